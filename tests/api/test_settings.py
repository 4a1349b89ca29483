"""Settings on their way to a sampler, and interrupts."""

from __future__ import annotations

from typing import Any

import pytest
from support.events import RunScript, instance

from attnscope.attention.settings import SETTINGS
from attnscope.backend.mailbox import open_messages


def begin(api: Any, **options: Any) -> RunScript:
    script = RunScript(layers=2, **options)
    api.send(script.started(), script.step(0))
    return script


def put(api: Any, script: RunScript, base: int, status: int = 202, **settings: Any) -> Any:
    response = api.client.put(
        f"/api/v1/runs/{script.run_id}/settings",
        json={"base_revision": base, "settings": settings},
    )
    assert response.status_code == status, response.text
    return response.json()


def revisions(api: Any, script: RunScript) -> list[Any]:
    items: list[Any] = api.get(f"/runs/{script.run_id}/revisions")["items"]
    return items


def mail(api: Any, instance_id: str | None = None) -> list[Any]:
    with api.services.store.read() as session:
        return open_messages(session, instance_id or api.instance.instance_id)


def test_the_settings_of_the_beginning_are_revision_0(api: Any) -> None:
    script = begin(api)
    (first,) = revisions(api, script)
    assert (first["number"], first["state"], first["applied_step"]) == (0, "applied", 0)
    assert first["settings"] == script.settings
    assert first["base"] is None
    assert mail(api) == []


def test_a_pushed_revision_from_hand_to_sampler(api: Any) -> None:
    script = begin(api)
    pushed = put(api, script, 0, P=5, scale_mul=0.5)
    assert (pushed["number"], pushed["base"], pushed["state"]) == (1, 0, "pending")
    assert pushed["changes"] == {"P": [3, 5], "scale_mul": [1.0, 0.5]}
    assert pushed["settings"] == {**script.settings, "P": 5, "scale_mul": 0.5}
    (message,) = mail(api)
    assert (message.id, message.number, message.run_id) == (pushed["id"], 1, script.run_id)
    assert message.settings == pushed["settings"]

    api.send(script.report(pushed["id"], "delivered"))
    row = revisions(api, script)[1]
    assert row["state"] == "delivered" and row["delivered_at"] and not row["settled_at"]
    assert len(mail(api)) == 1, "open until it is settled"
    run = api.get(f"/runs/{script.run_id}")
    assert (run["revision"], run["applied_revision"]) == (1, 0)
    assert run["settings"]["P"] == 3

    api.send(script.report(pushed["id"], "applied", 2), script.step(2, revision=1))
    row = revisions(api, script)[1]
    assert (row["state"], row["applied_step"]) == ("applied", 2)
    assert row["settled_at"] is not None
    run = api.get(f"/runs/{script.run_id}")
    assert (run["revision"], run["applied_revision"]) == (1, 1)
    assert run["settings"]["P"] == 5
    assert mail(api) == []


def test_a_stale_base_gets_the_newest_revision(api: Any) -> None:
    script = begin(api)
    newest = put(api, script, 0, P=5)
    problem = put(api, script, 0, 409, P=4)
    assert problem["type"] == "stale-revision"
    assert problem["current"] == newest
    assert "base_revision: 0" in problem["detail"]
    assert put(api, script, 1, P=4)["number"] == 2


def test_a_newer_revision_supersedes_an_open_one(api: Any) -> None:
    script = begin(api)
    first = put(api, script, 0, P=5)
    second = put(api, script, 1, scale_mul=0.5)
    assert second["settings"]["P"] == 5, "made on top of the first"
    assert second["changes"] == {"scale_mul": [1.0, 0.5]}
    states = [row["state"] for row in revisions(api, script)]
    assert states == ["applied", "superseded", "pending"]
    assert [message.id for message in mail(api)] == [second["id"]]
    # the sampler had taken the first up all the same: what it did goes before what was expected
    api.send(script.report(first["id"], "applied", 1))
    assert revisions(api, script)[1]["state"] == "applied"


def test_a_rejected_revision_says_why(api: Any) -> None:
    script = begin(api)
    pushed = put(api, script, 0, P=5)
    api.send(script.report(pushed["id"], "rejected"))
    row = revisions(api, script)[1]
    assert (row["state"], row["reason"]) == ("rejected", "no")
    assert api.get(f"/runs/{script.run_id}")["settings"]["P"] == 3

    again = put(api, script, 1, scale_mul=0.5)
    assert again["settings"]["P"] == 3, "what was rejected is not sent along"
    assert again["changes"] == {"scale_mul": [1.0, 0.5]}


