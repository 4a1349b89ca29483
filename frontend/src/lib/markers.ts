import type { Annotations, Shape } from 'plotly.js'

import type { Revision } from './api/schema'
import { formatSetting } from './numbers'
import type { Palette } from './palette'

export interface Marker {
  number: number
  step: number
  label: string
  hover: string
}

function changeList(revision: Revision): [string, string, string][] {
  return Object.entries(revision.changes).map(([name, [before, after]]) => [
    name,
    formatSetting(before),
    formatSetting(after),
  ])
}

/** Revisions that the sampler took up after its start, as a chart shows them. */
export function markersOf(revisions: readonly Revision[]): Marker[] {
  return revisions
    .filter((item) => item.number > 0 && item.applied_step !== null)
    .map((item) => {
      const changes = changeList(item)
      const [first] = changes
      const label =
        first && changes.length === 1
          ? `r${item.number} ${first[0]} ${first[1]}→${first[2]}`
          : `r${item.number} · ${changes.length} changes`
      const lines = changes.map(([name, before, after]) => `${name}: ${before} → ${after}`)
      return {
        number: item.number,
        step: item.applied_step ?? 0,
        label,
        hover: [`Revision ${item.number}, from step ${item.applied_step}`, ...lines].join('<br>'),
      }
    })
    .sort((a, b) => a.step - b.step)
}

export interface MarkerLayout {
  shapes: Partial<Shape>[]
  annotations: Partial<Annotations>[]
}

/** Where steps stand on a chart. */
export interface StepScale {
  /** Range of the axis, and pixels between two steps. */
  from: number
  to: number
  pixels: number
}

const LETTER_PIXELS = 5.6

/** The words of each marker that fit before the next one; empty where not even a number fits. */
export function markerLabels(markers: readonly Marker[], scale: StepScale): string[] {
  return markers.map((marker, index) => {
    const next = markers[index + 1]
    const end = next ? next.step : scale.to + 0.5
    const room = (end - marker.step) * scale.pixels
    const fits = (text: string) => text.length * LETTER_PIXELS <= room
    const short = `r${marker.number}`
    return fits(marker.label) ? marker.label : fits(short) ? short : ''
  })
}

/** A line between the last step of the old settings and the first of the new ones. */
export function markerLayout(
  markers: readonly Marker[],
  palette: Palette,
  scale: StepScale,
): MarkerLayout {
  const seen = markers.filter(({ step }) => step - 0.5 >= scale.from && step - 0.5 <= scale.to)
  const shapes = seen.map(
    ({ step }): Partial<Shape> => ({
      type: 'line',
      xref: 'x',
      yref: 'paper',
      x0: step - 0.5,
      x1: step - 0.5,
      y0: 0,
      y1: 1,
      line: { color: palette.marker, width: 1.5, dash: 'dot' },
    }),
  )
  const labels = markerLabels(seen, scale)
  const annotations = seen.map(
    (marker, index): Partial<Annotations> => ({
      x: marker.step - 0.5,
      y: 1,
      xref: 'x',
      yref: 'paper',
      xanchor: 'left',
      yanchor: 'bottom',
      showarrow: false,
      // a label that does not fit keeps its place for the pointer
      text: labels[index] || ' ',
      hovertext: marker.hover,
      font: { size: 10, color: palette.marker },
      borderpad: 0,
    }),
  )
  return { shapes, annotations }
}
