"""Tables from made-up rows: what is ranked, what is marked, what is refused, and the layouts, letter by letter."""

from __future__ import annotations

import csv
import io
import json
import math
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
from made import make
from rich.cells import cell_len

from backdoorbench_mcl import runner
from backdoorbench_mcl.errors import UserError
from backdoorbench_mcl.evaluate import MARKS
from backdoorbench_mcl.report import FORMATS, Format, render
from backdoorbench_mcl.report.formats import md, tex
from backdoorbench_mcl.report.grid import Cell, Line, build, ranks
from backdoorbench_mcl.rows import Row
from backdoorbench_mcl.text import one_line


def example() -> list[Row]:
    """One seed; floor ties, a flagged and a weak attack, a time-out, a failure, an erased class, no attack."""
    told: dict[str, Any] = {"knows": ("target",)}
    anchored = "mcldef(clean_anchor=1.0)"
    return [
        make("badnets", "before", 99.64, 82.4, tca=76.9),
        make("badnets", "ft", 4.1, 79.2),
        make("badnets", "nad", 2.5, 78.0),
        make("badnets", "mcldef", 1.8, 80.5, **told),
        make("badnets", anchored, 1.6, 81.93, **told),
        make("blend", "before", 93.64, 82.4, gate="flagged"),
        make("blend", "ft", 4.1, 79.2, gate="flagged"),
        make("blend", "nad", state="timeout", reason="stopped after 600 s", gate="flagged"),
        make("blend", "mcldef", 1.8, 80.5, gate="flagged", **told),
        make("sig", "before", 82.91, 81.19, gate="weak"),
        make("sig", "ft", state="n/a", gate="weak", reason="weak attack"),
        make("sig", "nad", state="n/a", gate="weak", reason="weak attack"),
        make("trojan(size=3,alpha=0.5)", "ft", 3.0, 80.0),
        make("trojan(size=3,alpha=0.5)", "nad", state="failed", reason="RuntimeError: \x1b[31mno |memory|\n_left_"),
        make("trojan(size=3,alpha=0.5)", "mcldef", 0.0, 81.0, tca=0.1, **told),
        make("trojan(size=3,alpha=0.5)", anchored, 9.0, 70.0, **told),
        make("none", "before", None, 83.0),
        make("none", "ft", None, 82.0),
        make("none", "mcldef", None, 81.0, **told),
    ]


def seeds() -> list[Row]:
    """Three toy victims of two defense seeds; one run diverged."""
    toy: dict[str, Any] = {"dataset": "shapes", "toy": True, "budget": "quick"}
    rows = []
    for victim in range(3):
        rows.append(make("blend", "before", 99.0 + 0.2 * victim, 82 + 0.3 * victim, victim=victim, **toy))
        for i, defense in enumerate(("ft", "mcldef", "mcldef(clean_anchor=1.0)")):
            for draw in range(2):
                lost: dict[str, Any] = {"state": "diverged", "reason": "loss is not finite"}
                fate = lost if (defense, victim, draw) == ("mcldef", 2, 1) else {}
                asr = 1 + 4 / (i + 1) + 0.3 * victim + 0.1 * draw
                rows.append(make("blend", defense, asr, 80 + i - 0.5 * victim, victim=victim, draw=draw, **toy, **fate))
    return rows


def line(rows: Sequence[Row], attack: str = "badnets") -> dict[str, Cell]:
    """Column label -> cell of one attack of the only block."""
    (block,) = build(rows)
    (found,) = (one for one in block.lines if one.label == attack)
    return {column.label: cell for column, cell in zip(block.columns, found.cells, strict=True) if cell}


# ---------------------------------------------------------------- ranking


