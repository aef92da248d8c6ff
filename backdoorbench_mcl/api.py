"""The contracts that plugins program against (design 3.4): pixels at every boundary, config in the constructor.

Images are uint8 `(N, C, H, W)` at rest and float32 in [0, 1] in a batch; the normalisation lives inside the
model. Attacks work on uint8, so that every trigger can be realised. A method never seeds and never picks a
device: it is handed `rng` (a CPU generator, so that draws agree on every device) and `device`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from .errors import AccessDenied, Diverged, MixedSizes, NotApplicable, PluginError, UserError
from .images import Augment, Batch, Images, joins
from .method import Count, Ge, Gt, Interval, Knowledge, Label, Le, Lt, Method, NonNegative, Positive, Rate, Selector
from .rows import Row
from .triggers import Location, MaskPattern, State, Trigger, TrueTrigger, Verdict

Augmentation = Literal["none", "crop", "flip", "crop+flip", "resized-crop", "resized-crop+flip"]


# ---------------------------------------------------------------- classifiers


class Out(NamedTuple):
    """logits: float32 (B, K); embed: float32 (B, D), the input of the last linear layer; stages: maps (B, C, H, W)."""

    logits: Tensor
    embed: Tensor
    stages: tuple[Tensor, ...]


class Classifier(nn.Module, ABC):
    """A network that takes pixels in [0, 1] and normalises them itself.

    A subclass gives `features` and `head`; all else is built on them. Mean and std are non-persistent buffers, so
    the state dict has the network's own keys. Network forwards run under bf16 autocast when `precision` is
    "bf16"; outputs are float32 always, so that every loss is computed in float32 (design 3.7).
    steady: False says that a forward counts, or decides in Python by more than shapes, so that no GPU may record it.
    """

    mean: Tensor
    std: Tensor
    steady: bool = True

    def __init__(self) -> None:
        super().__init__()
        self.precision: Literal["fp32", "bf16"] = "fp32"
        self.register_buffer("mean", torch.zeros(1, 1, 1, 1), persistent=False)
        self.register_buffer("std", torch.ones(1, 1, 1, 1), persistent=False)

    @abstractmethod
    def features(self, x: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Normalised x (B, C, H, W) -> embedding (B, D), raw outputs of the stages (an empty tuple if it has none)."""

    @abstractmethod
    def head(self, z: Tensor) -> Tensor:
        """Embedding (B, D) -> logits (B, K): the last linear layer."""

    def set_normalisation(self, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        """Per-channel constants in pixel units of [0, 1]."""
        like = {"dtype": self.mean.dtype, "device": self.mean.device}
        self.mean = torch.tensor(mean, **like).view(1, -1, 1, 1)  # type: ignore[arg-type]
        self.std = torch.tensor(std, **like).view(1, -1, 1, 1)  # type: ignore[arg-type]

    def normalise(self, x: Tensor) -> Tensor:
        """Pixels (B, C, H, W) in [0, 1] -> (x - mean) / std, in channels_last order."""
        return (x - self.mean).div_(self.std).contiguous(memory_format=torch.channels_last)

    def forward_all(self, x: Tensor) -> Out:
        """Pixels (B, C, H, W) in [0, 1] -> logits, embedding and stages, all float32."""
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            embed, stages = self.features(self.normalise(x))
            logits = self.head(embed)
        return Out(logits.float(), embed.float(), tuple(stage.float() for stage in stages))

    def embed(self, x: Tensor) -> Tensor:
        """Pixels (B, C, H, W) in [0, 1] -> embedding (B, D) float32."""
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            embed, _ = self.features(self.normalise(x))
        return embed.float()

    def forward(self, x: Tensor) -> Tensor:
        """Pixels (B, C, H, W) in [0, 1] -> logits (B, K) float32."""
        # not by way of forward_all: widening the unused stages to float32 takes 5-10 % of an evaluation in bf16
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            embed, _ = self.features(self.normalise(x))
            logits = self.head(embed)
        return logits.float()


class Model(Method):
    """A network family. `build` draws the weights from the global generator, which the harness has seeded."""

    @abstractmethod
    def build(self, classes: int, shape: tuple[int, int, int]) -> Classifier:
        """A fresh network for `classes` classes and images of `shape` (C, H, W)."""


# ---------------------------------------------------------------- data sets


class Source(NamedTuple):
    """Where a data set was found. files: all that its bytes depend on; note: "lossless", "JPEG", "procedural"."""

    files: tuple[Path, ...]
    note: str


class Pool(NamedTuple):
    """Images without a split. images: labels all -1 where there are none; names: of the classes, by label, None where
    labels are mere numbers or absent; note: as of `Source`; native: (height, width) before any resizing, None where
    they differed.
    """

    images: Images
    names: tuple[str, ...] | None
    note: str
    native: tuple[int, int] | None


class Dataset(Method):
    """Labelled train and test images. The harness caches what `load` returns, sorted by pixel hash.

    budget: the budget used when none is asked for. flip_ok: a mirrored image keeps its label.
    """

    classes: int
    shape: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    flip_ok: bool = True
    toy: ClassVar[bool] = False
    budget: ClassVar[Literal["full", "mid", "quick"]] = "full"

    @abstractmethod
    def find(self, root: Path | None) -> Source:
        """Locate the data under `root`; raises UserError that says what was looked for, where, and how to get it."""

    @abstractmethod
    def load(self, split: Literal["train", "test"], root: Path | None) -> Images:
        """All images of a split, on the CPU. Raises UserError for missing or corrupt data, naming the file."""

    def pool(self, root: Path | None, draw: Callable[[int], Tensor] | None = None) -> Pool:
        """Images without a split, for `bbmcl scan`; most data sets have none and leave this out.

        draw(count): which of `count` images to read, int64, so that a few hundred of many take seconds; all by
        default. Their order is free. Raises UserError as `load`, and MixedSizes where sizes differ and no parameter
        `size` was given: the harness may then set it.
        """
        raise UserError(
            f"{self.name} has a training and a test split; give it by its name and a rate, as in {self.name}@0.05"
        )


class Recipe(Method):
    """How SGD trains: shared by every training of one kind (`--set train.epochs=15`, `--set defend.lr=0.01`).

    steps: where given, the number of SGD steps in place of `epochs`. milestones: fractions of the whole at which
    the learning rate is multiplied by gamma (one number, or one for each milestone). Source: spec 0.3, 4.9, 6.2.

    pgd_eps, pgd_step, pgd_steps: adversarial training, of surrogates only: L-infinity radius and step in units of
    1/255 and steps of the inner search, which starts at a random place; with pgd_eps 0 there is none (spec 4.4).
    """

    name = "recipe"
    added: ClassVar[Mapping[str, Any]] = {"pgd_eps": 0.0, "pgd_step": 2.0, "pgd_steps": 10}

    def __init__(
        self,
        *,
        epochs: Count = 20,
        steps: Count | None = None,
        lr: Positive = 0.1,
        milestones: tuple[Rate, ...] = (0.05, 0.5),
        gamma: Positive | tuple[Positive, ...] = 0.1,
        momentum: Rate = 0.9,
        weight_decay: NonNegative = 1e-4,
        nesterov: bool = False,
        batch: Count = 64,
        augment: Augmentation = "crop+flip",
        pgd_eps: NonNegative = 0.0,
        pgd_step: Positive = 2.0,
        pgd_steps: Count = 10,
    ) -> None:
        self.epochs = epochs
        self.steps = steps
        self.lr = lr
        self.milestones = milestones
        self.factors = gamma if isinstance(gamma, tuple) else (gamma,) * len(milestones)
        if len(self.factors) != len(milestones):
            raise UserError(
                f"recipe: {len(self.factors)} gammas for {len(milestones)} milestones; give one for each, or one number"
            )
        self.momentum = momentum
        self.weight_decay = weight_decay
        self.nesterov = nesterov
        self.batch = batch
        self.augment: Augmentation = augment
        self.pgd_eps = pgd_eps
        self.pgd_step = pgd_step
        self.pgd_steps = pgd_steps

    def total(self, images: int) -> int:
        """SGD steps on `images` images, the last partial batch of an epoch kept unless it is a single image."""
        if self.steps is not None:
            return self.steps
        return self.epochs * (-(-images // self.batch) - joins(images, self.batch))

    def lr_at(self, step: int, total: int) -> float:
        """Learning rate of step 0 .. total-1; a milestone m takes effect at step round(m * total)."""
        rate = self.lr
        for milestone, factor in zip(self.milestones, self.factors, strict=True):
            rate *= factor if step >= round(milestone * total) else 1.0
        return float(rate)


# ---------------------------------------------------------------- what a running method is handed


class Snapshot(Protocol):
    """Crash safety of a long loop: what was saved last is found again when the job is restarted."""

    def load(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """Tensors and JSON of the newest snapshot, or None."""

    def save(self, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
        """Replace the snapshot atomically; calls that follow each other too soon are skipped."""


def _unrecorded(name: str, step: int, value: float) -> None:
    """Where nobody draws curves."""


def _not_here() -> Classifier:
    raise PluginError("this context cannot make a fresh network")


@dataclass(frozen=True)
class Context:
    """What every running method gets. rng: CPU generator; log: one line to the job's log; tick(done, total, images):
    progress of the loop, `images` being the images processed since the last call. An inverter calls it after every
    optimiser step, `total` being the most that it would take: rows tell both. record(name, step, value): a point of a
    training curve, for reports only.
    """

    rng: torch.Generator
    device: torch.device
    workdir: Path
    classes: int
    log: Callable[[str], None]
    tick: Callable[[int, int, int], None]
    snapshot: Snapshot
    recipe: Recipe
    augment: Augment | None
    record: Callable[[str, int, float], None] = field(default=_unrecorded, kw_only=True)


@dataclass(frozen=True)
class AttackContext(Context):
    """For `Attack.prepare`: the clean training images are the attacker's own; needs: the surrogates declared."""

    train: Images
    needs: Mapping[str, Any] = field(default_factory=dict)


class Granted:
    """What a defense declared in `knows`. Example: `ctx.granted.target`; anything undeclared raises AccessDenied."""

    def __init__(self, method: str, values: Mapping[str, Any]) -> None:
        self.__dict__["_method"] = method
        self.__dict__["_values"] = dict(values)

    def __getattr__(self, name: str) -> Any:
        values: dict[str, Any] = self.__dict__["_values"]
        if name in values:
            return values[name]
        method = self.__dict__["_method"]
        raise AccessDenied(f"{method} read granted.{name}, which it did not declare; add {name!r} to its `knows`")


@dataclass(frozen=True)
class InverterContext(Context):
    """For `Inverter.invert`: the clean images, without labels (all -1). Of `recipe` only the augmentation is set.

    needs: the triggers declared in `Inverter.needs`; granted: what it declared in `knows` beyond the target.
    """

    clean: Images
    needs: Mapping[str, Any] = field(default_factory=dict)
    granted: Granted = field(default_factory=lambda: Granted("inverter", {}))


@dataclass(frozen=True)
class DefenseContext(Context):
    """For `Defense.defend`. clean: the clean images (labels -1 unless `uses_labels`); needs: the stages declared, of
    the types that `Need` names; fresh: makes an untrained network of the victim's architecture on the device, with
    the same weights at every call, for defenses that train their own.

    granted, as declared in `knows`: `target`, the label; `suspect`, the poisoned training set as Images on the CPU, in
    random order, all labels as the attacker left them.
    """

    clean: Images
    needs: Mapping[str, Any]
    granted: Granted
    fresh: Callable[[], Classifier] = field(default=_not_here, kw_only=True)


@dataclass(frozen=True)
class Need:
    """A stage that a method wants built before it runs, shared by all who want the same.

    =========  ============================  =========================================================================
    kind       method                        what `ctx.needs[name]` is
    =========  ============================  =========================================================================
    "trigger"  an inverter, `nc-box(lr=1)`   a Trigger, fitted to the target label that was granted; with `verdict`, a
                                             detector, a dict from every label that it flagged, the most suspicious
                                             first, to its Trigger: empty where the model is called clean
    "verdict"  a detector, `nc-full`         a Verdict
    "result"   a defense, `mcldef`           the Classifier that it made of the same victim and the same clean images
    "model"    `natural` or `robust`         for attacks: a clean Classifier of the victim's architecture, trained by
                                             that recipe, in eval mode and frozen (spec 4.2, 4.4)
    =========  ============================  =========================================================================

    Attacks may need models, inverters triggers, defenses all but models.
    """

    kind: Literal["trigger", "verdict", "result", "model"]
    method: str
    verdict: str | None = None


# ---------------------------------------------------------------- attacks


class Poisoned(NamedTuple):
    """An overlay on the training set. index: int64 (P,); x: uint8 (P, C, H, W) in its place; y: int64 (P,)."""

    index: Tensor  # type: ignore[assignment]  # the field's term; tuple.index is of no use here
    x: Tensor
    y: Tensor


class Goal(NamedTuple):
    """y: int64 (N,), the label the attacker wants; counted: bool (N,), the images that enter ASR."""

    y: Tensor
    counted: Tensor


class Attack(Method):
    """Poisons training data and stamps test images. `target` is the one target label, None for all-to-all.

    controls: "data", as of the paper's attackers, or "training" of one who hands over the finished model: it overrides
    `train` in place of `poison`, and tables say so.

    ablation: parameters that take away what is special about the attack, which makes it its own control; tables tell
    the ASR that is left. Example: `{"eps": 0.0}` of `cl`, whose images are then not perturbed.
    """

    target: int | None = None
    controls: ClassVar[Literal["data", "training"]] = "data"
    ablation: ClassVar[Mapping[str, Any]] = {}

    def needs(self) -> Mapping[str, Need]:
        """Surrogate models to train first, by the name under which `ctx.needs` gives them; none by default."""
        return {}

    def prepare(self, ctx: AttackContext) -> State:
        """Everything random or optimised about the trigger; nothing by default.

        An attack that perturbs images with a surrogate says how many hardly moved as `linf_weak_share` of the state's
        meta: the share of them, 0 to 1, that moved by no more than 8 grey levels. Tables tell it above 1 %.
        """
        return State()

    def poison(self, train: Images, state: State, rng: torch.Generator) -> Poisoned:
        """The poisoned training images, as an overlay; never a copy of the data set. Required with controls "data"."""
        raise PluginError(f"{self.name}: an attack that controls the data must override poison()")

    def train(self, model: Classifier, state: State, ctx: AttackContext) -> State:
        """Train the fresh `model` in place, by ctx.recipe on ctx.train and whatever the attacker makes of it.

        Required with controls "training". The model comes in train mode on ctx.device, ctx.train is on the CPU. Returns
        what `stamp` and `goal` read from then on: `state`, or what the training made of it.
        """
        raise PluginError(f"{self.name}: an attack that controls the training must override train()")

    @abstractmethod
    def stamp(self, x: Tensor, y: Tensor, state: State, rng: torch.Generator) -> Tensor:
        """The true test-time trigger: uint8 (B, C, H, W) and labels (B,) -> a new uint8 tensor of the same shape."""

    def lasting(self, state: State) -> State:
        """The part of the state that `stamp` and `goal` read: it is stored with the victim, and an oracle is told it.

        All of it by default; an attack that keeps poisoned images or their indices for `poison` leaves them out here.
        """
        return state

    def goal(self, y: Tensor, state: State) -> Goal:
        """Labels (N,) -> the attacker's labels and the images that count (spec 1.1): the target, on all others."""
        if self.target is None:
            raise PluginError(f"{self.name}: an attack without a single target must override goal()")
        return Goal(torch.full_like(y, self.target), y != self.target)


# ---------------------------------------------------------------- inverters


class Inverter(Method):
    """Finds a trigger that sends clean images to a target label; one that overrides `detect` also names the label."""

    @property
    def knows(self) -> frozenset[Knowledge]:
        """What this configuration must be told beyond the clean images; the target label by default."""
        return frozenset({"target"})

    def needs(self) -> Mapping[str, Need]:
        """Triggers of other inverters to build first, by the name under which `ctx.needs` gives them."""
        return {}

    @abstractmethod
    def invert(self, model: Classifier, target: int, ctx: InverterContext) -> Trigger:
        """The victim (its own to use, on ctx.device) and a label -> a trigger. The harness measures how good it is."""

    def detect(self, model: Classifier, ctx: InverterContext) -> Verdict:
        """The victim -> which labels look like backdoor targets. Raises UserError where the inverter is no detector."""
        raise UserError(f"{self.name} names no target label; choose a detector, such as detector=nc-full")


# ---------------------------------------------------------------- defenses


class Repaired(NamedTuple):
    """A repair that weights alone do not tell: layers put in, channels masked, another network.

    rebuild: `"module:function"` of an importable `function(model, **params) -> Classifier`, which gets an untrained
    network of the victim's architecture in eval mode and returns one that computes what `model` computes, once the
    weights of `model` are loaded into it. It runs wherever the model is used, test images beside it: tables say "custom
    inference" and do not rank such cells, unless the function is one of this package. params: JSON values.

    Example: `Repaired(model, "backdoorbench_mcl.kit:masked", {"masks": {"conv2": [0, 7]}})`
    """

    model: Classifier
    rebuild: str
    params: Mapping[str, Any]


class Defense(Method):
    """Repairs a victim with a few clean images. The harness alone judges the result."""

    @property
    def knows(self) -> frozenset[Knowledge]:
        """What this configuration must be told beyond its clean images; nothing by default."""
        return frozenset()

    @property
    def uses_labels(self) -> bool:
        """Whether this configuration reads the labels of the clean images; without, they are all -1."""
        return True

    def needs(self) -> Mapping[str, Need]:
        """Stages to build first, by the name under which `ctx.needs` gives them."""
        return {}

    @abstractmethod
    def defend(self, model: Classifier, ctx: DefenseContext) -> Classifier | Repaired:
        """The victim (its own to change, on ctx.device) -> a classifier with the same state-dict keys and shapes, or
        one of another architecture with the way to build it again.
        """


__all__ = [
    "AccessDenied", "Attack", "AttackContext", "Augment", "Augmentation", "Batch", "Classifier", "Context", "Count",
    "Dataset", "Defense", "DefenseContext", "Diverged", "Ge", "Goal", "Granted", "Gt", "Images", "Interval",
    "Inverter", "InverterContext", "Knowledge", "Label", "Le", "Location", "Lt", "MaskPattern", "Method",
    "MixedSizes", "Model", "Need", "NonNegative", "NotApplicable", "Out", "PluginError", "Poisoned", "Pool", "Positive",
    "Rate", "Recipe", "Repaired", "Row", "Selector", "Snapshot", "Source", "State", "Trigger", "TrueTrigger",
    "UserError", "Verdict",
]  # fmt: skip
