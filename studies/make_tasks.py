"""Write the tasks that ship with the package, of which a small model solves some samples.

    python studies/make_tasks.py selfdistill/data/bundled

They are for methods that learn from rewards or feedback, so each has a scorer that says what is wrong. ``strings``:
short Python functions, with unit tests (``--scorer code``). ``sums``: small numbers, and a reply with a line
"Answer: 12"; ``tickets``: which queue of a hotel takes a guest's message, and from which room it comes, as two lines;
``chains``: three additions and subtractions in turn, a line of working for each, and a line "Answer: 12" (all
``--scorer python:selfdistill.data.bundled.checks.fields``). ``chains.plans`` are the training rows of ``chains`` with a
plan each.

Validation and test rows of ``strings`` have functions and compositions that no training row has, those of ``sums``
stories, those of ``tickets`` messages, and those of ``chains`` other numbers or signs. The hand-written part is in
``task_texts.py``.
"""

from __future__ import annotations

import itertools
import json
import random
import sys
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from task_texts import EXAMPLES, MESSAGES, NAMES, PLANS, STORIES, THINGS

ROLES = ("user", "assistant")
PARTS = {"train": 160, "validation": 48, "test": 64}

STEPS = (
    {
        "{x} in upper case": "{s}.upper()",
        "{x} in lower case": "{s}.lower()",
        "{x} reversed": "{s}[::-1]",
        "{x} without spaces": '{s}.replace(" ", "")',
        "{x} without its first character": "{s}[1:]",
        "{x} without its last character": "{s}[:-1]",
        "the first character of {x}": "{s}[:1]",
        "the last character of {x}": "{s}[-1:]",
        "the first three characters of {x}": "{s}[:3]",
        "{x} repeated twice": "{s} * 2",
        "{x} with an exclamation mark at the end": '{s} + "!"',
        "{x} with a dot at the end": '{s} + "."',
        "{x} with every space replaced by a dash": '{s}.replace(" ", "-")',
        "{x} with every a replaced by o": '{s}.replace("a", "o")',
        "{x} between two stars": '"*" + {s} + "*"',
        "{x} without the letter e": '{s}.replace("e", "")',
    },
    {
        "{x} with upper and lower case swapped": "{s}.swapcase()",
        "the last two characters of {x}": "{s}[-2:]",
        "{x} with a question mark at the end": '{s} + "?"',
        "{x} with every space replaced by an underscore": '{s}.replace(" ", "_")',
    },
    {
        "{x} in title case": "{s}.title()",
        "{x} repeated three times": "{s} * 3",
        "{x} without its first two characters": "{s}[2:]",
        "the first two characters of {x}": "{s}[:2]",
        "{x} with a dash in front": '"-" + {s}',
        "{x} with every l replaced by r": '{s}.replace("l", "r")',
    },
)
"""What makes a text of a text: of all parts, only of validation, only of the test."""
ENDS = (
    {
        "the length of {x}": "len({s})",
        "the number of words in {x}": "len({s}.split())",
        "how often the letter a occurs in {x}": '{s}.count("a")',
        "the list of the words of {x}": "{s}.split()",
        "True if {x} starts with the letter h, else False": '{s}.startswith("h")',
        "True if {x} contains a space, else False": '" " in {s}',
    },
    {
        "how often the letter e occurs in {x}": '{s}.count("e")',
        "True if {x} ends with a dot, else False": '{s}.endswith(".")',
        "the position of the first a in {x}": '{s}.find("a")',
    },
    {
        "how often the letter o occurs in {x}": '{s}.count("o")',
        "True if {x} ends with the letter n, else False": '{s}.endswith("n")',
        "the list of the characters of {x}": "list({s})",
        "the length of {x} plus one": "len({s}) + 1",
    },
)
"""What makes something else of a text."""
ASKING = (
    "Write a Python function f(s) that returns {what}.",
    "Write a Python function f that takes a string s and returns {what}.",
    "In Python, define f(s). It returns {what}.",
    "Python code, please: f(s) returns {what}.",
)
INPUTS = (
    *("hello", "hello world", "Python", "banana", "Anna", "a", "Hello, how are you", "level", "one two three"),
    *("The end.", "no", "green tea", "apple pie", "London", "have a nice day", "SUN", "e-mail", "Nala and Ella"),
)


