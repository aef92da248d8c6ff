"""`gtsrb`: the German Traffic Sign Recognition Benchmark (Stallkamp et al. 2012), found under the data root. Spec 2.2.

Read are torchvision's layout (`gtsrb/GTSRB/Training/`, ...) and the official archives as they unpack:

    GTSRB/Training/00000/00000_00000.ppm                GTSRB-Training_fixed.zip             26,640 images
    GTSRB/Online-Test-sort/00000/*.ppm                  GTSRB_Online-Test-Images-Sorted.zip  12,569 (and `Images/`,
                                                        a second copy of them, not read)
    GTSRB/Final_Training/Images/00000/00000_00000.ppm   GTSRB_Final_Training_Images.zip      39,209
    GTSRB/Final_Test/Images/00000.ppm                   GTSRB_Final_Test_Images.zip          12,630
    GT-final_test.csv                                   GTSRB_Final_Test_GT.zip              their labels

The paper's counts are those of `split=online`, the first two. Their union is Final_Training; where only that is at
hand, whole tracks (up to 30 frames of one sign) are divided so that the totals come out the same, and the note says
"reconstructed": which tracks the organisers took is not known. `split=final` tests on the 12,630 images.
Never split by image: frames of one sign would lie on both sides.

Images are resized as a whole, without a crop to the sign. `colour=bgr` repeats a bug of the authors' code, which
swaps red and blue but not the constants nor the trigger. Many a mirrored sign is another sign; the paper's defences
mirror all the same, `flip=false` forbids it.

Paper: J. Stallkamp et al., "The German Traffic Sign Recognition Benchmark: A multi-class classification competition",
IJCNN 2011; its use is that of the MCLDef paper (arXiv 2205.04411).
Differs: nothing known for `split=online`; which images the authors really had is deduced from their counts.
Should reach: 26,640 + 12,569 images of 43 classes; a BadNets victim, WRN-16-1, ASR 100 and BA without the target
class 97.86 (spec 11, Table 1, `Before`).
"""

from __future__ import annotations

import csv
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from PIL import Image

from backdoorbench_mcl.api import Count, Dataset, Images, Source, UserError

from .decode import note, stack, whole
from .folder import Listing, head, images_in, read

CLASSES = 43
OFFICIAL = {"Training": 26640, "Online-Test-sort": 12569, "Final_Training": 39209, "Final_Test": 12630}  # images
ARCHIVES = {
    "Training": "GTSRB-Training_fixed",
    "Online-Test-sort": "GTSRB_Online-Test-Images-Sorted",
    "Final_Training": "GTSRB_Final_Training_Images",
    "Final_Test": "GTSRB_Final_Test_Images",
    "GT-final_test.csv": "GTSRB_Final_Test_GT",
}
PIECES = {
    "Training": "Training",
    "Online-Test-sort": "Online-Test-sort",
    "Final_Training": "Final_Training/Images",
    "Final_Test": "Final_Test/Images",
}
TRUTH = "GT-final_test.csv"
TRAINING = {"Final_Training", "Training"}
HOMES = ("gtsrb", "GTSRB", "")  # below the data root; torchvision's comes first
_FRAME = re.compile(r"(\d+)_\d+\.")  # track_frame

Split = Literal["online", "final", "reconstructed"]


# ---------------------------------------------------------------- the reconstructed split, pure


