"""The HTML page: whole, small, escaped, with what is behind each cell. What a browser makes of it: tests/browser."""

from __future__ import annotations

import base64
import hashlib
import itertools
import json
import math
import random
import re
import shutil
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import small
from conftest import Bbmcl, Reference
from made import make, page_of
from shelves import Shelves, shelved

from backdoorbench_mcl import documents, runner
from backdoorbench_mcl.job import MAX_CURVES, MAX_POINTS, Job
from backdoorbench_mcl.report.drill import Drill
from backdoorbench_mcl.report.html import Part, page
from backdoorbench_mcl.report.records import embedded
from backdoorbench_mcl.report.sheets import Sheet
from backdoorbench_mcl.rows import Row
from backdoorbench_mcl.store import Stage, Store

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

    @property
    def buttons(self) -> list[int]:
        """The cells that buttons open."""
        return [int(a["data-cell"] or "") for tag, a in self.tags if tag == "button" and "data-cell" in a]


def told(data: dict[str, Any], run: int) -> dict[str, str]:
    """The table of a run."""
    words = [data["words"][place] for place in data["runs"][run]["told"]]
    return dict(zip(words[::2], words[1::2], strict=True))


def example() -> list[Row]:
    return [
        make("badnets", "before", 99.0, 83.0), make("badnets", "ft", 10.0, 80.0, draw=0),
        make("badnets", "ft", 12.0, 81.0, draw=1), make("badnets", "mcldef", 2.0, 81.0, knows=("target",)),
        make("sig", "before", 99.5, 84.0), make("sig", "ft", state="failed", reason="no memory"),
        make("sig", "mcldef", 0.0, 70.0, tca=0.1),
    ]  # fmt: skip


def test_the_page_holds_the_grid_and_every_run() -> None:
    found = Parsed(page_of(example()))
    assert [tag for tag, _ in found.tags].count("dialog") == 1
    runs = found.data["runs"]
    assert [(r["row"]["attack"], r["row"]["defense"], r["row"]["state"]) for r in runs].count(
        ("sig", "ft", "failed")
    ) == 1
    assert len(runs) == 7
    cells = found.data["cells"]
    assert sorted(set(found.buttons)) == list(range(len(cells)))
    assert sorted(number for numbers, more in cells for number in numbers) == list(range(7))
    assert sorted(len(numbers) for numbers, more in cells) == [1, 1, 1, 1, 1, 2]  # two draws behind one cell
    assert not any(more for _, more in cells)
    assert "8910 of 9000" in told(found.data, 0)["ASR"]


def test_an_erased_cell_has_no_colour_of_a_good_one_and_its_runs_say_what_they_are() -> None:
    rows = [make("sig", "before", 99.5, 84.0), make("sig", "ft", 0.0, 70.0, tca=0.1), make("sig", "nad", 1.0, 81.0),
            make("sig", "nc", 9.0, 80.0)]  # fmt: skip
    found = Parsed(page_of(rows))
    heat = [a for tag, a in found.tags if tag == "td" and "heat" in (a.get("class") or "")]
    assert [a["class"] for a in heat[2::2]] == ["heat  none", "heat best", "heat second"]
    assert [a["style"] for a in heat[2::2]] == [
        "background: none", "background: rgb(222,234,246)", "background: rgb(225,230,234)",
    ]  # fmt: skip
    floor, erased = "ASR at its floor", "target class erased"
    marks = [{floor, erased} & told(found.data, run).keys() for run in range(4)]
    assert marks == [set(), {floor, erased}, {floor}, set()]


def test_nothing_from_outside_is_markup_or_script() -> None:
    rows = [
        make("badnets", "before", 99.0, 83.0),
        replace(make("badnets", "x", 5.0, 80.0, reason=HOSTILE, params={"a": {HOSTILE: 1}}), defense=f"x{HOSTILE}"),
        replace(make("sig", "y", state="failed", reason=HOSTILE), attack=HOSTILE, defense="y"),
    ]  # fmt: skip
    text = page_of(rows, title=HOSTILE)
    found = Parsed(text)
    assert [tag for tag, _ in found.tags].count("script") == 2
    assert not [a for tag, a in found.tags if tag == "img" and "onerror" in a]
    assert found.data["runs"][-1]["row"]["reason"] == HOSTILE


def test_the_page_loads_nothing_and_runs_no_script_but_its_own() -> None:
    text = page_of(example())
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
    text = page_of(rows)
    assert len(text.encode()) < 5_000_000
    assert len(Parsed(text).data["runs"]) == 25 * 41


