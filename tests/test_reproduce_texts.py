"""What `bbmcl reproduce` prints of made-up rows, to the letter.

Look at the new texts, then write them: `python tests/test_reproduce_texts.py`.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from made import make, reproduced

from backdoorbench_mcl.presets.suite import suite
from backdoorbench_mcl.rows import Row

GOLDEN = Path(__file__).parent / "golden"
ASR = {"ft": 13.0, "nad": 6.0, "ibau": 3.0, "nc": 3.5, "mcldef": 2.5}
BA = {"ft": 80.5, "nad": 81.5, "ibau": 79.5, "nc": 81.0, "mcldef": 82.0}


def table(name: str, victims: int = 1, shift: float = 0.0) -> list[Row]:
    """Rows of a table of the paper on two attacks, `nc` failed on one; shift: points that FT and NAD lose in ASR."""
    lines = suite(name, "cifar10", "full").set
    recipes: dict[str, Any] = {
        "train": {"augment": "crop+flip" if "train.augment=crop+flip" in lines else "none"},
        "defend": {"augment": "none" if "defend.augment=none" in lines else "crop+flip"},
    }
    out = []
    for i, attack in enumerate(("badnets", "sig")):
        for victim in range(victims):
            named: dict[str, Any] = {"victim": victim, "overrides": lines}
            before = {"attack": {"name": attack}, "train": recipes["train"]}
            out.append(make(attack, "before", 99.0, 83.0 - i, **named, params=before))
            for defense in ASR:
                more = {**named, "params": {**before, **recipes, "defense": {"name": defense}}}
                more["knows"] = ("target",) if defense in ("nc", "mcldef") else ()
                if (attack, defense, victim) == ("sig", "nc", 0):
                    out.append(make(attack, defense, **more, state="failed", reason="out of memory"))
                    continue
                asr = ASR[defense] + i + 0.5 * victim + (shift if defense in ("ft", "nad") else 0)
                out.append(make(attack, defense, asr, BA[defense] - i + 0.25 * victim, **more))
    return out


def temperatures() -> list[Row]:
    """Rows of Figure 10 on one attack, three temperatures."""
    taus = [
        make("blend", f"mcldef(temperature={tau})", 1 + 2 * tau, 80 + 2 * tau, knows=("target",))
        for tau in (0.1, 0.5, 1.0)
    ]
    return [make("blend", "before", 99.0, 84.0), *taus]


def victims(*attacks: str) -> list[Row]:
    """Rows of a target that only trains victims: `sig` is a weak attack."""
    gates = {"sig": "flagged"}
    return [make(attack, "before", 99.0 - 10 * (attack in gates), 83.0, gate=gates.get(attack, "ok"))
            for attack in attacks]  # fmt: skip


def repaired() -> list[Row]:
    """Rows of Figure 3: `nad` deletes the target class of one attack, `mcldef` comes down to the floor of the other."""
    out = victims("badnets", "cl")
    for i, attack in enumerate(("badnets", "cl")):
        out += [
            make(attack, "nad", 0.5, 74.0, ftr=0.6, tca=0.2) if i else make(attack, "nad", 6.0, 81.5),
            make(attack, "nc", 4.0 + i, 80.5, knows=("target",)),
            make(attack, "mcldef", 2.0 + 2 * i, 81.0, knows=("target",)),
        ]  # fmt: skip
    return out


def rates(*attacks: str) -> list[Row]:
    """Rows of Figures 4 and 9: three shares of clean data, `mcldef+` and its control too."""
    out = victims(*attacks)
    told = {"ft": (), "mcldef": ("target",), "mcldef+": ("target",), "mcldef+(stage=contrast)": ("target",)}
    for i, attack in enumerate(attacks):
        for rate in (0.01, 0.05, 0.2):
            for j, (defense, knows) in enumerate(told.items()):
                if (attack, defense, rate) == ("trojan", "ft", 0.01):
                    out.append(make(attack, defense, state="diverged", reason="loss is NaN", clean_rate=rate))
                    continue
                asr, ba = 26.0 - 7 * j - 20 * rate + i, 78.0 + j + 10 * rate
                out.append(make(attack, defense, asr, ba, clean_rate=rate, knows=knows))
    return out


TEXTS: list[tuple[str, str, Sequence[Row], Sequence[Row]]] = [
    ("table1", "table", table("table1", 2), ()),
    ("table1", "markdown", table("table1"), ()),
    ("table4", "table", table("table4", shift=40.0), table("table1")),  # C5 needs both
    ("table5", "latex", table("table5"), ()),
    ("fig1", "table", victims("badnets", "cl", "sig"), ()),
    ("fig3", "markdown", repaired(), ()),
    ("fig4", "table", rates("badnets"), ()),
    ("fig5", "latex", victims("badnets", "sig"), ()),
    ("fig9", "markdown", rates("trojan", "blend"), ()),
    ("fig10", "table", temperatures(), ()),
    ("fig10", "markdown", temperatures(), ()),
]
ENDINGS = {"table": "txt", "markdown": "md", "latex": "tex"}


def golden(name: str, fmt: str) -> Path:
    return GOLDEN / f"reproduce_{name}.{ENDINGS[fmt]}"


@pytest.mark.parametrize(("name", "fmt", "rows", "stored"), TEXTS, ids=[f"{one[0]}-{one[1]}" for one in TEXTS])
def test_text(tmp_path: Path, name: str, fmt: str, rows: Sequence[Row], stored: Sequence[Row]) -> None:
    (found,) = reproduced(tmp_path, {name: rows}, fmt, stored)
    assert found.text + "\n" == golden(name, fmt).read_text(encoding="utf-8")


if __name__ == "__main__":
    for target, kind, given, others in TEXTS:
        with tempfile.TemporaryDirectory() as folder:
            (made,) = reproduced(Path(folder), {target: given}, kind, others)
        golden(target, kind).write_text(made.text + "\n", encoding="utf-8")
