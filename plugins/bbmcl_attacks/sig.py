"""SIG: a horizontal sinusoid over the whole image, on images of the target class that keep their label.

Paper: M. Barni, K. Kallas, B. Tondi, "A New Backdoor Attack in CNNs by Training Set Corruption Without Label
Poisoning", ICIP 2019 (arXiv 1902.11237); as run by the MCLDef paper (arXiv 2205.04411, spec 4.5, 4.6).
Differs: delta 20 and frequency 6 are deduced, not printed (spec 0.3). `form="clean"` is the sinusoid of the text, 6
cycles across an image of any width. `form="wrapped"` is what the authors' mask really held: trunc(20 sin(0.8 j)) stored
as uint8, so that -1..-19 became 255..237, mixed in with weight 0.2; their 0.8 radians per pixel are 4.07 cycles across
32 pixels, and that many it keeps on other widths.
Should reach: ASR 99.03, BA without the target class 84.64 on CIFAR-10, WRN-16-1, 8 % poison, no augmentation (spec 11,
Table 1, `Before`); `clean` may stay below the gate (82.9 in one run, spec 4.9). 80 % of the target class carry the
trigger in training, so that the victim knows that class badly without it.
"""

from __future__ import annotations

import math
from typing import Annotated, Literal

import torch
from torch import Tensor

from backdoorbench_mcl.api import (
    Attack,
    AttackContext,
    Images,
    Interval,
    Label,
    Poisoned,
    Positive,
    Rate,
    State,
    UserError,
)

from .clean_label import clean_label_count, poison_target_class
from .dirty_label import check_target

FREQUENCY = 6.0  # cycles across the image (spec 4.5)
WRAPPED_STEP = 0.8  # radians per pixel at 32 pixels (spec 4.5)


def sinusoid(width: int, delta: float, frequency: float) -> Tensor:
    """v(j) = delta * sin(2 pi j frequency / width) for the columns j: float64 (W,). Source: spec 4.5."""
    columns = torch.arange(width, dtype=torch.float64)
    return delta * torch.sin(2 * math.pi * frequency * columns / width)


def rounded(v: Tensor) -> Tensor:
    """v (W,), float64 -> the nearest integers, halves upwards, int16: for integer x, x + rounded(v) rounds x + v.

    A hair above, so that 2.5 stays a half when its sine came out as 2.4999... .
    """
    return (v + 0.5 + 1e-9).floor().to(torch.int16)


def wrapped_mask(width: int, delta: float) -> Tensor:
    """trunc(delta * sin(0.8 j)) modulo 256, int16 (W,); at other widths than 32 the 0.8 becomes 0.8 * 32 / width."""
    wave = sinusoid(width, delta, WRAPPED_STEP * 32 / (2 * math.pi))
    return wave.trunc().to(torch.int16).remainder(256)


def add_wave(x: Tensor, wave: Tensor) -> Tensor:
    """clip(x + wave) of x, uint8 (B, C, H, W), and wave, int16 (W,), as a new uint8 tensor."""
    return (x.to(torch.int16) + wave.to(x.device)).clamp_(0, 255).to(torch.uint8)


def mix_mask(x: Tensor, mask: Tensor) -> Tensor:
    """trunc(0.8 x + 0.2 mask) of x, uint8 (B, C, H, W), and mask, int16 (W,), as a new uint8 tensor; exact."""
    return (x.to(torch.int16).mul_(4) + mask.to(x.device)).floor_divide_(5).to(torch.uint8)


class Sig(Attack):
    """Columns brightened and darkened by up to `delta` grey levels, on images of the target class.

    rate: share of the whole training set; where the class has fewer images, all of it is taken (`wanted` and
    `poisoned` are kept with the victim). frequency: cycles across the image, of the form "clean" only.
    prepare raises UserError when the target is no class, or has no images.
    """

    name = "sig"
    paper = "Barni et al., SIG, ICIP 2019, arXiv 1902.11237"
    target: int

    def __init__(
        self,
        *,
        target: Label = 5,
        rate: Rate = 0.08,
        delta: Annotated[float, Interval(gt=0, le=255)] = 20.0,
        frequency: Positive = FREQUENCY,
        form: Literal["clean", "wrapped"] = "clean",
    ) -> None:
        if form == "wrapped" and frequency != FREQUENCY:
            raise UserError(
                f"sig: frequency={frequency} was given with form='wrapped', whose stripes have their own; "
                f"leave one of them out"
            )
        self.target = target
        self.rate = rate
        self.delta = delta
        self.frequency = frequency
        self.form: Literal["clean", "wrapped"] = form

    def prepare(self, ctx: AttackContext) -> State:
        """The stripe, one value for each column, kept with the victim."""
        check_target(self.name, self.target, ctx.classes)
        wanted, poisoned = clean_label_count(self.rate, ctx.train, self.target)
        width = ctx.train.x.shape[-1]
        if self.form == "clean":
            wave = rounded(sinusoid(width, self.delta, self.frequency))
        else:
            wave = wrapped_mask(width, self.delta)
        return State({"wave": wave}, {"wanted": wanted, "poisoned": poisoned})

    def poison(self, train: Images, state: State, rng: torch.Generator) -> Poisoned:
        """round(rate * N) striped images of the target class, with the labels they had."""
        return poison_target_class(self, self.target, self.rate, train, state, rng)

    def stamp(self, x: Tensor, y: Tensor, state: State, rng: torch.Generator) -> Tensor:
        """The stripe over x, uint8 (B, C, H, W), in a copy."""
        put = add_wave if self.form == "clean" else mix_mask
        return put(x, state.tensors["wave"])
