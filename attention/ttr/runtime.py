"""The students of one model: built at a first call, kept over runs, read and written."""

from __future__ import annotations

import zlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from ..variant import ModelPrint
from . import checkpoint
from .build import build_student
from .readiness import MovingAverage, Rule, is_ready
from .student import Student, StudentOptions
from .trainer import Trainer, training


@dataclass(slots=True, eq=False)
class Layer:
    """A layer's student with what is known of its training.

    Attributes:
        name: of the block.
        student: on ``device``.
        trainer: of the student.
        device: where both are.
        updates: that it has had, over all runs.
        loss: average of the loss.
        nmse: average of the held-out NMSE.
        ready: whether it may serve.
        started: whether its first weights were set by a call.
    """

    name: str
    student: Student
    trainer: Trainer
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    updates: int = 0
    loss: MovingAverage = field(default_factory=MovingAverage)
    nmse: MovingAverage = field(default_factory=MovingAverage)
    ready: bool = False
    started: bool = False

    def to(self, device: torch.device) -> None:
        """Take everything to a device."""
        if device != self.device:
            with training(device):
                self.student.to(device)
                self.trainer.to(device)
            self.device = device


class Runtime:
    """All students of a model and a kind. One run at a time uses it.

    Attributes:
        path: absolute, of the checkpoint; None where there is none.
        options: of the students; heads and head_dim are those of each layer's calls.
        layers: by name, in the order in which they were built.
        unsaved: updates since it was last written.
    """

    def __init__(
        self, path: Path | None, options: StudentOptions, seed: int, model: ModelPrint
    ) -> None:
        """
        Args:
            path: see the attribute.
            options: see the attribute.
            seed: of first weights.
            model: that teaches.
        """
        self.path = path
        self.options = options
        self.layers: dict[str, Layer] = {}
        self.unsaved = 0
        self._seed = seed
        self._model = model
        self._stamp: tuple[int, int] | None = None

    @property
    def updates(self) -> int:
        """Of all layers."""
        return sum(layer.updates for layer in self.layers.values())

    @property
    def ready(self) -> int:
        """Layers that are."""
        return sum(layer.ready for layer in self.layers.values())

    @property
    def stale(self) -> bool:
        """Whether the checkpoint on disk is another than was last read or written here."""
        stamp = _stamp(self.path)
        return stamp is not None and stamp != self._stamp

    @property
    def held_bytes(self) -> int:
        """Of parameters and moments."""
        tensors = [
            tensor
            for layer in self.layers.values()
            for tensor in (*layer.student.state_dict().values(), *layer.trainer.state().values())
        ]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def layer(self, name: str, heads: int, head_dim: int, device: torch.device) -> Layer:
        """A layer's student on a device, built at the first call.

        Raises:
            CheckpointError: the checkpoint's student is of other heads.
        """
        known = self.layers.get(name)
        if known is None:
            known = self.layers[name] = self._build(name, heads, head_dim)
        has = known.student.options
        if (has.heads, has.head_dim) != (heads, head_dim):
            raise checkpoint.CheckpointError(
                f"{self.path}: {name} has {has.heads} heads of {has.head_dim}; allowed: {heads} "
                f"of {head_dim}, as the model has: it is of another model"
            )
        known.to(device)
        return known

    def judge(self, rule: Rule, layers: Iterable[Layer] | None = None) -> list[Layer]:
        """Decide anew which layers are ready, all of them or some; those that have changed."""
        changed = []
        for layer in self.layers.values() if layers is None else layers:
            ready = is_ready(layer.ready, layer.nmse.value, layer.updates, rule)
            if ready != layer.ready:
                layer.ready = ready
                changed.append(layer)
        return changed

    def load(self, model_layers: frozenset[str], named: bool) -> bool:
        """Read the checkpoint, if there is one.

        Args:
            model_layers: of the sampled model; empty where unknown.
            named: see `checkpoint.check_fit`.

        Returns:
            Whether there is one.

        Raises:
            CheckpointError: it can't be used; nothing has changed.
        """
        path, stamp = self.path, _stamp(self.path)
        if path is None or stamp is None:
            return False
        info, tensors = checkpoint.read(path)
        checkpoint.check_fit(path, info, self.options, self._model.weights, named)
        unknown = sorted(set(info.layers) - model_layers) if model_layers else []
        if unknown:
            raise checkpoint.CheckpointError(
                f"{path}: has students of {', '.join(unknown[:3])}, which the model doesn't have: "
                "it is of another model"
            )
        layers = {}
        for name, of_layer in info.layers.items():
            layer = self._build(name, of_layer.heads, of_layer.head_dim)
            try:
                with training(layer.device):
                    layer.student.load_state_dict(dict(tensors[name].student))
                    layer.trainer.load_state(tensors[name].optimizer)
            except (RuntimeError, ValueError) as error:
                raise checkpoint.CheckpointError(f"{path}: {name}: {error}") from error
            layer.updates, layer.ready, layer.started = of_layer.updates, of_layer.ready, True
            layer.loss = MovingAverage(of_layer.loss.total, of_layer.loss.weight)
            layer.nmse = MovingAverage(of_layer.nmse.total, of_layer.nmse.weight)
            layers[name] = layer
        self.layers, self.unsaved, self._stamp = layers, 0, stamp
        return True

    def save(self) -> Path:
        """Write the checkpoint.

        Raises:
            CheckpointError: it can't be written.
        """
        path = self.path
        if path is None:
            raise checkpoint.CheckpointError("checkpoint: no file is named, so nothing is kept")
        trained = {n: layer for n, layer in self.layers.items() if layer.updates > 0}
        info = checkpoint.CheckpointInfo(
            student=self.options.kind,
            features=self.options.features,
            window_radius=self.options.window_radius,
            landmarks=self.options.landmarks,
            model=self._model.name,
            weights=self._model.weights,
            layers={name: _info(layer) for name, layer in trained.items()},
        )
        tensors = {
            name: checkpoint.LayerTensors(layer.student.state_dict(), layer.trainer.state())
            for name, layer in trained.items()
        }
        checkpoint.write(path, info, tensors)
        self.unsaved, self._stamp = 0, _stamp(path)
        return path

    def release(self) -> None:
        """Leave the device."""
        for layer in self.layers.values():
            layer.to(torch.device("cpu"))

    def _build(self, name: str, heads: int, head_dim: int) -> Layer:
        options = StudentOptions(
            self.options.kind, heads, head_dim, self.options.features,
            self.options.window_radius, self.options.landmarks,
        )  # fmt: skip
        # The generator looks at the lower 32 bits alone.
        seed = zlib.crc32(f"{self._seed} {name}".encode())
        generator = torch.Generator().manual_seed(seed)
        # Modules draw first weights from the global generator, which is the sampling's.
        with training(torch.device("cpu")), torch.random.fork_rng(devices=[]):
            student = build_student(options, generator)
            return Layer(name, student, Trainer(student))


def _info(layer: Layer) -> checkpoint.LayerInfo:
    return checkpoint.LayerInfo(
        heads=layer.student.options.heads,
        head_dim=layer.student.options.head_dim,
        updates=layer.updates,
        loss=checkpoint.AverageInfo(total=layer.loss.total, weight=layer.loss.weight),
        nmse=checkpoint.AverageInfo(total=layer.nmse.total, weight=layer.nmse.weight),
        ready=layer.ready,
    )


def _stamp(path: Path | None) -> tuple[int, int] | None:
    """What tells one version of a file from another; None where there is none."""
    try:
        found = path.stat() if path is not None else None
    except OSError:
        return None
    return None if found is None else (found.st_mtime_ns, found.st_size)
