"""What the machine can do: matrix products and memory, the two limits beside which a step is judged."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor


def best_seconds(run: Callable[[], object], repeats: int = 7) -> float:
    """The fastest of several: a limit is what is possible."""
    run()
    seconds = []
    for _ in range(repeats):
        began = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - began)
    return min(seconds)


def product_rate(dtype: torch.dtype, rows: int = 1024) -> float:
    """Floating-point operations a second of (rows, 576) x (576, 1536), the feed-forward shape of the starter model.

    Thirty weights in turn, as a model has them, so that none stays in the cache.
    """
    left = torch.randn(rows, 576).to(dtype)
    rights = [torch.randn(1536, 576).to(dtype) for _ in range(30)]

    def run() -> list[Tensor]:
        return [torch.nn.functional.linear(left, right) for right in rights]

    return 30 * 2 * rows * 576 * 1536 / best_seconds(run)


def bandwidth() -> float:
    """Bytes a second that a copy of 512 MiB reads and writes."""
    source, target = torch.ones(2**27), torch.zeros(2**27)
    return 2 * source.numel() * 4 / best_seconds(lambda: target.copy_(source))


def main() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        rates = ", ".join(f"{product_rate(dtype, rows) / 1e9:.0f} with {rows} rows" for rows in (16, 128, 1024))
        print(f"matrix products in {str(dtype).removeprefix('torch.')}, GFLOP/s: {rates}")
    print(f"memory, GB/s read and written by a copy: {bandwidth() / 1e9:.1f}")


if __name__ == "__main__":
    main()
