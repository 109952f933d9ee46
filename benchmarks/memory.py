"""Memory by plan of Qwen2.5's sizes on GPUs of 24 and 80 GB; nothing is computed. Prints the tables of docs/memory.md.

Usage: python benchmarks/memory.py
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config

from selfdistill.config import TrainConfig
from selfdistill.data import load_demonstrations
from selfdistill.training import MemoryPlan
from selfdistill.training.fitting import fit
from selfdistill.training.traced_step import Device

SIZES: dict[str, dict[str, Any]] = {
    "1.5B": {
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "vocab_size": 151936,
        "tie_word_embeddings": True,
    },
    "7B": {
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "vocab_size": 152064,
        "tie_word_embeddings": False,
    },
    "14B": {
        "hidden_size": 5120,
        "intermediate_size": 13824,
        "num_hidden_layers": 48,
        "num_attention_heads": 40,
        "num_key_value_heads": 8,
        "vocab_size": 152064,
        "tie_word_embeddings": False,
    },
}
"""What config.json of Qwen2.5 says."""
SMALL: dict[str, Any] = {"gradient_accumulation_steps": 32, "gradient_checkpointing": True}
SETTINGS: dict[str, dict[str, Any]] = {
    "defaults: full, EMA": {},
    "full, EMA, 32 micro-batches, checkpointing": SMALL,
    "full, live, 32 micro-batches, checkpointing": SMALL | {"teacher": "live"},
    "full on bfloat16, 8-bit moments, EMA, 32 micro-batches, checkpointing": SMALL
    | {"dtype": "bfloat16", "optim": "adamw_8bit"},
    "LoRA 16, 32 micro-batches, checkpointing": SMALL | {"lora_rank": 16},
    "LoRA 16 on bfloat16": {"lora_rank": 16, "dtype": "bfloat16"},
    "LoRA 16 on bfloat16, 8 micro-batches, checkpointing": {
        "lora_rank": 16,
        "dtype": "bfloat16",
        "gradient_accumulation_steps": 8,
        "gradient_checkpointing": True,
    },
    "QLoRA 16 on bfloat16, 8 micro-batches, checkpointing": {
        "lora_rank": 16,
        "load_in_4bit": True,
        "dtype": "bfloat16",
        "gradient_accumulation_steps": 8,
        "gradient_checkpointing": True,
    },
    "QLoRA 16 on float32, 8 micro-batches, checkpointing": {
        "lora_rank": 16,
        "load_in_4bit": True,
        "gradient_accumulation_steps": 8,
        "gradient_checkpointing": True,
    },
}
SHARDED: dict[str, dict[str, Any]] = {
    "full, EMA": {"fsdp": True},
    "full, EMA, 4 micro-batches, checkpointing": {
        "fsdp": True,
        "gradient_accumulation_steps": 4,
        "gradient_checkpointing": True,
    },
}
"""On eight processes."""
GB = 10**9


def write_model(folder: Path, values: dict[str, Any]) -> None:
    """A config.json, and a tokenizer with one token per byte."""
    folder.mkdir()
    Qwen2Config(**values, max_position_embeddings=32768, architectures=["Qwen2ForCausalLM"]).save_pretrained(folder)
    backend = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(["<|end|>", *alphabet()])}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>").save_pretrained(folder)


def write_inputs(folder: Path) -> None:
    """The models without weights, and 32 rows."""
    for size, values in SIZES.items():
        write_model(folder / size, values)
    lines = [json.dumps({"prompt": f"{i:02} " + "x" * 70, "completion": "y" * 400}) for i in range(32)]
    (folder / "rows.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def alphabet() -> list[str]:
    return sorted(pre_tokenizers.ByteLevel.alphabet())


def cell(plan: MemoryPlan) -> str:
    """The peak in GB, what of the machine's memory there is beside it, and the phase."""
    beside = f" + {plan.host / GB:.0f}" if plan.host else ""
    return f"{plan.peak / GB:.0f}{beside} ({plan.largest.name})"


def rows(folder: Path, settings: dict[str, dict[str, Any]], processes: int) -> Iterator[tuple[str, list[MemoryPlan]]]:
    """The plans of all sizes, by settings: 32 prompts of about 100 tokens, 500 more for the teacher, 512 new tokens."""
    for name, values in settings.items():
        plans = []
        for size in SIZES:
            config = TrainConfig(
                model=str(folder / size),
                data=str(folder / "rows.jsonl"),
                output_dir="unused",
                context="turns",
                max_completion_length=512,
                **values,
            )
            device = Device("cuda", "bf16", processes)
            plans.append(fit(config, load_demonstrations(config.data), device, 2**60).plan)
        yield name, plans


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_inputs(folder)
        for title, settings, processes in (("one GPU", SETTINGS, 1), ("each of eight GPUs, sharded", SHARDED, 8)):
            print(f"| GB by plan, {title} | {' | '.join(SIZES)} |\n|---|{'---|' * len(SIZES)}")
            for label, plans in rows(folder, settings, processes):
                print(f"| {label} | {' | '.join(map(cell, plans))} |", flush=True)
            print()


if __name__ == "__main__":
    main()
