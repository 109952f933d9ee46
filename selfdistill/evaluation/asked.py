"""Ask a model one question, and its base: a reply, or an episode in an environment."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from selfdistill.config import AskConfig
from selfdistill.data import (
    ChatFormat,
    Demonstration,
    Message,
    as_transcript,
    encode,
    load_demonstrations,
    read_picture,
)
from selfdistill.errors import UserError, number_of
from selfdistill.evaluation.episodes import EpisodePlayer, told
from selfdistill.evaluation.generate import (
    generate,
    note_on_environment,
    run_of,
    settings_of,
    system_turn_of,
    with_system_turn,
)
from selfdistill.methods import EpisodeRow, begun, episode_rules
from selfdistill.model import LoadedModel, Sampling, load_model, sample_seed, to_best_device
from selfdistill.runtime import Printable, say_note, unobeyed

QUESTION = "question"
"""Source of the row that a question is, in messages."""


@dataclass(frozen=True, repr=False)
class AskResult(Printable):
    """One question, and the replies of a model and its base."""

    question: str | list[Message]
    """As it was asked: one user turn, or a conversation."""
    reply: str
    """Of an episode, the last."""
    base_reply: str | None
    """None without a base."""
    episode: dict[str, Any] | None = None
    """With an environment, the whole episode: ``messages`` after the question, ``turns``, ``invalid_calls``,
    ``truncated``, and ``reward`` and ``feedback`` of a row that has nothing but the question; the reward is None if the
    environment gave none."""
    base_episode: dict[str, Any] | None = None

    @property
    def details(self) -> dict[str, Any]:
        """What ``--json`` writes."""
        found = {"question": self.question, "reply": self.reply, "base_reply": self.base_reply}
        if self.episode is None:
            return found
        return found | {"episode": self.episode, "base_episode": self.base_episode}

    def print(self, console: Console) -> None:
        """Print the reply, or the transcript of the episode, as it is; with a base, both side by side."""
        reply = _shown(self.reply, self.episode)
        if self.base_reply is None:
            console.print(reply, markup=False, highlight=False, soft_wrap=True)
            return
        table = Table(title=None, expand=False)
        for name in ("base", "model"):
            table.add_column(name, overflow="fold", max_width=60)
        table.add_row(Text(_shown(self.base_reply, self.base_episode)), Text(reply))  # text, not rich's markup
        console.print(table)


def _shown(reply: str, episode: dict[str, Any] | None) -> str:
    """A reply, or the transcript of an episode and how it ended."""
    if episode is None:
        return unobeyed(reply) if reply.strip() else "(empty reply)"
    end = episode["feedback"]
    if not episode["truncated"] and episode["reward"] is not None:
        end = f"reward {episode['reward']:.2f}, as for a row without an answer" + (f": {end}" if end else "")
    end = ": ".join(filter(None, [number_of(episode["turns"], "turn"), end]))
    return unobeyed(f"{as_transcript(episode['messages'])}\n({end})")


def ask(config: AskConfig, conversation: Sequence[Message] | None = None) -> AskResult:
    """Ask a model one question, and its base if given.

    With an environment, each plays an episode that begins with the question.

    Args:
        config: settings.
        conversation: chat messages to reply to, in place of the question.

    Raises:
        UserError: a model cannot be loaded, or reads no pictures; the picture or the conversation cannot be used; or
            the environment fails, for example because it needs more of a row than its prompt.
    """
    run = run_of(Path(config.run))
    trained = settings_of(run)
    if "environment" not in config.model_fields_set:
        note_on_environment(config.run, trained)
    pictures = [] if config.image is None else [read_picture(config.image)]
    messages = [{"role": "user", "content": config.question}] if conversation is None else _checked(conversation)
    marks = "".join(picture.mark for picture in pictures)
    messages[-1] = {**messages[-1], "content": marks + messages[-1]["content"]}
    (messages,) = with_system_turn([messages], config.system, partial(system_turn_of, run))
    row = None if config.environment == "none" else _begun(config, messages)
    template: dict[str, Any] = config.chat_template_kwargs or trained.get("chat_template_kwargs") or {}

    def answer_of(name: str, adapter_base: str | None) -> tuple[str, dict[str, Any] | None]:
        loaded = to_best_device(load_model(name, dtype=config.dtype, adapter_base=adapter_base))
        for note in loaded.notes:
            say_note(note)
        if row is not None:
            episode = _played(config, loaded, loaded.chat(template), row)
            return episode["messages"][-1]["content"], episode
        options: dict[str, Any] = {
            "max_completion_length": config.max_completion_length,
            "temperature": config.temperature,
            "seed": config.seed,
            "chat_template_kwargs": template,
        }
        return generate(loaded, [messages], pictures=pictures, **options)[0], None

    base_reply, base_episode = (None, None) if config.base is None else answer_of(config.base, None)
    reply, episode = answer_of(config.run, config.adapter_base)
    question = config.question if conversation is None else list(conversation)
    return AskResult(question, reply, base_reply, episode, base_episode)


def _checked(conversation: Sequence[Message]) -> list[Message]:
    """The messages of a conversation.

    Raises:
        UserError: they are not chat messages that end with a user turn or a tool's.
    """
    (row,) = load_demonstrations([{"prompt": list(conversation)}], prompts_only=True, name=QUESTION)
    return list(row.prompt)


def _begun(config: AskConfig, messages: Sequence[Message]) -> EpisodeRow:
    """The row of an episode that begins with these messages."""
    episode_rules(config)  # refuses an unknown environment
    with _row_is_named():
        (row,) = begun(config.environment, [Demonstration(tuple(messages), source=QUESTION)])
    return row


def _played(config: AskConfig, loaded: LoadedModel, chat: ChatFormat, row: EpisodeRow) -> dict[str, Any]:
    """The model's episode, as :class:`AskResult` has it."""
    limits: dict[str, Any] = {
        "max_completion_length": config.max_completion_length,
        "max_episode_length": config.longest_completion,
    }
    examples, _ = encode([row], None, chat, max_prompt_length=None, window=loaded.window, replies="episode", **limits)
    rules = episode_rules(config)
    assert rules is not None
    play, prompts = EpisodePlayer(chat, rules, batch_size=1), [example.student_ids for example in examples]
    sampling = Sampling(config.max_completion_length, config.temperature)
    with _row_is_named():
        answers = play(loaded, examples, prompts, sampling, [sample_seed(config.seed, 0, 0, 0)], scored=False)
    episode = told(answers.episodes[0])
    return {**episode, "messages": [*row.first, *episode["messages"]]}


@contextmanager
def _row_is_named() -> Iterator[None]:
    """Let an environment's failure say what it was given."""
    try:
        yield
    except UserError as error:
        if not str(error).startswith(f"{QUESTION}, at "):
            raise
        raise UserError(f"{error}; ask gives the environment a row that has only a prompt") from error
