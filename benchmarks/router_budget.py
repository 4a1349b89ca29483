"""Whether the error-budget router keeps its promises, on prompts that it never saw: small Flux.

ComfyUI's KSampler draws captions with the demo checkpoint on a 64×64 latent (1,024 image tokens,
20 Euler steps, cfg 1). The candidates are Taylor attention as it comes and tiled attention, as it
comes and with a window of the query's own tile alone, its gates open, since calls are this short.
The first captions calibrate: the router measures its candidates on sampled queries and the
picture is exact. Then its table is frozen (``learn`` off) and other captions with other seeds are
drawn. In every call that the router gives to a candidate, exact attention of *all* queries is
computed beside it and the candidate's true NMSE is compared with the layer's budget.

``router_budget_kept``: share of (caption, step, layer) with another choice than exact whose true
NMSE is within the layer's budget. The share that is within its prediction, which is the closer
promise and made with 95 %, and the share of steps whose errors add up to no more than the step's
budget are printed beside it, as is the share of calls that were not exact.

At 1,088 tokens no candidate is faster than exact attention on a CPU, so ``cost`` is "flops" here:
what is cheapest goes by arithmetic. Errors, predictions and budgets don't depend on that.

    COMFYUI_DIR=… python benchmarks/router_budget.py
"""

from __future__ import annotations

import argparse
import logging
import os
import statistics
import tempfile
import time
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from demo_caption_accuracy import draw_captions, find_comfyui, prepare

RESULTS = ("router_budget_kept",)

CELLS = 64
STEPS = 20
SEED = 20_260_401
CANDIDATES = (
    "tiled:min_tokens=0,dense_first_steps=0; "
    "tiled:min_tokens=0,dense_first_steps=0,window_radius=0; "
    "taylor"
)


@dataclass(frozen=True)
class Told:
    """One call of a held-out caption.

    Attributes:
        caption: its number.
        step: of the schedule.
        layer: that called.
        made_by: the candidate, or "exact".
        nmse: over all queries; None where exact attention ran.
        predicted: what the router said; None likewise.
    """

    caption: int
    step: int
    layer: str
    made_by: str
    nmse: float | None = None
    predicted: float | None = None


def sampled(model: Any, caption: Any, seed: int) -> None:
    """Draw a caption; its picture is not looked at."""
    import nodes
    import torch

    from attnscope.comfy_plugin.demo.prompt import encode_prompt

    both = [encode_prompt(text, CELLS * 8, CELLS * 8) for text in (caption.text, "")]
    positive, negative = ([[c[None], {"pooled_output": p[None]}]] for c, p in both)
    latent = {"samples": torch.zeros(1, 16, CELLS, CELLS)}
    with torch.inference_mode():
        nodes.KSampler().sample(
            model, seed, STEPS, 1.0, "euler", "simple", positive, negative, latent, 1.0
        )


def watch(told: list[Told], number: list[int]) -> None:
    """From now on compare what the router's choices make of a call with exact attention."""
    import torch

    from attnscope.attention.quality import nmse
    from attnscope.attention.router.variant import RouterVariant

    original = RouterVariant.attend

    def attend(self: Any, query: Any, key: Any, value: Any, call: Any) -> Any:
        result = original(self, query, key, value, call)
        place = number[0], call.step, str(call.layer)
        if result.out is None:
            told.append(Told(*place, "exact"))
        else:
            exact = torch.nn.functional.scaled_dot_product_attention(
                query, key, value, scale=call.scale
            )
            error = float(nmse(result.out, exact))
            predicted = float(result.stats["predicted_nmse"])
            told.append(Told(*place, result.made_by, error, predicted))
        return result

    RouterVariant.attend = attend  # type: ignore[method-assign]


