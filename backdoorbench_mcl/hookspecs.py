"""The six hooks. Five collect methods, one observes finished cells; none can change a score."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from .hooks import Entry, hookspec

if TYPE_CHECKING:
    from .rows import Row


@hookspec
def bbmcl_attacks() -> Sequence[Entry]:
    """Attacks of this plugin.

    Example: `return [Entry("badnets", "bbmcl_attacks.badnets:BadNets", "3x3 corner patch")]`
    """
    raise AssertionError("a hook specification is never called")


@hookspec
def bbmcl_models() -> Sequence[Entry]:
    """Network families of this plugin.

    Example: `return [Entry("wrn", "bbmcl_models.wrn:WRN", "wide residual networks wrn-D-K")]`
    """
    raise AssertionError("a hook specification is never called")


@hookspec
def bbmcl_inverters() -> Sequence[Entry]:
    """Trigger inverters of this plugin.

    Example: `return [Entry("nc-box", "bbmcl_inverters.nc_box:NCBox", "mask and pattern by Adam in a box")]`
    """
    raise AssertionError("a hook specification is never called")


@hookspec
def bbmcl_defenses() -> Sequence[Entry]:
    """Defenses of this plugin.

    Example: `return [Entry("ft", "bbmcl_defenses.ft:FT", "fine-tune on the clean images")]`
    """
    raise AssertionError("a hook specification is never called")


@hookspec
def bbmcl_datasets() -> Sequence[Entry]:
    """Data sets of this plugin.

    Example: `return [Entry("shapes", "bbmcl_datasets.shapes:Shapes", "procedural toy images")]`
    """
    raise AssertionError("a hook specification is never called")


@hookspec
def bbmcl_cell_finished(row: Row) -> None:
    """Called in the driver after a row is settled; a return value is ignored, an exception is reported and dropped.

    Prints go to standard error; one that takes more than ten seconds or calls `sys.exit` is not called again.

    Example: `print(row.attack, row.defense, row.asr)`
    """
    raise AssertionError("a hook specification is never called")
