import { vi } from 'vitest'

import type { Change } from '../lib/api/schema'

/** An EventSource that says what a test tells it to. */
export class FakeEventSource {
  static all: FakeEventSource[] = []
  static get latest(): FakeEventSource {
    const source = FakeEventSource.all.at(-1)
    if (!source) throw new Error('no stream was opened')
    return source
  }

  closed = false
  private readonly takers = new Map<string, ((event: unknown) => void)[]>()

  constructor(readonly url: string) {
    FakeEventSource.all.push(this)
  }

  addEventListener(name: string, take: (event: unknown) => void): void {
    this.takers.set(name, [...(this.takers.get(name) ?? []), take])
  }

  close(): void {
    this.closed = true
  }

  say(name: string, event: unknown = {}): void {
    if (!this.closed) this.takers.get(name)?.forEach((take) => take(event))
  }

  send(change: Change): void {
    this.say(change.kind, { data: JSON.stringify(change) })
  }
}

export type Answer = (body: unknown) => { status?: number; body?: unknown }

/** Answers by "METHOD path"; a path that a test does not foresee fails it. */
export function fakeServer(answers: Record<string, unknown>) {
  const calls: { key: string; body: unknown }[] = []
  vi.stubGlobal('fetch', (url: string, options: RequestInit) => {
    const key = `${options.method ?? 'GET'} ${url.replace('/api/v1', '')}`
    const body: unknown = typeof options.body === 'string' ? JSON.parse(options.body) : undefined
    calls.push({ key, body })
    if (!(key in answers)) return Promise.reject(new TypeError(`unexpected ${key}`))
    const given = answers[key]
    const answer = typeof given === 'function' ? (given as Answer)(body) : { body: given }
    const { status = 200 } = answer
    const ok = status >= 200 && status < 300
    return Promise.resolve({ ok, status, json: () => Promise.resolve(structuredClone(answer.body)) })
  })
  return calls
}

export function change(seq: number, kind: Change['kind'], data: object, runId: string | null = null): Change {
  return { seq, kind, run_id: runId, data: data as Change['data'] }
}

/** Let everything that waits for an answer go on, whatever the timers are. */
export async function answered(): Promise<void> {
  for (let turn = 0; turn < 50; turn += 1) await Promise.resolve()
}

export async function settled(): Promise<void> {
  await answered()
  await new Promise((resolve) => setTimeout(resolve, 0))
}
