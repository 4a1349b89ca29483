import { expect, it } from 'vitest'

import { revision } from '../testing/fixtures'
import { markerLabels, markerLayout, markersOf } from './markers'
import { PALETTES } from './palette'

const revisions = [
  revision(0),
  revision(2, { applied_step: 12, changes: { P: [3, 4], eps: [1e-6, 1e-3] } }),
  revision(1, { applied_step: 8, changes: { P: [2, 3] } }),
  revision(3, { applied_step: null, state: 'rejected', changes: { P: [4, 5] } }),
]

it('marks what was applied after the start, in order, with old and new values', () => {
  expect(markersOf(revisions)).toEqual([
    { number: 1, step: 8, label: 'r1 P 2→3', hover: 'Revision 1, from step 8<br>P: 2 → 3' },
    {
      number: 2,
      step: 12,
      label: 'r2 · 2 changes',
      hover: 'Revision 2, from step 12<br>P: 3 → 4<br>eps: 0.000001 → 0.001',
    },
  ])
})

it('draws the line before the first step of the new settings, where it is in view', () => {
  const scale = { from: -0.5, to: 20, pixels: 30 }
  const { shapes, annotations } = markerLayout(markersOf(revisions), PALETTES.light, scale)
  expect(shapes.map((shape) => shape.x0)).toEqual([7.5, 11.5])
  expect(annotations.map((item) => item.text)).toEqual(['r1 P 2→3', 'r2 · 2 changes'])
  const zoomed = { from: 10, to: 20, pixels: 60 }
  expect(markerLayout(markersOf(revisions), PALETTES.light, zoomed).shapes).toHaveLength(1)
})

it('shortens labels that would run into the next', () => {
  const markers = markersOf(revisions)
  expect(markerLabels(markers, { from: 0, to: 30, pixels: 5 })).toEqual(['r1', 'r2 · 2 changes'])
  expect(markerLabels(markers, { from: 0, to: 30, pixels: 1 })).toEqual(['', 'r2'])
})
