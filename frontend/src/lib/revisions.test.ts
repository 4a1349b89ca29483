import { describe, expect, it } from 'vitest'

import { revision } from '../testing/fixtures'
import {
  newestOf,
  restored,
  standingOf,
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

describe('what the sampler is expected to run with', () => {
  const first = revision(0)
  const standing = (...items: Parameters<typeof standingOf>[0]) => standingOf(items)?.number

  it('is the revision under way, else the one applied last', () => {
    const rejected = revision(2, { state: 'rejected', applied_step: null })
    expect(standing(first, revision(1), rejected)).toBe(1)
    expect(standing(first, revision(2, { state: 'delivered', applied_step: null }))).toBe(2)
    expect(standing(first, revision(1, { state: 'expired', applied_step: null }))).toBe(0)
    expect(standingOf([])).toBeNull()
  })

  it('is what was pushed, though something tuned got a higher number meanwhile', () => {
    const tuned = revision(2, { tuned: true, applied_step: 3 })
    const pushed = revision(1, { state: 'pending', applied_step: null })
    expect(standing(first, pushed, tuned)).toBe(1)
    expect(standing(first, revision(1, { applied_step: 4 }), tuned)).toBe(1)
    expect(standing(first, revision(1, { state: 'rejected', applied_step: null }), tuned)).toBe(2)
  })

  it('is what was tuned on top, where both began with one step', () => {
    expect(standing(first, revision(1, { applied_step: 3 }), revision(2, { applied_step: 3 }))).toBe(2)
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
