"""The demo model in a real ComfyUI: training, loading, nodes, sampling and previews."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from attnscope.comfy_plugin.demo.captions import parse, sample_caption
from attnscope.comfy_plugin.demo.checkpoint import (
    DEFAULT_PATH,
    UNET_CONFIG,
    CheckpointError,
    load_checkpoint,
    save_checkpoint,
)
from attnscope.comfy_plugin.demo.pictures import render
from attnscope.comfy_plugin.demo.prompt import encode_prompt
from attnscope.comfy_plugin.demo.scorer import judge

pytestmark = [pytest.mark.comfyui, pytest.mark.usefixtures("comfyui")]


def _conditioning(text: str, side: int) -> list[Any]:
    from attnscope.comfy_plugin.demo.nodes import AttnScopeDemoPrompt

    return AttnScopeDemoPrompt.execute(text, side, side).args[0]


def _sample(model: Any, text: str, side: int, *, steps: int = 20, seed: int = 1) -> torch.Tensor:
    """Through ComfyUI's KSampler and our decoder: an image [H, W, 3]."""
    import nodes

    from attnscope.comfy_plugin.demo.nodes import AttnScopeDemoDecode

    latent = {"samples": torch.zeros(1, 16, side // 8, side // 8)}
    with torch.inference_mode():
        (result,) = nodes.KSampler().sample(
            model, seed, steps, 1.0, "euler", "simple",
            _conditioning(text, side), _conditioning("", side), latent, 1.0,
        )  # fmt: skip
        return AttnScopeDemoDecode.execute(result).args[0][0]


@pytest.fixture(scope="module")
def model(comfyui: Path) -> Any:
    from attnscope.comfy_plugin.demo.nodes import AttnScopeDemoModel

    return AttnScopeDemoModel.execute().args[0]


def test_samples_held_out_captions(model: Any) -> None:
    rng = np.random.default_rng(5)
    captions = [sample_caption(rng, held_out=True) for _ in range(8)]
    verdicts = [
        judge(_sample(model, caption.text, 256, seed=index).numpy(), caption)
        for index, caption in enumerate(captions)
    ]
    assert sum(verdict.ok for verdict in verdicts) >= 6, verdicts


def test_prompt_changes_the_picture(model: Any) -> None:
    one = _sample(model, "large red circle left of small blue square", 256)
    two = _sample(model, "large red circle right of small blue square", 256)
    assert float((one - two).abs().mean()) > 0.02


def test_override_sees_every_attention_call(model: Any) -> None:
    calls = []

    def override(func: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        options = kwargs["transformer_options"]
        calls.append((options["block_type"], options["block_index"], tuple(args[0].shape)))
        return func(*args, **kwargs)

    patched = model.clone()
    patched.model_options["transformer_options"]["optimized_attention_override"] = override
    _sample(patched, "red circle", 128, steps=2)
    layers = [("double", 0), ("double", 1), *(("single", index) for index in range(4))]
    assert [call[:2] for call in calls] == layers * 2
    assert {call[2] for call in calls} == {(1, 2, 64 + 16, 128)}


def test_latent_preview_looks_like_the_image(model: Any) -> None:
    import latent_preview
    from comfy.cli_args import LatentPreviewMethod, args

    from attnscope.comfy_plugin.demo.nodes import AttnScopeDemoEncode

    rng = np.random.default_rng(3)
    image = render(parse("large red circle left of small blue square"), 256, 256, rng)
    latent = AttnScopeDemoEncode.execute(torch.from_numpy(image)[None]).args[0]["samples"]
    before, args.preview_method = args.preview_method, LatentPreviewMethod.Latent2RGB
    try:
        previewer = latent_preview.get_previewer(model.load_device, model.model.latent_format)
        preview = np.asarray(previewer.decode_latent_to_preview(latent)) / 255
    finally:
        args.preview_method = before
    assert preview.shape == (32, 32, 3)
    assert np.abs(preview - image.reshape(32, 8, 32, 8, 3).mean((1, 3))).mean() < 0.01


def test_latent_format_changes_nothing(model: Any) -> None:
    latent = torch.randn(1, 16, 4, 4)
    assert torch.equal(model.model.process_latent_in(latent), latent)
    assert torch.equal(model.model.process_latent_out(latent), latent)


def test_image_to_image_keeps_the_layout(model: Any) -> None:
    import nodes

    from attnscope.comfy_plugin.demo.nodes import AttnScopeDemoDecode, AttnScopeDemoEncode

    caption = parse("large green square at left")
    image = torch.from_numpy(render(caption, 256, 256, np.random.default_rng(2)))[None]
    latent = AttnScopeDemoEncode.execute(image).args[0]
    with torch.inference_mode():
        (result,) = nodes.KSampler().sample(
            model, 4, 10, 1.0, "euler", "simple",
            _conditioning(caption.text, 256), _conditioning("", 256), latent, 0.4,
        )  # fmt: skip
    again = AttnScopeDemoDecode.execute(result).args[0]
    assert float((again - image).abs().mean()) < 0.1


def test_encode_crops_to_whole_patches() -> None:
    from attnscope.comfy_plugin.demo.nodes import AttnScopeDemoEncode

    latent = AttnScopeDemoEncode.execute(torch.rand(2, 70, 99, 4)).args[0]["samples"]
    assert latent.shape == (2, 16, 8, 12)
    with pytest.raises(ValueError, match="smaller than one patch"):
        AttnScopeDemoEncode.execute(torch.rand(1, 8, 99, 3))


def test_prompt_node_checks_its_words() -> None:
    from attnscope.comfy_plugin.demo.nodes import AttnScopeDemoPrompt

    assert AttnScopeDemoPrompt.validate_inputs("red circle") is True
    assert "'pink'" in AttnScopeDemoPrompt.validate_inputs("pink circle")


def test_node_schemas() -> None:
    from attnscope.comfy_plugin.demo.nodes import DEMO_NODES

    for node in DEMO_NODES:
        schema = node.GET_SCHEMA()
        assert schema.category == "AttnScope/demo" and schema.description


def test_loader_names_the_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from attnscope.comfy_plugin.demo.nodes import AttnScopeDemoModel

    path = tmp_path / "nothing.safetensors"
    monkeypatch.setenv("ATTNSCOPE_DEMO_CHECKPOINT", str(path))
    with pytest.raises(CheckpointError, match=r"nothing\.safetensors"):
        AttnScopeDemoModel.execute()


def test_loader_takes_later_norm_names_and_refuses_odd_weights(tmp_path: Path) -> None:
    from attnscope.comfy_plugin.demo.model import build_patcher, load_demo_model

    checkpoint = load_checkpoint(DEFAULT_PATH)
    renamed = {n.replace("_norm.scale", "_norm.weight"): w for n, w in checkpoint.weights.items()}
    assert set(renamed) != set(checkpoint.weights)
    build_patcher(type(checkpoint)(renamed, checkpoint.codec, checkpoint.config))
    weights = dict(list(checkpoint.weights.items())[1:])
    path = tmp_path / "short.safetensors"
    save_checkpoint(path, weights, checkpoint.codec, checkpoint.config)
    with pytest.raises(CheckpointError, match=r"short\.safetensors"):
        load_demo_model(path)


@pytest.fixture
def trainer(comfyui: Path) -> Any:
    from attnscope.comfy_plugin.demo.batches import Stage
    from attnscope.comfy_plugin.demo.codec import fit_codec
    from attnscope.comfy_plugin.demo.train import Trainer

    codec = fit_codec(0, pictures=20)
    stage = Stage(steps=4, sizes="4:1,6:1", batch_tokens=60, warmup=1)
    return lambda: Trainer(stage, torch.device("cpu"), codec)


def train(trainer: Any, indices: range) -> list[float]:
    """Train the stage's steps; returns their losses."""
    from attnscope.comfy_plugin.demo.batches import Batches

    batches = Batches(trainer.stage, trainer.codec, trainer.step - indices[0])
    rates = [trainer.stage.learning_rate(index, seconds=0.0) for index in indices]
    return [
        float(trainer.train_step(batches[index], rate)[0])
        for index, rate in zip(indices, rates, strict=True)
    ]


def test_training_resumes_as_if_unbroken(trainer: Any, tmp_path: Path) -> None:
    unbroken = trainer()
    losses = train(unbroken, range(4))
    assert all(np.isfinite(losses))

    first = trainer()
    train(first, range(2))
    first.save_state(tmp_path / "state.safetensors", 2)
    second = trainer()
    assert second.load_state(tmp_path / "state.safetensors") == 2
    assert train(second, range(2, 4)) == pytest.approx(losses[2:], rel=1e-4)
    for name, value in unbroken.averaged.items():
        torch.testing.assert_close(second.averaged[name], value, rtol=1e-3, atol=1e-5)

    second.export(tmp_path / "demo.safetensors")
    exported = load_checkpoint(tmp_path / "demo.safetensors")
    assert exported.config["unet"] == UNET_CONFIG and exported.config["steps"] == 4


def test_training_forward_equals_comfyuis_own(trainer: Any) -> None:
    """The rewritten residual additions and plain attention change no numbers."""
    from attnscope.comfy_plugin.demo.head_start import plain_attention

    flux = trainer().flux
    with torch.no_grad():
        for parameter in flux.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    context, pooled = encode_prompt("red circle above blue square", 128, 128)
    x, level = torch.randn(2, 16, 8, 8), torch.tensor([0.3, 0.9])
    args = (x, level, context.repeat(2, 1, 1), pooled.repeat(2, 1))
    with torch.no_grad():
        options = {"optimized_attention_override": plain_attention}
        ours = flux(*args, transformer_options=options)
        for block in (*flux.double_blocks, *flux.single_blocks):
            del block.forward
        theirs = flux(*args, transformer_options={})
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


def test_training_command_line(tmp_path: Path) -> None:
    from attnscope.comfy_plugin.demo.batches import Stage
    from attnscope.comfy_plugin.demo.train import build_parser

    parsed = build_parser().parse_args(["--out", "a", "--state", "b", "--steps", "3"])
    assert parsed.steps == 3 and parsed.batch_tokens == Stage().batch_tokens
    with pytest.raises(ValueError, match="even latent sides"):
        Stage(sizes="15:1").size_shares()


def test_a_stage_ends_by_steps_or_by_time() -> None:
    from attnscope.comfy_plugin.demo.batches import Stage

    timed = Stage(steps=100, minutes=2, lr=1.0, lr_end=0.0, warmup=0)
    assert timed.progress(25, seconds=30) == 0.25
    assert timed.progress(25, seconds=90) == 0.75
    assert timed.learning_rate(25, seconds=90) == pytest.approx(0.25)
    assert timed.progress(1, seconds=121) == 1
    assert Stage(steps=100).progress(50, seconds=1e6) == 0.5