@pytest.mark.parametrize(
    ("settings", "field", "allowed"),
    [
        ({"P": 99}, "settings.P", "a whole number from 1 to 8"),
        ({"P": "many"}, "settings.P", "a whole number from 1 to 8"),
        ({"eps": 0.0}, "settings.eps", "a number above 0 to 1"),
        ({"taylor_block_type": "triple"}, "settings.taylor_block_type", "one of all"),
        ({"enabled": "perhaps"}, "settings.enabled", "true or false"),
        ({"magic": 1}, "settings.magic", "a setting of taylor"),
        ({"quality_seed": 5}, "settings.quality_seed", "not live"),
        ({"P": 3}, "settings", "differs"),
        ({}, "settings", "differs"),
    ],
)
def test_values_that_are_not_allowed_are_named(
    api: Any, settings: dict[str, Any], field: str, allowed: str
) -> None:
    script = begin(api)
    problem = put(api, script, 0, 422, **settings)
    (error,) = problem["errors"]
    assert error["field"] == field
    assert allowed in error["allowed"]
    assert len(revisions(api, script)) == 1


def test_a_run_that_does_not_run_takes_nothing(api: Any) -> None:
    script = begin(api)
    pushed = put(api, script, 0, P=5)
    api.send(script.ended())
    row = revisions(api, script)[1]
    assert (row["id"], row["state"]) == (pushed["id"], "expired")
    assert mail(api) == []
    assert put(api, script, 1, 409, P=4)["type"] == "run-ended"
    path = f"/runs/{script.run_id}/interrupt"
    assert api.problem("POST", path, 409)["type"] == "run-ended"
    body = {"base_revision": 0, "settings": {"P": 4}}
    assert api.problem("PUT", f"/runs/{'0' * 32}/settings", 404, json=body)


def test_an_interrupt_stays_open_until_the_run_ends(api: Any) -> None:
    script = begin(api)
    path = f"/api/v1/runs/{script.run_id}/interrupt"
    assert api.client.post(path).status_code == 202
    assert api.client.post(path).status_code == 202
    (message,) = mail(api)
    assert (message.kind, message.run_id) == ("interrupt", script.run_id)
    api.send(script.ended("interrupted"))
    assert mail(api) == []


def test_message_ids_are_of_one_sequence(api: Any) -> None:
    api.send()
    script = begin(api)
    put(api, script, 0, P=5)
    api.client.post(f"/api/v1/runs/{script.run_id}/interrupt")
    path = f"/api/v1/instances/{api.instance.instance_id}/settings/exact"
    api.client.put(path, json={"settings": {"quality_samples": 8}})
    messages = mail(api)
    assert {message.kind for message in messages} == {
        "revision", "interrupt", "instance_settings",
    }  # fmt: skip
    ids = [message.id for message in messages]
    assert ids == sorted(set(ids))


def put_instance(api: Any, variant: str, settings: Any, status: int = 200) -> Any:
    path = f"/api/v1/instances/{api.instance.instance_id}/settings/{variant}"
    response = api.client.put(path, json={"settings": settings})
    assert response.status_code == status, response.text
    return response.json()


def test_settings_of_an_instance_are_kept_and_taken_back(api: Any) -> None:
    api.send()
    answer = put_instance(api, "taylor", {"P": 5, "quality_seed": 3})
    complete = SETTINGS["taylor"](P=5, quality_seed=3).model_dump(mode="json")
    assert answer["settings"] == complete, "what is left out takes its default"
    path = f"/instances/{api.instance.instance_id}"
    assert api.get(path)["settings"] == {"taylor": answer["settings"]}
    (message,) = mail(api)
    assert (message.id, message.settings) == (answer["id"], answer["settings"])
    put_instance(api, "taylor", None)
    assert api.get(path)["settings"] == {}
    (message,) = mail(api)
    assert message.settings is None, "the plugin must learn that they are taken back"

    problem = put_instance(api, "magic", {}, 422)
    assert problem["errors"][0]["field"] == "variant"
    problem = put_instance(api, "taylor", {"P": 99}, 422)
    assert problem["errors"][0]["field"] == "settings.P"
    body = {"settings": {"P": 5}}
    assert api.problem("PUT", f"/instances/{'0' * 32}/settings/taylor", 404, json=body)


