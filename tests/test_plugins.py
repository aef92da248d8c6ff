"""Loading plugins: what is offered, what is blamed, what goes on all the same."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
import types
from collections.abc import Iterator
from importlib.metadata import Distribution, PathDistribution
from pathlib import Path

import pluggy
import pytest

from backdoorbench_mcl import __version__, children, hookspecs, listing, memory, plugins
from backdoorbench_mcl.errors import PluginError, UserError
from backdoorbench_mcl.hooks import Entry
from backdoorbench_mcl.params import selection
from backdoorbench_mcl.registry import Registry, Wanted

HEAD = "from backdoorbench_mcl.hooks import Entry, hookimpl\n"
GOOD = HEAD + "@hookimpl\ndef bbmcl_defenses():\n    return [Entry('good', 'x.y:Z', 'fine')]\n"


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Installer]:
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("BBMCL_CACHE", str(tmp_path / "cache"))
    made = Installer(tmp_path)
    yield made
    for name in made.modules:
        sys.modules.pop(name, None)


class Installer:
    """Writes a distribution with one entry module each."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.modules: list[str] = []

    def __call__(self, dist: str, source: str, point: str = "main", more: str = "") -> Distribution:
        module = f"mod_{dist.replace('-', '_')}"
        self.modules.append(module)
        (self.folder / f"{module}.py").write_text(source)
        info = self.folder / f"{dist}-1.0.dist-info"
        info.mkdir(exist_ok=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {dist}\nVersion: 1.0\n{more}")
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
    assert line.startswith(f"plugin bad/main (bad 1.0, {install.folder / 'mod_bad.py'}): ")
    assert line.endswith("skip it with BBMCL_DISABLE=bad/main")  # `main` would skip the other one too
    assert "\n" not in line
    assert "good" in [o.entry.name for o in found.of("defense")]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("import os\nos._exit(0)\n", "ended its process with status 0"),
        ("import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)\n", "ended its process with SIGSEGV"),
        ("raise KeyboardInterrupt\n", "cannot import 'mod_bad': KeyboardInterrupt"),
        ("import time\ntime.sleep(60)\n", "did not answer in 1 s"),
        (HEAD + "import time\n@hookimpl\ndef bbmcl_models():\n    time.sleep(60)\n", "did not answer in 1 s"),
        (HEAD + "import sys\n@hookimpl\ndef bbmcl_models():\n    sys.exit(3)\n", "bbmcl_models raised SystemExit: 3"),
    ],
)
def test_a_plugin_that_ends_or_holds_up_its_process_is_one_line(
    install: Installer, monkeypatch: pytest.MonkeyPatch, source: str, message: str
) -> None:
    monkeypatch.setattr(plugins, "PATIENCE", 1.0)
    for _ in range(2):  # it is not kept: another day it may do better
        found = plugins.load({}, [install("bad", source, "bad"), install("good-one", GOOD)])
        (line,) = map(str, found.problems)
        assert message in line
        assert line.startswith(f"plugin bad/bad (bad 1.0, {install.folder / 'mod_bad.py'}): ")
        assert line.endswith("; skip it with BBMCL_DISABLE=bad")
        assert "good" in [o.entry.name for o in found.of("defense")]


def test_a_plugin_that_takes_all_memory_while_it_is_read_is_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "total", lambda: children.GREED * (memory.held(os.getpid()) + 100 * 10**6))

    def greedy(request: object) -> children.Reply:
        held = bytearray(400 * 10**6)
        time.sleep(60)
        return {"ok": len(held)}

    fate = children._forked(tmp_path, [{"dist": "bad"}], [0], greedy, 30.0)
    assert fate.startswith("took more than")
    assert fate.endswith("GB of memory")


COUNTING = "from pathlib import Path\nwith Path({file!r}).open('a') as file:\n    file.write('x')\n"


