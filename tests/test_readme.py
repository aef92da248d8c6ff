"""README keeps its word: the plugin that it shows works, and its commands are those that CI and packaging use."""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from backdoorbench_mcl.api import Classifier, Granted, Images, Recipe
from backdoorbench_mcl.errors import UserError

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


class Tiny(Classifier):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(12, 2)

    def features(self, x: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        return x.flatten(1), ()

    def head(self, z: Tensor) -> Tensor:
        return cast(Tensor, self.fc(z))


def test_the_plugin_of_the_readme_repairs_a_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "bbmcl_smooth"
    package.mkdir()
    entry_module, method_module = blocks("python")
    (package / "__init__.py").write_text(entry_module)
    (package / "method.py").write_text(method_module)
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("bbmcl_smooth", "bbmcl_smooth.method"):
        monkeypatch.delitem(sys.modules, name, raising=False)

    (entry,) = importlib.import_module("bbmcl_smooth").bbmcl_defenses()
    module, _, name = entry.target.partition(":")
    smooth: Any = getattr(importlib.import_module(module), name)
    assert entry.name == smooth.name == "smooth"
    assert repr(smooth(smoothing=0.2)) == "Smooth(smoothing=0.2)"
    with pytest.raises(UserError, match="smoothing=2"):
        smooth(smoothing=2)

    rng = torch.Generator().manual_seed(0)
    images = Images(torch.randint(0, 256, (16, 3, 2, 2), dtype=torch.uint8, generator=rng), torch.arange(16) % 2)
    context: Any = SimpleNamespace(
        clean=images, rng=rng, device=torch.device("cpu"), workdir=tmp_path, classes=2, needs={},
        recipe=Recipe(epochs=3, lr=0.1, batch=8, augment="none"), augment=None, granted=Granted("smooth", {}),
        log=lambda line: None, tick=lambda done, total, n: None, record=lambda name, step, value: None,
        snapshot=SimpleNamespace(load=lambda: None, save=lambda tensors, meta: None),
    )  # fmt: skip
    victim = Tiny()
    before = victim.fc.weight.detach().clone()
    repaired = smooth().defend(victim, context)
    assert repaired.state_dict().keys() == Tiny().state_dict().keys()
    assert not torch.equal(repaired.fc.weight, before)


def test_the_test_command_is_what_ci_runs() -> None:
    command = "pip install -c constraints.txt tox && tox"
    assert f"{command}\n" in blocks("sh")
    assert (ROOT / ".ci" / "run").read_text().splitlines()[-1] == command
