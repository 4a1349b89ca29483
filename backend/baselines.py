"""Which runs can be compared, and what a comparison of two of them says."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from sqlalchemy.orm import Session

from ..db import conditions, images, instances, models, numbers, runs
from ..wire import ModelInfo, RunStatus
from . import pictures, problems, serial
from .comparing import Comparer
from .schemas import (
    Baseline,
    BaselineCandidate,
    ComparedRun,
    Comparison,
    ConditionDifference,
    ErrorMap,
    FieldProblem,
    ImagePair,
    Match,
    Ratio,
)

EXACT = "exact"
MOST_CANDIDATES = 50
LOOKED_THROUGH = 200
LOSSLESS = frozenset({"image/png"})
"""How finished images come that are as they were; a plugin sends WebP only with losses."""

TITLES = {
    "model": "model",
    "seed": "seed",
    "sigmas": "schedule",
    "sampler": "sampler",
    "cfg": "cfg",
    "denoise": "denoise",
    "latent_shape": "latent shape",
    conditions.RECIPE: "prompt or another input of the sampler",
}
WHAT_TO_DO = "Run the same prompt with the AttnScope Monitor node to get a baseline."
_SHOWN = 80


def match(run: models.Run, baseline: models.Run) -> Match:
    """Whether two runs differ in their attention alone."""
    ours, theirs = _conditions(run), _conditions(baseline)
    names = conditions.differences(ours, theirs)
    recipes = (run.sampling.get(conditions.RECIPE), baseline.sampling.get(conditions.RECIPE))
    unknown = [] if all(recipes) else [conditions.RECIPE]
    if run.sampling.get("seed") is None and baseline.sampling.get("seed") is None:
        unknown.insert(0, "seed")
    if not names and all(recipes) and recipes[0] != recipes[1]:
        # Where anything else differs, so does the recipe: it would say nothing more.
        names = [conditions.RECIPE]
        ours, theirs = ({conditions.RECIPE: str(recipe)} for recipe in recipes)
    return Match(
        comparable=not names and unknown != ["seed", conditions.RECIPE],
        differs=[
            ConditionDifference(
                name=name,
                title=TITLES[name],
                run=_shown(ours[name]),
                baseline=_shown(theirs[name]),
            )
            for name in names
        ],
        unknown=unknown,
    )


def find(session: Session, run: models.Run) -> Baseline:
    """The exact runs that a run can be compared with, or why there are none."""
    rows = [
        row
        for row in runs.completed(session, EXACT, run.conditions, LOOKED_THROUGH)
        if row.id != run.id and match(run, row).comparable
    ]
    # A stable sort: those whose prompt is known to be the same stay newest first.
    rows.sort(key=lambda row: conditions.RECIPE in match(run, row).unknown)
    candidates = _candidates(session, run, rows[:MOST_CANDIDATES])
    with_image = [item.run.run_id for item in candidates if item.run.finals]
    if candidates:
        recommended = with_image[0] if with_image else candidates[0].run.run_id
        return _answer(run, candidates=candidates, recommended=recommended)
    others = [row for row in runs.completed(session, EXACT, None, LOOKED_THROUGH)
              if row.id != run.id]  # fmt: skip
    if not others:
        return _answer(run, reason="none_exact", detail=f"No exact run yet. {WHAT_TO_DO}")
    nearest = min(others, key=lambda row: len(match(run, row).differs))
    [found] = _candidates(session, run, [nearest])
    if not found.match.differs:
        detail = (
            "Neither the seed nor the prompt of this run is known, so nothing tells which run it "
            f"can be compared with. {WHAT_TO_DO}"
        )
        return _answer(run, reason="conditions_unknown", detail=detail)
    titles = ", ".join(item.title for item in found.match.differs)
    detail = f"No exact run fits; the nearest has another {titles}. {WHAT_TO_DO}"
    return _answer(run, reason="none_comparable", detail=detail, nearest=found)


def side_by_side(session: Session, run: models.Run, baseline: models.Run) -> Comparison:
    """A run against another one, without the images' figures, which take time: see `pairs`.

    Raises:
        ProblemError: one of them has no finished image (409).
    """
    ours, theirs = compared(session, [run, baseline])
    for field, side in (("run_id", ours), ("with", theirs)):
        if not side.finals:
            allowed = "a run with a finished image"
            raise problems.ProblemError(
                409,
                "no-final-image",
                f"{field}: {side.run_id} has no finished image; allowed: {allowed}. It comes from "
                "a save or preview node behind the sampler, once the prompt has ended.",
                errors=[FieldProblem(field=field, value=side.run_id, allowed=allowed)],
            )
    return Comparison(
        run=ours,
        baseline=theirs,
        match=match(run, baseline),
        images=[],
        unpaired=abs(len(ours.finals) - len(theirs.finals)),
        attn_ms=ratio(ours.attn_ms, theirs.attn_ms),
        duration_ms=ratio(ours.duration_ms, theirs.duration_ms),
        same_device=_same_device(session, run, baseline),
    )


def pairs(
    comparer: Comparer, ours: ComparedRun, theirs: ComparedRun, base_url: str
) -> list[ImagePair]:
    """Finished images of two runs, each beside the one at the same place of the batch.

    Args:
        base_url: path of the API.

    Raises:
        ProblemError: an image can't be compared (422), or others are being compared (503).
    """
    found_pairs = []
    for index, (one, other) in enumerate(zip(ours.finals, theirs.finals, strict=False)):
        found = comparer.difference(one.sha256, other.sha256)
        scale = pictures.fitting_scale(found.error_p999)
        found_pairs.append(
            ImagePair(
                index=index,
                width=one.width,
                height=one.height,
                run=one,
                baseline=other,
                run_url=f"{base_url}/images/{one.sha256}",
                baseline_url=f"{base_url}/images/{other.sha256}",
                lossless={one.media_type, other.media_type} <= LOSSLESS,
                identical=found.max_error == 0,
                psnr=found.psnr,
                ssim=found.ssim,
                mae=found.mae,
                max_error=found.max_error,
                error_map=ErrorMap(
                    url=f"{base_url}/images/{one.sha256}/error-map"
                    f"?with={other.sha256}&scale={scale}",
                    scale=scale,
                    scales=list(pictures.SCALES),
                    colors=list(pictures.COLORS),
                ),
            )
        )
    return found_pairs


def compared(session: Session, rows: Sequence[models.Run]) -> list[ComparedRun]:
    """Runs as a comparison shows them."""
    finals = images.finals_of(session, [row.id for row in rows])
    answers = []
    for row in rows:
        times = numbers.restored(row, ("attn_ms", "duration_ms"))
        instance = instances.find(session, row.instance_id)
        answers.append(
            ComparedRun(
                run_id=row.run_id,
                label=row.label,
                variant=row.variant,
                status=RunStatus(row.status),
                started_at=row.started_at,
                device=instance.device if instance is not None else "",
                model=ModelInfo.model_validate(row.model),
                finals=[serial.image(image) for image in finals[row.id]],
                **times,
            )
        )
    return answers


def ratio(run: float | None, baseline: float | None) -> Ratio:
    """A time beside another one; without a ratio where either isn't known or is none."""
    quotient = None
    if run is not None and baseline is not None and math.isfinite(run) and baseline > 0:
        quotient = run / baseline
    return Ratio(run=run, baseline=baseline, ratio=quotient)


