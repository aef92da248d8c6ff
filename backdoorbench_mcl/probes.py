"""The jobs that look at a finished model: how soon it learns the backdoor again, and where its features lie."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

from . import api, kit
from .job import Job, require_finite, weights_of

STEPS, LR = 10, 0.01  # of a re-tuning: "a few steps" (spec 12.3, item 9)
PERPLEXITY = 30.0  # of t-SNE (spec 10)
_FOLDS = 5  # of the linear probe
_MEASURED = 2000  # points of a silhouette, whose cost is quadratic


def retune(job: Job) -> None:
    """A few steps on triggered images with the attacker's labels and on their clean twins. out: weights; meta: used.

    All weights move, batch norm keeps its statistics: on a batch half of which is triggered they would move towards the
    trigger by themselves. The twins keep the model from learning to say the target whatever it is shown.
    """
    found = load_file(job.folder / "in" / "retune.safetensors")
    x, y = found["x"].to(job.device).float() / 255, found["y"].to(job.device)
    model = job.victim()
    optimiser = torch.optim.SGD(model.parameters(), lr=LR, momentum=0.9)
    for step in range(STEPS):
        optimiser.zero_grad(set_to_none=True)
        torch.autograd.backward(F.cross_entropy(model(x), y))
        optimiser.step()
        job.tick(step + 1, STEPS, len(x))
    weights = weights_of(model)
    require_finite(weights)
    job.save("weights", weights)
    rebuild = job.spec.get("rebuild", {}).get("weights")
    how = {} if rebuild is None else {"rebuild": rebuild}
    job.save_meta({"used": job.spec["used"], "steps": STEPS, "lr": LR, **how})


def embed(job: Job) -> None:
    """Features of clean and triggered images. out: xy float32 (N, 2), y int64 (N,), triggered uint8 (N,); meta.

    xy: t-SNE of the features, clean images first; y: true labels of the clean ones, -1 for triggered. Distances in such
    a picture are no evidence, hence the measures in meta, taken on the features themselves: `cosine`, the mean of
    cos(f(x~), f0(x)) between the model's feature of a triggered image and the victim's of its clean twin; `silhouette`
    of "triggered or not"; `probe`, the cross-validated accuracy in % with which a linear classifier tells triggered
    images from their twins (50: not at all).
    """
    found = load_file(job.folder / "in" / "points.safetensors")
    model, victim = job.victim(), job.victim("victim")
    clean, triggered, twins = (_features(model, found[name], job) for name in ("clean", "triggered", "twins"))
    before = _features(victim, found["twins"], job)
    points = torch.cat([clean, triggered]).numpy()
    flags = np.r_[np.zeros(len(clean), np.uint8), np.ones(len(triggered), np.uint8)]
    xy, perplexity = layout(points)
    job.tick(1, 1, len(points))
    y = torch.cat([found["y"], torch.full((len(triggered),), -1)])
    job.save("embedding", {
        "xy": xy, "y": y, "triggered": torch.from_numpy(flags),
    })  # fmt: skip
    job.save_meta({
        "cosine": float(F.cosine_similarity(triggered, before).mean()),
        "silhouette": _silhouette(points, flags), "probe": _probe(triggered.numpy(), twins.numpy()),
        "perplexity": perplexity, "clean": len(clean), "triggered": len(triggered),
    })  # fmt: skip


def layout(points: np.ndarray[Any, Any]) -> tuple[Tensor, float]:
    """Features (N, D) in the plane by t-SNE, float32 (N, 2), and the perplexity that N points allow."""
    from sklearn.manifold import TSNE

    perplexity = min(PERPLEXITY, max(1.0, (len(points) - 1) / 3))
    plane = TSNE(2, perplexity=perplexity, init="pca", random_state=0).fit_transform(points)
    return torch.from_numpy(np.ascontiguousarray(plane, np.float32)), perplexity


def _features(model: api.Classifier, x: Tensor, job: Job) -> Tensor:
    with torch.inference_mode():
        parts = [model.embed(part.to(job.device).float() / 255).float().cpu() for part in x.split(kit.at_once(x))]
    return torch.cat(parts)


def _silhouette(points: np.ndarray[Any, Any], flags: np.ndarray[Any, Any]) -> float | None:
    """None where the features are all the same, as of a model that has collapsed."""
    from sklearn.metrics import silhouette_score

    if not points.std() > 0:
        return None
    return float(silhouette_score(points, flags, sample_size=min(_MEASURED, len(points)), random_state=0))


def _probe(triggered: np.ndarray[Any, Any], twins: np.ndarray[Any, Any]) -> float | None:
    """Triggered images and their twins in equal number; None for too few to hold some out."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import cross_val_score
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    if len(triggered) < _FOLDS:
        return None
    points, flags = np.concatenate([triggered, twins]), np.repeat([1, 0], len(triggered))
    classifier = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    return 100 * float(cross_val_score(classifier, points, flags, cv=_FOLDS).mean())


__all__ = ["embed", "layout", "retune"]
