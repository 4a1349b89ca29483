"""Results of hybrid attention become runs: the plugin's own lines and those of the older pack."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from attnscope.attention.settings import HybridSettings
from attnscope.backend import importing

RUN = "5" * 32
OURS = {
    "timestamp": 2000.0, "run_id": RUN, "status": "interrupted",
    "quality": {
        "nmse_mean": 0.02, "nmse_max": "Infinity", "cosine_mean": 0.99, "cosine_min": 0.9,
        "log_mass_bias": None, "attn_ms": 12.5, "calls": 24, "calls_hybrid": 20,
        "calls_measured": 20, "samples": 16,
    },
    "config": HybridSettings(local_window=300).model_dump(mode="json"),
    "meta": {
        "run_start_ts": 1990.0, "duration_ms": 9500.0, "model": "flux1-dev", "layers": [],
        "sampler": "euler", "seed": 7, "cfg": 1.0, "sigmas": [1.0, 0.5, 0.0], "sigma": 0.5,
        "steps": 2, "revision": 0, "q_len": 1280, "k_len": 1280, "head_dim": 128,
        "latent_shape": [1, 16, 64, 64], "batch": 1, "latent_h": 64, "latent_w": 64,
    },
}  # fmt: skip
OLDER = {
    "timestamp": 1000.5,
    "quality": {
        "mean_abs": 0.0123, "max_abs": 1.5, "mean_rel": 0.4, "max_rel": 80.0,
        "samples": 1474560, "calls": 57,
    },
    "config": {
        "local_window": 512, "local_window_min": 512, "local_window_max": 512,
        "local_window_sigma_low": 0.0, "local_window_sigma_high": 0.0, "local_chunk": 256,
        "prefix_tokens": 512, "global_dim": 16, "global_P": 2, "global_weight": 0.1,
        "global_sigma_low": 0.0, "global_sigma_high": 0.0, "global_scale_mul": 1.0,
        "global_norm_power": 0.25, "global_norm_clip": 4.0, "use_pca": True, "pca_samples": 65536,
        "allow_cross_attention": True, "layer_start": -1, "layer_end": -1, "eps": 1e-6,
        "force_fp32": True,
    },
    "meta": {
        "run_start_ts": 990.0, "model_class": "Flux", "model_type": "ModelType.FLUX", "batch": 1,
        "heads": 24, "head_dim": 128, "token_dim": 3072, "q_len": 4608, "k_len": 4608,
        "is_cross": False, "dtype": "bfloat16", "device": "cuda:0", "sigma": 0.25,
        "effective_local_window": 512, "effective_global_weight": 0.1, "block_index": 37,
    },
}  # fmt: skip


def write(path: Path, *records: Any) -> Path:
    text = "\n".join(r if isinstance(r, str) else json.dumps(r) for r in records)
    path.write_text(text + "\n", encoding="utf-8")
    return path


def changed(record: dict[str, Any], part: str, **values: Any) -> dict[str, Any]:
    return record | {part: record[part] | values}


def test_lines_become_runs_once(api: Any, tmp_path: Path) -> None:
    file = write(tmp_path / "results.jsonl", OURS, "", OLDER)
    report = importing.import_file(api.services.config, file)
    assert (report.runs, report.stored, report.known) == (2, 6, 0)
    again = importing.import_file(api.services.config, file)
    assert (again.runs, again.stored, again.known) == (2, 0, 6)
    ours, older = sorted(api.get("/runs")["items"], key=lambda run: -run["started_at"])
    assert ours["run_id"] == RUN
    assert (ours["variant"], ours["status"], ours["duration_ms"]) == (
        "hybrid", "interrupted", 9500.0,
    )  # fmt: skip
    assert ours["settings"]["local_window"] == 300
    assert ours["sampling"]["latent_shape"] == [1, 16, 64, 64]
    (row,) = api.get(f"/runs/{RUN}/layer-steps")["items"]
    assert row["metrics"]["nmse"] == 0.02
    assert (row["step"], row["calls"], row["calls_variant"]) == (1, 24, 20)
    assert older["model"]["name"] == "Flux"
    assert older["label"] == (
        "imported result; mean_abs 0.0123; max_abs 1.5; mean_rel 0.4; max_rel 80"
    )
    assert older["settings"]["global_P"] == 2
    assert older["settings"]["prefix_tokens"] == 512
    assert older["settings"]["combine"] == "additive"
    assert older["settings"]["global_norm_power"] == 0.25
    assert older["settings"]["global_norm_clip"] == 4.0
    assert older["settings"]["pca_samples"] == 65_536
    assert older["sampling"]["sigmas"] == [0.25, 0.0]
    assert older["duration_ms"] == pytest.approx(10_500.0)


def test_a_run_that_the_server_has_stays_as_it_is(api: Any, tmp_path: Path) -> None:
    from support.events import RunScript

    script = RunScript(variant="hybrid", steps=2)
    api.send(*script.whole())
    before = api.get(f"/runs/{script.run_id}")
    file = write(tmp_path / "results.jsonl", OURS | {"run_id": script.run_id})
    assert importing.import_file(api.services.config, file).stored == 0
    assert api.get(f"/runs/{script.run_id}") == before


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (changed(OURS, "quality", mean_abs="0.1"), "line 2: quality.mean_abs: "),
        (changed(OURS, "quality", calls=-1), "line 2: quality.calls: "),
        (changed(OURS, "meta", sigmas=["1"]), "line 2: meta.sigmas.0: "),
        (changed(OURS, "config", global_P="3"), "line 2: config.global_P: "),
        (changed(OURS, "config", global_weight=99.0), "line 2: config.global_weight: "),
        (OURS | {"timestamp": None}, "line 2: timestamp: "),
        (OURS | {"run_id": "x"}, "line 2: run_id: "),
        ({"timestamp": 1.0, "config": {}}, "line 2: quality: "),
        ("{", "line 2: line: "),
    ],
)
def test_a_bad_line_is_named_and_nothing_is_stored(
    api: Any, tmp_path: Path, bad: Any, message: str
) -> None:
    file = write(tmp_path / "results.jsonl", OLDER, bad)
    with pytest.raises(importing.ImportFailed) as refused:
        importing.import_file(api.services.config, file)
    assert str(refused.value).startswith(message)
    assert api.get("/runs")["items"] == []


def test_names_that_nobody_knows_are_passed_over(api: Any, tmp_path: Path) -> None:
    record = changed(changed(OLDER, "config", comet=1, pca_samples=0), "meta", anything=[1]) | {
        "more": 1
    }
    file = write(tmp_path / "results.jsonl", record)
    assert importing.import_file(api.services.config, file).stored == 3
    (older,) = api.get("/runs")["items"]
    assert older["settings"]["pca_samples"] == 0
