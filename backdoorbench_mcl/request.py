"""From what the user typed to what is to be computed: names resolved, presets applied, data found. Free of torch."""

from __future__ import annotations

import difflib
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from . import cells, datacache, params, presets, provenance
from .errors import BbmclError, UserError
from .needed import Needed, Table, check_declarations, describe_needed, told_by
from .params import Selection
from .plugins import Kind
from .registry import Described, Registry, Wanted

CONTROL = "none"  # the no-attack: a control that `--attacks all` leaves out
NOTHING = "none"  # `--defenses none`: victims are trained and judged, that is all
ORACLES = frozenset({"trigger", "location"})  # what a method knows that `all` leaves out
BEFORE = "before"  # the label of the undefended victim
Precision = Literal["fp32", "bf16"]
PrepareData = Callable[[Described, Path | None, str], datacache.DataInfo]


@dataclass(frozen=True)
class Options:
    """What the command line (or a script) asks for; every field as typed."""

    attacks: str
    defenses: str
    dataset: str = "shapes"
    model: str = "wrn-16-1"
    seeds: str = "0"
    defense_seeds: str = "0"
    clean_rate: float = 0.05
    preset: str = "paper"
    budget: str | None = None
    overrides: Sequence[str] = ()
    device: str = "auto"
    precision: str = "auto"
    data_root: Path | None = None
    exclude_poisoned: bool = False
    sweeps: Sequence[str] = ()
    retune: int = 0
    embed: bool = False


@dataclass(frozen=True)
class Request:
    """A resolved matrix. needed: the configured method behind every need, by its kind and text. left_out: labels of
    defenses that `all` would have named if they were not told too much. retune: triggered images for a re-tuning of
    each repaired model, 0 for none; embed: lay out the features of every model.
    """

    dataset: Described
    data: datacache.DataInfo
    model: Described
    attacks: Sequence[Described]
    defenses: Sequence[Described]
    needed: Needed
    train: Described
    defend: Described
    seeds: Sequence[int]
    defense_seeds: Sequence[int]
    clean_rates: Sequence[float]
    preset: str
    budget: str
    device: str
    precision: Precision
    exclude_poisoned: bool = False
    left_out: Sequence[str] = ()
    overrides: Sequence[str] = ()
    retune: int = 0
    embed: bool = False


def one_of(option: str, given: str, allowed: Sequence[str]) -> str:
    if given not in allowed:
        close = difflib.get_close_matches(given, allowed, 1)
        hint = f"did you mean {close[0]!r}?" if close else f"expected one of {', '.join(allowed)}"
        raise UserError(f"{option} {given!r}: {hint}")
    return given


def resolve_device(text: str) -> str:
    """`auto` is `cuda` where torch sees a GPU, else `cpu`; `cuda`, `cuda:N` and lists of these are checked.

    Raises UserError. Example: `resolve_device("cuda:0,cuda:1")`
    """
    if text == "cpu":
        return text
    parts = [part.strip() for part in text.split(",")]
    if text != "auto" and not all(re.fullmatch(r"cuda(:[0-9]{1,3})?", part) for part in parts):
        raise UserError(f"--device {text!r}: expected auto, cpu, cuda, cuda:N, or several GPUs as in cuda:0,cuda:1")
    places = [int(part.partition(":")[2] or 0) for part in parts] if text != "auto" else [0]
    if len(set(places)) < len(places):
        raise UserError(f"--device {text!r}: names a GPU twice; --workers is how many jobs run at once")
    driver = any(os.path.exists(path) for path in ("/dev/nvidiactl", "/dev/nvidia0", "/dev/dxg", "/dev/kfd"))
    found: list[str] = []
    if driver:  # only then is asking torch worth two seconds
        code = "import torch as t; print(*map(t.cuda.get_device_name, range(t.cuda.device_count())), sep='\\n')"
        asked = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
        found = asked.stdout.split("\n")[:-1] if asked.returncode == 0 and asked.stdout.strip() else []
    if text == "auto":
        return "cuda" if found else "cpu"
    if max(places) >= len(found):
        raise UserError(
            f"--device {text}: torch sees {len(found)} CUDA device{'' if len(found) == 1 else 's'} here; use --device "
            "cpu"
        )
    if len(models := {found[place] for place in places}) > 1:
        raise UserError(
            f"--device {text}: these are {' and '.join(sorted(models))}, whose numbers differ; name GPUs of one model"
        )
    return ",".join(parts)


