"""Replay: bounded over all layers, oldest first, in half precision on the host."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from attnscope.attention.ttr.replay import LEAST_TURNS, KeptCall, Replay


def kept(tokens: int = 8, seed: int = 0, dtype: torch.dtype = torch.float32) -> KeptCall:
    generator = torch.Generator().manual_seed(seed)

    def some(count: int) -> torch.Tensor:
        return torch.randn(1, 2, count, 4, generator=generator).to(dtype)

    index = torch.randperm(tokens, generator=generator)[:3]
    mass = torch.randn(1, 2, 3, generator=generator)
    return KeptCall(some(3), index, some(tokens), some(tokens), some(3), mass, 0.5, None)


def replay(limit: int) -> Replay:
    return Replay(limit, torch.Generator().manual_seed(1))


def test_half_precision_on_the_host_in_memory_of_its_own() -> None:
    for dtype, half in ((torch.float32, torch.bfloat16), (torch.float16, torch.float16)):
        call = kept(dtype=dtype)
        copy = call.to_host()
        for name in ("query", "key", "value", "out"):
            mine, theirs = getattr(copy, name), getattr(call, name)
            assert mine.dtype == half
            assert torch.equal(mine, theirs.to(half))
            assert mine.data_ptr() != theirs.data_ptr()
        assert copy.log_mass.dtype == torch.float32
    already = kept(dtype=torch.bfloat16)
    assert already.to_host().key.data_ptr() != already.key.data_ptr()


def test_a_lesson_has_the_chosen_queries_and_every_key_in_float32() -> None:
    call = kept().to_host()
    rows, target = call.lesson(torch.tensor([2, 0]), torch.device("cpu"))
    assert torch.equal(rows.query, call.query[:, :, [2, 0]].float())
    assert torch.equal(rows.index, call.index[[2, 0]])
    assert rows.key.shape == call.key.shape and rows.key.dtype == torch.float32
    assert torch.equal(target.out, call.out[:, :, [2, 0]].float())
    assert torch.equal(target.log_mass, call.log_mass[:, :, [2, 0]])


@given(
    st.lists(st.tuples(st.sampled_from("abc"), st.integers(3, 40)), max_size=30),
    st.integers(200, 4000),
)
def test_never_more_than_the_bound_and_always_the_newest(
    calls: list[tuple[str, int]], limit: int
) -> None:
    store = replay(limit)
    fitting: list[tuple[str, KeptCall]] = []
    for layer, tokens in calls:
        call = kept(tokens).to_host()
        store.add(layer, call)
        if call.held_bytes <= limit:
            fitting.append((layer, call))
        assert store.total_bytes <= limit
    # What is left is what came last, as much of it as fits.
    left, total = [], 0
    for layer, call in reversed(fitting):
        total += call.held_bytes
        if total > limit:
            break
        left.append((layer, call))
    assert len(store) == len(left)
    for layer in "abc":
        mine = [call for name, call in left if name == layer]
        assert store.held_bytes(layer) == sum(call.held_bytes for call in mine)
        drawn = store.draw(layer)
        assert (drawn is None) == (not mine)
        assert drawn is None or any(drawn is call for call in mine)
    assert store.total_bytes == sum(call.held_bytes for _, call in left)


def test_draws_reach_every_kept_call_of_the_layer_and_no_other() -> None:
    store = replay(10**6)
    mine = [kept(seed=seed) for seed in range(3)]
    for call in mine:
        store.add("a", call)
        store.add("b", kept(seed=9))
    drawn = {id(store.draw("a")) for _ in range(60)}
    assert drawn == {id(call) for call in mine}
    assert store.draw("c") is None


def test_what_is_discarded_is_drawn_no_more() -> None:
    store = replay(10**6)
    one, other = kept(seed=1), kept(seed=2)
    store.add("a", one)
    store.add("a", other)
    store.discard(one)
    store.discard(one)
    assert {id(store.draw("a")) for _ in range(20)} == {id(other)}
    assert store.total_bytes == other.held_bytes
    store.clear()
    assert store.total_bytes == len(store) == store.held_bytes("a") == 0


def test_a_small_bound_keeps_few_calls_for_long_instead_of_all_for_no_turn() -> None:
    size = kept().to_host().held_bytes
    layers = [f"single.{index}" for index in range(20)]
    # Room for half of a round of all layers.
    store = replay(size * len(layers) // 2)
    found = turns = 0
    for turn in range(60):
        for layer in layers:
            if turn > 20:
                turns += 1
                found += store.draw(layer) is not None
            if store.admits(layer, size):
                store.add(layer, kept().to_host())
    # Keeping every call would leave each layer's gone at its next turn.
    assert found / turns > 0.25
    ample = replay(size * len(layers) * LEAST_TURNS)
    assert all(ample.admits(layer, size) for _ in range(3) for layer in layers)
    assert not replay(size - 1).admits("a", size)


def test_draws_leave_the_global_generator_alone() -> None:
    before = torch.random.get_rng_state()
    store = replay(10**6)
    store.add("a", kept())
    store.draw("a")
    store.admits("a", 10**5)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert store.admits("a", 10**7) is False
    assert pytest.approx(store.total_bytes) == kept().held_bytes
