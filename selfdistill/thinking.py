"""Replies of reasoning models: what is thought aloud, and what is said."""

from __future__ import annotations

from collections.abc import Sequence

from selfdistill.chat_format import ChatFormat

THINKING = ("<think>", "</think>")
"""Between these a reasoning model thinks; a prompt that ends in the first leaves only the second to the reply."""


def thought_and_said(chat: ChatFormat, prompt: Sequence[int], ids: Sequence[int]) -> tuple[str, str]:
    """The two parts of a reply, as text, from the token ids of the prompt and of the reply."""
    begun = str(chat.tokenizer.decode(list(prompt[-4:]))).rstrip().endswith(THINKING[0])
    return split_thinking(chat.decode(ids), begun=begun)


def split_thinking(reply: str, *, begun: bool = False) -> tuple[str, str]:
    """What a reply thinks aloud, and what it says then. A thought that never ends is followed by nothing.

    Args:
        begun: the prompt ends with the tag that begins a thought.
    """
    begin, end = THINKING
    if end in reply:
        thought, said = reply.split(end, 1)
        return thought.lstrip().removeprefix(begin), said.lstrip()
    thinks = begun or reply.lstrip().startswith(begin)
    return (reply.lstrip().removeprefix(begin), "") if thinks else ("", reply)
