import type { RunStatus } from './api/schema'

export type Query = Record<string, string | null | undefined | (string | null)[]>
export type Range = [number, number]

/** What a run's page shows: everything that a pasted link must bring back. */
export interface RunView {
  metric: string
  layer: string | null
  step: number | null
  /** Range of steps and of rows; null follows the run. */
  x: Range | null
  y: Range | null
  /** Step of the preview; null shows the newest image. */
  preview: number | null
  scope: 'run' | 'later'
  /** Id of the run to compare with; null takes the one that fits best. */
  baseline: string | null
  compare: CompareMode
  /** Which of a batch's finished images is compared. */
  pair: number
  /** What stands in the middle of a run that trains students. */
  tab: RunTab
  /** Metric of the students' updates, and range of their numbers; null follows the training. */
  trained: string
  updates: Range | null
}

export type RunTab = 'distillation' | 'attention'

/** How two images stand beside each other. */
export type CompareMode = 'wipe' | 'side' | 'error'

export const COMPARE_MODES: CompareMode[] = ['wipe', 'side', 'error']

export const DEFAULT_RUN_VIEW: RunView = {
  metric: 'nmse',
  layer: null,
  step: null,
  x: null,
  y: null,
  preview: null,
  scope: 'run',
  baseline: null,
  compare: 'wipe',
  pair: 0,
  tab: 'distillation',
  trained: 'nmse_ema',
  updates: null,
}

export interface RunsView {
  q: string
  status: RunStatus[]
  variant: string[]
  sort: string
  page: number
}

export const STATUSES: RunStatus[] = ['running', 'completed', 'interrupted', 'failed', 'lost']
export const PAGE_SIZE = 50

function one(query: Query, name: string): string | null {
  const value = query[name]
  return (Array.isArray(value) ? value[0] : value) ?? null
}

function all(query: Query, name: string): string[] {
  const text = one(query, name)
  return text ? text.split(',').filter(Boolean) : []
}

function wholeNumber(text: string | null): number | null {
  return text !== null && /^\d{1,9}$/.test(text) ? Number(text) : null
}

function range(text: string | null): Range | null {
  const parts = (text ?? '').split('~').map(Number)
  const [from, to] = parts
  if (parts.length !== 2 || from === undefined || to === undefined) return null
  return Number.isFinite(from) && Number.isFinite(to) && from < to ? [from, to] : null
}

function short(value: number): string {
  return String(Number(value.toFixed(3)))
}

export function readRunView(query: Query): RunView {
  const metric = one(query, 'metric')
  const baseline = one(query, 'baseline')
  const trained = one(query, 'trained')
  return {
    metric: metric && /^\w{1,64}$/.test(metric) ? metric : DEFAULT_RUN_VIEW.metric,
    layer: one(query, 'layer'),
    step: wholeNumber(one(query, 'step')),
    x: range(one(query, 'x')),
    y: range(one(query, 'y')),
    preview: wholeNumber(one(query, 'preview')),
    scope: one(query, 'scope') === 'later' ? 'later' : 'run',
    baseline: baseline && /^[0-9a-f]{32}$/.test(baseline) ? baseline : null,
    compare: COMPARE_MODES.find((mode) => mode === one(query, 'compare')) ?? 'wipe',
    pair: wholeNumber(one(query, 'pair')) ?? 0,
    tab: one(query, 'tab') === 'attention' ? 'attention' : 'distillation',
    trained: trained && /^\w{1,64}$/.test(trained) ? trained : DEFAULT_RUN_VIEW.trained,
    updates: range(one(query, 'updates')),
  }
}

/** The shortest query that brings the view back: what is as usual is left out. */
export function writeRunView(view: RunView): Record<string, string> {
  const query: Record<string, string> = {}
  if (view.metric !== DEFAULT_RUN_VIEW.metric) query.metric = view.metric
  if (view.layer !== null) query.layer = view.layer
  if (view.step !== null) query.step = String(view.step)
  if (view.x) query.x = view.x.map(short).join('~')
  if (view.y) query.y = view.y.map(short).join('~')
  if (view.preview !== null) query.preview = String(view.preview)
  if (view.scope !== 'run') query.scope = view.scope
  if (view.baseline !== null) query.baseline = view.baseline
  if (view.compare !== 'wipe') query.compare = view.compare
  if (view.pair !== 0) query.pair = String(view.pair)
  if (view.tab !== DEFAULT_RUN_VIEW.tab) query.tab = view.tab
  if (view.trained !== DEFAULT_RUN_VIEW.trained) query.trained = view.trained
  if (view.updates) query.updates = view.updates.map(short).join('~')
  return query
}

export function readRunsView(query: Query): RunsView {
  const known = new Set<string>(STATUSES)
  return {
    q: one(query, 'q') ?? '',
    status: all(query, 'status').filter((name): name is RunStatus => known.has(name)),
    variant: all(query, 'variant'),
    sort: one(query, 'sort') ?? '',
    page: Math.max(1, wholeNumber(one(query, 'page')) ?? 1),
  }
}

export function writeRunsView(view: RunsView): Record<string, string> {
  const query: Record<string, string> = {}
  if (view.q) query.q = view.q
  if (view.status.length > 0) query.status = view.status.join(',')
  if (view.variant.length > 0) query.variant = view.variant.join(',')
  if (view.sort) query.sort = view.sort
  if (view.page > 1) query.page = String(view.page)
  return query
}