def nested(attacks: int, defenses: int) -> list[Row]:
    """A matrix of five victims an attack; no two runs have the same numbers or stages."""
    rng, out = random.Random(0), []
    for a, victim in itertools.product(range(attacks), range(5)):
        own: dict[str, Any] = {"victim": victim, "target": 0}
        model = {"model": f"model {a} {victim}", "predict": f"predict {a} {victim}"}
        out.append(make(f"attack{a}", "before", rng.uniform(98, 100), rng.uniform(82, 84), **own, stages=model))
        for d in range(defenses):
            stages = {**model, **{name: f"{name} {a} {victim} {d}" for name in ("invert", "defend", "predict")}}
            found = make(f"attack{a}", f"defense{d}", rng.uniform(2, 60), rng.uniform(70, 82), **own, stages=stages,
                         inverter="nc-box", clean_n=2500, inverter_success=rng.uniform(90, 99),
                         inverter_l1=rng.uniform(3, 9), peak_mb=9e3 * rng.random())  # fmt: skip
            out.append(replace(found, seconds=99 * rng.random(), seconds_shared=999 * rng.random()))
    return out


@pytest.mark.slow  # the statistics of a thousand cells
def test_a_thousand_cells_of_five_victims_make_a_small_page(tmp_path: Path) -> None:
    rows = nested(25, 40)
    assert len(rows) == 5125
    text = page_of(rows, store=Shelves(tmp_path, {"model": 2, "invert": 2, "defend": 2}, 20))
    assert len(text.encode()) < 5_000_000
    data = Parsed(text).data
    assert len(data["cells"]) == 1025
    assert {len(numbers) + more for numbers, more in data["cells"]} == {5}
    assert min(len(numbers) for numbers, _ in data["cells"]) >= 2
    missing = len(rows) - len(data["runs"])
    assert missing == sum(more for _, more in data["cells"]) > 0
    assert re.search(f"left out of its cells: {missing} runs, .*[.] --format json has all runs[.]", text)


def test_a_cell_has_its_first_runs_where_there_is_no_room_for_all() -> None:
    drill = Drill(None, None)
    for name in "abcd":
        drill.cell([make(name, "ft", 5.0 + victim, 80.0, victim=victim, reason="<" * 400) for victim in range(5)])
    everything = drill.data()[0]
    assert everything["cells"] == [[[4 * turn + cell for turn in range(5)], 0] for cell in range(4)]
    small = Drill(None, None)
    for name in "abcd":
        small.cell([make(name, "ft", 5.0 + victim, 80.0, victim=victim, reason="<" * 400) for victim in range(5)])
    data, (line,) = small.data(30_000)
    shown = [len(numbers) for numbers, _ in data["cells"]]
    assert shown == sorted(shown, reverse=True) and shown[0] - shown[-1] <= 1 <= shown[-1] < 5
    assert [[data["runs"][number]["row"]["victim_seed"] for number in numbers] for numbers, _ in data["cells"]] == [
        list(range(count)) for count in shown
    ]
    assert [more for _, more in data["cells"]] == [5 - count for count in shown]
    assert 27_000 < len(embedded(data)) < 33_000
    assert line == (f"To keep the page small, these were left out of its cells: {20 - sum(shown)} runs. --format json "
                    "has all runs.")  # fmt: skip


def test_a_run_of_several_parts_is_held_once() -> None:
    shared = [make("sig", "before", 99.0, 83.0), make("sig", "ft", 9.0, 81.0)]
    found = Parsed(page([Part("one", shared), Part("two", [*shared, make("sig", "nad", 8.0)])])).data
    assert found["cells"] == [[[0], 0], [[1], 0], [[0], 0], [[1], 0], [[2], 0]]


@pytest.mark.parametrize("repairs, points", [(1, 20), pytest.param(8, 200, marks=pytest.mark.slow)])
def test_a_thousand_cells_with_curves_logs_and_predictions_make_a_small_page(
    tmp_path: Path, repairs: int, points: int
) -> None:
    store = Shelves(tmp_path, {"model": 2, "invert": 2, "defend": repairs}, points)
    text = page_of(shelved(25, 40), store=store)
    assert len(text.encode()) < 5_000_000
    data = Parsed(text).data
    run = next(run for run in data["runs"] if run["row"]["defense"] == "defense3" and run["row"]["state"] == "ok")
    failed = next(run for run in data["runs"] if run["row"]["state"] == "failed")
    assert len(run["curves"]) == 4 + repairs
    assert all(data["curves"][place] for place in run["curves"])
    assert not any(more for _, more in data["cells"])
    assert sum(count for _, count in data["confusions"][run["confusion"]]["fired"]) == 9000
    assert "xxx" in data["logs"][failed["log"]]
    assert run["pictures"] and re.search(r"left out of its cells: \d+ pictures", text)
    assert ("curves are thinned to" in text) == (points > 20)


