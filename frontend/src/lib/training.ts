import type { StudentLayerState, TrainingWindow } from './api/schema'
import type { Range } from './urlState'

export type Cells = (number | null)[][]

/** The middle of each bucket, in update numbers. */
export function middles(window: TrainingWindow): number[] {
  return window.start.map((start) => start + (window.width - 1) / 2)
}

function upTo<T>(rows: T[][], length: number, fresh: T[][]): T[][] {
  return rows.map((row, index) => [...row.slice(0, length), ...(fresh[index] ?? [])])
}

/**
 * A window with its newest buckets taken in; null where they do not go together, so that the whole
 * must be asked for anew: another width, a layer that was not there, a gap between the two.
 */
export function mergeWindow(known: TrainingWindow, fresh: TrainingWindow): TrainingWindow | null {
  const [begin] = fresh.start
  if (begin === undefined) return { ...known, seq: fresh.seq }
  const same =
    known.width === fresh.width &&
    known.metric === fresh.metric &&
    known.layers.length === fresh.layers.length &&
    known.layers.every((layer, index) => layer === fresh.layers[index])
  const at = known.start.findIndex((start) => start >= begin)
  const kept = at < 0 ? known.start.length : at
  const last = known.start[kept - 1]
  if (!same || (last !== undefined && last + known.width !== begin)) return null
  if (last === undefined && known.start.length > 0 && known.start[0] !== begin) return null
  const merged: TrainingWindow = {
    ...fresh,
    start: [...known.start.slice(0, kept), ...fresh.start],
    counts: [...known.counts.slice(0, kept), ...fresh.counts],
    nonfinite: [
      ...known.nonfinite.filter(([, column]) => column < kept),
      ...fresh.nonfinite.map(([row, column, count]): [number, number, number] => [
        row,
        column + kept,
        count,
      ]),
    ],
  }
  if (known.heatmap && fresh.heatmap) merged.heatmap = upTo(known.heatmap, kept, fresh.heatmap)
  if (known.bands && fresh.bands) {
    const [a, b] = [known.bands, fresh.bands]
    const part = (name: 'p10' | 'p50' | 'p90' | 'low' | 'high') => [
      ...a[name].slice(0, kept),
      ...b[name],
    ]
    merged.bands = {
      p10: part('p10'),
      p50: part('p50'),
      p90: part('p90'),
      low: part('low'),
      high: part('high'),
      layers: [...a.layers.slice(0, kept), ...b.layers],
    }
  }
  if (known.lines && fresh.lines) {
    const [a, b] = [known.lines, fresh.lines]
    merged.lines = {
      low: upTo(a.low, kept, b.low),
      high: upTo(a.high, kept, b.high),
      first: upTo(a.first, kept, b.first),
      last: upTo(a.last, kept, b.last),
    }
  }
  return merged
}

/** From which update on something is new, as two summaries tell; null where nothing is. */
export function grownFrom(
  before: readonly StudentLayerState[],
  after: readonly StudentLayerState[],
): number | null {
  const known = new Map(before.map((layer) => [layer.layer, layer]))
  let from = Infinity
  for (const layer of after) {
    const old = known.get(layer.layer)
    if (old?.updates === layer.updates) continue
    const [last, now] = [old?.last_update ?? null, layer.last_update ?? 0]
    // set back, or never seen: everything of it may be new
    const next = last === null || now <= last ? 0 : last + 1
    from = Math.min(from, next)
  }
  return from < Infinity ? from : null
}

/** Range of update numbers on all charts: what was zoomed into, else the whole training. */
export function updateRange(updates: Range | null, window: TrainingWindow): Range {
  const last = Math.max(window.last_update, window.first_update + 1)
  return updates ?? [window.first_update - 0.5, last + 0.5]
}

/** The update numbers to ask for, where a range is zoomed into. */
export function wholeUpdates(updates: Range | null): { from: number; to: number } | null {
  if (!updates) return null
  const from = Math.max(0, Math.ceil(updates[0]))
  return { from, to: Math.max(from, Math.floor(updates[1])) }
}

export function extremes(cells: Cells, log: boolean): [number, number] | null {
  let least = Infinity
  let most = -Infinity
  for (const row of cells) {
    for (const value of row) {
      if (value === null || (log && value <= 0)) continue
      if (value < least) least = value
      if (value > most) most = value
    }
  }
  return least <= most ? [least, most] : null
}

/** A layer's own line through the first, least, largest and last value of each bucket. */
export function linePoints(window: TrainingWindow, row: number): { x: number[]; y: number[] } {
  const { lines, start, width } = window
  const x: number[] = []
  const y: number[] = []
  if (!lines) return { x, y }
  start.forEach((begin, column) => {
    const [first, low, high, last] = [lines.first, lines.low, lines.high, lines.last].map(
      (rows) => rows[row]?.[column] ?? null,
    )
    if (first == null || low == null || high == null || last == null) return
    if (low === high) {
      x.push(begin + (width - 1) / 2)
      y.push(first)
      return
    }
    const end = begin + width - 1
    const third = (width - 1) / 3
    // the extreme that is nearer to the first value is taken to have come first
    const rises = Math.abs(first - low) <= Math.abs(first - high)
    x.push(begin, begin + third, end - third, end)
    y.push(first, rises ? low : high, rises ? high : low, last)
  })
  return { x, y }
}

/** How a value stands between two others, as a part of 1; on a log scale by its logarithm. */
export function part(value: number, [least, most]: [number, number], log: boolean): number {
  const scale = (number: number) => (log ? Math.log10(Math.max(number, 1e-38)) : number)
  const span = scale(most) - scale(least)
  return span > 0 ? Math.min(1, Math.max(0, (scale(value) - scale(least)) / span)) : 0.5
}

/** A layer's line as an SVG path in a box of 100 × 100. */
export function linePath(
  window: TrainingWindow,
  row: number,
  updates: Range,
  values: [number, number],
  log: boolean,
): string {
  const { x, y } = linePoints(window, row)
  const [from, to] = updates
  const points = x.flatMap((at, index) => {
    const value = y[index] ?? NaN
    if (log && value <= 0) return []
    const across = ((at - from) / (to - from)) * 100
    return [`${across.toFixed(2)} ${((1 - part(value, values, log)) * 100).toFixed(2)}`]
  })
  return points.length > 0 ? `M${points.join('L')}` : ''
}

export interface Stretch {
  /** In percent of the axis. */
  left: number
  width: number
  title: string
}

/** When a layer was ready, as stretches of an axis of updates. */
export function readyStretches(layer: StudentLayerState, [from, to]: Range): Stretch[] {
  return layer.intervals.flatMap((item) => {
    const end = item.to_update ?? Math.max(layer.last_update ?? 0, item.from_update + 1)
    const [a, b] = [Math.max(from, item.from_update), Math.min(to, end)]
    if (b < a) return []
    const until = item.to_update === null ? '' : ` to ${item.to_update}`
    return [
      {
        left: ((a - from) / (to - from)) * 100,
        width: Math.max(0.5, ((b - a) / (to - from)) * 100),
        title: `ready from update ${item.from_update}${until}`,
      },
    ]
  })
}
