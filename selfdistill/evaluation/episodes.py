"""Evaluate a model in an environment: one episode per row, through the code that rollouts use."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from selfdistill.config import TaskSettings
from selfdistill.data import (
    JUDGE,
    ChatFormat,
    Context,
    Demonstration,
    Example,
    Lacks,
    Message,
    Verdict,
    check_scorer,
    default_scorer,
    encode,
    nothing_to_score,
    thought_and_said,
)
from selfdistill.errors import UserError
from selfdistill.evaluation.answers import Answers, grade, in_batches
from selfdistill.evaluation.judge import Judge
from selfdistill.evaluation.statistics import mean_interval
from selfdistill.methods import (
    Completion,
    EpisodeRules,
    begun,
    episode_rules,
    limits_of,
    play,
    scorer_judges,
    to_score,
)
from selfdistill.model import LoadedModel, Sampling, check_room, prompts_at_a_time


def unscored(config: TaskSettings) -> Lacks:
    """A function that says why a row cannot be evaluated; an environment can judge any row.

    Raises:
        UserError: there is no such environment, or the scorer cannot be used.
    """
    if not scorer_judges(config):
        return lambda row: None
    check_scorer(config.scorer)
    return nothing_to_score(config.scorer)


def rows_of(config: TaskSettings, rows: Sequence[Demonstration]) -> list[Demonstration]:
    """The rows as the model sees them: with an environment, including its tools and its first message.

    Raises:
        UserError: an environment fails.
    """
    return list(rows) if config.environment == "none" else [*begun(config.environment, rows)]


def encoded(
    config: TaskSettings,
    rows: Sequence[Demonstration],
    context: Context | None,
    chat: ChatFormat,
    window: int | None,
    pool: Sequence[Demonstration] | None,
) -> tuple[list[Example], int]:
    """Encode rows from :func:`rows_of` for evaluation, and count dropped ones; see :func:`selfdistill.data.encode`."""
    return encode(
        rows,
        context,
        chat,
        window=window,
        on_long_prompt=config.on_long_prompt,
        pool=pool,
        **limits_of(config),
    )


@dataclass(frozen=True)
class EpisodePlayer:
    """Plays episodes with a model, batch by batch."""

    chat: ChatFormat
    rules: EpisodeRules
    batch_size: int
    """Episodes per batch; an engine forms its own batches."""
    by_scorer: bool = False
    """Whether a scorer judges the last replies, because the environment has no rewards."""
    scorer: str | None = None
    """Scorer for rows that name none."""

    def __call__(
        self,
        loaded: LoadedModel,
        examples: Sequence[Example],
        prompts: Sequence[list[int]],
        sampling: Sampling,
        seeds: Sequence[int] | None = None,
        what: str | None = None,
        judge: Judge | None = None,
        *,
        scored: bool = True,
    ) -> Answers:
        """Play one episode per example.

        Args:
            loaded: the model.
            examples: encoded rows of :func:`rows_of`.
            prompts: token ids that the model sees before each episode: the student's or the teacher's prompt.
            sampling: how each reply is sampled.
            seeds: one per example, for sampling.
            what: label of the progress bar; None: silent.
            judge: required if a scorer is ``judge``.
            scored: whether success is asked for; if not, ``correct`` is empty.

        Returns:
            The episodes. An episode is correct if its reward is 1.

        Raises:
            UserError: an environment fails, or does not judge; or an engine has no room for the episodes.
        """
        check_room(loaded, prompts, self.rules.max_length, "episode")
        seen = [replace(example, student_ids=ids) for example, ids in zip(examples, prompts, strict=True)]

        def played(batch: list[int]) -> list[Completion]:
            own = [0 if seeds is None else seeds[i] for i in batch]
            return play(loaded, self.chat, [seen[i] for i in batch], sampling, self.rules, own)

        size = prompts_at_a_time(loaded, self.batch_size)
        episodes, lenient = in_batches(played, [len(ids) for ids in prompts], size, what), None
        if self.by_scorer and scored:
            episodes, lenient = self._scored(episodes, judge)
        return Answers(
            replies=[episode.messages[-1]["content"] for episode in episodes],
            correct=[self._verdict(episode).reward == 1 for episode in episodes] if scored else [],
            lenient=lenient,
            ids=[episode.ids for episode in episodes],
            thinking=[self._thinking(episode) for episode in episodes],
            truncated=sum(episode.truncated for episode in episodes),
            episodes=episodes,
        )

    def _scored(
        self, episodes: Sequence[Completion], judge: Judge | None
    ) -> tuple[list[Completion], list[bool] | None]:
        """The episodes with the scorers' verdicts, also by the lenient standard. One that was cut has failed."""
        whole = [number for number, episode in enumerate(episodes) if episode.verdict is None]
        found, lenient = grade(to_score([episodes[number] for number in whole], self.chat, self.scorer), judge)
        if lenient is None and any(default_scorer(one.example.demonstration, self.scorer) == JUDGE for one in episodes):
            lenient = [verdict.reward == 1 for verdict in found]  # all episodes for the judge were cut
        scored = list(episodes)
        for number, verdict in zip(whole, found, strict=True):
            scored[number] = replace(episodes[number], verdict=verdict)
        if lenient is None:
            return scored, None
        right = dict(zip(whole, lenient, strict=True))
        return scored, [right.get(number, False) for number in range(len(episodes))]

    def _verdict(self, episode: Completion) -> Verdict:
        if episode.verdict is None:
            raise UserError(
                f"{episode.example.demonstration.source}: environment {self.rules.environment!r} ended the episode "
                "without a reward, so success cannot be measured; add one"
            )
        return episode.verdict

    def _thinking(self, episode: Completion) -> int:
        """Number of thinking tokens in the replies."""
        count = 0
        for start, end in episode.reply_spans:
            before = [*episode.example.student_ids, *episode.ids[:start]]
            thought, _ = thought_and_said(self.chat, before, episode.ids[start:end])
            count += len(self.chat.encode_text(thought))
        return count


