"""Scans and repairs of a model in memory, and what is made of their numbers."""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import handed_toy as toy
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import backdoorbench_mcl
from backdoorbench_mcl import runner
from backdoorbench_mcl.audit import live, opened, purify, stages
from backdoorbench_mcl.audit.chain import Chain
from backdoorbench_mcl.audit.handed import Handed, HandedGrants
from backdoorbench_mcl.audit.purify import ClassAccuracy, Judgement, Repair
from backdoorbench_mcl.audit.scan import Scan
from backdoorbench_mcl.audit.stages import How, Stages
from backdoorbench_mcl.errors import UserError
from backdoorbench_mcl.registry import Described, Registry
from backdoorbench_mcl.store import Store

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
CHEAP = {"nc-box.steps": 250, "uap.steps": 60}
MODEL = Described("model", "net", "net", "torch.nn:Module", "", {}, 1, "net", {"name": "net"})


@pytest.fixture(scope="module")
def known(toy_env: dict[str, str]) -> Iterator[Registry]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BBMCL_CACHE", toy_env["BBMCL_CACHE"])
        yield runner.registry(jobs=False)


@pytest.fixture
def handed(tmp_path: Path) -> Handed:
    x, y = toy.images(60, 5)
    return Handed(
        tmp_path, MODEL, "ab", toy.CLASSES, (3, 8, 8), (0.0,) * 3, (1.0,) * 3, True, x.numpy(), y.numpy(),
        np.arange(40), np.arange(40, 60), "cd", tuple("abcdefgh"),
    )  # fmt: skip


# ---------------------------------------------------------------- in memory


@pytest.fixture(scope="module")
def scanned(tmp_path_factory: pytest.TempPathFactory) -> tuple[Scan, Path]:
    runs = tmp_path_factory.mktemp("scan") / "runs"
    x, y = toy.images(300, 5)
    return live.scan(toy.trained(True), x, y, budget="quick", set=CHEAP, runs=runs), runs


def test_a_backdoor_is_found_with_its_label_and_its_trigger(scanned: tuple[Scan, Path]) -> None:
    found, _ = scanned
    assert (found.call, found.target, found.kind) == ("suspicious", toy.TARGET, "patch")
    assert found.chance is not None and found.chance < 0.01
    best = found.full[0]
    assert best.mask is not None and best.label == toy.TARGET and (best.success or 0) > 90
    x, y = toy.images(200, 6)
    stamped = torch.from_numpy(best.apply(x.numpy())).float() / 255
    others = y != toy.TARGET
    with torch.no_grad():
        hits = toy.trained(True)(stamped).argmax(1)[others] == toy.TARGET
    assert 100 * float(hits.float().mean()) > 85, "new images go there too"
    assert len(found.labels) == len(found.triggers) == 2 * toy.CLASSES
    assert found.as_dict()["target"] == toy.TARGET


def test_a_clean_network_is_called_clean() -> None:
    x, _ = toy.images(300, 5)
    found = live.scan(toy.trained(False), x.numpy(), budget="quick", set=CHEAP)
    assert (found.call, found.target) == ("clean", None)


def test_purify_removes_the_backdoor_and_leaves_the_callers_network_alone(scanned: tuple[Scan, Path]) -> None:
    found, runs = scanned
    net = toy.trained(True)
    before = copy.deepcopy(net.state_dict())
    state, numbers = torch.get_rng_state(), np.random.get_state()[1].copy()  # type: ignore[index]
    x, y = toy.images(300, 5)
    made = live.purify(net, x, y, budget="quick", set=CHEAP, runs=runs)
    assert made.target == toy.TARGET and made.scan is not None and made.defense == "mcldef"
    assert made.scan.labels == found.labels, "the searches were kept"
    assert toy.asr(net) > 99 and all(torch.equal(net.state_dict()[name], value) for name, value in before.items())
    assert torch.equal(torch.get_rng_state(), state)
    assert np.array_equal(np.random.get_state()[1], numbers)  # type: ignore[index]
    assert type(made.model) is type(net) and not made.model.training
    assert toy.accuracy(made.model) > 90
    told = made.judgement
    assert told.images == 60 and (told.success_before or 0) > 90 and (told.success_after or 100) < 25
    assert told.ba_before == pytest.approx(100, abs=2) and len(told.classes) == toy.CLASSES


