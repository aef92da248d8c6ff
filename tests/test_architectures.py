"""What --arch names: registered models and functions of the user's, and which normalisation is the right one."""

from __future__ import annotations

import sys
import textwrap
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from backdoorbench_mcl import nearby, runner
from backdoorbench_mcl.architectures import MARGIN, choose, described, distinct
from backdoorbench_mcl.engines.base import FUNCTION, functions, named
from backdoorbench_mcl.errors import UserError
from backdoorbench_mcl.functions import Function, OtherWidth
from backdoorbench_mcl.registry import Registry
from backdoorbench_mcl.traced import Traced


@pytest.fixture(scope="module")
def known(toy_env: dict[str, str]) -> Registry:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BBMCL_CACHE", toy_env["BBMCL_CACHE"])
        return runner.registry()


def write(folder: Path, **files: str) -> Path:
    """Modules by name, "nets/small" being nets/small.py."""
    for name, text in files.items():
        file = folder / f"{name}.py"
        file.parent.mkdir(exist_ok=True)
        file.write_text(textwrap.dedent(text))
    return folder


# ---------------------------------------------------------------- what is named


def test_registered_models_are_named_as_everywhere(known: Registry) -> None:
    model = described(known, "wrn-16-2")
    assert (model.full_name, model.params) == ("backdoorbench-mcl/wrn", {"depth": 16, "widen": 2})
    assert described(known, "resnet18(stem=imagenet)").params["stem"] == "imagenet"
    assert described(known, " torchvision:resnet18 ").params == {"arch": "resnet18"}
    with pytest.raises(UserError, match=r"unknown model 'resnet19'; did you mean 'resnet18'\?"):
        described(known, "resnet19")
    with pytest.raises(UserError, match="no network 'resnet5O'"):
        described(known, "torchvision:resnet5O")


def test_a_function_is_named_by_its_module(known: Registry, tmp_path: Path) -> None:
    write(tmp_path, mynet="import layers", layers="A = 1", other="B = 2")
    model = described(known, "mynet:Nets.small", tmp_path)
    assert (model.kind, model.full_name, model.target) == ("model", "mynet:Nets.small", FUNCTION)
    assert model.params == {"function": "mynet:Nets.small"}
    assert {name: model.identity[name] for name in ("name", "version", "params")} == {
        "name": "mynet:Nets.small", "version": 1, "params": {"function": "mynet:Nets.small"},
    }  # fmt: skip
    assert functions({"model": model.spec, "threads": 1}) == ["mynet:Nets.small"]
    assert set(named({"model": model.spec})) == {FUNCTION, "mynet:Nets.small"}

    def source() -> object:
        return described(known, "mynet:Nets.small", tmp_path).identity["source"]

    write(tmp_path, other="B = 3")
    assert source() == model.identity["source"]
    write(tmp_path, layers="A = 2")  # results of the network as it was are not those of this one
    assert source() != model.identity["source"]


