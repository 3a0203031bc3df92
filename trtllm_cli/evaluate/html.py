"""Parts of self-contained HTML pages: the document, tables, figures. Text given as text is escaped here."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from trtllm_cli.evaluate.style import STYLE


def document(title: str, sections: Sequence[str], style: str = "") -> str:
    """A page of ``sections`` (HTML; empty ones are left out) in the pages' style, with rules of its own after it."""
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8"/>\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1"/>\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}{style}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(section for section in sections if section)
        + "\n</main>\n</body>\n</html>\n"
    )


def tile(label: str, value: str, sub: str) -> str:
    """One figure with what it is above and what to know of it below."""
    return (
        f'<div class="tile"><span class="label">{escape(label)}</span><span class="value">{escape(value)}</span>'
        f'<span class="sub">{escape(sub)}</span></div>'
    )


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells; a head of empty strings is left out."""
    top = "".join(f"<th>{escape(cell)}</th>" for cell in head) if any(head) else ""
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    heading = f"<thead><tr>{top}</tr></thead>" if top else ""
    return f'<div class="scroll"><table>{heading}<tbody>{body}</tbody></table></div>'


def figure(caption: str, drawing: str) -> str:
    """A drawing (HTML) with its caption."""
    return f'<figure><div class="scroll">{drawing}</div><figcaption>{escape(caption)}</figcaption></figure>'
