"""Each check of the conformance suite fails on its deliberate offender, and says what is wrong."""

from __future__ import annotations

import os
import sys
import types
from pathlib import Path
from typing import Any

import offending as o
import pytest
import torch
from tiny import one_thread

from backdoorbench_mcl import api, testing
from backdoorbench_mcl.templates import defense, inverter
from backdoorbench_mcl.testing import CheckFailed, Skipped, Subject, toys
from bbmcl_attacks.badnets import BadNets
from bbmcl_datasets.shapes import Shapes

__all__ = ["one_thread"]


OFFENCES: list[tuple[str, Any, str]] = [
    ("constructs_without_arguments", o.Untyped, "parameter 'lr' needs a type annotation"),
    ("constructs_without_arguments", o.Lax, "the default lr=-0.1 is not what its annotation allows"),
    ("constructs_without_arguments", o.Demanding, "lr must be given, expected a default"),
    ("rebuilds_from_its_spec", o.Alphabet, "on the way through JSON"),
    ("rebuilds_from_its_spec", o.Growing, "`added` names momentum, no parameter of the constructor"),
    ("has_a_card", o.Cardless, "the module cardless has no docstring"),
    ("deterministic", o.Moody, "conv1.weight differ between two runs with equal seeds"),
    ("leaves_global_state_alone", o.Seeder, "seeded the global generator of numpy, torch"),
    ("leaves_global_state_alone", o.Settler, "changed threads, environment for the whole process"),
    ("stamp_keeps_dtype_range_and_shape", o.Inplace, "stamp() wrote to its input"),
    ("stamp_keeps_dtype_range_and_shape", o.Floats, "into torch.float32 (1, 3, 32, 32); return uint8"),
    ("stamp_keeps_dtype_range_and_shape", o.Invisible, "changed no pixel of 20 images"),
    ("poison_touches_exactly_rate", o.Greedy, "rate=0.2 of 400 images poisoned 160, expected 80"),
    ("poison_touches_exactly_rate", o.Twice, "no distinct places among the 400 training images"),
    ("poison_touches_exactly_rate", o.Scribbler, "poison() wrote to the training set"),
    ("goal_fits_its_labels", o.Boastful, "counts 10 images whose goal is their own label"),
    ("state_can_be_stored", o.Remembering, "stamp() does something else once its state was stored"),
    ("state_can_be_stored", o.Unstorable, "cannot be stored (Object of type Generator is not JSON serializable)"),
    ("trigger_is_learnable", o.Mismatched, "expected at least 90 and 60"),
    ("reads_only_what_it_declared", o.Peeking, "read granted.target, which it did not declare"),
    ("reads_only_what_it_declared", o.Needing, "KeyError 'trigger'; where that is a name of ctx.needs"),
    ("reads_only_what_it_declared", o.Clairvoyant, "knows trigger, which no defense is granted"),
    ("survives_one_clean_image", o.Crowd, "with one clean image it raised IndexError"),
    ("survives_a_restart", o.Forgetful, "conv1.weight differ after a restart from a snapshot"),
    ("survives_a_restart", o.Immortal, "caught the end of its process"),
    ("returns_a_trigger", o.PairInverter, "invert() returned tuple, expected Trigger"),
    ("returns_a_trigger", o.DirtyInverter, "apply() wrote to its input"),
    ("returns_a_trigger", o.HalfInverter, "another one after tensors() and from_tensors()"),
    ("finds_a_planted_patch", o.Blind, "to the planted label, expected 90"),
    ("verdict_covers_every_label", o.Partial, "detect() judged 2 labels, expected all 4"),
    ("returns_a_working_classifier", o.Nothing, "defend() returned NoneType, expected Classifier"),
    ("returns_a_working_classifier", o.Wide, "changed fc.bias, fc.weight of the state dict"),
    ("returns_a_working_classifier", o.Infinite, "conv1.weight of the repaired model is not finite"),
    ("returns_a_working_classifier", o.Hooked, "computes more than the network with its weights"),
    ("returns_a_working_classifier", o.Unbuilt, "rebuild 'nowhere:nothing' cannot be imported"),
    ("returns_a_working_classifier", o.Ruinous, "has BA 25.0 %, expected at least 60"),
    ("keeps_a_clean_model_clean", o.Ruinous, "to 25.0 %, expected to keep all but 15 points"),
    ("embed_and_stages", o.networks(features=o.flat), "expected (B, C, H, W)"),
    ("normalises_by_itself", o.networks(normalise=o.stubborn), "does not normalise with the constants"),
    ("state_dict_is_the_network", o.networks(__init__=o.drawn, head=o.scaled), "a fresh network with the same weights"),
    ("predicts_each_image_by_itself", o.networks(features=o.together), "depend on the others of its batch"),
    ("can_be_trained", o.networks(head=o.half), "no gradient reaches"),
    ("loads_what_it_says", o.Overfull, "train labels run from 1 to 4, `classes` says 0..3"),
    ("loads_what_it_says", o.Grey, "is outside [0, 1]"),
    ("splits_are_apart", o.Same, "40 of 40 test images are training images"),
]  # fmt: skip


