import { fileURLToPath, URL } from 'node:url'

import ui from '@nuxt/ui/vite'
import vue from '@vitejs/plugin-vue'
import { defineConfig } from 'vitest/config'

export default defineConfig({
  plugins: [
    vue(),
    ui({
      colorMode: false,
      dts: false,
      icon: { clientBundle: { scan: true } },
      ui: {
        colors: { primary: 'blue', neutral: 'slate' },
        button: { slots: { base: 'cursor-pointer' } },
      },
    }),
  ],
  resolve: {
    alias: { '@': fileURLToPath(new URL('./src', import.meta.url)) },
  },
  server: {
    proxy: { '/api': { target: 'http://127.0.0.1:8420' } },
  },
  build: {
    target: 'es2022',
    // plotly is one chunk, loaded only where a chart is seen
    chunkSizeWarningLimit: 6000,
  },
  test: {
    environment: 'node',
    include: ['src/**/*.test.ts'],
  },
})
