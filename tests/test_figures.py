"""Figures: what is drawn, what stands in the legend, and what a page leaves out of them and says."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from made import make
from safetensors.numpy import save_file

from backdoorbench_mcl.report import figures, grid, plots
from backdoorbench_mcl.report.evidence import Evidence
from backdoorbench_mcl.rows import Row


def sweep(**more: Any) -> list[Row]:
    """Two defenses over three clean rates, two victims."""
    out = [make("badnets", "before", 99.0, 83.0)]
    for rate in (0.2, 0.01, 0.05):
        for defense, asr in (("ft", 20.0), ("mcldef", 2.0)):
            out += [
                make("badnets", defense, asr + v + 10 * rate, 80.0 + v, victim=v, clean_rate=rate, **more)
                for v in range(2)
            ]
    return out


def entries(made: Any) -> list[str]:
    """The legend of a figure."""
    return [entry.get_text() for entry in made.legends[0].get_texts()]


def swept(rows: list[Row]) -> dict[str, dict[str, dict[str, list[float]]]]:
    """What varies -> attack -> curve -> values."""
    return {
        found.name: {a: {c: [p.x for p in ps] for c, ps in by.items()} for a, by in found.curves.items()}
        for found in figures.sweeps(grid.build(rows))
    }


# ---------------------------------------------------------------- sweeps


def test_what_varies_is_found() -> None:
    assert swept(sweep()) == {"clean rate in %": {"badnets": {"ft": [1, 5, 20], "mcldef": [1, 5, 20]}}}
    (found,) = figures.sweeps(grid.build(sweep()))
    point = found.curves["badnets"]["mcldef"][0].cell.asr
    assert point is not None
    assert point.mean == pytest.approx(2.6, abs=0.01)  # 2.1 and 3.1 of two victims
    assert found.cells == 6
    taus = [make("sig", f"mcldef(temperature={t})", t, 80.0) for t in (0.5, 0.1)] + [make("sig", "ft", 1.0)]
    assert swept(taus) == {"temperature of mcldef": {"sig": {"mcldef": [0.1, 0.5]}}}
    assert swept([make("sig", "ft", 1.0), make("sig", "nad", 2.0)]) == {}
    assert swept([make("sig", "ft(lr=0.1)", state="failed"), make("sig", "ft(lr=0.2)", 2.0)]) == {}


def test_every_parameter_that_varies_has_a_figure_and_what_varies_beside_it_a_curve() -> None:
    rows = [
        make("sig", f"mcldef(temperature={t}, layers={n})", 1.0, 80.0, clean_rate=rate)
        for t in (0.5, 0.1) for n in (1, 2) for rate in (0.05, 0.1)
    ]  # fmt: skip
    rows += [make("sig", f"nad(beta={b}, on=true)", 1.0, 80.0) for b in (1, 2)]
    rows.append(make("sig", "no selection {", 1.0, 80.0))
    found = swept(rows)
    assert list(found) == ["clean rate in %", "temperature of mcldef", "layers of mcldef", "beta of nad"]
    assert found["temperature of mcldef"]["sig"] == {
        f"mcldef(layers={n}), clean rate {rate} %": [0.1, 0.5] for rate in (5, 10) for n in (1, 2)
    }
    assert found["beta of nad"]["sig"] == {"nad(on=True), clean rate 5 %": [1, 2]}


def test_curves_mark_erased_classes_and_name_every_line() -> None:
    made = figures.curves(sweep(), "t")
    assert made is not None
    assert entries(made) == ["ft", "mcldef", "undefended", "FTR, the floor of ASR"]
    made = figures.curves([*sweep(), *sweep_of("nad", tca=1.0)], "t")
    assert made is not None
    assert entries(made) == ["ft", "mcldef", "nad", "undefended", "FTR, the floor of ASR", "target class erased"]
    crosses = [line for axis in made.axes for line in axis.lines if line.get_marker() == "x"]
    assert len(crosses) == 6  # three rates, of ASR and of BA


def test_a_clean_model_has_a_panel_of_ba_and_none_of_asr() -> None:
    clean = [make("none", "ft", None, 80.0, clean_rate=rate, asr_before=None) for rate in (0.01, 0.05, 0.2)]
    made = figures.curves([*sweep(), *clean], "t")
    assert made is not None
    assert [axis.axison for axis in made.axes] == [True, False, True, True]
    assert [text.get_text() for text in made.axes[1].texts] == ["no ASR"]


def sweep_of(defense: str, **more: Any) -> list[Row]:
    return [make("badnets", defense, 9.0, 70.0, clean_rate=rate, **more) for rate in (0.01, 0.05, 0.2)]


# ---------------------------------------------------------------- scatters


def line_of(rows: list[Row]) -> list[figures.Dot]:
    (block,) = grid.build(rows)
    return figures.dots(block.lines[0], block.columns)


def test_erased_flagged_and_incomplete_cells_are_hollow_and_off_the_front() -> None:
    rows = [
        make("sig", "before", 99.0, 83.0), make("sig", "ft", 30.0, 82.0), make("sig", "nad", 10.0, 80.0),
        make("sig", "ibau", 1.0, 60.0, ftr=0.5, tca=1.0), make("sig", "nc", 5.0, 82.5),
        make("sig", "nc", victim=1, state="failed"), make("sig", "mcldef", 20.0, 79.0),
    ]  # fmt: skip
    found = line_of(rows)
    assert {dot.label: dot.hollow for dot in found} == {
        "ft": "", "nad": "", "ibau": "target class erased", "nc": "runs missing", "mcldef": "",
    }  # fmt: skip
    assert [dot.label for dot in figures.best(found)] == ["nad", "ft"]
    weak = line_of([row if row.defense == "before" else Row.from_dict({**row.as_dict(), "gate": "flagged"})
                    for row in rows])  # fmt: skip
    assert {dot.hollow for dot in weak} == {"weak attack", "target class erased"}
    assert figures.best(weak) == []
    made = figures.scatter(rows, "t")
    assert made is not None
    faces = [len(dots.get_facecolor()) for dots in made.axes[0].collections]
    assert Counter(faces) == {1: 3, 0: 2}
    assert entries(made) == [
        "ft", "nad", "ibau", "nc", "mcldef", "hollow: target class erased", "hollow: runs missing",
    ]  # fmt: skip


def test_what_runs_code_of_its_own_is_hollow_for_that() -> None:
    rows = [make("sig", "ft", 30.0, 82.0), make("sig", "guest", 1.0, 83.0, rebuild="somebody.model")]
    assert {dot.label: dot.hollow for dot in line_of(rows)} == {
        "ft": "", "guest": "custom inference by code of its own",
    }  # fmt: skip


def test_cells_at_the_floor_of_their_asr_tie_on_the_front() -> None:
    rows = [
        make("sig", "before", 99.0, 83.0), make("sig", "ft", 1.0, 80.0), make("sig", "nad", 1.5, 81.0),
        make("sig", "nc", 0.5, 79.0), make("sig", "ibau", 40.0, 83.0), make("sig", "mcldef", 5.0, 80.5),
    ]  # fmt: skip
    found = line_of(rows)
    assert [dot.label for dot in found if dot.floor] == ["ft", "nad", "nc"]  # FTR is 2
    assert [dot.label for dot in figures.best(found)] == ["nad", "ibau"]
    made = figures.scatter(rows, "t")
    assert made is not None
    assert made.get_suptitle().replace("\n", " ") == "t; dashed: Pareto front, no ASR beats one at its floor"
    assert entries(made)[-1] == "ring: ASR at its floor"
    rings = [dots for dots in made.axes[0].collections if dots.get_label() == "floor"]
    places = np.concatenate([np.asarray(ring.get_offsets()) for ring in rings])
    assert sorted(places[:, 0]) == pytest.approx([0.5, 1.0, 1.5], abs=0.01)
    assert all(len(ring.get_facecolor()) == 0 for ring in rings)
    (drawn,) = made.axes[0].lines
    assert np.allclose(np.asarray(drawn.get_xdata(), float), [1.5, 40.0])


def test_a_cell_at_its_floor_is_off_the_front_for_its_ba_alone() -> None:
    rows = [
        make("sig", "before", 99.0, 83.0, ftr=3.5), make("sig", "nc", 3.4, 81.0, ftr=3.7),
        make("sig", "mcldef", 1.1, 80.0, ftr=0.8), make("sig", "nad", 2.5, 82.0), make("sig", "ft", 9.0, 81.5),
    ]  # fmt: skip
    # nad ties with nc and has more BA; nc ties with mcldef and has more BA, but is not on the front itself
    assert [dot.label for dot in figures.best(line_of(rows))] == ["mcldef", "nad"]
    lower = [Row.from_dict({**row.as_dict(), "ba": 79.0}) if row.defense == "nc" else row for row in rows]
    assert [dot.label for dot in figures.best(line_of(lower))] == ["mcldef", "nad"]


@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6), st.booleans()), min_size=1, max_size=8))
def test_whatever_is_off_the_front_is_beaten_by_one_on_it(points: list[tuple[int, int, bool]]) -> None:
    def beats(one: tuple[int, int, bool], other: tuple[int, int, bool]) -> bool:
        """One has no worse BA, an ASR that the other's does not beat, and is better in one of the two."""
        better = one[0] < other[0] and not other[2]
        worse = other[0] < one[0] and not one[2]
        return one[1] >= other[1] and not worse and (one[1] > other[1] or better)

    on = figures.front(points)
    assert on
    for i, point in enumerate(points):
        assert (i in on) == (not any(beats(points[j], point) for j in on if j != i))


