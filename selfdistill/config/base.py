"""One schema for every setting: its default, unit and source.

The same class is the command line (``--learning_rate``), the YAML file (``--config``, and ``config.yaml`` in a run
folder) and the Python call. Names are TRL's where TRL has the setting. An unknown key is an error.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from typing import Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from selfdistill.data import FUNCTION, JUDGE, SCORER_NAMES
from selfdistill.errors import UserError


def plain_address(value: str | None) -> str | None:
    """An address without user, query or fragment: what is secret belongs in the environment, not in config.yaml."""
    if value is None or re.fullmatch(r"https?://[^/?#@\s]+(/[^?#@\s]*)?", value):
        return value
    raise ValueError("an address such as http://localhost:8000/v1, without user, password or '?'")


class Settings(BaseModel):
    """Base of the settings of each command: frozen, no unknown keys, errors as one line."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise UserError("; ".join(_one_line(detail) for detail in error.errors())) from None


def _one_line(detail: Any) -> str:
    name = ".".join(part for part in detail["loc"] if isinstance(part, str))  # no places in a list
    if detail["type"] == "extra_forbidden":
        return f"unknown setting '{name}': remove it, or see --help for the names"
    if detail["type"] == "missing":
        return f"setting '{name}' is required: give --{name}"
    if not name:
        return str(detail["msg"]).removeprefix("Value error, ")
    want = detail["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
    return f"setting '{name}': found {detail['input']!r}, expected: {want}"


class ModelSettings(Settings):
    """Which model, and how text becomes its tokens. Shared by all commands."""

    model: str
    """Folder, hub id or ``smollm2-135m`` (the starter model, fetched once from the package index)."""
    dtype: Literal["float32", "bfloat16", "auto"] = "float32"
    """Data type of the weights. float32 with bfloat16 arithmetic (``mixed_precision``) is the safe choice."""
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)
    """Passed to the tokenizer's chat template, e.g. ``{"enable_thinking": false}``."""
    data: str
    """Demonstrations: ``.jsonl``, ``.json``, ``.parquet``, a folder of them, a saved data set or a hub name."""
    split: str = "train"
    """Split of a data set with several."""
    max_prompt_length: int | None = Field(default=None, ge=1)
    """Longest prompt, teacher's or student's, in tokens. Default: what the model's window leaves."""
    max_completion_length: int = Field(default=256, ge=1)
    """Most tokens a completion may have."""
    on_long_prompt: Literal["error", "drop"] = "error"
    """A row that does not fit: stop and name it, or leave it out and count it. Nothing is ever cut."""
    batch_size: int = Field(default=32, ge=1)
    """Prompts per optimizer step, or per batch where nothing is trained. 32: the paper's."""
    scorer: str | None = None
    """Scorer for rows that name none: ``exact`` (the default), ``contains``, ``choice``, ``regex``, ``tool_call``,
    ``judge``, or a function of yours as ``python:package.module.function``."""
    judge_url: str | None = None
    """OpenAI-compatible API of the ``judge``, e.g. ``http://localhost:8000/v1``; data and replies are sent there. Its
    key: environment variable ``SELFDISTILL_JUDGE_KEY``, for api.openai.com also ``OPENAI_API_KEY``."""
    judge_model: str | None = None
    """Name of the ``judge`` there: a model that answers at once, without thinking aloud."""

    @field_validator("scorer")
    @classmethod
    def _known_scorer(cls, value: str | None) -> str | None:
        known = (*SCORER_NAMES, JUDGE)
        if value is None or value in known or FUNCTION.fullmatch(value):
            return value
        raise ValueError(f"{', '.join(known)} or python:package.module.function{closest(value, known, '')}")

    @field_validator("judge_url")
    @classmethod
    def _plain_address(cls, value: str | None) -> str | None:
        return plain_address(value)

    @model_validator(mode="after")
    def _judge_has_an_address(self) -> ModelSettings:
        if self.scorer == JUDGE and not (self.judge_url and self.judge_model):
            raise ValueError("setting 'scorer': 'judge' is a model at an address: give --judge_url and --judge_model")
        return self


class QuestionSettings(Settings):
    """How questions about documents are made."""

    writer_url: str | None = None
    """OpenAI-compatible API of another model that writes the questions; the documents are sent there. Its key:
    environment variable ``SELFDISTILL_JUDGE_KEY``, for api.openai.com also ``OPENAI_API_KEY``."""
    writer_model: str | None = None
    """Its name there. Without a writer the model itself writes them."""
    passage_words: int = Field(default=150, ge=20)
    """Most words of a passage, the piece of a document that the teacher is shown."""
    tries: int = Field(default=2, ge=1)
    """Questions asked for about each sentence."""
    phrasings: int = Field(default=2, ge=0)
    """Further phrasings of each question for training, beside the one that is held out for the test."""

    @field_validator("writer_url")
    @classmethod
    def _plain_writer_address(cls, value: str | None) -> str | None:
        return plain_address(value)

    @model_validator(mode="after")
    def _writer_has_a_name(self) -> QuestionSettings:
        if (self.writer_url is None) != (self.writer_model is None):
            raise ValueError("settings 'writer_url' and 'writer_model' go together: give both or none")
        return self


def closest(word: str, known: Iterable[str], otherwise: str = "; see --help for the names") -> str:
    """The end of a message about a word that is not known: the one that was probably meant."""
    names = list(known)
    initials = [name for name in names if "".join(part[:1] for part in name.lstrip("-").split("_")) == word.lstrip("-")]
    close = initials or difflib.get_close_matches(word, names, n=1)
    return f"; did you mean {close[0]}?" if close else otherwise
