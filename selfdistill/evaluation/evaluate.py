"""Evaluate a model: the new task, prior abilities, and the distance from its base."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from selfdistill.config import EpisodeSettings, EvalConfig, TaskSettings
from selfdistill.data import (
    ChatFormat,
    Demonstration,
    Example,
    Rows,
    default_scorer,
    doubt_about,
    drift_prompts,
    encode_prompts,
    load_demonstrations,
    notes_on_episodes,
    notes_on_rendered,
    parse_context,
)
from selfdistill.evaluation.answers import Answers, answer, check_answers
from selfdistill.evaluation.distances import ANSWER_TOKENS, Between, between
from selfdistill.evaluation.episodes import (
    encoded,
    episode_scores,
    note_on_unused_tools,
    player_of,
    rows_of,
    unscored,
)
from selfdistill.evaluation.judge import Judge, judge_of
from selfdistill.evaluation.lmeval import lm_eval_abilities
from selfdistill.evaluation.priors import EncodedPrior, encode_priors, load_prior, prior_abilities
from selfdistill.evaluation.replies import reply_lines, write_replies
from selfdistill.evaluation.statistics import difference_interval, mean_interval, paired, pass_at_k, share_interval
from selfdistill.methods import scorer_judges
from selfdistill.model import (
    ForwardPass,
    LoadedModel,
    Sampling,
    load_matching,
    load_model,
    matched,
    resolved_precision,
    rest_engine,
    sample,
    sample_seed,
    to_best_device,
    training_precision,
    use_engine,
)
from selfdistill.runtime import check_writable, say, say_note

ASKED = ("model", "base", "data", "prior", "context", "max_completion_length", "num_samples", "temperature", "seed")
"""Settings reported with a result, beside its precision."""
Evaluation = dict[str, Any]
"""The results of one model, as they are written to JSON.

- Always: ``accuracy``, ``accuracy_interval``, ``items``, ``dropped`` (rows too long), ``correct`` (per item), and means
  over replies: ``completion/length`` (tokens), ``completion/truncated`` (share), ``completion/thinking`` and
  ``completion/said`` (tokens inside and outside thinking tags).
- With a judge: ``accuracy_lenient``.
- With an environment, whose verdicts are then in ``correct``, means over episodes: ``episode/reward``,
  ``episode/reward_interval``, ``episode/turns`` and ``episode/invalid_calls``.
- With priors: ``prior`` (by name: ``accuracy``, ``accuracy_norm``, ``interval``, ``items``, ``correct`` and, for
  questions in a file, ``truncated``, the number of replies at the length limit),
  ``prior_accuracy`` (mean over names) and ``prior_interval``.

