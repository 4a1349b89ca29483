import type { ReasonRow } from './api/schema'

export type ReasonKind = ReasonRow['kind']

export interface ReasonTotal {
  kind: ReasonKind
  reason: string
  count: number
}

/** Why calls ran exactly, or as which of several variants, by step and layer. */
export class ReasonBook {
  private readonly rows = new Map<number, Map<string, ReasonRow[]>>()
  private readonly sums = new Map<string, ReasonTotal>()

  /** The reasons of a step, complete; the same step again replaces itself. */
  setStep(step: number, rows: readonly ReasonRow[]): void {
    const before = this.rows.get(step)
    for (const layer of before?.values() ?? []) for (const row of layer) this.count(row, -1)
    const layers = new Map<string, ReasonRow[]>()
    for (const row of rows) {
      const known = layers.get(row.layer)
      if (known) known.push(row)
      else layers.set(row.layer, [row])
      this.count(row, 1)
    }
    this.rows.set(step, layers)
  }

  load(rows: readonly ReasonRow[]): void {
    const steps = new Map<number, ReasonRow[]>()
    for (const row of rows) {
      const known = steps.get(row.step)
      if (known) known.push(row)
      else steps.set(row.step, [row])
    }
    for (const [step, items] of steps) this.setStep(step, items)
  }

  at(step: number, layer: string): readonly ReasonRow[] {
    return this.rows.get(step)?.get(layer) ?? []
  }

  ofStep(step: number): ReadonlyMap<string, readonly ReasonRow[]> | undefined {
    return this.rows.get(step)
  }

  totals(kind: ReasonKind): ReasonTotal[] {
    return [...this.sums.values()]
      .filter((total) => total.kind === kind && total.count > 0)
      .sort((a, b) => b.count - a.count)
  }

  private count(row: ReasonRow, sign: 1 | -1): void {
    const key = `${row.kind}/${row.reason}`
    const total = this.sums.get(key) ?? { kind: row.kind, reason: row.reason, count: 0 }
    total.count += sign * row.count
    this.sums.set(key, total)
  }
}
