"""The errors a user may see. Each says what was given, what was expected and what to do."""

from __future__ import annotations

from .text import one_line


class BbmclError(Exception):
    """Root of all errors that this package raises on purpose; its text is one printable line, whatever it quotes."""

    def __str__(self) -> str:
        return one_line(super().__str__())


class UserError(BbmclError):
    """The request cannot be carried out as given: printed as one line, exit status 2, no traceback."""


class MixedSizes(UserError):
    """Images that are to make one array differ in size: who knows a size asks again with it."""


class PluginError(BbmclError):
    """A plugin broke the contract of `api` or `hooks`; the message names the plugin and the way out."""


class AccessDenied(PluginError):
    """A method reached for something that it did not declare in `knows`."""


class Diverged(BbmclError):
    """A loss or a weight is no longer finite. This is a result of the method, not a fault of the run."""


class NotApplicable(BbmclError):
    """The method is undefined for this cell, as NAD on a network without stages: the cell reads n/a with this line."""
