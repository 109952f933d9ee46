"""What each scorer calls right, and what it tells the user about an answer that it cannot use."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import itertools
import json
import re
import sys
import unicodedata
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from selfdistill.config.commands import EvalConfig
from selfdistill.data import comparisons
from selfdistill.data.demonstrations import CODE, SCORER_NAMES, Demonstration, load_demonstrations
from selfdistill.data.scorers import JUDGE, Verdict, default_scorer, doubt_about, reference, score, verdict, verdicts
from selfdistill.errors import UserError

REAL = Path(__file__).parents[3] / "shared" / "data" / "skills"
TABLE = Path(__file__).parents[2] / "docs" / "scorers.md"


def row(answer: Any = None, completion: str = "", scorer: str | None = None) -> Demonstration:
    prompt = ({"role": "user", "content": "q"},)
    return Demonstration(prompt, completion, answer=answer, scorer=scorer, source="train.jsonl:7")


def calls(*pairs: tuple[str, str]) -> str:
    return "\n".join(f"Action: {name}\nAction Input: {arguments}" for name, arguments in pairs)


def test_default_scorer() -> None:
    assert default_scorer(row(scorer="regex"), "choice") == "regex"
    assert default_scorer(row(), "choice") == "choice"
    assert default_scorer(row(), None) == "exact"


@pytest.mark.parametrize(
    ("answer", "right", "wrong"),
    [
        ('["Lima", "La Paz"]', "It is La Paz.", "It is Quito."),
        (' [ "it\'s", "a b" ] ', "a b", "b a"),
        ('["利馬", "Lima"]', "利馬", "秘魯"),
        ('[5, "five"]', "It is five.", "It is six."),
        ('[5, "five"]', "It is 5.", "55"),
        ('["five", 5.0]', "5", "five5"),
    ],
)
def test_contains_reads_the_json_text_of_a_list(answer: str, right: str, wrong: str) -> None:
    assert score("contains", right, row(answer))
    assert not score("contains", wrong, row(answer))


@pytest.mark.parametrize(
    "answer",
    ["['Lima', 'La Paz']", "['Lima' 'La Paz']", """['a', "it's"]""", "[\"a\", 'b']", "[5, 'five']", "['five', None]"],
)
def test_contains_refuses_a_list_as_python_writes_it(answer: str) -> None:
    with pytest.raises(UserError, match="it is the text of a Python list, expected a list or its JSON text"):
        score("contains", "Lima", row(answer))
    assert score("contains", f"It prints {answer}.", row([answer]))


def test_contains_takes_other_brackets_as_they_are() -> None:
    for answer in ("[1, 2]", "[a]", "x[0]", '[["a", 1]]', "['a'] == x[0]", "[a, 'b']"):
        assert score("contains", f"It is {answer}.", row(answer))
    assert score("contains", '["a", "b"]', row(completion='["a", "b"]'))
    assert not score("contains", "a", row(completion='["a", "b"]'))


def at(line: int, answer: Any, completion: str, scorer: str | None = None) -> Demonstration:
    return dataclasses.replace(row(answer, completion, scorer), source=f"a.jsonl:{line}")


def test_a_scorer_by_which_the_demonstrations_are_wrong_is_doubted() -> None:
    tagged = [at(line, letter, f"<answer>\n{letter}\n</answer>") for line, letter in enumerate("BCDE", start=1)]
    assert doubt_about(tagged, None) == (
        "scorer 'exact' rejects 4 of 4 demonstrated completions, contains or choice would accept all: "
        "a.jsonl:1, a.jsonl:2, a.jsonl:3 and 1 more"
    )
    assert doubt_about(tagged, "choice") is None
    assert doubt_about([row("B"), row("C")], None) is None  # nothing is demonstrated
    mixed = [at(1, "yes", "yes"), at(2, "yes", "no"), at(3, "no", "No!")]
    assert doubt_about(mixed, "exact") == "scorer 'exact' rejects 2 of 3 demonstrated completions: a.jsonl:2, a.jsonl:3"
    assert doubt_about(mixed[::2], "exact") == (
        "scorer 'exact' rejects 1 of 2 demonstrated completions, contains would accept all: a.jsonl:3"
    )


@pytest.mark.parametrize(
    ("scorer", "answer", "right", "wrong", "fitting"),
    [
        ("exact", 72.0, "72", "The answer is 72.", ", contains would accept all"),
        ("contains", "C#", "Use C#.", "Use C++.", ""),
        ("choice", "B", "so B", "It is vitamin B", ", contains would accept all"),
        ("regex", r"^\d+$", "72", "72 km", ""),
        ("tool_call", [["get", {"id": 3}]], calls(("get", '{"id": 3}')), calls(("get", '{"id": 4}')), ""),
    ],
)
def test_rows_with_their_own_scorer_are_doubted_too(
    scorer: str, answer: Any, right: str, wrong: str, fitting: str
) -> None:
    rows = [at(1, answer, right, scorer), at(2, answer, wrong, scorer), at(3, "yes", "yes"), at(4, "x", "")]
    assert doubt_about(rows[:1] + rows[2:], None) is None
    note = f"scorer {scorer!r} rejects 1 of 2 demonstrated completions{fitting}: a.jsonl:2"
    if scorer == "exact":  # the third row goes by it, too
        note = note.replace("1 of 2", "1 of 3")
    assert doubt_about(rows, None) == note
    assert doubt_about(rows, JUDGE) == note.replace("1 of 3", "1 of 2")  # the third row is the judge's
    others = [at(5, "B", "no letter", "choice")] if scorer != "choice" else [at(5, "x", "y", "regex")]
    both = doubt_about([*rows, *others], None)
    assert both is not None
    assert "\n" not in both
    assert both.startswith(note + "; scorer '")


THOUGHTS = "<think>\n7 + 5 = 12, or (A)? Action: get\n</think>\n\n"


@pytest.mark.parametrize(
    ("scorer", "said", "reply", "other"),
    [
        ("exact", "42", "42", "12"),
        ("contains", "42", "It is 42.", "12"),
        ("choice", "(B)", "B", "A"),
        ("tool_call", calls(("get", '{"id": 3}')), calls(("get", '{"id": 3.0}')), "none"),
    ],
)
def test_thoughts_of_a_demonstration_are_not_compared(scorer: str, said: str, reply: str, other: str) -> None:
    for completion in (said, THOUGHTS + said, THOUGHTS.removeprefix("<think>") + said):
        shown = row(completion=completion)
        assert score(scorer, reply, shown)
        assert not score(scorer, other, shown)
        assert reference(scorer, shown) == said
        assert doubt_about([shown], scorer) is None
    with_answer = row("42", THOUGHTS + "42")
    assert doubt_about([with_answer], "exact") is None
    for completion in (THOUGHTS, "<think>and so on"):
        with pytest.raises(UserError) as caught:
            score(scorer, reply, row(completion=completion))
        assert str(caught.value).endswith(": it holds only thoughts; add the column 'answer'")
        assert score("exact", "42", row("42", completion))  # the answer is what counts


def test_names_of_scorers_are_the_same_everywhere() -> None:
    compare = {
        name
        for name, function in vars(comparisons).items()
        if inspect.isfunction(function) and list(inspect.signature(function).parameters) == ["reply", "demonstration"]
    }
    assert compare == set(SCORER_NAMES)
    everything = [*SCORER_NAMES, CODE, JUDGE]
    help_text = EvalConfig.model_fields["scorer"].description
    assert help_text is not None
    assert re.findall(r"``(\w+)``", help_text) == everything
    table = re.findall(r"^\| `(\w+)` \|", section("data.md", "Scorers"), re.MULTILINE)
    assert table == everything
    for name in SCORER_NAMES:
        with pytest.raises(UserError, match=f"scorer '{name}' needs"):  # and is not unknown
            score(name, "reply", row())


def section(page: str, heading: str) -> str:
    text = TABLE.with_name(page).read_text(encoding="utf-8")
    return text.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]


def pairs_of_the_table() -> Iterator[tuple[str, dict[str, Any], str, bool]]:
    """Scorer, column, reply and verdict of each row of the documentation's tables."""
    scorer = ""
    text = TABLE.read_text(encoding="utf-8")
    for line in text.replace(section("scorers.md", "Feedback"), "").splitlines():
        if heading := re.fullmatch(r"(?:## )?`(\w+)`:?", line):
            scorer = heading[1]
        elif heading := re.fullmatch(r"\| (answer|completion) \| reply \| scored \|", line):
            column = heading[1]
        elif cells := re.fullmatch(r"\| `(.*)` \| `(.*)` \| (right|wrong) \|", line):
            yield scorer, {column: json.loads(cells[1])}, json.loads(cells[2]), cells[3] == "right"
        else:
            assert not line.startswith("|") or line == "|---|---|---|", line


