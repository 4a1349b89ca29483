"""The way to the server and back: outages, refusals, revisions, interrupts."""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from flux import acting, sample
from receiver import Receiver, wait_for

from attnscope.wire import InstanceSettings, InterruptRequested, RevisionPushed

pytestmark = pytest.mark.comfyui


def numbered(events: list[Any]) -> bool:
    return [event.seq for event in events] == list(range(len(events)))


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [
        record.message
        for record in caplog.records
        if record.name == "attnscope" and record.levelno >= logging.WARNING
    ]


def test_without_a_server_sampling_is_the_same_and_says_so_once(
    flux: Any, prepared: Any, plugin: Any, receiver: Receiver, caplog: pytest.LogCaptureFixture
) -> None:
    receiver.stop()
    model = prepared("exact")
    assert torch.equal(sample(flux), sample(model))
    assert torch.equal(sample(flux), sample(model))
    assert plugin.link.join(20.0)
    assert len(warnings(caplog)) == 1
    assert "can't be reached" in warnings(caplog)[0]
    # The next run finds the server again, and everything that waited on disk goes first.
    receiver.start()
    sample(model)
    receiver.finished(3)
    assert all(numbered(receiver.run(i)) and len(receiver.run(i)) == 6 for i in range(3))
    assert not receiver.doubled


