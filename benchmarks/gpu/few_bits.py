"""Checks of bitsandbytes on the device: moments of 8 bits, and weights of 4 bits. Without it they are not run."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from bench import Bench, Check, Found
from exactness import compare, completions_of, gradient, step_settings
from models import accelerate_on, make_trainer, needs_bitsandbytes
from torch import Tensor, nn

from selfdistill.model import Optim
from selfdistill.model.four_bits import dequantised
from selfdistill.model.optimizer import make_optimizer

RATE, STEPS = 1e-4, 3


def check_eight_bits(bench: Bench, found: Found) -> None:
    """Steps with moments of 8 bits, here and on the CPU, against steps with moments in float32.

    The length of a weight is no multiple of a block, and that of the largest more than the optimizer updates at a time.
    """
    needs_bitsandbytes()
    lengths = (4099, 2**22 + 300) if bench.cuda else (4099, 2**14)
    expected = moved("cpu", "adamw_torch", torch.float32, lengths)
    for name, device, dtype in (
        ("here", bench.device, torch.float32),
        ("on the CPU", "cpu", torch.float32),
        ("here, of bfloat16 weights", bench.device, torch.bfloat16),
    ):
        own = moved(device, "adamw_8bit", dtype, lengths)
        share = float(own @ expected / (expected @ expected))
        found.add(f"{name}: share of the steps of float32", share, at_least=0.98, at_most=1.02)
        if dtype == torch.float32:
            found.add(f"{name}: relative difference", float((own - expected).norm() / expected.norm()), at_most=0.05)


def moved(device: str, optim: Optim, dtype: torch.dtype, lengths: Sequence[int]) -> Tensor:
    """How far some steps move weights, on the CPU; the same gradients on every device."""
    generator = torch.Generator().manual_seed(0)
    begun = [torch.randn(length, generator=generator).mul(0.02).bfloat16().float() for length in lengths]
    parameters = [nn.Parameter(weight.to(device, dtype, copy=True)) for weight in begun]
    optimizer = make_optimizer(parameters, optim, seed=0, weight_decay=0.0)
    optimizer.param_groups[0]["lr"] = RATE
    for _ in range(STEPS):
        for parameter in parameters:
            noise = torch.randn(parameter.shape, generator=generator).bfloat16()
            parameter.grad = noise.to(device, dtype)
        optimizer.step()
    return torch.cat([(p.detach().float().cpu() - w) for p, w in zip(parameters, begun, strict=True)])


def check_four_bits(bench: Bench, found: Found) -> None:
    """An adapter on weights of 4 bits: the rounded weights, and a step in float32, on the CPU and here."""
    needs_bitsandbytes()
    config = step_settings(bench, "four", lora_rank=8, teacher="frozen", load_in_4bit=True)
    with accelerate_on("cpu"):
        on_cpu = make_trainer(config)
        completions = completions_of(on_cpu, 0)
        reference = gradient(on_cpu, completions)
    on_device = make_trainer(config)
    weights, others = dequantised(on_device.loaded.model), dequantised(on_cpu.loaded.model)
    same = [rounded_alike(weights[name].cpu(), others[name]) for name in others]
    found.add("weights that are rounded alike", min(same), at_least=0.999)
    compare(found, "4 bits", gradient(on_device, completions), reference, loss=1e-3, gradient=1e-2)


def rounded_alike(own: Tensor, other: Tensor) -> float:
    """The share of dequantised weights that have the same code and scale, up to the last bits of the scales.

    They need not be equal, for a scale has the mean of all scales in it, which a GPU sums in another order.
    """
    return float(((own - other).abs() <= 1e-5 * other.abs()).float().mean())


CHECKS = (
    Check("8 bits", "steps with moments of 8 bits against float32", 30, check_eight_bits),
    Check("4 bits", "a step on weights of 4 bits on the CPU and here", 45, check_four_bits),
)
