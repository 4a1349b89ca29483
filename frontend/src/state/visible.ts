import { onBeforeUnmount, onMounted, ref, type Ref } from 'vue'

/** Whether an element stands on the screen, or a little beside it. */
export function useVisible(element: Readonly<Ref<Element | null>>): Readonly<Ref<boolean>> {
  const visible = ref(false)
  const observer = new IntersectionObserver(
    ([entry]) => (visible.value = entry?.isIntersecting ?? false),
    { rootMargin: '120px' },
  )
  onMounted(() => element.value && observer.observe(element.value))
  onBeforeUnmount(() => observer.disconnect())
  return visible
}
