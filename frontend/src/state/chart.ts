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
  return computed(() => ({
    palette: PALETTES[theme.value],
    markers: markers.value,
    steps: Math.max(state.run.value?.steps_total ?? 0, (state.run.value?.last_step ?? -1) + 1),
    x: view.value.x,
    version: state.version.value,
    touch: touch.value,
    uirevision: state.run.value?.run_id ?? '',
  }))
}