@pytest.mark.parametrize("cost", [False, True])
def test_a_ring_is_larger_than_its_dot_and_an_erased_cell_has_none(cost: bool) -> None:
    rows = [make("sig", "ft", 1.0, 80.0), make("sig", "nad", 40.0, 81.0), make("sig", "nc", 0.0, 70.0, tca=0.1)]
    made = figures.scatter(rows, "t", cost)
    assert made is not None
    every: list[Any] = list(made.axes[0].collections)
    (ring,) = (marks for marks in every if marks.get_label() == "floor")
    (dot,) = (marks for marks in every if marks is not ring and np.allclose(marks.get_offsets(), ring.get_offsets()))
    assert ring.get_sizes()[0] > 2 * dot.get_sizes()[0]
    assert entries(made)[-2:] == ["hollow: target class erased", "ring: ASR at its floor"]
    without = figures.scatter([make("sig", "ft", 9.0, 80.0)], "t", cost)
    assert without is not None
    assert entries(without) == ["ft"]


@pytest.mark.parametrize("cost", [False, True])
def test_a_defense_that_failed_on_the_first_attack_is_in_the_legend(cost: bool) -> None:
    rows = [
        make("badnets", "ft", 30.0, 82.0), make("badnets", "nad", state="failed"), make("sig", "ft", 20.0, 82.0),
        make("sig", "nad", 9.0, 81.0), make("sig", "lost", state="failed"),
    ]  # fmt: skip
    made = figures.scatter(rows, "t", cost)
    assert made is not None
    assert entries(made) == ["ft", "nad"]
    rows = [make("badnets", "ft", 30.0, 82.0, clean_rate=0.05), make("badnets", "nad", state="failed")]
    rows += [make("sig", d, 9.0, 81.0, clean_rate=rate) for d in ("ft", "nad") for rate in (0.05, 0.1)]
    made = figures.curves(rows, "t")
    assert made is not None
    assert entries(made)[:2] == ["ft", "nad"]


