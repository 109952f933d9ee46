"""All checks, in the order in which they run: whether results are right, memory against plan, then the rest.

Together they may take longer than there is time, so the last ones may not be run.
"""

from __future__ import annotations

import exactness
import few_bits
import graphs
import others
import shape
import speed

FIRST = ("agree", "greedy", "graphs", *(check.name for check in shape.CHECKS))
ALL = (*exactness.CHECKS, *few_bits.CHECKS, *graphs.CHECKS, *speed.CHECKS, *shape.CHECKS, *others.CHECKS)
CHECKS = sorted(ALL, key=lambda check: FIRST.index(check.name) if check.name in FIRST else len(FIRST))
