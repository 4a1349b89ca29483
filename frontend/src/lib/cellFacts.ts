import type { MetricInfo } from './api/schema'
import { CELL_TITLES, Cell, cellKind } from './cells'
import type { RunColumns } from './columns'
import { isCoded, metricText } from './metrics'
import { formatNumber, formatShare } from './numbers'
import type { ReasonBook } from './reasons'

export interface CellFacts {
  layer: string
  step: number
  sigma: string
  metric: string
  value: string
  path: string
  /** What a router promised and what coded metrics say, in words; not the metric that is shown. */
  notes: string[]
  reasons: { name: string; prose: string; detail: string }[]
}

const REASON_VERBS = { gate: 'Gated', fallback: 'Fell back', choice: 'Chosen' } as const

/** What a router promised of the cell, in words; nothing where none did. */
function promise(predicted: number | null, share: number | null): string[] {
  if (predicted === null) return []
  const part = share === null ? '' : `, ${formatShare(share)} of the layer's budget`
  return [`predicted NMSE up to ${formatNumber(predicted)}${part}`]
}

/** All there is to say of one cell of the map; null where the step has not closed. */
export function cellFacts(
  columns: RunColumns,
  book: ReasonBook,
  metric: MetricInfo | null,
  metrics: readonly MetricInfo[],
  prose: (reason: string) => string,
  layer: string,
  step: number,
): CellFacts | null {
  const index = columns.indexOfStep(step)
  if (index < 0 || columns.row(layer) < 0) return null
  const rows = book.at(step, layer)
  const path = columns.path(layer, index)
  const kind = cellKind(path, rows)
  const valueOf = ({ name }: MetricInfo) => columns.value(name, layer, index)
  const coded = metrics.filter(
    (item) => isCoded(item) && item.name !== metric?.name && valueOf(item) !== null,
  )
  return {
    layer,
    step,
    sigma: formatNumber(columns.numbers.get('sigma')?.get(index)),
    metric: metric?.title ?? '',
    value: metric ? metricText(metric, valueOf(metric)) : '',
    path: kind === Cell.Ran ? `${path} ran` : CELL_TITLES[kind],
    notes: [
      ...promise(
        columns.value('predicted_nmse', layer, index),
        columns.value('budget_share', layer, index),
      ),
      ...coded.map((item) => `${item.title} ${metricText(item, valueOf(item))}`),
    ],
    reasons: rows.map((row) => ({
      name: row.reason,
      prose: `${REASON_VERBS[row.kind]}${row.count > 1 ? ` ×${row.count}` : ''}: ${prose(row.reason)}`,
      detail: row.detail,
    })),
  }
}