@dataclass(frozen=True)
class Function:
    """A function of a text s: in words, as an expression, and the last part whose steps or ends it uses."""

    what: str
    code: str
    newest: int
    composed: bool

    @cached_property
    def results(self) -> tuple[str, ...]:
        """What it returns for each of ``INPUTS``, as Python writes it."""
        return tuple(repr(eval(self.code, {"s": s})) for s in INPUTS)

    @property
    def part(self) -> int:
        """Compositions of what all parts have: training three times in five."""
        return part_of(repr(self.results)) if self.composed and self.newest == 0 else self.newest


def part_of(text: str) -> int:
    """A part for the text, always the same: training three times in five."""
    return (0, 0, 0, 1, 2)[zlib.crc32(text.encode()) % 5]


def written() -> Iterator[Function]:
    """Functions of one step or end, and compositions of two, those of training first."""
    for newest in range(len(PARTS)):
        new = STEPS[newest] | ENDS[newest]
        steps = STEPS[0] | STEPS[newest]
        for what, code in new.items():
            yield Function(what.format(x="s"), code.format(s="s"), newest, False)
        for outer, inner in itertools.product((steps | ENDS[0] | ENDS[newest]).items(), steps.items()):
            if new.keys() & {outer[0], inner[0]}:
                first = inner[1].format(s="s")
                code = outer[1].format(s=f"({first})" if "+" in first or "*" in first else first)
                yield Function(f"{outer[0].format(x='t')}, where t is {inner[0].format(x='s')}", code, newest, True)


FUNCTIONS = tuple({function.results: function for function in reversed([*written()])}.values())
"""No two give the same results; of those that do, the first."""