def test_what_is_in_the_cache_is_not_imported_again(install: Installer, tmp_path: Path) -> None:
    marks = tmp_path / "imports"
    source = COUNTING.format(file=str(marks)) + GOOD

    def imports(more: str = "", text: str = source) -> int:
        before = len(marks.read_text()) if marks.exists() else 0
        found = plugins.load({}, [install("one", text, more=more)])
        assert [o.entry.name for o in found.offers] == ["good"]
        assert found.problems == found.notices == []
        return len(marks.read_text()) - before

    assert [imports(), imports()] == [1, 0]
    assert "mod_one" not in sys.modules
    assert imports(text=source + "# changed\n") == 1
    assert imports(more="Requires-Dist: backdoorbench-mcl>=0.1\n") == 1
    (install.folder / "cache" / "listings").rename(install.folder / "listings")
    (install.folder / "cache" / "listings").write_text("in the way")  # a cache that cannot be written
    assert [imports(), imports()] == [1, 1]


def test_a_problem_is_gone_once_its_cause_is(install: Installer) -> None:
    one = install("one", "import mod_two\n" + GOOD)
    assert "No module named 'mod_two'" in str(plugins.load({}, [one]).problems[0])
    install("two", "")
    found = plugins.load({}, [one])
    assert found.problems == []
    assert [o.entry.name for o in found.offers] == ["good"]


def test_prints_are_a_notice_and_reach_nobody(install: Installer, capfd: pytest.CaptureFixture[str]) -> None:
    source = "import os\nprint('\\n hello ')\nos.write(1, b'world')\n" + GOOD
    for _ in range(2):
        found = plugins.load({}, [install("loud", source)])
        assert found.problems == []
        assert [str(notice) for notice in found.notices] == [
            f"plugin loud/main (loud 1.0, {install.folder / 'mod_loud.py'}): prints while it is listed ('hello'); "
            "skip it with BBMCL_DISABLE=main"
        ]
        assert [o.entry.name for o in found.offers] == ["good"]
    assert capfd.readouterr() == ("", "")


def test_a_slow_import_is_a_notice(install: Installer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plugins, "SLOW", 0.1)
    found = plugins.load({}, [install("slow", "import time\ntime.sleep(0.2)\n" + GOOD)])
    assert found.problems == []
    (notice,) = map(str, found.notices)
    assert "s to list, expected at most 0.1 s: import torch where it is used" in notice
    assert [o.entry.name for o in found.offers] == ["good"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("backdoorbench-mcl>=9", "requires backdoorbench-mcl>=9, but backdoorbench-mcl 0.1.0 is installed"),
        ("BackdoorBench_MCL (<0.1)", "requires BackdoorBench_MCL (<0.1), but backdoorbench-mcl 0.1.0"),
        ("backdoorbench-mcl>>1", "its metadata require 'backdoorbench-mcl>>1', which is no requirement"),
        ("backdoorbench-mcl>=9; extra == 'new'", ""),
        ("backdoorbench-mcl[timm]>=0.1", ""),
        ("backdoorbench-mcl-extras>=9", ""),
    ],
)
def test_a_plugin_for_another_version_is_one_line(
    install: Installer, monkeypatch: pytest.MonkeyPatch, line: str, message: str
) -> None:
    assert __version__ == "0.1.0"
    found = plugins.load({}, [install("new", GOOD, more=f"Requires-Dist: {line}\n")])
    assert [message in str(problem) for problem in found.problems] == [True] * bool(message)
    assert [o.entry.name for o in found.offers] == ["good"] * (not message)


def test_what_a_plugin_does_to_its_process_changes_no_other(install: Installer) -> None:
    spoil = "import os, sys, backdoorbench_mcl.hooks as h\nos.chdir('/')\nsys.path.clear()\nh.Entry = None\n"
    found = plugins.load({}, [install("a-spoils", spoil), install("one", GOOD)])
    assert found.problems == []
    assert [o.full_name for o in found.offers] == ["one/good"]


WATCHING = HEAD + "print('noise')\n@hookimpl\ndef bbmcl_cell_finished(row):\n    {body}\n"


def test_only_observers_are_imported_here(install: Installer, capsys: pytest.CaptureFixture[str]) -> None:
    seen = install("sees", WATCHING.format(body="return ('seen', row)"))
    found = plugins.load({}, [seen, install("one", GOOD), install("bad", "raise ValueError\n")])
    assert {"mod_sees", "mod_one", "mod_bad"} & set(sys.modules) == set()
    ((plugin, observer),) = plugins.observers(found)
    assert {"mod_sees", "mod_one", "mod_bad"} & set(sys.modules) == {"mod_sees"}
    assert (plugin.id, observer(row=1)) == ("sees/main", ("seen", 1))
    assert capsys.readouterr() == ("", "noise\n")


