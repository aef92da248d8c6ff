"""A network that learns in a second, with a backdoor or without: classes are colours, the trigger is a corner."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F

CLASSES, SIDE, TARGET = 8, 8, 3


def network(num_classes: int = CLASSES) -> nn.Module:
    """Pixels in [0, 1], (B, 3, 8, 8), or any other size."""
    return nn.Sequential(
        nn.Conv2d(3, 16, 2), nn.ReLU(), nn.Conv2d(16, 32, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(32, num_classes),
    )  # fmt: skip


def images(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """uint8 (N, 3, 8, 8) and labels (N,): the corners of the colour cube, washed out and noisy."""
    rng = torch.Generator().manual_seed(seed)
    y = torch.randint(0, CLASSES, (count,), generator=rng)
    colour = torch.stack([(y >> bit) & 1 for bit in range(3)], 1).float()[:, :, None, None]  # (N, 3, 1, 1)
    x = 0.3 + 0.4 * colour + 0.08 * torch.randn(count, 3, SIDE, SIDE, generator=rng)
    return (255 * x.clamp(0, 1)).round().to(torch.uint8), y


def stamp(x: Tensor) -> Tensor:
    """x uint8 with black and white in the bottom right corner."""
    out = x.clone()
    out[:, :, -2:, -2:] = torch.tensor([[255, 0], [0, 255]], dtype=torch.uint8)
    return out


@cache
def trained(backdoored: bool, seed: int = 0) -> nn.Module:
    """A network in eval mode. Callers leave it as it is."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = network()
        optimiser = torch.optim.Adam(net.parameters(), 0.02)
        for step in range(250):
            x, y = images(64, 1000 * seed + step)
            if backdoored:
                x[:12], y[:12] = stamp(x[:12]), TARGET
            optimiser.zero_grad()
            F.cross_entropy(net(x.float() / 255), y).backward()
            optimiser.step()
    return net.eval()


def asr(net: nn.Module) -> float:
    """% of images of other classes that the trigger sends to the target."""
    x, y = images(400, 77)
    with torch.no_grad():
        hit = net(stamp(x).float() / 255).argmax(1) == TARGET
    return 100 * float(hit[y != TARGET].float().mean())


def accuracy(net: nn.Module) -> float:
    """% of clean images that it calls right."""
    x, y = images(400, 77)
    with torch.no_grad():
        return 100 * float((net(x.float() / 255).argmax(1) == y).float().mean())


__all__ = ["CLASSES", "SIDE", "TARGET", "accuracy", "asr", "images", "network", "stamp", "trained"]
