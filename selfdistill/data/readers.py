"""Readers: one file to raw rows, each with its place. A file whose content is of another format than its name is named.

Nothing is guessed about values: a cell of a table is text as it stands, so ``007``, ``NA`` and ``null`` stay what they
are; an empty cell is null.
"""

from __future__ import annotations

import csv
import io
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from selfdistill.data.columns import COLUMNS, OTHER_NAMES
from selfdistill.data.rows import RawRow, describe_value, numbered, one_of, parse_json, quoted
from selfdistill.errors import UserError, number_of, one_line

_PACKED = {".gz": "a gzip file", ".zst": "a zstd file"}
"""Endings that may follow those of text files, and what they are."""
_FORMATS_OF_TEXT = {
    ".jsonl": "JSON Lines",
    ".json": "a JSON list",
    ".csv": "a table with commas",
    ".tsv": "a table with tabs",
}
_NAMES = {**_FORMATS_OF_TEXT, ".parquet": "a parquet file", **_PACKED}
_NARROW = {"float32": "float32", "float": "float32", "float16": "float16", "halffloat": "float16"}
"""NumPy's types of numbers with fewer bits than Python's, by their names in ``datasets`` and in Arrow."""
_ONE_OBJECT = "one JSON object over several lines"
"""A format that no ending stands for."""
FILE_TYPES = (*_FORMATS_OF_TEXT, ".parquet")
"""Endings of the files that are read."""
# In a folder, their rows would go missing silently; as a path, they are a file, not a hub name.
_OTHER_FILE_TYPES = (
    *(".ndjson", ".jsonlines", ".jl", ".arrow", ".feather", ".orc", ".avro", ".pkl", ".xlsx", ".xls", ".ods"),
    *(".zip", ".bz2", ".xz", ".lz4"),
)
_OTHER_SEPARATORS = {";": "semicolons", "|": "vertical bars"}
_JSON_PROBLEMS = {
    "Unterminated string starting at": "a text begins there and has no closing quote",
    "Invalid control character at": "a text has a line break, a tab or the like there; write it as \\n or \\t",
}
"""What Python's messages say that end in mid-sentence."""
_KNOWN = {*COLUMNS, *(name for others in OTHER_NAMES.values() for name in others)}


class _Binary(NamedTuple):
    """A format that its first bytes tell."""

    first: bytes
    name: str
    ending: str = ""
    """Of its files; "" if it is not read."""
    advice: str = "convert it to JSON Lines"


_UTF_16 = _Binary(b"\xff\xfe", "UTF-16 text", advice="save it as UTF-8")
_BINARY = (
    _Binary(b"PAR1", _NAMES[".parquet"], ".parquet"),
    _Binary(b"\x1f\x8b", _NAMES[".gz"], ".gz"),
    _Binary(b"\x28\xb5\x2f\xfd", _NAMES[".zst"], ".zst"),
    _Binary(b"PK\x03\x04", "a ZIP archive or spreadsheet"),
    _Binary(b"BZh", "a bzip2 file"),
    _Binary(b"\xfd7zXZ\x00", "an xz file"),
    _Binary(b"ARROW1", "an Arrow file"),
    _Binary(b"version https://git-lfs", "a Git LFS pointer instead of the file", advice="fetch it with git lfs pull"),
    _UTF_16,
    _UTF_16._replace(first=b"\xfe\xff"),
)


def kind_of(path: str) -> tuple[str, str]:
    """The two endings of a file's name: that of its format, and that of its compression or ""."""
    name = path.lower()
    packed = next((ending for ending in _PACKED if name.endswith(ending)), "")
    return os.path.splitext(name.removesuffix(packed))[1], packed


def is_readable(path: str) -> bool:
    """Whether the name is that of a file that is read."""
    kind, packed = kind_of(path)
    return kind in FILE_TYPES and not (packed and kind == ".parquet")


def is_data_file(path: str) -> bool:
    """Whether the name is that of a file with data, though it may be in a format that is not read."""
    kind, packed = kind_of(path)
    return bool(packed) or kind in (*FILE_TYPES, *_OTHER_FILE_TYPES)