def test_a_curve_is_held_once_and_in_four_digits(tmp_path: Path) -> None:
    data = Parsed(page_of(shelved(1, 3), store=Shelves(tmp_path, {"model": 1, "defend": 1}, 300)))
    runs, curves = data.data["runs"], data.data["curves"]
    assert [len(run["curves"]) for run in runs] == [1, 0, 2, 2]
    assert len({run["curves"][0] for run in (runs[0], *runs[2:])}) == 1
    assert len(curves) == 3
    _, flat = curves[0]
    assert (flat[0], flat[-2], len(flat)) == (0, 299, 400)  # first and last step of 200 points
    rng = random.Random("model 0")
    assert flat[1] == float(f"{rng.random():.4g}")


def test_what_does_not_fit_is_left_out_and_said(tmp_path: Path) -> None:
    store = Shelves(tmp_path, {"model": 1, "invert": 8, "defend": 8}, 100)
    drill = Drill(store, None)
    for row in shelved(10, 10):
        drill.cell([row])
    data, lines = drill.data(130_000)
    assert 120_000 < len(embedded(data)) < 130_000
    assert len(data["runs"]) == 110
    left, thinned = lines
    assert thinned == "To keep the page small, curves are thinned to at most 12 points each."
    repaired = [run for run in data["runs"] if run["row"]["state"] == "ok" and run["row"]["defense"] != "before"]
    dropped = 10 + 16 * len(repaired) - len(data["curves"])
    confusions = sum(run["confusion"] is None for run in data["runs"] if run["row"]["state"] == "ok")
    assert dropped > 0 and confusions > 0
    pictures = len(repaired) - len(data["images"])
    assert re.search(
        f": {pictures} pictures, {dropped} curves, {confusions} tables of predicted classes, \\d logs\\.$", left
    )


def test_points_that_are_no_numbers_are_left_out(tmp_path: Path) -> None:
    class Odd(Shelves):
        def stage(self, key: str) -> Stage | None:
            points = [[0, 1], [1, 10**400], ["2", 1], [3], None, [4, math.nan], [5, 2.0], [6, 1e200]]
            return Stage(key, "", {}, "", {"curves": {"odd": points, "no list": 3, "one point": [[0, 1]]}})

    drill = Drill(Odd(tmp_path, {}, 0), None)
    drill.cell(shelved(1, 0))
    assert drill.data()[0]["curves"] == [["Training of the victim: odd", [0, 1, 5, 2, 6, 1e200]]]


def test_a_sweep_over_clean_rates_is_drawn_although_each_has_a_table_of_its_own() -> None:
    rows = [make("badnets", "ft", 30 - 100 * rate, 80.0, clean_rate=rate) for rate in (0.01, 0.05, 0.2)]
    text = page_of(rows)
    assert text.count(">clean rate in %</text>") == 2  # of ASR and of BA
    assert "clean rate in %" not in page_of(rows[:1])


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
    assert "<h1>" in page_of([])


