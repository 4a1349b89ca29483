import { describe, expect, it } from 'vitest'

import { variant } from '../testing/fixtures'
import type { SettingField } from './api/schema'
import { allowedRange, diff, formGroups, parseField, rawValue, readDraft } from './settings'

function field(name: string): SettingField {
  const found = variant().fields.find((item) => item.name === name)
  if (!found) throw new Error(name)
  return found
}

describe('parseField', () => {
  it.each([
    ['P', '4', 4],
    ['P', ' 8 ', 8],
    ['eps', '1e-6', 1e-6],
    ['sigma_max', '0,5', 0.5],
    ['block_type', 'single', 'single'],
    ['enabled', false, false],
  ])('%s takes %s', (name, raw, value) => {
    expect(parseField(field(name), raw)).toEqual({ ok: true, value })
  })

  it.each([
    ['P', ''],
    ['P', '3.5'],
    ['P', '9'],
    ['P', '0'],
    ['P', '-'],
    ['eps', '0'],
    ['eps', 'NaN'],
    ['eps', '1e999'],
    ['block_type', 'triple'],
  ])('%s refuses «%s»', (name, raw) => {
    expect(parseField(field(name), raw).ok).toBe(false)
  })
})

it('takes free text as it is, empty too', () => {
  const text: SettingField = {
    ...field('block_type'),
    name: 'capture_layers',
    choices: null,
    default: '',
  }
  expect(parseField(text, 'single.0-5,double.3')).toEqual({
    ok: true,
    value: 'single.0-5,double.3',
  })
  expect(parseField(text, '')).toEqual({ ok: true, value: '' })
  expect(allowedRange(text)).toBe('text')
})

it('says what is allowed', () => {
  expect(allowedRange(field('P'))).toBe('a whole number from 1 to 8')
  expect(allowedRange(field('eps'))).toBe('a number above 0, at most 1')
  expect(allowedRange(field('block_type'))).toBe('all, double, single')
})

describe('readDraft', () => {
  const base = { P: 3, eps: 1e-6, enabled: true, block_type: 'all' }

  it('keeps only what differs', () => {
    const draft = { P: '3', eps: '0.001', enabled: false }
    expect(readDraft(variant(), draft, base)).toEqual({
      changed: { eps: 0.001, enabled: false },
      problems: {},
    })
  })

  it('places a problem at its field', () => {
    const { changed, problems } = readDraft(variant(), { P: '4', eps: '0' }, base)
    expect(changed).toEqual({ P: 4 })
    expect(problems).toEqual({ eps: 'a number above 0, at most 1' })
  })

  it('compares with the default where the run does not say', () => {
    expect(readDraft(variant(), { sigma_max: '0' }, base).changed).toEqual({})
  })
})

it('lists differences', () => {
  expect(diff({ P: 3, eps: 1 }, { P: 4, eps: 1, extra: true })).toEqual({
    P: [3, 4],
    extra: [undefined, true],
  })
})

it('writes values as inputs show them', () => {
  expect([rawValue(1e-6), rawValue(true), rawValue(null), rawValue('all')]).toEqual([
    '0.000001',
    true,
    '',
    'all',
  ])
})

it('groups fields in the given order and loses none', () => {
  const groups = [
    { name: 'approximation', title: 'Approximation' },
    { name: 'gate', title: 'Gates' },
    { name: 'memory', title: 'Memory' },
  ]
  const form = formGroups(groups, variant().fields)
  expect(form.map((group) => group.name)).toEqual(['approximation', 'gate', 'other'])
  expect(form.flatMap((group) => group.fields)).toHaveLength(variant().fields.length)
})
