"""The chat template as a program: what it writes, and, by probing, how it writes turns, tools and calls."""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from selfdistill.data.call_format import PROBE_RESULT, PROBE_TOOL, CallFormat, probe, probe_call
from selfdistill.data.differences import same_start
from selfdistill.data.images import as_parts
from selfdistill.data.messages import Message
from selfdistill.data.template_clock import pinned
from selfdistill.data.text_ids import HIDDEN, TextIds
from selfdistill.data.thinking import EMPTY_THOUGHT, before_thought, open_thought
from selfdistill.errors import UserError

PLAIN_USER, PLAIN_REPLY = "User:", "Assistant:"
"""How turns begin in the plain-text layout, which replaces a missing template."""
REPLY = "selfdistill"
"""A word that no template writes."""
PLACE = f"{HIDDEN}P{HIDDEN}"
"""The part of a message that stands for a picture."""
_USER = {"role": "user", "content": "a"}


class TemplateRefusal(UserError):
    """The chat template rejects a conversation, or drops a part of it."""


@dataclass(frozen=True)
class AssistantTurn:
    """How the template writes an assistant turn."""

    prompt: str
    """The prompt up to the reply."""
    lead: str
    """Between the prompt and the text of a reply, such as a space or an empty thought."""
    after: str
    """From the end of the text on."""
    asked: tuple[Message, ...] = ()
    """The chat of that prompt."""


class Template:
    """A tokenizer's chat template with the run's arguments; see :class:`selfdistill.data.ChatFormat`.

    With ``parts``, it belongs to an image-text model and gets each message's content as a list of parts.
    """

    def __init__(
        self, tokenizer: Any, kwargs: Mapping[str, Any], date: str | None, texts: TextIds, *, parts: bool = False
    ) -> None:
        self._tokenizer, self._parts = tokenizer, parts
        self._kwargs = kwargs
        self._date = date
        self._added = texts.added
        self._end_names = texts.end_names
        self._turns: dict[str, AssistantTurn] = {}

    def write(
        self, messages: Sequence[Message], options: Mapping[str, Any], *, add_generation_prompt: bool = True
    ) -> str:
        """A chat as the template writes it.

        Raises:
            TemplateRefusal: it rejects the chat.
        """
        fixed: dict[str, Any] = {"tokenize": False, "add_generation_prompt": add_generation_prompt}
        given = {**self._kwargs, **options}
        if taken := sorted(fixed.keys() & given.keys()):
            raise UserError(f"setting 'chat_template_kwargs': {taken[0]!r} is reserved; leave it out")
        shown: list[Any] = list(messages)
        if self._parts:
            shown = [{**message, "content": as_parts(message["content"].split(PLACE))} for message in messages]
        try:
            if self._date is not None:
                template = self._tokenizer.get_chat_template(None, tools=given.get("tools"))
                fixed["chat_template"] = pinned(template, datetime.date.fromisoformat(self._date))
            return str(self._tokenizer.apply_chat_template(shown, **fixed, **given))
        except Exception as error:  # templates are programs and may raise anything
            roles = ", ".join(m["role"] for m in messages)
            reason = " ".join(str(error).split())
            raise TemplateRefusal(f"the chat template rejects the roles {roles}: {reason}") from None

    def turn(self, options: Mapping[str, Any], *, after_result: bool = False) -> AssistantTurn:
        """How the template writes an assistant turn with these options, after a user's or after a tool's result."""
        key = json.dumps([after_result, options], sort_keys=True, default=str)
        if key not in self._turns:
            self._turns[key] = self._probe_after_result(options) if after_result else self._probe(options)
        return self._turns[key]

    def _probe(self, options: Mapping[str, Any]) -> AssistantTurn:
        if not self._tokenizer.chat_template:
            return AssistantTurn(PLAIN_REPLY, " ", "")
        for asked in ([_USER], [{"role": "system", "content": "a"}, _USER]):
            try:
                return self._probe_with(asked, options)
            except TemplateRefusal:
                continue
        return AssistantTurn("", "", "")  # a template for other conversations; the rows will show

    def _probe_after_result(self, options: Mapping[str, Any]) -> AssistantTurn:
        turn = self.turn(options)
        if self.calls is None:  # results are user turns
            return turn
        try:
            return self._probe_with(self.calls.shown([*turn.asked, probe_call(), PROBE_RESULT]), options)
        except TemplateRefusal:
            return turn

    def _probe_with(self, asked: list[Message], options: Mapping[str, Any]) -> AssistantTurn:
        prompt = self.write(asked, options)
        answered = [*asked, {"role": "assistant", "content": REPLY}]
        before, reply, after = self.write(answered, options, add_generation_prompt=False).rpartition(REPLY)
        lead = before.removeprefix(prompt) if before.startswith(prompt) else ""
        if not reply:
            return AssistantTurn(prompt, "", "", tuple(asked))
        if not self._added.match(after.lstrip()):  # some end every reply but the last
            more = self.write([*answered, _USER], options, add_generation_prompt=False).partition(REPLY)[2]
            end = self._added.match(more, len(more) - len(more.lstrip()))
            after = more[: end.end()] if end and end[0] in self._end_names else after
        return AssistantTurn(prompt, lead, after, tuple(asked))

    @cached_property
    def calls(self) -> CallFormat | None:
        """How the template writes calls; None if it writes none, so that calls are text."""
        if not self._tokenizer.chat_template:
            return None
        tools = {"tools": [PROBE_TOOL]}
        turn = self.turn(tools)

        def reply(messages: Sequence[Message]) -> str | None:
            try:
                return self.reply([*turn.asked, *messages], turn, tools)
            except TemplateRefusal:
                return None

        def prompt(messages: Sequence[Message]) -> str | None:
            try:
                return self.write([*turn.asked, *messages], tools)
            except TemplateRefusal:
                return None

        return probe(reply, prompt)

    @cached_property
    def shows_tools(self) -> bool:
        turn = self.turn({})
        return bool(turn.asked) and self.write(turn.asked, {"tools": [PROBE_TOOL]}) != turn.prompt

    def reply(self, chat: Sequence[Message], turn: AssistantTurn, options: Mapping[str, Any]) -> str:
        """The template's text for the reply that ends a chat, without an empty thought and the end of the turn."""
        whole = self.write(chat, options, add_generation_prompt=False)
        text = whole[self._reply_start(whole, turn.prompt) :]
        thought = EMPTY_THOUGHT
        if tags := open_thought(turn.prompt):  # the reply begins within it
            thought += rf"|{re.escape(tags[1])}\s*"
        text = re.sub(rf"\A\s*({thought})", "", text)
        text = text.removesuffix(turn.after)
        # Nothing is sampled after the first end token. Some templates write a second, empty turn.
        ends = (found.start() for found in self._added.finditer(text) if found[0] in self._end_names)
        return text[: next(ends, len(text))]

    def _reply_start(self, whole: str, prompt: str) -> int:
        """Where the last turn begins in a whole chat, which may lack the thought with which the prompt ends."""
        if whole.startswith(prompt):
            return len(prompt)
        same = same_start(whole, before_thought(prompt))
        tokens = self._added.finditer(whole)
        return next((token.start() for token in tokens if token.start() < same < token.end()), same)