def test_a_server_that_dies_and_returns_misses_and_doubles_nothing(
    prepared: Any, plugin: Any, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ATTNSCOPE_LINGER_S", "30")

    def die() -> None:
        wait_for(lambda: receiver.events, what="the run's beginning")
        receiver.stop()

    sample(acting(prepared("exact"), {3: die, 8: receiver.start}), steps=12)
    events = receiver.finished()
    assert numbered(events)
    assert [event.step for event in events if event.kind == "step"] == list(range(12))
    assert [seq for _, seq in receiver.order] == list(range(len(events)))
    assert not receiver.doubled


def test_an_answer_that_gets_lost_is_followed_by_the_same_events(
    prepared: Any, receiver: Receiver
) -> None:
    """The server stored a batch and its answer never came: the same seqs come again."""
    lost = threading.Event()

    def refuse(batch: Any) -> Any:
        if batch.events and not lost.is_set():
            lost.set()
            receiver.batches.append(batch)
            receiver._store(batch)
            return 502, {}
        return None

    receiver.refuse = refuse
    sample(prepared("exact"))
    events = receiver.finished()
    assert numbered(events) and len(events) == 6
    assert receiver.doubled


def test_a_bad_event_is_left_out_and_counted(
    prepared: Any, receiver: Receiver, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(batch: Any) -> Any:
        for index, event in enumerate(batch.events):
            if event.kind == "step" and event.step == 1:
                problem = {"field": f"events.{index}.layers", "allowed": "another"}
                return 422, {"type": "invalid", "detail": "no", "errors": [problem]}
        return None

    receiver.refuse = refuse
    sample(prepared("exact"))
    receiver.finished()
    events = wait_for(
        lambda: [e for e in receiver.run() if e.kind == "events_lost"] and receiver.run()
    )
    assert [event.step for event in events if event.kind == "step"] == [0, 2, 3]
    assert sum(event.count for event in events if event.kind == "events_lost") == 1
    assert any("refused event 2 (step)" in text for text in warnings(caplog))


def test_a_refusal_that_names_nothing_is_narrowed_down(
    prepared: Any, plugin: Any, receiver: Receiver
) -> None:
    def refuse(batch: Any) -> Any:
        bad = any(event.kind == "step" and event.step == 2 for event in batch.events)
        return (422, {"detail": "something is wrong"}) if bad else None

    receiver.stop()
    sample(prepared("exact"))
    receiver.refuse = refuse
    receiver.start()
    receiver.finished()
    assert [event.step for event in receiver.steps()] == [0, 1, 3]


def test_a_server_that_has_lost_the_run_is_told_of_its_beginning_again(
    prepared: Any, receiver: Receiver
) -> None:
    def forget() -> None:
        wait_for(lambda: any(e.kind == "step" for e in receiver.run()) and receiver.events)
        with receiver.lock:
            receiver.events.clear()

    def refuse(batch: Any) -> Any:
        unknown = {
            e.run_id for e in batch.events
            if e.run_id not in receiver.events
            and not any(o.kind == "run_started" and o.run_id == e.run_id for o in batch.events)
        }  # fmt: skip
        if unknown:
            return 409, {"type": "unknown-run", "detail": f"run_id: {', '.join(unknown)}"}
        return None

    receiver.refuse = refuse
    sample(acting(prepared("exact"), {3: forget}))
    events = receiver.finished()
    assert events[0].kind == "run_started"
    assert events[-1].kind == "run_ended"
    assert [event.step for event in receiver.steps()][-1] == 3


def test_a_refused_token_is_one_line_and_the_events_wait(
    prepared: Any,
    plugin: Any,
    receiver: Receiver,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("ATTNSCOPE_TOKEN", "secret")
    receiver.refuse = lambda batch: (401, {"type": "unauthorized", "detail": "token: wrong"})
    sample(prepared("exact"))
    assert plugin.link.join(20.0)
    assert len(warnings(caplog)) == 1 and "token" in warnings(caplog)[0]
    assert set(receiver.authorization) == {"Bearer secret"}
    receiver.refuse = lambda batch: None
    sample(prepared("exact"))
    receiver.finished(2)
    assert numbered(receiver.run(0))


def test_a_full_spool_drops_steps_and_tells_how_many(
    prepared: Any, plugin: Any, receiver: Receiver
) -> None:
    receiver.stop()
    model = prepared("exact")
    plan = model.wrappers["sampler_sample"]["attnscope"][0].plan
    channel = plugin.channel(plan.config)
    channel.spool._limit = 12_000
    sample(model, steps=20)
    receiver.start()
    events = receiver.finished()
    steps = [event.step for event in events if event.kind == "step"]
    assert events[0].kind == "run_started"
    assert 0 < len(steps) < 20
    assert steps == sorted(steps) and steps[-1] == 19
    wait_for(
        lambda: (
            len(steps)
            + sum(event.count for event in receiver.run() if event.kind == "events_lost")
            == 20
        ),
        what="the report of every lost step",
    )


class Steering:
    """Pushes to the run as the server does, while the model is being called."""

    def __init__(self, receiver: Receiver) -> None:
        self.receiver = receiver
        self.number = 0
        self.ids = iter(range(100, 200))

    def push(self, settings: dict[str, Any], variant: str = "taylor", **more: Any) -> int:
        started = wait_for(lambda: self.receiver.events and self.receiver.run()[0])
        wait_for(lambda: self.receiver.mailboxes, what="the mailbox's connection")
        self.number += 1
        revision = RevisionPushed(
            id=next(self.ids),
            run_id=started.run_id,
            number=self.number,
            variant=variant,
            settings=started.settings | settings,
            **more,
        )
        self.receiver.push(revision)
        return revision.id

    def reported(self, revision_id: int, state: str) -> Any:
        def find() -> Any:
            for event in self.receiver.run():
                if event.kind != "revision" or event.revision_id != revision_id:
                    continue
                if event.state == state:
                    return event
            return None

        return wait_for(find, what=f"revision {revision_id} {state}")


@pytest.fixture
def steering(receiver: Receiver) -> Steering:
    return Steering(receiver)


def test_a_revision_is_taken_up_whole_at_a_step_s_beginning(
    prepared: Any, receiver: Receiver, steering: Steering
) -> None:
    def push() -> None:
        steering.reported(
            steering.push({"taylor_block_type": "double", "quality_samples": 0}), "delivered"
        )

    sample(acting(prepared("taylor", min_tokens=1, quality_every=1), {1: push}), steps=6)
    receiver.finished()
    applied = steering.reported(100, "applied")
    assert applied.step == 2
    assert [step.revision for step in receiver.steps()] == [0, 0, 1, 1, 1, 1]
    for step in receiver.steps():
        taylor = ["taylor"] * 6 if step.step < 2 else ["taylor"] * 2 + ["exact"] * 4
        assert step.layers.path == taylor
        assert ("nmse" in step.layers.metrics) is (step.step < 2)
    order = [event.kind for event in receiver.run()]
    assert order.index("revision") < len(order) - 1


def test_a_revision_waits_for_the_end_of_a_step_of_several_evaluations(
    prepared: Any, receiver: Receiver, steering: Steering
) -> None:
    def push() -> None:
        steering.reported(steering.push({"enabled": False}), "delivered")

    # The third call of heun's: the first evaluation of step 1.
    model = acting(prepared("taylor", min_tokens=1, quality_samples=0), {2: push})
    sample(model, sampler="heun", steps=4)
    receiver.finished()
    assert steering.reported(100, "applied").step == 2
    assert [step.layers.path[0] for step in receiver.steps()] == [
        "taylor", "taylor", "exact", "exact"
    ]  # fmt: skip
    assert receiver.steps()[1].layers.calls_variant == [2] * 6


def test_of_two_revisions_before_a_step_the_later_one_is_taken(
    prepared: Any, receiver: Receiver, steering: Steering
) -> None:
    def push() -> None:
        steering.push({"P": 1})
        steering.reported(steering.push({"enabled": False}), "delivered")

    sample(acting(prepared("taylor", min_tokens=1), {1: push}))
    receiver.finished()
    assert steering.reported(100, "superseded")
    assert steering.reported(101, "applied").step == 2
    assert [step.revision for step in receiver.steps()] == [0, 0, 2, 2]


@pytest.mark.parametrize(
    ("settings", "variant", "reason"),
    [
        ({"quality_seed": 4}, "taylor", "quality_seed: is 4; allowed: 0"),
        ({"P": 99}, "taylor", "P: is 99; allowed"),
        ({"mood": 1}, "taylor", "mood"),
        ({}, "exact", "variant: is 'exact'; allowed: 'taylor'"),
    ],
)
def test_what_can_not_be_taken_up_is_rejected_with_its_reason(
    settings: dict[str, Any],
    variant: str,
    reason: str,
    prepared: Any,
    receiver: Receiver,
    steering: Steering,
) -> None:
    def push() -> None:
        steering.reported(steering.push(settings, variant), "rejected")

    sample(acting(prepared("taylor", min_tokens=1), {1: push}))
    receiver.finished()
    assert reason in steering.reported(100, "rejected").reason
    assert {step.revision for step in receiver.steps()} == {0}


def test_a_message_that_comes_again_is_handled_once(
    prepared: Any, receiver: Receiver, steering: Steering
) -> None:
    def push() -> None:
        steering.reported(steering.push({"P": 1}), "delivered")

    def reconnect() -> None:
        with receiver.lock:
            for box in receiver.mailboxes:
                box.put(None)
        wait_for(lambda: not receiver.mailboxes)
        wait_for(lambda: receiver.mailboxes)

    model = prepared("taylor", min_tokens=1, quality_samples=0)
    sample(acting(model, {1: push, 3: reconnect}), steps=6)
    receiver.finished()
    states = [event.state for event in receiver.run() if event.kind == "revision"]
    assert states == ["delivered", "applied"]


def test_settings_of_the_instance_serve_its_later_runs(
    prepared: Any, receiver: Receiver, steering: Steering, plugin: Any
) -> None:
    model = prepared("taylor", min_tokens=1, quality_samples=0)

    def push(settings: dict[str, Any] | None, id: int) -> Callable[[], None]:
        def act() -> None:
            wait_for(lambda: receiver.mailboxes)
            receiver.push(InstanceSettings(id=id, variant="taylor", settings=settings))
            shelf = plugin.channel(
                model.wrappers["sampler_sample"]["attnscope"][0].plan.config
            ).shelf
            wait_for(lambda: (shelf.get("taylor") is None) is (settings is None))

        return act

    wanted = {"min_tokens": 1, "P": 2, "taylor_block_type": "double", "quality_samples": 0}
    sample(acting(model, {1: push(wanted, 40)}))
    receiver.finished(1)
    first = receiver.run(0)[0]
    assert first.instance_revision is None
    sample(acting(model, {1: push(None, 41)}))
    second = receiver.finished(2)[0]
    assert second.instance_revision == 40
    assert second.settings["P"] == 2
    assert receiver.steps()[0].layers.path == ["taylor"] * 2 + ["exact"] * 4
    sample(model)
    third = receiver.finished(3)[0]
    assert third.instance_revision is None
    assert third.settings == first.settings


def test_a_run_is_interrupted_from_the_server(
    prepared: Any, receiver: Receiver, interruptible: None
) -> None:
    import comfy.model_management as management

    def stop() -> None:
        started = wait_for(lambda: receiver.events and receiver.run()[0])
        wait_for(lambda: receiver.mailboxes)
        receiver.push(InterruptRequested(id=1, run_id="f" * 32))
        receiver.push(InterruptRequested(id=2, run_id=started.run_id))
        wait_for(management.processing_interrupted)

    with pytest.raises(management.InterruptProcessingException):
        sample(acting(prepared("exact"), {1: stop}), steps=8)
    assert receiver.finished()[-1].status == "interrupted"
    assert len(receiver.steps()) < 8


def test_what_a_dead_process_left_is_sent_under_its_own_name(
    prepared: Any, receiver: Receiver, plugin: Any, tmp_path: Any
) -> None:
    from attnscope.comfy_plugin.spool import Spool

    sample(prepared("exact"))
    receiver.finished()
    assert plugin.link.join(20.0)
    instance = receiver.batches[-1].instance.model_dump(mode="json")
    owner = {
        "pid": 2**22 + 1,
        "born": 1.0,
        "url": receiver.url,
        "instance": instance | {"instance_id": "d" * 32},
    }
    old = Spool(tmp_path / "spool" / "dead", owner, 10**9)
    for event in receiver.run():
        moved = event.model_copy(update={"run_id": "e" * 32})
        old.append(moved.run_id, moved.seq, moved.kind, moved.model_dump_json().encode())
    with open(next((tmp_path / "spool" / "dead").glob("0*.jsonl")), "ab") as file:
        file.write(b'{"run_id": "half a li')
    sample(prepared("exact"))
    receiver.finished(3)
    assert numbered([e for _, e in sorted(receiver.events["e" * 32].items())])
    senders = {
        batch.instance.instance_id
        for batch in receiver.batches
        if any(event.run_id == "e" * 32 for event in batch.events)
    }
    assert senders == {"d" * 32}
    assert plugin.link.join(20.0)
    assert not (tmp_path / "spool" / "dead").exists()


def test_unsent_events_outlive_the_link_and_the_plugin(
    prepared: Any, receiver: Receiver, plugin: Any, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from attnscope.comfy_plugin import spool as spools

    receiver.stop()
    sample(prepared("exact"))
    assert plugin.link.join(20.0)
    (folder,) = (tmp_path / "spool").iterdir()
    assert json.loads((folder / "owner.json").read_text())["url"] == receiver.url
    lines = [json.loads(line) for line in (folder / "00000001.jsonl").read_text().splitlines()]
    assert [line["kind"] for line in lines] == ["run_started", *["step"] * 4, "run_ended"]
    assert spools.left_over(tmp_path / "spool", receiver.url) == []
    # As another process would find it.
    monkeypatch.setattr(spools, "_alive", lambda owner: False)
    assert [path for path, _ in spools.left_over(tmp_path / "spool", receiver.url)] == [folder]
    assert spools.left_over(tmp_path / "spool", "http://127.0.0.1:1") == []
