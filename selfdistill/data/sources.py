"""Sources: a path, the name of a hub data set or rows in memory to raw rows, of one split where there are several."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from selfdistill.data.images import undecoded
from selfdistill.data.readers import answers_as_meant, expected_types, is_data_file, is_readable, kind_of, read_file
from selfdistill.data.rows import RawRow, describe_value, first_ten, numbered, one_of
from selfdistill.errors import UserError, one_line, similar_inside

Note = Callable[[str], object]
"""What takes a note for the user, one line without its ``note:``."""

_Part = TypeVar("_Part")

_SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
"""Splits by the words in the names of files and folders that tell them, as ``datasets`` has them."""
_WORDS = {word: split for split, words in _SPLITS.items() for word in words}
_DEFAULT = "train"
"""The split of training data unless another is asked for."""
_NOT_DATA = ("dataset_info.json", "dataset_infos.json", "config.json")
"""Files that describe a data set of the hub."""
_HUB_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*|\w[\w-]*")
"""An owner's data set, or one of the few without an owner, which have no dot: that is a file."""
_SHARD = re.compile(r"(.+)-\d{5}-of-\d{5}\b.*")


BUNDLED = "bundled:"
"""What the names of the package's own files begin with, such as ``bundled:shop.test.jsonl``."""


class Split(NamedTuple):
    """Which split is read where there are several."""

    name: str | None
    """None: ``test``, or the only one."""
    advice: str
    """How to choose another, for messages."""


def packaged(name: str) -> str:
    """Path of a data file, or folder, that ships with the package."""
    return str(resources.files("selfdistill.data.bundled") / name)


def read_rows(path: str, split: Split, note: Note) -> list[RawRow]:
    """The unchecked rows of a file, a folder or a data set.

    Args:
        path: a file, a folder of files, a data set saved by ``datasets``, the name of a hub data set, or ``bundled:``
            and the name of a file of the package.
        split: see :func:`choose`; files are read in full.
        note: takes what the user should know.

    Raises:
        UserError: there is no such path, file type or split, or a file is corrupt.
        OSError: a file cannot be read.
    """
    if os.path.isdir(path):
        is_saved_set = any(os.path.exists(os.path.join(path, name)) for name in ("dataset_dict.json", "state.json"))
        return _read_set(path, split, note, saved=True) if is_saved_set else _read_folder(path, split, note)
    if os.path.exists(path):
        return read_file(path)
    if path.startswith(BUNDLED):
        place = located(path)
        rows = read_rows(place, split, note)
        return [replace(raw, source=path + raw.source.removeprefix(place)) for raw in rows]
    hint = similar_inside(path)
    if hint is None and _HUB_NAME.fullmatch(path) and not is_data_file(path):
        return _read_set(path, split, note, saved=False)
    raise UserError(f"{path}: no such file or folder (looked from {os.getcwd()}){hint or '; check the path'}")


def located(path: str) -> str:
    """Where a file or folder is: the path itself; or that in the package, for a name that begins with ``bundled:``.

    Raises:
        UserError: the package has nothing of this name.
    """
    if os.path.exists(path) or not path.startswith(BUNDLED):
        return path
    root = Path(packaged(""))
    files = [file.relative_to(root) for file in root.rglob("*") if is_data_file(file.name)]
    names = {place.as_posix() for file in files for place in (file, file.parent)} - {"."}
    name = path.removeprefix(BUNDLED)
    if name not in names:
        close = difflib.get_close_matches(name, names, 1)
        hint = f"did you mean {BUNDLED}{close[0]}?" if close else f"expected one of {', '.join(sorted(names))}"
        raise UserError(f"{path}: no such file in the package; {hint}")
    return packaged(name)


def rows_in_memory(data: Any, name: str, split: Split, note: Note, as_row: Callable[[Any], Any]) -> list[RawRow]:
    """The rows of a ``datasets.Dataset`` (or of the split of a ``DatasetDict``), or of any other iterable of rows.

    They are called ``name[0]``, ``name[1]``, ... in messages.

    Raises:
        UserError: the data is neither, or has no such split.
    """
    if isinstance(data, dict) and hasattr(data, "column_names"):  # a DatasetDict
        data = choose(name, data, split, note)
    if isinstance(data, dict | str | bytes) or not isinstance(data, Iterable):
        found = "a dict" if isinstance(data, dict) else describe_value(data)
        raise UserError(f"{name}: found {found}, expected a path, a list of rows or a datasets.Dataset")
    if hasattr(data, "columns"):  # a DataFrame, which would yield its columns
        found = type(data).__name__
        raise UserError(f"{name}: found a {found}; convert it with datasets.Dataset.from_pandas or from_polars")
    rows = []
    for number, row in enumerate(_of_set(data)):
        place, value = f"{name}[{number}]", as_row(row)
        problem = None if isinstance(value, dict) else _not_dict(value)
        rows.append(RawRow(place, getattr(row, "source", "") or place, value, problem))
    return rows


def _not_dict(value: Any) -> str:
    return f"found {describe_value(value)}, expected a dict"


def choose(path: str, splits: Mapping[str, _Part], split: Split, note: Note) -> _Part:
    """The split that was asked for, with a note if there are others.

    Args:
        path: for messages.
        splits: all splits of a data set by name.
        split: the one to read. The only split is read in place of ``test`` and ``train``, the defaults.
        note: takes what the user should know.

    Raises:
        UserError: there is no such split.
    """
    names = list(splits)
    chosen = split.name or "test"
    if chosen not in splits:  # validation may have been asked for as dev, and a test be called eval
        chosen = next((name for name in names if _WORDS.get(name) == _WORDS.get(chosen, chosen)), chosen)
    if chosen not in splits and len(names) == 1 and split.name in (None, _DEFAULT):
        if split.name is not None:
            note(f"{path}: reading the only split, {names[0]!r}")
        return splits[names[0]]
    if chosen not in splits:
        raise UserError(f"{path}: no split '{chosen}' in this data set, expected {one_of(names)} {split.advice}")
    if others := [name for name in names if name != chosen]:
        # Whoever names a split needs no advice on how to name another.
        advice = f" {split.advice}" if split.name in (None, _DEFAULT) else ""
        are = "the other split is" if len(others) == 1 else "the other splits are"
        note(f"{path}: split '{chosen}' is read; {are} {' and '.join(map(repr, others))}{advice}")
    return splits[chosen]


