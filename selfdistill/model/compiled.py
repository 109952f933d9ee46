"""Find and compile the layers of a model.

Legend: B sequences, L tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from selfdistill.errors import UserError
from selfdistill.model.head import body_and_head, unwrap
from selfdistill.model.loading import LoadedModel


def layers_of(loaded: LoadedModel, network: Any, setting: str) -> list[nn.Module]:
    """The modules that a model declares as its layers (``_no_split_modules``).

    Args:
        loaded: the model to name in the error.
        network: the model, or another with the same architecture.
        setting: the setting that needs the layers, for the error.

    Raises:
        UserError: the model declares no layers.
    """
    kinds = set(getattr(unwrap(network), "_no_split_modules", None) or ())
    layers = [module for module in network.modules() if type(module).__name__ in kinds]
    within = {
        part for layer in layers for part in layer.modules() if part is not layer
    }  # Mamba also declares parts of layers
    layers = [layer for layer in layers if layer not in within]
    if not layers:
        raise UserError(f"model {loaded.name!r} does not declare which modules are its layers; leave {setting} out")
    return layers


class CompiledLayers:
    """The model's layers compiled with ``torch.compile``, in use within :meth:`active`; one compilation serves all.

    Raises:
        UserError: the model does not declare its layers, or they cannot be compiled on this machine.
    """

    def __init__(self, loaded: LoadedModel) -> None:
        self._layers = layers_of(loaded, loaded.model, "torch_compile")
        # The size of a small batch, because the compiler decides here which loops to multithread. Odd sizes, because
        # one that equals a model dimension, such as 64, would be specialised and other sizes recompiled.
        parts = body_and_head(loaded.model)  # called as in scoring, or the layers get different arguments
        network: Any = loaded.model if parts is None else parts[0]
        ids_BL = torch.full((3, min(61, loaded.window or 61)), loaded.pad_token_id, device=loaded.device)
        try:
            self._compiled = [torch.compile(layer.forward, dynamic=True) for layer in self._layers]
            with self.active():
                network(input_ids=ids_BL, past_key_values=None, use_cache=False)[0].sum().backward()
        except Exception as error:  # whatever a compiler raises
            reason = " ".join(str(error).split("\n\n")[0].split()) or type(error).__name__
            raise UserError(f"torch_compile does not work here: {reason}; leave it out") from None
        loaded.model.zero_grad(set_to_none=True)

    @contextmanager
    def active(self) -> Iterator[None]:
        """Use the compiled layers in forward passes."""
        try:
            for layer, compiled in zip(self._layers, self._compiled, strict=True):
                layer.forward = compiled
            yield
        finally:
            for layer in self._layers:
                vars(layer).pop("forward", None)
