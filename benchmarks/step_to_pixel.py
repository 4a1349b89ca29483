"""How long a closed step takes from the sampler to the screen.

A real ComfyUI samples the demo model with the monitor on, the real server stores and streams, and
a real Chromium draws, all on this machine. Of each step: the time between its close in the
sampler and the animation frame after the heatmap has been drawn with it. Steps that closed before
the page was open don't count.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from support.browser import chromium, watched_page
from support.stack import Stack, demo_workflow, wait_for

RESULTS = ("step_to_pixel_ms_p95",)

STEPS = 60
RUNS = 2

# Every change of the heatmap's data-drawn-at, as [last step drawn, time in ms].
WATCH = """
window.drawn = [];
new MutationObserver(() => {
  const map = document.querySelector('[data-testid=heatmap]');
  if (!map || !map.dataset.drawnAt) return;
  const entry = [Number(map.dataset.drawnStep), Number(map.dataset.drawnAt)];
  const last = window.drawn[window.drawn.length - 1];
  if (!last || last[0] !== entry[0]) window.drawn.push(entry);
}).observe(document, {subtree: true, childList: true, attributes: true,
                      attributeFilter: ['data-drawn-at']});
"""


def delays_of_one_run(stack: Stack, page, seed: int) -> list[float]:  # type: ignore[no-untyped-def]
    """Delays in ms of the steps that closed after the page had first drawn the run."""
    prompt = stack.queue(demo_workflow(steps=STEPS, seed=seed, node="AttnScopeMonitor"))
    run_id = stack.run_of(prompt)["run_id"]
    page.goto(f"{stack.server_url}/runs/{run_id}")
    stack.ended_run(prompt)
    wait_for(
        lambda: page.evaluate("window.drawn.length && window.drawn.at(-1)[0]") == STEPS - 1,
        30,
        "the last step drawn",
    )
    drawn: list[tuple[int, float]] = page.evaluate("window.drawn")
    columns = stack.api(f"/runs/{run_id}/columns")["steps"]
    closed = dict(zip(columns["step"], columns["closed_at"], strict=True))
    first_drawn_at = drawn[0][1]
    delays = []
    for step, closed_at in closed.items():
        if closed_at * 1000 < first_drawn_at:
            continue
        seen = min(at for last, at in drawn if last >= step)
        delays.append(seen - closed_at * 1000)
    return delays


def main() -> None:
    with tempfile.TemporaryDirectory() as folder, chromium() as browser:
        stack = Stack(Path(folder))
        try:
            stack.start()
            with watched_page(browser) as (page, complaints):
                page.add_init_script(WATCH)
                delays = [
                    delay for run in range(RUNS) for delay in delays_of_one_run(stack, page, run)
                ]
            if complaints:
                raise SystemExit(f"the page complained: {complaints}")
        finally:
            stack.stop()
    if len(delays) < STEPS:
        raise SystemExit(f"only {len(delays)} steps closed while the page was open")
    delays.sort()
    at = {share: delays[int(share * (len(delays) - 1))] for share in (0.5, 0.95, 1.0)}
    print(
        f"{len(delays)} steps: median {at[0.5]:.0f} ms, 95th percentile {at[0.95]:.0f} ms, "
        f"longest {at[1.0]:.0f} ms"
    )
    print(f"RESULT step_to_pixel_ms_p95 {at[0.95]:.0f}")


if __name__ == "__main__":
    main()
