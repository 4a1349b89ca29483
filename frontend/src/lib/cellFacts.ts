import type { MetricInfo } from './api/schema'
import { CELL_TITLES, Cell, cellKind } from './cells'
import type { RunColumns } from './columns'
import { formatNumber } from './numbers'
import type { ReasonBook } from './reasons'

export interface CellFacts {
  layer: string
  step: number
  sigma: string
  metric: string
  value: string
  path: string
  reasons: { name: string; prose: string; detail: string }[]
}

/** All there is to say of one cell of the map; null where the step has not closed. */
export function cellFacts(
  columns: RunColumns,
  book: ReasonBook,
  metric: MetricInfo | null,
  prose: (reason: string) => string,
  layer: string,
  step: number,
): CellFacts | null {
  const index = columns.indexOfStep(step)
  if (index < 0 || columns.row(layer) < 0) return null
  const rows = book.at(step, layer)
  const path = columns.path(layer, index)
  const kind = cellKind(path, rows)
  return {
    layer,
    step,
    sigma: formatNumber(columns.numbers.get('sigma')?.get(index)),
    metric: metric?.title ?? '',
    value: metric
      ? [formatNumber(columns.value(metric.name, layer, index)), metric.unit].join(' ').trim()
      : '',
    path: kind === Cell.Ran ? `${path} ran` : CELL_TITLES[kind],
    reasons: rows.map((row) => ({
      name: row.reason,
      prose: `${row.kind === 'gate' ? 'Gated' : 'Fell back'}${row.count > 1 ? ` ×${row.count}` : ''}: ${prose(row.reason)}`,
      detail: row.detail,
    })),
  }
}
