"""One schema for all settings, with their defaults, units and sources.

The same class defines the command line (``--learning_rate``), the YAML file (``--config``, and ``config.yaml`` in a run
folder) and the Python API. Settings that TRL also has keep TRL's names. An unknown key is an error.
"""

from __future__ import annotations

import datetime
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, get_args
from urllib.parse import urlsplit

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic.fields import FieldInfo
from pydantic_core import PydanticKnownError

from selfdistill.config.trl_names import unknown_setting
from selfdistill.data import CODE, JUDGE, SCORER_NAMES, LearntTurns, by_name, known_or_own
from selfdistill.environments import name_of_given
from selfdistill.errors import UserError, closest, found_value


def plain_address(value: str | None) -> str | None:
    """Accept only addresses without user, query or fragment: secrets belong in the environment, not in config.yaml."""
    if value is None or _is_address(value, "(/[^?#@ ]*)?"):
        return value
    raise ValueError("an address such as http://localhost:8000/v1 in ASCII, without user, password or '?'")


def _is_address(url: str, path: str = "") -> bool:
    """Whether this is the address of a server, with a path that matches the pattern."""
    try:
        parts = urlsplit(url)
        (parts.hostname or "").encode("idna")  # as the connection does
        form = re.fullmatch(rf"https?://[^/?#@ ,]+{path}", url)
        return bool(form and parts.hostname and parts.port != 0 and url.isascii() and url.isprintable())
    except ValueError:  # a port that is not a number, or a host that none can be
        return False


class Settings(BaseModel):
    """Base class of each command's settings: frozen, rejects unknown keys, reports errors on one line."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)

    def __init__(self, **values: Any) -> None:
        values = {name: os.fspath(v) if isinstance(v, os.PathLike) else v for name, v in values.items()}
        try:
            super().__init__(**values)
        except ValidationError as error:
            fields = type(self).model_fields
            raise UserError("; ".join(_one_line(detail, fields) for detail in error.errors())) from None

    @field_validator("*", mode="before")
    @classmethod
    def _no_truth_value(cls, value: Any, info: ValidationInfo) -> Any:
        """Refuse True and False where a number is meant: they would count as 1 and 0."""
        kinds = _kinds(cls.model_fields[str(info.field_name)].annotation)
        is_whole = int in kinds
        if not is_whole and float not in kinds:
            return value
        if isinstance(value, bool):
            raise PydanticKnownError("int_type" if is_whole else "float_type")
        if isinstance(value, list | tuple) and any(isinstance(item, bool) for item in value):
            raise ValueError("whole numbers" if is_whole else "numbers")
        return value

    @field_validator("*")
    @classmethod
    def _as_files_hold_it(cls, value: Any, info: ValidationInfo) -> Any:
        """Convert values of any type to those that config.yaml holds."""
        return _plain(value) if Any in _kinds(cls.model_fields[str(info.field_name)].annotation) else value


def _plain(value: Any) -> Any:
    """A value as files hold it: paths and dates as text, tuples as lists, NumPy's numbers as Python's.

    Raises:
        ValueError: files hold no such value.
    """
    if value is None or type(value) in (str, bool, int, float):
        return value
    if isinstance(value, dict):
        return {_plain(key): _plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, datetime.date):  # YAML reads an unquoted day as a date
        return value.isoformat()
    if hasattr(value, "tolist"):
        return _plain(value.tolist())
    raise ValueError("only numbers, text, lists and objects in it")


def _kinds(hint: Any) -> list[Any]:
    """A type and all types that it is made of."""
    return [hint, *(kind for part in get_args(hint) for kind in _kinds(part))]


_LIMITS = {
    "greater_than": "a number above {gt:g}",
    "greater_than_equal": "{ge:g} or more",
    "less_than": "a number below {lt:g}",
    "less_than_equal": "{le:g} or less",
    "finite_number": "a finite number",
    "too_short": "at least {min_length}",
    "string_pattern_mismatch": "letters, digits, '_', '.' and '-', not beginning with '.' or '-'",
}
"""What a value of the right type should have been, by the type of pydantic's error."""
_TYPES = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "string": "text",
    "list": "a list",
    "tuple": "a list",
    "dict": "an object",
}
"""What a value should have been, by the beginning of the type of pydantic's error."""


