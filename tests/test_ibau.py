"""I-BAU: the hypergradient against closed forms and finite differences, a round against a literal one, and resuming."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny import Bench, Memory, Tiny, generator, images, same, state
from tiny import one_thread as one_thread
from torch import Tensor

from backdoorbench_mcl.api import Diverged, Images, Recipe, UserError
from bbmcl_defenses.ibau import IBAU, add_patch, hypergradient, patched_count, project

TOLERANCE = 1e-3


def randn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


# ---------------------------------------------------------------- hypergradient: a quadratic problem


class Quadratic:
    """inner = d'Hd/2 - d'Bt, so that d*(t) = H^-1 Bt; outer = |d - a|^2/2 + d'Mt + c|t|^2/2. H has `curvatures`."""

    def __init__(self, curvatures: list[float]) -> None:
        size = len(curvatures)
        turn = torch.linalg.qr(randn(size, size, seed=1))[0]
        self.h = turn @ torch.diag(torch.tensor(curvatures, dtype=torch.float64)) @ turn.T
        self.b, self.m = randn(size, 3, seed=2), randn(size, 3, seed=3)
        self.a = randn(size, seed=4)
        self.theta = randn(3, seed=5).requires_grad_()

    def inner(self, d: Tensor) -> Tensor:
        value: Tensor = d @ self.h @ d / 2 - d @ self.b @ self.theta
        return value

    def outer(self, d: Tensor) -> Tensor:
        return (d - self.a).square().sum() / 2 + d @ self.m @ self.theta + 0.35 * self.theta.square().sum()

    def best(self) -> Tensor:
        found: Tensor = torch.linalg.solve(self.h, self.b @ self.theta.detach())
        return found

    def estimate(self, iterations: int) -> Tensor:
        (found,), value = hypergradient(
            self.inner, self.outer, self.best(), [self.theta], iterations=iterations, step=0.1
        )
        assert float(value) == pytest.approx(float(self.outer(self.best()).detach()))
        return found

    def differences(self) -> Tensor:
        """Central differences of t -> outer(d*(t))."""
        found = []
        for place in range(3):
            values = []
            for move in (1e-5, -1e-5):
                with torch.no_grad():
                    self.theta[place] += move
                    values.append(float(self.outer(self.best())))
                    self.theta[place] -= move
            found.append((values[0] - values[1]) / 2e-5)
        return torch.tensor(found, dtype=torch.float64)


def error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize(
    ("curvatures", "iterations"),
    [([1.0, 3.0, 6.0, 9.0], 200), ([9.0, 9.7, 10.3, 11.0], 5)],  # the second: at the default K
)
def test_quadratic_against_finite_differences(curvatures: list[float], iterations: int) -> None:
    problem = Quadratic(curvatures)
    expected = problem.differences()
    assert error(problem.estimate(iterations), expected) < TOLERANCE
    assert error(problem.estimate(0), expected) > 100 * TOLERANCE, "without the implicit part the test must fail"


def test_quadratic_against_the_closed_form() -> None:
    problem = Quadratic([1.0, 3.0, 6.0, 9.0])
    best, theta = problem.best(), problem.theta.detach()
    pull = best - problem.a + problem.m @ theta
    expected = problem.m.T @ best + 0.7 * theta + problem.b.T @ torch.linalg.solve(problem.h, pull)
    assert error(problem.estimate(300), expected) < 1e-9  # it stops at moves of 1e-10


@pytest.mark.parametrize("iterations", range(7))
def test_every_number_of_iterations_against_the_truncated_series(iterations: int) -> None:
    """v_K = sum_{k<K} (I - 0.1 H)^k g, so one iteration too many or too few is seen."""
    problem = Quadratic([1.0, 3.0, 6.0, 9.0])
    best, theta = problem.best(), problem.theta.detach()
    pull = best - problem.a + problem.m @ theta
    v = torch.zeros_like(pull)
    for _ in range(iterations):
        v = (torch.eye(4, dtype=torch.float64) - 0.1 * problem.h) @ v + pull
    expected = problem.m.T @ best + 0.7 * theta + 0.1 * problem.b.T @ v
    assert error(problem.estimate(iterations), expected) < 1e-12


