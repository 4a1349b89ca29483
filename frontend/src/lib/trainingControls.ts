import type { Revision, StudentEventItem } from './api/schema'
import { stateText } from './revisions'

/** The newest revision that a hand on the page made of a setting; null where there is none. */
export function newestOfSetting(revisions: readonly Revision[], name: string): Revision | null {
  return revisions.filter((item) => item.number > 0 && name in item.changes).at(-1) ?? null
}

/** What became of pausing or resuming. */
export function pauseText(revision: Revision | null): string {
  if (!revision) return ''
  const what = revision.changes.training_paused?.[1] === true ? 'pause' : 'resume'
  return `${what}: ${stateText(revision)}`
}

/** What became of "save now": the order first, then the file. */
export function saveText(
  revision: Revision | null,
  events: readonly StudentEventItem[],
): { text: string; done: boolean; failed: boolean } | null {
  if (!revision) return null
  const outcome = events.find(
    (item) =>
      (item.event === 'checkpoint_saved' || item.event === 'checkpoint_failed') &&
      item.at >= (revision.settled_at ?? Infinity) - CLOCKS_APART,
  )
  if (revision.state === 'applied' && outcome) {
    const failed = outcome.event === 'checkpoint_failed'
    const detail = outcome.detail ? `: ${outcome.detail}` : ''
    return { text: `${failed ? 'not saved' : 'saved'}${detail}`, done: true, failed }
  }
  const failed = revision.state === 'rejected' || revision.state === 'expired'
  const text = `save: ${stateText(revision)}`
  return { text: revision.reason ? `${text} (${revision.reason})` : text, done: false, failed }
}

/** Seconds by which the word about a file may be dated before the word about its order. */
const CLOCKS_APART = 0.5
