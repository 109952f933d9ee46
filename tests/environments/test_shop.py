"""The bundled job ``shop``: its files are what the script writes, the expert is right, and wrong ends earn nothing."""

from __future__ import annotations

import copy
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from selfdistill.data import load_demonstrations, packaged
from selfdistill.environments import PRODUCTS, Step, make_environment, price_of, stock_of

PARTS = {"train": 40, "validation": 20, "test": 60}


def rows(part: str) -> list[dict[str, Any]]:
    lines = Path(packaged(f"shop.{part}.jsonl")).read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def asked(row: dict[str, Any]) -> str:
    return str(row["prompt"] if "prompt" in row else row["messages"][0]["content"])


def call(tool: str, /, **arguments: Any) -> dict[str, Any]:
    return {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"type": "function", "function": {"name": tool, "arguments": arguments}}],
    }


def reply(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


def end(row: dict[str, Any], *messages: dict[str, Any]) -> Step:
    """The last step of an episode of the model's messages."""
    environment = make_environment("bundled:shop")()
    try:
        assert environment.reset({"prompt": asked(row), "answer": row["answer"]}) == []
        steps = [environment.step(message) for message in messages]
    finally:
        environment.close()
    assert [step.done for step in steps] == [False] * (len(steps) - 1) + [True]
    return steps[-1]


def said(row: dict[str, Any]) -> list[dict[str, Any]]:
    return [message for message in row["messages"] if message["role"] == "assistant"]


@pytest.fixture
def make_shop(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "studies")
    import make_shop

    return make_shop


def test_the_files_are_those_that_the_script_writes(make_shop: Any, tmp_path: Path) -> None:
    make_shop.main(str(tmp_path))
    files = sorted(tmp_path.iterdir())
    assert [file.name for file in files] == [f"shop.{part}.jsonl" for part in sorted(PARTS)]
    for file in files:
        assert file.read_bytes() == Path(packaged(file.name)).read_bytes()


def test_a_misspelt_part_is_named(make_shop: Any, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"^error: no part 'tests'; there are train, validation, test$"):
        make_shop.main(str(tmp_path), "tests")
    assert not list(tmp_path.iterdir())


def test_the_test_with_its_episodes_asks_the_same(make_shop: Any, tmp_path: Path) -> None:
    make_shop.main(str(tmp_path / "shown"), "test")
    shown = load_demonstrations(tmp_path / "shown" / "shop.test.jsonl")
    assert all(row.episode for row in shown)
    plain = load_demonstrations("bundled:shop.test.jsonl")
    assert [(row.prompt, row.tools, row.answer) for row in shown] == [(r.prompt, r.tools, r.answer) for r in plain]


@pytest.mark.parametrize("part", PARTS)
def test_the_expert_is_right_about_every_question(part: str, make_shop: Any) -> None:
    questions = make_shop.questions(part)
    assert sorted(question.text for question in questions) == sorted(map(asked, rows(part)))
    for question in questions:
        environment = make_environment("bundled:shop")()
        messages = make_shop.episode(environment, question)  # which asserts a reward of 1
        environment.close()
        assert 1 <= sum(message["role"] == "tool" for message in messages) <= 3
        assert max(len(message["content"].split()) for message in messages) <= 12


def test_the_demonstrations_are_episodes_whose_observations_are_true() -> None:
    for row in rows("train"):
        environment = make_environment("bundled:shop")()
        assert row["tools"] == environment.tools
        environment.reset({"prompt": asked(row), "answer": row["answer"]})
        for message, following in zip(row["messages"], [*row["messages"][1:], None], strict=True):
            if message["role"] == "assistant":
                step = environment.step(message)
                assert step == (Step(done=True, reward=1.0) if following is None else Step((following,)))
        environment.close()


def test_the_rows_are_read_as_episodes_and_prompts() -> None:
    for part, size in PARTS.items():
        found = load_demonstrations(packaged(f"shop.{part}.jsonl"))
        assert len(found) == size
        assert all(bool(row.episode) == (part == "train") and row.tools for row in found)


def test_the_parts_share_no_product_customer_or_phrasing(make_shop: Any) -> None:
    about: dict[str, set[str]] = {}
    runs: dict[str, set[tuple[str, ...]]] = {}
    for part in PARTS:
        questions = make_shop.questions(part)
        about[part] = {name for one in questions for name in (one.product, one.customer)}
        texts = [re.sub(rf"(?i){one.product}|{one.other}|{one.customer}|\d+", "_", one.text) for one in questions]
        words = [re.findall(r"\w+", piece.lower()) for text in texts for piece in text.split("_")]
        runs[part] = {tuple(one[at : at + 4]) for one in words for at in range(len(one) - 3)}
        assert len({asked(row) for row in rows(part)}) == PARTS[part]
    for part, other in (("train", "validation"), ("train", "test"), ("validation", "test")):
        assert not about[part] & about[other]
        assert not runs[part] & runs[other]


def test_no_price_is_a_stock_and_every_product_has_both() -> None:
    places = range(len(PRODUCTS))
    assert len(set(PRODUCTS)) == len(PRODUCTS) == 64
    assert min(map(price_of, places)) > max(map(stock_of, places)) > min(map(stock_of, places)) > 1


def test_without_calls_nothing_is_right() -> None:
    numbers = " ".join(map(str, range(60)))
    for part in PARTS:
        for row in rows(part):
            for guess in ("", "Sorry, no.", "I ordered it.", "5", "There are 10 left.", numbers):
                if row["answer"].get("number") not in (5, 10):
                    assert end(row, reply(guess)).reward == 0, (asked(row), guess)


def test_another_reply_an_order_too_many_and_one_too_few_are_wrong() -> None:
    feedback = Counter()
    for row in rows("train"):
        *calls, last = said(row)
        number = row["answer"].get("number")
        found = [end(row, *calls, reply(last["content"] + " Or 99."))] if number is not None else []
        found.append(end(row, *calls, call("order", id=101, count=1, customer="Zoe"), last))
        orders = [one for one in calls if one["tool_calls"][0]["function"]["name"] == "order"]
        if row["answer"].get("orders"):
            found.append(end(row, *[one for one in calls if one not in orders], last))
            if 2 * row["answer"]["orders"][0][2] <= stock_of(PRODUCTS.index(row["answer"]["orders"][0][1])):
                found.append(end(row, *calls, orders[0], last))
            other = copy.deepcopy(orders[0])
            other["tool_calls"][0]["function"]["arguments"]["customer"] = "Zoe"
            found.append(end(row, *[other if one in orders else one for one in calls], last))
        if row["answer"].get("refused"):
            found.append(end(row, *calls, reply("It is done.")))
        for step in found:
            assert step.reward == 0
            assert step.feedback
            feedback[re.sub(r"\d+|the orders .*?(?=,|$)", "_", step.feedback)[:24]] += 1
    assert len(feedback) >= 5


def test_a_reply_may_repeat_what_was_asked_and_word_it_in_other_ways() -> None:
    by_kind = {tuple(sorted(row["answer"])): row for row in rows("train")}
    row = by_kind[("number", "orders")]
    *calls, _ = said(row)
    name, _, count = row["answer"]["orders"][0]
    assert end(row, *calls, reply(f"{name} has {count} of it; {row['answer']['number']} remain.")).reward == 1
    row = by_kind[("refused",)]
    *calls, _ = said(row)
    for text in ("That can't be done.", "Unfortunately there are fewer.", "We have none, 3 perhaps next week."):
        assert end(row, *calls, reply(text)).reward == 1


def test_tools_say_what_is_wrong_with_a_call_and_change_nothing() -> None:
    environment = make_environment("bundled:shop")()
    environment.reset({"prompt": "", "answer": {"orders": []}})
    left = f"{stock_of(0)} left"
    wrong = {
        "no such product": call("find", name="kettle'; DROP TABLE products; --"),
        "no such id": call("stock", id=1),
        "not ordered, count must be at least 1": call("order", id=101, count=-5, customer="Ana"),
        f"not ordered, only {left}": call("order", id=101, count=99, customer="Ana"),
        "Error: order: missing argument 'customer'": call("order", id=101, count=1),
    }
    for text, message in wrong.items():
        assert environment.step(message).observations[0]["content"] == text
    assert (
        environment.step(call("stock", id=10**30)).observations[0]["content"].startswith("Error: stock: OverflowError")
    )
    assert environment.step(call("find", name=" Copper  KETTLES ")).observations[0]["content"].startswith("id 101, ")
    assert environment.step(call("stock", id=101)).observations[0]["content"] == left
    assert environment.step(reply("Fine.")).reward == 1
    environment.close()
