"""Assistant turns with calls, and what lies between them, as token ids, under templates of many forms."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from tool_templates import CALL_TAGS, HERMES, TOOL_TEMPLATES, ToolTemplate

from selfdistill.data.chat_format import ChatFormat
from selfdistill.data.comparisons import COMPARISONS
from selfdistill.data.contexts import Verbatim
from selfdistill.data.demonstrations import Demonstration, load_demonstrations
from selfdistill.data.encoding import reply_spans
from selfdistill.data.episodes import changed_when_shown_anew, encode_replies, turns_of
from selfdistill.data.scorers import default_scorer, doubt_about, score, scored_text
from selfdistill.data.template import TemplateRefusal

TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Tells the weather.",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "description": "where"},
                "n": {"type": "array"},
                "": {"type": "integer"},
            },
        },
    },
}
OPTIONS = {"tools": [TOOL]}
each = pytest.mark.parametrize("template", TOOL_TEMPLATES, ids=lambda template: template.name)


def chat_of(template: ToolTemplate) -> ChatFormat:
    tokenizer = template.tokenizer()
    return ChatFormat(tokenizer, tokenizer.convert_tokens_to_ids([template.end, *template.ends]), {})


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def says(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


def calls(*arguments: dict[str, Any], content: str = "", name: str = "weather") -> dict[str, Any]:
    made = [{"type": "function", "function": {"name": name, "arguments": each}} for each in arguments]
    return {"role": "assistant", "content": content, "tool_calls": made}


def result(text: str) -> dict[str, Any]:
    return {"role": "tool", "content": text}


QWEN3_CODER = next(template for template in TOOL_TEMPLATES if template.name == "qwen3-coder")
ONE = "<parameter=a>1</parameter>"
CITY = {"city": "Oslo"}
ODD = {"city": 'a "b" \\ {c}\n[d] é ✓', "n": [1, 2.5, None, True, {"x": {}}], "empty": "", "": 0}
REPLIES = {
    "text": says("It rains in Oslo."),
    "text with JSON": says('The config is {"name": "weather", "size": 2}.'),
    "call": calls(CITY),
    "no arguments": calls({}),
    "odd arguments": calls(ODD),
    "content": calls(CITY, content="I look that up."),
    "several": calls(CITY, ODD),
    "content and several": calls(CITY, {}, CITY, content="Three.\n\nAt once."),
}
OBSERVED = (result("rain"), result('{"t": [1, "two"], "s": "a \\"b\\""}'), result("line\nline ✓"))


def episode(template: ToolTemplate) -> list[dict[str, Any]]:
    some = [calls(CITY), OBSERVED[0], calls(ODD, CITY) if template.several else calls(ODD), OBSERVED[1]]
    some += [OBSERVED[2]] if template.several else []
    if template.beside:
        some += [calls(CITY, content="Once more."), OBSERVED[2]]
    return [*some, says("It rains."), user("And now?"), says("Still.")]


# --- a reply and back ---


@pytest.mark.parametrize("reply", REPLIES)
@each
def test_a_reply_is_read_back_equal(template: ToolTemplate, reply: str) -> None:
    chat, message = chat_of(template), REPLIES[reply]
    prompt = chat.encode_prompt([user("Weather?")], OPTIONS)
    if not template.several and len(message.get("tool_calls", ())) > 1:
        with pytest.raises(TemplateRefusal, match="only supports single tool-calls"):
            chat.encode_reply(message, OPTIONS)
        return
    ids = chat.encode_reply(message, OPTIONS)
    assert ids[-1] == chat.tokenizer.convert_tokens_to_ids(template.end_of(message))
    assert ids.count(ids[-1]) == 1
    assert chat.message_of(ids, prompt, OPTIONS) == message


@each
def test_a_reply_without_calls_is_a_completion(template: ToolTemplate) -> None:
    chat = chat_of(template)
    assert chat.encode_reply(says("It rains."), OPTIONS) == chat.encode_completion("It rains.", OPTIONS)


@each
def test_ids_of_calls_are_kept_where_the_template_writes_them(template: ToolTemplate) -> None:
    chat, message = chat_of(template), calls(CITY)
    message["tool_calls"][0]["id"] = "abcdefghi"
    found = chat.message_of(chat.encode_reply(message, OPTIONS))["tool_calls"][0]
    assert found.get("id") == ("abcdefghi" if template.name == "mistral" else None)


@each
def test_the_scorer_of_tool_calls_reads_the_calls_of_the_template(template: ToolTemplate) -> None:
    chat, row = (
        chat_of(template),
        Demonstration("Weather?", answer=[["weather", CITY]], scorer="tool_call", tools=[TOOL]),
    )
    prompt = chat.encode_prompt(row.prompt, OPTIONS)
    for reply, right in ((calls(CITY), True), (calls({"city": "Rome"}), False), (says("Rain."), False)):
        text = scored_text(chat, prompt, chat.encode_reply(reply, OPTIONS), row, "tool_call")
        assert score("tool_call", text, row) == right
    ids = chat.encode_reply(says("Rain."), OPTIONS)
    assert scored_text(chat, prompt, ids, row, "exact") == scored_text(chat, prompt, ids, row, "tool_call") == "Rain."


def loaded(*replies: dict[str, Any], **columns: Any) -> Demonstration:
    """The row that replies become, of which the last one is scored."""
    (row,) = load_demonstrations([{"prompt": "Weather?", "completion": list(replies), "tools": [TOOL], **columns}])
    return turns_of(row, "last")[0]


@each
def test_a_reply_of_calls_is_scored_by_its_calls(template: ToolTemplate) -> None:
    """The row keeps them as lines, which models of most templates never write."""
    chat = chat_of(template)
    for row in (loaded(calls(CITY)), loaded(calls(ODD, content="First."), result("rain"), calls(CITY, content="So."))):
        prompt, (ids, _) = chat.encode_prompt(row.prompt, OPTIONS), encode_replies(row, chat)
        name = default_scorer(row, None)
        assert score(name, scored_text(chat, prompt, ids, row, name), row)
        for other in (calls({"city": "Rome"}), says("Rain.")):
            assert not score(name, scored_text(chat, prompt, chat.encode_reply(other, OPTIONS), row, name), row)
        assert doubt_about([row], None, chat) is None


def test_the_scorer_that_nobody_names() -> None:
    assert default_scorer(loaded(calls(CITY)), None) == "tool_call"
    assert default_scorer(loaded(calls(CITY)), "contains") == "contains"
    assert default_scorer(loaded(calls(CITY), scorer="regex", answer="a"), None) == "regex"
    assert default_scorer(loaded(calls(CITY), answer="It rains."), None) == "exact"
    assert default_scorer(loaded(calls(CITY), result("rain"), says("It rains.")), None) == "exact"


@each
def test_a_scorer_that_rejects_the_calls_of_the_template_is_doubted(template: ToolTemplate) -> None:
    chat, row = chat_of(template), loaded(calls(CITY))
    for scorer in ("exact", "contains"):
        note = f"scorer '{scorer}' rejects 1 of 1 demonstrated completions, tool_call would accept all: data[0]"
        assert doubt_about([row], scorer, chat) == (note if template.own_calls else None)


# --- a whole episode ---


def as_template_wants(messages: list[dict[str, Any]], name: str) -> list[dict[str, Any]]:
    """The messages with ids for Mistral, and with arguments as text for DeepSeek."""
    made, waiting = [], []
    for message in messages:
        if "tool_calls" in message:
            written = []
            for number, call in enumerate(message["tool_calls"]):
                function = dict(call["function"])
                if name == "deepseek":
                    function["arguments"] = json.dumps(function["arguments"], ensure_ascii=False)
                written.append({"id": f"call{number:05d}", "type": "function", "function": function})
            waiting = [call["id"] for call in written]
            made.append({**message, "tool_calls": written})
        else:
            made.append({**message, "tool_call_id": waiting.pop(0)} if message["role"] == "tool" else message)
    return made


def joined(chat: ChatFormat, prompt: list[dict[str, Any]], turns: list[dict[str, Any]]) -> list[int]:
    """Prompt, reply, what lies between, reply, ..."""
    ids, seen = chat.encode_prompt(prompt, OPTIONS), list(prompt)
    place = 0
    while place < len(turns):
        reply, after = turns[place], place + 1
        ids += chat.encode_reply(reply, OPTIONS)
        while after < len(turns) and turns[after]["role"] != "assistant":
            after += 1
        if after < len(turns):
            ids += chat.encode_between([*seen, reply], turns[place + 1 : after], OPTIONS)
        seen += turns[place:after]
        place = after
    return ids


@each
def test_an_episode_is_what_the_template_writes(template: ToolTemplate) -> None:
    if not template.own_calls:
        pytest.skip("its calls are text, as another test says")
    chat, prompt, turns = chat_of(template), [user("Weather?")], episode(template)
    found = chat.tokenizer.decode(joined(chat, prompt, turns))
    shown = as_template_wants([*prompt, *turns], template.name)
    whole = chat.tokenizer.apply_chat_template(shown, tokenize=False, **OPTIONS)
    if template.appends:
        whole = whole.rstrip("\n") + (template.end_of(turns[-1]) if template.ends else "")
        assert joined(chat, prompt, turns) == chat.tokenizer(whole, add_special_tokens=False)["input_ids"]
    for part in ("Oslo", "rain", "line\\nline" if "line\\nline" in whole else "line\nline", "And now?", "Still."):
        assert found.count(part) == whole.count(part), part


def test_a_result_has_the_id_of_its_call() -> None:
    chat, prompt = chat_of(next(each for each in TOOL_TEMPLATES if each.name == "mistral")), [user("Weather?")]
    turns = [calls(CITY), OBSERVED[0], calls(ODD, CITY), *OBSERVED[1:], calls(CITY), OBSERVED[0], says("So.")]
    for ids in (joined(chat, prompt, turns), chat.encode_prompt([*prompt, *turns, user("And now?")], OPTIONS)):
        called, answered = (
            re.findall(rf'"{key}": "(call\d+)"', chat.tokenizer.decode(ids)) for key in ("id", "call_id")
        )
        assert called == answered == ["call00000", "call00000", "call00001", "call00000"]


@each
def test_thoughts_of_earlier_turns_stay_as_they_were_sampled(template: ToolTemplate) -> None:
    chat = chat_of(template)
    turns = [
        calls(CITY, content="<think>\nhm\n</think>\n\nSo."),
        result("rain"),
        says("Rain."),
        user("And?"),
        says("r"),
    ]
    if not template.beside and template.own_calls:
        turns[0] = says("<think>\nhm\n</think>\n\nSo.")
        turns[1] = user("rain")
    found = chat.tokenizer.decode(joined(chat, [user("Weather?")], turns))
    assert found.count("<think>\nhm\n</think>\n\nSo.") == 1
    assert re.search(r"rain[^a-z].*Rain\..*And\?.*r", found, re.DOTALL)


@each
def test_a_text_beside_calls_is_learnt_also_where_the_template_leaves_it_out_later(template: ToolTemplate) -> None:
    chat, turns = chat_of(template), [calls(CITY, content="I look that up."), result("rain"), says("Rain.")]
    found = chat.tokenizer.decode(joined(chat, [user("Weather?")], turns))
    assert found.count("I look that up.") == found.count("Oslo") == 1
    later = chat.render([user("Weather?"), *turns, user("And?")], OPTIONS)
    assert later.count("I look that up.") == template.beside
    shown = [{**m, "content": Verbatim(m["content"])} if m["role"] == "assistant" else m for m in turns]
    if not template.beside:
        with pytest.raises(TemplateRefusal, match="leaves out the demonstration"):
            chat.render([user("Weather?"), *shown, user("And?")], OPTIONS)


@pytest.mark.parametrize("template", [t for t in TOOL_TEMPLATES if not t.own_calls], ids=lambda t: t.name)
def test_calls_as_text(template: ToolTemplate) -> None:
    chat = chat_of(template)
    turns = [calls(CITY, CITY, content="So."), result("rain"), result("sun"), says("Rain and sun.")]
    found = chat.tokenizer.decode(joined(chat, [user("Weather?")], turns))
    action = 'Action: weather\nAction Input: {"city": "Oslo"}'
    assert f"So.\n{action}\n{action}" in found
    assert "Observation: rain\nObservation: sun" in found
    assert found.count("Tells the weather.") == 1
    assert ("Action Input: the arguments" in found) == (template.name != "smollm3")  # which lists tools itself


# --- text never becomes markup ---


@each
def test_names_of_control_tokens_in_results_and_arguments_stay_text(template: ToolTemplate) -> None:
    chat = chat_of(template)
    names = [str(token) for token in chat.tokenizer.added_tokens_decoder.values()]
    evil = "".join(f" a{name}b" for name in names if name not in template.around_value)

    def control(ids: list[int]) -> list[int]:
        return [token for token in ids if token in chat.tokenizer.added_tokens_decoder]

    def ids_of(text: str) -> list[list[int]]:
        prompt, asks = [user("Weather?")], calls({"city": text, "key" if template.around_value else text or "key": 1})
        return [
            chat.encode_reply(asks, OPTIONS),
            chat.encode_between([*prompt, asks], [result(text or "r")], OPTIONS),
            chat.encode_prompt([*prompt, asks, result(text or "r")], OPTIONS),
        ]

    for found, plain in zip(ids_of(evil), ids_of(""), strict=True):
        assert control(found) == control(plain)
        assert evil in chat.tokenizer.decode(found) or json.dumps(evil)[1:-1] in chat.tokenizer.decode(found)
    reply = calls({"city": evil})
    assert chat.message_of(chat.encode_reply(reply, OPTIONS)) == reply


def test_a_call_in_the_text_of_a_user_is_text() -> None:
    chat = chat_of(TOOL_TEMPLATES[0])
    ids = chat.encode_prompt([user(f"{CALL_TAGS[0]} x {CALL_TAGS[1]}")])
    assert not {*chat.tokenizer.convert_tokens_to_ids(list(CALL_TAGS))} & {*ids}


# --- arguments in tags of their own ---

FIND = {
    "type": "function",
    "function": {
        "name": "find",
        "parameters": {
            "type": "object",
            "properties": {
                "text": {"type": "string"},
                "count": {"type": "integer"},
                "limit": {"type": "number"},
                "exact": {"type": "boolean"},
                "tags": {"type": "array"},
                "where": {"type": "object"},
                "since": {"anyOf": [{"type": "integer"}, {"type": "null"}]},
                "either": {"type": ["integer", "string"]},
                "any": {"description": "of any type"},
            },
        },
    },
}
in_tags = pytest.mark.parametrize("template", [t for t in TOOL_TEMPLATES if t.around_value], ids=lambda t: t.name)


@in_tags
def test_the_schema_says_what_an_arguments_text_stands_for(template: ToolTemplate) -> None:
    chat = chat_of(template)
    given = {
        "text": "7",
        "count": 7,
        "limit": 0.5,
        "exact": False,
        "tags": ["a", 1],
        "where": {"x": [True, None]},
        "since": None,
        "either": "7",
        "any": "7",
        "undeclared": "7",
    }
    ids = chat.encode_reply(calls(given, name="find"), {"tools": [FIND]})
    assert chat.message_of(ids, options={"tools": [TOOL, FIND]}) == calls(given, name="find")
    (call,) = chat.message_of(ids)["tool_calls"]
    assert (call["function"]["arguments"]["count"], call["function"]["arguments"]["tags"]) == ("7", '["a", 1]')


@pytest.mark.parametrize(
    ("text", "value"),
    [("7.0", 7.0), (" 7\n", 7), ("seven", "seven"), ("7 or 8", "7 or 8"), ("NaN", "NaN"), ("True", True), ("", "")],
)
def test_text_that_has_no_value_of_the_type_stays_text(text: str, value: Any) -> None:
    """The environment then tells the model what it expects."""
    chat = chat_of(QWEN3_CODER)
    reply = f"<tool_call>\n<function=find>\n<parameter=count>\n{text}\n</parameter>\n</function>\n</tool_call>"
    message = chat.message_of(chat.encode_completion(reply), options={"tools": [FIND]})
    (call,) = message["tool_calls"]
    assert call["function"]["arguments"] == {"count": value}
    assert type(call["function"]["arguments"]["count"]) is type(value)


@pytest.mark.parametrize(
    "function",
    [
        {"name": "find"},
        {"name": "find", "parameters": "count"},
        {"name": "find", "parameters": {"properties": {"count": True}}},
        {"name": "find", "parameters": {"properties": {"count": {"anyOf": [{"type": "integer"}, True]}}}},
        "find",
    ],
)
def test_a_schema_that_gives_no_type_leaves_text(function: Any) -> None:
    chat = chat_of(QWEN3_CODER)
    message = calls({"count": "7"}, name="find")
    tools = [{"type": "function", "function": function}]
    assert chat.message_of(chat.encode_reply(message), options={"tools": tools}) == message


@in_tags
def test_white_space_of_a_value_is_kept(template: ToolTemplate) -> None:
    message = calls({"city": "\n\n  Oslo\n "})
    chat = chat_of(template)
    assert chat.message_of(chat.encode_reply(message, OPTIONS), options=OPTIONS) == message


@in_tags
def test_an_argument_that_could_not_be_read_back_is_refused(template: ToolTemplate) -> None:
    chat = chat_of(template)
    before, after = template.around_value
    opens = re.escape(before) + ".*"
    for value in (f"x{after}y", [f"x{after}y"]):
        with pytest.raises(TemplateRefusal, match=f"cannot write an argument that contains '{after}'"):
            chat.encode_reply(calls({"city": value}), OPTIONS)
    with pytest.raises(TemplateRefusal, match=f"cannot write an argument that contains '{opens}'"):
        chat.encode_reply(calls({"city": f'x{before}"y'}), OPTIONS)
    with pytest.raises(TemplateRefusal, match="cannot write an argument with the name 'a>b'"):
        chat.encode_reply(calls({"a>b": "x"}), OPTIONS)


@pytest.mark.parametrize(
    "reply",
    [
        "<function=weather><parameter=city>Oslo</parameter></function>",
        "<tool_call><function=weather>\n<parameter=city>\nOslo\n</parameter>\n</function>",
        "<tool_call>\n\n<function=weather>\n\n<parameter=city>Oslo</parameter></function>\n\n</tool_call>\n",
    ],
)
def test_other_spellings_of_tags_are_read(reply: str) -> None:
    chat = chat_of(QWEN3_CODER)
    assert chat.message_of(chat.encode_completion(reply)) == calls(CITY)


@pytest.mark.parametrize(
    ("changed", "by"),
    [
        ("'<parameter=' + key + '>\n'", "'<' + key + '>\n'"),
        ("'\n</parameter>\n'", "'\n'"),
        ("'</function>\n</tool_call>'", "''"),
        ("'<parameter=' + key + '>\n'", "'<parameter=' + key + (' text>' if value is string else '>') + '\n'"),
    ],
)
def test_tags_in_another_form_are_text(changed: str, by: str) -> None:
    assert QWEN3_CODER.text is not None
    other = QWEN3_CODER.text.replace(changed, by)
    assert other != QWEN3_CODER.text
    chat = chat_of(ToolTemplate("other", other, added=CALL_TAGS))
    assert not chat.writes_calls
    assert not chat.reads_calls
    message = chat.message_of(chat.encode_reply(calls(CITY), OPTIONS))
    assert message.keys() == {"role", "content"}
    assert "weather" in message["content"]
    note = "scorer 'tool_call' rejects 1 of 1 demonstrated completions: data[0]"
    assert doubt_about([loaded(calls(CITY))], None, chat) == note


# --- earlier turns that are shown anew ---

THOUGHT = "<think>\nhm\n</think>"
WEATHER = {
    "thought of a call": [calls(CITY, content=THOUGHT), result("rain"), says("It rains.")],
    "thought": [says(f"{THOUGHT}\n\nIt rains."), user("And now?"), says("Still.")],
    "text": [calls(CITY, content="I look that up."), result("rain"), says("It rains.")],
    "call": [says("Wait."), user("Well?"), calls(ODD), result("rain"), says("It rains.")],
}


@pytest.mark.parametrize(
    ("name", "turns", "changed"),
    [
        ("hermes", "thought", ""),
        ("qwen3", "thought of a call", ""),
        ("qwen3", "thought", "leaves out the thought of the reply '<think> hm </think> It rains.'"),
        ("qwen3", "text", "leaves out the empty thought of the reply '<think> </think> I look that up. "),
        ("llama3_1", "thought of a call", "leaves out the thought of the reply '<think> hm </think> "),
        ("llama3_1", "text", "leaves out the text beside the call in the reply 'I look that up. {"),
        ("mistral", "text", "leaves out the text beside the call in the reply 'I look that up. [TOOL_CALLS] "),
        *((template.name, "call", "") for template in TOOL_TEMPLATES if template.name != "qwen3"),
    ],
)
def test_what_a_template_changes_in_earlier_turns_is_found(name: str, turns: str, changed: str) -> None:
    chat = chat_of(next(template for template in TOOL_TEMPLATES if template.name == name))
    row = Demonstration((user("Weather?"),), "", episode=tuple(WEATHER[turns]), tools=[TOOL])
    ids, given = encode_replies(row, chat)
    prompt = chat.encode_prompt(row.prompt, OPTIONS)
    before = [*row.prompt, *row.episode[:-1]]
    found = changed_when_shown_anew(chat, before, OPTIONS, prompt, ids, reply_spans(len(ids), given)[:-1])
    assert found.startswith(changed) if changed else not found


def test_a_reply_that_is_written_otherwise_is_found() -> None:
    chat = chat_of(TOOL_TEMPLATES[0])
    sampled = '<tool_call>\n{"arguments": {"city": "Oslo"}, "name": "weather"}\n</tool_call>'
    ids = [*chat.encode_text(sampled), chat.end_token_id]
    before = [user("Weather?"), chat.message_of(ids), result("rain")]
    prompt = chat.encode_prompt(before[:1], OPTIONS)
    found = changed_when_shown_anew(chat, before, OPTIONS, prompt, ids, [(0, len(ids))])
    assert found.startswith('rewrites the reply \'<tool_call> {"arguments": {"city"')


# --- replies that are not calls ---


@pytest.mark.parametrize(
    ("template", "reply", "problem"),
    [
        ("hermes", '<tool_call>\n{"name": "f", "arguments": {"a": }}\n</tool_call>', "the call is not valid JSON"),
        ("hermes", '<tool_call>\n{"arguments": {}}\n</tool_call>', "the call has no name"),
        ("hermes", '<tool_call>\n{"name": "f", "arguments": [1]}\n</tool_call>', "the arguments of f are not a JSON"),
        ("hermes", '<tool_call>\n{"name": "f", "arguments": {"a": NaN}}\n</tool_call>', "NaN is not a JSON value"),
        (
            "hermes",
            '<tool_call>\n{"name": "f", "arguments": {"a": 1, "a": 9}}\n</tool_call>',
            "the call is not valid JSON: duplicate key 'a'; remove one",
        ),
        (
            "hermes",
            r'<tool_call>{"name": "f", "arguments": "{\"a\": 2}, {\"a\": 3}"}</tool_call>',
            "the arguments of f go on after their JSON value",
        ),
        ("hermes", "<tool_call>", "the call is not valid JSON"),
        ("llama3_1", '{"name": "f", "parameters": {"a": ', "the call is not valid JSON"),
        ("mistral", '[TOOL_CALLS] [{"name": "f", "arguments": {}}', "the call is not valid JSON"),
        ("mistral with [ARGS]", "[TOOL_CALLS]f{}", r"the call has no \[ARGS\] after its name"),
        ("deepseek", "<|tool_calls_begin|><|tool_call_begin|>function<|tool_sep|>f\n```json\n{", "not valid JSON"),
        ("qwen3-coder", "<tool_call>", "must begin with <tool_call><function= and a name, then <parameter= or </funct"),
        (
            "qwen3-coder",
            '<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>',
            "must begin with <tool_call><func",
        ),
        ("qwen3-coder", "<function=f", "a call must begin with <tool_call><function= and a name, then"),
        ("qwen3-coder", "<function=f>", "a call must begin with <tool_call><function= and a name, then"),
        ("qwen3-coder", "<function=f>x</function>", "a call must begin with <tool_call><function= and a name, then"),
        (
            "qwen3-coder",
            "<function=f>\n<parameter=a>\n1",
            "in the call of f, expected <parameter=KEY>VALUE</parameter> or",
        ),
        (
            "qwen3-coder",
            "<function=f><parameter=a>1</parameter>",
            "in the call of f, expected <parameter=KEY>VALUE</para",
        ),
        ("qwen3-coder", f"<function=f>{ONE}so{ONE}</function>", "in the call of f, expected <parameter=KEY>VALUE"),
        ("qwen3-coder", f"<function=f><parameter=b>1{ONE}</function>", "in the call of f, expected <parameter=KEY>"),
        ("qwen3-coder", f"<function=f>{ONE}{ONE}</function>", "the call of f has the argument 'a' twice"),
        ("minimax", '<minimax:tool_call><invoke name="f"></invoke><invoke>', "must begin with <minimax:tool_call><inv"),
        (
            "glm4_5",
            '<tool_call>{"name": "f"}</tool_call>',
            "a call must begin with <tool_call> and a name, then <arg_key>",
        ),
        ("glm4_5", "<tool_call>f", "a call must begin with <tool_call> and a name, then <arg_key> or </tool_call>"),
        ("glm4_5", "<tool_call>f<arg_key>a</arg_key></tool_call>", "expected <arg_key>KEY</arg_key><arg_value>VALUE"),
        ("plain ChatML", "Action: f\nAction Input: {a}", "must be followed by 'Action Input:' and a JSON object"),
        ("plain ChatML", "Action: f", "must be followed by 'Action Input:' and a JSON object"),
        (
            "plain ChatML",
            'Action: f\nAction Input: {"a": NaN}',
            "must be followed by 'Action Input:' and a JSON object",
        ),
        ("plain ChatML", 'Action: f\nAction Input: {"a": 1, "a": 9}', "a JSON object, in which no key comes twice"),
        ("plain ChatML", "Action: f\nAction Input: [1]", "the arguments of f are not a JSON object"),
    ],
)
def test_a_call_that_cannot_be_read_says_why(template: str, reply: str, problem: str) -> None:
    chat = chat_of(next(each for each in TOOL_TEMPLATES if each.name == template))
    message = chat.message_of(chat.encode_completion(reply))
    assert re.search(problem, message.pop("invalid"))
    assert message == says(reply.strip())
    assert chat.encode_between([user("q"), message], [user("Again.")])  # the episode goes on
    no_call = Demonstration("q", answer=[], scorer="tool_call")
    text = scored_text(chat, [], chat.encode_completion(reply), no_call, "tool_call")
    verdict = COMPARISONS["tool_call"](text, no_call)
    assert (verdict.reward, verdict.feedback) == (0, "expected no call, found a call that cannot be read")


@pytest.mark.parametrize(
    "reply",
    [
        '<tool_call>{"name": "weather", "arguments": {"city": "Oslo"}}</tool_call>',
        '<tool_call>\n{"arguments": {"city": "Oslo"}, "name": "weather"}',
        '<tool_call>\n{"name": "weather", "arguments": "{\\"city\\": \\"Oslo\\"}"}\n</tool_call>\n',
        '<tool_call>\n{"name": "weather", "arguments": " {\\"city\\": \\"Oslo\\"}\\n"}\n</tool_call>\n',
    ],
)
def test_other_spellings_of_a_call_are_read(reply: str) -> None:
    chat = chat_of(TOOL_TEMPLATES[0])
    assert chat.message_of(chat.encode_completion(reply)) == calls(CITY)


@pytest.mark.parametrize("template", ["hermes", "llama3_1", "deepseek", "plain ChatML", "none"])
def test_half_of_a_surrogate_pair_in_a_call_is_replaced(template: str) -> None:
    chat = chat_of(next(each for each in TOOL_TEMPLATES if each.name == template))
    written = chat.decode(chat.encode_reply(calls({"city": "HALF", "KEY": ["\U0001f600"]}), OPTIONS))
    if template == "deepseek":  # whose tags decode leaves out
        written = "<|tool_calls_begin|><|tool_call_begin|>function<|tool_sep|>weather\n```json\n" + '{"city": "HALF"}'
    reply = written.replace("HALF", r"\ud83d").replace("KEY", r"\ude00").replace("\U0001f600", r"\ud83d\ude00")
    message = chat.message_of(chat.encode_completion(reply))
    given = message["tool_calls"][0]["function"]["arguments"]
    assert given == {"city": "\ufffd"} | ({} if template == "deepseek" else {"\ufffd": ["\U0001f600"]})
    assert json.dumps(message, ensure_ascii=False).encode()
    assert chat.encode_prompt([user("Weather?"), message, result("rain")], OPTIONS)


@pytest.mark.parametrize("lead", ["", "I look.\n", "I look. "])
def test_llamas_call_may_have_its_tag(lead: str) -> None:
    chat = chat_of(next(each for each in TOOL_TEMPLATES if each.name == "llama3_1"))
    tag = chat.tokenizer.convert_tokens_to_ids("<|python_tag|>")
    call = '{"name": "weather", "parameters": {"city": "Oslo"}}'
    ids = [*chat.encode_completion(lead)[:-1], tag, *chat.encode_completion(call)]
    assert chat.message_of(ids) == calls(CITY, content=lead.strip())
    only = [tag, *chat.encode_completion("print(1)")]
    assert chat.message_of(only) == says("<|python_tag|>print(1)")


# The white space that a template writes between the parts of calls, and other white space that a model may write.
SPACES = {
    "hermes": [("\n</tool_call>\n<tool_call>\n", "</tool_call><tool_call>"), ("</tool_call>", "\n\n</tool_call>")],
    "deepseek": [
        ("<|tool_call_end|>\n<|tool_call_begin|>", "<|tool_call_end|><|tool_call_begin|>"),
        ("\n```<|tool_call_end|>", "```\n<|tool_call_end|>"),
        ("<|tool_calls_begin|>", "<|tool_calls_begin|>\n"),
        ("\n```json\n", " ```json "),
        ("<|tool_call_end|><|tool_calls_end|>", "<|tool_call_end|>\n<|tool_calls_end|>"),
    ],
    "mistral with [ARGS]": [("[TOOL_CALLS]", "\n[TOOL_CALLS] "), ("[ARGS]", " [ARGS]\n")],
}


@pytest.mark.parametrize(("name", "change"), [(name, change) for name, some in SPACES.items() for change in some])
def test_there_may_be_any_white_space_between_the_parts_of_calls(name: str, change: tuple[str, str]) -> None:
    chat = chat_of(next(each for each in TOOL_TEMPLATES if each.name == name))
    message = calls(CITY, ODD, {}, content="Three at once.")
    written = chat.tokenizer.decode(chat.encode_reply(message, OPTIONS)[:-1])
    other = written.replace(*change)
    assert other != written
    assert chat.message_of(chat.tokenizer(other)["input_ids"]) == message


def test_a_further_call_that_cannot_be_read_is_an_error() -> None:
    chat = chat_of(next(each for each in TOOL_TEMPLATES if each.name == "deepseek"))
    written = chat.tokenizer.decode(chat.encode_reply(calls(CITY, CITY), OPTIONS)[:-1])
    for old, new in (("function", "tool"), ("```<|tool_call_end|>", "<|tool_call_end|>"), ("weather\n", "weather")):
        head, _, last = written.rpartition(old) if old == "function" else written.partition(old)
        message = chat.message_of(chat.tokenizer(f"{head}{new}{last}")["input_ids"])
        if old == "weather\n":
            assert message == calls(CITY, CITY)
        else:
            assert re.search(r"after a call, expected ```<\|tool_call_end\|>", message["invalid"])


@each
def test_what_is_said_between_calls_is_content(template: ToolTemplate) -> None:
    chat = chat_of(template)
    written = chat.tokenizer.decode(chat.encode_reply(calls(CITY), OPTIONS)[:-1])
    call = written.rpartition("</think>")[2].strip()  # Qwen 3 writes an empty thought first
    found = chat.message_of(chat.encode_completion(f"First.\n{call}\nThen.\n{call}\nLast."))
    if template.name == "llama3_1":  # which has one call, at the end of a reply
        assert found["content"].startswith("First.\nThen.\n")
    else:
        assert found == calls(CITY, CITY, content="First.\nThen.\nLast.")


def test_calls_that_end_with_another_token_than_replies_are_refused() -> None:
    """What follows would begin where the user's turn ends, and so repeat the call."""
    calls_end = "{%- endfor %}\n        {{- '<|im_end|>"
    other = HERMES.replace(calls_end, calls_end.replace("im_end", "stop"), 1)
    assert other != HERMES
    chat = chat_of(ToolTemplate("stops", other, added=(*CALL_TAGS, "<|stop|>")))
    with pytest.raises(TemplateRefusal, match="does not end an assistant turn before what follows it"):
        chat.encode_between([user("Weather?"), calls(CITY)], [result("rain")], OPTIONS)


def test_a_thought_that_the_prompt_opened_is_part_of_the_message() -> None:
    template = TOOL_TEMPLATES[2]
    opened = template.text.replace("assistant\n' }}{%- endif %}\n", "assistant\n<think>\n' }}{%- endif %}\n")
    assert opened != template.text
    chat = chat_of(ToolTemplate("opens", opened, added=template.added))
    prompt = chat.encode_prompt([user("Weather?")])
    for content in ("<think>\nhm\n</think>\n\nSo.", "So."):
        message = calls(CITY, content=content)
        assert chat.message_of(chat.encode_reply(message), prompt) == message