def resolve_precision(text: str, device: str) -> Precision:
    """`auto` is bf16 on CUDA and on processors that have it, else fp32: a static rule, never a timing (design 3.3)."""
    one_of("--precision", text, ("auto", "fp32", "bf16"))
    if text == "auto":
        return "bf16" if device.startswith("cuda") or provenance.supports_bf16() else "fp32"
    return "bf16" if text == "bf16" else "fp32"


def _expand(
    registry: Registry, kind: Kind, text: str, sweeps: Sequence[params.Sweep]
) -> tuple[list[Selection], frozenset[str]]:
    """The selections of a list, and the labels of those that nobody typed.

    `all`: every method that is no control and knows neither trigger nor location.
    """
    out: list[Selection] = []
    typed: set[str] = set()
    for part in params.split(text):
        if part == "all":
            offers = registry.plugins.of(kind)
            shared = Counter(offer.entry.name for offer in offers)
            for offer in offers:
                if offer.entry.name != CONTROL and not ORACLES & set(offer.entry.may_know):
                    name = offer.entry.name if shared[offer.entry.name] == 1 else offer.full_name
                    out.append(Selection(name, name))
        elif part:
            chosen = params.selections(part)
            typed |= {selection.label for selection in chosen}
            out.extend(chosen)
    labels = [selection.label for selection in out]
    unique = list({selection.label: selection for selection in reversed(out)}.values())[::-1]
    if kind == "defense" and labels == [NOTHING]:
        return [], frozenset()
    if not unique:
        raise UserError(f"--{kind}s {text!r}: expected at least one {kind}; see: bbmcl plugins")
    many = [each for selection in unique for each in params.swept(selection, sweeps)]
    return many, frozenset(labels) - typed


def _clean_rates(options: Options, sweeps: Sequence[params.Sweep]) -> list[float]:
    given = next((sweep.values for sweep in sweeps if sweep.name is None), [("", options.clean_rate)])
    for _, rate in given:
        if not isinstance(rate, int | float) or isinstance(rate, bool) or not 0 < rate <= 1:
            raise UserError(f"--clean-rate {rate}: expected a share above 0 and at most 1, as in 0.05")
    return [float(rate) for _, rate in given]


def _check_sweeps(sweeps: Sequence[params.Sweep], chosen: Sequence[Selection]) -> None:
    """Raises UserError for a sweep of something that is not selected, or of one parameter twice."""
    known = sorted({name for s in chosen for name in (s.name, s.name.rpartition("/")[2])})
    for i, sweep in enumerate(sweeps):
        if any((sweep.name, sweep.parameter) == (other.name, other.parameter) for other in sweeps[:i]):
            raise UserError(f"--sweep {sweep.name or ''}{'.' * bool(sweep.name)}{sweep.parameter} is given twice")
        if sweep.name in ("train", "defend"):
            raise UserError(
                f"--sweep {sweep.name}.{sweep.parameter}: a recipe holds for a whole table; use --set "
                f"{sweep.name}.{sweep.parameter}=... in runs of their own"
            )
        if sweep.name is not None and sweep.name not in known:
            close = difflib.get_close_matches(sweep.name, known, 1)
            hint = f"did you mean {close[0]!r}?" if close else f"this run has {', '.join(known)}"
            raise UserError(f"--sweep {sweep.name}.{sweep.parameter}: no such attack or defense is selected; {hint}")


def _needs_of(
    registry: Registry, table: Table, methods: Sequence[Described], untyped: frozenset[str]
) -> tuple[list[Described], Needed]:
    """`methods` and everything that they need; one that nobody typed and whose needs cannot be met is broken."""
    sound = [method for method in methods if not method.problem]
    try:
        return list(methods), describe_needed(registry, table, sound)
    except BbmclError:  # whose?

        def met(method: Described) -> Described:
            describe_needed(registry, table, [method])
            return method

        checked = [_contained(method, untyped, met) for method in methods]
        return checked, describe_needed(registry, table, [method for method in checked if not method.problem])


def _contained(method: Described, untyped: frozenset[str], check: Callable[[Described], Described]) -> Described:
    """What `check` makes of a method; one that nobody typed and that fails it is broken, and the run goes on."""
    if method.problem:
        return method
    try:
        return check(method)
    except BbmclError as error:
        if method.label not in untyped:
            raise
        return method.broken(str(error))