All intervals are 95% intervals.
"""


def rows_fingerprint(parts: Mapping[str, Sequence[Any]]) -> str:
    """SHA-256 of named groups of rows, independent of where their files are."""
    rows = {
        name: [row.identity() if isinstance(row, Demonstration) else {**asdict(row), "source": ""} for row in part]
        for name, part in parts.items()
    }
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


class EvaluationSet:
    """The questions of an evaluation as token ids, validated before any computation.

    Args:
        loaded: the model, or one with the same tokenizer.
        demonstrations: rows of the new task.
        priors: from :func:`load_prior`.
        config: a command's settings. With an environment, one episode is played per row.
        context: what the model sees with each question of the new task; None: the question alone.
        pool: demonstrations that contexts may draw from; default ``demonstrations``.

    Raises:
        UserError: rows are too long, a scorer cannot use an answer, or the context does not fit the rows.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        demonstrations: Sequence[Demonstration],
        priors: dict[str, Any],
        config: TaskSettings,
        context: str | None = None,
        pool: Sequence[Demonstration] | None = None,
    ) -> None:
        self.config = config
        self.chat = loaded.chat_for(config)
        self._player = player_of(config, self.chat, config.batch_size)
        self.rows: list[Example]
        self.rows, self.dropped = encoded(
            config,
            rows_of(config, demonstrations),
            None if context is None else parse_context(context),
            self.chat,
            loaded.window,
            None if pool is None or context is None else rows_of(config, pool),
        )
        self.demonstrations = [row.demonstration for row in self.rows]
        self.prompts = [row.teacher_ids or row.student_ids for row in self.rows]
        for note in notes_on_rendered(self.demonstrations, self.chat):
            say_note(note)
        self._check_scorers()
        self.priors: list[EncodedPrior] = encode_priors(loaded, self.chat, priors)

    def _check_scorers(self) -> None:
        """Refuse answers that scorers cannot use, and print notes about the scorers."""
        scorer, world = self.config.scorer, self.config.environment
        if not scorer_judges(self.config):
            if scorer:
                say(f"note: the environment {world} gives the rewards, so scorer {scorer} is ignored")
            return
        if self._player:
            say_note(f"the environment {world} has no reward, so the scorer judges the last reply")
        check_answers(self.demonstrations, scorer)
        if scorer and all(row.scorer for row in self.demonstrations):
            say(f"note: every row has its own scorer, so scorer {scorer} is ignored")
        if doubt := doubt_about(self.demonstrations, scorer, self.chat):
            say_note(doubt, topic="scorer")

    @property
    def scorers(self) -> list[str]:
        """Names of the scorers in use, or of the environment."""
        if not scorer_judges(self.config):
            return [self.config.environment]
        return sorted({default_scorer(row, self.config.scorer) for row in self.demonstrations})

    def fingerprint(self) -> str:
        """SHA-256 of all questions with their answers, independent of where the files are."""
        return rows_fingerprint({"": self.demonstrations, **{prior.name: prior.rows for prior in self.priors}})

    def answers(self, loaded: LoadedModel, judge: Judge | None = None, *, what: str) -> Answers:
        """Greedy replies to the new task, or episodes; ``what`` labels the progress bar."""
        return self._answers(loaded, judge, Sampling(self.config.max_completion_length, temperature=0), what)

    def _answers(
        self,
        loaded: LoadedModel,
        judge: Judge | None,
        sampling: Sampling,
        what: str,
        count: int = 1,
        seeds: Sequence[int] | None = None,
    ) -> Answers:
        """``count`` replies to each question, or episodes; an engine then rests."""
        rows = [row for row in self.rows for _ in range(count)]
        prompts = [prompt for prompt in self.prompts for _ in range(count)]
        if self._player:
            answers = self._player(loaded, rows, prompts, sampling, seeds, what, judge)
        else:
            answers = answer(
                loaded,
                prompts,
                [row.demonstration for row in rows],
                self.chat,
                sampling,
                batch_size=self.config.batch_size,
                scorer=self.config.scorer,
                judge=judge,
                seeds=seeds,
                what=what,
            )
        rest_engine()
        return answers

    def ask(
        self, loaded: LoadedModel, judge: Judge | None = None, *, who: str, rows: str
    ) -> tuple[Evaluation, Answers]:
        """Evaluate a model on all questions; also returns its greedy replies to the new task, or episodes.

        The progress bars call the model ``who``, and its new task ``rows``.
        """
        answers = self.answers(loaded, judge, what=f"{who} on {rows}")
        thinking = sum(answers.thinking) / len(self.rows)
        length = sum(answers.lengths) / len(self.rows)
        result: Evaluation = {
            "accuracy": answers.accuracy,
            "accuracy_interval": list(share_interval(sum(answers.correct), len(self.rows))),
            "items": len(self.rows),
            "dropped": self.dropped,
            "correct": answers.correct,
            "completion/length": length,
            "completion/truncated": answers.truncated / len(self.rows),
            "completion/thinking": thinking,
            "completion/said": length - thinking,
            **episode_scores(answers),
        }
        if answers.lenient is not None:
            result["accuracy_lenient"] = sum(answers.lenient) / len(self.rows)
        result |= prior_scores(loaded, self.chat, self.priors, self.config.batch_size, who)
        return result, answers

    def pass_at(self, loaded: LoadedModel, config: EvalConfig, judge: Judge | None, who: str) -> dict[str, Any]:
        """pass@k on the new task from ``num_samples`` samples per row: by k, ``value``, ``interval``, ``items``."""
        count = config.num_samples
        sampling = Sampling(config.max_completion_length, config.temperature, config.top_p)
        seeds = [sample_seed(config.seed, 0, row.row, g) for row in self.demonstrations for g in range(count)]
        sampled = self._answers(loaded, judge, sampling, f"{who}, {count} samples per row", count, seeds)
        right = [sum(sampled.correct[i : i + count]) for i in range(0, len(sampled.correct), count)]
        result = {}
        for k in sorted({2**i for i in range(count.bit_length()) if 2**i <= count} | {count}):
            values = [pass_at_k(c, count, k) for c in right]
            result[str(k)] = {
                "value": sum(values) / len(values),
                "interval": list(mean_interval(values)),
                "items": values,
            }
        return result


