// @vitest-environment happy-dom
import { afterEach, beforeEach, expect, it, vi } from 'vitest'
import { effectScope, type EffectScope } from 'vue'

import { change, FakeEventSource, fakeServer, settled } from '../testing/browser'
import { columnsAnswer, revision, run, RUN_ID, stepDelta } from '../testing/fixtures'

let scope: EffectScope
let answerColumns: () => void

async function begin() {
  const waiting = new Promise<void>((resolve) => (answerColumns = resolve))
  fakeServer({
    'GET /session': { required: false, may_read: true, may_steer: true },
    'GET /health': { status: 'ok', version: '', latest_seq: 5 },
    [`GET /runs/${RUN_ID}/columns`]: columnsAnswer(),
    [`GET /runs/${RUN_ID}`]: run(),
    [`GET /runs/${RUN_ID}/revisions`]: { items: [revision(0)] },
    [`GET /runs/${RUN_ID}/images`]: { items: [] },
    [`GET /runs/${RUN_ID}/fallbacks`]: { items: [], totals: {} },
  })
  const now = globalThis.fetch
  vi.stubGlobal('fetch', async (url: string, options: RequestInit) => {
    if (url.endsWith('/columns')) await waiting
    return now(url, options)
  })
  const { startFeed } = await import('./feed')
  const { useRun } = await import('./run')
  await startFeed()
  return scope.run(() => useRun(RUN_ID))
}

beforeEach(() => {
  vi.resetModules()
  FakeEventSource.all = []
  vi.stubGlobal('EventSource', FakeEventSource)
  scope = effectScope()
})

afterEach(() => {
  scope.stop()
  vi.unstubAllGlobals()
})

it('misses nothing that comes while it asks, and takes nothing twice', async () => {
  const state = await begin()
  const stream = FakeEventSource.latest
  const layers = ['double.0', 'single.0']
  stream.send(change(6, 'step', stepDelta(1, layers, { nmse: [9, 9] }), RUN_ID))
  stream.send(change(8, 'step', stepDelta(2, layers, { nmse: [0.1, 0.2] }), RUN_ID))
  stream.send(change(9, 'step', stepDelta(0, layers), 'e'.repeat(32)))
  expect(state?.state.value).toBe('loading')

  answerColumns()
  await settled()
  expect(state?.state.value).toBe('ready')
  expect(state?.columns.value.length).toBe(3)
  // the answer includes number 6 (its position is 7), so its own numbers stand
  expect(state?.columns.value.value('nmse', 'double.0', 1)).toBe(0.25)
  expect(state?.columns.value.value('nmse', 'single.0', 2)).toBe(0.2)

  stream.send(change(10, 'step', stepDelta(3, layers), RUN_ID))
  expect(state?.columns.value.length).toBe(4)
  expect(state?.version.value).toBe(3)
})

it('follows revisions and the end of the run', async () => {
  const state = await begin()
  answerColumns()
  await settled()
  const stream = FakeEventSource.latest
  stream.send(change(11, 'revision', revision(1, { state: 'pending' }), RUN_ID))
  stream.send(change(12, 'revision', revision(1, { state: 'applied' }), RUN_ID))
  stream.send(change(13, 'run', run({ status: 'completed' }), RUN_ID))
  expect(state?.revisions.value.map((item) => item.state)).toEqual(['applied', 'applied'])
  expect(state?.run.value?.status).toBe('completed')
  stream.send(change(14, 'run_deleted', { run_id: RUN_ID }, RUN_ID))
  expect(state?.state.value).toBe('deleted')
})