PAIRS = list(pairs_of_the_table())


@pytest.mark.parametrize(("scorer", "column", "reply", "right"), PAIRS)
def test_the_documentation_says_what_is_right(scorer: str, column: dict[str, Any], reply: str, right: bool) -> None:
    demonstration = dataclasses.replace(row(), **column)
    assert score(scorer, reply, demonstration) is right
    shown = dataclasses.replace(demonstration, completion=reply)
    assert (doubt_about([shown], scorer) is None) is (right or "completion" in column)


def test_the_documentation_shows_enough() -> None:
    assert len({json.dumps(pair) for pair in PAIRS}) >= 150
    for name in (*SCORER_NAMES, CODE):
        assert {right for scorer, _, _, right in PAIRS if scorer == name} == {True, False}
    for script in ("LATIN", "CYRILLIC", "GREEK", "ARABIC", "HEBREW", "CJK", "HIRAGANA", "HANGUL", "THAI", "DEVANAGARI"):
        written = [
            pair for pair in PAIRS if any(unicodedata.name(c, "").startswith(script) for c in f"{pair[1]}{pair[2]}")
        ]
        assert {right for *_, right in written} == {True, False}, script


@pytest.mark.parametrize(
    ("reply", "answer", "right"),
    [
        (" yes \n", "yes", True),
        ("a  b\nc", "a b\tc", True),
        ("Yes", "yes", False),
        ("yes.", "yes", False),
        ("ab", "a b", False),
        ("", "yes", False),
        ("42", 42, True),
        ("0.5", 0.5, True),
    ],
)
def test_exact(reply: str, answer: Any, right: bool) -> None:
    assert score("exact", reply, row(answer, completion="other")) is right


