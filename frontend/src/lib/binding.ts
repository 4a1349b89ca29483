import type { RunColumns } from './columns'

/**
 * The small language of a figure's `meta.bind`, as `backend/figures/binding.py` defines it. Rows
 * are typed arrays in which NaN is a gap.
 */
export type Row = ArrayLike<number> | (string | null)[]
export type Value = Row | Row[]

/** A path names nothing that the run has; its trace is left out. */
export class UnknownColumn extends Error {}

type Kind = 'nan' | 'inf' | '-inf' | 'nonpositive'

export function evaluate(expression: string, columns: RunColumns): Value {
  const bracket = expression.indexOf('(')
  if (bracket < 0) return path(expression.trim(), columns)
  const name = expression.slice(0, bracket).trim()
  const argumentsOf = split(expression.slice(bracket + 1, expression.lastIndexOf(')')))
  const [first = '', second = '', third = ''] = argumentsOf
  switch (name) {
    case 'finite':
      return each(evaluate(first, columns), (value) => (Number.isFinite(value) ? value : NaN))
    case 'log10':
      return each(evaluate(first, columns), (value) =>
        value > 0 && value < Infinity ? Math.log10(value) : NaN,
      )
    case 'median':
      return fold(first, columns, median)
    case 'min':
      return fold(first, columns, (values) => Math.min(...values))
    case 'max':
      return fold(first, columns, (values) => Math.max(...values))
    case 'where':
      return where(first, second as Kind, third, columns)
    case 'cells_x':
      return cells(first, second as Kind, columns).map(([step]) => step)
    case 'cells_y':
      return cells(first, second as Kind, columns).map(([, layer]) => layer)
    default:
      throw new Error(`no such function: ${name}`)
  }
}

/** The columns that an expression names. */
export function pathsOf(expression: string): string[] {
  return expression.match(/\b(?:steps|layer_steps|reasons)\.[\w.]+|\b(?:layers|paths)\b/g) ?? []
}

function split(text: string): string[] {
  const parts: string[] = []
  let depth = 0
  let start = 0
  for (let index = 0; index < text.length; index += 1) {
    const letter = text[index]
    if (letter === '(') depth += 1
    else if (letter === ')') depth -= 1
    else if (letter === ',' && depth === 0) {
      parts.push(text.slice(start, index).trim())
      start = index + 1
    }
  }
  return [...parts, text.slice(start).trim()]
}

function path(name: string, columns: RunColumns): Value {
  const value = columns.column(name) ?? columns.matrix(name)
  if (!value) throw new UnknownColumn(name)
  return value
}

function isMatrix(value: Value): value is Row[] {
  return Array.isArray(value) && typeof value[0] === 'object' && value[0] !== null
}

function numbersOf(row: Row): ArrayLike<number> {
  return row as ArrayLike<number>
}

function eachOf(row: Row, change: (value: number) => number): Float64Array {
  return Float64Array.from(numbersOf(row), change)
}

function each(value: Value, change: (value: number) => number): Value {
  return isMatrix(value) ? value.map((row) => eachOf(row, change)) : eachOf(value, change)
}

function median(values: number[]): number {
  values.sort((a, b) => a - b)
  const middle = values.length >> 1
  const upper = values[middle] ?? NaN
  return values.length % 2 ? upper : ((values[middle - 1] ?? NaN) + upper) / 2
}

function fold(name: string, columns: RunColumns, pick: (values: number[]) => number): Float64Array {
  const value = evaluate(name, columns)
  const rows = isMatrix(value) ? value : [value]
  return Float64Array.from({ length: columns.length }, (_, step) => {
    const known = rows.map((row) => numbersOf(row)[step] ?? NaN).filter(Number.isFinite)
    return known.length > 0 ? pick(known) : NaN
  })
}

/** Why a value has no place on an axis; the mask tells NaN from "not measured". */
function kindOf(value: number, known: boolean): Kind | null {
  if (!known) return null
  if (Number.isNaN(value)) return 'nan'
  if (!Number.isFinite(value)) return value > 0 ? 'inf' : '-inf'
  return value <= 0 ? 'nonpositive' : null
}

function where(name: string, kind: Kind, source: string, columns: RunColumns): number[] {
  const series = columns.series(name)
  if (!series) throw new UnknownColumn(name)
  const repeated = Number(source)
  const values = Number.isNaN(repeated) ? numbersOf(evaluate(source, columns) as Row) : null
  const hits: number[] = []
  for (let index = 0; index < columns.length; index += 1) {
    if (kindOf(series.values[index] ?? NaN, series.known[index] === 1) !== kind) continue
    hits.push(values ? (values[index] ?? NaN) : repeated)
  }
  return hits
}

function cells(name: string, kind: Kind, columns: RunColumns): [number, string][] {
  const hits: [number, string][] = []
  columns.rows(name)?.forEach((series, row) => {
    for (let index = 0; index < columns.length; index += 1) {
      if (kindOf(series.values[index] ?? NaN, series.known[index] === 1) === kind) {
        hits.push([columns.step(index), columns.layers[row] ?? ''])
      }
    }
  })
  return hits
}