def test_a_finished_matrix_shows_its_triggers_curves_and_confusion(
    reference: Reference, toy_env: dict[str, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    small.install_toy(monkeypatch, toy_env["BBMCL_CACHE"])
    rows = runner.stored_rows(reference.runs)
    file = documents.write_page(reference.runs, rows, tmp_path / "new" / "report.html", against="mcldef")
    found = Parsed(file.read_text())
    run = next(r for r in found.data["runs"] if (r["row"]["attack"], r["row"]["defense"]) == ("badnets", "mcldef"))
    pictures = [found.data["images"][place] for place in run["pictures"]]
    assert [title.partition(":")[0] for title, _ in pictures] == [
        "clean", "true trigger", "difference x4", "inverted by nc-box(steps=20)",
    ]  # fmt: skip
    assert all(address.startswith("data:image/png;base64,") for _, address in pictures)
    curves = dict(found.data["curves"][place] for place in run["curves"])
    assert list(curves) == [
        "Training of the victim: loss", "Inversion: mask L1", "Inversion: success in %", "Repair: loss",
    ]  # fmt: skip
    losses = curves["Training of the victim: loss"][1::2]
    assert losses[-1] < losses[0]
    confusion = found.data["confusions"][run["confusion"]]
    assert sum(count for _, count in confusion["target"]) == run_count(rows, "tca_n")
    assert sum(count for _, count in confusion["fired"]) == run_count(rows, "asr_n")
    made = found.data["provenance"][run["provenance"]]
    assert "torch" in made["versions"]
    assert made["precision"] in ("fp32", "bf16")
    assert made["machine"].endswith("/cpu")
    assert {"versions", "processor", "git", "command", "kernels"} <= made["origin"].keys()
    assert "victim" not in made  # by the same run
    assert len(found.data["images"]) == 8  # of two victims and two inversions, each once


def test_a_victim_that_another_run_made_is_told_apart(reference: Reference) -> None:
    class Elsewhere(Store):
        def stage(self, key: str) -> Stage | None:
            found = super().stage(key)
            assert found is not None
            return replace(found, numerics={**found.numerics, "machine": "far"}) if found.kind == "train" else found

    drill = Drill(Elsewhere(reference.runs, readonly=True), None)
    row = next(row for row in reference.rows if row.defense == "ft")
    drill.cell([row])
    (made,) = drill.data()[0]["provenance"]
    assert made["victim"]["machine"] == "far"
    assert made["victim"]["origin"] == made["origin"]
    assert "repair" not in made


def run_count(rows: list[Row], name: str) -> int:
    return int(next(getattr(r, name) for r in rows if (r.attack, r.defense) == ("badnets", "mcldef")))


def test_a_failure_comes_with_its_log(bbmcl: Bbmcl, tmp_path: Path) -> None:
    done = bbmcl(*small.command("badnets", "offender(how=raise)"), "--runs", "runs")
    assert done.returncode == 1, done.stderr
    assert bbmcl("report", "--format", "html", "--runs", "runs").stdout.strip() == "runs/report.html"
    found = Parsed((tmp_path / "runs" / "report.html").read_text())
    run = next(r for r in found.data["runs"] if r["row"]["state"] == "failed")
    assert "Traceback" in found.data["logs"][run["log"]]
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
    assert {name: len(points) for name, points in running.curves.items()} == {
        f"curve {i}": 3 for i in range(MAX_CURVES)
    }


def test_cells_of_sheets_are_sorted_by_their_leading_number() -> None:
    body = (("badnets", "12", "10.00±0.10 [1, 2]", "<0.001", "differs"), ("sig", "2", "+2.50 to 3", "–", "consistent"),
            ("cl", "3", "\N{MINUS SIGN}0.5", "cannot fire", ""), ("blend", "4", "7:3", "nan", "too wide"))  # fmt: skip
    found = Parsed(page_of([], below=[Sheet("Claims", ("attack", "text", "ASR", "p", ""), body, 2)]))
    cells = [a for tag, a in found.tags if tag == "td"]
    values = [[a.get("data-v") for a in cells if a["data-c"] == str(column)] for column in range(5)]
    assert values == [
        [None] * 4, [None] * 4, ["10.0", "2.5", "-0.5", "7.0"], ["0.001", "", "", ""], [None] * 4,
    ]  # fmt: skip


def test_a_folded_sheet_shows_its_title_alone() -> None:
    body = (("cl", "+1.00"),)
    text = page_of([], below=[Sheet("Claims", ("", "n"), body, 1), Sheet("C1 <it>", ("", "n"), body, 1, folded=True)])
    found = [tag for tag, _ in Parsed(text).tags if tag in ("h2", "details", "summary", "table")]
    assert found == ["h2", "table", "details", "summary", "table"]
    assert "<summary>C1 &lt;it&gt;</summary>" in text
    assert text.count("</details>") == 1


def test_plots_are_limited_by_cells_and_not_by_runs() -> None:
    rows = [
        make(f"attack{a}", f"defense{d}", 5.0 + d, 80.0, victim=v, draw=r)
        for a in range(5) for d in range(6) for v in range(5) for r in range(3)
    ]  # fmt: skip
    text = page_of(rows)
    assert text.count("<svg") == 2
    assert "too many" not in text
    many = page_of([make(f"attack{a}", f"defense{d}", 5.0, 80.0) for a in range(21) for d in range(20)])
    assert many.count("<svg") == 0
    assert many.count("420 cells are too many to be drawn, at most 400 are.") == 2


def test_every_plot_of_a_page_is_labelled_and_no_id_stands_twice() -> None:
    rates = [make(a, f"ft(lr={lr})", 30.0, 80.0, clean_rate=r) for a in "ab" for lr in (1, 2) for r in (0.01, 0.05)]
    found = Parsed(page_of(rates))
    shown = [a for tag, a in found.tags if tag == "svg"]
    assert len(shown) == 6  # two for each rate, one for the rates, one for lr
    assert all(a["role"] == "img" and a["aria-label"] for a in shown)
    assert len({a["aria-label"] for a in shown}) == 6
    ids = [a["id"] for _, a in found.tags if "id" in a]
    assert len(ids) == len(set(ids))


def test_a_reproduced_page_has_the_papers_names_and_its_slash() -> None:
    rows = [make("sig", "before", 99.0, 84.0), make("sig", "mcldef", 3.0, 73.0), make("sig", "ft", 60.0, 80.0),
            make("sig", "mcldef(inverter=mesa)", state="n/a", reason="no patch")]  # fmt: skip
    text = page_of(rows, printed_names=True)
    for name in ("Sig", "MCLDef", "MESA", ">/</button>", "MCLDef less each other defense"):
        assert name in text, name
    assert "MESA" not in page_of(rows)