def test_a_given_target_needs_no_scan_and_labels_are_learnt_from() -> None:
    x, y = toy.images(200, 5)
    made = live.purify(toy.trained(True), x, y, target=toy.TARGET, defense="nc", budget="quick", set=CHEAP)
    assert made.scan is None and made.defense == "nc"
    assert (made.judgement.success_after or 0) < (made.judgement.success_before or 0)
    assert toy.asr(made.model) < 20 and toy.accuracy(made.model) > 90


def test_the_example_runs(capsys: pytest.CaptureFixture[str]) -> None:
    spec = importlib.util.spec_from_file_location("handed", EXAMPLES / "handed.py")
    assert spec is not None and spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    made = example.main(steps=2, count=20, target=3, budget="quick", set={"nc-box.steps": 2, "defend.steps": 2})
    assert type(made.model).__name__ == "ShuffleNetV2"
    assert "after: right" in capsys.readouterr().out


def test_the_functions_are_offered_by_the_package() -> None:
    assert backdoorbench_mcl.scan is live.scan and backdoorbench_mcl.purify is live.purify


@pytest.mark.parametrize(
    "change, line",
    [
        ({"images": np.zeros((4, 8, 8), np.uint8)}, r"images: expected at least 2 as \(N, C, H, W\), got uint8"),
        ({"images": np.full((4, 3, 8, 8), 2.0)}, r"floats from 0 to 1, got float64 from 2 to 2"),
        ({"labels": np.zeros(3, np.int64)}, r"labels: expected 40 integers from 0 to 7, got int64 \(3,\)"),
        ({"mean": (0.5, 0.5), "std": (1.0, 1.0)}, r"expected 1 or 3 numbers each"),
        ({"mean": (0.5,), "std": (0.0,)}, r"std above 0"),
        ({"labels": np.full(40, 99)}, r"labels: expected 40 integers from 0 to 7"),
        ({"hold_out": 0.99}, r"expected a share from 0 to 0.9"),
        ({"hold_out": -0.5}, r"expected a share from 0 to 0.9"),
        ({"budget": "tiny"}, r"tiny"),
        ({"set": {"nc-box.stepz": 3}}, r"no parameter 'stepz'"),
        ({"model": nn.Sequential(nn.Flatten(), nn.Linear(192, 8), nn.ReLU())}, r"its logits are not what one last"),
        ({"model": nn.Sequential(nn.Flatten(), nn.Linear(99, 8))}, r"no forward pass with images of 3x8x8"),
    ],
)  # fmt: skip
def test_misuse_of_the_functions_is_one_line(change: dict[str, Any], line: str) -> None:
    x, y = toy.images(40, 5)
    asked = {"model": toy.trained(False), "images": x, "labels": y, "budget": "quick", **change}
    with pytest.raises(UserError, match=line) as caught:
        live.scan(**asked)
    assert "\n" not in str(caught.value)


def test_misuse_of_purify_is_one_line() -> None:
    x, y = toy.images(40, 5)
    with pytest.raises(UserError, match="target=8: the model has the labels 0 to 7"):
        live.purify(toy.trained(False), x, y, target=8)
    with pytest.raises(UserError, match="ft learns from labels, and the clean images have none"):
        live.purify(toy.trained(False), x, target=1, defense="ft")
    with pytest.raises(UserError, match="is told the trigger, which nobody knows"):
        live.purify(toy.trained(False), x, y, target=1, defense="mcldef(inverter=true)")
    with pytest.raises(UserError, match="did you mean 'mcldef'"):
        live.purify(toy.trained(False), x, y, target=1, defense="mcldeff")


# ---------------------------------------------------------------- numbers


