"""Methods: each a composition of slots, run by the same loop.

A method answers four questions for the loop: whose tokens are scored (sequence), whose weights score them and with
what context (teacher), how the gap is measured (loss), and which tokens count (weights). The loop never asks for a
method's name.
"""

from __future__ import annotations

from collections.abc import Callable

from selfdistill.config import TrainConfig
from selfdistill.methods.sdft import sdft
from selfdistill.methods.sft import sft
from selfdistill.methods.slots import Method

METHODS: dict[str, Callable[[TrainConfig], Method]] = {"sdft": sdft, "sft": sft}
"""By the name that ``--method`` takes."""
