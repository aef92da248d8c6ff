"""mesa against literal formulas, a planted family of three patches, resume, and what its patches do to images."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny import Bench, Memory, Tiny, generator, images, same
from tiny import one_thread as one_thread
from torch import Tensor

from backdoorbench_mcl.api import (
    Classifier,
    Diverged,
    Granted,
    Images,
    InverterContext,
    Location,
    Recipe,
    UserError,
)
from bbmcl_inverters.mesa import (
    MESA,
    Critic,
    Generator,
    Member,
    Patches,
    clipped_success,
    critic_gain,
    information,
    paste,
)

PLACE = Location(1, 4, 3, 2)  # neither square nor in a corner: rows and columns cannot be mixed up unseen


def context(bench: Bench, clean: Images, place: Location = PLACE) -> InverterContext:
    return dataclasses.replace(bench.inverter(clean), granted=Granted("mesa", {"location": place, "target": 0}))


def small(**changes: Any) -> MESA:
    return MESA(**{"width": 12, "batch": 8, "epochs": 2, **changes})


def run(inverter: MESA, bench: Bench | None = None) -> Patches:
    return inverter.invert(Tiny(), 2, context(Bench() if bench is None else bench, images()))


# ---------------------------------------------------------------- formulas


def test_success_is_cut_at_beta_and_so_is_its_gradient() -> None:
    chances = torch.tensor([0.3, 0.6, 0.95])
    logits = torch.stack([(1 - chances).log(), chances.log()], 1).requires_grad_()
    value = clipped_success(logits, 1, 0.5)
    assert float(value.detach()) == pytest.approx((0.3 + 0.5 + 0.5) / 3, abs=1e-6)
    (gradient,) = torch.autograd.grad(value, logits)
    assert gradient[0, 1] == pytest.approx(0.3 * 0.7 / 3, abs=1e-6)  # p (1 - p), below the level
    assert not gradient[1:].any()


def test_information_of_two_scores_by_hand() -> None:
    joint, marginal = torch.tensor([1.0, 3.0]), torch.tensor([0.0, 1.0])
    assert float(information(joint, marginal)) == pytest.approx(2 - math.log((1 + math.e) / 2), abs=1e-6)
    assert float(information(torch.zeros(4), torch.zeros(4))) == pytest.approx(0, abs=1e-6)


def test_critic_gain_has_the_gradient_of_mine() -> None:
    """d mean T - dE / average, and nothing comes through the average or the detached E: by loops, not autograd."""
    joint = torch.randn(5, generator=generator(1), dtype=torch.float64).requires_grad_()
    marginal = torch.randn(5, generator=generator(2), dtype=torch.float64).requires_grad_()
    average = torch.tensor(2.5, dtype=torch.float64)
    gain = critic_gain(joint, marginal, average)
    mean = sum(math.exp(float(t)) for t in marginal.detach()) / 5
    assert float(gain.detach()) == pytest.approx(float(joint.detach().mean()) - math.log(mean + 1e-8) * mean / 2.5)
    of_joint, of_marginal = torch.autograd.grad(gain, (joint, marginal))
    assert of_joint.tolist() == pytest.approx([0.2] * 5)
    expected = [-math.exp(float(t)) / 5 / (mean + 1e-8) * mean / 2.5 for t in marginal.detach()]
    assert of_marginal.tolist() == pytest.approx(expected)


def test_steps_along_critic_gain_tighten_the_bound() -> None:
    """Patches that are a function of the noise: a critic that is trained sees it, one that is not does not."""
    critic = Critic((1, 2, 2), 24)
    critic.draw(generator(0))
    adam = torch.optim.Adam(critic.parameters(), lr=2e-3)
    z, other = (torch.rand(128, 64, generator=generator(seed)) for seed in (1, 2))
    q = z[:, :4].view(-1, 1, 2, 2)
    start = float(information(critic(z, q), critic(other, q)).detach())
    for _ in range(60):
        adam.zero_grad()
        marginal = critic(other, q)
        torch.autograd.backward(-critic_gain(critic(z, q), marginal, marginal.detach().exp().mean()))
        adam.step()
    assert float(information(critic(z, q), critic(other, q)).detach()) > start + 0.5


def test_paste_replaces_the_box_and_leaves_its_input() -> None:
    x = torch.rand(2, 3, 8, 8, generator=generator(0)).requires_grad_()
    patches = torch.rand(2, 3, 3, 2, generator=generator(1)).requires_grad_()
    out = paste(x, patches, PLACE)
    for b in range(2):
        for i in range(8):
            for j in range(8):
                inside = 1 <= i < 4 and 4 <= j < 6
                assert torch.equal(out[b, :, i, j], patches[b, :, i - 1, j - 4] if inside else x[b, :, i, j])
    of_x, of_patches = torch.autograd.grad(out.sum(), (x, patches))
    assert torch.equal(of_patches, torch.ones_like(patches))
    assert float(of_x.sum()) == 2 * 3 * (64 - 6)


def test_generator_and_critic_as_the_paper_draws_them() -> None:
    maker, judge = Generator((3, 3, 2), 12), Critic((3, 3, 2), 12)
    maker.draw(generator(0))
    judge.draw(generator(1))
    z = torch.rand(6, 64, generator=generator(2))
    h = torch.zeros(6, 0)
    for i in range(3):
        weight = dict(maker.named_parameters())[f"hidden.{i}.weight"]
        out = torch.cat([h, z[:, 16 * i : 16 * i + 16]], 1) @ weight.T
        out = (out - out.mean(0)) / (out.var(0, unbiased=False) + 1e-5).sqrt()
        h = torch.where(out > 0, out, 0.2 * out)
    expected = 1 / (1 + (-(torch.cat([h, z[:, 48:]], 1) @ maker.out.weight.T + maker.out.bias)).exp())
    q = maker(z)
    assert q.shape == (6, 3, 3, 2)
    assert torch.allclose(q.flatten(1), expected, atol=1e-5)
    first = judge.first.weight
    a = F.leaky_relu(z @ first[:, :64].T + q.flatten(1) @ first[:, 64:].T + judge.first.bias, 0.2)
    b = F.leaky_relu(a @ judge.second.weight.T + judge.second.bias, 0.2)
    assert torch.allclose(judge(z, q), F.leaky_relu(b @ judge.last.weight[0] + judge.last.bias, 0.2), atol=1e-5)


def test_weights_start_by_their_rules_from_the_generator_given() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    maker, judge = Generator((3, 3, 3), 200), Critic((3, 3, 3), 200)
    maker.draw(generator(0))
    judge.draw(generator(0))
    assert torch.equal(torch.get_rng_state(), before)  # nothing comes from the global generator
    second = dict(maker.named_parameters())["hidden.1.weight"]
    assert float(second.detach().abs().max()) == pytest.approx(216**-0.5, rel=1e-3)
    gain = math.sqrt(2 / 1.04)
    assert float(judge.first.weight.detach()[:, :64].std()) == pytest.approx(gain / 8, rel=0.03)
    assert float(judge.first.weight.detach()[:, 64:].std()) == pytest.approx(gain / 27**0.5, rel=0.03)
    assert float(judge.second.weight.detach().std()) == pytest.approx(gain / 200**0.5, rel=0.03)
    assert not judge.second.bias.any()


# ---------------------------------------------------------------- the search


class _Adam:
    """Adam by its formula, for a dict of leaves."""

    def __init__(self, leaves: dict[str, Tensor], lr: float) -> None:
        self.leaves, self.lr, self.step = leaves, lr, 0
        self.first = {k: torch.zeros_like(v) for k, v in leaves.items()}
        self.second = {k: torch.zeros_like(v) for k, v in leaves.items()}

    def descend(self, loss: Tensor) -> None:
        self.step += 1
        gradients = torch.autograd.grad(loss, list(self.leaves.values()), retain_graph=True)
        for (name, leaf), g in zip(self.leaves.items(), gradients, strict=True):
            self.first[name] = 0.5 * self.first[name] + 0.5 * g
            self.second[name] = 0.999 * self.second[name] + 0.001 * g**2
            first = self.first[name] / (1 - 0.5**self.step)
            second = self.second[name] / (1 - 0.999**self.step)
            with torch.no_grad():
                leaf -= self.lr * first / (second.sqrt() + 1e-8)


def test_the_whole_search_against_a_literal_one() -> None:
    """Spec 8.3 line by line: both losses, the average of E, who gets which gradient, order of the draws."""
    clean, model, rng = images(20), Tiny(), generator(7)
    maker, judge = Generator((3, 3, 2), 12), Critic((3, 3, 2), 12)
    maker.draw(rng)
    judge.draw(rng)
    maker_adam = _Adam(dict(maker.named_parameters()), 0.01)
    judge_adam = _Adam(dict(judge.named_parameters()), 0.01)
    average = None
    for _ in range(3):
        for index in torch.split(torch.randperm(20, generator=rng), 8):
            z, other = torch.rand(8, 64, generator=rng), torch.rand(8, 64, generator=rng)
            q = maker(z)
            rough = q + 0.1 * torch.randn(q.shape, generator=rng)
            x = clean.x[index].float() / 255
            x[:, :, 1:4, 4:6] = rough[: len(index)]
            p = model(x).softmax(1)[:, 2]
            success = torch.minimum(p, torch.tensor(0.4)).mean()
            bound = judge(z, q).mean() - torch.log(judge(other, q).exp().mean() + 1e-8)
            maker_adam.descend(-success - 0.3 * bound)
            e = judge(other, rough.detach()).exp().mean()
            average = float(e.detach()) if average is None else 0.999 * average + 0.001 * float(e.detach())
            judge_adam.descend(-(judge(z, rough.detach()).mean() - torch.log(e + 1e-8) * float(e.detach()) / average))
    bench = Bench(seed=7)
    found = small(lr=0.01, epochs=3, alpha=0.3, betas=(0.4,)).invert(Tiny(), 2, context(bench, clean))
    weights = found.generators[0].state_dict()
    for name, expected in maker.state_dict().items():
        assert torch.allclose(weights[name].float(), expected.float(), atol=2e-4), name
    saved = bench.snapshot.saved[-1][0]
    for name, expected in judge.state_dict().items():
        assert torch.allclose(saved[f"0.critic.{name}"], expected, atol=2e-4), name
    assert float(saved["0.average"]) == pytest.approx(average, rel=1e-4)


class Family(Classifier):
    """Class 1 where the bottom right 3x3 pixels are near any one of three patches, class 0 elsewhere. No weights."""

    REACH = 0.3  # mean distance of a pixel; the three are 0.41 to 0.59 apart

    def __init__(self) -> None:
        super().__init__()
        rng = generator(5)
        self.known = torch.stack([torch.randint(0, 2, (3, 3, 3), generator=rng) for _ in range(3)]).float()

    def distance(self, patches: Tensor) -> Tensor:
        return (patches[:, None] - self.known).abs().mean((2, 3, 4))  # (B, 3)

    def features(self, x: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        return self.distance(x[:, :, -3:, -3:]), ()

    def head(self, z: Tensor) -> Tensor:
        hit = 20 * (self.REACH - z.amin(1, keepdim=True))
        return torch.cat([torch.zeros_like(hit), hit], 1)


def test_covers_a_planted_family_of_patches() -> None:
    """Measured over seeds 0-4: two of the three each time, the second with at least 31 % of the samples."""
    model = Family()
    clean = Images(
        torch.randint(0, 256, (64, 3, 8, 8), generator=generator(0), dtype=torch.uint8), torch.zeros(64).long()
    )
    inverter = MESA(steps=250, batch=64, width=256, lr=5e-4)
    trigger = inverter.invert(model, 1, context(Bench(classes=2, seed=0), clean, Location(5, 5, 3, 3)))
    x = clean.x.float() / 255
    assert not model(x).argmax(1).any()
    assert float(model(trigger.apply(x, generator(2))).argmax(1).float().mean()) > 0.9
    patches = trigger.sample(512, generator(3))
    distance = model.distance(patches)
    fires = distance.amin(1) < model.REACH
    shares = [float((fires & (distance.argmin(1) == k)).float().mean()) for k in range(3)]
    assert float(fires.float().mean()) > 0.9
    assert sum(share > 0.1 for share in shares) >= 2, shares


class Flat(Classifier):
    """The same chances for every image, so that nothing but variety is left to be gained."""

    def features(self, x: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        return 0 * x.mean((1, 2, 3)).unsqueeze(1), ()

    def head(self, z: Tensor) -> Tensor:
        return torch.cat([z, z], 1)


def test_alpha_pays_for_variety() -> None:
    spread = []
    for alpha in (0.0, 1.0):
        inverter = MESA(alpha=alpha, steps=120, batch=64, width=48, lr=1e-3, noise=0.0)
        trigger = inverter.invert(Flat(), 1, context(Bench(classes=2), images(64)))
        spread.append(float(trigger.sample(256, generator(0)).std(0).mean()))
    assert spread[1] > 2 * spread[0], spread


def test_every_success_level_has_its_own_generator_on_the_same_images() -> None:
    bench = Bench()
    trigger = run(small(betas=(0.5, 0.9), steps=4), bench)
    assert len(trigger.generators) == 2
    assert not same(trigger.generators[0].state_dict(), trigger.generators[1].state_dict())
    assert bench.ticks == [(1, 4, 16), (2, 4, 16), (3, 4, 16), (4, 4, 16)]  # 24 images: 3 steps a pass
    assert len(bench.lines) == 4  # two passes of two members
    assert "beta 0.5" in bench.lines[0] and "beta 0.9" in bench.lines[1]


def test_a_level_that_is_reached_moves_nothing() -> None:
    """Where the network is sure of the target and alpha is 0, beta 0.5 leaves the generator as it was drawn."""

    class Sure(Flat):
        def head(self, z: Tensor) -> Tensor:
            return torch.cat([z, z + 2], 1)  # p = 0.88

    drawn = Generator((3, 3, 2), 12)
    drawn.draw(generator(1))
    trigger = small(alpha=0.0, betas=(0.5,)).invert(Sure(), 1, context(Bench(classes=2), images()))
    for name, value in drawn.named_parameters():
        assert torch.equal(dict(trigger.generators[0].named_parameters())[name], value)


def test_the_last_short_batch_is_used_and_one_image_is_enough() -> None:
    bench = Bench()
    MESA(width=12, batch=8, epochs=1).invert(Tiny(), 0, context(bench, images(17)))
    assert bench.ticks == [(1, 3, 8), (2, 3, 8), (3, 3, 1)]
    MESA(width=12, steps=2).invert(Tiny(), 0, context(Bench(), images(1)))


@pytest.mark.parametrize("limits", [{"epochs": 4}, {"steps": 10}])
def test_a_resumed_search_ends_in_the_same_bits(limits: dict[str, Any]) -> None:
    inverter = small(betas=(0.5, 0.9), lr=0.01, **limits)
    recipe = Recipe(augment="crop+flip")
    bench = Bench(seed=1, recipe=recipe)
    whole = run(inverter, bench)
    assert len(bench.snapshot.saved) == 4
    for saved in bench.snapshot.saved:
        again = Bench(seed=99, recipe=recipe, snapshot=Memory(saved))
        assert same(run(inverter, again).tensors(), whole.tensors())
        assert len(again.ticks) == len(bench.ticks) - saved[1]["step"]


def test_seeds_matter_and_nothing_else_does() -> None:
    first, again, other = (run(small(), Bench(seed=seed)).tensors() for seed in (1, 1, 2))
    assert same(first, again)
    assert not same(first, other)


def test_the_patches_are_fitted_to_augmented_images() -> None:
    plain, flipped = (run(small(), Bench(recipe=Recipe(augment=augment))) for augment in ("none", "crop+flip"))
    assert not same(plain.tensors(), flipped.tensors())


def test_the_model_is_left_alone() -> None:
    model = Tiny().train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    small().invert(model, 0, context(Bench(), images()))
    assert same(before, model.state_dict())
    assert all(p.grad is None for p in model.parameters())


def test_a_broken_model_diverges_and_no_images_are_refused() -> None:
    class Broken(Flat):
        def head(self, z: Tensor) -> Tensor:
            return torch.cat([z, z * math.nan], 1)

    with pytest.raises(Diverged, match="mesa: loss or weights are not finite by step 3"):
        small().invert(Broken(), 1, context(Bench(classes=2), images()))
    with pytest.raises(UserError, match="mesa: no clean images"):
        small().invert(Tiny(), 0, context(Bench(), images().subset(torch.empty(0, dtype=torch.int64))))


@pytest.mark.parametrize("bad", [{"betas": ()}, {"betas": (0.0,)}, {"betas": (1.5,)}, {"batch": 1}, {"alpha": -0.1}])
def test_parameters_out_of_range_are_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=f"mesa: {next(iter(bad))}"):
        MESA(**bad)


# ---------------------------------------------------------------- the trigger


def fitted(betas: tuple[float, ...] = (0.5, 0.8, 0.9)) -> Patches:
    """Generators of recognisable patches: number k makes nothing but k / 4, but for a little noise."""
    trigger = run(small(betas=betas))
    with torch.no_grad():
        for k, maker in enumerate(trigger.generators):
            maker.out.weight.mul_(1e-3)
            maker.out.bias.fill_(math.log((k + 1) / 4 / (1 - (k + 1) / 4)))
    return trigger


def test_patches_are_pasted_at_the_place_and_nowhere_else() -> None:
    trigger = run(small())
    x = images(6).x.float() / 255
    before = x.clone()
    out = trigger.apply(x, generator(0))
    assert torch.equal(x, before)
    assert torch.equal(out[:, :, 1:4, 4:6], trigger.sample(6, generator(0)))
    out[:, :, 1:4, 4:6] = x[:, :, 1:4, 4:6]
    assert torch.equal(out, x)


def test_every_image_has_a_patch_of_its_own_whatever_lies_beside_it() -> None:
    """Batch norm with the batch's own statistics, as while fitting, would tie the patches of a batch together."""
    trigger = run(small())
    many = trigger.sample(9, generator(0))
    assert many.shape == (9, 3, 3, 2)
    assert bool(((many > 0) & (many < 1)).all())
    assert len(many.flatten(1).unique(dim=0)) == 9
    assert torch.allclose(trigger.sample(4, generator(0)), many[:4], atol=1e-6)
    assert torch.equal(trigger.sample(4), trigger.sample(4))
    assert not torch.equal(trigger.sample(4, generator(0)), trigger.sample(4, generator(1)))


