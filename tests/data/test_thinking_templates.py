"""Templates of thinking families whose turns differ from their prompts: where calls begin, and where thoughts end."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
from tool_templates import CALL_TAGS, THINK_TAGS, ToolTemplate

from selfdistill.data import (
    ChatFormat,
    Demonstration,
    encode,
    load_demonstrations,
    notes_on,
    score,
    scored_text,
    thought_and_said,
)

TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Tells the weather.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}
OPTIONS = {"tools": [TOOL]}
ASK = {"role": "user", "content": "Weather?"}
CALL = {
    "role": "assistant",
    "content": "",
    "tool_calls": [{"type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}],
}

RESULT = {"role": "tool", "name": "weather", "content": "rain"}

QWQ = """\
{%- for message in messages %}
    {%- if loop.first and tools %}{{- '<|im_start|>system\n' + (tools | tojson) + '<|im_end|>\n' }}{%- endif %}
    {%- if message.role == 'tool' %}
        {{- '<|im_start|>user\n<tool_response>\n' + message.content + '\n</tool_response><|im_end|>\n' }}
    {%- else %}
        {%- set content = message.content.split('</think>')[-1].lstrip('\n') %}
        {{- '<|im_start|>' + message.role + ('\n' + content if content or not message.tool_calls else '') }}
        {%- for call in message.tool_calls or [] %}
            {{- '\n<tool_call>\n{"name": "' + call.function.name + '", "arguments": ' }}
            {{- (call.function.arguments | tojson) + '}\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n<think>\n' }}{%- endif %}
"""

R1 = """\
{{- bos_token }}
{%- set ns = namespace(result=false) %}
{%- for message in messages %}
    {%- if message.role == 'system' %}{{- message.content }}
    {%- elif message.role == 'user' %}{%- set ns.result = false %}{{- '<|User|>' + message.content }}
    {%- elif message.role == 'tool' %}
        {%- if not ns.result %}{{- '<|tool_outputs_begin|>' }}{%- endif %}
        {%- set ns.result = true %}
        {{- '<|tool_output_begin|>' + message.content + '<|tool_output_end|>' }}
    {%- else %}
        {%- if message.tool_calls %}
            {%- set ns.result = false %}
            {%- for call in message.tool_calls %}
                {{- '<|Assistant|><|tool_calls_begin|>' if loop.first else '\n' }}
                {{- '<|tool_call_begin|>' + call.type + '<|tool_sep|>' + call.function.name + '\n```json\n' }}
                {{- call.function.arguments + '\n```<|tool_call_end|>' }}
            {%- endfor %}
            {{- '<|tool_calls_end|>' + eos_token }}
        {%- endif %}
        {%- if message.content is not none %}
            {{- '<|tool_outputs_end|>' if ns.result else '<|Assistant|>' }}
            {{- message.content.split('</think>')[-1] + eos_token }}
            {%- set ns.result = false %}
        {%- endif %}
    {%- endif %}
{%- endfor %}
{%- if ns.result %}{{- '<|tool_outputs_end|>' }}
{%- elif add_generation_prompt %}{{- '<|Assistant|><think>\n' }}{%- endif %}
"""

V3_1 = """\
{{- bos_token }}
{%- set ns = namespace(asked=false) %}
{%- for message in messages %}
    {%- if message.role == 'system' %}{{- message.content }}
    {%- elif message.role == 'user' %}{%- set ns.asked = true %}{{- '<|User|>' + message.content }}
    {%- elif message.role == 'tool' %}
        {%- set ns.asked = false %}
        {{- '<|tool_output_begin|>' + message.content + '<|tool_output_end|>' }}
    {%- else %}
        {%- if ns.asked %}{{- '<|Assistant|></think>' }}{%- endif %}
        {%- set ns.asked = false %}
        {{- message.content.split('</think>')[-1] }}
        {%- for call in message.tool_calls or [] %}
            {{- '<|tool_calls_begin|>' if loop.first }}
            {{- '<|tool_call_begin|>' + call.function.name + '<|tool_sep|>' + call.function.arguments }}
            {{- '<|tool_call_end|>' }}
            {{- '<|tool_calls_end|>' if loop.last }}
        {%- endfor %}
        {{- eos_token }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt and ns.asked %}
    {{- '<|Assistant|>' + ('<think>' if thinking | default(false) else '</think>') }}
{%- endif %}
"""

GEMMA_4 = """\
{{- bos_token }}
{%- if tools %}{{- '<|turn>system\n<|tool>' + (tools | tojson) + '<tool|><turn|>\n' }}{%- endif %}
{%- set ns = namespace(last='') %}
{%- for message in messages %}
    {%- if message.role == 'tool' %}
        {{- 'response:' + (message.name or '') + '{value:<|"|>' + message.content + '<|"|>}<tool_response|>' }}
    {%- else %}
        {%- set content = message.content %}
        {%- if message.role == 'assistant' and '<channel|>' in content %}
            {%- set content = content.split('<channel|>')[-1] %}
        {%- endif %}
        {{- '<|turn>' + message.role.replace('assistant', 'model') + '\n' if ns.last != 'tool' }}
        {%- for call in message.tool_calls or [] %}
            {{- '<|tool_call>call:' + call.function.name + '{' }}
            {%- for key, value in call.function.arguments.items() %}
                {{- key + ':<|"|>' + value + '<|"|>' + ('' if loop.last else ',') }}
            {%- endfor %}
            {{- '}<tool_call|>' }}
        {%- endfor %}
        {{- content | trim + ('<|tool_response>' if message.tool_calls else '<turn|>\n') }}
    {%- endif %}
    {%- set ns.last = message.role %}
{%- endfor %}
{%- if add_generation_prompt and ns.last != 'tool' %}
    {{- '<|turn>model\n' + ('' if enable_thinking | default(false) else '<|channel>thought\n<channel|>') }}
{%- endif %}
"""


HARMONY = """\
{{- '<|start|>system<|message|># Valid channels: analysis, commentary, final.<|end|>' }}
{%- if tools %}{{- '<|start|>developer<|message|># Tools\n' + (tools | tojson) + '<|end|>' }}{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'assistant' and message.tool_calls %}
        {%- set call = message.tool_calls[0].function %}
        {%- if message.content %}
            {{- '<|start|>assistant<|channel|>analysis<|message|>' + message.content + '<|end|>' }}
        {%- endif %}
        {{- '<|start|>assistant to=functions.' + call.name + '<|channel|>commentary json<|message|>' }}
        {{- (call.arguments | tojson) + '<|call|>' }}
    {%- elif message.role == 'assistant' %}
        {{- '<|start|>assistant<|channel|>final<|message|>' + message.content }}
        {{- '<|return|>' if loop.last and not add_generation_prompt else '<|end|>' }}
    {%- elif message.role == 'tool' %}
        {{- '<|start|>functions.' + (message.name or '') + ' to=assistant<|channel|>commentary<|message|>' }}
        {{- (message.content | tojson) + '<|end|>' }}
    {%- else %}{{- '<|start|>' + message.role + '<|message|>' + message.content + '<|end|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start|>assistant' }}{%- endif %}
