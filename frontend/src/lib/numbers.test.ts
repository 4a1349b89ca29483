import { describe, expect, it } from 'vitest'

import {
  formatAge,
  formatBytes,
  formatDuration,
  formatNumber,
  formatSetting,
  formatShare,
  parseNumber,
} from './numbers'

describe('parseNumber', () => {
  it('reads what JSON cannot spell', () => {
    expect(parseNumber('NaN')).toBeNaN()
    expect(parseNumber('Infinity')).toBe(Infinity)
    expect(parseNumber('-Infinity')).toBe(-Infinity)
  })

  it('keeps "not measured" apart from NaN', () => {
    expect(parseNumber(null)).toBeNull()
    expect(parseNumber(undefined)).toBeNull()
    expect(parseNumber(0)).toBe(0)
  })
})

describe('formatNumber', () => {
  it.each([
    [0, '0'],
    [0.0123, '0.0123'],
    [1.5, '1.50'],
    [123.456, '123'],
    [-2.5, '−2.50'],
    [1e-7, '1.00×10⁻⁷'],
    [3.2e12, '3.20×10¹²'],
    ['NaN', 'NaN'],
    ['Infinity', '+∞'],
    ['-Infinity', '−∞'],
    [null, '–'],
  ])('%s → %s', (value, text) => {
    expect(formatNumber(value)).toBe(text)
  })
})

describe('formatShare', () => {
  it.each([
    [0, '0 %'],
    [0.0002, '<0.1 %'],
    [0.034, '3.4 %'],
    [1, '100 %'],
    [null, '–'],
  ])('%s → %s', (value, text) => {
    expect(formatShare(value)).toBe(text)
  })
})

describe('formatDuration', () => {
  it.each([
    [0, '0 ms'],
    [0.64, '640 µs'],
    [12.34, '12.3 ms'],
    [4100, '4.1 s'],
    [59_970, '1 min 00 s'],
    [187_000, '3 min 07 s'],
    [7_500_000, '2 h 05 min'],
    [null, '–'],
  ])('%s ms → %s', (value, text) => {
    expect(formatDuration(value)).toBe(text)
  })
})

describe('formatAge', () => {
  it.each([
    [-3, '0.0 s ago'],
    [0.42, '0.4 s ago'],
    [42, '42 s ago'],
    [200, '3 min ago'],
    [90_000, 'yesterday'],
    [200_000, '2 days ago'],
  ])('%s s → %s', (value, text) => {
    expect(formatAge(value)).toBe(text)
  })
})

it('formats sizes', () => {
  expect(formatBytes(512)).toBe('512 B')
  expect(formatBytes(1_530_000)).toBe('1.5 MB')
})

it('never rounds a setting', () => {
  expect(formatSetting(0.000001)).toBe('0.000001')
  expect(formatSetting(true)).toBe('on')
  expect(formatSetting('single')).toBe('single')
})
