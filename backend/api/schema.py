"""What can be set and what is measured."""

from __future__ import annotations

from fastapi import APIRouter
from starlette.responses import Response

from .. import catalogue
from ..schemas import MetricInfos, VariantSchemas
from .answers import answer

router = APIRouter(prefix="/schema", tags=["schema"])


@router.get("/variants", response_model=VariantSchemas)
def variants() -> Response:
    """Every variant's settings: groups, fields with range, unit and help, JSON schema."""
    return answer(catalogue.variant_schemas())


@router.get("/metrics", response_model=MetricInfos)
def metrics() -> Response:
    """Every metric, and prose for every gate and fallback reason."""
    return answer(catalogue.metric_infos())
