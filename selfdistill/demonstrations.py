"""Demonstrations: rows of a file, folder or data set, all checked, each as one small dataclass.

Columns are named as in TRL: ``prompt`` and ``completion``, or ``messages``. Bad rows are named in one error; nothing is
dropped, cut or repaired. Columns that are not listed in :data:`COLUMNS` are ignored.
"""

from __future__ import annotations

import difflib
import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from selfdistill.errors import UserError

Message = dict[str, str]
"""One chat message: ``{"role": "system" | "user" | "assistant", "content": text}``."""


@dataclass(frozen=True)
class Demonstration:
    """One prompt with its demonstrated completion, and what the teacher or a scorer may use."""

    row: int
    """Position in the whole set, from 0; part of every sample's seed."""
    source: str
    """Where it stands, for messages: ``train.jsonl:12`` (line from 1), or ``name[12]`` for data sets (row from 0)."""
    prompt: tuple[Message, ...]
    """Chat messages up to and including the last user turn. A string prompt is one user turn."""
    completion: str
    """The demonstrated reply; empty where the file has none and none was required."""
    document: str | None = None
    """Text that the teacher reads first."""
    privileged_context: str | None = None
    """What the teacher sees instead of the demonstration."""
    answer: Any = None
    """What a scorer compares with; the completion where absent."""
    scorer: str | None = None
    """Name of the scorer for this row; the command's setting or ``exact`` where absent."""

    @property
    def shown(self) -> str:
        """What the teacher is shown: ``privileged_context`` where given, else the completion."""
        return self.completion if self.privileged_context is None else self.privileged_context


SCORER_NAMES = ("exact", "contains", "choice", "regex", "tool_call")
"""Names that column ``scorer`` may hold; :mod:`selfdistill.scorers` has one function for each."""

COLUMNS = ("prompt", "completion", "messages", "document", "privileged_context", "answer", "scorer")
"""Columns that are read."""

_FILE_TYPES = (".jsonl", ".json", ".parquet")
# In a folder these hold rows that would go missing without a word; as a path they are a file, not a hub name.
_OTHER_FILE_TYPES = (".csv", ".tsv", ".arrow", ".gz", ".zip", ".zst")
_ROLES = ("system", "user", "assistant")
_SHOWN = 10
_LONE_SURROGATE = re.compile("[\ud800-\udfff]")  # JSON can write it, UTF-8 and so no tokenizer can

# Other projects' names for a column, suggested when the column is missing; misspellings are found by difflib.
_OTHER_NAMES = {
    "prompt": ("question", "instruction", "input", "query"),
    "messages": ("conversation", "conversations", "chat", "dialogue"),
    "completion": ("response", "output", "reply", "target", "chosen"),
    "answer": ("gold", "label", "solution", "ground_truth"),
}
_WANT_CHAT = "text or a list of messages"
_WANT_COMPLETION = "text or one assistant message"


def load_demonstrations(path: str, *, completion_required: bool = True, split: str = "train") -> list[Demonstration]:
    """Read and check every row of ``path``, in order.

    ``path`` is a ``.jsonl``, ``.json`` (a list of rows) or ``.parquet`` file; a folder of such files, read in order of
    name and without its subfolders; a folder written by ``datasets`` ``save_to_disk``; or, where nothing of that name
    exists here, the name of a hub data set. ``split`` picks the split of a saved ``DatasetDict`` or a hub data set;
    files and a saved ``Dataset`` have no splits and are read whole.

    A row has ``prompt`` and ``completion`` (each text or chat messages, the completion exactly one assistant message),
    or ``messages``, whose last turn is the assistant's demonstration. Without ``completion_required`` a row may have
    ``answer`` in place of the completion, which is then "". Null stands for absent.

    Raises :class:`UserError` where the path cannot be read or has no rows, and one that names the first ten bad rows
    and the number of all of them where rows are not as above or do not all have the same form.
    """
    demonstrations: list[Demonstration] = []
    bad: list[str] = []
    first_form = first_place = None
    try:
        rows = _read(path, split)
    except OSError as error:
        raise UserError(f"{error.filename or path}: cannot be read: {error.strerror}") from error
    if not rows:
        raise UserError(f"{path}: no rows, want at least one")
    for raw in rows:
        problems = [raw.problem] if raw.problem else []
        form = None if problems else _form(raw.value, problems)
        if form and first_form is None:
            first_form, first_place = form, raw.place
        if form and form != first_form:
            problems.append(f"has '{form}' where {first_place} has '{first_form}', want one form in the whole set")
        elif form:
            demonstrations.append(_demonstration(raw, len(demonstrations), form, completion_required, problems))
        if problems:
            bad.append(f"{raw.place}, {' and '.join(problems)}")
    if bad:
        raise bad_rows(path, bad)
    return demonstrations


