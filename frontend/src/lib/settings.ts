import type { SettingField, VariantSchema } from './api/schema'

export type Settings = Record<string, unknown>
/** What the user has typed and not yet sent, as typed: a half-written number stays as it is. */
export type Draft = Record<string, string | boolean>

export type Parsed = { ok: true; value: boolean | number | string } | { ok: false; allowed: string }

const WHOLE = /^[+-]?\d+$/

export function allowedRange(field: SettingField): string {
  if (field.choices?.length) return field.choices.join(', ')
  if (field.type === 'boolean') return 'on or off'
  if (field.type === 'string') {
    return field.max_length ? `text of at most ${field.max_length} characters` : 'text'
  }
  const kind = field.type === 'integer' ? 'a whole number' : 'a number'
  const { minimum, maximum, exclusive_minimum: above } = field
  const least = typeof above === 'number' ? `above ${above}` : null
  if (least && typeof maximum === 'number') return `${kind} ${least}, at most ${maximum}`
  if (least) return `${kind} ${least}`
  if (typeof minimum === 'number' && typeof maximum === 'number') {
    return `${kind} from ${minimum} to ${maximum}`
  }
  if (typeof minimum === 'number') return `${kind} of at least ${minimum}`
  if (typeof maximum === 'number') return `${kind} of at most ${maximum}`
  return kind
}

export function parseField(field: SettingField, raw: string | boolean): Parsed {
  const refused: Parsed = { ok: false, allowed: allowedRange(field) }
  if (field.type === 'boolean') return { ok: true, value: raw === true }
  if (typeof raw === 'boolean') return refused
  if (field.type === 'string') {
    const listed = !field.choices?.length || field.choices.includes(raw)
    // counted like the server does, by characters and not by UTF-16's halves of them
    const fits = listed && [...raw].length <= (field.max_length ?? Infinity)
    return fits ? { ok: true, value: raw } : refused
  }
  const text = raw.trim().replace(',', '.').replace('−', '-')
  if (text === '' || (field.type === 'integer' && !WHOLE.test(text))) return refused
  const value = Number(text)
  if (!Number.isFinite(value)) return refused
  if (typeof field.minimum === 'number' && value < field.minimum) return refused
  if (typeof field.maximum === 'number' && value > field.maximum) return refused
  if (typeof field.exclusive_minimum === 'number' && value <= field.exclusive_minimum) {
    return refused
  }
  return { ok: true, value }
}

/** A value as the form's input shows it. */
export function rawValue(value: unknown): string | boolean {
  if (typeof value === 'boolean') return value
  if (value === null || value === undefined) return ''
  return typeof value === 'string' || typeof value === 'number' ? String(value) : ''
}

export function settingOf(field: SettingField, settings: Settings): unknown {
  return field.name in settings ? settings[field.name] : field.default
}

export interface DraftResult {
  /** Settings whose value would change. */
  changed: Settings
  /** What may stand there instead, by the name of each field that cannot be read. */
  problems: Record<string, string>
}

/** What a draft would change of some settings. */
export function readDraft(schema: VariantSchema, draft: Draft, base: Settings): DraftResult {
  const result: DraftResult = { changed: {}, problems: {} }
  for (const field of schema.fields) {
    const raw = draft[field.name]
    if (raw === undefined) continue
    const parsed = parseField(field, raw)
    if (!parsed.ok) result.problems[field.name] = parsed.allowed
    else if (parsed.value !== settingOf(field, base)) result.changed[field.name] = parsed.value
  }
  return result
}

export type Changes = Record<string, [unknown, unknown]>

export function diff(before: Settings, after: Settings): Changes {
  const changes: Changes = {}
  for (const name of new Set([...Object.keys(before), ...Object.keys(after)])) {
    if (JSON.stringify(before[name]) !== JSON.stringify(after[name])) {
      changes[name] = [before[name], after[name]]
    }
  }
  return changes
}

export interface FormGroup {
  name: string
  title: string
  fields: SettingField[]
}

/** Fields in the order of the form; a group that has none is left out. */
export function formGroups(
  groups: readonly { name: string; title: string }[],
  fields: readonly SettingField[],
): FormGroup[] {
  const known = groups.map(({ name, title }) => ({
    name,
    title,
    fields: fields.filter((field) => field.group === name),
  }))
  const names = new Set(groups.map((group) => group.name))
  const rest = fields.filter((field) => !names.has(field.group))
  if (rest.length > 0) known.push({ name: 'other', title: 'Other', fields: rest })
  return known.filter((group) => group.fields.length > 0)
}
