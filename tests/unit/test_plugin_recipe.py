"""The hash of what a picture came of: blind for our own nodes, and for nothing else."""

from __future__ import annotations

import copy
import sys
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from attnscope.comfy_plugin.identity import Place, with_recipe
from attnscope.comfy_plugin.recipe import gives_list, recipe
from attnscope.wire import SamplingInfo

SAMPLER = "6"


def graph() -> dict[str, Any]:
    """A workflow as it executes: loader, our node, texts, sampler, and what comes after."""
    return {
        "1": {"class_type": "UNETLoader", "inputs": {"unet_name": "flux.safetensors"}},
        "2": {"class_type": "AttnScopeTaylor", "inputs": {"model": ["1", 0], "P": 3}},
        "3": {"class_type": "CLIPTextEncode", "inputs": {"text": "a cat", "clip": ["9", 0]}},
        "4": {"class_type": "CLIPTextEncode", "inputs": {"text": "", "clip": ["9", 0]}},
        "5": {"class_type": "EmptySD3LatentImage", "inputs": {"width": 512, "batch_size": 1}},
        "6": {
            "class_type": "KSampler",
            "inputs": {
                "model": ["2", 0],
                "positive": ["3", 0],
                "negative": ["4", 0],
                "latent_image": ["5", 0],
                "seed": 42,
                "cfg": 1.0,
            },
        },
        "7": {"class_type": "SaveImage", "inputs": {"images": ["6", 0], "filename_prefix": "x"}},
        "9": {"class_type": "CLIPLoader", "inputs": {"clip_name": "t5"}},
    }


def changed(node: str, **inputs: Any) -> dict[str, Any]:
    made = graph()
    made[node]["inputs"].update(inputs)
    return made


BASE = recipe(graph(), SAMPLER)


def test_it_is_the_same_everywhere() -> None:
    # A stored run is compared with this one after any number of restarts.
    assert BASE == "45387d65a2e78955d99df562e47bebeabb76547bec27c29e09e82cce6111a6ed"
    assert SamplingInfo(sigmas=[1.0, 0.0], recipe=BASE).recipe == BASE


def test_our_own_nodes_do_not_matter() -> None:
    other = graph()
    other["2"] = {"class_type": "AttnScopeMonitor", "inputs": {"model": ["1", 0], "label": "b"}}
    stacked = graph()
    stacked["8"] = {"class_type": "AttnScopeMonitor", "inputs": {"model": ["1", 0]}}
    stacked["2"]["inputs"]["model"] = ["8", 0]
    swept = graph()
    swept["8"] = {"class_type": "AttnScopeClockedSweepValues", "inputs": {"values": "1, 2"}}
    swept["2"]["inputs"]["P"] = ["8", 0]
    without = changed(SAMPLER, model=["1", 0])
    del without["2"]
    for one in (other, stacked, swept, without, changed("2", P=4)):
        assert recipe(one, SAMPLER) == BASE


def test_names_titles_and_what_comes_after_do_not_matter() -> None:
    renamed = {f"n{name}": copy.deepcopy(node) for name, node in reversed(graph().items())}
    for node in renamed.values():
        node["_meta"] = {"title": "something"}
        node["inputs"] = {
            key: [f"n{value[0]}", value[1]] if isinstance(value, list) else value
            for key, value in reversed(node["inputs"].items())
        }
    assert recipe(renamed, f"n{SAMPLER}") == BASE
    assert recipe(changed("7", filename_prefix="y"), SAMPLER) == BASE
    assert recipe(changed(SAMPLER, cfg=1), SAMPLER) == BASE, "1 and 1.0 are one number"


