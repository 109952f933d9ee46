"""Chat messages to token ids and back, through the chat template or a plain-text layout; text never becomes markup."""

from __future__ import annotations

import datetime
import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

from selfdistill.data.call_format import read_text, with_tools
from selfdistill.data.images import Picture, PictureTokens, PromptIds
from selfdistill.data.messages import Message
from selfdistill.data.template import PLAIN_USER, REPLY, AssistantTurn, Template, TemplateRefusal
from selfdistill.data.text_ids import NAME, TextIds, mapped
from selfdistill.data.thinking import (
    EMPTY_THOUGHT,
    open_thought,
    split_thinking,
    thinks,
    within_open_thought,
    without_thought,
)
from selfdistill.data.tool_calls import InvalidCall, written
from selfdistill.data.written_chat import ChatWriter

NEXT_TURN = f"\n\n{PLAIN_USER}"
"""Where the plain-text layout's next turn begins, a reply has ended, too: so a base model ends it."""


class ChatFormat:
    """Encodes messages with the tokenizer's chat template or, without one, in a plain-text layout.

    Control tokens come from the template only. Where a text contains the name of one, such as ``<|im_end|>``, it is
    encoded as plain characters. Thinking and tool tags in replies are the exception: they are what the model writes.

    The plain-text layout is ``<system text>``, ``User: <text>``, ``Assistant: <text>``, separated by blank lines. A
    prompt ends with ``Assistant:``, and a completion starts with a space.

    Args:
        tokenizer: the model's.
        end_token_ids: the tokens that end a reply.
        chat_template_kwargs: further arguments of the chat template.
        date: the day (YYYY-MM-DD) that a template which reads the clock sees; default: today.
        pictures: how pictures are written; None if the model reads none.
    """

    def __init__(
        self,
        tokenizer: Any,
        end_token_ids: Sequence[int],
        chat_template_kwargs: Mapping[str, Any],
        date: str | None = None,
        pictures: PictureTokens | None = None,
    ) -> None:
        self.tokenizer, self.pictures = tokenizer, pictures
        self.kwargs = dict(chat_template_kwargs)
        template = str(tokenizer.chat_template or "")
        self.date = (date or datetime.date.today().isoformat()) if "strftime_now" in template else None
        """The day that the template sees; None if it does not read the clock."""
        self._ends = list(end_token_ids)
        self._texts = TextIds(tokenizer, end_token_ids, template)
        self.end_names = self._texts.end_names
        self._template = Template(tokenizer, self.kwargs, self.date, self._texts, parts=pictures is not None)
        self._writer = ChatWriter(self._template, template, self._texts, pictures)

    @cached_property
    def end_token_id(self) -> int:
        """The end token that the template writes after an assistant turn, else the first end token."""
        after = self._texts.ids(self.turn.after) if self.tokenizer.chat_template else []
        return next((token for token in after if token in self._ends), self._ends[0])

    @cached_property
    def turn_end_id(self) -> int | None:
        """The control token that the template writes after an assistant turn, an end token or not; None if none."""
        found = self._texts.added.match(self.turn.after.lstrip())
        return None if found is None else int(self.tokenizer.convert_tokens_to_ids(found[0]))

    @property
    def turn(self) -> AssistantTurn:
        """How the template writes an assistant turn after a user's."""
        return self._template.turn({})

    @property
    def turn_names(self) -> list[str]:
        """Names of the control tokens in a prompt of one turn, without the first of every text and tags of thoughts."""
        names = dict.fromkeys(found[0] for found in self._texts.added.finditer(self.turn.prompt))
        return [n for n in names if n != self.tokenizer.bos_token and self._texts.in_replies.fullmatch(n)]

    def unshown(self, messages: Sequence[Message], options: Mapping[str, Any]) -> str | None:
        """The first of a row's own ``options`` that the template does not show, as it would be lost; else None."""
        template = str(self.tokenizer.chat_template or "")
        others = {name: value for name, value in options.items() if name != "tools"}
        if len(others) < len(options) and self.render(messages, options) == self.render(messages, others):
            return "tools"
        return next((name for name in others if not re.search(rf"\b{re.escape(name)}\b", template)), None)

    def render(
        self, messages: Sequence[Message], options: Mapping[str, Any] | None = None, *, checked: bool = True
    ) -> str:
        """The prompt as text, up to the start of the reply.

        Args:
            messages: the chat. The content of a turn may be :class:`Verbatim`.
            options: further arguments of the chat template, in addition to the format's own.
            checked: whether a message that is left out is an error.

        Raises:
            TemplateRefusal: the template rejects the messages, or leaves one out.
        """
        chat = self._writer.hidden(*self._prepared(messages, options or {}))
        text = self._writer.written(chat, checked=0 if checked else len(chat.given))
        return NAME.sub(lambda found: chat.names[int(found[1])], text)

    def encode_prompt(
        self,
        messages: Sequence[Message],
        options: Mapping[str, Any] | None = None,
        pictures: Mapping[str, Picture] | None = None,
    ) -> list[int]:
        """Token ids of the prompt, see :meth:`render`; a :class:`PromptIds` if it has pictures.

        ``pictures`` are those whose marks in the messages count, by their hashes.
        """
        chat = self._writer.hidden(*self._prepared(messages, options or {}), pictures)
        text = self._writer.written(chat)
        # A template writes its own special tokens. Plain text gets the tokenizer's, such as a leading BOS.
        ids = [*([] if self.tokenizer.chat_template else self._texts.begin), *self._texts.mixed("", text, chat.names)]
        return PromptIds(ids, chat.pictures) if chat.pictures else ids

    def encode_completion(
        self, text: str, options: Mapping[str, Any] | None = None, *, after_result: bool = False
    ) -> list[int]:
        """Token ids of a demonstrated reply as it stands after the prompt, plus the end-of-turn token.

        They are those that the template gives when it writes the whole turn, with ``text`` itself kept verbatim. A
        thought that the prompt has opened is continued, or closed. ``after_result`` is as in :meth:`encode_reply`.
        """
        return self.encode_reply({"role": "assistant", "content": text}, options, after_result=after_result)

    def encode_reply(
        self, message: Message, options: Mapping[str, Any] | None = None, *, after_result: bool = False
    ) -> list[int]:
        """Token ids of an assistant turn as it stands after the prompt, with its calls and the end-of-turn token.

        The content is kept verbatim, as in :meth:`encode_completion`, and calls are as the template writes them.

        Args:
            message: the reply.
            options: as in :meth:`render`.
            after_result: whether the prompt ends with a tool's result, after which some templates open no thought.

        Raises:
            TemplateRefusal: the template cannot write these calls, such as several where it has place for one.
        """
        turn, said = self._template.turn(options or {}), message["content"]
        begun = self._template.turn(options or {}, after_result=after_result)
        lead = begun.lead
        if tags := open_thought(begun.prompt):
            lead, said = "", within_open_thought(said, begun.prompt, tags)
        elif thinks(said):
            lead = without_thought(lead)
        elif not said and without_thought(lead) == lead:
            lead = ""  # such as a space in front of a text
        hidden: list[str] = []
        shown = self._texts.hide(said, self._texts.in_replies, hidden)
        if "tool_calls" in message:
            shown += self._calls_text(message, turn, options or {}, hidden)
        space = turn.after[: len(turn.after) - len(turn.after.lstrip())]
        tail = "" if self.turn_end_id is None else space
        return [*self._texts.mixed(begun.prompt, lead + shown + tail, hidden), self._end_of(message)]

    def _end_of(self, reply: Message) -> int:
        """The token that ends a reply; after calls it may be the one that begins their results."""
        if "tool_calls" in reply and self._template.calls is not None:
            for found in self._texts.added.finditer(self._template.calls.to_result):
                if found[0] in self.end_names:
                    return int(self.tokenizer.convert_tokens_to_ids(found[0]))
        return self.end_token_id

    def encode_between(
        self,
        before: Sequence[Message],
        observations: Sequence[Message],
        options: Mapping[str, Any] | None = None,
        sampled: Sequence[int] = (),
    ) -> list[int]:
        """Token ids from the end token of a reply to the next reply: the observations and the start of that turn.

        Earlier turns are not rendered anew: what the template writes otherwise there, such as without thoughts, stays
        as it was sampled.

        Args:
            before: the chat, which ends with the reply.
            observations: what follows it: tool messages or user turns.
            options: as in :meth:`render`.
            sampled: the reply's ids, if they were sampled. In the plain-text layout they may end with the beginning of
                the next turn in place of an end token; it is then not written twice.

        Raises:
            TemplateRefusal: the template rejects the chat, or does not tell where the reply ends.
        """
        end = str(self.tokenizer.convert_ids_to_tokens(self._end_of(before[-1])))
        if not self.tokenizer.chat_template:
            chat = self._writer.hidden(observations, {})
            text = f"\n\n{self._writer.written(chat)}"
            if sampled and sampled[-1] not in self._ends:
                return self._texts.mixed(NEXT_TURN, text.removeprefix(NEXT_TURN), chat.names)
            return self._texts.mixed(end, text, chat.names)
        messages, given = self._prepared([*before, *observations], options or {})
        first = len(messages) - len(observations)
        chat = self._writer.hidden(messages, given)
        text, head = self._writer.written(chat, checked=first), self._writer.text_before(chat, first)
        if self.turn_end_id is not None and end not in head:
            end = str(self.tokenizer.convert_ids_to_tokens(self.turn_end_id))
        asked = self._writer.written(self._writer.hidden(messages[: first - 1], given), checked=first)
        if head.count(end) == asked.count(end) or not text.startswith(head):
            raise TemplateRefusal("the chat template does not end an assistant turn before what follows it")
        return self._texts.mixed(end, text[head.rindex(end) + len(end) :], chat.names)

    @property
    def writes_calls(self) -> bool:
        """Whether the template writes calls in a form that is read; else they are lines of text."""
        return self._template.calls is not None and self._template.calls.is_read

    @property
    def reads_calls(self) -> bool:
        """Whether calls in replies are read: in the template's form or, if it writes none, as lines of text."""
        return self._template.calls is None or self._template.calls.is_read

    def message_of(
        self, ids: Sequence[int], prompt: Sequence[int] = (), options: Mapping[str, Any] | None = None
    ) -> Message:
        """A reply as a message, the inverse of :meth:`encode_reply` except for white space around its content.

        Args:
            ids: of the reply.
            prompt: ids of its prompt, which may have opened a thought.
            options: as in :meth:`render`; the schemas of ``tools`` say which values an argument may have.

        Returns:
            The assistant's message, of text alone unless :attr:`reads_calls`. If a call cannot be read it has no
            ``tool_calls``, the whole text as its content, and under ``invalid`` the reason, in words for a model.
        """
        form = self._template.calls
        text = self.decode(ids, form.written if form else "")
        opened = self.opened_thought(prompt)
        thought, said = split_thinking(text, begun=opened is not None)
        head = text[: len(text) - len(said)]
        if not thought.strip() and (said or opened):
            head = ""
        elif opened:
            head = f"{opened[0]}\n{head}"
        try:
            content, calls = form.read(said, (options or {}).get("tools", ())) if form else read_text(said)
        except InvalidCall as error:
            return {"role": "assistant", "content": head + said, "invalid": str(error)}
        made: Message = {"role": "assistant", "content": (head + content).strip()}
        return {**made, "tool_calls": calls} if calls else made

    def closes_thought(self, options: Mapping[str, Any] | None = None, *, after_result: bool = False) -> bool:
        """Whether the prompt ends with a thought that is closed already; arguments as in :meth:`encode_reply`."""
        prompt = self._template.turn(options or {}, after_result=after_result).prompt
        return bool(re.search(rf"({EMPTY_THOUGHT})\Z", prompt))

    def encode_text(self, text: str) -> list[int]:
        """Token ids of a plain text, without control tokens."""
        return self._texts.encode(text)

    def encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Token ids of a plain text and of its continuation, which are those of the joint text after the context's."""
        head, whole = self._texts.ids(context, split=True), self._texts.ids(context + continuation, split=True)
        return self._texts.begin + whole[: len(head)], whole[len(head) :]

    def decode(self, ids: Sequence[int], also: str = "") -> str:
        """Decode a reply, skipping special tokens except thinking and tool tags, and the tokens that ``also`` names."""
        text = self._texts.decode(ids, also)
        return (text if self.tokenizer.chat_template else text.partition(NEXT_TURN)[0]).strip()

    def opened_thought(self, prompt: Sequence[int]) -> tuple[str, str] | None:
        """The tags of the thought with which a prompt ends, for the reply to continue; None if it ends with none."""
        return open_thought(str(self.tokenizer.decode(list(prompt[-8:]))))  # a tag may take several tokens

    def _prepared(
        self, messages: Sequence[Message], options: Mapping[str, Any]
    ) -> tuple[list[Message], Mapping[str, Any]]:
        """The messages, with the tools in them if the template does not show tools, and the template's options."""
        if options.get("tools") and not self._template.shows_tools:
            messages = with_tools(messages, options["tools"], how=self._template.calls is None)
            options = {name: value for name, value in options.items() if name != "tools"}
        return list(messages), options

    def _calls_text(self, message: Message, turn: AssistantTurn, options: Mapping[str, Any], hidden: list[str]) -> str:
        """The calls of a message as they stand after its content, with names of control tokens hidden."""
        if self._template.calls is None:
            text = written([(c["function"]["name"], c["function"]["arguments"]) for c in message["tool_calls"]])
            return "\n" * bool(message["content"]) + self._texts.hide(text, self._texts.in_texts, hidden)
        if problem := self._template.calls.unwritable(message["tool_calls"]):
            raise TemplateRefusal(f"the chat template cannot write {problem}")
        calls = mapped(message["tool_calls"], lambda value: self._texts.hide(value, self._texts.in_texts, hidden))
        (shown,) = self._template.calls.shown([{**message, "tool_calls": calls}])
        if message["content"]:
            _, _, text = self._template.reply([*turn.asked, {**shown, "content": REPLY}], turn, options).partition(
                REPLY
            )
            if calls[0]["function"]["name"] in text:
                return text
        text = self._template.reply([*turn.asked, {**shown, "content": ""}], turn, options)
        return "\n" * bool(message["content"]) + text


def thought_and_said(chat: ChatFormat, prompt: Sequence[int], ids: Sequence[int]) -> tuple[str, str]:
    """Split a reply into its thought and its final text, given the token ids of prompt and reply."""
    return split_thinking(chat.decode(ids), begun=chat.opened_thought(prompt) is not None)
