"""Evaluate a model during training, as ``eval`` does, against its base."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from selfdistill.config import TrainingSettings
from selfdistill.data import (
    Demonstration,
    Lacks,
    Note,
    drift_prompts,
    is_packaged,
    load_demonstrations,
    load_prompts,
    notes_on_episodes,
    parse_context,
)
from selfdistill.evaluation.answers import check_answers
from selfdistill.evaluation.distances import Distance, kl_along
from selfdistill.evaluation.episodes import rows_of, unscored
from selfdistill.evaluation.evaluate import Evaluation, EvaluationSet
from selfdistill.evaluation.judge import judge_of
from selfdistill.evaluation.priors import load_prior
from selfdistill.evaluation.replies import kept_replies
from selfdistill.evaluation.statistics import share_interval
from selfdistill.methods import scorer_judges
from selfdistill.model import ForwardPass, LoadedModel, training_precision, use_engine
from selfdistill.runtime import say, say_note


def check_inputs(config: TrainingSettings, own_files: Sequence[str] = (), lacks: Lacks | None = None) -> None:
    """Validate data, evaluation files and the context before any long work, and print notes about them.

    Args:
        config: settings; ``data`` may be "" if its rows are yet to be generated from documents, or have been checked.
        own_files: names of files with rows from memory, for which all notes have been printed.
        lacks: says what a row of ``data`` lacks for the method; see :data:`Lacks`.

    Raises:
        UserError: a file is missing or has bad rows, a scorer cannot use an answer, or the context is unknown.
    """
    if config.context != "auto":
        parse_context(config.context)

    def noted(path: str) -> Note | None:
        return None if Path(path).name in own_files else say_note

    if config.data:
        load_demonstrations(config.data, split=config.split, turns=config.turns, note=noted(config.data), lacks=lacks)
    rows: list[Demonstration] = []
    if config.test is not None:
        rows = load_demonstrations(
            config.test, split=config.test_split, turns=config.turns, note=noted(config.test), lacks=unscored(config)
        )
    if scorer_judges(config):
        check_answers(rows, config.scorer)
    if config.prior is not None:
        load_prior(config.prior)
    for source in config.anchors:
        if not is_packaged(source):
            load_prompts(source, noted(source))


def say_learnt(asked: Sequence[Demonstration], learnt: Sequence[Demonstration]) -> None:
    """Print how many test questions are also prompts to learn, if any."""
    prompts = {repr(row.prompt) for row in learnt}
    if known := sum(repr(row.prompt) in prompts for row in asked):
        say(f"note: {known} of {len(asked)} test questions are also in the training data")


class Evaluator:
    """Test rows, prior questions and the base's results, for any number of runs from that base.

    Evaluation changes neither weights nor random state: replies are greedy, and there are no gradients. With an
    environment, one episode is played per test row.

    Args:
        config: settings with ``test``.
        base: the model before training.

    Raises:
        UserError: test rows or prior questions are invalid.
    """

    def __init__(self, config: TrainingSettings, base: LoadedModel) -> None:
        assert config.test is not None
        rows = load_demonstrations(config.test, split=config.test_split, turns=config.turns)
        for note in notes_on_episodes(rows) if config.environment == "none" else ():
            say_note(note)
        priors = load_prior(config.prior) if config.prior else {}
        self._mixed_precision = config.mixed_precision
        use_engine(base, config)
        self.questions = EvaluationSet(base, rows, priors, config)
        if self.questions.dropped:
            say(f"dropped {self.questions.dropped} of {len(rows)} rows of {config.test}: too long")
        self._data = rows_of(config, load_demonstrations(config.data, split=config.split, turns=config.turns))
        say_learnt(self.questions.demonstrations, self._data)
        self._judge = judge_of(config)
        with self._arithmetic(base):
            self._distance = Distance(base, ForwardPass(base), self.questions.chat, drift_prompts())
        self._test = config.test
        self.replies: list[dict[str, Any]] = []
        """Replies of the model that was measured last to some test rows, as a run keeps them."""
        self.base = self.measure(base, "base")
        self.base_replies = self.replies

    def measure(self, loaded: LoadedModel, who: str) -> Evaluation:
        """The model's :data:`Evaluation`, with ``kl_base``: KL(base||model) on general prompts, nats per token.

        The progress bars call the model ``who``.
        """
        with self._arithmetic(loaded):
            result, answers = self.questions.ask(loaded, self._judge, who=who, rows=self._test)
            result["kl_base"] = self._distance.of(loaded.model)
        self.replies = kept_replies(self.questions.demonstrations, answers)
        return result

    def shown(self, base: LoadedModel, context: str, what: str) -> dict[str, Any] | None:
        """Evaluate the base given each test row's own demonstration (roughly the ceiling for training) or document.

        Args:
            base: the model before training.
            context: how the demonstration or document is shown.
            what: label of the progress bar.

        Returns:
            ``accuracy``, ``interval``, ``items`` and ``kl``: KL(shown||base), in nats per token, along the replies with
            the context. None if rows lack what the context shows.

        Raises:
            UserError: the context does not fit the rows.
        """
        bare, kind = self.questions, parse_context(context)
        if any(kind.lacks(row) for row in bare.demonstrations):
            return None
        questions = EvaluationSet(base, bare.demonstrations, {}, bare.config, context, self._data)
        if questions.dropped:
            asked = len(bare.demonstrations)
            say(f"dropped {questions.dropped} of {asked} rows of {self._test} for the {what}: too long with {context}")
        with self._arithmetic(base):
            answers = questions.answers(base, self._judge, what=f"{what} on {self._test}")
            prompts = [row.student_ids for row in questions.rows]
            kl = kl_along(prompts, answers.ids, base, base, questions.prompts, answers.is_own)
        interval = list(share_interval(sum(answers.correct), len(questions.rows)))
        return {"accuracy": answers.accuracy, "interval": interval, "items": len(questions.rows), "kl": kl}

    def moved(self, base: LoadedModel, model: LoadedModel) -> float:
        """KL(model||base) along the model's own replies to the test rows, nats per token."""
        use_engine(model, self.questions.config)
        with self._arithmetic(base, model):
            answers = self.questions.answers(model, self._judge, what=f"model on {self._test}")
            return kl_along(self.questions.prompts, answers.ids, model, base, own=answers.is_own)

    def _arithmetic(self, loaded: LoadedModel, *others: LoadedModel) -> AbstractContextManager[None]:
        return training_precision(loaded.model, self._mixed_precision, *(other.model for other in others))
