"""What a sequence of skills left of each: the retention matrix and what is usually computed from it.

Legend: R_ij is the score on skill j of the model after skill i was learnt; row 0 is the base.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

Matrix = Sequence[Sequence[float | None]]
"""Rows: the base, then the model after each skill. Columns: skills. None: not measured."""


@dataclass(frozen=True)
class Transfer:
    """Means over skills, as shares."""

    average: float
    """Of the last model over all skills."""
    backward: float | None
    """R_Tj - R_jj over skills before the last (Lopez-Paz and Ranzato 2017, arXiv 1706.08840); below 0: forgotten."""
    forward: float | None
    """R_(j-1)j - R_0j over skills after the first: what earlier skills gave a skill before it was learnt."""
    forgetting: float | None
    """max_i R_ij - R_Tj over skills j before the last, i from j to T - 1 (Chaudhry et al. 2018, arXiv 1801.10112).

    Above 0: the last model is worse than the best one before it, which is a loss; below 0: better than any of them."""


def transfer(matrix: Matrix) -> Transfer | None:
    """The four numbers; None before a skill is learnt.

    Args:
        matrix: of T skills, with T + 1 rows; everything from the diagonal on down is measured, and so are row 0 and the
            row before each diagonal.
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
