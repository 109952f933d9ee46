"""Settings of a training run."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import (
    Field,
)

from selfdistill.config.base import ModelSettings, QuestionSettings
from selfdistill.errors import UserError

Precision = Literal["auto", "no", "bf16"]


MethodName = Literal["sdft", "sft", "dft", "cpt", "sft_reinvoke", "sft_from_teacher", "offline_distillation", "grpo"]


class OneRun(ModelSettings):
    """What a comparison varies from run to run."""

    method: MethodName = "sdft"
    """``sdft``: self-distillation. For comparison: ``sft``, cross-entropy on the demonstrations; ``dft``, the same
    weighed by each token's probability; ``cpt``, cross-entropy on the documents; ``sft_reinvoke``, sft and then back
    towards the base on general prompts; ``sft_from_teacher`` and ``offline_distillation``, on samples of the teacher
    drawn beforehand; ``grpo``, reinforcement learning with the scorer as reward."""
    learning_rate: float | None = Field(default=None, gt=0)
    """Peak. Default 1e-5, or 1e-4 with LoRA (about ten times that of full fine-tuning, arXiv 2405.09673)."""
    seed: int = Field(default=0, ge=0)
    """Order of the data, draws of contexts, and every sample."""


class TrainingSettings(ModelSettings):
    """What ``train`` and ``compare`` share."""

    output_dir: str
    """The run folder. An existing one is never overwritten."""

    context: str = "auto"
    """How the teacher sees the demonstration, e.g. ``turns:repeats=2``. ``auto``: measure and take the best."""

    temperature: float = Field(default=1.0, gt=0)
    """Sampling temperature of rollouts. The divergence is always between the untempered distributions."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Nucleus sampling: smallest set of tokens with at least this mass."""
    top_k: int = Field(default=0, ge=0)
    """Sample among the k likeliest tokens; 0: all."""
    num_generations: int | None = Field(default=None, ge=1)
    """Rollouts per prompt. Default 1, beyond which the paper found no gain, or 8 for ``grpo``."""
    cold_start_steps: int = Field(default=0, ge=0)
    """Steps of ``sdft`` in which some rollouts are replaced by demonstrations, all at first and fewer and fewer then:
    for a model that never comes near the demonstration by itself."""

    teacher: Literal["ema", "frozen", "live", "snapshot"] = "ema"
    """Whose weights score: a float32 moving average, the start, the student itself, or a copy every n steps."""
    ema_rate: float = Field(default=0.01, gt=0, le=1)
    """Share of the student in the average per step. Official code: 0.01; the paper tried 0.01, 0.02, 0.05."""
    snapshot_steps: int = Field(default=50, ge=1)
    """Steps between copies of the student into a ``snapshot`` teacher."""

    teacher_model: str | None = None
    """A model that teaches in place of the student's own weights and does not change: the base of a sequence of skills,
    an earlier checkpoint, or a larger model of the same kind and vocabulary. For ``sdft``."""

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

    target_teacher: float = Field(default=1.0, ge=0)
    """a of the target softmax(a log teacher + b log student + d log base) that stands in for the teacher."""
    target_student: float = Field(default=0.0, ge=0)
    """b: above 0 the aim stays nearer to the student, through which no gradient flows (Veto, arXiv 2601.07155)."""
    target_base: float = Field(default=0.0, ge=0)
    """d: above 0 the aim stays nearer to the model before training, which sees the prompt alone."""

    skip_first_tokens: int = Field(default=0, ge=0)
    """First completion tokens left out of the loss; 3 in the official code. Refused where it hides most of them."""
    loss_normalisation: Literal["sequence", "token"] = "sequence"
    """Mean over tokens of each completion, then over completions; or over all tokens at once."""
    importance_cap: float | None = Field(default=None, gt=0)
    """Weigh each rollout by the mean of min(p_now/p_sampled, cap). For rollouts that are not quite on-policy."""

    general_prompts: str | None = None
    """Text file with the prompts of the second stage of ``sft_reinvoke``, one a line; default: 120 that ship with the
    package."""

    num_demonstrations: int | None = Field(default=None, ge=1)
    """Rows of the data that are learnt from, drawn by the seed; default: all."""

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
    stop_on_collapse: bool = False
    """Stop a run that falls apart (it warns in any case; the signs are in docs/reliability.md), with the model of the
    last measurement before it began; needs ``test`` and ``eval_steps``."""
    max_skipped_steps: int = Field(default=5, ge=1)
    """A step whose loss or gradient is not finite is left out; after so many in a row the run stops."""
    mixed_precision: Precision = "auto"
    """auto: bfloat16 arithmetic where it is fast (most GPUs, CPUs with AMX), float32 otherwise."""
    torch_compile: bool = False
    """Compile the layers for the student's passes, which then read every row whole. On the CPU it pays with bfloat16,
    where rows share little, from about 60 steps on, and needs a C++ compiler."""
    lora_rank: int = Field(default=0, ge=0)
    """Rank of a LoRA adapter on all linear layers; 0: full fine-tuning."""
    lora_alpha: float | None = Field(default=None, gt=0)
    """LoRA's scale; default twice the rank."""

    test: str | None = None
    """Rows on which the model is measured before, during and after training, as ``eval`` does but in the training's
    arithmetic. Nothing is chosen by them."""
    prior: str | None = None
    """File or folder of questions about abilities the model already had, measured along with ``test``."""
    eval_steps: int = Field(default=0, ge=0)
    """Steps between measurements on ``test``; 0: only at the start and at the end."""
    view_rows: int = Field(default=4, ge=0)
    """Rows whose rollouts are kept with what the teacher says of each token, before and after training, for
    ``report``."""
    drift_steps: int = Field(default=10, ge=0)
    """Steps between measurements of how far student and teacher have moved from the start, and one at the end; 0:
    never."""
    save_steps: int = Field(default=100, ge=0)
    """Steps between checkpoints, and one at the end; 0: only the final model."""
    save_total_limit: int = Field(default=2, ge=1)
    """Checkpoints kept; two at least, for one may be damaged."""
    logging_steps: int = Field(default=1, ge=1)
    """Steps between printed lines where the output is not a terminal. metrics.jsonl has every step."""
    report_to: Literal["none", "trackio", "tensorboard", "wandb"] = "none"
    """Tracker that gets every line of metrics.jsonl and the scores on ``test``, too; its package must be installed.
    wandb sends them elsewhere."""

    def model_post_init(self, _context: Any) -> None:
        """Rules between settings."""
        if self.batch_size % self.gradient_accumulation_steps:
            raise UserError(
                f"setting 'gradient_accumulation_steps': {self.gradient_accumulation_steps} does not divide "
                f"batch_size {self.batch_size}"
            )
        measured = self.test is not None or getattr(self, "documents", None)
        if not measured and (self.prior is not None or self.eval_steps):
            raise UserError("setting 'test' is missing: prior and eval_steps belong to the measurements on it")
        if self.stop_on_collapse and not (measured and self.eval_steps):
            raise UserError("setting 'stop_on_collapse' goes back to a measurement: give test and eval_steps, too")
        if self.lora_alpha is not None and not self.lora_rank:
            raise UserError("setting 'lora_alpha' belongs to an adapter: give --lora_rank, too, or leave it out")
        if self.torch_compile and self.gradient_checkpointing:
            raise UserError("setting 'torch_compile' does not go with gradient_checkpointing: leave one of them out")
        if self.importance_cap is not None and (self.top_p < 1 or self.top_k > 0):
            raise UserError(
                "setting 'importance_cap' needs sampling from the whole distribution: use top_p 1 and top_k 0"
            )
        if self.importance_cap is not None and self.cold_start_steps:
            raise UserError("setting 'cold_start_steps' does not go with importance_cap: leave one of them out")
        if self.target_teacher + self.target_student + self.target_base == 0:
            raise UserError("setting 'target_teacher': found 0, and the other parts of the target are 0, too")
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