def read_file(path: str) -> list[RawRow]:
    """The unchecked rows of a file.

    Raises:
        UserError: the file's format is not read, or is another than its name says; or it is corrupt or not UTF-8.
        OSError: the file cannot be read.
    """
    kind, packed = kind_of(path)
    if not is_readable(path):
        raise UserError(f"{path}: cannot read file type '{kind}{packed}', expected {expected_types()}")
    _check_format(path, kind, packed)
    rows = _read_parquet(path) if kind == ".parquet" else _read_text(path, kind, packed)
    return [replace(raw, folder=os.path.dirname(path)) for raw in rows]


def _read_text(path: str, kind: str, packed: str) -> list[RawRow]:
    text = _utf8(path, _unpacked(path, packed))
    readers: dict[str, Callable[[str, str], list[RawRow]]] = {
        ".jsonl": _lines,
        ".json": _items,
        ".csv": lambda path, text: _table(path, text, ","),
        ".tsv": lambda path, text: _table(path, text, "\t"),
    }
    return readers[kind](path, text)


def read_jsonl(path: str) -> list[RawRow]:
    """The unchecked rows of a JSON Lines file, whatever its name; a row with invalid JSON has a problem, not a value.

    Raises:
        UserError: the file is not UTF-8, or is of another format.
        OSError: the file cannot be read.
    """
    return _lines(path, _utf8(path, Path(path).read_bytes()))


def read_prompts(path: str) -> list[tuple[int, str]]:
    """The lines of a text file that are not blank, each with its number.

    Raises:
        UserError: the file is not UTF-8, is binary, or has JSON rows.
        OSError: the file cannot be read.
    """
    text = _utf8(path, Path(path).read_bytes())
    if (found := _format_of(text)) in (".jsonl", ".json"):
        raise UserError(f"{path}: found {_NAMES[found]}, expected one prompt per line; rename it to end with {found}")
    lines = re.split("\r\n?|\n", text)  # not splitlines(), as in _lines
    if binary := [number for number, line in enumerate(lines, start=1) if "\0" in line]:  # such as UTF-16
        raise UserError(f"{path}: not text: line {binary[0]} has a null byte; save it as UTF-8")
    return [(number, line.strip()) for number, line in enumerate(lines, start=1) if line.strip()]


def expected_types() -> str:
    """The endings of the files that are read, for messages."""
    return f"{one_of(FILE_TYPES)} (text also compressed as {one_of(list(_PACKED))})"


def _lines(path: str, text: str) -> list[RawRow]:
    """The rows of JSON Lines."""
    rows = []
    # Not splitlines(): JSON text may contain U+2028 and the like, which do not end a line here.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        value = problem = None
        try:
            value = parse_json(line)
        except json.JSONDecodeError as error:
            problem = f"invalid JSON at character {error.colno}: {_JSON_PROBLEMS.get(error.msg, error.msg)}"
        except (ValueError, RecursionError) as error:
            problem = f"invalid JSON: {error}"
        rows.append(RawRow(f"line {number}", f"{path}:{number}", value, problem))
    if rows and not isinstance(rows[0].value, dict):
        _refuse_other_format(path, text, ".jsonl")
    return rows


def _items(path: str, text: str) -> list[RawRow]:
    """The rows of a JSON list."""
    try:
        rows = parse_json(text) if text.strip() else []
    except (ValueError, RecursionError) as error:
        _refuse_other_format(path, text, ".json")
        raise UserError(f"{path}: invalid JSON: {error}") from error
    if not isinstance(rows, list):
        lists = [key for key, value in rows.items() if _is_list_of_rows(value)] if isinstance(rows, dict) else []
        advice = f"; its {quoted(lists[0])} is one: write that list alone" if lists else ""
        raise UserError(f"{path}: found {describe_value(rows)}, expected a list of rows{advice}")
    return [RawRow(f"item {number}", f"{path}[{number}]", row) for number, row in enumerate(rows)]


