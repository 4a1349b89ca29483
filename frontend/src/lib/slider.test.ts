import { describe, expect, it } from 'vitest'

import { variant } from '../testing/fixtures'
import { positionOf, sliderOf, valueAt } from './slider'

const context = { sigmas: [1, 0.75, 0.5, 0.25, 0], lastBlock: 37, steps: 20 }

function slider(name: string, unit?: string) {
  const field = variant().fields.find((item) => item.name === name)
  if (!field) throw new Error(name)
  return sliderOf({ ...field, unit: unit ?? field.unit }, context)
}

describe('sliderOf', () => {
  it("stops a sigma gate at the run's own sigmas", () => {
    expect(slider('sigma_max')?.stops).toEqual([0, 0.25, 0.5, 0.75, 1])
  })

  it('gives small ranges a slider and wide ones none', () => {
    expect(slider('P')).toEqual({ min: 1, max: 8, step: 1 })
    expect(slider('quality_seed')).toBeNull()
    expect(slider('eps')).toBeNull()
    expect(slider('enabled')).toBeNull()
  })

  it("ends at the run's last block or step", () => {
    expect(slider('quality_seed', 'block')?.max).toBe(37)
    expect(slider('quality_seed', 'steps')?.max).toBe(20)
  })
})

it('moves between values and positions', () => {
  const stops = { min: 0, max: 2, step: 1, stops: [0, 0.3, 0.9] }
  expect(positionOf(stops, 0.31)).toBe(1)
  expect(valueAt(stops, 2)).toBe(0.9)
  const plain = { min: 0.01, max: 4, step: 0.01 }
  expect(valueAt(plain, 0.1 + 0.2)).toBe(0.3)
  expect(positionOf(plain, 9)).toBe(4)
})
