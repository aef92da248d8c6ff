"""The matrix on a GPU, and its agreement with the CPU. Skipped, visibly, where torch sees none."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, cast

import numpy as np
import pytest
import small
import torch
from helpers import TinyNet, make_context, make_images
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

from backdoorbench_mcl import api, datacache, evaluate, kit, plan, request, runner
from backdoorbench_mcl.describe import construct
from backdoorbench_mcl.rows import Row
from backdoorbench_mcl.runner import Settings
from backdoorbench_mcl.store import Store

if not torch.cuda.is_available():
    pytest.skip("torch sees no CUDA device here: nothing of tests/cuda was run", allow_module_level=True)

GPU = "cuda"
POINTS = 1.0  # of ASR and BA (percent) that the same weights may differ by between two devices


@pytest.fixture(scope="module", autouse=True)
def toy(toy_env: dict[str, str]) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        small.install_toy(patch, toy_env["BBMCL_CACHE"])
        yield


@pytest.fixture(scope="module")
def on_gpu(toy: None, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Row]]:
    """The 2x2 toy matrix on the GPU, in its default precision: runs folder and rows. For reading only."""
    runs = tmp_path_factory.mktemp("gpu") / "runs"
    return runs, runner.run_matrix(small.options(device=GPU), Settings(runs=runs), live=False)


def test_every_cell_is_filled_on_the_gpu(on_gpu: tuple[Path, list[Row]]) -> None:
    runs, rows = on_gpu
    assert [(row.state, row.reason) for row in rows] == [("ok", "")] * 6
    assert {row.device for row in rows} == {GPU}
    assert {row.precision for row in rows} == {"bf16"}
    assert {row.gate for row in rows if row.defense == request.BEFORE} == {"ok"}
    for stage in Store(runs).stages():
        assert stage.numerics["device"] == GPU
        on_cpu = stage.kind == "trial"  # triggers are stamped on uint8 images there
        assert (stage.cost["peak_gpu_mb"] == 0) == on_cpu


def test_auto_finds_the_gpu() -> None:
    assert request.resolve_device("auto") == GPU
    assert request.resolve_precision("auto", GPU) == "bf16"


def test_the_same_line_gives_the_same_bits(on_gpu: tuple[Path, list[Row]], tmp_path: Path) -> None:
    one = small.options("badnets", "mcldef", device=GPU)
    runner.run_matrix(one, Settings(runs=tmp_path / "runs"), live=False)
    first = {stage.key: stage.artefact for stage in Store(on_gpu[0]).stages()}
    again = {stage.key: stage.artefact for stage in Store(tmp_path / "runs").stages()}
    assert {key: first[key] for key in again} == again


def test_what_the_gpu_computed_serves_the_cpu(on_gpu: tuple[Path, list[Row]], tmp_path: Path) -> None:
    runs = Path(shutil.copytree(on_gpu[0], tmp_path / "runs"))
    stages = Store(runs).stages()
    rows = runner.run_matrix(small.options(device="cpu", precision="bf16"), Settings(runs=runs), live=False)
    assert rows == on_gpu[1]
    assert Store(runs).stages() == stages  # the device is recorded, not part of a key


def score(asked: request.Request, store: Store, node: plan.Node, device: str) -> tuple[float, float]:
    """ASR and BA (percent) of the stored model that `node` judges, predicted on `device`."""
    weights, trial = (store.stage(node.inputs[role]) for role in ("weights", "trial"))
    assert weights is not None and trial is not None
    spec = node.methods["model"].spec
    model = cast(api.Model, construct(spec["target"], "model", spec["suffix"], spec["params"]))
    network = model.build(asked.data.classes, asked.data.shape)
    network.set_normalisation(asked.data.mean, asked.data.std)
    network.load_state_dict(load_file(store.open(weights) / "weights.safetensors"))
    network.precision = asked.precision
    network.to(torch.device(device))
    x, y = datacache.open_split(asked.data, "test")
    known = load_file(store.open(trial) / "trial.safetensors")
    clean, triggered = (kit.predict(network, part).numpy() for part in (torch.from_numpy(np.array(x)), known["x"]))
    counted = known["counted"].numpy().astype(bool)
    found = evaluate.measure(clean, triggered, np.array(y), known["goal"].numpy(), counted)
    assert found["asr"] is not None and found["ba"] is not None
    return float(found["asr"]), float(found["ba"])


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_same_weights_score_alike_on_both_devices(
    on_gpu: tuple[Path, list[Row]], precision: Literal["fp32", "bf16"]
) -> None:
    store = Store(on_gpu[0])
    graph = plan.build(small.resolve(small.options(device=GPU)))
    asked = small.resolve(small.options(device="cpu", precision=precision))
    judged = [node for node in graph.nodes.values() if node.kind == "predict"]
    assert len(judged) == 6  # victims and repaired models
    for node in judged:
        there, here = (score(asked, store, node, device) for device in (GPU, "cpu"))
        assert np.abs(np.subtract(there, here)).max() <= POINTS, (node.title, there, here)


def test_a_training_step_is_the_same_in_fp32(tmp_path: Path) -> None:
    """One SGD step with augmentation: the CPU generator draws for both devices, so only rounding differs."""
    recipe = api.Recipe(steps=1, batch=64, lr=0.1, augment="crop+flip")
    images = make_images(64)
    start = TinyNet()
    start.drop.p = 0.0  # its mask would be drawn on the device

    def trained(device: str) -> dict[str, Tensor]:
        model = TinyNet()
        model.drop.p = 0.0
        model.load_state_dict(start.state_dict())
        model.to(torch.device(device)).train()
        context = make_context(tmp_path, 1, recipe, device=device)
        with torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False):
            kit.fit(model, images.to(device), context, lambda batch: F.cross_entropy(model(batch.x), batch.y))
        return {name: tensor.cpu() for name, tensor in model.state_dict().items()}

    there, here = trained(GPU), trained("cpu")
    for name, before in start.state_dict().items():
        assert torch.allclose(there[name], here[name], rtol=1e-4, atol=1e-6), name
        assert not torch.equal(before, here[name]), name  # a step was made
