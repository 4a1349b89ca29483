import { expect, it } from 'vitest'

import { stepDelta } from '../testing/fixtures'
import type { MetricInfo } from './api/schema'
import { cellFacts } from './cellFacts'
import { RunColumns } from './columns'
import { ReasonBook } from './reasons'

const METRIC: MetricInfo = {
  name: 'nmse',
  title: 'NMSE',
  help: '',
  unit: '',
  direction: 'lower',
  log: true,
  names: {},
}
const CODED: MetricInfo = {
  ...METRIC,
  name: 'sums_path',
  title: 'Sums computed by',
  direction: 'neutral',
  log: false,
  names: { '2': 'torch (no CUDA device)', '20': 'full' },
}

function facts(metric: MetricInfo | null, layer = 'single.0') {
  const columns = new RunColumns()
  const metrics = { nmse: [0.5, 0.25, 0.125], sums_path: [2, 7, null] }
  columns.apply(stepDelta(0, ['single.0', 'single.1', 'single.2'], metrics))
  return cellFacts(columns, new ReasonBook(), metric, [METRIC, CODED], String, layer, 0)
}

it('says what computed the sums, whatever metric is shown', () => {
  expect(facts(METRIC)?.value).toBe('0.500')
  expect(facts(METRIC)?.notes).toEqual(['Sums computed by torch (no CUDA device)'])
  expect(facts(null)?.notes).toEqual(['Sums computed by torch (no CUDA device)'])
})

it('says it once where that is the metric that is shown', () => {
  expect(facts(CODED)?.value).toBe('torch (no CUDA device)')
  expect(facts(CODED)?.notes).toEqual([])
})

it('shows a code of a newer plugin as the number that it is, and nothing where none was measured', () => {
  expect(facts(METRIC, 'single.1')?.notes).toEqual(['Sums computed by 7.00'])
  expect(facts(METRIC, 'single.2')?.notes).toEqual([])
})

it('says what a router promised, and why it chose', () => {
  const columns = new RunColumns()
  const metrics = { predicted_nmse: [0.004], budget_share: [0.32] }
  columns.apply(stepDelta(0, ['single.0'], metrics))
  const book = new ReasonBook()
  const row = { step: 0, layer: 'single.0', count: 1, detail: 'tiled up to 0.004 (chosen)' }
  book.setStep(0, [{ ...row, kind: 'choice', reason: 'router_cheapest' }])
  const found = cellFacts(columns, book, null, [METRIC], String, 'single.0', 0)
  expect(found?.path).toBe('taylor ran')
  expect(found?.notes).toEqual(["predicted NMSE up to 0.00400, 32 % of the layer's budget"])
  expect(found?.reasons[0]?.prose).toBe('Chosen: router_cheapest')
  expect(found?.reasons[0]?.detail).toBe('tiled up to 0.004 (chosen)')
})
