"""The retention matrix of a sequence of skills and its standard summary metrics.

Legend: R_ij is the score on skill j of the model after learning skill i; i = 0 is the base.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

Matrix = Sequence[Sequence[float | None]]
"""First index: the base, then the model after each skill. Second index: skills. None: not measured."""


@dataclass(frozen=True)
class Transfer:
    """Means over skills, in units of accuracy. Those that need two skills are None with one."""

    average: float
    """R_Tj over all skills: the last model's mean score."""
    backward: float | None
    """R_Tj - R_jj over skills before the last (Lopez-Paz and Ranzato 2017, arXiv 1706.08840); below 0: forgetting."""
    forward: float | None
    """R_(j-1)j - R_0j over skills after the first: the gain from earlier skills before a skill was learnt."""
    forgetting: float | None
    """max_i R_ij - R_Tj over skills j before the last, i from j to T - 1 (Chaudhry et al. 2018, arXiv 1801.10112).

    Above 0: the last model is worse than the best earlier one; below 0: better than all of them."""


def transfer(matrix: Matrix) -> Transfer | None:
    """Compute the four metrics; None if there are no skills.

    Args:
        matrix: (T + 1) x T for T skills. R_ij must be measured for i >= j, for i = 0 and for i = j - 1.
    """
    skills = len(matrix) - 1
    if skills < 1:
        return None

    def at(row: int, column: int) -> float:
        value = matrix[row][column]
        assert value is not None, (row, column)
        return value

    earlier = range(skills - 1)
    return Transfer(
        average=_mean([at(skills, j) for j in range(skills)]) or 0.0,
        backward=_mean([at(skills, j) - at(j + 1, j) for j in earlier]),
        forward=_mean([at(j, j) - at(0, j) for j in range(1, skills)]),
        forgetting=_mean([max(at(i, j) for i in range(j + 1, skills)) - at(skills, j) for j in earlier]),
    )


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
