"""The page `cli` from the command itself: every command, argument and option of the typer app, as Markdown."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import typer.main
from sphinx.application import Sphinx

from backdoorbench_mcl.cli import app as command_line

PAGE, PLACE = "cli", "<!-- commands -->"  # which page, and where in it


def render(command: Any, name: str = "bbmcl", above: Any = None) -> Iterator[str]:
    """Lines of Markdown for a command of click and all below it: a heading, its usage, a line per parameter.

    above: the context of the command that it belongs to, None for the outermost.
    """
    context = command.context_class(command, parent=above, info_name=name)
    level = context.command_path.count(" ") + 2
    yield from (f"{'#' * level} {context.command_path}", "", command.help or "", "")
    usage = " ".join([context.command_path, *command.collect_usage_pieces(context)])
    yield from ("```text", usage, "```", "", f"```{{program}} {context.command_path}", "```", "")
    for parameter in command.params:
        typed, told = parameter.get_help_record(context)
        yield from (f"```{{option}} {typed.replace(' range>', '>')}", told, "```", "")
    for child in getattr(command, "commands", {}).values():
        yield from render(child, child.name, context)


def fill(app: Sphinx, page: str, source: list[str]) -> None:
    """Put the commands into their page."""
    if page == PAGE:
        source[0] = source[0].replace(PLACE, "\n".join(render(typer.main.get_command(command_line))))


def setup(app: Sphinx) -> dict[str, bool]:
    """What Sphinx calls."""
    app.connect("source-read", fill)
    return {"parallel_read_safe": True}
