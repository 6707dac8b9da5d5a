"""Markdown as the documentation tests read it: code blocks, code spans, links, headings."""

import re
from functools import cache

from tests.support import tree

_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
_SPAN = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")
_LINK = re.compile(r"(?<!!)\[[^\]]*\]\(([^)\s]+)\)")
_HEADING = re.compile(r"^(#{1,6}) (.+)$", re.MULTILINE)


@cache
def prose(path: str) -> str:
    """A page without its code blocks."""
    return _FENCE.sub("", tree.text(path))


def blocks(path: str, *languages: str) -> list[str]:
    """The code blocks in these languages, in order."""
    return [body for language, body in _FENCE.findall(tree.text(path)) if language in languages]


def spans(path: str) -> list[str]:
    """What stands between backticks in running text and tables."""
    return _SPAN.findall(prose(path))


def links(path: str) -> list[str]:
    """Where its links lead."""
    return _LINK.findall(prose(path))


def headings(path: str) -> list[str]:
    """Its headings as they are written, backticks left out."""
    return [title.replace("`", "") for _, title in _HEADING.findall(prose(path))]


def anchors(path: str) -> set[str]:
    """What a link can name after "#": the headings as web viewers spell them."""
    plain = (re.sub(r"[^\w\- ]", "", title.lower()) for title in headings(path))
    return {title.replace(" ", "-") for title in plain}


def section(path: str, heading: str) -> str:
    """The text below the heading that has `heading` among its comma-separated words, up to the next of its level."""
    parts = re.split(r"^## (.+)$", tree.text(path), flags=re.MULTILINE)
    for title, body in zip(parts[1::2], parts[2::2], strict=True):
        if heading in [word.strip() for word in title.split(",")]:
            return body
    return ""