def test_an_installed_function_is_named_too(known: Registry, tmp_path: Path) -> None:
    model = described(known, "torchvision.models:resnet18", tmp_path)
    assert model.params == {"function": "torchvision.models:resnet18"}
    assert len(model.identity["source"]) == 64


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("nowhere:build", "no module 'nowhere' in the working directory, and none is installed$"),
        ("torchvison:resnet18", "none is installed; did you mean torchvision:resnet18?"),
        ("./mynet.py:build", "expected the name of a module, as in mynet:build for mynet.py"),
        ("", "is no method name"),
        ("mynet:", "unknown model 'mynet'"),
    ],
)
def test_what_names_nothing_is_said(known: Registry, tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(UserError, match=words) as caught:
        described(known, text, tmp_path)
    assert "\n" not in str(caught.value)


# ---------------------------------------------------------------- what a module rests on


def test_modules_of_the_folder_are_found_by_what_files_say(tmp_path: Path) -> None:
    write(
        tmp_path, mynet="import torch, layers.deep\ndef f():\n    from late import x", late="import mynet",
        json="raise SystemExit", unused="", broken="def",
        **{"layers/__init__": "", "layers/deep": "from . import wide\nimport json",
           "layers/wide": "import bare_of_init.a", "bare_of_init/a": "", "torchvision/x": ""},
    )  # fmt: skip
    assert list(nearby.modules("mynet", tmp_path)) == ["mynet", "late", "layers", "bare_of_init"]
    assert list(nearby.modules("layers.deep", tmp_path)) == ["layers", "bare_of_init"]
    assert list(nearby.modules("broken", tmp_path)) == ["broken"]
    for name in ("json", "torchvision", "absent"):  # a folder without __init__ hides nothing that is installed
        assert nearby.modules(name, tmp_path) == {}
    places = [path.relative_to(tmp_path).as_posix() for path in nearby.reach("mynet", tmp_path)]
    sys.meta_path.pop(0)
    assert places == ["mynet.py", "late.py", "layers", "bare_of_init"]


def test_nothing_is_imported_to_find_it(tmp_path: Path) -> None:
    write(tmp_path, loud="raise SystemExit('imported')")
    assert nearby.digest("loud", tmp_path)
    assert nearby.digest("absent", tmp_path) == ""


# ---------------------------------------------------------------- what a function may return

SOURCE = """
    import torch
    from torch import nn

    from backdoorbench_mcl.api import Classifier

    def net(width):
        return nn.Sequential(nn.Conv2d(3, 4, 3, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, width))

    def num(num_classes=7): return net(num_classes)
    def classes(a=1, *, classes): return net(classes)
    def passed(**options): return net(options["num_classes"])
    def ten(): return net(10)
    def image(): return 3
    def bad(num_classes): raise ValueError("no\\nway")
    def leaves(num_classes): raise SystemExit(3)
    def needs(width): return net(width)
    def softmax(num_classes): return nn.Sequential(net(num_classes), nn.Softmax(1))
    def flat(num_classes): return nn.Sequential(nn.Flatten(), nn.Linear(192, num_classes))

    class Own(Classifier):
        def __init__(self, num_classes):
            super().__init__()
            self.fc = nn.Linear(3, num_classes)
            self.drop = nn.Dropout()
        def features(self, x): return x.mean((2, 3)), ()
        def head(self, z): return self.fc(z)

    class Wide(Own):
        def head(self, z): return torch.cat([self.fc(z)] * 2, 1)

    NUMBER = 3
"""


@pytest.fixture
def user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module of the user's, importable; its name is new each time."""
    name = f"user_{tmp_path.name}"
    write(tmp_path, **{name: SOURCE})
    monkeypatch.syspath_prepend(str(tmp_path))
    return name


@pytest.mark.parametrize("name", ["num", "classes", "passed", "Own"])
def test_a_function_builds_for_the_classes_that_it_is_asked_for(user: str, name: str) -> None:
    model = Function(function=f"{user}:{name}").build(6, (3, 16, 16))
    assert isinstance(model, Traced) == (name != "Own")
    assert all(module.training for module in model.modules())
    assert model(torch.rand(2, 3, 16, 16)).shape == (2, 6)


def test_a_function_may_have_classes_of_its_own(user: str) -> None:
    family = Function(function=f"{user}:ten")
    assert family.build(10, (3, 16, 16))(torch.rand(2, 3, 16, 16)).shape == (2, 10)
    with pytest.raises(OtherWidth, match="network of 10 classes, expected 43; have it take num_classes") as told:
        family.build(43, (3, 16, 16))
    assert told.value.width == 10


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("absent", "absent cannot be imported: AttributeError .*expected package.module:function"),
        ("NUMBER", "NUMBER is int, expected a function"),
        ("image", "image returned int, expected a torch.nn.Module"),
        ("bad", "bad raised ValueError at .*: no way when called for 6 classes"),
        ("leaves", "leaves raised SystemExit at .*: 3"),
        ("needs", "needs raised TypeError at .*missing 1 required positional argument: 'width'"),
        ("softmax", "softmax: its logits are not what one last linear layer"),
        ("flat", "flat: no forward pass with images of 3x16x16, which may not be its size: RuntimeError"),
        ("Wide", "Wide built a network of 12 classes, expected 6"),
    ],
)
def test_what_is_no_network_is_explained(user: str, name: str, words: str) -> None:
    with pytest.raises(UserError, match=words) as caught:
        Function(function=f"{user}:{name}").build(6, (3, 16, 16))
    assert "\n" not in str(caught.value)


def test_a_module_that_cannot_be_imported_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(write(tmp_path, user_leaves="raise SystemExit(1)")))
    for name in ("user_leaves", "user_absent"):
        with pytest.raises(UserError, match=f"{name}:build cannot be imported: (SystemExit|ModuleNotFoundError)"):
            Function(function=f"{name}:build").build(2, (3, 8, 8))


# ---------------------------------------------------------------- normalisation

ACCURACIES = st.dictionaries(st.text(min_size=1, max_size=5), st.floats(0, 100), min_size=1, max_size=5)


@given(accuracy=ACCURACIES)
def test_the_best_is_chosen_only_if_it_is_far_ahead(accuracy: dict[str, float]) -> None:
    values = sorted(accuracy.values(), reverse=True)
    if len(values) == 1 or values[0] - values[1] > MARGIN:
        assert accuracy[choose(accuracy)] == values[0]
        return
    with pytest.raises(UserError, match=r"cannot be told") as caught:
        choose(accuracy)
    assert "--mean" in str(caught.value)
    assert "--std" in str(caught.value)
    assert all(f"{value:.1f} %" in str(caught.value) for value in values)


def test_a_lead_of_exactly_the_margin_is_none() -> None:
    with pytest.raises(UserError, match=r"are a 53\.0 %, b 50\.0 %, none 9\.5 %, expected one more than 3 points"):
        choose({"b": 50.0, "none": 9.5, "a": 53.0})
    assert choose({"b": 50.0, "a": 53.0}, margin=2.9) == "a"


def test_candidates_with_equal_constants_are_one() -> None:
    given = [
        {"name": "data", "mean": [0.5], "std": [1.0]}, {"name": "same", "mean": (0.5,), "std": (1.0,)},
        {"name": "none", "mean": [0.0], "std": [1.0]},
    ]  # fmt: skip
    assert [one["name"] for one in distinct(given)] == ["data", "none"]
