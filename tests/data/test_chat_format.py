"""What chat template and tokenizer do to a text is what the user meant, for tokenizers and templates of many kinds."""

from __future__ import annotations

import string
from collections.abc import Callable
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from tool_templates import CALL_TAGS, HERMES, ToolTemplate
from transformers import PreTrainedTokenizerFast

from selfdistill import UserError
from selfdistill.data import ChatFormat, Demonstration, encode, load_demonstrations, notes_on, parse_context, texts_of
from selfdistill.data.chat_format import thought_and_said

LIMITS: dict[str, Any] = {"max_prompt_length": None, "max_completion_length": 64, "window": None}
STRIPPING = (
    "{% for m in messages %}{% set said = m.content %}"
    "{% if m.role == 'assistant' %}{% set said = said.split('</think>')[-1] | trim %}{% endif %}"
    "<|im_start|>{{ m.role }}\n{{ said }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
OPENING = STRIPPING.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}")
EMPTY_FIRST = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}<think>\n\n</think>\n\n{% endif %}"
    "{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
THOUGHT = "<think>\n7 + 5 = 12\n</think>\n\n42"


def demonstration(question: str = "Why?", reply: str = "So.", row: int = 0) -> Demonstration:
    return Demonstration(question, reply, row=row, source=f"d.jsonl:{row + 1}")


def shown(chat: ChatFormat, reply: str, context: str = "turns") -> str:
    row = demonstration(reply=reply)
    return chat.tokenizer.decode(chat.encode_prompt(parse_context(context).messages(row, [row])))


# --- tokenizers whose pieces depend on what stands before ---


def sentencepiece(scheme: str, template: str | None) -> PreTrainedTokenizerFast:
    """Of the kind of Llama 2 (``prepend``), or with Metaspace: a space is put in front of a text, or of every part."""
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2, "▁": 3}
    for letter in string.digits + string.ascii_letters + string.punctuation + "\n":
        vocabulary.setdefault(letter, len(vocabulary))
    merges = [("Y", "e"), ("Ye", "s"), ("▁", "Yes")]
    for a, b in merges:
        vocabulary.setdefault(a + b, len(vocabulary))
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>", fuse_unk=True))
    if scheme == "prepend":
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
        backend.decoder = decoders.Metaspace(prepend_scheme=scheme)
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="</s>"
    )
    tokenizer.chat_template = template
    return tokenizer


LINES = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
BRACKETS = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token }}[INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content }} {{ eos_token }}{% endif %}{% endfor %}"
)


@pytest.mark.parametrize("scheme", ["prepend", "first", "always", "never"])
@pytest.mark.parametrize("template", [LINES, BRACKETS])
@pytest.mark.parametrize("reply", ["Yes", "Yes, no", "a b", "(Yes)"])
def test_a_completion_has_the_tokens_of_the_whole_turn(scheme: str, template: str, reply: str) -> None:
    tokenizer = sentencepiece(scheme, template)
    chat = ChatFormat(tokenizer, [2], {})
    row = demonstration("ok?", reply)
    turns = [*row.prompt, {"role": "assistant", "content": reply}]
    text = tokenizer.apply_chat_template(turns, tokenize=False)
    whole = tokenizer(text, add_special_tokens=False)["input_ids"]
    own = chat.encode_prompt(row.prompt) + chat.encode_completion(reply)
    assert own == whole[: len(own)]
    assert 2 not in whole[len(own) :]
    assert chat.decode(chat.encode_completion(reply)) == reply


@pytest.mark.parametrize("scheme", ["prepend", "first", "always", "never"])
@pytest.mark.parametrize("template", [LINES, BRACKETS, None])
def test_names_of_control_tokens_keep_their_spaces(scheme: str, template: str | None) -> None:
    chat = ChatFormat(sentencepiece(scheme, template), [2], {})
    odd = "a <s>b</s> c</s>"
    prompt = chat.encode_prompt(demonstration(odd).prompt)
    assert odd in chat.tokenizer.decode(prompt)
    assert prompt.count(2) == chat.encode_prompt(demonstration("a").prompt).count(2)
    assert chat.decode(chat.encode_completion(odd)) == odd
    assert odd in shown(chat, odd)


def test_without_a_template_a_completion_stands_after_its_label() -> None:
    chat = ChatFormat(sentencepiece("prepend", None), [2], {})
    assert chat.tokenizer.convert_ids_to_tokens(chat.encode_completion("Yes")) == ["▁Yes", "</s>"]


