import type {
  Baseline,
  Columns,
  ComparedRun,
  Comparison,
  Image,
  ImagePair,
  Revision,
  Run,
  Step,
  StepDelta,
  VariantSchema,
} from '../lib/api/schema'
import type { WireNumber } from '../lib/numbers'

export const RUN_ID = '0123456789abcdef0123456789abcdef'

export function step(index: number, parts: Partial<Step> = {}): Step {
  return {
    step: index,
    sigma: 1 - index / 10,
    closed_at: 1000 + index,
    model_calls: 1,
    duration_ms: 100,
    revision: 0,
    nmse_median: 0.01,
    nmse_worst: 0.5,
    worst_layer: 'double.0',
    cosine_median: 0.99,
    cosine_worst: 0.9,
    calls: 2,
    fallback_share: 0,
    gated_share: 0,
    attn_ms: 5,
    qk_std_median: 1,
    qk_p01_min: -2,
    qk_p99_max: 2,
    denom_min: 0.5,
    nonfinite: 0,
    ...parts,
  }
}

export function stepDelta(
  index: number,
  layers: string[],
  metrics: Record<string, WireNumber[]> = {},
  parts: Partial<Step> = {},
): StepDelta {
  return {
    run_id: RUN_ID,
    step: step(index, parts),
    layers,
    paths: layers.map(() => 'taylor'),
    metrics: metrics as StepDelta['metrics'],
    reasons: [],
  }
}

export function columnsAnswer(): Columns {
  const steps = [step(0), step(1, { worst_layer: 'single.0' })]
  return {
    run_id: RUN_ID,
    seq: 7,
    layers: ['double.0', 'single.0'],
    steps: Object.fromEntries(
      Object.keys(step(0)).map((name) => [name, steps.map((item) => item[name as keyof Step])]),
    ),
    layer_steps: {
      nmse: [
        [0.5, 0.25],
        [null, 'Infinity'],
      ],
    },
    paths: [
      ['taylor', 'taylor'],
      ['exact', 'taylor'],
    ],
    reasons: { 'gate.below_min_tokens': [2, 0] },
  }
}

export function run(parts: Partial<Run> = {}): Run {
  return {
    run_id: RUN_ID,
    instance_id: 'f'.repeat(32),
    label: '',
    status: 'running',
    error: '',
    variant: 'taylor',
    settings: { P: 3, eps: 1e-6, enabled: true, taylor_block_type: 'all' },
    revision: 0,
    applied_revision: 0,
    sampling: {
      sampler: 'euler',
      sigmas: [1, 0.9, 0.8, 0],
      seed: 1,
      cfg: 1,
      denoise: 1,
      latent_shape: [1, 16, 64, 64],
      prompt_id: null,
      node_id: null,
      list_index: null,
    },
    model: { name: 'Flux', parameters: null, layers: ['double.0', 'single.0'] },
    layers: ['double.0', 'single.0'],
    started_at: 1000,
    ended_at: null,
    last_event_at: 1001,
    duration_ms: 1000,
    steps_total: 3,
    steps_done: 1,
    last_step: 0,
    nmse_median: 0.01,
    nmse_worst: 0.5,
    worst_layer: 'double.0',
    fallback_share: 0,
    gated_share: 0,
    attn_ms: 5,
    nonfinite: 0,
    events_lost: 0,
    preview: null,
    final: null,
    ...parts,
  }
}

export function revision(number: number, parts: Partial<Revision> = {}): Revision {
  return {
    id: number + 100,
    run_id: RUN_ID,
    number,
    base: number === 0 ? null : number - 1,
    variant: 'taylor',
    settings: { P: 3 },
    changes: {},
    state: 'applied',
    reason: '',
    requested_at: 1000 + number,
    delivered_at: null,
    settled_at: null,
    applied_step: number === 0 ? 0 : number * 4,
    tuned: false,
    instance_revision: null,
    ...parts,
  }
}

export function variant(): VariantSchema {
  const base = {
    help: '',
    unit: '',
    live: true,
    advanced: false,
    minimum: null,
    maximum: null,
    exclusive_minimum: null,
    step: null,
    choices: null,
  }
  return {
    name: 'taylor',
    title: 'Taylor',
    help: '',
    json_schema: {},
    schedules: [],
    fields: [
      { ...base, name: 'enabled', title: 'enabled', type: 'boolean', default: true, group: 'gate' },
      {
        ...base,
        name: 'sigma_max',
        title: 'sigma max',
        type: 'number',
        default: 0,
        group: 'gate',
        unit: 'sigma',
        minimum: 0,
        maximum: 1000,
        step: 0.01,
      },
      {
        ...base,
        name: 'block_type',
        title: 'block type',
        type: 'string',
        default: 'all',
        group: 'gate',
        choices: ['all', 'double', 'single'],
      },
      {
        ...base,
        name: 'P',
        title: 'P (terms)',
        type: 'integer',
        default: 3,
        group: 'approximation',
        unit: 'terms',
        minimum: 1,
        maximum: 8,
      },
      {
        ...base,
        name: 'eps',
        title: 'eps',
        type: 'number',
        default: 1e-6,
        group: 'stability',
        exclusive_minimum: 0,
        maximum: 1,
        step: 1e-6,
        advanced: true,
      },
      {
        ...base,
        name: 'quality_seed',
        title: 'quality seed',
        type: 'integer',
        default: 0,
        group: 'quality',
        live: false,
        advanced: true,
        minimum: 0,
        maximum: 2147483647,
      },
    ],
  }
}

export function final(digit: string): Image {
  return {
    sha256: digit.repeat(64),
    kind: 'final',
    step: null,
    media_type: 'image/png',
    width: 512,
    height: 512,
    bytes: 1000,
    at: 2000,
  }
}

export function comparedRun(parts: Partial<ComparedRun> = {}): ComparedRun {
  return {
    run_id: RUN_ID,
    label: '',
    variant: 'exact',
    status: 'completed',
    started_at: 900,
    device: 'cpu',
    model: { name: 'Flux', parameters: null, layers: [] },
    attn_ms: 5,
    duration_ms: 100,
    finals: [final('2')],
    ...parts,
  }
}

export function baselineAnswer(runs: ComparedRun[]): Baseline {
  const match = { comparable: true, differs: [], unknown: [] }
  return {
    run_id: RUN_ID,
    candidates: runs.map((item) => ({ run: item, match })),
    recommended: runs[0]?.run_id ?? null,
    reason: runs.length > 0 ? null : 'none_exact',
    detail: '',
    nearest: null,
  }
}

export function imagePair(parts: Partial<ImagePair> = {}): ImagePair {
  return {
    index: 0,
    width: 512,
    height: 512,
    run: final('1'),
    baseline: final('2'),
    run_url: '',
    baseline_url: '',
    lossless: true,
    identical: false,
    psnr: 31.5,
    ssim: 0.98,
    mae: 2.5,
    max_error: 40,
    error_map: { url: '', scale: 32, scales: [32], colors: ['#000000', '#ffffff'] },
    ...parts,
  }
}

export function comparison(baseline: string): Comparison {
  return {
    run: comparedRun({ variant: 'taylor' }),
    baseline: comparedRun({ run_id: baseline }),
    match: { comparable: true, differs: [], unknown: [] },
    images: [imagePair()],
    unpaired: 0,
    attn_ms: { run: 5, baseline: 10, ratio: 0.5 },
    duration_ms: { run: 100, baseline: 200, ratio: 0.5 },
    same_device: true,
  }
}
