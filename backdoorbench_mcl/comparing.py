"""The job that holds a repaired model against what it was made of, on images that neither repair nor search saw."""

from __future__ import annotations

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from . import api, kit
from .job import Job

POINTS = 400  # clean images in the picture of features, and half as many triggered ones
PERPLEXITY = 30.0
LEAST = 5  # points that can be laid out


def compare(job: Job) -> None:
    """Predictions and features of both models. in: weights, repaired, held (x); needs: triggers by their label.

    out: labels, int64 (N,) each: `before`, `after`, and for a trigger that leads to K `before.K`, `after.K` of the same
    images with it; features: for each model `xy.before`, `xy.after` float32 (M, 2), `label` int64 (M,), the predicted
    class of the image without trigger, `triggered` uint8 (M,). Without a repaired model there is no `after`.
    """
    x = load_file(job.folder / "in" / "held.safetensors")["x"]
    models = {"before": job.victim()}
    if (job.folder / "in" / "repaired.safetensors").exists():
        models["after"] = job.victim("repaired")
    triggers = {told["label"]: job.needs()[name] for name, told in job.spec["needs"].items()}
    stamped = {label: _stamped(x, trigger, job) for label, trigger in triggers.items()}
    out: dict[str, Tensor] = {}
    for name, model in models.items():
        out[name] = kit.predict(model, x)
        for label, triggered in stamped.items():
            out[f"{name}.{label}"] = _predict(model, triggered, job)
    job.save("labels", {name: labels.to(torch.int64) for name, labels in out.items()})
    if job.spec["features"]:
        job.save("features", _features(models, x, next(iter(stamped.values()), None), out["before"], job))
    job.save_meta({"images": len(x)})


def _stamped(x: Tensor, trigger: api.Trigger, job: Job) -> Tensor:
    """x uint8 (N, C, H, W) -> float32 in [0, 1] with the trigger, on the CPU: rounding would weaken faint ones."""
    rng = job.rng("stamp")
    with torch.no_grad():
        parts = [trigger.apply(part.to(job.device).float() / 255, rng).clamp(0, 1).cpu() for part in _parts(x)]
    return torch.cat(parts)


def _predict(model: api.Classifier, x: Tensor, job: Job) -> Tensor:
    with torch.inference_mode():
        return torch.cat([model(part.to(job.device)).argmax(1).cpu() for part in _parts(x)])


def _embed(model: api.Classifier, x: Tensor, job: Job) -> Tensor:
    with torch.inference_mode():
        return torch.cat([model.embed(part.to(job.device)).float().cpu() for part in _parts(x)])


def _parts(x: Tensor) -> tuple[Tensor, ...]:
    return tuple(x.split(kit.at_once(x)))


def _features(
    models: dict[str, api.Classifier], x: Tensor, stamped: Tensor | None, label: Tensor, job: Job
) -> dict[str, Tensor]:
    """Laid out by t-SNE, each model by itself: clean images, then the first half of them with the trigger."""
    from sklearn.manifold import TSNE

    clean = x[:POINTS].float() / 255
    half = clean[:0] if stamped is None else stamped[: max(1, len(clean) // 2)]
    points = torch.cat([clean, half])
    out = {
        "label": torch.cat([label[: len(clean)], label[: len(half)]]).to(torch.int64),
        "triggered": torch.cat([torch.zeros(len(clean)), torch.ones(len(half))]).to(torch.uint8),
    }
    for name, model in models.items():
        if len(points) < LEAST:
            break
        features = _embed(model, points, job).numpy()
        perplexity = min(PERPLEXITY, max(1.0, (len(points) - 1) / 3))
        plane = TSNE(2, perplexity=perplexity, init="pca", random_state=0).fit_transform(features)
        out[f"xy.{name}"] = torch.from_numpy(np.ascontiguousarray(plane, np.float32))
    return out


__all__ = ["compare"]
