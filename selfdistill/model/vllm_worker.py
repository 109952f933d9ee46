"""What runs in vLLM's worker: put the weights of another model into its own."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor


def put_weights(worker: Any, weights: Iterator[tuple[str, Tensor]], on_cpu: bool) -> None:
    """Replace all weights of the engine; runs in its worker.

    vLLM loads layer by layer, packs again what it packs for its kernels, and copies the result to where it was.
    """
    from vllm.config import set_current_vllm_config

    runner = worker.model_runner
    with torch.no_grad(), set_current_vllm_config(worker.vllm_config):
        runner.reload_weights(weights_iterator=weights)
    if on_cpu:
        pack_embeddings(runner.get_model())


def pack_embeddings(model: torch.nn.Module) -> None:
    """Pack embedding and head again. Of a head that is tied to the embedding vLLM keeps the packed copy as it was."""
    from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm
    from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

    for module in model.modules():
        if isinstance(module, VocabParallelEmbedding):
            dispatch_cpu_unquantized_gemm(module, remove_weight=False)