def test_a_run_that_began_without_them_gets_the_live_ones(api: Any) -> None:
    api.send()
    answer = put_instance(api, "taylor", {"P": 5, "quality_seed": 3})
    script = begin(api)
    row = revisions(api, script)[1]
    assert row["state"] == "pending"
    assert row["instance_revision"] == answer["id"]
    assert row["changes"] == {"P": [3, 5]}, "what is not live waits for the next run"
    kept, pushed = mail(api)
    assert (kept.id, kept.settings) == (answer["id"], answer["settings"])
    assert pushed.id == row["id"]

    informed = RunScript(layers=2, settings={"P": 5}, instance_revision=answer["id"])
    api.send(informed.started())
    assert len(revisions(api, informed)) == 1, "it began with them"
    elsewhere = RunScript(layers=2)
    api.send(elsewhere.started(), instance=instance())
    assert len(revisions(api, elsewhere)) == 1, "another instance has nothing to do with it"
    other = RunScript(layers=2, variant="exact")
    api.send(other.started())
    assert len(revisions(api, other)) == 1, "nor has another variant"


def test_reports_on_unknown_revisions_do_no_harm(api: Any) -> None:
    script = begin(api)
    other = begin(api)
    pushed = put(api, other, 0, P=5)
    api.send(script.report(999, "applied", 1), script.report(pushed["id"], "applied", 1))
    assert revisions(api, other)[1]["state"] == "pending"
    assert api.get(f"/runs/{script.run_id}")["applied_revision"] == 0


def test_tuned_settings_become_a_revision_that_is_in_force(api: Any) -> None:
    script = begin(api)
    api.send(script.tuned(1, qk_norm_power=0.4), script.step(1), script.step(2))
    first, row = revisions(api, script)
    assert (first["tuned"], row["tuned"]) == (False, True)
    assert (row["number"], row["base"], row["state"], row["applied_step"]) == (1, 0, "applied", 1)
    assert row["changes"] == {"qk_norm_power": [0.0, 0.4]}
    assert row["reason"] == "mean NMSE 0.5 → 0.25"
    run = api.get(f"/runs/{script.run_id}")
    assert run["applied_revision"] == run["revision"] == 1
    assert run["settings"]["qk_norm_power"] == 0.4
    # The plugin doesn't know the number; the steps have it all the same.
    steps = api.get(f"/runs/{script.run_id}/steps")["items"]
    assert [step["revision"] for step in steps] == [0, 1, 1]
    # A change by hand builds on what was tuned.
    pushed = put(api, script, 1, P=5)
    assert pushed["settings"]["qk_norm_power"] == 0.4
    api.send(script.report(pushed["id"], "applied", 3), script.step(3, revision=2))
    steps = api.get(f"/runs/{script.run_id}/steps")["items"]
    assert [step["revision"] for step in steps] == [0, 1, 1, 2]
    assert api.get(f"/runs/{script.run_id}")["settings"]["P"] == 5


def test_tuning_that_found_nothing_better_is_a_revision_without_changes(api: Any) -> None:
    script = begin(api)
    api.send(script.tuned(1))
    row = revisions(api, script)[1]
    assert row["tuned"] and row["changes"] == {} and row["state"] == "applied"


def test_a_pushed_revision_that_tuning_overtook_is_still_taken_up(api: Any) -> None:
    script = begin(api)
    pushed = put(api, script, 0, P=5)
    api.send(script.tuned(1, scale_mul=0.9), script.step(1))
    assert [row["state"] for row in revisions(api, script)] == ["applied", "pending", "applied"]
    api.send(script.report(pushed["id"], "applied", 2), script.step(2, revision=1))
    run = api.get(f"/runs/{script.run_id}")
    assert run["applied_revision"] == 1
    assert (run["settings"]["P"], run["settings"]["scale_mul"]) == (5, 1.0)
    # What comes next builds on what is in force, not on what was numbered last.
    assert put(api, script, 2, eps=0.1)["settings"]["scale_mul"] == 1.0


def test_tuned_settings_that_are_not_allowed_are_refused(api: Any) -> None:
    script = begin(api)
    answer = api.post(script.tuned(1, scale_mul=99.0))
    assert answer.status_code == 422 and "scale_mul" in answer.text
    assert len(revisions(api, script)) == 1
