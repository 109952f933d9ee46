"""Fingerprints of a model's weights and of its network, by which it is known again."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch
from torch import nn

from selfdistill.model.four_bits import plain, scales
from selfdistill.model.loading import LoadedModel

_OF_FILES = ("_name_or_path", "transformers_version", "torch_dtype", "dtype")
"""What ``config.json`` says of its files. The type of the weights is part of their fingerprint."""


def weights_fingerprint(model: nn.Module) -> str:
    """SHA-256 of names, shapes, data types and bits of all weights, and of the scales of quantised ones."""
    digest = hashlib.sha256()
    for name, weight in (*model.named_parameters(), *scales(model).items()):
        digest.update(f"{name} {tuple(weight.shape)} {weight.dtype}\n".encode())
        digest.update(plain(weight).cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def start_fingerprint(loaded: LoadedModel) -> str:
    """Fingerprint of the weights before training; empty if an adapter was merged.

    Merging may round differently on another machine.
    """
    return "" if loaded.merged_adapter else weights_fingerprint(loaded.model)


def _of_network(part: dict[str, Any]) -> dict[str, Any]:
    """What a part of ``config.json`` says of the network; not the copy of the rotary base for transformers 4."""
    kept = {name: value for name, value in part.items() if name not in _OF_FILES}
    rope = kept.get("rope_parameters")
    if isinstance(rope, dict) and "rope_theta" in kept and kept["rope_theta"] == rope.get("rope_theta"):
        del kept["rope_theta"]
    return kept


def network_fingerprint(loaded: LoadedModel) -> str:
    """SHA-256 of ``config.json`` without what only describes its files; empty if the model has no files.

    The file, because what transformers makes of it differs between releases.
    """
    file = None if loaded.files is None else loaded.files / "config.json"
    if file is None or not file.is_file():
        return ""
    said = json.loads(file.read_text(encoding="utf-8"), object_hook=_of_network)
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()