@pytest.mark.parametrize(
    ("reply", "answer", "right"),
    [
        ("It was the Eiffel-Tower, in 1889!", "eiffel tower", True),
        ("STRASSE", "Straße", True),
        ("cafe\u0301 noir", "Café", True),
        ("concatenate", "cat", False),
        ("towers", "tower", False),
        ("tower eiffel", "eiffel tower", False),
        ("the eiffel", "eiffel tower", False),
        ("It cost 4,500 euros.", "4500", True),
        ("It cost 4500.", "4,500", True),
        ("1,234,567.", 1234567, True),
        ("14,500", "4500", False),
        ("Numbers 10,200,30", "200", True),
        ("About 3.5 km", "3.5", True),
        ("About 3.5 km", "5", False),
        ("About 35 km", "3.5", False),
        ("It is -5 degrees", "5", False),
        ("It is \u22125 degrees", "-5", True),
        ("pages 3-5", "5", True),
        ("It is blue", ["red", "blue"], True),
        ("It is green", ["red", "blue"], False),
        ("", "red", False),
        ("東京 です", "東京", True),
    ],
)
def test_contains(reply: str, answer: Any, right: bool) -> None:
    assert score("contains", reply, row(answer)) is right


@pytest.mark.parametrize(
    ("reply", "answer", "right"),
    [("code X-17", r"X-\d+", True), ("code X-", r"X-\d+", False), ("a\nb", r"^b$", False), ("a\nb", r"(?m)^b$", True)],
)
def test_regex(reply: str, answer: str, right: bool) -> None:
    assert score("regex", reply, row(answer)) is right


TWO = [["get", {"id": 3, "tags": ["a", "b"]}], ["put", {"id": 4, "deep": {"x": 1, "y": None}}]]
TWO_CALLS = [("get", '{"id": 3, "tags": ["a", "b"]}'), ("put", '{"deep": {"y": null, "x": 1}, "id": 4}')]


