"""mesa: a generator of patches that covers the set of valid triggers at a known place, instead of one trigger.

For each success level beta a generator is trained by the clipped success of its patches plus alpha times a lower bound
of the mutual information between noise and patch, which a critic estimates (MINE): patches that succeed well enough
gain nothing by succeeding better, so what is left to gain is variety.

Paper: X. Qiao, Y. Yang, H. Li, "Defending Neural Backdoors via Generative Distribution Modeling" (MESA), NeurIPS 2019
(arXiv 1910.04749); the bound is that of M. I. Belghazi et al., "MINE", ICML 2018. Source: spec 8.3.
Differs: the patch is pasted where the attacker pastes it, not at random; the images are the few clean ones that the
defense owns instead of 80 % of the test set, hence 40 epochs instead of 10 (20 batches an epoch on CIFAR-10 with 5 %
clean images: 800 steps, where 10 epochs of the original are some 630). MESA's own retraining is left out: MCLDef's
second stage takes the patches. A patch larger than about 8x8 is made by the same fully connected generator with more
outputs; there is no convolutional one. The running mean of the bound's gradient starts at the first batch, 128 patches
are made however few images are left, and the critic's first layer is scaled for noise and patch apart. The place is one
that shows the same pixels in every image: Trojan in its adding form (`mode=wrap`, preset `authors`) has none, n/a.
Should reach: MCLDef with this inverter on CIFAR-10, WRN-16-1, 5 % clean images: ASR 1.34 and BA 82.76 for BadNets, 1.50
and 82.76 for Trojan, 0.09 and 84.98 for CL (spec 11, Table 2, n = 1); no patch of fixed pixels, no result.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backdoorbench_mcl.api import (
    Classifier,
    Count,
    Diverged,
    Ge,
    Interval,
    Inverter,
    InverterContext,
    Knowledge,
    Location,
    NonNegative,
    Positive,
    Trigger,
    UserError,
)

CHUNK, LAYERS = 16, 4  # noise: one chunk for each layer of the generator, 64 numbers in all
SLOPE = 0.2
EPS = 1e-8
EMA_RATE = 0.001
MOMENTS = (0.5, 0.999)  # Adam's betas

# ---------------------------------------------------------------- pure functions


def paste(x: Tensor, patches: Tensor, location: Location) -> Tensor:
    """Images (B, C, H, W) with patch b (B, C, h, w) over image b at the location; a new tensor."""
    top, left, height, width = location
    out = x.clone()
    out[:, :, top : top + height, left : left + width] = patches
    return out


def clipped_success(logits: Tensor, target: int, beta: float) -> Tensor:
    """mean_b min(softmax(logits_b)[target], beta): logits (B, K) -> a scalar; above beta there is no gradient."""
    return logits.softmax(1)[:, target].clamp(max=beta).mean()


def information(joint: Tensor, marginal: Tensor) -> Tensor:
    """Lower bound of the mutual information, in nats: mean T - log(mean exp T' + 1e-8).

    joint: the critic's scores (B,) of noise with its own patch; marginal: (B,) of other noise with the same patches.
    """
    return joint.mean() - (marginal.exp().mean() + EPS).log()


def critic_gain(joint: Tensor, marginal: Tensor, average: Tensor) -> Tensor:
    """What the critic maximises: mean T - log(E + 1e-8) * stopgrad(E) / average, with E = mean exp T'.

    average: a moving average of E. The gradient of the second term is then that of E over `average` instead of over the
    E of one batch, whose ratio is biased (MINE, section 3.2).
    """
    mean = marginal.exp().mean()
    return joint.mean() - (mean + EPS).log() * mean.detach() / average


def _uniform(count: int, rng: torch.Generator, device: torch.device) -> Tensor:
    return torch.rand(count, LAYERS * CHUNK, generator=rng).to(device)  # on the CPU: the same noise on every device


# ---------------------------------------------------------------- networks


def _linear(inputs: int, outputs: int, bias: bool = True) -> nn.Linear:
    layer: nn.Linear = nn.utils.skip_init(nn.Linear, inputs, outputs, bias)  # else drawn from the global generator
    return layer


class Generator(nn.Module):
    """Noise (B, 64) -> patches (B, C, h, w) in [0, 1]: every layer gets a chunk of the noise of its own."""

    def __init__(self, shape: tuple[int, int, int], width: int) -> None:
        super().__init__()
        self.shape = shape
        # no biases here: batch norm takes them out again
        self.hidden = nn.ModuleList(_linear((i > 0) * width + CHUNK, width, False) for i in range(LAYERS - 1))
        self.norms = nn.ModuleList(nn.BatchNorm1d(width) for _ in range(LAYERS - 1))
        self.out = _linear(width + CHUNK, math.prod(shape))

    def draw(self, rng: torch.Generator) -> None:
        """PyTorch's usual start for linear layers, uniform within 1 / sqrt(inputs), from `rng`."""
        with torch.no_grad():
            for layer in (*self.hidden, self.out):
                bound = layer.in_features**-0.5
                for parameter in layer.parameters():
                    parameter.uniform_(-bound, bound, generator=rng)

    def forward(self, z: Tensor) -> Tensor:
        first, *rest = z.split(CHUNK, 1)
        h = first  # (B, 16), then (B, width + 16)
        for layer, norm, chunk in zip(self.hidden, self.norms, rest, strict=True):
            h = torch.cat([F.leaky_relu(norm(layer(h)), SLOPE), chunk], 1)
        return torch.as_tensor(self.out(h)).sigmoid().view(-1, *self.shape)


class Critic(nn.Module):
    """Noise (B, 64) and patches (B, C, h, w) -> how well they belong together, (B,)."""

    def __init__(self, shape: tuple[int, int, int], width: int) -> None:
        super().__init__()
        self.first = _linear(LAYERS * CHUNK + math.prod(shape), width)  # Wz z + Wq q + b, side by side
        self.second = _linear(width, width)
        self.last = _linear(width, 1)

    def draw(self, rng: torch.Generator) -> None:
        """Kaiming normal for the slope in use, biases 0, from `rng`; z and q count as inputs of their own."""
        gain = math.sqrt(2 / (1 + SLOPE**2))
        noise = LAYERS * CHUNK
        with torch.no_grad():
            for layer in (self.first, self.second, self.last):
                parts = (noise, layer.in_features - noise) if layer is self.first else (layer.in_features,)
                for part in layer.weight.split(parts, 1):
                    part.normal_(0, gain / math.sqrt(part.shape[1]), generator=rng)
                layer.bias.zero_()

    def forward(self, z: Tensor, q: Tensor) -> Tensor:
        h = torch.cat([z, q.flatten(1)], 1)
        for layer in (self.first, self.second, self.last):
            h = F.leaky_relu(layer(h), SLOPE)
        return h[:, 0]


# ---------------------------------------------------------------- what comes out


class Patches(Trigger):
    """A fresh patch on every image, at one place; the generators take turns, beginning with a random one."""

    def __init__(self, generators: list[Generator], location: Location) -> None:
        if not generators or any(g.shape[1:] != (location.height, location.width) for g in generators):
            raise ValueError(f"patches: the generators' {[g.shape for g in generators]} do not fit {location}")
        self.generators = [generator.eval().requires_grad_(False) for generator in generators]
        self.location = location

    def sample(self, n: int, rng: torch.Generator | None = None) -> Tensor:
        """Patches (n, C, h, w) in [0, 1]; without `rng` always the same ones."""
        rng = torch.Generator() if rng is None else rng
        turns = len(self.generators)
        start = int(torch.randint(turns, (), generator=rng))
        device = self.generators[0].out.weight.device
        z = _uniform(n, rng, device)
        out = torch.empty(n, *self.generators[0].shape, device=device)
        for i, generator in enumerate(self.generators):
            mine = slice((i - start) % turns, None, turns)
            out[mine] = generator(z[mine])
        return out

    def apply(self, x: Tensor, rng: torch.Generator | None = None) -> Tensor:
        return paste(x, self.sample(len(x), rng), self.location)

    def tensors(self) -> dict[str, Tensor]:
        weights = {f"{i}.{k}": v for i, g in enumerate(self.generators) for k, v in g.state_dict().items()}
        return {**weights, "location": torch.tensor(self.location)}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> Patches:
        location = Location(*(int(value) for value in tensors["location"]))
        generators: list[Generator] = []
        while f"{len(generators)}.out.weight" in tensors:
            prefix = f"{len(generators)}."
            weights = {k[len(prefix) :]: v for k, v in tensors.items() if k.startswith(prefix)}
            outputs, inputs = weights["out.weight"].shape
            shape = (outputs // (location.height * location.width), location.height, location.width)
            generator = Generator(shape, inputs - CHUNK)
            generator.load_state_dict(weights)
            generators.append(generator.to(weights["out.weight"].device))
        return cls(generators, location)


# ---------------------------------------------------------------- fitting


@dataclass
class Member:
    """One sub-model in training. average: of E in `critic_gain`, 0 before the first step."""

    beta: float
    generator: Generator
    critic: Critic
    adams: tuple[torch.optim.Adam, torch.optim.Adam]
    average: Tensor

    @classmethod
    def start(
        cls, beta: float, shape: tuple[int, int, int], width: int, lr: float, rng: torch.Generator, device: torch.device
    ) -> Member:
        """Weights drawn on the CPU, so that every device starts from the same values."""
        networks = Generator(shape, width), Critic(shape, width)
        for network in networks:
            network.draw(rng)
            network.to(device).train()
        adams = [torch.optim.Adam(network.parameters(), lr=lr, betas=MOMENTS) for network in networks]
        return cls(beta, *networks, (adams[0], adams[1]), torch.zeros((), device=device))

    def step(
        self, model: Classifier, x: Tensor, target: int, location: Location, *, alpha: float, noise: float, batch: int,
        rng: torch.Generator,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """One step of the generator, then one of the critic: clipped success and information of the first, detached.

        `batch` patches are made even where fewer images are left, so that the critic never compares a handful.
        """
        z, other = _uniform(batch, rng, x.device), _uniform(batch, rng, x.device)
        patches = self.generator(z)
        rough = patches + noise * torch.randn(patches.shape, generator=rng).to(x.device)
        success = clipped_success(model(paste(x, rough[: len(x)], location)), target, self.beta)
        bound = information(self.critic(z, patches), self.critic(other, patches))
        self._descend(0, -success - alpha * bound)

        seen = rough.detach()
        marginal = self.critic(other, seen)
        mean = marginal.detach().exp().mean()
        # from the first batch on: from 1, say, the average would take a thousand steps to forget where it began
        self.average = torch.where(self.average == 0, mean, torch.lerp(self.average, mean, EMA_RATE))
        self._descend(1, -critic_gain(self.critic(z, seen), marginal, self.average))
        return success.detach(), bound.detach()

    def _descend(self, which: int, loss: Tensor) -> None:
        network, adam = (self.generator, self.critic)[which], self.adams[which]
        adam.zero_grad(set_to_none=True)
        torch.autograd.backward(loss, inputs=list(network.parameters()))  # the other network only passes it on
        adam.step()

    def finite(self) -> bool:
        """Whether all weights are finite."""
        own = [*self.generator.parameters(), *self.critic.parameters()]
        return bool(torch.stack([tensor.isfinite().all() for tensor in own]).all())

    def tensors(self) -> dict[str, Tensor]:
        """Everything that the next step depends on, the generator of random numbers aside."""
        out = {"average": self.average}
        for name, network in (("generator", self.generator), ("critic", self.critic)):
            out.update({f"{name}.{key}": value for key, value in network.state_dict().items()})
        for name, adam in zip(("adam-g", "adam-c"), self.adams, strict=True):
            for number, state in adam.state_dict()["state"].items():
                out.update({f"{name}.{number}.{key}": value for key, value in state.items()})
        return out

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Continue from what `tensors` gave."""
        parts: dict[str, dict[str, Tensor]] = {}
        for name, value in tensors.items():
            part, _, rest = name.partition(".")
            parts.setdefault(part, {})[rest] = value
        self.generator.load_state_dict(parts["generator"])
        self.critic.load_state_dict(parts["critic"])
        for name, adam in zip(("adam-g", "adam-c"), self.adams, strict=True):
            state: dict[int, dict[str, Tensor]] = {}
            for key, value in parts[name].items():
                number, _, field = key.partition(".")
                state.setdefault(int(number), {})[field] = value
            adam.load_state_dict({**adam.state_dict(), "state": state})
        self.average = tensors["average"].to(self.average.device)


class MESA(Inverter):
    """Fit one generator of patches per success level, at the attacker's place.

    alpha: weight of the mutual information, of variety. betas: success levels, one sub-model each; sampling takes them
    in turn. noise: deviation of the noise on a patch while fitting. width: of every hidden layer. batch: images, and
    patches, of a step. steps: where given, the number of steps in place of `epochs`.
    """

    name = "mesa"
    paper = "Qiao, Yang, Li, MESA, NeurIPS 2019, arXiv 1910.04749; MINE, ICML 2018"

    def __init__(
        self,
        *,
        alpha: NonNegative = 0.1,
        betas: tuple[Annotated[float, Interval(gt=0, le=1)], ...] = (0.9,),
        epochs: Count = 40,
        steps: Count | None = None,
        batch: Annotated[int, Ge(2)] = 128,
        lr: Positive = 2e-4,
        width: Count = 512,
        noise: NonNegative = 0.1,
    ) -> None:
        if not betas:
            raise UserError(f"{self.name}: betas=() was given, expected at least one success level, as in betas=(0.9,)")
        self.alpha = alpha
        self.betas = betas
        self.epochs = epochs
        self.steps = steps
        self.batch = batch
        self.lr = lr
        self.width = width
        self.noise = noise

    @property
    def knows(self) -> frozenset[Knowledge]:
        return frozenset({"target", "location"})

    def invert(self, model: Classifier, target: int, ctx: InverterContext) -> Patches:
        """Alternate generator and critic over augmented batches; raises Diverged when something is no longer finite.

        Raises UserError when there are no clean images.
        """
        if len(ctx.clean) == 0:
            raise UserError(f"{self.name}: no clean images were given, expected at least one; raise the clean rate")
        model.eval().requires_grad_(False)  # gradients stop at the patch: no weight gradients are computed
        location: Location = ctx.granted.location
        shape = (ctx.clean.x.shape[1], location.height, location.width)
        members = [Member.start(beta, shape, self.width, self.lr, ctx.rng, ctx.device) for beta in self.betas]
        total = self.steps if self.steps is not None else self.epochs * -(-len(ctx.clean) // self.batch)
        step = self._resume(members, ctx)
        while step < total:
            step = self._one_pass(model, target, location, members, ctx, step, total)
            packed = {f"{i}.{k}": v for i, member in enumerate(members) for k, v in member.tensors().items()}
            packed["rng"] = ctx.rng.get_state()
            ctx.snapshot.save({k: v.detach().cpu() for k, v in packed.items()}, {"step": step})
        return Patches([member.generator for member in members], location)

    def _resume(self, members: list[Member], ctx: InverterContext) -> int:
        saved = ctx.snapshot.load()
        if saved is None:
            return 0
        tensors, meta = saved
        for i, member in enumerate(members):
            prefix = f"{i}."
            member.restore({k[len(prefix) :]: v for k, v in tensors.items() if k.startswith(prefix)})
        ctx.rng.set_state(tensors["rng"].cpu())
        return int(meta["step"])

    def _one_pass(
        self, model: Classifier, target: int, location: Location, members: list[Member], ctx: InverterContext,
        step: int, total: int,
    ) -> int:  # fmt: skip
        sums = torch.zeros(len(members), 2, device=ctx.device)
        first = step
        for x, _, _ in ctx.clean.batches(self.batch, ctx.rng, ctx.augment):
            for i, member in enumerate(members):
                told = member.step(
                    model, x, target, location, alpha=self.alpha, noise=self.noise, batch=self.batch, rng=ctx.rng
                )
                sums[i] += torch.stack(told)
            step += 1
            ctx.tick(step, total, len(x) * len(members))
            if step == total:
                break
        if not bool(sums.isfinite().all()) or not all(member.finite() for member in members):
            raise Diverged(f"{self.name}: loss or weights are not finite by step {step}; lower lr={self.lr}")
        for beta, (success, bound) in zip(self.betas, (sums / (step - first)).tolist(), strict=True):
            ctx.log(f"step {step} of {total}, beta {beta:g}: clipped success {success:.3f}, information {bound:.2f}")
        return step
