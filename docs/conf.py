"""How Sphinx builds the site: `tox -e docs`. Nothing is fetched, so there are no links into other projects' pages."""

from __future__ import annotations

import sys
from pathlib import Path

from sphinx.application import Sphinx

from backdoorbench_mcl import __version__

sys.path.insert(0, str(Path(__file__).parent / "_ext"))

project = "backdoorbench_mcl"
author = "The backdoorbench_mcl authors"
release = version = __version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "checks", "commands", "grants", "repository"]
source_suffix = {".md": "markdown"}
exclude_patterns = ["adr/README.md"]  # what adr/index shows
myst_heading_anchors = 3

default_role = "literal"  # a single backtick in a docstring is code
napoleon_use_ivar = True
autodoc_preserve_defaults = True
autodoc_member_order = "bysource"
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 100
nitpick_ignore_regex = [
    ("py:.*", r"(annotated_types|collections|numpy|os|pandas|pathlib|pd|pluggy|pytest|torch|typing)\..*|Path|Tensor"),
]

html_theme = "furo"
html_title = f"bbmcl {release}"
html_show_copyright = False
html_show_sourcelink = False
html_copy_source = False


def unreadable_signature(
    app: Sphinx, what: str, name: str, found: object, options: object, signature: str | None, returned: str | None
) -> tuple[str, str | None] | None:
    """No signature with defaults that have no source form, as dataclasses have them; the fields are listed instead."""
    return ("", returned) if signature and "=<" in signature.replace(" ", "") else None


def nothing_said(app: Sphinx, what: str, name: str, found: object, skip: bool, options: object) -> bool | None:
    """Leave out the fields of named tuples, of which Python says only their number: class docstrings say the rest."""
    return True if str(getattr(found, "__doc__", "")).startswith("Alias for field number") else None


def setup(app: Sphinx) -> None:
    """What Sphinx calls."""
    app.connect("autodoc-process-signature", unreadable_signature)
    app.connect("autodoc-skip-member", nothing_said)
