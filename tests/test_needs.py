"""Stages that methods ask for: who gets what, in which type, and what a cell says where there is nothing to get."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small
import torch
from helpers import MemorySnapshot, make_context
from safetensors.numpy import load_file, save_file
from tiny import Tiny, images

from backdoorbench_mcl import artefacts, plan, remarks, runner
from backdoorbench_mcl.api import Inverter, InverterContext, Need
from backdoorbench_mcl.describe import _need
from backdoorbench_mcl.errors import PluginError, UserError
from backdoorbench_mcl.inversions import _context, _Search
from backdoorbench_mcl.job import Job
from backdoorbench_mcl.rows import Row
from backdoorbench_mcl.runner import Settings
from backdoorbench_mcl.store import Store
from backdoorbench_mcl.triggers import MaskPattern, TrueTrigger, Verdict
from bbmcl_attacks.badnets import BadNets, corner_patch
from bbmcl_inverters.nc_box import NCBox

STEPS = ("train.steps=200", "defend.steps=5")
NATURAL, ROBUST = (*STEPS, "natural.steps=20"), (*STEPS, "robust.steps=20", "robust.pgd_steps=1")


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch, toy_env: dict[str, str]) -> None:
    small.install_toy(monkeypatch, toy_env["BBMCL_CACHE"])


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("needs") / "runs"


def run(
    runs: Path, defenses: str, attacks: str = "badnets(target=1,rate=0.2)", overrides: tuple[str, ...] = STEPS
) -> list[Row]:
    asked = small.options(attacks, defenses, overrides=overrides)
    rows = runner.run_matrix(asked, Settings(runs=runs, workers=1, threads=1), live=False)
    return [row for row in rows if row.defense != "before"]


@pytest.mark.usefixtures("toy")
def test_an_inverter_is_told_the_place_or_the_trigger_and_the_row_says_so(runs: Path) -> None:
    known = {know: f"needy(inverter='oracle(know={know})')" for know in ("location", "trigger")}
    place, trigger = run(runs, ",".join(known.values()))
    assert (place.state, place.knows) == ("ok", ("location", "target"))
    assert (trigger.state, trigger.knows) == ("ok", ("target", "trigger"))
    store = Store(runs)
    found = {row.defense: store.open(stage) for row in (place, trigger) if (stage := store.stage(row.stages["invert"]))}
    mask = load_file(found[place.defense] / "trigger.safetensors")["mask"]
    assert mask.sum() == 9
    assert mask[-3:, -3:].all()
    stored = load_file(found[trigger.defense] / "trigger.safetensors")
    again = TrueTrigger.from_tensors({name: torch.from_numpy(value) for name, value in stored.items()})
    x = torch.full((2, 3, 8, 8), 100 / 255)
    expected = x.clone()
    expected[..., -3:, -3:] = corner_patch(3) / 255
    assert torch.equal(again.apply(x), expected)
    assert trigger.inverter_success is not None
    assert trigger.inverter_success > 90
    store.close()


@pytest.mark.usefixtures("toy")
def test_all_leaves_out_what_is_told_the_trigger_by_way_of_its_inverter() -> None:
    """Its entry cannot say so: it declares what the method itself may know."""
    oracle = ("needy.inverter=oracle(know=trigger)",)

    def labels(defenses: str, overrides: tuple[str, ...] = ()) -> list[str]:
        return [
            d.label for d in small.resolve(small.options("badnets(target=1)", defenses, overrides=overrides)).defenses
        ]

    everyone = labels("all")
    assert "needy" in everyone
    assert labels("all", oracle) == [label for label in everyone if label != "needy"]
    asked = small.resolve(small.options("badnets(target=1)", "all", overrides=oracle))
    said = runner.summary(asked, runner.Resources(1, 1, "process"))
    assert "note: `all` leaves out needy, told the trigger or its place" in said
    assert sorted(labels("all,needy", oracle)) == sorted(everyone)  # typed is typed


@pytest.mark.usefixtures("toy")
def test_a_row_says_how_long_the_search_for_its_trigger_was(runs: Path) -> None:
    """A mask that cannot shrink (lr 1e-9) ends nc-box's patience after its third pass."""
    inverters = ["nc-box(steps=7)", "nc-box(lr=1e-9,steps=500,patience=1,batch=1000)", "zero"]
    rows = run(runs, ",".join(f"needy(inverter='{inverter}')" for inverter in inverters))
    assert [row.inverter_steps for row in rows] == [7, 3, None]
    assert [row.inverter_stopped_early for row in rows] == [False, True, None]


