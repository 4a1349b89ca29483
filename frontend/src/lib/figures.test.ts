import { describe, expect, it } from 'vitest'

import { columnsAnswer, RUN_ID } from '../testing/fixtures'
import { RunColumns } from './columns'
import { bindTrace, lineFigure, relayoutRanges, stepRange, type ChartContext } from './figures'
import { heatmapFigure } from './heatmap'
import { PALETTES } from './palette'
import { ReasonBook } from './reasons'

const columns = RunColumns.from(columnsAnswer())
const context: ChartContext = {
  palette: PALETTES.light,
  markers: [{ number: 1, step: 1, label: 'r1 P 3→4', hover: '' }],
  steps: 10,
  x: null,
  y: null,
  width: 600,
  height: 300,
  version: 3,
  touch: false,
  uirevision: RUN_ID,
}

describe('bindTrace', () => {
  it('puts columns and matrices where the figure names them', () => {
    const bound = bindTrace(
      {
        type: 'heatmap',
        meta: { bind: { x: 'steps.step', y: 'layers', z: 'layer_steps.nmse', text: 'paths' } },
      },
      columns,
    )
    expect([...(bound?.x as Float64Array)]).toEqual([0, 1])
    expect(bound?.y).toEqual(['double.0', 'single.0'])
    expect((bound?.z as Float64Array[]).map((row) => [...row])).toEqual([
      [0.5, 0.25],
      [NaN, Infinity],
    ])
    expect(bound?.text).toEqual(columns.paths)
  })

  it('leaves out what the run lacks, and optional traces that come out empty', () => {
    expect(bindTrace({ meta: { bind: { y: 'steps.unheard' } } }, columns)).toBeNull()
    const bind = { x: 'where(steps.nmse_worst, nan, steps.step)' }
    expect(bindTrace({ meta: { bind, optional: true } }, columns)).toBeNull()
    expect(bindTrace({ meta: { bind } }, columns)?.x).toEqual([])
  })
})

describe('lineFigure', () => {
  const figure = {
    data: [{ type: 'scatter', meta: { bind: { x: 'steps.step', y: 'steps.nmse_median' } } }],
    layout: { meta: { markers: true }, yaxis: { type: 'log' } },
  }

  it('shows the whole schedule until somebody zooms', () => {
    expect(stepRange(context)).toEqual([-0.5, 9.5])
    const { layout } = lineFigure(figure, columns, { ...context, x: [2, 4], y: [-3, -1] })
    expect(layout.xaxis).toMatchObject({ range: [2, 4], autorange: false })
    expect(layout.yaxis).toMatchObject({ type: 'log', range: [-3, -1], autorange: false })
  })

  it('keeps the view of the user over new data', () => {
    const revisions = [1, 2].map((version) => lineFigure(figure, columns, { ...context, version }))
    expect(new Set(revisions.map(({ layout }) => layout.uirevision)).size).toBe(1)
    expect(new Set(revisions.map(({ layout }) => layout.datarevision)).size).toBe(2)
  })

  it('draws applied revisions where the figure asks for them', () => {
    expect(lineFigure(figure, columns, context).layout.shapes).toHaveLength(1)
    const without = lineFigure({ ...figure, layout: {} }, columns, context)
    expect(without.layout.shapes).toHaveLength(0)
  })
})

describe('heatmapFigure', () => {
  const metric = {
    name: 'nmse',
    title: 'NMSE',
    help: '',
    unit: '',
    direction: 'lower',
    log: true,
  } as const
  const matrix = 'layer_steps.nmse'
  const figure = {
    data: [
      {
        type: 'heatmap',
        name: 'NMSE',
        meta: { bind: { x: 'steps.step', y: 'layers', z: `log10(${matrix})` } },
      },
      ...['nan', 'inf'].map((kind) => ({
        type: 'scatter',
        name: kind,
        meta: {
          bind: { x: `cells_x(${matrix}, ${kind})`, y: `cells_y(${matrix}, ${kind})` },
          optional: true,
        },
      })),
    ],
    layout: {},
  }
  const input = { columns, reasons: new ReasonBook(), metric, figure, layer: 'single.0', step: 1 }

  it('stacks paths, numbers and marks', () => {
    const { data, layout } = heatmapFigure(input, context)
    expect(data.map((trace) => trace.name)).toEqual(['path', 'NMSE', 'inf'])
    expect(data[1]).toMatchObject({ zmin: -1, zmax: 0 })
    expect(data[2]).toMatchObject({ x: [1], y: ['single.0'] })
    expect(layout.yaxis).toMatchObject({ range: [1.5, -0.5], ticktext: ['double.0', 'single.0'] })
    expect(layout.shapes).toHaveLength(3)
  })

  it('shows the paths alone', () => {
    const { data } = heatmapFigure({ ...input, metric: null }, context)
    expect(data.map((trace) => trace.name)).toEqual(['path'])
  })
})

it("reads the user's zoom, whichever way the axis runs", () => {
  expect(
    relayoutRanges({
      'xaxis.range[0]': 1,
      'xaxis.range[1]': 5,
      'yaxis.range[0]': 9.5,
      'yaxis.range[1]': 2.5,
    }),
  ).toEqual({ x: [1, 5], y: [2.5, 9.5] })
  expect(relayoutRanges({ 'xaxis.autorange': true, 'yaxis.autorange': true })).toEqual({
    x: null,
    y: null,
  })
  expect(relayoutRanges({ dragmode: 'pan' })).toEqual({})
})
