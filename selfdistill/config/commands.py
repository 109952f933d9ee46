"""Settings of the commands other than ``train``."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, field_validator, model_validator

from selfdistill.config.base import (
    EngineSettings,
    EpisodeSettings,
    ModelSettings,
    QuestionSettings,
    Settings,
    TaskSettings,
    read_mapping,
)
from selfdistill.config.method import OwnOrMethodName, anchor_sources
from selfdistill.config.train import OneRun, Precision, TrainConfig, TrainingSettings
from selfdistill.data import GIVEN, by_name
from selfdistill.environments import IN_PYTHON
from selfdistill.errors import UserError, closest


class CompareConfig(TrainingSettings):
    """Settings of ``selfdistill compare``: those of its runs, and what varies between them."""

    output_dir: str
    """Folder of the comparison, with a run folder for each run. An existing one is never overwritten."""
    test: str
    """Held-out rows on which every run is evaluated. Do not use them to choose anything."""
    methods: tuple[OwnOrMethodName, ...] = ("sft", "sdft")
    """Methods, separated by commas, as in ``method``."""
    seeds: tuple[NonNegativeInt, ...] = (0, 1, 2)
    """Seeds, separated by commas. Every method runs once with each."""
    learning_rates: tuple[PositiveFloat, ...] = ()
    """Peak learning rates, separated by commas. Every method runs with each. Default: that of ``train``."""
    vary: dict[str, list[Any]] = Field(default_factory=dict)
    """Another setting and its values, e.g. ``{"teacher": ["ema", "frozen", "live"]}``. Every method runs with each."""
    arms: dict[str, dict[str, Any]] = Field(default_factory=dict)
    """YAML file of runs by name, with the settings in which each differs, such as ``gentle: {method: isdft,
    method_settings: {pull: 0.01}}``. Replaces ``methods`` and ``vary``."""

    eval_steps: int = Field(default=0, ge=0)
    """Steps between evaluations; 0: five per run."""

    def __init__(self, **values: Any) -> None:
        if isinstance(arms := values.get("arms"), str | os.PathLike):
            values["arms"] = read_mapping(Path(arms), "names to settings")
        _refuse_equal_names(values)
        super().__init__(**values)

    @property
    def evaluates_between(self) -> bool:
        """Whether its runs have evaluations between the start and the end: even if ``eval_steps`` is 0."""
        return True

    @field_validator("arms", mode="before")
    @classmethod
    def _methods_by_name(cls, arms: Any) -> Any:
        """Functions of the user's as their names."""
        if not (isinstance(arms, dict) and all(isinstance(own, dict) for own in arms.values())):
            return arms  # pydantic reports the wrong type
        return {arm: {k: by_name(v, k) if k == "method" else v for k, v in own.items()} for arm, own in arms.items()}

    @field_validator("methods", "seeds", "learning_rates", mode="before")
    @classmethod
    def _split(cls, value: Any) -> Any:
        return value.split(",") if isinstance(value, str) else value

    def model_post_init(self, _context: Any) -> None:
        """Check settings against each other."""
        super().model_post_init(_context)
        for name in ("methods", "seeds", "learning_rates"):
            values = getattr(self, name)
            if len(set(values)) < len(values):
                raise UserError(f"setting '{name}': found {values}, expected each value once")
            if not values and name != "learning_rates":
                raise UserError(f"setting '{name}': found no value, expected at least one")
        # All runs have the same number of steps, unless max_steps is varied, and all are measured in one environment.
        fixed = (
            *ModelSettings.model_fields,
            *("environment", "max_completion_length", "output_dir", "test", "test_split", "prior", "eval_steps"),
            "num_train_epochs",
        )
        may_vary = [name for name in TrainingSettings.model_fields if name not in fixed]
        for name, values in self.vary.items():
            if name not in may_vary:
                raise UserError(f"setting 'vary': {name!r} cannot be varied{closest(name, may_vary)}")
            if len(self.vary) > 1 or not values:
                raise UserError("setting 'vary': expected one setting with at least one value")
        if self.arms and (self.vary or self.methods != CompareConfig.model_fields["methods"].default):
            raise UserError("setting 'arms' names the runs: leave 'methods' and 'vary' out")
        own = [*may_vary, "method", "learning_rate"]
        if any(not arm.strip() for arm in self.arms):
            raise UserError("setting 'arms': found an arm without a name")
        for arm, values in self.arms.items():
            if unknown := [name for name in values if name not in own]:
                raise UserError(f"setting 'arms', {arm!r}: {unknown[0]!r} cannot differ{closest(unknown[0], own)}")


