"""Settings of the commands beside ``train``."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import (
    Field,
    NonNegativeInt,
    PositiveFloat,
    field_validator,
)

from selfdistill.config.base import ModelSettings, QuestionSettings, Settings, closest
from selfdistill.config.train import MethodName, OneRun, Precision, TrainingSettings
from selfdistill.errors import UserError


class CompareConfig(TrainingSettings):
    """Settings of ``selfdistill compare``: those of its runs, and what differs between them."""

    test: str
    """Rows on which every run is measured. Nothing may be chosen by them."""
    methods: tuple[MethodName, ...] = ("sft", "sdft")
    """Methods, separated by commas."""
    seeds: tuple[NonNegativeInt, ...] = (0, 1, 2)
    """Seeds, separated by commas: every method runs once with each."""
    learning_rates: tuple[PositiveFloat, ...] = ()
    """Peak learning rates, separated by commas: every method runs with each. Default: that of ``train``."""
    vary: dict[str, list[Any]] = Field(default_factory=dict)
    """One more setting and the values that it takes in turn, e.g. ``{"teacher": ["ema", "frozen", "live"]}``: every
    method runs with each."""

    eval_steps: int = Field(default=0, ge=0)
    """Steps between measurements; 0: five in a run."""

    @field_validator("methods", "seeds", "learning_rates", mode="before")
    @classmethod
    def _split(cls, value: Any) -> Any:
        return value.split(",") if isinstance(value, str) else value

    def model_post_init(self, _context: Any) -> None:
        """Rules between settings."""
        super().model_post_init(_context)
        for name in ("methods", "seeds", "learning_rates"):
            values = getattr(self, name)
            if len(set(values)) < len(values):
                raise UserError(f"setting '{name}': found {values}, expected each once")
            if not values and name != "learning_rates":
                raise UserError(f"setting '{name}': found nothing, expected at least one")
        # All runs have as many steps, unless max_steps is varied.
        fixed = (*ModelSettings.model_fields, "output_dir", "test", "prior", "eval_steps", "num_train_epochs")
        may_vary = [name for name in TrainingSettings.model_fields if name not in fixed]
        for name, values in self.vary.items():
            if name not in may_vary:
                raise UserError(f"setting 'vary': {name!r} cannot be varied{closest(name, may_vary)}")
            if len(self.vary) > 1 or not values:
                raise UserError("setting 'vary': expected one setting with at least one value")


class CheckConfig(ModelSettings):
    """Settings of ``selfdistill check``."""

    seed: int = Field(default=0, ge=0)
    """Order of the data, draws of contexts, and every sample."""

    contexts: list[str] = Field(default_factory=list)
    """Layouts to compare, e.g. ``turns:repeats=2``; default: a set that fits the data."""
    sample: int = Field(default=16, ge=2)
    """Rows drawn by seed for the measurement."""
    temperature: float = Field(default=1.0, gt=0)
    """Sampling temperature of the rollouts along which teacher and student are compared."""
    batch_size: int = Field(default=8, ge=1)
    """Prompts per step of the training that is being estimated."""
    mixed_precision: Precision = "auto"
    """The arithmetic of that training, with which everything is measured."""
    fine_tuned: str | None = None
    """A model fine-tuned on the same demonstrations, for instance by ``--method sft``: how far it has moved from the
    base is compared with how far the teacher is from it."""


class EvalConfig(ModelSettings):
    """Settings of ``selfdistill eval``."""

    prior: str | None = None
    """File or folder of questions about abilities the model already had."""
    base: str | None = None
    """Model it began as: measured on the same items, with paired tests, and how far the two are apart."""
    context: str | None = None
    """What the model, not the base, is shown with each new question, as a teacher is in training:
    ``document:show=document`` is oracle RAG, the right document in the prompt."""
    num_samples: int = Field(default=0, ge=0)
    """Sampled replies per row, for pass@k with k up to their number; 0: greedy replies only."""
    temperature: float = Field(default=1.0, gt=0)
    """Sampling temperature of these replies."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Nucleus sampling of these replies: smallest set of tokens with at least this mass."""
    seed: int = Field(default=0, ge=0)
    """Order of the data, draws of contexts, and every sample."""
    lm_eval_tasks: list[str] = Field(default_factory=list)
    """Tasks and groups of lm-eval, by name, measured as prior abilities; needs the extra ``lm-eval``."""
    lm_eval_path: str | None = None
    """Folder with lm-eval task files (YAML) of your own. They can run Python code: use only what you trust."""
    lm_eval_limit: int | None = Field(default=None, ge=1)
    """Most items of each of these tasks; default: all."""
    replies: str | None = None
    """File for every greedy reply with its score, as JSON lines."""


