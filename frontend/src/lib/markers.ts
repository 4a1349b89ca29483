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

/**
 * A line between the last step of the old settings and the first of the new ones. Labels are
 * shortened to the revision's number where the next line is near.
 */
export function markerLayout(
  markers: readonly Marker[],
  palette: Palette,
  stepsPerLabel: number,
): MarkerLayout {
  const shapes = markers.map(
    (marker): Partial<Shape> => ({
      type: 'line',
      xref: 'x',
      yref: 'paper',
      x0: marker.step - 0.5,
      x1: marker.step - 0.5,
      y0: 0,
      y1: 1,
      line: { color: palette.marker, width: 1.5, dash: 'dot' },
    }),
  )
  const annotations = markers.map((marker, index): Partial<Annotations> => {
    const next = markers[index + 1]
    const roomy = !next || next.step - marker.step >= stepsPerLabel
    return {
      x: marker.step - 0.5,
      y: 1,
      xref: 'x',
      yref: 'paper',
      xanchor: 'left',
      yanchor: 'bottom',
      showarrow: false,
      text: roomy ? marker.label : `r${marker.number}`,
      hovertext: marker.hover,
      font: { size: 10, color: palette.marker },
      borderpad: 1,
    }
  })
  return { shapes, annotations }
}
