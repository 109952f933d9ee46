"""Episodes: the student and an environment in turns; the student's tokens are learnt, the environment's are given.

    x -> y_1 ~ p(.|x);  o_1 = env(y_1);  y_2 ~ p(.|x, y_1, o_1);  ...   L = the method's loss over the tokens of all y_k

The tokens of an episode are scored as they were sampled, in one pass of each network. The teacher sees them after its
own context. The environment's tokens are read and never a target.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

from selfdistill.config import EpisodeSettings, TrainConfig
from selfdistill.data import ChatFormat, Example, Message, TemplateRefusal, Verdict, changed_when_shown_anew
from selfdistill.environments import Step
from selfdistill.errors import UserError
from selfdistill.methods.examples import DemonstrationExamples, OtherRows
from selfdistill.methods.sequences import ColdStart, Completion, DatasetCompletions, StudentSamples
from selfdistill.methods.slots import Method
from selfdistill.methods.worlds import EpisodeRow, Worlds, environment_of, scorer_judges, tell_shortened
from selfdistill.model import LoadedModel, Rollout, Sampling, TurnSampler, sample_seed
from selfdistill.runtime import gathered, rank_slice, say_note

_LIMITS = {
    "max_turns": "raise max_turns",
    "max_episode_length": "raise max_episode_length, which counts replies, observations, and room for one more reply",
}
"""Settings that cut episodes, and what to do about it."""
COMPARED = 64
"""Episodes of several turns that are compared with what the chat template writes: each costs a rendering."""


@dataclass(frozen=True)
class EpisodeRules:
    """The environment, and the limits of an episode."""

    environment: str
    max_turns: int
    """Replies of the student."""
    max_length: int
    """Tokens of replies and observations together."""
    compared: Iterator[int] = field(default_factory=lambda: iter(range(COMPARED)), compare=False)
    """Has an item for each episode whose turns are still to be compared with what the chat template writes."""

    def tell(self, kind: str, note: str) -> None:
        """Print the first note of a kind in a run, which may have thousands."""
        say_note(note, topic=f"{self.environment}: {kind}")


@dataclass(frozen=True)
class _Answer:
    """What follows a reply."""

    message: Message
    """The reply."""
    step: Step | None = None
    """The environment's step; None if the reply was cut, so the environment was not called."""
    ids: tuple[int, ...] | None = None
    """Token ids of the observations up to the next reply; None if there is no next reply."""
    why: str = ""
    """Why the episode is cut here; "" if it is not."""
    limit: str = ""
    """The setting that cuts it, if it is one of :data:`_LIMITS`."""
    failure: str = ""
    """A failure outside the task: of the environment's step or the chat template."""


@dataclass
class _Episode:
    """An episode so far."""

    example: Example
    seed: int
    ids: list[int] = field(default_factory=list)
    logps: list[float] = field(default_factory=list)
    given: list[tuple[int, int]] = field(default_factory=list)
    messages: list[Message] = field(default_factory=list)
    turns: int = 0
    invalid_calls: int = 0
    truncated: bool = False
    cut: bool = False
    verdict: Verdict | None = None
    ended: bool = False

    @property
    def prompt(self) -> list[int]:
        """All tokens before the next reply."""
        return [*self.example.student_ids, *self.ids]

    @property
    def turn_seed(self) -> int:
        """The seed of the next reply; for the first reply, that of a sample without an environment."""
        return sample_seed(self.seed, self.turns, 0, 0) if self.turns else self.seed

    def take(self, rollout: Rollout, answer: _Answer) -> None:
        """Add a reply and what follows it."""
        self.turns += 1
        self.ids += rollout.ids
        self.logps += rollout.logps
        self.messages.append(answer.message)
        step = answer.step
        if step is not None:
            self.invalid_calls += step.invalid_calls
            if step.done and step.reward is not None:
                self.verdict = Verdict(step.reward, step.feedback)
        if answer.why:
            self.truncated, self.cut, self.verdict = True, step is not None, Verdict(0.0, answer.why)
        if step is None or answer.ids is None:
            self.ended = True
            return
        self.messages += step.observations
        self.given.append((len(self.ids), len(self.ids) + len(answer.ids)))
        self.ids += answer.ids
        self.logps += [0.0] * len(answer.ids)

    def completion(self) -> Completion:
        """The episode as what is scored."""
        return Completion(
            self.example,
            self.ids,
            self.logps,
            self.truncated,
            cut=self.cut,
            given=tuple(self.given),
            turns=self.turns,
            invalid_calls=self.invalid_calls,
            verdict=self.verdict,
            messages=tuple(self.messages),
        )


