import { shallowRef, watch, type Ref, type ShallowRef } from 'vue'
import { useRoute, useRouter } from 'vue-router'

import type { Query } from '../lib/urlState'

/**
 * The state of a page, mirrored to its address: what is put in stands there at once, and a changed
 * address (back, a pasted link) changes the page.
 */
export function useView<T>(
  read: (query: Query) => T,
  write: (view: T) => Record<string, string>,
): { view: Readonly<Ref<T>>; change: (part: Partial<T>) => void } {
  const route = useRoute()
  const router = useRouter()
  const path = route.path
  const view = shallowRef(read(route.query)) as ShallowRef<T>

  watch(
    () => route.query,
    (query) => {
      // On the way to another page the address changes before this one is gone.
      if (route.path !== path) return
      const next: T = read(query)
      if (JSON.stringify(next) !== JSON.stringify(view.value)) view.value = next
    },
  )

  return {
    view,
    change(part) {
      view.value = { ...view.value, ...part }
      void router.replace({ query: write(view.value), hash: route.hash })
    },
  }
}
