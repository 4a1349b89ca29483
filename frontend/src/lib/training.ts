import type {
  MetricInfo,
  RevisionMark,
  StudentLayerState,
  TrainingWindow,
} from './api/schema'
import {
  baseLayout,
  bindingOf,
  hoverLabel,
  inside,
  type ChartContext,
  type Figure,
  type Json,
} from './figures'
import { markerLayout, type Marker } from './markers'
import { metricScale, type Palette } from './palette'
import { rangeOf } from './scale'
import { logRange, logTicks } from './ticks'
import type { Range } from './urlState'

type Cells = (number | null)[][]

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

function log10(cells: Cells): Cells {
  return cells.map((row) =>
    row.map((value) => (value !== null && value > 0 ? Math.log10(value) : null)),
  )
}

/** What a trace's `meta.bind` names, as `backend/figures/training.py` defines it. */
export function bound(expression: string, window: TrainingWindow): unknown[] {
  if (expression.startsWith('log10(')) return log10(bound(expression.slice(6, -1), window) as Cells)
  switch (expression) {
    case 'middle':
      return middles(window)
    case 'cells_x': {
      const middle = middles(window)
      return window.nonfinite.map(([, column]) => middle[column])
    }
    case 'cells_y':
      return window.nonfinite.map(([row]) => window.layers[row])
    case 'layers':
      return window.layers
    case 'heatmap':
      return window.heatmap ?? []
  }
  const [table, column = ''] = expression.split('.')
  const bands = window.bands as Record<string, unknown[]> | null
  if (table === 'bands' && bands) return bands[column] ?? []
  throw new Error(`no such column: ${expression}`)
}

function bindWindow(trace: Json, window: TrainingWindow): Json | null {
  const values = Object.fromEntries(
    Object.entries(bindingOf(trace)).map(([name, text]) => [name, bound(text, window)]),
  )
  const empty = Object.values(values).every((value) => value.length === 0)
  return empty && inside(trace, 'meta').optional === true ? null : { ...trace, ...values }
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

export interface TrainingInput {
  figure: Figure
  window: TrainingWindow
  metric: MetricInfo
  layer: string | null
  updates: Range | null
  marks: readonly RevisionMark[]
}

function markers(input: TrainingInput, context: ChartContext, margins: number) {
  const [from, to] = updateRange(input.updates, input.window)
  const known = new Map(context.markers.map((marker) => [marker.number, marker]))
  const placed = input.marks.flatMap((mark): Marker[] => {
    const marker = known.get(mark.revision)
    return marker ? [{ ...marker, step: mark.update }] : []
  })
  const pixels = Math.max(50, context.width - margins) / (to - from)
  return markerLayout(placed, context.palette, { from, to, pixels })
}

function updateAxis(input: TrainingInput, context: ChartContext, palette: Palette): Json {
  return {
    range: updateRange(input.updates, input.window),
    autorange: false,
    fixedrange: context.touch,
    showgrid: false,
    zeroline: false,
    tickformat: ',d',
    tickfont: { size: 10.5, color: palette.muted },
    ticks: 'outside',
    ticklen: 3,
    tickcolor: palette.axis,
    linecolor: palette.axis,
    nticks: Math.max(3, Math.floor(context.width / 90)),
  }
}

/** The layer × update map of the server's figure, in the page's colours. */
export function trainingHeatmap(input: TrainingInput, context: ChartContext): Figure {
  const { window, metric, figure } = input
  const { palette } = context
  const tick = { size: 10.5, color: palette.muted }
  const range = rangeOf(extremes(window.heatmap ?? [], metric.log), metric.log)
  const data = figure.data.flatMap((trace): Json[] => {
    const drawn = bindWindow(trace, window)
    if (!drawn) return []
    if (trace.type !== 'heatmap') {
      return [{ ...drawn, marker: { ...inside(drawn, 'marker'), color: palette.nonfinite } }]
    }
    return [
      {
        ...drawn,
        zmin: range.min,
        zmax: range.max,
        zauto: false,
        colorscale: metricScale(metric.direction),
        reversescale: false,
        colorbar: {
          thickness: 10,
          outlinewidth: 0,
          xpad: 4,
          ypad: 0,
          len: 1,
          tickvals: range.ticks,
          ticktext: range.labels,
          tickfont: tick,
          ticks: 'outside',
          ticklen: 3,
          tickcolor: palette.axis,
        },
      },
    ]
  })
  const row = input.layer === null ? -1 : window.layers.indexOf(input.layer)
  const chosen =
    row < 0
      ? []
      : [{
          type: 'rect', xref: 'paper', yref: 'y', x0: 0, x1: 1, y0: row - 0.5, y1: row + 0.5,
          line: { color: palette.selection, width: 1.5 },
        }]
  const margin = { l: 62, r: 56, t: 20, b: 24 }
  const marked = markers(input, context, margin.l + margin.r)
  const every = Math.max(
    1,
    Math.ceil((12.5 * window.layers.length) / Math.max(1, context.height - margin.t - margin.b)),
  )
  const tickvals = window.layers.map((_, index) => index).filter((index) => index % every === 0)
  return {
    data,
    layout: {
      ...figure.layout,
      ...baseLayout(context),
      margin,
      showlegend: false,
      hovermode: 'closest',
      xaxis: updateAxis(input, context, palette),
      yaxis: {
        type: 'category',
        categoryorder: 'array',
        categoryarray: window.layers,
        range: [window.layers.length - 0.5, -0.5],
        autorange: false,
        fixedrange: true,
        showgrid: false,
        zeroline: false,
        tickfont: tick,
        tickvals,
        ticktext: tickvals.map((index) => window.layers[index] ?? ''),
      },
      shapes: [...chosen, ...marked.shapes],
      annotations: marked.annotations,
    },
  }
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

/** Quantiles over the layers, with a line of the chosen layer. */
export function trainingBands(
  input: TrainingInput,
  line: TrainingWindow | null,
  context: ChartContext,
): Figure {
  const { window, metric, figure, layer } = input
  const { palette } = context
  const data = figure.data
    .map((trace) => bindWindow(trace, window))
    .filter((trace) => trace !== null)
    .map((trace): Json => ({ ...trace, hovertemplate: '%{y:.3~g}' }))
  if (line && layer !== null && line.layers[0] === layer) {
    data.push({
      type: 'scatter',
      mode: 'lines',
      name: layer,
      ...linePoints(line, 0),
      line: { color: palette.selection, width: 1.25 },
      hovertemplate: '%{y:.3~g}',
    })
  }
  const margin = { l: 48, r: 56, t: 18, b: 24 }
  const marked = markers(input, context, margin.l + margin.r)
  const covered = metric.log ? (context.y ?? logRange(data)) : context.y
  return {
    data,
    layout: {
      ...figure.layout,
      ...baseLayout(context),
      hoverlabel: hoverLabel(palette),
      margin,
      showlegend: false,
      hovermode: 'x unified',
      xaxis: updateAxis(input, context, palette),
      yaxis: {
        type: metric.log ? 'log' : 'linear',
        gridcolor: palette.grid,
        zeroline: false,
        tickfont: { size: 10.5, color: palette.muted },
        fixedrange: context.touch,
        nticks: 5,
        ...(covered ? { range: [...covered], autorange: false } : { autorange: true }),
        ...(metric.log && covered ? logTicks(covered) : {}),
      },
      shapes: marked.shapes,
      annotations: marked.annotations,
    },
  }
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
