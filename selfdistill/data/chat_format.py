"""Chat messages to token ids and back, through the chat template or a plain-text layout; text never becomes markup."""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from selfdistill.data.contexts import Verbatim
from selfdistill.data.images import Picture, PictureTokens, PromptIds, as_parts, split_at_pictures
from selfdistill.data.messages import Message
from selfdistill.data.template_clock import pinned
from selfdistill.data.thinking import (
    EMPTY_THOUGHT,
    open_thought,
    split_thinking,
    thinks,
    within_open_thought,
    without_thought,
)
from selfdistill.errors import UserError

_HIDDEN = "\U0010fffd"
"""Delimits the number of a hidden text. A private-use character, unlikely to occur next to a number in any text."""
_NAME = re.compile(f"{_HIDDEN}([0-9]+){_HIDDEN}")
_PLACE = f"{_HIDDEN}P{_HIDDEN}"
"""Where a picture stands in a message."""
_VERBATIM = re.compile(f"{_NAME.pattern}|(?P<thought>{EMPTY_THOUGHT})?{_HIDDEN}V(?P<number>[0-9]+){_HIDDEN}")
"""A whole hidden turn, after the thought that a template puts in front of it; or a hidden name, to pass over it."""
_PLAIN_USER, _PLAIN_REPLY = "User:", "Assistant:"
NEXT_TURN = f"\n\n{_PLAIN_USER}"
"""Where the plain-text layout's next turn begins, a reply has ended, too: so a base model ends it."""
_REPLY = "selfdistill"
"""A word that no template writes."""
_OF_REPLIES = re.compile("think|thought|tool|python_tag|function_call", re.IGNORECASE)
"""Control tokens that a model writes within its reply, so that a demonstration may contain them."""
_ANCHOR = 32
"""Characters of the preceding text with which a text is tokenised."""


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