def _table(path: str, text: str, delimiter: str) -> list[RawRow]:
    """The rows of a table whose first line names the columns. A cell is text; an empty one is null.

    A column without name and content, as spreadsheets leave them behind, is none.
    """
    _refuse_other_format(path, text, kind_of(path)[0])
    _refuse_other_separator(path, text, delimiter)
    lines = _cells(path, text, delimiter)
    if not lines:
        return []
    (_, header), *rows = lines
    used = [at for at, name in enumerate(header) if name.strip() or any(_cell(cells, at) for _, cells in rows)]
    names = [header[at] for at in used]
    _check_header(path, names)
    found = []
    for line, cells in rows:
        fits = len(cells) == len(header)
        count = number_of(len(cells), "cell")
        problem = None if fits else f"found {count}, expected {len(header)} ({', '.join(names)})"
        value = {header[at]: cells[at] or None for at in used} if fits else None
        found.append(RawRow(f"line {line}", f"{path}:{line}", value, problem))
    return found


def _cell(cells: list[str], at: int) -> str:
    """What the cell holds, if there is one."""
    return cells[at].strip() if at < len(cells) else ""


def _cells(path: str, text: str, delimiter: str) -> list[tuple[int, list[str]]]:
    """The cells of each row that is not blank, with the number of its first line."""
    found, line = [], 1
    limit = csv.field_size_limit(2**31 - 1)  # by default, a document of 128 KiB is too long
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        for cells in reader:
            found += [(line, cells)] if any(cells) else []
            line = reader.line_num + 1
    except csv.Error as error:
        raise UserError(f"{path}: line {line} is not a row of a table: {error}") from error
    finally:
        csv.field_size_limit(limit)
    return found


def _check_header(path: str, names: list[str]) -> None:
    """Refuse a first line that does not name each column once, or not one that is known."""
    if sum(not name.strip() for name in names) > 1:
        raise UserError(f"{path}: line 1 does not name all columns that have values; name them or leave them out")
    if repeated := [name for name, times in Counter(names).items() if times > 1]:
        raise UserError(f"{path}: line 1 names the column {repeated[0]!r} twice, expected each once")
    if not set(map(str.lower, names)) & _KNOWN:
        found = f"line 1 is {quoted(','.join(names))}"
        want = f"names of columns, such as 'prompt', in {_NAMES[kind_of(path)[0]]}; name the columns in line 1"
        raise UserError(f"{path}: {found}, expected {want}")


def _refuse_other_separator(path: str, text: str, delimiter: str) -> None:
    """Refuse a table whose first line names columns with another separator, as some spreadsheets write it."""
    first = text.strip().partition("\n")[0]
    for separator, name in _OTHER_SEPARATORS.items():
        if _columns_in(first, separator) and not _columns_in(first, delimiter):
            raise UserError(f"{path}: separated by {name}; use commas in a .csv, or tabs in a .tsv")


def _columns_in(line: str, separators: str) -> set[str]:
    """The known names of columns in a line, if that has a separator."""
    names = [name.strip(' "\r').lower() for name in re.split(f"[{separators}]", line)]
    return set(names) & _KNOWN if len(names) > 1 else set()


def _read_parquet(path: str) -> list[RawRow]:
    import pyarrow.parquet  # type: ignore[import-untyped]

    try:
        # Not read_table(path): that would read a `key=value` folder of the path as a column.
        table = pyarrow.parquet.ParquetFile(path).read()
        rows = table.to_pylist()
    except (OSError, pyarrow.ArrowException) as error:
        raise UserError(f"{path}: not a readable parquet file: {one_line(error)}") from error
    types = dict(zip(table.schema.names, map(str, table.schema.types), strict=True))
    return numbered(path, answers_as_meant(rows, types.get("answer", ""), _classes(table.schema)))


def _classes(schema: Any) -> Sequence[str]:
    """The names of the classes that numbers in the column ``answer`` stand for, where ``datasets`` has written them."""
    try:
        names: Sequence[str] = json.loads(schema.metadata[b"huggingface"])["info"]["features"]["answer"]["names"]
    except (TypeError, KeyError, ValueError):  # no metadata, another column or another type
        return ()
    return names


