"""What a repeated step computes, without a GPU; tests/cuda/test_replay.py has what is recorded there."""

from __future__ import annotations

from pathlib import Path

import torch
from helpers import TinyNet, make_context, make_images
from torch import Tensor
from torch.nn import functional as F

from backdoorbench_mcl import api, kit


def test_a_step_sets_gradients_and_keeps_no_graph() -> None:
    one, two, idle = (torch.tensor(value, requires_grad=True) for value in (3.0, 5.0, 7.0))
    idle.grad = torch.tensor(1.0)  # of an earlier step
    step = kit.Repeated(lambda x: ((one * two * x).sum(), one + two), [one, two, idle])
    loss, other = step(torch.tensor([1.0, 2.0]))
    assert (float(loss), float(other)) == (45.0, 8.0)
    assert not loss.requires_grad
    assert not other.requires_grad
    assert one.grad is not None
    assert two.grad is not None
    assert (float(one.grad), float(two.grad)) == (15.0, 9.0)
    assert idle.grad is None
    step(torch.tensor([1.0]))
    assert float(one.grad) == 5.0  # not added to the gradient before


def test_a_frozen_parameter_with_an_old_gradient_is_left_alone(tmp_path: Path) -> None:
    model = TinyNet().train()
    model.conv1.weight.requires_grad_(False)
    model.conv1.weight.grad = torch.ones_like(model.conv1.weight)
    before = model.conv1.weight.clone()
    context = make_context(tmp_path, 1, api.Recipe(epochs=1, batch=16))
    kit.fit(model, make_images(40), context, lambda batch: F.cross_entropy(model(batch.x), batch.y), steady=True)
    assert torch.equal(model.conv1.weight, before)


def test_a_steady_training_is_the_same_training(tmp_path: Path) -> None:
    def trained(steady: bool) -> dict[str, Tensor]:
        torch.manual_seed(0)
        model = TinyNet().train()
        context = make_context(tmp_path, 1, api.Recipe(epochs=2, batch=16, augment="crop+flip"))
        kit.fit(model, make_images(40), context, lambda batch: F.cross_entropy(model(batch.x), batch.y), steady=steady)
        return dict(model.state_dict())

    plain, steady = trained(False), trained(True)
    assert all(torch.equal(plain[name], steady[name]) for name in plain)
