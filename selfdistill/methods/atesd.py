"""ATESD: adaptive teacher exposure, a controller that learns how much the teacher sees (arXiv 2605.11458).

    x -> y ~ p(.|x);   L = mean_t D( p(.|x, y_<t), q(.|x, c_a, y_<t) )
    a_k ~ Beta(1 + softplus(w s_k), 1 + softplus(v s_k));   (w, v) += r sum_k G_k grad log Beta(a_k)
    G_k = sum_{j>0} g^(j-1) fall_{k+j};   fall_k = (l_{k-1} - l_k) / l_0,   by a trace e, as losses are seen

c_a: the first floor(a m) of the m steps of the reference's reasoning, and its answer. l_k: mean loss while a_k is held.

Differences: based on notes, not on the authors' code. Their s, f, r, g and holds were not found. Here f is linear, s =
(1, completed share of the run, l / l_0), and there is no baseline. A smaller a also lowers the loss at once. Steps are
lines, or sentences of a single line. D and q are the settings'. Hints are in :mod:`selfdistill.methods.hints`.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from statistics import mean
from typing import Any, ClassVar

import torch
from pydantic import Field

from selfdistill.config import Settings, TrainConfig
from selfdistill.data import first_steps_and_answer
from selfdistill.errors import UserError
from selfdistill.methods.hints import HintContexts, HintController, SteppedExamples, hint_of
from selfdistill.methods.on_policy import on_policy
from selfdistill.methods.slots import Method, State, divergence_of, own_settings, teacher_of


class AtesdSettings(Settings):
    """Settings of ATESD alone."""

    hold: int = Field(default=5, ge=1)
    """Number of updates for which a is held."""
    rate: float = Field(default=1.0, ge=0)
    """r, the controller's learning rate; 0: the distribution of a stays as it is."""
    discount: float = Field(default=0.9, ge=0, le=1)
    """g, per draw."""


@dataclass(frozen=True)
class Exposure(HintController):
    """The controller of a."""

    own: AtesdSettings
    seed: int
    start: ClassVar[State] = {"weights": 2 * [3 * [0.0]], "e": 2 * [3 * [0.0]], "s": [1.0, 0, 1], "l": [], "losses": []}

    def value(self, state: State, step: int, steps: int) -> float:
        shapes = _shapes(torch.tensor(state["weights"]), state).tolist()
        return random.Random(f"{self.seed}-{step // self.own.hold}").betavariate(*shapes)

    def update(self, state: State, metrics: dict[str, Any], step: int, steps: int) -> State:
        losses = [*state["losses"], *[metrics[key] for key in ("loss/task", "loss") if key in metrics][:1]]
        if not losses or (step + 1) % self.own.hold:
            return {**state, "losses": losses}
        now = mean(losses)
        first, last = state["l"] or (abs(now) or 1.0, now)
        weights, trace = torch.tensor(state["weights"], requires_grad=True), torch.tensor(state["e"])
        drawn = torch.tensor(self.value(state, step, steps)).clamp(1e-6, 1 - 1e-6)
        (gradient,) = torch.autograd.grad(torch.distributions.Beta(*_shapes(weights, state)).log_prob(drawn), weights)
        weights = weights.detach() + self.own.rate * (last - now) / first * trace
        trace, seen = self.own.discount * trace + gradient, [1.0, (step + 1) / steps, now / first]
        return {"weights": weights.tolist(), "e": trace.tolist(), "s": seen, "l": [first, now], "losses": []}


def _shapes(weights: torch.Tensor, state: State) -> torch.Tensor:
    return 1 + torch.nn.functional.softplus(weights @ torch.tensor(state["s"]))


def atesd(config: TrainConfig) -> tuple[Method, ...]:
    """Student samples, a teacher that sees a part of the reasoning, a controller of the part."""
    own, method = own_settings(config, AtesdSettings), on_policy(config, divergence_of(config), teacher_of(config))
    if config.hint != "1":
        raise UserError("setting 'hint': atesd itself chooses how much the teacher sees: leave it out")
    select = HintContexts(hint_of(config, 1, first_steps_and_answer))
    examples = SteppedExamples(config, config.context, in_parts=True)
    return (replace(method, examples=examples, select=select, controller=Exposure(own, config.seed)),)
