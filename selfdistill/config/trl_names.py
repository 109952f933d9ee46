"""What other projects' names of settings are here, for messages about unknown settings.

They are those of TRL, of the SDFT authors' code and of tinker-cookbook. The page on TRL lists the same.
"""

from __future__ import annotations

import re
from collections.abc import Collection

from selfdistill.errors import closest

ARGUMENTS = ("tokenizer", "on_step", "resume")
"""Arguments of Python functions that are no settings."""

_KL_TO_REFERENCE = "or for a KL to a reference model `anchors` or `target_base`"
_LIMITS = "`max_prompt_length` and `max_completion_length`"
_SHOWN = "show in `method_settings`: sibling, feedback, either or both"
_LAST_MODEL = "the final model is that of the last step"

TRL_NAMES = {
    "model_name_or_path": "`model`",
    "model_name": "`model`",
    "model_revision": "`model`, the folder of that revision",
    "load_checkpoint_path": "`model`",
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
    "chat_template_path": "the chat template of the model",
    "renderer_name": "the chat template of the model",
    "system_prompt": "the system message that begins each prompt",
    "per_device_train_batch_size": "`batch_size`, of the whole optimizer step",
    "num_prompts_per_batch": "`batch_size`",
    "groups_per_batch": "`batch_size`",
    "group_size": "`num_generations`",
    **dict.fromkeys(
        ("num_iterations", "generation_batch_size", "steps_per_generation", "num_substeps"),
        "one update from each batch of samples",
    ),
    **dict.fromkeys(
        ("epsilon", "epsilon_high", "delta", "importance_sampling_level"),
        "one update from each batch of samples, so nothing is clipped",
    ),
    "teacher_model_name_or_path": "`teacher_model`",
    "teacher_model_revision": "`teacher_model`, the folder of that revision",
    **dict.fromkeys(
        ("teacher_tokenizer_name_or_path", "use_uld_loss"), "not available; `teacher_model` needs the same vocabulary"
    ),
    **dict.fromkeys(("teacher_model_server_url", "use_teacher_server"), "not available; no server for the teacher"),
    "teacher_model_kind": "`teacher`",
    "teacher_update_rate": "`ema_rate`, with sdpo in `method_settings`",
    "ref_model_mixup_alpha": "`ema_rate`",
    "teacher_sync_steps": "ema follows at every step; for a rate of 1, `teacher` snapshot with `snapshot_steps`",
    "ref_model_sync_steps": "ema follows at every step; for a rate of 1, `teacher` snapshot with `snapshot_steps`",
    "teacher_sync_every": "`teacher` snapshot with `snapshot_steps`",
    "sync_ref_model": f"`teacher` ema, {_KL_TO_REFERENCE}",
    "teacher_prompt_template": "`context` template:file=FILE",
    "demo_template": "`context` template:file=FILE",
    "generate_from_teacher": "not available; nearest is `method` offline_distillation",
    "distillation_mode": "`support`; with sdpo always top_k",
    "distillation_topk": "`support_top_k`, with sdpo top_k in `method_settings`",
    "loss_top_k": "`support_top_k`, with `support` top_k",
    "topk": "`support_top_k`, with `support` top_k",
    "n_teacher_targets": "`support_top_k`, with `support` top_k",
    "distillation_add_tail": "`support_tail`; with sdpo always bucket",
    "loss_add_tail": "`support_tail`",
    "distillation_alpha": "`divergence` and `jsd_weight`, with sdpo divergence in `method_settings`",
    "beta": f"`divergence` with `jsd_weight`, {_KL_TO_REFERENCE}",
    "alpha": "`divergence` with `jsd_weight`",
    "reverse": "`divergence` reverse_kl",
    "distillation_is_clip": "`importance_cap`, per sample; not with sdpo",
    **dict.fromkeys(
        ("vllm_importance_sampling_correction", "vllm_importance_sampling_cap", "vllm_importance_sampling_clip_max"),
        "`importance_cap`, by default 2 with an engine",
    ),
    "distillation_weight": "1 minus it as grpo in `method_settings`",
    "use_successful_as_teacher": _SHOWN,
    "include_environment_feedback": _SHOWN,
    "environment_feedback_only_without_solution": _SHOWN,
    "reprompt_template": "context in `method_settings`: template:file=FILE",
    "solution_template": "context in `method_settings`: template:file=FILE",
    "feedback_template": "sdpo has its own words for feedback",
    "max_reprompt_len": "`max_prompt_length`, of the teacher too",
    "dont_reprompt_on_self_success": "always so",
    "remove_thinking_from_demonstration": "always so",
    "success_reward_threshold": "`success_reward`",
    "scale_rewards": "always group",
    "num_loss_tokens_to_skip": "`skip_first_tokens`",
    "lmbda": "always 1 with sdft",
    "seq_kd": "`method` sft_from_teacher, whose teacher is the model itself",
    "peft_config": "`lora_rank` and `lora_alpha`",
    "use_peft": "`lora_rank`",
    "lora_r": "`lora_rank`",
    "r": "`lora_rank`",
    "use_vllm": "`engine` vllm",
    "vllm_mode": "`engine` vllm, with `engine_url` for servers",
    "vllm_server_base_url": "`engine` vllm, with `engine_url` for servers",
    "vllm_gpu_memory_utilization": "`engine_memory_gib`",
    "vllm_max_model_length": "as much of the model's window as fits",
    "bf16": "`mixed_precision` bf16",
    "fp16": "`mixed_precision` bf16",
    "warmup_ratio": "`warmup_steps`",
    "save_strategy": "`save_steps`",
    "save_every": "`save_steps`",
    "log_path": "`output_dir`",
    "reward_funcs": "`scorer`",
    "compute_metrics": "`scorer`, of replies to `test`",
    "callbacks": "`on_step`, in Python",
    "resume_from_checkpoint": "`resume`",
    "loss_type": "`loss_normalisation` sequence for grpo, token for dapo; no other",
    "reward_weights": "one `scorer`, which may combine several",
    "packing": "no packing",
    "padding_free": "no packing",
    "max_new_tokens": "`max_completion_length`",
    "max_tokens": "`max_completion_length`",
    "max_length": _LIMITS,
    "max_seq_length": _LIMITS,
    "max_context_length": _LIMITS,
    **dict.fromkeys(
        ("min_p", "repetition_penalty", "generation_kwargs"),
        "not available; sampling has `temperature`, `top_p` and `top_k`",
    ),
    **dict.fromkeys(
        (
            *("mask_truncated_completions", "top_entropy_quantile", "entropy_coef", "off_policy_mask_threshold"),
            *("sapo_temperature_neg", "sapo_temperature_pos", "kd_temperature", "length_normalization"),
            *("kl_penalty_coef", "kl_discount_factor"),
        ),
        "not available",
    ),
    "formatting_func": "the columns of the data",
    "dataset_text_field": "the columns of the data",
    "assistant_only_loss": "only replies are learnt, with `turns` all every one",
    "completion_only_loss": "only replies are learnt, with `turns` all every one",
    "disable_dropout": "no dropout",
    "lora_dropout": "no dropout",
    "lora_target_modules": "LoRA is on all linear layers",
    "target_modules": "LoRA is on all linear layers",
    "use_liger_kernel": "the loss is computed in chunks",
    "device_map": "one device per process, or `fsdp`",
    "eval_strategy": "`eval_steps`, with `test`",
    "eval_every": "`eval_steps`, with `test`",
    "per_device_eval_batch_size": "`batch_size`, of evaluations too",
    "eval_accumulation_steps": "`batch_size`, of evaluations too",
    "num_generations_eval": "evaluations take one greedy reply per row",
    "push_to_hub": "nothing is uploaded; export the run and upload that folder",
    "load_best_model_at_end": _LAST_MODEL,
    "metric_for_best_model": _LAST_MODEL,
    "run_name": "a tracker shows the name of `output_dir`, with an id",
    "trust_remote_code": "always off",
}
"""By the other project's name, what there is here; settings and arguments in backticks."""


def unknown_setting(name: str, known: Collection[str]) -> str:
    """The message about an unknown setting: what it is here, or which of the ``known`` settings may be meant."""
    return f"unknown setting '{name}'{name_here(name, known) or '; there is no such setting here'}"


def name_here(name: str, known: Collection[str], prefix: str = "") -> str:
    """The end of a message about an unknown setting.

    Args:
        name: the unknown setting.
        known: settings that may be named.
        prefix: written before each of them, such as ``--``.

    Returns:
        What it is here if another project has it; else the known setting of a similar name. Empty if there is none, or
        ``known`` lacks what it is here: a similar name would mean something else.
    """
    if name not in TRL_NAMES:
        return closest(name, [prefix + key for key in known])
    here = TRL_NAMES[name]
    if not {*re.findall(r"`(\w+)`", here)} <= {*known, *ARGUMENTS}:
        return ""
    written = re.sub(r"`(\w+)`", lambda found: prefix + found[1] if found[1] in known else found[1], here)
    return f"; here: {written}"
