import { evaluate, UnknownColumn, type Value } from './binding'
import type { RunColumns } from './columns'
import type { Marker } from './markers'
import { markerLayout, type StepScale } from './markers'
import type { Palette } from './palette'
import { logRange, logTicks } from './ticks'
import type { Range } from './urlState'

export type Json = Record<string, unknown>
export interface Figure {
  data: Json[]
  layout: Json
}

function isJson(value: unknown): value is Json {
  return typeof value === 'object' && value !== null && !Array.isArray(value)
}

export function inside(parent: Json, key: string): Json {
  const value = parent[key]
  return isJson(value) ? value : {}
}

/** What a trace draws: attribute → expression, as the server's figure says. */
export function bindingOf(trace: Json): Record<string, string> {
  const bind = inside(inside(trace, 'meta'), 'bind')
  return Object.fromEntries(
    Object.entries(bind).filter((entry): entry is [string, string] => typeof entry[1] === 'string'),
  )
}

/**
 * A trace with a run's numbers; null where the run has no such column, or where it would show
 * something only in cases that did not occur.
 */
export function bindTrace(
  trace: Json,
  columns: RunColumns,
  attributes: readonly string[] = ['x', 'y', 'z', 'text', 'customdata'],
): Json | null {
  const values: Record<string, Value> = {}
  try {
    for (const [attribute, expression] of Object.entries(bindingOf(trace))) {
      if (attributes.includes(attribute)) values[attribute] = evaluate(expression, columns)
    }
  } catch (error) {
    if (error instanceof UnknownColumn) return null
    throw error
  }
  const optional = inside(trace, 'meta').optional === true
  if (optional && Object.values(values).every((value) => value.length === 0)) return null
  return { ...trace, ...values }
}

export function wantsMarkers(figure: Figure): boolean {
  return inside(figure.layout, 'meta').markers === true
}

function axis(palette: Palette, given: Json, extra: Json): Json {
  return {
    automargin: false,
    ...given,
    gridcolor: palette.grid,
    linecolor: palette.axis,
    tickcolor: palette.axis,
    zerolinecolor: palette.axis,
    zeroline: false,
    ticks: 'outside',
    ticklen: 3,
    tickfont: { size: 10.5, color: palette.muted },
    ...extra,
  }
}

export function hoverLabel(palette: Palette): Json {
  return {
    bgcolor: palette.panel,
    bordercolor: palette.axis,
    font: { color: palette.text, size: 11.5, family: FONT },
    align: 'left',
  }
}

export const FONT = "'Inter Variable', ui-sans-serif, system-ui, sans-serif"

/** All that a chart adds to a figure of the server: its theme, its view and the run's markers. */
export interface ChartContext {
  palette: Palette
  markers: readonly Marker[]
  /** Steps on the axis while nobody has zoomed. */
  steps: number
  x: Range | null
  y: Range | null
  width: number
  height: number
  version: number
  touch: boolean
  /** Keeps what plotly itself holds for the user, such as a hidden trace. */
  uirevision: string
}

/** Range of the step axis: the whole schedule from the start, so that it need not move. */
export function stepRange(context: { x: Range | null; steps: number }): Range {
  return context.x ?? [-0.5, Math.max(1, context.steps) - 0.5]
}

export function baseLayout(context: ChartContext): Json {
  return {
    autosize: false,
    width: context.width,
    height: context.height,
    paper_bgcolor: 'rgba(0,0,0,0)',
    plot_bgcolor: 'rgba(0,0,0,0)',
    font: { family: FONT, size: 11, color: context.palette.text },
    hoverlabel: hoverLabel(context.palette),
    dragmode: context.touch ? false : 'zoom',
    uirevision: context.uirevision,
    datarevision: context.version,
    separators: '.\u202f',
  }
}

/** Where steps stand, for the labels of markers. */
export function stepScale(context: ChartContext, margins: number): StepScale {
  const [from, to] = stepRange(context)
  return { from, to, pixels: Math.max(50, context.width - margins) / (to - from) }
}

/** With more steps, dots on a line cost more than they tell. */
const MOST_DOTS = 24

/** The same trace at the size of a card. */
function quiet(trace: Json, steps: number): Json {
  if (trace.type !== 'scatter') return trace
  const marker = inside(trace, 'marker')
  if (trace.mode === 'markers') return { ...trace, marker: { ...marker, size: 7 } }
  return {
    ...trace,
    mode: steps > MOST_DOTS ? 'lines' : 'lines+markers',
    line: { ...inside(trace, 'line'), width: 1.75 },
    marker: { ...marker, size: 3.5 },
  }
}

/** Shapes of the figure itself, their words at the size of a card. */
function ownShapes(figure: Figure): Json[] {
  const shapes = Array.isArray(figure.layout.shapes) ? figure.layout.shapes.filter(isJson) : []
  return shapes.map((shape) => ({ ...shape, label: undefined }))
}

/** A line chart over steps, from a figure of the server. */
export function lineFigure(figure: Figure, columns: RunColumns, context: ChartContext): Figure {
  const { palette } = context
  const left = 46
  const markers = wantsMarkers(figure)
    ? markerLayout(context.markers, palette, stepScale(context, left + 8))
    : { shapes: [], annotations: [] }
  const data = figure.data
    .map((trace) => bindTrace(trace, columns))
    .filter((trace) => trace !== null)
    .map((trace) => quiet(trace, columns.length))
  const given = inside(figure.layout, 'yaxis')
  const covered = given.type === 'log' ? (context.y ?? logRange(data)) : context.y
  const logarithmic = given.type === 'log' && covered ? logTicks(covered) : {}
  return {
    data,
    layout: {
      ...figure.layout,
      ...baseLayout(context),
      margin: { l: left, r: 8, t: markers.annotations.length > 0 ? 18 : 8, b: 26 },
      showlegend: false,
      hovermode: 'x unified',
      bargap: 0.15,
      xaxis: axis(palette, inside(figure.layout, 'xaxis'), {
        title: undefined,
        range: stepRange(context),
        autorange: false,
        fixedrange: context.touch,
        showgrid: false,
        tickformat: 'd',
        nticks: Math.max(3, Math.floor(context.width / 70)),
      }),
      yaxis: axis(palette, given, {
        title: undefined,
        ...(covered ? { range: [...covered], autorange: false } : { autorange: true }),
        ...logarithmic,
        fixedrange: context.touch,
        nticks: 5,
        dtick: undefined,
        exponentformat: 'power',
        showexponent: 'all',
      }),
      shapes: [...ownShapes(figure), ...markers.shapes],
      annotations: markers.annotations,
    },
  }
}

/** The user's new ranges in a `plotly_relayout` event; null means back to all. */
export function relayoutRanges(event: Json): { x?: Range | null; y?: Range | null } {
  const ranges: { x?: Range | null; y?: Range | null } = {}
  for (const name of ['x', 'y'] as const) {
    const from = event[`${name}axis.range[0]`]
    const to = event[`${name}axis.range[1]`]
    if (typeof from === 'number' && typeof to === 'number') {
      ranges[name] = from < to ? [from, to] : [to, from]
    } else if (event[`${name}axis.autorange`] === true) ranges[name] = null
  }
  return ranges
}
