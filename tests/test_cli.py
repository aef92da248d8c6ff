"""The command line as a user meets it: exit statuses, one clear line for bad input, streams that stay clean."""

from __future__ import annotations

import csv
import importlib
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
import small
from conftest import Bbmcl, Reference
from PIL import Image

from backdoorbench_mcl import __version__, cli, describe, plugins
from backdoorbench_mcl.evaluate import marks
from backdoorbench_mcl.registry import Registry
from backdoorbench_mcl.report import FORMATS
from backdoorbench_mcl.rows import Row
from backdoorbench_mcl.store import Store

ANNOUNCED = ("reading methods ", "preparing data set ", "data set ", "attacks ", "preset ")  # what may precede an error
Call = Callable[..., "Answer"]


class Answer:
    """What a call of the command left: its status and what it printed."""

    def __init__(self, status: int, out: str, err: str) -> None:
        self.status = status
        self.out = out
        self.err = err

    def assert_one_line(self, *parts: str) -> None:
        """Wrong usage: one line on stderr, after whatever was announced, says so and holds `parts`."""
        assert self.status == 2, self.err
        assert self.out == ""
        *announced, line = self.err.splitlines()
        assert line.startswith("bbmcl: "), self.err
        assert all(a.startswith(ANNOUNCED) for a in announced), self.err
        assert len(line) < 600
        for part in parts:
            assert part in line, line


@pytest.fixture
def call(
    monkeypatch: pytest.MonkeyPatch, toy_env: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> Call:
    """`bbmcl` in this process, in a folder of its own: no interpreter to start, and a traceback fails the test."""
    for name in [name for name in os.environ if name.startswith("BBMCL_")]:
        monkeypatch.delenv(name)
    small.install_toy(monkeypatch, toy_env["BBMCL_CACHE"])
    monkeypatch.chdir(tmp_path)

    def here(self: Registry, requests: list[dict[str, object]]) -> list[dict[str, object]]:
        return [describe.answer(request) for request in json.loads(json.dumps(requests))]

    # the child that reads classes imports torch, 2 s each time; test_json_on_stdout_is_pure and others start it
    monkeypatch.setattr(Registry, "_child", here)

    def run(*arguments: str) -> Answer:
        monkeypatch.setattr(sys, "argv", ["bbmcl", *arguments])
        capsys.readouterr()
        status = cli._run()
        return Answer(status, *capsys.readouterr())

    return run


@pytest.fixture
def finished(reference: Reference, tmp_path: Path) -> Path:
    """A copy of a finished 2x2 matrix that the test may change."""
    return Path(shutil.copytree(reference.runs, tmp_path / "finished"))


def tiny(*arguments: str, attacks: str = "badnets(target=1)", defenses: str = "ft") -> list[str]:
    """A matrix on the toy; what `arguments` repeat, they win."""
    base = ["matrix", "--dataset", "tiny", "--model", "tiny-net", "--attacks", attacks, "--defenses", defenses]
    return [*base, *arguments]


# ---------------------------------------------------------------- help and version


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; sys.argv = ['bbmcl', *sys.argv[1:]]\n"
        "from backdoorbench_mcl import cli; status = cli._run()\n"
        "heavy = {'torch', 'numpy', 'pandas', 'pydantic_core', 'safetensors', 'rich', 'sqlite3'} & set(sys.modules)\n"
        "print('status', status, 'heavy', sorted(heavy & {'torch', 'numpy', 'pandas', 'safetensors'}), file=sys.stderr)"
    )
    for arguments in (["--help"], ["matrix", "--help"], ["--version"]):
        done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True)
        assert done.stderr == "status 0 heavy []\n"
        assert "bbmcl" in done.stdout


def test_help_names_every_option_of_the_issue(call: Call) -> None:
    answer = call("matrix", "--help")
    assert answer.status == 0
    for option in (
        "attacks", "defenses", "dataset", "model", "seeds", "defense-seeds", "clean-rate", "preset", "budget", "set",
        "sweep", "device", "precision", "workers", "threads-per-job", "timeout", "isolation", "no-retry", "runs",
        "data-root", "format", "config", "dry-run",
    ):  # fmt: skip
        assert f"--{option}" in answer.out, option


