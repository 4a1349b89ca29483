import { describe, expect, it } from 'vitest'

import { revision } from '../testing/fixtures'
import {
  expectedSettings,
  newestOf,
  restored,
  stateText,
  undone,
  withRevision,
} from './revisions'

describe('stateText', () => {
  it('names the step at which a revision was applied', () => {
    expect(stateText(revision(3, { applied_step: 12 }))).toBe('applied at step 12')
    expect(stateText(revision(0))).toBe('initial')
  })

  it.each([
    ['pending', 'waiting for the plugin'],
    ['rejected', 'rejected'],
    ['expired', 'expired: the run ended first'],
  ] as const)('%s', (state, text) => {
    expect(stateText(revision(1, { state }))).toBe(text)
  })
})

it('takes a revision in and never lets it go back', () => {
  const [first, second] = [revision(1, { state: 'applied' }), revision(2, { state: 'pending' })]
  const late = revision(1, { state: 'pending' })
  expect(withRevision([first], late)).toEqual([first])
  expect(withRevision([second], first)).toEqual([first, second])
  const rejected = revision(2, { state: 'rejected' })
  expect(withRevision([first, second], rejected)).toEqual([first, rejected])
})

describe('after a rejected revision', () => {
  const rejected = revision(2, { state: 'rejected', settings: { P: 7, eps: 1 } })

  it('expects the settings in force', () => {
    expect(expectedSettings(rejected, { P: 3, eps: 1 })).toEqual({ P: 3, eps: 1 })
    expect(expectedSettings(revision(2, { state: 'pending' }), { P: 9 })).toEqual({ P: 3 })
  })
})

it('finds the newest', () => {
  expect(newestOf([revision(1), revision(3), revision(2)])?.number).toBe(3)
  expect(newestOf([])).toBeNull()
})

it('reverts what a revision changed and nothing else', () => {
  const old = revision(1, { changes: { P: [3, 4], eps: [1e-6, 1e-3] } })
  expect(undone(old, { P: 4, eps: 1e-6, enabled: true })).toEqual({ P: 3 })
})

it('restores the live settings of a revision', () => {
  const old = revision(1, { settings: { P: 3, eps: 1e-6, seed: 7 } })
  const live = (name: string) => name !== 'seed'
  expect(restored(old, { P: 4, eps: 1e-6, seed: 9 }, live)).toEqual({ P: 3 })
})