"""

DEEPSEEK_END = "<|end_of_sentence|>"
DEEPSEEK_ADDED = (
    *("<|User|>", "<|Assistant|>", "<|tool_calls_begin|>", "<|tool_calls_end|>", "<|tool_call_begin|>"),
    *("<|tool_call_end|>", "<|tool_sep|>", "<|tool_outputs_begin|>", "<|tool_outputs_end|>"),
    *("<|tool_output_begin|>", "<|tool_output_end|>", *THINK_TAGS),
)
GEMMA_TOKENS = (
    *("<s>", "<|turn>", "<|channel>", "<channel|>", "<|tool>", "<tool|>", "<|tool_call>", "<tool_call|>"),
    *("<|tool_response>", "<tool_response|>", '<|"|>'),
)


@dataclass(frozen=True)
class Family:
    """A template with its arguments, and what it writes."""

    template: ToolTemplate
    call: str
    """The reply :data:`CALL` without a thought, from the prompt to its end token."""
    kwargs: dict[str, Any] = field(default_factory=dict)
    ends: tuple[str, ...] = ()
    """End tokens beside the template's."""

    def chat(self) -> ChatFormat:
        tokenizer = self.template.tokenizer()
        return ChatFormat(tokenizer, tokenizer.convert_tokens_to_ids([self.template.end, *self.ends]), self.kwargs)