class LearnConfig(TrainingSettings, OneRun):
    """Settings of ``selfdistill learn``."""

    state: str
    """Folder that is the memory of one model: its skills in order, their tests, models and results."""
    action: Literal["add", "stream", "status", "history", "rollback", "discard", "export"]
    """``add``: learn a skill from a file, or go on where that was interrupted. ``stream``: the same from rows in the
    order of their arrival, each chunk tested before it is learnt. ``status``: what is left of every skill. ``history``:
    what was done. ``rollback``: take the last skill back. ``discard``: drop an interrupted ``add``. ``export``: write
    the current model to ``output_dir``."""
    data: str = ""
    """Demonstrations of the skill (``add``, ``stream``)."""
    model: str = ""
    """The base model; needed once, when the state is made."""
    output_dir: str = ""
    """Where ``export`` writes the model."""
    name: str | None = Field(default=None, pattern=r"^\w[\w.-]*$")
    """Of the skill; default: that of its file."""
    prior: str | None = None
    """File or folder of questions about what the base could do, copied into the state when it is made."""
    test: str | None = None
    """Rows on which the skill is measured, now and whenever another is added; default: a share of the data. They decide
    nothing but the gates."""
    test_share: float = Field(default=0.2, gt=0, lt=1)
    """Share of the data that is never learnt: for the test where there is no ``test``. Of a ``stream`` it is for the
    validation that says how long a chunk is learnt, and without ``test`` half of it for each."""
    min_teacher: float = Field(default=0.5, ge=0, le=1)
    """Refuse a skill, before it is learnt, whose teacher (the current model shown the demonstration) is right on a
    smaller share of its rows than this, or no better than the model itself; 0: never."""
    max_prior_drop: float = Field(default=0.02, ge=0, le=1)
    """Gate: refuse a skill after which the mean of the prior abilities is lower than the base's by more than this."""
    max_skill_drop: float | None = Field(default=None, ge=0, le=1)
    """Gate: refuse a skill after which an earlier one scores lower than when it was learnt, or the new one lower than
    before it was learnt, by more than this. Default: lower than the 95% interval of that score, which is wide where the
    test has few items."""
    eval_steps: int = Field(default=0, ge=0)
    """Steps between measurements of every skill during training, kept in ``along.jsonl``; 0: none."""
    chunk_size: int = Field(default=32, ge=1)
    """``stream``: rows that are tested, then learnt, at a time."""
    chunk_steps: int = Field(default=50, ge=1)
    """``stream``: most steps on a chunk; learning it ends when the loss on the latest validation rows stops falling.
    While no validation row has come, all of them are taken."""

    def model_post_init(self, _context: Any) -> None:
        """Rules between settings; those of ``train`` about ``test`` are not for this command."""
        needs = {"add": "data", "stream": "data", "export": "output_dir"}.get(self.action)
        if needs and not getattr(self, needs):
            what = "the file of the skill" if needs == "data" else "--output_dir"
            raise UserError(f"learn {self.action}: give {what}")
        if self.stop_on_collapse:
            raise UserError("setting 'stop_on_collapse' belongs to train: here the gates refuse a skill that does harm")


class QuestionsConfig(QuestionSettings):
    """Settings of ``selfdistill questions``."""

    documents: str
    """Folder of documents (``.txt``, ``.md``, ``.html``, ``.pdf``), with its subfolders; or one file."""
    output_dir: str
    """Where ``train.jsonl``, ``test.jsonl`` and ``indirect.jsonl`` go; what was asked there is not asked again."""
    model: str
    """The model that is to be taught: it writes the questions, unless there is a writer, and must answer them from the
    text."""
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)
    """Passed to the tokenizer's chat template, e.g. ``{"enable_thinking": false}``."""
    batch_size: int = Field(default=16, ge=1)
    """Questions at a time."""
    seed: int = Field(default=0, ge=0)
    """Of every sample."""


class ExportConfig(Settings):
    """Settings of ``selfdistill export``."""

    run: str
    """Run folder or model folder."""
    output_dir: str
    """Where the model goes: a folder that does not exist or is empty."""
    merge: bool = False
    """Fold a LoRA adapter into its base, so that the result needs neither the base nor PEFT."""


class DemoConfig(Settings):
    """Settings of ``selfdistill demo``."""

    output_dir: str | None = None
    """Where the run is kept; default ``runs/demo``, or the first of ``runs/demo-2``, ... that is free."""
    seed: int = Field(default=0, ge=0)
    """Order of the data and every sample."""


class ReportConfig(Settings):
    """Settings of ``selfdistill report``."""

    runs: list[str] = Field(min_length=1)
    """Folders written by ``train`` or ``compare``."""
    output: str = "report.html"
    """The HTML file to write."""
