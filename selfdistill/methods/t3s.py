"""T3S: SFT on the tokens that a worse checkpoint has not learnt (arXiv 2601.10348).

    L = -mean_{t in K} log p(d_t | x, d_<t),   K = { t : log p_b(d_t) <= log p_0(d_t) }

p_0 is the model before training. p_b is ``teacher_model``: an SFT run on the same data, ended at its lowest accuracy.
The tokens that SFT learns first are assumed to be harmful, and are left out. Training restarts from p_0.

Differences: based on notes, not on the authors' code. They find p_b among the checkpoints of the SFT run. Here you name
it, because a run's stages continue from one another and keep no other weights. With ``max_steps``, ``warmup_steps`` 0
and a constant rate, a short SFT run is a checkpoint of a longer one. The notes have the sum over K, as if the other
tokens were not there. So here a demonstration counts as in SFT, by its mean over K, and 0 if K is empty. With
``loss_normalisation`` token, every token in K counts the same, in a mean over all tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from selfdistill.config import TrainConfig
from selfdistill.data import ChatFormat, Demonstration, Example
from selfdistill.errors import UserError
from selfdistill.loss import Pair, pick
from selfdistill.methods.examples import DemonstrationExamples
from selfdistill.methods.sft import sft
from selfdistill.methods.slots import Method, teacher_of
from selfdistill.model import LoadedModel


@dataclass(frozen=True)
class SeenAlike(DemonstrationExamples):
    """Demonstrations whose teacher sees the prompt alone, as the student does."""

    def __call__(
        self, demonstrations: Sequence[Demonstration], loaded: LoadedModel, chat: ChatFormat
    ) -> tuple[list[Example], int]:
        examples, dropped = super().__call__(demonstrations, loaded, chat)
        return [replace(example, teacher_ids=example.student_ids) for example in examples], dropped


def t3s(config: TrainConfig) -> tuple[Method, ...]:
    """SFT's slots plus a token mask, from a worse model and the base."""
    if config.teacher_model is None:
        raise UserError(
            "setting 'teacher_model': t3s needs an SFT run on the same data, ended at its lowest accuracy; give its "
            "run folder"
        )

    def unlearnt(pair: Pair, tokens_N: Tensor) -> Tensor:
        assert pair.log_q_NV is not None
        assert pair.log_base_NV is not None
        return (pick(pair.log_q_NV, tokens_N) <= pick(pair.log_base_NV, tokens_N)).to(pair.log_p_NV.dtype)

    (method,) = sft(config)
    return (
        replace(
            method,
            examples=SeenAlike(config, completion_must_fit=True, replies="episode"),
            teacher=teacher_of(config),
            weighting=unlearnt,
            relative_weights=config.loss_normalisation == "sequence",
            weighs_base=True,
        ),
    )
