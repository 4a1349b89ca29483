import { describe, expect, it } from 'vitest'

import { imagePair } from '../testing/fixtures'
import { baselineTitle, caveats, errorText, psnrText, ratioText, ssimText, timeRatio } from './comparison'

const FINE = { exact: true, sameDevice: true, unpaired: 0 }
const SAME = { comparable: true, differs: [], unknown: [] }

describe('figures for a person', () => {
  it.each([
    ['Infinity', 'identical'],
    [31.4159, '31.42 dB'],
    [null, '–'],
  ])('PSNR %s is %s', (value, text) => expect(psnrText(value)).toBe(text))

  it.each([
    [1, '1'],
    [0.99999, '>0.9999'],
    [0.98765, '0.9877'],
    [-0.1, '-0.1000'],
    [null, '–'],
  ])('SSIM %s is %s', (value, text) => expect(ssimText(value)).toBe(text))

  it.each([
    [0.5, '2.00× faster'],
    [2.8, '2.80× slower'],
    [1.004, 'the same'],
    [null, ''],
    ['Infinity', ''],
    [0, ''],
  ])('a ratio of %s is "%s"', (value, text) => expect(ratioText(value)).toBe(text))

  it('names errors with their range', () => {
    expect(errorText(1.25)).toBe('1.25 / 255')
    expect(errorText(26)).toBe('26 / 255')
    expect(errorText(null)).toBe('–')
  })
})

it('divides times only where both are known', () => {
  expect(timeRatio(50, 100)).toEqual({ run: 50, baseline: 100, ratio: 0.5 })
  expect(timeRatio(50, 0).ratio).toBeNull()
  expect(timeRatio(null, 100)).toEqual({ run: null, baseline: 100, ratio: null })
  expect(timeRatio('NaN', 100).ratio).toBeNull()
})

describe('what must be known before the figures are trusted', () => {
  it('is nothing where all is well', () => {
    expect(caveats(SAME, imagePair(), FINE)).toEqual([])
    expect(caveats(null, null, FINE)).toEqual([])
  })

  it('names each difference', () => {
    const differs = [
      { name: 'seed', title: 'seed', run: '7', baseline: '8' },
      { name: 'sigmas', title: 'schedule', run: '1 '.repeat(40), baseline: '1 0' },
    ]
    const [seed, schedule] = caveats({ ...SAME, comparable: false, differs }, null, FINE)
    expect(seed).toBe('Another seed: 7 here, 8 there.')
    expect(schedule).toContain('…')
  })

  it('says what was not compared, and what spoils the figures', () => {
    const found = caveats({ ...SAME, unknown: ['recipe'] }, imagePair({ lossless: false }), {
      exact: false,
      sameDevice: false,
      unpaired: 2,
    })
    expect(found).toHaveLength(5)
    expect(found[0]).toContain('not exact')
    expect(found[1]).toContain('prompt')
    expect(found[2]).toContain('JPEG')
    expect(found[3]).toBe('2 images have no partner.')
    expect(found[4]).toContain('device')
  })
})

it('calls a baseline by its label, else by its id, and by its time', () => {
  const run = { label: '', run_id: '0123456789abcdef', started_at: 1_700_000_000 }
  expect(baselineTitle(run)).toMatch(/^01234567 · 2023-11-1[45] \d\d:\d\d$/)
  expect(baselineTitle({ ...run, label: 'reference' })).toMatch(/^reference · /)
})