def prior_scores(
    loaded: LoadedModel, chat: ChatFormat, priors: Sequence[EncodedPrior], batch_size: int, who: str
) -> Evaluation:
    """The part of an :data:`Evaluation` about prior abilities; empty without priors. Progress bars name ``who``.

    An engine then rests.
    """
    result: Evaluation = {}
    if priors:
        found = prior_abilities(loaded, ForwardPass(loaded), chat, priors, batch_size=batch_size, who=who)
        rest_engine()
        _add_priors(result, {prior.name: asdict(prior) for prior in found})
    return result


def _add_priors(result: Evaluation, found: dict[str, dict[str, Any]]) -> None:
    for prior in found.values():
        prior.pop("name")
        prior["interval"] = list(share_interval(sum(prior["correct"]), prior["items"]))
    priors = result["prior"] = {**result.get("prior", {}), **found}
    result["prior_accuracy"] = sum(prior["accuracy"] for prior in priors.values()) / len(priors)
    intervals = [prior["interval"] for prior in priors.values()]
    groups = (prior["correct"] for prior in priors.values())
    result["prior_interval"] = intervals[0] if len(intervals) == 1 else list(mean_interval(*groups))


def evaluate(
    config: EvalConfig,
    rows: Rows | None = None,
    loaded: LoadedModel | None = None,
    base: LoadedModel | None = None,
) -> dict[str, Any]:
    """Evaluate a model on the new task and prior abilities, and compare it with its base.

    Args:
        config: settings.
        rows: the data of the new task, if already loaded; else ``config.data`` is read.
        loaded: the model, if already loaded; else ``config.model`` is loaded.
        base: the base, if already loaded; else ``config.base`` is loaded, if set.

    Returns:
        The model's :data:`Evaluation` with ``settings`` (``ASKED``), ``scorers``, ``dropped``, ``replies`` and, with
        ``num_samples``, ``pass@k``. With a base also ``base`` (the base's results), ``paired`` (differences on the
        same items: ``accuracy``, ``pass@k``, each prior's, ``prior_accuracy``), ``distance`` (:class:`Between` on
        ``general`` prompts and the ``new_task``'s) and ``kl_base``: KL(base||model) on the general prompts.

    Raises:
        UserError: settings, data or a model are invalid.
    """
    if config.replies:
        check_writable(config.replies, f"replies {config.replies!r}")
    data = config.data if rows is None else rows
    scored = unscored(config)
    shown = parse_context(config.context, episodes=config.environment != "none").lacks if config.context else None

    def lacks(row: Demonstration) -> str | None:
        return scored(row) or (shown(row) if shown else None)

    demonstrations = load_demonstrations(data, split=config.split, turns=config.turns, note=say_note, lacks=lacks)
    priors = load_prior(config.prior) if config.prior else {}
    judge = judge_of(config)
    if loaded is None:
        loaded = to_best_device(load_model(config.model, dtype=config.dtype, adapter_base=config.adapter_base))
    use_engine(loaded, config)
    episodes = notes_on_episodes(demonstrations) if config.environment == "none" else []
    for note in [*episodes, *loaded.notes]:
        say_note(note)
    if base is not None:
        base = matched(base, loaded)
    elif config.base:
        base = load_matching(config.base, loaded, dtype=config.dtype)
    questions = EvaluationSet(loaded, demonstrations, priors, config, config.context)
    if base is not None:
        # Rows too long for either model are dropped for both, so that both answer the same items.
        for_base = EvaluationSet(base, questions.demonstrations, priors, config)
        if for_base.dropped:
            kept = for_base.demonstrations
            questions = EvaluationSet(loaded, kept, priors, config, config.context, demonstrations)
    with training_precision(loaded.model, config.mixed_precision, *([base.model] if base else [])):
        result, answers = _measured(loaded, questions, config, judge, config.model)
        for note in note_on_unused_tools(answers.episodes):
            say_note(note)
        result["settings"] = _reported(config)
        result["scorers"] = questions.scorers
        result["dropped"] = len(demonstrations) - len(questions.rows)
        if base is not None:
            result["base"], of_base = _measured(base, for_base, config, judge, f"base {config.base}")
            result["base"]["dropped"] = result["dropped"]  # the same rows
            result["paired"] = _paired(result["base"], result)
            general = _general_distance(base, loaded, config)
            own = (of_base.is_own, answers.is_own)
            new_task = between(base, loaded, for_base.prompts, questions.prompts, of_base.ids, answers.ids, own)
            result["distance"] = {"general": asdict(general), "new_task": asdict(new_task)}
            result["kl_base"] = general.kl_base
    result["replies"] = reply_lines(questions.demonstrations, answers)
    if config.replies:
        write_replies(Path(config.replies), result["replies"])
    return result


