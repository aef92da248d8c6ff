"""One page on a model: what the scan found, what a repair changed. It loads nothing and runs no script.

Every text from a file or a plugin is escaped by the template.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from functools import cache
from importlib import resources
from typing import TYPE_CHECKING, Any

import numpy as np

from ..report import drill, figures, gallery
from ..text import one_line
from . import words
from .handed import Handed
from .purify import Repair
from .scan import KINDS, Found, Scan, kind_of

if TYPE_CHECKING:
    from jinja2 import Template

MOST_LABELS = 60  # with pictures of their triggers: a page of 1,000 classes would be 20 MB
SHOWN = 1  # held-out images that a trigger is shown on


def page(
    title: str, facts: Sequence[tuple[str, str]], handed: Handed, found: Scan | None, held: Sequence[float | None] = (),
    repairs: Sequence[Repair] = (),
) -> str:  # fmt: skip
    """HTML. facts: what is known of model and images, in rows; held: success on held-out images of `found.full`;
    repairs: the best first.
    """
    from markupsafe import Markup

    css = resources.files("backdoorbench_mcl.report").joinpath("page.css").read_text()
    return _template().render(
        title=one_line(title), css=Markup(css),  # noqa: S704 (our own)
        facts=[(one_line(name), one_line(value, 300)) for name, value in facts],
        scan=None if found is None else _scan(found, handed, held),
        repairs=[_repair(one, handed) for one in repairs[:1]], ranking=_ranking(repairs) if len(repairs) > 1 else None,
    )  # fmt: skip


@cache
def _template() -> Template:
    from jinja2 import Environment, StrictUndefined

    made = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return made.from_string(resources.files(__package__).joinpath("page.html").read_text())


# ---------------------------------------------------------------- the scan


def _scan(found: Scan, handed: Handed, held: Sequence[float | None]) -> dict[str, Any]:
    after = [*held, *[None] * len(found.full)]
    where = "" if found.target is None else f", label {one_line(handed.name(found.target), 60)}"
    quick = []
    for kind in KINDS:
        first = {one.label: one.chance for one in found.labels if one.kind == kind.name and one.chance is not None}
        own = [one for one in found.triggers if one.kind == kind.name]
        items = sorted(own, key=lambda one: first.get(one.label, 1.0))[:MOST_LABELS]
        items.sort(key=lambda one: one.label)
        quick.append({"title": f"Quick searches: {kind.name} ({kind.measure})",
                      "shown": [_shown(one, _caption(one, handed)) for one in items]})  # fmt: skip
    left_out = handed.classes - MOST_LABELS
    notes = [*found.notes, *([f"{left_out} labels without pictures, to keep the page small"] if left_out > 0 else [])]
    explained = (
        "index: Neural Cleanse's, in median deviations below the median; a label that stands out needs a trigger far "
        "smaller than the others do"
    )
    return {
        "verdict": f"{found.call}{where}: {one_line(found.reason)}",
        "head": words.label_head(), "rows": words.label_rows(found, handed), "notes": [*notes, explained],
        "marked": [] if found.target is None else [found.target], "quick": quick,
        "full": [picture for one, success in zip(found.full, after, strict=False)
                 for picture in _closely(one, handed, success)],
    }  # fmt: skip


def _caption(one: Found, handed: Handed) -> str:
    digits = 1 if one.mask is not None else 2
    return f"{one_line(handed.name(one.label), 24)}: {one.size:.{digits}f}, {words.number(one.success, 0)} %"


def _closely(one: Found, handed: Handed, held: float | None) -> list[dict[str, str]]:
    """A trigger on its own, its mask, and an image with it."""
    out = [_shown(one, words.trigger_line(one, handed, held))]
    if one.mask is not None:
        out.append(_item(gallery.to_pixels(one.mask[None]), f"mask, {kind_of(one.kind).measure} {one.size:.1f}"))
    chosen = (handed.held if len(handed.held) else handed.repair)[:SHOWN]
    for position in chosen:
        image = handed.x[position]
        out += [_item(image, "a clean image"), _item(one.apply(image), "the same with the trigger")]
    return out


def _shown(one: Found, caption: str) -> dict[str, str]:
    mask = np.ones((1, 1)) if one.mask is None else one.mask
    shape = gallery.Found("", (), "add" if one.mask is None else "blend", mask, one.pattern)
    return _item(shape.alone(), caption)


def _item(image: gallery.Pixels, caption: str) -> dict[str, str]:
    return {"data": drill.uri(image), "alt": caption, "caption": caption}


# ---------------------------------------------------------------- repairs


def _repair(one: Repair, handed: Handed) -> dict[str, Any]:
    told, failed = one.judgement, f": failed, {one_line(one.reason, 200)}" if one.reason else ""
    gone = ", ".join(handed.name(label) for label in told.gone)
    warning = f"Hardly said any more: {gone}. A trigger may be gone because its label is." if gone else ""
    return {
        "title": f"Repair by {one_line(one.defense)}{failed}",
        "warning": warning, "head": [f"{told.images} held-out images", "before", "after"],
        "rows": words.judgement_rows(told, handed, one.target), "features": _features(one.features),
    }  # fmt: skip


def _features(found: Mapping[str, Any]) -> str:
    """Both models' features as a picture, "" where there are none."""
    panels = []
    for name, title in (("before", "before"), ("after", "after the repair")):
        if f"xy.{name}" in found:
            labels = np.where(found["triggered"] > 0, -1, found["label"])
            panels.append(figures.Embedding(title, "", found[f"xy.{name}"], labels, {}))
    if not panels:
        return ""
    drawn = figures.render(figures.tsne(panels, "Features of held-out images, t-SNE"), "png", dpi=110)
    return "data:image/png;base64," + base64.b64encode(drawn).decode()


def _ranking(repairs: Sequence[Repair]) -> dict[str, Any]:
    return {"head": words.RANKING, "rows": words.ranking_rows(repairs)}


__all__ = ["MOST_LABELS", "page"]
