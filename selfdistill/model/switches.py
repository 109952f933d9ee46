"""What training switches in a model, and switches back at its end."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from selfdistill.errors import UserError
from selfdistill.model.head import unwrap
from selfdistill.model.loading import LoadedModel

_HANDLES = ("_require_grads_hooks", "_require_grads_hook")
"""Where transformers keeps the handles of :func:`_gradient_hooks`."""


def can_checkpoint(model: Any) -> bool:
    """Whether the model's layers can recompute their activations; a few of transformers' models do not support it."""
    return bool(unwrap(model).supports_gradient_checkpointing)


def checkpoint_activations(model: Any) -> None:
    """Let the model's layers recompute their activations in the backward pass, after :func:`set_recomputing`.

    Raises:
        UserError: they cannot.
    """
    if not can_checkpoint(model):
        name = type(unwrap(model)).__name__
        raise UserError(f"setting 'gradient_checkpointing': {name} does not support it; leave it out")
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def set_recomputing(model: Any, recompute: bool) -> None:
    """Start or stop recomputing activations in a model after :func:`checkpoint_activations`.

    transformers recomputes in train mode. So the model and its layers that recompute are in train mode, and all other
    modules stay in eval mode: in train mode the routers of some mixtures of experts add noise.
    """
    model.eval()
    if recompute:
        for module in model.modules():
            module.training = module is model or hasattr(module, "gradient_checkpointing")


@contextmanager
def switched_back(loaded: LoadedModel) -> Iterator[None]:
    """Undo at the end what training switches in a model: gradient checkpointing, frozen weights and a new adapter."""
    model = loaded.model
    trainable = [(weight, weight.requires_grad) for weight in model.parameters()]
    kept = ("gradient_checkpointing", "_gradient_checkpointing_func", *_HANDLES)
    modules = {part: {name: vars(part)[name] for name in kept if name in vars(part)} for part in model.modules()}
    hooks = {key for part in modules for key in _gradient_hooks(part)}
    try:
        yield
    finally:
        if loaded.model is not model:
            loaded.model.unload()
            loaded.model = model
        for weight, was in trainable:
            weight.requires_grad_(was)
        for part, before in modules.items():
            for key in _gradient_hooks(part) - hooks:
                del part._forward_hooks[key]
            for name in kept:
                vars(part).pop(name, None)
            vars(part).update(before)


def _gradient_hooks(module: nn.Module) -> set[int]:
    """Keys of the hooks with which transformers and PEFT let the embedding's output require gradients, and leave it."""
    hooks = module._forward_hooks.items()
    return {key for key, hook in hooks if "require_grad" in getattr(hook, "__qualname__", "")}
