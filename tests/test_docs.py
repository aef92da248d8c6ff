"""The pages keep their word: the plugin that they build works, what they tell to type is understood, links lead on."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from configparser import ConfigParser
from pathlib import Path
from typing import Any

import pytest
import small
import typed as command
import typer.main

import backdoorbench_mcl
from backdoorbench_mcl import api, runner
from backdoorbench_mcl.cli import app
from backdoorbench_mcl.errors import UserError
from backdoorbench_mcl.rows import Row
from backdoorbench_mcl.runner import Settings

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
NEIGHBOURS = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "benchmarks/README.md")]
PAGES = [*NEIGHBOURS, *sorted(DOCS.rglob("*.md"))]
PLUGIN_PAGE = (DOCS / "writing-a-plugin.md").read_text(encoding="utf-8")
FENCE = re.compile(r"^```([^\n]*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
BELOW = ", below"  # behind a name in a caption: the block goes to the end of a file that was begun above


def of(page: Path) -> str:
    return str(page.relative_to(ROOT))


# ---------------------------------------------------------------- links


def anchors(page: Path) -> set[str]:
    """What `#...` may name on a page: its headings, as MyST and GitHub spell them."""
    prose = FENCE.sub("", page.read_text(encoding="utf-8"))
    headings = re.findall(r"^#+ (.+)$", prose, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=of)
def test_links_lead_somewhere(page: Path) -> None:
    prose = FENCE.sub("", page.read_text(encoding="utf-8"))
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#\s]*)(?:#([^)\s]+))?\)", prose):
        file = page.parent / target if target else page
        assert file.exists(), f"{of(page)} links to {target}, which does not exist"
        assert not anchor or anchor in anchors(file), f"{of(page)} links to {target}#{anchor}, where no heading is so"


# ---------------------------------------------------------------- commands


def typed(text: str) -> list[str]:
    """The command lines of `bbmcl` in a shell block: behind prompts, variables and `&&`, without comments and pipes."""
    out = []
    for line in text.replace("\\\n", " ").splitlines():
        for part in re.split(r"&&|[|>] ", line.removeprefix("$ ")):
            words = shlex.split(part, comments=True)
            while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
                words = words[1:]
            if words[:1] == ["bbmcl"]:
                out.append(shlex.join(words[1:]))
    return out


def quoted(kinds: tuple[str, ...]) -> list[tuple[str, str]]:
    """Page and command line, of all blocks of some kinds: where each line stands as it is typed."""
    blocks = [(page, *found) for page in PAGES for found in FENCE.findall(page.read_text(encoding="utf-8"))]
    return [
        (of(page), line) for page, kind, text in blocks if kind in kinds
        for line in typed("\n".join(t for t in text.splitlines() if kind == "sh" or t.startswith("$ ")))
    ]  # fmt: skip


COMMANDS = sorted(set(quoted(("sh", "console"))))


def parse(line: str) -> None:
    """Parse a command line as the program does, and run nothing. Raises what the program would answer with."""
    command: Any = typer.main.get_command(app)
    words, above = shlex.split(line), None
    with contextlib.suppress(typer.Exit):  # `--version` and `--help` answer at once
        while hasattr(command, "resolve_command"):
            above = command.make_context(command.name, words, parent=above)
            _, command, words = command.resolve_command(above, [*above._protected_args, *above.args])
        command.make_context(command.name, words, parent=above)


@pytest.mark.parametrize(("page", "line"), COMMANDS)
def test_what_pages_tell_to_type_is_understood(
    page: str, line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.toml").write_text(files()["run.toml"])
    parse(line)


def test_what_nobody_could_type_is_found() -> None:
    for wrong in ("matrix --attacks badnets --defenses ft --sed 1", "matrixx", "report --format pdf", "show"):
        with pytest.raises(Exception, match=r"No such|Missing|is not one of"):
            parse(wrong)


def test_options_named_in_prose_exist() -> None:
    """`--seeds` and the like between single backticks, of whichever command."""
    known = {"--help", "--ignore"}

    def collect(command: Any) -> None:
        known.update(name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts))
        for child in getattr(command, "commands", {}).values():
            collect(child)

    collect(typer.main.get_command(app))
    named = 0
    for page in sorted(DOCS.glob("*.md")):
        prose = FENCE.sub("", page.read_text(encoding="utf-8"))
        for code in re.findall(r"`([^`\n]+)`", prose):
            for option in re.findall(r"(?<![\w-])--[a-z][a-z-]*", code):
                named += 1
                assert option in known or code.startswith(("pytest", "tox")), f"{of(page)} names {option} in `{code}`"
    assert named > 10


# ---------------------------------------------------------------- the plugin


def files() -> dict[str, str]:
    """The files that `writing-a-plugin` shows, by name."""
    out: dict[str, str] = {}
    for name, where, text in re.findall(
        r'^```\{code-block\} \w+\n:caption: "`([^`\n]+)`([^\n]*)"\n\n(.*?)^```$', PLUGIN_PAGE, re.M | re.S
    ):
        assert where == (BELOW if name in out else ""), f"{name} is shown twice, or continued before it is begun"
        out[name] = f"{out[name]}\n\n{text}" if name in out else text
    return out


def test_every_block_of_the_page_is_a_file_or_a_command() -> None:
    kinds = [kind for kind, _ in FENCE.findall(PLUGIN_PAGE)]
    captions = re.findall(r"^:caption: ", PLUGIN_PAGE, re.MULTILINE)
    assert len(captions) == sum(kind.startswith("{code-block} ") for kind in kinds)
    assert {kind for kind in kinds if not kind.startswith("{code-block} ")} == {"sh"}


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory, toy_env: dict[str, str]) -> Iterator[Path]:
    """The package of the page, installed beside the toy plugin; `run.toml` lies in the same folder."""
    folder = tmp_path_factory.mktemp("demo")
    for name, text in files().items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    project = tomllib.loads((folder / "pyproject.toml").read_text())["project"]
    info = folder / f"bbmcl_demo-{project['version']}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n")
    points = "\n".join(f"{name} = {where}" for name, where in project["entry-points"]["bbmcl"].items())
    (info / "entry_points.txt").write_text(f"[bbmcl]\n{points}\n")
    with pytest.MonkeyPatch.context() as patch:
        small.install_toy(patch, toy_env["BBMCL_CACHE"])
        patch.syspath_prepend(str(folder))
        patch.setenv("PYTHONPATH", os.pathsep.join([str(folder), os.environ["PYTHONPATH"]]))
        patch.chdir(folder)
        yield folder


def run(folder: Path, attacks: str, defenses: str, **changes: Any) -> dict[tuple[str, str], Row]:
    asked = small.options(attacks, defenses, **changes)
    rows = runner.run_matrix(asked, Settings(runs=folder / "runs", workers=1, threads=1), live=False)
    return {(row.attack, row.defense): row for row in rows}


SHORT = ("train.steps=200", "defend.steps=20")


def test_its_attack_defenses_and_inverter_fill_a_matrix(demo: Path) -> None:
    attacks = "badnets(target=1, rate=0.2),dot(rate=0.2)"
    needy = ("unlearn", "unlearn(inverter=plain)")
    own = ("smooth", "smooth(layers=head, lr=0.01)", "cut(layer=conv2)")
    defenses = ",".join((*own, *needy))
    overrides = ("nc-box.steps=20", "plain.steps=20", *SHORT)
    rows = run(demo, attacks, defenses, overrides=overrides)
    assert len(rows) == 12
    assert {row.state for row in rows.values()} == {"ok"}, [row.reason for row in rows.values()]
    assert rows["dot(rate=0.2)", "before"].gate == "ok"
    assert {label: row.knows for (_, label), row in rows.items() if label != "before"} == {
        **dict.fromkeys(own, ()), **dict.fromkeys(needy, ("target",)),
    }  # fmt: skip
    assert rows["dot(rate=0.2)", "cut(layer=conv2)"].rebuild == "backdoorbench_mcl.kit:masked"
    assert {rows["dot(rate=0.2)", label].inverter for label in needy} == {"nc-box", "plain"}
    assert {rows["dot(rate=0.2)", label].inverter_steps for label in needy} == {20}


def test_its_network_learns_its_data_set(demo: Path) -> None:
    rows = run(demo, "none(target=1)", "smooth", dataset="tints", model="pico-8", overrides=SHORT)
    assert {row.state for row in rows.values()} == {"ok"}, [row.reason for row in rows.values()]
    assert all(row.toy for row in rows.values())
    assert rows["none(target=1)", "before"].ba == pytest.approx(100, abs=5)


def test_its_options_are_bounded(demo: Path) -> None:
    for wrong, line in (
        ("smooth(smoothing=2)", "smoothing=2: input should be less than or equal to 1"),
        ("smooth(layers=some)", "layers='some': input should be 'all' or 'head'"),
    ):
        with pytest.raises(UserError, match=line):
            small.resolve(small.options("badnets(target=1)", wrong, overrides=()))
    with pytest.raises(UserError, match="model pico-8-8: expected pico-WIDTH"):
        small.resolve(small.options("badnets(target=1)", "smooth", model="pico-8-8", overrides=()))


def test_its_methods_pass_the_tests_that_it_shows(demo: Path) -> None:
    chosen = "card or working or trigger"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", chosen, "test_demo.py"]
    done = subprocess.run(command, cwd=demo, capture_output=True, text=True, timeout=240, check=False)
    assert "6 passed" in done.stdout, done.stdout


TYPED = [line for page, line in COMMANDS if page == "docs/writing-a-plugin.md" and "my-defense" not in line]


@pytest.mark.parametrize("line", TYPED)  # what `bbmcl new` makes is tried in test_authoring.py
def test_its_commands_are_planned(demo: Path, line: str) -> None:
    words = shlex.split(line)
    more = ("--dry-run",) if words[0] == "matrix" else ()
    answer = command.typed(*words, *more, folder=demo, env=os.environ)
    assert answer.returncode == 0, answer.stderr
    if "run.toml" in line:
        assert "attacks badnets; defenses ft, smooth" in answer.stdout
        assert "9 cells" in answer.stdout


# ---------------------------------------------------------------- reference and citation


def test_every_name_of_the_contracts_is_on_the_page() -> None:
    page = (DOCS / "api.md").read_text(encoding="utf-8")
    missing = [name for name in api.__all__ if not re.search(rf"\b{name}\b", page)]
    assert missing == []


def test_the_citation_is_of_this_version() -> None:
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    setup = ConfigParser()
    setup.read(ROOT / "setup.cfg")
    assert f"\nversion: {backdoorbench_mcl.__version__}\n" in citation
    assert f'  - name: "{setup["metadata"]["author"]}"\n' in citation
    assert f"\nlicense: {setup['metadata']['license_expression']}\n" in citation
    page = (DOCS / "cite.md").read_text(encoding="utf-8")
    assert f"version = {{{backdoorbench_mcl.__version__}}}" in page


@pytest.mark.parametrize("name", ["threat-model.md", "faults.md"])
def test_the_tests_that_a_page_names_exist(name: str) -> None:
    page = (DOCS / name).read_text(encoding="utf-8")
    named = set(re.findall(r"`((?:\w+/)?test_\w+\.py)::(\w+)`", page))
    assert len(named) > 15
    for file, test in named:
        assert f"\ndef {test}(" in (ROOT / "tests" / file).read_text(encoding="utf-8"), f"{file} has no {test}"