def player_of(config: TaskSettings, chat: ChatFormat, batch_size: int) -> EpisodePlayer | None:
    """The player for the environment in the settings; None without one.

    Raises:
        UserError: there is no such environment.
    """
    rules = episode_rules(config)
    return None if rules is None else EpisodePlayer(chat, rules, batch_size, scorer_judges(config), config.scorer)


def episode_scores(answers: Answers) -> dict[str, Any]:
    """Means over episodes, as part of an evaluation's results; empty without episodes."""
    if not answers.episodes:
        return {}
    rewards = [episode.verdict.reward for episode in answers.episodes if episode.verdict]
    return {
        "episode/reward": sum(rewards) / len(rewards),
        "episode/reward_interval": list(mean_interval(rewards)),
        "episode/turns": answers.turns,
        "episode/invalid_calls": answers.invalid_calls,
    }


def note_on_unused_tools(episodes: Sequence[Completion]) -> list[str]:
    """A note if tools were shown but no reply called one, not even with an invalid call; else empty."""
    messages = [message for episode in episodes for message in episode.messages]
    shown = any(episode.example.demonstration.tools for episode in episodes)
    if not shown or any(message.get("tool_calls") or message.get("invalid") for message in messages):
        return []
    return ["no reply called a tool, though tools were shown; train on demonstrated episodes first (docs/agents.md)"]


def told(episode: Completion) -> dict[str, Any]:
    """An episode as an object for a JSON file: its messages, counts and verdict; without one, the reward is None."""
    messages: list[Message] = list(episode.messages)
    verdict = episode.verdict
    return {
        "messages": messages,
        "turns": episode.turns,
        "invalid_calls": episode.invalid_calls,
        "truncated": episode.truncated,
        "reward": None if verdict is None else verdict.reward,
        "feedback": "" if verdict is None else verdict.feedback,
    }