def answers_as_meant(rows: Iterable[Any], kind: str, classes: Sequence[str]) -> Iterable[Any]:
    """Rows whose answers are what a typed column means by them: a class's name, and 3.7 for 3.700000047683716.

    Args:
        rows: dicts.
        kind: the type of the column ``answer``.
        classes: the names of the classes that its numbers stand for.
    """
    import numpy

    names, narrow = dict(enumerate(classes)), numpy.dtype(_NARROW[kind]).type if kind in _NARROW else None

    def meant(answer: Any) -> Any:
        if names and isinstance(answer, int):
            return names.get(answer)  # -1 stands for none
        return float(str(narrow(answer))) if narrow and isinstance(answer, float) else answer

    return [{**row, "answer": meant(row.get("answer"))} for row in rows] if names or narrow else rows


# --- bytes and formats ---


def _unpacked(path: str, packed: str) -> bytes:
    if not packed:
        return Path(path).read_bytes()
    import pyarrow

    try:
        with pyarrow.CompressedInputStream(pyarrow.OSFile(path), {".gz": "gzip", ".zst": "zstd"}[packed]) as stream:
            return bytes(stream.read())
    except (OSError, pyarrow.ArrowException) as error:
        raise UserError(f"{path}: not a readable {_PACKED[packed].removeprefix('a ')}: {one_line(error)}") from error


def _utf8(path: str, data: bytes) -> str:
    try:
        return data.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        # An error of the file, not of a row: the bytes of one character may look like the end of a line.
        line, byte = data.count(b"\n", 0, error.start) + 1, error.start - data.rfind(b"\n", 0, error.start)
        found = f"line {line}, byte {byte} is 0x{data[error.start]:02x}"
        raise UserError(f"{path}: not UTF-8: {found}; save it as UTF-8") from error


def _check_format(path: str, kind: str, packed: str) -> None:
    """Refuse a file whose first bytes are those of another format than its ending says.

    Raises:
        UserError: names both formats.
    """
    ending = packed or kind
    with open(path, "rb") as file:
        head = file.read(32)
    found = next((form for form in _BINARY if head.startswith(form.first)), None)
    if found is None and ending in _FORMATS_OF_TEXT and 0 in head[:2]:
        found = _UTF_16  # without a byte order mark
    if found is None and ending not in _FORMATS_OF_TEXT:
        _refuse_other_format(path, Path(path).read_bytes().decode("utf-8", "replace"), ending)
    elif found is not None and found.ending != ending:
        right = kind + found.ending if found.ending in _PACKED else found.ending
        advice = f"rename it to end with {right}" if right else found.advice
        raise UserError(f"{path}: found {found.name}, expected {_NAMES[ending]}; {advice}")


def _refuse_other_format(path: str, text: str, ending: str) -> None:
    """Refuse text in another format than the file's ending says.

    Raises:
        UserError: names both formats.
    """
    found = _format_of(text)
    if found in (None, ending):
        return
    if found == _ONE_OBJECT:
        name, advice = found, "write each row on one line"
    else:
        packed = kind_of(path)[1] if ending in _FORMATS_OF_TEXT else ""  # else the file is the text itself
        name, advice = _NAMES[found], f"rename it to end with {found}{packed}"
    raise UserError(f"{path}: found {name}, expected {_NAMES[ending]}; {advice}")


def _format_of(text: str) -> str | None:
    """The ending of a text's format, or :data:`_ONE_OBJECT`; None if it is not known."""
    text = text.strip()
    first = text.partition("\n")[0]
    if text[:1] == "{":
        if isinstance(_value(first), dict):
            return ".jsonl"
        return _ONE_OBJECT if isinstance(_value(text), dict) else None
    if text[:1] == "[":
        items = _value(text)
        return ".json" if _is_list_of_rows(items) else None
    return (".tsv" if "\t" in first else ".csv") if _columns_in(first, ",\t") else None


def _is_list_of_rows(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[0], dict)


def _value(text: str) -> Any:
    """The JSON value of a text; None if it is not JSON."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None
