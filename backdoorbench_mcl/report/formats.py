"""Grids for documents: Markdown and LaTeX (booktabs)."""

from __future__ import annotations

import re
from collections.abc import Sequence

from ..text import one_line
from . import notes
from .grid import Block, Cell, Rank, Stat

# ---------------------------------------------------------------- Markdown

_MARKDOWN = re.compile(r"([\\`*_\[\]<>|~#&$])")


def md(text: str) -> str:
    """Text of others for Markdown, table cells included: every character with a meaning is escaped."""
    return _MARKDOWN.sub(r"\\\1", one_line(text))


def as_markdown(blocks: Sequence[Block], detail: bool) -> str:
    """Pipe tables: best in `**bold**`, second best in `<u>`."""
    parts = [f"> **{md(text)}**" for text in [notes.banner(blocks)] if text]
    for block in blocks:
        parts.append(f"**{md(block.title)}**")
        headings = [md(notes.heading(column)) for column in block.columns]
        head = ["attack", *(f"{name} {metric}" for name in headings for metric in ("ASR", "BA"))]
        body = [
            [md(notes.attack(line)), *(text for cell in line.cells for text in _md_cell(cell))] for line in block.lines
        ]
        parts.append(as_pipes(head, body, left=1))
        below = [*notes.legend(block, "**Bold**: best, <u>underlined</u>: second best"), *notes.failures(block)]
        parts.append("\n".join(f"- {line if i == 0 and '<u>' in line else md(line)}" for i, line in enumerate(below)))
        rows = notes.details(block) if detail else []
        if rows:
            body = [[md(text) for text in row] for row in rows]
            parts.append(f"**{notes.DETAILS_TITLE}**")
            parts += [as_pipes(notes.details_head(block), body, left=2), notes.details_legend(block)]
    return "\n\n".join(parts)


def as_pipes(head: list[str], body: list[list[str]], left: int) -> str:
    from tabulate import tabulate  # 30 ms, for this format only

    align = ["left"] * left + ["right"] * (len(head) - left)
    return tabulate(body, head, tablefmt="pipe", colalign=align, disable_numparse=True)


def _md_cell(cell: Cell | None) -> tuple[str, str]:
    if cell is None:
        return "", ""
    if cell.failure:
        return md(" ".join(filter(None, (cell.failure, cell.tag)))), ""
    ba = _md_value(cell.ba, cell.ba_rank)
    return _md_value(cell.asr, cell.asr_rank) + notes.asr_marks(cell), f"{ba} ({cell.tag})" if cell.tag else ba


def _md_value(stat: Stat | None, rank: Rank) -> str:
    if stat is None:
        return notes.NONE
    return {"best": "**{}**", "second": "<u>{}</u>", "": "{}"}[rank].format(stat.text())


# ---------------------------------------------------------------- LaTeX

_LATEX = {
    "\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "$": r"\$", "&": r"\&", "#": r"\#", "%": r"\%", "_": r"\_",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}", ">": r"\textgreater{}",
    "|": r"\textbar{}", '"': r"\textquotedbl{}", "±": r"$\pm$", "–": "--", "≈": r"\textsuperscript{$\approx$}",
    "×": r"\textsuperscript{$\times$}", "°": r"\textsuperscript{$\circ$}", "†": r"\textsuperscript{\dag}",
    "‡": r"\textsuperscript{\ddag}", "§": r"\textsuperscript{\S}", "¶": r"\textsuperscript{\P}",
    "¤": r"\textsuperscript{*}",
}  # fmt: skip


def tex(text: str) -> str:
    """Text of others for LaTeX: specials escaped; a character that a plain pdflatex has no glyph for becomes `?`."""
    return "".join(_LATEX.get(c, c if " " <= c <= "~" or "\u00c0" <= c <= "\u017f" else "?") for c in one_line(text))


def as_latex(blocks: Sequence[Block], detail: bool) -> str:
    """`table` environments for booktabs: best in bold, second best underlined, legend as a footnote."""
    parts = ["% needs \\usepackage[T1]{fontenc} and \\usepackage{booktabs}"]
    banner = notes.banner(blocks)
    for block in blocks:
        head = " & ".join(
            ["", *(rf"\multicolumn{{2}}{{c}}{{{tex(notes.heading(column))}}}" for column in block.columns)]
        )
        rules = "".join(rf"\cmidrule(lr){{{2 * i + 2}-{2 * i + 3}}}" for i in range(len(block.columns)))
        sub = " & ".join(["attack", *(["ASR", "BA"] * len(block.columns))])
        body = [" & ".join([tex(notes.attack(line)), *map(_tex_cell, line.cells)]) for line in block.lines]
        table = tabular("l" + "rr" * len(block.columns), [f"{head} \\\\\n{rules}\n{sub}"], body)
        below = notes.legend(block, "Bold: best, underlined: second best") + notes.failures(block)
        title = f"{banner} {block.title}" if block.toy else block.title
        parts.append(tex_float(title, table, [tex(line) for line in below]))
        rows = notes.details(block) if detail else []
        if rows:
            titles = notes.details_head(block)
            names = [" & ".join(map(tex, titles))]
            table = tabular("ll" + "r" * (len(titles) - 2), names, [" & ".join(map(tex, row)) for row in rows])
            parts.append(tex_float(f"{notes.DETAILS_TITLE}: {title}", table, [tex(notes.details_legend(block))]))
    return "\n\n".join(parts)


def tabular(columns: str, head: list[str], body: list[str]) -> str:
    lines = [rf"\begin{{tabular}}{{{columns}}}", r"\toprule", *(f"{line} \\\\" for line in head), r"\midrule"]
    return "\n".join([*lines, *(f"{line} \\\\" for line in body), r"\bottomrule", r"\end{tabular}"])


def tex_float(caption: str, tabular: str, below: list[str]) -> str:
    foot = "\\\\\n".join(below)
    return "\n".join(
        [r"\begin{table}[tp]", r"\centering\small", rf"\caption{{{tex(caption)}}}", tabular, "", r"\smallskip",
         rf"\parbox{{\linewidth}}{{\footnotesize\raggedright {foot}}}", r"\end{table}"]
    )  # fmt: skip


def _tex_cell(cell: Cell | None) -> str:
    if cell is None:
        return " & "
    if cell.failure:
        return rf"\multicolumn{{2}}{{c}}{{{tex(' '.join(filter(None, (cell.failure, cell.tag))))}}}"
    ba = _tex_value(cell.ba, cell.ba_rank) + (f" ({tex(cell.tag)})" if cell.tag else "")
    marks = tex(notes.asr_marks(cell))
    hung = rf"\rlap{{{marks}}}" if marks else ""  # takes no room, so that decimals stay in line
    return f"{_tex_value(cell.asr, cell.asr_rank)}{hung} & {ba}"


def _tex_value(stat: Stat | None, rank: Rank) -> str:
    if stat is None:
        return tex(notes.NONE)
    form = {"best": r"\textbf{%s}", "second": r"\underline{%s}", "": "%s"}[rank]
    return form % stat.text("$\\pm$")
