"""Episodes: rows with several replies to learn, and messages from tools or users in between.

On-policy methods learn each reply after the demonstrated conversation so far. SFT learns all replies of
an episode in one sequence, in which the other messages are given.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

from selfdistill.data.chat_format import ChatFormat
from selfdistill.data.demonstrations import Demonstration
from selfdistill.data.messages import Message, text_of_reply
from selfdistill.data.rows import quoted
from selfdistill.data.thinking import EMPTY_THOUGHT, before_thought, split_thinking

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


def changed_when_shown_anew(
    chat: ChatFormat,
    before: Sequence[Message],
    options: Mapping[str, Any],
    prompt: Sequence[int],
    ids: Sequence[int],
    replies: Sequence[tuple[int, int]],
) -> str:
    """What the chat template leaves out of sampled replies, or writes otherwise, when it shows them as earlier turns.

    White space is not compared.

    Args:
        chat: the format.
        before: the chat up to the next reply.
        options: further arguments of the chat template.
        prompt: token ids of the prompt of the first reply.
        ids: what followed it, as it was sampled and given.
        replies: half-open spans of ``ids``: those that are now earlier turns, which ``before`` ends with.

    Returns:
        In words, with the last such reply as an example; "" if there is none, or without a template.
    """
    if not chat.tokenizer.chat_template or not replies:
        return ""
    text = _without_space(chat.render(before, options, checked=False))
    messages = [message for message in before if message["role"] == "assistant"][-len(replies) :]
    at, whole = len(text), [*prompt, *ids]
    for message, (start, end) in zip(reversed(messages), reversed(replies), strict=True):
        sampled, opened = _sampled_text(chat, whole, len(prompt) + start, len(prompt) + end)
        at = text.rfind(_without_space(opened + sampled), 0, at)
        if at < 0:
            return f"{_change(text, opened + sampled, message)} the reply {quoted(' '.join(sampled.split()))}"
    return ""


def _change(text: str, sampled: str, message: Message) -> str:
    """What a rendering without white space changes in a reply."""
    thought, said = split_thinking(message["content"])
    if _without_space(thought) not in text:
        return "leaves out the thought of"
    bare = re.sub(EMPTY_THOUGHT, "", sampled, count=1)
    if bare != sampled and _without_space(bare) in text:
        return "leaves out the empty thought of"
    if "tool_calls" in message and _without_space(said) not in text:
        return "leaves out the text beside the call in"
    return "rewrites"


def _sampled_text(chat: ChatFormat, whole: Sequence[int], start: int, end: int) -> tuple[str, str]:
    """A reply without its end token, and the thought, open or empty, with which its prompt ends."""
    prompt, said = (str(chat.tokenizer.decode(list(part))) for part in (whole[:start][-32:], whole[start:end]))
    ended = next((name for name in chat.end_names if said.endswith(name)), "")
    return said.removesuffix(ended), prompt[len(before_thought(prompt)) :]


def _without_space(text: str) -> str:
    return "".join(text.split())
