import { describe, expect, it } from 'vitest'

import { pointsOf } from './schedules'

describe('pointsOf', () => {
  it('reads steps and values of a filled figure', () => {
    const figure = { data: [{ x: [0, 1], y: [512, 100] }], layout: {} }
    expect(pointsOf(figure)).toEqual([
      { step: 0, value: 512 },
      { step: 1, value: 100 },
    ])
  })

  it('has nothing to read where nothing is drawn', () => {
    expect(pointsOf({ data: [], layout: {} })).toEqual([])
    expect(pointsOf({ data: [{ x: [0, 1], y: [1, null] }], layout: {} })).toHaveLength(1)
  })
})
