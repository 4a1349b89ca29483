// Opens the dashboard from ComfyUI's menu, and marks our nodes while they are being watched.
// Everything asks before it uses: a frontend without one of these hooks just shows less.
import { app } from "../../scripts/app.js"
import { api } from "../../scripts/api.js"

const CLASSES = new Set(["AttnScopeTaylor", "AttnScopeMonitor"])
const DEFAULT_URL = "http://127.0.0.1:8420"

/** Newest run per node id: {url, run_id, live}. */
const runs = new Map()
let newest = null

const runUrl = (run) => `${run.url}/runs/${encodeURIComponent(run.run_id)}`

const isWeb = (url) => /^https?:\/\//i.test(url ?? "")

const show = (url) => {
  if (isWeb(url)) window.open(url, "attnscope", "noreferrer")
}

async function dashboardUrl() {
  if (newest?.live) return runUrl(newest)
  try {
    const answer = await api.fetchApi("/attnscope/config")
    const { url } = await answer.json()
    if (isWeb(url)) return url
  } catch {
    // An older plugin, or a ComfyUI that has gone: the default may still be right.
  }
  return newest?.url ?? DEFAULT_URL
}

const openDashboard = async () => show(await dashboardUrl())

function onRun({ detail }) {
  if (!detail?.run_id || !isWeb(detail.url)) return
  const run = { url: detail.url, run_id: detail.run_id, live: detail.live === true }
  if (run.live || newest?.run_id === run.run_id) newest = run
  for (const id of detail.node_ids ?? []) {
    if (run.live || runs.get(String(id))?.run_id === run.run_id) runs.set(String(id), run)
  }
  app.graph?.setDirtyCanvas?.(true, false)
}

function drawBadge(node, context) {
  const run = runs.get(String(node.id))
  if (!run || node.flags?.collapsed) return
  const text = run.live ? "● live" : "recorded"
  context.save()
  context.font = "11px sans-serif"
  context.textAlign = "right"
  context.fillStyle = run.live ? "#2e9e5b" : "#8a8a8a"
  context.fillText(text, node.size[0] - 8, -10)
  context.restore()
}

const isOurs = (node) => CLASSES.has(node?.comfyClass ?? node?.type)

app.registerExtension?.({
  name: "AttnScope",
  commands: [
    {
      id: "AttnScope.OpenDashboard",
      label: "Open AttnScope dashboard",
      icon: "pi pi-chart-line",
      function: openDashboard,
    },
  ],
  menuCommands: [{ path: ["Extensions"], commands: ["AttnScope.OpenDashboard"] }],
  setup() {
    api.addEventListener?.("attnscope.run", onRun)
  },
  nodeCreated(node) {
    if (!isOurs(node)) return
    const before = node.onDrawForeground
    node.onDrawForeground = function (context, ...rest) {
      before?.call(this, context, ...rest)
      try {
        drawBadge(this, context)
      } catch {
        // A frontend that draws its nodes otherwise.
      }
    }
  },
  getNodeMenuItems(node) {
    const run = isOurs(node) ? runs.get(String(node.id)) : undefined
    return run ? [{ content: "Open run in AttnScope", callback: () => show(runUrl(run)) }] : []
  },
})
