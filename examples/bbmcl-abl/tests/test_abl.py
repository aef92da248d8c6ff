"""The contract of backdoorbench_mcl, one test per sentence; below it the losses, the isolation and the three phases."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, log_softmax

from backdoorbench_mcl.api import Batch, Context, DefenseContext, Diverged, Images, Recipe, UserError
from backdoorbench_mcl.kit import fit, predict
from backdoorbench_mcl.testing import parametrize_with_checks, toys
from bbmcl_abl.method import ABL, isolated_count, lengths, local_ascent, losses_of, lowest, require_whole

Sign = Literal["batch", "image"]


@parametrize_with_checks([ABL(lr=0.05)])  # 120 steps and the ascent: the toys learn nothing from 0.1
def test_conformance(check: Callable[[], None]) -> None:
    check()


# ---------------------------------------------------------------- the losses


@pytest.mark.parametrize(
    ("losses", "sign", "value", "gradient"),
    [
        # the mean is 1.3125, above gamma: all descend, those below it too
        ([0.25, 0.5, 1.5, 3.0], "batch", 1.3125, [0.25, 0.25, 0.25, 0.25]),
        # the mean is 0.3, below gamma: all ascend, those above it too
        ([0.1, 0.1, 0.1, 0.9], "batch", -0.3, [-0.25, -0.25, -0.25, -0.25]),
        ([0.25, 0.75], "batch", 0.0, [0.0, 0.0]),  # at gamma itself nothing is asked
        ([0.25, 0.5, 1.5, 3.0], "image", (-0.25 + 0 + 1.5 + 3.0) / 4, [-0.25, 0.0, 0.25, 0.25]),
    ],
)
def test_local_ascent_by_hand(losses: list[float], sign: Sign, value: float, gradient: list[float]) -> None:
    given = torch.tensor(losses, requires_grad=True)
    found = local_ascent(given, 0.5, sign)
    assert found.item() == pytest.approx(value)
    found.backward()
    assert given.grad is not None and given.grad.tolist() == pytest.approx(gradient)


@pytest.mark.parametrize("sign", ["batch", "image"])
def test_local_ascent_holds_a_loss_at_gamma(sign: Sign) -> None:
    for start in (0.01, 4.0):
        loss = torch.tensor([start], requires_grad=True)
        for _ in range(500):
            (gradient,) = torch.autograd.grad(local_ascent(loss, 0.5, sign), loss)
            loss = (loss - 0.01 * gradient).detach().requires_grad_()
        assert loss.item() == pytest.approx(0.5, abs=0.02)


def test_the_sign_is_that_of_the_batch_by_default() -> None:
    assert ABL().sign == "batch"
    losses = torch.tensor([0.1, 3.0])
    assert torch.equal(local_ascent(losses, 0.5), local_ascent(losses, 0.5, "batch"))


def test_losses_are_those_of_a_literal_loop() -> None:
    model, images = toys.victim().train(), toys.make_images(70, 5)
    found = losses_of(model, images)
    assert not model.training
    for i in range(0, 70, 9):
        with torch.no_grad():
            scores = log_softmax(model(images.x[i : i + 1].float() / 255)[0], 0)
        assert found[i].item() == pytest.approx(-scores[images.y[i]].item(), abs=1e-5)


# ---------------------------------------------------------------- how many, how long


@pytest.mark.parametrize(
    ("losses", "count", "expected"),
    [([3.0, 1.0, 2.0, 0.0], 2, [1, 3]), ([1.0, 1.0, 1.0, 1.0], 2, [0, 1]), ([3.0, 1.0, 2.0, 0.0], 3, [1, 2, 3])],
)
def test_the_lowest_losses_are_isolated(losses: list[float], count: int, expected: list[int]) -> None:
    assert lowest(torch.tensor(losses), count).nonzero().flatten().tolist() == expected


@pytest.mark.parametrize(
    ("rate", "total", "count"),
    [(0.01, 50000, 500), (0.29, 100, 29), (0.01, 400, 4), (0.01, 150, 2), (0.01, 3, 2)],  # batch norm needs two
)
def test_how_many_are_isolated(rate: float, total: int, count: int) -> None:
    assert isolated_count(rate, total) == count


@pytest.mark.parametrize(
    ("times", "usual", "turn", "expected"),
    [
        (4.0, 20, 0.25, (20, 60)),  # the paper's 20 epochs, the released code's 60
        (4.0, 200, 0.25, (200, 600)),
        (1.0, 10, 0.0, (1, 9)),  # no isolation without a step
        (1.0, 10, 1.0, (10, 0)),
        (0.01, 30, 0.25, (1, 0)),  # 0.3 of a step
    ],
)
def test_lengths(times: float, usual: int, turn: float, expected: tuple[int, int]) -> None:
    assert lengths(times, usual, turn) == expected


class Run:
    """What a repair did. ticks: done and total; curves: names; asr, ba: on the toys, in %."""

    def __init__(
        self, defense: ABL, recipe: Recipe, seed: int = 0, snapshot: toys.MemorySnapshot | None = None,
        suspect: Images | None = None, **fields: Any,
    ) -> None:  # fmt: skip
        self.ticks: list[tuple[int, int]] = []
        self.lines: list[str] = []
        self.curves: set[str] = set()
        granted = toys.granted(defense.knows, "abl")
        if suspect is not None:
            granted._values["suspect"] = suspect
        fields = {
            "tick": lambda done, total, images: self.ticks.append((done, total)), "log": self.lines.append,
            "record": lambda name, step, value: self.curves.add(name), "fresh": lambda: toys.fresh(seed),
            "snapshot": toys.MemorySnapshot() if snapshot is None else snapshot, **fields,
        }  # fmt: skip
        ctx = toys.context(
            DefenseContext, seed=seed, clean=toys.clean_images(labels=False), needs={}, recipe=recipe, granted=granted,
            **fields,
        )  # fmt: skip
        self.net = defense.defend(toys.victim(), ctx)

    @property
    def asr(self) -> float:
        test = toys.make_images(toys.TEST, 2)
        stamped = toys.stamped(test.x[test.y != toys.TARGET])
        return 100 * float((predict(self.net, stamped) == toys.TARGET).float().mean())

    @property
    def ba(self) -> float:
        return toys.accuracy(self.net, toys.make_images(toys.TEST, 2))


def plain(**settings: Any) -> Recipe:
    return Recipe(**{"augment": "none", **settings})


@pytest.mark.parametrize(
    ("recipe", "steps"),
    [
        ({"steps": 10}, 10 + 30 + 4),  # 4 isolated images, four passes
        ({"epochs": 1, "batch": 40}, 10 + 30 + 4),  # 4 x 1 epoch of 400 images
        ({"epochs": 1, "batch": 20}, 20 + 60 + 4),
    ],
)
def test_the_recipe_says_how_long_and_progress_counts_as_one(recipe: dict[str, Any], steps: int) -> None:
    run = Run(ABL(), plain(**recipe))
    assert run.ticks == [(step, steps) for step in range(1, steps + 1)]
    assert run.curves == {"loss, isolate", "loss, rest", "loss, unlearn"}
    assert run.lines[0].startswith("isolated 4 of 400 images")


@pytest.mark.parametrize(
    ("settings", "curves"),
    [
        ({"times": 0.01}, {"loss, isolate", "loss, unlearn"}),
        ({"turn": 1.0, "unlearn": 0}, {"loss, isolate"}),
        ({"unlearn": 0}, {"loss, isolate", "loss, rest"}),
    ],
)
def test_phases_without_a_step_are_left_out(settings: dict[str, Any], curves: set[str]) -> None:
    assert Run(ABL(**settings), plain(steps=10)).curves == curves


def test_only_the_training_on_the_rest_is_augmented() -> None:
    """10 steps of 40 images are one pass over all 400, 30 steps three over the rest."""
    seen: list[int] = []

    def augment(x: Tensor, rng: torch.Generator) -> Tensor:
        seen.append(len(x))
        return x

    Run(ABL(), plain(steps=10, batch=40), augment=augment)
    assert seen == ([40] * 9 + [36]) * 3


def test_too_few_images() -> None:
    two = toys.make_images(2)
    with pytest.raises(UserError, match="2 suspect images were given, expected 3 or more"):
        Run(ABL(), plain(steps=1), suspect=two)
    Run(ABL(), plain(steps=1), suspect=toys.make_images(3))


# ---------------------------------------------------------------- a restart


@pytest.mark.parametrize("phase", ["isolate", "rest", "unlearn"])
def test_a_restart_goes_on_where_it_stood(phase: str) -> None:
    """Two epochs of ten steps, six, and four of one: 20 + 60 + 4 steps; death comes with the second tick of a phase."""
    defense, recipe = ABL(), plain(epochs=2, batch=40)
    begun = {"isolate": 0, "rest": 20, "unlearn": 80}[phase]
    length = 1 if phase == "unlearn" else 10  # of an epoch
    whole = Run(defense, recipe)
    snapshot, done = toys.MemorySnapshot(), []

    def tick(step: int, total: int, images: int) -> None:
        done.append(step)
        if step == begun + length + 1:
            raise toys.Killed

    with pytest.raises(toys.Killed):
        Run(defense, recipe, snapshot=snapshot, tick=tick)
    assert done[-1] == begun + length + 1
    again = Run(defense, recipe, snapshot=snapshot)
    assert again.ticks == whole.ticks[begun + length :]  # the epoch in which it died, and none before
    state = again.net.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in whole.net.state_dict().items())


# ---------------------------------------------------------------- what the paper says


def carrying(images: Images) -> Tensor:
    """Which of the images carry the patch: bool (N,)."""
    return (images.x == toys.stamped(images.x)).flatten(1).all(1)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_what_is_learnt_first_is_poison_however_long_it_goes_on(seed: int) -> None:
    """Of the 40 lowest losses three of four carry the patch, as one in five does by chance, after
    60 steps, 200 and 400.
    """
    suspect, net = toys.suspect_images(), toys.fresh(seed)
    there = carrying(suspect)
    assert int(there.sum()) == 80
    found: dict[int, int] = {}

    def tick(done: int, total: int, images: int) -> None:
        if done in (60, 200, 400):
            found[done] = int((lowest(losses_of(net, suspect), 40) & there).sum())
            net.train()

    def loss(batch: Batch) -> Tensor:
        defense = ABL()
        return local_ascent(cross_entropy(net(batch.x), batch.y, reduction="none"), defense.gamma, defense.sign)

    recipe = plain(steps=400, batch=40, lr=0.05, milestones=())
    fit(net.train(), suspect, toys.context(Context, seed=seed, recipe=recipe, tick=tick), loss)
    assert found.keys() == {60, 200, 400}
    assert min(found.values()) >= 30, found


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_what_was_isolated_can_be_unlearned(seed: int) -> None:
    """The default phases take ten points of ASR or more off what isolation and rest leave, and leave BA above 60.

    A demonstration on three seeds, no evidence: isolation and unlearn_lr are the ones of several that do so. A fifth is
    isolated, all the poison there is, and ascent is ten times as fast as on real images: on the toys the loss of what
    stays in the rest sinks to where no gradient is left to climb.
    """
    before = Run(ABL(lr=0.05, isolation=0.2, unlearn=0), plain(steps=16), seed)
    after = Run(ABL(lr=0.05, isolation=0.2, unlearn_lr=0.0075), plain(steps=16), seed)
    assert before.asr > 90
    assert after.asr < before.asr - 10
    assert after.ba > 60


def test_an_ascent_that_wrecks_the_network_has_diverged() -> None:
    with pytest.raises(Diverged, match=r"mean loss of the other images is .*lower abl.unlearn or abl.unlearn_lr"):
        Run(ABL(lr=0.05, isolation=0.2, unlearn=10, unlearn_lr=0.02), plain(steps=20, batch=40), seed=1)
    require_whole(13.8, 4, 1)
    for loss in (13.9, float("nan"), float("inf")):
        with pytest.raises(Diverged, match=r"after 1 steps of ascent .* expected at most 13\.9"):
            require_whole(loss, 4, 1)
