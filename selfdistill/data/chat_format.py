"""Chat messages to token ids and back, through the chat template or a plain-text layout; text never becomes markup."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from selfdistill.data.messages import Message
from selfdistill.errors import UserError

_HIDDEN = "\U0010fffd"
"""Delimits the number of a hidden name. A private-use character, unlikely to occur next to a number in any text."""


def _any_of(names: Sequence[str]) -> re.Pattern[str]:
    """Matches any of the names, longest first, or the character that hides them."""
    return re.compile("|".join(map(re.escape, sorted([*names, _HIDDEN], key=len, reverse=True))))


class ChatFormat:
    """Encodes messages with the tokenizer's chat template or, without one, in a plain-text layout.

    Control tokens come from the template only. Where a text contains the name of one, such as ``<|im_end|>``, it is
    encoded as plain characters.

    The plain-text layout is ``<system text>``, ``User: <text>``, ``Assistant: <text>``, separated by blank lines. A
    prompt ends with ``Assistant:``, and a completion starts with a space.
    """

    def __init__(self, tokenizer: Any, end_token_ids: Sequence[int], chat_template_kwargs: dict[str, Any]) -> None:
        self.tokenizer = tokenizer
        self.kwargs = chat_template_kwargs
        template, added = str(tokenizer.chat_template or ""), tokenizer.added_tokens_decoder.values()
        names = [str(token) for token in added if token.special]
        # A template may also write non-special tokens, such as <|User|>; a reply may contain some, such as <think>.
        others = [str(token) for token in added if not token.special and str(token) in template]
        self._in_replies, self._in_texts = _any_of(names), _any_of([*names, *others])
        ends = [str(tokenizer.convert_ids_to_tokens(token)) for token in end_token_ids]
        self.end_names = [name for name in ends if name in names]
        self.end_token_id = self._turn_end(end_token_ids)

    def render(self, messages: Sequence[Message], options: Mapping[str, Any] | None = None) -> str:
        """The prompt as text, up to the start of the reply.

        Args:
            messages: the chat, up to the user's last turn.
            options: a row's own arguments of the template, over the setting's; the plain layout has none.
        """
        if self.tokenizer.chat_template:
            return self._by_template(messages, options, add_generation_prompt=True)
        labels = {"system": "", "user": "User: ", "assistant": "Assistant: "}
        return "".join(f"{labels[m['role']]}{m['content']}\n\n" for m in messages) + "Assistant:"

    def unshown(self, messages: Sequence[Message], options: Mapping[str, Any]) -> str | None:
        """The first of a row's own ``options`` that the template does not show, as it would be lost; else None."""
        template = str(self.tokenizer.chat_template or "")
        if "tools" in options:
            others = {name: value for name, value in options.items() if name != "tools"}
            if not template or self.render(messages, options) == self.render(messages, others):
                return "tools"
        return next((name for name in options if not re.search(rf"\b{re.escape(name)}\b", template)), None)

    def encode_prompt(self, messages: Sequence[Message], options: Mapping[str, Any] | None = None) -> list[int]:
        """Token ids of the prompt; for the arguments see :meth:`render`."""
        hidden: list[str] = []

        def hide(found: re.Match[str]) -> str:
            hidden.append(found[0])
            return f"{_HIDDEN}{len(hidden) - 1}{_HIDDEN}"

        shown = []
        for message in messages:
            names = self._in_replies if message["role"] == "assistant" else self._in_texts
            shown.append({**message, "content": names.sub(hide, message["content"])})
        # The texts of tools and other arguments come from the data, too.
        text = self.render(shown, _mapped(options or {}, lambda value: self._in_texts.sub(hide, value)))
        # A template writes its own special tokens. Plain text gets the tokenizer's, such as a leading BOS.
        special = not self.tokenizer.chat_template
        first, *others = re.split(f"{_HIDDEN}([0-9]+){_HIDDEN}", text)
        ids = self._ids(first, special=special)
        for number, after in zip(others[::2], others[1::2], strict=True):
            ids += self._name(hidden[int(number)]) + self._ids(after, special=False)
        return ids

    def encode_completion(self, text: str) -> list[int]:
        """Token ids of a demonstrated reply plus the end-of-turn token. Joins ids, never text."""
        lead = "" if self.tokenizer.chat_template else " "
        return [*self._plain(lead + text, self._in_replies), self.end_token_id]

    def encode_text(self, text: str) -> list[int]:
        """Token ids of a plain text, without control tokens."""
        return self._plain(text, self._in_texts)

    def _plain(self, text: str, names: re.Pattern[str]) -> list[int]:
        ids, start = [], 0
        for found in names.finditer(text):
            ids += self._ids(text[start : found.start()], special=False) + self._name(found[0])
            start = found.end()
        return ids + self._ids(text[start:], special=False)

    def decode(self, ids: Sequence[int]) -> str:
        """Decode a reply, skipping special tokens."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True)).strip()

    def _by_template(
        self, messages: Sequence[Message], own: Mapping[str, Any] | None = None, *, add_generation_prompt: bool
    ) -> str:
        options = {"tokenize": False, "add_generation_prompt": add_generation_prompt}
        if taken := sorted(options.keys() & self.kwargs.keys()):
            raise UserError(f"setting 'chat_template_kwargs': {taken[0]!r} is reserved; leave it out")
        try:
            return str(self.tokenizer.apply_chat_template(list(messages), **options, **{**self.kwargs, **(own or {})}))
        except Exception as error:  # templates are programs and may raise anything
            roles = ", ".join(m["role"] for m in messages)
            raise UserError(f"the chat template rejects the roles {roles}: {error}") from None

    def _ids(self, text: str, *, special: bool) -> list[int]:
        options = {"add_special_tokens": special, "split_special_tokens": False}
        return list(self.tokenizer(text, **options)["input_ids"]) if text or special else []

    def _name(self, name: str) -> list[int]:
        """Token ids of a control token's name as plain characters, split in two so it never becomes the token."""
        return self._ids(name[:1], special=False) + self._ids(name[1:], special=False)

    def _turn_end(self, end_token_ids: Sequence[int]) -> int:
        """The end token that the template writes after an assistant turn, else the first end token."""
        if self.tokenizer.chat_template:
            reply = "selfdistill"  # a word that no template writes
            probe = [{"role": "user", "content": "a"}, {"role": "assistant", "content": reply}]
            text = self._by_template(probe, add_generation_prompt=False)
            after = self._ids(text.rpartition(reply)[2] if reply in text else "", special=False)
            for token in after:
                if token in end_token_ids:
                    return token
        return end_token_ids[0]


