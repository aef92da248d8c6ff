"""Image files and data sets of strangers: refused in one line before they take memory, time or another file."""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from layouts import encode, pixels, write_folder, write_parquet, write_signs

from backdoorbench_mcl import datacache, kit
from backdoorbench_mcl.api import Images
from backdoorbench_mcl.errors import PluginError, UserError
from bbmcl_datasets import decode
from bbmcl_datasets.folder import Folder
from bbmcl_datasets.gtsrb import Gtsrb
from bbmcl_datasets.parquet import Parquet


def png(width: int, height: int) -> bytes:
    """A grey PNG whose pixels are one zero byte, compressed."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


@pytest.mark.parametrize("size", [(30_000, 30_000), (2**31 - 1, 2**31 - 1), (2**31 - 1, 1), (0, 0)])
def test_an_image_that_claims_to_be_huge_is_refused_before_it_is_decoded(size: tuple[int, int]) -> None:
    with pytest.raises(UserError, match=r"more than the 64,000,000|not a readable"):
        decode.decode(png(*size), "x.png", None)


def test_an_absurd_size_is_refused_before_images_are_enlarged_to_it(tmp_path: Path) -> None:
    write_folder(tmp_path / "train", pixels(8, 2))
    write_folder(tmp_path / "test", pixels(8, 2))
    with pytest.raises(UserError, match="size=10000000 was given, expected at most 8000"):
        Folder(path=str(tmp_path), size=10_000_000).load("train", None)


def _pipe(file: Path) -> None:
    os.mkfifo(file)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (_pipe, "no ordinary file"),
        (lambda file: file.symlink_to("/dev/zero"), "no ordinary file"),
        (lambda file: file.symlink_to(file.parent), "no ordinary file"),
        (lambda file: file.symlink_to("nowhere"), "no ordinary file|No such file"),
        (lambda file: file.mkdir(), "no ordinary file"),
        (lambda file: os.truncate(os.open(file, os.O_CREAT | os.O_RDWR), 100 << 30), "more than the"),
    ],
)
def test_what_is_no_image_file_is_named_at_once(tmp_path: Path, spoil: Callable[[Path], None], said: str) -> None:
    write_folder(tmp_path, pixels(8, 2))
    where = next(p for p in tmp_path.iterdir() if p.is_dir())
    spoil(where / "zzz.png")
    if "more" not in said:
        with pytest.raises(UserError, match=said):
            Folder(path=str(tmp_path)).find(None)
    with pytest.raises(UserError, match=said):
        Folder(path=str(tmp_path)).load("train", None)
    with pytest.raises(UserError, match=said):
        kit.read_file(where / "zzz.png", 1 << 20)


def test_names_of_files_do_not_break_the_line_of_a_message(tmp_path: Path) -> None:
    """Found by fuzzing: a name may hold line ends and escapes, and what Python raises is printed by others, too."""
    (tmp_path / "a\n\x1b[31mb\u202e\x1b]c\x9d").mkdir()
    with pytest.raises(UserError) as caught:
        Folder(path=str(tmp_path)).pool(None)
    assert str(caught.value).isprintable()
    assert str(caught.value).startswith(f"{tmp_path}/a bc: no image in it; expected files")


def test_a_data_set_with_absurdly_many_classes_is_refused(tmp_path: Path) -> None:
    """A label of 10^12 made as many counters."""
    write_parquet(tmp_path, pixels(8, 2), pixels(8, 2))
    file = next(tmp_path.glob("train*"))
    table = pq.read_table(file)
    for label, kind in ((10**12, pa.int64()), (2**63, pa.uint64())):
        pq.write_table(
            table.set_column(table.schema.get_field_index("label"), "label", pa.array([label] * 8, kind)), file
        )
        with pytest.raises(UserError, match="expected an integer from 0 to 65535"):
            Parquet(path=str(tmp_path)).load("train", None)

    class Many(Parquet):
        def load(self, split: Any, root: Path | None) -> Images:
            self.classes, self.shape, self.mean, self.std = 10**12, (3, 32, 32), (0.5,) * 3, (0.5,) * 3
            x, y = pixels(4, 2)
            import torch

            return Images(torch.from_numpy(x), torch.from_numpy(y))

    pq.write_table(table, file)
    with pytest.raises(PluginError, match=r"1,000,000,000,000 classes, expected at most 65,536"):
        datacache.prepare(Many(path=str(tmp_path)), None, tmp_path / "cache", "k")


def test_one_image_of_many_megabytes_said_a_thousand_times_is_held_a_few_times(tmp_path: Path) -> None:
    """1 kB of Parquet: 20 MB in a dictionary, used by every row. It took 5 GB for 256 rows."""
    blob = encode(np.zeros((3, 8, 8), np.uint8)) + bytes(20 << 20)
    column = pa.DictionaryArray.from_arrays(pa.array([0] * 1000, pa.int32()), pa.array([blob], pa.binary()))
    table = pa.table({"img": column, "label": [i % 2 for i in range(1000)]})
    for name in ("train", "test"):
        pq.write_table(table, tmp_path / f"{name}.parquet", compression="zstd", dictionary_pagesize_limit=1 << 30,
                       store_schema=False)  # fmt: skip
    from bbmcl_datasets import parquet

    before = pa.total_allocated_bytes()
    images = parquet.blobs([tmp_path / "train.parquet"])
    assert [len(next(images)[1]) for _ in range(300)] == [len(blob)] * 300
    assert pa.total_allocated_bytes() - before < 100 << 20
    assert len(decode._gathered(images, 256)) == 1  # nor are 256 of them in flight


def test_a_column_that_ends_early_is_not_half_a_data_set(tmp_path: Path) -> None:
    """A flipped bit in the kind of a page: pyarrow gives no rows, and no error."""
    write_parquet(tmp_path, pixels(6, 2, (3, 8, 8)), pixels(6, 2, (3, 8, 8)))
    file = next(tmp_path.glob("train*"))
    content = bytearray(file.read_bytes())
    assert content[4:6] == b"\x15\x04"  # the first field of the first page's header: a page of the dictionary
    content[5] = 6  # a page of an index, which readers pass over
    file.write_bytes(content)
    with pytest.raises(UserError, match=r"has 0 readable rows of 6|cannot be read to its end"):
        Parquet(path=str(tmp_path)).load("train", None)


def test_text_that_is_no_utf8_is_named(tmp_path: Path) -> None:
    """Found by fuzzing: Arrow takes any bytes for text until Python asks for it."""
    images = [encode(image) for image in pixels(2)[0]]
    names = pa.Array.from_buffers(
        pa.string(), 2, [None, pa.py_buffer(struct.pack("<3i", 0, 1, 2)), pa.py_buffer(b"\xb1a")]
    )
    column = pa.StructArray.from_arrays([pa.array(images, pa.binary()), names], ["bytes", "path"])
    for split in ("train", "test"):
        pq.write_table(pa.table({"img": column, "label": pa.array([0, 1])}), tmp_path / f"{split}.parquet")
    with pytest.raises(UserError, match=r"cannot be read to its end .*can't decode byte 0xb1"):
        Parquet(path=str(tmp_path)).find(None)


def test_two_columns_of_one_name_are_refused(tmp_path: Path) -> None:
    image, label = pa.array([encode(image) for image in pixels(2)[0]], pa.binary()), pa.array([0, 1])
    for split in ("train", "test"):
        table = pa.Table.from_arrays([image, label, label], ["img", "label", "label"])
        pq.write_table(table, tmp_path / f"{split}.parquet")
    with pytest.raises(UserError, match="has two columns of one name"):
        Parquet(path=str(tmp_path)).find(None)


def test_columns_whose_names_are_no_text_are_refused(tmp_path: Path) -> None:
    write_parquet(tmp_path, pixels(4, 2), pixels(4, 2))
    (file,) = tmp_path.glob("train*")
    file.write_bytes(file.read_bytes().replace(b"label", b"\xb1abel"))
    with pytest.raises(UserError, match="not a readable Parquet file"):
        Parquet(path=str(tmp_path)).find(None)


def test_labels_of_absurdly_many_digits_are_named(tmp_path: Path) -> None:
    write_signs(tmp_path / "GTSRB" / "Final_Training" / "Images")
    test = tmp_path / "GTSRB" / "Final_Test" / "Images"
    test.mkdir(parents=True)
    (test / "00000.ppm").write_bytes(b"")
    for name, label in (("00000.ppm", "9" * 5000), ("00000.ppm", "0" * 5000), ("../x.ppm", "1"), ("a\0b", "1")):
        (tmp_path / "GT-final_test.csv").write_text(f"Filename;ClassId\n{name};{label}\n")
        with pytest.raises(UserError, match=r"expected a name and 0 to 42|is missing"):
            Gtsrb(split="final").find(tmp_path)


def test_images_of_several_row_groups_are_read(tmp_path: Path) -> None:
    """As in the usual file of CIFAR-10: rows that are read at once begin in one group and end in the next one."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (300, 3, 8, 8), np.uint8)
    encoded = [{"bytes": encode(image), "path": None} for image in images]
    for name in ("train", "test"):
        table = pa.table({"img": encoded, "label": [i % 4 for i in range(300)]})
        pq.write_table(
            table, tmp_path / f"{name}.parquet", row_group_size=100, dictionary_pagesize_limit=5000, data_page_size=4000
        )
    encodings = pq.ParquetFile(tmp_path / "train.parquet").metadata.row_group(0).column(0).encodings
    assert {"PLAIN", "RLE_DICTIONARY"} <= set(encodings)
    found = Parquet(path=str(tmp_path)).load("train", None)
    assert np.array_equal(found.x.numpy(), images)
