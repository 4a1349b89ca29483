import type { StudentLayerState, TrainingWindow } from '../lib/api/schema'
import { RUN_ID } from './fixtures'

/** A window whose every part holds the same numbers, one row per layer. */
export function trainingWindow(
  start: number[],
  width: number,
  rows: (number | null)[][],
): TrainingWindow {
  const first = rows[0] ?? []
  const copy = () => rows.map((row) => [...row])
  return {
    run_id: RUN_ID,
    seq: 1,
    metric: 'nmse_ema',
    first_update: start[0] ?? 0,
    last_update: (start.at(-1) ?? 0) + width - 1,
    updates: 100,
    layers: rows.map((_, index) => `double.${index}`),
    width,
    start,
    counts: start.map(() => width),
    nonfinite: [],
    heatmap: copy(),
    bands: {
      p10: [...first], p50: [...first], p90: [...first], low: [...first], high: [...first],
      layers: start.map(() => 1),
    },
    lines: { low: copy(), high: copy(), first: copy(), last: copy() },
  }
}

export function studentLayer(
  layer: string,
  updates: number,
  intervals: [number, number | null][] = [],
): StudentLayerState {
  return {
    layer,
    updates,
    first_update: 1,
    last_update: updates,
    last_at: 1,
    nonfinite: 0,
    ready: intervals.at(-1)?.[1] === null,
    intervals: intervals.map(([from, to]) => ({
      from_update: from, from_step: 0, from_at: 1,
      to_update: to, to_step: null, to_at: null,
    })),
    latest: {},
  }
}
