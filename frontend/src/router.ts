import { createRouter, createWebHistory } from 'vue-router'

import RunsPage from './pages/RunsPage.vue'

export const router = createRouter({
  history: createWebHistory(),
  routes: [
    { path: '/', name: 'runs', component: RunsPage, meta: { title: 'Runs' } },
    {
      path: '/runs/:id([0-9a-f]{32})',
      name: 'run',
      component: () => import('./pages/RunPage.vue'),
      meta: { title: 'Run' },
    },
    {
      path: '/:rest(.*)*',
      name: 'nowhere',
      component: () => import('./pages/NowherePage.vue'),
      meta: { title: 'Not found' },
    },
  ],
  scrollBehavior(to, from, saved) {
    if (saved) return saved
    return to.path === from.path ? false : { top: 0 }
  },
})

router.afterEach((to) => {
  document.title = `${to.meta.title as string} · AttnScope`
})