class TrainConfig(TrainingSettings, OneRun, QuestionSettings):
    """Settings of ``selfdistill train``. They are saved, resolved, as ``config.yaml`` in ``output_dir``."""

    data: str = ""
    """Demonstrations: ``.jsonl``, ``.json``, ``.parquet``, a folder of them, a saved data set or a hub name."""
    documents: str | None = None
    """In place of ``data``: documents, about which questions are made first, as ``selfdistill questions`` does; they
    are kept in the folder ``output_dir`` with ``-questions`` at its end."""
    fsdp: bool = False
    """Several processes each hold a part of weights, gradients, optimizer and teacher (FSDP2); all for sampling."""

    def model_post_init(self, _context: Any) -> None:
        """Rules between settings."""
        super().model_post_init(_context)
        untempered = self.temperature == 1 and self.top_p == 1 and self.top_k == 0
        if self.method == "grpo" and not untempered:
            raise UserError(
                "setting 'method': grpo's gradient is that of samples of the student as it is: use temperature 1, "
                "top_p 1 and top_k 0"
            )
        if self.support == "sampled" and (self.method == "offline_distillation" or self.cold_start_steps):
            raise UserError(
                "setting 'support': 'sampled' needs the student's own samples: leave cold_start_steps out, and use "
                "method sdft"
            )
        if self.teacher_model is not None and self.method != "sdft":
            raise UserError(f"setting 'teacher_model' is for method sdft, found {self.method!r}: leave it out")
        if self.teacher_model is not None and self.teacher not in ("ema", "frozen"):
            raise UserError(f"setting 'teacher_model' does not change, found teacher {self.teacher!r}: leave that out")
        if self.fsdp and self.torch_compile:
            raise UserError("setting 'fsdp' does not go with torch_compile: leave one of them out")
        if bool(self.data) == bool(self.documents):
            found = "both" if self.data else "neither"
            raise UserError(f"settings 'data' and 'documents': found {found}, expected one of them")
