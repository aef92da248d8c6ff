"""Names what is to be computed on a handed model: inversions for a label, repairs. Free of torch.

Methods are configured as a matrix configures them, by preset, budget and `--set`; what a benchmark alone can grant (the
attacker's trigger, its place, the poisoned training set) is refused in one line.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from .. import params, presets, request
from ..errors import UserError
from ..needed import Table, check_declarations, describe_needed, labels_used, told_by
from ..plan import Builder, Case, Node
from ..registry import Described, Registry, Wanted
from ..request import Precision, Request, one_of
from .handed import ATTACKER, Handed

ORACLES = request.ORACLES | {"suspect"}  # what nobody knows of a model that was handed over
SMALL, LARGE = 32 * 32, 224 * 224  # pixels for which a weight of masks is known (spec 5.1)
WEIGHTS = (0.01, 0.001)  # of nc-box's mask at these sizes
STEPS: Mapping[str, int] = {"nc-box": 1000, "uap": 600}  # of full searches; masks: see budgets.toml, uap: a guess


@dataclass(frozen=True)
class How:
    """Options that decide numbers. overrides: lines of `--set`. Raises UserError for an unknown preset or budget."""

    preset: str = "clean"
    budget: str = "full"
    overrides: Sequence[str] = ()
    device: str = "cpu"
    precision: Precision = "fp32"
    seed: int = 0

    def __post_init__(self) -> None:
        one_of("--preset", self.preset, presets.PRESETS)
        one_of("--budget", self.budget, presets.BUDGETS)


class Stages:
    """The stages on one handed model. inverters, defenses: selections, as in `uap(lr=0.02)` or `mcldef`.

    Raises UserError for an unknown method or parameter, and for a defense that asks to be told what nobody knows.
    """

    def __init__(
        self, registry: Registry, handed: Handed, how: How, inverters: Sequence[str], defenses: Sequence[str] = ()
    ) -> None:
        chosen = [params.selection(text) for text in dict.fromkeys(defenses)]
        searched = [params.selection(text) for text in dict.fromkeys(inverters)]
        table = Table(settings(how, handed), params.overrides(list(how.overrides)))
        wanted = [
            Wanted("recipe", params.selection("defend"), table.of(params.selection("defend"))),
            *(Wanted("inverter", s, table.of(s)) for s in searched),
            *(Wanted("defense", s, table.of(s)) for s in chosen),
        ]  # fmt: skip
        recipe, *others = registry.describe(wanted)
        needed = dict(describe_needed(registry, table, others))
        needed |= {("inverter", method.label): method for method in others[: len(searched)]}
        table.check()
        full = [replace(one, told=tuple(sorted(told_by(one, needed)))) for one in others[len(searched) :]]
        for one in full:
            check_declarations(one, registry.find("defense", one.full_name))
            _check_told(one)
        self.defenses = {one.label: one for one in full}
        self.how = how
        self.handed = handed
        self.builder = Builder(Request(
            Described("dataset", "clean images", "clean images", "", "", {}, 0, "", {}), handed.data, handed.model, (),
            tuple(full), needed, recipe, recipe, (0,), (how.seed,), (1.0,), how.preset, how.budget, how.device,
            how.precision,
        ))  # fmt: skip

    @property
    def nodes(self) -> Mapping[str, Node]:
        """All stages that were named so far."""
        return self.builder.plan.nodes

    def uses_labels(self, defense: str) -> bool:
        """Whether a defense, or one that it builds on, reads the labels of the clean images."""
        return labels_used(self.defenses[defense], self.builder.request.needed)

    def invert(self, inverter: str, label: int) -> str:
        """The key of a search for a trigger that leads to `label`."""
        return self.builder.invert({"method": inverter, "verdict": None}, self._case(label))

    def defend(self, defense: str, label: int | None) -> str:
        """The key of a repair; `label` is what it is told where it asks for the target."""
        return self.builder.defend(self.defenses[defense], self._case(label))

    def _case(self, label: int | None) -> Case:
        attacker = replace(ATTACKER, attack_target=label)
        return Case(attacker, 0, self.how.seed, self.handed.key, "", "", 1.0)


def settings(how: How, handed: Handed) -> presets.Settings:
    """What preset and budget say, and the weight of a mask for images of this size.

    A mask of the same look has more pixels in a larger image: the weight follows a power of their number that meets
    both sizes for which the paper has one.
    """
    out = presets.settings(how.preset, how.budget, "")  # type: ignore[arg-type]
    pixels = handed.shape[1] * handed.shape[2]
    out.setdefault("nc-box", {}).setdefault("lam", mask_weight(pixels))
    for inverter, steps in STEPS.items():
        if not {"steps", "epochs"} & out.setdefault(inverter, {}).keys():
            out[inverter]["steps"] = steps
    return out


def mask_weight(pixels: int) -> float:
    """Example: 0.01 up to 1,024 pixels, 0.001 at 50,176."""
    if pixels <= SMALL:
        return WEIGHTS[0]
    slope = math.log(WEIGHTS[1] / WEIGHTS[0]) / math.log(LARGE / SMALL)
    return float(round(WEIGHTS[0] * (pixels / SMALL) ** slope, 6))


def _check_told(defense: Described) -> None:
    unknown = sorted(ORACLES & set(defense.told))
    if unknown:
        raise UserError(
            f"{defense.label} is told the {' and the '.join(unknown)}, which nobody knows of a model that was handed "
            "over; choose another defense"
        )


__all__ = ["ORACLES", "How", "Stages", "mask_weight", "settings"]
