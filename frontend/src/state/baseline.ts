import { computed, onScopeDispose, ref, shallowRef, watch, type Ref } from 'vue'

import { messageOf, request } from '../lib/api/client'
import type { Baseline, Change, ComparedRun, Comparison, Image, Run } from '../lib/api/schema'
import { timeRatio } from '../lib/comparison'
import { onChange } from './feed'

interface Watched {
  run: Ref<Run | null>
  images: Ref<Image[]>
}

/**
 * A run's baseline and what the two differ by. It follows the feed: the list anew when an exact
 * run ends or a run is deleted, the figures when a finished image comes.
 */
export function useBaseline(runId: string, { run, images }: Watched, pinned: Ref<string | null>) {
  const found = shallowRef<Baseline | null>(null)
  const comparison = shallowRef<Comparison | null>(null)
  const problem = ref('')
  const failed = ref('')
  let askedList = 0
  let askedFigures = 0

  const chosen = computed(() => pinned.value ?? found.value?.recommended ?? null)
  const candidates = computed(() => found.value?.candidates.map((item) => item.run) ?? [])
  const baseline = computed<ComparedRun | null>(() => {
    if (comparison.value?.baseline.run_id === chosen.value) return comparison.value.baseline
    return candidates.value.find((item) => item.run_id === chosen.value) ?? null
  })
  const finals = computed(() => images.value.filter((image) => image.kind === 'final'))
  const ended = computed(() => run.value !== null && run.value.status !== 'running')
  const times = computed(() => {
    if (comparison.value) {
      const { attn_ms: attention, duration_ms: duration, same_device: same } = comparison.value
      return { attention, duration, same }
    }
    if (!run.value || !ended.value || !baseline.value) return null
    return {
      attention: timeRatio(run.value.attn_ms, baseline.value.attn_ms),
      duration: timeRatio(run.value.duration_ms, baseline.value.duration_ms),
      same: true,
    }
  })

  async function load(): Promise<void> {
    const mine = ++askedList
    try {
      const answer = await request<Baseline>(`/runs/${runId}/baseline`)
      if (mine !== askedList) return
      found.value = answer
      failed.value = ''
    } catch (error) {
      if (mine === askedList) failed.value = messageOf(error)
    }
  }

  async function compare(): Promise<void> {
    const mine = ++askedFigures
    const other = chosen.value
    if (comparison.value?.baseline.run_id !== other) comparison.value = null
    if (other === null || finals.value.length === 0) return
    // Its picture comes a little after its end, and the feed tells of it.
    if (baseline.value?.finals.length === 0) return
    try {
      const answer = await request<Comparison>(`/runs/${runId}/comparison?with=${other}`)
      if (mine !== askedFigures) return
      comparison.value = answer
      problem.value = ''
    } catch (error) {
      if (mine !== askedFigures) return
      comparison.value = null
      problem.value = messageOf(error)
    }
  }

  function take(change: Change): void {
    if (change.run_id === runId) return
    if (change.kind === 'run_deleted') {
      void load()
    } else if (change.kind === 'run') {
      const other = change.data as unknown as Run
      if (other.variant === 'exact' && other.status !== 'running') void load()
    } else if (change.kind === 'image' && candidates.value.some((item) => item.run_id === change.run_id)) {
      void load()
    }
  }

  const stop = onChange(take, () => void load())
  onScopeDispose(() => {
    stop()
    askedList += 1
    askedFigures += 1
  })
  watch(
    () => [chosen.value, baseline.value?.finals.length, ...finals.value.map(({ sha256 }) => sha256)].join(),
    () => {
      problem.value = ''
      void compare()
    },
    { immediate: true },
  )
  void load()

  return { found, chosen, candidates, baseline, comparison, finals, ended, times, problem, failed, reload: load }
}