def in_training(names: Sequence[str]) -> list[bool]:
    """File names TRACK_FRAME of one class -> whether each is for training: those of the lowest ceil(2n/3) of n tracks.

    Raises ValueError naming a file whose name is not of that form. Example: in_training(["00000_00000.ppm"]) -> [True]
    """
    tracks = []
    for name in names:
        match = _FRAME.match(name)
        if match is None:
            raise ValueError(f"{name}: expected a name like 00012_00029.ppm, track and frame")
        tracks.append(int(match[1]))
    every = sorted(set(tracks))
    first = set(every[: -(-2 * len(every) // 3)])
    return [track in first for track in tracks]


# ---------------------------------------------------------------- finding


class Parts(NamedTuple):
    """The two splits, and what the report is to say about them."""

    train: Listing
    test: Listing
    about: str


def _bases(root: Path) -> list[Path]:
    """Folders in which a piece may lie, with or without a `GTSRB/` above it; an archive may have one of its own."""
    homes = [root / home for home in HOMES]
    return [*homes, *(home / archive for home in homes for archive in ARCHIVES.values())]


def _pieces(root: Path) -> dict[str, Path]:
    """The pieces that are there, by name: folders, and the CSV file with the labels of Final_Test."""
    found: dict[str, Path] = {}
    for base in _bases(root):
        for folder in (base / "GTSRB", base):
            for piece, path in PIECES.items():
                sign = folder / path / ("00000.ppm" if piece == "Final_Test" else "00000")
                if piece not in found and sign.exists():
                    found[piece] = folder / path
            for above in (folder, folder / "Final_Test", folder / "Final_Test" / "Images"):
                if TRUTH not in found and (above / TRUTH).is_file():
                    found[TRUTH] = above / TRUTH
    return found


def _by_class(folder: Path) -> Listing:
    """Class folders 00000 to 00042; whatever else lies there is not read (spec 2.2: `Images`)."""
    files: list[Path] = []
    labels: list[int] = []
    folders = [folder / f"{label:05d}" for label in range(CLASSES)]
    for label, inside in enumerate(folders):
        if not inside.is_dir():
            raise UserError(f"{folder}: no class folder {inside.name}; expected 00000 to {CLASSES - 1:05d}")
        found = images_in(inside)
        files.extend(found)
        labels.extend([label] * len(found))
    return Listing(tuple(files), tuple(labels), (folder, *folders))


def _by_csv(folder: Path, table: Path) -> Listing:
    """The images that a CSV file (`;` between columns, among them Filename and ClassId) names."""
    files: list[Path] = []
    labels: list[int] = []
    for i, (name, label) in enumerate(_rows(table)):
        known = re.fullmatch(r"\d{1,9}", label.strip(), re.ASCII) is not None and int(label) < CLASSES
        if not name or Path(name).name != name or not known:
            raise UserError(
                f"{table}, image {i}: Filename {name[:80]!r} and ClassId {label[:80]!r}; expected a name and "
                f"0 to {CLASSES - 1}, as in {ARCHIVES[TRUTH]}.zip"
            )
        if not (folder / name).is_file():
            raise UserError(f"{folder / name} is missing, but {table.name} lists it; unpack the archive again")
        files.append(folder / name)
        labels.append(int(label))
    if not files:
        raise UserError(f"{table}: lists no image; expected the labels from {ARCHIVES[TRUTH]}.zip")
    return Listing(tuple(files), tuple(labels), (folder, table))


def _rows(table: Path) -> list[tuple[str, str]]:
    try:
        with table.open(newline="", encoding="utf-8-sig") as file:
            rows = csv.DictReader(file, delimiter=";", skipinitialspace=True)
            return [(row.get("Filename") or "", row.get("ClassId") or "") for row in rows]
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{table}: no readable table ({error}); unpack {ARCHIVES[TRUTH]}.zip again") from error


def _reconstructed(folder: Path) -> tuple[Listing, Listing]:
    files, labels, folders = _by_class(folder)
    chosen: list[bool] = []
    for label in range(CLASSES):
        names = [path.name for path, of in zip(files, labels, strict=True) if of == label]
        try:
            chosen += in_training(names)
        except ValueError as error:
            raise UserError(f"{folder / f'{label:05d}'}/{error}") from error
    train, test = (
        Listing(
            tuple(path for path, first in zip(files, chosen, strict=True) if first == wanted),
            tuple(label for label, first in zip(labels, chosen, strict=True) if first == wanted),
            folders,
        )
        for wanted in (True, False)
    )
    if not test.files:
        raise UserError(f"{folder}: one track in each class, so that none is left for testing")
    return train, test


# ---------------------------------------------------------------- data set


class Gtsrb(Dataset):
    """GTSRB, 43 classes. Constants: spec 2.

    split: "online" (the paper's: 26,640 + 12,569; reconstructed where only Final_Training is found), "final" (39,209,
    or 26,640 where only Training is found, + 12,630), "reconstructed" (from Final_Training whatever else is found).
    colour: "bgr" swaps red and blue. flip: whether training may mirror signs. size: images become size x size.
    """

    name = "gtsrb"
    paper = "Stallkamp et al. 2012, Man vs. computer: Benchmarking machine learning for traffic sign recognition"
    classes = CLASSES
    mean = (0.3403, 0.3121, 0.3214)
    std = (0.2724, 0.2608, 0.2669)

    def __init__(
        self,
        *,
        split: Split = "online",
        colour: Literal["rgb", "bgr"] = "rgb",
        flip: bool = True,
        size: Count = 32,
    ) -> None:
        self.split = split
        self.colour = colour
        self.flip_ok = flip
        self.size = size
        self.shape = (3, size, size)

    def _parts(self, root: Path | None) -> Parts:
        try:
            found = {} if root is None else _pieces(root)
            if self.split == "online" and {"Training", "Online-Test-sort"} <= found.keys():
                pieces = ("Training", "Online-Test-sort")
                train, test = _by_class(found["Training"]), _by_class(found["Online-Test-sort"])
                about = "online split"
            elif self.split == "final" and {"Final_Test", TRUTH} <= found.keys() and found.keys() & TRAINING:
                pieces = ("Final_Training" if "Final_Training" in found else "Training", "Final_Test")
                train, test = _by_class(found[pieces[0]]), _by_csv(found["Final_Test"], found[TRUTH])
                about = f"final split with {pieces[0]}"
            elif self.split != "final" and "Final_Training" in found:
                pieces = ("Training", "Online-Test-sort")  # of which it has the counts
                train, test = _reconstructed(found["Final_Training"])
                about = "reconstructed split"
            else:
                raise self._missing(root, found)
        except OSError as error:
            raise UserError(f"{error.filename or root}: cannot be read: {error.strerror or error}") from error
        for name, part, piece in zip(("train", "test"), (train, test), pieces, strict=True):
            if len(part.files) != OFFICIAL[piece]:
                about += f", {name} has {len(part.files):,} of {OFFICIAL[piece]:,} images"
        return Parts(train, test, about)

    def _missing(self, root: Path | None, found: dict[str, Path]) -> UserError:
        wanted = {
            "online": "GTSRB/Training with GTSRB/Online-Test-sort, or GTSRB/Final_Training/Images",
            "final": "GTSRB/Final_Training/Images or GTSRB/Training, with GTSRB/Final_Test/Images and " + TRUTH,
            "reconstructed": "GTSRB/Final_Training/Images",
        }[self.split]
        where = "no data root was given" if root is None else f"in {root}, its gtsrb/ and its GTSRB/"
        zips = [] if root is None else sorted({str(p) for h in HOMES for p in (root / h).glob("GTSRB*.zip")})
        have = f"found only {', '.join(sorted(found))}" if found else "found none of them"
        todo = (
            f"unpack {', '.join(zips)} where it lies"
            if zips
            else "get the archives "
            + ", ".join(f"{name}.zip" for name in ARCHIVES.values())
            + " that you need from https://benchmark.ini.rub.de and unpack them into --data-root (BBMCL_DATA)"
        )
        return UserError(f"gtsrb, split={self.split}: looked for {wanted}; {where}; {have}; {todo}")

    def find(self, root: Path | None) -> Source:
        train, test, about = self._parts(root)
        files = (*train.files, *test.files)
        text = f"{note(head(path) for path in files)}, {about}, resized to {self.size}x{self.size}"
        # with the folders above them: another archive beside these may change what is chosen
        above = [folder.parent for part in (train, test) for folder in (part.folders[0], part.folders[0].parent)]
        folders = dict.fromkeys((*above, *train.folders, *test.folders))
        return Source((*folders, *files), text + (", BGR" if self.colour == "bgr" else ""))

    def load(self, split: Literal["train", "test"], root: Path | None) -> Images:
        parts = self._parts(root)
        files, labels, _ = parts.train if split == "train" else parts.test
        x, _ = stack(read(files), self._shape)
        return Images(torch.from_numpy(x), torch.from_numpy(np.array(labels, np.int64)))

    def _shape(self, image: Image.Image) -> Image.Image:
        resized = whole(self.size)(image)
        return resized if self.colour == "rgb" else Image.merge("RGB", resized.split()[::-1])
