import { readonly, ref } from 'vue'

import { request } from '../lib/api/client'
import type { SessionState } from '../lib/api/schema'

const session = ref<SessionState | null>(null)

export async function loadSession(): Promise<SessionState> {
  session.value = await request<SessionState>('/session')
  return session.value
}

export async function logIn(token: string): Promise<SessionState> {
  session.value = await request<SessionState>('/session', { method: 'POST', body: { token } })
  return session.value
}

export async function logOut(): Promise<void> {
  await request('/session', { method: 'DELETE' })
  await loadSession()
}

export function useSession() {
  return { session: readonly(session) }
}
