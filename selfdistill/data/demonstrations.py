"""Demonstrations: validated rows of a file, folder or data set, each as a small dataclass.

Columns have TRL's names: ``prompt`` and ``completion``, or ``messages``. One error names all bad rows; nothing is
dropped, truncated or repaired; results of parallel calls are put in the order of the calls. Whether a row has what a
method uses is the method's to check.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, get_args

from selfdistill.data.call_results import notes_on_calls
from selfdistill.data.columns import COLUMNS, is_empty, misnamed, misnamed_in, missing, notes_on_unread, refused
from selfdistill.data.images import Picture, in_order, in_parts, marked, pictures_of, refuse_late, saved
from selfdistill.data.messages import (
    LearntTurns,
    Message,
    as_written,
    chat_of,
    check_json,
    check_order,
    first_learnt,
    messages_of,
    not_object,
    notes_on_earlier_replies,
    replies_of,
    text_of,
    text_of_reply,
    uses_tools,
    wrong,
)
from selfdistill.data.rows import RawRow, check_rows, first_three, join_surrogates, one_of, repeated_key
from selfdistill.data.sources import Note, Split, read_rows, rows_in_memory
from selfdistill.data.template_columns import template_kwargs_of, tools_of
from selfdistill.errors import UserError


@dataclass(frozen=True)
class Demonstration:
    """A prompt with its demonstrated completion, and extra information for the teacher or scorer."""

    prompt: tuple[Message, ...]
    """Chat messages up to and including the last user turn. A string becomes one user turn."""
    completion: str = ""
    """The demonstrated reply, of an episode the last one, with its calls as text; empty if there is none."""
    document: str | None = None
    """Text that the teacher reads first."""
    privileged_context: str | None = None
    """What the teacher sees in place of the completion."""
    answer: Any = None
    """What a scorer compares the reply with; default: the completion."""
    scorer: str | None = None
    """Name of the scorer for this row; default: the command's setting, else :func:`.scorers.default_scorer`'s."""
    row: int = 0
    """Position in the whole set, from 0; part of every sample's seed."""
    source: str = ""
    """Location for messages: ``train.jsonl:12`` (line, from 1), or ``name[12]`` for data sets (row, from 0). What
    is not UTF-8 in a file's name is U+FFFD."""
    tools: list[dict[str, Any]] | None = None
    """JSON schemas of the tools that the chat template shows."""
    chat_template_kwargs: dict[str, Any] | None = None
    """Further arguments of the chat template for this row, over the setting's."""
    episode: tuple[Message, ...] = ()
    """The messages after the prompt, where there are several replies to learn or the one calls tools; the first and the
    last are the assistant's. Empty for a reply of text alone."""
    images: tuple[Picture, ...] = ()
    """The prompt's pictures; in its texts a mark stands for each."""
    turn_of: Demonstration | None = None
    """The row of which this is one turn; see :func:`selfdistill.data.encode`."""

    def __post_init__(self) -> None:
        prompt: Any = self.prompt
        turns = ({"role": "user", "content": prompt},) if isinstance(prompt, str) else tuple(prompt)
        object.__setattr__(self, "prompt", turns)
        object.__setattr__(self, "source", join_surrogates(self.source))

    def identity(self) -> dict[str, Any]:
        """What fingerprints hash: all fields except the source, in the key order of older folders.

        Fields that older folders did not know are left out where they are not set.
        """
        values = {**asdict(replace(self, turn_of=None, images=())), "source": ""}
        del values["turn_of"]
        values["images"] = [picture.digest for picture in self.images] or None
        newer = {name: values.pop(name) for name in ("tools", "chat_template_kwargs", "episode", "images")}
        first = {"row": values.pop("row"), "source": values.pop("source")}
        return {**first, **values, **{name: value for name, value in newer.items() if value not in (None, ())}}

    @property
    def template_options(self) -> dict[str, Any]:
        """The row's own arguments of the chat template."""
        return {**({} if self.tools is None else {"tools": self.tools}), **(self.chat_template_kwargs or {})}

    @property
    def has_reference(self) -> bool:
        """Whether a scorer can compare a reply with something."""
        return bool(self.completion) or self.answer is not None

    @property
    def has_demonstration(self) -> bool:
        """Whether there is something to show the teacher."""
        return bool(self.completion) or self.privileged_context is not None

    @property
    def shown(self) -> str:
        """What the teacher is shown: ``privileged_context`` if given, else the completion.

        Raises:
            UserError: the row has neither.
        """
        if not self.has_demonstration:
            raise UserError(f"{self.source}: neither completion nor privileged_context to show the teacher; add one")
        return self.completion if self.privileged_context is None else self.privileged_context