def test_ranks() -> None:
    assert ranks([3.0, 1.0, 2.0], [False] * 3) == ["", "best", "second"]
    assert ranks([1.004, 1.001, 2.0, 2.001], [False] * 4) == ["best", "best", "second", "second"]  # ties as printed
    assert ranks([None, 1.0], [False] * 2) == ["", ""]  # one value has no rival
    assert ranks([], []) == []
    # Cells at their floor are beaten by none, and beat what has more of ASR and is not at its own.
    assert ranks([1.13, 3.4], [False, True]) == ["best", "best"]
    assert ranks([1.0, 2.0, 3.4], [False, False, True]) == ["best", "second", "best"]
    assert ranks([1.6, 1.8, 1.5, 1.7, 1.9], [True, True, False, False, False]) == ["best", "best", "best", "second", ""]


def test_asr_at_the_floor_ties_and_ba_does_not() -> None:
    cells = line(example())
    assert [cells[name].asr_rank for name in ("ft", "nad", "mcldef", "mcldef(clean_anchor=1.0)")] == [
        "", "second", "best", "best",
    ]  # fmt: skip
    assert [cells[name].ba_rank for name in ("ft", "nad", "mcldef", "mcldef(clean_anchor=1.0)")] == [
        "", "", "second", "best",
    ]  # fmt: skip
    assert cells["Before"].asr_rank == cells["Before"].ba_rank == ""


def test_what_cannot_be_compared_is_not_ranked() -> None:
    rows = example()
    assert all(cell.asr_rank == cell.ba_rank == "" for cell in line(rows, "blend").values())  # flagged
    trojan = line(rows, "trojan(size=3,alpha=0.5)")
    assert trojan["mcldef"].erased
    assert trojan["mcldef"].asr_rank == trojan["mcldef"].ba_rank == ""  # although it has the lowest ASR, highest BA
    assert trojan["ft"].asr_rank == "best"
    incomplete = line(seeds(), "blend")
    assert incomplete["mcldef"].tag == "5/6"
    assert incomplete["mcldef"].asr_rank == ""
    assert incomplete["ft"].asr_rank == "second"
    forced = [make("sig", name, asr, gate="weak") for name, asr in (("ft", 1.0), ("nad", 3.0))]  # run all the same
    assert build(forced)[0].lines[0].flagged


def test_a_victim_that_the_gate_held_back_costs_no_rank_but_is_counted() -> None:
    fates: list[dict[str, Any]] = [{}, {}, {"state": "n/a", "gate": "weak"}]
    rows = [
        make("badnets", name, asr, victim=victim, **fate)
        for name, asr in (("ft", 4.0), ("nad", 3.0))
        for victim, fate in enumerate(fates)
    ]
    cells = line(rows)
    assert {cell.tag for name, cell in cells.items() if name != "Before"} == {"2/3"}
    assert (cells["nad"].asr_rank, cells["ft"].asr_rank) == ("best", "second")


def test_floor_is_pooled_over_seeds() -> None:
    rows = [make("badnets", "ft", asr, victim=i, ftr=2.0) for i, asr in enumerate((2.5, 1.4))]
    assert line(rows)["ft"].floor
    assert not line([replace(row, ftr_k=170) for row in rows])["ft"].floor


def test_a_floor_that_the_repair_itself_raised_excuses_no_asr() -> None:
    """A model that calls everything the target has ASR = FTR = 100; it must not be tied with the best."""
    before = make("badnets", "before", 99.64, 82.4, ftr=3.0)
    good = make("badnets", "ft", 3.2, 79.0, ftr=3.1)
    cells = line([before, good, make("badnets", "nad", 100.0, 10.0, ftr=100.0, tca=100.0)])
    assert not cells["nad"].floor
    assert (cells["ft"].asr_rank, cells["nad"].asr_rank) == ("best", "second")
    level = [make("badnets", name, asr, ftr=ftr) for name, asr, ftr in (("nad", 3.9, 4.0), ("mcldef", 4.0, 4.1))]
    cells = line([before, *level])
    assert (cells["nad"].floor, cells["mcldef"].floor) == (True, False)  # one point above the victim's is tolerated
    assert line(level)["mcldef"].floor  # the victim's FTR is not known


