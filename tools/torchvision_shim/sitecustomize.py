"""Lets an ordinary torchvision import on a CPU-only torch.

torchvision's wheels are built against CUDA builds of torch; with a CPU torch their compiled
operators don't load, and ``import torchvision`` then fails while registering fake kernels for
``torchvision::nms``, which ComfyUI never calls. Naming the two operators is enough to import.
Put this folder on PYTHONPATH for a ComfyUI process; ComfyUI itself stays as it is.

Nothing is imported at start-up but what the interpreter has loaded anyway: the work waits until
torchvision itself is imported, and only its own verdict that its operators are missing starts it.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import os
import sys


class _OperatorNames:
    """An import hook that finds nothing, but is asked just before the failing registration."""

    library = None

    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name == "torchvision._meta_registrations":
            sys.meta_path.remove(cls)
            cls.define_missing()
        return None

    @classmethod
    def define_missing(cls):
        extension = sys.modules.get("torchvision.extension")
        has_operators = getattr(extension, "_has_ops", None)
        if has_operators is None or has_operators():
            return
        import torch

        # Kept on the class: the definitions vanish with the library object.
        cls.library = torch.library.Library("torchvision", "DEF")
        arguments = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
        for name in ("nms", "qnms"):
            cls.library.define(name + arguments)


def _run_hidden_sitecustomize():
    """Python imports only the first sitecustomize on the path; run the one that this hides."""
    here = os.path.dirname(os.path.abspath(__file__))
    others = [entry for entry in sys.path if os.path.abspath(entry or os.curdir) != here]
    spec = importlib.machinery.PathFinder.find_spec("sitecustomize", others)
    if spec is None or spec.loader is None:
        return
    spec.loader.exec_module(importlib.util.module_from_spec(spec))


sys.meta_path.insert(0, _OperatorNames)
_run_hidden_sitecustomize()
