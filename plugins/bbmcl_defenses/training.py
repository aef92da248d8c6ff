"""What the SGD defenses share: their own settings on top of the common recipe, and one log line per pass."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from backdoorbench_mcl.api import Recipe


def adapt(
    recipe: Recipe, *, nesterov: bool, lr: float | None = None, epochs: int | None = None, steps: int | None = None
) -> Recipe:
    """`recipe` with the settings that a defense brings; None leaves the recipe's value.

    `lr` is the first learning rate: the milestones still divide it. `epochs` takes the place of a number of steps.
    """
    changed = {**recipe.params, "nesterov": nesterov}
    if lr is not None:
        changed["lr"] = lr
    if epochs is not None:
        changed.update(epochs=epochs, steps=None)
    if steps is not None:
        changed["steps"] = steps
    return Recipe(**changed)


class Meter:
    """Means over one pass of `images` images, logged as one line at its end.

    Values stay on their device until then, so that a GPU is not made to wait at every step.
    """

    def __init__(self, log: Callable[[str], None], images: int) -> None:
        self.log = log
        self.images = images
        self.seen = 0
        self.sums: dict[str, Tensor] = {}

    def add(self, count: int, **means: Tensor) -> None:
        """Scalars that are means over `count` images."""
        for name, value in means.items():
            weighted = value.detach() * count
            self.sums[name] = self.sums[name] + weighted if name in self.sums else weighted
        self.seen += count
        if self.seen >= self.images:
            self.log(", ".join(f"{name} {float(total) / self.seen:.4f}" for name, total in self.sums.items()))
            self.seen, self.sums = 0, {}
