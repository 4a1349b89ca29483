import type { MetricInfo } from './api/schema'
import { formatNumber } from './numbers'

/** Whether a metric's values are codes that stand for names. */
export function isCoded(metric: MetricInfo): boolean {
  return Object.keys(metric.names ?? {}).length > 0
}

/** A metric's value for a person: its name where the metric is a code. */
export function metricText(metric: MetricInfo, value: number | null): string {
  const name = value === null ? undefined : metric.names?.[String(value)]
  return name ?? [formatNumber(value), metric.unit].join(' ').trim()
}
