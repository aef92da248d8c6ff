"""How good `bbmcl scan` and `bbmcl purify` are on the victims of a runs folder, of which they know nothing.

    bbmcl matrix --dataset shapes --model wrn-10-1 --budget quick --attacks badnets,...,none --defenses none --runs RUNS
    python benchmarks/detection.py RUNS OUT.jsonl [--purify] [--only ATTACK] [--budget quick] [--set ...]
        [--weak] [--shard 0/4] [--device cuda] [--isolation inline] [--threads 1]
    python benchmarks/detection.py RUNS OUT.jsonl --rejudge

Each victim is saved as a file of weights and scanned by the command, as a stranger would. `--purify` repairs what was
found suspicious and measures with the attacker's own trigger, on test images that no command saw. A line for each
model goes to OUT.jsonl; models that are in it already are not scanned again. A victim whose backdoor did not
take (its row is `weak`) is left out unless `--weak` is given. At the end a table: alarms, labels, ROC.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from tabulate import tabulate

from backdoorbench_mcl import api, artefacts, cells, datacache, describe, evaluate, kit, params, runner
from backdoorbench_mcl.audit import verdict
from backdoorbench_mcl.registry import Described, Wanted, cache_folder
from backdoorbench_mcl.store import Stage, Store

CLEAN = "none"


def victims(store: Store, weak: bool = False) -> Iterator[tuple[Stage, dict[str, Any]]]:
    """Every trained victim with what its row says of it: attack, seed, target, asr, ba."""
    rows = {row.stages["model"]: row for row in store.rows() if row.defense == "before"}
    for stage in store.stages():
        if stage.kind == "train" and stage.key in rows:
            row = rows[stage.key]
            if row.gate == "weak" and not weak:
                continue
            yield stage, {"attack": row.attack, "seed": row.victim_seed, "target": row.target, "asr": row.asr,
                          "ba": row.ba, "gate": row.gate, "model": row.model, "dataset": row.dataset}  # fmt: skip
        elif stage.kind == "surrogate":  # a clean model of the attacker's
            name = "natural" if not stage.spec["recipe"]["params"].get("pgd_eps") else "robust"
            yield stage, {"attack": CLEAN, "seed": name, "target": None, "asr": None, "ba": None, "gate": "",
                          "model": None, "dataset": None}  # fmt: skip


def command(*typed: str) -> tuple[int, str, float]:
    """Exit status, standard output and seconds of `bbmcl` with these words."""
    started = time.monotonic()
    done = subprocess.run([sys.executable, "-m", "backdoorbench_mcl", *typed], stdout=subprocess.PIPE, text=True)
    return done.returncode, done.stdout, time.monotonic() - started


def true_numbers(stage: Stage, folder: Path, weights: Path, about: dict[str, Any], data: datacache.DataInfo,
                 model: Described, device: str) -> dict[str, Any]:  # fmt: skip
    """ASR, FTR, BA and TCA of weights by the attacker's own trigger, on the whole test split."""
    attack: Any = describe.construct(*_attack(stage))
    tensors = load_file(folder / "attack.safetensors")
    state = api.State({k[len("state."):]: v for k, v in tensors.items() if k.startswith("state.")},
                      artefacts.read_meta(folder)["attack"])  # fmt: skip
    x, y = (torch.from_numpy(np.array(part)) for part in datacache.open_split(data, "test"))
    rng = torch.Generator().manual_seed(0)
    parts = [attack.stamp(a.clone(), b.clone(), state, rng) for a, b in zip(x.split(1000), y.split(1000), strict=True)]
    goal, counted = attack.goal(y, state)
    network: Any = describe.construct(model.target, "model", model.suffix, model.params)
    net = network.build(data.classes, data.shape)
    net.set_normalisation(data.mean, data.std)
    net.load_state_dict(load_file(weights))
    net.to(torch.device(device)).eval()
    labels = [kit.predict(net, part).numpy() for part in (x, torch.cat(parts))]
    clean, triggered = labels
    found = evaluate.measure(clean, triggered, y.numpy(), goal.numpy(), counted.numpy())
    return {name: found[name] for name in ("asr", "ftr", "ba", "ba_nt", "tca")}


