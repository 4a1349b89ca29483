import type { SettingField } from './api/schema'

/** What a run offers a slider: its own sigmas, blocks and steps are the sensible range. */
export interface SliderContext {
  sigmas: readonly number[]
  lastBlock: number
  steps: number
}

export interface Slider {
  min: number
  max: number
  step: number
  /** Where only some values make sense, position → value. */
  stops?: number[]
}

const MOST_POSITIONS = 1100

/** The slider of a setting, or none where no slider could hit a value. */
export function sliderOf(field: SettingField, context: SliderContext): Slider | null {
  if (field.type !== 'integer' && field.type !== 'number') return null
  const { minimum, maximum } = field
  if (typeof minimum !== 'number' || typeof maximum !== 'number') return null
  if (field.unit === 'sigma') {
    const inside = context.sigmas.filter((sigma) => sigma >= minimum && sigma <= maximum)
    const stops = [...new Set([minimum, ...inside])].sort((a, b) => a - b)
    return stops.length > 2 ? { min: 0, max: stops.length - 1, step: 1, stops } : null
  }
  if (field.unit === 'block' && context.lastBlock > 0) {
    return { min: minimum, max: Math.min(maximum, context.lastBlock), step: 1 }
  }
  if (field.unit === 'steps' && context.steps > 1) {
    return { min: minimum, max: Math.min(maximum, context.steps), step: 1 }
  }
  const step = field.step ?? (field.type === 'integer' ? 1 : (maximum - minimum) / 100)
  return (maximum - minimum) / step <= MOST_POSITIONS ? { min: minimum, max: maximum, step } : null
}

/** Where a value stands on its slider; one outside stands at the nearer end. */
export function positionOf(slider: Slider, value: number): number {
  if (!slider.stops) return Math.min(slider.max, Math.max(slider.min, value))
  let best = 0
  slider.stops.forEach((stop, index) => {
    const nearest = slider.stops?.[best] ?? 0
    if (Math.abs(stop - value) < Math.abs(nearest - value)) best = index
  })
  return best
}

/** The value at a slider's position, without the dust of binary fractions. */
export function valueAt(slider: Slider, position: number): number {
  if (slider.stops) return slider.stops[Math.round(position)] ?? 0
  const decimals = Math.max(0, Math.ceil(-Math.log10(slider.step)) + 1)
  return Number(position.toFixed(Math.min(decimals, 12)))
}
