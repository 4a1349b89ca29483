import { shallowRef } from 'vue'

import { request } from '../lib/api/client'
import type { MetricInfo, MetricInfos, VariantSchema, VariantSchemas } from '../lib/api/schema'

const variants = shallowRef<VariantSchemas | null>(null)
const metrics = shallowRef<MetricInfos | null>(null)

/** What does not change while the server runs: asked for once. */
export async function loadSchema(): Promise<void> {
  if (variants.value && metrics.value) return
  const [first, second] = await Promise.all([
    request<VariantSchemas>('/schema/variants'),
    request<MetricInfos>('/schema/metrics'),
  ])
  variants.value = first
  metrics.value = second
}

export function useSchema() {
  return {
    variants,
    metrics,
    variant: (name: string): VariantSchema | undefined =>
      variants.value?.variants.find((item) => item.name === name),
    metric: (name: string): MetricInfo | undefined =>
      metrics.value?.metrics.find((item) => item.name === name),
    training: (name: string): MetricInfo | undefined =>
      metrics.value?.training.find((item) => item.name === name),
    studentEvent: (name: string): string => metrics.value?.student_events[name] ?? name,
    reason: (name: string): string => metrics.value?.reasons[name] ?? name,
  }
}