def share(kept: list[bool]) -> float:
    """Share of True; NaN of nothing."""
    return sum(kept) / len(kept) if kept else float("nan")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--calibrate", type=int, default=5, help="captions to measure on")
    parser.add_argument("--held-out", type=int, default=6, help="captions to judge by")
    parser.add_argument("--quality-speed", type=float, default=0.5)
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    began = time.monotonic()
    _alive = prepare(find_comfyui(None))

    import folder_paths

    from attnscope.attention.router.policy import budget_of
    from attnscope.attention.settings import RouterSettings
    from attnscope.comfy_plugin import hooks
    from attnscope.comfy_plugin.config import Config
    from attnscope.comfy_plugin.demo.model import load_demo_model
    from attnscope.comfy_plugin.plugin import Plugin

    captions = draw_captions(options.calibrate + options.held_out)
    model = load_demo_model()
    settings = RouterSettings(
        quality_speed=options.quality_speed, cost="flops", candidates=CANDIDATES,
        quality_samples=0, min_runs=min(4, options.calibrate), recheck_runs=0,
    )  # fmt: skip
    told: list[Told] = []
    number = [0]
    with tempfile.TemporaryDirectory() as folder:
        folder_paths.set_output_directory(folder)
        plugin = Plugin(Path(folder) / "spool")
        hooks.get_plugin = lambda: plugin
        # Nothing is recorded: the router has to do without.
        config = Config(disabled=True)
        every = settings.model_copy(update={"min_runs": 40})
        measuring = hooks.attach(model, hooks.Plan("router", every, "", config))
        for index, caption in enumerate(captions[: options.calibrate]):
            sampled(measuring, caption, SEED + index)
            print(f"calibrated on: {caption.text}", flush=True)
        frozen = settings.model_copy(update={"learn": False})
        routing = hooks.attach(model, hooks.Plan("router", frozen, "", config))
        watch(told, number)
        for index, caption in enumerate(captions[options.calibrate :], options.calibrate):
            number[0] = index
            sampled(routing, caption, SEED + index)
            mine = [one for one in told if one.caption == index]
            ran = [one for one in mine if one.nmse is not None]
            print(f"routed: {caption.text}: {len(ran)} of {len(mine)} calls", flush=True)
    layers = len({one.layer for one in told})
    budget = budget_of(settings, layers)
    report(told, budget.layer, budget.step)
    print(f"{len(captions)} captions, {time.monotonic() - began:.0f} s in all")


def report(told: list[Told], of_layer: float, of_step: float) -> None:
    """Print what was promised and what was kept."""
    chosen = [one for one in told if one.nmse is not None and one.predicted is not None]
    if not chosen:
        raise SystemExit("the router gave no call to a candidate")
    for layer in sorted({one.layer for one in told}):
        names = Counter(one.made_by for one in told if one.layer == layer)
        errors = [one.nmse for one in chosen if one.layer == layer]
        middle = f"{statistics.median(errors):.2g}" if errors else "-"
        ran = ", ".join(f"{name} {count}" for name, count in names.most_common())
        print(f"  {layer}: {ran}; median NMSE {middle}")
    sums: dict[tuple[int, int], float] = defaultdict(float)
    for one in told:
        sums[one.caption, one.step] += one.nmse or 0.0
    kept = share([one.nmse <= of_layer for one in chosen])
    predicted = share([one.nmse <= one.predicted for one in chosen])
    ratio = statistics.median(one.nmse / one.predicted for one in chosen)
    print(f"budget of a layer {of_layer:.4g}, of a step {of_step:.4g}")
    print(f"not exact: {len(chosen)} of {len(told)} calls, {len(chosen) / len(told):.3f}")
    print(f"within its prediction: {predicted:.4f}; error over prediction, median {ratio:.2f}")
    print(f"steps within their budget: {share([s <= of_step for s in sums.values()]):.4f}")
    print(f"RESULT router_budget_kept {kept:.4f}")


if __name__ == "__main__":
    os.environ.setdefault("TQDM_DISABLE", "1")
    main()
