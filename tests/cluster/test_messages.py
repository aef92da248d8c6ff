"""Parts of the engine `ray` without a cluster: what is believed of a node, what a node compares, keeps and receives."""

from __future__ import annotations

import dataclasses
import io
import json
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import small
from nodes import ABSENT
from test_engine import made_bench

from backdoorbench_mcl import artefacts, datacache
from backdoorbench_mcl.engines import node
from backdoorbench_mcl.engines import ray as engine_ray
from backdoorbench_mcl.errors import UserError

ray = pytest.importorskip("ray", reason=ABSENT)
from backdoorbench_mcl.engines import broker  # noqa: E402

# ---------------------------------------------------------------- what a node sends


def ending(**changes: Any) -> dict[str, Any]:
    result = {"state": "ok", "reason": "", "seconds": 1.0}
    return {"ended": {"state": "ok", "reason": "", "log": "", "result": json.dumps(result), **changes}}


@pytest.mark.parametrize(
    "message",
    [
        None, [], "ended", {"file": "../x.safetensors", "part": b"x"}, {"file": "/x.safetensors", "part": b"x"},
        {"file": "a/b.safetensors", "part": b"x"}, {"file": "spec.json", "part": b"x"}, {"file": 3, "part": b"x"},
        {"file": ".safetensors", "part": b"x"}, {"file": "x.safetensors\n", "part": b"x"},
        {"file": "x" * 200 + ".safetensors", "part": b"x"}, {"file": "x.safetensors", "part": "x"},
        {"file": "x.safetensors"}, {"node": 3}, {"node": "a", "address": "b", "host": "c" * 1000}, {"made": "{}"},
        {"made": json.dumps({"machine": 3, "versions": {}, "origin": {}})}, {"made": "[" * 10_000},
        {"made": json.dumps({"machine": "", "versions": {"torch": 3}, "origin": {}})}, {"ended": None},
        {"made": json.dumps({"machine": "", "versions": {}, "origin": {"cores": float("nan")}})},
        ending(state="fine"), ending(result="{}"), ending(result="nonsense"), ending(log=3), ending(reason="x" * 5000),
        ending(state="failed"), ending(result='{"state": "ok", "reason": "", "seconds": "long"}'),
    ],
)  # fmt: skip
def test_a_node_that_sends_nonsense_is_not_believed(tmp_path: Path, message: Any) -> None:
    folder = tmp_path / "job"
    folder.mkdir()
    intake = broker.Intake(folder)
    intake.take({"file": "a.safetensors", "part": b"12"})
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises((ValueError, RecursionError)):
        intake.take(message)
    assert sorted(tmp_path.rglob("*")) == before
    assert not intake.ended
    intake.take(ending())  # and what it should send is taken
    assert intake.ended["state"] == "ok" and (folder / "out" / "a.safetensors").read_bytes() == b"12"


class Script:
    """What Ray's task and client are for a broker. tries: what each try of a job has a node send; the last raises."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *tries: Callable[[], Iterator[Any]]) -> None:
        self.tries = iter(tries)
        self.asked: list[dict[str, Any]] = []
        monkeypatch.setattr(ray, "remote", lambda function: self)
        monkeypatch.setattr(ray, "get", lambda message: message)

    def options(self, **options: Any) -> Script:
        self.asked.append(options)
        return self

    def remote(self, request: Any) -> Iterator[Any]:
        return next(self.tries)()


def test_a_job_that_all_nodes_left_have_refused_fails_with_their_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One refuses, the other one is lost: asked of any but the first, a job would wait for ever."""
    living = {"A": 1, "B": 1}

    def refuses() -> Iterator[Any]:
        yield {"node": "A", "address": "a", "host": "h", "pid": "1"}
        yield {"refused": "node a has torch 1"}

    def dies() -> Iterator[Any]:
        yield {"node": "B", "address": "b", "host": "h", "pid": "1"}
        del living["B"]
        raise ray.exceptions.WorkerCrashedError

    script, told = Script(monkeypatch, refuses, dies), io.StringIO()
    served = broker.Broker({"threads": 1, "gpus": 0}, told)
    monkeypatch.setattr(served, "nodes", lambda: dict(living))
    monkeypatch.setattr(served, "_request", lambda job: {})
    served._follow(broker._Job(tmp_path))
    lines = [json.loads(line) for line in told.getvalue().splitlines()]
    assert [line["finished"][:3] for line in lines if "finished" in line] == [
        [str(tmp_path), "failed", "node a has torch 1"]
    ]
    assert len(script.asked) == 2
    assert script.asked[1]["label_selector"] == {"ray.io/node-id": "!in(A)"}


def test_jobs_that_ask_at_once_have_the_data_set_stored_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stored: list[int] = []

    def put(piece: bytes) -> int:
        time.sleep(0.02)
        stored.append(len(piece))
        return 0

    monkeypatch.setattr(ray, "put", put)
    for file in datacache.FILES:
        (tmp_path / file).write_bytes(file.encode() * 100)
    served = broker.Broker({}, io.StringIO())
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: served._data(tmp_path, "hash"), range(8)))
    assert sum(stored) == sum((tmp_path / file).stat().st_size for file in datacache.FILES)
    assert all(one == found[0] for one in found)