QWQ_FAMILY = Family(
    ToolTemplate("qwq", QWQ, added=(*CALL_TAGS, *THINK_TAGS, "<tool_response>", "</tool_response>")),
    '\n</think>\n\n<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call><|im_end|>',
)
QWQ_WITHOUT_TOKENS = Family(ToolTemplate("qwq without tokens for its tags", QWQ), QWQ_FAMILY.call)
R1_FAMILY = Family(
    ToolTemplate("deepseek-r1", R1, DEEPSEEK_END, ("<s>",), DEEPSEEK_ADDED),
    "\n</think>\n\n<|tool_calls_begin|><|tool_call_begin|>function<|tool_sep|>weather\n```json\n"
    '{"city": "Oslo"}\n```<|tool_call_end|><|tool_calls_end|><|end_of_sentence|>',
)
V3_1_CALL = (
    '<|tool_calls_begin|><|tool_call_begin|>weather<|tool_sep|>{"city": "Oslo"}<|tool_call_end|>'
    "<|tool_calls_end|><|end_of_sentence|>"
)
V3_1_TEMPLATE = ToolTemplate("deepseek-v3.1", V3_1, DEEPSEEK_END, ("<s>",), DEEPSEEK_ADDED)
V3_1_FAMILY = Family(V3_1_TEMPLATE, V3_1_CALL)
V3_1_THINKING = Family(V3_1_TEMPLATE, f"\n\n</think>\n\n{V3_1_CALL}", {"thinking": True})
GEMMA_TEMPLATE = ToolTemplate("gemma 4", GEMMA_4, "<turn|>", GEMMA_TOKENS)
GEMMA_CALL = '<|tool_call>call:weather{city:<|"|>Oslo<|"|>}<tool_call|><|tool_response>'
GEMMA = Family(GEMMA_TEMPLATE, GEMMA_CALL, ends=("<|tool_response>",))
GEMMA_THINKING = Family(GEMMA_TEMPLATE, GEMMA_CALL, {"enable_thinking": True}, ("<|tool_response>",))
HARMONY_TOKENS = ("<|start|>", "<|channel|>", "<|message|>", "<|end|>", "<|call|>")
GPT_OSS = Family(
    ToolTemplate("gpt-oss", HARMONY, "<|return|>", HARMONY_TOKENS),
    ' to=functions.weather<|channel|>commentary json<|message|>{"city": "Oslo"}<|call|>',
    ends=("<|call|>",),
)
FAMILIES = (QWQ_FAMILY, QWQ_WITHOUT_TOKENS, R1_FAMILY, V3_1_FAMILY, V3_1_THINKING, GEMMA, GEMMA_THINKING)


def named(family: Family) -> str:
    return " ".join([family.template.name, *family.kwargs])


each = pytest.mark.parametrize("family", FAMILIES, ids=named)
each_that_is_read = pytest.mark.parametrize("family", FAMILIES[:5], ids=named)


@each
def test_a_call_keeps_all_of_its_markup(family: Family) -> None:
    chat = family.chat()
    assert chat.tokenizer.decode(chat.encode_reply(CALL, OPTIONS)) == family.call


@each_that_is_read
def test_a_call_is_read_after_a_thought_and_without(family: Family) -> None:
    chat = family.chat()
    prompt = chat.encode_prompt([ASK], OPTIONS)
    assert chat.message_of(chat.encode_reply(CALL, OPTIONS), prompt, OPTIONS) == CALL
    if "</think>" in family.call:
        sampled = chat.tokenizer("hm\n" + family.call.lstrip(), add_special_tokens=False)["input_ids"]
        assert chat.message_of(sampled, prompt, OPTIONS) == {**CALL, "content": "<think>\nhm\n</think>"}


def learnt(family: Family, said: str, turns: str) -> tuple[str, str]:
    """The end of what precedes the last reply of an episode, and that reply."""
    row = {"messages": [ASK, CALL, RESULT, {"role": "assistant", "content": said}], "tools": [TOOL]}
    chat, rows = family.chat(), load_demonstrations([row], turns=turns)
    limits: dict[str, Any] = {"max_prompt_length": None, "max_completion_length": 200, "window": None}
    (example,), _ = encode(rows, None, chat, replies="episode", **limits)
    assert notes_on([example], chat) == []
    start = example.given[-1][1] if example.given else 0
    before = [*example.student_ids, *example.completion_ids[:start]]
    return chat.tokenizer.decode(before), chat.tokenizer.decode(example.completion_ids[start:])


@pytest.mark.parametrize("turns", ["all", "last"])
@each
def test_a_reply_to_a_result_closes_the_thought_that_its_prompt_opens_and_no_other(family: Family, turns: str) -> None:
    before, reply = learnt(family, "It rains.", turns)
    assert "rain" in before
    closing = "\n</think>\n\n" if before.endswith("<think>\n") else ""
    assert reply == f"{closing}It rains.{family.template.end}"


@pytest.mark.parametrize("turns", ["all", "last"])
@pytest.mark.parametrize("family", [R1_FAMILY, V3_1_THINKING], ids=named)
def test_a_reply_to_a_result_opens_its_own_thought_where_the_prompt_does_not(family: Family, turns: str) -> None:
    thinks = "<think>hm</think>It rains."
    assert learnt(family, thinks, turns)[1] == f"{thinks}{family.template.end}"


