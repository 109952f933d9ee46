"""Disable dropout, wherever a model has it."""

from __future__ import annotations

import copy
from typing import Any

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel


def disable_dropout(model: nn.Module) -> None:
    """Set every dropout probability to zero, so that train mode (gradient checkpointing) changes no result."""
    configs: dict[int, Any] = {}
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        _zero_dropout(module)
        # Falcon's layers read it from the configuration. Give them a copy, because the model's own is saved with it.
        config = vars(module).get("config")
        if isinstance(config, PretrainedConfig) and not isinstance(module, PreTrainedModel):
            if id(config) not in configs:
                configs[id(config)] = copy.deepcopy(config)
                _zero_dropout(configs[id(config)])
            module.config = configs[id(config)]


def _zero_dropout(holder: Any) -> None:
    """Zero the holder's attributes such as attention_dropout, hidden_dropout, resid_pdrop and layerdrop."""
    for name, value in list(vars(holder).items()):
        if isinstance(value, float) and "drop" in name:
            setattr(holder, name, 0.0)
