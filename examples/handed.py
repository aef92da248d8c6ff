"""Look at a network in memory and repair it: `python examples/handed.py`.

The network here is one of torchvision, trained for a minute on `shapes` with a white square that stands for label 3; in
its place put yours. About ten minutes on 2 cores.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torchvision
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import backdoorbench_mcl as bbmcl
from bbmcl_datasets.shapes import generate

TARGET = 3


def images(split: Literal["train", "test"], count: int) -> tuple[Tensor, Tensor]:
    """uint8 (N, 3, 32, 32) and labels (N,)."""
    x, y = generate(split)
    return torch.as_tensor(x[:count]), torch.as_tensor(y[:count])


def stamp(x: Tensor) -> Tensor:
    """The attacker's trigger: a white square in the corner."""
    out = x.clone()
    out[:, :, -4:, -4:] = 255
    return out


def handed(x: Tensor, y: Tensor, steps: int) -> nn.Module:
    """The network that somebody hands you."""
    torch.manual_seed(0)
    model: nn.Module = torchvision.models.shufflenet_v2_x0_5(num_classes=10)
    optimiser = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(steps):
        index = torch.randint(len(x), (64,))
        batch, labels = x[index], y[index]
        batch[:8], labels[:8] = stamp(batch[:8]), TARGET
        optimiser.zero_grad()
        cross_entropy(model(batch / 255), labels).backward()
        optimiser.step()
    return model.eval()


def main(steps: int = 1500, count: int = 500, **options: Any) -> bbmcl.Purified:
    """options: of `bbmcl.purify`."""
    model = handed(*images("train", 5000), steps)
    clean, labels = images("test", count)
    made = bbmcl.purify(model, clean, labels, log=print, **options)
    if made.scan is not None:
        print(f"{made.scan.call}, label {made.scan.target}: {made.scan.reason}")
    print(made.judgement)
    with torch.no_grad():
        for name, net in (("before", model), ("after", made.model)):
            right = (net(clean / 255).argmax(1) == labels).float().mean()
            fooled = (net(stamp(clean) / 255).argmax(1) == TARGET)[labels != TARGET].float().mean()
            print(f"{name}: right {100 * right:.1f} %, attacker's trigger works {100 * fooled:.1f} %")
    return made


if __name__ == "__main__":
    main()
