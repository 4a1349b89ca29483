import type { Columns, Step, StepDelta } from './api/schema'
import { parseNumber, type WireNumber } from './numbers'

const FIRST_CAPACITY = 64

/**
 * Numbers with a mask. A plain NaN would not do for "not measured": NaN is also a value here.
 */
export class Series {
  values: Float64Array
  known: Uint8Array

  constructor(capacity = FIRST_CAPACITY) {
    this.values = new Float64Array(capacity).fill(NaN)
    this.known = new Uint8Array(capacity)
  }

  grow(capacity: number): void {
    const values = new Float64Array(capacity).fill(NaN)
    values.set(this.values)
    const known = new Uint8Array(capacity)
    known.set(this.known)
    this.values = values
    this.known = known
  }

  set(index: number, value: number | null): void {
    this.values[index] = value ?? NaN
    this.known[index] = value === null ? 0 : 1
  }

  get(index: number): number | null {
    return this.known[index] ? (this.values[index] ?? null) : null
  }

  /** Numbers as a chart takes them: NaN leaves a gap. No copy. */
  view(length: number): Float64Array {
    return this.values.subarray(0, length)
  }

  clear(index: number): void {
    this.set(index, null)
  }
}

/** A whole run in typed columns. Steps arrive in order as a rule, and may arrive twice. */
export class RunColumns {
  layers: string[] = []
  readonly numbers = new Map<string, Series>()
  readonly texts = new Map<string, (string | null)[]>()
  readonly metrics = new Map<string, Series[]>()
  /** Calls per step by `gate.<reason>` and `fallback.<reason>`. */
  readonly reasons = new Map<string, Series>()
  readonly paths: (string | null)[][] = []
  length = 0

  private capacity = FIRST_CAPACITY
  private readonly layerRow = new Map<string, number>()
  private readonly stepIndex = new Map<number, number>()

  constructor(layers: readonly string[] = []) {
    this.addLayers(layers)
  }

  static from(answer: Columns): RunColumns {
    const columns = new RunColumns(answer.layers)
    const count = answer.steps.step?.length ?? 0
    columns.reserve(count)
    columns.length = count
    for (const [name, values] of Object.entries(answer.steps)) {
      values.forEach((value, index) => columns.put(name, index, value as WireNumber))
    }
    for (let index = 0; index < count; index += 1) {
      columns.stepIndex.set(columns.step(index), index)
    }
    for (const [metric, rows] of Object.entries(answer.layer_steps)) {
      const series = columns.metric(metric)
      rows.forEach((row, layer) => {
        row.forEach((value, index) => series[layer]?.set(index, parseNumber(value)))
      })
    }
    for (const [name, counts] of Object.entries(answer.reasons)) {
      const series = columns.reason(name)
      counts.forEach((count, index) => series.set(index, count))
    }
    answer.paths.forEach((row, layer) => columns.paths[layer]?.splice(0, row.length, ...row))
    return columns
  }

  addLayers(names: readonly string[]): void {
    for (const name of names) {
      if (this.layerRow.has(name)) continue
      this.layerRow.set(name, this.layers.length)
      this.layers = [...this.layers, name]
      this.paths.push(new Array<string | null>(this.length).fill(null))
      for (const rows of this.metrics.values()) rows.push(new Series(this.capacity))
    }
  }

  /** Take up one closed step; the same step again replaces itself. Returns its position. */
  apply(delta: StepDelta): number {
    this.addLayers(delta.layers)
    const index = this.place(delta.step.step)
    for (const [name, value] of Object.entries(delta.step) as [keyof Step, WireNumber][]) {
      this.put(name, index, value)
    }
    delta.layers.forEach((layer, item) => {
      const row = this.row(layer)
      const paths = this.paths[row]
      if (paths) paths[index] = delta.paths[item] ?? null
    })
    for (const [metric, values] of Object.entries(delta.metrics)) {
      const series = this.metric(metric)
      delta.layers.forEach((layer, item) => {
        series[this.row(layer)]?.set(index, parseNumber(values[item]))
      })
    }
    for (const series of this.reasons.values()) series.set(index, 0)
    for (const { kind, reason, count } of delta.reasons) {
      const series = this.reason(`${kind}.${reason}`)
      series.set(index, (series.get(index) ?? 0) + count)
    }
    return index
  }

