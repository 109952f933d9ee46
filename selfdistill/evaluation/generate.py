"""Generate replies to prompts, as text."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from selfdistill.config import AskConfig, TrainConfig, load_saved
from selfdistill.data import BUNDLED, Demonstration, Message, Picture, load_demonstrations, quoted, read_picture
from selfdistill.errors import UserError
from selfdistill.model import LoadedModel, Sampling, load_model, sample, sample_seed, to_best_device
from selfdistill.runtime import Printable, say_note


def generate(
    loaded: LoadedModel,
    prompts: Sequence[str | Sequence[Message]],
    *,
    pictures: Sequence[Picture] = (),
    max_completion_length: int = 256,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> list[str]:
    """Generate the model's reply to each prompt.

    Args:
        loaded: the model.
        prompts: each text (one user turn) or chat messages.
        pictures: those whose marks in the prompts stand for them.
        max_completion_length: maximum length of a reply, in tokens.
        temperature: sampling temperature; 0: greedy.
        top_p: nucleus sampling: sample from the smallest set of tokens with at least this mass.
        seed: random seed for sampling.
        chat_template_kwargs: extra arguments of the tokenizer's chat template.

    Raises:
        UserError: the model reads no pictures.
    """
    if pictures and loaded.pictures is None:
        raise UserError(
            f"model {loaded.name!r} reads no pictures; use an image-text model with its processor's files, or leave "
            "the picture out"
        )
    known = {picture.digest: picture for picture in pictures}
    chat = loaded.chat(chat_template_kwargs)
    turns = [Demonstration(prompt).prompt for prompt in prompts]  # type: ignore[arg-type]
    ids = [chat.encode_prompt(messages, None, known) for messages in turns]
    seeds = [sample_seed(seed, 0, number, 0) for number in range(len(ids))]
    rollouts = sample(loaded, ids, Sampling(max_completion_length, temperature, top_p), seeds)
    return [chat.decode(rollout.ids) for rollout in rollouts]


@dataclass(frozen=True, repr=False)
class AskResult(Printable):
    """One question, and the replies of a model and its base."""

    question: str | list[Message]
    """As it was asked: one user turn, or a conversation."""
    reply: str
    base_reply: str | None
    """None without a base."""

    def print(self, console: Console) -> None:
        """Print the replies side by side."""
        table = Table(title=None, expand=False)
        sides = {"model": self.reply}
        if self.base_reply is not None:
            sides = {"base": self.base_reply, **sides}
        for name in sides:
            table.add_column(name, overflow="fold", max_width=60)
        table.add_row(
            *(Text(reply if reply.strip() else "(empty reply)") for reply in sides.values())
        )  # text, not rich's markup
        console.print(table)


def ask(config: AskConfig, conversation: Sequence[Message] | None = None) -> AskResult:
    """Ask a model one question, and its base if given.

    Args:
        config: settings.
        conversation: chat messages to reply to, in place of the question.

    Raises:
        UserError: a model cannot be loaded, or reads no pictures; or the picture or the conversation cannot be used.
    """
    trained = _settings_of(config.run)
    pictures = [] if config.image is None else [read_picture(config.image)]
    messages = [{"role": "user", "content": config.question}] if conversation is None else _checked(conversation)
    marks = "".join(picture.mark for picture in pictures)
    messages[-1] = {**messages[-1], "content": marks + messages[-1]["content"]}
    messages = [*_system_turn(config, messages, trained), *messages]
    options: dict[str, Any] = {
        "max_completion_length": config.max_completion_length,
        "temperature": config.temperature,
        "seed": config.seed,
        "chat_template_kwargs": config.chat_template_kwargs or trained.get("chat_template_kwargs"),
    }

    def reply_of(name: str, adapter_base: str | None) -> str:
        loaded = to_best_device(load_model(name, dtype=config.dtype, adapter_base=adapter_base))
        for note in loaded.notes:
            say_note(note)
        return generate(loaded, [messages], pictures=pictures, **options)[0]

    base_reply = None if config.base is None else reply_of(config.base, None)
    question = config.question if conversation is None else list(conversation)
    return AskResult(question, reply_of(config.run, config.adapter_base), base_reply)


def _settings_of(run: str) -> dict[str, Any]:
    """The settings of a run; empty if the model is not a run folder."""
    file = Path(run) / "config.yaml"
    return load_saved(file, TrainConfig) if file.is_file() else {}


def _checked(conversation: Sequence[Message]) -> list[Message]:
    """The messages of a conversation.

    Raises:
        UserError: they are not chat messages that end with a user turn or a tool's.
    """
    (row,) = load_demonstrations([{"prompt": list(conversation)}], prompts_only=True, name="question")
    return list(row.prompt)


def _system_turn(config: AskConfig, messages: Sequence[Message], trained: Mapping[str, Any]) -> list[Message]:
    """The system turn before the messages: the given one, else the one of all training rows; empty if there is none.

    Raises:
        UserError: there are two.
    """
    has_own = messages[0]["role"] == "system"
    if has_own and config.system is not None:
        raise UserError("setting 'system': the messages begin with a system turn of their own; leave one of them out")
    if has_own or config.system == "" or not (config.system or trained):
        return []
    text = config.system or _shared_system_turn(str(trained["data"]), trained)
    return [{"role": "system", "content": text}] if text else []


def _shared_system_turn(data: str, trained: Mapping[str, Any]) -> str | None:
    """The system turn with which all training rows begin; None if there is none, or they are not on this machine."""
    if not (os.path.exists(data) or data.startswith(BUNDLED)):
        say_note(f"the training rows {data!r} are not here, so ask sends no system turn that they may have")
        return None
    rows = load_demonstrations(data, split=trained.get("split", "train"), turns=trained.get("turns", "auto"))
    first = [row.prompt[0] for row in rows]
    if first[0]["role"] != "system" or any(turn != first[0] for turn in first):
        return None
    text = str(first[0]["content"])
    say_note(
        f"asked with the system turn of all training rows, {quoted(text)}; set system to another, or to '' for none"
    )
    return text
