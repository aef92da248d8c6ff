"""Each check of the conformance suite fails on its deliberate offender, and says what is wrong."""

from __future__ import annotations

import os
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import pytest
import torch
from tiny import one_thread
from torch import Tensor, nn

from backdoorbench_mcl import api, kit, testing
from backdoorbench_mcl.templates import attack, dataset, defense, inverter, model
from backdoorbench_mcl.testing import CheckFailed, Skipped, Subject, toys
from bbmcl_attacks.badnets import BadNets
from bbmcl_datasets.shapes import Shapes

__all__ = ["one_thread"]


class Attack(attack.MyMethod):
    name = "offender"

    def __init__(self, *, rate: api.Rate = 0.2) -> None:
        super().__init__(rate=rate)


class Defense(api.Defense):
    """Does nothing."""

    name = "offender"

    def defend(self, model: api.Classifier, ctx: api.DefenseContext) -> Any:
        return model


class Inverter(inverter.MyMethod):
    name = "offender"

    def __init__(self) -> None:
        super().__init__(steps=150)


# ---------------------------------------------------------------- of every kind


class Untyped(Defense):
    def __init__(self, *, lr=0.1) -> None:  # type: ignore[no-untyped-def]  # the offence
        self.lr = lr


class Demanding(Defense):
    def __init__(self, *, lr: float) -> None:
        self.lr = lr


class Alphabet(Defense):
    """Its parameter becomes another one when it is constructed again."""

    def __init__(self, *, layers: tuple[str, ...] = ("a", "b")) -> None:
        self.layers = layers

    @property
    def params(self) -> dict[str, Any]:
        return {"layers": tuple(reversed(self.layers))}


class Growing(Defense):
    """Its `added` names what the constructor does not have."""

    added: ClassVar[dict[str, Any]] = {"momentum": 0.9}


Cardless = type("Cardless", (Defense,), {"__module__": "cardless"})


class Moody(Defense):
    """Goes on where the last call ended."""

    calls: ClassVar[list[int]] = []

    def defend(self, model: api.Classifier, ctx: api.DefenseContext) -> Any:
        self.calls.append(0)
        with torch.no_grad():
            next(model.parameters()).add_(0.001 * len(self.calls))
        return model


class Seeder(Defense):
    def defend(self, model: api.Classifier, ctx: api.DefenseContext) -> Any:
        torch.manual_seed(0)
        np.random.seed(0)
        return model


class Settler(Defense):
    def defend(self, model: api.Classifier, ctx: api.DefenseContext) -> Any:
        os.environ["OFFENDED"] = str(len(os.environ))
        torch.set_num_threads(torch.get_num_threads() + 1)
        return model


# ---------------------------------------------------------------- attacks


class Inplace(Attack):
    def stamp(self, x: Tensor, y: Tensor, state: api.State, rng: torch.Generator) -> Tensor:
        x[:, :, 0, 0] = 255
        return x


class Floats(Attack):
    def poison(self, train: api.Images, state: api.State, rng: torch.Generator) -> api.Poisoned:
        return api.Poisoned(torch.tensor([0]), train.x[:1], torch.tensor([1]))

    def stamp(self, x: Tensor, y: Tensor, state: api.State, rng: torch.Generator) -> Tensor:
        return x / 255


class Invisible(Attack):
    def stamp(self, x: Tensor, y: Tensor, state: api.State, rng: torch.Generator) -> Tensor:
        return x.clone()


class Greedy(Attack):
    def poison(self, train: api.Images, state: api.State, rng: torch.Generator) -> api.Poisoned:
        index = torch.arange(int(2 * self.rate * len(train)))
        return api.Poisoned(index, train.x[index], torch.ones_like(index))


class Twice(Attack):
    def poison(self, train: api.Images, state: api.State, rng: torch.Generator) -> api.Poisoned:
        return api.Poisoned(torch.tensor([3, 3]), train.x[[3, 3]], torch.tensor([1, 1]))


class Scribbler(Attack):
    def poison(self, train: api.Images, state: api.State, rng: torch.Generator) -> api.Poisoned:
        train.y[:] = 1
        return api.Poisoned(torch.tensor([3]), train.x[[3]], torch.tensor([1]))


class Boastful(Attack):
    def goal(self, y: Tensor, state: api.State) -> api.Goal:
        return api.Goal(torch.ones_like(y), torch.ones_like(y, dtype=torch.bool))


