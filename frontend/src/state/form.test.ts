import { afterEach, beforeEach, describe, expect, it, vi } from 'vitest'
import { ref, shallowRef } from 'vue'

import type { Instance, Revision, Run } from '../lib/api/schema'
import { withRevision } from '../lib/revisions'
import { fakeServer } from '../testing/browser'
import { revision, run, RUN_ID, variant } from '../testing/fixtures'
import { useSettingsForm, type Scope } from './form'
import type { RunState } from './run'

const SETTINGS = { enabled: true, sigma_max: 0, block_type: 'all', P: 3, eps: 1e-6, quality_seed: 0 }
const PUT = `PUT /runs/${RUN_ID}/settings`

function begin() {
  const scope = ref<Scope>('run')
  const revisions = shallowRef<Revision[]>([revision(0, { settings: SETTINGS })])
  const takeRevision = (item: Revision) => (revisions.value = withRevision(revisions.value, item))
  const state = {
    run: shallowRef<Run>(run({ settings: SETTINGS })),
    instance: shallowRef<Instance | null>(null),
    revisions,
    takeRevision,
    takeInstance: vi.fn(),
  }
  const form = useSettingsForm(state as unknown as RunState, ref(variant()), scope)
  return { form, scope, takeRevision, state }
}

const next = (parts: Partial<Revision>) =>
  revision(1, { state: 'pending', applied_step: null, ...parts })

beforeEach(() => fakeServer({}))
afterEach(() => vi.unstubAllGlobals())

it('sends what changed, with the revision that it was typed on', async () => {
  const calls = fakeServer({ [PUT]: next({ settings: { ...SETTINGS, P: 4 }, state: 'pending' }) })
  const { form } = begin()
  form.type('P', '4')
  form.type('eps', '0.000001')
  expect(form.changed.value).toEqual(['P'])
  await form.apply()
  expect(calls).toEqual([{ key: PUT, body: { base_revision: 0, settings: { P: 4 } } }])
  expect(form.draft.value).toEqual({})
  expect(form.base.value.P).toBe(4)
  expect(form.conflict.value).toBeNull()
})

it('keeps a half-typed value when a revision comes, and shows what came', () => {
  const { form, takeRevision } = begin()
  form.type('eps', '0.')
  takeRevision(next({ settings: { ...SETTINGS, P: 5 }, changes: { P: [3, 5] } }))
  expect(form.draft.value.eps).toBe('0.')
  expect(form.base.value.P).toBe(5)
  expect(form.conflict.value?.changes).toEqual({ P: [3, 5] })
  form.type('eps', '0.1')
  expect(form.canApply.value).toBe(false)
  form.rebase()
  expect(form.conflict.value).toBeNull()
  expect(form.canApply.value).toBe(true)
})

it('tells all settings as they are typed, and in force where nothing can be read', () => {
  const { form } = begin()
  form.type('P', '5')
  form.type('sigma_max', '0.')
  form.type('eps', 'none')
  expect(form.wanted.value).toEqual({ ...SETTINGS, P: 5 })
})

it('shows who was first when the server knows of a newer revision', async () => {
  const current = next({ settings: { ...SETTINGS, P: 2 }, changes: { P: [3, 2] } })
  const problem = { type: 'stale-revision', title: '', status: 409, detail: 'stale', current }
  const calls = fakeServer({ [PUT]: () => ({ status: 409, body: problem }) })
  const { form } = begin()
  form.type('P', '4')
  await form.apply()
  expect(form.conflict.value?.revision.number).toBe(1)
  expect(form.draft.value).toEqual({ P: '4' })
  form.rebase()
  await form.apply()
  expect(calls[1]?.body).toEqual({ base_revision: 1, settings: { P: 4 } })
})

it("places the server's refusal at its field until it is typed in again", async () => {
  const errors = [{ field: 'settings.P', value: 4, allowed: 'an odd number' }]
  const problem = { type: 'validation-error', title: '', status: 422, detail: 'P', errors }
  fakeServer({ [PUT]: () => ({ status: 422, body: problem }) })
  const { form } = begin()
  form.type('P', '4')
  await form.apply()
  expect(form.problems.value).toEqual({ P: 'an odd number' })
  expect(form.problem.value).toBe('')
  form.type('P', '5')
  expect(form.problems.value).toEqual({})
})

it('says so when the server does not answer', async () => {
  const { form } = begin()
  form.type('P', '4')
  await form.apply()
  expect(form.problem.value).toBe('The server does not answer.')
  expect(form.draft.value).toEqual({ P: '4' })
})

it('sets later runs over what is set for them already', async () => {
  const instance = { settings: { taylor: { P: 5 } } } as unknown as Instance
  const path = `/instances/${'f'.repeat(32)}`
  const calls = fakeServer({
    [`PUT ${path}/settings/taylor`]: { id: 1, variant: 'taylor', settings: {} },
    [`GET ${path}`]: instance,
  })
  const { form, scope, state } = begin()
  state.instance.value = instance
  scope.value = 'later'
  expect(form.base.value.P).toBe(5)
  form.type('quality_seed', '9')
  await form.apply()
  expect(calls[0]?.body).toEqual({ settings: { P: 5, quality_seed: 9 } })
  await form.takeBackLater()
  expect(calls[2]?.body).toEqual({ settings: null })
})