def _refuse_equal_names(given: dict[str, Any]) -> None:
    """Refuse different functions of the user's with one name, because a method is known by its name.

    Raises:
        UserError: there are two.
    """
    arms, methods = given.get("arms"), given.get("methods")
    own = [arm.get("method") for arm in arms.values() if isinstance(arm, dict)] if isinstance(arms, dict) else methods
    functions: dict[str, Any] = {}
    for function in own if isinstance(own, list | tuple) else ():
        if callable(function) and not isinstance(function, type):
            name = by_name(function, "method")
            if functions.setdefault(name, function) != function:
                raise UserError(
                    f"setting {'arms' if arms else 'methods'!r}: found two functions named "
                    f"{name.removeprefix(GIVEN)!r}, and methods are known by their names; give each its own __name__"
                )


class CheckConfig(TaskSettings):
    """Settings of ``selfdistill check``."""

    seed: int = Field(default=0, ge=0)
    """Random seed for data order, contexts and sampling."""

    contexts: list[str] = Field(default_factory=list)
    """Contexts to compare, e.g. ``turns:repeats=2``; default: a set that suits the data."""
    sample: int = Field(default=16, ge=2)
    """Number of rows to measure on, drawn at random with the seed."""
    temperature: float = Field(default=1.0, gt=0)
    """Sampling temperature of the rollouts on which teacher and student are compared."""
    batch_size: int = Field(default=8, ge=1)
    """Prompts per optimizer step of the training run to estimate."""
    mixed_precision: Precision = "auto"
    """Precision of that training run, used for all measurements."""
    lora_rank: int = Field(default=0, ge=0)
    """Rank of that training run's LoRA adapter, for its cost and plan, ``spill`` and ``hints``; 0: full fine-tuning."""
    hints: bool = False
    """Also measure the teacher in the best layout with shares of the demonstration from 0 to 1, and, as ``spill`` does,
    the effect of a few training steps with each share. With ``anchors`` ``none``: only the teacher."""
    spill: bool = False
    """Also measure how far a few steps of SFT and of SDFT move the model on general prompts, or on your ``anchors``."""
    anchors: tuple[str, ...] = ("package",)
    """Prompts on which ``spill`` and ``hints`` measure how far the model moves; 16 are drawn. As in ``train``:
    ``package`` (general prompts of many kinds), ``package:list+code`` (only these kinds), or a text file with one
    prompt per line, or rows with ``prompt`` or ``messages``, such as your own traffic. Several sources, separated by
    commas, get equal shares. ``none``: not measured."""
    learning_rate: float | None = Field(default=None, gt=0)
    """Learning rate for the steps of ``spill`` and ``hints``: use that of the training run. Default 1e-5, with LoRA
    1e-4."""
    fine_tuned: str | None = None
    """A model fine-tuned on the same demonstrations, for example with ``--method sft``. Its distance from the base is
    compared with the teacher's."""

    _sources = field_validator("anchors", mode="before")(anchor_sources)

    @field_validator("contexts", mode="before")
    @classmethod
    def _one_context(cls, value: Any) -> Any:
        """A text is one context."""
        return [value] if isinstance(value, str) else value