def _mapped(value: Any, change: Callable[[str], str]) -> Any:
    """The value with every text in it changed, at any depth; keys, too."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {_mapped(key, change): _mapped(part, change) for key, part in value.items()}
    return [_mapped(part, change) for part in value] if isinstance(value, list) else value


THINKING = ("<think>", "</think>")
"""Tags around a reasoning model's thoughts. If the prompt ends with the first, the reply holds only the second."""


def thought_and_said(chat: ChatFormat, prompt: Sequence[int], ids: Sequence[int]) -> tuple[str, str]:
    """Split a reply into its thought and its final text, given the token ids of prompt and reply."""
    begun = str(chat.tokenizer.decode(list(prompt[-4:]))).rstrip().endswith(THINKING[0])
    return split_thinking(chat.decode(ids), begun=begun)


def split_thinking(reply: str, *, begun: bool = False) -> tuple[str, str]:
    """Split a reply into its thought and its final text, which is empty if the thought never ends.

    Args:
        begun: whether the prompt ends with the opening tag.
    """
    begin, end = THINKING
    if end in reply:
        thought, said = reply.split(end, 1)
        return thought.lstrip().removeprefix(begin), said.lstrip()
    thinks = begun or reply.lstrip().startswith(begin)
    return (reply.lstrip().removeprefix(begin), "") if thinks else ("", reply)
