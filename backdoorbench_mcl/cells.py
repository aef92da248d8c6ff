"""Identity and randomness: keys, seeds, the clean split (design 3.2, 3.3). Pure functions, free of torch."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from .errors import UserError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

Role = Literal[
    "poison",
    "trigger",
    "suspect",
    "init",
    "order",
    "split",
    "invert",
    "stamp",
    "shuffle",
    "surrogate-init",
    "surrogate-order",
    "retune",
    "embed",
]


MOST_SEEDS = 10_000


def canonical(value: Any) -> str:
    """JSON with sorted keys, no spaces, floats by their shortest round-trip form; tuples are lists.

    Raises ValueError for NaN and infinities, which have no JSON form.
    """
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


def key(spec: Mapping[str, Any]) -> str:
    """SHA-256 (hex) of the canonical JSON of `spec`."""
    return hashlib.sha256(canonical(spec).encode()).hexdigest()


def seed(role: Role, data_hash: str, victim_seed: int, defense_seed: int | None = None) -> int:
    """A 63-bit seed for one role.

    It never depends on method parameters or versions, so that defenses, sweeps and clean rates stay paired.
    """
    text = canonical([role, data_hash, victim_seed, defense_seed])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def clean_count(total: int, rate: float) -> int:
    """floor(rate * total) clean images. Raises UserError when that is no image at all."""
    count = math.floor(rate * total + 1e-9)  # 0.05 * 60 must give 3 although the product is 2.9999...
    if count < 1:
        raise UserError(
            f"a clean rate of {rate} leaves no image of {total}; raise --clean-rate to at least {1 / total:.2g}"
        )
    return count


def clean_index(
    total: int, rate: float, split_seed: int, exclude: NDArray[np.int64] | None = None
) -> NDArray[np.int64]:
    """The first `clean_count` entries of one permutation: nested over rates (spec 2.5), in drawn order.

    exclude: indices that are passed over. Raises UserError where too few are left.
    """
    import numpy as np  # 50 ms that `bbmcl show`, which needs keys only, does not spend

    count = clean_count(total, rate)
    order = np.random.Generator(np.random.PCG64(split_seed)).permutation(total).astype(np.int64)
    if exclude is not None:
        order = order[~np.isin(order, exclude)]
        if len(order) < count:
            raise UserError(
                f"a clean rate of {rate} asks for {count} images, but only {len(order)} of {total} were not poisoned; "
                "lower --clean-rate or leave --exclude-poisoned out"
            )
    return order[:count]


def seeds(text: str) -> list[int]:
    """`"0-2,7"` -> [0, 1, 2, 7]. Raises UserError for anything else, or a seed twice."""
    out: list[int] = []
    for part in str(text).split(","):
        match = re.fullmatch(r"\s*(\d{1,9})(?:-(\d{1,9}))?\s*", part)
        if not match:
            raise UserError(f"seeds {text!r}: expected numbers and ranges, as in '0-2' or '0,3,5-7'")
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first or last - first >= MOST_SEEDS:
            raise UserError(
                f"seeds {text!r}: the range {part.strip()!r} runs backwards or is longer than {MOST_SEEDS:,}"
            )
        out.extend(range(first, last + 1))
        if len(out) > MOST_SEEDS:
            raise UserError(f"seeds {text[:80]!r}: more than {MOST_SEEDS:,} seeds were given, expected fewer")
    if len(set(out)) != len(out):
        raise UserError(f"seeds {text!r}: a seed is given twice")
    return out


__all__ = ["Role", "canonical", "clean_count", "clean_index", "key", "seed", "seeds"]