def _reported(config: EvalConfig) -> dict[str, Any]:
    """The settings that are reported with a result."""
    asked = ASKED if config.environment == "none" else (*ASKED, *EpisodeSettings.model_fields)
    found = {name: getattr(config, name) for name in asked}
    return found | {"mixed_precision": resolved_precision(config.mixed_precision)}


def _measured(
    loaded: LoadedModel, questions: EvaluationSet, config: EvalConfig, judge: Judge | None, who: str
) -> tuple[Evaluation, Answers]:
    result, answers = questions.ask(loaded, judge, who=who, rows=config.data)
    if config.num_samples:
        result["pass@k"] = questions.pass_at(loaded, config, judge, who)
    if config.lm_eval_tasks:
        found = lm_eval_abilities(
            loaded,
            config.lm_eval_tasks,
            include_path=config.lm_eval_path,
            limit=config.lm_eval_limit,
            batch_size=config.batch_size,
        )
        _add_priors(result, {f"lm-eval/{task.name}": asdict(task) for task in found})
    return result, answers


def _general_distance(base: LoadedModel, loaded: LoadedModel, config: EvalConfig) -> Between:
    contexts, answers = [], []
    for model in (base, loaded):
        chat = model.chat_for(config)
        contexts.append(encode_prompts(drift_prompts(), chat))
        answers.append([r.ids for r in sample(model, contexts[-1], Sampling(ANSWER_TOKENS, temperature=0))])
    rest_engine()
    return between(base, loaded, contexts[0], contexts[1], answers[0], answers[1])


def _paired(base: Evaluation, model: Evaluation) -> dict[str, Any]:
    """Differences model - base on the same items, each with its interval and p-value."""
    found: dict[str, Any] = {"accuracy": asdict(paired(base["correct"], model["correct"]))}
    for k, of_model in model.get("pass@k", {}).items():
        found[f"pass@{k}"] = asdict(paired(base["pass@k"][k]["items"], of_model["items"]))
    if "prior" in model:
        pairs = {name: (base["prior"][name]["correct"], prior["correct"]) for name, prior in model["prior"].items()}
        found["prior"] = {name: asdict(paired(*pair)) for name, pair in pairs.items()}
        found["prior_accuracy"] = prior_difference(base, model)
    return found


def prior_difference(base: Evaluation, model: Evaluation) -> dict[str, float]:
    """``difference`` of the mean prior accuracies, model - base, with its interval from ``low`` to ``high``.

    Both answered the same questions. Every file has the same weight, so each is resampled on its own.
    """
    pairs = ((base["prior"][name]["correct"], prior["correct"]) for name, prior in model["prior"].items())
    differences = ([int(b) - int(a) for a, b in zip(*pair, strict=True)] for pair in pairs)
    low, high = difference_interval(*differences)
    return {"difference": model["prior_accuracy"] - base["prior_accuracy"], "low": low, "high": high}
