"""Encode demonstrations as token ids, as the student and the teacher see them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from selfdistill.data.chat_format import ChatFormat
from selfdistill.data.contexts import Context
from selfdistill.data.demonstrations import Demonstration
from selfdistill.errors import UserError


@dataclass(frozen=True)
class Example:
    """A demonstration as token ids."""

    demonstration: Demonstration
    student_ids: list[int]
    """The prompt, as the student sees it."""
    teacher_ids: list[int] | None
    """The prompt with the context, as the teacher sees it; None without a context."""
    completion_ids: list[int]
    """The completion with its end token."""


class NothingFits(UserError):
    """Every row is too long, and ``on_long_prompt`` is ``drop``."""


def encode(
    demonstrations: Sequence[Demonstration],
    context: Context | None,
    chat: ChatFormat,
    *,
    max_prompt_length: int | None,
    max_completion_length: int,
    window: int | None,
    on_long_prompt: str = "error",
    completion_must_fit: bool = False,
    pool: Sequence[Demonstration] | None = None,
) -> tuple[list[Example], int]:
    """Encode demonstrations, and count those dropped because they are too long.

    Args:
        demonstrations: what to encode.
        context: the teacher's context, or None.
        max_prompt_length: limit for either prompt, in tokens; None: the window minus ``max_completion_length``.
        max_completion_length: most tokens of a completion.
        window: the model's limit for prompt plus completion, in tokens; None if it has none.
        on_long_prompt: ``error`` or ``drop``.
        completion_must_fit: apply ``max_completion_length`` to the demonstrated completion, which is trained on.
        pool: demonstrations that contexts may draw from; default ``demonstrations``.

    Returns:
        The examples, and the number of demonstrations dropped.

    Raises:
        NothingFits: with ``drop``, no row is left.
        UserError: rows are too long, all reported together; or completions end with the name of an end token.
    """
    room = None if window is None else window - max_completion_length
    limit = min((x for x in (room, max_prompt_length) if x is not None), default=None)
    if limit is not None and limit < 1:
        raise UserError(
            f"setting 'max_completion_length': {max_completion_length} leaves no room for a prompt in the model's "
            f"window of {window} tokens"
        )
    ended = [d.source for d in demonstrations if d.completion.rstrip().endswith(tuple(chat.end_names))]
    if ended:
        raise UserError(
            f"{len(ended)} of {len(demonstrations)} completions end with {' or '.join(chat.end_names)}, which the chat "
            f"format adds itself ({', '.join(ended[:10])}); remove it"
        )
    raised = limit == max_prompt_length
    more_room = (
        "raise --max_prompt_length" if raised else f"lower --max_completion_length (the window is {window} tokens)"
    )
    kept, long, advice = [], [], []
    for demonstration in demonstrations:
        row = Example(
            demonstration,
            chat.encode_prompt(demonstration.prompt),
            chat.encode_prompt(context.messages(demonstration, pool or demonstrations)) if context else None,
            chat.encode_completion(demonstration.completion),
        )
        prompts = {"prompt": row.student_ids, "teacher's prompt": row.teacher_ids or []}
        who = next((who for who, ids in prompts.items() if limit is not None and len(ids) > limit), None)
        if who is not None:
            long.append(f"{demonstration.source}: {who} has {len(prompts[who])} tokens, limit {limit}")
            advice.append(more_room)
        elif completion_must_fit and len(row.completion_ids) > max_completion_length:
            found = f"completion has {len(row.completion_ids)} tokens, limit {max_completion_length}"
            long.append(f"{demonstration.source}: {found} (max_completion_length)")
            advice.append("raise --max_completion_length")
        else:
            kept.append(row)
    if long and (on_long_prompt == "error" or not kept):
        more = f"; and {len(long) - 10} more" if len(long) > 10 else ""
        text = f"{len(long)} of {len(demonstrations)} rows do not fit: {'; '.join(long[:10])}{more}; "
        ways = [*dict.fromkeys(advice), *(["choose a shorter context"] if context else [])]
        if on_long_prompt == "drop":
            raise NothingFits(text + " or ".join(ways))
        raise UserError(f"{text}{', '.join(ways)}, or drop them with --on_long_prompt drop")
    return kept, len(long)
