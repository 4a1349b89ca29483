import type { MetricInfo, RevisionMark, TrainingWindow } from './api/schema'
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
import { extremes, linePoints, middles, updateRange, type Cells } from './training'
import type { Range } from './urlState'

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
  // the map's own edges, its colour bar included
  const margin = { l: 62, r: 74, t: 18, b: 24 }
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
