"""One row of the result table: everything that is known of one cell, free of torch.

Percentages are 0-100 and unrounded, `*_k` of `*_n` are the integer counts behind them, undefined is None
(spec 1.3, design 3.6).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal, get_args

State = Literal["ok", "n/a", "failed", "killed", "timeout", "diverged"]
FINAL_STATES: frozenset[str] = frozenset({"ok", "n/a", "diverged"})
SCHEMA = 1
_TUPLES = ("knows", "strays", "changed", "overrides")
_SECTIONS = ("attack", "model", "dataset", "defense", "inverter", "train", "defend", "control")  # of `params`: mappings
_PERCENT = ("asr", "ba", "ba_nt", "tca", "ra", "ftr", "asr_before", "ba_before", "tca_before", "ftr_before")
_DEEP = 40  # levels of `params`
_NESTED = (Mapping, list, tuple)


@dataclass(frozen=True)
class Row:
    """One cell: a defense (label `before` for the undefended victim) on one victim.

    Labels are what the user typed; `key` identifies the cell with every resolved parameter. The floor of
    `asr` is `ftr` (the share of clean non-target images that the repaired model calls the target).
    `knows` lists what the method was told beyond its clean images.
    """

    key: str
    dataset: str
    model: str
    attack: str
    defense: str
    victim_seed: int
    defense_seed: int | None
    clean_rate: float | None
    state: State
    reason: str = ""
    blame: str = ""  # where a cell failed or has strays or changed: the method's package, version, file, how to skip it
    asr_before: float | None = None
    ba_before: float | None = None
    asr: float | None = None
    asr_k: int | None = None
    asr_n: int | None = None
    ba: float | None = None
    ba_k: int | None = None
    ba_n: int | None = None
    ba_nt: float | None = None
    ba_nt_k: int | None = None
    ba_nt_n: int | None = None
    tca: float | None = None
    tca_k: int | None = None
    tca_n: int | None = None
    ra: float | None = None
    ra_k: int | None = None
    ra_n: int | None = None
    ftr: float | None = None
    ftr_k: int | None = None
    ftr_n: int | None = None
    der: float | None = None
    tca_before: float | None = None
    ftr_before: float | None = None
    retuned_images: int | None = None  #: triggered images in a few further steps of the repaired model
    retuned_asr: float | None = None  #: after these steps, on the other test images
    retuned_ftr: float | None = None
    retuned_ba: float | None = None
    retuned_clean_images: int | None = None  #: the same steps on a clean model, the control of an undefended victim
    retuned_clean_asr: float | None = None
    retuned_clean_ftr: float | None = None
    retuned_clean_ba: float | None = None
    gate: str = ""  #: "ok", "flagged" (ASR before 90-95), "weak" (< 90) or "" where no gate applies
    seconds: float | None = None  #: this cell alone
    seconds_shared: float | None = None  #: with the stages that it shares with others (inversion)
    peak_mb: float | None = None
    knows: tuple[str, ...] = ()
    uses_labels: bool | None = None
    inverter: str | None = None
    inverter_success: float | None = None  #: % of the clean images that the victim calls otherwise
    inverter_l1: float | None = None
    inverter_pixels_changed: float | None = None  #: mean per clean image, by more than 1/255 in any channel
    inverter_steps: int | None = None  #: of the optimiser of its search
    inverter_stopped_early: bool | None = None  #: the search had steps left
    verdict: str = ""  #: of the detector that named the label to defend, as in "clean" or "flagged 5, 2"
    surrogate: str = ""  #: the clean models that the attack relied on, and how robust they are
    clean_n: int | None = None  #: clean images used
    clean_poisoned: int | None = None  #: of them, clean copies of images that the attacker changed in training
    target: int | None = None
    controls: str = "data"  # of the attacker, or "training"
    rebuild: str = ""  # of a repair that weights alone do not tell: the function that builds its network
    preset: str = "paper"
    budget: str = "full"
    precision: str = "fp32"
    isolation: str = "process"
    strays: tuple[str, ...] = ()  #: files opened or changed although not granted, where there is no Landlock
    changed: tuple[str, ...] = ()  #: what a method altered of the state that all code of its process shares
    device: str = "cpu"
    threads: int | None = None
    toy: bool = False
    data: str = ""  #: of the images, as in "lossless", "JPEG", a split, how many; "" in rows stored earlier
    overrides: tuple[str, ...] = ()  #: the `--set` lines of the run, which depart from preset and budget
    params: Mapping[str, Any] = field(default_factory=dict)  #: resolved parameters of attack, model, defense, recipes
    versions: Mapping[str, str] = field(default_factory=dict)
    stages: Mapping[str, str] = field(default_factory=dict)  #: stage kind -> stage key
    schema: int = SCHEMA

    def as_dict(self) -> dict[str, Any]:
        """A JSON-ready dict with every field, in the order of declaration."""
        out = asdict(self)
        for name in _TUPLES:
            out[name] = list(out[name])
        return out

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Row:
        """The row behind `as_dict`; fields of a newer version are dropped, absent ones take their default.

        Raises ValueError for anything else: rows come from archives and runs folders of others.
        """
        if not isinstance(data, Mapping):
            raise ValueError(f"a row is a mapping, got {type(data).__name__}")
        given = {f.name: data[f.name] for f in fields(cls) if f.name in data}
        for name in _TUPLES:
            given[name] = tuple(given[name]) if isinstance(given.get(name), list | tuple) else given.get(name) or ()
        for f in fields(cls):
            if f.name in given and not any(_TYPES[part](given[f.name]) for part in str(f.type).split(" | ")):
                raise ValueError(f"{f.name} of a row is {str(given[f.name])[:80]!r}, expected {f.type}")
        for name in _PERCENT:
            if given.get(name) is not None and (given[name] < 0 or given[name] > 100):  # NaN is neither
                raise ValueError(f"{name} of a row is {given[name]}, expected 0 to 100")
        if not all(map(_is_key, (given.get("key", ""), *given.get("stages", {}).values()))):
            raise ValueError("the key of a row, or of one of its stages, is no key")
        _check_params(given.get("params", {}))
        try:
            return cls(**given)
        except TypeError as error:  # a field that has no default is missing
            raise ValueError(f"no whole row: {error}") from error


def _is_key(value: str) -> bool:
    return len(value) <= 500 and value.isascii() and value.isprintable()


def _is_number(value: Any) -> bool:
    return isinstance(value, float) or _is_count(value)


def _is_count(value: Any) -> bool:
    return type(value) is int and -(2**63) <= value < 2**63  # what SQLite and numpy hold


def _is_mapping(value: Any) -> bool:
    return isinstance(value, Mapping) and all(isinstance(name, str) for name in value)


_TYPES: Mapping[str, Callable[[Any], bool]] = {
    "str": lambda value: isinstance(value, str),
    "State": lambda value: isinstance(value, str) and value in get_args(State),
    "int": _is_count,
    "float": _is_number,
    "bool": lambda value: isinstance(value, bool),
    "None": lambda value: value is None,
    "tuple[str, ...]": lambda value: isinstance(value, tuple) and all(isinstance(item, str) for item in value),
    "Mapping[str, Any]": _is_mapping,
    "Mapping[str, str]": lambda value: _is_mapping(value) and all(isinstance(item, str) for item in value.values()),
}


def _check_params(params: Mapping[str, Any]) -> None:
    """Raise ValueError where parameters are nested too deeply to print, or lack the structure that reports read."""
    level: list[Any] = [params]
    for _ in range(_DEEP):
        inside = (item.values() if isinstance(item, Mapping) else item for item in level if isinstance(item, _NESTED))
        level = [part for items in inside for part in items]
    if level:
        raise ValueError(f"params of a row are nested more than {_DEEP} deep")
    needs = [value for name, value in params.items() if name.startswith("needs ")]
    parts = [params[name] for name in _SECTIONS if name in params] + needs
    parts += [item for need in needs if isinstance(need, Mapping) for item in need.values()]
    if "control" in params and isinstance(params["control"], Mapping):
        parts += [params["control"].get(name) for name in ("attack", "set")]
    if not all(map(_is_mapping, parts)):
        raise ValueError("params of a row lack the parameters of a method")
