/** Something on the page that is redrawn when its numbers change. */
export interface Drawable {
  /** Lower ones are drawn first. */
  priority: number
  draw(): Promise<void> | void
}

export interface Clock {
  now(): number
  frame(callback: () => void): void
  later(callback: () => void, ms: number): void
}

const browserClock: Clock = {
  now: () => performance.now(),
  frame: (callback) => requestAnimationFrame(callback),
  later: (callback, ms) => setTimeout(callback, ms),
}

/** The least time between two drawings of the same chart: ten a second. */
export const SHORTEST_GAP_MS = 100
/** Once a frame has drawn this long, the rest waits for the next one. */
export const FRAME_BUDGET_MS = 12

/**
 * The one way to the screen. Requests between two frames become one drawing; nothing runs while
 * nothing is asked for, and a hidden page, which gets no frames, draws nothing.
 */
export class DrawQueue {
  private readonly waiting = new Set<Drawable>()
  private readonly busy = new Set<Drawable>()
  private readonly drawnAt = new WeakMap<Drawable, number>()
  private scheduled = false

  constructor(private readonly clock: Clock = browserClock) {}

  request(drawable: Drawable): void {
    this.waiting.add(drawable)
    this.schedule()
  }

  cancel(drawable: Drawable): void {
    this.waiting.delete(drawable)
  }

  private schedule(): void {
    if (this.scheduled) return
    const ready = [...this.waiting].filter((item) => !this.busy.has(item))
    if (ready.length === 0) return
    this.scheduled = true
    const wait = Math.min(...ready.map((item) => this.restOfGap(item)))
    const frame = () => this.clock.frame(() => this.run())
    if (wait > 0) this.clock.later(frame, wait)
    else frame()
  }

  private restOfGap(drawable: Drawable): number {
    const last = this.drawnAt.get(drawable)
    return last === undefined ? 0 : SHORTEST_GAP_MS - (this.clock.now() - last)
  }

  private run(): void {
    this.scheduled = false
    const begin = this.clock.now()
    const due = [...this.waiting]
      .filter((item) => !this.busy.has(item) && this.restOfGap(item) <= 0)
      .sort((a, b) => a.priority - b.priority)
    for (const item of due) {
      if (this.clock.now() - begin > FRAME_BUDGET_MS) break
      this.waiting.delete(item)
      this.drawnAt.set(item, this.clock.now())
      this.busy.add(item)
      void Promise.resolve(item.draw()).finally(() => {
        this.busy.delete(item)
        this.schedule()
      })
    }
    // Otherwise the end of a drawing asks for the next frame, after its own notice of completion.
    if (this.busy.size === 0) this.schedule()
  }
}

export const drawQueue = new DrawQueue()
