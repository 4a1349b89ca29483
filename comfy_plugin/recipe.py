"""A hash of everything that makes a sampler's picture, but for what our own nodes do to attention.

Two runs of one workflow have the same recipe when they differ in our nodes alone, so that an exact
run can be the baseline of an approximating one.
"""

from __future__ import annotations

import hashlib
import json
import math
import sys
from collections.abc import Callable, Mapping
from typing import Any, TypeGuard

OWN_PREFIX = "AttnScope"
"""What the class names of our own nodes begin with."""


def recipe(
    graph: Mapping[str, Any],
    node_id: str | None,
    list_index: int | None = None,
    gives_list: Callable[[str, int], bool] = lambda class_type, output: False,
) -> str | None:
    """The hash of a node and of all that leads to it.

    It is a Merkle hash over class names, input names, literal values, links and the fingerprints
    that ComfyUI took of changing inputs (the content of a loaded picture, for one). Ids and titles
    of nodes, and everything after the node, don't matter. A node of ours with a ``model`` input
    counts as the node that this input comes from. Which of several executions it is counts only
    where an output that gives a list leads to the node.

    Args:
        graph: node id to node, with ``class_type`` and ``inputs``, links as ``[node id, output]``.
        node_id: of the sampler.
        list_index: which of several executions of the node, from 0.
        gives_list: whether an output of a class of nodes is a list to work through.

    Returns:
        SHA-256, 64 hex digits; None where the graph doesn't tell: no such node, a cycle, a link
        into nothing or a value that has no JSON.
    """
    if node_id is None or str(node_id) not in graph:
        return None
    walk = _Walk(graph, gives_list)
    try:
        node = walk.digest(str(node_id))
    except (TypeError, ValueError, KeyError):
        return None
    index = (list_index or 0) if walk.lists else 0
    return hashlib.sha256(f"{node}:{index}".encode()).hexdigest()


def gives_list(class_type: str, output: int) -> bool:
    """Whether an output of a class of nodes is a list, as ComfyUI in this process knows it."""
    classes = getattr(sys.modules.get("nodes"), "NODE_CLASS_MAPPINGS", {})
    lists = getattr(classes.get(class_type), "OUTPUT_IS_LIST", None) or ()
    return output < len(lists) and bool(lists[output])


class _Walk:
    """Digests of a graph's nodes, each made once, those that a node needs before itself."""

    def __init__(self, graph: Mapping[str, Any], gives_list: Callable[[str, int], bool]) -> None:
        self.lists = False
        self._graph = graph
        self._gives_list = gives_list
        self._digests: dict[str, str] = {}

    def digest(self, node_id: str) -> str:
        # A stack of its own: a workflow may be longer than Python's recursion is deep.
        stack = [node_id]
        waiting: set[str] = set()
        while stack:
            name = stack[-1]
            missing = {self._source(link) for link in self._links(name)} - self._digests.keys()
            if not missing:
                self._digests.setdefault(name, self._of(name))
                stack.pop()
            elif name in waiting:
                raise ValueError("the graph has a cycle")
            else:
                waiting.add(name)
                stack += missing
        return self._digests[node_id]

    def _of(self, name: str) -> str:
        node = self._graph[name]
        inputs = {
            key: ["link", self._follow(value)] if self._is_link(value) else ["is", _plain(value)]
            for key, value in self._inputs(name).items()
        }
        content = {
            "class": node["class_type"],
            "inputs": inputs,
            "changed": _fingerprint(node.get("is_changed")),
        }
        text = json.dumps(content, sort_keys=True, allow_nan=False)
        return hashlib.sha256(text.encode()).hexdigest()

    def _follow(self, link: list[Any]) -> list[Any]:
        name, output = self._past_own(str(link[0]), int(link[1]))
        if self._gives_list(str(self._graph[name]["class_type"]), output):
            self.lists = True
        return [self._digests[name], output]

    def _source(self, link: list[Any]) -> str:
        return self._past_own(str(link[0]), int(link[1]))[0]

    def _past_own(self, name: str, output: int) -> tuple[str, int]:
        seen = set()
        while str(self._graph[name]["class_type"]).startswith(OWN_PREFIX):
            model = self._inputs(name).get("model")
            if not self._is_link(model):
                break
            if name in seen:
                raise ValueError("the graph has a cycle")
            seen.add(name)
            name, output = str(model[0]), int(model[1])
        return name, output

    def _links(self, name: str) -> list[list[Any]]:
        return [value for value in self._inputs(name).values() if self._is_link(value)]

    def _inputs(self, name: str) -> Mapping[str, Any]:
        return self._graph[name].get("inputs") or {}

    @staticmethod
    def _is_link(value: Any) -> TypeGuard[list[Any]]:
        return (
            isinstance(value, list)
            and len(value) == 2
            and isinstance(value[0], str)
            and isinstance(value[1], (int, float))
            and not isinstance(value[1], bool)
        )


def _plain(value: Any) -> Any:
    """A literal in one spelling: JavaScript sends 1 where Python sends 1.0."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    return value


def _fingerprint(value: Any) -> Any:
    """What a node says about its outside inputs; NaN only means "always run me again"."""
    if isinstance(value, (list, tuple)):
        return [_fingerprint(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return _plain(value)