@pytest.fixture
def cardless(monkeypatch: pytest.MonkeyPatch) -> None:
    """A module without a docstring."""
    module = types.ModuleType("cardless")
    module.__dict__["Cardless"] = o.Cardless
    monkeypatch.setitem(sys.modules, "cardless", module)


def subject(offender: Any, monkeypatch: pytest.MonkeyPatch) -> Subject:
    """The class under a name that can be imported."""
    name = f"Offender{id(offender)}" if offender.__name__ == "Offender" else offender.__name__
    monkeypatch.setitem(vars(sys.modules[offender.__module__]), name, offender)
    kinds = {"attack": api.Attack, "inverter": api.Inverter, "model": api.Model, "dataset": api.Dataset}
    kind = next((kind for kind, base in kinds.items() if issubclass(offender, base)), "defense")
    return Subject(kind, f"{offender.__module__}:{name}", label=f"my {offender.__name__.lower()}")


@pytest.mark.parametrize(("name", "offender", "message"), OFFENCES, ids=lambda value: getattr(value, "__name__", None))
def test_a_check_fails_on_its_offender(
    name: str, offender: Any, message: str, cardless: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = torch.get_num_threads()
    monkeypatch.setenv("OFFENDED", "no")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]))
    try:
        with pytest.raises(CheckFailed) as caught:
            getattr(testing, f"check_{name}")(subject(offender, monkeypatch))
    finally:
        torch.set_num_threads(before)
    line = str(caught.value)
    assert message in line
    assert "\n" not in line


READER = """
from pathlib import Path
from backdoorbench_mcl.api import Defense, Repaired
from backdoorbench_mcl.templates import attack

class Reader(Defense):
    name = "reader"
    def defend(self, model, ctx):
        Path("/etc/hostname").read_text()
        return model

class Late(Defense):
    name = "late"
    def defend(self, model, ctx):
        Late.repaired_here = True
        return Repaired(model, "reading_methods:again", {})

def again(model):
    if not hasattr(Late, "repaired_here"):
        Path("/etc/hostname").read_text()
    return model

class Stamper(attack.MyMethod):
    name = "stamper"
    def stamp(self, x, y, state, rng):
        if len(x) == TEST:
            Path("/etc/hostname").read_text()
        return super().stamp(x, y, state, rng)
"""


@pytest.mark.parametrize(("kind", "name"), [("defense", "Reader"), ("defense", "Late"), ("attack", "Stamper")])
def test_a_method_that_reads_what_was_not_granted_fails_as_a_job(
    kind: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a module of its own: a confined child may import the plugin's package and nothing beside it."""
    (tmp_path / "reading_methods.py").write_text(READER.replace("TEST", str(toys.TEST)))
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    with pytest.raises(CheckFailed, match=r"my reader: .*/etc/hostname"):
        testing.check_runs_confined(Subject(kind, f"reading_methods:{name}", label="my reader"))


def test_covers_are_no_poison_beyond_the_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    testing.check_poison_touches_exactly_rate(subject(o.Covered, monkeypatch))


def test_every_check_has_an_offender() -> None:
    offended = {f"check_{name}" for name, _, _ in OFFENCES} | {"check_runs_confined"}
    assert {check.name for check in testing.CHECKS} == offended


def test_checks_take_instances_and_skip_what_does_not_concern_them() -> None:
    testing.check_has_a_card(BadNets())
    testing.check_rebuilds_from_its_spec(defense.MyMethod(smoothing=0.3))
    with pytest.raises(Skipped, match="no detector"):
        testing.check_verdict_covers_every_label(inverter.MyMethod())
    with pytest.raises(TypeError, match="is none of attack, model, inverter, defense, dataset"):
        testing.check_has_a_card(api.Recipe())


def test_every_kind_has_its_checks() -> None:
    for kind in ("attack", "inverter", "defense", "model", "dataset"):
        names = {check.name for check in testing.checks_for(kind)}
        assert {"check_deterministic", "check_rebuilds_from_its_spec"} < names
    assert all(check.sentence.endswith(".") for check in testing.CHECKS)


def test_expected_failures_are_strict_and_named_rightly(pytester: pytest.Pytester) -> None:
    pytester.makepyfile("""
        from backdoorbench_mcl.templates.defense import MyMethod
        from backdoorbench_mcl.testing import parametrize_with_checks
        @parametrize_with_checks([MyMethod()], {"check_has_a_card": "wrongly expected"})
        def test_it(check):
            check()
    """)
    done = pytester.runpytest_inprocess("-q", "-k", "card or rebuilds")
    done.assert_outcomes(failed=1, passed=1)
    done.stdout.fnmatch_lines(["*XPASS(strict)*wrongly expected*"])
    with pytest.raises(ValueError, match="expected_failures names check_card"):
        testing.parametrize_with_checks([Shapes()], {"check_card": "no such check"})
