"""Code that runs in vLLM's worker, in this process or on a server: it replaces the worker's weights."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

_UNCONFIRMED = "unconfirmed "
"""Marks the version of loaded weights while the prefix cache may still hold states from older weights."""


def put_weights(worker: Any, weights: Iterator[tuple[str, Tensor]], on_cpu: bool) -> None:
    """Replace all weights of the engine; runs in its worker.

    vLLM loads layer by layer, repacks what its kernels need, and copies the result in place.
    """
    from vllm.config import set_current_vllm_config

    runner = worker.model_runner
    with torch.no_grad(), set_current_vllm_config(worker.vllm_config):
        runner.reload_weights(weights_iterator=weights)
    if on_cpu:
        pack_embeddings(runner.get_model())


def pack_embeddings(model: torch.nn.Module) -> None:
    """Repack embedding and head. For a head that is tied to the embedding, vLLM would keep the old packed copy."""
    from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm
    from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

    for module in model.modules():
        if isinstance(module, VocabParallelEmbedding):
            dispatch_cpu_unquantized_gemm(module, remove_weight=False)


def sizes(config: Any) -> dict[str, int]:
    """The numbers of a model's configuration that determine the shapes of its weights."""
    found = config.get_text_config().to_dict()
    numbers = {key: value for key, value in found.items() if type(value) is int and not key.endswith("_token_id")}
    return numbers | {"tie_word_embeddings": int(bool(found.get("tie_word_embeddings")))}


class Worker:
    """Extra methods of a server's worker: ``vllm serve --worker-extension-cls``."""

    selfdistill_held = ""

    def selfdistill_model(self) -> dict[str, Any]:
        """The numbers of the model's configuration that determine its weights."""
        return sizes(self.vllm_config.model_config.hf_config)  # type: ignore[attr-defined]

    def selfdistill_version(self) -> str:
        """Version of the weights: ``""`` at first and during replacement, then marked until confirmed."""
        return self.selfdistill_held

    def selfdistill_load(self, folder: str, version: str) -> None:
        """Replace all weights with those in a newly written folder.

        Raises:
            FileNotFoundError: the folder has no weights or cannot be read; nothing has been changed.
        """
        try:
            found, why = any(name.endswith(".safetensors") for name in os.listdir(folder)), "no file"
        except OSError as error:
            found, why = False, str(error.strerror)
        if not found:
            raise FileNotFoundError(
                f"finds no weights in {folder} ({why}); give an engine_folder that the server can also read"
            )
        self.selfdistill_held = ""
        self.reload_weights(weights_path=folder)  # type: ignore[attr-defined]
        if self.vllm_config.device_config.device_type == "cpu":  # type: ignore[attr-defined]
            pack_embeddings(self.model_runner.get_model())  # type: ignore[attr-defined]
        self.selfdistill_held = _UNCONFIRMED + version

    def selfdistill_confirm(self, version: str) -> str:
        """Record that nothing from older weights is cached any more; returns the version of the weights.

        If another run has replaced the weights since they were loaded, the version differs or is marked.
        """
        if self.selfdistill_held == _UNCONFIRMED + version:
            self.selfdistill_held = version
        return self.selfdistill_held