@pytest.mark.parametrize("template", ["chatml", None])
def test_what_a_tokenizer_appends_is_left_out(make_tokenizer: Callable[..., Any], template: str | None) -> None:
    tokenizer = make_tokenizer() if template else make_tokenizer(template=None)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|stop|> $A <|im_end|>", special_tokens=[("<|stop|>", 259), ("<|im_end|>", 257)]
    )
    chat = ChatFormat(tokenizer, [257], {})
    prompt = chat.encode_prompt(demonstration().prompt)
    assert prompt[-1] != 257
    assert prompt.count(259) == (0 if template else 1)
    head, tail = chat.encode_pair("The sky is", " blue")
    assert (head[0], tokenizer.decode(head[1:]), tokenizer.decode(tail)) == (259, "The sky is", " blue")
    assert 257 not in head + tail


def test_decoding_leaves_spaces_alone(make_tokenizer: Callable[..., Any]) -> None:
    tokenizer = make_tokenizer()
    tokenizer.clean_up_tokenization_spaces = True
    chat = ChatFormat(tokenizer, [257], {})
    assert chat.decode(chat.encode_completion("a , b . do n't")) == "a , b . do n't"


# --- what a tokenizer loses is told ---


def note_on(tokenizer: Any, *replies: str) -> str | None:
    chat = ChatFormat(tokenizer, [2], {})
    rows = [demonstration(reply=reply, row=number) for number, reply in enumerate(replies)]
    return "; ".join(notes_on(encode(rows, None, chat, **LIMITS)[0], chat)) or None


def test_a_completion_that_the_tokenizer_changes_is_told() -> None:
    assert note_on(sentencepiece("first", LINES), "Yes", "no") is None
    assert note_on(sentencepiece("first", LINES), "Yes", "caf\u00e9!") == (
        "the tokenizer changes 1 of 2 completions: in d.jsonl:2, 'caf\u00e9!' becomes 'caf!'"
    )
    lower = sentencepiece("first", LINES)
    lower.backend_tokenizer.normalizer = normalizers.Lowercase()
    assert "'Yes' becomes 'yes'" in str(note_on(lower, "Yes"))


def test_a_composed_letter_is_no_change(make_tokenizer: Callable[..., Any]) -> None:
    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.NFC()
    chat = ChatFormat(tokenizer, [257], {})
    examples, _ = encode([demonstration(reply="cafe\u0301")], None, chat, **LIMITS)
    assert notes_on(examples, chat) == []


# --- the demonstration that the teacher reads is the demonstration ---


@pytest.mark.parametrize("template", [STRIPPING, OPENING, EMPTY_FIRST])
@pytest.mark.parametrize("context", ["turns:repeats=2", "few_shot:k=1,this=true", "document:show=answer"])
@pytest.mark.parametrize("reply", [THOUGHT, "  indented\n    code\n"])
def test_the_demonstration_is_shown_as_it_is(
    make_tokenizer: Callable[..., Any], template: str, context: str, reply: str
) -> None:
    chat = ChatFormat(make_tokenizer(template=template), [257], {})
    rows = [demonstration(reply=reply), demonstration("Who?", "Me.", row=1)]
    text = chat.render(parse_context(context).messages(rows[0], rows))
    assert text.count(f"{reply}<|im_end|>") == (2 if "repeats" in context else 1)
    assert "<think>\n\n</think>\n\n<think>" not in text


def test_thoughts_in_earlier_turns_of_a_prompt_are_the_templates_affair(make_tokenizer: Callable[..., Any]) -> None:
    chat = ChatFormat(make_tokenizer(template=STRIPPING), [257], {})
    turns = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": THOUGHT},
        {"role": "user", "content": "b"},
    ]
    assert "<think>" not in chat.render(turns)


