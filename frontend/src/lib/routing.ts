import type { RunColumns } from './columns'
import type { ReasonBook } from './reasons'

/** What a router did with a layer at a step, and why. */
export interface RoutedCell {
  layer: string
  step: number
  sigma: number | null
  path: string
  predicted_nmse: number | null
  budget_share: number | null
  nmse: number | null
  attn_ms: number | null
  reason: string | null
  detail: string
}

/** Steps in a row at which a layer ran the same for the same reason. */
export interface Route {
  layer: string
  first: number
  last: number
  sigmas: [number | null, number | null]
  path: string
  /** Largest over the steps. */
  predicted: number | null
  share: number | null
  nmse: number | null
  /** Mean over the steps. */
  ms: number | null
  reason: string | null
  /** Of the last step. */
  detail: string
}

/** Every layer at every closed step, layer by layer. */
export function routedCells(columns: RunColumns, book: ReasonBook): RoutedCell[] {
  const cells: RoutedCell[] = []
  for (const layer of columns.layers) {
    for (let index = 0; index < columns.length; index += 1) {
      const path = columns.path(layer, index)
      if (path === null) continue
      const step = columns.step(index)
      const row = book.at(step, layer)[0]
      cells.push({
        layer,
        step,
        sigma: columns.numbers.get('sigma')?.get(index) ?? null,
        path,
        predicted_nmse: columns.value('predicted_nmse', layer, index),
        budget_share: columns.value('budget_share', layer, index),
        nmse: columns.value('nmse', layer, index),
        attn_ms: columns.value('attn_ms', layer, index),
        reason: row?.reason ?? null,
        detail: row?.detail ?? '',
      })
    }
  }
  return cells
}

function largest(cells: readonly RoutedCell[], of: (cell: RoutedCell) => number | null) {
  const known = cells.map(of).filter((value) => value !== null)
  return known.length > 0 ? Math.max(...known) : null
}

function route(cells: readonly [RoutedCell, ...RoutedCell[]]): Route {
  const first = cells[0]
  const last = cells[cells.length - 1] ?? first
  const times = cells.map((cell) => cell.attn_ms).filter((value) => value !== null)
  return {
    layer: first.layer,
    first: first.step,
    last: last.step,
    sigmas: [first.sigma, last.sigma],
    path: first.path,
    predicted: largest(cells, (cell) => cell.predicted_nmse),
    share: largest(cells, (cell) => cell.budget_share),
    nmse: largest(cells, (cell) => cell.nmse),
    ms: times.length > 0 ? times.reduce((sum, value) => sum + value, 0) / times.length : null,
    reason: last.reason,
    detail: last.detail,
  }
}

/** The cells in as few rows as say the same. */
export function routes(cells: readonly RoutedCell[]): Route[] {
  const found: Route[] = []
  let group: [RoutedCell, ...RoutedCell[]] | null = null
  for (const cell of cells) {
    const before = group?.[0]
    const same =
      before?.layer === cell.layer && before.path === cell.path && before.reason === cell.reason
    if (group && same) group.push(cell)
    else {
      if (group) found.push(route(group))
      group = [cell]
    }
  }
  if (group) found.push(route(group))
  return found
}

/** The cells as a file; what is no number is spelled out, since JSON has none for it. */
export function routingFile(runId: string, cells: readonly RoutedCell[]): string {
  const spelled = (_: string, value: unknown) =>
    typeof value === 'number' && !Number.isFinite(value) ? String(value) : value
  return JSON.stringify({ run_id: runId, cells }, spelled, 1)
}
