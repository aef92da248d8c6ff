"""Recorded steps on a GPU: the bits of the steps that they stand for. Skipped, visibly, where torch sees none."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import TinyNet, make_context, make_images
from torch import Tensor
from torch.nn import functional as F

from backdoorbench_mcl import api, kit, replay
from bbmcl_inverters.nc_box import NCBox
from bbmcl_inverters.nc_full import NCFull
from bbmcl_inverters.pixel import Pixel
from bbmcl_inverters.uap import UAP
from bbmcl_models.wrn import WRN

if not torch.cuda.is_available():
    pytest.skip("torch sees no CUDA device here: nothing of tests/cuda was run", allow_module_level=True)

NEVER = 10**9


@pytest.fixture(autouse=True)
def as_in_jobs(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture
def recordings(monkeypatch: pytest.MonkeyPatch) -> list[replay._Recording]:
    """Every recording that the test makes."""
    made: list[replay._Recording] = []

    class Noted(replay._Recording):
        def __init__(self, *given: Any) -> None:
            super().__init__(*given)
            made.append(self)

    monkeypatch.setattr(replay, "_Recording", Noted)
    return made


def network(precision: str) -> api.Classifier:
    torch.manual_seed(0)
    model = WRN().build(10, (3, 32, 32))
    model.set_normalisation((0.5,) * 3, (0.25,) * 3)
    model.precision = precision  # type: ignore[assignment]
    return model.to("cuda").to(memory_format=torch.channels_last)


def trained(model: api.Classifier, folder: Path, steady: bool) -> dict[str, Tensor]:
    """Eight epochs of four whole batches and a shorter one, with momentum, augmentation and a falling rate."""
    recipe = api.Recipe(steps=40, batch=64, lr=0.1, milestones=(0.5,), augment="crop+flip")
    images = make_images(4 * 64 + 24).to("cuda")
    context = make_context(folder, 1, recipe, device="cuda")
    kit.fit(model.train(), images, context, lambda batch: F.cross_entropy(model(batch.x), batch.y), steady=steady)
    return {name: tensor.cpu() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_recorded_training_has_the_bits_of_a_plain_one(
    precision: str, tmp_path: Path, recordings: list[replay._Recording]
) -> None:
    plain = trained(network(precision), tmp_path / "a", steady=False)
    assert not recordings
    found = trained(network(precision), tmp_path / "b", steady=True)
    assert len(recordings) == 2  # of whole batches, and of the shorter one, by turns
    assert plain.keys() == found.keys()
    assert [name for name in plain if not torch.equal(plain[name], found[name])] == []


def test_dropout_draws_what_it_would_have_drawn(tmp_path: Path, recordings: list[replay._Recording]) -> None:
    def run(folder: str, steady: bool) -> dict[str, Tensor]:
        torch.manual_seed(3)
        model = TinyNet().to("cuda")
        assert model.drop.p > 0
        return trained(model, tmp_path / folder, steady)

    plain, found = run("a", False), run("b", True)
    assert len(recordings) == 2
    assert [name for name in plain if not torch.equal(plain[name], found[name])] == []


@pytest.mark.parametrize(
    "inverter",
    [NCBox(steps=14), UAP(steps=14), Pixel(steps=14, patience=1), NCFull(steps=4, images_per_step=128, patience=1)],
    ids=lambda inverter: inverter.name,
)
def test_a_recorded_search_has_the_bits_of_a_plain_one(
    inverter: Any, tmp_path: Path, recordings: list[replay._Recording], monkeypatch: pytest.MonkeyPatch
) -> None:
    def found(folder: str) -> list[Tensor]:
        clean = make_images(4 * 64).to("cuda")
        context: Any = make_context(tmp_path / folder, 2, device="cuda", kind=api.InverterContext, clean=clean)
        trigger = inverter.invert(network("bf16"), 1, context)
        return [value.cpu() for value in vars(trigger).values() if isinstance(value, Tensor)]

    with monkeypatch.context() as patch:
        patch.setattr(replay, "WARM", NEVER)
        plain = found("a")
    assert not recordings
    again = found("b")
    assert len(recordings) == 1
    assert plain
    assert all(torch.equal(one, two) for one, two in zip(plain, again, strict=True))


class Asking(TinyNet):
    def features(self, x: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        assert float(x.abs().sum()) > 0  # waits for the GPU
        return super().features(x)


class Drawing(TinyNet):
    def features(self, x: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        embed, stages = super().features(x)
        return (embed if float(torch.rand(1)) < 0.5 else 2 * embed), stages


class Unsteady(Drawing):
    steady = False


@pytest.mark.parametrize("kind, reason", [(Asking, "waits"), (Drawing, "draws"), (Unsteady, "")])
def test_a_network_that_cannot_be_recorded_is_run_as_it_is(
    kind: type[TinyNet], reason: str, tmp_path: Path, recordings: list[replay._Recording]
) -> None:
    lines: list[str] = []

    def run(steady: bool) -> dict[str, Tensor]:
        torch.manual_seed(3)
        model = kind().to("cuda").train()
        recipe = api.Recipe(steps=12, batch=64, augment="none")
        context = make_context(tmp_path / str(steady), 1, recipe, device="cuda", lines=lines)
        images = make_images(256).to("cuda")
        kit.fit(model, images, context, lambda batch: F.cross_entropy(model(batch.x), batch.y), steady=steady)
        return {name: tensor.cpu() for name, tensor in model.state_dict().items()}

    plain, found = run(False), run(True)
    assert not recordings
    assert sum("is not recorded" in line and reason in line for line in lines) == (1 if reason else 0)
    assert all(torch.equal(plain[name], found[name]) for name in plain)


def test_the_second_gpu_records_too(tmp_path: Path, recordings: list[replay._Recording]) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU: recording on another than the current one was not run")

    def found(steady: bool) -> list[Tensor]:
        x, model = torch.rand(64, 3, 32, 32, device="cuda:1"), network("fp32").to("cuda:1").eval()
        step = kit.Repeated(lambda given: (model(given).square().mean(),), list(model.parameters()), able=steady)
        told = [step(x)[0].cpu() for _ in range(8)]
        return [*told, *(p.grad.cpu() for p in model.parameters() if p.grad is not None)]

    assert all(torch.equal(one, two) for one, two in zip(found(False), found(True), strict=True))
    assert len(recordings) == 1
