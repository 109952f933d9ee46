"""What SDFT and its relatives share: student samples, scored by a teacher that sees the demonstration."""

from __future__ import annotations

from selfdistill.config import TrainConfig
from selfdistill.loss import Divergence
from selfdistill.methods.examples import DemonstrationExamples
from selfdistill.methods.hints import hinted
from selfdistill.methods.sequences import StudentSamples
from selfdistill.methods.slots import Method, engine_cap, sampling_of
from selfdistill.model import TeacherRule


def on_policy(config: TrainConfig, loss: Divergence, teacher: TeacherRule) -> Method:
    """The slots, with a loss and a teacher."""
    method = Method(
        examples=DemonstrationExamples(config, config.context),
        sequence=StudentSamples(sampling_of(config), config.num_generations or 1, config.seed),
        loss=loss,
        teacher=teacher,
        skip_first_tokens=config.skip_first_tokens,
        importance_cap=config.importance_cap or engine_cap(config),
    )
    return hinted(method, config)