@pytest.mark.parametrize(
    ("reply", "answer", "right"),
    [
        (calls(*TWO_CALLS), TWO, True),
        (calls(*TWO_CALLS), json.dumps(TWO), True),
        (calls(*TWO_CALLS), [[name, json.dumps(arguments)] for name, arguments in TWO], True),
        (calls(*reversed(TWO_CALLS)), TWO, True),
        ("Thought: look.\n\n" + calls(TWO_CALLS[0]) + "\nThought: store.\n" + calls(TWO_CALLS[1]), TWO, True),
        (calls(TWO_CALLS[0]), TWO, False),
        (calls(*TWO_CALLS, TWO_CALLS[0]), TWO, False),
        (calls(TWO_CALLS[0], TWO_CALLS[0]), TWO, False),
        (calls(("get", '{"id": "3"}')), [["get", {"id": 3}]], True),
        (calls(("get", '{"id": 3.0}')), [["get", {"id": 3}]], True),
        (calls(("get", '{"on": "true", "at": ["1"]}')), [["get", {"on": True, "at": [1]}]], True),
        (calls(("get", '{"id": "three"}')), [["get", {"id": 3}]], False),
        (calls(("get", '{"id": 3, "more": 1}')), [["get", {"id": 3}]], False),
        (calls(("get", '{"tags": ["b", "a"]}')), [["get", {"tags": ["a", "b"]}]], False),
        (calls(("get", '{"id": 1}'), ("get", '{"id": 2}')), [["get", {"id": 2}], ["get", {"id": 1}]], True),
        # A plain merge of dicts would keep the last id only and call this right.
        (calls(("get", '{"id": 9}'), ("get", '{"id": 2}')), [["get", {"id": 1}], ["get", {"id": 2}]], False),
        (calls(("[Optional]put", "{}")), [["[Optional]put", "{}"]], True),
        (calls(("get", '{\n  "id": 3\n}')), [["get", {"id": 3}]], True),
        ("Action: get\r\nAction Input: {}\r\n", [["get", {}]], True),
        (calls(("get", "{id: 3}")), [["get", {"id": 3}]], False),
        (calls(("get", "[3]")), [["get", {"id": 3}]], False),
        (calls(("get", "[" * 100_000)), [["get", {}]], False),
        # Deep enough for our own recursion, not for the parser's; escaping level by level would never end.
        (calls(("get", '{"a": ' + "[" * 600 + "]" * 600 + "}")), [["get", {}]], False),
        (calls(("get", '{"a": ' + "[" * 60 + '"b"' + "]" * 60 + "}")), [["get", {"a": ["b"]}]], False),
        (
            calls(("get", '{"a": ' * 200 + '"1"' + "}" * 200)),
            '[["get", ' + '{"a": ' * 200 + "1" + "}" * 200 + "]]",
            True,
        ),
        ("Action: get", [["get", {}]], False),
        (calls(("get", "{}")) + "\nAction: put", [["get", {}]], False),
        ("", [["get", {}]], False),
        # Two texts are compared as texts, a number with a text by value.
        (calls(("get", '{"v": "3.1"}')), [["get", {"v": "3.10"}]], False),
        (calls(("get", '{"v": 3.1}')), [["get", {"v": "3.10"}]], True),
        (calls(("get", '{"id": "100000"}')), [["get", {"id": "1e5"}]], False),
        (calls(("get", '{"id": "1,000"}')), [["get", {"id": "1000"}]], False),
        (calls(("get", '{"id": "1,000"}')), [["get", {"id": 1000}]], True),
        (calls(("get", '{"at": [{"v": "3.1"}]}')), [["get", {"at": [{"v": "3.10"}]}]], False),
        (calls(("get", '{"at": [{"v": "3.1"}]}')), [["get", {"at": [{"v": 3.10}]}]], True),
        (calls(("get", '{"at": [1, 2]}')), [["get", {"at": '["1", "2"]'}]], False),
        # The text "3.0" must take the number, for it is not the text "3".
        (calls(("get", '{"v": 3}'), ("get", '{"v": "3"}')), [["get", {"v": "3"}], ["get", {"v": "3.0"}]], True),
        (calls(("get", '{"v": "3"}'), ("get", '{"v": 3}')), [["get", {"v": "3.0"}], ["get", {"v": "3"}]], True),
        (calls(("get", '{"v": "3"}'), ("get", '{"v": "3"}')), [["get", {"v": "3"}], ["get", {"v": "3.0"}]], False),
        (calls(("get", '{"v": 1}')), [["get", {"v": True}]], False),
        ("No tool is needed.", [], True),
        (calls(("get", "{}")), [], False),
    ],
)
def test_tool_call(reply: str, answer: Any, right: bool) -> None:
    assert score("tool_call", reply, row(answer)) is right


def test_completion_stands_in_for_the_answer() -> None:
    assert score("exact", "four", row(completion=" four ")) is True
    assert score("contains", "It is Four.", row(completion="four")) is True
    assert score("tool_call", calls(*TWO_CALLS), row(completion=calls(*reversed(TWO_CALLS)))) is True


