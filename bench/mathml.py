"""What the documentation's Markdown needs when it becomes the site: an extension of Python-Markdown.

zensical.toml names this module. Mathematics between dollars becomes MathML, as GitHub shows it from the same text; no
script is loaded for it. Headings get GitHub's anchors, so a link leads to the same place in both.
"""

import html
import re
import unicodedata
import xml.etree.ElementTree as etree

from markdown import Markdown
from markdown.extensions import Extension
from markdown.inlinepatterns import InlineProcessor
from math_core import LatexError, LatexToMathML

from bench.site import UNREAD

# $$...$$, or $...$ on one line with no space inside the dollars; \$ is a dollar. Longest first.
FORMULA = r"(?<![\\$])(?:\$\$(?P<block>[^$]+?)\$\$|\$(?!\s)(?P<inline>[^$\n]*?[^$\s\\])\$(?![\d$]))"


def slug(text: str, separator: str = "-") -> str:
    """The anchor that GitHub gives to a heading."""
    text = unicodedata.normalize("NFC", text)
    return re.sub(r"[^\w -]", "", text).strip().lower().replace(" ", separator)


class Formula(InlineProcessor):
    """A formula in LaTeX, as MathML. One that cannot be read says so in the page, and `bench.site` refuses the page."""

    def __init__(self, md: Markdown) -> None:
        super().__init__(FORMULA, md)
        self.latex = LatexToMathML(fancy_error=False, annotation=False)

    def handleMatch(self, m: re.Match[str], data: str) -> tuple[etree.Element | str, int, int]:
        text = m["block"] or m["inline"]
        try:
            made = self.latex.convert_with_local_state(text.strip(), displaystyle=bool(m["block"]))
            made = f'<div class="formula">{made}</div>' if m["block"] else made
        except LatexError as error:
            said = html.escape(f"cannot read the formula {text.strip()!r}: {error}")
            made = f'<code class="{UNREAD}" title="{said}">{html.escape(m[0])}</code>'
        return self.md.htmlStash.store(made), m.start(0), m.end(0)


class Site(Extension):
    """The extension: formulas, and GitHub's anchors."""

    def extendMarkdown(self, md: Markdown) -> None:
        md.ESCAPED_CHARS = [*md.ESCAPED_CHARS, "$"]
        # After code (190), before backslashes (180): a backslash in a formula is LaTeX's.
        md.inlinePatterns.register(Formula(md), "formula", 185)
        md.treeprocessors["toc"].slugify = slug


def makeExtension(**settings: object) -> Site:
    """What Python-Markdown calls."""
    return Site(**settings)
