"""Chats as the template or the plain-text layout writes them: texts stay text, and nothing is lost."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from selfdistill.data.call_format import in_text
from selfdistill.data.contexts import Verbatim
from selfdistill.data.images import Picture, PictureTokens, split_at_pictures
from selfdistill.data.messages import Message, uses_tools
from selfdistill.data.template import PLACE, PLAIN_REPLY, PLAIN_USER, Template, TemplateRefusal
from selfdistill.data.text_ids import HIDDEN, NAME, TextIds, mapped
from selfdistill.data.thinking import EMPTY_THOUGHT, split_thinking, thinks
from selfdistill.errors import shortened

_VERBATIM = re.compile(f"{NAME.pattern}|(?P<thought>{EMPTY_THOUGHT})?{HIDDEN}V(?P<number>[0-9]+){HIDDEN}")
"""A whole hidden turn, after the thought that a template puts in front of it; or a hidden name, to pass over it."""
_MARK = f"{HIDDEN}O{HIDDEN}"
"""In place of a message's content, to find where it begins."""
_KEYS = ("tool_calls", "name", "tool_call_id")
"""What a message may have beside its role and content."""


@dataclass(frozen=True)
class HiddenChat:
    """A chat whose texts hide what the template must not see."""

    given: Sequence[Message]
    """The messages as they were given."""
    messages: list[Message]
    """The same, with names of control tokens, pictures and whole verbatim turns hidden."""
    options: Mapping[str, Any]
    """Further arguments of the template, with names hidden."""
    names: list[str]
    """The hidden names, by number."""
    verbatim: list[str]
    """The hidden turns, by number; names in them are hidden."""
    pictures: list[Picture]

    def marked(self, number: int) -> HiddenChat:
        """The chat with :data:`_MARK` as the content of a message."""
        messages = [{**m, "content": _MARK} if i == number else m for i, m in enumerate(self.messages)]
        return replace(self, messages=messages)


class ChatWriter:
    """Writes chats with the template or, if the tokenizer has none, in the plain-text layout.

    Args:
        template: the template.
        source: its program, or "".
        texts: hides names of control tokens.
        pictures: how pictures are written; None if the model reads none.
    """

    def __init__(self, template: Template, source: str, texts: TextIds, pictures: PictureTokens | None) -> None:
        self._template, self._is_plain = template, not source
        self._texts, self._pictures = texts, pictures
        switches = re.findall(r"['\"](/\w+)['\"]", source)
        self._breaks = re.compile("|".join(map(re.escape, [PLACE, *switches])))

    def hidden(
        self,
        messages: Sequence[Message],
        options: Mapping[str, Any],
        pictures: Mapping[str, Picture] | None = None,
    ) -> HiddenChat:
        """The chat as the template may see it; ``pictures`` are those whose marks count, by their hashes."""
        chat = HiddenChat(messages, [], {}, [], [], [])

        def hide(text: str) -> str:
            return self._texts.hide(text, self._texts.in_texts, chat.names)

        for message in messages:
            content = message["content"]
            names = self._texts.in_replies if message["role"] == "assistant" else self._texts.in_texts
            pieces = split_at_pictures(content, pictures or {})
            chat.pictures.extend(piece for piece in pieces if isinstance(piece, Picture))
            text = "".join(PLACE if isinstance(x, Picture) else self._texts.hide(x, names, chat.names) for x in pieces)
            if isinstance(content, Verbatim) and text:
                chat.verbatim.append(text)
                text = f"{HIDDEN}V{len(chat.verbatim) - 1}{HIDDEN}"
            others = {key: mapped(message[key], hide) for key in _KEYS if key in message}
            chat.messages.append({"role": message["role"], "content": text, **others})
        # The texts of tools and other arguments come from the data, too.
        return replace(chat, options=mapped(options, hide))

    def written(self, chat: HiddenChat, checked: int = 0) -> str:
        """The chat as a prompt, in which names are still hidden.

        Args:
            chat: the hidden chat.
            checked: from this message on, none may be left out.

        Raises:
            TemplateRefusal: the template rejects the chat, or leaves out a message.
        """
        shown = chat.messages
        if uses_tools(shown):
            form = self._template.calls
            shown = in_text(shown) if form is None else form.shown(shown)
        text = _plain(shown) if self._is_plain else self._template.write(shown, chat.options)
        self._refuse_left_out(chat, checked, text)

        def put_in(found: re.Match[str]) -> str:
            if found["number"] is None:
                return found[0]
            said = chat.verbatim[int(found["number"])]
            return said if thinks(said) else (found["thought"] or "") + said  # in place of an empty one

        return _VERBATIM.sub(put_in, self._with_pictures(text, chat.pictures))

    def text_before(self, chat: HiddenChat, number: int) -> str:
        """What precedes the content of a message in the written chat."""
        return self.written(chat.marked(number), checked=len(chat.given)).partition(_MARK)[0]

    def _with_pictures(self, text: str, seen: Sequence[Picture]) -> str:
        """The text as the template wrote it, with what the processor writes in place of each picture's token."""
        if self._pictures is None or not seen:
            return text
        first, *others = text.split(self._pictures.token)  # in texts of the rows its name is hidden
        if len(others) != len(seen):
            raise TemplateRefusal(f"the chat template shows {len(others)} pictures of {len(seen)}")
        return first + "".join(map("".join, zip(self._pictures.expanded(seen), others, strict=True)))

    def _refuse_left_out(self, chat: HiddenChat, first: int, text: str) -> None:
        """Refuse a rendering that lacks the text of a message from number ``first`` on.

        Missing may be what a template strips off its ends, a switch such as ``/no_think`` that it reads, and in an
        earlier assistant turn of a prompt a thought, or a text beside calls: that is how the model sees such turns.
        """
        messages, shown = chat.given[first:], chat.messages[first:]
        if uses_tools(messages) and self._template.calls is None:
            messages, shown = in_text(messages), in_text(shown)
        texts = [_said(message) for message in shown]
        for message, content in zip(messages, texts, strict=True):
            parts = [part.strip() for part in self._breaks.split(content)]
            counts = [(text.count(part), sum(other.count(part) for other in texts)) for part in parts if part]
            if all(found >= wanted for found, wanted in counts):
                continue
            if message["role"] == "tool" and _as_json(content) in text:  # as some templates write it
                continue
            if "tool_calls" in message and not isinstance(message["content"], Verbatim):
                continue
            if isinstance(message["content"], Verbatim):
                raise TemplateRefusal("the chat template leaves out the demonstration, an earlier assistant turn")
            found = shortened(message["content"], 40)
            raise TemplateRefusal(f"the chat template leaves out or rewrites the {message['role']} turn {found!r}")
        for message in shown:
            for call in message.get("tool_calls", ()):
                if call["function"]["name"] not in text:
                    raise TemplateRefusal(f"the chat template leaves out the call of {call['function']['name']!r}")


def _plain(messages: Sequence[Message]) -> str:
    labels = {"system": "", "user": f"{PLAIN_USER} ", "assistant": f"{PLAIN_REPLY} "}
    return "".join(f"{labels[m['role']]}{m['content']}\n\n" for m in messages) + PLAIN_REPLY


def _as_json(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)[1:-1]


def _said(message: Message) -> str:
    content = message["content"]
    return (split_thinking(content)[1] if message["role"] == "assistant" else content).strip()
