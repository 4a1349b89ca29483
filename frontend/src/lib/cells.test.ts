import { describe, expect, it } from 'vitest'

import { stepDelta } from '../testing/fixtures'
import type { ReasonRow } from './api/schema'
import { Cell, nonFinite, pathCodes } from './cells'
import { RunColumns } from './columns'
import { ReasonBook } from './reasons'

function row(step: number, layer: string, kind: 'gate' | 'fallback', reason: string): ReasonRow {
  return { step, layer, kind, reason, count: 2, detail: '' }
}

describe('ReasonBook', () => {
  it('counts by reason, most frequent first', () => {
    const book = new ReasonBook()
    book.load([
      row(0, 'single.0', 'fallback', 'mask'),
      row(1, 'single.0', 'fallback', 'denominator'),
      row(1, 'single.1', 'fallback', 'denominator'),
      row(1, 'single.2', 'gate', 'below_min_tokens'),
    ])
    expect(book.totals('fallback')).toEqual([
      { kind: 'fallback', reason: 'denominator', count: 4 },
      { kind: 'fallback', reason: 'mask', count: 2 },
    ])
    expect(book.totals('gate')).toHaveLength(1)
  })

  it('counts a repeated step once', () => {
    const book = new ReasonBook()
    book.setStep(3, [row(3, 'single.0', 'gate', 'disabled')])
    book.setStep(3, [row(3, 'single.0', 'gate', 'disabled')])
    expect(book.totals('gate')[0]?.count).toBe(2)
    book.setStep(3, [])
    expect(book.totals('gate')).toEqual([])
  })
})

it('tells how each cell came about', () => {
  const layers = ['a.0', 'a.1', 'a.2', 'a.3', 'a.4']
  const columns = new RunColumns([...layers, 'a.5'])
  columns.apply({
    ...stepDelta(4, layers),
    paths: ['taylor', 'exact', 'exact', 'exact', 'mixed'],
  })
  const book = new ReasonBook()
  book.setStep(4, [
    row(4, 'a.2', 'gate', 'disabled'),
    row(4, 'a.3', 'gate', 'disabled'),
    row(4, 'a.3', 'fallback', 'mask'),
  ])
  expect(pathCodes(columns, book).map((codes) => codes[0])).toEqual([
    Cell.Ran,
    Cell.Exact,
    Cell.Gated,
    Cell.Fallback,
    Cell.Mixed,
    Cell.Unmeasured,
  ])
})

it('finds what is no number, and only that', () => {
  const columns = new RunColumns()
  columns.apply(stepDelta(0, ['a.0', 'a.1', 'a.2'], { nmse: ['NaN', null, 1] }))
  columns.apply(stepDelta(1, ['a.0', 'a.1', 'a.2'], { nmse: [1, '-Infinity', 1] }))
  expect(nonFinite(columns, 'nmse')).toEqual([
    { index: 0, row: 0 },
    { index: 1, row: 1 },
  ])
})
