// @vitest-environment happy-dom
import { afterEach, beforeEach, expect, it, vi } from 'vitest'

import { answered, change, FakeEventSource, fakeServer, settled } from '../testing/browser'

let latest = 40
/** Each test has a feed of its own, so those of earlier tests must not hear the page. */
let forget: (() => void)[] = []

function setHidden(hidden: boolean): void {
  vi.spyOn(document, 'hidden', 'get').mockReturnValue(hidden)
  document.dispatchEvent(new Event('visibilitychange'))
}

async function begin() {
  const feed = await import('./feed')
  const seen: number[] = []
  const resync = vi.fn()
  feed.onChange((item) => seen.push(item.seq), resync)
  await feed.startFeed()
  FakeEventSource.latest.say('open')
  return { ...feed.useFeed(), seen, resync }
}

beforeEach(() => {
  vi.resetModules()
  latest = 40
  for (const target of [document, window]) {
    const add = target.addEventListener.bind(target)
    vi.spyOn(target, 'addEventListener').mockImplementation(
      (name: string, take: EventListenerOrEventListenerObject) => {
        add(name, take)
        forget.push(() => target.removeEventListener(name, take))
      },
    )
  }
  FakeEventSource.all = []
  vi.stubGlobal('EventSource', FakeEventSource)
  fakeServer({
    'GET /session': { required: false, may_read: true, may_steer: true },
    'GET /health': () => ({ body: { status: 'ok', version: '', latest_seq: latest } }),
  })
  vi.spyOn(document, 'hidden', 'get').mockReturnValue(false)
})

afterEach(() => {
  forget.forEach((remove) => remove())
  forget = []
  vi.restoreAllMocks()
  vi.unstubAllGlobals()
})

it('begins where the server is and hands on each change once', async () => {
  const feed = await begin()
  expect(FakeEventSource.latest.url).toBe('/api/v1/stream?after=40')
  expect(feed.connection.value).toBe('open')
  for (const seq of [41, 42, 42, 41, 45]) FakeEventSource.latest.send(change(seq, 'run', {}))
  expect(feed.seen).toEqual([41, 42, 45])
  expect(feed.seq.value).toBe(45)
})

it('holds no stream while the page is hidden and resumes from its own position', async () => {
  const feed = await begin()
  FakeEventSource.latest.send(change(41, 'run', {}))
  setHidden(true)
  expect(FakeEventSource.latest.closed).toBe(true)
  expect(feed.connection.value).toBe('paused')

  latest = 60
  setHidden(false)
  await settled()
  expect(FakeEventSource.all).toHaveLength(2)
  expect(FakeEventSource.latest.url).toBe('/api/v1/stream?after=41')
  expect(feed.resync).not.toHaveBeenCalled()
})

it('asks for the present state after a gap too long to replay', async () => {
  const feed = await begin()
  setHidden(true)
  latest = 90_000
  setHidden(false)
  await settled()
  expect(feed.resync).toHaveBeenCalledOnce()
  expect(FakeEventSource.latest.url).toBe('/api/v1/stream?after=90000')
})

it('asks for the present state when the server counts anew', async () => {
  const feed = await begin()
  setHidden(true)
  latest = 3
  setHidden(false)
  await settled()
  expect(feed.resync).toHaveBeenCalledOnce()
  expect(feed.seq.value).toBe(3)
})

it('connects again by itself and says so when it takes long', async () => {
  vi.useFakeTimers()
  const feed = await begin()
  latest = 44
  FakeEventSource.latest.send(change(44, 'run', {}))
  FakeEventSource.latest.say('error')
  expect(feed.connection.value).toBe('connecting')
  await vi.advanceTimersByTimeAsync(600)
  await answered()
  expect(FakeEventSource.latest.url).toBe('/api/v1/stream?after=44')
  FakeEventSource.latest.say('error')
  await vi.advanceTimersByTimeAsync(3000)
  expect(feed.connection.value).toBe('down')
  FakeEventSource.latest.say('open')
  expect(feed.connection.value).toBe('open')
  vi.useRealTimers()
})