def test_a_judgement_is_what_a_slow_count_gives(handed: Handed) -> None:
    rng = np.random.Generator(np.random.PCG64(3))
    told = {name: rng.integers(0, 8, 20) for name in ("before", "after", "before.3", "after.3")}
    found = purify.judge(handed, told, 3)
    y = handed.y[handed.held]
    right = [int(a == b) for a, b in zip(told["after"], y, strict=True)]
    sent = [int(t == 3) for t, clean in zip(told["after.3"], told["after"], strict=True) if clean != 3]
    floor = [int(a == 3) for a, b in zip(told["after"], y, strict=True) if b != 3]
    same = [int(a == b) for a, b in zip(told["after"], told["before"], strict=True)]
    assert found.ba_after == pytest.approx(100 * sum(right) / 20)
    assert found.success_after == pytest.approx(100 * sum(sent) / len(sent))
    assert found.floor_after == pytest.approx(100 * sum(floor) / len(floor))
    assert found.agreement == pytest.approx(100 * sum(same) / 20)
    assert sum(one.images for one in found.classes) == 20
    for label in np.unique(told["before"]):  # without labels, what the model says is the class
        told["after"][told["before"] == label] = (label + 1) % 8
    unlabelled = purify.judge(replace(handed, y=np.full(60, -1)), told, 3)
    assert unlabelled.ba_after is None and unlabelled.classes == () and unlabelled.agreement == 0
    many = [label for label in range(8) if (told["before"] == label).sum() >= purify.LEAST]
    assert list(unlabelled.gone) == many and many
    assert purify.judge(handed, {}, 3) == Judgement(0)


def repair(defense: str, ba: float, success: float, gone: bool = False, failed: bool = False) -> Repair:
    classes = (ClassAccuracy(0, 10, 80.0, 1.0 if gone else 70.0),)
    told = Judgement(100, 90.0, 90.0, ba, classes, 99.0, success, 1.0, (0,) * gone)
    return Repair(defense, 3, None if failed else Path(), Judgement(0) if failed else told, 1.0, False, "bad" * failed)


def test_repairs_are_ranked_by_what_is_gone_and_what_is_left() -> None:
    good, weak, dear = repair("good", 89, 2), repair("weak", 90, 90), repair("dear", 60, 1)
    gone, failed = repair("gone", 90, 0, gone=True), repair("failed", 0, 0, failed=True)
    assert [one.defense for one in purify.ranked([failed, gone, weak, dear, good])] == [
        "good", "dear", "weak", "gone", "failed",
    ]  # fmt: skip
    assert good.judgement.score == pytest.approx((97 - 1 + 100) / 2)


@given(st.integers(3, 5000), st.floats(0, 0.9), st.integers(0, 3))
def test_images_are_held_out_once_and_for_all(total: int, share: float, seed: int) -> None:
    try:
        repair_part, held = opened.split(total, share, seed)
    except UserError:
        assert total - max(1, round(total * share)) < 2
        return
    assert sorted([*repair_part.tolist(), *held.tolist()]) == list(range(total))
    assert len(held) == (max(1, round(total * share)) if share > 0 else 0)
    again = opened.split(total, share, seed)
    assert np.array_equal(again[0], repair_part) and np.array_equal(again[1], held)


def test_images_are_taken_in_the_size_that_weights_fit() -> None:
    assert opened.taken((48, 32), [32, 64, 96, 224]), "a network that takes all sizes takes any"
    assert opened.taken((96, 96), [96, 224]) and not opened.taken((64, 64), [32]) and not opened.taken((32, 64), [32])
    assert opened.preferred([96, 224]) == 224 and opened.preferred([32, 64, 96, 224]) == 32
    assert opened.preferred([224, 32, 64, 96]) == 224


def test_grey_is_the_luminance() -> None:
    x = np.zeros((1, 3, 1, 2), np.uint8)
    x[0, :, 0, 0], x[0, :, 0, 1] = (255, 255, 255), (255, 0, 0)
    assert opened.luminance(x).tolist() == [[[[255, 76]]]]


def test_the_weight_of_a_mask_meets_both_sizes_of_the_paper() -> None:
    assert stages.mask_weight(32 * 32) == stages.mask_weight(28 * 28) == 0.01
    assert stages.mask_weight(224 * 224) == pytest.approx(0.001)
    assert 0.001 < stages.mask_weight(96 * 96) < 0.01


# ---------------------------------------------------------------- stages


def test_a_scan_and_a_repair_name_the_same_search(known: Registry, handed: Handed) -> None:
    found = Stages(known, handed, How(), ["nc-box"], ["mcldef"])
    search, repaired = found.invert("nc-box", 3), found.defend("mcldef", 3)
    assert search in found.nodes[repaired].inputs.values()
    assert found.invert("nc-box", 4) != search


SWAPPED = np.array([1, 0, *range(2, 40)])


