"""One step of this package against one of TRL's ``SDFTTrainer``: ratio of times, and the loss on the same rollouts.

    python benchmarks/against_trl.py [--tokens 32] [--lora] [--bf16] [--steps 6]

Needs TRL beside this package (``make bench`` gives it an environment of its own). Both train the starter model in
float32, or both with bfloat16 autocast, on 8 prompts a step of the demo's data, with the same teacher prompt (one user
turn: question, document, demonstration), exactly ``tokens`` new tokens a prompt (no end token stops them), temperature
1, full-vocabulary forward KL, AdamW; the teacher is an EMA of the student, or with ``--lora`` the frozen base. What a
frozen teacher keeps of its contexts was read before. Steps alternate in one process, so what this package tells the C
library about freed memory speeds up both. The loss is compared before the first update: TRL's rollouts are scored by
both.
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

from datasets import Dataset
from measure import now
from peft import LoraConfig
from step import first_epoch
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl.experimental.sdft import SDFTConfig, SDFTTrainer

from selfdistill.config.train import TrainConfig
from selfdistill.data.demonstrations import load_demonstrations
from selfdistill.data.sources import packaged
from selfdistill.methods.slots import Completion
from selfdistill.model.starter import starter_model_path
from selfdistill.training.selection import BatchPart
from selfdistill.training.stopwatch import Stopwatch
from selfdistill.training.trainer import Trainer

BATCH = 8
NO_TOKEN = -1
"""An end token that is never sampled, so that every completion has the full length."""


class Alternate(TrainerCallback):
    """Times TRL's step, and after it one of ours on the same rows."""

    def __init__(self, run: Trainer) -> None:
        self.run, self.batch = run, None
        self.trl_s: list[float] = []
        self.own_s: list[float] = []
        self.parts: list[dict[str, float]] = []
        self.losses: tuple[float, float] | None = None

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.began = now()

    def on_self_distillation_batch_prepared(self, **batch: Any) -> None:
        if self.batch is None:  # the first: both students and teachers are still the base
            self.batch = batch
            began = now()
            self.own_loss = self._score(batch)
            self.began += now() - began

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.trl_s.append(now() - self.began)
        began = now()
        self.parts.append(self.run.step(state.global_step - 1))
        self.own_s.append(now() - began)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if self.losses is None and "loss" in (logs or {}):
            self.losses = (float(logs["loss"]), self.own_loss)

    def _score(self, batch: Any) -> float:
        by_prompt = {tuple(row.student_ids): row for row in self.run.stage.task.examples}
        completions = []
        for prompt, padded, teacher, mask in zip(
            batch["prompt_ids"].tolist(),
            batch["completion_ids"].tolist(),
            batch["teacher_input_ids"].tolist(),
            batch["teacher_attention_mask"].tolist(),
            strict=True,
        ):
            ids = padded[: sum(mask[-len(padded) :])]  # TRL takes what follows the tokenizer's end token for padding
            row = next(row for key, row in by_prompt.items() if tuple(prompt[-len(key) :]) == key)
            seen = [token for token, counts in zip(teacher, mask, strict=True) if counts][: -len(ids)]
            assert seen == row.teacher_ids, "the teachers' prompts differ"
            completions.append(Completion(row, ids, None, True))
        task = self.run.stage.task
        part = BatchPart(task.name, task.method, completions, 1.0)
        (result,) = self.run.gradient.add([part], Stopwatch(self.run.loaded.device))
        self.run.optimizer.zero_grad(set_to_none=True)
        return result.loss


@dataclass(frozen=True)
class Result:
    """Median seconds of a step, and the loss of the first rollouts before any update, by this package and by TRL."""

    own_s: float
    trl_s: float
    own_loss: float
    trl_loss: float
    parts: dict[str, float]
    """Median seconds of the parts of this package's step."""


def compare(options: argparse.Namespace, model: str, data: str, *, use_cpu: bool) -> Result:
    """Train with both in turn.

    Args:
        options: ``tokens``, ``steps``, ``lora`` and ``bf16``, as on the command line.
        model: folder of the model.
        data: file of the rows.
        use_cpu: whether TRL is to compute on the CPU; this package does where accelerate finds no GPU.
    """
    rows = load_demonstrations(data)
    with tempfile.TemporaryDirectory() as folder:
        template = Path(folder) / "template.txt"
        template.write_text("{prompt}\n\n{document}\n\n{demonstration}", encoding="utf-8")
        run = Trainer(
            TrainConfig(
                model=model,
                data=data,
                output_dir=f"{folder}/own",
                context=f"template:file={template}",
                teacher="frozen" if options.lora else "ema",
                ema_rate=0.02,
                lora_rank=16 if options.lora else 0,
                batch_size=BATCH,
                max_completion_length=options.tokens,
                max_steps=options.steps,
                learning_rate=1e-5,
                drift_steps=0,
                mixed_precision="bf16" if options.bf16 else "no",
            )
        )
        run.loaded = replace(run.loaded, end_token_ids=(NO_TOKEN,))
        first_epoch(run)
        tokenizer = AutoTokenizer.from_pretrained(model)
        trainer = SDFTTrainer(
            model=AutoModelForCausalLM.from_pretrained(model),
            processing_class=tokenizer,
            args=SDFTConfig(
                output_dir=f"{folder}/trl",
                per_device_train_batch_size=BATCH,
                num_generations=1,
                max_steps=options.steps,
                learning_rate=1e-5,
                distillation_mode="full_logits",
                distillation_alpha=0.0,
                distillation_is_clip=None,
                teacher_model_kind="base" if options.lora else "ema",
                teacher_update_rate=0.02,
                max_prompt_length=None,
                max_completion_length=options.tokens,
                generation_kwargs={"eos_token_id": NO_TOKEN, "min_new_tokens": options.tokens},
                bf16=options.bf16,
                use_cpu=use_cpu,
                gradient_checkpointing=False,
                logging_steps=1,
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
            ),
            train_dataset=Dataset.from_list(
                [{"prompt": row.prompt, "privileged_context": f"{row.document}\n\n{row.shown}"} for row in rows]
            ),
            peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
            if options.lora
            else None,
        )
        alternate = Alternate(run)
        trainer.add_callback(alternate)
        trainer.train()
    assert alternate.losses is not None
    times = [key for key in alternate.parts[0] if key.startswith("time/")]
    return Result(
        median(alternate.own_s[1:]),
        median(alternate.trl_s[1:]),
        alternate.losses[1],
        alternate.losses[0],
        {key.removeprefix("time/").removesuffix("_s"): median(m[key] for m in alternate.parts[1:]) for key in times},
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--lora", action="store_true")
    parser.add_argument("--bf16", action="store_true")
    options = parser.parse_args()
    model, data = str(starter_model_path("smollm2-135m")), packaged("knowledge.train.jsonl")
    result = compare(options, model, data, use_cpu=True)
    parts = ", ".join(f"{name} {seconds:.2f} s" for name, seconds in result.parts.items())
    print(
        f"{options.tokens} tokens, {'LoRA, frozen' if options.lora else 'full, EMA'}, "
        f"{'bfloat16' if options.bf16 else 'float32'}: {result.own_s / result.trl_s:.2f} of TRL's step "
        f"({result.own_s:.2f} s, {result.trl_s:.2f} s, median of {options.steps - 1}); loss on the same rollouts: TRL "
        f"{result.trl_loss:.6f}, here {result.own_loss:.6f}; parts here: {parts}"
    )


if __name__ == "__main__":
    main()