@pytest.mark.parametrize(
    ("loop", "found"),
    [
        ("for m in messages if m.role != 'system'", "system turn 'Be brief.'"),
        ("for m in messages[-1:]", "system turn 'Be brief.'"),
        ("for m in messages if m.role != 'assistant'", "assistant turn 'First.'"),
    ],
)
def test_a_template_that_leaves_out_a_turn_is_refused(
    make_tokenizer: Callable[..., Any], loop: str, found: str
) -> None:
    template = "{% " + loop + " %}{{ m.role }}: {{ m.content }}<|im_end|>{% endfor %}"
    chat = ChatFormat(make_tokenizer(template=template), [257], {})
    rows = load_demonstrations(
        [
            {"prompt": "q", "completion": "a"},
            {
                "prompt": [
                    {"role": "system", "content": "Be brief."},
                    {"role": "user", "content": "One?"},
                    {"role": "assistant", "content": "First."},
                    {"role": "user", "content": "Two?"},
                ],
                "completion": "b",
            },
        ]
    )
    with pytest.raises(UserError, match=r"^1 of 2 rows do not fit the chat template: data\[1\]: ") as error:
        encode(rows, None, chat, **LIMITS)
    assert f"leaves out or rewrites the {found}" in str(error.value)


def test_a_template_that_rewrites_a_text_or_drops_the_demonstration_is_refused(
    make_tokenizer: Callable[..., Any],
) -> None:
    upper = ChatFormat(make_tokenizer(template="{% for m in messages %}{{ m.content | upper }}{% endfor %}"), [257], {})
    with pytest.raises(UserError, match=r"leaves out or rewrites the user turn 'Why\?'"):
        upper.encode_prompt(demonstration().prompt)
    short = "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}"
    last = ChatFormat(make_tokenizer(template=short), [257], {})
    with pytest.raises(UserError, match=r"d.jsonl:1: .* leaves out the demonstration, an earlier assistant turn$"):
        encode([demonstration()], parse_context("turns"), last, **LIMITS)


def test_every_row_that_a_template_refuses_is_named(make_tokenizer: Callable[..., Any]) -> None:
    template = (
        "{% if messages[1:2] and messages[1].role == 'user' %}{{ raise_exception('one turn\n only') }}{% endif %}"
    )
    template += "{{ messages[0].content }}"
    chat = ChatFormat(make_tokenizer(template=template), [257], {})
    twice = ({"role": "user", "content": "a"}, {"role": "user", "content": "b"})
    rows = [
        Demonstration(twice if number % 2 else "a", "x", row=number, source=f"d.jsonl:{number + 1}")
        for number in range(30)
    ]
    with pytest.raises(UserError) as error:
        encode(rows, None, chat, **LIMITS)
    assert str(error.value) == (
        "15 of 30 rows do not fit the chat template: d.jsonl:2, 4, 6 and 12 more: the chat template rejects the roles "
        "user, user: one turn only"
    )


# --- thinking ---


def thinking(make_tokenizer: Callable[..., Any], template: str, *, special: bool) -> ChatFormat:
    tokenizer = make_tokenizer(template=template)
    tokenizer.add_tokens(["<think>", "</think>"], special_tokens=special)
    return ChatFormat(tokenizer, [257], {})


@pytest.mark.parametrize("special", [True, False])
def test_tags_are_tokens_where_a_model_writes_them_and_nowhere_else(
    make_tokenizer: Callable[..., Any], special: bool
) -> None:
    chat = thinking(make_tokenizer, STRIPPING, special=special)
    begin, end = chat.tokenizer.convert_tokens_to_ids(["<think>", "</think>"])
    completion = chat.encode_completion(THOUGHT)
    assert (completion.count(begin), completion.count(end)) == (1, 1)
    prompt = chat.encode_prompt(demonstration().prompt)
    thought, said = thought_and_said(chat, prompt, completion)
    assert (thought.strip(), said) == ("7 + 5 = 12", "42")
    row = Demonstration(f"{THOUGHT}?", THOUGHT, document=f"A text with {THOUGHT}.", source="d.jsonl:1")
    told = chat.encode_prompt(parse_context("document:repeats=2").messages(row, [row]))
    assert (told.count(begin), told.count(end)) == (2, 2)  # of the demonstrations; none of question and document
    assert not {begin, end} & set(chat.encode_text(THOUGHT))


