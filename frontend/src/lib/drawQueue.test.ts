import { beforeEach, describe, expect, it } from 'vitest'

import { DrawQueue, SHORTEST_GAP_MS, type Drawable } from './drawQueue'

let time = 0
let frames: (() => void)[] = []
let timers: { at: number; callback: () => void }[] = []

const clock = {
  now: () => time,
  frame: (callback: () => void) => frames.push(callback),
  later: (callback: () => void, ms: number) => timers.push({ at: time + ms, callback }),
}

async function advance(ms: number): Promise<void> {
  time += ms
  const due = timers.filter((timer) => timer.at <= time)
  timers = timers.filter((timer) => timer.at > time)
  due.forEach((timer) => timer.callback())
  const now = frames
  frames = []
  now.forEach((frame) => frame())
  for (let tick = 0; tick < 5; tick += 1) await Promise.resolve()
}

function counter(priority = 0, cost = 0): Drawable & { count: number } {
  return {
    priority,
    count: 0,
    draw() {
      this.count += 1
      time += cost
    },
  }
}

beforeEach(() => {
  time = 0
  frames = []
  timers = []
})

describe('DrawQueue', () => {
  it('makes one drawing of many requests', async () => {
    const queue = new DrawQueue(clock)
    const chart = counter()
    for (let i = 0; i < 50; i += 1) queue.request(chart)
    await advance(16)
    expect(chart.count).toBe(1)
  })

  it('asks for no frame while nothing is wanted', async () => {
    const queue = new DrawQueue(clock)
    queue.request(counter())
    await advance(16)
    expect(frames).toHaveLength(0)
    expect(timers).toHaveLength(0)
  })

  it('draws a chart at most ten times a second', async () => {
    const queue = new DrawQueue(clock)
    const chart = counter()
    for (let frame = 0; frame < 100; frame += 1) {
      queue.request(chart)
      await advance(10)
    }
    expect(chart.count).toBeLessThanOrEqual(1000 / SHORTEST_GAP_MS)
    expect(chart.count).toBeGreaterThan(6)
  })

  it('draws the important one first and spreads the rest over frames', async () => {
    const queue = new DrawQueue(clock)
    const side = counter(5, 15)
    const main = counter(1, 15)
    queue.request(side)
    queue.request(main)
    await advance(16)
    expect([main.count, side.count]).toEqual([1, 0])
    await advance(16)
    expect([main.count, side.count]).toEqual([1, 1])
  })

  it('does not start a drawing again before it has ended', async () => {
    const queue = new DrawQueue(clock)
    let end: () => void = () => undefined
    let started = 0
    const slow: Drawable = {
      priority: 0,
      draw: () => {
        started += 1
        return new Promise((resolve) => (end = resolve))
      },
    }
    queue.request(slow)
    await advance(16)
    queue.request(slow)
    await advance(500)
    expect(started).toBe(1)
    end()
    await advance(0)
    await advance(500)
    expect(started).toBe(2)
  })

  it('forgets what was cancelled', async () => {
    const queue = new DrawQueue(clock)
    const chart = counter()
    queue.request(chart)
    queue.cancel(chart)
    await advance(16)
    expect(chart.count).toBe(0)
  })
})
