"""Encode what methods put into prompts themselves, such as guides and samples."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from selfdistill.config import TrainConfig
from selfdistill.data import ChatFormat, ContextEncoder, Demonstration, PromptIds, pictures_in, with_guide
from selfdistill.methods.slots import Method
from selfdistill.model import LoadedModel, window_of


def encoder_of(config: TrainConfig, chat: ChatFormat, window: int | None) -> ContextEncoder:
    """Encodes contexts within the limits of a run.

    Args:
        config: settings of the run.
        chat: the format of both prompts.
        window: the model's limit for prompt plus completion, in tokens; None if it has none.
    """
    return ContextEncoder(chat, config.max_prompt_length, config.longest_completion, window)


def with_teachers_window(loaded: LoadedModel, method: Method) -> LoadedModel:
    """The student, with the smallest context window of all models that score or draw the method's completions.

    Raises:
        UserError: the ``config.json`` of another model cannot be used.
    """
    rules = [one.teacher for one in (method, *(other for _, other in method.also)) if one.teacher]
    names = {rule.model for rule in rules if rule.model is not None}
    names |= set(method.drawn.others) if method.drawn else set()
    windows = [window for window in (loaded.window, *map(window_of, sorted(names))) if window is not None]
    return replace(loaded, window=min(windows, default=None))


def guided(row: Demonstration, guide: str, encode: ContextEncoder) -> list[int] | None:
    """Token ids of the row's prompt with a guide at its end; None if they do not fit."""
    return encode(row, with_guide(row.prompt, guide))


def cut(made: Callable[[ContextEncoder], list[int] | None], encode: ContextEncoder) -> list[int]:
    """What ``made`` encodes without limits, cut to those of ``encode``, with its pictures; for memory plans.

    None becomes no tokens.
    """
    ids = made(replace(encode, max_prompt_length=None, window=None)) or []
    shorter, pictures = ids[: encode.limit], pictures_in(ids)
    return PromptIds(shorter, pictures) if pictures else shorter