def test_the_iteration_stops_once_it_stands_still() -> None:
    problem = Quadratic([9.0, 9.7, 10.3, 11.0])  # a factor of 0.1 each time
    calls = 0
    before = torch.autograd.grad

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        return before(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.autograd, "grad", counted)
        problem.estimate(10_000)
    assert 8 < calls < 20


# ---------------------------------------------------------------- hypergradient: a network


class TwoLayers:
    """softplus network 5 -> 6 -> 3 in float64; inner and outer as in I-BAU, the inner one made convex by its weight."""

    def __init__(self) -> None:
        shapes = ((6, 5), (6,), (3, 6), (3,))
        self.params = [randn(*shape, seed=10 + n).requires_grad_() for n, shape in enumerate(shapes)]
        self.x, self.other = randn(8, 5, seed=20), randn(7, 5, seed=21)
        self.y, self.labels = torch.arange(8) % 3, torch.arange(7) % 3

    def net(self, x: Tensor) -> Tensor:
        w1, b1, w2, b2 = self.params
        return F.softplus(x @ w1.T + b1) @ w2.T + b2

    def inner(self, d: Tensor) -> Tensor:
        return 2.0 * d.square().sum() - F.cross_entropy(self.net(self.x + d), self.y)

    def outer(self, d: Tensor) -> Tensor:
        return F.cross_entropy(self.net(self.other + d), self.labels)

    def best(self) -> Tensor:
        """The inner minimum by gradient descent, to 1e-12."""
        d = torch.zeros(5, dtype=torch.float64, requires_grad=True)
        for _ in range(500):
            (slope,) = torch.autograd.grad(self.inner(d), d)
            d = (d - 0.2 * slope).detach().requires_grad_()
            if float(slope.norm()) < 1e-12:
                return d.detach()
        raise AssertionError("the inner problem was not solved")


def test_network_against_finite_differences() -> None:
    """Along random directions of all parameters at once, the inner problem solved anew at both ends."""
    problem = TwoLayers()
    best = problem.best()

    def estimate(iterations: int) -> list[Tensor]:
        return hypergradient(problem.inner, problem.outer, best, problem.params, iterations=iterations, step=0.1)[0]

    full, direct = estimate(200), estimate(0)
    wrong = 0
    for seed in range(4):
        directions = [randn(*p.shape, seed=100 * seed + n) for n, p in enumerate(problem.params)]
        values = []
        for move in (1e-4, -1e-4):
            for p, direction in zip(problem.params, directions, strict=True):
                p.data += move * direction
            values.append(float(problem.outer(problem.best()).detach()))
            for p, direction in zip(problem.params, directions, strict=True):
                p.data -= move * direction
        expected = (values[0] - values[1]) / 2e-4

        def along(gradients: list[Tensor], directions: list[Tensor] = directions) -> float:
            return sum(float((g * d).sum()) for g, d in zip(gradients, directions, strict=True))

        assert along(full) == pytest.approx(expected, rel=TOLERANCE)
        wrong += abs(along(direct) - expected) > 10 * TOLERANCE * abs(expected)
    assert wrong == 4, "without the implicit part the test must fail"


def test_a_parameter_without_part_in_the_losses_gets_zero() -> None:
    problem = Quadratic([9.0, 10.0])
    spare = torch.ones(2, dtype=torch.float64, requires_grad=True)
    (_, zero), _ = hypergradient(
        problem.inner, problem.outer, problem.best(), [problem.theta, spare], iterations=5, step=0.1
    )
    assert torch.equal(zero, torch.zeros(2, dtype=torch.float64))


# ---------------------------------------------------------------- small functions


@pytest.mark.parametrize(
    ("share", "batch", "expected"),
    [(0.01, 100, 1), (0.01, 99, 1), (0.01, 32, 1), (0.01, 256, 2), (0.29, 100, 29), (1.0, 7, 7)],
)
def test_at_least_one_image_is_patched(share: float, batch: int, expected: int) -> None:
    assert patched_count(share, batch) == expected


def test_projection() -> None:
    delta = torch.full((1, 3, 2, 2), 2.0)  # norm sqrt(48)
    assert float(project(delta, 3.0).norm()) == pytest.approx(3.0)
    assert torch.equal(project(delta, 7.0), delta)
    assert torch.equal(project(delta, None), delta)
    assert torch.equal(project(torch.zeros(1, 3, 2, 2), 3.0), torch.zeros(1, 3, 2, 2))


