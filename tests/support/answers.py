"""Answers of the API, made comparable."""

from __future__ import annotations

from typing import Any


def strip_ids(answer: Any) -> Any:
    """An answer without the numbers that only one database gives: ids of revisions."""
    if isinstance(answer, dict):
        revision = "requested_at" in answer
        return {k: strip_ids(v) for k, v in answer.items() if not (revision and k == "id")}
    if isinstance(answer, list):
        return [strip_ids(item) for item in answer]
    return answer
