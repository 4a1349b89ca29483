import type { Json } from './figures'
import { formatNumber } from './numbers'
import type { Range } from './urlState'

const MOST_TICKS = 6

/** Ticks of a log axis over a range of exponents: decades where it spans some, else 1, 2, 5. */
export function logTicks([from, to]: Range): { tickvals: number[]; ticktext: string[] } {
  const first = Math.floor(from)
  const last = Math.ceil(to)
  const inside = (value: number) => {
    const power = Math.log10(value)
    return power >= from - 1e-9 && power <= to + 1e-9
  }
  const powers = Array.from({ length: last - first + 1 }, (_, index) => first + index)
  const decades = powers.map((power) => 10 ** power).filter(inside)
  const fine = powers
    .flatMap((power) => [1, 2, 5].map((part) => Number(`${part}e${power}`)))
    .filter(inside)
  const every = Math.ceil(decades.length / MOST_TICKS)
  const tickvals =
    fine.length <= MOST_TICKS ? fine : decades.filter((_, index) => index % every === 0)
  const text = (value: number) =>
    value >= 0.001 && value < 1e4 ? String(value) : formatNumber(value, 1)
  return { tickvals, ticktext: tickvals.map(text) }
}

const ROOM = 0.06

/** Range of exponents that a chart's lines cover, with a little room; null where there is none. */
export function logRange(traces: readonly Json[]): Range | null {
  let least = Infinity
  let most = -Infinity
  for (const trace of traces) {
    if (trace.yaxis === 'y2' || !trace.y) continue
    for (const value of Array.from(trace.y as ArrayLike<number>)) {
      if (!(value > 0 && value < Infinity)) continue
      least = Math.min(least, value)
      most = Math.max(most, value)
    }
  }
  if (least > most) return null
  const from = Math.log10(least)
  const to = Math.log10(most)
  const room = Math.max(0.05, (to - from) * ROOM)
  return [from - room, to + room]
}