SHARED_WITH_CHECK = (CheckConfig.model_fields.keys() & TrainConfig.model_fields.keys()) - {"anchors"}
"""Settings of a check that its training run shares; not ``anchors``, which a check measures on and a run trains on."""


def run_settings(config: CheckConfig) -> dict[str, Any]:
    """The settings that a training run shares with a check, by name."""
    context = config.contexts[0] if len(config.contexts) == 1 else "auto"
    return {name: getattr(config, name) for name in SHARED_WITH_CHECK} | {"context": context}


class EvalConfig(TaskSettings):
    """Settings of ``selfdistill eval``."""

    batch_size: int = Field(default=32, ge=1)
    """Prompts per forward batch. It changes time and memory."""
    mixed_precision: Precision = "auto"
    """As in ``train``, so that scores agree with those of its evaluations. auto: bfloat16 arithmetic where it is fast
    (most GPUs, CPUs with AMX or AVX512-BF16), float32 otherwise."""
    prior: str | None = None
    """File or folder of questions about the base model's prior abilities, e.g. ``bundled:prior/test``."""
    base: str | None = None
    """Base model: evaluated on the same items, with paired tests and the distance between the two models."""
    context: str | None = None
    """Context that the model, but not the base, sees with each new question, as a teacher does in training.
    ``document:show=document`` is oracle RAG: the right document in the prompt."""
    num_samples: int = Field(default=0, ge=0)
    """Sampled replies, or episodes, per row, for pass@k with k up to this number; 0: greedy replies only."""
    temperature: float = Field(default=1.0, gt=0)
    """Sampling temperature for ``num_samples``."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Nucleus sampling for ``num_samples``: sample from the smallest set of tokens with at least this mass."""
    seed: int = Field(default=0, ge=0)
    """Random seed for data order, contexts and sampling."""
    lm_eval_tasks: list[str] = Field(default_factory=list)
    """Names of lm-eval tasks and groups to evaluate as prior abilities; needs the extra ``lm-eval``."""
    lm_eval_path: str | None = None
    """Folder of your own lm-eval task files (YAML). They can run Python code: use only files you trust."""
    lm_eval_limit: int | None = Field(default=None, ge=1)
    """Maximum number of items per task; default: all."""
    replies: str | None = None
    """File for every greedy reply with its score, in JSON Lines."""


class AskConfig(EpisodeSettings):
    """Settings of ``selfdistill ask``."""

    run: str
    """Run folder, model folder, hub id or ``smollm2-135m``."""
    question: str
    """The question: one user turn."""
    system: str | None = None
    """A system turn before the question; ``''``: none. Default: that of the training rows, if the same one begins all
    rows of the run."""
    image: str | None = None
    """A picture file, shown before the question. Needs an image-text model with its processor's files."""
    base: str | None = None
    """A second model that gets the same question, shown beside the first."""
    temperature: float = Field(default=0.0, ge=0)
    """Sampling temperature; 0: greedy."""
    seed: int = Field(default=0, ge=0)
    """Random seed for sampling."""
    dtype: Literal["float32", "bfloat16", "auto"] = "float32"
    """Data type of the weights."""
    adapter_base: str | None = None
    """Base of an adapter, if it is not where ``adapter_config.json`` says, e.g. because it was moved."""
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)
    """Extra arguments of the tokenizer's chat template; default: those of the run's training."""

    @model_validator(mode="after")
    def _an_episode_is_text(self) -> AskConfig:
        if self.image is not None and self.environment != "none":
            raise ValueError("setting 'image': episodes support only text; leave out the picture or the environment")
        return self


