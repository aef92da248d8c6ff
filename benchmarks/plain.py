"""What one writes first: PIL images, a DataLoader, fp32, the weights always take gradients. The control of the suites.

Formulas are those of the papers (spec 5.1, 6.1, 9.2), steps and schedules those of the harness, so that quality can be
compared; what is plain is how images get to the network and what is computed on the way.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from common import MEAN, STD
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from backdoorbench_mcl.api import Classifier, Images

Stamp = Callable[[Tensor], Tensor]  # puts a trigger on normalised images
Stream = Iterator[tuple[Tensor, Tensor]]  # images, normalised float32 (B, C, H, W), and labels (B,)


class PilImages(Dataset[tuple[Tensor, int]]):
    """The images as torchvision's CIFAR10 serves them: an array turned into a PIL image, then transformed."""

    def __init__(self, images: Images, transform: Callable[[Image.Image], Tensor]) -> None:
        self.x: NDArray[np.uint8] = images.x.permute(0, 2, 3, 1).contiguous().numpy()
        self.y: list[int] = images.y.tolist()
        self.transform = transform

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(Image.fromarray(self.x[index])), self.y[index]


class Bare(torch.nn.Module):
    """The network without its wrapper: normalised images -> logits float32."""

    def __init__(self, model: Classifier, precision: str) -> None:
        super().__init__()
        self.model = model
        self.autocast = precision == "bf16"

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.autocast):
            logits = self.model.head(self.model.features(x)[0])
        return logits.float()


def plain_network(network: Classifier) -> Bare:
    """fp32 in the default memory order, on images that the transforms have normalised."""
    model = copy.deepcopy(network).to(memory_format=torch.contiguous_format)
    return Bare(model, "fp32")


def loader_forever(images: Images, batch: int, augment: bool, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    steps = [transforms.RandomCrop(32, 4), transforms.RandomHorizontalFlip()] if augment else []
    transform = transforms.Compose([*steps, transforms.ToTensor(), transforms.Normalize(MEAN, STD)])
    loader = DataLoader(PilImages(images, transform), batch_size=batch, shuffle=augment, num_workers=0)
    while True:
        for x, y in loader:
            yield x.to(device), y.to(device)


# ---------------------------------------------------------------- an MCLDef cell


@dataclass(frozen=True)
class Lengths:
    """Optimiser steps of the inversion and of the repair, and their batch."""

    inversion: int
    repair: int
    batch: int


def stream(images: Images, batch: int, device: torch.device) -> Stream:
    """Batches without end: mirrored at random, as the data set `shapes` is augmented."""
    steps = [transforms.RandomHorizontalFlip(), transforms.ToTensor(), transforms.Normalize(MEAN, STD)]
    loader = DataLoader(PilImages(images, transforms.Compose(steps)), batch_size=batch, shuffle=True, num_workers=0)
    while True:
        for x, y in loader:
            yield x.to(device), y.to(device)


def embed(model: Bare, x: Tensor) -> Tensor:
    """Normalised images (B, C, H, W) -> features (B, D)."""
    return model.model.features(x)[0]


def invert(model: Bare, images: Stream, target: int, steps: int, lr: float = 0.005, lam: float = 0.01) -> Stamp:
    """Neural Cleanse with clamped variables (spec 5.1), the pattern in pixels."""
    model.eval()
    mask = torch.rand(32, 32).requires_grad_()
    pattern = torch.rand(3, 32, 32).requires_grad_()
    mean, std = torch.tensor(MEAN).view(3, 1, 1), torch.tensor(STD).view(3, 1, 1)
    adam = torch.optim.Adam([mask, pattern], lr=lr)
    for _ in range(steps):
        x, _ = next(images)
        adam.zero_grad()
        logits = model((1 - mask) * x + mask * (pattern - mean) / std)
        goal = torch.full((len(x),), target)
        torch.autograd.backward(F.cross_entropy(logits, goal) + lam * mask.abs().sum())
        adam.step()
        with torch.no_grad():
            mask.clamp_(0, 1)
            pattern.clamp_(0, 1)
    mask, pattern = mask.detach(), (pattern.detach() - mean) / std
    return lambda x: (1 - mask) * x + mask * pattern


def purify(victim: Bare, images: Stream, stamp: Stamp, steps: int, rate: Callable[[int], float]) -> Bare:
    """MCLDef's second stage (spec 6.1) with tau 0.5; rate: the learning rate of a step."""
    model = copy.deepcopy(victim)
    victim.eval()
    model.train()
    sgd = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
    for step in range(steps):
        x, _ = next(images)
        for group in sgd.param_groups:
            group["lr"] = rate(step)
        triggered = stamp(x)
        z = embed(model, triggered)
        z_pos, z_neg = embed(victim, x).detach(), embed(victim, triggered).detach()
        s_pos, s_neg = F.cosine_similarity(z, z_pos), F.cosine_similarity(z, z_neg)
        sgd.zero_grad()
        pull, push = torch.exp(s_pos / 0.5), torch.exp(s_neg / 0.5)
        torch.autograd.backward(-torch.log(pull / (pull + push)).mean())
        sgd.step()
    return model


def fine_tune(model: Bare, images: Stream, steps: int, lr: float = 0.01) -> Bare:
    """Cross-entropy, all layers, Nesterov momentum."""
    model.train()
    sgd = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, weight_decay=1e-4, nesterov=True)
    for _ in range(steps):
        x, y = next(images)
        sgd.zero_grad()
        torch.autograd.backward(F.cross_entropy(model(x), y))
        sgd.step()
    return model


def attention(maps: Tensor) -> Tensor:
    """NAD's map of a stage: (B, C, H, W) -> (B, H * W)."""
    return F.normalize(maps.pow(2).mean(1).flatten(1))


def distil(student: Bare, images: Stream, steps: int, lr: float = 0.01) -> Bare:
    """NAD's second stage (spec 9.2) against a copy of the student as it was."""
    teacher = copy.deepcopy(student).eval()
    student.train()
    sgd = torch.optim.SGD(student.parameters(), lr=lr, momentum=0.9, weight_decay=1e-4, nesterov=True)
    for _ in range(steps):
        x, y = next(images)
        z, ours = student.model.features(x)
        _, theirs = teacher.model.features(x)
        loss = F.cross_entropy(student.model.head(z), y)
        for beta, a, b in zip((500, 1000, 1000), ours, theirs, strict=True):
            loss = loss + beta * (attention(a) - attention(b).detach()).pow(2).mean()
        sgd.zero_grad()
        torch.autograd.backward(loss)
        sgd.step()
    return student


def judge(model: Bare, images: Images, batch: int = 512) -> Tensor:
    """Predicted labels (N,) int64 of the images in storage order."""
    model.eval()
    transform = transforms.Compose([transforms.ToTensor(), transforms.Normalize(MEAN, STD)])
    with torch.no_grad():
        return torch.cat([model(x).argmax(1) for x, _ in DataLoader(PilImages(images, transform), batch_size=batch)])
