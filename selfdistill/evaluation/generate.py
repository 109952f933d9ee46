"""Generate replies to prompts, as text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from selfdistill.config import AskConfig, TrainConfig, load_yaml
from selfdistill.data import Demonstration, Message, Picture, read_picture
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

    question: str
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


def ask(config: AskConfig) -> AskResult:
    """Ask a model one question, and its base if given.

    Raises:
        UserError: a model cannot be loaded, or reads no pictures; or the picture cannot be used.
    """
    pictures = [] if config.image is None else [read_picture(config.image)]
    question = "".join(picture.mark for picture in pictures) + config.question
    options: dict[str, Any] = {
        "max_completion_length": config.max_completion_length,
        "temperature": config.temperature,
        "seed": config.seed,
        "chat_template_kwargs": config.chat_template_kwargs or _template_options(config.run),
    }

    def reply_of(name: str, adapter_base: str | None) -> str:
        loaded = to_best_device(load_model(name, dtype=config.dtype, adapter_base=adapter_base))
        for note in loaded.notes:
            say_note(note)
        return generate(loaded, [question], pictures=pictures, **options)[0]

    base_reply = None if config.base is None else reply_of(config.base, None)
    return AskResult(config.question, reply_of(config.run, config.adapter_base), base_reply)


def _template_options(run: str) -> dict[str, Any]:
    """The ``chat_template_kwargs`` of a run; empty if the model is not a run folder."""
    file = Path(run) / "config.yaml"
    return dict(load_yaml(file, TrainConfig).get("chat_template_kwargs") or {}) if file.is_file() else {}
