import { onScopeDispose, ref, shallowRef, watch, type Ref } from 'vue'

import { messageOf, request } from '../lib/api/client'
import type {
  Change,
  Distillation,
  StudentEventItem,
  StudentEvents,
  TrainingTotals,
  TrainingWindow,
} from '../lib/api/schema'
import { grownFrom, mergeWindow } from '../lib/training'
import { onChange } from './feed'

/** The least time between two questions about what has grown. */
const SHORTEST_GAP_MS = 500
const EVENTS_PAGE = 1000

type Grown = (from: number | null) => void

/**
 * A run's training. The feed says that there is something new and how much there is in all; what
 * exactly is asked for, from where the last answer ended, at most twice a second.
 */
export function useTraining(runId: string, wanted: Readonly<Ref<boolean>>) {
  const summary = shallowRef<Distillation | null>(null)
  const totals = shallowRef<TrainingTotals | null>(null)
  const events = shallowRef<StudentEventItem[]>([])
  const problem = ref('')
  const listeners = new Set<Grown>()
  let timer: ReturnType<typeof setTimeout> | undefined
  let busy = false
  let again = false
  let gone = false

  async function loadEvents(): Promise<void> {
    for (;;) {
      const after = events.value.at(-1)?.seq ?? -1
      const page = await request<StudentEvents>(
        `/runs/${runId}/distillation/events?after=${after}&limit=${EVENTS_PAGE}`,
      )
      if (gone) return
      if (page.items.length > 0) events.value = [...events.value, ...page.items]
      if (!page.more) return
    }
  }

  function eventCount(of: TrainingTotals | null): number {
    return Object.values(of?.events ?? {}).reduce((sum, count) => sum + count, 0)
  }

  async function refresh(): Promise<void> {
    busy = true
    again = false
    try {
      const answer = await request<Distillation>(`/runs/${runId}/distillation`)
      if (gone) return
      const before = summary.value
      summary.value = answer
      totals.value = answer.totals
      problem.value = ''
      if (eventCount(answer.totals) > events.value.length) await loadEvents()
      const from = grownFrom(before?.layers ?? [], answer.layers)
      if (before && from !== null) listeners.forEach((listener) => listener(from))
    } catch (error) {
      problem.value = messageOf(error)
    } finally {
      busy = false
      if (again) schedule()
    }
  }

  function schedule(): void {
    if (gone || !wanted.value) return
    if (busy || timer !== undefined) {
      again = true
      return
    }
    timer = setTimeout(() => {
      timer = undefined
      void refresh()
    }, SHORTEST_GAP_MS)
  }

  function take(change: Change): void {
    if (change.kind !== 'training' || change.run_id !== runId) return
    totals.value = change.data as unknown as TrainingTotals
    schedule()
  }

  function reload(): void {
    summary.value = null
    events.value = []
    listeners.forEach((listener) => listener(null))
    if (wanted.value) void refresh()
  }

  const stop = onChange(take, reload)
  onScopeDispose(() => {
    gone = true
    stop()
    clearTimeout(timer)
  })
  watch(wanted, (now) => now && void refresh(), { immediate: true })

  return {
    runId,
    summary,
    totals,
    events,
    problem,
    onGrown(listener: Grown): () => void {
      listeners.add(listener)
      return () => listeners.delete(listener)
    },
  }
}

export type TrainingState = ReturnType<typeof useTraining>

export interface WindowQuery {
  metric: string
  part: ('heatmap' | 'bands' | 'lines')[]
  layer: string | null
  range: { from: number; to: number } | null
  points: number
}

function address(runId: string, query: WindowQuery, more: Record<string, number>): string {
  const text = new URLSearchParams({ metric: query.metric, points: String(query.points) })
  query.part.forEach((name) => text.append('part', name))
  if (query.layer !== null) text.set('layer', query.layer)
  if (query.range) {
    text.set('from_update', String(query.range.from))
    text.set('to_update', String(query.range.to))
  }
  for (const [name, value] of Object.entries(more)) text.set(name, String(value))
  return `/runs/${runId}/distillation/series?${text}`
}

/** A window into the series: the whole of it once, later what has grown. */
export function useTrainingWindow(training: TrainingState, query: () => WindowQuery | null) {
  const window = shallowRef<TrainingWindow | null>(null)
  const waiting = ref(false)
  const problem = ref('')
  let asked = 0
  let abort: AbortController | null = null
  /** Least update that has grown since the last question; null while nothing has. */
  let grown: number | null = null

  async function ask(from: number | null): Promise<void> {
    const wanted = query()
    if (!wanted) {
      window.value = null
      return
    }
    const mine = ++asked
    abort?.abort()
    abort = new AbortController()
    waiting.value = true
    const known = window.value
    const partly = from !== null && known !== null && known.start.length > 0
    const { range } = wanted
    if (partly && range && from > range.to) {
      waiting.value = false
      return
    }
    const more: Record<string, number> = partly
      ? { width: known.width, from_update: Math.max(from, range?.from ?? 0) }
      : {}
    try {
      const answer = await request<TrainingWindow>(address(training.runId, wanted, more), {
        signal: abort.signal,
      })
      if (mine !== asked) return
      problem.value = ''
      const merged = partly ? mergeWindow(known, answer) : answer
      if (!merged || merged.start.length > wanted.points) return await ask(null)
      window.value = merged
    } catch (error) {
      if (mine !== asked) return
      problem.value = messageOf(error)
    } finally {
      if (mine === asked) {
        waiting.value = false
        abort = null
        if (grown !== null) {
          const next = grown
          grown = null
          void ask(window.value ? next : null)
        }
      }
    }
  }

  const stop = training.onGrown((from) => {
    if (from === null) void ask(null)
    else if (abort) grown = Math.min(grown ?? from, from)
    else void ask(from)
  })
  onScopeDispose(() => {
    stop()
    asked += 1
    abort?.abort()
  })
  watch(
    () => JSON.stringify(query()),
    () => {
      grown = null
      void ask(null)
    },
    { immediate: true },
  )

  return { window, waiting, problem }
}