def _one_line(detail: Any, fields: Mapping[str, FieldInfo]) -> str:
    """One of pydantic's errors, in this package's words."""
    name = ".".join(part for part in detail["loc"] if isinstance(part, str))  # without list indices
    if detail["type"] == "extra_forbidden":
        return unknown_setting(name, fields)
    if detail["type"] == "missing":
        return f"setting '{name}' is required: {_what(fields[name])}"
    if not name:
        return str(detail["msg"]).removeprefix("Value error, ")
    known = re.findall(r"'(\w+)'", detail["msg"]) if detail["type"] == "literal_error" else ()
    value, want = detail["input"], _wanted(detail, fields[detail["loc"][0]])
    found = repr(value) if isinstance(value, str) else found_value(value)  # of a model, or all rows
    return f"setting '{name}': found {found}, expected: {want}{closest(str(value), known)}"


def _what(field: FieldInfo) -> str:
    """What a setting is: the first sentence of its help."""
    sentence = re.split(r"\.(?:\s+(?=[A-Z])|$)", field.description or "")[0].replace("``", "")
    return " ".join((sentence[:1].lower() + sentence[1:]).split())


def _wanted(detail: Any, field: FieldInfo) -> str:
    """What a setting, or an item of it, should have been; with an example of a list or an object, if there is one."""
    kind, value, is_item = detail["type"], detail["input"], len(detail["loc"]) > 1
    if kind in _LIMITS:
        return _LIMITS[kind].format(**detail.get("ctx", {}))
    if not re.search("_(type|parsing|from_float)", kind):
        return str(detail["msg"]).removeprefix("Value error, ").removeprefix("Input should be ")
    want, help_text = _TYPES[kind.partition("_")[0]], field.description or ""
    if want == "text" and hasattr(value, "save_pretrained"):
        return "a folder or a name; write the model with save_pretrained and give its folder"
    if want == "text" and isinstance(value, Iterable) and isinstance(next(iter(value), None), dict):
        return "the path of a file; write the rows to one"
    example: Any = None
    if want == "a list" and isinstance(field.default, tuple) and field.default:
        example = list(field.default)
    elif want == "an object" and (documented := re.search(r"``(\{.*?\})``", help_text)):
        example = documented[1]
    return want if is_item or example is None else f"{want} such as {example}"


def read_mapping(path: Path, of: str) -> dict[str, Any]:
    """Read a YAML file with a mapping of names to values.

    Args:
        path: the file.
        of: what it maps, for messages, such as "setting names to values".

    Raises:
        UserError: the file cannot be read, is not YAML or not a mapping.
    """
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file (looked from {os.getcwd()}); check the path") from None
    except OSError as error:
        raise UserError(f"{path}: cannot read the settings: {error.strerror}") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        at = "" if mark is None else f"line {mark.line + 1}, column {mark.column + 1}: "
        said = ", ".join(part for part in (error.context, error.problem) if part)
        raise UserError(f"{path}: not a valid YAML file: {at}{said}") from None
    except (yaml.YAMLError, ValueError) as error:  # of bytes that are no text, or of a date that does not exist
        raise UserError(f"{path}: not a valid YAML file: {' '.join(str(error).split())}") from None
    except RecursionError:
        raise UserError(f"{path}: not a valid YAML file: nested too deeply") from None
    if not isinstance(values, dict):
        found = "nothing" if values is None else f"a {type(values).__name__}"
        raise UserError(f"{path}: found {found}, expected a mapping of {of}")
    return values