def test_a_hundred_defenses_look_different() -> None:
    assert len({figures._look(i) for i in range(100)}) == 100


# ---------------------------------------------------------------- on a page


def test_svg_of_a_page_says_what_it_shows_and_has_ids_of_its_own() -> None:
    made = figures.scatter([make("sig", 'ft(a=" id=")', 9.0, 81.0), make("sig", "url(#a)", 9.0, 81.0)], "t")
    assert made is not None
    first, second = (figures.svg(made, name, '<"says&') for name in ("a", "b"))
    assert first == figures.svg(made, "a", '<"says&')
    found = [{e.get("id") for e in ElementTree.fromstring(text).iter()} - {None} for text in (first, second)]
    assert found[0] and not found[0] & found[1]
    root = ElementTree.fromstring(first)
    assert (root.get("role"), root.get("aria-label")) == ("img", '<"says&')
    used = set(re.findall(r'(?:xlink:href="#|url\(#)([^")]+)', re.sub(r">[^<]*<", "><", first)))
    assert used and used <= found[0]
    assert any("url(#a)" in (e.text or "") for e in root.iter())  # a text stays as it is
    assert any('ft(a=" id=")' in (e.text or "") for e in root.iter())


class Features(Evidence):
    """Every embedding but those of victim 99."""

    def __init__(self) -> None:
        pass

    def embedding(self, row: Row) -> figures.Embedding | None:
        gone = row.victim_seed == 99
        xy = np.zeros((2, 2), np.float32)
        return (
            None if gone else figures.Embedding("sig / ft", f"victim seed {row.victim_seed}", xy, np.zeros(2, int), {})
        )


