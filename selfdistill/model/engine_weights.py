"""The weights of a model as an engine needs them (full, merged, with the hub's names), and whether they changed."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from selfdistill.errors import UserError
from selfdistill.model.fsdp import full_tensor, local_tensor
from selfdistill.model.head import unwrap
from selfdistill.model.loading import LoadedModel
from selfdistill.runtime import all_gather

_LORA = ".lora_"
_PEFT = "base_model.model."
_OTHER_LORA = 0.02
"""Standard deviation of the noise that :func:`other_lora` adds."""
_BASE = ".base_layer"
_ADAPTER = "default"
"""The student's adapter."""
_OTHER_KINDS = (_BASE, ".original_module", ".modules_to_save", ".token_adapter")
"""What PEFT adds to the names of weights that adapters other than LoRA wrap."""

WeightsVersion = tuple[Any, ...]
"""One number per weight, and one tuple per LoRA layer; see :func:`weights_version`."""
_BLOCK = 64
"""Number of 64-bit integers per block; each block's sum has its own factor in a weight's number."""


@torch.no_grad()
def weights_version(model: nn.Module) -> WeightsVersion:
    """Identifies the weights that the model computes with on this rank.

    It has a position-dependent sum of the bits of each weight and saved buffer, and for each LoRA layer the active
    adapters with their scales.

    It does not rely on code that reports changes: optimizers, checkpoints and callers may all write to the weights, and
    PyTorch's own counter (``Tensor._version``) misses fused optimizers.
    """
    weights = [*model.parameters(), *(buffer for _, buffer in _saved_buffers(model))]
    sums = [_sum_of_bits(local_tensor(weight.detach())) for weight in weights]
    adapters = [
        (layer.disable_adapters, layer.merged, *layer.active_adapters, *layer.scaling.values())
        for layer in _lora_layers(model).values()
    ]
    return (*(torch.stack(sums).tolist() if sums else ()), *adapters)


def _sum_of_bits(weight: Tensor) -> Tensor:
    """Sum over blocks k of (2 k + 1) times the sum of the block's bits, read as 64-bit integers, modulo 2^64."""
    bits, block_bytes = weight.contiguous().view(-1).view(torch.uint8), 8 * _BLOCK
    if len(bits) % block_bytes or bits.storage_offset() % 8:
        bits = nn.functional.pad(bits, (0, -len(bits) % block_bytes))  # a copy
    blocks = bits.view(torch.int64).view(-1, _BLOCK).sum(1)
    return (blocks * torch.arange(1, 2 * len(blocks), 2, device=blocks.device)).sum()


class WeightsDigest(NamedTuple):
    """Identifies the weights of a model across processes."""

    base: str
    """Of all weights but LoRA's; the same with and without LoRA."""
    lora: str
    """Of LoRA's weights, the active adapters and their scales; ``""`` without LoRA."""


def weights_digest(loaded: LoadedModel) -> WeightsDigest:
    """Digests of :func:`weights_version`; all ranks must call this together.

    The digests of sharded weights depend on the world size.
    """
    weights = dict(loaded.model.named_parameters()) | dict(_saved_buffers(loaded.model))
    versions = all_gather([weights_version(loaded.model)])
    base: list[Any] = []
    lora: list[Any] = []
    for number, (name, weight) in enumerate(weights.items()):
        shards = versions if local_tensor(weight) is not weight else versions[:1]
        named = (name.removeprefix(_PEFT).replace(_BASE, ""), *(version[number] for version in shards))
        (lora if _LORA in name else base).append(named)
    lora += versions[0][len(weights) :]
    return WeightsDigest(_hash(base), _hash(lora) if lora else "")


def _hash(values: Any) -> str:
    return hashlib.sha256(repr(values).encode()).hexdigest()[:16]


