// @vitest-environment happy-dom
import { afterEach, beforeEach, expect, it, vi } from 'vitest'
import { effectScope, nextTick, ref, shallowRef, type EffectScope } from 'vue'

import type { Image, Run } from '../lib/api/schema'
import { answered, change, FakeEventSource, fakeServer } from '../testing/browser'
import { baselineAnswer, comparedRun, comparison, final, run, RUN_ID } from '../testing/fixtures'

const EXACT = 'e'.repeat(32)
const OTHER = 'f'.repeat(32)

let scope: EffectScope
let answers: Record<string, unknown>

async function begin(images: Image[] = []) {
  const calls = fakeServer(answers)
  const watched = { run: shallowRef<Run | null>(run()), images: shallowRef(images) }
  const pinned = ref<string | null>(null)
  const { startFeed } = await import('./feed')
  const { useBaseline } = await import('./baseline')
  await startFeed()
  const state = scope.run(() => useBaseline(RUN_ID, watched, pinned))
  if (!state) throw new Error('the scope is gone')
  await answered()
  const asked = (path: string) => calls.filter(({ key }) => key === `GET /runs/${RUN_ID}${path}`).length
  return { state, watched, pinned, asked }
}

beforeEach(() => {
  vi.resetModules()
  FakeEventSource.all = []
  vi.stubGlobal('EventSource', FakeEventSource)
  scope = effectScope()
  answers = {
    'GET /session': { required: false, may_read: true, may_steer: true },
    'GET /health': { status: 'ok', version: '', latest_seq: 5 },
    [`GET /runs/${RUN_ID}/baseline`]: baselineAnswer([comparedRun({ run_id: EXACT })]),
    [`GET /runs/${RUN_ID}/comparison?with=${EXACT}`]: comparison(EXACT),
    [`GET /runs/${RUN_ID}/comparison?with=${OTHER}`]: comparison(OTHER),
  }
})

afterEach(() => {
  scope.stop()
  vi.unstubAllGlobals()
})

it('compares as soon as the finished image comes, and not before', async () => {
  const { state, watched, asked } = await begin()
  expect(state.chosen.value).toBe(EXACT)
  expect(state.baseline.value?.run_id).toBe(EXACT)
  expect(state.times.value).toBeNull()
  expect(asked(`/comparison?with=${EXACT}`)).toBe(0)

  watched.run.value = run({ status: 'completed', attn_ms: 10, duration_ms: 300 })
  expect(state.times.value?.attention.ratio).toBe(2)
  watched.images.value = [final('1')]
  await nextTick()
  await answered()
  expect(state.comparison.value?.images[0]?.psnr).toBe(31.5)
  expect(state.times.value?.attention.ratio).toBe(0.5)
  expect(asked(`/comparison?with=${EXACT}`)).toBe(1)
})

it('takes the run that the user has chosen, also one that is not in the list', async () => {
  const { state, pinned } = await begin([final('1')])
  expect(state.comparison.value?.baseline.run_id).toBe(EXACT)
  pinned.value = OTHER
  await nextTick()
  await answered()
  expect(state.comparison.value?.baseline.run_id).toBe(OTHER)
  pinned.value = null
  await nextTick()
  expect(state.comparison.value).toBeNull()
  await answered()
  expect(state.comparison.value?.baseline.run_id).toBe(EXACT)
})

it('finds the baseline that ends while the page is open', async () => {
  const path = `GET /runs/${RUN_ID}/baseline`
  const there = answers[path]
  answers[path] = baselineAnswer([])
  const { state, asked } = await begin([final('1')])
  expect(state.chosen.value).toBeNull()
  answers[path] = there
  const stream = FakeEventSource.latest
  const exact = (status: Run['status']) => run({ run_id: EXACT, variant: 'exact', status })
  stream.send(change(6, 'run', exact('running'), EXACT))
  stream.send(change(7, 'run', run({ run_id: OTHER, status: 'completed' }), OTHER))
  expect(asked('/baseline')).toBe(1)
  stream.send(change(8, 'run', exact('completed'), EXACT))
  await answered()
  expect(state.comparison.value?.baseline.run_id).toBe(EXACT)
})

it('says why two runs cannot be compared', async () => {
  const detail = 'image 0123: 512×512 pixels; allowed: 1024×1024.'
  answers[`GET /runs/${RUN_ID}/comparison?with=${EXACT}`] = () => ({
    status: 422,
    body: { type: 'image-sizes-differ', title: '', status: 422, detail, errors: [], current: null },
  })
  const { state } = await begin([final('1')])
  expect(state.problem.value).toBe(detail)
  expect(state.comparison.value).toBeNull()
})

it('waits for the picture of a baseline that has just ended', async () => {
  const path = `GET /runs/${RUN_ID}/baseline`
  const there = answers[path]
  answers[path] = baselineAnswer([comparedRun({ run_id: EXACT, finals: [] })])
  const { state, asked } = await begin([final('1')])
  expect(state.chosen.value).toBe(EXACT)
  expect(asked(`/comparison?with=${EXACT}`)).toBe(0)
  answers[path] = there
  FakeEventSource.latest.send(change(6, 'image', final('2'), EXACT))
  await answered()
  expect(state.comparison.value?.baseline.run_id).toBe(EXACT)
})