@pytest.mark.parametrize(
    ("node", "inputs"),
    [
        ("1", {"unet_name": "other.safetensors"}),
        ("3", {"text": "a dog"}),
        ("4", {"text": "a cat"}),
        ("5", {"width": 1024}),
        (SAMPLER, {"seed": 43}),
        (SAMPLER, {"cfg": 1.5}),
        (SAMPLER, {"positive": ["4", 0], "negative": ["3", 0]}),
        (SAMPLER, {"latent_image": ["5", 1]}),
        ("9", {"clip_name": "clip"}),
    ],
)
def test_everything_that_makes_the_picture_matters(node: str, inputs: dict[str, Any]) -> None:
    assert recipe(changed(node, **inputs), SAMPLER) not in (BASE, None)


def test_a_node_between_model_and_sampler_matters() -> None:
    lora = graph()
    lora["8"] = {"class_type": "LoraLoader", "inputs": {"model": ["1", 0], "strength": 0.5}}
    lora["2"]["inputs"]["model"] = ["8", 0]
    assert recipe(lora, SAMPLER) not in (BASE, None)


def test_the_content_of_a_loaded_file_matters() -> None:
    def loaded(fingerprint: Any) -> str | None:
        made = changed(SAMPLER, latent_image=["8", 0])
        made["8"] = {"class_type": "LoadLatent", "inputs": {"latent": "a.latent"}}
        made["8"] |= {"is_changed": fingerprint}
        return recipe(made, SAMPLER)

    assert loaded(["abc"]) == loaded(["abc"])
    assert loaded(["abc"]) != loaded(["def"])
    # A node that is always to run again says nothing about what it gives.
    assert loaded(float("nan")) == loaded(float("nan"))


def test_the_execution_of_a_list_matters_where_a_list_leads_to_the_sampler() -> None:
    def lists(class_type: str, output: int) -> bool:
        return class_type.endswith("SweepValues") and output == 0

    seeds = changed(SAMPLER, seed=["8", 0])
    seeds["8"] = {"class_type": "AttnScopeClockedSweepValues", "inputs": {"values": "1, 2"}}
    recipes = [recipe(seeds, SAMPLER, index, lists) for index in (0, 1)]
    assert recipes[0] != recipes[1]
    # A list that only sweeps our own settings: every run has the same baseline.
    swept = changed("2", P=["8", 0])
    swept["8"] = seeds["8"]
    assert {recipe(swept, SAMPLER, index, lists) for index in (None, 0, 1)} == {BASE}


def test_lists_are_known_from_comfyui(monkeypatch: pytest.MonkeyPatch) -> None:
    classes = {"Sweep": SimpleNamespace(OUTPUT_IS_LIST=(False, True)), "Plain": SimpleNamespace()}
    monkeypatch.setitem(sys.modules, "nodes", SimpleNamespace(NODE_CLASS_MAPPINGS=classes))
    assert gives_list("Sweep", 1)
    assert not any(gives_list(*which) for which in (("Sweep", 0), ("Sweep", 2), ("Plain", 0)))
    assert not gives_list("Unknown", 0)


def test_where_the_graph_does_not_tell_there_is_none() -> None:
    cycle = changed("9", clip_name=["3", 0])
    own_cycle = changed("2", model=["2", 0])
    for broken in (cycle, own_cycle, changed("3", clip=["77", 0]), changed("3", text=object())):
        assert recipe(broken, SAMPLER) is None
    assert recipe({}, SAMPLER) is None and recipe(graph(), None) is None
    info = SamplingInfo(sigmas=[1.0, 0.0])
    assert with_recipe(info, Place()).recipe is None
    place = Place("prompt", SAMPLER, None, graph())
    assert with_recipe(info, place).recipe == BASE and info.recipe is None


def test_a_workflow_may_be_long() -> None:
    chain: dict[str, Any] = {"0": {"class_type": "Loader", "inputs": {}}}
    for index in range(1, 5000):
        link = [str(index - 1), 0]
        chain[str(index)] = {"class_type": "Lora", "inputs": {"model": link, "clip": link}}
    assert recipe(chain, "4999") is not None


@given(st.permutations(list(graph())))
def test_the_order_of_the_nodes_does_not_matter(order: list[str]) -> None:
    made = graph()
    assert recipe({name: made[name] for name in order}, SAMPLER) == BASE
