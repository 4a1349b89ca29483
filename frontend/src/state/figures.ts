import { request } from '../lib/api/client'
import type { Figure } from '../lib/figures'

const known = new Map<string, Promise<Figure>>()

/** A figure's definition without numbers; the same for every run, so asked for once. */
export function loadFigure(runId: string, name: string, metric?: string): Promise<Figure> {
  const key = `${name}/${metric ?? ''}`
  let figure = known.get(key)
  if (!figure) {
    const query = metric ? `metric=${metric}&data=0` : 'data=0'
    figure = request<Figure>(`/runs/${runId}/figures/${name}?${query}`)
    figure.catch(() => known.delete(key))
    known.set(key, figure)
  }
  return figure
}
