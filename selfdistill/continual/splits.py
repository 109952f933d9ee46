"""The rows of a skill: those to learn, and those held out to validate and to test."""

from __future__ import annotations

import random
from collections.abc import Mapping

from selfdistill.config import LearnConfig
from selfdistill.data import Demonstration, Lacks, Rows, doubt_about, load_demonstrations
from selfdistill.errors import UserError
from selfdistill.evaluation import check_answers, unscored
from selfdistill.methods import scorer_judges
from selfdistill.runtime import say_note


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
