"""How fast a device computes and reads its memory, from a data sheet or measured on this machine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from selfdistill.runtime import GPUS, clock

SHARE_OF_PRODUCTS, SHARE_OF_BANDWIDTH = 0.4, 0.7
"""The share of a data sheet's rates that training reaches in practice. Estimates, not measured here."""
READING_SHARES = {"cpu": 1 / 3}
"""The share of a copy's measured rate that products with few rows reach when reading weights (docs/performance.md)."""
GPU_READING_SHARE = 0.8
"""The same on other devices; an estimate."""
LAYER_SECONDS = 0.5e-3
"""Seconds per layer that a pass of a few tokens takes to start its operations, besides products and reading."""
ADAPTER_SECONDS = 0.5e-3
"""The same in addition for an adapter's operations, on a GPU. An estimate from the number of kernels, not measured."""
MEASURED_SECONDS = 0.5
"""Seconds of each of the two measurements."""


@dataclass(frozen=True)
class Rates:
    """The rates that a device reaches."""

    name: str
    """The device, and the source of the rates."""
    products: float
    """FLOP per second of matrix products in the run's arithmetic."""
    bandwidth: float
    """Bytes per second of its memory, to update weights."""
    reading: float
    """Bytes per second at which products with few rows read weights."""
    layer_seconds: float = LAYER_SECONDS
    """Seconds per layer of a pass of a few tokens, in addition."""


def named_rates(name: str, mixed_precision: str) -> Rates:
    """The rates of a GPU.

    Args:
        name: a key of ``GPUS``.
        mixed_precision: ``bf16`` or ``no``.
    """
    gpu = GPUS[name]
    tflops = gpu.bfloat16_tflops if mixed_precision == "bf16" else gpu.float32_tflops
    text = f"{name} at {SHARE_OF_PRODUCTS:.0%} of {tflops:g} TFLOP/s and {SHARE_OF_BANDWIDTH:.0%} of "
    text += f"{gpu.bandwidth_gbs:g} GB/s"
    bandwidth = SHARE_OF_BANDWIDTH * gpu.bandwidth_gbs * 1e9
    return Rates(text, SHARE_OF_PRODUCTS * tflops * 1e12, bandwidth, reading=bandwidth)


def measured_rates(device: torch.device, mixed_precision: str) -> Rates:
    """The rates of this machine's device, measured in a second with a matrix product and a copy."""
    is_cpu = device.type == "cpu"
    size, length = (1024, 2**26) if is_cpu else (8192, 2**30)
    factor = torch.ones(size, size, device=device, dtype=torch.bfloat16 if mixed_precision == "bf16" else torch.float32)
    source = torch.ones(length, device=device, dtype=torch.uint8)
    target = torch.zeros_like(source)
    products = 2 * size**3 / _least_seconds(lambda: factor @ factor, device)
    bandwidth = 2 * length / _least_seconds(lambda: target.copy_(source), device)  # reads and writes
    text = f"this {device.type}, measured: {products / 1e12:.2f} TFLOP/s and {bandwidth / 1e9:.0f} GB/s"
    return Rates(text, products, bandwidth, reading=bandwidth * READING_SHARES.get(device.type, GPU_READING_SHARE))


def _least_seconds(work: Callable[[], object], device: torch.device) -> float:
    """The shortest time of a task, repeated for ``MEASURED_SECONDS``; other processes only add to it."""
    least, began = float("inf"), clock(device)
    while (start := clock(device)) - began < MEASURED_SECONDS or least == float("inf"):
        work()
        least = min(least, clock(device) - start)
    return least