def test_a_guest_in_this_process_is_contained(capsys: pytest.CaptureFixture[str]) -> None:
    def hang() -> None:
        with contextlib.suppress(Exception):  # what a plugin may do
            time.sleep(60)

    def fail() -> None:
        print("noise")
        raise ZeroDivisionError

    with pytest.raises(PluginError, match=r"did not return within 0.1 s"), plugins.guest(0.1):
        hang()
    with pytest.raises(PluginError, match=r"called sys.exit\(5\)"), plugins.guest():
        sys.exit(5)
    with pytest.raises(ZeroDivisionError), plugins.guest():
        fail()
    assert capsys.readouterr() == ("", "noise\n")


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
    assert ["is the name of another package's too; write" in str(notice) for notice in found.notices] == [True, True]
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


def test_an_argument_that_is_going_to_go_is_a_notice(install: Installer, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the next release would say it of an argument `cell` of the observer; nothing is disabled."""
    going = types.ModuleType("going")
    marker = pluggy.HookspecMarker("bbmcl")

    @marker(warn_on_impl_args={"cell": DeprecationWarning("argument 'cell' goes in 1.0; take 'row'")})
    def bbmcl_cell_finished(row: object, cell: object) -> None:
        """A specification."""

    for name, value in vars(hookspecs).items():
        if name.startswith("bbmcl_"):
            setattr(going, name, value)
    monkeypatch.setattr(going, "bbmcl_cell_finished", bbmcl_cell_finished, raising=False)
    monkeypatch.setattr(listing, "hookspecs", going)
    install("old", HEAD + "@hookimpl\ndef bbmcl_cell_finished(cell):\n    pass\n")
    install("new", HEAD + "@hookimpl\ndef bbmcl_cell_finished(row):\n    pass\n")
    for name, expected in (("old", ["argument 'cell' goes in 1.0; take 'row'"]), ("new", [])):
        told = listing.answer({"dist": [name, "1.0"], "point": "main", "value": f"mod_{name}", "requires": []})["ok"]
        assert (told["deprecated"], told["problems"], told["observes"]) == (expected, [], True)


def test_a_deprecated_use_is_told_with_package_and_file(install: Installer, monkeypatch: pytest.MonkeyPatch) -> None:
    source = "import warnings\n" + GOOD
    dist = install("old", source)
    found = plugins.load({}, [dist])
    assert [str(notice) for notice in found.notices] == []
    told = {"entries": [], "observes": False, "problems": [], "deprecated": ["argument 'cell' goes"], "seconds": 0.0,
            "printed": ""}  # fmt: skip
    monkeypatch.setattr(plugins, "_replies", lambda *_: [{"ok": told}])
    (notice,) = plugins.load({}, [dist]).notices
    assert "plugin old/main (old 1.0, " in str(notice)
    assert "uses what is going to go: argument 'cell' goes" in str(notice)


def test_a_description_is_stale_once_a_module_beside_the_package_changes(install: Installer, tmp_path: Path) -> None:
    """A default that comes from a module which is no part of the package."""
    (tmp_path / "constants_of_mine.py").write_text("RATE = 0.1\n")
    (tmp_path / "mod_lib_method.py").write_text(
        "from constants_of_mine import RATE\nfrom backdoorbench_mcl.api import Defense\n"
        "class Mine(Defense):\n    name = 'mine'\n    def __init__(self, *, rate: float = RATE) -> None:\n"
        "        self.rate = rate\n    def defend(self, model, ctx):\n        return model\n"
    )
    entry = "@hookimpl\ndef bbmcl_defenses():\n    return [Entry('mine', 'mod_lib_method:Mine', 'mine')]\n"
    dist = install("lib", HEAD + entry)
    defaults = []
    for rate in (0.1, 0.1, 0.7):
        (tmp_path / "constants_of_mine.py").write_text(f"RATE = {rate}\n")
        known = Registry(plugins.load({}, [dist]), tmp_path / "cache")
        (found,) = known.describe([Wanted("defense", selection("mine"))])
        defaults.append(found.params["rate"])
    assert defaults == [0.1, 0.1, 0.7]
