"""The tracing by itself: head, embedding and stages of networks full of traps, pooling that can be repeated."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from backdoorbench_mcl.api import PluginError, UserError
from backdoorbench_mcl.traced import ExactPool, Traced, map_size, pooling


def hooks(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


class Toy(nn.Module):
    """Two resolutions and all that could be taken for a third, or for the wrong map of the two."""

    def __init__(self, end: str = "linear") -> None:
        super().__init__()
        self.end = end
        self.one = nn.Conv2d(3, 4, 3, padding=1)
        self.squeeze = nn.Conv2d(4, 4, 1)  # at 1x1, in the middle
        self.two = nn.Sequential(nn.Conv2d(4, 4, 1), nn.Conv2d(4, 6, 2, 2))  # its first map is not a stage
        self.act = nn.ReLU(inplace=True)  # called three times
        self.up = nn.Upsample(scale_factor=2)
        self.attend = nn.Identity()
        self.fc = nn.Linear(6, 5)
        self.extra = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Any:
        one = self.one(x)
        one = one * self.squeeze(one.mean((2, 3), keepdim=True)).sigmoid()
        two = self.two(self.act(one))
        self.up(two)  # larger than one before it
        self.attend(x.new_zeros(len(x), 2, 3, 7))  # no aspect of an image
        self.attend(x.new_zeros(len(x) * 4, 2, 2, 2))  # no batch
        two = self.act(self.act(two))  # in place: overwrites what `two` returned
        z = two.mean((2, 3))
        if self.end == "tokens":
            return self.fc(z[:, None])[:, 0]
        if self.end == "dense":
            return self.fc(z[:, None])
        if self.end == "softmax":
            return self.fc(z).softmax(1)
        if self.end == "two":
            return (self.fc(z) + self.extra(z)) / 2
        if self.end == "twice":
            return self.fc(self.fc(z)[:, :1].expand(-1, 6))
        if self.end == "fickle" and self.training:
            return self.extra(z)
        return self.fc(z)


def trace(net: nn.Module, side: int = 8) -> Traced:
    return Traced(net, (3, side, side), "toy")


def test_a_network_says_itself_whether_its_steps_may_be_recorded() -> None:
    net = Toy()
    assert trace(net).steady
    net.steady = False  # type: ignore[assignment]
    assert not trace(net).steady


def test_stages_of_a_network_full_of_traps() -> None:
    net = Toy()
    model = trace(net).eval()
    assert [(stage.module, stage.copy) for stage in model.anatomy.stages] == [("two", True)]
    assert model.anatomy.head == "fc"
    x = torch.rand(2, 3, 8, 8)
    with torch.no_grad():
        (stage,) = model.forward_all(x).stages
        gated = net.one(model.normalise(x))
        gated = gated * net.squeeze(gated.mean((2, 3), keepdim=True)).sigmoid()
        torch.testing.assert_close(stage, net.two(gated.relu()))
    assert float(stage.min()) < 0, "the step in place has reached the stage"


def test_a_gradient_flows_back_from_a_copied_stage() -> None:
    net = Toy()
    model = trace(net)
    torch.autograd.backward(model.forward_all(torch.rand(2, 3, 8, 8)).stages[0].square().sum())
    assert net.one.weight.grad is not None
    assert net.fc.weight.grad is None


@pytest.mark.parametrize("end", ["tokens", "dense", "softmax", "two", "twice"])
def test_other_ends_than_one_linear_layer_are_refused(end: str) -> None:
    with pytest.raises(UserError, match=r"^toy: its logits are not what one last linear layer makes of a vector"):
        trace(Toy(end))


def test_another_way_while_training_is_said() -> None:
    model = trace(Toy("fickle"))
    model.eval()(torch.rand(2, 3, 8, 8))
    with pytest.raises(PluginError, match="toy: in train mode the forward pass takes another way"):
        model.train()(torch.rand(2, 3, 8, 8))
    assert hooks(model) == 0


def test_no_hook_outlives_a_forward_pass_that_fails() -> None:
    net = Toy()
    model = trace(net)
    with pytest.raises(RuntimeError):
        model(torch.rand(2, 4, 8, 8))
    assert hooks(model) == 0
    with pytest.raises(RuntimeError):
        Traced(net, (4, 8, 8), "toy")
    assert hooks(net) == 0
    assert net.training


def test_sequences_that_pass_through_resolutions_are_looked_into() -> None:
    def down(channels: int, out: int) -> nn.Sequential:
        return nn.Sequential(nn.Conv2d(channels, channels, 1), nn.Conv2d(channels, out, 2, 2))

    body = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), *(down(4 + i, 5 + i) for i in range(5)))
    model = trace(nn.Sequential(body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(9, 5)), 32)
    assert [stage.module for stage in model.anatomy.stages] == ["0.2", "0.3", "0.4", "0.5"]
    with torch.no_grad():
        stages = model.forward_all(torch.rand(2, 3, 32, 32)).stages
    assert [tuple(stage.shape[1:]) for stage in stages] == [(5, 16, 16), (6, 8, 8), (7, 4, 4), (8, 2, 2)]


def test_other_modules_that_pass_through_resolutions_are_not_looked_into() -> None:
    """The maps within an attention or a fusion module are no trunk."""

    class Hidden(nn.Module):
        def __init__(self, *parts: nn.Module) -> None:
            super().__init__()
            self.parts = nn.ModuleList(parts)

        def forward(self, x: Tensor) -> Tensor:
            for part in self.parts:
                x = part(x)
            return x

    def stages(kind: type[nn.Module]) -> list[str]:
        body = kind(*(nn.Conv2d(4, 4, 2, 2) for _ in range(3)))
        ends = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5))
        net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), body, *ends)
        return [stage.module for stage in trace(net, 32).anatomy.stages]

    assert stages(nn.Sequential) == ["1", "2.0", "2.1", "2"]
    assert stages(Hidden) == ["1", "2"]


def test_the_first_layer_alone_makes_no_stage() -> None:
    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cut = nn.Conv2d(3, 6, 4, 4)
            self.mix = nn.Linear(6, 6)
            self.fc = nn.Linear(6, 5)

        def forward(self, x: Tensor) -> Tensor:
            logits: Tensor = self.fc(self.mix(self.cut(x).flatten(2).mT).mean(1))
            return logits

    assert trace(Tokens()).anatomy == ("fc", ())


@pytest.mark.parametrize(
    ("out", "image", "want"),
    [
        ((2, 96, 8, 8), (32, 32), (8, 8, False)),
        ((2, 8, 8, 96), (32, 32), (8, 8, True)),
        ((2, 8, 8, 8), (32, 32), (8, 8, False)),
        ((2, 96, 1, 1), (32, 32), (1, 1, False)),
        ((2, 7, 20, 11), (40, 22), (20, 11, False)),
        ((2, 7, 5, 3), (40, 22), (5, 3, False)),
        ((2, 5, 3, 7), (40, 22), (5, 3, True)),
        ((2, 7, 11, 20), (40, 22), None),
        ((2, 3, 65, 65), (64, 64), None),
        ((4, 96, 8, 8), (32, 32), None),
        ((2, 64, 96), (32, 32), None),
    ],
)
def test_map_size(out: tuple[int, ...], image: tuple[int, int], want: tuple[int, int, bool] | None) -> None:
    assert map_size(out, image) == want


# ---------------------------------------------------------------- pooling with a deterministic backward


def ops(tensor: Tensor) -> Iterator[str]:
    todo = [tensor.grad_fn]
    while todo:
        node = todo.pop()
        if node is not None:
            yield node.name()
            todo += [above for above, _ in node.next_functions]


@pytest.mark.parametrize("size", [7, (6, 6), (3, None), (5, 2), 1])
@pytest.mark.parametrize("shape", [(1, 1), (2, 2), (7, 7), (8, 5), (13, 10)])
def test_exact_pool_is_adaptive_pooling(size: Any, shape: tuple[int, int]) -> None:
    x = torch.rand(2, 3, *shape, generator=torch.Generator().manual_seed(0), requires_grad=True)
    ours, theirs = ExactPool(size)(x), F.adaptive_avg_pool2d(x, size)
    torch.testing.assert_close(ours, theirs)
    weights = torch.rand(theirs.shape, generator=torch.Generator().manual_seed(1))
    (mine,), (reference,) = (torch.autograd.grad((out * weights).sum(), x, retain_graph=True) for out in (ours, theirs))
    torch.testing.assert_close(mine, reference)
    assert not any("Adaptive" in name for name in ops(ours))


def test_pooling_matrix() -> None:
    assert pooling(4, 2).tolist() == [[0.5, 0.5, 0, 0], [0, 0, 0.5, 0.5]]
    assert pooling(3, 2).tolist() == [[0.5, 0.5, 0], [0, 0.5, 0.5]]
    assert pooling(1, 3).tolist() == [[1], [1], [1]]


def test_adaptive_pooling_is_replaced() -> None:
    model = trace(nn.Sequential(nn.Conv2d(3, 2, 1), nn.AdaptiveAvgPool2d(3), nn.Flatten(), nn.Linear(18, 5)))
    assert isinstance(model.net.get_submodule("1"), ExactPool)
    assert not any("AdaptiveAvgPool" in name for name in ops(model(torch.rand(2, 3, 8, 8))))
