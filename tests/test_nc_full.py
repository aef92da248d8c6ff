"""nc-full: its schedule against tables made by hand, its search against loops, planted backdoors, detection, resume."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from tiny import Bench, Memory, Tiny, generator, images
from tiny import one_thread as one_thread
from torch import Tensor

from backdoorbench_mcl.api import Classifier, Diverged, Images, MaskPattern, Recipe, UserError
from backdoorbench_mcl.kit import anomaly_index
from bbmcl_inverters.leaves import Dial
from bbmcl_inverters.nc_full import NCFull, Rules, Schedule, judge, one_scale, squash, unsquash

K = 6
SIGNS = torch.where(torch.rand(K, 3, 8, 8, generator=generator(5)) < 0.5, -1.0, 1.0)


class Patterns(Classifier):
    """Each class is a pattern of signs over the whole image; the planted class, if any, is also a white corner."""

    def __init__(self, planted: int | None = None) -> None:
        super().__init__()
        self.planted = planted
        centred = SIGNS - SIGNS.mean((1, 2, 3), keepdim=True)
        self.weight = centred * torch.linspace(7, 14, K).view(-1, 1, 1, 1) / 192

    def features(self, x: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        corner = x[:, :, -3:, -3:].mean((1, 2, 3)).unsqueeze(1)
        return torch.cat([x.flatten(1) @ self.weight.flatten(1).T, corner], 1), ()

    def head(self, z: Tensor) -> Tensor:
        extra = torch.zeros(len(z), K)
        if self.planted is not None:
            extra[:, self.planted] = 60
        return z[:, :K] + extra * (z[:, K:] - 0.6)


def patterned(seed: int, count: int = 60) -> Images:
    noise = torch.randint(-60, 61, (count, 3, 8, 8), generator=generator(seed))
    x = (120 + 40 * SIGNS[torch.arange(count) % K] + noise).to(torch.uint8)
    return Images(x, torch.full((count,), -1))


# ---------------------------------------------------------------- schedule

RULES = Rules(success=0.9, cost=0.25, patience=2, multiplier=4.0, ratio=1.0, stale=3)


def test_schedule_against_a_table() -> None:
    """patience 2, x4 up and /8 down: (success, norm) -> what is kept, cost, counters, flags, best, stale, the end."""
    table: list[tuple[float, float, bool, float, int, int, int, bool, bool, float, int, bool]] = [
        # at cost 0 two successes in a row set it; flags that were set before are cleared, and the step counts anew
        (0.5, 9.0, False, 0.0, 0, 0, 1, False, False, math.inf, 0, False),
        (0.8, 9.0, False, 0.0, 0, 0, 0, False, True, math.inf, 0, False),
        (0.9, 9.0, True, 0.0, 1, 1, 0, False, True, 9.0, 0, False),
        (0.5, 8.0, False, 0.0, 0, 0, 1, False, True, 9.0, 1, False),
        (1.0, 9.0, False, 0.0, 1, 1, 0, False, True, 9.0, 2, False),
        (1.0, 8.0, True, 0.25, 0, 1, 0, False, False, 8.0, 0, False),
        # from there two successes multiply it
        (1.0, 7.0, True, 1.0, 0, 0, 0, True, False, 7.0, 0, False),
        (1.0, 6.0, True, 1.0, 0, 1, 0, True, False, 6.0, 0, False),
        # a failure resets the count of successes, two divide it; smaller norms of failures are not kept
        (0.5, 2.0, False, 1.0, 0, 0, 1, True, False, 6.0, 1, False),
        (0.5, 2.0, False, 0.125, 0, 0, 0, True, True, 6.0, 2, False),
        # a better step resets the early stop; an equal one does not
        (0.9, 5.0, True, 0.125, 0, 1, 0, True, True, 5.0, 0, False),
        (0.9, 5.0, False, 0.5, 0, 0, 0, True, True, 5.0, 1, False),
        (0.5, 5.5, False, 0.5, 0, 0, 1, True, True, 5.0, 2, False),
        (0.9, 5.5, False, 0.5, 0, 0, 1, True, True, 5.0, 3, True),
    ]
    schedule = Schedule()
    for number, (success, norm, *expected) in enumerate(table):
        better = schedule.update(RULES, success, norm)
        s = schedule
        seen = [better, s.cost, s.waited, s.up, s.down, s.raised, s.lowered, s.best, s.stale, s.stopped]
        assert seen == expected, number


def test_schedule_does_not_stop_before_the_cost_has_moved_both_ways() -> None:
    schedule = Schedule()
    for _ in range(30):
        schedule.update(RULES, 1.0, 5.0)
    assert schedule.stale > RULES.stale
    assert schedule.raised
    assert not schedule.stopped


def test_early_ratio_asks_for_progress() -> None:
    """With ratio 0.5 a norm that is not halved at once counts as no progress."""
    rules = Rules(success=0.9, cost=0.25, patience=2, multiplier=4.0, ratio=0.5, stale=3)
    schedule = Schedule(best=8.0, watched=8.0)
    counts = []
    for norm in (7.0, 3.0, 2.0, 0.5):
        schedule.update(rules, 1.0, norm)
        counts.append(schedule.stale)
    assert counts == [1, 0, 1, 0]


def test_dial_says_which_way_it_turned() -> None:
    dial = Dial(1.0)
    assert [dial.turn(won, 2, 4.0) for won in (True, False, True, True, False, False, False)] == [0, 0, 0, 1, 0, -1, 0]
    assert dial.cost == 0.5


# ---------------------------------------------------------------- anomaly index


def test_anomaly_index_golden_values() -> None:
    index = anomaly_index((10, 50, 52, 54, 56))
    assert index == pytest.approx((14.1643, 0.67449, 0, 0.67449, 1.34898), abs=1e-4)


def test_the_median_of_an_even_number_is_the_mean_of_the_middle_two() -> None:
    assert anomaly_index((1, 2, 4, 8)) == pytest.approx([v / (1.4826 * 1.5) for v in (2, 1, 1, 5)])


def test_equal_norms_raise_no_alarm_and_an_outlier_among_them_does() -> None:
    assert anomaly_index((5, 5, 5, 5)) == (0, 0, 0, 0)
    assert anomaly_index((0, 0, 0)) == (0, 0, 0)
    assert max(anomaly_index((49.9, 50, 50, 50))) == pytest.approx(0.2)
    assert anomaly_index((10, 50, 50, 50))[0] == pytest.approx(80)


def test_full_and_coarse_norms_are_brought_to_one_scale() -> None:
    coarse, full = (40.0, 20.0, 10.0, 30.0), {2: 2.0, 1: 10.0, 3: 18.0}
    assert one_scale(coarse, full) == (40 * 0.5, 10.0, 2.0, 18.0)
    assert one_scale((4.0, 2.0), {1: 3.0}) == (4.0, 3.0)  # a longer search makes no norm larger
    assert one_scale((4.0, 0.0), {1: 0.0}) == (4.0, 0.0)


def test_a_longer_search_alone_makes_nobody_suspicious() -> None:
    """Three clean labels searched to the end: beside the coarse norms of the others they would all be outliers."""
    coarse = (52.0, 58.0, 47.0, 61.0, 50.0, 55.0, 64.0, 45.0, 57.0, 49.0)
    full = {7: 9.0, 2: 9.5, 9: 10.0}
    side_by_side = anomaly_index([full.get(label, norm) for label, norm in enumerate(coarse)])
    assert all(side_by_side[label] > 2 for label in full)
    assert judge(coarse, full, list(full), 2.0)[0].flagged == ()
    exact = {7: 9.0, 2: 4.7, 9: 10.0}  # no coarse outlier, whatever comes out of it
    assert judge(coarse, exact, list(full), 2.0)[0].flagged == ()


def test_an_outlier_on_both_scales_is_flagged_most_suspicious_first() -> None:
    coarse = (52.0, 58.0, 12.0, 61.0, 50.0, 55.0, 64.0, 20.0, 57.0, 49.0)
    full = {2: 3.0, 7: 4.0, 9: 12.0}
    verdict, first = judge(coarse, full, [2, 7, 9], 2.0)
    assert verdict.flagged == (2, 7)
    assert first == anomaly_index(coarse)
    assert all(a <= b for a, b in zip(verdict.index, first, strict=True))
    assert judge(coarse, full, [9, 7], 2.0)[0].flagged == (7,)  # 2 sends too few images to its label
    assert judge(coarse, {**full, 2: 12.0}, [2, 7, 9], 2.0)[0].flagged == (7,)  # not an outlier after the full search
    assert judge(coarse, full, [2, 7, 9], 50.0)[0].flagged == ()
    large, shrunk = (50.0, 51.0, 52.0, 53.0, 90.0), {0: 50.0, 1: 51.0, 2: 52.0, 4: 5.0}
    assert judge(large, shrunk, list(shrunk), 2.0)[0].flagged == ()  # an outlier twice, but once a large one


def test_with_all_labels_searched_to_the_end_the_index_is_the_plain_one() -> None:
    full = {4: 56.0, 0: 10.0, 1: 50.0, 3: 54.0, 2: 52.0}
    verdict, _ = judge((60.0, 60.0, 60.0, 60.0, 1.0), full, list(full), 2.0)
    assert verdict.norms == (10, 50, 52, 54, 56)
    assert verdict.index == anomaly_index((10, 50, 52, 54, 56))
    assert verdict.flagged == (0,)
    high = {0: 90.0, 1: 50.0, 2: 52.0, 3: 54.0, 4: 56.0}
    assert judge((1.0,) * 5, high, list(high), 2.0)[0].flagged == ()  # an outlier, but no small one


# ---------------------------------------------------------------- search


def test_tanh_reaches_black_and_white_and_starts_anywhere() -> None:
    ends = squash(torch.tensor([-20.0, 20.0, 0.0]))
    assert ends.tolist() == [0.0, 1.0, 0.5]
    values = torch.tensor([0.0, 1e-7, 0.25, 0.5, 0.99, 1.0])
    assert bool(unsquash(values).isfinite().all())
    assert torch.allclose(squash(unsquash(values)), values, atol=1e-6)


def test_the_whole_search_against_a_literal_one() -> None:
    """Spec 5.2 by its formulas, Adam by its own; the images are the stream of permutations."""
    model, clean, rng = Tiny(), images(20), generator(7)
    eps = 1e-7
    a = [torch.atanh((torch.rand(shape, generator=rng) - 0.5) * (2 - eps)) for shape in ((8, 8), (3, 8, 8))]
    moments = [[torch.zeros_like(v), torch.zeros_like(v)] for v in a]
    queue: list[int] = []
    cost, done, kept, best = 0.0, 0, None, math.inf
    costs, up, waited = [], 0, 0
    for _ in range(4):
        hits, norms = 0.0, 0.0
        for _ in range(3):  # 25 images a step in batches of 8: three of them
            done += 1
            while len(queue) < 8:
                queue += torch.randperm(20, generator=rng).tolist()
            index, queue = queue[:8], queue[8:]
            x = clean.x[index].float() / 255
            for v in a:
                v.requires_grad_()
            m, p = (v.tanh() / (2 - eps) + 0.5 for v in a)
            blended = torch.stack([torch.stack([(1 - m) * plane + m * q for plane, q in zip(i, p)]) for i in x])  # noqa: B905
            logits = model(blended)
            loss = -logits.log_softmax(1)[:, 1].mean() + cost * m.abs().sum()
            hits += float((logits.argmax(1) == 1).float().mean()) / 3
            norms += float(m.detach().sum()) / 3
            moved = []
            for v, gradient, moment in zip(a, torch.autograd.grad(loss, a), moments, strict=True):
                moment[0] = 0.5 * moment[0] + 0.5 * gradient
                moment[1] = 0.9 * moment[1] + 0.1 * gradient**2
                first, second = moment[0] / (1 - 0.5**done), moment[1] / (1 - 0.9**done)
                moved.append((v - 0.1 * first / (second.sqrt() + 1e-8)).detach())
            a = moved
        if hits >= 0.05 and norms < best:  # every step succeeds by so little
            kept, best = [v.tanh() / (2 - eps) + 0.5 for v in a], norms
        costs.append(cost)
        up, waited = up + 1, waited + 1 if cost == 0 else 0
        if waited == 2:
            cost, up, waited = 0.01, 1, 0
        if up == 2 and cost:
            cost, up = cost * 2, 0
        elif up == 2:
            up = 0
    assert costs == [0.0, 0.0, 0.01, 0.02]
    assert kept is not None
    inverter = NCFull(steps=4, images_per_step=25, batch=8, patience=2, cost=0.01, success=0.05)
    bench = Bench(seed=7)
    trigger = inverter.invert(Tiny(), 1, bench.inverter(clean))
    assert torch.allclose(trigger.mask, kept[0], atol=1e-4)
    assert torch.allclose(trigger.pattern, kept[1], atol=1e-4)
    assert bench.ticks == [(i + 1, 12, 8) for i in range(12)]


def small(**more: Any) -> NCFull:
    return NCFull(images_per_step=60, batch=60, patience=3, **{"steps": 90, "coarse_steps": 60, **more})


def test_finds_a_planted_patch() -> None:
    model, clean = Patterns(planted=3), patterned(2)
    trigger = small().invert(model, 3, Bench(classes=K).inverter(clean))
    x = clean.x.float() / 255
    assert float((model(x).argmax(1) == 3).float().mean()) < 0.2
    assert float((model(trigger.apply(x)).argmax(1) == 3).float().mean()) >= 0.9
    assert float(trigger.mask[-3:, -3:].sum()) > 0.9 * float(trigger.mask.sum())
    used = trigger.mask[-3:, -3:] > 0.5
    assert bool(used.any())
    assert float(trigger.pattern[:, -3:, -3:][:, used].mean()) > 0.9


@pytest.mark.parametrize("seed", [2, 3])
def test_detects_the_planted_label_and_no_other(seed: int) -> None:
    bench = Bench(classes=K, seed=seed)
    verdict = small().detect(Patterns(planted=3), bench.inverter(patterned(seed)))
    assert verdict.flagged == (3,)
    assert min(range(K), key=verdict.norms.__getitem__) == 3
    assert verdict.index[3] > 2
    assert sum(", full " in line for line in bench.lines) == 3


@pytest.mark.parametrize("seed", [2, 3])
def test_a_clean_network_is_called_clean(seed: int) -> None:
    """Of five seeds that were tried two raise a false alarm with six labels (spec 5.3), these do not."""
    bench = Bench(classes=K, seed=seed)
    verdict = small().detect(Patterns(), bench.inverter(patterned(seed)))
    assert verdict.flagged == ()
    assert len(verdict.index) == len(verdict.norms) == K
    assert np.ptp(verdict.norms) < max(verdict.norms) / 2


def test_the_last_trigger_is_returned_where_no_step_succeeds() -> None:
    bench = Bench(classes=K)
    trigger = small(steps=2, success=1.0).invert(Patterns(), 1, bench.inverter(patterned(0)))
    last = bench.snapshot.saved[-1][0]
    assert "best.mask" not in last
    assert torch.equal(trigger.mask, squash(last["mask"]))
    assert torch.equal(trigger.pattern, squash(last["pattern"]))
    assert float(trigger.mask.sum()) > 0


def test_early_stop_ends_the_search() -> None:
    bench = Bench(classes=K)
    small(steps=400, early_patience=5).invert(Patterns(planted=3), 3, bench.inverter(patterned(2)))
    assert len(bench.ticks) < 200
    assert bench.snapshot.saved[-1][1]["schedule"]["stopped"]


def test_every_image_comes_once_before_any_comes_again() -> None:
    from bbmcl_inverters.nc_full import Search

    x = (torch.arange(10, dtype=torch.uint8)[:, None, None, None] * 20).expand(10, 3, 8, 8).contiguous()
    clean = Images(x, torch.full((10,), -1))
    context = Bench().inverter(clean)
    search = Search((3, 8, 8), 0.1, context.rng, context.device)
    drawn = torch.cat([search.batch(clean, 4, context)[:, 0, 0, 0] for _ in range(10)])  # 40 = four passes
    for part in (drawn * 255 / 20).round().to(torch.int64).split(10):
        assert part.sort().values.tolist() == list(range(10))
    assert len(search.batch(clean, 32, context)) == 32  # a step may be larger than the clean set


# ---------------------------------------------------------------- resume


def test_a_resumed_search_ends_in_the_same_bits() -> None:
    inverter = NCFull(steps=8, images_per_step=20, batch=8, patience=2, success=0.1)

    def run(snapshot: Memory, seed: int) -> tuple[MaskPattern, Bench]:
        bench = Bench(seed=seed, recipe=Recipe(augment="crop+flip"), snapshot=snapshot)
        return inverter.invert(Tiny(), 2, bench.inverter(images())), bench

    whole, bench = run(Memory(), 1)
    assert len(bench.snapshot.saved) == 8
    for save in bench.snapshot.saved:
        resumed, again = run(Memory(save), 99)
        assert torch.equal(resumed.mask, whole.mask)
        assert torch.equal(resumed.pattern, whole.pattern)
        assert again.ticks == bench.ticks[2 * save[1]["step"] :]


def test_a_resumed_detection_ends_in_the_same_bits() -> None:
    inverter = NCFull(
        steps=6, images_per_step=20, batch=8, patience=1, success=0.3, coarse_steps=3, finalists=2, early_patience=3
    )

    def run(snapshot: Memory, seed: int) -> tuple[Any, Bench]:
        bench = Bench(seed=seed, recipe=Recipe(augment="crop+flip"), snapshot=snapshot)
        return inverter.detect(Tiny(), bench.inverter(images())), bench

    whole, bench = run(Memory(), 1)
    saves = bench.snapshot.saved
    assert 4 * 3 < len(saves) <= 4 * 3 + 2 * 3
    assert bench.ticks[-1][1] == (4 * 3 + 2 * 3) * 2
    assert [done for done, _, _ in bench.ticks] == list(range(1, len(bench.ticks) + 1))
    for number, save in enumerate(saves):
        resumed, again = run(Memory(save), 99)
        assert resumed == whole, number
        assert again.ticks == bench.ticks[2 * (number + 1) :]


def test_a_label_is_searched_alike_whatever_the_others_do() -> None:
    found = []
    for finalists in (1, 4):
        inverter = NCFull(steps=4, images_per_step=16, batch=8, coarse_steps=2, finalists=finalists)
        bench = Bench(classes=4)
        inverter.detect(Tiny(), bench.inverter(images()))
        found.append([line.partition(",")[0].partition(";")[0] for line in bench.lines if "L1 coarse" in line])
    assert found[0] == found[1]


# ---------------------------------------------------------------- refusals


def test_the_model_is_left_alone_and_nonsense_is_refused() -> None:
    class Broken(Patterns):
        def head(self, z: Tensor) -> Tensor:
            return super().head(z) * math.nan

    model = Tiny()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    NCFull(steps=2, images_per_step=16, batch=8).invert(model.train(), 0, Bench().inverter(images()))
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    with pytest.raises(Diverged, match="nc-full: loss nan"):
        small().invert(Broken(), 1, Bench().inverter(patterned(0)))
    for call in (lambda ctx: small().invert(Patterns(), 1, ctx), lambda ctx: small().detect(Patterns(), ctx)):
        with pytest.raises(UserError, match="nc-full: no clean images"):
            call(Bench(classes=K).inverter(patterned(0, 0)))