def split(family: Family, reply: str) -> tuple[str, str]:
    """The thought and the text of a sampled reply."""
    chat = family.chat()
    ids = chat.tokenizer(reply, add_special_tokens=False)["input_ids"]
    thought, said = thought_and_said(chat, chat.encode_prompt([ASK], OPTIONS), ids)
    return thought.strip(), said


ANALYSIS, FINAL = "<|channel|>analysis<|message|>", "<|channel|>final<|message|>"


@pytest.mark.parametrize(
    ("reply", "parts"),
    [
        (f"{ANALYSIS}hm<|end|><|start|>assistant{FINAL}It rains.<|return|>", ("hm", "It rains.")),
        (f"{ANALYSIS}a<|end|><|start|>assistant{ANALYSIS}b<|end|><|start|>assistant{FINAL}c", ("a\nb", "c")),
        (f"{ANALYSIS}hm", ("hm", "")),
        (f"{ANALYSIS}hm<|end|><|start|>assistant<|channel|>fin", ("hm", "")),
        (f"{FINAL}It rains.<|return|>", ("", "It rains.")),
        ("<|channel|>commentary<|message|>I look.<|end|><|start|>assistant" + FINAL + "Rain.", ("", "I look.\nRain.")),
        ("It rains.<|return|>", ("", "It rains.")),
    ],
)
def test_a_thought_in_a_channel_is_not_the_answer(reply: str, parts: tuple[str, str]) -> None:
    assert split(GPT_OSS, reply) == parts


def test_scorers_read_the_text_beside_a_thought_in_a_channel() -> None:
    chat = GPT_OSS.chat()
    reply = f"{ANALYSIS}Rain or snow?<|end|><|start|>assistant{FINAL}It rains.<|return|>"
    ids = chat.tokenizer(reply, add_special_tokens=False)["input_ids"]
    for scorer, answer, right in (
        ("exact", "It rains.", True),
        ("contains", "rains", True),
        ("contains", "snow", False),
    ):
        row = Demonstration("Weather?", answer=answer)
        assert score(scorer, scored_text(chat, chat.encode_prompt([ASK]), ids, row, scorer), row) == right


def test_a_trained_reply_in_a_channel_is_its_text() -> None:
    chat = GPT_OSS.chat()
    named = "Write <|end|> and <|channel|>analysis<|message|>."
    for text in ("It rains.", named, "<think>\nhm\n</think>\n\nIt rains."):
        assert chat.decode(chat.encode_completion(text)) == text


def test_a_call_after_a_thought_in_a_channel_is_read() -> None:
    chat = GPT_OSS.chat()
    assert chat.tokenizer.decode(chat.encode_reply(CALL, OPTIONS)) == GPT_OSS.call
    for thought, content in (("", ""), (f"{ANALYSIS}hm<|end|><|start|>assistant", "<think>\nhm\n</think>")):
        sampled = chat.tokenizer(thought + GPT_OSS.call, add_special_tokens=False)["input_ids"]
        message = chat.message_of(sampled, chat.encode_prompt([ASK], OPTIONS), OPTIONS)
        assert message == {**CALL, "content": content}
        between = chat.tokenizer.decode(chat.encode_between([ASK, message], [RESULT], OPTIONS, sampled))
        assert between.startswith("<|start|>functions.weather to=assistant")
        assert between.endswith("<|start|>assistant")


@pytest.mark.parametrize(
    ("reply", "parts"),
    [
        ("<|channel>thought\nhm<channel|>It rains.<turn|>", ("hm", "It rains.")),
        ("<|channel>thought\nhm", ("hm", "")),
        ("It rains.<turn|>", ("", "It rains.")),
    ],
)
@pytest.mark.parametrize("family", [GEMMA, GEMMA_THINKING], ids=named)
def test_a_thought_between_gemmas_tags_is_not_the_answer(family: Family, reply: str, parts: tuple[str, str]) -> None:
    assert split(family, reply) == parts


def test_gemmas_tags_are_tokens_in_a_demonstration_and_text_in_a_prompt() -> None:
    chat, thinks = GEMMA_THINKING.chat(), "<|channel>thought\nhm<channel|>It rains."
    tags = chat.tokenizer.convert_tokens_to_ids(["<|channel>", "<channel|>"])
    assert [token for token in chat.encode_completion(thinks) if token in tags] == tags
    assert chat.decode(chat.encode_completion(thinks)) == thinks
    assert not {*tags} & {*chat.encode_prompt([{"role": "user", "content": thinks}])}
    assert GEMMA.chat().closes_thought()