def test_mean_over_victims_sd_over_victims() -> None:
    rows = [make("badnets", "ft", 4.0, ba, victim=v, draw=d) for v, d, ba in [(0, 0, 80), (0, 1, 82), (1, 0, 84)]]
    ba = line(rows)["ft"].ba
    assert ba is not None
    assert ba.mean == pytest.approx(82.5)
    assert ba.sd == pytest.approx(math.sqrt(4.5))  # of 81 and 84
    one = line(rows[:2])["ft"].ba
    assert one is not None
    assert one.sd == pytest.approx(math.sqrt(2))  # of 80 and 82: the only spread there is


def test_number_of_runs_is_shown_where_it_differs() -> None:
    rows = [make("badnets", name, 4.0, victim=v) for name in ("ft", "nad") for v in range(3)]
    assert line([*rows, make("badnets", "mcldef", 4.0)])["mcldef"].tag == "n=1"
    assert {cell.tag for cell in line(rows).values()} == {""}


def test_before_is_read_off_the_defended_rows_where_it_is_missing() -> None:
    rows = [make("badnets", "ft", 4.0, victim=v, asr_before=98.0 + v) for v in range(2)]
    before = line(rows)["Before"]
    assert before.asr is not None
    assert before.asr.mean == 98.5
    (block,) = build([make("badnets", "ft", 4.0, asr_before=None, ba_before=None)])
    assert [column.label for column in block.columns] == ["ft"]


def test_one_block_for_each_protocol_and_victims_stand_in_all_rates() -> None:
    rows = [
        make("badnets", "before", 99.0),
        make("badnets", "ft", 4.0),
        make("badnets", "ft", 4.0, clean_rate=0.1),
        make("badnets", "ft", 4.0, budget="mid"),
    ]
    blocks = build(rows)
    assert [(block.clean_rate, block.budget) for block in blocks] == [(0.05, "full"), (0.1, "full"), (0.05, "mid")]
    assert all(block.columns[0].label == "Before" for block in blocks)
    assert blocks[1].lines[0].cells[0] == blocks[0].lines[0].cells[0]
    assert build(rows[:1])[0].title == "cifar10, wrn-16-1, preset paper, budget full, fp32"


def test_failed_cells_never_vanish() -> None:
    (block,) = build(example())
    texts = {(one.label, col.label): cell.failure for one in block.lines for col, cell in pairs(block.columns, one)}
    assert texts["blend", "nad"] == "timeout"
    assert texts["sig", "ft"] == "n/a (weak attack)"
    assert texts["trojan(size=3,alpha=0.5)", "nad"] == "failed"
    mixed = [make("badnets", "ft", state=state, victim=i) for i, state in enumerate(("diverged", "failed"))]  # type: ignore[arg-type]
    assert line(mixed)["ft"].failure == "failed/diverged"
    assert line(mixed)["ft"].tag == "0/2"


def test_verdicts_and_surrogates_stand_below_the_grid() -> None:
    robust, weak = "robust: 43.2 % under PGD-10", "natural: 31.0 % under PGD-10, 40 would be robust"
    rows = [
        make("cl", "before", 99.0, surrogate=weak), make("cl", "ft", 9.0, surrogate=weak),
        make("cl", "nc(target=detect)", 99.0, verdict="clean", surrogate=weak),
        make("cl(eps=8.0)", "nc(target=detect)", 2.0, draw=1, verdict="flagged 5, 2", surrogate=robust),
        make("cl(eps=8.0)", "nc(target=detect)", 2.0, draw=2, verdict="flagged 5, 2", surrogate=robust),
    ]  # fmt: skip
    text = render(rows, "markdown")
    assert f"Surrogates of the attacks: cl {weak}; cl(eps=8.0) {robust}." in text
    told = "cl clean; cl(eps=8.0) flagged 5, 2 (2 runs). Clean: returned as it is."
    assert f"Verdicts behind nc(target=detect): {told}" in text
    assert "Verdicts behind ft" not in text


