"""One row of the result table: everything that is known of one cell, free of torch.

Percentages are 0-100 and unrounded, `*_k` of `*_n` are the integer counts behind them, undefined is None
(spec 1.3, design 3.6).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal

State = Literal["ok", "n/a", "failed", "killed", "timeout", "diverged"]
FINAL_STATES: frozenset[str] = frozenset({"ok", "n/a", "diverged"})
SCHEMA = 1
_TUPLES = ("knows", "strays", "changed", "overrides")


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
        """The row behind `as_dict`; fields of a newer version are dropped, absent ones take their default."""
        known = {f.name for f in fields(cls)}
        given = {k: v for k, v in data.items() if k in known}
        for name in _TUPLES:
            given[name] = tuple(given.get(name) or ())
        return cls(**given)