def test_the_patch_goes_where_it_is_told() -> None:
    x = images(3).x.float() / 255
    delta = torch.full((1, 3, 8, 8), 0.75)
    out = add_patch(x, delta, False, torch.tensor([0.0, 1.0, 0.0]))
    assert torch.equal(out[[0, 2]], x[[0, 2]])
    assert torch.equal(out[1], x[1] + 0.75)
    cut = add_patch(x, delta, True, torch.tensor([0.0, 1.0, 0.0]))
    assert torch.equal(cut[[0, 2]], x[[0, 2]])
    assert torch.equal(cut[1], (x[1] + 0.75).clamp(max=1))
    assert torch.equal(add_patch(x, delta, False), x + 0.75)


# ---------------------------------------------------------------- one round


def literal_round(model: Tiny, clean: Images, seed: int, iterations: int) -> tuple[list[Tensor], Tensor]:
    """Spec 9.3 with explicit Jacobians, on two batches of 10 and 6, share 0.2, radius 2; the gradients of each batch's
    parameters, one after the other with plain steps in between, and delta."""
    params = list(model.parameters())
    parts = [(clean.x[s].float() / 255, clean.y[s]) for s in (slice(0, 10), slice(10, 16))]
    delta = torch.zeros(1, 3, 8, 8)
    for x, _ in parts:
        own = model(x).argmax(1)
        d = delta.clone().requires_grad_()
        gain = F.cross_entropy(model(x + d), own) - 0.001 * sum(d.flatten() ** 2)
        delta = delta + 10 * torch.autograd.grad(gain, d)[0]
    if float(delta.norm()) > 2:
        delta = delta * 2 / delta.norm()

    rng, (x_first, y_first) = generator(seed), parts[0]
    found: list[Tensor] = []
    for x, y in parts:
        chosen = torch.randperm(len(x), generator=rng)[: {10: 2, 6: 1}[len(x)]].tolist()

        def outer(d: Tensor, x: Tensor = x, y: Tensor = y, chosen: list[int] = chosen) -> Tensor:
            rows = [image + d[0] if n in chosen else image for n, image in enumerate(x)]
            return F.cross_entropy(model(torch.stack(rows)), y)

        def phi(d: Tensor) -> Tensor:
            value = -F.cross_entropy(model(x_first + d), y_first) + 0.001 * d.square().sum()
            return d - 0.1 * torch.autograd.grad(value, d, create_graph=True)[0]

        turn = torch.autograd.functional.jacobian(phi, delta).view(192, 192)
        d = delta.clone().requires_grad_()
        pull, *direct = torch.autograd.grad(outer(d), [d, *params])
        v = torch.zeros(192)
        for _ in range(iterations):
            v = turn.T @ v + pull.flatten()
        mixed = torch.autograd.grad(phi(d).flatten() @ v, params)
        found += [a + b for a, b in zip(direct, mixed, strict=True)]
        for p, g in zip(params, found[-len(params) :], strict=True):
            p.data -= 0.1 * g
    return found, delta


class PlainSteps(torch.optim.SGD):
    """In Adam's place: steps of 0.1 times the gradient, which does not blow up rounding; keeps the gradients."""

    kept: list[Tensor]

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, lr=0.1)

    def step(self, closure: Any = None) -> Any:
        self.kept += [p.grad.clone() for p in self.param_groups[0]["params"]]
        return super().step(closure)


@pytest.mark.parametrize("iterations", [0, 1, 3])
def test_a_round_against_explicit_jacobians(iterations: int, monkeypatch: pytest.MonkeyPatch) -> None:
    clean = images(16)
    expected, delta = literal_round(Tiny(), clean, 7, iterations)
    method = IBAU(rounds=1, iterations=iterations, batch=10, patched_share=0.2, radius=2.0)
    assert torch.allclose(method.perturbation(Tiny(), clean), delta, atol=1e-5)
    assert float(delta.norm()) > 0.1
    PlainSteps.kept = []
    monkeypatch.setattr(torch.optim, "Adam", PlainSteps)
    bench = Bench(seed=7)
    method.defend(Tiny(), bench.defense(clean))
    assert len(PlainSteps.kept) == len(expected) == 2 * len(list(Tiny().parameters()))
    for got, want in zip(PlainSteps.kept, expected, strict=True):
        assert torch.allclose(got, want, atol=1e-5, rtol=1e-3)


