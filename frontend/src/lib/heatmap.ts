import type { MetricInfo } from './api/schema'
import { Cell, CELL_KINDS, nonFinite, pathCodes } from './cells'
import type { RunColumns } from './columns'
import {
  baseLayout,
  bindTrace,
  inside,
  stepRange,
  stepScale,
  type ChartContext,
  type Figure,
  type Json,
} from './figures'
import { markerLayout } from './markers'
import { isCoded } from './metrics'
import { flatScale, metricScale, type Palette } from './palette'
import type { ReasonBook } from './reasons'
import { codeRange, colorRange } from './scale'

/** The name under which the map shows how each output came about rather than a metric. */
export const PATH_VIEW = 'path'

/** More marks than this would cost a redraw more than they tell; the cell's colour says it too. */
const MOST_MARKS = 400

export interface HeatmapInput {
  columns: RunColumns
  reasons: ReasonBook
  metric: MetricInfo | null
  /** The server's figure of the metric. */
  figure: Figure | null
  layer: string | null
  step: number | null
}

export function cellColors(palette: Palette): string[] {
  const colors = new Array<string>(CELL_KINDS)
  colors[Cell.Unmeasured] = palette.unmeasured
  colors[Cell.Ran] = palette.ran
  colors[Cell.Exact] = palette.gated
  colors[Cell.Gated] = palette.gated
  colors[Cell.Fallback] = palette.fallback
  colors[Cell.Mixed] = palette.mixed
  colors[Cell.NonFinite] = palette.nonfinite
  return colors
}

function cells(codes: Uint8Array[], columns: RunColumns, colors: string[]): Json {
  return {
    type: 'heatmap',
    name: 'path',
    x: columns.column('steps.step') ?? [],
    y: columns.layers,
    z: codes,
    zmin: -0.5,
    zmax: CELL_KINDS - 0.5,
    zauto: false,
    colorscale: flatScale(colors),
    showscale: false,
    hoverinfo: 'none',
  }
}

/** The metric's cells as the server defines them, with colours that hold still. */
function numbers(trace: Json, input: HeatmapInput, metric: MetricInfo, palette: Palette): Json {
  const { columns } = input
  const rows = columns.metric(metric.name)
  const range = isCoded(metric)
    ? codeRange(metric.names ?? {})
    : colorRange(rows, columns.length, metric.log)
  return {
    ...trace,
    zmin: range.min,
    zmax: range.max,
    zauto: false,
    colorscale: metricScale(metric.direction),
    reversescale: false,
    xgap: 0,
    ygap: 0,
    hoverinfo: 'none',
    hovertemplate: undefined,
    colorbar: {
      thickness: 10,
      outlinewidth: 0,
      xpad: 4,
      ypad: 0,
      len: 1,
      tickvals: range.ticks,
      ticktext: range.labels,
      tickfont: { size: 10.5, color: palette.muted },
      ticklen: 3,
      ticks: 'outside',
      tickcolor: palette.axis,
    },
  }
}

function marks(trace: Json, palette: Palette): Json {
  const first = (values: unknown): unknown[] => Array.isArray(values) ? (values as unknown[]).slice(0, MOST_MARKS) : []
  const marker = inside(trace, 'marker')
  return {
    ...trace,
    x: first(trace.x),
    y: first(trace.y),
    marker: { ...marker, size: 7, color: palette.panel, line: { width: 1, color: palette.panel } },
    hoverinfo: 'skip',
    hovertemplate: undefined,
  }
}

function metricTraces(input: HeatmapInput, metric: MetricInfo, palette: Palette): Json[] {
  const traces = input.figure?.data ?? []
  return traces.flatMap((trace) => {
    const bound = bindTrace(trace, input.columns, ['x', 'y', 'z'])
    if (!bound) return []
    return trace.type === 'heatmap'
      ? [numbers(bound, input, metric, palette)]
      : [marks(bound, palette)]
  })
}

function selection(input: HeatmapInput, palette: Palette): Json[] {
  const row = input.layer === null ? -1 : input.columns.row(input.layer)
  const line = { color: palette.selection, width: 1.5 }
  const shapes: Json[] = []
  if (row >= 0) {
    shapes.push({
      type: 'rect', xref: 'paper', yref: 'y', x0: 0, x1: 1, y0: row - 0.5, y1: row + 0.5, line,
    })
    if (input.step !== null) {
      const x0 = input.step - 0.5
      shapes.push({
        type: 'rect', xref: 'x', yref: 'y', x0, x1: x0 + 1, y0: row - 0.5, y1: row + 0.5,
        line: { ...line, width: 2.5 },
      })
    }
  }
  return shapes
}

/** Labels of rows, as many as there is room for. */
function rowTicks(layers: readonly string[], height: number, visible: number): Json {
  const every = Math.max(1, Math.ceil((12.5 * visible) / Math.max(1, height)))
  const tickvals = layers.map((_, row) => row).filter((row) => row % every === 0)
  return { tickvals, ticktext: tickvals.map((row) => layers[row] ?? '') }
}

/** The step × layer map: how each output came about below, the metric's colours above it. */
export function heatmapFigure(input: HeatmapInput, context: ChartContext): Figure {
  const { columns, metric } = input
  const { palette } = context
  const codes = pathCodes(columns, input.reasons)
  if (metric) {
    for (const { index, row } of nonFinite(columns, metric.name)) {
      const line = codes[row]
      if (line) line[index] = Cell.NonFinite
    }
  }
  const data = [cells(codes, columns, cellColors(palette))]
  if (metric) data.push(...metricTraces(input, metric, palette))
  const margin = { l: 62, r: metric ? (isCoded(metric) ? 84 : 52) : 8, t: 20, b: 34 }
  const rows = Math.max(1, columns.layers.length)
  const y = context.y ?? [-0.5, rows - 0.5]
  const markers = markerLayout(
    context.markers,
    palette,
    stepScale(context, margin.l + margin.r),
  )
  const tick = { size: 10.5, color: palette.muted }
  return {
    data,
    layout: {
      ...baseLayout(context),
      margin,
      showlegend: false,
      hovermode: 'closest',
      xaxis: {
        range: stepRange(context),
        autorange: false,
        fixedrange: context.touch,
        showgrid: false,
        zeroline: false,
        tickformat: 'd',
        tickfont: tick,
        ticks: 'outside',
        ticklen: 3,
        tickcolor: palette.axis,
        nticks: Math.max(3, Math.floor(context.width / 60)),
        title: { text: 'step', font: tick, standoff: 4 },
      },
      yaxis: {
        type: 'category',
        categoryorder: 'array',
        categoryarray: columns.layers,
        range: [y[1], y[0]],
        autorange: false,
        fixedrange: context.touch,
        showgrid: false,
        zeroline: false,
        tickfont: tick,
        ...rowTicks(columns.layers, context.height - margin.t - margin.b, y[1] - y[0]),
      },
      shapes: [...selection(input, palette), ...markers.shapes],
      annotations: markers.annotations,
    },
  }
}
