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

function isOpen(revision: Revision): boolean {
  return revision.state === 'pending' || revision.state === 'delivered'
}

/**
 * The revision that the sampler runs with or will run with, and that the server builds the next
 * one on: the newest that is still under way, else the one that came into force last. That need
 * not be the newest of all: what the variant tunes is numbered when it arrives, so that a pushed
 * revision with a lower number can be taken up after it.
 */
export function standingOf(revisions: readonly Revision[]): Revision | null {
  const rank = (item: Revision): [number, number] =>
    isOpen(item) ? [Infinity, item.number] : [item.applied_step ?? -1, item.number]
  return revisions
    .filter((item) => isOpen(item) || item.state === 'applied')
    .reduce<Revision | null>((last, item) => {
      if (!last) return item
      const [a, b] = [rank(last), rank(item)]
      return b[0] > a[0] || (b[0] === a[0] && b[1] > a[1]) ? item : last
    }, null)
}

export function newestOf(revisions: readonly Revision[]): Revision | null {
  return revisions.reduce<Revision | null>(
    (newest, item) => (newest && newest.number > item.number ? newest : item),
    null,
  )
}

/** Settings that a revert of a revision asks for: what it changed, as it was before. */
export function undone(revision: Revision, expected: Settings): Settings {
  return Object.fromEntries(
    Object.entries(revision.changes)
      .map(([name, [before]]): [string, unknown] => [name, before])
      .filter(([name, before]) => expected[name] !== before),
  )
}

/** Live settings of a revision that are otherwise in what is expected to run. */
export function restored(
  revision: Revision,
  expected: Settings,
  live: (name: string) => boolean,
): Settings {
  return Object.fromEntries(
    Object.entries(revision.settings).filter(
      ([name, value]) => live(name) && expected[name] !== value,
    ),
  )
}