def _answer(run: models.Run, **fields: Any) -> Baseline:
    empty: dict[str, Any] = {
        "candidates": [],
        "recommended": None,
        "reason": None,
        "detail": "",
        "nearest": None,
    }
    return Baseline(run_id=run.run_id, **{**empty, **fields})


def _candidates(
    session: Session, run: models.Run, rows: Sequence[models.Run]
) -> list[BaselineCandidate]:
    return [
        BaselineCandidate(run=item, match=match(run, row))
        for item, row in zip(compared(session, rows), rows, strict=True)
    ]


def _same_device(session: Session, run: models.Run, baseline: models.Run) -> bool:
    if run.instance_id == baseline.instance_id:
        return True
    one = instances.find(session, run.instance_id)
    other = instances.find(session, baseline.instance_id)
    return one is not None and other is not None and _machine(one) == _machine(other)


def _machine(instance: models.Instance) -> tuple[str, str, str]:
    return instance.name.rpartition(":")[0], instance.platform, instance.device


def _conditions(run: models.Run) -> dict[str, Any]:
    return conditions.of_run(run.sampling, run.model)


def _shown(value: Any) -> str:
    if isinstance(value, list):
        text = " ".join(_shown(item) for item in value)
    else:
        text = "–" if value is None else str(value)
    return text if len(text) <= _SHOWN else text[:_SHOWN] + "…"