class EngineSettings(Settings):
    """What samples from a model."""

    engine: Literal["none", "vllm"] = "none"
    """What samples: ``none``, this package's own loop in PyTorch; ``vllm``, vLLM in the same process (the extra
    ``vllm``), meant for GPUs, or on servers with ``engine_url``."""
    engine_url: str | None = None
    """Addresses of vLLM servers that you started, e.g. ``http://10.0.0.2:8000``, several separated by commas. They
    sample instead of this process, and receive the model's weights and the prompts. ``''``: none."""
    engine_folder: str | None = None
    """Folder for sending weights to the servers, which must see it under the same path. The files are deleted after
    use. Default: the system's folder for temporary files."""
    engine_memory_gib: float = Field(default=4.0, gt=0)
    """Memory in GiB for the engine's key/value cache, in addition to its weights. It limits the number of samples drawn
    at a time and their length. Servers have their own setting."""
    engine_timeout_s: float = Field(default=600.0, gt=0)
    """End the command if the engine completes no sample for this many seconds, or if a server takes this long to answer
    any other request."""

    @field_validator("engine_url")
    @classmethod
    def _addresses(cls, value: str | None) -> str | None:
        if not value:  # '' goes back to this process when a run is resumed
            return None
        urls = [url.strip().rstrip("/") for url in value.split(",")]
        if all(map(_is_address, urls)) and len({*urls}) == len(urls):
            return ",".join(urls)
        raise ValueError("distinct server addresses such as http://10.0.0.2:8000, without a path")

    @model_validator(mode="after")
    def _servers_are_of_an_engine(self) -> EngineSettings:
        if self.engine_url and self.engine == "none":
            raise ValueError("setting 'engine_url': no engine uses it; add engine vllm")
        return self

    def refuse_engine_in_4bit(self) -> None:
        """Refuse an engine beside ``load_in_4bit``."""
        if self.engine != "none":
            raise UserError(
                f"setting 'load_in_4bit' does not work with an engine, found {self.engine!r}: leave one out"
            )


class ModelSettings(EngineSettings):
    """The model, its data and its tokenisation. Shared by most commands."""

    model: str
    """Folder, hub id or ``smollm2-135m`` (the starter model, downloaded once from the package index)."""
    dtype: Literal["float32", "bfloat16", "auto"] = "float32"
    """Data type of the weights. If memory allows, use float32 for full fine-tuning; ``mixed_precision`` makes it fast.
    bfloat16 halves the memory for weights, also below a LoRA adapter."""
    adapter_base: str | None = None
    """Base of an adapter, if it is not where ``adapter_config.json`` says, e.g. because it was moved."""
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)
    """Extra arguments of the tokenizer's chat template, e.g. ``{"enable_thinking": false}``."""
    template_date: str | None = None
    """Date (YYYY-MM-DD) for chat templates that write the date. Default: today; a resumed run keeps its start date, and
    a state of ``learn`` that of its first skill."""
    data: str
    """Demonstrations: ``.jsonl``, ``.json``, ``.csv``, ``.tsv``, ``.parquet``, a folder of them, a saved data set,
    a hub name, or a file of the package, e.g. ``bundled:shop.test.jsonl``."""
    split: str = "train"
    """Split of ``data`` to read, from a folder or data set with several."""
    turns: LearntTurns = "auto"
    """Which replies of a chat to learn. ``last``: the last one. ``all``: every one after the prompt. ``auto``: all in
    rows with tool calls or tool turns, else the last one."""
    max_prompt_length: int | None = Field(default=None, ge=1)
    """Maximum prompt length in tokens, for student and teacher. Default: the model's context window minus the
    completion."""
    on_long_prompt: Literal["error", "drop"] = "error"
    """What to do with a row that is too long: stop and name it, or drop and count it. Rows are never truncated."""
    batch_size: int = Field(default=32, ge=1)
    """Prompts per optimizer step, over all processes and micro-batches. The official code uses 32."""
    scorer: str | None = None
    """Scorer for rows that name none: ``exact`` (the default), ``contains``, ``choice``, ``regex``, ``tool_call`` (the
    default for demonstrated tool calls), ``code`` (runs code that the model writes), ``judge``, or your own function
    as ``python:package.module.function``; in Python also the function itself."""
    judge_url: str | None = None
    """OpenAI-compatible API of the ``judge``, e.g. ``http://localhost:8000/v1``; data and replies are sent there. The
    key is read from ``SELFDISTILL_JUDGE_KEY`` or, for api.openai.com only, ``OPENAI_API_KEY``."""
    judge_model: str | None = None
    """Name of the ``judge`` model at that API; it must answer directly, without a thinking phase."""

    @field_validator("scorer", mode="before")
    @classmethod
    def _function_by_name(cls, value: Any) -> Any:
        """A function is a scorer with its name."""
        return by_name(value, "scorer")

    @field_validator("scorer")
    @classmethod
    def _known_scorer(cls, value: str | None) -> str | None:
        return None if value is None else known_or_own(value, (*SCORER_NAMES, CODE, JUDGE))

    @field_validator("template_date", mode="before")
    @classmethod
    def _a_day(cls, value: Any) -> str | None:
        if value is None:
            return None
        try:
            return datetime.date.fromisoformat(str(value)).isoformat()  # YAML reads an unquoted day as a date
        except ValueError:
            raise ValueError("a day such as 2026-01-31") from None

    _plain_address = field_validator("judge_url")(plain_address)

    @model_validator(mode="after")
    def _judge_has_an_address(self) -> ModelSettings:
        if self.scorer == JUDGE and not (self.judge_url and self.judge_model):
            raise ValueError("setting 'scorer': 'judge' needs an endpoint: give judge_url and judge_model")
        return self


