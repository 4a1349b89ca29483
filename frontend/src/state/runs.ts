import { onScopeDispose, ref, shallowRef, watch, type Ref } from 'vue'

import { messageOf, request } from '../lib/api/client'
import type { Change, Run, Runs } from '../lib/api/schema'
import { PAGE_SIZE, type RunsView } from '../lib/urlState'
import { onChange } from './feed'

/** New runs and changed states move rows, so the list is asked for again, this often at most. */
const RELOAD_GAP_MS = 800

export function runsQuery(view: RunsView): string {
  const query = new URLSearchParams()
  if (view.q) query.set('q', view.q)
  for (const status of view.status) query.append('status', status)
  for (const variant of view.variant) query.append('variant', variant)
  if (view.sort) query.set('sort', view.sort)
  query.set('limit', String(PAGE_SIZE))
  query.set('offset', String((view.page - 1) * PAGE_SIZE))
  return query.toString()
}

/** One page of the list of runs, kept up to date by the feed. */
export function useRuns(view: Ref<RunsView>) {
  const items = shallowRef<Run[]>([])
  const total = ref(0)
  const loaded = ref(false)
  const problem = ref('')
  let asked = 0
  let timer: ReturnType<typeof setTimeout> | undefined

  async function load(): Promise<void> {
    clearTimeout(timer)
    timer = undefined
    const mine = ++asked
    try {
      const answer = await request<Runs>(`/runs?${runsQuery(view.value)}`)
      if (mine !== asked) return
      items.value = answer.items
      total.value = answer.total
      loaded.value = true
      problem.value = ''
    } catch (error) {
      if (mine === asked) problem.value = messageOf(error)
    }
  }

  function reloadSoon(): void {
    timer ??= setTimeout(() => void load(), RELOAD_GAP_MS)
  }

  function take(change: Change): void {
    if (change.kind === 'run_deleted') {
      reloadSoon()
      return
    }
    if (change.kind !== 'run') return
    const run = change.data as unknown as Run
    const index = items.value.findIndex((item) => item.run_id === run.run_id)
    const known = items.value[index]
    if (!known) {
      reloadSoon()
      return
    }
    items.value = items.value.with(index, run)
    if (known.status !== run.status) reloadSoon()
  }

  const stop = onChange(take, () => void load())
  onScopeDispose(() => {
    stop()
    clearTimeout(timer)
    asked += 1
  })
  watch(view, () => void load(), { immediate: true, deep: true })

  return { items, total, loaded, problem, reload: load }
}