@pytest.mark.parametrize(
    ("template", "reply", "completion"),
    [
        (STRIPPING, THOUGHT, THOUGHT),
        (STRIPPING, "42", "42"),
        (OPENING, THOUGHT, "7 + 5 = 12\n</think>\n\n42"),  # the prompt has the opening tag
        (OPENING, "7 + 5 = 12\n</think>\n\n42", "7 + 5 = 12\n</think>\n\n42"),
        (OPENING, "42", "\n</think>\n\n42"),  # an empty thought, not an answer within one
        (EMPTY_FIRST, "42", "<think>\n\n</think>\n\n42"),  # as the template writes it
        (EMPTY_FIRST, THOUGHT, THOUGHT),
    ],
)
def test_a_completion_continues_the_thought_of_its_prompt(
    make_tokenizer: Callable[..., Any], template: str, reply: str, completion: str
) -> None:
    chat = thinking(make_tokenizer, template, special=False)
    ids = chat.encode_completion(reply)
    assert chat.tokenizer.decode(ids[:-1]) == completion
    assert thought_and_said(chat, chat.encode_prompt(demonstration().prompt), ids)[1] == "42"
    examples, _ = encode([demonstration(reply=reply)], None, chat, **LIMITS)
    assert notes_on(examples, chat) == []


@pytest.mark.parametrize(
    ("reply", "said"),
    [("[THINK]no[/THINK]yes", "yes"), ("<|START_THINKING|>no<|END_THINKING|>yes", "yes"), ("[THINK]no", "")],
)
def test_other_families_tags_are_thoughts_too(make_tokenizer: Callable[..., Any], reply: str, said: str) -> None:
    chat = ChatFormat(make_tokenizer(), [257], {})
    assert thought_and_said(chat, [], chat.encode_completion(reply)[:-1])[1] == said


def test_a_tool_tag_may_be_demonstrated_but_not_the_end_of_a_turn(make_tokenizer: Callable[..., Any]) -> None:
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["<tool_call>"], special_tokens=True)
    chat = ChatFormat(tokenizer, [257], {})
    ids = chat.encode_completion("<tool_call>{}<|im_end|>!")
    assert ids.count(tokenizer.convert_tokens_to_ids("<tool_call>")) == 1
    assert ids.count(257) == 1
    assert chat.decode(ids) == "<tool_call>{}<|im_end|>!"


# --- the clock ---

DATED = "Today is {{ strftime_now('%d %b %Y') }}. {% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}"


def test_an_end_token_is_no_part_of_a_reply_whether_special_or_not() -> None:
    template = ToolTemplate("ends otherwise", HERMES, "<|endoftext|>", ("<|im_start|>",), ("<|im_end|>", *CALL_TAGS))
    tokenizer = template.tokenizer()
    ends = tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_end|>", "a"])
    chat, ids = ChatFormat(tokenizer, ends, {}), tokenizer("Lima is a<|im_end|>")["input_ids"]
    assert chat.encode_completion("Lima is a") == ids
    assert chat.decode(ids) == chat.message_of(ids)["content"] == thought_and_said(chat, [], ids)[1] == "Lima is a"
    row = demonstration(reply="Lima is a")
    examples, _ = encode([row], None, chat, **LIMITS)
    assert notes_on(examples, chat) == []
    with pytest.raises(
        UserError, match=r"completions end with <\|endoftext\|> or <\|im_end\|>, which the chat format adds"
    ):
        encode([demonstration(reply="Lima<|im_end|>")], None, chat, **LIMITS)
    call = '<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>'
    ends_calls = ChatFormat(tokenizer, tokenizer.convert_tokens_to_ids(["<|im_end|>", "</tool_call>"]), {})
    assert ends_calls.decode(tokenizer(call)["input_ids"]) == call


def test_a_template_sees_the_day_that_it_is_given(make_tokenizer: Callable[..., Any]) -> None:
    tokenizer = make_tokenizer(template=DATED)
    asked = demonstration().prompt
    assert ChatFormat(tokenizer, [257], {}, "2020-03-05").render(asked).startswith("Today is 05 Mar 2020. Why?")
    assert ChatFormat(tokenizer, [257], {}).render(asked) == tokenizer.apply_chat_template(asked, tokenize=False)
    assert ChatFormat(make_tokenizer(), [257], {}).date is None


@pytest.mark.parametrize(
    ("format_", "written"),
    [
        ("%B %d, %Y", "March 05, 2020"),
        ("%-d/%-m/%y", "5/3/20"),
        ("%F %H:%M:%S", "2020-03-05 00:00:00"),
        ("100%% on %A", "100% on Thursday"),
        ("", ""),
    ],
)
@pytest.mark.parametrize(
    "frame", ["{}", "\n  {{% if strftime_now is defined %}}{}{{% endif %}}", "{{%- set a = 1 %}} {}"]
)
def test_a_pinned_clock_writes_as_pythons_does(
    make_tokenizer: Callable[..., Any], format_: str, written: str, frame: str
) -> None:
    template = frame.format("{{ strftime_now('" + format_ + "') }}") + "{{ messages[0].content }}"
    free = make_tokenizer(template=template.replace(f"strftime_now('{format_}')", f"'{written}'"))
    pinned = ChatFormat(make_tokenizer(template=template), [257], {}, "2020-03-05")
    asked = demonstration().prompt
    assert pinned.render(asked) == free.apply_chat_template(asked, tokenize=False)


