"""The rows of a skill: those to learn, and those held out to validate and to test."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence

from selfdistill.config import LearnConfig
from selfdistill.continual.ledger import Skill
from selfdistill.data import Demonstration, Lacks, Rows, as_row, doubt_about, load_demonstrations
from selfdistill.errors import UserError
from selfdistill.evaluation import check_answers, unscored
from selfdistill.methods import scorer_judges
from selfdistill.runtime import say_note
from selfdistill.training import chosen_rows

HELD_OUT = "; the test is rows that were not learnt: for facts, give other phrasings of the learnt ones as test"
"""Advice on a test that was split off."""


def split_rows(config: LearnConfig, lacks: Lacks, in_memory: Mapping[str, Rows]) -> dict[str, list[Demonstration]]:
    """Split the data into ``train``, ``validation`` (of a stream) and ``test``.

    If both validation and test are held out, held-out rows alternate. Validation comes first, so that it starts early.

    Args:
        config: settings of the addition.
        lacks: says what a row lacks to be learnt; see :data:`Lacks`.
        in_memory: rows by the setting, ``data`` or ``test``, that would name their file.

    Raises:
        UserError: rows are invalid, lack what their use requires, or are too few to hold some out; or a scorer cannot
            use an answer of the test.
    """
    scored = unscored(config)
    any_is_asked = config.action == "stream" or not config.test

    def lacks_either(row: Demonstration) -> str | None:
        return lacks(row) or (scored(row) if any_is_asked else None)

    data: Rows = in_memory.get("data", config.data)
    rows = load_demonstrations(data, split=config.split, turns=config.turns, note=say_note, lacks=lacks_either)
    held = ["validation"] if config.action == "stream" else []
    if not config.test:
        held.append("test")
    count = max(len(held), round(len(rows) * config.test_share)) if held else 0
    if held and count >= len(rows):
        advice = "give more, or a lower test_share" if config.test else "give a test"
        raise UserError(f"{config.data}: {len(rows)} rows are too few to hold some out for the {held[-1]}; {advice}")
    chosen = sorted(random.Random(config.seed).sample(range(len(rows)), count))
    split_of = {number: held[place % len(held)] for place, number in enumerate(chosen)}
    splits = {split: [row for row in rows if split_of.get(row.row, "train") == split] for split in ("train", *held)}
    if config.test:
        test: Rows = in_memory.get("test", config.test)
        splits["test"] = load_demonstrations(
            test, split=config.test_split, turns=config.turns, note=say_note, lacks=scored, name="test"
        )
    if scorer_judges(config):  # here, where the rows still name the user's file
        check_answers(splits["test"], config.scorer)
        if doubt := doubt_about(splits["test"], config.scorer):
            say_note(doubt, topic="scorer")
    return splits


def rows_to_learn(
    skills: Sequence[Skill], config: LearnConfig, rows: Sequence[Demonstration]
) -> tuple[Sequence[Demonstration], str]:
    """The training rows that ``num_demonstrations`` draws, and a note if some are test questions of earlier skills.

    Once these are learnt, the skill's score no longer tells what is retained. So they are left out, unless the addition
    has a test of its own. The note is "" if there are none.

    Raises:
        UserError: all of them are left out.
    """
    drawn = chosen_rows(rows, config)
    learnt = {_question(config, row) for row in (drawn if config.test else rows)}
    asked = {
        skill.name: [_question(config, row) for row in load_demonstrations(str(skill.folder / "test.jsonl"))]
        for skill in skills
    }
    counts = {name: sum(question in learnt for question in test) for name, test in asked.items()}
    found = ", ".join(f"{count} of {len(asked[name])} of {name}" for name, count in counts.items() if count)
    if not found:
        return drawn, ""
    if config.test:
        lost = "their scores no longer tell what is retained"
        return drawn, f"{config.name} teaches test questions of earlier skills ({found}), so {lost}"
    held = {question for test in asked.values() for question in test}
    rest = [row for row in rows if _question(config, row) not in held]
    if not rest:
        raise UserError(f"{config.data}: all rows to train on are test questions of earlier skills; give a test")
    left = f"{len(rows) - len(rest)} of {len(rows)} rows to train on are test questions of earlier skills ({found})"
    return chosen_rows(rest, config), f"{left}, so they are left out; to learn them, give a test"


def _question(config: LearnConfig, row: Demonstration) -> str:
    """What tells a row from others: its prompt; in an environment, where other columns matter, all of it."""
    return repr(row.prompt if config.environment == "none" else as_row(row))