def _any_of(names: Sequence[str], *patterns: str) -> re.Pattern[str]:
    """Matches any of the names, longest first, the character that hides them, or a pattern."""
    longest_first = sorted([*names, _HIDDEN], key=len, reverse=True)
    return re.compile("|".join([*map(re.escape, longest_first), *patterns]))


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
        added = {str(token): token for token in tokenizer.added_tokens_decoder.values()}
        self._added = _any_of(list(added))
        self._swallowing = {name for name, token in added.items() if token.rstrip}
        special = {name for name, token in added.items() if token.special}
        self.end_names = [name for name in tokenizer.convert_ids_to_tokens(self._ends) if name in special]
        of_replies = {name for name in added if _OF_REPLIES.search(name)}.difference(self.end_names)
        of_reply_ids = tokenizer.convert_tokens_to_ids(sorted(of_replies))
        special_ids = tokenizer.convert_tokens_to_ids(sorted(special))
        self._skipped = {*special_ids, *tokenizer.all_special_ids}.difference(of_reply_ids)
        # A template may also write tokens that are not special, such as <|User|>.
        control = special | of_replies | {name for name in added if name.strip() and name in template}
        # Next to a token that swallows white space, that of a text is encoded on its own.
        edges = [r"\A\s+", r"\s+\Z"] if self._swallowing else []
        self._in_texts = _any_of(list(control))
        self._in_replies = _any_of(list(control - of_replies), *edges)
        switches = re.findall(r"['\"](/\w+)['\"]", template)
        self._breaks = re.compile("|".join(map(re.escape, [_PLACE, *switches])))
        self._turns: dict[str, _Turn] = {}
        self._begin = self._tokenizers_own_start()

    @cached_property
    def end_token_id(self) -> int:
        """The end token that the template writes after an assistant turn, else the first end token."""
        after = self._ids(self._turn({}).after) if self.tokenizer.chat_template else []
        return next((token for token in after if token in self._ends), self._ends[0])

    @cached_property
    def turn_end_id(self) -> int | None:
        """The control token that the template writes after an assistant turn, an end token or not; None if none."""
        found = self._added.match(self._turn({}).after.lstrip())
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
        text, hidden, _ = self._rendered(messages, options or {})
        return _NAME.sub(lambda found: hidden[int(found[1])], text)

    def encode_prompt(
        self,
        messages: Sequence[Message],
        options: Mapping[str, Any] | None = None,
        pictures: Mapping[str, Picture] | None = None,
    ) -> list[int]:
        """Token ids of the prompt, see :meth:`render`; a :class:`PromptIds` if it has pictures.

        ``pictures`` are those whose marks in the messages count, by their hashes.
        """
        text, hidden, seen = self._rendered(messages, options or {}, pictures)
        # A template writes its own special tokens. Plain text gets the tokenizer's, such as a leading BOS.
        ids = [*([] if self.tokenizer.chat_template else self._begin), *self._mixed("", text, hidden)]
        return PromptIds(ids, seen) if seen else ids

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
        shown = self._hide(said, self._in_replies, hidden)
        space = turn.after[: len(turn.after) - len(turn.after.lstrip())]
        tail = "" if self.turn_end_id is None else space
        return [*self._mixed(turn.prompt, lead + shown + tail, hidden), self.end_token_id]

    def closes_thought(self, options: Mapping[str, Any] | None = None) -> bool:
        """Whether the prompt ends with a thought that is closed already."""
        return bool(re.search(rf"({EMPTY_THOUGHT})\Z", self._turn(options or {}).prompt))

    def encode_text(self, text: str) -> list[int]:
        """Token ids of a plain text, without control tokens."""
        hidden: list[str] = []
        return self._mixed("", self._hide(text, self._in_texts, hidden), hidden)

    def encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Token ids of a plain text and of its continuation, which are those of the joint text after the context's."""
        head, whole = self._ids(context, split=True), self._ids(context + continuation, split=True)
        return self._begin + whole[: len(head)], whole[len(head) :]

    def decode(self, ids: Sequence[int]) -> str:
        """Decode a reply, skipping special tokens except thinking and tool tags."""
        kept = [token for token in ids if token not in self._skipped]
        text = str(self.tokenizer.decode(kept, clean_up_tokenization_spaces=False))
        return (text if self.tokenizer.chat_template else text.partition(NEXT_TURN)[0]).strip()

    def _rendered(
        self,
        messages: Sequence[Message],
        options: Mapping[str, Any],
        pictures: Mapping[str, Picture] | None = None,
    ) -> tuple[str, list[str], list[Picture]]:
        """The prompt with names of control tokens in its texts hidden, the hidden names by number, and its pictures."""
        hidden: list[str] = []
        seen: list[Picture] = []
        verbatim: list[str] = []
        shown: list[Message] = []
        for message in messages:
            content = message["content"]
            names = self._in_replies if message["role"] == "assistant" else self._in_texts
            pieces = split_at_pictures(content, pictures or {})
            seen += [piece for piece in pieces if isinstance(piece, Picture)]
            text = "".join(_PLACE if isinstance(x, Picture) else self._hide(x, names, hidden) for x in pieces)
            if isinstance(content, Verbatim):
                verbatim.append(text)
                text = f"{_HIDDEN}V{len(verbatim) - 1}{_HIDDEN}"
            shown.append({"role": message["role"], "content": text})

        def put_in(found: re.Match[str]) -> str:
            if found["number"] is None:
                return found[0]
            text = verbatim[int(found["number"])]
            return text if thinks(text) else (found["thought"] or "") + text  # in place of an empty one

        # The texts of tools and other arguments come from the data, too.
        options = _mapped(options, lambda value: self._hide(value, self._in_texts, hidden))
        text = self._by_template(shown, options) if self.tokenizer.chat_template else self._plain(shown)
        self._refuse_left_out(messages, shown, text)
        return _VERBATIM.sub(put_in, self._with_pictures(text, seen)), hidden, seen

    def _with_pictures(self, text: str, seen: Sequence[Picture]) -> str:
        """The text as the template wrote it, with what the processor writes in place of each picture's token."""
        if self.pictures is None or not seen:
            return text
        first, *others = text.split(self.pictures.token)  # in texts of the rows its name is hidden
        if len(others) != len(seen):
            raise TemplateRefusal(f"the chat template shows {len(others)} pictures of {len(seen)}")
        return first + "".join(map("".join, zip(self.pictures.expanded(seen), others, strict=True)))

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
            parts = [part.strip() for part in self._breaks.split(content)]
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
        shown: list[Any] = list(messages)
        if self.pictures is not None:  # image-text models' templates read parts
            shown = [{**message, "content": as_parts(message["content"].split(_PLACE))} for message in messages]
        try:
            if self.date is not None:
                template = self.tokenizer.get_chat_template(None, tools=given.get("tools"))
                fixed["chat_template"] = pinned(template, datetime.date.fromisoformat(self.date))
            return str(self.tokenizer.apply_chat_template(shown, **fixed, **given))
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
        if not self._added.match(after.lstrip()):  # some end only those replies that are not the last
            more = self._by_template([*answered, asked[-1]], options, add_generation_prompt=False).partition(_REPLY)[2]
            end = str(self.tokenizer.eos_token)
            after = more[: more.find(end) + len(end)] if more.lstrip().startswith(end) else after
        return _Turn(prompt, lead, after)

    def _hide(self, text: str, names: re.Pattern[str], hidden: list[str]) -> str:
        """The text with every match replaced by a marker; appends the matches to ``hidden``."""

        def marker(found: re.Match[str]) -> str:
            hidden.append(found[0])
            return f"{_HIDDEN}{len(hidden) - 1}{_HIDDEN}"

        return names.sub(marker, text)

    def _mixed(self, before: str, text: str, hidden: Sequence[str]) -> list[int]:
        """Token ids of a text with hidden names, as it stands after ``before``; names become plain characters.

        A name is split in two, so that it never becomes the control token.
        """
        first, *others = _NAME.split(text)
        ids, before = self._after(before, first), first or before
        for number, rest in zip(others[::2], others[1::2], strict=True):
            name = hidden[int(number)]
            for piece in (name[:1], name[1:]):
                alone = self._added.fullmatch(piece)  # a control token of one letter
                ids += self._ids(piece, split=True) if alone else self._after(before, piece)
                before = piece or before
            ids += self._after(before, rest)
            before = rest or before
        return ids

    def _after(self, before: str, text: str) -> list[int]:
        """Token ids of ``text`` as it stands after ``before``, which some tokenizers encode unlike a text's start.

        Where the two would share a token, as in ids that are already fixed, they are those after a line break.
        """
        if not text or not before:
            return self._ids(text)
        anchor = before[-_ANCHOR:]
        for found in self._added.finditer(before):
            swallowed = found[0] in self._swallowing and text[:1].isspace()
            anchor = before[found.end() if swallowed else found.start() :]
        for lead in (anchor, "\n", "a"):
            head, whole = self._ids(lead), self._ids(lead + text)
            if head and whole[: len(head)] == head:
                return whole[len(head) :]
        return self._ids(text)

    def _ids(self, text: str, *, split: bool = False) -> list[int]:
        options = {"add_special_tokens": False, "split_special_tokens": split}
        return list(self.tokenizer(text, **options)["input_ids"]) if text else []

    def _tokenizers_own_start(self) -> list[int]:
        """The special tokens that the tokenizer puts in front of a text; those that it appends are left out."""
        bare, whole = self._ids("a"), list(self.tokenizer("a")["input_ids"])
        at = next((i for i in range(len(whole)) if whole[i : i + len(bare)] == bare), 0)
        return whole[:at]


def _said(message: Message) -> str:
    content = message["content"]
    return (split_thinking(content)[1] if message["role"] == "assistant" else content).strip()


def _mapped(value: Any, change: Callable[[str], str]) -> Any:
    """The value with every text in it changed, at any depth; keys, too."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {_mapped(key, change): _mapped(part, change) for key, part in value.items()}
    return [_mapped(part, change) for part in value] if isinstance(value, list) else value


def thought_and_said(chat: ChatFormat, prompt: Sequence[int], ids: Sequence[int]) -> tuple[str, str]:
    """Split a reply into its thought and its final text, given the token ids of prompt and reply."""
    begun = open_thought(str(chat.tokenizer.decode(list(prompt[-8:])))) is not None
    return split_thinking(chat.decode(ids), begun=begun)