def play(
    loaded: LoadedModel,
    chat: ChatFormat,
    examples: Sequence[Example],
    sampling: Sampling,
    rules: EpisodeRules,
    seeds: Sequence[int],
) -> list[Completion]:
    """Play one episode per example, all together, turn by turn.

    An episode ends when its environment says so, or it is cut: a reply without an end token, too many turns, no room
    for a further reply, or a reply that the chat template cannot show. A cut episode has the verdict 0. Every episode
    depends only on its own seed and its environment, not on the others.

    Args:
        loaded: the student.
        chat: its format.
        examples: those of rows that have begun: see :func:`selfdistill.methods.worlds.begun`.
        sampling: the policy of one reply.
        rules: who answers, and how long an episode may be.
        seeds: one per example, from :func:`selfdistill.model.sample_seed`.

    Returns:
        One completion per example, the same on every rank.

    Raises:
        UserError: an environment fails, on all ranks; or it has tools, and the chat template's calls are not read.
    """
    if not chat.reads_calls and any(example.demonstration.tools for example in examples):
        raise UserError(
            f"environment {rules.environment!r}: it has tools, but the model's chat template writes calls in a form "
            "that is not read; use a model with another template"
        )
    episodes = [_Episode(example, seed) for example, seed in zip(examples, seeds, strict=True)]
    own, sampler = rank_slice(len(episodes)), TurnSampler(loaded, len(episodes))
    rows = [_row_of(example) for example in examples[own]]
    with Worlds(rules.environment, rows) as worlds:
        gathered(worlds.reset)
        own_episodes = _OwnEpisodes(worlds, chat, rules, sampling, own.start)
        for turn in range(1, rules.max_turns + 1):
            going = [number for number, episode in enumerate(episodes) if not episode.ended]
            if not going:
                break
            prompts = [episodes[number].prompt for number in going]
            turn_seeds = [episodes[number].turn_seed for number in going]
            rollouts = dict(zip(going, sampler(going, prompts, sampling, turn_seeds), strict=True))
            mine = {number: rollouts[number] for number in going if own.start <= number < own.stop}
            answers = gathered(partial(own_episodes.answers, episodes, mine, turn))
            for number, answer in zip(going, answers, strict=True):
                episodes[number].take(rollouts[number], answer)
                _tell_end(rules, examples[number], answer, turn)
                if answer.step is not None:
                    tell_shortened(examples[number].demonstration, turn, answer.step)
    completions = [episode.completion() for episode in episodes]
    for completion in completions:
        _tell_change(rules, chat, completion)
    return completions


def _tell_end(rules: EpisodeRules, example: Example, answer: _Answer, turn: int) -> None:
    """Report, once each, ends outside the task and those by a limit: otherwise only the rewards would show them."""
    place = f"{example.demonstration.source}, at turn {turn}"
    if answer.failure:
        rules.tell("failure", f"{place}: {answer.failure}; the episode has reward 0")
    if answer.limit:
        rules.tell(answer.limit, f"{place}: {answer.why}, so it has reward 0; {_LIMITS[answer.limit]}")


def _tell_change(rules: EpisodeRules, chat: ChatFormat, played: Completion) -> None:
    """Report, once, that an application which shows the messages anew shows the model other turns than this run."""
    if not played.given or next(rules.compared, None) is None:
        return
    row, before = played.example.demonstration, played.messages[:-1]
    options, prompt = row.template_options, played.example.student_ids
    spans = played.reply_spans[:-1]
    if changed := changed_when_shown_anew(chat, [*row.prompt, *before], options, prompt, played.ids, spans):
        rules.tell(
            "change",
            f"{row.source}: as an earlier turn, the chat template {changed}; here it stays as it was sampled, but "
            "applications that send the messages again show the model what the template writes",
        )


@dataclass(frozen=True)
class _OwnEpisodes:
    """Where this process's episodes are played."""

    worlds: Worlds
    chat: ChatFormat
    rules: EpisodeRules
    sampling: Sampling
    first: int
    """Number of the first of its episodes."""

    def answers(self, episodes: Sequence[_Episode], rollouts: dict[int, Rollout], turn: int) -> list[_Answer]:
        """What follows each reply, at turn ``turn`` (from 1); the keys are the numbers of the episodes."""
        whole = [number for number, rollout in rollouts.items() if not rollout.truncated]
        messages = {
            n: self.chat.message_of(r.ids, episodes[n].prompt, episodes[n].example.demonstration.template_options)
            for n, r in rollouts.items()
        }
        asked = [messages[number] for number in whole]
        steps = dict(zip(whole, self.worlds.step([n - self.first for n in whole], asked, turn), strict=True))
        return [
            self._answer(episodes[number], rollout, messages[number], steps.get(number), turn)
            for number, rollout in rollouts.items()
        ]

    def _answer(self, episode: _Episode, rollout: Rollout, message: Message, step: Step | None, turn: int) -> _Answer:
        limit = self.sampling.max_completion_length
        if step is None:
            return _Answer(message, why=f"the reply was cut after {limit} tokens")
        if step.done:
            failure = f"environment {self.rules.environment!r}: {step.feedback}" if step.failed else ""
            return _Answer(message, step, failure=failure)
        if turn == self.rules.max_turns:
            return _Answer(message, step, why=f"the episode was cut after {turn} turns", limit="max_turns")
        row = episode.example.demonstration
        before = [*row.prompt, *episode.messages, message]
        try:
            ids = tuple(self.chat.encode_between(before, step.observations, row.template_options, rollout.ids))
        except TemplateRefusal as error:
            return _Answer(message, step, why=f"the episode was cut: {error}", failure=str(error))
        if len(episode.ids) + len(rollout.ids) + len(ids) + limit > self.rules.max_length:
            why = f"the episode was cut near {self.rules.max_length} tokens"
            return _Answer(message, step, why=why, limit="max_episode_length")
        return _Answer(message, step, ids)