it('keeps the drafts of the two scopes apart', () => {
  const { form, scope } = begin()
  form.type('P', '4')
  scope.value = 'later'
  expect(form.draft.value).toEqual({})
  scope.value = 'run'
  expect(form.draft.value).toEqual({ P: '4' })
})

it('drops a draft that shows what is in force', () => {
  const { form } = begin()
  form.type('P', '3')
  form.settle('P')
  expect(form.draft.value).toEqual({})
})

describe('while the variant tunes', () => {
  const pending = () => next({ settings: { ...SETTINGS, P: 4 }, state: 'pending' })
  const tuned = (number: number) =>
    revision(number, { settings: { ...SETTINGS, eps: 0.5 }, base: 0, applied_step: 2, tuned: true })

  it('keeps showing what was pushed when something tuned gets a higher number', async () => {
    const calls = fakeServer({ [PUT]: pending() })
    const { form, takeRevision } = begin()
    form.type('P', '4')
    await form.apply()
    takeRevision(tuned(2))
    expect(form.base.value).toMatchObject({ P: 4, eps: SETTINGS.eps })
    takeRevision({ ...pending(), state: 'applied', applied_step: 3 })
    expect(form.base.value).toMatchObject({ P: 4, eps: SETTINGS.eps })
    form.type('enabled', false)
    await form.apply()
    expect(calls[1]?.body).toEqual({ base_revision: 2, settings: { enabled: false } })
  })

  it('falls back to what was tuned when the sampler rejects what was pushed', async () => {
    fakeServer({ [PUT]: pending() })
    const { form, takeRevision } = begin()
    form.type('P', '4')
    await form.apply()
    takeRevision(tuned(2))
    takeRevision({ ...pending(), state: 'rejected' })
    expect(form.base.value).toMatchObject({ P: 3, eps: 0.5 })
  })

  it('keeps a draft, and says what was tuned meanwhile', async () => {
    const calls = fakeServer({ [PUT]: revision(2, { state: 'pending', settings: SETTINGS }) })
    const { form, takeRevision } = begin()
    form.type('P', '4')
    takeRevision(tuned(1))
    expect(form.draft.value).toEqual({ P: '4' })
    expect(form.conflict.value?.revision.tuned).toBe(true)
    expect(form.conflict.value?.changes).toEqual({ eps: [SETTINGS.eps, 0.5] })
    await form.apply()
    expect(calls).toEqual([])
    form.rebase()
    await form.apply()
    expect(calls[0]?.body).toEqual({ base_revision: 1, settings: { P: 4 } })
  })

  it('asks nothing when tuning changed nothing', async () => {
    const calls = fakeServer({ [PUT]: revision(2, { state: 'pending', settings: SETTINGS }) })
    const { form, takeRevision } = begin()
    form.type('P', '4')
    takeRevision({ ...tuned(1), settings: SETTINGS })
    expect(form.conflict.value).toBeNull()
    await form.apply()
    expect(calls[0]?.body).toEqual({ base_revision: 1, settings: { P: 4 } })
  })

  it('learns of it from a push that came too late', async () => {
    const problem = { type: 'stale-revision', title: '', status: 409, detail: 'x', current: tuned(1) }
    fakeServer({ [PUT]: () => ({ status: 409, body: problem }) })
    const { form } = begin()
    form.type('P', '4')
    await form.apply()
    expect(form.draft.value).toEqual({ P: '4' })
    expect(form.problem.value).toBe('')
    expect(form.conflict.value?.revision.tuned).toBe(true)
  })
})

it('keeps what is typed while a push is on its way', async () => {
  const answer = next({ settings: { ...SETTINGS, P: 4 }, state: 'pending' })
  let typeMore: (() => void) | null = null
  const calls = fakeServer({
    [PUT]: () => {
      typeMore?.()
      return { status: 202, body: answer }
    },
  })
  const { form, scope, takeRevision } = begin()
  typeMore = () => {
    form.type('eps', '0.25')
    scope.value = 'later'
    form.type('quality_seed', '9')
  }
  form.type('P', '4')
  await form.apply()
  expect(form.draft.value).toEqual({ quality_seed: '9' })
  scope.value = 'run'
  expect(form.draft.value).toEqual({ eps: '0.25' })
  expect(form.conflict.value).toBeNull()
  takeRevision({ ...answer, state: 'applied', applied_step: 1 })
  expect(form.conflict.value).toBeNull()
  typeMore = null
  await form.apply()
  expect(calls[1]?.body).toEqual({ base_revision: 1, settings: { eps: 0.25 } })
})
