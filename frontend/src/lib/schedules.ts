import type { Figure } from './figures'

export interface SchedulePoint {
  step: number
  value: number
}

/** The numbers of a schedule's figure, which the server has filled in. */
export function pointsOf(figure: Figure): SchedulePoint[] {
  const [trace] = figure.data
  const { x, y } = trace ?? {}
  if (!Array.isArray(x) || !Array.isArray(y)) return []
  return x.flatMap((step: unknown, index) => {
    const value: unknown = y[index]
    return typeof step === 'number' && typeof value === 'number' ? [{ step, value }] : []
  })
}
