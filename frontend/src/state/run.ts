import { onScopeDispose, ref, shallowRef } from 'vue'

import { ApiError, messageOf, request } from '../lib/api/client'
import type {
  Change,
  Columns,
  Image,
  Images,
  Instance,
  Reasons,
  Revision,
  Revisions,
  Run,
  StepDelta,
} from '../lib/api/schema'
import { RunColumns } from '../lib/columns'
import { ReasonBook } from '../lib/reasons'
import { withRevision } from '../lib/revisions'
import { onChange } from './feed'

type Item = Record<string, unknown>

function withImage(items: Image[], image: Image): Image[] {
  const rest = items.filter((known) => known.sha256 !== image.sha256 || known.step !== image.step)
  return [...rest, image].sort((a, b) => a.at - b.at)
}

/**
 * One run as the page shows it. It listens before it asks, so that nothing between the answer and
 * the stream is missed; `drawn` counts up whenever the columns have changed.
 */
export function useRun(runId: string) {
  const run = shallowRef<Run | null>(null)
  const instance = shallowRef<Instance | null>(null)
  const revisions = shallowRef<Revision[]>([])
  const images = shallowRef<Image[]>([])
  const columns = shallowRef(new RunColumns())
  const reasons = shallowRef(new ReasonBook())
  const version = ref(0)
  const lastStepAt = ref<number | null>(null)
  const state = ref<'loading' | 'ready' | 'missing' | 'deleted' | 'failed'>('loading')
  const problem = ref('')
  let early: Change[] | null = []
  let asked = 0

  function apply(change: Change): void {
    const data: Item = change.data
    switch (change.kind) {
      case 'run':
        run.value = data as unknown as Run
        break
      case 'step': {
        const delta = data as unknown as StepDelta
        columns.value.apply(delta)
        reasons.value.setStep(delta.step.step, delta.reasons)
        lastStepAt.value = Date.now() / 1000
        version.value += 1
        break
      }
      case 'revision':
        revisions.value = withRevision(revisions.value, data as unknown as Revision)
        break
      case 'image':
        images.value = withImage(images.value, data as unknown as Image)
        break
      case 'run_deleted':
        state.value = 'deleted'
        break
    }
  }

  function take(change: Change): void {
    if (change.kind === 'instance') {
      const data = change.data as unknown as Instance
      if (data.instance_id === run.value?.instance_id) instance.value = data
      return
    }
    if (change.run_id !== runId) return
    if (early) early.push(change)
    else apply(change)
  }

  async function load(): Promise<void> {
    const mine = ++asked
    early ??= []
    try {
      const answer = await request<Columns>(`/runs/${runId}/columns`)
      const [one, allRevisions, allImages, allReasons] = await Promise.all([
        request<Run>(`/runs/${runId}`),
        request<Revisions>(`/runs/${runId}/revisions`),
        request<Images>(`/runs/${runId}/images`),
        request<Reasons>(`/runs/${runId}/fallbacks`),
      ])
      if (mine !== asked) return
      columns.value = RunColumns.from(answer)
      columns.value.addLayers(one.layers)
      reasons.value = new ReasonBook()
      reasons.value.load(allReasons.items)
      run.value = one
      revisions.value = allRevisions.items
      images.value = allImages.items
      lastStepAt.value = lastClosed()
      version.value += 1
      const later = early.filter((change) => change.seq > answer.seq)
      early = null
      later.forEach(apply)
      if (state.value !== 'deleted') state.value = 'ready'
      void loadInstance(one.instance_id)
    } catch (error) {
      if (mine !== asked) return
      problem.value = messageOf(error)
      state.value = error instanceof ApiError && error.status === 404 ? 'missing' : 'failed'
    }
  }

  function lastClosed(): number | null {
    const { length, numbers } = columns.value
    return length > 0 ? (numbers.get('closed_at')?.get(length - 1) ?? null) : null
  }

  async function loadInstance(id: string): Promise<void> {
    try {
      instance.value = await request<Instance>(`/instances/${id}`)
    } catch {
      instance.value = null
    }
  }

  const stop = onChange(take, () => void load())
  onScopeDispose(() => {
    stop()
    asked += 1
  })
  void load()

  return {
    run,
    instance,
    revisions,
    images,
    columns,
    reasons,
    version,
    lastStepAt,
    state,
    problem,
    reload: load,
    takeRevision: (item: Revision) => (revisions.value = withRevision(revisions.value, item)),
    takeLabel(label: string) {
      if (run.value) run.value = { ...run.value, label }
    },
    takeInstance: (item: Instance) => (instance.value = item),
  }
}

export type RunState = ReturnType<typeof useRun>
