"""Models and rows of the checks: a small random model, layers of a large one, and the starter model where it is."""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState
from bench import Bench, NotRun
from memory import SIZES
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast, Qwen2Config

from selfdistill.config import TrainConfig
from selfdistill.errors import UserError
from selfdistill.model import LoadedModel, adopt
from selfdistill.model.starter import starter_model_path
from selfdistill.training.trainer import Trainer

SPECIAL = ("<|im_start|>", "<|im_end|>")
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
NO_TOKEN = -1
"""An end token that is never sampled, so that every completion has the full length."""
WHOLE = SIZES["7B"]["num_hidden_layers"]
"""Layers of the model whose shape is measured."""


def write_tokenizer(folder: Path) -> None:
    """One token per byte, and a chat template."""
    names = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *SPECIAL]
    backend = Tokenizer(models.BPE(vocab={name: i for i, name in enumerate(names)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(list(SPECIAL))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=SPECIAL[1], pad_token=SPECIAL[1])
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)


def small_model(bench: Bench) -> str:
    """Folder of a random model with grouped queries, small enough to compare with a CPU."""
    folder = bench.scratch / "small"
    if not (folder / "config.json").exists():
        config = Qwen2Config(
            hidden_size=256 if bench.cuda else 64,
            intermediate_size=512 if bench.cuda else 128,
            num_hidden_layers=4 if bench.cuda else 2,
            num_attention_heads=8,
            num_key_value_heads=2,
            vocab_size=2048 if bench.cuda else 512,
            max_position_embeddings=4096,
            tie_word_embeddings=False,
            initializer_range=0.1,  # distributions far from uniform
            bos_token_id=None,
            eos_token_id=257,
        )
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
        write_tokenizer(folder)
    return str(folder)


def shape_folder(bench: Bench, layers: int) -> str:
    """Folder with config.json and tokenizer of Qwen2.5-7B with fewer layers, without weights; small on a CPU."""
    folder = bench.scratch / f"shape-{layers}"
    if not folder.exists():
        small = {"hidden_size": 64, "intermediate_size": 160, "num_attention_heads": 4, "num_key_value_heads": 2}
        values: dict[str, Any] = SIZES["7B"] | ({} if bench.cuda else small | {"vocab_size": 1024})
        config = Qwen2Config(
            **values | {"num_hidden_layers": layers},
            max_position_embeddings=32768,
            architectures=["Qwen2ForCausalLM"],
            bos_token_id=None,
            eos_token_id=257,
        )
        config.save_pretrained(folder)
        write_tokenizer(folder)
    return str(folder)


def shape_model(bench: Bench, layers: int, dtype: torch.dtype) -> LoadedModel:
    """The same with random weights, made on the device."""
    folder = shape_folder(bench, layers)
    torch.manual_seed(0)
    with torch.device(bench.device):
        model = AutoModelForCausalLM.from_config(Qwen2Config.from_pretrained(folder), dtype=dtype)
    return adopt(model, AutoTokenizer.from_pretrained(folder), folder)


def shape_files(bench: Bench, layers: int, dtype: torch.dtype) -> str:
    """Folder with the files of such a model."""
    folder = Path(f"{shape_folder(bench, layers)}-{str(dtype).removeprefix('torch.')}")
    if not folder.exists():
        loaded = shape_model(bench, layers, dtype)
        loaded.model.save_pretrained(folder)
        loaded.tokenizer.save_pretrained(folder)
    return str(folder)


def endless(loaded: LoadedModel) -> LoadedModel:
    """The model without end tokens, so that no sample ends before its last token."""
    return replace(loaded, end_token_ids=(NO_TOKEN,))


def starter(bench: Bench) -> str:
    """Folder of the starter model.

    Raises:
        NotRun: it is neither in the pack nor to be had, or the device is a CPU, where it would take too long.
    """
    if not bench.cuda:
        raise NotRun("takes the starter model, which is too slow here")
    try:
        return str(starter_model_path("smollm2-135m"))
    except UserError as error:
        raise NotRun(str(error)) from None


def needs_bitsandbytes() -> None:
    """Nothing, if bitsandbytes is there.

    Raises:
        NotRun: it is not.
    """
    if importlib.util.find_spec("bitsandbytes") is None:
        raise NotRun("bitsandbytes is not installed, so nothing with 8-bit moments or 4-bit weights was tried")


def rows(bench: Bench, count: int, prompt: int, completion: int, *, alike: bool = False) -> str:
    """File with so many rows, whose prompts and completions have about so many tokens of the byte tokenizer.

    Prompts begin with their number, so that no pass shares their beginning; or, if ``alike``, they end with it.
    """
    file = bench.scratch / f"rows-{count}-{prompt}-{completion}{'-alike' * alike}.jsonl"
    asked, said = "where is it? " * 999, "it is there. " * 999
    lines = [
        {
            "prompt": asked[: prompt - 2] + f"{i:02}" if alike else f"{i:02} {asked}"[:prompt],
            "completion": f"{i:02} {said}"[:completion],
            "document": "It is there.",
        }
        for i in range(count)
    ]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return str(file)


def settings(bench: Bench, out: str, **values: Any) -> TrainConfig:
    """Settings of a run into the scratch folder; nothing is measured or saved beside its steps."""
    defaults: dict[str, Any] = {
        "output_dir": str(bench.scratch / out),
        "context": "turns",
        "learning_rate": 1e-5,
        "warmup_steps": 0,
        "drift_steps": 0,
        "save_steps": 0,
        "view_rows": 0,
        "mixed_precision": "no",
    }
    return TrainConfig(**defaults | values)


def make_trainer(config: TrainConfig, loaded: LoadedModel | None = None) -> Trainer:
    """A trainer whose samples all have the full length."""
    run = Trainer(config, loaded=loaded)
    run.loaded = endless(run.loaded)
    return run


@contextmanager
def accelerate_on(device: str) -> Iterator[None]:
    """Let accelerate choose this kind of device for what is made inside. An accelerator lives no longer than this."""
    before = os.environ.get("ACCELERATE_USE_CPU")
    os.environ["ACCELERATE_USE_CPU"] = "true" if device == "cpu" else "false"
    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        yield
    finally:
        os.environ.pop("ACCELERATE_USE_CPU")
        if before is not None:
            os.environ["ACCELERATE_USE_CPU"] = before
        AcceleratorState._reset_state(reset_partial_state=True)
