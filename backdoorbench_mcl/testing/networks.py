"""Checks of models: where the normalisation lives, what the state dict holds, that every part of the network learns."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F

from .. import api
from . import toys
from .core import Subject, as_api, check, label_of, require, seeded, state_of


def _built(subject: Subject) -> api.Classifier:
    with seeded():
        model: Any = subject.make().build(toys.CLASSES, toys.SHAPE)
    as_api(model, api.Classifier, f"{label_of(subject)}: build()")
    model.set_normalisation(toys.MEAN, toys.STD)
    return model.eval()  # type: ignore[no-any-return]


@check("model")
def check_embed_and_stages(subject: Subject) -> None:
    """The logits are head(embed(x)), embeddings are (B, D), stages are maps (B, C, H, W), all of them float32."""
    who = label_of(subject)
    model = _built(subject)
    x = toys.make_images(6, 2).x.float() / 255
    with torch.no_grad():
        out = model.forward_all(x)
        logits, embed, again = model(x), model.embed(x), model.head(out.embed)
    require(
        out.logits.shape == (6, toys.CLASSES) and out.logits.dtype == torch.float32,
        f"{who}: logits are {out.logits.dtype} {tuple(out.logits.shape)}, expected float32 (B, {toys.CLASSES})",
    )
    require(out.embed.ndim == 2, f"{who}: the embedding is {tuple(out.embed.shape)}, expected (B, D)")
    shapes = [tuple(stage.shape) for stage in out.stages]
    require(
        all(len(shape) == 4 and shape[0] == 6 for shape in shapes), f"{who}: stages {shapes}, expected (B, C, H, W)"
    )
    close = all(torch.allclose(a, b, rtol=1e-4, atol=1e-5) for a, b in ((out.logits, logits), (out.embed, embed)))
    require(
        close and torch.allclose(again, logits, rtol=1e-4, atol=1e-5),
        f"{who}: forward(), forward_all(), embed() and head() disagree; derive them from features() and head()",
    )


@check("model")
def check_normalises_by_itself(subject: Subject) -> None:
    """It takes pixels in [0, 1] and normalises them with the constants of set_normalisation()."""
    model = _built(subject)
    x = toys.make_images(6, 2).x.float() / 255
    with torch.no_grad():
        first = model(x)
        model.set_normalisation((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
        mean, std = torch.tensor(toys.MEAN).view(1, 3, 1, 1), torch.tensor(toys.STD).view(1, 3, 1, 1)
        second = model((x - mean) / std)
    require(
        torch.allclose(first, second, rtol=1e-3, atol=1e-4),
        f"{label_of(subject)}: does not normalise with the constants of set_normalisation(); leave forward() and "
        "normalise() as Classifier has them",
    )


@check("model")
def check_state_dict_is_the_network(subject: Subject) -> None:
    """Its state dict holds no mean or std, and loaded into a fresh network it gives the same outputs."""
    who = label_of(subject)
    model = _built(subject)
    weights = state_of(model)
    extra = sorted({"mean", "std"} & weights.keys())
    require(not extra, f"{who}: the state dict holds {', '.join(extra)}; the constants are non-persistent buffers")
    with seeded(1):
        other: api.Classifier = subject.make().build(toys.CLASSES, toys.SHAPE)
    other.set_normalisation(toys.MEAN, toys.STD)
    other.load_state_dict(weights)
    x = toys.make_images(6, 2).x.float() / 255
    with torch.no_grad():
        same = torch.equal(other.eval()(x), model(x))
    require(same, f"{who}: a fresh network with the same weights gives other outputs; keep all of it in the state dict")


@check("model")
def check_predicts_each_image_by_itself(subject: Subject) -> None:
    """In eval mode an image gets the same logits alone and among others."""
    model = _built(subject)
    x = toys.make_images(6, 2).x.float() / 255
    with torch.no_grad():
        together, alone = model(x), torch.cat([model(image[None]) for image in x])
    require(
        torch.allclose(together, alone, rtol=1e-3, atol=1e-4),
        f"{label_of(subject)}: the logits of an image depend on the others of its batch in eval mode",
    )


@check("model")
def check_can_be_trained(subject: Subject) -> None:
    """Gradients reach every parameter, and ten steps on one batch lower its loss."""
    who = label_of(subject)
    model = _built(subject).train()
    batch = toys.make_images(16, 2)
    x = batch.x.float() / 255
    optimiser = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    losses = []
    with seeded():
        for _ in range(11):
            optimiser.zero_grad(set_to_none=True)
            loss = F.cross_entropy(model(x), batch.y)
            torch.autograd.backward(loss)
            losses.append(float(loss.detach()))
            unreached = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
            require(not unreached, f"{who}: no gradient reaches {', '.join(unreached[:3])}; use it or leave it out")
            optimiser.step()
    require(losses[-1] < losses[0], f"{who}: ten steps took the loss from {losses[0]:.2f} to {losses[-1]:.2f}")


__all__ = [
    "check_can_be_trained", "check_embed_and_stages", "check_normalises_by_itself",
    "check_predicts_each_image_by_itself", "check_state_dict_is_the_network",
]  # fmt: skip
