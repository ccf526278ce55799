"""Tables and sentences as Markdown, LaTeX and HTML."""

from __future__ import annotations

import base64
import html
import re
from collections.abc import Sequence
from pathlib import Path

from segmamba.report.comparison_tables import Table

_LATEX = {
    "\\": r"\textbackslash{}",
    "&": r"\&",
    "%": r"\%",
    "$": r"\$",
    "#": r"\#",
    "_": r"\_",
    "{": r"\{",
    "}": r"\}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"$<$",
    ">": r"$>$",
    "|": r"\textbar{}",
    "±": r"$\pm$",
}
_STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;max-width:75em;margin:2em auto;"
    "padding:0 1em;color:#1f2937}table{border-collapse:collapse;font-size:13px}"
    "th,td{padding:.25em .7em;text-align:left;border-bottom:1px solid #e5e7eb;"
    "white-space:nowrap}th{border-bottom:2px solid #9ca3af}.wide{overflow-x:auto}"
    "p.note{color:#4b5563;font-size:13px}img{max-width:100%}"
)


def to_markdown(
    title: str, tables: Sequence[Table], facts: Sequence[str], figure: str
) -> str:
    """Write tables and facts as Markdown.

    Args:
        title: Headline.
        tables: One after another.
        facts: Sentences for a list at the end.
        figure: File name of the picture, beside the text.

    Returns:
        The text.
    """
    parts = [f"# {_plain_markdown(title)}\n"]
    for table in tables:
        lines = [f"## {table.title}\n", _row_markdown(table.header)]
        lines.append("| " + " | ".join("---" for _ in table.header) + " |")
        for number, row in enumerate(table.rows):
            cells = [
                f"**{_plain_markdown(cell)}**"
                if (number, column) in table.bold
                else _plain_markdown(cell)
                for column, cell in enumerate(row)
            ]
            lines.append("| " + " | ".join(cells) + " |")
        parts.append("\n".join(lines) + "\n")
        if table.full_note:
            parts.append(table.full_note + "\n")
    parts.append(f"![Each case's score under each model]({figure})\n")
    listed = "\n".join(f"- {_plain_markdown(fact)}" for fact in facts)
    return "\n".join([*parts, "## How it was computed\n", listed, ""])


def to_latex(title: str, tables: Sequence[Table], facts: Sequence[str]) -> str:
    r"""Write tables for a paper, each a `table` for `\input`; needs no package.

    Args:
        title: For a comment at the top.
        tables: One after another.
        facts: Sentences, as comments.

    Returns:
        The text, in ASCII but for names that have other letters.
    """
    parts = [f"% {line}" for line in (title, *facts)]
    for table in tables:
        note = f" {table.full_note}" if table.full_note else ""
        parts += [
            "",
            r"\begin{table}",
            rf"\caption{{{escape_latex(table.title + '.' + note)}}}",
            r"\centering\scriptsize",
            rf"\begin{{tabular}}{{{'l' * len(table.header)}}}",
            r"\hline",
            " & ".join(map(escape_latex, table.header)) + r" \\",
            r"\hline",
        ]
        for number, row in enumerate(table.rows):
            cells = [
                rf"\textbf{{{escape_latex(cell)}}}"
                if (number, column) in table.bold
                else escape_latex(cell)
                for column, cell in enumerate(row)
            ]
            parts.append(" & ".join(cells) + r" \\")
        parts += [r"\hline", r"\end{tabular}", r"\end{table}"]
    return "\n".join(parts) + "\n"


def to_html(
    title: str, tables: Sequence[Table], facts: Sequence[str], figure: Path
) -> str:
    """Write one page that holds everything, its picture too.

    Args:
        title: Headline.
        tables: One after another.
        facts: Sentences for a list at the end.
        figure: PNG file to put into the page.

    Returns:
        The page.
    """
    picture = base64.b64encode(figure.read_bytes()).decode("ascii")
    parts = [
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f"<title>{html.escape(title)}</title><style>{_STYLE}</style></head><body>",
        f"<h1>{html.escape(title)}</h1>",
    ]
    for table in tables:
        parts += [f"<h2>{html.escape(table.title)}</h2>", _table_html(table)]
        if table.full_note:
            parts.append(f'<p class="note">{html.escape(table.full_note)}</p>')
    parts += [
        '<img alt="Each case\'s score under each model" '
        f'src="data:image/png;base64,{picture}">',
        "<h2>How it was computed</h2>",
        "<ul>" + "".join(f"<li>{html.escape(fact)}</li>" for fact in facts) + "</ul>",
        "</body></html>",
    ]
    return "\n".join(parts) + "\n"


def escape_latex(text: str) -> str:
    """Write text so that LaTeX shows it as it is."""
    return "".join(_LATEX.get(letter, letter) for letter in text)


def _table_html(table: Table) -> str:
    head = "".join(f"<th>{html.escape(name)}</th>" for name in table.header)
    lines = [f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>']
    for number, row in enumerate(table.rows):
        cells = [
            f"<td><b>{html.escape(cell)}</b></td>"
            if (number, column) in table.bold
            else f"<td>{html.escape(cell)}</td>"
            for column, cell in enumerate(row)
        ]
        lines.append(f"<tr>{''.join(cells)}</tr>")
    return "\n".join([*lines, "</tbody></table></div>"])


def _row_markdown(cells: Sequence[str]) -> str:
    return "| " + " | ".join(map(_plain_markdown, cells)) + " |"


def _plain_markdown(text: str) -> str:
    """Keep names from turning into markup or another column."""
    return re.sub(r"([\\|*`<]|(?<!\w)_|_(?!\w))", r"\\\1", text)
