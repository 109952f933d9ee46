"""Documents: a folder of texts, as passages short enough to stand in a prompt."""

from __future__ import annotations

import re
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from selfdistill.errors import UserError

KINDS = (".txt", ".md", ".html", ".htm", ".pdf")
"""Files that are read. PDF and HTML need the extra ``documents``."""


BLOCKS = (
    *("p", "div", "section", "article", "main", "header", "footer", "aside", "blockquote", "pre", "figcaption"),
    *("caption", "ul", "ol", "li", "dl", "dt", "dd", "table", "tr", "h1", "h2", "h3", "h4", "h5", "h6", "br", "hr"),
)
"""Elements of HTML that stand alone."""


@dataclass(frozen=True)
class Passage:
    """A piece of one document."""

    source: str
    """File and number of the piece, from 1: ``notes/mill.md#2``."""
    text: str


def load_passages(path: str, *, max_words: int) -> list[Passage]:
    """Every document of a folder with its subfolders, in order of name, or of one file; split into passages.

    A passage is as many whole paragraphs as have at most ``max_words`` words; a longer paragraph is split between
    sentences, a longer sentence stands alone. Nothing is left out.

    Raises:
        UserError: no such folder, no document in it, one that cannot be read or has no text, or a package is missing.
    """
    root = Path(path)
    if not root.exists():
        raise UserError(f"documents {path!r}: no such file or folder")
    files = [root] if root.is_file() else sorted(file for file in root.rglob("*") if file.is_file())
    chosen = [file for file in files if file.suffix.lower() in KINDS]
    if not chosen:
        raise UserError(f"documents {path!r}: no file of {', '.join(KINDS)}")
    passages = []
    for file in chosen:
        paragraphs = [" ".join(part.split()) for part in re.split(r"\n\s*\n", _text(file))]
        pieces = _pieces([part for part in paragraphs if part], max_words)
        if not pieces:
            raise UserError(f"{file}: no text in it{'; a scan has none' if file.suffix == '.pdf' else ''}")
        name = file.name if root.is_file() else str(file.relative_to(root))
        passages += [Passage(f"{name}#{number}", piece) for number, piece in enumerate(pieces, start=1)]
    return passages


def sentences(text: str) -> list[str]:
    """The text cut after full stops, question marks and exclamation marks that a space and a capital follow."""
    return [part for part in re.split(r"(?<=[.!?])\s+(?=[\"'(]?[^\W\d_a-z])", text) if part]


def _pieces(paragraphs: list[str], max_words: int) -> list[str]:
    """Paragraphs joined, and split where they must be."""
    units: list[tuple[str, str]] = []  # text, and what stands before it in a joined piece
    for paragraph in paragraphs:
        parts = [paragraph] if len(paragraph.split()) <= max_words else sentences(paragraph)
        units += [(part, " " if number else "\n\n") for number, part in enumerate(parts)]
    pieces: list[str] = []
    for text, gap in units:
        if pieces and len(pieces[-1].split()) + len(text.split()) <= max_words:
            pieces[-1] += gap + text
        else:
            pieces.append(text)
    return pieces


def _text(file: Path) -> str:
    kind = file.suffix.lower()
    try:
        if kind == ".pdf":
            return _pdf(file)
        text = file.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(f"{file}: not UTF-8 text; save it as UTF-8") from None
    return _html(text) if kind in (".html", ".htm") else text


def _pdf(file: Path) -> str:
    _need("pypdf", file)
    from pypdf import PdfReader

    try:
        pages = [page.extract_text() for page in PdfReader(file).pages]
    except Exception as error:  # whatever a broken or encrypted file leads to
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{file}: not a PDF that can be read ({reason})") from None
    return "\n\n".join(pages)


def _html(text: str) -> str:
    _need("bs4", "a file of HTML")
    from bs4 import BeautifulSoup

    page = BeautifulSoup(text, "html.parser")
    for part in page(["script", "style", "head", "nav", "template", "noscript"]):
        part.decompose()
    for block in page(list(BLOCKS)):
        block.insert_before("\n\n")
        block.insert_after("\n\n")
    for cell in page(["td", "th"]):
        cell.insert_after(" ")
    return page.get_text()


def _need(package: str, what: object) -> None:
    if find_spec(package) is None:
        raise UserError(f"{what}: needs a package that is missing: pip install 'selfdistill[documents]'")
