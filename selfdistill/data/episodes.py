"""Episodes: rows with several replies to learn, and messages from tools or users in between.

On-policy methods learn each reply after the demonstrated conversation so far. SFT learns all replies of
an episode in one sequence, in which the other messages are given.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

from selfdistill.data.chat_format import ChatFormat
from selfdistill.data.demonstrations import Demonstration
from selfdistill.data.messages import Message, text_of_reply

Replies = Literal["episode", "each", "last"]
"""What becomes an example: all replies of an episode in one sequence, each reply, or the last one."""
_NEXT_TURN = 1 << 32
"""Difference between the row numbers of two turns: larger than any data set."""


def turns_of(demonstration: Demonstration, replies: Replies) -> list[Demonstration]:
    """The demonstrations that become examples: the row itself, or its turns.

    A turn has the conversation before it as its prompt, and the row as ``turn_of``. Only the last turn has the answer,
    which belongs to the last reply. Each turn has its own row number, which seeds its samples; the
    first has the row's, as does a last turn alone.
    """
    episode = demonstration.episode
    if replies == "episode" or not episode or demonstration.turn_of is not None:
        return [demonstration]
    places = [place for place, message in enumerate(episode) if message["role"] == "assistant"]
    turns = [_turn(demonstration, place, number) for number, place in enumerate(places)]
    if replies == "last":
        return [replace(turns[-1], row=demonstration.row, source=demonstration.source)]
    return turns


def _turn(row: Demonstration, place: int, number: int) -> Demonstration:
    reply, is_last = row.episode[place], place == len(row.episode) - 1
    return replace(
        row,
        prompt=(*row.prompt, *row.episode[:place]),
        completion=text_of_reply(reply),
        episode=(reply,) if "tool_calls" in reply else (),
        answer=row.answer if is_last else None,
        scorer=row.scorer if is_last else None,
        row=row.row + number * _NEXT_TURN,
        source=f"{row.source} reply {number + 1}" if len(row.episode) > 1 else row.source,
        turn_of=row,
    )


def notes_on_episodes(demonstrations: Sequence[Demonstration]) -> list[str]:
    """A note that only the last of several replies is evaluated; none if no row has several."""
    several = [row for row in demonstrations if sum(message["role"] == "assistant" for message in row.episode) > 1]
    if not several:
        return []
    return [
        f"{len(several)} of {len(demonstrations)} rows are episodes; only their last reply is evaluated, after the "
        "demonstrated ones; training may learn all replies"
    ]


def encode_replies(demonstration: Demonstration, chat: ChatFormat) -> tuple[list[int], tuple[tuple[int, int], ...]]:
    """Token ids after the prompt, and the half-open spans of tokens that are not the model's.

    Raises:
        TemplateRefusal: the chat template cannot write the episode.
    """
    options = demonstration.template_options
    after_result = demonstration.prompt[-1]["role"] == "tool"
    if not demonstration.episode:
        text = demonstration.completion
        return (chat.encode_completion(text, options, after_result=after_result) if text else []), ()
    ids: list[int] = []
    given: list[tuple[int, int]] = []
    before: list[Message] = list(demonstration.prompt)
    observed: list[Message] = []
    for message in demonstration.episode:
        if message["role"] != "assistant":
            observed.append(message)
            continue
        if observed:
            between = chat.encode_between(before, observed, options)
            given.append((len(ids), len(ids) + len(between)))
            ids += between
            after_result = observed[-1]["role"] == "tool"
        ids += chat.encode_reply(message, options, after_result=after_result)
        before, observed = [*before, *observed, message], []
    return ids, tuple(given)