def test_a_search_that_had_ended_when_it_was_killed_says_the_same_again(tmp_path: Path) -> None:
    snapshot = MemorySnapshot()

    def searched() -> dict[str, Any]:
        search = _Search(lambda done, total, images: None, snapshot)
        context = make_context(tmp_path, kind=InverterContext, clean=images(40), tick=search.tick, snapshot=search)
        NCBox(lr=1e-9, steps=500, patience=1, batch=40).invert(Tiny(), 1, context)
        return search.meta()

    assert searched() == {"steps": 3, "stopped_early": True}
    saves = snapshot.saves
    assert searched() == {"steps": 3, "stopped_early": True}
    assert snapshot.saves == saves  # nothing was left to do


@pytest.mark.usefixtures("toy")
def test_no_place_is_told_of_a_trigger_that_is_no_patch(tmp_path: Path) -> None:
    place = "needy(inverter='oracle(know=location)')"
    row = run(tmp_path, place, "blend(target=1,rate=0.2,alpha=0.9)")[0]
    assert row.state == "n/a"
    assert row.reason.endswith("oracle(know=location): the trigger of this attack is no patch of fixed pixels")


@pytest.mark.usefixtures("toy")
@pytest.mark.parametrize(("flags", "told"), [("()", "clean"), ("(2,)", "flagged 2"), ("(3,0)", "flagged 3, 0")])
def test_a_verdict_names_the_labels_and_the_method_is_told_nothing(runs: Path, flags: str, told: str) -> None:
    both = [f"needy(kind={kind},detector='oracle(flags={flags})')" for kind in ("detect", "verdict")]
    detect, verdict = run(runs, ",".join(both))
    for row in (detect, verdict):
        assert (row.state, row.reason, row.knows, row.verdict) == ("ok", "", (), told)
    store = Store(runs)
    stage = store.stage(detect.stages["invert"])
    assert stage is not None
    meta = artefacts.read_meta(store.open(stage))
    assert meta["labels"] == json.loads(flags.replace("(", "[").replace(",)", "]").replace(")", "]"))
    assert len(meta["each"]) == len(meta["labels"])
    assert (meta["success"] is None) == (flags == "()")
    store.close()


@pytest.mark.usefixtures("toy")
def test_what_an_inverter_relies_on_is_fitted_to_the_labels_that_were_flagged(runs: Path) -> None:
    """Else the attacker's own label would get in by way of it, although the row says that nothing was told."""
    inverter = "random(like='oracle(know=location)')"
    defense = f'needy(kind=detect,inverter="{inverter}",detector="oracle(flags=(3,0))")'
    graph = plan.build(small.resolve(small.options("badnets(target=1,rate=0.2)", defense, overrides=STEPS)))
    inversions = [node for node in graph.nodes.values() if node.kind == "invert"]
    assert len(inversions) == 2
    assert all("verdict" in node.inputs and node.spec["target"] is None for node in inversions)
    row = run(runs, defense)[0]
    assert row.state == "failed"  # needy looks at the pattern, which `random` draws: but it got one for each label
    assert "AssertionError" in row.reason
    store = Store(runs)
    stored = [artefacts.read_meta(store.open(s)) for s in store.stages() if s.key in {node.key for node in inversions}]
    assert [meta["labels"] for meta in stored] == [[3, 0]] * 2
    store.close()


