import type { ComparedRun, ImagePair, Match, Ratio } from './api/schema'
import { formatNumber, NOT_MEASURED, parseNumber, type WireNumber } from './numbers'

/** Below this share two times count as equal: they vary by more from run to run. */
const SAME_TIME = 0.01

/** A peak signal-to-noise ratio for a person; no noise at all is "identical". */
export function psnrText(psnr: WireNumber): string {
  const value = parseNumber(psnr)
  if (value === null) return NOT_MEASURED
  return value === Infinity ? 'identical' : `${value.toFixed(2)} dB`
}

/** Structural similarity: what is short of 1 by less than it shows is not rounded up to 1. */
export function ssimText(ssim: WireNumber): string {
  const value = parseNumber(ssim)
  if (value === null || !Number.isFinite(value)) return NOT_MEASURED
  if (value < 1 && value > 0.99995) return '>0.9999'
  return value === 1 ? '1' : value.toFixed(4)
}

/** An error of 255. */
export function errorText(error: WireNumber): string {
  const value = parseNumber(error)
  if (value === null) return NOT_MEASURED
  return `${Number.isInteger(value) ? value : formatNumber(value)} / 255`
}

/** A time over its baseline's in words. */
export function ratioText(input: WireNumber): string {
  const ratio = parseNumber(input)
  if (ratio === null || !Number.isFinite(ratio) || ratio <= 0) return ''
  if (Math.abs(ratio - 1) < SAME_TIME) return 'the same'
  return ratio < 1 ? `${formatNumber(1 / ratio)}× faster` : `${formatNumber(ratio)}× slower`
}

/** The times of two runs beside each other, as the server gives them with a comparison. */
export function timeRatio(run: WireNumber, baseline: WireNumber): Ratio {
  const ours = parseNumber(run)
  const theirs = parseNumber(baseline)
  const known =
    ours !== null && theirs !== null && Number.isFinite(ours) && Number.isFinite(theirs) && theirs > 0
  return {
    run: (run ?? null) as Ratio['run'],
    baseline: (baseline ?? null) as Ratio['baseline'],
    ratio: known ? ours / theirs : null,
  }
}

const CONDITION_TITLES: Record<string, string> = { seed: 'seed', recipe: 'prompt' }

/** What a reader must know before trusting the figures; nothing where all is well. */
export function caveats(
  match: Match | null,
  pair: ImagePair | null,
  rest: { exact: boolean; sameDevice: boolean; unpaired: number },
): string[] {
  const found: string[] = []
  if (!rest.exact) found.push('The chosen run is not exact: its picture approximates, too.')
  for (const item of match?.differs ?? []) {
    found.push(`Another ${item.title}: ${shortened(item.run)} here, ${shortened(item.baseline)} there.`)
  }
  if (match && match.differs.length === 0 && match.unknown.length > 0) {
    const names = match.unknown.map((name) => CONDITION_TITLES[name] ?? name).join(' and ')
    found.push(`The ${names} of one of the runs is not known; everything else is the same.`)
  }
  if (pair && !pair.lossless) {
    found.push('An image is stored as JPEG, whose own losses are in the figures.')
  }
  if (rest.unpaired > 0) {
    found.push(`${rest.unpaired} image${rest.unpaired > 1 ? 's have' : ' has'} no partner.`)
  }
  if (!rest.sameDevice) found.push('Sampled on another device: the times say little.')
  return found
}

const LONGEST_VALUE = 24

function shortened(text: string): string {
  return text.length > LONGEST_VALUE ? `${text.slice(0, LONGEST_VALUE)}…` : text
}

/** What the list of baselines calls a run. */
export function baselineTitle(run: Pick<ComparedRun, 'label' | 'run_id' | 'started_at'>): string {
  const at = new Date(run.started_at * 1000)
  const two = (part: number) => String(part).padStart(2, '0')
  const day = `${at.getFullYear()}-${two(at.getMonth() + 1)}-${two(at.getDate())}`
  const time = `${two(at.getHours())}:${two(at.getMinutes())}`
  return `${run.label || run.run_id.slice(0, 8)} · ${day} ${time}`
}