def bad_rows(path: str, bad: Sequence[str]) -> UserError:
    """The error for the bad rows of ``path``, each given as its place and what is wrong with it."""
    return UserError(f"{path}: {'1 bad row' if len(bad) == 1 else f'{len(bad)} bad rows'}: {first_ten(bad)}")


def first_ten(found: Sequence[str]) -> str:
    """The first ten in one line, and the number of the others."""
    more = f"; ... and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
    return "; ".join(found[:_SHOWN]) + more


@dataclass(frozen=True)
class RawRow:
    """One row before it is checked: its place within the path (``line 3``), and why it has no value.

    An object with a key that stands twice is found by :func:`repeated_key` only.
    """

    place: str
    source: str
    value: Any = None
    problem: str | None = None


class _RepeatedKey(str):
    """A key that stands twice in a JSON object; takes the object's place so that its row can be named."""


# --- reading ---


def _read(path: str, split: str) -> list[RawRow]:
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
        raise UserError(f"{path}: cannot read {other}, want {_one_of(_FILE_TYPES)}; convert it or move it elsewhere")
    files = [name for name, kind in kinds.items() if kind in _FILE_TYPES]
    if not files:
        raise UserError(f"{path}: no {_one_of(_FILE_TYPES)} file in this folder (subfolders are not read)")
    return [replace(raw, place=f"{name} {raw.place}") for name in files for raw in _read_file(os.path.join(path, name))]


def _read_file(path: str) -> list[RawRow]:
    readers = dict(zip(_FILE_TYPES, (read_jsonl, _read_json, _read_parquet), strict=True))
    kind = os.path.splitext(path)[1].lower()
    if kind not in readers:
        raise UserError(f"{path}: cannot read file type '{kind}', want {_one_of(_FILE_TYPES)}")
    return readers[kind](path)


def read_jsonl(path: str) -> list[RawRow]:
    """The rows of a JSON Lines file, unchecked; one that is no JSON has a problem in place of a value.

    Raises :class:`UserError` where the file is not UTF-8, and OSError where it cannot be read.
    """
    rows = []
    # Not splitlines(): JSON text may hold U+2028 and the like, which are no line ends here.
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
        hint = "; one row a line belongs in a .jsonl file" if str(error).startswith("Extra data") else ""
        raise UserError(f"{path}: invalid JSON: {error}{hint}") from error
    if not isinstance(rows, list):
        raise UserError(f"{path}: found {_found(rows)}, want a list of rows")
    return [RawRow(f"item {number}", f"{path}[{number}]", row) for number, row in enumerate(rows)]


def _read_parquet(path: str) -> list[RawRow]:
    import pyarrow.parquet  # type: ignore[import-untyped]

    try:
        # Not read_table(path): that would read a `key=value` folder of the path as a column.
        rows = pyarrow.parquet.ParquetFile(path).read().to_pylist()
    except (OSError, pyarrow.ArrowException) as error:
        raise UserError(f"{path}: not a readable parquet file: {_one_line(error)}") from error
    return _numbered(path, rows)


def _read_set(path: str, split: str, *, saved: bool) -> list[RawRow]:
    import datasets

    try:
        rows = datasets.load_from_disk(path) if saved else datasets.load_dataset(path, split=split)
    except Exception as error:  # the network, the hub, arrow and the file system each raise errors of their own
        tried = "not a readable saved data set" if saved else f"no such file, and no hub data set with split '{split}'"
        raise UserError(f"{path}: {tried}: {_one_line(error)}") from error
    if isinstance(rows, datasets.DatasetDict) and split not in rows:
        raise UserError(f"{path}: no split '{split}' in this data set, want {_one_of(list(rows))}")
    return _numbered(path, rows[split] if isinstance(rows, datasets.DatasetDict) else rows)