@pytest.mark.usefixtures("toy")
def test_clean_copies_of_poisoned_images_are_counted_and_can_be_kept_out(runs: Path) -> None:
    asked = small.options("badnets(target=1,rate=0.2)", "ft(steps=3)", overrides=STEPS)
    settings = Settings(runs=runs, workers=1, threads=1)
    before, mixed = runner.run_matrix(asked, settings, live=False)
    apart = runner.run_matrix(dataclasses.replace(asked, exclude_poisoned=True), settings, live=False)[1]
    assert (before.clean_poisoned, apart.clean_poisoned) == (None, 0)
    assert mixed.clean_poisoned is not None
    assert 4 <= mixed.clean_poisoned <= 22  # 64 clean images of 320, of which 64 are poisoned: 12.8 expected
    assert (mixed.clean_n, apart.clean_n) == (64, 64)
    assert mixed.key != apart.key


@pytest.mark.usefixtures("toy")
def test_the_result_of_another_defense_is_shared_with_its_own_cell(runs: Path) -> None:
    ft, needy = run(runs, "ft(steps=3),needy(kind=result)")
    assert needy.state == "ok"
    assert needy.ba == ft.ba
    assert needy.knows == ()
    assert needy.uses_labels
    graph = plan.build(small.resolve(small.options("badnets", "ft(steps=3),needy(kind=result)")))
    assert sum(node.kind == "defend" for node in graph.nodes.values()) == 2
    assert needy.seconds_shared is not None
    assert needy.seconds is not None
    assert needy.seconds_shared > needy.seconds


@pytest.mark.usefixtures("toy")
@pytest.mark.parametrize(("overrides", "read"), [((), False), (("mcldef.ce=0.5",), True)])
def test_a_row_names_the_labels_that_another_defense_read_for_it(overrides: tuple[str, ...], read: bool) -> None:
    graph = plan.build(small.resolve(small.options("badnets(target=1)", "mcldef+", overrides=overrides)))
    assert [cell.row.uses_labels for cell in graph.cells] == [None, read]


@pytest.mark.usefixtures("toy")
@pytest.mark.parametrize(
    ("defense", "line"),
    [
        ("needy(kind=detect,inverter='oracle(know=trigger)')", "is told the trigger, and with it the target label"),
        ("needy(kind=detect,detector=nc-box)", "detector 'nc-box' names no target label; choose one that does"),
        ("needy(kind=verdict,detector='oracle(know=location)')", "has needs or must be told more"),
    ],
)
def test_a_verdict_that_would_mean_nothing_is_one_line(defense: str, line: str) -> None:
    with pytest.raises(UserError, match=line):
        small.resolve(small.options("badnets(target=1)", defense))


def test_only_a_trigger_that_a_defense_needs_rests_on_a_verdict() -> None:
    class Sly(Inverter):
        name = "sly"

        def needs(self) -> dict[str, Need]:
            return {"it": Need("trigger", "nc-box", verdict="nc-full")}

        def invert(self, model: Any, target: int, ctx: Any) -> Any:
            raise AssertionError

    with pytest.raises(PluginError, match="'it': only a trigger that a defense needs can rest on a verdict"):
        _need(Sly(), "it", Sly().needs()["it"])


@pytest.mark.usefixtures("toy")
def test_an_undefined_cell_is_known_by_all_that_its_row_says() -> None:
    def keys(**changes: Any) -> set[str]:
        graph = plan.build(small.resolve(small.options("badnets(targets=all)", "mcldef", **changes)))
        return {cell.key for cell in graph.cells if cell.undefined}

    base = small.overrides("badnets", "mcldef")[1:]
    variants = [keys(overrides=base), keys(overrides=base, clean_rate=0.1)]
    variants += [keys(overrides=(*base[:-1], "defend.steps=5")), keys(overrides=("mcldef.inverter=nc-box(steps=7)",))]
    assert len(set.union(*variants)) == len(variants)


