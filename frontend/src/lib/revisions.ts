import type { Revision } from './api/schema'
import type { Settings } from './settings'

/** What became of a revision, in words. */
export function stateText(revision: Revision): string {
  switch (revision.state) {
    case 'pending':
      return 'waiting for the plugin'
    case 'delivered':
      return 'delivered, waiting for the next step'
    case 'applied':
      if (revision.number === 0) return 'initial'
      return `applied at step ${revision.applied_step ?? '?'}`
    case 'rejected':
      return 'rejected'
    case 'superseded':
      return 'superseded'
    case 'expired':
      return 'expired: the run ended first'
  }
}

const RANK: Record<Revision['state'], number> = {
  pending: 0,
  delivered: 1,
  applied: 2,
  rejected: 2,
  superseded: 2,
  expired: 2,
}

/**
 * A list with a revision taken in. An answer may come later than what the stream has said since,
 * so a revision never goes back to an earlier state.
 */
export function withRevision(revisions: readonly Revision[], item: Revision): Revision[] {
  const known = revisions.find((other) => other.number === item.number)
  const kept = known && RANK[known.state] > RANK[item.state] ? known : item
  return [...revisions.filter((other) => other !== known), kept].sort(
    (a, b) => a.number - b.number,
  )
}

/**
 * The settings that the sampler runs with or will run with: those of the newest revision, unless
 * nothing came of it.
 */
export function expectedSettings(newest: Revision | null, inForce: Settings): Settings {
  const dropped = newest?.state === 'rejected' || newest?.state === 'expired'
  return newest && !dropped ? newest.settings : inForce
}

export function newestOf(revisions: readonly Revision[]): Revision | null {
  return revisions.reduce<Revision | null>(
    (newest, item) => (newest && newest.number > item.number ? newest : item),
    null,
  )
}

/** Settings that a revert of a revision asks for: what it changed, as it was before. */
export function undone(revision: Revision, newest: Settings): Settings {
  return Object.fromEntries(
    Object.entries(revision.changes)
      .map(([name, [before]]): [string, unknown] => [name, before])
      .filter(([name, before]) => newest[name] !== before),
  )
}

/** Settings of a revision that the newest one has otherwise, of those that are live. */
export function restored(
  revision: Revision,
  newest: Settings,
  live: (name: string) => boolean,
): Settings {
  return Object.fromEntries(
    Object.entries(revision.settings).filter(
      ([name, value]) => live(name) && newest[name] !== value,
    ),
  )
}
