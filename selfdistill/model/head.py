"""Split a model into the body, which computes hidden states, and the head, which computes logits.

Legend: B batch, T completion tokens, N tokens without padding, D hidden size, V vocabulary.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:  # it imports the pictures, which import this module
    from selfdistill.model.loading import LoadedModel


def unwrap(model: Any) -> Any:
    """The causal LM inside a ``PeftModel`` (adapters stay active), or the model itself."""
    return model.base_model.model if hasattr(model, "peft_config") and hasattr(model, "base_model") else model


class ScaledHead(nn.Module):
    """A head whose logits z are scaled and soft-capped: cap tanh(scale z / cap)."""

    def __init__(self, head: nn.Module, scale: float, cap: float | None) -> None:
        super().__init__()
        self.head, self.scale, self.cap = head, scale, cap

    def forward(self, hidden_ND: Tensor) -> Tensor:
        logits_NV = self.head(hidden_ND) * self.scale
        return logits_NV if self.cap is None else torch.tanh(logits_NV / self.cap) * self.cap


def body_and_head(model: Any) -> tuple[nn.Module, nn.Module] | None:
    """The module that computes hidden states and the one that maps them to logits; None if they are not separable."""
    causal = unwrap(model)
    body = getattr(causal, getattr(causal, "base_model_prefix", "") or "-", None)
    head = causal.get_output_embeddings()
    if not isinstance(body, nn.Module) or not isinstance(head, nn.Module):
        return None
    config = causal.config.get_text_config()
    # Cohere multiplies, Granite divides, Gemma caps. The probe (head_agrees) detects whether a model does more.
    times, over, cap = (
        value if isinstance(value := getattr(config, name, None), int | float) and value else None
        for name in ("logit_scale", "logits_scaling", "final_logit_softcapping")
    )
    plain = times is None and over is None and cap is None
    return body, head if plain else ScaledHead(head, (times or 1.0) / (over or 1.0), cap)


@torch.no_grad()
def head_agrees(loaded: LoadedModel) -> bool:
    """Start-up probe: does head(body(x)) equal the model's own logits?

    False for models that transform their logits further than :class:`ScaledHead`; for these, the model's own logits
    replace the hidden states. Runs once per ``loaded``.
    """
    if loaded.separate_head is None:
        loaded.separate_head = _agrees(loaded)
    return loaded.separate_head


def _agrees(loaded: LoadedModel) -> bool:
    parts = body_and_head(loaded.model)
    if parts is None:
        return False
    body, head = parts
    generator = torch.Generator().manual_seed(0)
    vocabulary = loaded.model.config.get_text_config().vocab_size
    ids_BT = torch.randint(vocabulary, (1, 8), generator=generator).to(loaded.device)
    own_BTV = loaded.model(input_ids=ids_BT, use_cache=False).logits.float()
    split_BTV = head(body(input_ids=ids_BT, use_cache=False).last_hidden_state).float()
    scale = own_BTV.abs().max().clamp(min=1.0)
    return own_BTV.shape == split_BTV.shape and bool((own_BTV - split_BTV).abs().max() <= 1e-3 * scale)
