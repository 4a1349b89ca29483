import { computed, type ComputedRef, type Ref } from 'vue'

import type { ChartContext } from '../lib/figures'
import { markersOf } from '../lib/markers'
import { PALETTES } from '../lib/palette'
import type { RunView } from '../lib/urlState'
import { useMedia } from './media'
import type { RunState } from './run'
import { useTheme } from './theme'

export type SizedContext = Omit<ChartContext, 'width' | 'height' | 'y'>

/** What all charts of a run have in common. */
export function useChartContext(
  state: RunState,
  view: Readonly<Ref<RunView>>,
): ComputedRef<SizedContext> {
  const { theme } = useTheme()
  const touch = useMedia('(pointer: coarse)')
  const markers = computed(() => markersOf(state.revisions.value))
  // numbers of their own, so that a run's other news redraws nothing
  const steps = computed(() =>
    Math.max(state.run.value?.steps_total ?? 0, (state.run.value?.last_step ?? -1) + 1),
  )
  const id = computed(() => state.run.value?.run_id ?? '')
  const x = computed(() => view.value.x)
  return computed(() => ({
    palette: PALETTES[theme.value],
    markers: markers.value,
    steps: steps.value,
    x: x.value,
    version: state.version.value,
    touch: touch.value,
    uirevision: id.value,
  }))
}
