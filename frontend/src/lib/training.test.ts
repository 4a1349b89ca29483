import { describe, expect, it } from 'vitest'

import { revision } from '../testing/fixtures'
import { studentLayer, trainingWindow } from '../testing/training'
import type { Figure } from './figures'
import { PALETTES } from './palette'
import {
  extremes,
  grownFrom,
  linePath,
  linePoints,
  mergeWindow,
  middles,
  readyStretches,
  updateRange,
  wholeUpdates,
} from './training'
import { newestOfSetting, pauseText, saveText } from './trainingControls'
import { bound, trainingHeatmap } from './trainingFigures'

describe('a window that grows', () => {
  it('takes the last bucket anew and what comes behind it', () => {
    const known = trainingWindow([0, 4, 8], 4, [[1, 2, 3]])
    const fresh = trainingWindow([8, 12], 4, [[30, 40]])
    fresh.nonfinite = [[0, 1, 2]]
    known.nonfinite = [[0, 0, 1], [0, 2, 9]]
    const merged = mergeWindow(known, fresh)
    expect(merged?.start).toEqual([0, 4, 8, 12])
    expect(merged?.heatmap).toEqual([[1, 2, 30, 40]])
    expect(merged?.bands?.p50).toEqual([1, 2, 30, 40])
    expect(merged?.lines?.last).toEqual([[1, 2, 30, 40]])
    expect(merged?.counts).toEqual([4, 4, 4, 4])
    expect(merged?.nonfinite).toEqual([[0, 0, 1], [0, 3, 2]])
  })

  it('asks for all of it anew where the two do not go together', () => {
    const known = trainingWindow([0, 4], 4, [[1, 2]])
    expect(mergeWindow(known, trainingWindow([8], 8, [[1]]))).toBeNull()
    expect(mergeWindow(known, trainingWindow([12], 4, [[1]]))).toBeNull()
    expect(mergeWindow(known, { ...trainingWindow([4], 4, [[1]]), metric: 'loss' })).toBeNull()
    expect(mergeWindow(known, { ...trainingWindow([4], 4, [[1]]), layers: ['single.0'] })).toBeNull()
  })

  it('stays as it is when nothing came', () => {
    const known = trainingWindow([0, 4], 4, [[1, 2]])
    expect(mergeWindow(known, trainingWindow([], 4, [[]]))?.start).toEqual([0, 4])
  })
})

describe('what has grown', () => {
  it('begins behind the slowest layer that has', () => {
    const before = [studentLayer('a', 10), studentLayer('b', 90), studentLayer('c', 5)]
    const after = [studentLayer('a', 12), studentLayer('b', 95), studentLayer('c', 5)]
    expect(grownFrom(before, after)).toBe(11)
    expect(grownFrom(after, after)).toBeNull()
  })

  it('is everything for a layer that is new or was set back', () => {
    expect(grownFrom([], [studentLayer('a', 3)])).toBe(0)
    const back = { ...studentLayer('a', 12), last_update: 4 }
    expect(grownFrom([studentLayer('a', 10)], [back])).toBe(0)
  })
})

describe('a figure of the server', () => {
  const window = trainingWindow([0, 4], 4, [[0.1, null]])

  it('names what it draws of a window', () => {
    expect(middles(window)).toEqual([1.5, 5.5])
    expect(bound('log10(heatmap)', window)).toEqual([[-1, null]])
    expect(bound('bands.p50', window)).toEqual([0.1, null])
    expect(() => bound('bogus', window)).toThrow('no such column')
  })

  it('gets the view and the revisions', () => {
    const figure: Figure = {
      data: [{ type: 'heatmap', meta: { bind: { x: 'middle', y: 'layers', z: 'heatmap' } } }],
      layout: {},
    }
    const metric = {
      name: 'loss', title: 'Loss', help: '', unit: '', direction: 'lower' as const, log: true, names: {},
    }
    const drawn = trainingHeatmap(
      { figure, window, metric, layer: 'double.0', updates: [2, 6], marks: [{ revision: 1, step: 3, update: 5 }] },
      {
        palette: PALETTES.dark, markers: [{ number: 1, step: 3, label: 'r1', hover: '' }], steps: 9,
        x: null, y: null, width: 400, height: 300, version: 1, touch: false, uirevision: '',
      },
    )
    expect(drawn.data[0]?.x).toEqual([1.5, 5.5])
    expect((drawn.layout.xaxis as { range: number[] }).range).toEqual([2, 6])
    const shapes = drawn.layout.shapes as { x0: number }[]
    expect(shapes.map((shape) => shape.x0)).toEqual([0, 4.5])
  })
})

describe('a line', () => {
  it('goes through both extremes of every bucket', () => {
    const window = trainingWindow([0, 8], 8, [[5, 1]])
    if (!window.lines) throw new Error('no lines')
    window.lines.low = [[2, 1]]
    window.lines.high = [[9, 1]]
    window.lines.first = [[3, 1]]
    expect(linePoints(window, 0).y).toEqual([3, 2, 9, 5, 1])
    expect(linePath(window, 0, [0, 16], [1, 9], false).startsWith('M0.00 75.00L')).toBe(true)
  })

  it('leaves out what a log scale has no place for', () => {
    const window = trainingWindow([0, 1], 1, [[0, 10]])
    expect(linePath(window, 0, [0, 2], [1, 10], true)).toBe('M50.00 0.00')
    expect(extremes([[0, 10, null]], true)).toEqual([10, 10])
  })
})

describe('ranges', () => {
  it('ask for whole updates', () => {
    expect(wholeUpdates([2.2, 9.9])).toEqual({ from: 3, to: 9 })
    expect(wholeUpdates([-4, 0.3])).toEqual({ from: 0, to: 0 })
    expect(wholeUpdates(null)).toBeNull()
    expect(updateRange(null, trainingWindow([1], 1, [[1]]))).toEqual([0.5, 2.5])
  })

  it('cut the times of readiness', () => {
    const layer = studentLayer('a', 100, [[20, 40], [60, null]])
    const [first, second] = readyStretches(layer, [0, 100])
    expect([first?.left, first?.width, second?.left, second?.width]).toEqual([20, 20, 60, 40])
    expect(readyStretches(layer, [0, 10])).toEqual([])
  })
})

describe('what became of an order', () => {
  const paused = revision(1, { changes: { training_paused: [false, true] }, applied_step: 4 })

  it('is told in the order of the revisions', () => {
    expect(newestOfSetting([revision(0), paused], 'training_paused')).toBe(paused)
    expect(pauseText(paused)).toBe('pause: applied at step 4')
    expect(pauseText(null)).toBe('')
  })

  it('ends with the file', () => {
    const order = revision(2, { changes: { checkpoint_now: [0, 1] }, settled_at: 50 })
    const event = { seq: 1, at: 51, event: 'checkpoint_saved', layer: null, update: null, step: 3, detail: 'x.safetensors' }
    expect(saveText(order, [])?.done).toBe(false)
    expect(saveText(order, [{ ...event, at: 20 }])?.done).toBe(false)
    expect(saveText(order, [event])).toEqual({ text: 'saved: x.safetensors', done: true, failed: false })
    expect(saveText(order, [{ ...event, event: 'checkpoint_failed' }])?.failed).toBe(true)
    expect(saveText({ ...order, state: 'pending' }, [event])?.text).toContain('waiting')
  })
})
