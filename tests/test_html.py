"""The HTML page: whole, small, escaped, with what is behind each cell. What a browser makes of it: tests/browser."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import small
from conftest import Bbmcl, Reference
from made import make

from backdoorbench_mcl import documents, runner
from backdoorbench_mcl.job import MAX_CURVES, MAX_POINTS, Job
from backdoorbench_mcl.report.html import page
from backdoorbench_mcl.rows import Row

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>\"'&"


class Parsed(HTMLParser):
    """Tags with their attributes, and the text of scripts by their id."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: dict[str, str] = {}
        self._in: str | None = None
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._in = dict(attrs).get("id") or "script" if tag == "script" else None

    def handle_endtag(self, tag: str) -> None:
        self._in = None if tag == "script" else self._in

    def handle_data(self, data: str) -> None:
        if self._in is not None:
            self.scripts[self._in] = self.scripts.get(self._in, "") + data

    @property
    def data(self) -> dict[str, Any]:
        """What the drill-down shows."""
        found: dict[str, Any] = json.loads(self.scripts["data"])
        return found


def example() -> list[Row]:
    return [
        make("badnets", "before", 99.0, 83.0), make("badnets", "ft", 10.0, 80.0, draw=0),
        make("badnets", "ft", 12.0, 81.0, draw=1), make("badnets", "mcldef", 2.0, 81.0, knows=("target",)),
        make("sig", "before", 99.5, 84.0), make("sig", "ft", state="failed", reason="no memory"),
        make("sig", "mcldef", 0.0, 70.0, tca=0.1),
    ]  # fmt: skip


def test_the_page_holds_the_grid_and_every_run() -> None:
    found = Parsed(page(example()))
    assert [tag for tag, _ in found.tags].count("dialog") == 1
    runs = found.data["runs"]
    assert [(r["row"]["attack"], r["row"]["defense"], r["row"]["state"]) for r in runs].count(
        ("sig", "ft", "failed")
    ) == 1
    assert len(runs) == 7
    buttons = [json.loads(a["data-runs"] or "") for tag, a in found.tags if tag == "button" and "data-runs" in a]
    assert sorted({number for numbers in buttons for number in numbers}) == list(range(7))
    assert 2 in map(len, buttons)  # two draws behind one cell
    assert "ASR" in dict(runs[0]["told"])
    assert "8910 of 9000" in dict(runs[0]["told"])["ASR"]


def test_nothing_from_outside_is_markup_or_script() -> None:
    rows = [
        make("badnets", "before", 99.0, 83.0),
        replace(make("badnets", "x", 5.0, 80.0, reason=HOSTILE, params={"a": {HOSTILE: 1}}), defense=f"x{HOSTILE}"),
        replace(make("sig", "y", state="failed", reason=HOSTILE), attack=HOSTILE, defense="y"),
    ]  # fmt: skip
    text = page(rows, title=HOSTILE)
    found = Parsed(text)
    assert [tag for tag, _ in found.tags].count("script") == 2
    assert not [a for tag, a in found.tags if tag == "img" and "onerror" in a]
    assert found.data["runs"][-1]["row"]["reason"] == HOSTILE


