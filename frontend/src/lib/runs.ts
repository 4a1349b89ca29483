import type { Run } from './api/schema'

/** What a run is called: its label, else its model and the beginning of its id. */
export function runTitle(run: Pick<Run, 'label' | 'model' | 'run_id'>): string {
  return run.label || `${run.model.name || 'run'} ${run.run_id.slice(0, 8)}`
}

/** What it sampled and how, in a line. */
export function runSubtitle(run: Pick<Run, 'model' | 'sampling'>): string {
  const { sampler, seed } = run.sampling
  const known = typeof seed === 'number' ? `seed ${seed}` : ''
  return [run.model.name, sampler, known].filter(Boolean).join(' · ')
}

/** The run's age or its length so far, in milliseconds. */
export function runDuration(run: Run, now: number): number | null {
  if (run.status !== 'running') return run.duration_ms
  return Math.max(0, (now - run.started_at) * 1000)
}

export function blockIndex(layer: string): number {
  return Number(layer.slice(layer.lastIndexOf('.') + 1))
}

/** The highest block index of a model, counted within its block types. */
export function lastBlock(layers: readonly string[]): number {
  return layers.reduce((highest, layer) => Math.max(highest, blockIndex(layer) || 0), 0)
}

const LATENT_FACTOR = 8

/** Latent shape for a person, with the picture's size where it is one. */
export function latentText(shape: readonly number[]): string {
  if (shape.length === 0) return ''
  const text = shape.join('×')
  const [height, width] = shape.slice(-2)
  if (shape.length < 4 || !height || !width) return text
  return `${text} (${width * LATENT_FACTOR}×${height * LATENT_FACTOR} px)`
}
