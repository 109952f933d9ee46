"""Generate replies to prompts, as text."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from selfdistill.config import TrainConfig, load_saved
from selfdistill.data import Demonstration, Message, Picture, quoted
from selfdistill.errors import UserError
from selfdistill.model import LoadedModel, Sampling, sample, sample_seed
from selfdistill.runtime import say_note


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


SYSTEM_TURN = "system_turn.json"
"""File in a run folder: the system turn with which all training rows begin, as a message; null if there is none."""


def shared_system_turn(rows: Sequence[Demonstration]) -> Message | None:
    """The system turn with which all rows begin; None if there is none, or it has pictures."""
    first: Message = rows[0].prompt[0]
    if first["role"] != "system" or any(row.prompt[0] != first for row in rows):
        return None
    has_pictures = any(picture.mark in first["content"] for picture in rows[0].images)
    return None if has_pictures else first


def with_system_turn(
    chats: Sequence[Sequence[Message]], system: str | None, default: Callable[[], str | None]
) -> list[list[Message]]:
    """Put a system turn before the chats that have none.

    Args:
        chats: the chats.
        system: its text; "": none; None: the default.
        default: gives its text or None; called only if it is needed.

    Raises:
        UserError: a chat begins with a system turn, beside the given one.
    """
    has_own = [any(message.get("role") == "system" for message in chat[:1]) for chat in chats]
    if system is not None and any(has_own):
        raise UserError("setting 'system': the messages begin with a system turn of their own; leave one of them out")
    if system is None and not all(has_own):
        system = default()
    turn: list[Message] = [{"role": "system", "content": system}] if system else []
    return [[*([] if own else turn), *chat] for chat, own in zip(chats, has_own, strict=True)]


def run_of(model: Path) -> Path:
    """The run folder of its ``final`` or of a skill's model in a state of ``learn``; any other folder itself.

    A skill learnt as a stream has a run for each chunk; the last one counts.
    """
    if (model / "config.yaml").is_file():
        return model
    if model.name == "final":
        places = [model.parent]
    elif model.name == "model":
        places = [model.parent / "run", *sorted(model.parent.glob("chunks/*/run"), reverse=True)]
    else:
        places = []
    runs = (place for place in places if all((place / file).is_file() for file in ("config.yaml", "metrics.jsonl")))
    return next(runs, model)


def settings_of(run: Path) -> dict[str, Any]:
    """The settings of a run; empty if the folder is not that of a run."""
    file = run / "config.yaml"
    return load_saved(file, TrainConfig) if file.is_file() else {}


def system_turn_of(run: Path) -> str | None:
    """The text of the system turn of all training rows of a run, with a note; None if none is known."""
    if not (run / SYSTEM_TURN).is_file() and (run / "config.yaml").is_file():
        say_note(f"run {str(run)!r} does not say whether its rows share a system turn, so none is sent; set system")
    text = _saved_turn(run)
    if text is not None:
        say_note(
            f"asked with the system turn of all training rows, {quoted(text)}; set system to another, or to '' for none"
        )
    return text


def note_on_chats(run: Path) -> None:
    """Print a note on what the chats of a run's training had and a copy of its model does not say."""
    text, template = _saved_turn(run), settings_of(run).get("chat_template_kwargs")
    had = [f"the system turn {quoted(text)}"] if text else []
    had += [f"chat_template_kwargs {json.dumps(template)}"] if template else []
    if had:
        say_note(f"training used {' and '.join(had)}, which the exported folder does not store; use it in every chat")


def _saved_turn(run: Path) -> str | None:
    """The text of the system turn of all training rows of a run; None if there is none."""
    file = run / SYSTEM_TURN
    turn = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None
    return None if turn is None else str(turn["content"])


def note_on_environment(run: str, settings: Mapping[str, Any]) -> None:
    """Print a note if a run with these settings learnt in an environment, of which a single reply shows nothing."""
    if (name := settings.get("environment", "none")) != "none":
        say_note(
            f"run {run!r} learnt in the environment {name!r}, whose tools are not shown here; give it as environment "
            "of ask to play an episode"
        )
