import type { RunColumns } from './columns'
import type { ReasonBook } from './reasons'

/** What a cell of the step × layer map stands for, apart from its number. */
export enum Cell {
  Unmeasured = 0,
  Ran = 1,
  Exact = 2,
  Gated = 3,
  Fallback = 4,
  Mixed = 5,
  NonFinite = 6,
}

export const CELL_KINDS = 7

export const CELL_TITLES: Record<Cell, string> = {
  [Cell.Unmeasured]: 'not measured',
  [Cell.Ran]: 'variant ran',
  [Cell.Exact]: 'exact',
  [Cell.Gated]: 'gated',
  [Cell.Fallback]: 'fell back',
  [Cell.Mixed]: 'mixed',
  [Cell.NonFinite]: 'NaN or infinite',
}

/** How a layer's output came about at a step. */
export function cellKind(path: string | null, reasons: readonly { kind: string }[]): Cell {
  if (path === null) return Cell.Unmeasured
  if (path === 'mixed') return Cell.Mixed
  if (path !== 'exact') return Cell.Ran
  if (reasons.some((row) => row.kind === 'fallback')) return Cell.Fallback
  return reasons.length > 0 ? Cell.Gated : Cell.Exact
}

/** The kinds of all cells, one row per layer. */
export function pathCodes(columns: RunColumns, book: ReasonBook): Uint8Array[] {
  const steps = Array.from({ length: columns.length }, (_, index) =>
    book.ofStep(columns.step(index)),
  )
  return columns.layers.map((layer, row) => {
    const paths = columns.paths[row] ?? []
    const codes = new Uint8Array(columns.length)
    for (let index = 0; index < codes.length; index += 1) {
      codes[index] = cellKind(paths[index] ?? null, steps[index]?.get(layer) ?? [])
    }
    return codes
  })
}

/** Positions of the values that are no number: where a map needs a mark. */
export function nonFinite(columns: RunColumns, metric: string): { index: number; row: number }[] {
  const found: { index: number; row: number }[] = []
  columns.metric(metric).forEach((series, row) => {
    for (let index = 0; index < columns.length; index += 1) {
      if (series.known[index] && !Number.isFinite(series.values[index])) found.push({ index, row })
    }
  })
  return found
}