@pytest.mark.parametrize(
    "change",
    [
        {"repair": np.arange(39)}, {"repair": SWAPPED}, {"sha256": "ef"}, {"flip_ok": False}, {"mean": (0.5,) * 3},
        {"y": np.zeros(60, np.int64)}, {"model": replace(MODEL, identity={"name": "other"})},
    ],
    ids=lambda change: next(iter(change)),
)  # fmt: skip
def test_whatever_a_search_or_a_repair_sees_is_in_its_key(
    known: Registry, handed: Handed, change: dict[str, Any]
) -> None:
    def keys(one: Handed) -> list[str]:
        found = Stages(known, one, How(), ["nc-box"], ["ft"])
        return [found.invert("nc-box", 3), found.defend("ft", 3)]

    before, after = keys(handed), keys(replace(handed, **change))
    assert not set(before) & set(after)
    assert keys(replace(handed, held=np.arange(41, 60), names=None)) == before, "what it does not see is not"


class Shifted(nn.Module):
    """A network that keeps a number where no state dict has it."""

    def __init__(self, shift: float) -> None:
        super().__init__()
        self.net = toy.network()
        self.shift = shift

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.net(x + self.shift)
        return out


def test_networks_in_memory_are_told_apart_by_what_they_compute() -> None:
    x, _ = toy.images(20, 5)
    one, other = Shifted(0.0), Shifted(0.3)
    other.load_state_dict(one.state_dict())
    way = live._Way((0.0,), (1.0,), 0.2, 0, True, "clean", "quick", "fp32", {}, None, lambda line: None)
    keys = []
    for net in (one, other, one):
        with live._Live(net, x, None, way) as opened_one:
            keys.append(opened_one.handed.key)
    assert keys[0] == keys[2] != keys[1]


def test_steps_of_full_searches_are_bounded_unless_somebody_says_otherwise(known: Registry, handed: Handed) -> None:
    assert stages.settings(How(), handed)["nc-box"]["steps"] == 1000
    assert stages.settings(How(budget="quick"), handed)["nc-box"]["steps"] == 600
    found = Stages(known, handed, How(overrides=("nc-box.epochs=7",)), ["nc-box"])
    node = found.nodes[found.invert("nc-box", 1)]
    assert node.methods["inverter"].params["epochs"] == 7 and node.methods["inverter"].params["steps"] is None


def test_a_repair_takes_the_inverter_of_the_kind_that_was_found(known: Registry) -> None:
    assert purify.suited(known, "mcldef", "additive") == "mcldef(inverter=uap)"
    assert purify.suited(known, "mcldef(temperature=0.1)", "additive") == "mcldef(temperature=0.1,inverter=uap)"
    assert purify.suited(known, "mcldef(inverter=pixel)", "additive") == "mcldef(inverter=pixel)"
    assert purify.suited(known, "mcldef", "patch") == purify.suited(known, "mcldef", None) == "mcldef"
    assert purify.suited(known, "ft", "additive") == "ft"
    assert purify.suited(known, "mcldef", "additive", ["mcldef.inverter=pixel"]) == "mcldef"
    assert purify.suited(known, " mcldef(temperature=0.1) ", "additive") == "mcldef(temperature=0.1,inverter=uap)"


def test_all_means_what_can_be_used(known: Registry) -> None:
    labelled, without = purify.usable(known, True), purify.usable(known, False)
    assert {"mcldef", "ft", "nc", "nad", "ibau"} <= set(labelled)
    assert "mcldef" in without and "ft" not in without


# ---------------------------------------------------------------- the chain


class Stuck:
    """An engine that must not be asked."""

    spreads = False
    free = 1

    def start(self, folder: Path) -> None:
        raise AssertionError("nothing was to be started")

    def events(self, patience: float = 0.1) -> list[Any]:
        return []

    def close(self) -> None:
        return


def test_two_drivers_do_not_compute_the_same(known: Registry, handed: Handed, tmp_path: Path) -> None:
    found = Stages(known, handed, How(), ["nc-box"])
    key = found.invert("nc-box", 3)
    store = Store(tmp_path / "runs")
    claim = store.claim(key)
    assert claim is not None
    grants = stages_grants(handed, store)
    chain = Chain(handed.key, tmp_path, store, grants, Stuck())
    with pytest.raises(UserError, match="another bbmcl is computing the same"):
        chain.compute(found.nodes, [key])
    claim.release()
    store.close()


def stages_grants(handed: Handed, store: Store) -> Any:
    return HandedGrants(handed, store, device="cpu", precision="fp32", threads=1, isolation="inline")