@pytest.mark.usefixtures("toy")
def test_stages_of_an_earlier_version_are_computed_again(tmp_path: Path) -> None:
    """Their keys did not move, but what they say of themselves lacks the place and the labels."""
    inverter = "'oracle(know=location)'"
    run(tmp_path, f"needy(inverter={inverter})")
    store = Store(tmp_path)
    for stage in [stage for stage in store.stages() if stage.kind in ("trial", "invert")]:
        out = tmp_path / f"old-{stage.kind}"
        shutil.copytree(store.open(stage), out)
        meta = artefacts.read_meta(out)
        old = {name: meta[name] for name in meta if name not in ("location", "labels", "modules", "detected")}
        (out / artefacts.META).chmod(0o600)
        (out / artefacts.META).write_text(json.dumps(old))
        store.forget(stage.key)
        store.commit(stage, out)
    store.close()
    row = run(tmp_path, f"nc(inverter={inverter})")[0]
    assert (row.state, row.reason) == ("ok", "")


@pytest.mark.usefixtures("toy")
def test_a_need_that_circles_is_one_line() -> None:
    with pytest.raises(PluginError, match=r"needy\(kind=itself\) needs itself"):
        small.resolve(small.options("badnets", "needy(kind=itself)"))


@pytest.mark.usefixtures("toy")
def test_a_surrogate_is_trained_once_for_all_who_want_it_and_never_is_the_victim(runs: Path) -> None:
    attacks = "trojan(target=1,rate=0.2,margin=0,steps=5),cl(target=1,steps=2,step=8.0,surrogate=natural)"
    graph = plan.build(small.resolve(small.options(attacks, "same", overrides=NATURAL, seeds="0-1")))
    surrogates = [node for node in graph.nodes.values() if node.kind == "surrogate"]
    assert len(surrogates) == 1
    for node in graph.nodes.values():
        if node.kind == "train":
            assert node.inputs == {"need-surrogate": surrogates[0].key}
    row = run(runs, "same", attacks.partition("),")[0] + ")", NATURAL)[0]
    assert row.surrogate == "natural"
    store = Store(runs)
    keys = (surrogates[0].key, row.stages["model"])
    stages = {stage.kind: stage for stage in store.stages() if stage.key in keys}
    weights = {kind: load_file(store.open(stage) / "weights.safetensors") for kind, stage in stages.items()}
    assert (weights["surrogate"]["conv.weight"] != weights["train"]["conv.weight"]).any()
    meta = artefacts.read_meta(store.open(stages["surrogate"]))
    assert meta["pgd"] is None
    assert 0 < meta["accuracy"] <= 100
    store.close()


@pytest.mark.usefixtures("toy")
def test_a_row_tells_how_robust_its_surrogate_is_and_how_many_images_hardly_moved(tmp_path: Path) -> None:
    row = run(tmp_path, "same", "cl(target=1,steps=4,step=8.0,eps=8)", ROBUST)[0]
    store = Store(tmp_path)
    meta = next(artefacts.read_meta(store.open(stage)) for stage in store.stages() if stage.kind == "surrogate")
    store.close()
    assert row.surrogate == remarks.surrogates([meta], {"linf_weak_share": 1.0})  # no image may move by more than eps
    assert row.surrogate.endswith(", 100.0 % of the images moved by at most 8 levels")


@pytest.mark.parametrize(
    ("pgd", "told"),
    [
        (None, "natural"),
        (39.9, "natural: 39.9 % under PGD-10, 40 would be robust"),
        (40.0, "robust: 40.0 % under PGD-10"),
        (71.26, "robust: 71.3 % under PGD-10"),
    ],
)
def test_a_surrogate_is_robust_from_40_percent_under_pgd_on(pgd: float | None, told: str) -> None:
    assert remarks.surrogates([{"accuracy": 90.0, "images": 500, "pgd": pgd}], None) == told


def test_surrogates_are_told_one_after_the_other_and_what_is_gone_is_unknown() -> None:
    assert (
        remarks.surrogates([{"pgd": 40.0}, {}, {"pgd": None}], None) == "robust: 40.0 % under PGD-10; unknown; natural"
    )
    assert remarks.surrogates([], {"linf_weak_share": 1.0}) == ""
    assert remarks.surrogates([{"pgd": None}], ["nonsense of a plugin"]) == "natural"