@pytest.mark.parametrize(
    ("name", "demonstration", "message"),
    [
        ("exakt", row("a"), "unknown scorer 'exakt', expected one of exact, contains, choice, regex, tool_call"),
        ("exact", row(), "train.jsonl:7: scorer 'exact' needs an answer or a completion"),
        ("contains", row(), "train.jsonl:7: scorer 'contains' needs an answer or a completion"),
        ("contains", row([]), "train.jsonl:7: scorer 'contains' needs an answer or a completion"),
        ("choice", row(), "train.jsonl:7: scorer 'choice' needs an answer or a completion"),
        ("tool_call", row(), "train.jsonl:7: scorer 'tool_call' needs an answer or a completion"),
        (
            "regex",
            row(completion="a"),
            "train.jsonl:7: scorer 'regex' needs a pattern; add the column 'answer'",
        ),
        (
            "regex",
            row("a("),
            "train.jsonl:7: scorer 'regex' cannot use answer \"a(\": "
            "invalid pattern: missing ), unterminated subpattern at position 1",
        ),
        ("exact", row([1]), "train.jsonl:7: scorer 'exact' cannot use answer [1]: it is not text or a number"),
        ("exact", row(True), "train.jsonl:7: scorer 'exact' cannot use answer true: it is not text or a number"),
        (
            "contains",
            row(["a", None]),
            "train.jsonl:7: scorer 'contains' cannot use answer [\"a\", null]: it is not text or a number",
        ),
        (
            "contains",
            row("?!"),
            "train.jsonl:7: scorer 'contains' cannot use answer \"?!\": it has no letters, digits or symbols",
        ),
        (
            "choice",
            row("BC"),
            "train.jsonl:7: scorer 'choice' cannot use answer \"BC\": "
            "it has no letter from A to Z; write the option's letter, such as A",
        ),
        (
            "choice",
            row(2),
            "train.jsonl:7: scorer 'choice' cannot use answer 2: "
            "it has no letter from A to Z; write the option's letter, such as A",
        ),
        (
            "choice",
            row(completion="two"),
            "train.jsonl:7: scorer 'choice' cannot use completion \"two\": "
            "it has no letter from A to Z; write the option's letter, such as A",
        ),
        (
            "tool_call",
            row("get(3)"),
            "train.jsonl:7: scorer 'tool_call' cannot use answer \"get(3)\": "
            "it is not a JSON list of [name, arguments]",
        ),
        (
            "tool_call",
            row([["get"]]),
            "train.jsonl:7: scorer 'tool_call' cannot use answer [[\"get\"]]: "
            "it is not a JSON list of [name, arguments]",
        ),
        (
            "tool_call",
            row([["get", 3]]),
            "train.jsonl:7: scorer 'tool_call' cannot use answer [[\"get\", 3]]: "
            "it is not a JSON list of [name, arguments]",
        ),
        (
            "tool_call",
            row([[3, {}]]),
            "train.jsonl:7: scorer 'tool_call' cannot use answer [[3, {}]]: a name is not text",
        ),
        (
            "tool_call",
            row(completion="x" * 100),
            f"train.jsonl:7: scorer 'tool_call' cannot use completion \"{'x' * 56}...: "
            "it has no Action and Action Input lines",
        ),
    ],
)
def test_what_the_user_must_mend(name: str, demonstration: Demonstration, message: str) -> None:
    with pytest.raises(UserError) as caught:
        score(name, "reply", demonstration)
    assert str(caught.value) == message


@pytest.mark.parametrize("scorer", ["exact", "contains", "choice", "regex", "tool_call"])
def test_a_number_that_python_does_not_write(scorer: str) -> None:
    number = 10**5000
    for answer in (number, -number) if scorer != "tool_call" else ([["get", {"id": number}]],):
        with pytest.raises(UserError) as caught:
            score(scorer, calls(("get", '{"id": 3}')), row(answer))
        assert str(caught.value) == (
            "train.jsonl:7: column 'answer': found a number of more than 4,300 digits, expected fewer; write it as text"
        )
    assert score("exact", "9" * 5000, row("9" * 5000))
    assert not score("tool_call", calls(("get", f'{{"id": {"9" * 5000}}}')), row([["get", {"id": 3}]]))


def test_a_list_with_a_number_that_python_does_not_write() -> None:
    with pytest.raises(UserError, match="more than 4,300 digits"):
        score("contains", "red", row(["red", 10**5000]))


def test_contains_checks_every_answer_of_the_list() -> None:
    with pytest.raises(UserError, match="it has no letters, digits or symbols"):
        score("contains", "red", row(["red", "?"]))


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize(("skill", "scorer"), [("tooluse", "tool_call"), ("science", "choice"), ("medical", "exact")])
def test_real_demonstrations_are_right_and_each_others_mostly_wrong(skill: str, split: str, scorer: str) -> None:
    path = REAL / f"{skill}.{split}.jsonl"
    if not path.exists():
        pytest.skip(f"REAL DATA NOT SCORED: {path} does not exist")
    rows = load_demonstrations(str(path))
    wrong = [row.source for row in rows if not score(scorer, row.completion, row)]
    assert wrong == []
    unanswered = [dataclasses.replace(row, answer=None) for row in rows]
    assert [row.source for row in unanswered if not score(scorer, row.completion, row)] == []
    for one, other in itertools.pairwise(rows):
        same = one.completion == other.completion
        assert score(scorer, one.completion, other) is same, (one.source, other.source)


NUMBERS = itertools.count()


@pytest.fixture
def write_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], str]]:
    """Write a module of the text into the current folder; returns its name."""
    monkeypatch.chdir(tmp_path)
    before, path = set(sys.modules), list(sys.path)

    def write(text: str) -> str:
        name = f"own_{next(NUMBERS)}"  # a function is imported once, and then known by its name
        (tmp_path / name).mkdir()
        (tmp_path / name / "marks.py").write_text(text, encoding="utf-8")
        importlib.invalidate_caches()
        return f"{name}.marks"

    yield write
    assert sys.path == path
    for name in set(sys.modules) - before:
        if name.startswith("own_"):
            del sys.modules[name]


