"""AdamW on bfloat16 weights and with 8-bit moments, against PyTorch's own in float32."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from selfdistill.errors import UserError
from selfdistill.model import make_optimizer, moment_bytes, optimizer
from selfdistill.model.optimizer import BLOCK, round_stochastically_

Optimizer = torch.optim.Optimizer


def weights(dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    """A matrix whose moments may have 8 bits, and a vector that is too short for it, with bfloat16 values."""
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(*shape, generator=generator) * 0.02 for shape in ((96, 100), (100,))]
    return [nn.Parameter(value.bfloat16().to(dtype)) for value in values]


def stepped(optimizer: Optimizer, parameters: list[nn.Parameter], steps: range, rate: float = 1e-3) -> list[Tensor]:
    """The weights after steps whose gradients have a common direction and noise."""
    for step in steps:
        generator = torch.Generator().manual_seed(1 + step)
        optimizer.param_groups[0]["lr"] = rate
        for number, parameter in enumerate(parameters):
            noise = torch.randn(parameter.shape, generator=generator)
            common = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(100 + number))
            parameter.grad = (common + noise).to(parameter.dtype)
        optimizer.step()
    return [parameter.detach().clone() for parameter in parameters]


def moved(dtype: torch.dtype, make: Callable[[list[nn.Parameter]], Optimizer], **options: Any) -> Tensor:
    """How far 50 steps move the matrix."""
    parameters = weights(dtype)
    return stepped(make(parameters), parameters, range(50), **options)[0].float() - weights()[0].detach()


def rounding(parameters: list[nn.Parameter], **options: Any) -> Optimizer:
    return make_optimizer(parameters, **{"optim": "adamw_torch", "seed": 0, "weight_decay": 0.0} | options)


def plain(parameters: list[nn.Parameter]) -> Optimizer:
    return torch.optim.AdamW(parameters, weight_decay=0.0)


@pytest.fixture
def in_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    """The matrix is updated in ten slices, the last of which is shorter, as large ones are."""
    monkeypatch.setattr(optimizer, "SLICE", 4 * BLOCK)


def test_stochastic_rounding_is_right_on_average_and_takes_neighbours() -> None:
    x = torch.randn(1000, generator=torch.Generator().manual_seed(0)) * torch.logspace(-6, 6, 1000)
    generator, draws = torch.Generator().manual_seed(1), 4000
    below = (x.view(torch.int32) & -(2**16)).view(torch.float32)  # nearer to 0
    gap = ((below.view(torch.int32) + 2**16).view(torch.float32) - below).abs()
    total = torch.zeros(1000, dtype=torch.float64)
    for _ in range(draws):
        rounded = round_stochastically_(x.clone(), generator)
        assert torch.equal(rounded.bfloat16().float(), rounded)
        assert bool(((rounded == below) | ((rounded - below).abs() == gap)).all())
        total += rounded.double()
    share = ((x - below).abs() / gap).double()  # the probability of the one farther from 0
    error = (total / draws - x.double()) / gap.double() / (share * (1 - share) / draws).sqrt()
    assert float(error.square().mean()) == pytest.approx(1.0, abs=0.15)  # standard errors
    assert abs(float(error.mean())) < 4 / 1000**0.5


def test_rounding_keeps_what_bfloat16_has_and_what_is_no_number() -> None:
    x = torch.tensor([0.0, -0.0, 1.0, -0.5, float("inf"), float("-inf")])
    assert torch.equal(round_stochastically_(x.clone(), torch.Generator().manual_seed(0)), x)
    assert bool(round_stochastically_(torch.tensor([float("nan")]), torch.Generator().manual_seed(0)).isnan())


@pytest.mark.usefixtures("in_slices")
def test_without_stochastic_rounding_bfloat16_hardly_moves() -> None:
    expected = moved(torch.float32, plain, rate=1e-5)

    def along(found: Tensor) -> float:
        """What of the expected move was made."""
        return float((found * expected).sum() / expected.square().sum())

    assert along(moved(torch.bfloat16, plain, rate=1e-5)) < 0.2
    assert along(moved(torch.bfloat16, rounding, rate=1e-5)) == pytest.approx(1.0, abs=0.03)


@pytest.mark.usefixtures("in_slices")
def test_the_step_in_float32_is_that_of_pytorch() -> None:
    """Weights in both types together, so that PyTorch's own is not taken."""
    expected, found = weights(), [*weights(), nn.Parameter(torch.ones(3, dtype=torch.bfloat16))]
    ends = stepped(torch.optim.AdamW(expected, weight_decay=0.1), expected, range(5))
    own = stepped(rounding(found, weight_decay=0.1), found, range(5))
    for one, two in zip(ends, own[:2], strict=True):
        assert torch.allclose(one, two, rtol=1e-6, atol=1e-8)
    assert type(rounding(weights())) is torch.optim.AdamW


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_8bit"])
def test_noise_follows_from_seed_and_step(optim: str) -> None:
    if optim == "adamw_8bit":
        pytest.importorskip("bitsandbytes")

    def ends(seed: int, **options: Any) -> list[Tensor]:
        parameters = weights(torch.bfloat16)
        return stepped(rounding(parameters, optim=optim, seed=seed), parameters, range(3))

    torch.manual_seed(5)  # is not used
    first = ends(0)
    torch.manual_seed(6)
    assert all(map(torch.equal, first, ends(0)))
    assert not torch.equal(first[0], ends(1)[0])


@pytest.mark.usefixtures("in_slices")
def test_moments_in_8_bits_step_like_those_in_float32() -> None:
    pytest.importorskip("bitsandbytes")
    expected = moved(torch.float32, plain)
    found = moved(torch.float32, lambda parameters: rounding(parameters, optim="adamw_8bit"))
    assert float((found - expected).norm() / expected.norm()) < 0.05


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_8bit"])
def test_moments_have_the_bytes_that_are_planned(optim: Any, dtype: torch.dtype) -> None:
    if optim == "adamw_8bit":
        pytest.importorskip("bitsandbytes")
    parameters = weights(dtype)
    optimizer = rounding(parameters, optim=optim)
    stepped(optimizer, parameters, range(1))
    held = [t for p in parameters for name, t in optimizer.state[p].items() if name != "step"]
    assert sum(t.nbytes for t in held) == moment_bytes(parameters, optim)


def test_a_missing_library_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(UserError, match=r"^setting 'optim': adamw_8bit needs bitsandbytes"):
        make_optimizer(weights(), "adamw_8bit", seed=0, weight_decay=0.0)


@pytest.mark.parametrize(
    "use",
    [
        "add_lora(load_model({!r}), 2, None, 0)",
        pytest.param("import_bitsandbytes('it').optim.AdamW8bit", marks=pytest.mark.slow),
    ],
)
def test_the_library_fetches_no_code(use: str, model_folder: Callable[..., Path], tmp_path: Path) -> None:
    """On some CPUs it asks the package kernels for code from the model hub while it is imported, also by PEFT."""
    pytest.importorskip("bitsandbytes")
    (tmp_path / "kernels.py").write_text("raise SystemExit('fetched')\n", encoding="utf-8")
    code = (
        "import sys\n"
        "from selfdistill.model.quantisation import import_bitsandbytes\n"
        "from selfdistill.model import add_lora, load_model\n"
        f"sys.path.append({str(tmp_path)!r})\n"
        f"{use.format(str(model_folder()))}\n"
        "assert 'bitsandbytes' in sys.modules\n"
        "assert 'kernels' not in sys.modules\n"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
    assert "kernels" not in found.stderr
