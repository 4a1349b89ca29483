import { pathsOf } from './binding'
import type { RunColumns } from './columns'
import { bindingOf, inside, type Figure, type Json } from './figures'
import { formatDuration, formatNumber, formatShare } from './numbers'

export interface CardKind {
  /** Name of the server's figure. */
  figure: 'quality' | 'fallbacks' | 'time' | 'qk'
  title: string
  hint: string
  /** The metric of the chosen layer that is drawn beside the figure's lines. */
  metric: string | null
  /** Columns of a step to write out where the figure's lines don't name them. */
  readings?: [column: string, name: string][]
}

export const CARDS: CardKind[] = [
  {
    figure: 'quality',
    title: 'Quality',
    hint: 'NMSE over the layers of each step',
    metric: 'nmse',
  },
  {
    figure: 'fallbacks',
    title: 'Fallbacks',
    hint: 'Calls that ran exactly, by reason: fallbacks filled, gates hatched',
    metric: null,
    readings: [
      ['fallback_share', 'fell back'],
      ['gated_share', 'gated'],
    ],
  },
  {
    figure: 'time',
    title: 'Time per step',
    hint: 'Sum over the layers of each step',
    metric: null,
  },
  {
    figure: 'qk',
    title: 'q·k range',
    hint: 'Sampled scaled logits over the layers',
    metric: 'qk_std',
  },
]

export function formatColumn(name: string, value: number | null): string {
  if (name.endsWith('_share') || name.endsWith('_frac')) return formatShare(value)
  return name.endsWith('_ms') ? formatDuration(value) : formatNumber(value)
}

export interface Reading {
  name: string
  value: string
  note: string
  color: string | null
}

function reading(columns: RunColumns, column: string, name: string, color: string | null): Reading {
  const last = columns.length - 1
  const value = last < 0 ? null : (columns.numbers.get(column)?.get(last) ?? null)
  const layer = column === 'nmse_worst' ? columns.texts.get('worst_layer')?.[last] : undefined
  return { name, value: formatColumn(column, value), note: layer ?? '', color }
}

/** The newest value of each line of a figure, which serves as its legend too. */
export function readings(card: CardKind, figure: Figure, columns: RunColumns): Reading[] {
  if (card.readings) {
    return card.readings.map(([column, name]) => reading(columns, column, name, null))
  }
  return figure.data.flatMap((trace) => {
    const [path = ''] = pathsOf(bindingOf(trace).y ?? '')
    if (trace.mode === 'markers' || !path.startsWith('steps.')) return []
    const name = typeof trace.name === 'string' ? trace.name : path
    const { color } = inside(trace, 'line')
    // "1st percentile, least layer": the card's hint says the rest
    const short = name.split(',')[0] ?? name
    return [reading(columns, path.slice(6), short, typeof color === 'string' ? color : null)]
  })
}

/** The colour of each reason in the figure, by `fallback.<reason>` and `gate.<reason>`. */
export function reasonColors(figure: Figure | null): Record<string, string> {
  const colors: Record<string, string> = {}
  for (const trace of figure?.data ?? []) {
    const [path = ''] = pathsOf(bindingOf(trace).y ?? '')
    const { color } = inside(trace, 'marker')
    if (path.startsWith('reasons.') && typeof color === 'string') colors[path.slice(8)] = color
  }
  return colors
}

/** The chosen layer's own line. */
export function layerTrace(columns: RunColumns, metric: string, layer: string, color: string): Json {
  const series = columns.metric(metric)[columns.row(layer)]
  return {
    type: 'scatter',
    mode: 'lines',
    name: layer,
    x: columns.column('steps.step') ?? [],
    y: series?.view(columns.length) ?? [],
    line: { color, width: 1.5, dash: 'dash' },
  }
}