def test_generators_take_turns_and_a_random_one_begins() -> None:
    trigger, rng = fitted(), generator(0)
    starts = set()
    for _ in range(20):
        who = (trigger.sample(7, rng).mean((1, 2, 3)) * 4).round().long() - 1
        assert who.tolist() == [(int(who[0]) + i) % 3 for i in range(7)]
        starts.add(int(who[0]))
    assert starts == {0, 1, 2}  # else single images would know one generator only


def test_trigger_round_trip() -> None:
    trigger = run(small(betas=(0.5, 0.9)))
    again = Patches.from_tensors({k: v.clone() for k, v in trigger.tensors().items()})
    assert same(again.tensors(), trigger.tensors())
    assert again.location == PLACE
    assert isinstance(again.location.top, int)
    x = images(5).x.float() / 255
    assert torch.equal(again.apply(x, generator(4)), trigger.apply(x, generator(4)))
    assert all(tensor.isfinite().all() for tensor in trigger.tensors().values())
    with pytest.raises(ValueError, match="do not fit"):
        Patches(trigger.generators, Location(0, 0, 4, 4))


def test_large_patches_and_grey_images() -> None:
    x = Images(torch.randint(0, 256, (8, 1, 16, 16), generator=generator(0), dtype=torch.uint8), torch.zeros(8).long())
    trigger = small(steps=1).invert(Flat(), 1, context(Bench(classes=2), x, Location(0, 4, 16, 12)))
    assert trigger.sample(2).shape == (2, 1, 16, 12)
    assert Patches.from_tensors(trigger.tensors()).sample(2).shape == (2, 1, 16, 12)


def test_declares_what_it_must_be_told() -> None:
    assert MESA().knows == {"target", "location"}
    assert MESA().params["betas"] == (0.9,) and MESA().params["width"] == 512


def test_members_draw_all_they_use_from_the_generator_given() -> None:
    first, again = (Member.start(0.9, (3, 3, 2), 8, 1e-3, generator(3), torch.device("cpu")) for _ in range(2))
    assert same(first.generator.state_dict(), again.generator.state_dict())
    assert same(first.critic.state_dict(), again.critic.state_dict())
