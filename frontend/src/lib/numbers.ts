/** A float as it travels in JSON: non-finite ones are spelled out, null means "not measured". */
export type WireNumber = number | string | null | undefined

export const NOT_MEASURED = '–'

export function parseNumber(value: WireNumber): number | null {
  if (value === null || value === undefined) return null
  if (typeof value === 'number') return value
  switch (value) {
    case 'NaN':
      return NaN
    case 'Infinity':
      return Infinity
    case '-Infinity':
      return -Infinity
    default:
      return value.trim() === '' ? null : Number(value)
  }
}

const MINUS = '\u2212'
const TIMES = '\u00d7'
const SUPERSCRIPTS: Record<string, string> = {
  '-': '\u207b',
  '0': '\u2070',
  '1': '\u00b9',
  '2': '\u00b2',
  '3': '\u00b3',
  '4': '\u2074',
  '5': '\u2075',
  '6': '\u2076',
  '7': '\u2077',
  '8': '\u2078',
  '9': '\u2079',
}

function nonFinite(value: number): string {
  if (Number.isNaN(value)) return 'NaN'
  return value > 0 ? '+∞' : `${MINUS}∞`
}

/** A figure for a person: three significant digits, powers of ten where zeros would mislead. */
export function formatNumber(input: WireNumber, digits = 3): string {
  const value = parseNumber(input)
  if (value === null) return NOT_MEASURED
  if (!Number.isFinite(value)) return nonFinite(value)
  if (value === 0) return '0'
  const size = Math.abs(value)
  if (size >= 1e-3 && size < 1e5) {
    const decimals = Math.max(0, digits - 1 - Math.floor(Math.log10(size)))
    const text = value.toFixed(Math.min(decimals, 6))
    return text.replace('-', MINUS)
  }
  const [mantissa = '0', exponent = '0'] = value.toExponential(digits - 1).split('e')
  const power = [...exponent.replace('+', '')].map((sign) => SUPERSCRIPTS[sign] ?? sign).join('')
  return `${mantissa.replace('-', MINUS)}${TIMES}10${power}`
}

export function formatShare(input: WireNumber): string {
  const value = parseNumber(input)
  if (value === null) return NOT_MEASURED
  if (!Number.isFinite(value)) return nonFinite(value)
  const percent = value * 100
  if (percent === 0) return '0 %'
  if (percent < 0.1) return '<0.1 %'
  return `${percent < 10 ? percent.toFixed(1) : percent.toFixed(0)} %`
}

export function formatInteger(value: number): string {
  return value.toLocaleString('en-US').replaceAll(',', '\u202f')
}

/** A length of time: "640 µs", "12.3 ms", "4.1 s", "3 min 07 s", "2 h 05 min". */
export function formatDuration(input: WireNumber): string {
  const ms = parseNumber(input)
  if (ms === null) return NOT_MEASURED
  if (!Number.isFinite(ms)) return nonFinite(ms)
  if (ms < 1) return ms === 0 ? '0 ms' : `${Math.max(1, Math.round(ms * 1000))} µs`
  if (ms < 100) return `${ms.toFixed(1)} ms`
  if (ms < 1000) return `${ms.toFixed(0)} ms`
  const seconds = ms / 1000
  if (seconds < 59.95) return `${seconds.toFixed(1)} s`
  const whole = Math.round(seconds)
  const two = (part: number) => String(part).padStart(2, '0')
  if (whole < 3600) return `${Math.floor(whole / 60)} min ${two(whole % 60)} s`
  const minutes = Math.round(seconds / 60)
  return `${Math.floor(minutes / 60)} h ${two(minutes % 60)} min`
}

/** How long ago, with one decimal while it is fresh. */
export function formatAge(seconds: number): string {
  const age = Math.max(0, seconds)
  if (age < 9.95) return `${age.toFixed(1)} s ago`
  if (age < 59.5) return `${Math.round(age)} s ago`
  if (age < 3600) return `${Math.floor(age / 60)} min ago`
  if (age < 86_400) return `${Math.floor(age / 3600)} h ago`
  const days = Math.floor(age / 86_400)
  return days === 1 ? 'yesterday' : `${days} days ago`
}

export function formatBytes(bytes: number): string {
  const units = ['B', 'kB', 'MB', 'GB']
  let value = bytes
  let unit = 0
  while (value >= 1000 && unit < units.length - 1) {
    value /= 1000
    unit += 1
  }
  return `${unit === 0 ? value : value.toFixed(value < 10 ? 1 : 0)} ${units[unit]}`
}

/** A setting's value as the form and the timeline write it: exact, never rounded. */
export function formatSetting(value: unknown): string {
  if (value === null || value === undefined) return NOT_MEASURED
  if (typeof value === 'boolean') return value ? 'on' : 'off'
  if (typeof value === 'number') return String(value)
  return typeof value === 'string' ? value : JSON.stringify(value)
}
