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
"""Standard deviation of what :func:`other_lora` adds."""
_BASE = ".base_layer"
_ADAPTER = "default"
_OTHER_KINDS = (_BASE, ".original_module", ".modules_to_save", ".token_adapter")
"""What PEFT adds to the names of weights that other adapters than LoRA wrap."""

WeightsVersion = tuple[int, ...]
"""One number per weight; see :func:`weights_version`."""


@torch.no_grad()
def weights_version(model: nn.Module) -> WeightsVersion:
    """What identifies the values of all weights on this rank: per weight the sum of its bits, as 64-bit integers.

    It needs no note of who changed them, which could be forgotten: optimizers, checkpoints and callers may all write to
    the weights, and PyTorch's own counter of changes (``Tensor._version``) does not see fused optimizers.
    """
    sums = [_sum_of_bits(local_tensor(weight.detach())) for weight in model.parameters()]
    return tuple(torch.stack(sums).tolist()) if sums else ()


def _sum_of_bits(weight: Tensor) -> Tensor:
    bits = weight.contiguous().view(-1).view(torch.uint8)
    bits = nn.functional.pad(bits, (0, -len(bits) % 8)) if len(bits) % 8 else bits
    return bits.view(torch.int64).sum()


class WeightsDigest(NamedTuple):
    """What identifies the weights of a model across processes."""

    base: str
    """Of all but LoRA's weights; the same with LoRA and without."""
    lora: str
    """Of LoRA's weights and scales; the same for all models without."""


def weights_digest(loaded: LoadedModel) -> WeightsDigest:
    """Digests of the sums of :func:`weights_version`, which all ranks must compute together.

    Those of a sharded weight are added up, so that it has the digest of the full one, up to shards of odd sizes.
    """
    parameters = dict(loaded.model.named_parameters())
    sums = all_gather([weights_version(loaded.model)])
    weights = []
    for name, weight, *parts in zip(parameters, parameters.values(), *sums, strict=True):
        total = sum(parts) % 2**64 if local_tensor(weight) is not weight else parts[0] % 2**64
        weights.append((name.removeprefix(_PEFT).replace(_BASE, ""), total))
    base = [weight for weight in weights if _LORA not in weight[0]]
    lora = [weight for weight in weights if _is_adapters(weight[0])]
    scales = [layer.scaling.get(_ADAPTER) for layer in _lora_layers(loaded)]
    return WeightsDigest(*(hashlib.sha256(repr(values).encode()).hexdigest()[:16] for values in (base, (lora, scales))))


def lora_rank(loaded: LoadedModel) -> int:
    """The largest rank of the model's LoRA layers; 0 without any."""
    return max((layer.r.get(_ADAPTER, 0) for layer in _lora_layers(loaded)), default=0)


def _is_adapters(name: str) -> bool:
    """Whether a weight is LoRA's and the student's. A teacher may have an adapter beside it."""
    return _LORA in name and f".{_ADAPTER}." in name


def _lora_layers(loaded: LoadedModel) -> list[Any]:
    return [layer for layer in loaded.model.modules() if hasattr(layer, "lora_A")]


@contextmanager
def other_lora(loaded: LoadedModel) -> Iterator[None]:
    """Give LoRA other weights meanwhile. A fresh one changes nothing, so an engine that leaves it out would agree."""
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

    Checks the model at once, and computes each tensor when it is asked for.

    Sharded weights are gathered one by one, and all ranks must iterate. LoRA is merged in float32: W + s B A. With
    ``merge=False`` these are the weights of the base, W.

    Raises:
        UserError: the adapter does more than LoRA on linear layers.
    """
    from transformers.core_model_loading import revert_weight_conversion

    causal = unwrap(loaded.model)
    parts = dict(_parts(causal, loaded.name))
    # Converting back, as from experts in one tensor to single ones, needs all tensors at once.
    renamed = revert_weight_conversion(causal, {name: weight.to("meta") for name, (weight, _) in parts.items()})
    weights = ((name, _whole(weight, layer if merge else None)) for name, (weight, layer) in parts.items())
    if renamed.keys() == parts.keys():
        return weights
    return iter(revert_weight_conversion(causal, dict(weights)).items())


def adapter_tensors(loaded: LoadedModel) -> Iterator[tuple[str, Tensor]]:
    """Name and full tensor of the student's LoRA weights, as PEFT's files have them; all ranks must iterate."""
    for name, weight in loaded.model.named_parameters():
        if _is_adapters(name):
            yield name.replace(f".{_ADAPTER}.", "."), full_tensor(weight.detach())


def _parts(causal: nn.Module, name: str) -> Iterator[tuple[str, tuple[Tensor, Any]]]:
    """Each weight and saved buffer of the base by its name there, with the LoRA layer to merge into it, or None."""
    wrapped = {path: layer for path, layer in causal.named_modules() if hasattr(layer, "lora_A")}
    for path, weight in (*causal.named_parameters(), *_saved_buffers(causal)):
        if _LORA in path:
            continue
        layer = wrapped.get(path.rpartition(".")[0].removesuffix(_BASE)) if _BASE in path else None
        if layer is not None:
            _check_lora(layer, name)
        elif any(part in path for part in _OTHER_KINDS):
            raise _unsupported(name)
        merge = layer if path.endswith(f"{_BASE}.weight") else None
        yield path.replace(_BASE, ""), (weight.detach(), merge)


def _saved_buffers(causal: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The buffers that files hold. ``state_dict`` would tell them, too, but shards what is gathered."""
    for path, module in causal.named_modules():
        for name, buffer in module.named_buffers(recurse=False):
            if name not in module._non_persistent_buffers_set:
                yield f"{path}.{name}" if path else name, buffer


def _check_lora(layer: Any, name: str) -> None:
    """Refuse what is not W + s B A.

    Raises:
        UserError: names the model.
    """
    from peft.tuners.lora import Linear

    plain = isinstance(layer, Linear) and layer.active_adapters == [_ADAPTER]
    if not plain or layer.lora_variant or layer.lora_bias.get(_ADAPTER) or layer.merged or layer.disable_adapters:
        raise _unsupported(name)


def _unsupported(name: str) -> UserError:
    return UserError(
        f"model {name!r}: an engine gets LoRA on linear layers merged, and this adapter is of another kind; merge it "
        "first (selfdistill export --merge), or leave engine out"
    )


@torch.no_grad()
def _whole(weight: Tensor, layer: Any) -> Tensor:
    """The full tensor, with the LoRA layer's update."""
    whole = full_tensor(weight)
    if layer is None:
        return whole
    down, up = (full_tensor(part[_ADAPTER].weight.detach()).float() for part in (layer.lora_A, layer.lora_B))
    update = layer.scaling[_ADAPTER] * (up @ down)
    return whole.float() + (update.T if layer.fan_in_fan_out else update)