def test_the_page_loads_nothing_and_runs_no_script_but_its_own() -> None:
    text = page(example())
    found = Parsed(text)
    policy = next(a["content"] for tag, a in found.tags if a.get("http-equiv") == "Content-Security-Policy") or ""
    digest = base64.b64encode(hashlib.sha256(found.scripts["script"].encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in policy
    assert "default-src 'none'" in policy
    links = [a.get("src") or a.get("href") or "" for _, a in found.tags if "src" in a or "href" in a]
    assert all(link.startswith(("data:", "#")) for link in links)
    assert not re.search(r"<[a-z]+[^>]* on[a-z]+=", text)


def test_a_thousand_cells_make_a_small_page() -> None:
    wide: dict[str, Any] = {"params": {"recipe": {f"p{i}": i for i in range(40)}}}
    rows = []
    for a in range(25):
        rows.append(make(f"attack{a}", "before", 99.0, 83.0))
        for d in range(40):
            state: Any = "failed" if (a + d) % 17 == 0 else "ok"
            ba = float("nan") if (a, d) == (3, 3) else 80.0
            made = make(f"attack{a}", f"defense{d}", 5.0, 80.0, state=state, reason="x" * 300, **wide)
            rows.append(replace(made, ba=ba) if state == "ok" else made)
    text = page(rows)
    assert len(text.encode()) < 5_000_000
    assert len(Parsed(text).data["runs"]) == 25 * 41


def test_a_sweep_over_clean_rates_is_drawn_although_each_has_a_table_of_its_own() -> None:
    rows = [make("badnets", "ft", 30 - 100 * rate, 80.0, clean_rate=rate) for rate in (0.01, 0.05, 0.2)]
    text = page(rows)
    assert text.count("clean rate in %") == 2  # of ASR and of BA
    assert "clean rate in %" not in page(rows[:1])


def test_a_damaged_store_costs_pictures_and_not_the_page(
    reference: Reference, toy_env: dict[str, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    small.install_toy(monkeypatch, toy_env["BBMCL_CACHE"])
    runs = tmp_path / "runs"
    shutil.copytree(reference.runs, runs)
    for name in ("trial", "trigger", "predictions"):
        for file in (runs / "artefacts").rglob(f"{name}.safetensors"):
            file.write_bytes(file.read_bytes()[:-1])
    found = Parsed(documents.write_page(runs, runner.stored_rows(runs), tmp_path / "report.html").read_text())
    assert len(found.data["runs"]) == len(reference.rows)
    assert found.data["images"] == []


def test_no_rows_are_a_page_too() -> None:
    assert "<h1>" in page([])


def test_a_finished_matrix_shows_its_triggers_curves_and_confusion(
    reference: Reference, toy_env: dict[str, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    small.install_toy(monkeypatch, toy_env["BBMCL_CACHE"])
    rows = runner.stored_rows(reference.runs)
    file = documents.write_page(reference.runs, rows, tmp_path / "new" / "report.html", against="mcldef")
    found = Parsed(file.read_text())
    run = next(r for r in found.data["runs"] if (r["row"]["attack"], r["row"]["defense"]) == ("badnets", "mcldef"))
    assert [title.partition(":")[0] for title, _ in run["pictures"]] == [
        "clean", "true trigger", "difference x4", "inverted by nc-box(steps=20)",
    ]  # fmt: skip
    assert all(found.data["images"][i].startswith("data:image/png;base64,") for _, i in run["pictures"])
    curves = dict(run["curves"])
    assert list(curves) == ["Training of the victim: loss", "Repair: loss"]
    losses = [value for _, value in curves["Training of the victim: loss"]]
    assert losses[-1] < losses[0]
    assert sum(count for _, count in run["target"]) == run_count(rows, "tca_n")
    assert sum(count for _, count in run["fired"]) == run_count(rows, "asr_n")
    assert "torch" in found.data["provenance"][run["provenance"]]["versions"]
    assert len(found.data["images"]) == 8  # of two victims and two inversions, each once


def run_count(rows: list[Row], name: str) -> int:
    return int(next(getattr(r, name) for r in rows if (r.attack, r.defense) == ("badnets", "mcldef")))


def test_a_failure_comes_with_its_log(bbmcl: Bbmcl, tmp_path: Path) -> None:
    done = bbmcl(*small.command("badnets", "offender(how=raise)"), "--runs", "runs")
    assert done.returncode == 1, done.stderr
    assert bbmcl("report", "--format", "html", "--runs", "runs").stdout.strip() == "runs/report.html"
    found = Parsed((tmp_path / "runs" / "report.html").read_text())
    run = next(r for r in found.data["runs"] if r["row"]["state"] == "failed")
    assert "Traceback" in run["log"]
    assert run["row"]["reason"]


@pytest.mark.parametrize(
    "arguments, says",
    [
        (("--paper", "3"), "expected one of 1, 2, 4, 5"),
        (("--against", "nobody"), "no stored row has that defense; there are before, ft, mcldef"),
        (("--format", "html", "--against", "nobody"), "no stored row has that defense"),
    ],
)
def test_bad_questions_are_one_line(bbmcl: Bbmcl, reference: Reference, arguments: tuple[str, ...], says: str) -> None:
    done = bbmcl("report", "--runs", str(reference.runs), *arguments)
    assert done.returncode == 2
    assert says in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_statistics_below_the_table(bbmcl: Bbmcl, reference: Reference) -> None:
    done = bbmcl("report", "--runs", str(reference.runs), "--statistics", "--paper", "1")
    assert done.returncode == 0, done.stderr
    assert "mcldef† less each other defense" in done.stdout
    assert "These pairs of models only" in done.stdout
    assert "tiny is no data set of the paper" in done.stdout


def test_a_job_keeps_few_and_finite_points_of_a_curve(tmp_path: Path) -> None:
    running = Job(tmp_path, {}, lambda done, total, images: None)
    for step in range(MAX_POINTS + 5):
        running.record("loss", step, 1.0)
    running.record("other", 1, float("nan"))
    for i in range(MAX_CURVES + 5):
        running.record(f"curve {i}", 1, 2.0)
    assert len(running.curves["loss"]) == MAX_POINTS
    assert len(running.curves) <= MAX_CURVES
    assert running.curves.get("other", []) == []
    assert json.loads(json.dumps(running.curves, allow_nan=False))["loss"][0] == [0, 1.0]


def test_a_job_with_as_many_curves_as_it_may_have_goes_on_with_each_of_them(tmp_path: Path) -> None:
    running = Job(tmp_path, {}, lambda done, total, images: None)
    for step in range(3):
        for i in range(MAX_CURVES + 1):
            running.record(f"curve {i}", step, float(i))
    assert {name: len(points) for name, points in running.curves.items()} == {f"curve {i}": 3 for i in range(MAX_CURVES)}
