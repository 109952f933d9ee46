"""Features of pictures: what a vision tower and its connector make of each, as the language model takes it.

With the argument ``mm_encoder_outputs`` models of transformers take what their ``get_image_features`` returned before.
"""

from __future__ import annotations

import inspect
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

_ARGUMENT = "mm_encoder_outputs"
_OUTPUTS = ("pooler_output", "deepstack_features")
"""What the language model reads of ``get_image_features``: its first layer's inputs, and additions to later layers."""
_Value = TypeVar("_Value")


class Recent(Generic[_Value]):
    """The values that were used last, up to a number of bytes; others are made again.

    Args:
        limit: in bytes.
    """

    def __init__(self, limit: int) -> None:
        self._limit, self._bytes = limit, 0
        self._kept: OrderedDict[Hashable, tuple[_Value, int]] = OrderedDict()

    def emptied(self) -> Recent[_Value]:
        """Another with the same limit."""
        return Recent(self._limit)

    def __call__(self, key: Hashable, make: Callable[[], _Value]) -> _Value:
        """The value of a key, made if it is not kept."""
        if key in self._kept:
            self._kept.move_to_end(key)
            return self._kept[key][0]
        value = make()
        size = value.nbytes if isinstance(value, Features) else _bytes(value)
        self._kept[key], self._bytes = (value, size), self._bytes + size
        while self._bytes > self._limit:
            self._bytes -= self._kept.popitem(last=False)[1][1]
        return value


@dataclass(frozen=True)
class Features:
    """A picture's features."""

    kind: type
    """What ``get_image_features`` returns."""
    outputs: dict[str, Any]
    """Its parts: each a tensor, or nested lists of tensors."""
    places: dict[str, Tensor]
    """What models compute positions from, such as a grid."""
    tower: Tensor
    """A weight of the tower, whose ``id`` is thus its own."""

    @classmethod
    @torch.no_grad()
    def of(cls, body: Any, tower: Tensor, seen: dict[str, Tensor]) -> Features:
        """The features of a picture.

        Args:
            body: the model without its head.
            tower: a weight of its vision tower.
            seen: what the processor makes of the picture.
        """
        taken = inspect.signature(body.get_image_features).parameters
        output = body.get_image_features(**{k: v for k, v in seen.items() if k in taken}, return_dict=True)
        outputs = {name: value for name in _OUTPUTS if (value := getattr(output, name, None)) is not None}
        places = {k: v for k, v in seen.items() if not v.is_floating_point() and v.ndim <= 2}  # no masks of pixels
        return cls(type(output), outputs, places, tower)

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors, without the tower."""
        return _bytes((self.outputs, self.places))


def takes_features(model: Any) -> bool:
    """Whether an image-text model takes features, and its body as well."""
    return all(_ARGUMENT in inspect.signature(part.forward).parameters for part in (model, model.base_model))


def joined_features(features: Sequence[Features]) -> dict[str, Any]:
    """A model's inputs for several pictures."""
    first = features[0]
    outputs = {name: _together([each.outputs[name] for each in features]) for name in first.outputs}
    return {_ARGUMENT: {"image": first.kind(**outputs)}, **joined([each.places for each in features])}


def _together(parts: Sequence[Any]) -> Any:
    """Outputs for each of several pictures, as they would be for all: a tensor, or a list of a tensor for each picture,
    or such a list for each layer."""
    if isinstance(parts[0], Tensor):
        return torch.cat(list(parts))
    if isinstance(parts[0][0], Tensor):
        return [tensor for part in parts for tensor in part]
    return [_together(layer) for layer in zip(*parts, strict=True)]


def joined(parts: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Tensors of several pictures concatenated, padded with zeros to the largest, as processors do."""
    return {key: _padded([part[key] for part in parts]) for key in parts[0]}


def _padded(tensors: Sequence[Tensor]) -> Tensor:
    sizes = [max(sizes) for sizes in zip(*(tensor.shape[1:] for tensor in tensors), strict=True)]
    filled = []
    for tensor in tensors:
        pad = [
            x for size, most in zip(reversed(tensor.shape[1:]), reversed(sizes), strict=True) for x in (0, most - size)
        ]
        filled.append(nn.functional.pad(tensor, pad) if any(pad) else tensor)
    return torch.cat(filled)


def _bytes(values: Any) -> int:
    return sum(tensor.nbytes for tensor in tree_leaves(values))
