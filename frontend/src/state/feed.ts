import { readonly, ref } from 'vue'

import { API, request } from '../lib/api/client'
import type { Change, Health } from '../lib/api/schema'
import { loadSession } from './session'

export type Connection = 'connecting' | 'open' | 'down' | 'paused'
export type Listener = (change: Change) => void

const KINDS = ['instance', 'run', 'step', 'revision', 'image', 'training', 'run_deleted'] as const
/** A page that slept longer than this asks for the present state rather than for all it missed. */
const LONGEST_REPLAY = 2000
const FIRST_RETRY_MS = 500
const LONGEST_RETRY_MS = 5000
/** The banner waits this long: a server that restarts is not worth alarm. */
const GRACE_MS = 3000

const connection = ref<Connection>('connecting')
const seq = ref(0)
const listeners = new Set<Listener>()
const resyncs = new Set<() => void>()

let source: EventSource | null = null
let retryMs = FIRST_RETRY_MS
let retryTimer: ReturnType<typeof setTimeout> | undefined
let graceTimer: ReturnType<typeof setTimeout> | undefined
let started = false
let positioned = false

function take(event: MessageEvent<string>): void {
  const change = JSON.parse(event.data) as Change
  if (change.seq <= seq.value) return
  seq.value = change.seq
  for (const listener of listeners) listener(change)
}

function lost(): void {
  clearTimeout(graceTimer)
  graceTimer = setTimeout(() => {
    if (connection.value === 'connecting') connection.value = 'down'
  }, GRACE_MS)
  if (connection.value === 'open') connection.value = 'connecting'
}

function retry(): void {
  close()
  lost()
  clearTimeout(retryTimer)
  retryTimer = setTimeout(() => void open(), retryMs)
  retryMs = Math.min(LONGEST_RETRY_MS, retryMs * 2)
}

function close(): void {
  source?.close()
  source = null
}

/**
 * Bring the cursor up to date before a stream opens. A gap too long to replay, or a server whose
 * count began anew, makes every view ask for its present state.
 */
async function position(): Promise<void> {
  // a stream cannot say that its login has run out
  const { may_read: mayRead } = await loadSession()
  if (!mayRead) throw new Error('a token is needed')
  const { latest_seq: latest } = await request<Health>('/health')
  const gap = latest - seq.value
  if (!positioned) {
    positioned = true
    seq.value = latest
  } else if (gap < 0 || gap > LONGEST_REPLAY) {
    seq.value = latest
    resyncs.forEach((resync) => resync())
  }
}

async function open(): Promise<void> {
  close()
  clearTimeout(retryTimer)
  if (document.hidden) return
  try {
    await position()
  } catch {
    retry()
    return
  }
  if (document.hidden || source) return
  const stream = new EventSource(`${API}/stream?after=${seq.value}`)
  source = stream
  stream.addEventListener('open', () => {
    retryMs = FIRST_RETRY_MS
    clearTimeout(graceTimer)
    connection.value = 'open'
  })
  // The browser's own reconnection is slower than ours and gives up on an HTTP error.
  stream.addEventListener('error', () => {
    if (source === stream) retry()
  })
  for (const kind of KINDS) stream.addEventListener(kind, take)
}

/** A hidden page holds no stream: browsers allow six connections to a server over all tabs. */
function onVisibility(): void {
  if (document.hidden) {
    close()
    clearTimeout(retryTimer)
    clearTimeout(graceTimer)
    connection.value = 'paused'
  } else {
    connection.value = 'connecting'
    retryMs = FIRST_RETRY_MS
    lost()
    void open()
  }
}

export async function startFeed(): Promise<void> {
  if (started) {
    retryMs = FIRST_RETRY_MS
    await open()
    return
  }
  started = true
  document.addEventListener('visibilitychange', onVisibility)
  addEventListener('online', () => void open())
  addEventListener('pagehide', close)
  addEventListener('pageshow', (event) => {
    if (event.persisted) onVisibility()
  })
  lost()
  await open()
}

/** Hear every change from now on; `resync` is called when changes were left out. */
export function onChange(listener: Listener, resync: () => void): () => void {
  listeners.add(listener)
  resyncs.add(resync)
  return () => {
    listeners.delete(listener)
    resyncs.delete(resync)
  }
}

export function useFeed() {
  return { connection: readonly(connection), seq: readonly(seq), reconnect: () => void open() }
}
