"""All checks, in the order in which they run: what must be right first, then what was long suspected, then the rest."""

from __future__ import annotations

import exactness
import few_bits
import graphs
import others
import shape
import speed

CHECKS = (*exactness.CHECKS, *few_bits.CHECKS, *graphs.CHECKS, *speed.CHECKS, *shape.CHECKS, *others.CHECKS)
