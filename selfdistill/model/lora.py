"""Add a LoRA adapter to a model, and say what it adapts."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from selfdistill.errors import UserError, number_of
from selfdistill.model.loading import LoadedModel, load_model
from selfdistill.model.pictures import beside_language, language_part
from selfdistill.model.quantisation import import_before_peft
from selfdistill.model.weights import first_line

_OWN_FORWARD = ("FalconLinear", "Linear4bit")
"""Kinds of linear layers with a forward pass of their own that computes what ``nn.Linear`` does."""
_WITHOUT_OUTPUT = ("falcon_h1", "falcon_mamba", "mamba", "mamba2", "nemotron_h")
"""Model types whose fast kernels use the weight of ``out_proj`` beside its layer, so PEFT refuses to adapt it."""


def add_lora(loaded: LoadedModel, rank: int, alpha: float | None, seed: int) -> None:
    """Add a LoRA adapter named ``default`` to all linear layers except the head, and freeze the base weights.

    In an image-text model, only the language model gets an adapter. Routers that are linear layers and return more than
    their product get none, nor do layers whose weight Mamba's kernels read by themselves. In some mixtures of experts
    PEFT adapts the tensors of experts, see :func:`describe_lora`. The adapter's weights are float32 whatever the
    model's data type (PEFT's ``autocast_adapter_dtype``).

    Args:
        loaded: the model; changed in place.
        rank: the adapter's rank.
        alpha: the adapter's update is scaled by ``alpha / rank``; default: 2 ``rank``.
        seed: seed of the initial weights.

    Raises:
        UserError: PEFT finds no layer that it can adapt.
    """
    import_before_peft()
    from peft import LoraConfig, get_peft_model

    scale: Any = alpha or 2 * rank  # PEFT's annotation says int, but it only divides by the rank
    left_out = sorted(_without(loaded.model))
    if loaded.pictures is not None:
        left_out.append(beside_language(loaded.model))
    config = LoraConfig(
        r=rank,
        lora_alpha=scale,
        lora_dropout=0.0,
        target_modules="all-linear",
        exclude_modules="|".join(left_out) or None,
        task_type="CAUSAL_LM",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed % 2**64)  # a generator takes no more bits
        try:
            loaded.model = get_peft_model(loaded.model, config)
        except ValueError as error:
            raise UserError(
                f"setting 'lora_rank': model {loaded.name!r} cannot be adapted: {first_line(error)}; leave it out, or "
                "use another model"
            ) from None
    loaded.model.eval()


@contextmanager
def with_lora(loaded: LoadedModel, rank: int, seed: int) -> Iterator[LoadedModel]:
    """The same model with a new adapter (:func:`add_lora`), which is taken off again at the end.

    Raises:
        UserError: PEFT finds no layer that it can adapt.
    """
    trained = [parameter for parameter in loaded.model.parameters() if parameter.requires_grad]
    adapted = replace(loaded)
    add_lora(adapted, rank, None, seed)
    try:
        yield adapted
    finally:
        adapted.model.unload()
        for parameter in trained:
            parameter.requires_grad_(True)


def check_base(loaded: LoadedModel) -> None:
    """Check that an adapter of a loaded model can be saved: the model is that of its ``name_or_path``.

    ``adapter_config.json`` names the base, from which the adapter is loaded again. So that model is loaded here, and
    its weights are compared.

    Raises:
        UserError: there is no such model, or its weights differ.
    """
    cannot = "setting 'lora_rank': adapter_config.json must name the base, and this loaded model"
    save = "save it with its tokenizer (save_pretrained), and give that folder"
    name, own = loaded.model.name_or_path, dict(loaded.model.named_parameters())
    if not name:
        raise UserError(f"{cannot} has no name_or_path; {save}")
    try:
        there = dict(load_model(name, dtype=loaded.dtype).model.named_parameters())
    except UserError as error:
        raise UserError(f"{cannot} cannot be loaded again ({error}); {save}") from None
    if own.keys() != there.keys() or not all(_equal(own[tensor], there[tensor]) for tensor in own):
        raise UserError(f"{cannot} has different weights from {name!r}; {save}")


def _equal(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and one.shape == other.shape and torch.equal(one.cpu(), other.cpu())


def _without(model: Any) -> set[str]:
    """Regular expressions for the names of linear layers that get no adapter; numbers stand for all numbers."""
    bypassed = {
        id(part.dt_proj)  # its weight is read, so an adapter would have no effect
        for part in model.modules()
        if "Mamba" in type(part).__name__ and hasattr(part, "dt_proj")
    }
    if model.config.get_text_config().model_type in _WITHOUT_OUTPUT:
        bypassed |= {id(module) for name, module in model.named_modules() if name.endswith(".out_proj")}
    names = {
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and (not _is_plain(module) or id(module) in bypassed)
    }
    return {re.sub(r"\d+", r"\\d+", re.escape(name)) for name in names}


def _is_plain(layer: nn.Linear) -> bool:
    """Whether a linear layer computes W x + b, and nothing else."""
    return type(layer).forward is nn.Linear.forward or type(layer).__name__ in _OWN_FORWARD


def describe_lora(loaded: LoadedModel) -> str:
    """What the adapter adapts, in words: linear layers and tensors, and the linear layers and experts that it does not.

    PEFT adapts experts only in families that it knows. There it takes the names of experts' parts for the experts, so
    linear layers with these names get no adapter.
    """
    causal = loaded.model.base_model.model
    layers = [module for module in causal.modules() if hasattr(module, "lora_A")]
    tensors = sum(hasattr(layer, "parameter_name") for layer in layers)
    line = f"LoRA on {number_of(len(layers) - tensors, 'linear layer')}"
    if tensors:
        line += f" and {number_of(tensors, 'tensor')} of experts and routers"
    left = Counter(_left_out(causal if loaded.pictures is None else language_part(causal), causal))
    if left:
        line += f", not on {', '.join(f'{name} ({count})' for name, count in left.items())}"
    return line


def _left_out(part: Any, causal: Any) -> Iterator[str]:
    """The last two names of each linear layer but the head, and of each tensor of experts, without an adapter."""
    head = causal.get_output_embeddings()
    adapted = {id(layer.get_base_layer()) for layer in part.modules() if hasattr(layer, "lora_A")}
    for name, module in part.named_modules():
        if id(module) in adapted or ".lora_" in name or module is head:
            continue
        if isinstance(module, nn.Linear):
            yield ".".join(name.split(".")[-2:])
        elif "Experts" in type(module).__name__:
            yield from (
                f"{name.rpartition('.')[2]}.{own}" for own, p in module.named_parameters(recurse=False) if p.ndim == 3
            )