def test_a_function_scores_with_the_whole_row(write_module: Callable[[str], str]) -> None:
    module = write_module(
        "seen = []\n"
        "def right(reply, row):\n"
        "    seen.append(dict(row))\n"
        "    row['prompt'][0]['content'] = 'changed'\n"
        "    return reply == row['answer']['wanted']\n"
    )
    name = f"python:{module}.right"
    asked = dataclasses.replace(row({"wanted": "yes"}, "shown"), document="read this")
    assert score(name, "yes", asked)
    assert not score(name, "no", asked)
    assert asked.prompt[0]["content"] == "q"
    (first, _) = sys.modules[module].seen  # one module for both: it is loaded once
    columns = {"prompt": [{"role": "user", "content": "changed"}], "completion": "shown", "document": "read this"}
    assert first == columns | {"answer": {"wanted": "yes"}}
    other = write_module("def same(reply, row): return row['answer'] == reply")
    same = f"python:{other}.same"
    assert score(same, "yes", row(completion=THOUGHTS + "yes"))  # without an answer, it is the completion
    assert default_scorer(row(), name) == name
    half = [row({"wanted": "yes"}, THOUGHTS + "yes"), row({"wanted": "yes"}, "no")]
    assert doubt_about(half[:1], name) is None
    assert sys.modules[module].seen[-1]["completion"] == "yes"
    assert doubt_about(half, name) == f"scorer {name!r} rejects 1 of 2 demonstrated completions: train.jsonl:7"


EXPECTED = "expected True or False, a reward from 0 to 1, or a pair of one of these and a feedback text"


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("return 2", f"returned 2, {EXPECTED}"),
        ("return float('nan')", f"returned nan, {EXPECTED}"),
        ("return None", f"returned None, {EXPECTED}"),
        ("return 'right'", f"returned 'right', {EXPECTED}"),
        ("import torch; return torch.ones(2)", f"returned tensor([1., 1.]), {EXPECTED}"),
        ("return True, None", f"returned (True, None), {EXPECTED}"),
        ("return [][0]", "failed: IndexError: list index out of range"),
        ("raise ValueError('two\\nlines')", "failed: ValueError: two lines"),
        ("raise SystemExit", "failed: SystemExit: SystemExit"),
    ],
)
def test_a_function_that_does_not_say_right_or_wrong(
    write_module: Callable[[str], str], body: str, message: str
) -> None:
    name = f"python:{write_module('def right(reply, row):' + chr(10) + '    ' + body)}.right"
    with pytest.raises(UserError) as error:
        score(name, "", row("a"))
    assert str(error.value) == f"train.jsonl:7: scorer {name!r} {message}"


@pytest.mark.parametrize(
    ("returned", "expected"),
    [
        ("True", Verdict(1.0)),
        ("0.25", Verdict(0.25)),
        ("1", Verdict(1.0)),
        ("(False, 'line 3: no such name')", Verdict(0.0, "line 3: no such name")),
        ("(0.5, '')", Verdict(0.5)),
        (r"(0.5, 'a\ud83d\ude00 \udcff')", Verdict(0.5, "a\U0001f600 \ufffd")),  # halves of surrogate pairs
        ("__import__('numpy').array([1, 2]).any()", Verdict(1.0)),
        ("__import__('numpy').float32(0.25), 'so'", Verdict(0.25, "so")),
        ("__import__('torch').tensor(0.5)", Verdict(0.5)),
    ],
)
def test_a_function_gives_a_reward_and_feedback(
    write_module: Callable[[str], str], returned: str, expected: Verdict
) -> None:
    name = f"python:{write_module('def right(reply, row):' + chr(10) + '    return ' + returned)}.right"
    assert verdict(name, "reply", row("a")) == expected
    assert score(name, "reply", row("a")) == (expected.reward == 1)


# --- feedback ---

FEEDBACK = re.findall(r"^\| `(\w+)` \| `(.*)` \| `(.*)` \| `(.*)` \|$", section("scorers.md", "Feedback"), re.MULTILINE)


@pytest.mark.parametrize(("scorer", "answer", "reply", "feedback"), FEEDBACK)
def test_feedback_says_what_was_expected(scorer: str, answer: str, reply: str, feedback: str) -> None:
    assert verdict(scorer, json.loads(reply), row(json.loads(answer))) == Verdict(0.0, feedback)


@pytest.mark.parametrize(
    ("pattern", "shown"), [("a  b", "'a  b'"), ("(?x) a\n\tb", r"'(?x) a\n\tb'"), (r"\d+", r"'\d+'")]
)
def test_feedback_shows_the_white_space_of_a_pattern(pattern: str, shown: str) -> None:
    assert verdict("regex", "x", row(pattern)).feedback == f"expected text that matches {shown}, found 'x'"


def test_the_documentation_shows_feedback_of_every_scorer() -> None:
    table = [line for line in section("scorers.md", "Feedback").splitlines() if line.startswith("|")]
    assert len(FEEDBACK) == len(table) - 2
    assert {scorer for scorer, *_ in FEEDBACK} == {*SCORER_NAMES, CODE}


