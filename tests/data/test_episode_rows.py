"""Episodes as rows: chats with tool calls and tool turns, in the forms in which TRL, OpenAI and tables hold them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from selfdistill.data.demonstrations import Demonstration, load_demonstrations, write_demonstrations
from selfdistill.data.prompts import load_prompts
from selfdistill.errors import UserError

USER = {"role": "user", "content": "Weather in Oslo?"}
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo", "days": 2}}}
ASKS = {"role": "assistant", "content": "", "tool_calls": [CALL]}
RAIN = {"role": "tool", "content": "rain"}
SAYS = {"role": "assistant", "content": "It rains."}
THANKS = {"role": "user", "content": "And Rome?"}
SUN = {"role": "assistant", "content": "Sun."}
EPISODE = (ASKS, RAIN, SAYS)


def only(row: dict[str, Any], **options: Any) -> Demonstration:
    (demonstration,) = load_demonstrations([row], **options)
    return demonstration


def refusal(row: dict[str, Any]) -> str:
    with pytest.raises(UserError) as refused:
        load_demonstrations([row])
    assert "\n" not in str(refused.value)
    return str(refused.value).removeprefix("data: 1 bad row: data[0], ")


def call(**changes: Any) -> dict[str, Any]:
    """A row whose call is changed."""
    return {"messages": [USER, {"role": "assistant", "tool_calls": [CALL | changes]}]}


# --- what is learnt ---


@pytest.mark.parametrize(
    ("row", "turns", "prompt", "episode", "completion"),
    [
        ({"messages": [USER, *EPISODE]}, "auto", (USER,), EPISODE, "It rains."),
        ({"messages": [USER, *EPISODE]}, "all", (USER,), EPISODE, "It rains."),
        ({"messages": [USER, *EPISODE]}, "last", (USER, ASKS, RAIN), (), "It rains."),
        ({"prompt": [USER], "completion": list(EPISODE)}, "auto", (USER,), EPISODE, "It rains."),
        ({"prompt": USER["content"], "completion": list(EPISODE)}, "all", (USER,), EPISODE, "It rains."),
        ({"prompt": [USER], "completion": list(EPISODE)}, "last", (USER, ASKS, RAIN), (), "It rains."),
        ({"prompt": [USER, ASKS, RAIN], "completion": "It rains."}, "auto", (USER, ASKS, RAIN), (), "It rains."),
        ({"messages": [USER, SAYS, THANKS, SUN]}, "auto", (USER, SAYS, THANKS), (), "Sun."),
        ({"messages": [USER, SAYS, THANKS, SUN]}, "all", (USER,), (SAYS, THANKS, SUN), "Sun."),
        ({"messages": [USER, SAYS]}, "all", (USER,), (), "It rains."),
        (
            {"messages": [USER, ASKS]},
            "auto",
            (USER,),
            (ASKS,),
            'Action: weather\nAction Input: {"city": "Oslo", "days": 2}',
        ),
        ({"messages": [USER, ASKS, RAIN]}, "auto", (USER, ASKS, RAIN), (), ""),
    ],
)
def test_prompt_and_episode(
    row: dict[str, Any], turns: Any, prompt: tuple[Any, ...], episode: tuple[Any, ...], completion: str
) -> None:
    found = only(row, turns=turns)
    assert (found.prompt, found.episode, found.completion) == (prompt, episode, completion)


def test_the_identity_of_a_row_has_the_episode_only_where_there_is_one() -> None:
    assert "episode" not in only({"messages": [USER, SAYS]}).identity()
    assert only({"messages": [USER, *EPISODE]}).identity()["episode"] == EPISODE


def test_prompts_alone_have_no_episode(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"messages": [USER, *EPISODE]}), encoding="utf-8")
    (row,) = load_prompts(str(path))
    assert (row.prompt, row.episode, row.completion) == ((USER, ASKS, RAIN), (), "")


def test_other_values_of_turns_are_refused() -> None:
    with pytest.raises(UserError) as refused:
        load_demonstrations([{"messages": [USER, SAYS]}], turns="first")  # type: ignore[arg-type]
    assert str(refused.value) == "turns 'first': expected auto, last or all"


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"messages": [USER]}, "column 'messages': ends with a user turn, expected an assistant turn, which it needs"),
        (
            {"messages": [USER, ASKS, RAIN]},
            "column 'messages': ends with a tool turn, expected an assistant turn, which it needs",
        ),
        ({"prompt": [USER, ASKS, RAIN]}, "column 'completion': missing, which it needs"),
    ],
)
def test_a_chat_without_a_last_reply_is_said_to_end_without_it(row: dict[str, Any], problem: str) -> None:
    with pytest.raises(UserError, match="1 bad row") as refused:
        load_demonstrations([row], lacks=lambda _: "column 'completion': missing, which it needs")
    assert str(refused.value) == f"data: 1 bad row: data[0], {problem}"


# --- forms of calls ---


@pytest.mark.parametrize(
    "written",
    [
        CALL,
        {"name": "weather", "arguments": {"city": "Oslo", "days": 2}},
        {"type": "function", "function": {"name": "weather", "arguments": '{"city": "Oslo", "days": 2}'}},
        {"name": "weather", "arguments": '{"city": "Oslo", "days": 2}', "id": None, "function": None},
        {"id": None, "function": {"name": "weather", "arguments": {"city": "Oslo", "days": 2, "zone": None}}},
    ],
)
@pytest.mark.parametrize("content", [{}, {"content": None}, {"content": ""}, {"content": " "}])
def test_calls_in_the_forms_of_others(written: dict[str, Any], content: dict[str, Any]) -> None:
    asks = {"role": "assistant", "tool_calls": [written], **content}
    assert only({"messages": [USER, asks, RAIN, SAYS]}).episode == EPISODE


def test_ids_names_and_texts_are_kept() -> None:
    asks = {"role": "assistant", "content": "Let me see.", "tool_calls": [{"id": "a1", **CALL}, {"id": "b2", **CALL}]}
    results = [RAIN | {"content": "", "tool_call_id": "a1"}, RAIN | {"tool_call_id": "b2", "name": "weather"}]
    assert only({"messages": [USER, asks, *results, SAYS]}).episode == (asks, *results, SAYS)


@pytest.mark.parametrize("form", ["messages", "completion", "prompt"])
def test_results_stand_in_the_order_of_their_calls(form: str) -> None:
    asks = ASKS | {"tool_calls": [CALL | {"id": name} for name in "abc"]}
    a, b, c = (RAIN | {"content": f"of {name}", "tool_call_id": name} for name in "abc")
    bare_b = {"role": "tool", "content": "of b"}  # answers the first call that is still open
    for given, expected in [([c, a, b], [a, b, c]), ([c, a, bare_b], [a, bare_b, c]), ([c, a], [a, c])]:
        row: dict[str, Any] = {"messages": [USER, asks, *given, SAYS, THANKS, asks, b, a, c, SUN]}
        if form != "messages":
            at = 1 if form == "completion" else -1
            row = {"prompt": row["messages"][:at], "completion": row["messages"][at:]}
        found = only(row, turns="all")
        assert (*found.prompt, *found.episode, *([] if found.episode else [SUN])) == (
            *(USER, asks, *expected, SAYS),
            *(THANKS, asks, a, b, c, SUN),
        )


def test_arguments_written_as_text_keep_their_nulls(tmp_path: Path) -> None:
    row = only(call(function={"name": "f", "arguments": '{"a": null, "b": {}}'}))
    assert row.episode[0]["tool_calls"][0]["function"]["arguments"] == {"a": None, "b": {}}
    write_demonstrations(tmp_path / "rows.jsonl", [row])
    assert only_of(tmp_path / "rows.jsonl").episode == row.episode


def only_of(path: Path) -> Demonstration:
    (row,) = load_demonstrations(str(path))
    return row


@pytest.mark.parametrize("turns", ["auto", "all", "last"])
def test_written_rows_are_read_back_equal(tmp_path: Path, turns: Any) -> None:
    chats = [[USER, *EPISODE], [USER, ASKS], [USER, SAYS, THANKS, SUN], [USER, SAYS]]
    rows = load_demonstrations([{"messages": chat} for chat in chats], turns=turns)
    write_demonstrations(tmp_path / "rows.jsonl", rows)
    for read_as in ("auto", turns):
        again = load_demonstrations(str(tmp_path / "rows.jsonl"), turns=read_as)
        assert [row.identity() for row in again] == [row.identity() for row in rows]


def test_arrow_writes_null_for_keys_of_other_rows(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    other = {"type": "function", "function": {"name": "clock", "arguments": {"zone": "CET"}}}
    asks = {"role": "assistant", "content": None, "tool_calls": [other]}
    rows = [{"messages": [USER, *EPISODE]}, {"messages": [USER, asks, RAIN | {"name": "clock"}, SAYS]}]
    table = datasets.Dataset.from_list(rows)
    table.to_parquet(str(tmp_path / "rows.parquet"))
    for data in (table, str(tmp_path / "rows.parquet")):
        first, second = load_demonstrations(data)
        assert first.episode == EPISODE
        assert second.episode == (asks | {"content": ""}, RAIN | {"name": "clock"}, SAYS)


def test_tools_in_memory_may_be_functions() -> None:
    def weather(city: str, days: int = 1) -> str:
        """The weather.

        Args:
            city: where
            days: how many
        """
        return f"{city} {days}"

    (schema,) = only({"prompt": "q", "completion": "r", "tools": [weather]}).tools or []
    assert schema["function"]["name"] == "weather"
    assert schema["function"]["parameters"]["required"] == ["city"]
    assert schema["function"]["parameters"]["properties"]["days"] == {"type": "integer", "description": "how many"}

    def bare(city):  # type: ignore[no-untyped-def]
        return city

    problem = refusal({"prompt": "q", "completion": "r", "tools": [bare]})
    assert problem.startswith("column 'tools': function 'bare': no schema: ")
    assert problem.endswith("no docstring; write one, with a line for each argument under 'Args:'")


# --- what is noted ---


def tool(name: str, **parameters: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": {"type": "object", **parameters}}}


def notes_of(*rows: dict[str, Any]) -> list[str]:
    notes: list[str] = []
    load_demonstrations(list(rows), note=notes.append)
    return [note.removeprefix("data: ") for note in notes]


WEATHER = tool("weather", properties={"city": {}, "days": {}})
TWO = ASKS | {"tool_calls": [CALL, CALL]}


@pytest.mark.parametrize(
    ("messages", "tools", "noted"),
    [
        ((USER, *EPISODE), [WEATHER], None),
        ((USER, *EPISODE), [WEATHER["function"]], None),
        ((USER, *EPISODE), None, None),
        ((USER, *EPISODE), [tool("clock")], "a call to a tool that is not in its 'tools' (data[0]: 'weather')"),
        (
            (USER, *EPISODE),
            [tool("weather", properties={"city": {}})],
            "an argument that the tool's schema does not declare (data[0]: 'days' of 'weather')",
        ),
        ((USER, *EPISODE), [tool("weather", properties={"city": {}}, additionalProperties=True)], None),
        ((USER, *EPISODE), [tool("weather", properties={"city": {}}, allOf=[{}])], None),
        ((USER, *EPISODE), [tool("weather")], None),
        ((USER, *EPISODE), [{"schema": {}}], None),
        ((USER, ASKS, RAIN | {"name": "weather"}, SAYS), None, None),
        (
            (USER, ASKS, RAIN | {"name": "clock"}, SAYS),
            None,
            "a tool message whose name differs from its call's (data[0]: 'clock' for 'weather')",
        ),
        ((USER, TWO, RAIN, RAIN, SAYS), None, None),
        ((USER, TWO), None, None),
        ((USER, TWO, RAIN, SAYS), None, "fewer tool messages than calls before the next turn (data[0]: 1 for 2)"),
        ((USER, TWO, RAIN), None, "fewer tool messages than calls before the next turn (data[0]: 1 for 2)"),
        ((USER, ASKS, THANKS, SUN), None, "fewer tool messages than calls before the next turn (data[0]: 0 for 1)"),
    ],
)
def test_odd_calls_are_noted(messages: tuple[Any, ...], tools: list[Any] | None, noted: str | None) -> None:
    assert notes_of({"messages": list(messages), "tools": tools}) == ([f"1 row has {noted}"] if noted else [])


def test_odd_calls_are_noted_once_with_the_first_rows() -> None:
    asked = [{"role": "user", "content": f"Weather {number}?"} for number in range(5)]
    rows = [{"messages": [question, TWO, RAIN, SAYS, THANKS, ASKS]} for question in asked]
    rows[0]["messages"][4:] = [THANKS, TWO, RAIN, SUN]
    assert notes_of(*rows, {"messages": [USER, *EPISODE], "tools": [tool("clock")]}) == [
        "1 row has a call to a tool that is not in its 'tools' (data[5]: 'weather')",
        "5 rows have fewer tool messages than calls before the next turn (data[0]: 1 for 2, data[1]: 1 for 2, "
        "data[2]: 1 for 2, ...)",
    ]


# --- what is refused ---


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        (
            {"messages": [USER, RAIN, SAYS]},
            "column 'messages[1]': found a tool message without a call, expected one after tool_calls",
        ),
        (
            {"messages": [USER, ASKS, RAIN, RAIN, SAYS]},
            "column 'messages[3]': found a tool message without a call, expected one after tool_calls",
        ),
        (
            {"messages": [USER, ASKS, THANKS, RAIN, SAYS]},
            "column 'messages[3]': found a tool message without a call, expected one after tool_calls",
        ),
        (
            {"messages": [USER, ASKS | {"tool_calls": [CALL | {"id": "a"}]}, RAIN | {"tool_call_id": "b"}, SAYS]},
            "column 'messages[2].tool_call_id': found 'b', expected 'a'",
        ),
        (
            call(function={"arguments": {}}),
            "column 'messages[1].tool_calls[0]': found a call without a name, expected a call with name and arguments",
        ),
        (
            {"messages": [USER, ASKS | {"tool_calls": ["weather"]}]},
            "column 'messages[1].tool_calls[0]': found 'weather', expected a call with name and arguments",
        ),
        (
            {"messages": [USER, ASKS | {"tool_calls": "weather"}]},
            "column 'messages[1].tool_calls': found 'weather', expected a list of calls",
        ),
        (
            call(function={"name": "f", "arguments": "{city: Oslo}"}),
            "column 'messages[1].tool_calls[0].arguments': found '{city: Oslo}', expected an object, or its JSON text",
        ),
        (
            call(function={"name": "f", "arguments": [1]}),
            "column 'messages[1].tool_calls[0].arguments': found a list of 1, expected an object, or its JSON text",
        ),
        (
            call(function={"name": "f", "arguments": {"a": float("nan")}}),
            "column 'messages[1].tool_calls[0].arguments': found a value that is not JSON, expected JSON values",
        ),
        (
            call(function={"name": "f", "arguments": {"a": "\ud83d"}}),
            "column 'messages[1].tool_calls[0].arguments': found a lone surrogate, expected text",
        ),
        (
            call(function={"name": "\ud83d", "arguments": {}}),
            "column 'messages[1].tool_calls[0].name': found '\\ud83d' with a lone surrogate, expected text",
        ),
        (
            call(function={"name": "f", "parameters": {"a": 1}}),
            "column 'messages[1].tool_calls[0]': found key 'parameters', expected only name, arguments",
        ),
        (
            call(args={"a": 1}),
            "column 'messages[1].tool_calls[0]': found key 'args', expected only id, type, function",
        ),
        (
            call(type="code"),
            "column 'messages[1].tool_calls[0].type': found 'code', expected 'function'",
        ),
        (
            {"messages": [USER, ASKS, RAIN | {"result": "r"}, SAYS]},
            "column 'messages[2]': found key 'result', expected only role, content, name and tool_call_id",
        ),
        (
            {"messages": [USER, ASKS, RAIN | {"content": {"a": 1}}, SAYS]},
            "column 'messages[2].content': found an object, expected text",
        ),
        (
            {"prompt": [USER], "completion": [ASKS, RAIN]},
            "column 'completion': found messages of assistant, tool, expected one assistant message, or turns from an "
            "assistant's to an assistant's",
        ),
        (
            {"prompt": [USER, ASKS], "completion": [SAYS]},
            "column 'prompt': the prompt ends with an assistant turn, expected it to end with a user turn",
        ),
        (
            {"messages": [USER, ASKS, SAYS]},
            "column 'messages': found two assistant turns in a row, expected a tool or user turn in between",
        ),
    ],
)
def test_bad_episodes(row: dict[str, Any], problem: str) -> None:
    assert refusal(row) == problem