@pytest.mark.parametrize(
    "victims, says",
    [
        (range(12), []),
        (range(13), ["12 of 13 models are drawn; at most 12 are"]),
        ([0, 99], ["1 of 2 models are drawn; the others are no longer stored"]),
        ([99], ["0 of 1 models are drawn; the others are no longer stored"]),
    ],
)
def test_features_that_are_not_drawn_are_said(victims: list[int], says: list[str]) -> None:
    (block,) = grid.build([make("sig", "ft", 9.0, 81.0, victim=v, stages={"embed": f"e{v}"}) for v in victims])
    page = plots.Plots(10**7)
    made = page.of_block(block, Features())
    assert sum("<img" in markup for markup in made) == (victims != [99])
    assert page.left_out() == [f"Features: {block.title}: {line}." for line in says]
    assert page.left_out() == []


def panel(seeds: str) -> figures.Embedding:
    return figures.Embedding("sig / ft", seeds, np.zeros((2, 2), np.float32), np.array([0, -1]), {"probe": 3.0})


def test_panels_of_features_name_their_seeds() -> None:
    made = figures.tsne([panel("victim seed 3, defense seed 1")], "t")
    assert made.axes[0].get_title() == "sig / ft\nvictim seed 3, defense seed 1\nprobe 3 %"


def test_a_panel_of_a_model_without_its_target_class_says_so() -> None:
    made = figures.tsne([replace(panel("victim seed 3"), mark="target class erased")], "t")
    assert made.axes[0].get_title() == "sig / ft\nvictim seed 3\ntarget class erased\nprobe 3 %"


def test_a_plot_without_room_is_left_out_and_said() -> None:
    (block,) = grid.build([make("sig", "ft", 9.0, 81.0)])
    page = plots.Plots(1000)
    assert page.of_block(block, None) == []
    assert page.left_out() == [f"{what} and BA: {block.title}: left out, to keep the page small."
                               for what in ("ASR", "Cost")]  # fmt: skip


def test_an_embedding_of_a_store_names_both_seeds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_file({"xy": np.zeros((1, 2), np.float32), "y": np.zeros(1, np.int32)}, tmp_path / "embedding.safetensors")
    (tmp_path / "meta.json").write_text("{}")
    monkeypatch.setattr(Features, "folder", lambda self, row, kind: tmp_path)
    rows = [make("sig", defense, victim=3, draw=1, tca=tca) for defense, tca in (("before", 70.0), ("ft", 0.1))]
    told = [Evidence.embedding(Features(), row) for row in rows]
    assert [found and (found.title, found.seeds, found.mark) for found in told] == [
        ("sig", "victim seed 3", ""), ("sig / ft", "victim seed 3, defense seed 1", "target class erased"),
    ]  # fmt: skip
