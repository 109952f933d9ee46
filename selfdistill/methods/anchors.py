"""Anchors: prompts on which the model should answer as before; an extra part for any method.

    z -> y ~ p(.|z);   L = mean_t D( p(.|z, y_<t), p_0(.|z, y_<t) )

z are general prompts, your own traffic, or the prompts of earlier skills. p is the student and p_0 the model
before the first step, which sees the same prompt. So no answers are needed. D is forward KL, KL(p_0||p), by default;
JSD has the weight ``jsd_weight``.

Related: Learning without Forgetting (Li and Hoiem 2016, arXiv 1606.09282) distils from the old model on the new task's
inputs; the second stage of SFT + Re-invoke (arXiv 2601.19897) has the same loss, but after the task instead of
alongside it.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain, count
from pathlib import Path
from typing import Any

from selfdistill.config import TrainConfig
from selfdistill.loss import Divergence
from selfdistill.methods.examples import PromptExamples
from selfdistill.methods.sequences import StudentSamples
from selfdistill.methods.slots import FROZEN, Method, Part, Parts, engine_cap, sampling_of


def anchors(config: TrainConfig) -> Parts:
    """One part per source of anchors, which divide ``anchor_share`` evenly."""
    if not config.anchors or not config.anchor_share:
        return ()
    own: dict[str, Any] = {"weight": config.jsd_weight} if config.anchor_divergence == "jsd" else {}
    loss = Divergence(config.anchor_divergence, **own)
    return tuple(
        Part(
            name,
            Method(
                examples=PromptExamples(config, source),
                sequence=StudentSamples(sampling_of(config), 1, config.seed),
                loss=loss,
                teacher=FROZEN,
                importance_cap=engine_cap(config),
            ),
            share=config.anchor_share / len(config.anchors),
        )
        for name, source in zip(_names(config.anchors), config.anchors, strict=True)
    )


def _names(sources: Sequence[str]) -> list[str]:
    """Names of the parts by file; files of the same name are numbered."""
    names: list[str] = []
    for source in sources:
        name = f"anchors:{Path(source).stem}"
        numbered = (f"{name}-{number}" for number in count(2))
        names.append(next(free for free in chain([name], numbered) if free not in names))
    return names
