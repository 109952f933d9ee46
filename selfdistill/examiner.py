"""Measuring a model while it is trained: as ``eval`` does, against the base that it began as."""

from __future__ import annotations

from typing import Any

import torch

from selfdistill.answers import answer
from selfdistill.config import TrainingSettings
from selfdistill.contexts import encode, parse_context
from selfdistill.demonstrations import load_demonstrations
from selfdistill.distances import Distance, general_prompts, kl_along
from selfdistill.evaluate import Evaluation, Questions
from selfdistill.judge import judge_of
from selfdistill.models import LoadedModel, casts_kept, resolved_precision
from selfdistill.priors import load_prior
from selfdistill.scores import Scorer
from selfdistill.statistics import share_interval
from selfdistill.tracking import say


class Examiner:
    """Test rows, prior questions and the base's own numbers, for any number of runs from that base.

    Measuring changes neither weights nor any random state: replies are greedy, and no gradient flows.

    Args:
        config: settings with ``test``.
        base: the model as it is before training.

    Raises:
        UserError: test rows or prior questions that cannot be used.
    """

    def __init__(self, config: TrainingSettings, base: LoadedModel) -> None:
        assert config.test is not None
        rows = load_demonstrations(config.test, completion_required=False, split=config.split)
        priors = load_prior(config.prior) if config.prior else {}
        self._bfloat16 = resolved_precision(config.mixed_precision) == "bf16"
        self.questions = Questions(base, rows, priors, config)
        if self.questions.dropped:
            say(f"{self.questions.dropped} of {len(rows)} rows of {config.test} are too long and left out")
        self._judge = judge_of(config)
        with self._arithmetic(base):
            self._distance = Distance(base, Scorer(base), self.questions.chat, general_prompts())
        self.base = self.measure(base)

    def measure(self, loaded: LoadedModel) -> Evaluation:
        """The model's :data:`Evaluation`, with ``kl_base``: KL(base||model) on general prompts, nats per token."""
        with casts_kept(loaded.model), self._arithmetic(loaded):
            result, _ = self.questions.ask(loaded, self._judge)
            result["kl_base"] = self._distance.of(loaded.model)
        return result

    def teacher(self, base: LoadedModel, context: str) -> dict[str, Any] | None:
        """The base shown each test row's own demonstration: about the most that can be taught.

        Returns:
            ``accuracy``, ``interval``, ``items`` and ``kl``, KL(teacher||base) along the teacher's replies, nats per
            token; None where rows have no demonstration.

        Raises:
            UserError: a context that does not fit the rows.
        """
        questions, config = self.questions, self.questions.config
        if not all(row.completion for row in questions.demonstrations):
            return None
        rows, _ = encode(
            questions.demonstrations,
            parse_context(context),
            questions.chat,
            max_prompt_length=config.max_prompt_length,
            max_completion_length=config.max_completion_length,
            window=base.window,
            on_long_prompt=config.on_long_prompt,
            pool=load_demonstrations(config.data, split=config.split),
        )
        with casts_kept(base.model), self._arithmetic(base):
            answers = answer(
                base,
                [row.teacher_ids or [] for row in rows],
                [row.demonstration for row in rows],
                questions.chat,
                max_completion_length=config.max_completion_length,
                batch_size=config.batch_size,
                scorer=config.scorer,
                judge=self._judge,
                what="teacher",
            )
            prompts = [row.student_ids for row in rows], [row.teacher_ids or [] for row in rows]
            kl = kl_along(prompts[0], answers.ids, base, base, prompts[1])
        interval = list(share_interval(sum(answers.correct), len(rows)))
        return {"accuracy": answers.accuracy, "interval": interval, "items": len(rows), "kl": kl}

    def moved(self, base: LoadedModel, model: LoadedModel) -> float:
        """KL(model||base) along the model's own replies to the test rows, nats per token."""
        with casts_kept(base.model), casts_kept(model.model), self._arithmetic(base):
            answers = self.questions.answers(model, self._judge)
            return kl_along(self.questions.prompts, answers.ids, model, base)

    def _arithmetic(self, loaded: LoadedModel) -> Any:
        """The training's."""
        return torch.autocast(loaded.device.type, torch.bfloat16, enabled=self._bfloat16)
