import type { Problem } from './schema'

export const API = '/api/v1'

/** An answer that is not a success, with what the server says about it. */
export class ApiError extends Error {
  constructor(
    readonly status: number,
    readonly problem: Problem | null,
    message: string,
  ) {
    super(message)
    this.name = 'ApiError'
  }
}

function isProblem(body: unknown): body is Problem {
  return typeof body === 'object' && body !== null && 'detail' in body && 'type' in body
}

export async function request<T>(
  path: string,
  options: { method?: string; body?: unknown; signal?: AbortSignal } = {},
): Promise<T> {
  const { method = 'GET', body, signal } = options
  let response: Response
  try {
    response = await fetch(API + path, {
      method,
      signal: signal ?? null,
      credentials: 'same-origin',
      headers: body === undefined ? {} : { 'Content-Type': 'application/json' },
      body: body === undefined ? null : JSON.stringify(body),
    })
  } catch (error) {
    if (error instanceof DOMException && error.name === 'AbortError') throw error
    throw new ApiError(0, null, 'The server does not answer.')
  }
  if (!response.ok) {
    const answer: unknown = await response.json().catch(() => null)
    const problem = isProblem(answer) ? answer : null
    throw new ApiError(
      response.status,
      problem,
      problem?.detail ?? `The server answered ${response.status}.`,
    )
  }
  if (response.status === 204) return undefined as T
  return (await response.json()) as T
}

export function messageOf(error: unknown): string {
  return error instanceof Error ? error.message : String(error)
}

export function imageUrl(sha256: string): string {
  return `${API}/images/${sha256}`
}
