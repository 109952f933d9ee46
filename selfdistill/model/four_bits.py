"""4-bit weights under an adapter (QLoRA, arXiv 2305.14314): NF4 with quantised scales, by bitsandbytes.

A weight is one of the 16 numbers of NF4 times the scale of its block of 64. A scale is an 8-bit number times the
float32 scale of its block of 256. So a weight takes 0.516 bytes. Linear layers except the head are quantised;
everything else, such as embeddings, norms and biases, keeps its data type.

Each pass converts a layer's weights to its compute type, uses them and discards them. Weights are quantised
while they are read, one tensor at a time on the device, which never holds all of them in floating point.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BitsAndBytesConfig
from transformers.quantizers.auto import AutoHfQuantizer

from selfdistill.errors import UserError
from selfdistill.model.device import best_device
from selfdistill.model.files import resolve
from selfdistill.model.quantisation import import_bitsandbytes

BLOCK, BLOCK_OF_SCALES = 64, 256
_ASKED = "setting 'load_in_4bit'"


def four_bit_options() -> dict[str, Any]:
    """Arguments of ``from_pretrained`` that quantise a model on the best device.

    Raises:
        UserError: bitsandbytes is not installed, or cannot be loaded.
    """
    import_bitsandbytes(_ASKED)
    return {"quantization_config": _config(), "device_map": {"": best_device()}}


def can_be_in_4bit(name: str) -> bool:
    """Whether a model can be read in 4 bits here: bitsandbytes can be loaded, and the model is not an adapter.

    Raises:
        UserError: there is no such model.
    """
    try:
        import_bitsandbytes(_ASKED)
    except UserError:
        return False
    return not (Path(resolve(name)) / "adapter_config.json").is_file()


def is_in_4bit(model: nn.Module) -> bool:
    """Whether a model has 4-bit weights."""
    return bool(scales(model))


def set_compute_dtype(model: nn.Module, dtype: torch.dtype) -> None:
    """Make layers with 4-bit weights compute in a data type, and cast their biases to it.

    Autocast does not see these layers. On CPUs with AVX512-BF16, bitsandbytes would repack the weights in eval mode
    for a kernel that rounds to bfloat16 and has no gradient; this is disabled.
    """
    for layer in _layers(model):
        layer.compute_dtype, layer.compute_type_is_set = dtype, True
        layer.support_avx512bf16_for_cpu = False
        if layer.bias is not None:
            layer.bias = nn.Parameter(layer.bias.detach().to(dtype), requires_grad=False)


def scales(model: nn.Module) -> dict[str, Tensor]:
    """The quantisation state of 4-bit weights, by name; empty for other models."""
    found: dict[str, Tensor] = {}
    for name, weight in model.named_parameters():
        if (state := getattr(weight, "quant_state", None)) is not None:
            parts = {"absmax": state.absmax, "code": state.code, "offset": state.offset}
            parts |= {"nested_absmax": state.state2.absmax, "nested_code": state.state2.code}
            found |= {f"{name}.{part}": tensor for part, tensor in parts.items()}
    return found


def weight_tensors(model: nn.Module) -> list[Tensor]:
    """Parameters and buffers, and the scales of quantised weights."""
    return [*model.parameters(), *model.buffers(), *scales(model).values()]


def count_of(weight: Tensor) -> int:
    """How many numbers a weight has; the codes of a quantised one are two per byte."""
    state = getattr(weight, "quant_state", None)
    return weight.numel() if state is None else int(state.shape.numel())


def plain(weight: Tensor) -> Tensor:
    """A weight as an ordinary tensor; for a quantised weight its codes, two per byte."""
    return weight.detach().as_subclass(Tensor) if hasattr(weight, "quant_state") else weight.detach()


def dequantised(model: nn.Module) -> dict[str, Tensor]:
    """The dequantised 4-bit weights, by name."""
    functional = import_bitsandbytes(_ASKED).functional
    weights = {name: weight for name, weight in model.named_parameters() if hasattr(weight, "quant_state")}
    return {name: functional.dequantize_4bit(plain(weight), weight.quant_state) for name, weight in weights.items()}


def replace_layers(model: Any) -> None:
    """Replace the layers that loading would quantise, in a model without data (on the device ``meta``).

    Raises:
        UserError: bitsandbytes is not installed, or cannot be loaded.
    """
    import_bitsandbytes(_ASKED)
    quantizer: Any = AutoHfQuantizer.from_config(_config())
    quantizer.preprocess_model(model, device_map=None)
    model.is_loaded_in_4bit = True  # PEFT checks this
    set_compute_dtype(model, model.dtype)


def pack_weights(model: nn.Module) -> None:
    """Give replaced layers weights of the size of their codes, still without data. Call it after adding an adapter."""
    for layer in _layers(model):
        count = layer.in_features * layer.out_features
        layer.weight = nn.Parameter(torch.empty(-(-count // 2), 1, dtype=torch.uint8), requires_grad=False)


def add_scales(model: nn.Module, dtype: torch.dtype) -> None:
    """Add scales to packed weights, for a model of this data type; they are fake tensors under ``FakeTensorMode``."""
    state: Any = import_bitsandbytes(_ASKED).functional.QuantState
    for layer in _layers(model):
        shape = torch.Size((layer.out_features, layer.in_features))
        blocks = -(-shape.numel() // BLOCK)
        nested = state(
            torch.empty(-(-blocks // BLOCK_OF_SCALES)),
            code=torch.empty(256),
            blocksize=BLOCK_OF_SCALES,
            dtype=torch.float32,
        )
        layer.weight.quant_state = state(
            torch.empty(blocks, dtype=torch.uint8),
            shape=shape,
            code=torch.empty(16),
            blocksize=BLOCK,
            quant_type="nf4",
            dtype=dtype,
            offset=torch.empty(()),
            state2=nested,
        )


def _config() -> BitsAndBytesConfig:
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)


def _layers(model: nn.Module) -> Iterator[Any]:
    """4-bit layers: bitsandbytes' own, inside an adapter's layers if there is one."""
    kind = import_bitsandbytes(_ASKED).nn.Linear4bit
    return (layer for layer in model.modules() if isinstance(layer, kind))