def test_version(call: Call) -> None:
    answer = call("--version")
    assert (answer.status, answer.out, answer.err) == (0, f"bbmcl {__version__}\n", "")


def test_the_package_is_the_command_too(toy_env: dict[str, str]) -> None:
    command = [sys.executable, "-m", "backdoorbench_mcl", "--version"]
    done = subprocess.run(command, env=toy_env, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (0, f"bbmcl {__version__}\n")


# ---------------------------------------------------------------- bad input

BAD: dict[str, tuple[list[str], list[str]]] = {
    "attack": (tiny(attacks="badnet"), ["unknown attack 'badnet'", "did you mean 'badnets'?", "bbmcl plugins"]),
    "defense": (tiny(defenses="ft,mcldeff"), ["unknown defense 'mcldeff'", "did you mean 'mcldef'?"]),
    "dataset": (tiny("--dataset", "tinny"), ["unknown dataset 'tinny'", "did you mean 'tiny'?"]),
    "model": (tiny("--model", "zzz"), ["unknown model 'zzz'", "tiny-net", "wrn"]),
    "preset": (tiny("--preset", "papers"), ["--preset 'papers'", "'paper'"]),
    "budget": (tiny("--budget", "huge"), ["--budget 'huge'", "full, mid, quick"]),
    "format": (tiny("--format", "xml"), ["--format", "'xml'", "'markdown'", "bbmcl matrix --help"]),
    "device": (tiny("--device", "gpu"), ["--device 'gpu'", "auto, cpu, cuda, cuda:N, or several GPUs"]),
    "device number": (tiny("--device", "cuda:99"), ["--device cuda:99", "CUDA device", "use --device cpu"]),
    "precision": (tiny("--precision", "fp16"), ["--precision 'fp16'", "'bf16'"]),
    "isolation": (tiny("--isolation", "docker"), ["--isolation 'docker'", "auto, landlock, process or inline"]),
    "wrong type of an option": (tiny("--workers", "two"), ["--workers", "bbmcl matrix --help"]),
    "workers 0": (tiny("--workers", "0"), ["--workers 0", "1 to 1024"]),
    "threads 0": (tiny("--threads-per-job", "0"), ["--threads-per-job 0", "1 to 1024"]),
    "timeout 0": (tiny("--timeout", "0"), ["--timeout 0", "above 0"]),
    "timeout nan": (tiny("--timeout", "nan"), ["--timeout nan", "above 0"]),
    "set target": (tiny("--set", "ftt.lr=0.1"), ["--set ftt", "nothing selected", "did you mean 'ft'?"]),
    "set of what is not selected": (tiny("--set", "mcldef.temperature=0.1"), ["'mcldef'", "nothing selected"]),
    "set without value": (tiny("--set", "ft.lr"), ["--set 'ft.lr'", "name.param=value"]),
    "wrong type of a parameter": (tiny("--set", "train.epochs=many"), ["train: epochs='many'", "integer"]),
    "parameter out of range": (tiny(attacks="badnets(rate=1.5)"), ["badnets", "rate=1.5", "less than or equal to 1"]),
    "unknown parameter": (
        tiny(attacks="badnets(trget=1)"),
        ["no parameter 'trget'", "did you mean 'target'?"],
    ),
    "unknown parameter by --set": (tiny("--set", "train.epoch=1"), ["train: no parameter 'epoch'", "'epochs'"]),
    "no suffix": (tiny("--model", "tiny-net-3"), ["'tiny-net' takes no suffix", "'tiny-net-3'"]),
    "bracket": (tiny(attacks="badnets(rate=0.1"), ["closing ')' is missing"]),
    "nothing": (tiny(attacks=","), ["--attacks ','", "at least one attack"]),
    "before": (tiny(defenses="before,ft"), ["'before'", "leave it out"]),
    "clean rate 0": (tiny("--clean-rate", "0"), ["--clean-rate 0", "above 0 and at most 1"]),
    "clean rate 2": (tiny("--clean-rate", "2"), ["--clean-rate 2", "above 0 and at most 1"]),
    "clean rate nan": (tiny("--clean-rate", "nan"), ["--clean-rate nan", "above 0 and at most 1"]),
    "clean rate text": (tiny("--clean-rate", "5%"), ["--clean-rate", "bbmcl matrix --help"]),
    "clean rate of no image": (tiny("--clean-rate", "0.001"), ["0.001", "320"]),
    "target": (tiny(attacks="badnets(target=4)"), ["target=4", "labels 0 to 3"]),
    "seeds": (tiny("--seeds", "0-x"), ["0-x"]),
    "seeds backwards": (tiny("--seeds", "3-1"), ["3-1"]),
    "negative seed": (tiny("--seeds=-1"), ["-1"]),
    "no seeds": (tiny("--seeds", ""), ["seed"]),
    "defense seeds": (tiny("--defense-seeds", "a"), ["'a'"]),
    "missing data": (tiny("--dataset", "cifar10"), ["cifar10", "--data-root", "BBMCL_DATA"]),
    "missing folder": (tiny("--dataset", "folder:nowhere"), ["nowhere"]),
    "option": (tiny("--atacks", "x"), ["--atacks", "bbmcl matrix --help"]),
    "no attacks": (["matrix", "--defenses", "ft"], ["--attacks", "bbmcl matrix --help"]),
    "command": (["matrx"], ["matrx", "bbmcl --help"]),
    "runs in the way": (tiny("--runs", "file"), ["file cannot be used", "is a file", "--runs"]),
    "runs below a file": (tiny("--runs", "file/runs"), ["file/runs cannot be used", "--runs"]),
    "runs where nothing can be made": (tiny("--runs", "/proc/bbmcl"), ["/proc/bbmcl cannot be used", "--runs"]),
    "config missing": (tiny("--config", "none.toml"), ["--config none.toml", "No such file"]),
    "config of an unknown key": (
        tiny("--config", "unknown.toml"),
        ["unknown option 'worker'", "did you mean 'workers'?"],
    ),
    "config that is no TOML": (tiny("--config", "broken.toml"), ["broken.toml is no TOML"]),
    "config of a wrong type": (tiny("--config", "wrong.toml"), ["workers"]),
    "show": (["show", "nosuch"], ["unknown method 'nosuch'", "bbmcl plugins"]),
    "report without a store": (["report", "--runs", "absent"], ["no results in absent", "bbmcl matrix"]),
    "report format": (["report", "--format", "pdf", "--runs", "absent"], ["--format", "pdf"]),
    "export without a store": (["export", "a.tar", "--runs", "absent"], ["no results in absent"]),
    "import of nothing": (["import", "a.tar"], ["a.tar: no such file"]),
    "import of garbage": (["import", "file", "--runs", "."], ["no bbmcl archive", "nothing was imported"]),
    "data check": (["data", "check", "tinny"], ["unknown dataset 'tinny'"]),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line(call: Call, tmp_path: Path, case: str) -> None:
    (tmp_path / "file").write_text("in the way")
    (tmp_path / "unknown.toml").write_text("worker = 2\n")
    (tmp_path / "broken.toml").write_text("workers = = 2\n")
    (tmp_path / "wrong.toml").write_text('workers = "two"\n')
    before = sorted(tmp_path.rglob("*"))
    arguments, parts = BAD[case]
    call(*arguments).assert_one_line(*parts)
    if case != "import of garbage":  # which opens the store that it names before it opens the archive
        assert sorted(tmp_path.rglob("*")) == before  # nothing was begun


def test_a_corrupt_image_is_named(call: Call, tmp_path: Path) -> None:
    for split in ("train", "test"):
        for label in ("cat", "dog"):
            folder = tmp_path / "pets" / split / label
            folder.mkdir(parents=True)
            for i in range(3):
                Image.new("RGB", (8, 8), (40 * i, 80, 120 if label == "cat" else 9)).save(folder / f"{i}.png")
    broken = tmp_path / "pets" / "train" / "dog" / "1.png"
    broken.write_bytes(broken.read_bytes()[:40])
    call(*tiny("--dataset", f"folder:{tmp_path / 'pets'}")).assert_one_line(str(broken))


# ---------------------------------------------------------------- runs


def test_a_dry_run_computes_and_writes_nothing(call: Call, finished: Path, tmp_path: Path) -> None:
    fresh = call(*small.command(), "--runs", "runs", "--dry-run")
    assert fresh.status == 0
    assert fresh.err == ""
    lines = [line.split() for line in fresh.out.splitlines()]
    assert ["train", "2", "to", "compute,", "0", "stored"] in lines
    assert ["predict", "6", "to", "compute,", "0", "stored"] in lines
    assert not (tmp_path / "runs").exists()
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*") if path.is_file()}
    stored = call(*small.command(), "--runs", str(finished), "--dry-run")
    assert ["defend", "0", "to", "compute,", "4", "stored"] in [line.split() for line in stored.out.splitlines()]
    assert {path: path.stat().st_mtime_ns for path in finished.rglob("*") if path.is_file()} == before


def test_json_on_stdout_is_pure(process: Bbmcl, reference: Reference) -> None:
    done = process(*small.command(), "--runs", str(reference.runs), "--format", "json")
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)
    assert done.stdout.startswith("[") and done.stdout.endswith("]\n")
    assert rows == [row.as_dict() | marks(row) for row in reference.rows]
    assert {"dataset", "model", "key", "asr_before", "seconds_shared", "toy", "versions"} <= set(rows[0])
    assert "data set tiny" in done.stderr
    assert "mcldef" in done.stderr


def test_a_failed_cell_is_status_1_after_all_have_run(bbmcl: Bbmcl, finished: Path) -> None:
    arguments = small.command("badnets", "offender(how=raise),ft")
    done = bbmcl(*arguments, "--runs", str(finished), "--format", "json")
    assert done.returncode == 1, done.stderr
    rows = {row["defense"]: row for row in json.loads(done.stdout)}
    assert rows["offender(how=raise)"]["state"] == "failed"
    assert rows["offender(how=raise)"]["reason"] == "ValueError at bbmcl_toy_methods.py:282: first line"
    assert rows["ft"]["state"] == "ok"
    assert "Traceback" not in done.stderr


def test_a_config_file_gives_options_and_what_is_typed_beats_it(
    call: Call, reference: Reference, tmp_path: Path
) -> None:
    file = tmp_path / "run.toml"
    sets = [line.partition("=") for line in small.overrides("badnets", "mcldef")]
    tables: dict[str, list[str]] = {}
    for name, _, value in sets:
        method, _, parameter = name.rpartition(".")
        shown = value if value[0].isdigit() else json.dumps(value)
        tables.setdefault(method, []).append(f"{parameter} = {shown}")
    file.write_text(
        f'attacks = "badnets"\ndefenses = ["mcldef", "ft"]\ndataset = "tiny"\nmodel = "tiny-net"\nclean-rate = 0.2\n'
        f'runs = "{reference.runs}"\nformat = "csv"\nworkers = "auto"\nseeds = 0\ndefense_seeds = "0"\n'
        + "".join(f"[set.{method}]\n" + "\n".join(lines) + "\n" for method, lines in tables.items())
    )
    answer = call("matrix", "--config", str(file))
    assert answer.status == 0, answer.err
    by_key = {row.key: row for row in reference.rows}
    rows = list(csv.DictReader(io.StringIO(answer.out)))
    assert [(row["attack"], row["defense"]) for row in rows] == [
        ("badnets", "before"), ("badnets", "mcldef"), ("badnets", "ft"),
    ]  # fmt: skip
    assert all(row["key"] in by_key for row in rows)  # the same cells: nothing was computed
    typed = call("matrix", "--defenses", "mcldef", "--config", str(file), "--format", "json")
    assert [row["defense"] for row in json.loads(typed.out)] == ["before", "mcldef"]


def test_options_may_come_from_the_environment(
    call: Call, reference: Reference, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BBMCL_RUNS", str(reference.runs))
    assert len(json.loads(call("report", "--format", "json").out)) == 6


# ---------------------------------------------------------------- lists and cards


def test_plugins_lists_every_method_and_its_origin(call: Call) -> None:
    answer = call("plugins")
    assert answer.status == 0
    assert answer.err == ""
    for word in ("badnets", "blend", "none", "nc-box", "ft", "mcldef", "wrn", "shapes", "tiny-net", "offender"):
        assert f"  {word} " in answer.out
    assert "bbmcl-toy 1.0" in answer.out
    found = json.loads(call("plugins", "--json").out)
    assert found["problems"] == []
    methods = {(item["kind"], item["name"]): item for item in found["methods"]}
    assert methods["defense", "mcldef"]["may_know"] == ["target"]
    assert methods["model", "tiny-net"]["dist"] == "bbmcl-toy"


def test_plugins_names_a_broken_plugin_and_goes_on(call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    info = tmp_path / "site" / "bbmcl_bad-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: bbmcl-bad\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[bbmcl]\nbad = bbmcl_bad_module\n")
    (tmp_path / "site" / "bbmcl_bad_module.py").write_text("raise ImportError('no such luck\\nsecond line')\n")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    answer = call("plugins")
    assert answer.status == 0
    assert "mcldef" in answer.out
    assert answer.err.count("\n") == 1
    assert "bbmcl-bad" in answer.err
    assert "no such luck" in answer.err


def test_show_prints_parameters_with_bounds_and_defaults(call: Call) -> None:
    answer = call("show", "mcldef")
    assert (answer.status, answer.err) == (0, "")
    lines = [" ".join(line.split()) for line in answer.out.splitlines()]
    assert "temperature number > 0, default 0.5" in lines
    assert "clean_anchor number >= 0, default 0.0" in lines
    assert "inverter string, default 'nc-box'" in lines
    assert "bn_refresh boolean, default False" in lines
    assert any("2205.04411" in line for line in lines)
    assert "may be told: target" in lines


def test_show_prints_the_bounds_of_lists(call: Call) -> None:
    lines = [" ".join(line.split()) for line in call("show", "nad").out.splitlines()]
    assert "betas 3 x number >= 0, default [500.0, 1000.0, 1000.0]" in lines
    lines = [" ".join(line.split()) for line in call("show", "mesa").out.splitlines()]
    assert any(line.startswith("betas list of number > 0") for line in lines)


def test_every_shipped_method_has_its_card() -> None:
    """Paper, what differs here, the number that it should reach (design, rule 11)."""
    shipped = [offer for offer in plugins.load({}).offers if offer.plugin.dist == "backdoorbench-mcl"]
    assert len(shipped) >= 30
    for offer in shipped:
        card = importlib.import_module(offer.entry.target.partition(":")[0]).__doc__ or ""
        for part in ("Paper: ", "Differs: ", "Should reach"):
            assert part in card, f"{offer.entry.name}: its file does not say {part!r}"


def test_data_list_and_check(call: Call, reference: Reference) -> None:
    listed = call("data", "list")
    assert listed.status == 0
    for name in ("shapes", "cifar10", "cifar100", "folder", "parquet", "tiny"):
        assert any(line.startswith(name) for line in listed.out.splitlines())
    assert "prepared: 4 classes, 3x8x8" in listed.out
    checked = call("data", "check", "tiny")
    assert (checked.status, checked.err) == (0, "")
    assert "320 train + 100 test images" in checked.out
    assert "80, 80, 80, 80" in checked.out
    assert checked.out.rstrip().endswith("verified")


def test_data_check_finds_damage(call: Call, reference: Reference) -> None:
    checked = call("data", "check", "tiny(train=32)")
    assert checked.status == 0
    folder = Path(checked.out.rpartition("prepared copy in ")[2].partition(": verified")[0])
    array = max(folder.glob("*.npy"), key=lambda path: path.stat().st_size)
    content = bytearray(array.read_bytes())
    content[-1] ^= 1
    array.chmod(0o644)
    array.write_bytes(content)
    call("data", "check", "tiny(train=32)").assert_one_line("damaged", str(folder), "run again")


# ---------------------------------------------------------------- report, export, import


@pytest.mark.parametrize("fmt", FORMATS)
def test_report_prints_a_finished_store(call: Call, reference: Reference, fmt: str) -> None:
    answer = call("report", "--runs", str(reference.runs), "--format", fmt)
    assert (answer.status, answer.err) == (0, "")
    assert "badnets" in answer.out
    assert "mcldef" in answer.out
    if fmt == "json":
        assert {row["key"] for row in json.loads(answer.out)} == {row.key for row in reference.rows}
    if fmt == "csv":
        assert len(list(csv.DictReader(io.StringIO(answer.out)))) == 6


def test_report_narrows_what_it_prints(call: Call, reference: Reference) -> None:
    narrow = ["--attacks", "blend", "--defenses", "ft", "--format", "json"]
    rows = json.loads(call("report", "--runs", str(reference.runs), *narrow).out)
    assert [(row["attack"], row["defense"]) for row in rows] == [("blend", "before"), ("blend", "ft")]


def test_export_and_import_carry_a_matrix(call: Call, reference: Reference, tmp_path: Path) -> None:
    exported = call("export", "all.tar", "--runs", str(reference.runs))
    assert (exported.status, exported.out) == (0, "all.tar: 16 stages, 6 rows\n")
    imported = call("import", "all.tar", "--runs", "elsewhere")
    assert (imported.status, imported.out) == (0, "elsewhere: 16 new stages, 6 new rows\n")
    again = call("import", "all.tar", "--runs", "elsewhere")
    assert again.out == "elsewhere: 0 new stages, 0 new rows\n"
    store = Store(tmp_path / "elsewhere")
    assert {stage.key: stage.artefact for stage in store.stages()} == reference.artefacts
    store.close()
    matrix = call(*small.command(), "--runs", "elsewhere", "--format", "json")
    assert [Row.from_dict(row) for row in json.loads(matrix.out)] == reference.rows
    assert ": ok, " not in matrix.err  # no stage was run


def test_victims_can_be_shared_without_test_images(call: Call, reference: Reference, tmp_path: Path) -> None:
    exported = call("export", "victims.tar", "--only", "surrogate,train", "--runs", str(reference.runs))
    assert (exported.status, exported.out) == (0, "victims.tar: 2 stages, 6 rows\n")
    with tarfile.open(tmp_path / "victims.tar") as tar:
        assert not [name for name in tar.getnames() if "trial" in name]
    call("import", "victims.tar", "--runs", "elsewhere")
    store = Store(tmp_path / "elsewhere")
    assert {stage.kind for stage in store.stages()} == {"train"}
    assert {stage.key: stage.artefact for stage in store.stages()}.items() <= reference.artefacts.items()
    store.close()
    wrong = call("export", "some.tar", "--only", "train,weights", "--runs", str(reference.runs))
    assert wrong.status == 2
    assert "--only 'train,weights': 'weights' is no kind of stage; there are surrogate, train" in wrong.err


@pytest.mark.parametrize("command", ["report", "plugins", "matrix --help"])
def test_a_closed_pipe_is_no_traceback(toy_env: dict[str, str], reference: Reference, command: str) -> None:
    code = "import sys; from backdoorbench_mcl.cli import main; sys.stdin.read(); main()"
    arguments = [sys.executable, "-c", code, *command.split()]
    env = {**toy_env, "BBMCL_RUNS": str(reference.runs)}
    pipe = subprocess.PIPE
    with subprocess.Popen(arguments, stdin=pipe, stdout=pipe, stderr=pipe, text=True, env=env) as process:
        assert process.stdout is not None and process.stdin is not None and process.stderr is not None
        process.stdout.close()  # nobody reads, before the first line is written
        process.stdin.close()
        assert process.stderr.read() == ""
        assert process.wait(60) in (0, 1)