def adapter_rank(loaded: LoadedModel) -> int:
    """The largest rank of the student's adapter; 0 if there is none, or it is not active."""
    layers = _lora_layers(loaded.model).values()
    if any(layer.disable_adapters or layer.active_adapters != [_ADAPTER] for layer in layers):
        return 0
    return max((layer.r.get(_ADAPTER, 0) for layer in layers), default=0)


def _is_adapters(name: str) -> bool:
    """Whether a weight belongs to the student's LoRA adapter. A teacher may have its own adapter."""
    return _LORA in name and f".{_ADAPTER}." in name


@contextmanager
def other_lora(loaded: LoadedModel) -> Iterator[None]:
    """Temporarily change LoRA's weights. A fresh adapter has no effect, so an engine that ignores it would agree."""
    weights = [local_tensor(weight) for name, weight in loaded.model.named_parameters() if _is_adapters(name)]
    kept = [weight.detach().clone() for weight in weights]
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in weights:
            weight += _OTHER_LORA * torch.randn(weight.shape, generator=generator).to(weight)
        try:
            yield
        finally:
            for weight, before in zip(weights, kept, strict=True):
                weight.copy_(before)


def hub_tensors(loaded: LoadedModel, *, merge: bool = True) -> Iterator[tuple[str, Tensor]]:
    """Name and full tensor of every weight, as the model's files would have them; tied weights once.

    Checks the model immediately, and computes each tensor lazily. Only tensors that the files hold in another form,
    such as experts one by one, are converted all at once, at the end.

    Sharded weights are gathered one by one, and all ranks must iterate. Active LoRA adapters are merged in float32:
    W + s B A. With ``merge=False`` these are the weights of the base, W.

    Raises:
        UserError: the adapter does more than LoRA on linear layers and experts.
    """
    from transformers.core_model_loading import revert_weight_conversion

    parts = _checked_parts(loaded)
    causal = unwrap(loaded.model)

    def whole(name: str) -> Tensor:
        weight, layer = parts[name]
        return _whole(weight, layer if merge else None)

    def tensors() -> Iterator[tuple[str, Tensor]]:
        shapes = {
            name: torch.empty(weight.shape, dtype=weight.dtype, device="meta") for name, (weight, _) in parts.items()
        }
        names = {id(shape): name for name, shape in shapes.items()}
        hubs = revert_weight_conversion(causal, shapes)
        # Renaming keeps a tensor, and converting makes another, which may have the same name and shape.
        kept = {hub_name: names[id(shape)] for hub_name, shape in hubs.items() if id(shape) in names}
        for hub_name, name in kept.items():
            yield hub_name, whole(name)
        left = parts.keys() - kept.values()
        if left:
            given = {name: whole(name) if name in left else shape for name, shape in shapes.items()}
            converted = revert_weight_conversion(causal, given)
            yield from ((name, weight) for name, weight in converted.items() if name not in kept)

    return tensors()


def check_adapter(loaded: LoadedModel) -> None:
    """Refuse adapters that an engine cannot get.

    Raises:
        UserError: the adapter does more than LoRA on linear layers and experts.
    """
    _checked_parts(loaded)


def _checked_parts(loaded: LoadedModel) -> dict[str, tuple[Tensor, Any]]:
    return dict(_parts(unwrap(loaded.model), loaded.name))


def is_adapter_for_engines(loaded: LoadedModel) -> bool:
    """Whether engines can load the student's adapter as one: it is active, and adapts linear layers only."""
    layers = _lora_layers(loaded.model).values()
    return adapter_rank(loaded) > 0 and not any(hasattr(layer, "parameter_name") for layer in layers)


def adapter_tensors(loaded: LoadedModel) -> Iterator[tuple[str, Tensor]]:
    """Name and full tensor of the student's LoRA weights, to go with :func:`adapter_config`; all ranks must iterate.

    B includes the layer's scale, and A and B are padded with zeros to the largest rank. Engines take ranks and scales
    only from the configuration, not from the layers, where they may have been changed.
    """
    rank = adapter_rank(loaded)
    for path, layer in _lora_layers(loaded.model).items():
        if _ADAPTER in layer.lora_A:
            down, up = (full_tensor(part[_ADAPTER].weight.detach()).float() for part in (layer.lora_A, layer.lora_B))
            missing = rank - len(down)
            yield f"{path}.lora_A.weight", nn.functional.pad(down, (0, 0, 0, missing))
            yield f"{path}.lora_B.weight", nn.functional.pad(layer.scaling[_ADAPTER] * up, (0, missing))


