"""Replies in channels, as gpt-oss writes them: the channel ``analysis`` is the thought, ``final`` the text.

``<|channel|>analysis<|message|>THOUGHT<|end|><|start|>assistant<|channel|>final<|message|>TEXT``. All who read replies
find thoughts by their tags, so such a reply gets tags when it is decoded.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from selfdistill.data.thinking import TAGS

CHANNEL_TOKENS = ("<|start|>", "<|channel|>", "<|message|>")
"""The tokens around a message's header."""


@dataclass(frozen=True)
class Channels:
    """Ids of :data:`CHANNEL_TOKENS`."""

    start: int
    channel: int
    message: int

    def with_tags(self, ids: Sequence[int], text_of: Callable[[Sequence[int]], str]) -> str:
        """A reply as text, with its thought between tags; a call keeps its header.

        Args:
            ids: of the reply.
            text_of: decodes a part of it.
        """
        if self.message not in ids:
            return text_of(ids)
        thoughts: list[str] = []
        said: list[str] = []
        for part in self._messages(ids):
            header, body = _cut(part, self.message)
            recipient, channel = map(text_of, _cut(header, self.channel))
            if channel.startswith("analysis"):
                thoughts.append(text_of(body))
            elif "to=" in recipient + channel:
                said.append(text_of(part).removeprefix("assistant"))
            else:
                said.append(text_of(body))
        if not thoughts:
            return "\n".join(said)
        begin, end = TAGS[0]
        thought = f"{begin}\n" + "\n".join(thoughts)
        return f"{thought}\n{end}\n\n" + "\n".join(said) if said else thought

    def _messages(self, ids: Sequence[int]) -> list[Sequence[int]]:
        """The messages of a reply, each from its header on."""
        places = [place for place, token in enumerate(ids) if token == self.start]
        return [ids[a:b] for a, b in zip([0, *places], [*places, len(ids)], strict=True)]


def _cut(ids: Sequence[int], at: int) -> tuple[Sequence[int], Sequence[int]]:
    """What precedes and what follows a token; all precedes if it is missing."""
    place = list(ids).index(at) if at in ids else len(ids)
    return ids[:place], ids[place + 1 :]
