import { expect, it } from 'vitest'

import { RUN_ID, stepDelta } from '../testing/fixtures'
import { RunColumns } from './columns'
import { ReasonBook } from './reasons'
import { routedCells, routes, routingFile } from './routing'

function routed() {
  const columns = new RunColumns()
  const book = new ReasonBook()
  const layers = ['double.0', 'single.0']
  for (const step of [0, 1, 2]) {
    const ran = step > 0
    const delta = stepDelta(step, layers, {
      nmse: [ran ? 0.001 * step : null, null],
      predicted_nmse: [ran ? 0.004 : null, null],
      budget_share: [ran ? 0.4 : null, null],
      attn_ms: [ran ? step : 4, 4],
    })
    delta.paths = [ran ? 'tiled' : 'exact', 'exact']
    columns.apply(delta)
    book.setStep(step, [
      {
        step,
        layer: 'double.0',
        kind: ran ? 'choice' : 'gate',
        reason: ran ? 'router_cheapest' : 'router_unmeasured',
        count: 1,
        detail: `of step ${step}`,
      },
      { step, layer: 'single.0', kind: 'gate', reason: 'router_over_budget', count: 1, detail: '' },
    ])
  }
  return routedCells(columns, book)
}

it('puts steps together at which a layer ran the same for the same reason', () => {
  expect(routes(routed())).toEqual([
    {
      layer: 'double.0',
      first: 0,
      last: 0,
      sigmas: [1, 1],
      path: 'exact',
      predicted: null,
      share: null,
      nmse: null,
      ms: 4,
      reason: 'router_unmeasured',
      detail: 'of step 0',
    },
    {
      layer: 'double.0',
      first: 1,
      last: 2,
      sigmas: [0.9, 0.8],
      path: 'tiled',
      predicted: 0.004,
      share: 0.4,
      nmse: 0.002,
      ms: 1.5,
      reason: 'router_cheapest',
      detail: 'of step 2',
    },
    expect.objectContaining({ layer: 'single.0', first: 0, last: 2, path: 'exact' }),
  ])
})

it('exports every layer at every step, and spells out what JSON has no number for', () => {
  const cells = routed()
  const first = cells[0]
  if (!first) throw new Error('no cells')
  first.nmse = NaN
  const file = JSON.parse(routingFile(RUN_ID, cells)) as { run_id: string; cells: unknown[] }
  expect(file.run_id).toBe(RUN_ID)
  expect(file.cells).toHaveLength(6)
  expect(file.cells[0]).toMatchObject({ layer: 'double.0', step: 0, nmse: 'NaN' })
})

it('has nothing to say before the first step', () => {
  expect(routes(routedCells(new RunColumns(), new ReasonBook()))).toEqual([])
})