@pytest.mark.parametrize("name", SCORER_NAMES)
def test_every_comparison_has_a_line_of_feedback_on_wrong_replies_only(name: str) -> None:
    long = " ".join(f"word{number}" for number in range(500))
    of_scorer = [(column, reply) for scorer, column, reply, _ in PAIRS if scorer == name]
    for column, _ in of_scorer:
        demonstration = dataclasses.replace(row(), **column)
        for reply in [*(reply for _, reply in of_scorer), "", long]:
            found = verdict(name, reply, demonstration)
            assert found.reward in (0, 1)
            assert (found.reward == 1) == (not found.feedback)
            assert len(found.feedback.splitlines()) == int(found.reward == 0)
            assert len(found.feedback) < 400


@pytest.mark.parametrize(
    ("wanted", "reply", "feedback"),
    [
        ("get a get b", "get a", 'expected get {"id": "b"}, found no such call'),
        ("get a", "get a put b", 'expected no further call, found put {"id": "b"}'),
        ("get a", "get b get a", 'expected no further call, found get {"id": "b"}'),
        ("get a put b", "put b", 'expected get {"id": "a"}, found no such call'),
        ("get a put b", "put c get a", 'argument \'id\': expected "b", found "c"'),
        ("get a put a", "get b put a", 'argument \'id\': expected "a", found "b"'),
        ("get a put b", "put a get b", ""),
    ],
)
def test_feedback_on_several_calls(wanted: str, reply: str, feedback: str) -> None:
    def pairs(text: str) -> list[tuple[str, str]]:
        words = iter(text.split())
        return [(name, json.dumps({"id": value})) for name, value in zip(words, words, strict=True)]

    assert verdict("tool_call", calls(*pairs(reply)), row(pairs(wanted))).feedback == feedback


def test_feedback_shows_arguments_as_they_were_written() -> None:
    wanted = [["get", {"of": [1234.5, {"a": None}], "on": True}]]
    found = verdict("tool_call", calls(("get", '{"of": [1e3, {"a": "é"}], "on": true}')), row(wanted))
    assert found.feedback == 'argument \'of\': expected [1234.5, {"a": "null"}], found [1000.0, {"a": "é"}]'


def test_feedback_on_long_texts_shows_where_they_differ() -> None:
    words = [f"w{number}" for number in range(400)]
    changed = [*words[:200], "other", *words[201:]]
    feedback = verdict("exact", " ".join(changed), row(" ".join(words))).feedback
    match = re.fullmatch(r"expected \.\.\.(.*)\.\.\., found \.\.\.(.*)\.\.\.", feedback)
    assert match
    expected, found = match.groups()
    assert (len(expected), len(found)) == (120, 120)
    assert " w199 w200 w201 " in expected
    assert " w199 other w201 " in found
    missing = verdict("contains", "w1 w2", row(" ".join(words))).feedback
    assert missing.endswith("..., missing 'w0', 'w3', 'w4', 'w5', 'w6' and others")
    answers = [f"w{number}" for number in range(9)]
    assert verdict("contains", "none", row(answers)).feedback == (
        "expected one of 'w0', 'w1', 'w2', 'w3', 'w4' and others, found none of them"
    )


def test_a_function_that_is_not_there(write_module: Callable[[str], str], tmp_path: Path) -> None:
    module = write_module("number = 1")
    broken = write_module("import nothing_of_that_name")
    wrong = write_module("def right(:")
    script = write_module("import sys\nsys.exit()")
    failed = write_module("import sys\nsys.exit('no data')")
    from_here = f"cannot be imported from {tmp_path} or the environment"
    cases = {
        "python:no_such.thing": f"module 'no_such' {from_here}: ModuleNotFoundError: No module named 'no_such'",
        f"python:{broken}.right": f"module '{broken}' {from_here}: ModuleNotFoundError: No module named 'nothing_of",
        f"python:{wrong}.right": f"module '{wrong}' {from_here}: SyntaxError: ",
        f"python:{script}.right": f"module '{script}' {from_here}: SystemExit",
        f"python:{failed}.right": f"module '{failed}' {from_here}: SystemExit: no data",
        f"python:{module}.right": f"{tmp_path / module.replace('.', '/')}.py has no function 'right'",
        f"python:{module}.number": f"{tmp_path / module.replace('.', '/')}.py has no function 'number'",
        "python:right": "expected python:package.module.function",
    }
    for name, message in cases.items():
        with pytest.raises(UserError) as error:
            score(name, "", row("a"))
        assert str(error.value).startswith(f"scorer {name!r}: {message}")
        assert "\n" not in str(error.value)


