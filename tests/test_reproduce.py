"""`bbmcl reproduce`: targets resolve, layouts are the paper's, figures come out, a second run computes nothing."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small
from conftest import Bbmcl
from made import computed, make, reproduced
from PIL import Image
from typer.testing import CliRunner

from backdoorbench_mcl import cli, params, plan, remarks, report, reproduce
from backdoorbench_mcl.api import Recipe
from backdoorbench_mcl.errors import UserError
from backdoorbench_mcl.presets import PRESETS, PresetName
from backdoorbench_mcl.presets.suite import NAMES, datasets, pinned, suite
from backdoorbench_mcl.report import figures, paper
from backdoorbench_mcl.reproduce import Reproduced
from backdoorbench_mcl.request import Options
from backdoorbench_mcl.rows import Row

CONTROL = "mcldef+(stage=contrast)"  # the steps of mcldef+ on the loss of mcldef (spec 7)
GOLDEN = Path(__file__).parent / "golden"
TOY = (
    "--dataset", "tiny", "--model", "tiny-net", "--budget", "quick", "--precision", "fp32", "--runs", "runs",
    *(part for line in (
        "train.steps=120", "defend.steps=6", "nc-box.steps=10", "badnets.target=1", "badnets.rate=0.2", "cl.target=1",
        "cl.surrogate=natural", "natural.steps=20",
    ) for part in ("--set", line)),
)  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_every_target_is_a_plan(name: str, monkeypatch: pytest.MonkeyPatch, toy_env: dict[str, str]) -> None:
    small.install_toy(monkeypatch, toy_env["BBMCL_CACHE"])
    ((found, options),) = reproduce.planned(name, Options("", "", "shapes", "", precision="fp32"))
    assert (options.budget, options.model) == ("quick", "wrn-16-1")
    built = plan.build(small.resolve(options))
    kinds = {node.kind for node in built.nodes.values()}
    assert ("embed" in kinds) == (found.kind == "tsne")
    rates = {cell.row.clean_rate for cell in built.cells} - {None}
    assert rates == ({0.01, 0.05, 0.1, 0.15, 0.2} if name in ("fig4", "fig9") else set() if name in ("fig1", "fig5")
                     else {0.05})  # fmt: skip


def test_the_paper_s_data_sets_have_their_attacks_and_networks() -> None:
    assert suite("table1", "gtsrb", "full").attacks == "badnets,trojan,blend"
    assert suite("table1", "imagenet20", "full").model == "resnet18"
    assert suite("table5", "cifar10", "full").set[-1] == "train.epochs=100"
    assert "train.epochs=100" not in suite("table5", "cifar10", "mid").set
    assert pinned(4) == {"defend.augment=none"}
    for name in NAMES:
        found = suite(name, "cifar10", "full")
        for part in params.split(found.attacks):
            assert part in paper.ATTACKS
        for part in params.split(found.defenses):
            assert part in ("none", CONTROL) or part in paper.DEFENSES


def test_targets_are_checked_before_anything_is_run() -> None:
    assert reproduce.targets("all") == NAMES
    assert reproduce.targets("fig1, table2") == ("fig1", "table2")
    with pytest.raises(UserError, match="did you mean 'table1'"):
        reproduce.targets("table2,tabel1")
    with pytest.raises(UserError, match="expected all or some of"):
        reproduce.targets("")


def test_a_clean_model_and_re_tuning_are_passed_on_to_the_runs(toy: Toy) -> None:
    base = replace(toy(), attacks="none", retune=12)
    found = {one.name: small.build(options) for one, options in reproduce.planned("table1,fig3,fig5", base)}
    kinds = {name: Counter(node.kind for node in built.nodes.values()) for name, built in found.items()}
    defenses = {name: {cell.row.defense for cell in built.cells if cell.row.attack == "none"} for name, built in
                found.items()}  # fmt: skip
    assert defenses == {
        "table1": {"before", "ft", "nad", "ibau", "nc", "mcldef"}, "fig3": {"before", "nad", "nc", "mcldef"},
        "fig5": set(),
    }  # fmt: skip
    assert kinds["table1"]["retune"] == 5 * 6  # of each attack the repaired models, and the clean one
    plain = small.build(reproduce.planned("fig3", toy())[0][1])
    embedded = [node for node in plain.nodes.values() if node.kind == "embed"]
    assert kinds["fig3"]["embed"] == len(embedded) == 8  # none of a model without a trigger


def test_the_command_has_both_flags(bbmcl: Bbmcl) -> None:
    plain = bbmcl("reproduce", "fig3", *TOY, "--dry-run")
    both = bbmcl("reproduce", "fig3", *TOY, "--set", "none.target=1", "--clean-model", "--retune", "12", "--dry-run")
    assert both.returncode == 0, both.stderr
    lines = re.compile(r"^ +([a-z]+) +(\d+) to compute", re.MULTILINE)
    counts = [{kind: int(count) for kind, count in lines.findall(done.stdout)} for done in (plain, both)]
    assert "retune" not in counts[0]
    assert counts[1]["retune"] == 8
    assert (counts[1]["train"], counts[1]["defend"]) == (counts[0]["train"] + 1, counts[0]["defend"] + 3)


def test_a_clean_model_is_not_missed_among_pictures_of_features(tmp_path: Path) -> None:
    found = [make("badnets", "ft", 3.0), make("none", "ft", None, 82.0, asr_before=None)]
    (made,) = reproduced(tmp_path, {"fig3": found})
    assert made.problems == ("badnets / ft: its embedding is not stored", "fig3: no model to draw")


Toy = Callable[..., Options]


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch, toy_env: dict[str, str]) -> Toy:
    """What `reproduce` is given on shapes: `toy("mcldef.epochs=3", dataset="gtsrb")`."""
    small.install_toy(monkeypatch, toy_env["BBMCL_CACHE"])

    def options(*lines: str, **base: Any) -> Options:
        return Options("", "", **{"dataset": "shapes", "model": "", "precision": "fp32", **base}, overrides=lines)

    return options


def test_the_sweeps_hold_the_control_that_tells_the_loss_of_mcldef_plus_from_its_steps(toy: Toy) -> None:
    for name in ("fig4", "fig9"):
        ((found, options),) = reproduce.planned(name, toy())
        assert "C8" in found.claims
        built = small.build(options)
        much = {cell.row.defense: cell for cell in built.cells if cell.row.clean_rate == 0.2}
        plus, control = (built.nodes[much[label].own[0]] for label in ("mcldef+", CONTROL))
        assert plus.inputs == control.inputs  # the same purified model, the same trigger
        params_of = [node.methods["defense"].params for node in (plus, control)]
        assert {name for name in params_of[0] if params_of[0][name] != params_of[1][name]} == {"stage"}


@pytest.mark.parametrize("preset", PRESETS)
def test_table_5_trains_by_one_schedule_under_every_preset(preset: PresetName, toy: Toy) -> None:
    """Spec 4.7 and 4.9: the released script, tenfold drops after epochs 20 and 70 and no Nesterov momentum."""
    lines = [f"{attack}.target=1" for attack in ("badnets", "trojan", "blend", "cl", "sig")]
    ((_, options),) = reproduce.planned("table5", toy(*lines, dataset="tiny", preset=preset, budget="full"))
    recipe = Recipe(**small.resolve(options).train.params)
    assert (recipe.epochs, recipe.augment, recipe.nesterov) == (100, "crop+flip", False)
    epochs = {0: 0.1, 19: 0.1, 20: 0.01, 69: 0.01, 70: 0.001, 99: 0.001}
    assert {epoch: recipe.lr_at(782 * epoch, 782 * 100) for epoch in epochs} == pytest.approx(epochs)


def lines_of(name: str, base: Options, said: list[str]) -> dict[str, list[str]]:
    """The typed `--set` lines that each target keeps."""
    return {
        found.name: [line for line in options.overrides if line in base.overrides]
        for found, options in reproduce.planned(name, base, said.append)
    }


def test_a_set_line_holds_for_the_targets_that_use_it_and_the_others_are_named(toy: Toy) -> None:
    lines = ("train.lr=0.1", "mesa.alpha=0.5", "natural.steps=9", "nc-box.steps=9", "sig.delta=30")
    said: list[str] = []
    assert lines_of("table2,fig4,fig1", toy(*lines), said) == {
        "table2": list(lines), "fig4": ["train.lr=0.1", "nc-box.steps=9"],
        "fig1": ["train.lr=0.1", "natural.steps=9", "sig.delta=30"],
    }  # fmt: skip
    assert said == [
        "note: --set mesa.alpha=0.5 is left out of fig4, fig1, without 'mesa'",
        "note: --set natural.steps=9 is left out of fig4, without 'natural'",
        "note: --set nc-box.steps=9 is left out of fig1, without 'nc-box'",
        "note: --set sig.delta=30 is left out of fig4, without 'sig'",
    ]


def test_a_set_line_may_bring_in_the_method_of_another_one(toy: Toy) -> None:
    lines = ("mcldef.inverter=pixel", "pixel.steps=9", "nc-box.steps=9")
    said: list[str] = []
    assert lines_of("fig10,table1", toy(*lines), said) == {"fig10": list(lines[:2]), "table1": list(lines)}
    assert said == ["note: --set nc-box.steps=9 is left out of fig10, without 'nc-box'"]


@pytest.mark.parametrize("name, line, hint", [
    ("fig1,fig3", "mesa.alpha=1", "these targets have badnets, blend, cl, defend, mcldef, nad, natural, nc, nc-box, "
     "shapes, sig, train, trojan, wrn$"), ("fig3,fig4", "mcldeff.epochs=3", "mean 'mcldef'"),
    ("fig10,fig3", "mcldef+.epochs=3", "mean 'mcldef'"),
])  # fmt: skip
def test_a_set_line_that_no_target_uses_is_refused(toy: Toy, name: str, line: str, hint: str) -> None:
    with pytest.raises(UserError, match=rf"--set {re.escape(line)}: nothing selected is called '.*'; .*{hint}"):
        reproduce.planned(name, toy(line))


@pytest.mark.parametrize(
    "line, told", [("mcldef", "expected"), ("sig.deltaa=30", "sig"), ("natural.stepz=9", "natural")]
)
def test_a_bad_set_line_is_told_before_anything_is_run(toy: Toy, line: str, told: str) -> None:
    with pytest.raises(UserError, match=told) as error:
        reproduce.planned("fig4,fig1", toy(line))
    assert "nothing selected" not in str(error.value)


def test_a_single_target_refuses_a_set_line_as_matrix_does(toy: Toy) -> None:
    ((_, options),) = reproduce.planned("table1", toy("mesa.alpha=0.5"))
    with pytest.raises(UserError, match="nothing selected is called 'mesa'"):
        small.resolve(options)


def test_what_the_paper_has_not_on_a_data_set_is_refused_by_name_and_left_out_of_all(toy: Toy) -> None:
    for dataset, model in (("gtsrb", "wrn-16-1"), ("imagenet20", "resnet18")):
        said: list[str] = []
        found = reproduce.planned("all", toy(dataset=dataset), said.append)
        assert [(one.name, options.attacks, options.model) for one, options in found] == [
            ("table1", "badnets,trojan,blend", model), ("fig5", "badnets,trojan,blend", model),
        ]  # fmt: skip
        assert said == [
            f"note: the paper has no table2, table4, table5, fig1, fig3, fig4, fig9, fig10 on {dataset}: left out"
        ]
    with pytest.raises(
        UserError, match=r"reproduce table2 --dataset gtsrb: the paper has it on cifar10 only; use that"
    ):
        reproduce.planned("table1,table2", toy(dataset="gtsrb"))
    for dataset in ("shapes", "tiny"):
        assert [one.name for one, _ in reproduce.planned("all", toy(dataset=dataset))] == list(NAMES)
    assert datasets("table1") == ("cifar10", "gtsrb", "imagenet20")
    assert datasets("table5") == ("cifar10",)


def rows(sig_mesa: bool = True) -> list[Row]:
    told: dict[str, Any] = {"knows": ("target",)}
    out = []
    for i, attack in enumerate(("badnets", "sig")):
        out += [
            make(attack, "before", 99.0, 83.0), make(attack, "nc", 4.0 + i, 80.0, **told),
            make(attack, "mcldef", 2.5, 81.0 - i, **told),
        ]  # fmt: skip
        if i == 0:
            out.append(make(attack, "mcldef(inverter=mesa)", 1.5, 82.0, knows=("location", "target")))
        else:
            out.append(make(attack, "mcldef(inverter=mesa)", state="n/a", reason="the trigger is no patch"))
    return out


@pytest.mark.parametrize("fmt, ending", [("table", "txt"), ("markdown", "md"), ("latex", "tex")])
def test_the_layout_of_the_paper(fmt: report.Format, ending: str) -> None:
    below = paper.sheets(rows(), 2)
    found = report.render(rows(), fmt, width=100, restyle=paper.restyle, below=below)
    golden = GOLDEN / f"reproduce_table2.{ending}"
    assert found + "\n" == golden.read_text()


def test_a_figure_from_end_to_end_and_again_from_the_store(bbmcl: Bbmcl, tmp_path: Path) -> None:
    done = bbmcl("reproduce", "fig3", *TOY)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("Figure 3: features after repair")
    assert "BadNets" in done.stdout
    drawn = tmp_path / "runs" / "figures" / "fig3_tiny_paper_quick.png"
    assert done.stdout.rstrip().splitlines()[-2:] == [
        f"runs/figures/{drawn.stem}.png",
        f"runs/figures/{drawn.stem}.svg",
    ]
    pixels = np.asarray(Image.open(drawn).convert("RGB"))
    assert (pixels == 0).all(2).sum() > 50  # triggered images, black
    before = drawn.read_bytes()
    again = bbmcl("reproduce", "fig3", *TOY)
    assert again.returncode == 0, again.stderr
    assert "ok," not in again.stderr
    assert drawn.read_bytes() == before


def test_a_figure_that_cannot_be_drawn_stops_no_other_target(tmp_path: Path) -> None:
    failed = [make("badnets", "before", state="failed", reason="out of memory")]
    gallery, front = reproduced(tmp_path, {"fig5": failed, "table2": rows()})
    (problem,) = gallery.problems
    assert problem.startswith("fig5: no stored victim fits")
    assert [path.suffix for path in front.files] == [".png", ".svg"] * 2


def claims_of(found: Reproduced) -> list[str]:
    """The claims that stand with a target."""
    return [line[0] for sheet in found.judged for line in sheet.body]


@pytest.mark.parametrize("fmt, heading", [
    ("table", "fig4, table1\n\nClaims: cifar10"), ("markdown", "## fig4, table1\n\n**Claims: cifar10"),
    ("latex", "% fig4, table1\n\n\\begin{table}"),
])  # fmt: skip
def test_claims_are_judged_once_when_all_targets_have_run(tmp_path: Path, fmt: str, heading: str) -> None:
    first, last = reproduced(tmp_path, {"fig4": sweep(), "table1": rows()}, fmt)
    assert claims_of(first) == []
    assert claims_of(last) == ["C1", "C2", "C3", "C7", "C8", "C10"]
    assert "Claims" not in first.text + first.closing + last.text
    assert last.closing.startswith(heading)
    assert "only NC and MCLDef cut ASR" in last.closing


@pytest.mark.parametrize("fmt", ["table", "html"])
def test_the_command_shows_the_claims_once(tmp_path: Path, fmt: str) -> None:
    runs = ("--runs", str(tmp_path), "--budget", "full", "--precision", "fp32", "--format", fmt)
    with computed({"fig4": sweep(), "fig9": [row for row in rows() if row.attack == "sig"]}):
        done = CliRunner().invoke(cli.app, ["reproduce", "fig4,fig9", *runs])
    assert done.exit_code == 0, done.output
    text = done.stdout if fmt == "table" else (tmp_path / "reproduce-fig4-fig9.html").read_text()
    assert text.count("Claims") == 1


def headings(page: str) -> list[str]:
    """The headings of a page, and the best BA of each grid's lines below the grid's own."""
    found = re.findall(r"<h[234][^>]*>([^<]*)<|class=\"heat best\"[^>]*><button[^>]*>([^<]*)<", page)
    return [heading.partition(":")[0].split(",")[0] or f"best {value}" for heading, value in found]


def test_a_page_of_several_targets_has_each_for_itself(tmp_path: Path) -> None:
    told: dict[str, Any] = {"knows": ("target",)}
    shared = [make("badnets", "before", 99.0, 83.0), make("badnets", "mcldef", 3.0, 80.0, **told)]
    one = [*shared, make("badnets", "nad", 30.0, 81.0)]
    two = [*shared, make("badnets", "mcldef(inverter=mesa)", 20.0, 82.0, knows=("location", "target"))]
    runs = ("--runs", str(tmp_path), "--budget", "full", "--precision", "fp32", "--format", "html")
    with computed({"table1": one, "table2": two}):
        done = CliRunner().invoke(cli.app, ["reproduce", "table1,table2", *runs])
    assert done.exit_code == 0, done.output
    page = (tmp_path / "reproduce-table1-table2.html").read_text()
    assert headings(page) == [
        "Table 1", "cifar10", "best 3.00", "best 81.00", "Every cell", "MCLDef† less each other defense",
        "Beside the printed Table 1", "Table 2", "cifar10", "best 3.00", "best 82.00", "Every cell",
        "MCLDef† less each other defense", "Beside the printed Table 2", "table1", "Claims", "C4",
    ]  # fmt: skip
    data = json.loads(page.partition('id="data">')[2].partition("</script>")[0])
    assert [run["row"]["defense"] for run in data["runs"]] == ["before", "mcldef", "nad", "mcldef(inverter=mesa)"]


def test_the_claims_of_a_single_target_stand_with_it(tmp_path: Path) -> None:
    (found,) = reproduced(tmp_path, {"fig4": sweep()})
    assert claims_of(found) == ["C7", "C8"]
    assert "\nClaims: cifar10, preset paper, budget full, fp32\n" in found.text
    assert found.closing == ""
    (found,) = reproduced(tmp_path, {"fig4": sweep()}, "html")
    assert (claims_of(found), found.text, found.closing) == (["C7", "C8"], "", "")
    first, last = reproduced(tmp_path, {"fig3": rows(), "fig5": rows()})  # neither bears on a claim
    assert (first.closing, last.closing, claims_of(last)) == ("", "", [])


def test_re_tuning_is_a_column_and_a_stored_row_is_scored_again(bbmcl: Bbmcl, tmp_path: Path) -> None:
    command = (*small.command("badnets", "ft"), "--runs", "runs")
    plain = bbmcl(*command)
    assert plain.returncode == 0, plain.stderr
    assert "ASR re" not in plain.stdout
    tuned = bbmcl(*command, "--retune", "12")
    assert tuned.returncode == 0, tuned.stderr
    assert "after 10 steps on 12 triggered images" in " ".join(tuned.stdout.split())
    assert "re-tune ft on badnets 0: ok" in tuned.stderr
    assert "ft on badnets 0: ok" not in tuned.stderr.replace("re-tune ft on badnets 0: ok", "").replace(
        "judge re-tuned ft on badnets 0: ok", ""
    )
    found = bbmcl("report", "--format", "csv", "--runs", "runs").stdout.splitlines()
    column = found[0].split(",").index("retuned_asr")
    assert [line.split(",")[column] != "" for line in found[1:]] == [False, True]
    assert bbmcl(*command, "--retune", "12").stderr.count("re-tune") == 0
    more = bbmcl(*command, "--retune", "20")
    assert "after 10 steps on 20 triggered images" in " ".join(more.stdout.split())  # not what is stored of the 12


def test_re_tuning_has_a_clean_model_to_compare_with(bbmcl: Bbmcl) -> None:
    command = (*small.command("badnets", "ft"), "--runs", "runs", "--clean-model", "--set", "none.target=1")
    done = bbmcl(*command, "--retune", "12", "--format", "json")
    assert done.returncode == 0, done.stderr
    found = {(row["attack"], row["defense"]): row for row in json.loads(done.stdout)}
    before = found.pop(("badnets", "before"))
    assert before["retuned_clean_images"] == 12
    assert before["retuned_asr"] is None  # the victim has the backdoor as it is
    assert 0 <= before["retuned_clean_asr"] <= 100
    assert 0 <= before["retuned_clean_ba"] <= 100
    assert found["badnets", "ft"]["retuned_asr"] is not None
    assert all(row["retuned_clean_asr"] is None for row in found.values())
    assert done.stderr.count("re-tune none on badnets 0: ok") == 1
    assert done.stderr.count("none victim 0: ok") == 1  # the clean model of the table
    alone = bbmcl(*small.command("badnets", "ft"), "--runs", "runs", "--retune", "12", "--format", "json")
    assert json.loads(alone.stdout)[0]["retuned_clean_asr"] == before["retuned_clean_asr"]  # kept


def test_one_stage_beside_the_score_does_not_cost_another() -> None:
    tuned = make("badnets", "ft", 5.0, stages={"predict": "p", "retuned": "r"}, retuned_asr=99.0, retuned_images=12)
    again = make("badnets", "ft", 5.0, stages={"predict": "p", "embed": "e"})
    assert remarks.lacking(tuned, {"embed": "e"})
    found = remarks.kept(again, tuned, {"embed": "e"})
    assert (found.retuned_asr, found.retuned_images) == (99.0, 12)
    assert dict(found.stages) == {"predict": "p", "embed": "e", "retuned": "r"}
    assert not remarks.lacking(found, {"embed": "e"})
    assert remarks.lacking(found, {"retuned": "of another number of images"})
    assert remarks.kept(again, tuned, {"embed": "e", "retuned": "s"}) == again
    assert remarks.kept(again, None, {}) == again


@pytest.mark.parametrize("given", ["5", "51", "-3"])
def test_re_tuning_takes_10_to_50_images(bbmcl: Bbmcl, given: str) -> None:
    done = bbmcl(*small.command("badnets", "ft"), "--retune", given)
    assert done.returncode == 2
    assert "expected 10 to 50 triggered images" in done.stderr


def test_a_clean_model_and_no_defense(bbmcl: Bbmcl) -> None:
    done = bbmcl(
        *small.command("badnets", "none"),
        "--clean-model",
        "--set",
        "none.target=1",
        "--format",
        "csv",
        "--runs",
        "runs",
    )
    assert done.returncode == 0, done.stderr
    names = [line.split(",")[3:5] for line in done.stdout.splitlines()[1:]]
    assert names == [["badnets", "before"], ["none", "before"]]


# ---------------------------------------------------------------- figures


def sweep() -> list[Row]:
    out = [make("badnets", "before", 99.0, 83.0)]
    for rate in (0.2, 0.01, 0.05):
        for defense, asr in (("ft", 20.0), ("mcldef", 2.0)):
            out += [
                make("badnets", defense, asr + v + 10 * rate, 80.0 + v, victim=v, clean_rate=rate) for v in range(2)
            ]
    return out


def test_the_pareto_front() -> None:
    points = [(1, 80), (2, 79), (3, 82), (0.5, 70), (3, 81)]
    assert figures.front([(asr, ba, False) for asr, ba in points]) == [3, 0, 2]
    assert figures.front([]) == []


def test_figures_are_written_whole_and_twice_the_same(tmp_path: Path) -> None:
    made = figures.curves(sweep(), "Sweep of $x$ & <b>")
    assert made is not None
    first = [path.read_bytes() for path in figures.save(made, tmp_path / "a" / "curve")]
    again = figures.curves(sweep(), "Sweep of $x$ & <b>")
    assert again is not None
    second = [path.read_bytes() for path in figures.save(again, tmp_path / "curve")]
    assert first == second
    assert first[0].startswith(b"\x89PNG")
    assert b"<svg" in first[1]
    assert figures.svg(made, "a", "b").startswith("<svg")


def test_scatters_take_what_is_finished(tmp_path: Path) -> None:
    found = [*rows(), make("none", "ft", None, 80.0)]
    for cost in (False, True):
        made = figures.scatter(found, "t", cost)
        assert made is not None
        assert [axis.get_title() for axis in made.axes] == ["badnets", "sig"]
    assert figures.scatter([make("none", "ft", None, 80.0)], "t") is None
    assert figures.curves([make("none", "ft", None, 80.0)], "t") is None