def test_the_implicit_part_is_there() -> None:
    """The round's test above would pass with it at zero, were it nothing on this network."""
    clean = images(16)
    direct, _ = literal_round(Tiny(), clean, 7, 0)
    full, _ = literal_round(Tiny(), clean, 7, 3)
    assert max(float((a - b).norm() / a.norm()) for a, b in zip(direct, full, strict=True)) > 0.05


# ---------------------------------------------------------------- the defense


def run(clean: Images | None = None, *, change: Callable[[Tiny], object] = bool, **given: Any) -> tuple[Tiny, Bench]:
    bench = Bench(seed=3)
    model = Tiny()
    change(model)
    out = IBAU(**{"rounds": 2, "batch": 10, **given}).defend(model, bench.defense(clean or images()))
    assert isinstance(out, Tiny)
    return out, bench


def test_every_weight_moves_and_no_statistic() -> None:
    repaired, bench = run()
    before = state(Tiny())
    for name, value in repaired.state_dict().items():
        moved = not torch.equal(before[name], value)
        assert moved != (name.startswith("bn.running") or name.endswith("tracked")), name
    assert not any(module.training for module in repaired.modules())
    assert all(parameter.grad is None for parameter in repaired.parameters())
    assert bench.ticks == [(1, 6, 10), (2, 6, 10), (3, 6, 4), (4, 6, 10), (5, 6, 10), (6, 6, 4)]
    assert IBAU().knows == frozenset()
    assert IBAU().uses_labels


def test_every_round_is_reported() -> None:
    _, bench = run()
    assert [line.split(":")[0] for line in bench.lines] == ["round 1 of 2", "round 2 of 2"]
    _, bench = run(lr=1e-9, radius=1e-6)  # nothing moves: what is reported can be computed from the victim
    clean, model = images(), Tiny()
    with torch.no_grad():
        logits = model(clean.x.float() / 255)
    hits = 100 * (logits.argmax(1) == clean.y).double().mean()
    line = f"loss on patched batches {F.cross_entropy(logits, clean.y):.4f}, norm of delta 0.000"
    assert bench.lines[1] == f"round 2 of 2: {line}, clean accuracy {hits:.1f} %"


def test_fewer_rounds_end_where_more_rounds_passed_through() -> None:
    """So that `--sweep ibau.rounds=1,2,3` reports every round of one repair."""
    whole, bench = run(rounds=3, batch=8)
    for rounds, (tensors, _) in enumerate(bench.snapshot.saved, 1):
        part, _ = run(rounds=rounds, batch=8)
        passed = {name.removeprefix("model."): value for name, value in tensors.items() if name.startswith("model.")}
        assert same(state(part), passed)
        assert same(state(part), state(whole)) == (rounds == 3)


def test_the_perturbation_fools_and_stays_in_its_ball() -> None:
    clean = images(40)
    x = clean.x.float() / 255
    method = IBAU(batch=10, radius=1.0)
    delta = method.perturbation(Tiny(), clean)
    assert delta.shape == (1, 3, 8, 8)
    assert float(delta.norm()) <= 1.0 + 1e-5
    with torch.no_grad():
        own = Tiny()(x).argmax(1)
        plain, moved = F.cross_entropy(Tiny()(x), own), F.cross_entropy(Tiny()(x + delta), own)
    assert float(moved) > float(plain) + 0.01
    free = IBAU(batch=10, radius=None).perturbation(Tiny(), clean)
    assert float(free.norm()) > 1.0
    adam = IBAU(batch=40, delta_optimiser="adam", delta_lr=0.25, radius=None).perturbation(Tiny(), clean)
    assert torch.allclose(adam.abs(), torch.full_like(adam, 0.25), atol=0.01)


