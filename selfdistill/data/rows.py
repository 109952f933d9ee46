"""Raw rows of files and data sets, each with its location, and the wording of errors about them."""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from selfdistill.errors import UserError

Made = TypeVar("Made")

_FILE_TYPES = (".jsonl", ".json", ".parquet")
# Unsupported. In a folder, their rows would go missing silently; as a path, they are a file, not a hub name.
_OTHER_FILE_TYPES = (".csv", ".tsv", ".arrow", ".gz", ".zip", ".zst")
_SHOWN = 10
LONE_SURROGATE = re.compile("[\ud800-\udfff]")
"""Half of a surrogate pair. JSON can write it; UTF-8, and so any tokenizer, cannot."""


def join_surrogates(text: str) -> str:
    """Join the halves of surrogate pairs, and replace lone ones with U+FFFD."""
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


@dataclass(frozen=True)
class RawRow:
    """One unchecked row: its place within the path (``line 3``), and its value or the reason it has none.

    Only :func:`repeated_key` detects an object with a duplicate key.
    """

    place: str
    source: str
    value: Any = None
    problem: str | None = None


class _RepeatedKey(str):
    """A duplicate key, in place of its JSON object, so that the error can name the row."""


def read_rows(path: str, split: str) -> list[RawRow]:
    kind = os.path.splitext(path)[1].lower()
    if os.path.isdir(path):
        is_saved_set = any(os.path.exists(os.path.join(path, name)) for name in ("dataset_dict.json", "state.json"))
        return _read_set(path, split, saved=True) if is_saved_set else _read_folder(path)
    if os.path.exists(path):
        return _read_file(path)
    if re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", path) and kind not in _FILE_TYPES + _OTHER_FILE_TYPES:
        return _read_set(path, split, saved=False)
    raise UserError(f"{path}: no such file or folder (looked from {os.getcwd()}); check the path")


def _read_folder(path: str) -> list[RawRow]:
    kinds = {name: os.path.splitext(name)[1].lower() for name in sorted(os.listdir(path)) if name[0] != "."}
    if other := next((name for name, kind in kinds.items() if kind in _OTHER_FILE_TYPES), None):
        raise UserError(f"{path}: cannot read {other}, expected {one_of(_FILE_TYPES)}; convert it or move it elsewhere")
    files = [name for name, kind in kinds.items() if kind in _FILE_TYPES]
    if not files:
        raise UserError(f"{path}: no {one_of(_FILE_TYPES)} file in this folder (subfolders are not read)")
    return [replace(raw, place=f"{name} {raw.place}") for name in files for raw in _read_file(os.path.join(path, name))]


def _read_file(path: str) -> list[RawRow]:
    readers = dict(zip(_FILE_TYPES, (read_jsonl, _read_json, _read_parquet), strict=True))
    kind = os.path.splitext(path)[1].lower()
    if kind not in readers:
        raise UserError(f"{path}: cannot read file type '{kind}', expected {one_of(_FILE_TYPES)}")
    return readers[kind](path)


def read_jsonl(path: str) -> list[RawRow]:
    """The unchecked rows of a JSON Lines file; a row with invalid JSON has a problem instead of a value.

    Raises:
        UserError: the file is not UTF-8.
        OSError: the file cannot be read.
    """
    rows = []
    # Not splitlines(): JSON text may contain U+2028 and the like, which do not end a line here.
    for number, line in enumerate(_utf8(path).split("\n"), start=1):
        if not line.strip():
            continue
        value = problem = None
        try:
            value = _parse(line)
        except json.JSONDecodeError as error:
            problem = f"invalid JSON at character {error.colno}: {error.msg}"
        except (ValueError, RecursionError) as error:
            problem = f"invalid JSON: {error}"
        rows.append(RawRow(f"line {number}", f"{path}:{number}", value, problem))
    return rows


def _read_json(path: str) -> list[RawRow]:
    text = _utf8(path)
    try:
        rows = _parse(text) if text.strip() else []
    except (ValueError, RecursionError) as error:
        hint = "; if it has one row per line, name it .jsonl" if str(error).startswith("Extra data") else ""
        raise UserError(f"{path}: invalid JSON: {error}{hint}") from error
    if not isinstance(rows, list):
        raise UserError(f"{path}: found {describe_value(rows)}, expected a list of rows")
    return [RawRow(f"item {number}", f"{path}[{number}]", row) for number, row in enumerate(rows)]


def _read_parquet(path: str) -> list[RawRow]:
    import pyarrow.parquet  # type: ignore[import-untyped]

    try:
        # Not read_table(path): that would read a `key=value` folder of the path as a column.
        rows = pyarrow.parquet.ParquetFile(path).read().to_pylist()
    except (OSError, pyarrow.ArrowException) as error:
        raise UserError(f"{path}: not a readable parquet file: {one_line(error)}") from error
    return _numbered(path, rows)