def _row_of(example: Example) -> EpisodeRow:
    row = example.demonstration
    assert isinstance(row, EpisodeRow), "its examples have begun"
    return row


@dataclass(frozen=True)
class EpisodeSamples(StudentSamples):
    """On-policy: the student's own episodes, in an environment."""

    rules: EpisodeRules
    config: TrainConfig = field(kw_only=True, compare=False)

    def __call__(self, loaded: LoadedModel, examples: Sequence[Example], step: int) -> list[Completion]:
        chat = loaded.chat_for(self.config)
        expanded, seeds = self.expanded(examples, step)
        return play(loaded, chat, expanded, self.sampling, self.rules, seeds)


@dataclass(frozen=True)
class NoVerdicts:
    """The checker where only the environment judges, so an episode without its verdict is an error."""

    environment: str

    def __call__(self, completions: Sequence[Completion], chat: ChatFormat) -> list[Verdict]:
        if completions:
            raise UserError(
                f"{completions[0].example.demonstration.source}: environment {self.environment!r} ended the episode "
                "without a reward, but the method learns from rewards; add one"
            )
        return []


def episode_rules(config: EpisodeSettings) -> EpisodeRules | None:
    """The rules of episodes that the settings define; None without an environment.

    Raises:
        UserError: there is no such environment.
    """
    if config.environment == "none":
        return None
    environment_of(config.environment)
    return EpisodeRules(config.environment, config.max_turns, config.longest_completion)


def with_environment(config: TrainConfig, stages: tuple[Method, ...]) -> tuple[Method, ...]:
    """The stages of a method in the environment of the settings, if they name one.

    A stage that learns demonstrations or general prompts is unchanged: its model meets the environment only in
    evaluations.

    Raises:
        UserError: the method samples, but not complete replies of the student; or there is no such environment.
    """
    rules = episode_rules(config)
    if rules is None:
        return stages

    def placed(method: Method) -> Method:
        beside = tuple(replace(part, method=placed(part.method)) for part in method.beside)
        return replace(_in_environment(config, method, rules) if _samples_task(method) else method, beside=beside)

    return tuple(map(placed, stages))


def _samples_task(method: Method) -> bool:
    """Whether it samples replies to the demonstrations' prompts."""
    is_as_given = isinstance(method.sequence, DatasetCompletions) and method.drawn is None
    examples = method.examples.examples if isinstance(method.examples, OtherRows) else method.examples
    return isinstance(examples, DemonstrationExamples) and not is_as_given


def rules_of(method: Method) -> EpisodeRules | None:
    """The rules of the episodes that the method samples; None if it samples none."""
    sequence = method.sequence.samples if isinstance(method.sequence, ColdStart) else method.sequence
    return sequence.rules if isinstance(sequence, EpisodeSamples) else None


def _in_environment(config: TrainConfig, method: Method, rules: EpisodeRules) -> Method:
    samples = method.sequence.samples if isinstance(method.sequence, ColdStart) else method.sequence
    if type(samples) is not StudentSamples or method.drawn is not None:
        raise UserError(
            f"setting 'environment': {config.method} does not learn from whole episodes of the student alone, found "
            f"{rules.environment!r}; use a method that does, such as sdft or grpo, or leave it out"
        )
    played = EpisodeSamples(samples.sampling, samples.num_generations, samples.seed, rules, config=config)
    return replace(
        method,
        sequence=replace(method.sequence, samples=played) if isinstance(method.sequence, ColdStart) else played,
        checker=method.checker and (method.checker if scorer_judges(config) else NoVerdicts(rules.environment)),
        also=tuple((name, _in_environment(config, other, rules)) for name, other in method.also),
    )
