"""Numerical precision of a model's computation."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from selfdistill.errors import UserError
from selfdistill.model.device import has_gpu
from selfdistill.model.fsdp import unsharded
from selfdistill.model.loading import LoadedModel


def bfloat16_is_fast() -> bool:
    """Whether the hardware multiplies matrices in bfloat16 fast: most GPUs, and CPUs with AMX or AVX512-BF16."""
    if has_gpu():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    found: Callable[[], dict[str, Any]] = getattr(torch.cpu, "get_capabilities", dict)  # not in torch 2.6
    capabilities = found()
    return any(capabilities.get(name, False) for name in ("amx_bf16", "avx512_bf16"))


def resolved_precision(setting: str) -> str:
    """``bf16`` or ``no`` for the setting ``mixed_precision``."""
    return setting if setting != "auto" else "bf16" if bfloat16_is_fast() else "no"


def with_own_dtype(given: dict[str, Any], loaded: LoadedModel | None) -> dict[str, Any]:
    """The settings with the data type of a loaded model as ``dtype``.

    Raises:
        UserError: another is given.
    """
    if loaded is None:
        return given
    asked = str(given.get("dtype", "auto")).removeprefix("torch.")
    if asked not in ("auto", loaded.dtype):
        raise UserError(
            f"setting 'dtype': found {asked!r}, but the loaded model is {loaded.dtype}; load it in that type, or leave "
            "dtype out"
        )
    return given | {"dtype": loaded.dtype if loaded.dtype in ("float32", "bfloat16") else "auto"}


def refuse_float16(model: nn.Module, name: str) -> None:
    """Refuse to train weights in float16, whose gradients become zero below 6e-8 and infinite above 65,504.

    Raises:
        UserError: trainable weights are float16; the message says what to do.
    """
    if any(p.requires_grad and p.dtype == torch.float16 for p in model.parameters()):
        raise UserError(
            f"model {name!r}: its trainable weights are float16, where small gradients become zero; load it with "
            "dtype bfloat16 or float32 (a loaded model with torch.bfloat16 or torch.float32), or train an adapter with "
            "lora_rank 16"
        )


def refuse_autocast() -> None:
    """Refuse to train where the caller's autocast is on, which keeps casts of weights until its outermost region ends.

    Raises:
        UserError: it is on.
    """
    if any(torch.is_autocast_enabled(kind) for kind in ("cpu", "cuda")):
        raise UserError(
            "torch.autocast is on, and would compute with casts of the weights from before a step; call this outside "
            "of it, with the setting mixed_precision"
        )


@contextmanager
def cached_casts(model: nn.Module) -> Iterator[None]:
    """Cast each weight once rather than once per pass, in passes without gradients under autocast.

    Autocast caches the cast of a weight until its context ends, but only if the weight requires a gradient. So here all
    weights do; ``no_grad`` ensures that none is computed. Shards are excluded, because passes do not use them directly.
    """
    own = (p for p in model.parameters() if not isinstance(p, DTensor))
    frozen = [p for p in own if p.is_floating_point() and not p.requires_grad]
    with torch.no_grad():
        try:
            for parameter in frozen:
                parameter.requires_grad_(True)
            yield
        finally:
            for parameter in frozen:
                parameter.requires_grad_(False)


@contextmanager
def training_precision(model: nn.Module, mixed_precision: str, *others: nn.Module) -> Iterator[None]:
    """Evaluate models in the precision of training with this setting, unsharded and with cached casts."""
    device = next(model.parameters()).device.type
    enabled = resolved_precision(mixed_precision) == "bf16"
    with ExitStack() as contexts:
        for evaluated in (model, *others):
            contexts.enter_context(unsharded(evaluated))
            contexts.enter_context(cached_casts(evaluated))
        contexts.enter_context(torch.autocast(device, torch.bfloat16, enabled=enabled))
        yield