def _read_set(path: str, split: str, *, saved: bool) -> list[RawRow]:
    import datasets

    try:
        rows = datasets.load_from_disk(path) if saved else datasets.load_dataset(path, split=split)
    except Exception as error:  # the network, the hub, Arrow and the file system each have their own errors
        tried = "not a readable saved data set" if saved else f"no such file, and no hub data set with split '{split}'"
        raise UserError(f"{path}: {tried}: {one_line(error)}") from error
    if isinstance(rows, datasets.DatasetDict) and split not in rows:
        raise UserError(f"{path}: no split '{split}' in this data set, expected {one_of(list(rows))}")
    return _numbered(path, rows[split] if isinstance(rows, datasets.DatasetDict) else rows)


def _numbered(name: str, rows: Iterable[Any]) -> list[RawRow]:
    return [RawRow(f"row {number}", f"{name}[{number}]", row) for number, row in enumerate(rows)]


def rows_in_memory(data: Any, split: str, as_row: Callable[[Any], Any]) -> list[RawRow]:
    """The rows of a ``datasets.Dataset`` (or of the split of a ``DatasetDict``), or of any other iterable of rows.

    Raises:
        UserError: the data is neither, or has no such split.
    """
    if isinstance(data, dict) and hasattr(data, "column_names"):  # a DatasetDict
        if split not in data:
            raise UserError(f"data: no split '{split}' in this data set, expected {one_of(list(data))}")
        data = data[split]
    if isinstance(data, dict | str | bytes) or not isinstance(data, Iterable):
        raise UserError(f"data: found {describe_value(data)}, expected a path, a list of rows or a datasets.Dataset")
    rows = list(data)
    sources = [getattr(row, "source", "") or f"data[{number}]" for number, row in enumerate(rows)]
    return [
        RawRow(f"row {number}", source, as_row(row))
        for number, (row, source) in enumerate(zip(rows, sources, strict=True))
    ]


def _utf8(path: str) -> str:
    data = Path(path).read_bytes()
    try:
        return data.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        # An error of the file, not of a row: in UTF-16, for example, lines and rows are meaningless.
        line, byte = data.count(b"\n", 0, error.start) + 1, error.start - data.rfind(b"\n", 0, error.start)
        found = f"line {line}, byte {byte} is 0x{data[error.start]:02x}"
        raise UserError(f"{path}: not UTF-8: {found}; save it as UTF-8") from error


def _parse(text: str) -> Any:
    return json.loads(text, object_pairs_hook=_object, parse_constant=_no_constant)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any] | _RepeatedKey:
    repeated = [key for key, times in Counter(key for key, _ in pairs).items() if times > 1]
    return _RepeatedKey(repeated[0]) if repeated else dict(pairs)


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON value")


def repeated_key(row: Any) -> str | None:
    """The problem if any object in the row, at any depth, has a duplicate key."""
    stack = [row]
    while stack:
        value = stack.pop()
        if isinstance(value, _RepeatedKey):
            return f"duplicate key {quoted(value)}; remove one"
        stack.extend(value.values() if isinstance(value, dict) else value if isinstance(value, list) else ())
    return None


def describe_value(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    if isinstance(value, str):
        if not value.strip():
            return "only whitespace" if value else "empty text"
        return quoted(value) + (" with a lone surrogate" if LONE_SURROGATE.search(value) else "")
    if isinstance(value, int | float):
        return f"the number {value}"
    if isinstance(value, list):
        return f"a list of {len(value)}" if value else "an empty list"
    return "an object" if isinstance(value, dict) else f"a {type(value).__name__}"


def one_of(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} or {names[-1]}"


def one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def quoted(text: str) -> str:
    return repr(text if len(text) <= 40 else text[:37] + "...")


def check_rows(
    path: str,
    rows: Iterable[RawRow],
    form_of: Callable[[Any, list[str]], str | None],
    make: Callable[[RawRow, str, int, list[str]], Made],
    whole: str,
) -> list[Made]:
    """Convert each row with ``make``, requiring one form; both callables append to a list of problems.

    Args:
        path: for the error.
        rows: the raw rows.
        form_of: returns the column that identifies a row's form, or None with a problem.
        make: converts a row, given its form and the number of rows before it.
        whole: what must have one form, ``set`` or ``file``, for the error.

    Raises:
        UserError: names the bad rows; see :func:`bad_rows`.
    """
    made: list[Made] = []
    bad: list[str] = []
    first_form = first_place = None
    for raw in rows:
        problems = [raw.problem] if raw.problem else []
        form = None if problems else form_of(raw.value, problems)
        if form and first_form is None:
            first_form, first_place = form, raw.place
        if form and form != first_form:
            problems.append(f"has '{form}' but {first_place} has '{first_form}'; use one form in the whole {whole}")
        elif form:
            made.append(make(raw, form, len(made), problems))
        if problems:
            bad.append(f"{raw.place}, {' and '.join(problems)}")
    if bad:
        raise bad_rows(path, bad)
    return made


def bad_rows(path: str, bad: Sequence[str]) -> UserError:
    """The error for the bad rows of ``path``, each given as its place and its problems."""
    return UserError(f"{path}: {'1 bad row' if len(bad) == 1 else f'{len(bad)} bad rows'}: {first_ten(bad)}")


def first_ten(found: Sequence[str]) -> str:
    """The first ten on one line, and the number of others."""
    more = f"; ... and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
    return "; ".join(found[:_SHOWN]) + more
