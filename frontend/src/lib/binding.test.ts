import { describe, expect, it } from 'vitest'

import { stepDelta } from '../testing/fixtures'
import { evaluate, pathsOf, UnknownColumn } from './binding'
import { RunColumns } from './columns'

const columns = new RunColumns(['a.0', 'a.1'])
columns.apply(stepDelta(0, ['a.0', 'a.1'], { nmse: [0.01, 'NaN'] }, { nmse_worst: 'NaN' }))
columns.apply(stepDelta(1, ['a.0', 'a.1'], { nmse: [0, 100] }, { nmse_worst: 'Infinity' }))
columns.apply(stepDelta(2, ['a.0', 'a.1'], { nmse: [null, '-Infinity'] }, { nmse_worst: null }))

function value(expression: string): unknown {
  const found = evaluate(expression, columns)
  return Array.from(found as ArrayLike<unknown>, (item) =>
    ArrayBuffer.isView(item) ? Array.from(item as Float64Array) : item,
  )
}

describe('evaluate', () => {
  it.each([
    ['steps.step', [0, 1, 2]],
    ['layers', ['a.0', 'a.1']],
    ['finite(steps.nmse_worst)', [NaN, NaN, NaN]],
    [
      'log10(layer_steps.nmse)',
      [
        [-2, NaN, NaN],
        [NaN, 2, NaN],
      ],
    ],
    ['median(layer_steps.nmse)', [0.01, 50, NaN]],
    ['min(layer_steps.nmse)', [0.01, 0, NaN]],
    ['max(layer_steps.nmse)', [0.01, 100, NaN]],
    ['where(steps.nmse_worst, nan, steps.step)', [0]],
    ['where(steps.nmse_worst, inf, 0.98)', [0.98]],
    ['where(steps.nmse_worst, -inf, 0.02)', []],
    ['cells_x(layer_steps.nmse, nan)', [0]],
    ['cells_y(layer_steps.nmse, nan)', ['a.1']],
    ['cells_x(layer_steps.nmse, nonpositive)', [1]],
    ['cells_y(layer_steps.nmse, -inf)', ['a.1']],
  ])('%s', (expression, expected) => {
    expect(value(expression)).toEqual(expected)
  })

  it('says which column the run lacks', () => {
    expect(() => evaluate('finite(steps.unheard)', columns)).toThrow(UnknownColumn)
    expect(() => evaluate('reasons.fallback.mask', columns)).toThrow(UnknownColumn)
  })

  it('takes no other language', () => {
    expect(() => evaluate('alert(1)', columns)).toThrow('no such function')
  })
})

it('lists the columns of an expression', () => {
  expect(pathsOf('where(steps.nmse_worst, nan, steps.step)')).toEqual([
    'steps.nmse_worst',
    'steps.step',
  ])
  expect(pathsOf('log10(layer_steps.nmse)')).toEqual(['layer_steps.nmse'])
})
