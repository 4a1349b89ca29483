import { describe, expect, it } from 'vitest'

import { columnsAnswer, stepDelta } from '../testing/fixtures'
import { RunColumns } from './columns'

describe('RunColumns', () => {
  it('takes steps as they close', () => {
    const columns = new RunColumns(['double.0', 'single.0'])
    columns.apply(stepDelta(0, ['double.0', 'single.0'], { nmse: [0.5, 'NaN'] }))
    columns.apply(stepDelta(1, ['double.0', 'single.0'], { nmse: [null, 0.25] }))

    expect(columns.length).toBe(2)
    expect(columns.lastStep()).toBe(1)
    expect(columns.value('nmse', 'double.0', 0)).toBe(0.5)
    expect(columns.value('nmse', 'single.0', 0)).toBeNaN()
    expect(columns.value('nmse', 'double.0', 1)).toBeNull()
    expect(columns.path('single.0', 1)).toBe('taylor')
  })

  it('is the same for a repeated step', () => {
    const columns = new RunColumns()
    const delta = stepDelta(0, ['single.0'], { nmse: [0.5] })
    expect(columns.apply(delta)).toBe(0)
    expect(columns.apply(delta)).toBe(0)
    expect(columns.length).toBe(1)
    expect(columns.total('calls')).toBe(2)
  })

  it('adds up a number over its steps', () => {
    const columns = new RunColumns()
    expect(columns.total('calls')).toBe(0)
    columns.apply(stepDelta(0, ['single.0'], {}, { calls: 3 }))
    columns.apply(stepDelta(1, ['single.0'], {}, { calls: 4, nmse_median: null }))
    expect(columns.total('calls')).toBe(7)
    expect(columns.total('nmse_median')).toBe(0.01)
    expect(columns.total('no_such')).toBe(0)
  })

  it('puts a late step in its place', () => {
    const columns = new RunColumns()
    for (const step of [0, 2, 3]) columns.apply(stepDelta(step, ['single.0'], { nmse: [step] }))
    expect(columns.apply(stepDelta(1, ['single.0'], { nmse: [1] }))).toBe(1)

    expect([...(columns.column('steps.step') as Float64Array)]).toEqual([0, 1, 2, 3])
    expect(columns.matrix('layer_steps.nmse')?.map((row) => [...row])).toEqual([[0, 1, 2, 3]])
    expect(columns.indexOfStep(3)).toBe(3)
  })

  it('grows over its first room and keeps what it had', () => {
    const columns = new RunColumns(['single.0'])
    for (let step = 0; step < 300; step += 1) {
      columns.apply(stepDelta(step, ['single.0'], { nmse: [step / 300] }))
    }
    expect(columns.length).toBe(300)
    expect(columns.value('nmse', 'single.0', 10)).toBeCloseTo(10 / 300)
    expect(columns.value('nmse', 'single.0', 299)).toBeCloseTo(299 / 300)
  })

  it('learns of layers and metrics on the way', () => {
    const columns = new RunColumns(['double.0'])
    columns.apply(stepDelta(0, ['double.0'], { nmse: [1] }))
    columns.apply(stepDelta(1, ['double.0', 'single.7'], { nmse: [1, 2], qk_std: [3, 4] }))

    expect(columns.layers).toEqual(['double.0', 'single.7'])
    expect(columns.value('nmse', 'single.7', 0)).toBeNull()
    expect(columns.value('qk_std', 'single.7', 1)).toBe(4)
    expect(columns.paths).toEqual([['taylor', 'taylor'], [null, 'taylor']])
  })

  it('reads the answer of the server', () => {
    const columns = RunColumns.from(columnsAnswer())
    expect(columns.length).toBe(2)
    expect(columns.value('nmse', 'single.0', 1)).toBe(Infinity)
    expect(columns.value('nmse', 'single.0', 0)).toBeNull()
    expect(columns.column('steps.worst_layer')).toEqual(['double.0', 'single.0'])
    columns.apply(stepDelta(2, ['double.0'], { nmse: [0.125] }))
    expect(columns.length).toBe(3)
    expect(columns.path('double.0', 2)).toBe('taylor')
    expect(columns.path('single.0', 2)).toBeNull()
  })

  it('knows only the columns that there are', () => {
    const columns = RunColumns.from(columnsAnswer())
    expect(columns.column('steps.unheard')).toBeUndefined()
    expect(columns.column('layers')).toEqual(['double.0', 'single.0'])
    expect(columns.matrix('elsewhere.nmse')).toBeUndefined()
    expect(columns.column('reasons.gate.mask')).toBeUndefined()
  })

  it('counts reasons per step, with zeros where there were none', () => {
    const columns = RunColumns.from(columnsAnswer())
    const mask = { step: 2, kind: 'fallback', reason: 'mask', detail: '' } as const
    const reasons = [
      { ...mask, layer: 'double.0', count: 2 },
      { ...mask, layer: 'single.0', count: 3 },
    ]
    columns.apply({ ...stepDelta(2, ['double.0', 'single.0']), reasons })
    const counts = (name: string) => [...(columns.column(`reasons.${name}`) as Float64Array)]
    expect(counts('gate.below_min_tokens')).toEqual([2, 0, 0])
    expect(counts('fallback.mask')).toEqual([0, 0, 5])
  })
})