SCORER_NAMES = ("exact", "contains", "choice", "regex", "tool_call")
"""Valid values of the column ``scorer``; :mod:`selfdistill.data.comparisons` has one function for each."""

CODE = "code"
"""The setting with which replies are run against the tests in ``answer``; not a valid value of the column."""

_TAUGHT = ("completion", "answer", "privileged_context")
_WANT_CHAT = "text or a list of messages"


Rows = str | Path | Sequence[Mapping[str, Any]] | Sequence[Demonstration] | Any
"""Where demonstrations come from: a path or hub name, dicts, :class:`Demonstration`s, or a ``datasets.Dataset``."""


Lacks = Callable[[Demonstration], str | None]
"""The problem of a row that lacks what it is used for, such as a completion to learn from; None if it lacks nothing."""


def load_demonstrations(
    data: Rows,
    *,
    split: str | None = "train",
    split_advice: str | None = None,
    note: Note | None = None,
    lacks: Lacks | None = None,
    turns: LearntTurns = "auto",
    prompts_only: bool = False,
    name: str = "data",
) -> list[Demonstration]:
    """Read and validate every row of ``data``, in order.

    Args:
        data: a ``.jsonl``, ``.json`` (a list of rows), ``.csv``, ``.tsv`` or ``.parquet`` file, the text also packed as
            ``.gz`` or ``.zst``; a folder of such files, read in name order; a folder written by ``datasets``
            ``save_to_disk``; if there is no such path, the name of a hub data set, or of a file of the package as in
            ``bundled:shop.test.jsonl``; or in-memory rows: dicts, demonstrations, a ``datasets.Dataset``.
        split: split of a folder or data set with several; None: ``test``, or the only one. Files and a single
            ``Dataset`` are read in full. A folder has splits if the names of its files, or of folders in it, say so,
            as in ``test.jsonl`` or ``data/test-00000-of-00001.parquet``.
        split_advice: how to choose another split, for messages; default: by the setting ``split`` or ``test_split``.
        note: takes what the user should know, a line each: columns that are not used, equal prompts with unlike
            answers, calls that do not fit the tools or have no results, other splits.
        lacks: what else a row must have; see :data:`Lacks`.
        turns: which assistant turns are learnt: ``last``; ``all`` after the prompt, which of ``messages`` is what comes
            before the first; ``auto``: all of a row with tool calls or tool turns or with several in its completion.
        prompts_only: only the prompts are used, so messages ask for no completion.
        name: of in-memory rows in messages, as in ``data[0]``.

    A row has ``prompt`` and ``completion`` (each text or chat messages, the completion one assistant message or an
    episode that begins and ends with one), or ``messages``, whose last turn is the assistant's demonstration. Messages
    may be their JSON text. Null counts as absent. All rows have the same form.

    Raises:
        UserError: the data cannot be read or has no rows; an unknown ``turns``; or rows are invalid.
    """
    if turns not in get_args(LearntTurns):
        raise UserError(f"turns {turns!r}: expected {one_of(get_args(LearntTurns))}")
    said = note or _nobody
    chosen = Split(split, split_advice or f"(setting {'test_split' if split is None else 'split'!r})")
    try:
        if isinstance(data, str | os.PathLike):
            name = os.fspath(data)
            rows = read_rows(name, chosen, said)
        else:
            rows = rows_in_memory(data, name, chosen, said, as_row)
    except OSError as error:
        raise UserError(f"{error.filename or name}: cannot be read: {error.strerror}") from error
    if not rows:
        raise UserError(f"{name}: no rows, expected at least one")

    def make(raw: RawRow, form: str, number: int, problems: list[str]) -> Demonstration:
        pictures = pictures_of(raw.value, raw.folder, problems)
        made = _demonstration(raw, number, form, prompts_only, turns, pictures, problems)
        if lacks and not problems:
            problems += filter(None, [_of_form(lacks(made), form, made, raw.value)])
        return made

    made = check_rows(name, rows, partial(_form, prompts_only), make, "set")
    if note:
        unread = notes_on_unread([raw.value for raw in rows], _TAUGHT if prompts_only else ())
        calls = notes_on_calls([(row.source, (*row.prompt, *row.episode), row.tools) for row in made])
        asked = [without_answer(row) for row in made] if prompts_only else made
        several = turns == "auto" and not prompts_only
        shown = [row.prompt if several and row.completion and not row.episode else () for row in made]
        earlier = notes_on_earlier_replies([raw.value for raw in rows], shown)
        for found in [*unread, *notes_on_repeated(asked), *calls, *earlier]:
            note(f"{name}: {found}")
    return made


