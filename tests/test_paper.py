"""Our rows beside printed numbers: which cell is which and what may be said of it; spread and tests of cells."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from made import row, spread

from backdoorbench_mcl.report import inference, paper, sheets, statistics
from backdoorbench_mcl.report.grid import build, cell_of
from backdoorbench_mcl.rows import Row


def test_every_printed_number_is_there() -> None:
    cells = paper.printed()
    assert len(cells) == 151
    assert {(c.table, sum(o.table == c.table for o in cells)) for c in cells} == {(1, 66), (2, 25), (4, 30), (5, 30)}
    assert next(c for c in cells if (c.table, c.attack, c.defense) == (2, "Sig", "MESA")).asr is None
    assert next(c for c in cells if (c.table, c.attack, c.defense) == (1, "BadNets", "MCLDef")).ba == 82.19


def test_what_the_text_of_the_paper_says_of_its_table_is_computed_from_it() -> None:
    """The numbers of spec 11.1."""
    *_, relative, drops, attacks = paper.oddities(1)
    assert relative == (
        "Reductions of ASR in the text are relative to the best rival, not points: BadNets 21.3 % (0.60 points), "
        "Trojan 32.1 % (1.24), Blend 8.2 % (0.19), CL 95.8 % (5.47), Sig 47.7 % (3.25), on GTSRB Blend 70.4 % (0.76); "
        "so is the gain of BA there, 3.3 % (3.09)."
    )
    assert drops == (
        "The text has MCLDef lose mostly below 2 % of BA: so it does in 8 of 11 lines, by 0.82, 0.80, 0.22, 2.47, "
        "10.83 (Cifar-10), 1.54, 1.67, 1.57 (GTSRB), -0.73, -0.84, 2.43 (ImageNet) points."
    )
    assert attacks == (
        "The text counts four attacks in one place and five in others: here are 5 on Cifar-10, 3 on GTSRB, 3 on "
        "ImageNet."
    )
    assert len(paper.oddities(1)) == 5
    assert (len(paper.oddities(2)), paper.oddities(5)) == (1, ())


def test_a_row_finds_its_cell_by_its_labels() -> None:
    found = paper.find(row("sig", "mcldef", 3.0, 73.0), 1)
    assert found is not None
    assert (found.asr, found.ba) == (3.56, 73.81)
    assert paper.find(row("sig", "mcldef(clean_anchor=1.0)", 3.0, 73.0), 1) is None
    assert paper.find(row("badnets(size=4)", "mcldef", 3.0, 73.0), 1) is None
    assert paper.find(row("cl", "mcldef", 3.0, 73.0, dataset="gtsrb"), 1) is None
    gtsrb = paper.find(row("blend", "mcldef", 3.0, 73.0, dataset="gtsrb(split=final)"), 1)
    assert gtsrb is not None
    assert gtsrb.asr == 0.32


@pytest.mark.parametrize(
    "table, change, says",
    [
        (1, {}, ""),
        (1, {"preset": "authors"}, ""),
        (4, {}, "defend.augment=crop+flip instead of none"),
        (5, {}, "train.augment=none instead of crop+flip"),
        (1, {"model": "resnet18"}, "resnet18 instead of wrn-16-1"),
        (1, {"preset": "clean"}, "preset clean"),
        (1, {"clean_rate": 0.01}, "clean rate 1 %"),
        (1, {"toy": True, "dataset": "shapes"}, "shapes is no data set of the paper"),
        (1, {"overrides": ("mcldef.temperature=0.1",)}, "--set mcldef.temperature=0.1"),
    ],
)
def test_what_departs_from_the_printed_protocol_is_not_compared(table: int, change: dict[str, Any], says: str) -> None:
    found = paper.departure(row("badnets", "mcldef", 2.0, 81.0, **change), table)
    assert found.startswith(says)
    assert bool(found) == bool(says)


def test_the_pinned_line_of_a_table_is_no_departure() -> None:
    four: dict[str, Any] = {"params": {"train": {"augment": "none"}, "defend": {"augment": "none"}}}
    made = row("badnets", "ft", 2.0, 81.0, overrides=("defend.augment=none",), **four)
    assert paper.departure(made, 4) == ""
    assert paper.departure(made, 1) == "defend.augment=none instead of crop+flip"


def test_five_victims_at_full_budget_allow_a_word() -> None:
    close = paper.compare(spread("badnets", "mcldef", 2.3, 81.6), 1)
    assert [(c.asr_word, c.ba_word, c.why) for c in close] == [("consistent", "consistent", "")]
    assert (close[0].printed.attack, close[0].printed.defense) == ("BadNets", "MCLDef")
    far = paper.compare(spread("badnets", "mcldef", 9.0, 70.0), 1)
    assert [(c.asr_word, c.ba_word) for c in far] == [("differs", "differs")]
    wide = paper.compare(spread("badnets", "mcldef", 3.0, 81.6, wide=3.0), 1)
    assert [c.ba_word for c in wide] == ["too wide to say"]


def test_the_compared_ba_leaves_out_the_target_class() -> None:
    found = paper.compare([row("badnets", "mcldef", 2.0, 70.0)], 1)[0]
    assert list(found.ba_nt) == pytest.approx([70.6])


@pytest.mark.parametrize(
    "rows, says",
    [
        (spread("badnets", "mcldef", 2.3, 81.6, n=4), "n = 4: fewer than 5 victims"),
        (spread("badnets", "mcldef", 2.3, 81.6, budget="mid"), "scaled protocol (budget mid)"),
    ],
)
def test_without_enough_there_is_no_word(rows: list[Row], says: str) -> None:
    found = paper.compare(rows, 1)[0]
    assert found.why == says
    assert {found.asr_word, found.ba_word} <= {"", "too wide to say"}


def test_the_prediction_interval_is_shown_and_whether_the_printed_number_lies_in_it() -> None:
    rows = spread("badnets", "mcldef", 2.3, 81.6) + spread("cl", "mcldef", 9.0, 70.0)
    (sheet,) = paper.sheets(rows, 1)
    assert sheet.head[3:9] == ("FTR", "ASR", "printed", "diff.", "95 % prediction", "")
    assert sheet.head[9:] == ("BA nt", "printed", "diff.", "95 % prediction", "")
    near, far = sheet.body
    asr = statistics.predicted(paper.per_victim(rows[:5], "asr"), 2.22, 9000, logit=True)
    ba = statistics.predicted(paper.per_victim(rows[:5], "ba_nt"), 82.19, 9000)
    assert asr is not None
    assert ba is not None
    assert near[7:9] == (f"{asr.low:.2f} to {asr.high:.2f}, in", "consistent")
    assert near[12:] == (f"{ba.low:.2f} to {ba.high:.2f}, in", "consistent")
    assert (far[7].endswith(", out"), far[8]) == (True, "differs")
    wide = paper.sheets(spread("badnets", "mcldef", 3.0, 81.6, wide=3.0), 1)[0].body[0]
    assert (wide[12].endswith(", in"), wide[13]) == (True, "too wide to say")


@pytest.mark.parametrize(
    "rows, shown",
    [
        (spread("badnets", "mcldef", 2.3, 81.6, n=4), False),
        (spread("badnets", "mcldef", 2.3, 81.6, budget="mid"), True),  # a number, and no word
        (spread("badnets", "mcldef", 2.3, 81.6, overrides=("mcldef.temperature=0.1",)), False),
        ([replace(r, state="failed") if r.victim_seed == 5 else r for r in spread("badnets", "mcldef", 2.3, 81.6, n=6)],
         False),
    ],
)  # fmt: skip
def test_no_interval_for_few_victims_or_missing_runs(rows: list[Row], shown: bool) -> None:
    sheet = paper.sheets(rows, 1)[0]
    assert ("95 % prediction" in sheet.head) == shown
    assert "consistent" not in sheet.body[0]


def test_draws_of_one_victim_count_once() -> None:
    rows = [row("badnets", "mcldef", 2.0 + draw, 81.0, 0, draw=draw) for draw in range(3)]
    assert list(paper.compare(rows, 1)[0].asr) == pytest.approx([3.0], abs=0.01)


def test_names_of_the_paper_and_a_slash_for_what_has_no_meaning() -> None:
    rows = [
        row("sig", "before", 99.0, 84.0), row("sig", "mcldef", 3.0, 73.0),
        replace(row("sig", "mcldef(inverter=mesa)", 0.0, 0.0), state="n/a", asr=None, ba=None, reason="no patch"),
    ]  # fmt: skip
    block = paper.restyle(build(rows)[0])
    assert [c.label for c in block.columns] == ["Before", "MCLDef", "MESA"]
    assert block.lines[0].label == "Sig"
    cell = block.lines[0].cells[2]
    assert cell is not None
    assert cell.failure == "/"


# ---------------------------------------------------------------- spread and tests


def two(n: int, difference: float = 2.0) -> list[Row]:
    rows = []
    for v in range(n):
        rows.append(row("badnets", "before", 99.0, 83.0, v))
        for draw in range(2):
            jitter = 0.2 * np.cos(3 * v + draw)
            rows.append(row("badnets", "mcldef", 5 + 0.5 * v, 80.0, v, draw=draw))
            rows.append(row("badnets", "ft", 5 + 0.5 * v + difference + jitter, 80.0 + jitter, v, draw=draw))
    return rows


def test_paired_differences_with_holm_and_effect_size() -> None:
    found = inference.sheets(build(two(5)))
    spread_, tests = found
    assert spread_.body[1][:3] == ("badnets", "mcldef", "5 x 2")
    assert "[" in spread_.body[1][3]  # an interval
    (line,) = tests.body
    assert line[:2] == ("badnets", "ft")
    assert line[2].startswith("-2.")
    assert line[4] == "<0.001"
    assert tests.title.startswith("mcldef less each other defense")


def test_one_victim_is_never_tested() -> None:
    found = inference.sheets(build(two(1)))
    assert found[0].below[-1].startswith("No interval: 5 victims are needed for one, this table has 1")
    (line,) = found[1].body
    assert line[3:6] == ("", "", "")
    assert "No test: fewer than 5 victims." in found[1].below


def test_below_five_victims_their_values_are_shown_and_nothing_is_tested() -> None:
    spread_, tests = inference.sheets(build(two(3)))
    assert spread_.body[1][3].endswith(" (5.00, 5.50, 6.00)")
    (line,) = tests.body
    assert line[3].startswith("(-")
    assert line[3].count(",") == 2
    assert line[4:6] == ("", "")


def test_models_at_their_floor_are_not_tested_on_asr() -> None:
    low = [replace(r, asr=1.0, asr_k=90, asr_n=9000) if r.defense != "before" else r for r in two(1)]
    judged = inference.Judged(np.ones(200, bool), np.arange(100) < 20)
    (line,) = inference.sheets(build(low), predictions=lambda one: judged)[1].body
    assert line[2:5] == ("≈ tied", "", "")
    assert line[5] == "+0.00"


def test_one_victim_with_predictions_is_a_pair_of_models() -> None:
    def said(one: Row) -> inference.Judged:
        fired = np.zeros(100, bool)
        fired[: 2 if one.defense == "mcldef" else 30] = True
        right = np.ones(200, bool)
        right[:3] = one.defense == "mcldef"
        return inference.Judged(right, fired)

    found = inference.sheets(build(two(1)), predictions=said)
    (line,) = found[1].body
    assert line == ("badnets", "ft", "-28.00", "0:28", "<0.001", "+1.50", "3:0", "cannot fire")
    assert "These pairs of models only" in found[1].below[0]


def test_several_victims_without_spread_are_not_called_one() -> None:
    flat = [replace(r, asr=5.0, ba=80.0) if r.defense != "before" else r for r in two(5)]
    found = inference.sheets(build(flat), predictions=lambda one: None)[1]
    assert any("no spread over victims" in text for text in found.below)
    assert not any("One victim" in text for text in found.below)


def test_predictions_that_are_gone_are_counted() -> None:
    found = inference.sheets(build(two(1)), predictions=lambda one: None)
    assert found[1].body == ()
    assert "1 pair without stored predictions left out." in found[1].below


def test_floor_ties_and_erased_classes_are_not_tested() -> None:
    low = [replace(r, asr=1.0, asr_k=90, asr_n=9000) if r.defense != "before" else r for r in two(5)]
    assert inference.sheets(build(low))[1].body[0][2] == "≈ tied"
    erased = [replace(r, tca=1.0) if r.defense == "ft" else r for r in two(5)]
    assert inference.sheets(build(erased))[1].body[0][2] == "×"


def test_what_runs_code_of_its_own_is_not_called_a_missing_run() -> None:
    rows = [replace(r, rebuild="somebody.model" if r.defense == "ft" else "backdoorbench_mcl.mean") for r in two(5)]
    (line,) = inference.sheets(build(rows))[1].body
    below = inference.sheets(build(rows))[1].below
    assert (line[2], line[6]) == ("own code", "own code")
    assert "own code: custom inference by code of its own, which runs where the test images are: not tested." in below
    assert not any("k/n" in text for text in below)
    assert paper.untestable(cell_of([r for r in rows if r.defense == "ft"])) == "custom inference by code of its own"
    assert paper.untestable(cell_of([r for r in rows if r.defense == "mcldef"])) == ""


def test_a_pair_without_asr_has_no_asr_difference() -> None:
    clean = [replace(row("none", d, 0.0, 80.0), asr=None, asr_k=None, asr_n=None) for d in ("before", "ft", "mcldef")]
    judged = inference.Judged(np.arange(200) < 190, np.zeros(0, bool))
    (line,) = inference.sheets(build(clean), predictions=lambda one: judged)[0].body
    assert line[2:5] == ("–", "", "")
    assert line[5] == "+0.00"


def test_only_draws_that_both_have_finished_are_paired() -> None:
    rows = [r for r in two(2) if not (r.defense == "ft" and r.victim_seed == 0 and r.defense_seed == 1)]
    first, second = inference.shared(
        "asr", [r for r in rows if r.defense == "ft"], [r for r in rows if r.defense == "mcldef"]
    )
    assert {v: len(x) for v, x in first.items()} == {v: len(x) for v, x in second.items()} == {0: 1, 1: 2}


def test_the_reference_may_be_named() -> None:
    assert inference.sheets(build(two(2)), against="ft")[1].title.startswith("ft less each other defense")


def test_sheets_print_in_every_format() -> None:
    one = sheets.Sheet("A & B", ("x", "y", "n"), (("a|b", "_c_", "1.00"), ("a|b", "d", "12.00")), 2, ("100 % of it",))
    text = sheets.as_text([one], 40).splitlines()
    assert text == ["A & B", "", "x    y        n", "a|b  _c_   1.00", "     d    12.00", "", "100 % of it"]
    markdown = sheets.as_markdown([one])
    assert "a\\|b" in markdown
    assert "\\_c\\_" in markdown
    latex = sheets.as_latex([one])
    assert r"A \& B" in latex
    assert r"100 \% of it" in latex
    assert r"\begin{tabular}{llr}" in latex
