import { describe, expect, it } from 'vitest'

import { logRange, logTicks } from './ticks'

describe('logTicks', () => {
  it('shows decades where there are some', () => {
    expect(logTicks([-4.2, 0.1]).ticktext).toEqual(['1×10⁻⁴', '0.001', '0.01', '0.1', '1'])
  })

  it('shows 1, 2 and 5 in a narrow range', () => {
    expect(logTicks([-2.1, -1.2]).tickvals).toEqual([0.01, 0.02, 0.05])
  })

  it('thins what would not fit', () => {
    expect(logTicks([-20, 0]).tickvals.length).toBeLessThanOrEqual(7)
  })
})

it('covers positive finite values of the main axis', () => {
  const range = logRange([
    { y: [0.01, NaN, 0, -3, Infinity] },
    { y: Float64Array.of(1) },
    { y: [1e9], yaxis: 'y2' },
  ])
  expect(range?.[0]).toBeCloseTo(-2.12)
  expect(range?.[1]).toBeCloseTo(0.12)
  expect(logRange([{ y: [] }])).toBeNull()
})