def resolve(options: Options, registry: Registry, prepare: PrepareData) -> Request:
    """Everything that `options` asks for, checked. Raises UserError with one line for the first thing that is wrong."""
    preset = one_of("--preset", options.preset, presets.PRESETS)
    if options.retune and not 10 <= options.retune <= 50:
        raise UserError(f"--retune {options.retune}: expected 10 to 50 triggered images, or 0 for no re-tuning")
    seeds, defense_seeds = cells.seeds(options.seeds), cells.seeds(options.defense_seeds)
    sweeps = [params.sweep(line) for line in options.sweeps]
    rates = _clean_rates(options, sweeps)
    overrides = params.overrides(list(options.overrides))
    device = resolve_device(options.device)
    precision = resolve_precision(options.precision, device)
    attacks, guests = _expand(registry, "attack", options.attacks, sweeps)
    defenses, untyped = _expand(registry, "defense", options.defenses, sweeps)
    _check_sweeps(sweeps, [*attacks, *defenses])
    for selection in defenses:
        if selection.name == BEFORE:
            raise UserError(f"--defenses {BEFORE!r}: the undefended victim is always part of the table; leave it out")
    for kind, group in (("attack", attacks), ("defense", defenses)):
        for selection in group:
            registry.find(kind, selection.name)  # type: ignore[arg-type]

    dataset_selection = params.selection(options.dataset)
    model_selection = params.selection(options.model)
    registry.find("model", model_selection.name)
    own = overrides.get(dataset_selection.name, {})
    said = presets.settings(preset, "full", dataset_selection.name)  # type: ignore[arg-type]
    own = {**said.get(dataset_selection.name, {}), **own}
    dataset = registry.describe([Wanted("dataset", dataset_selection, own)])[0]
    budget = one_of("--budget", options.budget or dataset.budget, presets.BUDGETS)
    base = presets.settings(preset, budget, dataset_selection.name)  # type: ignore[arg-type]
    table = Table(base, overrides)
    table.seen |= {dataset_selection.name}

    recipes = [Selection("train", "train"), Selection("defend", "defend")]
    wanted = [
        Wanted("model", model_selection, table.of(model_selection)),
        *(Wanted("recipe", selection, table.of(selection)) for selection in recipes),
        *(Wanted("attack", s, table.of(s), lenient=s.label in guests) for s in attacks),
        *(Wanted("defense", s, table.of(s), lenient=s.label in untyped) for s in defenses),
    ]
    described = registry.describe(wanted)
    model, train, defend = described[:3]
    found_attacks, found_defenses = described[3 : 3 + len(attacks)], described[3 + len(attacks) :]
    found_attacks, needed = _needs_of(registry, table, found_attacks, guests)
    found_defenses, also = _needs_of(registry, table, found_defenses, untyped)
    needed = {**needed, **also}
    table.check()

    def told(defense: Described) -> Described:
        full = replace(defense, told=tuple(sorted(told_by(defense, needed))))
        check_declarations(full, registry.find("defense", full.full_name))
        return full

    found_defenses = [_contained(defense, untyped, told) for defense in found_defenses]
    # an Entry declares what a method itself may know, not what reaches it by way of, say, its inverter
    left_out = [d.label for d in found_defenses if d.label in untyped and ORACLES & set(d.told)]
    found_defenses = [d for d in found_defenses if d.label not in left_out]
    if defenses and not found_defenses:
        raise UserError(f"--defenses {options.defenses!r}: every method is told the trigger or its location; name them")

    data = prepare(dataset, options.data_root, cells.key({"dataset": dataset.identity}))

    def in_range(attack: Described) -> Described:
        if attack.attack_target is not None and attack.attack_target >= data.classes:
            raise UserError(
                f"{attack.label}: target={attack.attack_target}, but {dataset.label} has the labels 0 to "
                f"{data.classes - 1}; set {attack.label.partition('(')[0]}.target"
            )
        return attack

    found_attacks = [_contained(attack, guests, in_range) for attack in found_attacks]
    for rate in rates:
        cells.clean_count(data.n_train, rate)  # says so if that is no image at all
    return Request(
        dataset, data, model, found_attacks, found_defenses, needed, train, defend,
        seeds, defense_seeds, rates, preset, budget, device, precision, options.exclude_poisoned,
        tuple(left_out), tuple(options.overrides), options.retune, options.embed,
    )  # fmt: skip


__all__ = [
    "BEFORE", "CONTROL", "NOTHING", "Options", "Request", "resolve", "resolve_device", "resolve_precision",
]  # fmt: skip
