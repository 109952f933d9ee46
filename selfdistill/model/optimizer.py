"""AdamW for weights in float32 or bfloat16, with moments in float32 or in 8 bits.

    m <- b1 m + (1 - b1) g
    v <- b2 v + (1 - b2) g^2
    w <- w - r d w - r m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps)

with gradient g, learning rate r, weight decay d and step t, in float32 (arXiv 1711.05101).

A step is about as large as the learning rate, 1e-5, but neighbouring bfloat16 numbers near 0.01 are 6e-5 apart. So
rounding to nearest would undo most steps. Stochastic rounding rounds up with the probability that makes the result
unbiased (arXiv 2010.06192). Its random numbers depend on seed, step and weight: they are the same on all ranks, and
after resuming.

8-bit moments are bitsandbytes': blocks of 256 numbers, each with its largest magnitude (arXiv 2110.02861).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from selfdistill.model.fsdp import local_tensor
from selfdistill.model.quantisation import import_bitsandbytes
from selfdistill.model.sampling import sample_seed

BETAS, EPS = (0.9, 0.999), 1e-8
BLOCK = 256
"""Numbers of 8-bit moments that share a scale; fixed in bitsandbytes."""
LEAST_QUANTISED = 4096
"""Smaller weights, such as norms, have float32 moments, as in bitsandbytes."""
SLICE = 2**22
"""Numbers updated at a time, which limits the float32 copies."""

Optim = Literal["adamw_torch", "adamw_8bit"]


def make_optimizer(
    parameters: Iterable[nn.Parameter], optim: Optim, *, seed: int, weight_decay: float
) -> torch.optim.Optimizer:
    """An AdamW for these parameters, with a learning rate of 0.

    Args:
        parameters: the weights to update, in float32 or bfloat16.
        optim: ``adamw_torch`` (moments in float32) or ``adamw_8bit``.
        seed: seed of stochastic rounding.
        weight_decay: each step shrinks weights by the learning rate times this.

    Raises:
        UserError: bitsandbytes is not installed.
    """
    parameters = list(parameters)
    if optim == "adamw_torch" and all(p.dtype == torch.float32 for p in parameters):
        return torch.optim.AdamW(parameters, 0.0, BETAS, EPS, weight_decay, fused=True)
    return RoundingAdamW(parameters, optim, seed=seed, weight_decay=weight_decay)


def moment_bytes(parameters: Iterable[Tensor], optim: Optim) -> int:
    """Bytes of both moments of the parameters."""
    return sum(2 * (n + 4 * _blocks(n) if _is_quantised(n, optim) else 4 * n) for n in (p.numel() for p in parameters))


class RoundingAdamW(torch.optim.Optimizer):
    """AdamW that rounds bfloat16 weights stochastically; arguments and errors as for :func:`make_optimizer`."""

    def __init__(self, parameters: Iterable[nn.Parameter], optim: Optim, *, seed: int, weight_decay: float) -> None:
        super().__init__(parameters, {"lr": 0.0, "weight_decay": weight_decay})
        self._optim, self._seed = optim, seed
        self._library = import_bitsandbytes("setting 'optim': adamw_8bit") if optim == "adamw_8bit" else None
        self._maps: dict[torch.device, tuple[Tensor, Tensor]] = {}  # values of the 8-bit codes of m and v

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        assert closure is None
        pairs = [(group, parameter) for group in self.param_groups for parameter in group["params"]]
        for number, (group, parameter) in enumerate(pairs):
            if parameter.grad is not None:
                self._step(number, parameter, parameter.grad, group["lr"], group["weight_decay"])

    def _step(self, number: int, parameter: Tensor, gradient: Tensor, rate: float, decay: float) -> None:
        state = self.state[parameter]
        if not state:
            state |= self._new_state(parameter)
        state["step"] = state["step"].cpu() + 1
        step = int(state["step"])
        weight, gradient = local_tensor(parameter).view(-1), local_tensor(gradient).reshape(-1)
        generator = torch.Generator(weight.device).manual_seed(sample_seed(self._seed, step, number, 0))
        for start in range(0, weight.numel(), SLICE):
            own = slice(start, min(start + SLICE, weight.numel()))
            new = weight[own].float()  # float32 weights themselves, or a copy
            new.mul_(1 - rate * decay)
            self._update(new, gradient[own].float(), state, own, rate, step)
            if weight.dtype == torch.bfloat16:
                weight[own].copy_(round_stochastically_(new, generator))

    def _new_state(self, parameter: Tensor) -> dict[str, Tensor]:
        quantised = _is_quantised(parameter.numel(), self._optim)
        dtype = torch.uint8 if quantised else torch.float32
        state = {name: torch.zeros_like(parameter, dtype=dtype) for name in ("exp_avg", "exp_avg_sq")}
        if quantised:
            blocks = _blocks(parameter.numel())
            state |= {name: torch.zeros(blocks, device=parameter.device) for name in ("exp_avg_max", "exp_avg_sq_max")}
        return state | {"step": torch.zeros(())}

    def _update(
        self, weight: Tensor, gradient: Tensor, state: dict[str, Tensor], own: slice, rate: float, step: int
    ) -> None:
        """Update a slice of a weight, in float32, and the same slice of its moments."""
        first, second = (local_tensor(state[name]).view(-1)[own] for name in ("exp_avg", "exp_avg_sq"))
        if first.dtype == torch.float32:
            first.lerp_(gradient, 1 - BETAS[0])
            second.mul_(BETAS[1]).addcmul_(gradient, gradient, value=1 - BETAS[1])
            scale = second.sqrt().div_(math.sqrt(1 - BETAS[1] ** step)).add_(EPS)
            weight.addcdiv_(first, scale, value=-rate / (1 - BETAS[0] ** step))
            return
        assert self._library is not None
        functional, blocks = self._library.functional, slice(own.start // BLOCK, _blocks(own.stop))
        if weight.device not in self._maps:
            signed, unsigned = (functional.create_dynamic_map(signed=signed) for signed in (True, False))
            self._maps[weight.device] = signed.to(weight.device), unsigned.to(weight.device)
        functional.optimizer_update_8bit_blockwise(
            *("adam", gradient, weight, first, second, *BETAS, 0.0, 0.0, EPS, step, rate),
            *self._maps[weight.device],
            *(state[name][blocks] for name in ("exp_avg_max", "exp_avg_sq_max")),
        )


def round_stochastically_(x: Tensor, generator: torch.Generator) -> Tensor:
    """Round float32 numbers in place to bfloat16 numbers, up or down at random, so that the expected value is exact.

    A bfloat16 number is a float32 number whose last 16 bits are 0. Adding 16 random bits carries into the upper bits
    with a probability equal to the part that is then cut off.
    """
    bits = x.view(torch.int32)
    bits += torch.randint(2**16, bits.shape, generator=generator, device=bits.device, dtype=torch.int32)
    bits &= -(2**16)
    return x


def _is_quantised(count: int, optim: Optim) -> bool:
    return optim == "adamw_8bit" and count >= LEAST_QUANTISED


def _blocks(count: int) -> int:
    return -(-count // BLOCK)