def adapter_config(loaded: LoadedModel) -> Any:
    """PEFT's configuration of :func:`adapter_tensors`: LoRA of one rank, scale 1."""
    from peft import LoraConfig

    rank, own = adapter_rank(loaded), loaded.model.peft_config[_ADAPTER]
    return LoraConfig(
        r=rank,
        lora_alpha=rank,
        target_modules=own.target_modules,
        exclude_modules=own.exclude_modules,
        task_type=own.task_type,
        inference_mode=True,
    )


def _parts(causal: nn.Module, name: str) -> Iterator[tuple[str, tuple[Tensor, Any]]]:
    """Each weight and saved buffer of the base by its name there, with the LoRA layer to merge into it, or None."""
    wrapped = _lora_layers(causal)
    for path, weight in (*causal.named_parameters(), *_saved_buffers(causal)):
        if _LORA in path:
            continue
        owner, _, own = path.rpartition(".")
        around, merge = [], None
        while owner.endswith(_BASE):  # each adapter of a tensor of experts is around the one before
            owner = owner.removesuffix(_BASE)
            around += [wrapped[owner]] if owner in wrapped else []
        for layer in around:
            if kind := _other_kind(layer):
                raise _unsupported(name, f"an adapter of kind {kind}")
            merge = layer if getattr(layer, "parameter_name", "weight") == own else merge
        if not around and any(part in path for part in _OTHER_KINDS):
            raise _unsupported(name, f"an adapter other than LoRA at {path.replace(_BASE, '')}")
        yield path.replace(_BASE, ""), (weight.detach(), merge)


def _lora_layers(model: nn.Module) -> dict[str, Any]:
    return {path: layer for path, layer in model.named_modules() if hasattr(layer, "lora_A")}


def _saved_buffers(causal: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The buffers that files hold. ``state_dict`` would also list them, but it reshards gathered weights."""
    for path, module in causal.named_modules():
        for name, buffer in module.named_buffers(recurse=False):
            if name not in module._non_persistent_buffers_set:
                yield f"{path}.{name}" if path else name, buffer


def _other_kind(layer: Any) -> str | None:
    """What a layer's adapter is, if it is not W + s B A of a linear layer or of each expert in a tensor."""
    from peft.tuners.lora import Linear, ParamWrapper

    if not isinstance(layer, (Linear, ParamWrapper)):
        return type(layer).__name__
    for variant in layer.lora_variant.values():
        return type(variant).__name__
    if any(layer.lora_bias.values()):
        return "LoRA with a bias"
    return "merged LoRA" if layer.merged else None


def _unsupported(name: str, found: str) -> UserError:
    return UserError(
        f"model {name!r}: found {found}, but an engine gets LoRA on linear layers and experts merged; merge it first "
        "(selfdistill export --merge), or leave engine out"
    )


@torch.no_grad()
def _whole(weight: Tensor, layer: Any) -> Tensor:
    """The full tensor, with the updates of the LoRA layer's active adapters."""
    whole = full_tensor(weight)
    active = [] if layer is None or layer.disable_adapters else layer.active_adapters
    for adapter in (name for name in active if name in layer.lora_A):
        if hasattr(layer, "parameter_name"):
            update = full_tensor(layer.get_delta_weight(adapter))
        else:
            down, up = (full_tensor(part[adapter].weight.detach()).float() for part in (layer.lora_A, layer.lora_B))
            update = layer.scaling[adapter] * (up @ down)
        whole = whole.float() + (update.T if layer.fan_in_fan_out else update)
    return whole
