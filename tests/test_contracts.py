"""What a method may do beyond weights and clean images: repairs that are built again, attackers that train, defenses
that are granted the suspect training set. On the toy data, through the whole harness.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import made
import pytest
import small
import torch
from safetensors.torch import load_file, save_file

from backdoorbench_mcl import artefacts, remarks, report, runner
from backdoorbench_mcl.api import Classifier
from backdoorbench_mcl.describe import load_class
from backdoorbench_mcl.errors import PluginError, UserError
from backdoorbench_mcl.kit import masked
from backdoorbench_mcl.report.grid import build
from backdoorbench_mcl.rows import Row
from backdoorbench_mcl.runner import Settings
from backdoorbench_mcl.store import Store

MASKERS = ("masker", "masker(how=hidden)", "masker(how=unknown)", "masker(how=other)")


@pytest.fixture(autouse=True)
def toy(monkeypatch: pytest.MonkeyPatch, toy_env: dict[str, str]) -> None:
    small.install_toy(monkeypatch, toy_env["BBMCL_CACHE"])


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, toy_env: dict[str, str]) -> tuple[Path, dict[str, Row]]:
    """Rows of badnets by defense, `takeover/` before those of the attack that trains."""
    runs = tmp_path_factory.mktemp("contracts") / "runs"
    asked = small.options("badnets,takeover", ",".join(("same", "wary", *MASKERS)), retune=10)
    with pytest.MonkeyPatch.context() as patch:
        small.install_toy(patch, toy_env["BBMCL_CACHE"])
        rows = runner.run_matrix(asked, Settings(runs=runs, workers=2, threads=1), live=False)
    return runs, {row.defense if row.attack == "badnets" else f"takeover/{row.defense}": row for row in rows}


# ---------------------------------------------------------------- repairs that are built again


def test_a_repair_that_is_built_again_is_judged_as_it_was_made(finished: tuple[Path, dict[str, Row]]) -> None:
    runs, rows = finished
    row = rows["masker"]
    assert (row.state, row.reason, row.rebuild) == ("ok", "", "backdoorbench_mcl.kit:masked")
    store = Store(runs)
    stage, victim = store.stage(row.stages["defend"]), store.stage(row.stages["model"])
    assert stage is not None and victim is not None
    kept = artefacts.read_meta(store.open(stage))
    assert kept["rebuild"]["params"] == {"masks": {"conv2": list(range(0, 16, 2))}}
    own, others = (load_file(store.open(s) / "weights.safetensors") for s in (stage, victim))
    store.close()
    assert all(torch.equal(own[name], others[name]) for name in others)  # the mask is in no weight
    assert row.asr_k != rows["same"].asr_k  # and yet it was there when the model was judged


def test_a_retuned_model_keeps_its_masks(finished: tuple[Path, dict[str, Row]]) -> None:
    runs, rows = finished
    assert rows["masker"].retuned_ba is not None
    store = Store(runs)
    tuned = next(s for s in store.stages() if s.kind == "retune" and "rebuild" in artefacts.read_meta(store.open(s)))
    assert artefacts.read_meta(store.open(tuned))["rebuild"]["function"] == "backdoorbench_mcl.kit:masked"
    store.close()


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ("hidden", "does more than the network with its weights"),
        ("unknown", "rebuild 'nowhere:nothing' cannot be imported"),
        ("other", "does more than the network with its weights"),
    ],
)
def test_what_cannot_be_built_again_is_a_failed_cell(
    finished: tuple[Path, dict[str, Row]], how: str, reason: str
) -> None:
    row = finished[1][f"masker(how={how})"]
    assert row.state == "failed"
    assert reason in row.reason


def test_tables_say_which_repair_is_more_than_weights(finished: tuple[Path, dict[str, Row]]) -> None:
    text = report.render(list(finished[1].values()), "table")
    said = " ".join(text.split())
    assert "Custom inference, more than other weights: masker (backdoorbench_mcl.kit:masked)." in said
    assert "The attacker trained the model, not only its data: takeover." in said


class Two(Classifier):
    def __init__(self) -> None:
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 4, 1)
        self.fc = torch.nn.Linear(4, 2)

    def features(self, x: torch.Tensor) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        out = self.conv(x)
        return out.mean((2, 3)), (out,)

    def head(self, z: torch.Tensor) -> torch.Tensor:
        return torch.as_tensor(self.fc(z))


def test_masked_channels_are_zero_and_the_others_untouched() -> None:
    model = Two().eval()
    x = torch.rand(5, 3, 4, 4)
    (before,) = model.forward_all(x).stages
    names = list(model.state_dict())
    assert masked(model, {"conv": [1, 3]}) is model
    (after,) = model.forward_all(x).stages
    assert torch.equal(after[:, [1, 3]], torch.zeros(5, 2, 4, 4))
    assert torch.equal(after[:, [0, 2]], before[:, [0, 2]])
    assert list(model.state_dict()) == names
    with pytest.raises(UserError, match="no module 'missing'; the network has conv, fc"):
        masked(model, {"missing": [0]})


def test_code_of_its_own_beside_the_test_images_is_not_ranked(finished: tuple[Path, dict[str, Row]]) -> None:
    """A function of this package is known to look at nothing; one of a plugin could pair images with their twins."""
    rows = finished[1]
    shipped = [rows["before"], rows["same"], rows["masker"]]
    (line,) = build(shipped)[0].lines
    assert [cell.incomparable for cell in line.cells if cell][1:] == ["", ""]
    assert any(cell.asr_rank for cell in line.cells if cell)
    foreign = dataclasses.replace(rows["masker"], rebuild="bbmcl_toy_methods:opened")
    (line,) = build([rows["before"], rows["same"], foreign])[0].lines
    assert line.cells[2] is not None
    assert line.cells[2].incomparable == "custom inference by code of its own"
    assert (line.cells[2].asr_rank, line.cells[2].ba_rank) == ("", "")
    said = " ".join(report.render([rows["before"], rows["same"], foreign], "table").split())
    assert "Not ranked where that is the method's own code: it runs where the test images are." in said


def test_what_a_rebuild_opens_marks_the_row(tmp_path: Path) -> None:
    """Without Landlock, in the job that predicts and in that of a re-tuning; with it the cell would fail."""
    asked = small.options("badnets", "masker(how=reading)", retune=10)
    found = runner.run_matrix(asked, Settings(runs=tmp_path / "runs", workers=1, isolation="process"), live=False)
    (row,) = [row for row in found if row.defense != "before"]
    assert (row.state, row.reason) == ("ok", "")
    assert "/etc/hostname" in row.strays
    store = Store(tmp_path / "runs")
    kinds = {stage.kind for stage in store.stages() if "/etc/hostname" in stage.numerics.get("strays", ())}
    store.close()
    assert {"defend", "predict", "retune"} <= kinds


# ---------------------------------------------------------------- attackers that train


def test_an_attacker_may_train(finished: tuple[Path, dict[str, Row]]) -> None:
    runs, rows = finished
    before, same = rows["takeover/before"], rows["takeover/same"]
    assert before.controls == "training"
    assert before.asr is not None and before.asr > 95
    assert (same.state, same.clean_poisoned) == ("ok", None)  # nobody knows which images were stamped
    store = Store(runs)
    stage = store.stage(before.stages["model"])
    assert stage is not None
    assert load_file(store.open(stage) / "attack.safetensors")["state.value"].tolist() == [255]
    store.close()
    assert rows["before"].controls == "data"


def test_there_is_no_training_set_to_suspect_where_the_attacker_trained(
    finished: tuple[Path, dict[str, Row]], tmp_path: Path
) -> None:
    row = finished[1]["takeover/wary"]
    assert (row.state, row.reason) == ("n/a", "the attacker trained the model: there is no training set to look at")
    graph = small.build(small.options("takeover", "same", exclude_poisoned=True))
    assert "differs from epoch to epoch" in graph.cells[1].undefined


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("def stamp(self, x, y, state, rng): return x", "lacks poison()"),
        ("controls = 'training'\n    def stamp(self, x, y, state, rng): return x", "lacks train()"),
        (
            "controls = 'all'\n    def stamp(self, x, y, state, rng): return x",
            "controls is 'all', expected one of data",
        ),
    ],
)
def test_an_attack_without_its_half_is_named(
    source: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = f"half_{abs(hash(source))}"
    (tmp_path / f"{name}.py").write_text(
        f"from backdoorbench_mcl.api import Attack\nclass Half(Attack):\n    name = 'half'\n    {source}\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(PluginError, match=reason):
        load_class(f"{name}:Half", "attack")


# ---------------------------------------------------------------- methods of other packages


def test_rows_name_the_packages_whose_methods_made_them(finished: tuple[Path, dict[str, Row]]) -> None:
    runs, rows = finished
    # of a repair, of a victim, of a cell that failed, of one that was not run
    for label in ("same", "before", "masker(how=hidden)", "takeover/wary"):
        assert rows[label].versions["bbmcl-toy"] == "1.0"
    store = Store(runs)
    versions = {stage.kind: stage.numerics["versions"] for stage in store.stages()}
    store.close()
    assert all(versions[kind]["bbmcl-toy"] == "1.0" for kind in ("train", "defend", "predict"))
    said = " ".join(report.render(list(rows.values()), "table").split())
    assert "Methods of other packages: tiny-net (bbmcl-toy 1.0); tiny (bbmcl-toy 1.0); same (bbmcl-toy 1.0)" in said


def test_versions_are_those_that_made_the_stages() -> None:
    base = {"torch": "2.9", "python": "3.11"}
    nearest, older = {**base, "mine": "2.0"}, {**base, "torch": "2.8", "mine": "1.0", "theirs": "7"}
    assert remarks.versions(nearest, [nearest, older], ["mine", "theirs", "lost"]) == {
        **base, "mine": "1.0, 2.0", "theirs": "7",
    }  # fmt: skip
    assert remarks.versions(nearest, [older], []) == nearest


def test_origins_are_told_as_far_as_rows_know_them() -> None:
    params = {
        "attack": {"name": "mine/own"}, "model": {"name": "backdoorbench-mcl/wrn"}, "dataset": {"name": "cifar10"},
        "defense": {"name": "theirs/d"}, "inverter": {"name": "mine/i"}, "train": {"lr": 0.1},
        "needs defense": {"d(step=2)": {"name": "theirs/d"}},
    }  # fmt: skip
    row = Row("k", "cifar10", "wrn-16-1", "own", "d", 0, 0, 0.05, "ok", inverter="i(steps=2)", params=params)
    assert remarks.origins(row) == {"own": "mine", "d": "theirs", "i(steps=2)": "mine", "d(step=2)": "theirs"}
    told = [made.make("own", "d", params=params, versions={"mine": version}) for version in ("1.0", "1.0, 2.0")]
    rows = [dataclasses.replace(row, victim_seed=seed) for seed, row in enumerate(told)]
    said = " ".join(report.render(rows, "markdown").split())
    assert "Methods of other packages: own (mine 1.0, 2.0); d (theirs); d(step=2) (theirs)." in said


# ---------------------------------------------------------------- the suspect training set


def test_a_defense_is_granted_the_training_set_that_the_victim_saw(finished: tuple[Path, dict[str, Row]]) -> None:
    runs, rows = finished
    row = rows["wary"]
    assert (row.state, row.reason, row.knows) == ("ok", "", ("suspect",))
    store = Store(runs)
    stage = next(stage for stage in store.stages() if stage.kind == "suspect")
    found = load_file(store.open(stage) / "suspect.safetensors")
    victim = store.stage(row.stages["model"])
    assert victim is not None
    poisoned = load_file(store.open(victim) / "attack.safetensors")["poison_index"]
    store.close()
    corner = found["x"][:, :, -3:, -3:].flatten(1)
    triggered = ((corner == 0) | (corner == 255)).all(1)
    assert len(found["x"]) == 320
    assert int(triggered.sum()) == len(poisoned) == 64
    assert found["y"][triggered].unique().tolist() == [1]
    places = triggered.nonzero().flatten().tolist()
    assert places != poisoned.tolist()  # in random order: the place in the data set tells nothing


def test_who_sees_the_training_set_has_no_clean_copy_of_a_poisoned_image(
    finished: tuple[Path, dict[str, Row]],
) -> None:
    """Such a copy, whose twin in the training set shows the trigger, would give away all that was not granted."""
    assert finished[1]["wary"].clean_poisoned == 0
    assert finished[1]["same"].clean_poisoned != 0  # the toy's clean set does meet poisoned images


def test_the_others_are_not(finished: tuple[Path, dict[str, Row]]) -> None:
    runs, rows = finished
    store = Store(runs)
    inputs = {key: store.stage(rows[label].stages["defend"]) for label in ("same", "wary") for key in [label]}
    store.close()
    assert inputs["same"] is not None and inputs["wary"] is not None
    assert "suspect" in inputs["wary"].numerics["inputs"]
    assert "suspect" not in inputs["same"].numerics["inputs"]


@pytest.mark.parametrize("what", ["index", pytest.param("content", marks=pytest.mark.slow)])
def test_a_training_set_that_comes_out_otherwise_is_not_passed_off_as_the_victims(
    what: str, finished: tuple[Path, dict[str, Row]], tmp_path: Path
) -> None:
    """As with a victim that was imported from another machine, where the attack chose or made other images."""
    _, rows = finished
    asked = small.options("badnets", "wary")
    other = tmp_path / "runs"
    runner.run_matrix(dataclasses.replace(asked, defenses="same"), Settings(runs=other, workers=1), live=False)
    store = Store(other)
    stage = store.stage(rows["before"].stages["model"])
    assert stage is not None
    folder = tmp_path / "altered"
    folder.mkdir()
    for file in store.open(stage).iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    known = load_file(folder / "attack.safetensors")
    if what == "index":
        known["poison_index"] = known["poison_index"].roll(1)
        save_file(known, folder / "attack.safetensors")
    else:
        meta = json.loads((folder / "meta.json").read_text())
        (folder / "meta.json").write_text(json.dumps({**meta, "content": "0" * 64}))
    store.forget(stage.key)
    store.commit(dataclasses.replace(stage, artefact=""), folder)
    store.close()
    row = {row.defense: row for row in runner.run_matrix(asked, Settings(runs=other, workers=1), live=False)}["wary"]
    assert row.state == "failed"
    assert "cannot be made again as this victim saw it" in row.reason


def test_rows_of_an_earlier_version_say_nothing_of_it() -> None:
    old = Row("k", "tiny", "tiny-net", "badnets", "ft", 0, 0, 0.2, "ok").as_dict()
    del old["controls"], old["rebuild"]
    assert (Row.from_dict(json.loads(json.dumps(old))).controls, Row.from_dict(old).rebuild) == ("data", "")
