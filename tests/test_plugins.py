"""Loading plugins: what is offered, what is blamed, what goes on all the same."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import Distribution, PathDistribution
from pathlib import Path

import pytest

from backdoorbench_mcl import plugins
from backdoorbench_mcl.errors import PluginError, UserError
from backdoorbench_mcl.hooks import Entry
from backdoorbench_mcl.registry import Registry

HEAD = "from backdoorbench_mcl.hooks import Entry, hookimpl\n"
GOOD = HEAD + "@hookimpl\ndef bbmcl_defenses():\n    return [Entry('good', 'x.y:Z', 'fine')]\n"


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Installer]:
    monkeypatch.syspath_prepend(str(tmp_path))
    made = Installer(tmp_path)
    yield made
    for name in made.modules:
        sys.modules.pop(name, None)


class Installer:
    """Writes a distribution with one entry module each."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.modules: list[str] = []

    def __call__(self, dist: str, source: str, point: str = "main") -> Distribution:
        module = f"mod_{dist.replace('-', '_')}"
        self.modules.append(module)
        (self.folder / f"{module}.py").write_text(source)
        info = self.folder / f"{dist}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {dist}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[bbmcl]\n{point} = {module}\n")
        return PathDistribution(info)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("import a_module_that_is_not_there\n", "cannot import 'mod_bad': ModuleNotFoundError"),
        ("raise SystemExit(0)\n", "cannot import 'mod_bad': SystemExit"),
        (
            HEAD + "@hookimpl\ndef bbmcl_defences():\n    return []\n",
            "unknown hook 'bbmcl_defences', did you mean 'bbmcl_defenses'?",
        ),
        (
            HEAD + "@hookimpl\ndef bbmcl_defenses():\n    raise OSError('no\\nluck')\n",
            "bbmcl_defenses raised OSError: no",
        ),
        (HEAD + "@hookimpl\ndef bbmcl_defenses():\n    return ['mcldef']\n", "returned list, expected a list of Entry"),
        (HEAD + "@hookimpl\ndef bbmcl_defenses():\n    return None\n", "returned NoneType, expected a list of Entry"),
        (HEAD + "@hookimpl\ndef bbmcl_defenses(wrong):\n    return []\n", "PluginValidationError"),
        (HEAD + "@hookimpl\ndef bbmcl_defenses():\n    return [Entry('Bad Name', 'x:Y')]\n", "method name 'Bad Name'"),
        (
            HEAD + "@hookimpl\ndef bbmcl_defenses():\n    return [Entry('a', 'x:Y'), Entry('a', 'x:Z')]\n",
            "a second time",
        ),
        (HEAD + "@hookimpl(wrapper=True)\ndef bbmcl_defenses():\n    return (yield)\n", "is a hook wrapper"),
    ],
)
def test_a_broken_plugin_is_one_line_and_the_others_go_on(install: Installer, source: str, message: str) -> None:
    found = plugins.load({}, [install("bad", source), install("good-one", GOOD)])
    assert len(found.problems) == 1
    line = str(found.problems[0])
    assert message in line
    assert line.startswith("plugin bad/main: ")
    assert line.endswith("skip it with BBMCL_DISABLE=main")
    assert "\n" not in line
    assert "good" in [o.entry.name for o in found.of("defense")]


def test_strict_raises_at_the_first_problem(install: Installer) -> None:
    with pytest.raises(PluginError, match="plugin bad/main"):
        plugins.load({"BBMCL_STRICT": "1"}, [install("bad", "raise ValueError\n")])


def test_environment_selects_and_disables(install: Installer) -> None:
    both = [install("one", GOOD, "first"), install("two", GOOD.replace("good", "better"), "second")]

    def names(**env: str) -> list[str]:
        return [o.entry.name for o in plugins.load(env, both).of("defense")]

    assert names() == ["better", "good"]
    assert names(BBMCL_PLUGINS="first") == ["good"]
    assert names(BBMCL_PLUGINS="two/second") == ["better"]
    assert names(BBMCL_DISABLE="second") == ["good"]
    assert names(BBMCL_PLUGINS="first, second", BBMCL_DISABLE="one/first") == ["better"]


def test_two_packages_with_one_name_are_both_reachable(install: Installer, tmp_path: Path) -> None:
    found = plugins.load({}, [install("one", GOOD), install("two", GOOD)])
    registry = Registry(found, tmp_path)
    assert found.problems == []
    assert registry.find("defense", "two/good").plugin.dist == "two"
    with pytest.raises(UserError, match=r"offered by two packages; write one/good or two/good"):
        registry.find("defense", "good")


def test_lookup_suggests_the_nearest_name(tmp_path: Path) -> None:
    registry = Registry(plugins.load({}), tmp_path)
    with pytest.raises(UserError, match=r"unknown attack 'badnet'; did you mean 'badnets'\? See: bbmcl plugins"):
        registry.find("attack", "badnet")


def test_shipped_methods_use_the_same_door() -> None:
    found = plugins.load({})
    assert found.problems == []
    shipped = {(o.kind, o.entry.name) for o in found.offers if o.plugin.dist == "backdoorbench-mcl"}
    assert {
        ("attack", "badnets"), ("attack", "blend"), ("attack", "none"), ("inverter", "nc-box"), ("defense", "ft"),
        ("defense", "mcldef"), ("dataset", "shapes"), ("dataset", "cifar10"), ("model", "wrn"),
    } <= shipped  # fmt: skip


def test_loading_plugins_does_not_import_torch() -> None:
    code = (
        "import sys; from backdoorbench_mcl import plugins, matrix, runner, report; plugins.load({}); "
        "print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


@pytest.mark.parametrize("name", ["ft", "nc-box", "mcldef+", "fine-pruning", "a1"])
def test_entry_names(name: str) -> None:
    assert Entry(name, "a.b:C").name == name


@pytest.mark.parametrize(
    ("name", "target", "knows"),
    [("wrn-16-1", "a:B", ()), ("FT", "a:B", ()), ("ft", "a.B", ()), ("ft", "a:B", ("everything",)), ("", "a:B", ())],
)
def test_entry_refuses(name: str, target: str, knows: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match=r"expected|may_know"):
        Entry(name, target, may_know=knows)
