import { expect, it } from 'vitest'

import { run } from '../testing/fixtures'
import { lastBlock, latentText, runDuration, runSubtitle, runTitle } from './runs'

it('calls a run by its label, else by model and id', () => {
  expect(runTitle(run({ label: 'P sweep 3' }))).toBe('P sweep 3')
  expect(runTitle(run())).toBe('Flux 01234567')
})

it('says what was sampled and how', () => {
  expect(runSubtitle(run())).toBe('Flux · euler · seed 1')
})

it('counts a running run from its start and leaves an ended one alone', () => {
  expect(runDuration(run({ started_at: 100 }), 103)).toBe(3000)
  expect(runDuration(run({ status: 'lost', duration_ms: 5 }), 1e6)).toBe(5)
})

it('finds the last block over all types', () => {
  expect(lastBlock(['double.0', 'double.18', 'single.37', 'single.2'])).toBe(37)
  expect(lastBlock([])).toBe(0)
})

it('writes latent shapes', () => {
  expect(latentText([1, 16, 64, 96])).toBe('1×16×64×96 (768×512 px)')
  expect(latentText([])).toBe('')
})
