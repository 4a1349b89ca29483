import { onScopeDispose, ref, watch, type Ref } from 'vue'

/** The time in seconds, for ages; it stands still while the page is hidden. */
export function useClock(everyMs: () => number): Ref<number> {
  const now = ref(Date.now() / 1000)
  let timer: ReturnType<typeof setTimeout> | undefined

  function tick(): void {
    clearTimeout(timer)
    now.value = Date.now() / 1000
    if (!document.hidden) timer = setTimeout(tick, everyMs())
  }

  document.addEventListener('visibilitychange', tick)
  onScopeDispose(() => {
    clearTimeout(timer)
    document.removeEventListener('visibilitychange', tick)
  })
  watch(everyMs, tick)
  tick()
  return now
}