def without_answer(demonstration: Demonstration) -> Demonstration:
    """Its prompt alone, with what the chat template shows beside it."""
    return replace(demonstration, completion="", privileged_context=None, answer=None, episode=())


def _of_form(problem: str | None, form: str, made: Demonstration, row: Mapping[str, Any]) -> str | None:
    """The problem of what a row lacks; rows of ``messages`` have no completion where they end with somebody else."""
    if problem is None or form != "messages":
        return problem and (misnamed_in(problem, row) or problem)
    ends = f"column 'messages': {_end_of(made.prompt)}, expected an assistant turn"
    return problem.replace("column 'completion': missing", ends, 1)


def _end_of(turns: Sequence[Message]) -> str:
    role = turns[-1]["role"]
    return f"ends with {'an' if role == 'assistant' else 'a'} {role} turn"


def nothing_to_show(demonstration: Demonstration) -> str | None:
    """The problem of a row that has nothing to show a teacher; see :data:`Lacks`."""
    if demonstration.has_demonstration or demonstration.document is not None:
        return None
    return "column 'completion': missing, and no 'privileged_context' or 'document' to show the teacher instead"


def _nobody(_note: str) -> None:
    """Takes notes that nobody asked for."""


def notes_on_repeated(demonstrations: Sequence[Demonstration]) -> list[str]:
    """Notes about rows that are equal, and about equal prompts whose answers differ."""
    same: list[str] = []
    unlike: list[str] = []
    seen: dict[str, dict[str, str]] = {}  # the source of each first row, by its prompt and by all of it
    for demonstration in demonstrations:
        asked = json.dumps([demonstration.prompt, demonstration.document, demonstration.template_options])
        reply = demonstration.episode or demonstration.completion
        told = json.dumps([reply, demonstration.privileged_context, demonstration.answer])
        before = seen.setdefault(asked, {})
        if told in before:
            same.append(f"{before[told]} and {demonstration.source}")
        elif before:
            unlike.append(f"{next(iter(before.values()))} and {demonstration.source}")
        before.setdefault(told, demonstration.source)
    notes = []
    if same:
        notes.append(f"{_rows(same)} an earlier one ({first_three(same)})")
    if unlike:
        rest = "completion, answer and privileged_context"
        notes.append(f"{_rows(unlike)} the prompt of an earlier one, but not its {rest} ({first_three(unlike)})")
    return notes


def _rows(found: Sequence[str]) -> str:
    return "1 row repeats" if len(found) == 1 else f"{len(found)} rows repeat"


def write_demonstrations(path: Path, demonstrations: Sequence[Demonstration], *, copy_pictures: bool = False) -> None:
    """Write a JSON Lines file that :func:`load_demonstrations` reads back equal except for ``row`` and ``source``.

    Pictures that are no files are written beside it, with ``copy_pictures`` all, so that the folder can be moved.
    """
    pictures = [saved(row.images, path.parent, copy_pictures) for row in demonstrations]
    rows = [
        as_row(row) | ({"images": paths} if paths else {}) for row, paths in zip(demonstrations, pictures, strict=True)
    ]
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_text(text, encoding="utf-8")


def as_row(row: Any) -> Any:
    """A demonstration as a row that holds its columns; anything else as it is."""
    if not isinstance(row, Demonstration):
        return row
    values = {name: getattr(row, name) for name in COLUMNS if name not in ("messages", "image")}
    values["prompt"] = [as_written({**turn, "content": in_parts(turn["content"], row.images)}) for turn in row.prompt]
    if row.episode:
        values["completion"] = [as_written(turn) for turn in row.episode]
    return {name: value for name, value in values.items() if value not in (None, "", ())}


# --- validation; each function appends to `problems` ---