def strings(part: int, count: int, chance: random.Random) -> list[dict[str, Any]]:
    """Functions of one step in each phrasing, then compositions; beside training, half of them with a new step."""
    functions = [function for function in FUNCTIONS if function.part == part and unit_tests(function, chance)]
    simple = [function for function in functions if not function.composed]
    rows = [string_row(ask, function, chance) for function in simple for ask in ASKING]
    kinds = [[one for one in functions if one.composed and one.newest == newest] for newest in sorted({0, part})]
    for kind in kinds:
        chosen = chance.sample(kind, (count - len(simple) * len(ASKING)) // len(kinds))
        rows += [string_row(chance.choice(ASKING), function, chance) for function in chosen]
    chance.shuffle(rows)
    return rows


def string_row(asking: str, function: Function, chance: random.Random) -> dict[str, Any]:
    tests = unit_tests(function, chance)
    return row("strings", asking.format(what=function.what), f"def f(s):\n    return {function.code}", tests)


def row(task: str, asked: str, completion: str, answer: Any) -> dict[str, Any]:
    """A row with worked examples as earlier turns, because a small model seldom keeps to a form that is described."""
    turns = [{"role": role, "content": text} for pair in EXAMPLES[task] for role, text in zip(ROLES, pair, strict=True)]
    return {"prompt": [*turns, {"role": "user", "content": asked}], "completion": completion, "answer": answer}


def unit_tests(function: Function, chance: random.Random) -> list[str]:
    """Three tests that no other function passes, nor one that returns one value or its argument; else none."""
    others = [other.results for other in FUNCTIONS if other is not function] + [tuple(map(repr, INPUTS))]
    choices = [*itertools.combinations(range(len(INPUTS)), 3)]
    for chosen in chance.sample(choices, len(choices)):
        values = [function.results[i] for i in chosen]
        if len(set(values)) > 1 and not any(values == [other[i] for i in chosen] for other in others):
            return [f"assert f({INPUTS[i]!r}) == {function.results[i]}" for i in chosen]
    return []


def sums(part: int, count: int, chance: random.Random) -> list[dict[str, Any]]:
    """Each story as often, with other numbers, names and things."""
    rows: dict[str, dict[str, Any]] = {}
    stories = itertools.cycle(STORIES[part])
    while len(rows) < count:
        story, sign = next(stories)
        a, b = numbers(sign, chance)
        result = {"+": a + b, "-": a - b, "*": a * b, "/": a // b}[sign]
        text = story.format(a=a, b=b, name=chance.choice(NAMES[part]), things=chance.choice(THINGS[part]))
        rows[text] = row("sums", text, f"Answer: {result}", {"fields": {"Answer": str(result)}})
    return shuffled(rows, chance)


def numbers(sign: str, chance: random.Random) -> tuple[int, int]:
    """Two numbers with a small whole result that is not negative."""
    if sign in "*/":
        a, b = chance.randint(2, 5), chance.randint(2, 4)
        return (a * b, b) if sign == "/" else (a, b)
    a, b = sorted((chance.randint(2, 9), chance.randint(1, 5)), reverse=True)
    return (a + 1, b) if sign == "-" else (a, b)


def tickets(part: int, count: int, chance: random.Random) -> list[dict[str, Any]]:
    """Each queue as often, each of its messages about as often, from other rooms."""
    rows: dict[str, dict[str, Any]] = {}
    names = list(MESSAGES)
    messages = {queue: itertools.cycle(parts[part]) for queue, parts in MESSAGES.items()}
    while len(rows) < count:
        queue = names[len(rows) % len(names)]
        room = str(chance.randint(1, 6) * 100 + chance.randint(1, 30))
        text = f'Guest in room {room}: "{next(messages[queue])}"\nQueue: kitchen, housekeeping, repairs or reception?'
        answer = {"fields": {"Queue": queue, "Room": room}, "allowed": {"Queue": names}}
        rows[text] = row("tickets", text, f"Queue: {queue}\nRoom: {room}", answer)
    return shuffled(rows, chance)


def chains(part: int, count: int, chance: random.Random) -> list[dict[str, Any]]:
    """Three numbers, added to or subtracted from a first one in turn."""
    rows: dict[str, dict[str, Any]] = {}
    while len(rows) < count:
        steps = [(chance.choice("+-"), chance.randint(1, 4)) for _ in range(3)]
        values = [*itertools.accumulate([chance.randint(1, 6), *(int(f"{sign}{b}") for sign, b in steps)])]
        text = f"Start with {values[0]}. " + " ".join(f"Then {sign} {b}." for sign, b in steps)
        if part_of(text) != part or not all(1 <= value <= 12 for value in values):
            continue
        results = zip(steps, itertools.pairwise(values), strict=True)
        working = [f"{a} {sign} {b} = {c}" for (sign, b), (a, c) in results]
        answer = {"fields": {"Answer": str(values[-1])}}
        rows[text] = row("chains", text, "\n".join([*working, f"Answer: {values[-1]}"]), answer)
    return shuffled(rows, chance)


def with_plan(row: dict[str, Any]) -> dict[str, Any]:
    """A row of ``chains`` with its operations in words, without results, as ``privileged_context``."""
    first, *more = [line.split()[:3] for line in row["completion"].splitlines()[:-1]]
    steps = [first, *[["the result", sign, b] for _, sign, b in more]]
    return row | {"privileged_context": "\n".join(PLANS[sign].format(a=a, b=b) for a, sign, b in steps)}


def shuffled(rows: dict[str, dict[str, Any]], chance: random.Random) -> list[dict[str, Any]]:
    found = list(rows.values())
    chance.shuffle(found)
    return found


def main(folder: str) -> None:
    for name, make in {"strings": strings, "sums": sums, "tickets": tickets, "chains": chains}.items():
        for part, (split, count) in enumerate(PARTS.items()):
            rows = make(part, count, random.Random(f"{name}-{split}"))
            write(rows, Path(folder) / f"{name}.{split}.jsonl")
            if (name, split) == ("chains", "train"):
                write([with_plan(row) for row in rows], Path(folder) / "chains.plans.jsonl")


def write(rows: list[dict[str, Any]], file: Path) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    print(file.name, len(rows))


if __name__ == "__main__":
    main(sys.argv[1])
