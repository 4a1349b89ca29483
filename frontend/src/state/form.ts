import { computed, ref, shallowRef, watch, type Ref } from 'vue'

import { ApiError, messageOf, request } from '../lib/api/client'
import type { Instance, Revision, VariantSchema } from '../lib/api/schema'
import { newestOf, standingOf } from '../lib/revisions'
import { diff, readDraft, type Changes, type Draft, type Settings } from '../lib/settings'
import type { RunState } from './run'

export type Scope = 'run' | 'later'

/**
 * The settings form. A field shows what the user has typed until it is sent or taken back, and
 * otherwise what is in force; nothing that arrives ever overwrites what was typed.
 */
export function useSettingsForm(
  state: RunState,
  schema: Readonly<Ref<VariantSchema | undefined>>,
  scope: Readonly<Ref<Scope>>,
) {
  const drafts = ref<Record<Scope, Draft>>({ run: {}, later: {} })
  const refused = ref<Record<string, string>>({})
  const problem = ref('')
  const busy = ref(false)
  /** The newest revision when the draft was begun, and what was expected to run then. */
  const begunOn = shallowRef<{ number: number; settings: Settings } | null>(null)

  const draft = computed(() => drafts.value[scope.value])
  const newest = computed(() => newestOf(state.revisions.value))
  const inForce = computed<Settings>(() => state.run.value?.settings ?? {})
  const standing = computed(() => standingOf(state.revisions.value))
  const expected = computed<Settings>(() => standing.value?.settings ?? inForce.value)
  const variant = computed(() => state.run.value?.variant ?? '')
  const later = computed(() => state.instance.value?.settings?.[variant.value] ?? null)
  const base = computed<Settings>(() =>
    scope.value === 'run' ? expected.value : { ...inForce.value, ...later.value },
  )
  const read = computed(() =>
    schema.value
      ? readDraft(schema.value, draft.value, base.value)
      : { changed: {}, problems: {} },
  )
  const problems = computed(() => ({ ...refused.value, ...read.value.problems }))
  const changed = computed(() => Object.keys(read.value.changed))
  /** All settings as the form shows them; a field that cannot be read keeps its value. */
  const wanted = computed<Settings>(() => ({ ...base.value, ...read.value.changed }))
  /** What somebody else, or tuning, changed since the draft was begun; null while nobody did. */
  const overtaken = computed<{ revision: Revision; changes: Changes } | null>(() => {
    const [begun, now] = [begunOn.value, standing.value]
    if (!begun || !now || (newest.value?.number ?? 0) <= begun.number) return null
    const changes = diff(begun.settings, now.settings)
    return Object.keys(changes).length > 0 ? { revision: now, changes } : null
  })
  const conflict = computed(() => (scope.value === 'run' && !busy.value ? overtaken.value : null))
  const canApply = computed(
    () =>
      !busy.value &&
      conflict.value === null &&
      changed.value.length > 0 &&
      Object.keys(read.value.problems).length === 0,
  )

  function type(name: string, raw: string | boolean): void {
    if (scope.value === 'run' && begunOn.value === null) rebase()
    draft.value[name] = raw
    delete refused.value[name]
    problem.value = ''
  }

  function takeBack(name?: string): void {
    if (name === undefined) drafts.value[scope.value] = {}
    else delete draft.value[name]
    refused.value = {}
    problem.value = ''
    forgetBeginning()
  }

  function forgetBeginning(): void {
    if (Object.keys(drafts.value.run).length === 0) begunOn.value = null
  }

  /** Drop what has been sent. What was typed while it was on its way stays. */
  function takeBackSent(from: Scope, sent: Draft): void {
    const left = Object.entries(drafts.value[from]).filter(([name, raw]) => raw !== sent[name])
    drafts.value[from] = Object.fromEntries(left)
    forgetBeginning()
  }

  function rebase(): void {
    begunOn.value = { number: newest.value?.number ?? 0, settings: expected.value }
    problem.value = ''
  }

  /** A field that shows again what is in force needs no draft any more. */
  function settle(name: string): void {
    if (!(name in read.value.changed) && !(name in problems.value)) takeBack(name)
  }

  function fail(error: unknown): void {
    problem.value = messageOf(error)
    if (!(error instanceof ApiError) || !error.problem) return
    const { current, errors } = error.problem
    if (current) {
      state.takeRevision(current)
      if (overtaken.value) problem.value = ''
    }
    const known = new Set(schema.value?.fields.map((field) => field.name))
    for (const item of errors ?? []) {
      const name = item.field.replace(/^settings\./, '')
      if (!known.has(name)) continue
      refused.value[name] = item.allowed
      problem.value = ''
    }
  }

  async function attempt(work: () => Promise<void>): Promise<void> {
    busy.value = true
    problem.value = ''
    refused.value = {}
    try {
      await work()
    } catch (error) {
      fail(error)
    } finally {
      busy.value = false
    }
  }

  async function push(settings: Settings, baseRevision: number): Promise<Revision> {
    const id = state.run.value?.run_id ?? ''
    const revision = await request<Revision>(`/runs/${id}/settings`, {
      method: 'PUT',
      body: { base_revision: baseRevision, settings },
    })
    state.takeRevision(revision)
    return revision
  }

  async function putLater(settings: Settings | null): Promise<void> {
    const id = state.run.value?.instance_id ?? ''
    await request(`/instances/${id}/settings/${variant.value}`, {
      method: 'PUT',
      body: { settings },
    })
    state.takeInstance(await request<Instance>(`/instances/${id}`))
  }

  async function apply(): Promise<void> {
    if (conflict.value) return
    const [from, sent, changes] = [scope.value, { ...draft.value }, read.value.changed]
    await attempt(async () => {
      if (from === 'run') {
        const { number, settings } = await push(changes, newest.value?.number ?? 0)
        if (begunOn.value) begunOn.value = { number, settings }
      } else {
        await putLater({ ...later.value, ...changes })
      }
      takeBackSent(from, sent)
    })
  }

  /** Settings from elsewhere than the form: a revert. What is typed in the form stays. */
  const send = (settings: Settings) =>
    attempt(async () => {
      const number = newest.value?.number ?? 0
      await push(settings, number)
      if (begunOn.value?.number === number) rebase()
    })

  const takeBackLater = () => attempt(() => putLater(null))

  watch(scope, () => {
    refused.value = {}
    problem.value = ''
  })

  return {
    draft,
    base,
    inForce,
    expected,
    later,
    changed,
    wanted,
    problems,
    problem,
    busy,
    canApply,
    conflict,
    type,
    takeBack,
    rebase,
    settle,
    apply,
    send,
    takeBackLater,
  }
}

export type SettingsFormState = ReturnType<typeof useSettingsForm>
