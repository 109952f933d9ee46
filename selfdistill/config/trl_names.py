"""What TRL's names of settings are here, for messages about unknown settings. The page on TRL lists the same."""

from __future__ import annotations

import re
from collections.abc import Collection

ARGUMENTS = ("tokenizer", "on_step", "resume")
"""Arguments of Python functions that are no settings."""

TRL_NAMES = {
    "model_name_or_path": "`model`",
    "dataset_name": "`data`",
    "dataset_config": "load it with datasets, write it with save_to_disk, and give that folder as `data`",
    "dataset_train_split": "`split`",
    "dataset_test_split": "`test_split`",
    "train_dataset": "`data`",
    "eval_dataset": "`test`",
    "torch_dtype": "`dtype`",
    "model_init_kwargs": "`dtype`",
    "attn_implementation": "transformers chooses it; for another, load the model in Python",
    "quantization_config": "`load_in_4bit`, with `lora_rank`",
    "load_in_8bit": "`load_in_4bit`, with `lora_rank`",
    "processing_class": "`tokenizer`, in Python with a loaded model",
    "per_device_train_batch_size": "`batch_size`, of the whole optimizer step",
    "teacher_model_name_or_path": "`teacher_model`",
    "teacher_model_kind": "`teacher`",
    "teacher_update_rate": "`ema_rate`",
    "teacher_sync_steps": "`teacher` snapshot with `snapshot_steps`",
    "teacher_prompt_template": "`context` template:file=FILE",
    "distillation_mode": "`support`",
    "distillation_topk": "`support_top_k`",
    "distillation_add_tail": "`support_tail`",
    "distillation_alpha": "`divergence`, with `jsd_weight`",
    "distillation_is_clip": "`importance_cap`",
    "success_reward_threshold": "`success_reward`",
    "num_loss_tokens_to_skip": "`skip_first_tokens`",
    "peft_config": "`lora_rank` and `lora_alpha`",
    "use_peft": "`lora_rank`",
    "lora_r": "`lora_rank`",
    "r": "`lora_rank`",
    "use_vllm": "`engine` vllm",
    "bf16": "`mixed_precision` bf16",
    "fp16": "`mixed_precision` bf16",
    "warmup_ratio": "`warmup_steps`",
    "save_strategy": "`save_steps`",
    "reward_funcs": "`scorer`",
    "compute_metrics": "`scorer`, of replies to `test`",
    "callbacks": "`on_step`, in Python",
    "resume_from_checkpoint": "`resume`",
    "loss_type": "always TRL's grpo",
    "num_iterations": "one update from each batch of samples",
    "beta": "`anchors`, or `target_base`",
    "sync_ref_model": "`anchors`, or `target_base`",
    "reward_weights": "one `scorer`, which may combine several",
    "packing": "no packing",
    "padding_free": "no packing",
    "max_new_tokens": "`max_completion_length`",
    "max_length": "`max_prompt_length` and `max_completion_length`",
    "formatting_func": "the columns of the data",
    "dataset_text_field": "the columns of the data",
    "lora_dropout": "no dropout",
    "lora_target_modules": "LoRA is on all linear layers",
    "target_modules": "LoRA is on all linear layers",
    "use_liger_kernel": "the loss is computed in chunks",
    "device_map": "one device per process, or `fsdp`",
    "eval_strategy": "`eval_steps`, with `test`",
    "per_device_eval_batch_size": "`batch_size`, of evaluations too",
    "push_to_hub": "nothing is uploaded; export the run and upload that folder",
    "load_best_model_at_end": "the final model is that of the last step",
    "metric_for_best_model": "the final model is that of the last step",
    "run_name": "a tracker shows the name of `output_dir`, with an id",
    "trust_remote_code": "always off",
}
"""By TRL's name, what there is here; settings and arguments in backticks."""


def trl_hint(name: str, known: Collection[str], prefix: str = "") -> str:
    """The end of a message about an unknown setting: what it is here if TRL has it.

    Args:
        name: the unknown setting.
        known: settings that may be named.
        prefix: written before each of them, such as ``--``.

    Returns:
        The hint; empty if TRL has no setting of this name, or ``known`` lacks what it is here.
    """
    here = TRL_NAMES.get(name, "")
    needed = re.findall(r"`(\w+)`", here)
    if not here or not {*needed} <= {*known, *ARGUMENTS}:
        return ""
    written = re.sub(r"`(\w+)`", lambda found: prefix + found[1] if found[1] in known else found[1], here)
    return f"; TRL's name, here: {written}"
