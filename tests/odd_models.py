"""Tiny models that count places, positions or nothing, or keep a recurrent state in place of keys and values."""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    DogeConfig,
    DogeForCausalLM,
    FalconConfig,
    FalconForCausalLM,
    FalconH1Config,
    FalconH1ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoConfig,
    GPTNeoForCausalLM,
    JambaConfig,
    JambaForCausalLM,
    Lfm2Config,
    Lfm2ForCausalLM,
    Llama4ForCausalLM,
    Llama4TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MptConfig,
    MptForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PhimoeConfig,
    PhimoeForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
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


def doge() -> DogeForCausalLM:
    """A model whose ``dt_proj`` is an ordinary layer, with the effect that training gives it."""
    model = DogeForCausalLM(DogeConfig(**SIZE))
    for layer in model.model.layers:
        torch.nn.init.ones_(layer.self_attn.A)
    return model


EXPERTS: dict[str, Any] = {"num_local_experts": 4, "num_experts_per_tok": 2}
LATENT: dict[str, Any] = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8}
ODD_LAYERS: dict[str, tuple[Any, str]] = {
    "mamba": (MAKERS["mamba, recurrent"], "LoRA on 4 linear layers, not on mixer.dt_proj (2), mixer.out_proj (2)"),
    "doge": (doge, "LoRA on 16 linear layers"),
    "jamba": (
        lambda: JambaForCausalLM(
            JambaConfig(
                **SIZE,
                attn_layer_period=2,
                attn_layer_offset=1,
                num_experts=1,
                mamba_d_state=4,
                mamba_dt_rank=4,
                use_mamba_kernels=False,
            )
        ),
        "LoRA on 13 linear layers, not on mamba.dt_proj (1)",
    ),
    "falcon-h1": (
        lambda: FalconH1ForCausalLM(
            FalconH1Config(**SIZE, mamba_d_ssm=32, mamba_n_heads=4, mamba_d_head=8, mamba_d_state=8, mamba_n_groups=1)
        ),
        "LoRA on 16 linear layers, not on mamba.out_proj (2)",
    ),
    "falcon": (
        lambda: FalconForCausalLM(
            FalconConfig(vocab_size=300, hidden_size=32, num_hidden_layers=2, num_attention_heads=4)
        ),
        "LoRA on 8 linear layers",
    ),
    "llama 4": (
        lambda: Llama4ForCausalLM(
            Llama4TextConfig(**SIZE, intermediate_size_mlp=48, head_dim=8, num_local_experts=2, num_experts_per_tok=1)
        ),
        "LoRA on 14 linear layers, not on experts.gate_up_proj (2), experts.down_proj (2), feed_forward.router (2)",
    ),
    "phimoe": (
        lambda: PhimoeForCausalLM(PhimoeConfig(**SIZE, **EXPERTS)),
        "LoRA on 8 linear layers, not on mlp.router (2), experts.gate_up_proj (2), experts.down_proj (2)",
    ),
    "qwen 3 moe": (
        lambda: Qwen3MoeForCausalLM(
            Qwen3MoeConfig(**SIZE, head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)
        ),
        "LoRA on 8 linear layers and 6 tensors of experts and routers",
    ),
    "deepseek 3": (
        lambda: DeepseekV3ForCausalLM(
            DeepseekV3Config(
                **(SIZE | {"num_key_value_heads": 4}),
                **LATENT,
                v_head_dim=8,
                moe_intermediate_size=16,
                n_routed_experts=4,
                num_experts_per_tok=2,
                n_group=2,
                topk_group=1,
                first_k_dense_replace=1,
            )
        ),
        "LoRA on 10 linear layers and 3 tensors of experts and routers, not on mlp.gate_proj (1), mlp.up_proj (1), "
        "mlp.down_proj (1), shared_experts.gate_proj (1), shared_experts.up_proj (1), shared_experts.down_proj (1)",
    ),
}
"""Models with linear layers that take no LoRA, or with experts; and what LoRA adapts in them."""


def long_rope(first: int = 64, window: int = 512) -> Phi3ForCausalLM:
    """A model with one set of rotary frequencies up to ``first`` tokens, and another for longer sequences."""
    factors = {"short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
    config = Phi3Config(
        **SIZE,
        max_position_embeddings=window,
        original_max_position_embeddings=first,
        rope_parameters={"rope_type": "longrope", "rope_theta": 1e4, **factors},
        initializer_range=0.25,
        embd_pdrop=0.0,
        resid_pdrop=0.0,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Phi3ForCausalLM(config).eval()


def odd_model(name: str) -> tuple[Any, bool]:
    """The model, and whether a pass of it can go on from cached states over a gap of padding."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return MAKERS[name]().eval(), name.startswith(("llama", "gpt2", "bloom"))