def _attack(stage: Stage) -> tuple[str, str, str, dict[str, Any]]:
    """What constructs the attack of a victim."""
    found = stage.spec["attack"]
    known = runner.registry(jobs=False)
    offer = known.find("attack", found["name"])
    return offer.entry.target, "attack", "", dict(found["params"])


def look(stage: Stage, about: dict[str, Any], store: Store, options: argparse.Namespace) -> dict[str, Any]:
    """Scan one victim, and repair it if asked for."""
    known = runner.registry(jobs=False)
    dataset = known.describe([Wanted("dataset", params.selection(options.dataset))])[0]
    root = os.environ.get("BBMCL_DATA")
    prepare = runner.prepare_data(known, cache_folder())
    data = prepare(dataset, None if root is None else Path(root), cells.key({"dataset": dataset.identity}))
    model = known.describe([Wanted("model", params.selection(options.model))])[0]
    folder = store.open(stage)
    with tempfile.TemporaryDirectory() as name:
        file, out = Path(name) / "model.safetensors", Path(name) / "clean.safetensors"
        file.write_bytes((folder / "weights.safetensors").read_bytes())
        typed = [
            str(file), "--arch", options.model, "--clean", f"{options.dataset}@{options.rate}",
            "--norm", options.dataset, "--budget", options.budget, "--runs", str(options.runs / "audit"),
            "--device", options.device, "--isolation", options.isolation,
            *(() if options.threads is None else ("--threads-per-job", str(options.threads))),
            *(word for line in options.set for word in ("--set", line)),
        ]  # fmt: skip
        status, printed, seconds = command("scan", *typed, "--format", "json")
        if not printed:
            return {**about, "key": stage.key, "status": status, "seconds": round(seconds, 1), "call": "failed",
                    "said": None, "kind": None, "labels": []}  # fmt: skip
        found = json.loads(printed)["scan"]
        line = {**about, "key": stage.key, "status": status, "seconds": round(seconds, 1), "call": found["call"],
                "said": found["target"], "kind": found["kind"], "labels": found["labels"]}  # fmt: skip
        if options.purify and found["call"] == "suspicious" and about["attack"] != CLEAN:
            line["before"] = true_numbers(stage, folder, file, about, data, model, options.device)
            status, printed, seconds = command("purify", *typed, "-o", str(out), "--format", "json")
            line["purify_seconds"] = round(seconds, 1)
            if status == 0:
                line["repair"] = json.loads(printed)["repairs"][0]
                line["after"] = true_numbers(stage, folder, out, about, data, model, options.device)
    return line


