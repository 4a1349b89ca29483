import { computed, ref, watch } from 'vue'

import type { Theme } from '../lib/palette'

export type ThemeChoice = Theme | 'system'

const KEY = 'attnscope.theme'

function stored(): ThemeChoice {
  const value = localStorage.getItem(KEY)
  return value === 'light' || value === 'dark' ? value : 'system'
}

const choice = ref<ThemeChoice>(stored())
const systemDark = matchMedia('(prefers-color-scheme: dark)')
const system = ref<Theme>(systemDark.matches ? 'dark' : 'light')
systemDark.addEventListener('change', (event) => (system.value = event.matches ? 'dark' : 'light'))

const theme = computed<Theme>(() => (choice.value === 'system' ? system.value : choice.value))

watch(choice, (value) => {
  if (value === 'system') localStorage.removeItem(KEY)
  else localStorage.setItem(KEY, value)
})
watch(
  theme,
  (value) => {
    document.documentElement.classList.toggle('dark', value === 'dark')
    document.documentElement.classList.toggle('light', value === 'light')
  },
  { immediate: true },
)

export function useTheme() {
  return { choice, theme }
}
