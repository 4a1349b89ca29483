export type Theme = 'light' | 'dark'

/** Colours of charts. Lines follow Okabe and Ito, which stay apart for the colour-blind. */
export interface Palette {
  text: string
  muted: string
  grid: string
  axis: string
  panel: string
  marker: string
  selection: string
  lines: string[]
  gated: string
  fallback: string
  unmeasured: string
  nonfinite: string
  ran: string
  mixed: string
}

export const PALETTES: Record<Theme, Palette> = {
  light: {
    text: '#334155',
    muted: '#526077',
    grid: '#e8edf3',
    axis: '#cbd5e1',
    panel: '#ffffff',
    marker: '#9d174d',
    selection: '#0f172a',
    lines: ['#0068a8', '#c2410c', '#00795a', '#a83e7d', '#946200', '#4b5563'],
    gated: '#d5dce6',
    fallback: '#f0a13a',
    unmeasured: '#f1f5f9',
    nonfinite: '#d6006f',
    ran: '#3b74b8',
    mixed: '#8f6bb3',
  },
  dark: {
    text: '#cbd5e1',
    muted: '#94a3b8',
    grid: '#1e2a3d',
    axis: '#3a4a63',
    panel: '#0f172a',
    marker: '#f9a8d4',
    selection: '#ffffff',
    lines: ['#56b4e9', '#f0894a', '#2cc295', '#e08fbe', '#e6b23c', '#a3b1c6'],
    gated: '#33415a',
    fallback: '#c27a12',
    unmeasured: '#172033',
    nonfinite: '#ff4fa3',
    ran: '#4f8fd6',
    mixed: '#a585cc',
  },
}

export type ColorScale = [number, string][]

const VIRIDIS = [
  '#440154', '#482878', '#3e4989', '#31688e', '#26828e',
  '#1f9e89', '#35b779', '#6ece58', '#b5de2b', '#fde725',
]
const CIVIDIS = [
  '#00224e', '#123570', '#3b496c', '#575d6d', '#707173',
  '#8a8678', '#a59c74', '#c3b369', '#e1cc55', '#fee838',
]

function scale(colors: readonly string[]): ColorScale {
  return colors.map((color, index) => [index / (colors.length - 1), color])
}

/** Brighter is always worse; metrics without a better side have a scale of their own. */
export function metricScale(direction: 'lower' | 'higher' | 'neutral'): ColorScale {
  if (direction === 'neutral') return scale(CIVIDIS)
  return scale(direction === 'lower' ? VIRIDIS : [...VIRIDIS].reverse())
}

/** A scale of flat colours: code i of n stands in the i-th part. */
export function flatScale(colors: readonly string[]): ColorScale {
  return colors.flatMap((color, index): ColorScale => [
    [index / colors.length, color],
    [(index + 1) / colors.length, color],
  ])
}
