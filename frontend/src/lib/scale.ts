import type { Series } from './columns'

export interface ColorRange {
  min: number
  max: number
  ticks: number[]
  labels: string[]
}

const NICE = [1, 2, 2.5, 5, 10]

function niceStep(span: number, parts: number): number {
  const raw = span / parts
  const power = 10 ** Math.floor(Math.log10(raw))
  return (NICE.find((step) => step * power >= raw) ?? 10) * power
}

function label(value: number): string {
  if (value === 0) return '0'
  const size = Math.abs(value)
  if (size >= 1e4 || size < 1e-3) return value.toExponential(0).replace('e+', 'e')
  return String(Number(value.toPrecision(3)))
}

/** Smallest and largest finite value of the first columns; for a log scale, of the positive ones. */
export function extent(rows: readonly Series[], length: number, log: boolean): [number, number] | null {
  let min = Infinity
  let max = -Infinity
  for (const { values } of rows) {
    for (let index = 0; index < length; index += 1) {
      const value = values[index] ?? NaN
      if (!Number.isFinite(value) || (log && value <= 0)) continue
      if (value < min) min = value
      if (value > max) max = value
    }
  }
  return min <= max ? [min, max] : null
}

/** Whole decades: the colours hold still while new steps move the extremes a little. */
function decades([min, max]: [number, number]): ColorRange {
  const from = Math.floor(Math.log10(min) + 1e-9)
  // adding 0 turns -0 into 0
  const to = Math.max(from + 1, Math.ceil(Math.log10(max) - 1e-9)) + 0
  const every = Math.ceil((to - from) / 6)
  const ticks: number[] = []
  for (let power = from; power <= to; power += every) ticks.push(power)
  return { min: from, max: to, ticks, labels: ticks.map((power) => label(10 ** power)) }
}

function linear([min, max]: [number, number]): ColorRange {
  const span = max - min || Math.abs(max) || 1
  const step = niceStep(span, 4)
  const from = Math.floor(min / step + 1e-9) * step
  const to = Math.max(from + step, Math.ceil(max / step - 1e-9) * step)
  const count = Math.round((to - from) / step)
  const ticks = Array.from({ length: count + 1 }, (_, index) => from + index * step)
  return { min: from, max: to, ticks, labels: ticks.map((tick) => label(Number(tick.toPrecision(12)))) }
}

/** The range of a colour scale, rounded outwards so that it seldom changes. */
export function colorRange(rows: readonly Series[], length: number, log: boolean): ColorRange {
  return rangeOf(extent(rows, length, log), log)
}

/** The same of extremes that are known. */
export function rangeOf(found: [number, number] | null, log: boolean): ColorRange {
  if (!found) return log ? decades([0.001, 1]) : linear([0, 1])
  return log ? decades(found) : linear(found)
}

/** The range of a code's values; a tick at the first value of each name's first word. */
export function codeRange(names: Readonly<Record<string, string>>): ColorRange {
  const first = new Map<string, number>()
  const codes = Object.keys(names).map(Number).sort((a, b) => a - b)
  for (const code of codes) {
    const word = (names[String(code)] ?? '').split(' ')[0] ?? ''
    if (!first.has(word)) first.set(word, code)
  }
  return {
    min: codes[0] ?? 0,
    max: Math.max((codes[0] ?? 0) + 1, codes.at(-1) ?? 0),
    ticks: [...first.values()],
    labels: [...first.keys()],
  }
}
