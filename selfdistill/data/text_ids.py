"""Texts to token ids and back, where names of control tokens in a text never become control tokens."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from selfdistill.data.channels import CHANNEL_TOKENS, Channels

HIDDEN = "\U0010fffd"
"""Delimits the number of a hidden text. A private-use character, unlikely to occur next to a number in any text."""
NAME = re.compile(f"{HIDDEN}([0-9]+){HIDDEN}")
_OF_REPLIES = re.compile(r"think|thought|tool|python_tag|function_call|<\|channel>|<channel\|>", re.IGNORECASE)
"""Control tokens that a model writes within its reply, so that a demonstration may contain them."""
_ANCHOR = 32
"""Characters of the preceding text with which a text is tokenised."""
_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"
"""What tokenizers decode a part of a character to."""
_MOST_TOKENS = 5
"""Tokens that may have parts of one character: its bytes are at most four, and the first may end another token."""


def _any_of(names: Sequence[str], *patterns: str) -> re.Pattern[str]:
    """Matches any of the names, longest first, the character that hides them, or a pattern."""
    longest_first = sorted([*names, HIDDEN], key=len, reverse=True)
    return re.compile("|".join([*map(re.escape, longest_first), *patterns]))


class TextIds:
    """Encodes texts, in which names of control tokens are hidden while a template writes around them.

    Args:
        tokenizer: the model's.
        end_token_ids: the tokens that end a reply.
        template: the chat template, or "".
    """

    def __init__(self, tokenizer: Any, end_token_ids: Sequence[int], template: str) -> None:
        self.tokenizer = tokenizer
        added = {str(token): token for token in tokenizer.added_tokens_decoder.values()}
        self.added = _any_of(list(added))
        """Any added token."""
        self._swallowing = {name for name, token in added.items() if token.rstrip}
        special = {name for name, token in added.items() if token.special}
        ends = tokenizer.convert_ids_to_tokens(list(end_token_ids))
        self.end_names = [name for name in ends if name in special or (name in added and not _OF_REPLIES.search(name))]
        of_replies = {name for name in added if _OF_REPLIES.search(name)}.difference(self.end_names)
        of_reply_ids = tokenizer.convert_tokens_to_ids(sorted(of_replies))
        special_ids = tokenizer.convert_tokens_to_ids(sorted(special.union(self.end_names)))
        self._skipped = {*special_ids, *tokenizer.all_special_ids}.difference(of_reply_ids)
        has_channels = all(name in added for name in CHANNEL_TOKENS)
        self._channels = Channels(*tokenizer.convert_tokens_to_ids([*CHANNEL_TOKENS])) if has_channels else None
        # A template may also write tokens that are not special, such as <|User|>.
        control = special.union(of_replies, self.end_names, [n for n in added if n.strip() and n in template])
        # Next to a token that swallows white space, that of a text is encoded on its own.
        edges = [r"\A\s+", r"\s+\Z"] if self._swallowing else []
        self.in_texts = _any_of(list(control))
        """What is hidden in texts."""
        self.in_replies = _any_of(list(control - of_replies), *edges)
        """What is hidden in replies, which may hold thinking and tool tags."""
        self.begin = self._tokenizers_own_start()
        """The special tokens that the tokenizer puts in front of a text; those that it appends are left out."""

    def decode(self, ids: Sequence[int], also: str = "") -> str:
        """Decode a reply, skipping special and end tokens except thinking and tool tags and those named in ``also``.

        A thought in a channel of its own gets tags; see :class:`Channels`.
        """
        named = self.tokenizer.convert_tokens_to_ids([found[0] for found in self.added.finditer(also)]) if also else []

        def text_of(part: Sequence[int]) -> str:
            kept = [token for token in part if token not in self._skipped or token in named]
            return str(self.tokenizer.decode(kept, clean_up_tokenization_spaces=False))

        return self._channels.with_tags(ids, text_of) if self._channels else text_of(ids)

    def encode(self, text: str) -> list[int]:
        """Token ids of a plain text, without control tokens."""
        hidden: list[str] = []
        return self.mixed("", self.hide(text, self.in_texts, hidden), hidden)

    def hide(self, text: str, names: re.Pattern[str], hidden: list[str]) -> str:
        """The text with every match replaced by a marker; appends the matches to ``hidden``."""

        def marker(found: re.Match[str]) -> str:
            hidden.append(found[0])
            return f"{HIDDEN}{len(hidden) - 1}{HIDDEN}"

        return names.sub(marker, text)

    def mixed(self, before: str, text: str, hidden: Sequence[str]) -> list[int]:
        """Token ids of a text with hidden names, as it stands after ``before``; names become plain characters.

        A name is split in two, so that it never becomes the control token.
        """
        first, *others = NAME.split(text)
        ids, before = self.ids_after(before, first), first or before
        for number, rest in zip(others[::2], others[1::2], strict=True):
            name = hidden[int(number)]
            for piece in (name[:1], name[1:]):
                alone = self.added.fullmatch(piece)  # a control token of one letter
                ids += self.ids(piece, split=True) if alone else self.ids_after(before, piece)
                before = piece or before
            ids += self.ids_after(before, rest)
            before = rest or before
        return ids

    def ids_after(self, before: str, text: str) -> list[int]:
        """Token ids of ``text`` as it stands after ``before``, which some tokenizers encode unlike a text's start.

        Where the two would share a token, as in ids that are already fixed, they are those after a line break.
        """
        if not text or not before:
            return self.ids(text)
        anchor = before[-_ANCHOR:]
        for found in self.added.finditer(before):
            swallowed = found[0] in self._swallowing and text[:1].isspace()
            anchor = before[found.end() if swallowed else found.start() :]
        for lead in (anchor, "\n", "a"):
            head, whole = self.ids(lead), self.ids(lead + text)
            if head and whole[: len(head)] == head:
                return whole[len(head) :]
        return self.ids(text)

    def ids(self, text: str, *, split: bool = False) -> list[int]:
        options = {"add_special_tokens": False, "split_special_tokens": split}
        return list(self.tokenizer(text, **options)["input_ids"]) if text else []

    def _tokenizers_own_start(self) -> list[int]:
        bare, whole = self.ids("a"), list(self.tokenizer("a")["input_ids"])
        at = next((i for i in range(len(whole)) if whole[i : i + len(bare)] == bare), 0)
        return whole[:at]


def texts_of(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """The text of each token, also of control tokens.

    A character of several tokens is in the text of the last of them. Tokens that form none have U+FFFD.
    """
    texts: list[str] = []
    while len(texts) < len(ids):
        texts += _next_texts(tokenizer, ids[len(texts) : len(texts) + _MOST_TOKENS])
    return texts


def _next_texts(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """The text of the first token, and of those that end the character within which it ends."""
    texts: list[str] = []
    for end in range(1, len(ids) + 1):
        whole, known = str(tokenizer.decode(list(ids[:end]))), "".join(texts)
        complete = whole.rstrip(_INCOMPLETE)
        if _INCOMPLETE in complete or not complete.startswith(known):
            break
        texts.append(complete[len(known) :])
        if complete == whole:
            return texts
    return [str(tokenizer.decode([ids[0]]))]


def mapped(value: Any, change: Callable[[str], str]) -> Any:
    """The value with every text in it changed, at any depth; keys, too."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {mapped(key, change): mapped(part, change) for key, part in value.items()}
    return [mapped(part, change) for part in value] if isinstance(value, list) else value