def judged_again(line: dict[str, Any]) -> dict[str, Any]:
    """A line with the verdict as it is now on the sizes that its quick searches found; that a full search of what
    stands out would work is taken for granted.
    """
    if not line["labels"]:
        return line
    found: list[verdict.Standing] = []
    kinds = list(dict.fromkeys(one["kind"] for one in line["labels"]))
    for kind in kinds:
        own = sorted((one for one in line["labels"] if one["kind"] == kind), key=lambda one: int(one["label"]))
        sized = verdict.Sized(kind, tuple(one["size"] for one in own), tuple(one["success"] for one in own))
        found += verdict.standings(sized, len(kinds))
    doubtful = verdict.suspects(found)
    ruling = verdict.rule(len(found) // max(1, len(kinds)), found, [100.0] * len(doubtful))
    on = ruling.on
    return {**line, "call": ruling.call, "said": None if on is None else on.label,
            "kind": None if on is None else on.kind, "labels": [vars(one) for one in found]}  # fmt: skip


# ---------------------------------------------------------------- tables


def least(line: dict[str, Any]) -> float:
    """The smallest chance of a label that the verdict would look at, before any full search."""
    able = [one for one in line["labels"] if one["chance"] is not None and one["ratio"] < verdict.DEEP]
    return min((one["chance"] for one in able if one["success"] >= verdict.REACHED), default=1.0)


def index(line: dict[str, Any]) -> float:
    """Neural Cleanse's statistic on the same quick searches for patches: its largest index."""
    return max((one["index"] for one in line["labels"] if one["kind"] == "patch" and one["index"] is not None),
               default=0.0)  # fmt: skip


def area(bad: Sequence[float], good: Sequence[float]) -> float | None:
    """Area under the ROC curve: how often a backdoored model scores higher than a clean one, ties counting half."""
    if not bad or not good:
        return None
    return float(np.mean([[1.0 if b > g else 0.5 if b == g else 0.0 for g in good] for b in bad]))


def table(lines: Sequence[dict[str, Any]]) -> str:
    """Alarms by attack, then ROC areas of the verdict's chance and of Neural Cleanse's index."""
    clean = [line for line in lines if line["attack"] == CLEAN]
    names = sorted({line["attack"].partition("(")[0] for line in lines} - {CLEAN})
    rows = []
    for name in [*names, CLEAN]:
        own = [line for line in lines if line["attack"].partition("(")[0] == name]
        alarms = [line for line in own if line["call"] == "suspicious"]
        right = sum(line["said"] == line["target"] for line in alarms)
        unsure = sum(line["call"] == "undecided" for line in own)
        flagged = sum(index(line) > 2 for line in own)
        score = area([-least(line) for line in own], [-least(line) for line in clean]) if name != CLEAN else None
        other = area([index(line) for line in own], [index(line) for line in clean]) if name != CLEAN else None
        rows.append([name, len(own), len(alarms), right if name != CLEAN else "", unsure, flagged,
                     "" if score is None else f"{score:.2f}", "" if other is None else f"{other:.2f}"])  # fmt: skip
    head = [
        "attack",
        "models",
        "suspicious",
        "right label",
        "undecided",
        "index > 2",
        "ROC area",
        "ROC area of the index",
    ]
    return tabulate(rows, head, tablefmt="github")


def repairs(lines: Sequence[dict[str, Any]]) -> str:
    """What was left, by the attacker's own trigger."""
    rows = []
    for line in lines:
        if "after" in line:
            before, after = line["before"], line["after"]
            changes = [f"{before[name]:.1f} -> {after[name]:.1f}" for name in ("asr", "ba", "tca")]
            took = line["seconds"] + line["purify_seconds"]
            rows.append([line["attack"], line["kind"], *changes, f"{after['ftr']:.1f}", f"{took:.0f} s"])
    return tabulate(rows, ["attack", "found as", "ASR", "BA", "TCA", "FTR after", "scan + purify"], tablefmt="github")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--dataset", default="shapes")
    parser.add_argument("--model", default="wrn-10-1")
    parser.add_argument("--rate", type=float, default=0.1)
    parser.add_argument("--budget", default="full")
    parser.add_argument("--only", default="")
    parser.add_argument("--set", action="append", default=[], metavar="NAME.PARAM=VALUE")
    parser.add_argument("--shard", default="0/1", metavar="I/N", help="every N-th model, from the I-th on")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--isolation", default="auto")
    parser.add_argument("--threads", type=int, help="threads of each job; default: the command's")
    parser.add_argument("--weak", action="store_true", help="scan victims whose backdoor did not take as well")
    parser.add_argument("--purify", action="store_true")
    parser.add_argument("--rejudge", action="store_true", help="scan nothing: the verdict of now on the sizes in OUT")
    options = parser.parse_args()
    done = [json.loads(line) for line in options.out.read_text().splitlines()] if options.out.exists() else []
    if options.rejudge:
        print(table([judged_again(line) for line in done]))
        return
    known = {line["key"] for line in done}
    store = Store(options.runs)
    start, every = (int(part) for part in options.shard.split("/"))
    for stage, about in list(victims(store, options.weak))[start::every]:
        if stage.key in known or not about["attack"].startswith(options.only):
            continue
        line = look(stage, about, store, options)
        done.append(line)
        with options.out.open("a") as file:
            file.write(json.dumps(line) + "\n")
        print(f"{line['attack']} {line['seed']}: {line['call']}, {line['said']}, {line['seconds']} s", flush=True)
    print(table(done))
    if any("after" in line for line in done):
        print(repairs(done))


if __name__ == "__main__":
    main()