class Remembering(Attack):
    """Keeps in the object what belongs into the state."""

    grey_now = 0

    def prepare(self, ctx: api.AttackContext) -> api.State:
        self.grey_now = 255
        return api.State()

    def stamp(self, x: Tensor, y: Tensor, state: api.State, rng: torch.Generator) -> Tensor:
        out = x.clone()
        out[:, :, :3, :3] = self.grey_now
        return out


class Unstorable(Attack):
    def prepare(self, ctx: api.AttackContext) -> api.State:
        return api.State({}, {"rng": ctx.rng})


class Mismatched(Attack):
    """Trains one trigger and stamps another."""

    def poison(self, train: api.Images, state: api.State, rng: torch.Generator) -> api.Poisoned:
        index = kit.choose(len(train), 80, rng)
        x = train.x[index].clone()
        x[:, :, -3:, -3:] = 0
        return api.Poisoned(index, x, torch.ones_like(index))


# ---------------------------------------------------------------- inverters and defenses


class Peeking(Defense):
    def defend(self, model: api.Classifier, ctx: api.DefenseContext) -> Any:
        return model if ctx.granted.target == 1 else None


class Needing(Defense):
    def defend(self, model: api.Classifier, ctx: api.DefenseContext) -> Any:
        return ctx.needs["trigger"] and model


class Clairvoyant(Defense):
    @property
    def knows(self) -> frozenset[Any]:
        return frozenset({"trigger"})


class Crowd(Defense):
    def defend(self, model: api.Classifier, ctx: api.DefenseContext) -> Any:
        if len(ctx.clean) < 2:
            raise IndexError("list index out of range")
        return model


class Forgetful(Defense):
    """Saves where it is, not what its generator had drawn."""

    def defend(self, model: api.Classifier, ctx: api.DefenseContext) -> Any:
        found = ctx.snapshot.load()
        step, noise = (0, torch.zeros(())) if found is None else (found[1]["step"], found[0]["noise"])
        while step < 4:
            step, noise = step + 1, noise + torch.rand((), generator=ctx.rng)
            ctx.snapshot.save({"noise": noise}, {"step": step})
        with torch.no_grad():
            next(model.parameters()).add_(0.001 * noise)
        return model


class Immortal(Defense):
    def defend(self, model: api.Classifier, ctx: api.DefenseContext) -> Any:
        try:
            ctx.snapshot.save({"a": torch.zeros(1)}, {})
        except BaseException:
            return model
        return model


class Dirty(api.MaskPattern):
    def apply(self, x: Tensor, rng: torch.Generator | None = None) -> Tensor:
        x[:, :, 0, 0] = 1
        return x


class Half(api.MaskPattern):
    """Loses its pattern on the way through a file."""

    def tensors(self) -> dict[str, Tensor]:
        return {"mask": self.mask, "pattern": torch.zeros_like(self.pattern)}


class Returning(Inverter):
    kind: ClassVar[Any] = None

    def invert(self, model: api.Classifier, target: int, ctx: api.InverterContext) -> Any:
        true = toys.true_trigger()
        return self.kind(true.mask, true.pattern)


class DirtyInverter(Returning):
    kind = Dirty


class HalfInverter(Returning):
    kind = Half


class PairInverter(Returning):
    kind = staticmethod(lambda mask, pattern: (mask, pattern))


class Blind(Inverter):
    def invert(self, model: api.Classifier, target: int, ctx: api.InverterContext) -> Any:
        return api.MaskPattern(torch.zeros(32, 32), torch.zeros(3, 32, 32))


class Partial(Inverter):
    def detect(self, model: api.Classifier, ctx: api.InverterContext) -> api.Verdict:
        return api.Verdict((1,), (0.5, 3.0), (60.0, 9.0))


class Nothing(Defense):
    def defend(self, model: api.Classifier, ctx: api.DefenseContext) -> Any:
        return None


class Wide(Defense):
    def defend(self, model: api.Classifier, ctx: api.DefenseContext) -> Any:
        model.fc = nn.Linear(16, 7)
        return model


class Infinite(Defense):
    def defend(self, model: api.Classifier, ctx: api.DefenseContext) -> Any:
        with torch.no_grad():
            next(model.parameters()).fill_(float("inf"))
        return model