def _form(prompts_only: bool, row: Any, problems: list[str]) -> str | None:
    """The column that holds the row's chat, ``prompt`` or ``messages``; None, with a problem, if there is not one."""
    prompt, comma = ("'prompt'", "") if prompts_only else ("'prompt' with 'completion'", ",")
    if repeated := repeated_key(row):
        problems.append(repeated)
    elif not isinstance(row, dict):
        problems.append(not_object(row))
    elif row.get("messages") is not None:
        other = next((name for name in ("prompt", "completion") if row.get(name) is not None), None)
        if other is None:
            return "messages"
        problems.append(f"has '{other}' and 'messages', expected either 'messages' or {prompt}")
    elif row.get("prompt") is not None:
        return "prompt"
    elif "prompt" in row:
        problems.append(wrong("prompt", None, _WANT_CHAT))
    elif "messages" in row:
        problems.append(wrong("messages", None, "a list of messages"))
    else:
        problems.append(missing(row, "prompt", "messages", want=f"expected {prompt}{comma} or 'messages'"))
        if row.get("completion") is None and not prompts_only:
            problems += filter(None, [misnamed(row, *_TAUGHT)])
    return None


def _demonstration(
    raw: RawRow,
    number: int,
    form: str,
    prompts_only: bool,
    learnt: LearntTurns,
    pictures: Sequence[Picture],
    problems: list[str],
) -> Demonstration:
    """The row as a demonstration; invalid if there are problems."""
    row: dict[str, Any] = raw.value
    if prompts_only and is_empty(row.get("completion")):
        row = {**row, "completion": None}
    others = {name: row.get(name) for name in ("document", "privileged_context", "answer", "scorer")}
    chat = marked(chat_of(row[form], form, problems), form, pictures, problems)
    turns, replies = _prompt_and_replies(row, form, chat, learnt, problems)
    if not problems and (not turns or turns[-1]["role"] not in ("user", "tool")):
        found = _end_of(turns) if turns else "is empty"
        problems.append(f"column '{form}': the prompt {found}, expected it to end with a user turn")
    check_order(replies, form, problems)
    refuse_late(replies, form, problems)
    problems += refused(row)
    has_answer = prompts_only or replies or any(value is not None for value in others.values())
    if not problems and not has_answer:
        # A prompt alone may be meant, but hardly where another column has a familiar name.
        problems += filter(None, [misnamed(row, *_TAUGHT)])
    _check_others(others, problems)
    is_text = len(replies) < 2 and not uses_tools(replies)
    return Demonstration(
        tuple(turns),
        text_of_reply(replies[-1]) if replies and not problems else "",
        **others,
        row=number,
        source=raw.source,
        tools=tools_of(row.get("tools"), problems),
        chat_template_kwargs=template_kwargs_of(row.get("chat_template_kwargs"), problems),
        episode=() if is_text else tuple(replies),
        images=in_order(pictures, turns),
    )


def _prompt_and_replies(
    row: dict[str, Any], form: str, chat: Any, learnt: LearntTurns, problems: list[str]
) -> tuple[list[Message], list[Message]]:
    """The turns up to the one that is answered, and the replies that are learnt; ``chat`` is the column ``form``."""
    if form == "messages":
        turns = messages_of(chat, form, problems) if isinstance(chat, list) or not problems else []
        if turns and turns[-1]["role"] == "assistant":
            first = first_learnt(turns, learnt)
            return turns[:first], turns[first:]
        return turns, []
    if isinstance(row["prompt"], str) and isinstance(chat, list):  # then the completion may be such a text, too
        row = {**row, "completion": chat_of(row.get("completion"), "completion", problems)}
    replies = replies_of(row, problems)
    if isinstance(chat, list):
        turns = messages_of(chat, form, problems)
    else:
        turns = [{"role": "user", "content": text_of(chat, form, _WANT_CHAT, problems)}]
    return ([*turns, *replies[:-1]], replies[-1:]) if learnt == "last" else (turns, replies)


def _check_others(others: dict[str, Any], problems: list[str]) -> None:
    check_json(others["answer"], "answer", problems)
    if isinstance(others["answer"], str) and not others["answer"].strip():
        problems.append(wrong("answer", others["answer"], "a value or null"))
    for name in ("document", "privileged_context"):
        if others[name] is not None:
            text_of(others[name], name, "text or null", problems)
    if others["scorer"] == CODE:
        problems.append(
            f"column 'scorer': {CODE!r} runs code that a model writes, so only the setting may name it; leave it out "
            f"and give scorer {CODE}"
        )
    elif others["scorer"] is not None and others["scorer"] not in SCORER_NAMES:
        problems.append(wrong("scorer", others["scorer"], one_of(SCORER_NAMES)))