# --- folders ---


def _read_folder(path: str, split: Split, note: Note) -> list[RawRow]:
    files = _files(path, note)
    if not files:
        raise UserError(
            f"{path}: no {expected_types()} file in this folder, in its subfolder data, or in one named after a split"
        )
    if bad := next((file for file in files if not is_readable(file)), None):
        ending = "".join(kind_of(bad))
        raise UserError(f"{path}: cannot read {bad} ({ending}), expected {expected_types()}; convert it or move it")
    by_split: dict[str, list[str]] = {}
    for file in files:
        by_split.setdefault(_split_of(file) or "", []).append(file)
    unnamed = by_split.pop("", [])
    if by_split and unnamed:
        advice = f"name it like train-{os.path.basename(unnamed[0])}, or move it elsewhere"
        raise UserError(f"{path}: {unnamed[0]} is in no split, and others are in {one_of(sorted(by_split))}; {advice}")
    if by_split:
        files = choose(path, by_split, split, note)
    elif len(files) > 1:
        note(f"{path}: {len(files)} files are read as one data set: {first_ten(files)}")
    return [replace(raw, place=f"{file} {raw.place}") for file in files for raw in read_file(os.path.join(path, file))]


def _files(path: str, note: Note) -> list[str]:
    """The data files of a folder, of ``data`` in it and of folders named after a split, by their relative paths."""
    found, passed_over = [], []
    folders = [""]
    for folder in folders:
        for name in sorted(os.listdir(os.path.join(path, folder))):
            relative = os.path.join(folder, name)
            if name.startswith("."):
                continue
            if not os.path.isdir(os.path.join(path, relative)):
                found += [relative] if _is_row_file(name) else []
            elif (name == "data" and not folder) or _split_in(name):
                folders.append(relative)
            elif _holds_rows(os.path.join(path, relative)):
                passed_over.append(relative)
    if passed_over:
        note(f"{path}: folders not read: {', '.join(passed_over)}")
    return found


def _is_row_file(name: str) -> bool:
    """Whether a file of this name holds rows, hidden files aside."""
    return is_data_file(name) and not name.startswith(".") and name not in _NOT_DATA


def _holds_rows(folder: str) -> bool:
    """Whether a file with rows is in the folder or below it, hidden folders aside."""
    for _, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        if any(map(_is_row_file, names)):
            return True
    return False


def _split_of(file: str) -> str | None:
    """The split that a file's name tells or, if it does not, that of its folder; None if neither does."""
    *folders, name = file.split(os.sep)
    shard = _SHARD.fullmatch(name)
    if shard and _split_in(shard[1]):
        return _WORDS.get(shard[1], shard[1])
    return next(filter(None, map(_split_in, (name, *reversed(folders)))), None)


def _split_in(name: str) -> str | None:
    """The split of which a word stands in the name; None if there is none, or more than one.

    Words end at signs, digits and capitals, and may go on with ``set`` or ``data``: ``my_test``, ``myTest``,
    ``testset``.
    """
    words = [word.lower() for word in re.findall("[A-Z]?[a-z]+|[A-Z]+(?![a-z])", name)]
    found = {_WORDS[base] for word in words if (base := re.sub("(set|data)$", "", word)) in _WORDS}
    return found.pop() if len(found) == 1 else None


# --- data sets ---


def _read_set(path: str, split: Split, note: Note, *, saved: bool) -> list[RawRow]:
    import datasets

    # An expression such as train[:100] is for the hub alone; it is not the name of a split.
    asked = {"split": split.name} if split.name and re.search(r"[\[+]", split.name) else {}
    try:
        rows = datasets.load_from_disk(path) if saved else datasets.load_dataset(path, **asked)
    except Exception as error:  # the network, the hub, Arrow and the file system each have their own errors
        if "OfflineModeIsEnabled" in str(error):
            raise UserError(
                f"{path}: no such file, and the hub was not asked for a data set, because offline mode "
                "(HF_HUB_OFFLINE) is on"
            ) from None
        tried = "not a readable saved data set" if saved else "no such file, and no readable hub data set"
        several = "Config name is missing" in str(error)
        todo = (
            "; load one configuration with datasets, write it with save_to_disk and give that folder" if several else ""
        )
        raise UserError(f"{path}: {tried}: {one_line(error)}{todo}") from error
    if isinstance(rows, datasets.DatasetDict):
        rows = choose(path, rows, split, note)
    if rows.info.builder_name == "csv":
        note(
            f"{path}: datasets read it from CSV, so 007 became 7, and NA became null; to keep cells unchanged, give "
            "the file itself"
        )
    folder = path if saved else ""
    return [replace(raw, folder=folder) for raw in numbered(path, _of_set(rows))]


def _of_set(rows: Any) -> Iterable[Any]:
    """The rows of a ``datasets.Dataset``: its media are not decoded, and answers are what they mean; any others."""
    if not getattr(rows, "features", None) or not hasattr(rows, "cast_column"):
        return rows
    answer = rows.features.get("answer")
    return answers_as_meant(undecoded(rows), getattr(answer, "dtype", ""), getattr(answer, "names", ()))
