import { describe, expect, it } from 'vitest'

import {
  DEFAULT_RUN_VIEW,
  readRunsView,
  readRunView,
  writeRunsView,
  writeRunView,
  type RunView,
} from './urlState'

describe('the view of a run', () => {
  it('comes back from its own link', () => {
    const view: RunView = {
      metric: 'qk_std',
      layer: 'single.12',
      step: 14,
      x: [2.5, 20.25],
      y: [-0.5, 18.5],
      preview: 7,
      scope: 'later',
      baseline: '0123456789abcdef0123456789abcdef',
      compare: 'error',
      pair: 3,
      tab: 'attention',
      trained: 'loss',
      updates: [10.5, 99],
    }
    expect(readRunView(writeRunView(view))).toEqual(view)
  })

  it('leaves out what is as usual', () => {
    expect(writeRunView(DEFAULT_RUN_VIEW)).toEqual({})
    expect(readRunView({})).toEqual(DEFAULT_RUN_VIEW)
  })

  it('takes no nonsense', () => {
    const view = readRunView({ metric: '"><script>', x: '5~1', y: 'a~b', step: '-3', scope: '?', baseline: '../x', compare: '?', pair: '-1' })
    expect(view).toEqual(DEFAULT_RUN_VIEW)
  })
})

describe('the view of the list', () => {
  it('comes back from its own link', () => {
    const view = readRunsView({
      q: 'flux',
      status: 'running,odd,failed',
      variant: 'taylor',
      sort: '-nmse_worst',
      page: '3',
    })
    expect(view).toEqual({
      q: 'flux',
      status: ['running', 'failed'],
      variant: ['taylor'],
      sort: '-nmse_worst',
      page: 3,
    })
    expect(readRunsView(writeRunsView(view))).toEqual(view)
  })
})