EPISODE_REPLIES = 4
"""By default an episode has room for this many replies of maximum length."""


class EpisodeSettings(Settings):
    """The environment that answers the model, and the limits of a reply and of an episode."""

    environment: str = "none"
    """Environment that answers the model until the episode ends, e.g. ``bundled:shop`` or
    ``python:package.module.Class``; in Python also a class or a list of functions. The model sees its tools. Methods
    that learn from the student's own samples learn the whole episode, evaluations play one per row, and ``ask`` one
    that begins with the question (docs/agents.md)."""
    max_turns: int = Field(default=8, ge=1)
    """Maximum number of replies per episode; then it is cut."""
    max_completion_length: int = Field(default=256, ge=1)
    """Maximum length of a completion in tokens; of an episode, that of each reply."""
    max_episode_length: int | None = Field(default=None, ge=1)
    """Maximum tokens per episode after its prompt, replies and observations together. The episode is cut when another
    reply of ``max_completion_length`` might not fit. Default: four times that length, because most turns are short
    calls."""

    @field_validator("environment", mode="before")
    @classmethod
    def _environment(cls, value: Any) -> Any:
        """None is ``none``."""
        if callable(value):
            raise ValueError("a class, a list of functions, or a name as python:package.module.Class")
        return "none" if value is None else value

    @model_validator(mode="before")
    @classmethod
    def _given_by_name(cls, values: dict[str, Any]) -> dict[str, Any]:
        """A class, or functions, are an environment with their names."""
        given = values.get("environment")
        return {**values, "environment": name_of_given(given)} if isinstance(given, list | tuple | type) else values

    @property
    def longest_completion(self) -> int:
        """Maximum tokens after a prompt: of a reply, or of an episode if there is an environment."""
        if self.environment == "none":
            return self.max_completion_length
        return self.max_episode_length or EPISODE_REPLIES * self.max_completion_length

    @model_validator(mode="after")
    def _an_episode_has_room_for_a_reply(self) -> EpisodeSettings:
        if self.longest_completion < self.max_completion_length:
            raise ValueError(
                f"setting 'max_episode_length': found {self.longest_completion}, expected at least "
                f"max_completion_length, {self.max_completion_length}, the tokens of one reply"
            )
        return self


class TaskSettings(EpisodeSettings, ModelSettings):
    """The model and its task: the data and the environment."""


class QuestionSettings(Settings):
    """How questions about documents are generated."""

    writer_url: str | None = None
    """OpenAI-compatible API of another model that writes the questions; the documents are sent there. The key is read
    from ``SELFDISTILL_JUDGE_KEY`` or, for api.openai.com only, ``OPENAI_API_KEY``."""
    writer_model: str | None = None
    """Name of the writer model at that API. Without a writer, the model itself writes the questions."""
    passage_words: int = Field(default=150, ge=20)
    """Maximum length in words of a passage, the part of a document that the teacher sees. In scripts without spaces,
    such as Chinese, each character is a word."""
    tries: int = Field(default=2, ge=1)
    """Questions requested per sentence."""
    phrasings: int = Field(default=2, ge=0)
    """Paraphrases of each question for training, in addition to the one held out for the test."""

    _plain_writer_address = field_validator("writer_url")(plain_address)

    @model_validator(mode="after")
    def _writer_has_a_name(self) -> QuestionSettings:
        if (self.writer_url is None) != (self.writer_model is None):
            raise ValueError("settings 'writer_url' and 'writer_model' go together: give both or neither")
        return self