def test_knobs_reach_the_method() -> None:
    reference = state(run()[0])
    changes: list[dict[str, Any]] = [
        {"lr": 0.01}, {"rounds": 3}, {"round_steps": 1}, {"iterations": 1}, {"batch": 24}, {"radius": 0.1},
        {"clamp": True}, {"delta_lr": 1.0}, {"delta_optimiser": "adam"}, {"patched_share": 0.5}, {"weight": 0.5},
        {"inner_step": 1.0},
    ]  # fmt: skip
    for change in changes:
        assert not same(state(run(**change)[0]), reference), change
    assert same(state(run()[0]), reference)


def test_a_bounded_round_goes_on_where_the_last_one_stopped() -> None:
    """24 images in batches of 10 are 10, 10 and 4; two steps a round take batches 1 2, 3 1, 2 3."""
    method = IBAU(batch=10, round_steps=2)
    seen = [[len(batch.x) for batch in method.batches(images(24), number)] for number in (1, 2, 3)]
    assert seen == [[10, 10], [4, 10], [10, 4]]
    x = torch.cat([batch.x for batch in method.batches(images(24), 2)])
    assert torch.equal(x, torch.cat([images(24).x[20:], images(24).x[:10]]).float() / 255)
    _, bench = run(images(24), rounds=3, round_steps=2)
    assert bench.ticks == [(1, 6, 10), (2, 6, 10), (3, 6, 4), (4, 6, 10), (5, 6, 10), (6, 6, 4)]


def test_results_of_before_there_was_a_bound_keep_their_keys() -> None:
    assert IBAU.added == {"round_steps": None}


def test_enough_steps_are_a_whole_pass() -> None:
    unbounded = state(run()[0])
    assert same(state(run(round_steps=3)[0]), unbounded)
    assert same(state(run(round_steps=1000)[0]), unbounded)


def test_the_perturbation_is_fitted_on_the_batches_of_its_round() -> None:
    bounded = IBAU(batch=10, round_steps=1, radius=None)
    second = bounded.perturbation(Tiny(), images(24), 2)
    assert torch.equal(
        second, IBAU(batch=10, radius=None).perturbation(Tiny(), images(24).subset(torch.arange(10, 20)))
    )
    assert not torch.equal(second, bounded.perturbation(Tiny(), images(24), 1))


def test_second_derivatives_are_never_taken_in_bf16() -> None:
    def narrow(model: Tiny) -> None:
        model.precision = "bf16"

    repaired, _ = run(change=narrow)
    assert repaired.precision == "bf16"
    assert same(state(repaired), state(run()[0]))


def test_the_common_recipe_plays_no_part() -> None:
    other = Bench(seed=3, recipe=Recipe(steps=1, lr=0.5, batch=3, augment="crop+flip"))
    repaired = IBAU(rounds=2, batch=10).defend(Tiny(), other.defense(images()))
    assert same(state(repaired), state(run()[0]))


def test_a_kill_after_any_round_ends_in_the_same_bits() -> None:
    whole, first = run(rounds=3)
    assert len(first.snapshot.saved) == 3
    for done, start in enumerate(first.snapshot.saved, start=1):
        bench = Bench(seed=99, snapshot=Memory(copy.deepcopy(start)))
        again = IBAU(rounds=3, batch=10).defend(Tiny(seed=8), bench.defense(images()))
        assert same(state(again), state(whole)), f"killed after round {done}"
        assert len(bench.ticks) == 9 - 3 * done


def test_a_loss_that_is_not_finite_is_said() -> None:
    bench = Bench()
    model = Tiny()
    model.precision = "bf16"
    with torch.no_grad():
        model.fc.weight.fill_(math.inf)
    with pytest.raises(Diverged, match="round 1"):
        IBAU().defend(model, bench.defense(images()))
    assert bench.snapshot.saved == []
    assert model.precision == "bf16"


def test_no_clean_images() -> None:
    with pytest.raises(UserError, match="no clean images"):
        IBAU().defend(Tiny(), Bench().defense(images(0)))


@pytest.mark.parametrize(
    "given",
    [
        {"lr": 0.0}, {"rounds": 0}, {"round_steps": 0}, {"iterations": -1}, {"batch": 0}, {"radius": 0.0},
        {"delta_lr": 0.0}, {"delta_optimiser": "lbfgs"}, {"patched_share": 0.0}, {"patched_share": 1.5},
        {"weight": -1.0}, {"inner_step": 0.0},
    ],
)  # fmt: skip
def test_bounds(given: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=next(iter(given))):
        IBAU(**given)