class LearnConfig(TrainingSettings, OneRun):
    """Settings of ``selfdistill learn``."""

    state: str
    """Folder that holds one model's state: its skills in order, with their tests, models and results."""
    action: Literal["add", "stream", "status", "history", "rollback", "restore", "discard", "export"]
    """``add``: learn a skill from a file, or resume an interrupted ``add``. ``stream``: the same from rows in order of
    arrival, testing each chunk before learning it. ``status``: retention of every skill. ``history``: everything that
    was added, refused or rolled back. ``rollback``: undo the last skill. ``restore``: put back what was rolled back.
    ``discard``: drop an interrupted ``add``. ``export``: write the current model to ``output_dir``."""
    data: str = ""
    """Demonstrations of the skill (``add``, ``stream``)."""
    model: str = ""
    """The base model; required only when the state is created."""
    output_dir: str = ""
    """Where ``export`` writes the model."""
    name: str | None = Field(default=None, pattern=r"^\w[\w.-]*$")
    """Name of the skill; default: the name of its file."""
    replaces: str | None = None
    """Name of the earlier skill that this one replaces, for example with corrected rows. Its prompts are not rehearsed,
    and no gate applies to it, in this addition and all later ones."""
    prior: str | None = None
    """File or folder of questions about the base model's prior abilities, e.g. ``bundled:prior/test``, copied into the
    state when it is created."""
    test: str | None = None
    """Held-out rows for the gates, asked now and with every later addition; default: a share of the data."""
    test_share: float = Field(default=0.2, gt=0, lt=1)
    """Share of the data held out as the test if ``test`` is not given. In a ``stream`` it is the validation set that
    ends training on a chunk; without ``test``, half of it is the test."""
    min_teacher: float = Field(default=0.5, ge=0, le=1)
    """Refuse a skill before training if its teacher (the current model shown the demonstration) is right on a smaller
    share of its rows than this, by the 95% interval on 16 of them, or is no better than the model itself; 0: never."""
    max_prior_drop: float = Field(default=0.02, ge=0, le=1)
    """Gate: refuse a skill if it lowers the mean prior accuracy by more than this below the base's, and the 95%
    interval of the difference on the same questions excludes 0."""
    max_skill_drop: float | None = Field(default=None, ge=0, le=1)
    """Gate: refuse a skill if an earlier one's score drops by more than this since it was learnt, or its own since
    before training. Default: a drop below the 95% interval of that score, which is wide for a small test."""
    anchors: tuple[str, ...] = ("package",)
    """Prompts on which the model should answer as before the addition, besides those of earlier skills:
    ``package`` (general prompts of many kinds), ``package:list+code`` (only these kinds), or a text file with one
    prompt per line, or rows with ``prompt`` or ``messages``, such as your own traffic. Several sources are separated by
    commas. ``none``: only those of earlier skills."""
    anchor_share: float = Field(default=0.5, ge=0, lt=1)
    """Share of every batch that is anchors, by default half. All sources get equal parts; the prompts of all
    earlier skills together are one source. 0: no anchors and no rehearsal."""
    remember: Literal["all", "none"] | int = "all"
    """Which training prompts of this skill later additions rehearse: ``all``, ``none``, or at most this many, drawn
    with the seed. The rows themselves always stay in the state, in ``train.jsonl``."""
    eval_steps: int = Field(default=0, ge=0)
    """Steps between evaluations of every skill during training, written to ``along.jsonl``; 0: none."""
    chunk_size: int = Field(default=32, ge=1)
    """``stream``: rows per chunk."""
    chunk_steps: int = Field(default=50, ge=1)
    """``stream``: maximum steps per chunk; training on it ends when the loss on the latest validation rows stops
    falling. Until the first validation row arrives, every chunk takes this many steps."""

    @field_validator("remember", mode="before")
    @classmethod
    def _prompts(cls, value: Any) -> Any:
        """Accept a number as text; 0 is ``none``."""
        number = int(value) if isinstance(value, str) and value.isdecimal() else value
        if number in ("all", "none") or (type(number) is int and number >= 0):
            return number or "none"
        raise ValueError("all, none, or a number of prompts")

    def model_post_init(self, _context: Any) -> None:
        """Check settings against each other, without ``train``'s rules about ``test``."""
        needs = {"add": "data", "stream": "data", "export": "output_dir"}.get(self.action)
        if needs and not getattr(self, needs):
            what = "the skill's file" if needs == "data" else "output_dir"
            raise UserError(f"learn {self.action} needs {what}")
        if self.stop_on_collapse:
            raise UserError("setting 'stop_on_collapse' is for train and compare; learn has gates instead")
        if self.environment.startswith(IN_PYTHON):
            raise UserError(
                "setting 'environment': learn plays it again whenever another skill is added, but one given in "
                "Python is lost with this process; put it into a module and give python:module.NAME"
            )
        if self.scorer is not None and self.scorer.startswith(GIVEN):
            raise UserError(
                "setting 'scorer': learn scores with it again whenever another skill is added, but a function given "
                "in Python is lost with this process; put it into a module and give python:module.function"
            )


