"""What `--clean` and `--names` mean: paths, data sets with a rate, and whose labels images carry."""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import small
from hypothesis import given
from hypothesis import strategies as st

from backdoorbench_mcl import cells, clean, plan, runner
from backdoorbench_mcl.errors import UserError
from backdoorbench_mcl.grant import Grants
from backdoorbench_mcl.registry import cache_folder
from backdoorbench_mcl.store import Store

ANIMALS = ("ant", "black cat", "dog")

# ---------------------------------------------------------------- DATA


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with something of each kind."""
    monkeypatch.chdir(tmp_path)
    for name in ("photos", "a (1)@0.5", "hub", "root/set"):
        (tmp_path / name).mkdir(parents=True)
    for name in ("x.parquet", "hub/train-0.PARQUET", "x.png", "root/set/y.parquet"):
        (tmp_path / name).write_bytes(b"")
    return tmp_path


@pytest.mark.parametrize(
    ("text", "name", "path", "params"),
    [
        ("photos", "folder", "photos", {}),
        (" ./photos/ ", "folder", "photos", {}),
        ("a (1)@0.5", "folder", "a (1)@0.5", {}),  # what exists is taken as it is, whatever it looks like
        ("hub", "parquet", "hub", {}),
        ("x.parquet", "parquet", "x.parquet", {}),
        ("folder:photos(size=64)", "folder", "photos", {"size": 64}),
        ("folder:set", "folder", "root/set", {}),
        ("parquet:set/y.parquet", "parquet", "root/set/y.parquet", {}),
        ("folder:a (1)@0.5", "folder", "a (1)@0.5", {}),
    ],
)
def test_paths_are_pools(here: Path, text: str, name: str, path: str, params: dict[str, Any]) -> None:
    found = clean.parse(text, here / "root")
    assert (found.label, found.rate, found.path) == (text.strip(), None, here / path)
    assert (found.selection.name, found.selection.suffix) == (name, f":{here / path}")
    assert found.selection.params == params


@pytest.mark.parametrize(
    ("text", "name", "suffix", "params", "rate"),
    [
        ("cifar10", "cifar10", "", {}, 0.05),
        ("cifar10@0.1", "cifar10", "", {}, 0.1),
        ("shapes(train=500)@1", "shapes", "", {"train": 500}, 1.0),
        ("shapes(train=500)", "shapes", "", {"train": 500}, 0.05),
        ("other-dist/shapes@1e-2", "other-dist/shapes", "", {}, 0.01),
        ("x(note='a@b')", "x", "", {"note": "a@b"}, 0.05),
        ("folder:photos@0.2", "folder", ":photos", {}, 0.2),
        ("folder:photos(size=8)@0.2", "folder", ":photos", {"size": 8}, 0.2),
    ],
)
def test_names_are_data_sets_with_a_rate(
    here: Path, text: str, name: str, suffix: str, params: dict[str, Any], rate: float
) -> None:
    found = clean.parse(text)
    assert (found.selection.name, found.selection.suffix, found.selection.params) == (name, suffix, params)
    assert (found.path, found.rate, found.label) == (None, rate, text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "''.*no such file or folder, and no name of a data set; expected a folder of images, a .parquet file, or"),
        ("/data/photoz", "'/data/photoz': no such file or folder, and no name"),
        ("x.png", r"x\.png: is a file, but not \.parquet; expected a folder"),
        ("pipe", "pipe: is neither a folder nor an ordinary file"),
        ("broken", "broken: is neither a folder nor an ordinary file"),
        ("folder:photoz", r"folder:photoz: no such file or folder; looked for /.*/photoz; expected"),
        ("folder:", "folder:: no such file or folder"),
        ("folder:me@home", "folder:me@home: no such file or folder; looked for /.*/me@home"),
        ("cifar10@", "cifar10@: a rate of ''; expected a number above 0, at most 1, as in @0.05"),
        ("cifar10@5%", "a rate of '5%'"),
        ("cifar10@0", "a rate of '0'"),
        ("cifar10@nan", "a rate of 'nan'"),
        ("cifar10@1.01", "a rate of '1.01'"),
        ("shapes(train=@0.1", "no such file or folder, and no name"),
    ],
)
def test_what_names_no_images_is_one_line(here: Path, text: str, message: str) -> None:
    os.mkfifo("pipe")
    os.symlink("nowhere", "broken")
    with pytest.raises(UserError, match=message) as caught:
        clean.parse(text)
    assert "\n" not in str(caught.value)


def test_a_folder_that_cannot_be_listed_is_one_line(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Any) -> list[str]:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("os.listdir", refuse)
    with pytest.raises(UserError, match="photos: cannot be read: Permission denied"):
        clean.parse("photos")


@given(st.text(max_size=40))
def test_no_text_raises_another_error(text: str) -> None:
    with contextlib.suppress(UserError):
        found = clean.parse(text)
        assert (found.path is None) == (found.rate is not None)


# ---------------------------------------------------------------- a data set with a rate


def test_a_name_and_a_rate_are_the_clean_split_of_the_matrix(
    monkeypatch: pytest.MonkeyPatch, toy_env: dict[str, str], tmp_path: Path
) -> None:
    small.install_toy(monkeypatch, toy_env["BBMCL_CACHE"])
    known = runner.registry()
    source = clean.parse("shapes@0.1")
    dataset = clean.described(source, known)
    data = runner.prepare_data(known, cache_folder())(dataset, None, cells.key({"dataset": dataset.identity}))
    matrix = small.resolve(small.options("badnets", "ft", dataset="shapes", model="tiny-net", clean_rate=0.1))
    assert matrix.data.hash == data.hash
    store = Store(tmp_path / "runs")
    grants = Grants(matrix.data, store, device="cpu", precision="fp32", threads=1, isolation="process")
    node = next(node for node in plan.build(matrix).nodes.values() if node.kind == "defend")
    assert (node.victim_seed, node.defense_seed) == (0, 0)
    index = grants.clean_index(node, tmp_path)
    store.close()
    found = clean.drawn(source, data)
    x, y = (np.load(data.folder / f"train_{part}.npy") for part in "xy")
    assert np.array_equal(found.x, x[index]) and np.array_equal(found.y, y[index])
    count = data.n_train // 10
    assert (len(found.y), found.labelled, found.names, found.native) == (count, True, None, data.shape[1:])
    other = clean.drawn(source, data, seed=1)
    assert (other.hash != found.hash, len(other.y)) == (True, count)
    assert clean.drawn(clean.parse("shapes"), data).y.tolist() == found.y[: count // 2].tolist()  # nested
    with pytest.raises(UserError, match=rf"shapes@1e-6: 1e-06 of {data.n_train} images is none") as caught:
        clean.drawn(clean.parse("shapes@1e-6"), data)
    least = str(caught.value).rpartition(" ")[2]
    assert len(clean.drawn(clean.parse(f"shapes@{least}"), data).y) == 1


def test_a_name_that_nothing_has_comes_with_the_nearest(
    monkeypatch: pytest.MonkeyPatch, toy_env: dict[str, str]
) -> None:
    small.install_toy(monkeypatch, toy_env["BBMCL_CACHE"])
    known = runner.registry()
    with pytest.raises(UserError, match=r"cifar11@0\.1: no such file or folder; unknown.*did you mean 'cifar10'"):
        clean.described(clean.parse("cifar11@0.1"), known)
    with pytest.raises(UserError, match="no parameter 'sise'; did you mean 'size'"):
        clean.described(clean.parse("folder:x(sise=3)@0.1"), known)


# ---------------------------------------------------------------- names


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("ant\nblack cat\ndog\n", ANIMALS),
        ("\ufeffant\r\nblack cat \r\n dog", ANIMALS),
        ('["ant", "black cat", "dog"]', ANIMALS),
        ("a, b\nc", ("a, b", "c")),
    ],
)
def test_names_are_read_from_a_file(tmp_path: Path, content: str, expected: tuple[str, ...]) -> None:
    (tmp_path / "names").write_text(content, newline="")
    assert clean.read_names(str(tmp_path / "names")) == expected


def test_names_are_read_from_the_text() -> None:
    assert clean.read_names("ant,black cat , dog") == ANIMALS
    assert clean.read_names(' ["ant", "black cat", "dog"]') == ANIMALS


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nowhere", "--names nowhere: no such file, and no list"),
        ("", "no such file, and no list"),
        ("a,,b", "--names: name 1 is empty"),
        ("a,A", "--names: 'a' and 'A', of labels 0 and 1, are the same name but for case"),
        ("a b,c,A_b", "'a b' and 'A_b', of labels 0 and 2"),
        ("[1, 2]", "a list of other things than strings"),
        ("[", "no readable JSON list"),
        ("[" * 100_000, "no readable JSON list"),
        ("[]", "0 names; expected 1 to"),
        (json.dumps([str(i) for i in range(65_537)]), "65,537 names"),
        ("empty", "empty: 0 names; expected 1 to"),
        ("gap", "gap: name 1 is empty"),
        ("bytes", "is no text in UTF-8"),
        ("/dev/zero", "/dev/zero: cannot be read: is a device"),
        (".", "cannot be read: is a folder"),
    ],
)
def test_names_that_are_none_are_one_line(here: Path, text: str, message: str) -> None:
    Path("empty").write_bytes(b"\n\n")
    Path("gap").write_bytes(b"a\n\nb")
    Path("bytes").write_bytes(b"\xff\xfe,")
    with pytest.raises(UserError, match=message) as caught:
        clean.read_names(text)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


words = st.lists(
    st.text(st.characters(categories=["L", "N"]), min_size=1, max_size=8), min_size=2, max_size=6,
    unique_by=clean._plain,
)  # fmt: skip


@given(words)
def test_names_survive_as_a_json_list_and_separated_by_commas(names: list[str]) -> None:
    assert clean.read_names(json.dumps(names)) == tuple(names)
    assert clean.read_names(",".join(names)) == tuple(names)


# ---------------------------------------------------------------- matching


def labels(*values: int) -> Any:
    return np.array(values, np.int64)


@given(words, st.randoms(use_true_random=False), st.data())
def test_names_are_matched_whatever_their_order_and_spelling(names: list[str], random: Any, data: Any) -> None:
    wanted = [name.upper() if name.upper().casefold() == name.casefold() else name for name in names]
    order = list(range(len(names)))
    random.shuffle(order)
    mine = [" ".join(names[i]) + "_-" for i in order]
    y = labels(*data.draw(st.lists(st.integers(0, len(names) - 1), min_size=1, max_size=9)))
    assert clean.match(mine, y, wanted, len(names)).tolist() == [order[label] for label in y]


def test_images_without_labels_stay_so() -> None:
    for names, wanted in ((None, None), (None, ANIMALS), (None, ("0", "1", "2"))):
        assert clean.match(names, labels(-1, -1), wanted, 3).tolist() == [-1, -1]
    assert clean.match(("dog", "ant"), labels(0, -1, 1), ANIMALS, 3).tolist() == [2, -1, 0]


def test_numbers_are_labels_unless_the_model_names_its_classes_by_numbers() -> None:
    """torchvision's ImageFolder sorts 10 before 2: its label 1 is then the folder 10."""
    assert clean.match(None, labels(3, 7), None, 10).tolist() == [3, 7]
    assert clean.match(None, labels(2, 0), ANIMALS, 3).tolist() == [2, 0]
    strange = sorted(str(i) for i in range(12))
    assert clean.match(None, labels(10, 2, 0), strange, 12).tolist() == [2, 4, 0]
    assert clean.match(None, labels(7), [f"{i:05d}" for i in range(12)], 12).tolist() == [7]


