import { describe, expect, it } from 'vitest'

import { Series } from './columns'
import { codeRange, colorRange, extent } from './scale'

function series(...values: (number | null)[]): Series {
  const made = new Series(values.length)
  values.forEach((value, index) => made.set(index, value))
  return made
}

it('leaves out what has no place on the scale', () => {
  const rows = [series(3, NaN, null, -2), series(Infinity, 0, 0.5, 9)]
  expect(extent(rows, 4, false)).toEqual([-2, 9])
  expect(extent(rows, 4, true)).toEqual([0.5, 9])
  expect(extent([series(NaN, null)], 2, false)).toBeNull()
})

describe('colorRange', () => {
  it('takes whole decades on a log scale', () => {
    expect(colorRange([series(0.0123, 0.5)], 2, true)).toMatchObject({
      min: -2,
      max: 0,
      labels: ['0.01', '0.1', '1'],
    })
  })

  it('holds still while the extremes move a little', () => {
    const before = colorRange([series(0.02, 0.4)], 2, true)
    const after = colorRange([series(0.011, 0.93)], 2, true)
    expect(after).toEqual(before)
  })

  it('rounds a linear range outwards', () => {
    expect(colorRange([series(0.913, 0.998)], 2, false)).toMatchObject({ min: 0.9, max: 1 })
    const constant = colorRange([series(5, 5)], 2, false)
    expect(constant.max).toBeGreaterThan(constant.min)
  })

  it('has a range before the first number', () => {
    expect(colorRange([], 0, false)).toMatchObject({ min: 0, max: 1 })
    expect(colorRange([], 0, true)).toMatchObject({ min: -3, max: 0 })
  })
})

it('names the codes of a scale by their first words', () => {
  const names = { '10': 'streaming (as set)', '0': 'torch (as set)', '2': 'torch (no CUDA)', '20': 'full' }
  expect(codeRange(names)).toEqual({
    min: 0,
    max: 20,
    ticks: [0, 10, 20],
    labels: ['torch', 'streaming', 'full'],
  })
})