  row(layer: string): number {
    return this.layerRow.get(layer) ?? -1
  }

  indexOfStep(step: number): number {
    return this.stepIndex.get(step) ?? -1
  }

  step(index: number): number {
    return this.numbers.get('step')?.get(index) ?? -1
  }

  lastStep(): number | null {
    return this.length === 0 ? null : this.step(this.length - 1)
  }

  /** Sum of a number over all steps that have it. */
  total(name: string): number {
    const series = this.numbers.get(name)
    let sum = 0
    for (let index = 0; index < this.length; index += 1) sum += series?.get(index) ?? 0
    return sum
  }

  value(metric: string, layer: string, index: number): number | null {
    return this.metrics.get(metric)?.[this.row(layer)]?.get(index) ?? null
  }

  path(layer: string, index: number): string | null {
    return this.paths[this.row(layer)]?.[index] ?? null
  }

  /** A column with its mask, by the name that a figure's binding uses, such as `steps.sigma`. */
  series(name: string): Series | undefined {
    const [table, column] = split(name)
    if (table === 'steps') return this.numbers.get(column)
    return table === 'reasons' ? this.reasons.get(column) : undefined
  }

  /** A matrix with its masks, by the name that a figure's binding uses: one row per layer. */
  rows(name: string): Series[] | undefined {
    const [table, metric] = split(name)
    return table === 'layer_steps' ? this.metric(metric) : undefined
  }

  column(name: string): Float64Array | (string | null)[] | undefined {
    if (name === 'layers') return this.layers
    const [table, column] = split(name)
    return (
      this.series(name)?.view(this.length) ??
      (table === 'steps' ? this.texts.get(column) : undefined)
    )
  }

  matrix(name: string): (Float64Array | (string | null)[])[] | undefined {
    if (name === 'paths') return this.paths
    return this.rows(name)?.map((series) => series.view(this.length))
  }

  /** The rows of a metric, with room for every step; empty where nothing measured it. */
  metric(name: string): Series[] {
    let rows = this.metrics.get(name)
    if (!rows) {
      rows = this.layers.map(() => new Series(this.capacity))
      this.metrics.set(name, rows)
    }
    return rows
  }

  private reason(name: string): Series {
    let series = this.reasons.get(name)
    if (!series) {
      series = new Series(this.capacity)
      for (let index = 0; index < this.length; index += 1) series.set(index, 0)
      this.reasons.set(name, series)
    }
    return series
  }

  private put(name: string, index: number, value: WireNumber): void {
    if (name === 'worst_layer') {
      const column = this.texts.get(name) ?? []
      column[index] = typeof value === 'string' ? value : null
      this.texts.set(name, column)
      return
    }
    let series = this.numbers.get(name)
    if (!series) {
      series = new Series(this.capacity)
      this.numbers.set(name, series)
    }
    series.set(index, parseNumber(value))
  }

  /** The position of a step, made where it is new; a late one is put in order. */
  private place(step: number): number {
    const known = this.stepIndex.get(step)
    if (known !== undefined) return known
    this.reserve(this.length + 1)
    let index = this.length
    while (index > 0 && this.step(index - 1) > step) index -= 1
    if (index < this.length) this.shift(index)
    this.length += 1
    for (const paths of this.paths) if (paths.length < this.length) paths.push(null)
    this.stepIndex.set(step, index)
    return index
  }

  private shift(from: number): void {
    for (const series of this.every()) {
      series.values.copyWithin(from + 1, from, this.length)
      series.known.copyWithin(from + 1, from, this.length)
      series.clear(from)
    }
    for (const column of this.texts.values()) column.splice(from, 0, null)
    for (const paths of this.paths) paths.splice(from, 0, null)
    for (const [step, index] of this.stepIndex) {
      if (index >= from) this.stepIndex.set(step, index + 1)
    }
  }

  private *every(): Generator<Series> {
    yield* this.numbers.values()
    yield* this.reasons.values()
    for (const rows of this.metrics.values()) yield* rows
  }

  private reserve(length: number): void {
    if (length <= this.capacity) return
    while (this.capacity < length) this.capacity *= 2
    for (const series of this.every()) series.grow(this.capacity)
  }
}

function split(name: string): [string, string] {
  const dot = name.indexOf('.')
  return dot < 0 ? [name, ''] : [name.slice(0, dot), name.slice(dot + 1)]
}