def _numbered(name: str, rows: Iterable[Any]) -> list[RawRow]:
    return [RawRow(f"row {number}", f"{name}[{number}]", row) for number, row in enumerate(rows)]


def _utf8(path: str) -> str:
    data = Path(path).read_bytes()
    try:
        return data.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        # Of the file, not of a row: after the first wrong byte of, say, UTF-16 neither lines nor rows mean anything.
        line, byte = data.count(b"\n", 0, error.start) + 1, error.start - data.rfind(b"\n", 0, error.start)
        found = f"line {line}, byte {byte} of the line is 0x{data[error.start]:02x}"
        raise UserError(f"{path}: not UTF-8: {found}; save it as UTF-8") from error


def _parse(text: str) -> Any:
    return json.loads(text, object_pairs_hook=_object, parse_constant=_no_constant)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any] | _RepeatedKey:
    repeated = [key for key, times in Counter(key for key, _ in pairs).items() if times > 1]
    return _RepeatedKey(repeated[0]) if repeated else dict(pairs)


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON value")


# --- checking; each function adds what it finds to `problems` ---


def _form(row: Any, problems: list[str]) -> str | None:
    """``prompt`` or ``messages``: the column that holds the row's chat; None with a problem where that is not clear."""
    if repeated := repeated_key(row):
        problems.append(repeated)
    elif not isinstance(row, dict):
        problems.append(not_object(row))
    elif row.get("messages") is not None:
        other = next((name for name in ("prompt", "completion") if row.get(name) is not None), None)
        if other is None:
            return "messages"
        problems.append(f"has '{other}' and 'messages', want 'messages' alone or 'prompt' with 'completion'")
    elif row.get("prompt") is not None:
        return "prompt"
    elif "prompt" in row:
        problems.append(wrong("prompt", None, _WANT_CHAT))
    elif "messages" in row:
        problems.append(wrong("messages", None, "a list of messages"))
    else:
        problems.append(_missing(row, "prompt", "messages", want="want 'prompt' with 'completion', or 'messages'"))
    return None


def repeated_key(row: Any) -> str | None:
    """A problem where a key stands twice in an object of the row, at any depth."""
    stack = [row]
    while stack:
        value = stack.pop()
        if isinstance(value, _RepeatedKey):
            return f"key {_quoted(value)} stands twice in one object, want it once"
        stack.extend(value.values() if isinstance(value, dict) else value if isinstance(value, list) else ())
    return None


def _demonstration(
    raw: RawRow, number: int, form: str, completion_required: bool, problems: list[str]
) -> Demonstration:
    """The row as a demonstration, to be thrown away where there are problems."""
    row: dict[str, Any] = raw.value
    others = {name: row.get(name) for name in ("document", "privileged_context", "answer", "scorer")}
    completion = _completion(row, completion_required, problems) if form == "prompt" else ""
    if form == "prompt" and not isinstance(row["prompt"], list):
        turns = [{"role": "user", "content": text_of(row["prompt"], "prompt", _WANT_CHAT, problems)}]
    else:
        turns = _messages(row[form], form, problems)
    if turns and form == "messages" and turns[-1]["role"] == "assistant":
        completion = turns.pop()["content"]
    elif turns and form == "messages" and completion_required:
        problems.append(f"column 'messages': ends with the {turns[-1]['role']}, want the assistant's demonstration")
    if not problems and (not turns or turns[-1]["role"] != "user"):
        found = f"ends with the {turns[-1]['role']}" if turns else "is empty"
        problems.append(f"column '{form}': the prompt {found}, want the user's turn at its end")
    if not problems and not completion and others["answer"] is None:
        problems.append(_missing(row, "completion", "answer", want="want it or 'answer'"))
    if isinstance(others["answer"], str) and not others["answer"].strip():
        problems.append(wrong("answer", others["answer"], "a value or null"))
    for name in ("document", "privileged_context"):
        if others[name] is not None:
            text_of(others[name], name, "text or null", problems)
    if others["scorer"] is not None and others["scorer"] not in SCORER_NAMES:
        problems.append(wrong("scorer", others["scorer"], _one_of(SCORER_NAMES)))
    return Demonstration(number, raw.source, tuple(turns), completion, **others)


