"""bf16 against fp32 on the same victims: how far do ASR and BA of each defense move?

    python benchmarks/precision.py --runs DIR --attacks badnets --defenses ft,mcldef [--dataset cifar10 --budget mid]

The victims of a finished `bbmcl matrix --precision bf16` in DIR are kept; inversion, repair and judgement are done
again with fp32 forwards from the same seeds, clean images and orders. Prints one line per defense.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
from pathlib import Path

from backdoorbench_mcl import plan, request, runner
from backdoorbench_mcl.engines.local import Local
from backdoorbench_mcl.grant import Grants
from backdoorbench_mcl.matrix import Matrix
from backdoorbench_mcl.progress import Progress
from backdoorbench_mcl.registry import Described, cache_folder
from backdoorbench_mcl.rows import Row
from backdoorbench_mcl.store import Store


class SameVictims(plan.Builder):
    """A plan in one precision on the victims of another."""

    def __init__(self, asked: request.Request, victims: plan.Builder) -> None:
        super().__init__(asked)
        self.victims = victims

    def train(self, attack: Described, seed: int) -> str:
        key = self.victims.train(attack, seed)
        self.plan.nodes[key] = self.victims.plan.nodes[key]
        return key


def run(asked: request.Request, builder: plan.Builder, store: Store, using: runner.Resources) -> list[Row]:
    """The rows of a plan that must find its victims in the store."""
    for attack in asked.attacks:
        for seed in asked.seeds:
            undefended = builder.undefended(attack, seed)
            if store.stage(undefended[0]) is None:
                raise SystemExit(f"no victim {attack.label} {seed} in {store.folder}: run bbmcl matrix first")
            for defense in asked.defenses:
                builder.cell(attack, seed, undefended, defense, asked.defense_seeds[0], asked.clean_rates[0])
    grants = Grants(
        asked.data, store, device=asked.device, precision=asked.precision,
        threads=using.threads, isolation=using.isolation,
    )  # fmt: skip
    with Progress(len(builder.plan.cells)) as display:
        return Matrix(builder.plan, store, grants, Local(using.workers or 1), display).run()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, required=True)
    for name, default in (
        ("attacks", None),
        ("defenses", None),
        ("dataset", "shapes"),
        ("seeds", "0"),
        ("budget", None),
    ):
        parser.add_argument(f"--{name}", default=default, required=name in ("attacks", "defenses"))
    given = parser.parse_args()
    root = Path(os.environ["BBMCL_DATA"]) if os.environ.get("BBMCL_DATA") else None
    options = request.Options(
        given.attacks,
        given.defenses,
        given.dataset,
        seeds=given.seeds,
        budget=given.budget,
        precision="bf16",
        data_root=root,
    )
    known = runner.registry()
    asked = request.resolve(options, known, runner.prepare_data(known, cache_folder()))
    using = runner.resources(runner.Settings(), asked.device)
    store = Store(given.runs)
    half = run(asked, plan.Builder(asked), store, using)
    exact = dataclasses.replace(asked, precision="fp32")
    full = run(exact, SameVictims(exact, plan.Builder(asked)), store, using)
    head = f"{'attack':12} {'defense':28} seed  ASR bf16   fp32   diff   BA bf16   fp32   diff"
    print(head)
    for a, b in zip(half, full, strict=True):
        if a.asr is None or b.asr is None or a.ba is None or b.ba is None:
            print(f"{a.attack:12} {a.defense:28} {a.victim_seed:4}  {a.state} / {b.state}: {a.reason or b.reason}")
            continue
        print(
            f"{a.attack:12} {a.defense:28} {a.victim_seed:4}  {a.asr:8.2f} {b.asr:6.2f} {a.asr - b.asr:+6.2f}   "
            f"{a.ba:7.2f} {b.ba:6.2f} {a.ba - b.ba:+6.2f}"
        )


if __name__ == "__main__":
    main()
