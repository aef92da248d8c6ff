"""`imagenet20`: the first 20 classes of ImageNet (ILSVRC 2012) in WordNet-id order. Spec 2.3.

Found under the data root as an image folder, `train/n01440764/*` and `val/n01440764/*`, in the root itself or below
`imagenet20/`, `imagenet-20/` or `imagenet/`. A full ImageNet serves too: other classes are not read. Each class has
1,300 + 50 images, so 26,000 + 1,000. Training images are resized as a whole, aspect not kept; of a test image the
middle is taken (spec 2.4). Random crops are the recipe's (`train.augment`), drawn from what is stored here.

Paper: O. Russakovsky et al., "ImageNet Large Scale Visual Recognition Challenge", IJCV 2015; the 20 classes are
deduced from the counts that the MCLDef paper prints (arXiv 2205.04411).
Differs: nothing known.
Should reach: 26,000 + 1,000 images; a BadNets victim, ResNet-18, ASR 100 and BA without the target class 79.16 (spec
11, Table 1, `Before`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np
import torch

from backdoorbench_mcl.api import Count, Dataset, Images, Source, UserError

from .decode import centre, note, stack, whole
from .folder import Listing, head, images_in, read

SYNSETS = (
    "n01440764", "n01443537", "n01484850", "n01491361", "n01494475", "n01496331", "n01498041", "n01514668",
    "n01514859", "n01518878", "n01530575", "n01531178", "n01532829", "n01534433", "n01537544", "n01558993",
    "n01560419", "n01580077", "n01582220", "n01592084",
)  # fmt: skip
HOMES = ("imagenet20", "imagenet-20", "imagenet", "ImageNet", "")  # below the data root
OFFICIAL = {"train": 26000, "val": 1000}  # images


def synset_listing(folder: Path) -> Listing:
    """The images of the 20 classes below `folder`; UserError naming a class that is not there or empty."""
    files: list[Path] = []
    labels: list[int] = []
    folders = [folder / name for name in SYNSETS]
    absent = [path.name for path in folders if not path.is_dir()]
    if absent:
        raise UserError(
            f"{folder}: no class folder {', '.join(absent[:3])}{', ...' if len(absent) > 3 else ''} ({len(absent)} of "
            f"{len(SYNSETS)} missing); expected one for each of the first {len(SYNSETS)} synsets, with its images"
        )
    for label, path in enumerate(folders):
        inside = images_in(path)
        files.extend(inside)
        labels.extend([label] * len(inside))
    return Listing(tuple(files), tuple(labels), (folder, *folders))


class ImageNet20(Dataset):
    """ImageNet-20. Constants: spec 2. size: images become size x size, the middle of a test image being cut from one
    whose shorter side is size * 256/224."""

    name = "imagenet20"
    paper = "Russakovsky et al. 2015, ImageNet Large Scale Visual Recognition Challenge"
    classes = len(SYNSETS)
    mean = (0.485, 0.456, 0.406)
    std = (0.229, 0.224, 0.225)

    def __init__(self, *, size: Count = 224) -> None:
        self.size = size
        self.shape = (3, size, size)

    def _listings(self, root: Path | None) -> tuple[Listing, Listing]:
        homes = [] if root is None else [root / home for home in HOMES]
        try:
            for folder in homes:
                if any((folder / "train" / name).is_dir() for name in SYNSETS):
                    return synset_listing(folder / "train"), synset_listing(folder / "val")
        except OSError as error:
            raise UserError(f"{error.filename or root}: cannot be read: {error.strerror or error}") from error
        where = "anywhere, as no data root was given" if root is None else f"in {', '.join(str(f) for f in homes)}"
        raise UserError(
            f"imagenet20 not found: looked for train/{SYNSETS[0]}/ to train/{SYNSETS[-1]}/ and the same below val/ "
            f"{where}; point --data-root (BBMCL_DATA) at a folder that holds them, a full ImageNet (ILSVRC 2012) or "
            f"these {len(SYNSETS)} classes of it, from https://image-net.org"
        )

    def find(self, root: Path | None) -> Source:
        train, test = self._listings(root)
        files = (*train.files, *test.files)
        text = f"{note(head(path) for path in files)}, train resized to {self.size}x{self.size}, test centre-cropped"
        for name, part in (("train", train), ("val", test)):
            if len(part.files) != OFFICIAL[name]:
                text += f", {name} has {len(part.files):,} of {OFFICIAL[name]:,} images"
        return Source((*train.folders, *test.folders, *files), text)

    def load(self, split: Literal["train", "test"], root: Path | None) -> Images:
        train, test = self._listings(root)
        part, shaping = (train, whole(self.size)) if split == "train" else (test, centre(self.size))
        x, _ = stack(read(part.files), shaping)
        return Images(torch.from_numpy(x), torch.from_numpy(np.array(part.labels, np.int64)))