def _completion(row: dict[str, Any], required: bool, problems: list[str]) -> str:
    value = row.get("completion")
    if value is None and not (required and "completion" in row):
        if required:
            problems.append(_missing(row, "completion", want=f"want {_WANT_COMPLETION}"))
        return ""
    if not isinstance(value, list) or not value:
        return text_of(value, "completion", _WANT_COMPLETION, problems)
    turns = _messages(value, "completion", problems)
    roles = [turn["role"] for turn in turns]
    if turns and roles != ["assistant"]:
        problems.append(f"column 'completion': found messages of {', '.join(roles)}, want one assistant message")
    return turns[0]["content"] if turns else ""


def _messages(value: Any, column: str, problems: list[str]) -> list[Message]:
    """The list's messages with role and content only; none where any of them is wrong."""
    if not isinstance(value, list) or not value:
        problems.append(wrong(column, value, "a list of messages"))
        return []
    before = len(problems)
    turns: list[Message] = []
    for number, message in enumerate(value):
        at = f"{column}[{number}]"
        if not isinstance(message, dict):
            problems.append(wrong(at, message, "an object with role and content"))
            continue
        role = message.get("role")
        if role == "tool":
            problems.append(f"column '{at}.role': found 'tool', which is not supported, want {_one_of(_ROLES)}")
        elif role not in _ROLES:
            problems.append(wrong(f"{at}.role", role, _one_of(_ROLES)))
        elif role == "system" and number:
            problems.append(f"column '{at}.role': found 'system', want it in the first message only")
        text = text_of(message.get("content"), f"{at}.content", "text", problems)
        # Null is what arrow writes for a key that other messages have. Anything else would be lost without a word.
        others = [key for key in message if key not in ("role", "content") and message[key] is not None]
        if others:
            problems.append(f"column '{at}': found key {_quoted(others[0])}, want role and content only")
        turns.append({"role": str(role), "content": text})
    return turns if len(problems) == before else []


def text_of(value: Any, column: str, want: str, problems: list[str]) -> str:
    """The value where it is text that is not blank; else "" and a problem more."""
    if isinstance(value, str) and value.strip() and not _LONE_SURROGATE.search(value):
        return value
    problems.append(wrong(column, value, want))
    return ""


# --- wording ---


def wrong(column: str, value: Any, want: str) -> str:
    """The problem of a column: what was found there and what is wanted."""
    return f"column '{column}': found {_found(value)}, want {want}"


def not_object(row: Any) -> str:
    """The problem of a row that is no object."""
    return f"found {_found(row)}, want an object"


def _found(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    if isinstance(value, str):
        if not value.strip():
            return "white space only" if value else "empty text"
        return _quoted(value) + (" with half of a surrogate pair" if _LONE_SURROGATE.search(value) else "")
    if isinstance(value, int | float):
        return f"the number {value}"
    if isinstance(value, list):
        return f"a list of {len(value)}" if value else "an empty list"
    return "an object" if isinstance(value, dict) else f"a {type(value).__name__}"


def _missing(row: dict[str, Any], *names: str, want: str) -> str:
    """That the first of ``names`` is missing, with the column that looks like one of them, else what is wanted."""
    for name in names:
        for column in row:
            close = difflib.get_close_matches(column.lower(), [name], cutoff=0.9)
            if column not in COLUMNS and (close or column.lower() in _OTHER_NAMES[name]):
                return f"column '{names[0]}': missing, found {_quoted(column)}: rename it to '{name}'"
    return f"column '{names[0]}': missing, {want}"


def _quoted(text: str) -> str:
    return repr(text if len(text) <= 40 else text[:37] + "...")


def _one_of(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} or {names[-1]}"


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