def test_what_is_left_of_an_attack_without_its_perturbation_is_told_where_it_is_there() -> None:
    attack = {"name": "cl", "version": 1, "params": {"eps": 16.0, "rate": 0.08}}
    control = {**attack, "params": {"eps": 0.0, "rate": 0.08}}
    mine = {"attack": attack, "control": {"attack": control, "set": {"eps": 0.0}}}
    rows = [make("cl", "before", 99.0, params=mine), make("cl", "ft", 9.0, params=mine), make("sig", "ft", 9.0)]
    assert "Control of cl (eps=0.0): not in this table." in render(rows, "markdown")
    others = [
        make("cl(eps=0,rate=0.1)", "before", 55.0, params={"attack": {**control, "params": {"eps": 0.0, "rate": 0.1}}})
    ]
    assert "Control of cl (eps=0.0): not in this table." in render([*rows, *others], "markdown")
    bare = make("cl(eps=0)", "before", 12.5, asr_before=12.5, params={"attack": control})
    text = render([*rows, *others, bare], "markdown")
    assert "Control of cl (eps=0.0): ASR 12.50 (FTR –) before defense." in text
    known = replace(bare, ftr_before=1.25)
    told = "Control of cl (eps=0.0): ASR 12.50 (FTR 1.25) before defense."
    assert told in render([*rows, *others, known], "markdown")
    assert text.count("Control of") == 1
    stranger = make("cl(eps=0)", "before", 12.5, victim=3, asr_before=12.5, params={"attack": control})
    recipe = {"attack": control, "train": {"epochs": 1}}
    for wrong in (stranger, make("cl(eps=0)", "before", 12.5, asr_before=12.5, params=recipe)):
        assert "Control of cl (eps=0.0): not in this table." in render([*rows, wrong], "markdown")
    dead = make("cl(eps=0)", "before", state="failed", asr_before=None, params={"attack": control})
    assert "Control of cl (eps=0.0): failed." in render([*rows, dead], "markdown")
    rude = {**mine, "control": {"attack": control, "set": {"how": "\x1b[31m"}}}
    assert "\x1b" not in render([make("cl", "ft", 9.0, params=rude)], "table").replace("\x1b[0m", "")


def pairs(columns: Sequence[Any], one: Line) -> list[tuple[Any, Cell]]:
    return [(column, cell) for column, cell in zip(columns, one.cells, strict=True) if cell]


# ---------------------------------------------------------------- one label, one thing


def test_two_recipes_are_two_tables_that_say_what_differs() -> None:
    def params(train: str, defend: str | None) -> dict[str, Any]:
        return {"train": {"augment": train, "lr": 0.1}, **({"defend": {"augment": defend}} if defend else {})}

    rows = [
        make("badnets", "before", 99.0, params=params("none", None), stages={"model": "a"}),
        make("badnets", "ft", 4.0, params=params("none", "crop+flip"), stages={"model": "a"}),
        make("badnets", "ft", 90.0, params=params("none", "none"), stages={"model": "a"}),
        make("badnets", "before", 98.0, params=params("crop+flip", None), stages={"model": "b"}),
        make("badnets", "ft", 3.0, params=params("crop+flip", "crop+flip"), stages={"model": "b"}),
        make("blend", "before", 97.0, params=params("flip", None), stages={"model": "c"}),
    ]
    rows = [replace(row, key=f"{row.key} {i}") for i, row in enumerate(rows)]
    blocks = build(rows)
    assert [block.recipe for block in blocks] == [
        ("train.augment=none", "defend.augment=crop+flip"), ("train.augment=none", "defend.augment=none"),
        ("train.augment=crop+flip", "defend.augment=crop+flip"), ("train.augment=flip",),
    ]  # fmt: skip
    assert blocks[1].title.endswith("train.augment=none, defend.augment=none")
    assert [[cell.asr.mean for cell in block.lines[0].cells if cell and cell.asr] for block in blocks] == [
        [pytest.approx(99), pytest.approx(4)], [pytest.approx(99), pytest.approx(90)],
        [pytest.approx(98), pytest.approx(3)], [pytest.approx(97)],
    ]  # fmt: skip