def test_what_a_node_sends_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(broker, "MOST_BYTES", 10)
    intake = broker.Intake(tmp_path)
    intake.take({"file": "a.safetensors", "part": b"123456"})
    with pytest.raises(ValueError, match="larger ones"):
        intake.take({"file": "a.safetensors", "part": b"123456"})
    assert (tmp_path / "out.part" / "a.safetensors").stat().st_size == 6
    many = broker.Intake(tmp_path)
    for number in range(broker.MOST_FILES):
        many.take({"file": f"{number}.safetensors", "part": b""})
    with pytest.raises(ValueError, match="more files"):
        many.take({"file": "more.safetensors", "part": b""})


@pytest.mark.parametrize("told", [None, [], [1, 2], [1, 2, float("nan")], [1, "2", 3.0], [1 << 70, 1, 1.0]])
def test_progress_is_numbers(told: Any) -> None:
    assert broker.progress({"progress": told}) is None
    assert broker.progress({"progress": [1, 2, 3]}) == [1, 2, 3.0]


def test_a_link_in_place_of_a_result_does_not_leave_the_node(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "meta.json").write_text("{}")
    (out / "x.safetensors").write_bytes(b"x" * 10)
    assert [message["file"] for message in node.outputs(out)] == ["meta.json", "x.safetensors"]
    (out / "y.safetensors").symlink_to("/etc/passwd")
    with pytest.raises(artefacts.Damaged, match=r"y\.safetensors is no ordinary file"):
        list(node.outputs(out))


# ---------------------------------------------------------------- parts of a node


def test_versions_and_code_are_compared_line_by_line() -> None:
    wanted = node.wanted({"model": {"kind": "model", "target": "bbmcl_models:X", "name": "backdoorbench-mcl/x"}})
    assert set(wanted["code"]) == {"backdoorbench_mcl", "bbmcl_models"}
    assert {"python", "torch", "backdoorbench-mcl"} <= set(wanted["packages"])
    assert node.unlike(wanted, "n") == ""
    for name in wanted["packages"]:
        line = node.unlike({**wanted, "packages": {**wanted["packages"], name: "0"}}, "10.0.0.7")
        assert line.startswith(f"node 10.0.0.7 has {name} ") and "the driver has 0;" in line
    for name in wanted["code"]:
        line = node.unlike({**wanted, "code": {**wanted["code"], name: "0"}}, "n")
        assert line.startswith(f"node n has other files of {name} than the driver;")
    missing = {**wanted, "packages": {**wanted["packages"], "bbmcl-nowhere": "1.0"}}
    assert node.unlike(missing, "n").startswith("node n lacks bbmcl-nowhere, the driver has 1.0;")


def test_snapshots_go_to_the_runs_folder_only_where_its_token_is_seen(tmp_path: Path) -> None:
    runs, folder = tmp_path / "runs", tmp_path / "job"
    runs.mkdir()
    token = engine_ray.token(runs)
    assert token == engine_ray.token(runs) and len(list(runs.iterdir())) == 1
    request = {"runs": str(runs), "token": [engine_ray.TOKEN, token]}
    inside = str(runs / "snapshots" / "key")
    assert node._snapshot(inside, request, folder) == inside
    own = str(folder / "snapshots")
    assert node._snapshot(str(tmp_path / "elsewhere"), request, folder) == own
    assert node._snapshot(inside, {**request, "token": [engine_ray.TOKEN, "another"]}, folder) == own
    assert node._snapshot(inside, {**request, "runs": str(tmp_path / "absent")}, folder) == own


def test_a_data_set_that_arrives_damaged_is_refused(
    tmp_path: Path, toy_env: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    small.install_toy(monkeypatch, toy_env["BBMCL_CACHE"])
    data = made_bench(tmp_path).grants.data
    files = {name: [(data.folder / name).read_bytes()] for name in datacache.FILES}
    assert datacache.receive(tmp_path, data.hash, files) == tmp_path / "arrays" / data.hash
    assert datacache.intact(tmp_path / "arrays" / data.hash, data.hash)
    assert not datacache.check(dataclasses.replace(data, folder=tmp_path / "arrays" / data.hash))
    files["test_x.npy"] = [files["test_x.npy"][0][:-1] + b"?"]
    with pytest.raises(UserError, match=r"did not arrive as it was sent: test_x\.npy"):
        datacache.receive(tmp_path / "other", data.hash, files)
    assert list((tmp_path / "other" / "arrays").iterdir()) == []


def test_a_content_is_put_into_the_object_store_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put: list[bytes] = []

    def stored(piece: bytes) -> int:
        put.append(piece)
        return len(put)

    monkeypatch.setattr("ray.put", stored)
    monkeypatch.setattr(node, "PIECE", 4)
    shelf = broker.Shelf(kept=8)
    for name, content in (("a", b"123456"), ("b", b"123456"), ("c", b"12"), ("d", b"abcd")):
        (tmp_path / name).write_bytes(content)
    assert shelf.refs(tmp_path / "a") == shelf.refs(tmp_path / "b") == [1, 2]
    assert put == [b"1234", b"56"]
    shelf.refs(tmp_path / "c")
    assert shelf.refs(tmp_path / "b") == [1, 2]
    shelf.refs(tmp_path / "d")  # drops what was used longest ago
    assert shelf.refs(tmp_path / "c") == [5]
    assert len(put) == 5