# --- odd templates and tokenizers ---


def swallowing(template: str) -> PreTrainedTokenizerFast:
    """Of the kind of Phi-3: SentencePiece, with role markers that swallow the white space after them."""
    tokenizer = sentencepiece("prepend", template)
    markers = [AddedToken(name, rstrip=True, special=True) for name in ("<|user|>", "<|assistant|>", "<|end|>")]
    tokenizer.add_tokens(markers, special_tokens=True)
    return tokenizer


SWALLOWED = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


def test_a_completion_after_a_token_that_swallows_white_space_keeps_its_own() -> None:
    tokenizer = swallowing(SWALLOWED)
    end = tokenizer.convert_tokens_to_ids("<|end|>")
    chat = ChatFormat(tokenizer, [2, end], {})
    turns = [{"role": "user", "content": "ok?"}, {"role": "assistant", "content": "Yes"}]
    whole = tokenizer(tokenizer.apply_chat_template(turns, tokenize=False), add_special_tokens=False)["input_ids"]
    assert chat.encode_prompt(turns[:1]) + chat.encode_completion("Yes") == whole
    assert chat.decode(chat.encode_completion("  a\n    b")) == "a\n    b"
    assert tokenizer.convert_ids_to_tokens(chat.encode_completion("  a"))[:3] == ["▁", "▁", "a"]


@pytest.mark.parametrize("role", ["system", "user"])
def test_a_switch_that_a_template_takes_out_of_a_text_is_not_missed(
    make_tokenizer: Callable[..., Any], role: str
) -> None:
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content.replace('/no_think', '') | trim }}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    chat = ChatFormat(make_tokenizer(template=template), [257], {})
    turns = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Why?"}]
    for turn in turns:
        if turn["role"] == role:
            turn["content"] = "Be brief. /no_think Really."
    assert "Be brief." in chat.render(turns)


@pytest.mark.parametrize(("system", "asked"), [("Be brief.", "Be brief. What is up?"), ("a", "an apple")])
def test_a_turn_that_stands_in_another_is_missed_where_it_is_left_out(
    make_tokenizer: Callable[..., Any], system: str, asked: str
) -> None:
    template = "{% for m in messages if m.role != 'system' %}{{ m.content }}<|im_end|>{% endfor %}"
    chat = ChatFormat(make_tokenizer(template=template), [257], {})
    with pytest.raises(UserError, match="leaves out or rewrites the system turn"):
        chat.render([{"role": "system", "content": system}, {"role": "user", "content": asked}])


def test_a_token_of_white_space_in_the_templates_source_stays_a_token(make_tokenizer: Callable[..., Any]) -> None:
    tokenizer = make_tokenizer(template="{% for m in messages %}\n    {{ m.content }}<|im_end|>\n{% endfor %}")
    tokenizer.add_tokens(["    "])
    chat = ChatFormat(tokenizer, [257], {})
    assert tokenizer.convert_tokens_to_ids("    ") in chat.encode_completion("f():\n    return 1")


def test_a_template_that_needs_a_system_turn_still_ends_replies(make_tokenizer: Callable[..., Any]) -> None:
    needs = "{% if messages[0].role != 'system' %}{{ raise_exception('system first') }}{% endif %}"
    template = needs + "{% for m in messages %}{{ m.role }}: {{ m.content }}<|stop|>{% endfor %}"
    chat = ChatFormat(make_tokenizer(template=template), [257, 259], {})
    assert chat.encode_completion("a")[-1] == 259


def test_a_template_that_ends_all_replies_but_the_last_ends_that_too(make_tokenizer: Callable[..., Any]) -> None:
    template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}"
        "{% if not loop.last or m.role == 'user' %}<|im_end|>{% endif %}{% endfor %}"
    )
    assert ChatFormat(make_tokenizer(template=template), [257], {}).turn_end_id == 257


