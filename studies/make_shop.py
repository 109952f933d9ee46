"""Write the task ``shop``: questions about a small shop, and for training what an expert does about them.

    python studies/make_shop.py selfdistill/data/bundled
    python studies/make_shop.py runs/shown test

Rows of the training part are episodes: an expert that knows the kind of each question calls the tools of
``bundled:shop`` and words the reply from what they return, so that every observation is true. Rows of the other parts
have the prompt and what the environment compares the end with. Products, customers and phrasings, by hand in
``shop_texts.py``, differ between the parts.

Rows of parts that are named are episodes, too: what ``eval --context`` shows to measure the teacher on questions that
no student learns.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shop_texts import ASKED, CUSTOMERS, UNKNOWN

from selfdistill.environments import PRODUCTS, Environment, make_environment, price_of, stock_of

OWN = {"train": range(26), "validation": range(26, 36), "test": range(36, 64)}
"""Places of each part's products in ``PRODUCTS``."""


@dataclass(frozen=True)
class Question:
    """What is asked, and what it is about."""

    text: str
    kind: str
    product: str
    other: str
    """The product that a price is compared with."""
    count: int
    customer: str
    answer: dict[str, Any]


def questions(part: str) -> list[Question]:
    """The questions of a part, those of one kind after another; every product is asked for in turn."""
    made: list[Question] = []
    for kind, phrases in ASKED[part].items():
        for number, phrase in enumerate(phrases):
            made.append(_question(part, kind, phrase, number, len(made)))
    return made


def _question(part: str, kind: str, phrase: str, number: int, place: int) -> Question:
    own = OWN[part]
    at, beside = own[place % len(own)], own[(place + 7) % len(own)]
    left = stock_of(at)
    count = left + 1 + place % 3 if kind == "refused" else 1 + place % min(3, left)
    customer = CUSTOMERS[part][place % len(CUSTOMERS[part])]
    product = UNKNOWN[part][number] if kind == "missing" else PRODUCTS[at]
    order = [customer, product, count]
    answer: dict[str, Any] = {
        "price": {"number": price_of(at)},
        "stock": {"number": left},
        "order": {"orders": [order]},
        "refused": {"refused": True},
        "left": {"number": left - count, "orders": [order]},
        "missing": {"refused": True},
        "cheaper": {"number": min(price_of(at), price_of(beside))},
    }[kind]
    text = phrase.format(p=product, q=PRODUCTS[beside], n=count, c=customer)
    text = text[0].upper() + text[1:]
    return Question(text, kind, product, PRODUCTS[beside], count, customer, answer)


def row_of(question: Question) -> dict[str, Any]:
    """The row that asks the question, and has what its end is compared with."""
    return {"prompt": question.text, "answer": question.answer}


def episode(environment: Environment, question: Question) -> list[dict[str, Any]]:
    """What the expert does about a question, and what the environment answers."""
    messages = environment.reset(row_of(question))
    acting = expert(question)
    said = next(acting)
    while True:
        messages.append(said)
        step = environment.step(said)
        if step.done:
            assert step.reward == 1, (question, step)
            return messages
        messages += step.observations
        said = acting.send(step.observations[0]["content"])


def expert(question: Question) -> Generator[dict[str, Any], str, None]:
    """The expert's messages; it is sent what each call returned."""
    found = yield _call("find", name=question.product)
    if question.kind == "missing":
        yield _reply("Sorry, we do not sell that.")
    identity, price = (int(word) for word in found.removeprefix("id ").removesuffix(" euros").split(", "))
    order = {"id": identity, "count": question.count, "customer": question.customer}
    if question.kind == "price":
        yield _reply(f"The {question.product} costs {price} euros.")
    if question.kind == "stock":
        yield _reply(f"There are {_first((yield _call('stock', id=identity)))} left.")
    if question.kind == "order":
        yield _call("order", **order)
        yield _reply(f"I ordered {question.count} of the {question.product} for {question.customer}.")
    if question.kind == "refused":
        returned = yield _call("order", **order)
        yield _reply(f"Sorry, only {returned.split()[-2]} are left.")
    if question.kind == "left":
        yield _call("order", **order)
        yield _reply(f"I ordered it. There are {_first((yield _call('stock', id=identity)))} left.")
    if question.kind == "cheaper":
        beside = yield _call("find", name=question.other)
        yield _reply(f"The cheaper one costs {min(price, int(beside.split()[-2]))} euros.")


def _first(text: str) -> str:
    return text.split()[0]


def _call(tool: str, /, **arguments: Any) -> dict[str, Any]:
    call = {"type": "function", "function": {"name": tool, "arguments": arguments}}
    return {"role": "assistant", "content": "", "tool_calls": [call]}


def _reply(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


def main(folder: str, *shown: str) -> None:
    if unknown := set(shown) - set(ASKED):
        sys.exit(f"error: no part {min(unknown)!r}; there are {', '.join(ASKED)}")
    Path(folder).mkdir(parents=True, exist_ok=True)
    for part in ASKED:
        asked = questions(part)
        rows = []
        for place in range(len(asked)):
            question = asked[place * 17 % len(asked)]  # mixes the kinds
            environment = make_environment("bundled:shop")()
            acted = episode(environment, question)
            row = row_of(question)
            if part in ("train", *shown):
                prompt = {"role": "user", "content": row.pop("prompt")}
                row = {"messages": [prompt, *acted], **row}
            rows.append({**row, "tools": environment.tools})
            environment.close()
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (Path(folder) / f"shop.{part}.jsonl").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
