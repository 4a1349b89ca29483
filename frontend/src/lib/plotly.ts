import type * as Plotly from 'plotly.js'

type PlotlyModule = typeof Plotly

let loading: Promise<PlotlyModule> | undefined

/** Plotly is most of the page's weight, so it comes with the first chart that is seen. */
export function loadPlotly(): Promise<PlotlyModule> {
  loading ??= import('plotly.js-strict-dist-min').then(
    // a script of the old kind: what it exports stands under "default"
    (module) => (module as unknown as { default?: PlotlyModule }).default ?? module,
  )
  return loading
}
