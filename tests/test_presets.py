"""Presets against the specification: the numbers that `paper`, `authors` and `clean` stand for (spec 0.2, 0.3, 4.9)."""

from __future__ import annotations

import pytest
from tiny import one_thread as one_thread

from backdoorbench_mcl import evaluate, victims
from backdoorbench_mcl.api import Method, Recipe
from backdoorbench_mcl.presets import BUDGETS, PRESETS, settings
from bbmcl_attacks.badnets import BadNets
from bbmcl_attacks.blend import Blend
from bbmcl_attacks.cl import CL
from bbmcl_attacks.none import NoAttack
from bbmcl_attacks.sig import Sig
from bbmcl_attacks.trojan import Trojan
from bbmcl_defenses.ft import FT
from bbmcl_defenses.ibau import IBAU
from bbmcl_defenses.mcldef import MCLDef
from bbmcl_defenses.mcldef_plus import MCLDefPlus
from bbmcl_defenses.nad import NAD
from bbmcl_defenses.nc import NC
from bbmcl_inverters.mesa import MESA
from bbmcl_inverters.nc_box import NCBox
from bbmcl_inverters.nc_full import NCFull
from bbmcl_inverters.pixel import Pixel
from bbmcl_inverters.uap import UAP

CIFAR, GTSRB = 50_000, 26_640  # training images