def test_words_count_in_their_order_only_where_there_are_as_many() -> None:
    assert clean.match(ANIMALS, labels(2, 1), None, 3).tolist() == [2, 1]
    with pytest.raises(UserError, match=r"of 3 classes .'ant', 'black cat', 'dog'., the model has 4.*--names FILE"):
        clean.match(ANIMALS, labels(2, 1), None, 4)


@pytest.mark.parametrize(
    ("names", "y", "wanted", "classes", "message"),
    [
        (None, (0, 3), None, 3, "have the label 3, but the model has 3 classes, 0 to 2"),
        (None, (0, 3), ANIMALS, 3, "have the label 3, but the model has 3 classes, 0 to 2"),
        (None, (0, 3), ("0", "1", "4"), 3, "that --names does not have: '3'"),
        (ANIMALS, (0,), ANIMALS, 4, "--names has 3 names, but the model has 4 classes"),
        (
            ("Ant", "doge", "cow"),
            (0, 1, 2),
            ANIMALS,
            3,
            "not have: 'doge', 'cow' .did you mean 'dog' by 'doge'.*; rename",
        ),
        (tuple(f"z{i}" for i in range(9)), range(9), ANIMALS, 3, "'z0', 'z1', 'z2', 'z3', 'z4' and 4 more; rename"),
    ],
)
def test_labels_that_the_model_does_not_have_are_one_line(
    names: Any, y: Any, wanted: Any, classes: int, message: str
) -> None:
    with pytest.raises(UserError, match=message) as caught:
        clean.match(names, labels(*y), wanted, classes)
    assert "\n" not in str(caught.value)


def test_a_class_without_images_need_not_be_known() -> None:
    assert clean.match(("ant", "cow"), labels(0, 0), ANIMALS, 3).tolist() == [0, 0]
    assert cast(Any, clean.match(("cow", "Black-Cat"), labels(1), ANIMALS, 3)).tolist() == [1]