@pytest.mark.parametrize("section", ["defense", "attack", "model"])
def test_one_label_with_two_settings_is_refused(section: str) -> None:
    rows = [make("badnets", "ft", 4.0, victim=v, params={section: {"lr": lr}}) for v, lr in enumerate((0.1, 0.01))]
    with pytest.raises(UserError, match=re.escape(f"stands for two settings in one table ({section}: lr=0.1 and lr=")):
        render(rows, "table")
    rows[1] = replace(rows[1], budget="mid")  # another table
    assert render(rows, "table")


def test_two_defenses_on_two_victims_are_refused() -> None:
    rows = [make("badnets", name, 4.0, stages={"model": name}) for name in ("ft", "nad")]
    with pytest.raises(UserError, match="attack 'badnets', seed 0, come from different victims"):
        render(rows, "markdown")


def test_two_results_for_one_cell_are_refused_and_the_same_one_counts_once() -> None:
    row = make("badnets", "ft", 4.0)
    with pytest.raises(UserError, match=r"two results .* for badnets / ft, victim seed 0, defense seed 0"):
        render([row, replace(row, key="other")], "latex")
    assert len(line([row, row])["ft"].runs) == 1


# ---------------------------------------------------------------- records


def test_json_is_one_array_of_rows_without_nan() -> None:
    rows = [*example(), make("badnets", "x", 4.0, seconds=math.nan, params={"defense": {"lr": math.inf, "n": (1, 2)}})]
    found = json.loads(render(rows, "json"), parse_constant=lambda name: pytest.fail(f"{name} in JSON"))
    assert [Row.from_dict(cell) for cell in found[:-1]] == rows[:-1]
    assert list(found[0]) == [*(field.name for field in fields(Row)), *MARKS]
    assert found[-1]["seconds"] is None
    assert found[-1]["params"] == {"defense": {"lr": None, "n": [1, 2]}}
    assert len(render(rows, "json").splitlines()) == len(rows) + 2  # a cell a line
    assert render([], "json") == "[]"


def test_csv_is_flat() -> None:
    rows = [*example(), make("badnets", "x", state="failed", reason='=HYPERLINK("a"),\n\x1b[2Jb')]
    found = list(csv.DictReader(io.StringIO(render(rows, "csv"))))
    assert list(found[0]) == [*(field.name for field in fields(Row)), *MARKS]
    assert (found[0]["asr_k"], found[0]["asr_n"], found[0]["clean_rate"]) == ("8968", "9000", "")
    assert json.loads(found[1]["params"]) == rows[1].params
    assert json.loads(found[3]["knows"]) == ["target"]
    assert found[-1]["reason"] == '\'=HYPERLINK("a"), b'
    assert render([], "csv").split(",")[0] == "key"


def test_unknown_format_and_no_rows() -> None:
    with pytest.raises(UserError, match="format 'yaml': expected one of table, markdown, latex, csv, json"):
        render([], "yaml")  # type: ignore[arg-type]
    assert render([], "table") == "no results yet"


