"""The job that holds a repaired model against what it was made of, on images that neither repair nor search saw."""

from __future__ import annotations

import torch
from safetensors.torch import load_file
from torch import Tensor

from . import api, kit
from .job import Job
from .probes import layout

POINTS = 400  # clean images in the picture of features, and half as many triggered ones
LEAST = 5  # points that can be laid out


def compare(job: Job) -> None:
    """Predictions and features of both models. in: weights, repaired, held (x); needs: triggers of one label each.

    out: labels, int64 (N,) each: `before`, `after`, and for a trigger that leads to K `before.K`, `after.K` of the same
    images with it; features: for each model `xy.before`, `xy.after` float32 (M, 2), `label` int64 (M,), the predicted
    class of the image without trigger, `triggered` uint8 (M,). Without a repaired model there is no `after`.
    """
    x = load_file(job.folder / "in" / "held.safetensors")["x"]
    models = {"before": job.victim()}
    if (job.folder / "in" / "repaired.safetensors").exists():
        models["after"] = job.victim("repaired")
    needs = job.needs()
    triggers = {int(told["labels"][0]): needs[name] for name, told in job.spec["needs"].items()}
    out = {name: kit.predict(model, x).to(torch.int64) for name, model in models.items()}
    for label, trigger in triggers.items():
        out |= {f"{name}.{label}": found for name, found in _moved(models, x, trigger, job).items()}
    job.save("labels", out)
    if job.spec["features"]:
        job.save("features", _features(models, x, next(iter(triggers.values()), None), out["before"], job))
    job.save_meta({"images": len(x)})


def _stamped(x: Tensor, trigger: api.Trigger, job: Job, rng: torch.Generator) -> Tensor:
    """x uint8 (B, C, H, W) -> float32 in [0, 1] with the trigger: rounding would weaken faint ones."""
    with torch.no_grad():
        return trigger.apply(x.to(job.device).float() / 255, rng).clamp(0, 1)


def _moved(models: dict[str, api.Classifier], x: Tensor, trigger: api.Trigger, job: Job) -> dict[str, Tensor]:
    """What each model calls the images with the trigger, int64 (N,)."""
    found: dict[str, list[Tensor]] = {name: [] for name in models}
    rng = job.rng("stamp")
    for part in x.split(kit.at_once(x)):
        stamped = _stamped(part, trigger, job, rng)
        with torch.inference_mode():
            for name, model in models.items():
                found[name].append(model(stamped).argmax(1).cpu())
    return {name: torch.cat(parts) for name, parts in found.items()}


def _features(
    models: dict[str, api.Classifier], x: Tensor, trigger: api.Trigger | None, label: Tensor, job: Job
) -> dict[str, Tensor]:
    """Laid out by t-SNE, each model by itself: clean images, then the first half of them with the trigger."""
    clean = x[:POINTS]
    half = 0 if trigger is None else max(1, len(clean) // 2)
    found: dict[str, list[Tensor]] = {name: [] for name in models}
    rng = job.rng("stamp")
    for images, stamp in ((clean, None), (clean[:half], trigger)):
        for part in images.split(kit.at_once(x)):
            pixels = part.to(job.device).float() / 255 if stamp is None else _stamped(part, stamp, job, rng)
            with torch.inference_mode():
                for name, model in models.items():
                    found[name].append(model.embed(pixels).float().cpu())
    out = {
        "label": torch.cat([label[: len(clean)], label[:half]]),
        "triggered": torch.cat([torch.zeros(len(clean)), torch.ones(half)]).to(torch.uint8),
    }
    if len(clean) + half >= LEAST:
        out |= {f"xy.{name}": layout(torch.cat(parts).numpy())[0] for name, parts in found.items()}
    return out


__all__ = ["compare"]
