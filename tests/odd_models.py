"""Tiny models that count places, positions or nothing, or keep a recurrent state in place of keys and values."""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoConfig,
    GPTNeoForCausalLM,
    Lfm2Config,
    Lfm2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MptConfig,
    MptForCausalLM,
)

SIZE: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "bos_token_id": 256,
    "eos_token_id": 257,
    "pad_token_id": 258,
}
FEW: dict[str, Any] = {"vocab_size": 300, "n_layer": 2, "n_head": 4}
MAKERS: dict[str, Any] = {
    "llama, one key/value head": lambda: LlamaForCausalLM(LlamaConfig(**SIZE | {"num_key_value_heads": 1})),
    "gpt2, learnt positions": lambda: GPT2LMHeadModel(GPT2Config(**FEW, n_embd=32, n_positions=512)),
    "bloom, bias by position": lambda: BloomForCausalLM(BloomConfig(**FEW, hidden_size=32)),
    "mpt, bias by place": lambda: MptForCausalLM(
        MptConfig(vocab_size=300, d_model=32, n_heads=4, n_layers=2, max_seq_len=512)
    ),
    "gpt-neo, local windows": lambda: GPTNeoForCausalLM(
        GPTNeoConfig(
            vocab_size=300,
            hidden_size=32,
            num_layers=2,
            num_heads=4,
            attention_types=[[["global", "local"], 1]],
            window_size=16,
            max_position_embeddings=512,
        )
    ),
    "mamba, recurrent": lambda: MambaForCausalLM(
        MambaConfig(vocab_size=300, hidden_size=32, num_hidden_layers=2, state_size=4)
    ),
    "lfm2, hybrid": lambda: Lfm2ForCausalLM(Lfm2Config(**SIZE, layer_types=["conv", "full_attention"])),
}
NAMES = tuple(MAKERS)


def odd_model(name: str) -> tuple[Any, bool]:
    """The model, and whether a pass of it can go on from cached states over a gap of padding."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return MAKERS[name]().eval(), name.startswith(("llama", "gpt2", "bloom"))
