"""The layers of a model: which modules they are, and their compilation.

Legend: B rows, L tokens.
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
    """The modules that a model itself calls its layers, for ``setting``.

    Args:
        loaded: is named in the message.
        network: the model, or another of its kind.
        setting: needs them.

    Raises:
        UserError: it does not say.
    """
    kinds = set(getattr(unwrap(network), "_no_split_modules", None) or ())
    layers = [module for module in network.modules() if type(module).__name__ in kinds]
    within = {
        part for layer in layers for part in layer.modules() if part is not layer
    }  # Mamba names parts of them, too
    layers = [layer for layer in layers if layer not in within]
    if not layers:
        raise UserError(f"model {loaded.name!r} does not say which modules are its layers: leave {setting} out")
    return layers


class CompiledLayers:
    """The model's layers through ``torch.compile``, while :meth:`active`; one compilation serves them all.

    Raises:
        UserError: the model does not say which of its modules are layers, or they cannot be compiled here.
    """

    def __init__(self, loaded: LoadedModel) -> None:
        self._layers = layers_of(loaded, loaded.model, "torch_compile")
        # As large as a small batch, for which loops are worth several threads is decided here. Odd sizes: one that is
        # a size of the model's, too, such as 64, would be taken for the same thing, and others compiled again.
        parts = body_and_head(loaded.model)  # called as scoring calls them, or layers get other arguments
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
        """Forward passes use the compiled layers."""
        try:
            for layer, compiled in zip(self._layers, self._compiled, strict=True):
                layer.forward = compiled
            yield
        finally:
            for layer in self._layers:
                vars(layer).pop("forward", None)