class Hooked(Defense):
    def defend(self, model: api.Classifier, ctx: api.DefenseContext) -> Any:
        return kit.masked(model, {"conv2": [0, 1]})


class Unbuilt(Defense):
    def defend(self, model: api.Classifier, ctx: api.DefenseContext) -> Any:
        return api.Repaired(model, "nowhere:nothing", {})


class Ruinous(Defense):
    def defend(self, model: api.Classifier, ctx: api.DefenseContext) -> Any:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
        return model


# ---------------------------------------------------------------- networks and data sets


class Network(model.Network):
    def __init__(self) -> None:
        super().__init__(toys.CLASSES, 3, 8)


def networks(**changes: Callable[..., Any]) -> type[api.Model]:
    """A model whose network has some methods replaced."""
    cls = type("Changed", (Network,), dict(changes))
    return type("Offender", (api.Model,), {
        "name": "offender", "build": lambda self, classes, shape: cls(), "__module__": __name__,
    })  # fmt: skip


def flat(self: Any, x: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    z, maps = Network.features(self, x)
    return z, tuple(part.flatten(1) for part in maps)


def stubborn(self: Any, x: Tensor) -> Tensor:
    return x


def together(self: Any, x: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    z, maps = Network.features(self, x)
    return z - z.mean(0), maps


def half(self: Any, z: Tensor) -> Tensor:
    return Network.head(self, z.detach())


def drawn(self: Any) -> None:
    Network.__init__(self)
    self.scale = torch.rand(1)


def scaled(self: Any, z: Tensor) -> Tensor:
    return self.scale * Network.head(self, z)  # type: ignore[no-any-return]


class Stripes(dataset.MyMethod):
    def __init__(self) -> None:
        super().__init__(train=40, test=40)


class Overfull(Stripes):
    def load(self, split: Literal["train", "test"], root: Path | None) -> api.Images:
        images = super().load(split, root)
        return api.Images(images.x, images.y + 1)


class Grey(Stripes):
    mean = (128.0, 128.0, 128.0)


class Same(Stripes):
    def load(self, split: Literal["train", "test"], root: Path | None) -> api.Images:
        return super().load("train", root)


OFFENCES: list[tuple[str, Any, str]] = [
    ("constructs_without_arguments", Untyped, "parameter 'lr' needs a type annotation"),
    ("constructs_without_arguments", Demanding, "lr must be given, expected a default"),
    ("rebuilds_from_its_spec", Alphabet, "on the way through JSON"),
    ("rebuilds_from_its_spec", Growing, "`added` names momentum, no parameter of the constructor"),
    ("has_a_card", Cardless, "the module cardless has no docstring"),
    ("deterministic", Moody, "conv1.weight differ between two runs with equal seeds"),
    ("leaves_global_state_alone", Seeder, "seeded the global generator of numpy, torch"),
    ("leaves_global_state_alone", Settler, "changed threads, environment for the whole process"),
    ("stamp_keeps_dtype_range_and_shape", Inplace, "stamp() wrote to its input"),
    ("stamp_keeps_dtype_range_and_shape", Floats, "into torch.float32 (1, 3, 32, 32); return uint8"),
    ("stamp_keeps_dtype_range_and_shape", Invisible, "changed no pixel of 20 images"),
    ("poison_touches_exactly_rate", Greedy, "rate=0.2 of 400 images poisoned 160, expected 80"),
    ("poison_touches_exactly_rate", Twice, "no distinct places among the 400 training images"),
    ("poison_touches_exactly_rate", Scribbler, "poison() wrote to the training set"),
    ("goal_fits_its_labels", Boastful, "counts 10 images whose goal is their own label"),
    ("state_can_be_stored", Remembering, "stamp() does something else once its state was stored"),
    ("state_can_be_stored", Unstorable, "cannot be stored (Object of type Generator is not JSON serializable)"),
    ("trigger_is_learnable", Mismatched, "expected at least 90 and 60"),
    ("reads_only_what_it_declared", Peeking, "read granted.target, which it did not declare"),
    ("reads_only_what_it_declared", Needing, "KeyError 'trigger'; where that is a name of ctx.needs"),
    ("reads_only_what_it_declared", Clairvoyant, "knows trigger, which no defense is granted"),
    ("survives_one_clean_image", Crowd, "with one clean image it raised IndexError"),
    ("survives_a_restart", Forgetful, "conv1.weight differ after a restart from a snapshot"),
    ("survives_a_restart", Immortal, "caught the end of its process"),
    ("returns_a_trigger", PairInverter, "invert() returned tuple, expected Trigger"),
    ("returns_a_trigger", DirtyInverter, "apply() wrote to its input"),
    ("returns_a_trigger", HalfInverter, "another one after tensors() and from_tensors()"),
    ("finds_a_planted_patch", Blind, "to the planted label, expected 90"),
    ("verdict_covers_every_label", Partial, "detect() judged 2 labels, expected all 4"),
    ("returns_a_working_classifier", Nothing, "defend() returned NoneType, expected Classifier"),
    ("returns_a_working_classifier", Wide, "changed fc.bias, fc.weight of the state dict"),
    ("returns_a_working_classifier", Infinite, "conv1.weight of the repaired model is not finite"),
    ("returns_a_working_classifier", Hooked, "computes more than the network with its weights"),
    ("returns_a_working_classifier", Unbuilt, "rebuild 'nowhere:nothing' does not work"),
    ("returns_a_working_classifier", Ruinous, "has BA 25.0 %, expected at least 60"),
    ("keeps_a_clean_model_clean", Ruinous, "to 25.0 %, expected to keep all but 15 points"),
    ("embed_and_stages", networks(features=flat), "expected (B, C, H, W)"),
    ("normalises_by_itself", networks(normalise=stubborn), "does not normalise with the constants"),
    ("state_dict_is_the_network", networks(__init__=drawn, head=scaled), "a fresh network with the same weights gives"),
    ("predicts_each_image_by_itself", networks(features=together), "depend on the others of its batch in eval mode"),
    ("can_be_trained", networks(head=half), "no gradient reaches"),
    ("loads_what_it_says", Overfull, "train labels run from 1 to 4, `classes` says 0..3"),
    ("loads_what_it_says", Grey, "is outside [0, 1]"),
    ("splits_are_apart", Same, "40 of 40 test images are training images"),
]  # fmt: skip


@pytest.fixture
def cardless(monkeypatch: pytest.MonkeyPatch) -> None:
    """A module without a docstring."""
    module = types.ModuleType("cardless")
    module.__dict__["Cardless"] = Cardless
    monkeypatch.setitem(__import__("sys").modules, "cardless", module)


def subject(offender: Any, monkeypatch: pytest.MonkeyPatch) -> Subject:
    """The class under a name that can be imported."""
    name = f"Offender{id(offender)}" if offender.__name__ == "Offender" else offender.__name__
    monkeypatch.setitem(globals(), name, offender)
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
from backdoorbench_mcl.api import Defense
class Reader(Defense):
    name = "reader"
    def defend(self, model, ctx):
        Path("/etc/hostname").read_text()
        return model
"""


def test_a_method_that_reads_what_was_not_granted_fails_as_a_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a module of its own: a confined child may import the plugin's package and nothing beside it."""
    (tmp_path / "reading_defense.py").write_text(READER)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    with pytest.raises(CheckFailed, match=r"my reader: .*/etc/hostname"):
        testing.check_runs_confined(Subject("defense", "reading_defense:Reader", label="my reader"))


class Covered(Attack):
    """Stamps as many images again whose labels it keeps, so that the trigger alone does not suffice."""

    def poison(self, train: api.Images, state: api.State, rng: torch.Generator) -> api.Poisoned:
        index = kit.choose(len(train), 160, rng)
        x, y = train.take(index)
        y[torch.randperm(160, generator=rng)[:80]] = 1
        return api.Poisoned(index, self.stamp(x, y, state, rng), y)


def test_covers_are_no_poison_beyond_the_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    testing.check_poison_touches_exactly_rate(subject(Covered, monkeypatch))


def test_every_check_has_an_offender() -> None:
    offended = {f"check_{name}" for name, _, _ in OFFENCES} | {"check_runs_confined"}
    assert {check.name for check in testing.CHECKS} == offended


def test_checks_take_instances_and_skip_what_does_not_concern_them() -> None:
    testing.check_has_a_card(BadNets())
    testing.check_rebuilds_from_its_spec(defense.MyMethod(smoothing=0.3))
    with pytest.raises(Skipped, match="no detector"):
        testing.check_verdict_covers_every_label(inverter.MyMethod())
    with pytest.raises(TypeError, match="is none of attack, inverter, defense, model, dataset"):
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