def test_names_in_the_settings() -> None:
    for name in (*SCORER_NAMES, CODE, "python:a.b", "python:a.b_2.c"):
        assert EvalConfig(model="m", data="d", scorer=name).scorer == name
    known = "exact, contains, choice, regex, tool_call, code, judge or python:package.module.function"
    guesses = {"exakt": "exact", "judgement": "judge", "tool-call": "tool_call"}
    for name in ("python:a", "python:a.b()", "python:..b", "python: a.b", "x", *guesses):
        with pytest.raises(UserError) as error:
            EvalConfig(model="m", data="d", scorer=name)
        hint = f"; did you mean {guesses[name]}?" if name in guesses else ""
        assert str(error.value) == f"setting 'scorer': found {name!r}, expected: {known}{hint}"


@pytest.mark.parametrize("name", ["judge", "python:os.system"])
def test_rows_may_not_run_code_or_send_data_out(tmp_path: Path, name: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"prompt": "q", "completion": "c", "scorer": name}) + "\n", encoding="utf-8")
    with pytest.raises(UserError, match=f"column 'scorer': found '{name}', expected exact, contains, choice, regex or"):
        load_demonstrations(str(path))


def test_a_row_may_not_ask_to_run_what_the_model_writes(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"prompt": "q", "answer": ["f()"], "scorer": "code"}) + "\n", encoding="utf-8")
    with pytest.raises(UserError) as error:
        load_demonstrations(str(path))
    assert str(error.value) == (
        f"{path}: 1 bad row: line 1, column 'scorer': 'code' runs code that a model writes, so only the setting may "
        "name it; leave it out and give scorer code"
    )


TESTED = ["assert f(2) == 4", "assert f(3) == 9"]


def test_code_has_feedback() -> None:
    assert verdict("code", "def f(x): return x * x", row(TESTED)) == Verdict(1.0)
    wrong = "```\ndef f(x): return x + x\n```"
    assert verdict("code", wrong, row(TESTED)) == Verdict(0.0, "f(3): expected 9, found 6")
    assert verdict("code", "f = abs", row("assert f(-1) == 1")) == Verdict(1.0)
    assert (
        verdict("code", "f = abs", row(json.dumps(["f(-1) == 1", "f(0) == 1"]))).feedback == "f(0): expected 1, found 0"
    )


def test_many_verdicts_keep_their_order() -> None:
    given = [
        ("exact", "a", row("a")),
        ("code", "f = abs", row("f(-1) == 1")),
        ("contains", "a", row("b")),
        ("code", "f = abs", row("f(-1) == 2")),
    ]
    found = verdicts(given)
    wrong = [Verdict(0.0, "expected 'b', found none of it"), Verdict(0.0, "f(-1): expected 2, found 1")]
    assert found == [Verdict(1.0), Verdict(1.0), *wrong]
    assert found == [verdict(*one) for one in given]
    assert verdicts([]) == []


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (None, "scorer 'code' needs tests; add the column 'answer'"),
        ([], "scorer 'code' needs an answer or a completion"),
        ({"tests": 1}, "scorer 'code' cannot use answer {\"tests\": 1}: it is not text or a number"),
        (["f(1", "f(2)"], 'cannot use answer ["f(1", "f(2)"]: test 1: SyntaxError: \'(\' was never closed (line 1)'),
        ("x = f(1)", "scorer 'code' cannot use answer \"x = f(1)\": test 1: ValueError: it asserts nothing"),
        ("['f(1)']", "scorer 'code' cannot use answer \"['f(1)']\": it is the text of a Python list"),
    ],
)
def test_tests_that_cannot_be_used(answer: Any, message: str) -> None:
    for given in (
        [("code", "f = abs", row(answer))],
        [("code", "f = abs", row("f(1) == 1")), ("code", "", row(answer))],
    ):
        with pytest.raises(UserError) as error:
            verdicts(given)
        assert str(error.value).startswith("train.jsonl:7: ")
        assert message in str(error.value)


def test_code_is_doubted_where_demonstrations_fail() -> None:
    rows = [row(TESTED, "def f(x): return x * x"), row(TESTED, "def f(x): return x")]
    assert doubt_about(rows[:1], "code") is None
    assert doubt_about(rows, "code") == "scorer 'code' rejects 1 of 2 demonstrated completions: train.jsonl:7"


def test_the_judge_is_not_asked_about_the_demonstrations() -> None:
    assert doubt_about([row("yes", "no")] * 3, JUDGE) is None


@pytest.mark.parametrize("name", ["python:builtins.exec", "python:os.system", "python:os.path.exists"])
def test_pythons_own_functions_are_no_scorers(name: str) -> None:
    row = Demonstration(({"role": "user", "content": "q"},), "a", source="x.jsonl:1")
    with pytest.raises(UserError, match="is in the standard library; name your own module"):
        score(name, "reply", row)
