"""Verdicts on samples: each sample is checked once, by one rank."""

from __future__ import annotations

from collections.abc import Sequence

from selfdistill.data import ChatFormat, Verdict
from selfdistill.errors import UserError
from selfdistill.methods.sequences import Completion
from selfdistill.methods.slots import Checker
from selfdistill.runtime import RaisedOnAllRanks, all_gather, rank_slice


def verdicts_on(checker: Checker, completions: Sequence[Completion], chat: ChatFormat) -> list[Verdict]:
    """The verdict of each completion, the same on every rank; those that have one keep it.

    Each rank checks its share: it takes less time, and a checker that is not exact says the same everywhere.

    Raises:
        RaisedOnAllRanks: the checker's mistake on any rank.
    """
    unchecked = [one for one in completions if one.verdict is None]
    problem, own = None, []
    try:
        own = checker(unchecked[rank_slice(len(unchecked))], chat)
    except UserError as error:
        problem = str(error)
    for found in filter(None, all_gather([problem])):
        raise RaisedOnAllRanks(found)
    new = iter(all_gather(own))
    return [one.verdict or next(new) for one in completions]