def rates(recipe: Recipe, images: int) -> list[tuple[int, float]]:
    """The schedule as (epoch, learning rate) at each change; it may change between epochs only."""
    per_epoch, total = -(-images // recipe.batch), recipe.total(images)
    out: list[tuple[int, float]] = []
    for step in range(total):
        rate = round(recipe.lr_at(step, total), 9)
        if not out or out[-1][1] != rate:
            assert step % per_epoch == 0
            out.append((step // per_epoch, rate))
    return out


@pytest.mark.parametrize(
    ("preset", "epochs", "augment", "nesterov", "schedule"),
    [
        ("paper", 50, "none", False, [(0, 0.1), (20, 0.01), (30, 0.001)]),
        ("authors", 50, "none", True, [(0, 0.1), (20, 0.001), (29, 0.0009)]),
        ("clean", 100, "crop+flip", False, [(0, 0.1), (20, 0.01), (70, 0.001)]),
    ],
)
def test_victims_on_cifar10(
    preset: str, epochs: int, augment: str, nesterov: bool, schedule: list[tuple[int, float]]
) -> None:
    recipe = Recipe(**settings(preset, "full", "cifar10")["train"])  # type: ignore[arg-type]
    assert (recipe.epochs, recipe.steps, recipe.augment, recipe.nesterov) == (epochs, None, augment, nesterov)
    assert (recipe.batch, recipe.momentum, recipe.weight_decay) == (64, 0.9, 1e-4)
    assert rates(recipe, CIFAR) == schedule
    assert recipe.total(CIFAR) == 782 * epochs


@pytest.mark.parametrize("preset", PRESETS)
def test_repairs_follow_the_table_of_the_code(preset: str) -> None:
    recipe = Recipe(**settings(preset, "full", "cifar10")["defend"])  # type: ignore[arg-type]
    assert (recipe.epochs, recipe.batch, recipe.momentum, recipe.weight_decay) == (20, 64, 0.9, 1e-4)
    assert recipe.augment == "crop+flip"
    assert recipe.total(2500) == 800
    assert rates(recipe, 2500) == [(0, 0.1), (1, 0.01), (10, 0.001)]
    slow = Recipe(**settings(preset, "full", "gtsrb")["defend"])  # type: ignore[arg-type]
    assert rates(slow, 1332) == [(0, 0.01), (2, 0.001), (10, 0.0001)]
    assert slow.total(1332) == 21 * 20
    assert Recipe(**settings(preset, "full", "gtsrb")["train"]).lr == 0.01  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        (BadNets(), {"target": 5, "rate": 0.1, "margin": 0, "size": 3, "targets": "one"}),
        (
            Blend(),
            {"target": 5, "rate": 0.1, "alpha": 0.1, "colours": "random", "pattern": "auto", "targets": "one"},
        ),
        (NoAttack(), {"target": 5}),
        (FT(), {"nesterov": True, "lr": None, "epochs": None, "steps": None}),
        (
            NCBox(),
            {
                "lr": 0.005, "lam": 0.01, "epochs": 100, "steps": None, "patience": 30, "batch": 64, "box": "pixel",
                "binarize": "none",
            },
        ),
        (
            MCLDef(),
            {
                "inverter": "nc-box", "target": "given", "detector": "nc-full", "temperature": 0.5,
                "clean_anchor": 0.0, "exclude_target_class": False,
                "exclude_negative_on_target": False, "ce": 0.0, "bn_refresh": False, "nesterov": False, "lr": None,
                "epochs": None, "steps": None,
            },
        ),
        (Sig(), {"target": 5, "rate": 0.08, "delta": 20.0, "frequency": 6.0, "form": "clean"}),
        (
            CL(),
            {
                "target": 5, "rate": 0.08, "eps": 16.0, "step": 1.5, "steps": 100, "surrogate": "robust",
                "corners": "one", "place": "corner",
            },
        ),
    ],
)  # fmt: skip
def test_defaults_of_the_classes_are_preset_paper(method: Method, expected: dict[str, object]) -> None:
    assert method.params == expected
    assert not settings("paper", "full", "cifar10").get(method.name)


@pytest.mark.parametrize(
    ("method", "printed"),
    [
        (Trojan(), {"rate": 0.1, "size": 3, "margin": 4, "n_neuron": 2, "value": 100.0, "mode": "replace"}),  # spec 4.2
        (NC(), {"inverter": "nc-box", "share": 0.2, "nesterov": False}),  # 5.4
        (NAD(), {"power": 2.0, "betas": (500.0, 1000.0, 1000.0), "teacher_epochs": 10, "schedule": "nad"}),  # 9.2
        (IBAU(), {"rounds": 5, "iterations": 5, "batch": 100, "lr": 1e-3, "radius": 10.0, "clamp": False}),  # 9.3
        (
            IBAU(),
            {"patched_share": 0.01, "delta_lr": 10.0, "delta_optimiser": "sgd", "weight": 1e-3, "inner_step": 0.1},
        ),
        (MCLDefPlus(), {"inverter": "nc-box", "epochs": 10, "lr": 0.001, "nesterov": False}),  # 7
        (NCFull(), {"lr": 0.1, "steps": 1000, "images_per_step": 1000, "cost": 1e-3, "success": 0.99}),  # 5.2
        (NCFull(), {"patience": 5, "multiplier": 2.0, "early_ratio": 1.0, "early_patience": 25, "outlier": 2.0}),
        (Pixel(), {"lr": 0.1, "cost": 1e-3, "success": 0.9, "patience": 10, "multiplier": 1.5, "epochs": 100}),  # 8.4
        (UAP(), {"lr": 0.01, "weight": 0.02, "epochs": 40}),  # 6.5
        (MESA(), {"alpha": 0.1, "betas": (0.9,), "batch": 128, "lr": 2e-4, "width": 512, "noise": 0.1}),  # 8.3
        (MESA(), {"epochs": 40}),
    ],
)
def test_constants_of_the_specification(method: Method, printed: dict[str, object]) -> None:
    assert {name: method.params[name] for name in printed} == printed
    assert not settings("paper", "full", "cifar10").get(method.name)


def test_authors_and_clean_differ_from_paper_in_named_ways_only() -> None:
    paper, authors, clean = (settings(preset, "full", "cifar10") for preset in PRESETS)
    assert set(paper) == {"train", "natural", "robust", "defend"}
    assert {name: authors[name] for name in set(authors) - set(paper)} == {
        "nc-box": {"box": "normalized"},
        "blend": {"alpha": 0.2, "colours": "grey"},
        "sig": {"form": "wrapped"},
        "trojan": {"mode": "wrap"},
    }
    # not bn_refresh: ADR 0012; clean_anchor: ADR 0015
    assert {name: clean[name] for name in set(clean) - set(paper)} == {
        "cl": {"place": "centre"},
        "mcldef": {"clean_anchor": 1.0},
    }


def test_surrogates_are_trained_and_judged_as_the_specification_says() -> None:
    """Spec 4.2 and 4.4: 5-10 clean epochs; PGD training with eps 8, step 2, 10 inner steps; 40 % under PGD-10."""
    paper = settings("paper", "full", "cifar10")
    natural, robust = Recipe(**paper["natural"]), Recipe(**paper["robust"])
    assert (natural.epochs, natural.pgd_eps) == (10, 0.0)
    assert (robust.epochs, robust.pgd_eps, robust.pgd_step, robust.pgd_steps) == (15, 8.0, 2.0, 10)
    assert (victims.PGD_STEPS, victims.PGD_EPS, victims.PGD_STEP) == (10, 8 / 255, 2 / 255)
    assert evaluate.ROBUST == 40.0
    for name in ("natural", "robust"):  # as their victims
        assert settings("paper", "full", "gtsrb")[name]["lr"] == 0.01


def test_imagenet_is_attacked_and_repaired_as_printed() -> None:
    paper, authors = settings("paper", "full", "imagenet20"), settings("authors", "full", "imagenet20")
    victim = Recipe(**paper["train"])
    assert (victim.epochs, victim.batch, victim.augment) == (100, 32, "resized-crop+flip")
    assert rates(victim, 26_000) == [(0, 0.1), (20, 0.01), (70, 0.001)]
    assert Recipe(**paper["defend"]).total(1300) == 21 * 20
    assert BadNets(**paper["badnets"]).params["size"] == 32
    assert (Trojan(**paper["trojan"]).size, Trojan(**paper["trojan"]).margin) == (32, 12)
    assert NCBox(**paper["nc-box"]).lam == 0.001
    assert paper["blend"]["alpha"] == 0.2
    assert paper["nad"] == {"schedule": "shared"}
    assert paper["defend"]["augment"] == "resized-crop+flip"
    assert authors["badnets"] == {"size": 32, "margin": 11}
    assert authors["resnet18"] == {"stem": "cifar", "feature": "grid"}
    assert authors["blend"]["alpha"] == 0.2
    assert "mode" not in authors["trojan"]


@pytest.mark.parametrize(
    ("preset", "dataset", "images", "augment", "schedule"),
    [
        ("paper", "gtsrb", 26_640, "none", [(0, 0.01), (20, 0.001), (30, 0.0001)]),
        ("authors", "gtsrb", 26_640, "none", [(0, 0.01), (20, 0.0001), (29, 0.00009)]),
        ("clean", "gtsrb", 26_640, "crop+flip", [(0, 0.01), (20, 0.001), (70, 0.0001)]),
        ("paper", "imagenet20", 26_000, "resized-crop+flip", [(0, 0.1), (20, 0.01), (70, 0.001)]),
        ("authors", "imagenet20", 26_000, "resized-crop+flip", [(0, 0.1), (20, 0.01), (70, 0.001)]),
        ("clean", "imagenet20", 26_000, "resized-crop+flip", [(0, 0.1), (20, 0.01), (70, 0.001)]),
    ],
)
def test_what_holds_for_a_data_set_beats_what_a_preset_says_of_all(
    preset: str, dataset: str, images: int, augment: str, schedule: list[tuple[int, float]]
) -> None:
    recipe = Recipe(**settings(preset, "full", dataset)["train"])  # type: ignore[arg-type]
    assert recipe.augment == augment
    assert rates(recipe, images) == schedule


def test_signs_are_read_as_each_preset_says() -> None:
    assert [settings(preset, "full", "gtsrb").get("gtsrb") for preset in PRESETS] == [
        None, {"colour": "bgr"}, {"flip": False},
    ]  # fmt: skip


@pytest.mark.parametrize("preset", PRESETS)
def test_budgets_change_only_how_much_is_done(preset: str) -> None:
    full, mid, quick = (settings(preset, budget, "cifar10") for budget in BUDGETS)  # type: ignore[arg-type]
    assert mid == {
        **full,
        "train": {**full["train"], "epochs": 15},
        "natural": {**full["natural"], "epochs": 5},
        "robust": {**full["robust"], "epochs": 10, "pgd_steps": 1, "pgd_step": 10.0},
        "nc-full": {"steps": 100},
    }
    changed = {
        name: {key for key, value in quick[name].items() if full.get(name, {}).get(key) != value} for name in quick
    }
    assert {name: keys for name, keys in changed.items() if keys} == {
        **{name: {"steps"} for name in ("train", "defend", "nc-box", "natural", "pixel", "uap", "mesa")},
        "nc-full": {"steps", "images_per_step", "coarse_steps", "patience"},
        "robust": {"steps", "pgd_steps", "pgd_step"},
        "ibau": {"round_steps"},
    }


@pytest.mark.parametrize("preset", PRESETS)
def test_the_toy_learns_its_blend_under_every_preset(preset: str) -> None:
    """docs/shapes.md: fainter patches stay below the gate on `shapes`, so that no defense would run there."""
    assert settings(preset, "quick", "shapes")["blend"]["alpha"] == 0.9  # type: ignore[arg-type]


def test_none_on_the_command_line_is_the_word_where_there_is_one() -> None:
    assert Recipe(augment=None).augment == "none"  # type: ignore[arg-type]  # what `--set defend.augment=none` reads as
    assert Recipe(augment="none", epochs=3).params["augment"] == "none"
    assert Recipe(steps=None).params["steps"] is None