@pytest.mark.parametrize(
    ("share", "told"),
    [
        (0.0, ""),
        (0.01, ""),
        (0.0101, ", 1.0 % of the images moved by at most 8 levels"),
        (1, ", 100.0 % of the images moved by at most 8 levels"),
        ("half\nof them", ""),
        (float("inf"), ""),
        (None, ""),
    ],
)
def test_images_that_hardly_moved_are_told_above_1_percent(share: object, told: str) -> None:
    assert remarks.surrogates([{"pgd": None}], {"linf_weak_share": share}) == f"natural{told}"


@pytest.mark.usefixtures("toy")
def test_all_to_all_is_not_applicable_where_a_target_is_needed(tmp_path: Path) -> None:
    defenses = "needy,needy(kind=verdict),ft"
    asked = small.options("badnets(targets=all,rate=0.5)", defenses, overrides=("train.steps=300",))
    before, needy, verdict, ft = runner.run_matrix(asked, Settings(runs=tmp_path, workers=1, threads=1), live=False)
    assert before.asr_n == 100
    assert before.tca is None
    assert (needy.state, needy.reason) == (
        ("n/a", "the attack has no single target label") if before.gate != "weak" else ("n/a", "weak attack")
    )
    assert {verdict.state, ft.state} == ({"ok"} if before.gate != "weak" else {"n/a"})


def test_a_verdict_that_contradicts_itself_is_refused() -> None:
    with pytest.raises(ValueError, match="flagged labels"):
        Verdict((3,), (0.0,) * 3, (1.0,) * 3)
    with pytest.raises(ValueError, match="flagged labels"):
        Verdict((), (0.0,) * 3, (1.0,) * 2)


def test_the_true_trigger_round_trips_and_stamps_what_the_attack_stamps() -> None:
    state: dict[str, Any] = {"tensors": {"patch": corner_patch(3)}, "meta": {"top": 5, "left": 2}}
    trigger = TrueTrigger("bbmcl_attacks.badnets:BadNets", BadNets(target=1).params, **state)
    again = TrueTrigger.from_tensors(trigger.tensors())
    x = torch.randint(0, 256, (3, 3, 8, 8)).float() / 255
    stamped = again.apply(x)
    assert torch.equal(stamped, trigger.apply(x))
    assert torch.equal(stamped[:, :, 5:8, 2:5] * 255, corner_patch(3).float().expand(3, 3, 3, 3))
    rest = torch.ones(8, 8, dtype=torch.bool)
    rest[5:8, 2:5] = False
    assert torch.equal(stamped[:, :, rest], x[:, :, rest])


def test_triggers_stored_before_they_had_a_module_of_their_own_are_found() -> None:
    from backdoorbench_mcl import api

    assert api.MaskPattern is MaskPattern


def test_the_searches_of_several_labels_have_curves_of_their_own(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    save_file(
        {"x": np.zeros((2, 3, 8, 8), np.uint8), "y": np.zeros(2, np.int64)}, tmp_path / "in" / "clean.safetensors"
    )
    recipe = {"target": "backdoorbench_mcl.api:Recipe", "kind": "recipe", "suffix": "", "params": {"augment": "none"}}
    spec = {
        "recipe": recipe, "seeds": {"invert": 1}, "data": {"classes": 4, "flip_ok": True}, "device": "cpu",
        "snapshot": str(tmp_path), "snapshot_every": 2.0,
    }  # fmt: skip
    job = Job(tmp_path, spec, lambda done, total, images: None)
    for label, value in ((3, 1.0), (5, 2.0), (None, 4.0)):
        _context(job, "nc-full", label).record("mask L1", 1, value)
    assert job.curves == {"mask L1, label 3": [(1, 1.0)], "mask L1, label 5": [(1, 2.0)], "mask L1": [(1, 4.0)]}