def test_tables_and_records_need_neither_torch_nor_pandas() -> None:
    code = (
        "import sys\nfrom backdoorbench_mcl.report import render\nfrom backdoorbench_mcl.rows import Row\n"
        "row = Row('k', 'd', 'm', 'a', 'x', 0, 0, 0.05, 'ok', asr=1.0, ba=2.0)\n"
        "[render([row], name) for name in ('table', 'markdown', 'latex', 'csv', 'json')]\n"
        "print({'torch', 'pandas'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


# ---------------------------------------------------------------- text of others

HOSTILE = "\x1b]0;title\x07a\x1b[31mb\x9b2J\u202ec\ud800|d_e\\f{g}$h&i#j%k~l^m<n>`*[o]\x00\nq"


def test_one_line() -> None:
    assert one_line("a\tb\r\n c\x00d\x1b[1;31me\x1bcf\u200bg") == "a b cdefg"
    assert one_line("x" * 20, 10) == "xxxxxxx..."
    assert one_line(HOSTILE).startswith("abc|d_e")


@pytest.mark.parametrize("fmt", FORMATS)
def test_hostile_text_cannot_reach_the_terminal_or_break_the_table(fmt: Format) -> None:
    row = make(HOSTILE, HOSTILE, 4.0, knows=(HOSTILE,))
    bad = make(HOSTILE, "ft", state="failed", reason=HOSTILE)
    text = render([row, bad], fmt, width=80)
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e\ud800]", text)
    text.encode()
    if fmt == "markdown":
        grid = [text_line for text_line in text.splitlines() if text_line.startswith("|")]
        widths = {len(re.findall(r"(?<!\\)\|", text_line)) for text_line in grid[:3]}
        assert widths == {8}  # attack and three pairs
    if fmt == "table":
        assert "[o]" in text  # no markup of rich


def test_escapes() -> None:
    assert md("a|b*c_d<e>") == r"a\|b\*c\_d\<e\>"
    assert tex("50 % & {x}_1 \\ ~^ é 字") == (
        r"50 \% \& \{x\}\_1 \textbackslash{} \textasciitilde{}\textasciicircum{} é ?"
    )


@pytest.mark.parametrize("rows", [example(), seeds()], ids=["example", "seeds"])
def test_latex_is_balanced(rows: list[Row]) -> None:
    text = render(rows, "latex")
    plain = re.sub(r"\\[\\{}$%&#_]", lambda m: "\n" if m[0] == r"\\" else "", text)
    depth = 0
    for character in plain:
        depth += (character == "{") - (character == "}")
        assert depth >= 0
    assert depth == 0
    assert plain.count("$") % 2 == 0
    for name in re.findall(r"\\begin\{(\w+)\}", text):
        assert text.count(rf"\begin{{{name}}}") == text.count(rf"\end{{{name}}}")
    for table in re.findall(r"\\begin\{tabular\}\{(\w+)\}.*?\\midrule\n(.*?)\\bottomrule", text, re.S):
        for one in table[1].strip().splitlines():
            cells = one.count(" & ") + one.count(r"\multicolumn{2}") + 1
            assert cells == len(table[0])


# ---------------------------------------------------------------- layouts


@pytest.mark.parametrize("width", [80, 100, 120])
@pytest.mark.parametrize("rows", [example(), seeds()], ids=["example", "seeds"])
def test_tables_fit_the_terminal(rows: list[Row], width: int) -> None:
    text = render(rows, "table", width=width)
    assert max(cell_len(one) for one in text.splitlines()) <= width
    flat = re.sub(r"\s+", "", text)
    for row in rows:
        assert row.defense == "before" or row.attack[:8] in flat
        assert row.defense == "before" or row.defense.split("(")[0] in flat


def test_color_shows_rank_by_style_only() -> None:
    text = render(example(), "table", color=True, width=120)
    assert "\x1b[1m81.93\x1b[0m" in text
    assert "\x1b[4m80.50\x1b[0m" in text
    plain = re.sub(r"\x1b\[[\d;]*m", "", text)
    assert "81.93*" not in plain
    assert "Bold: best" in plain
    assert "\x1b" not in render(example(), "table", width=120)


def test_detail_is_optional() -> None:
    assert "TCA" in render(seeds(), "markdown")
    assert "| TCA" not in render(seeds(), "markdown", detail=False)


def test_wide_characters_keep_columns_aligned() -> None:
    lines = render([make("字字字字", "ft", 4.0), make("b", "ft", 5.0)], "table", width=80).splitlines()
    first, second = (next(one for one in lines if one.startswith(name)) for name in ("字", "b"))
    assert cell_len(first) == cell_len(second)