class QuestionsConfig(QuestionSettings, EngineSettings):
    """Settings of ``selfdistill questions``."""

    documents: str
    """Folder of documents (``.txt``, ``.md``, ``.html``, ``.pdf``), including subfolders; or one file."""
    output_dir: str
    """Folder for ``train.jsonl``, ``test.jsonl`` and ``indirect.jsonl``. Replies are cached there and reused."""
    model: str
    """The model to teach. It must answer the questions from the text and, without a writer, writes them."""
    dtype: Literal["float32", "bfloat16", "auto"] = "float32"
    """Data type of the weights, in which the model computes. bfloat16 halves the memory for weights."""
    load_in_4bit: bool = False
    """Keep the weights of linear layers in 4 bits. Needs the extra ``bitsandbytes``."""
    adapter_base: str | None = None
    """Base of an adapter, if it is not where ``adapter_config.json`` says, e.g. because it was moved."""
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)
    """Extra arguments of the tokenizer's chat template, e.g. ``{"enable_thinking": false}``."""
    batch_size: int = Field(default=16, ge=1)
    """Questions per batch."""
    seed: int = Field(default=0, ge=0)
    """Random seed for sampling."""

    def model_post_init(self, _context: Any) -> None:
        if self.load_in_4bit:
            self.refuse_engine_in_4bit()


class ExportConfig(Settings):
    """Settings of ``selfdistill export``."""

    run: str
    """Run folder or model folder."""
    output_dir: str
    """Folder for the model; must not exist or be empty."""
    step: int | None = Field(default=None, ge=1)
    """Write the model of this step's checkpoint instead of the final one."""
    merge: bool = False
    """Merge a LoRA adapter into its base model, so that the result needs neither the base nor PEFT."""
    adapter_base: str | None = None
    """Base of an adapter, if it is not where ``adapter_config.json`` says, e.g. because it was moved."""


class MergeConfig(Settings):
    """Settings of ``selfdistill merge``."""

    model: str
    """The model to change. Like the others: run or model folder, hub id in the local cache, or ``smollm2-135m``."""
    add: str
    """The trained model whose weights are added. It may be a LoRA adapter."""
    subtract: str | None = None
    """The same model before training, whose weights are subtracted. Default, for an adapter: its base."""
    scale: float = 1.0
    """Factor in model + scale * (add - subtract); below 0 removes what was learnt."""
    output_dir: str
    """Folder for the model; must not exist or be empty."""


class DemoConfig(Settings):
    """Settings of ``selfdistill demo``."""

    output_dir: str | None = None
    """Folder of the demo; default ``runs/demo``, or the first of ``runs/demo-2``, ... that is free."""
    seed: int = Field(default=0, ge=0)
    """Random seed for data order and sampling."""


class ReportConfig(Settings):
    """Settings of ``selfdistill report``."""

    runs: list[str] = Field(min_length=1)
    """Folders written by ``train`` or ``compare``."""
    output: str = "report.html"
    """The HTML file to write."""
