"""Settings of a training run."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    BeforeValidator,
    Field,
    field_validator,
)

from selfdistill.config.base import ModelSettings, QuestionSettings, TaskSettings
from selfdistill.config.method import UNTEMPERED, MethodSettings, OwnOrMethodName
from selfdistill.errors import UserError

Precision = Annotated[
    Literal["auto", "no", "bf16"],
    BeforeValidator(lambda value: "no" if value is False else value),  # YAML reads an unquoted no as false
]

OPEN = ("gradient_accumulation_steps", "gradient_checkpointing")
"""Settings that the memory plan chooses unless they are given; they do not change the result."""


def default_learning_rate(lora_rank: int | None) -> float:
    """The value of ``learning_rate`` if it is not set."""
    return 1e-4 if lora_rank else 1e-5


class OneRun(ModelSettings):
    """Settings that a comparison varies from run to run."""

    method: OwnOrMethodName = "sdft"
    """``sdft``: self-distillation. What the others learn from: demonstrations (``sft``, ``dft``, ``eaft``, ``t3s``,
    ``sft_reinvoke``) or documents (``cpt``); the teacher's scores of the student's samples (``opsd``, ``vopd``,
    ``isdft``, ``veto``, ``atesd``, ``msd``); samples drawn before the run (``sft_from_teacher``,
    ``offline_distillation``, ``ssd``); a scorer's rewards (``grpo``, ``sdpo``, ``pope``, ``trapo``, ``sort``,
    ``actguide``, ``npo``). docs/methods.md describes each. Your own function: ``python:package.module.function``; in
    Python also the function itself."""
    learning_rate: float | None = Field(default=None, gt=0)
    """Peak learning rate. Default 1e-5, or 1e-4 with LoRA (about ten times full fine-tuning's, arXiv 2405.09673)."""
    seed: int = Field(default=0, ge=0)
    """Random seed for data order, contexts and sampling."""


class TrainingSettings(MethodSettings, TaskSettings):
    """Settings shared by ``train`` and ``compare``."""

    output_dir: str
    """The run folder. An existing run is never overwritten."""

    teacher_model: str | None = None
    """A separate, fixed model as the teacher of ``sdft``, ``sdpo``, ``vopd``, ``isdft``, ``veto``, ``atesd`` or
    ``msd``: the base of a sequence of skills, an earlier checkpoint, or a larger model with the same architecture and
    vocabulary. For ``npo``, a better model, such as a later checkpoint, with the same
    vocabulary. For ``t3s``, a worse SFT run."""

    teacher_cache_mib: int = Field(default=2048, ge=0)
    """Memory in MiB for the cached key/value states of a ``frozen`` teacher's contexts, which later epochs reuse. Each
    batch needs a copy in addition. 0: recompute every context."""

    loss_normalisation: Literal["sequence", "token"] = "sequence"
    """Average over the tokens of each completion, then over completions; or over all tokens at once."""

    num_demonstrations: int | None = Field(default=None, ge=1)
    """Number of training rows, drawn at random with the seed; default: all."""

    lr_scheduler_type: Literal["cosine", "constant"] = "cosine"
    """After the warm-up: half a cosine down to zero, or constant."""
    warmup_steps: int = Field(default=10, ge=0)
    """Steps of linear warm-up, capped at a tenth of all steps; the authors advise 10."""
    optim: Literal["adamw_torch", "adamw_8bit"] = "adamw_torch"
    """AdamW with moments in float32, or in 8 bits by bitsandbytes (the extra ``bitsandbytes``). Names as in
    transformers. Weights in bfloat16 are rounded stochastically."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Weight decay of AdamW."""
    max_grad_norm: float = Field(default=1.0, gt=0)
    """Clip gradients to this global norm."""
    max_steps: int | None = Field(default=None, ge=1)
    """Optimizer steps; default: from ``num_train_epochs``."""
    num_train_epochs: float = Field(default=2.0, gt=0)
    """Passes over the data if ``max_steps`` is not given. The paper uses 2 for skills, 4 for knowledge."""
    gradient_accumulation_steps: int | None = Field(default=None, ge=1)
    """Maximum micro-batches per optimizer step. They do not change the loss. Default: as many as the memory plan
    needs."""
    gradient_checkpointing: bool | None = None
    """Recompute activations in the backward pass: less memory, about a third more time. Default: if the memory plan
    needs it."""
    stop_on_collapse: bool = False
    """Stop a run that collapses and keep the model of its last evaluation at least five steps earlier, if there is
    one; needs ``test`` and ``eval_steps``. Without it the run only warns; docs/reliability.md lists the signs. Not in
    ``learn``, which has gates."""
    max_skipped_steps: int = Field(default=5, ge=1)
    """Steps with a non-finite loss or gradient are skipped; after this many in a row the run stops."""
    mixed_precision: Precision = "auto"
    """auto: bfloat16 arithmetic where it is fast (most GPUs, CPUs with AMX or AVX512-BF16), float32 otherwise."""
    deterministic: bool = False
    """On a GPU, use only deterministic operations, which are slower: the same seed then gives the same bits. On CPUs
    all operations are deterministic."""
    torch_compile: bool = False
    """Compile the student's layers; shared prefixes are then recomputed for every example. On the CPU this pays off
    with bfloat16, little sharing and more than about 60 steps, and needs a C++ compiler."""
    lora_rank: int = Field(default=0, ge=0)
    """Rank of a LoRA adapter on all linear layers except the head; 0: full fine-tuning."""
    lora_alpha: float | None = Field(default=None, gt=0)
    """LoRA's scaling factor alpha; default: twice the rank."""
    train_vision_tower: bool = False
    """Also train the vision tower of an image-text model and its connector to the language model."""

    test: str | None = None
    """Held-out rows on which the model is evaluated before, during and after training, as in ``eval`` but in the
    training precision. They do not influence training."""
    test_split: str | None = None
    """Split of ``test`` to read, from a folder or data set with several. Default: ``test``, or the only one."""
    prior: str | None = None
    """File or folder of questions about the model's prior abilities, e.g. ``bundled:prior/test``, evaluated along with
    ``test``."""
    eval_steps: int = Field(default=0, ge=0)
    """Steps between evaluations on ``test``; 0: only at the start and the end."""
    view_rows: int = Field(default=4, ge=0)
    """Rows whose rollouts, and the teacher's view of each token, are saved at the start and the end for ``report``."""
    drift_steps: int = Field(default=10, ge=0)
    """Steps between measurements of the drift of student and teacher, plus one at the end; 0: never."""
    save_steps: int = Field(default=100, ge=0)
    """Steps between checkpoints, plus one at the end; 0: save only the final model."""
    save_total_limit: int = Field(default=2, ge=1)
    """Checkpoints to keep; at least two, because one may be corrupt."""
    logging_steps: int = Field(default=1, ge=1)
    """Steps between printed lines when the output is not a terminal. metrics.jsonl has every step."""
    report_to: Literal["none", "trackio", "tensorboard", "wandb"] = "none"
    """Tracker for the metrics and the scores on ``test``; its package must be installed. wandb uploads them."""

    @field_validator("lora_rank", mode="before")
    @classmethod
    def _no_adapter(cls, value: Any) -> Any:
        """None is no adapter."""
        return 0 if value is None else value

    @property
    def micro_batches(self) -> int:
        """Most micro-batches per optimizer step."""
        return self.gradient_accumulation_steps or 1

    def more_micro_batches(self, shares: int) -> list[int]:
        """Larger numbers of micro-batches that divide a batch of which so many processes have equal parts."""
        more = range(self.micro_batches + 1, self.batch_size + 1)
        return [count for count in more if self.batch_size % (count * shares) == 0]

    @property
    def evaluates_between(self) -> bool:
        """Whether there are evaluations between the start and the end."""
        return self.eval_steps > 0

    def model_post_init(self, _context: Any) -> None:
        """Check settings against each other."""
        if self.batch_size % self.micro_batches:
            raise UserError(
                f"setting 'gradient_accumulation_steps': {self.micro_batches} does not divide "
                f"batch_size {self.batch_size}"
            )
        measured = self.test is not None or getattr(self, "documents", None)
        if not measured and (self.prior is not None or self.eval_steps):
            raise UserError("setting 'test' is missing: prior and eval_steps need it")
        if self.test_split is not None and self.test is None:
            raise UserError("setting 'test_split' needs a test: add test, or leave it out")
        if self.stop_on_collapse and not (measured and self.evaluates_between):
            raise UserError("setting 'stop_on_collapse' returns to the last evaluation: add test and eval_steps")
        if self.lora_alpha is not None and not self.lora_rank:
            raise UserError("setting 'lora_alpha' needs an adapter: add lora_rank, or leave it out")
        if self.train_vision_tower and self.lora_rank:
            raise UserError("setting 'train_vision_tower' does not work with lora_rank: leave one of them out")
        if self.torch_compile and self.gradient_checkpointing:
            raise UserError("setting 'torch_compile' does not work with gradient_checkpointing: leave one of them out")
        if self.importance_cap is not None and (self.top_p < 1 or self.top_k > 0):
            raise UserError(
                "setting 'importance_cap' needs samples from the full distribution: use top_p 1 and top_k 0"
            )
        if self.target_teacher + self.target_student + self.target_base == 0:
            raise UserError("setting 'target_teacher': found 0, and the target's other weights are also 0; raise one")
        if self.support == "sampled" and self.divergence != "reverse_kl":
            raise UserError(
                f"setting 'support': 'sampled' is the policy gradient of reverse_kl, found divergence "
                f"{self.divergence!r}: add divergence reverse_kl"
            )
        if self.support == "sampled" and self.entry_clip is not None:
            raise UserError(
                "setting 'entry_clip': the 'sampled' support has no sum over the vocabulary to clip: leave one out"
            )
        # Its expectation equals the gradient of reverse_kl only over samples of the distribution being trained.
        if self.support == "sampled" and not self.is_untempered:
            raise UserError(f"setting 'support': 'sampled' needs {UNTEMPERED}")


class TrainConfig(TrainingSettings, OneRun, QuestionSettings):
    """Settings of ``selfdistill train``. The resolved settings are saved as ``config.yaml`` in ``output_dir``."""

    data: str = ""
    """Demonstrations: ``.jsonl``, ``.json``, ``.csv``, ``.tsv``, ``.parquet``, a folder of them, a saved data set,
    a hub name, or a file of the package, e.g. ``bundled:shop.test.jsonl``."""
    documents: str | None = None
    """Folder of documents or one file, instead of ``data``. Questions about them are generated first, as in
    ``selfdistill questions``, and saved in ``<output_dir>-questions``."""
    load_in_4bit: bool = False
    """Keep the weights of linear layers in 4 bits (NF4 with quantised scales) under an adapter: QLoRA, arXiv
    2305.14314. Needs ``lora_rank`` and the extra ``bitsandbytes``. ``teacher_model`` is not quantised."""
    fsdp: bool = False
    """Shard weights, gradients, optimizer and teacher across processes (FSDP2). Sampling unshards the weights."""

    def model_post_init(self, _context: Any) -> None:
        """Check settings against each other."""
        super().model_post_init(_context)
        if self.support == "sampled" and (self.method == "offline_distillation" or self.cold_start_steps):
            raise UserError(
                "setting 'support': 'sampled' needs the student's own samples: leave cold_start_steps out, and use "
                "method sdft"
            )
        if self.teacher_model is not None and self.teacher not in ("ema", "frozen"):
            raise UserError(
                f"setting 'teacher_model' is a fixed teacher, found teacher {self.teacher!r}: leave teacher out"
            )
        if self.fsdp and self.optim == "adamw_8bit":
            raise UserError("setting 'optim': adamw_8bit does not work with fsdp: leave one of them out")
        if self.load_in_4bit:
            self._check_4bit()
        if self.fsdp and self.torch_compile:
            raise UserError("setting 'fsdp' does not work with torch_compile: leave one of them out")
        if bool(self.data) == bool(self.documents):
            found = "both" if self.data else "neither"
            raise UserError(f"settings 'data' and 'documents': found {found}, expected one of them")

    def _check_4bit(self) -> None:
        if not self.lora_rank:
            raise UserError("setting 'load_in_4bit' needs an adapter, because its weights stay fixed: add lora_rank")
        for name, other in (("fsdp", self.fsdp), ("torch_compile", self.torch_compile)):
            if other:
                raise UserError(f"setting 'load_in_4bit' does not work with {name}: leave one of them out")
        self.refuse_engine_in_4bit()