GOLDEN = Path(__file__).parent / "golden"
LAYOUTS: list[tuple[str, list[Row], Format, dict[str, Any]]] = [
    ("report_example_80.txt", example(), "table", {"width": 80}),
    ("report_example_120.txt", example(), "table", {"width": 120, "detail": False}),
    ("report_seeds_80.txt", seeds(), "table", {"width": 80}),
    ("report_example.md", example(), "markdown", {}),
    ("report_seeds.md", seeds(), "markdown", {"detail": False}),
    ("report_example.tex", example(), "latex", {}),
    ("report_seeds.tex", seeds(), "latex", {"detail": False}),
]


@pytest.mark.parametrize(("name", "rows", "fmt", "options"), LAYOUTS, ids=[layout[0] for layout in LAYOUTS])
def test_layout(name: str, rows: list[Row], fmt: Format, options: dict[str, Any]) -> None:
    """Look at the new text, then write it: `python tests/test_report.py`."""
    assert render(rows, fmt, **options) + "\n" == (GOLDEN / name).read_text(encoding="utf-8")


if __name__ == "__main__":
    for layout, cells, kind, given in LAYOUTS:
        (GOLDEN / layout).write_text(render(cells, kind, **given) + "\n", encoding="utf-8")


def test_copies_and_splits_that_move_the_numbers_are_told_below_the_table() -> None:
    rows = [replace(row, data="JPEG; 50000 train + 10000 test images") for row in example()]
    assert "Images: JPEG; 50000 train + 10000 test images." in " ".join(render(rows, "table", width=200).split())
    plain = [replace(row, data="lossless; 50000 train + 10000 test images") for row in example()]
    assert "Images:" not in render(plain, "table", width=200)


def test_a_clean_set_without_copies_of_poisoned_images_is_a_table_of_its_own() -> None:
    rows = [make("badnets", "ft", 5.0, 80.0, victim_seed=0),
            make("badnets", "ft", 9.0, 80.0, victim_seed=1, params={"exclude_poisoned": True})]  # fmt: skip
    blocks = build(rows)
    assert [block.lines[0].cells[-1].asr.mean for block in blocks] == [5.0, 9.0]  # type: ignore[union-attr]
    assert blocks[1].title.endswith("without clean copies of poisoned images")


def test_the_line_before_tells_how_fast_a_clean_model_learns_the_trigger() -> None:
    rows = [make("badnets", "before", 99.0, 82.0, retuned_clean_images=12, retuned_clean_asr=31.25),
            make("badnets", "ft", 5.0, 80.0, retuned_images=12, retuned_asr=88.5, retuned_ftr=3.0)]  # fmt: skip
    text = render(rows, "table", width=160)
    (before,) = [line for line in text.splitlines() if "Before" in line and "31.25" in line]
    assert before.split()[-1] == "–"
    assert "of a clean model after the same steps" in " ".join(text.split())
    assert "of a clean model" not in render(rows[1:], "table", width=160)


def test_the_newest_rows_stand_in_one_table() -> None:
    """A method was edited and its version raised: the older rows stay stored, and one option leaves them out."""

    def version(number: int, attack: str = "badnets", asr: float = 4.0, **more: Any) -> Row:
        return make(attack, "mine", asr, key=f"{attack}{number}{more}", params={"defense": {"version": number}}, **more)

    rows = [
        make("badnets", "before", 99.0), version(1), version(1, victim=1), version(1, "blend"),
        make("badnets", "ft", 9.0), version(2, asr=2.0), version(2, asr=1.0),
    ]  # fmt: skip
    with pytest.raises(UserError, match="see the newest with bbmcl report --latest"):
        render(rows, "table")
    kept = runner.newest(rows)
    assert sorted((row.defense, row.asr_k) for row in kept) == [("before", 8910), ("ft", 810), ("mine", 90)]
    assert render(kept, "table")
    assert runner.newest(rows[:3]) == rows[2::-1]  # where all agree, all stay
