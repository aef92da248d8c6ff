"""The flops of the roofline against those that torch counts."""

from __future__ import annotations

import pytest
import roofline
import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from bbmcl_models.wrn import WRN

BATCH = 3


@pytest.mark.parametrize("depth, widen", [(16, 1), (10, 2)])
def test_flops_are_those_that_torch_counts(depth: int, widen: int) -> None:
    model = WRN(depth=depth, widen=widen).build(10, (3, 32, 32)).eval()
    found = roofline.layers(model)
    x, y = torch.rand(BATCH, 3, 32, 32), torch.zeros(BATCH, dtype=torch.int64)
    with FlopCounterMode(display=False) as forward, torch.no_grad():
        model(x)
    assert BATCH * roofline.forward_cost(found, BATCH).flops == forward.get_total_flops()
    with FlopCounterMode(display=False) as training:
        torch.autograd.backward(F.cross_entropy(model(x), y))
    assert BATCH * roofline.training_cost(found, BATCH).flops == training.get_total_flops()
    model.requires_grad_(False)
    with FlopCounterMode(display=False) as inversion:
        torch.autograd.backward(F.cross_entropy(model(x.clone().requires_grad_()), y))
    assert BATCH * roofline.inversion_cost(found, BATCH).flops == inversion.get_total_flops()


def test_bytes_of_a_layer_are_counted_by_hand() -> None:
    conv = roofline.Layer("c", "Conv2d", 100, 200, 40, 7)
    norm = roofline.Layer("n", "BatchNorm2d", 200, 200, 8, 0)
    assert roofline.forward_cost([conv, norm], 4) == (14, 4 * (100 + 200 + 10 + 200 + 200 + 2 + 400))
    assert roofline.training_cost([conv, norm], 4).flops == 3 * 14 - 14


def test_the_network_has_the_multiply_adds_of_the_spec() -> None:
    found = roofline.layers(WRN().build(10, (3, 32, 32)))
    assert round(sum(layer.macs for layer in found) / 1e6, 2) == 26.66
