"""Documents: read a folder of texts as passages short enough for a prompt."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import regex

from selfdistill.data import WORD, first_ten, join_surrogates, plain, spaced
from selfdistill.errors import UserError, number_of, one_line
from selfdistill.runtime import say

if TYPE_CHECKING:
    from bs4 import Tag

KINDS = (".txt", ".md", ".html", ".htm", ".pdf")
"""Supported file types."""
_NEEDS = {".html": "bs4", ".htm": "bs4", ".pdf": "pypdf"}
"""Packages of the extra ``documents`` that some file types need."""

BLOCKS = (
    *("p", "div", "section", "article", "main", "header", "footer", "aside", "blockquote", "pre", "figcaption"),
    *("caption", "ul", "ol", "li", "dl", "dt", "dd", "table", "tr", "h1", "h2", "h3", "h4", "h5", "h6", "br", "hr"),
    *("address", "center", "details", "dialog", "dir", "fieldset", "figure", "form", "hgroup", "legend", "menu"),
    *("optgroup", "option", "search", "summary"),
)
"""Block-level HTML elements."""
SPACED = ("td", "th", "button", "label", "select", "textarea")
"""HTML elements that stand apart from the text around them, but on its line."""

LONGEST_SENTENCE = 250
"""Words; what has more without the end of a sentence is a table, a list or a log."""

_GREEK_QUESTION = r"(?<=\p{Greek}[;\u037e])"  # elsewhere ; is a semicolon, and Unicode takes U+037E for one
_BETWEEN_SENTENCES = regex.compile(
    rf"""
    ( (?:(?<=\p{{Sentence_Terminal}})|{_GREEK_QUESTION})\s+(?=["'(]?[\p{{L}}--\p{{Ll}}])
    | (?<=[\u3002\uff01\uff1f][\p{{Pe}}\p{{Pf}}]*)\s*(?![\s\u3002\uff01\uff1f\p{{Pe}}\p{{Pf}}]|$) )
    """,
    regex.VERSION1 | regex.VERBOSE,
)
_QUESTION_END = regex.compile(rf"[?\uff1f\u061f]$|{_GREEK_QUESTION}$")
_GERMAN = (
    *("das", "der", "die", "ein", "eine", "einem", "einen", "einer", "und", "oder", "ist", "sind", "wird", "werden"),
    *("wurde", "nicht", "auf", "für", "im", "mit", "vom", "zum", "zur", "sich", "sie"),
)
"""Frequent German words in small letters, but those in German names abroad (von, den) and in other languages (es)."""

_RAISED = str.maketrans("0123456789+-\u2212\u2013n", "⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻⁻⁻ⁿ")
_LOWERED = str.maketrans("0123456789+-\u2212\u2013", "₀₁₂₃₄₅₆₇₈₉₊₋₋₋")
"""Characters that have a form above or below the line."""

_PAGE_IN_SENTENCE = regex.compile(r"(?<!\p{Sentence_Terminal}[\p{Pe}\p{Pf}\"']*\s*)\f\s*(?=\p{Ll})")
_LETTER = r"[\p{L}\p{M}]"
_LINE_END = r"[-\u2010\u00ad][ \t]*\n\s*"
_DIVISION = regex.compile(rf"(?<!{_LETTER})({_LETTER}++){_LINE_END}(?=(\p{{Ll}}{_LETTER}*+))")
_DIVIDED = regex.compile(rf"(?<!{_LETTER}){_LETTER}++(?:{_LINE_END}\p{{Ll}}{_LETTER}*+)+")
"""Words divided at the end of a line."""


@dataclass(frozen=True)
class Passage:
    """A part of a document."""

    source: str
    """File and passage number, from 1: ``notes/mill.md#2``."""
    text: str


def load_passages(path: str, *, max_words: int) -> list[Passage]:
    """Read a file, or every document of a folder and its subfolders in name order, and split them into passages.

    A passage holds as many full paragraphs as fit in ``max_words`` words; in scripts without spaces each character is a
    word. A longer paragraph is split between sentences, and a longer sentence becomes its own passage. What is too long
    for a sentence (:data:`LONGEST_SENTENCE`), such as a table, is split between its lines. The title of an HTML page is
    its first paragraph, unless the first heading repeats it. No text is dropped but that of ``nav`` and ``noscript``.
    Files and folders whose name begins with a dot are skipped, as are files of other types, with a note. Another note
    counts the pages of a PDF that have no text.

    Raises:
        UserError: the path does not exist, there are no documents, a package is missing, or documents cannot be read or
            have no text, of which it names the first ten and the total.
    """
    chosen = _documents(path)
    passages: list[Passage] = []
    bad: list[tuple[Path, str]] = []
    for file, name in chosen.items():
        try:
            pieces = _pieces(_paragraphs(file), max_words)
        except UserError as error:
            bad.append((file, str(error)))
        else:
            passages += [Passage(f"{name}#{number}", piece) for number, piece in enumerate(pieces, start=1)]
    if len(bad) == 1:
        raise UserError(": ".join(map(str, bad[0])))
    if bad:
        found = first_ten([f"{chosen[file]}: {problem}" for file, problem in bad])
        raise UserError(f"documents {path!r}: {len(bad)} documents cannot be used: {found}")
    return passages


def sentences(text: str) -> list[str]:
    """Split the text after full stops, question marks and exclamation marks followed by a space and a capital.

    The marks are those of all scripts, such as the danda and the Arabic question mark. In scripts without capitals any
    letter counts as one. The marks of Chinese and Japanese need no space after them; closing quotes and brackets stay
    with the sentence.
    """
    return [part for part in _BETWEEN_SENTENCES.split(text)[::2] if part]


def ends_as_question(text: str) -> bool:
    """Whether the text ends with a question mark: ``?``, that of Chinese, Arabic, or Greek, where it may be ``;``."""
    return _QUESTION_END.search(text) is not None


def is_german(text: str) -> bool:
    """Whether at least one word in twelve is a frequent German one, and two of these differ.

    German is the only widely spoken language in which every noun begins with a capital. How many words of a text do
    says less: names are as frequent in some English texts.
    """
    words = regex.findall(r"\w+", text)
    german = [word for word in words if word in _GERMAN]
    return len(set(german)) > 1 and 12 * len(german) >= len(words)


def goes_beyond(question: str, passage: str) -> bool:
    """Whether a question has a name or a number that is not in the passage.

    Names are capitalised words but the first and question words, in German only those in a row.
    """
    whole = spaced(plain(question))
    text = regex.sub(r"^\W*\w+", "", whole)
    named = " ".join(regex.findall(r"\b\p{Lu}\w*(?:\W+\p{Lu}\w*)+", text)) if is_german(passage) else text
    words = {word.lower() for word in regex.findall(r"\w+", named) if word != word.lower()}
    question_words = {"how", "what", "when", "where", "which", "who", "whom", "whose", "why"}
    numbers = set(regex.findall(r"\b\d+\b", whole))
    return bool((words - question_words | numbers) - set(only_words(passage).split()))


def only_words(text: str) -> str:
    """The words of a text in small letters, one space apart; in scripts without spaces each character is one."""
    return " ".join(regex.findall(r"\w+", spaced(plain(text)).lower()))


def _documents(path: str) -> dict[Path, str]:
    """The files to read, in name order, with their names for passages and errors; prints a note about others."""
    root = Path(path)
    if not root.exists():
        raise UserError(f"documents {path!r}: no such file or folder; check the path")
    if root.is_file():
        names = {root: Path(root.name)}
    else:
        names = {file: file.relative_to(root) for file in sorted(_files_below(root))}
    chosen = {file: join_surrogates(str(name)) for file, name in names.items() if file.suffix.lower() in KINDS}
    others = sorted({file.suffix.lower() or "without suffix" for file in names if file not in chosen})
    found = ", ".join(others[:10]) + (", ..." if len(others) > 10 else "")
    if not chosen:
        raise UserError(f"documents {path!r}: no file of {', '.join(KINDS)}{', found ' * bool(others)}{found}")
    if others:
        files = number_of(len(names) - len(chosen), "file")
        say(f"note: documents {path!r}: skipped {files} not of type {', '.join(KINDS)}: {found}")
    for file in chosen:
        package = _NEEDS.get(file.suffix.lower())
        if package and find_spec(package) is None:
            raise UserError(f"{file}: needs a missing package; pip install 'selfdistill[documents]'")
    return chosen


def _files_below(root: Path) -> list[Path]:
    """The files of a folder and its subfolders, linked ones too; not those whose name begins with a dot."""

    def refuse(error: OSError) -> None:
        raise UserError(f"{error.filename}: cannot be read: {error.strerror}; make it readable, or move it away")

    found: list[Path] = []
    seen: set[tuple[int, int]] = set()
    for folder, inner, files in os.walk(root, onerror=refuse, followlinks=True):
        status = os.stat(folder)
        if (status.st_dev, status.st_ino) in seen:  # by another link
            inner.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        inner[:] = sorted(name for name in inner if name[0] != ".")
        found += [file for name in files if name[0] != "." and (file := Path(folder, name)).is_file()]
    return found


def _pieces(paragraphs: list[str], max_words: int) -> list[str]:
    """Join paragraphs, each now on one line, and split long ones."""
    units: list[tuple[str, str]] = []  # text, and the separator before it
    for paragraph in paragraphs:
        parts = [paragraph] if _words(paragraph) <= max_words else _BETWEEN_SENTENCES.split(paragraph)
        for text, gap in zip(parts[::2], ["\n\n", *parts[1::2]], strict=True):
            too_long = _words(text) > max(max_words, LONGEST_SENTENCE)
            lines = text.split("\n") if too_long else [text]
            units += zip(lines, [gap, *"\n" * (len(lines) - 1)], strict=True)
    pieces: list[str] = []
    for text, gap in units:
        if pieces and _words(pieces[-1]) + _words(text) <= max_words:
            pieces[-1] += gap + text
        else:
            pieces.append(text)
    return [re.sub(r"(?<!\n)\n(?!\n)", " ", piece) for piece in pieces]


def _words(text: str) -> int:
    return len(WORD.findall(text))


def _paragraphs(file: Path) -> list[str]:
    """The paragraphs of a document, of lines with single spaces; errors do not name the file."""
    kind = file.suffix.lower()
    try:
        text = _pdf(file) if kind == ".pdf" else file.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UserError("not UTF-8 text, save it as UTF-8") from None
    if kind in (".html", ".htm"):
        text = _html(text)
    parts = [part.strip() for part in re.split(r"\n\s*\n", text) if part.strip()]
    found = ["\n".join(" ".join(line.split()) for line in part.splitlines() if line.strip()) for part in parts]
    if not found:
        raise UserError(f"has no text{' (scans have none)' if kind == '.pdf' else ''}, add some or remove it")
    return found


def _pdf(file: Path) -> str:
    from pypdf import PdfReader

    try:
        pages = [page.extract_text().strip() for page in PdfReader(file).pages]
    except Exception as error:  # a broken or encrypted file may raise anything
        reason = one_line(error)
        raise UserError(f"not a readable PDF ({reason}), replace or remove it") from None
    filled = list(filter(None, pages))
    if filled and len(filled) < len(pages):
        say(f"note: {file}: no text on {len(pages) - len(filled)} of {len(pages)} pages (scans have none, before OCR)")
    text = _PAGE_IN_SENTENCE.sub("\n", "\f".join(filled)).replace("\f", "\n\n")
    return join_surrogates(_unhyphenated(text))


def _unhyphenated(text: str) -> str:
    """Join the words that are divided at the end of a line.

    A hyphen before a part that is a word elsewhere in the text stays, as in ``well-known``, unless the whole is a word
    elsewhere, too.
    """
    known = set(regex.findall(rf"{_LETTER}+", _DIVIDED.sub(" ", text).lower()))

    def joined(divided: regex.Match[str]) -> str:
        first, second = divided.groups()
        return first if second not in known or (first + second).lower() in known else divided[0]

    return _DIVISION.sub(joined, text)


def _html(text: str) -> str:
    from bs4 import BeautifulSoup
    from bs4.exceptions import ParserRejectedMarkup

    try:
        page = BeautifulSoup(text, "html.parser")
    except ParserRejectedMarkup as error:
        reason = str(error).split("\n")[-1].strip()
        raise UserError(f"not readable HTML ({reason}), mend or remove it") from None
    titled = page.select_one("title:not(svg *)")  # those of drawings name their parts
    title = titled.get_text() if titled else ""
    for part in page(["script", "style", "title", "nav", "template", "noscript"]):
        part.decompose()
    for block in page(list(BLOCKS)):
        block.insert_before("\n\n")
        block.insert_after("\n\n")
    for part in page(list(SPACED)):
        part.insert_before(" ")  # if a cell's end tag is missing, the next cell is inside it
        part.insert_after(" ")
    for part in reversed(page(["sup", "sub"])):  # those within others first
        part.replace_with(_off_the_line(part))
    found, heading = page.get_text(), page.select_one("h1, h2, h3, h4, h5, h6")
    repeats = heading is not None and heading.get_text().split() == title.split()
    return found if repeats or not found.strip() else f"{title}\n\n{found}"


def _off_the_line(part: Tag) -> str:
    """The text of ``sup`` or ``sub``, so that it does not become a part of what it stands at.

    A link is a note, in brackets. Numbers have characters of their own, or ``^`` before them: 10⁶, CO₂, 10^1.5.
    Letters stay as they are: 19th.
    """
    text = part.get_text()
    shown, forms = text.strip(), _RAISED if part.name == "sup" else _LOWERED
    link = part.find("a") or part.find_parent("a")
    if shown and link and link.get_text().strip() in (shown, shown.strip("[]")):
        shown = f" [{shown.strip('[]')}]"
    elif all(ord(character) in forms for character in shown):
        shown = shown.translate(forms)
    elif part.name == "sup" and shown[0] != "[" and any(map(str.isdigit, shown)):
        shown = f"^{shown}"
    return shown + " " * text[-1:].isspace()
