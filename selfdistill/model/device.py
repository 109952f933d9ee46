"""What differs between kinds of device: all that the model's passes decide by it.

A kind is what PyTorch calls a device's type, such as ``cuda`` or ``cpu``. The numbers for GPUs are estimates: none was
measured on one (``make gpu`` will).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

PASS_TOKENS = {"cpu": 64, "cuda": 512}
"""Tokens that take about as long as one extra forward pass: what a shared prefix must save. Other kinds are as CPUs."""


def pass_tokens(kind: str) -> int:
    """What a shared prefix must save on a device of this kind, in tokens."""
    return PASS_TOKENS.get(kind, PASS_TOKENS["cpu"])


@contextmanager
def any_length(kind: str) -> Iterator[None]:
    """Use no attention kernel that is slow at first with every new length: for passes of ever other lengths.

    cuDNN plans its kernels anew for each batch size and length, in about 25 ms, and decoding has a new length at every
    token. CPUs have no cuDNN.
    """
    if kind != "cuda":
        yield
        return
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)