@pytest.mark.parametrize(
    "text", ["x\U0010fffdV0\U0010fffdy", "\U0010fffd0\U0010fffd", "<|im_end|>\U0010fffdV1\U0010fffd"]
)
def test_private_characters_are_no_markers_in_a_teachers_prompt(make_tokenizer: Callable[..., Any], text: str) -> None:
    chat = ChatFormat(make_tokenizer(), [257], {})
    row = demonstration(text, f"so {text}")
    for context in ("turns:repeats=2", "example"):
        told = chat.tokenizer.decode(chat.encode_prompt(parse_context(context).messages(row, [row])))
        assert told.count(f"so {text}") == (2 if "turns" in context else 1)
        assert told.count(text) == told.count(f"so {text}") + (3 if "turns" in context else 1)


def test_a_control_token_of_one_letter_stays_text(make_tokenizer: Callable[..., Any]) -> None:
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["☃"], special_tokens=True)
    chat = ChatFormat(tokenizer, [257], {})
    assert tokenizer.convert_tokens_to_ids("☃") not in chat.encode_prompt(demonstration("5 ☃?").prompt)


@pytest.mark.parametrize("reply", ["The tag </think> closes it.", "Use </think>", "a </think> b"])
def test_a_text_about_a_tag_is_no_thought(make_tokenizer: Callable[..., Any], reply: str) -> None:
    chat = ChatFormat(make_tokenizer(), [257], {})
    assert thought_and_said(chat, chat.encode_prompt(demonstration().prompt), chat.encode_completion(reply)) == (
        "",
        reply,
    )


def test_a_thought_without_its_opening_tag_has_the_closing_one_on_a_line(make_tokenizer: Callable[..., Any]) -> None:
    chat = ChatFormat(make_tokenizer(), [257], {})
    ids = chat.encode_completion("7 + 5\n</think>\n\n42")
    assert thought_and_said(chat, [], ids) == ("7 + 5\n", "42")


def test_a_thought_that_never_closes_goes_on_as_it_is(make_tokenizer: Callable[..., Any]) -> None:
    chat = thinking(make_tokenizer, OPENING, special=False)
    assert chat.tokenizer.decode(chat.encode_completion("<think>\nnever closed")[:-1]) == "never closed"


def test_a_thought_after_a_closed_one_and_an_unused_argument_are_told(make_tokenizer: Callable[..., Any]) -> None:
    closed = STRIPPING.replace("assistant\n{% endif %}", "assistant\n<think>\n\n</think>\n\n{% endif %}")
    chat = ChatFormat(make_tokenizer(template=closed), [257], {"enable_thinkin": False})
    examples, _ = encode([demonstration(reply=THOUGHT), demonstration(row=1)], None, chat, **LIMITS)
    assert notes_on(examples, chat) == [
        "1 of 2 completions think, but the chat template closes the thought before the reply (d.jsonl:1); remove their "
        "thoughts, or turn thinking on (chat_template_kwargs)",
        "setting 'chat_template_kwargs': the chat template does not use 'enable_thinkin'",
    ]


@pytest.mark.parametrize(
    ("text", "merges", "texts"),
    [
        ("ab", (), ["a", "b"]),
        ("界", (), ["", "", "界"]),
        ("é<|im_end|>", (), ["", "é", "<|im_end|>"]),
        ("x界y", (("x", "ç"),), ["x", "", "界", "y"]),  # ç is the first byte of the character
    ],
)
def test_a_character_is_the_text_of_its_last_token(
    make_tokenizer: Callable[..., PreTrainedTokenizerFast], text: str, merges: Any, texts: list[str]
) -> None:
    tokenizer = make_tokenizer(merges=merges)
    assert texts_of(tokenizer, tokenizer.encode(text)) == texts


def test_bytes_that_are_no_character_are_replaced(make_tokenizer: Callable[..., PreTrainedTokenizerFast]) -> None:
    tokenizer = make_tokenizer()
    first, second, third = tokenizer.encode("界")
    end, lost = tokenizer.eos_token_id, "\N{REPLACEMENT CHARACTER}"
    assert texts_of(tokenizer, []) == []
    assert texts_of(tokenizer, [first, second]) == [lost, lost]
    assert texts_of(tokenizer, [first, end, third]) == [lost, "<|im_end|>", lost]
    assert texts_of(tokenizer, [first] * 9 + [first, second, third]) == [lost] * 9 + ["", "", "界"]
