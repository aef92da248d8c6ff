"""Checks of data sets: that they hold what they say, and that the test images are no training images."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

import torch

from .. import api
from ..errors import UserError
from .core import Skipped, Subject, as_api, check, label_of, require

TWINS = 1.0  # % of the test images that may be found among the training images: real sets have a few


def load(subject: Subject, split: Literal["train", "test"]) -> tuple[api.Dataset, api.Images]:
    """A split, from `BBMCL_DATA`. Raises Skipped where the files are not there."""
    dataset: api.Dataset = subject.make()
    given = os.environ.get("BBMCL_DATA")
    root = Path(given) if given else None
    try:
        source = dataset.find(root)
        as_api(source, api.Source, f"{label_of(subject)}: find()")
        images = dataset.load(split, root)
    except UserError as error:
        raise Skipped(f"its files are not there ({error})") from error
    as_api(images, api.Images, f"{label_of(subject)}: load()")
    return dataset, images


@check("dataset")
def check_loads_what_it_says(subject: Subject) -> None:
    """Both splits have the shape and the labels that it declares, and one mean and one positive std per channel."""
    who = label_of(subject)
    for split in ("train", "test"):
        dataset, images = load(subject, split)
        require(
            tuple(images.x.shape[1:]) == tuple(dataset.shape),
            f"{who}: {split} images are {tuple(images.x.shape[1:])}, `shape` says {tuple(dataset.shape)}",
        )
        require(len(images) > 0, f"{who}: the {split} split is empty")
        low, high = int(images.y.min()), int(images.y.max())
        require(
            low >= 0 and high < dataset.classes,
            f"{who}: {split} labels run from {low} to {high}, `classes` says 0..{dataset.classes - 1}",
        )
        channels = dataset.shape[0]
        require(
            len(dataset.mean) == len(dataset.std) == channels and all(value > 0 for value in dataset.std),
            f"{who}: mean {dataset.mean} and std {dataset.std}, expected {channels} numbers each, std above 0",
        )
        require(
            all(0 <= value <= 1 for value in dataset.mean),
            f"{who}: mean {dataset.mean} is outside [0, 1]; give it in units of pixels in [0, 1]",
        )
    missing = sorted(set(range(dataset.classes)) - set(load(subject, "train")[1].y.tolist()))
    require(not missing, f"{who}: no training image has the labels {missing[:5]}")


@check("dataset")
def check_splits_are_apart(subject: Subject) -> None:
    """Hardly any test image is found among the training images."""
    _, train = load(subject, "train")
    _, test = load(subject, "test")
    known = {_bytes(image) for image in train.x}
    twins = sum(_bytes(image) in known for image in test.x)
    share = 100 * twins / len(test)
    require(
        share <= TWINS,
        f"{label_of(subject)}: {twins} of {len(test)} test images are training images, expected at most {TWINS:g} %",
    )


def _bytes(image: torch.Tensor) -> bytes:
    return image.contiguous().numpy().tobytes()


__all__ = ["check_loads_what_it_says", "check_splits_are_apart", "load"]
