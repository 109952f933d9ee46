"""Chat messages to token ids and back, through the chat template or a plain-text layout; text never becomes markup."""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from selfdistill.data.contexts import Verbatim
from selfdistill.data.messages import Message
from selfdistill.data.template_clock import pinned
from selfdistill.data.text_ids import HIDDEN, NAME, TextIds, mapped
from selfdistill.data.thinking import (
    EMPTY_THOUGHT,
    open_thought,
    split_thinking,
    thinks,
    within_open_thought,
    without_thought,
)
from selfdistill.errors import UserError

_VERBATIM = re.compile(f"{NAME.pattern}|(?P<thought>{EMPTY_THOUGHT})?{HIDDEN}V(?P<number>[0-9]+){HIDDEN}")
"""A whole hidden turn, after the thought that a template puts in front of it; or a hidden name, to pass over it."""
_PLAIN_USER, _PLAIN_REPLY = "User:", "Assistant:"
NEXT_TURN = f"\n\n{_PLAIN_USER}"
"""Where the plain-text layout's next turn begins, a reply has ended, too: so a base model ends it."""
_REPLY = "selfdistill"
"""A word that no template writes."""


class TemplateRefusal(UserError):
    """The chat template rejects a conversation, or leaves out a part of it."""


@dataclass(frozen=True)
class _Turn:
    """How the template writes an assistant turn."""

    prompt: str
    """The prompt up to the reply."""
    lead: str
    """Between the prompt and the text of a reply, such as a space or an empty thought."""
    after: str
    """From the end of the text on."""


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
    """

    def __init__(
        self,
        tokenizer: Any,
        end_token_ids: Sequence[int],
        chat_template_kwargs: Mapping[str, Any],
        date: str | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.kwargs = dict(chat_template_kwargs)
        template = str(tokenizer.chat_template or "")
        self.date = (date or datetime.date.today().isoformat()) if "strftime_now" in template else None
        """The day that the template sees; None if it does not read the clock."""
        self._ends = list(end_token_ids)
        self._texts = TextIds(tokenizer, end_token_ids, template)
        self.end_names = self._texts.end_names
        switches = re.findall(r"['\"](/\w+)['\"]", template)
        self._switches = re.compile("|".join(map(re.escape, switches)) or r"(?!)")  # matches nothing
        self._turns: dict[str, _Turn] = {}

    @cached_property
    def end_token_id(self) -> int:
        """The end token that the template writes after an assistant turn, else the first end token."""
        after = self._texts.ids(self._turn({}).after) if self.tokenizer.chat_template else []
        return next((token for token in after if token in self._ends), self._ends[0])

    @cached_property
    def turn_end_id(self) -> int | None:
        """The control token that the template writes after an assistant turn, an end token or not; None if none."""
        found = self._texts.added.match(self._turn({}).after.lstrip())
        return None if found is None else int(self.tokenizer.convert_tokens_to_ids(found[0]))

    def unshown(self, messages: Sequence[Message], options: Mapping[str, Any]) -> str | None:
        """The first of a row's own ``options`` that the template does not show, as it would be lost; else None."""
        template = str(self.tokenizer.chat_template or "")
        if "tools" in options:
            others = {name: value for name, value in options.items() if name != "tools"}
            if not template or self.render(messages, options) == self.render(messages, others):
                return "tools"
        return next((name for name in options if not re.search(rf"\b{re.escape(name)}\b", template)), None)

    def render(self, messages: Sequence[Message], options: Mapping[str, Any] | None = None) -> str:
        """The prompt as text, up to the start of the reply.

        Args:
            messages: the chat. The content of a turn may be :class:`Verbatim`.
            options: further arguments of the chat template, in addition to the format's own.

        Raises:
            TemplateRefusal: the template rejects the messages, or leaves one out.
        """
        text, hidden = self._rendered(messages, options or {})
        return NAME.sub(lambda found: hidden[int(found[1])], text)

    def encode_prompt(self, messages: Sequence[Message], options: Mapping[str, Any] | None = None) -> list[int]:
        """Token ids of the prompt; see :meth:`render`."""
        text, hidden = self._rendered(messages, options or {})
        # A template writes its own special tokens. Plain text gets the tokenizer's, such as a leading BOS.
        return [*([] if self.tokenizer.chat_template else self._texts.begin), *self._texts.mixed("", text, hidden)]

    def encode_completion(self, text: str, options: Mapping[str, Any] | None = None) -> list[int]:
        """Token ids of a demonstrated reply as it stands after the prompt, plus the end-of-turn token.

        They are those that the template gives when it writes the whole turn, with ``text`` itself kept verbatim. A
        thought that the prompt has opened is continued, or closed.
        """
        turn, said = self._turn(options or {}), text
        lead = turn.lead
        if tags := open_thought(turn.prompt):
            said = within_open_thought(text, turn.prompt, tags)
        elif thinks(text):
            lead = without_thought(lead)
        hidden: list[str] = []
        shown = self._texts.hide(said, self._texts.in_replies, hidden)
        space = turn.after[: len(turn.after) - len(turn.after.lstrip())]
        tail = "" if self.turn_end_id is None else space
        return [*self._texts.mixed(turn.prompt, lead + shown + tail, hidden), self.end_token_id]

    def closes_thought(self, options: Mapping[str, Any] | None = None) -> bool:
        """Whether the prompt ends with a thought that is closed already."""
        return bool(re.search(rf"({EMPTY_THOUGHT})\Z", self._turn(options or {}).prompt))

    def encode_text(self, text: str) -> list[int]:
        """Token ids of a plain text, without control tokens."""
        return self._texts.encode(text)

    def encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Token ids of a plain text and of its continuation, which are those of the joint text after the context's."""
        head, whole = self._texts.ids(context, split=True), self._texts.ids(context + continuation, split=True)
        return self._texts.begin + whole[: len(head)], whole[len(head) :]

    def decode(self, ids: Sequence[int]) -> str:
        """Decode a reply, skipping special tokens except thinking and tool tags."""
        text = self._texts.decode(ids)
        return (text if self.tokenizer.chat_template else text.partition(NEXT_TURN)[0]).strip()

    def _rendered(self, messages: Sequence[Message], options: Mapping[str, Any]) -> tuple[str, list[str]]:
        """The prompt with names of control tokens in its texts hidden, and the hidden names by number."""
        hidden: list[str] = []
        verbatim: list[str] = []
        shown: list[Message] = []
        for message in messages:
            content = message["content"]
            text = self._texts.hide(
                content, self._texts.in_replies if message["role"] == "assistant" else self._texts.in_texts, hidden
            )
            if isinstance(content, Verbatim):
                verbatim.append(text)
                text = f"{HIDDEN}V{len(verbatim) - 1}{HIDDEN}"
            shown.append({"role": message["role"], "content": text})

        def put_in(found: re.Match[str]) -> str:
            if found["number"] is None:
                return found[0]
            text = verbatim[int(found["number"])]
            return text if thinks(text) else (found["thought"] or "") + text  # in place of an empty one

        # The texts of tools and other arguments come from the data, too.
        options = mapped(options, lambda value: self._texts.hide(value, self._texts.in_texts, hidden))
        text = self._by_template(shown, options) if self.tokenizer.chat_template else self._plain(shown)
        self._refuse_left_out(messages, shown, text)
        return _VERBATIM.sub(put_in, text), hidden

    def _refuse_left_out(self, messages: Sequence[Message], shown: Sequence[Message], text: str) -> None:
        """Refuse a rendering that lacks the text of a message.

        Missing may be what a template strips off its ends, a switch such as ``/no_think`` that it reads, and a thought
        in an earlier assistant turn of a prompt: that is how the model sees such turns.

        Args:
            messages: as given.
            shown: as the template was given them.
            text: what it made of them.
        """
        texts = [_said(message) for message in shown]
        for message, content in zip(messages, texts, strict=True):
            parts = [part.strip() for part in self._switches.split(content)]
            if all(text.count(part) >= sum(other.count(part) for other in texts) for part in filter(None, parts)):
                continue
            if isinstance(message["content"], Verbatim):
                raise TemplateRefusal("the chat template leaves out the demonstration, an earlier assistant turn")
            found = message["content"] if len(message["content"]) <= 40 else message["content"][:37] + "..."
            raise TemplateRefusal(f"the chat template leaves out or rewrites the {message['role']} turn {found!r}")

    def _plain(self, messages: Sequence[Message]) -> str:
        labels = {"system": "", "user": f"{_PLAIN_USER} ", "assistant": f"{_PLAIN_REPLY} "}
        return "".join(f"{labels[m['role']]}{m['content']}\n\n" for m in messages) + _PLAIN_REPLY

    def _by_template(
        self, messages: Sequence[Message], options: Mapping[str, Any], *, add_generation_prompt: bool = True
    ) -> str:
        fixed: dict[str, Any] = {"tokenize": False, "add_generation_prompt": add_generation_prompt}
        given = self.kwargs | dict(options)
        if taken := sorted(fixed.keys() & given.keys()):
            raise UserError(f"setting 'chat_template_kwargs': {taken[0]!r} is reserved; leave it out")
        try:
            if self.date is not None:
                template = self.tokenizer.get_chat_template(None, tools=given.get("tools"))
                fixed["chat_template"] = pinned(template, datetime.date.fromisoformat(self.date))
            return str(self.tokenizer.apply_chat_template(list(messages), **fixed, **given))
        except Exception as error:  # templates are programs and may raise anything
            roles = ", ".join(m["role"] for m in messages)
            reason = " ".join(str(error).split())
            raise TemplateRefusal(f"the chat template rejects the roles {roles}: {reason}") from None

    def _turn(self, options: Mapping[str, Any]) -> _Turn:
        """How the template writes an assistant turn with these options."""
        key = json.dumps(options, sort_keys=True, default=str)
        if key not in self._turns:
            self._turns[key] = self._probe(options)
        return self._turns[key]

    def _probe(self, options: Mapping[str, Any]) -> _Turn:
        if not self.tokenizer.chat_template:
            return _Turn(_PLAIN_REPLY, " ", "")
        user = {"role": "user", "content": "a"}
        for asked in ([user], [{"role": "system", "content": "a"}, user]):
            try:
                return self._probe_with(asked, options)
            except TemplateRefusal:
                continue
        return _Turn("", "", "")  # a template for other conversations; the rows will tell

    def _probe_with(self, asked: list[Message], options: Mapping[str, Any]) -> _Turn:
        prompt = self._by_template(asked, options)
        answered = [*asked, {"role": "assistant", "content": _REPLY}]
        before, reply, after = self._by_template(answered, options, add_generation_prompt=False).rpartition(_REPLY)
        lead = before.removeprefix(prompt) if before.startswith(prompt) else ""
        if not reply:
            return _Turn(prompt, "", "")
        if not self._texts.added.match(after.lstrip()):  # some end only those replies that are not the last
            more = self._by_template([*answered, asked[-1]], options, add_generation_prompt=False).partition(_REPLY)[2]
            end = str(self.tokenizer.eos_token)
            after = more[: more.find(end) + len(end)] if more.lstrip().startswith(end) else after
        return _Turn(prompt, lead, after)


def _said(message: Message) -> str:
    content = message["content"]
    return (split_thinking(content)[1] if message["role"] == "assistant" else content).strip()


def thought_and_said(chat: ChatFormat, prompt: Sequence[int], ids: Sequence[int]) -> tuple[str, str]:
    """Split a reply into its thought and its final text, given the token ids of prompt and reply."""
    begun = open_thought(str(chat.tokenizer.decode(list(prompt[-8:])))) is not None
    return split_thinking(chat.decode(ids), begun=begun)
