"""GPUs as their vendor's data sheets describe them, to plan runs on them."""

from __future__ import annotations

import re
from dataclasses import dataclass

from selfdistill.errors import UserError, closest
from selfdistill.runtime.resources import size_in_bytes

THIS = "this"
"""Stands for the device of this machine, in place of a GPU's name."""


@dataclass(frozen=True)
class Gpu:
    """A GPU's data sheet."""

    memory_gb: float
    """Memory, in 10^9 bytes."""
    bfloat16_tflops: float
    """Dense matrix products accumulated in float32, in 10^12 operations per second."""
    float32_tflops: float
    """The same with float32 inputs, without TF32."""
    bandwidth_gbs: float
    """Memory bandwidth, in 10^9 bytes per second."""


GPUS = {
    "h200": Gpu(141, 989, 67, 4800),
    "h100": Gpu(80, 989, 67, 3350),
    "h100-pcie": Gpu(80, 756, 51, 2000),
    "a100-80": Gpu(80, 312, 19.5, 2039),
    "a100-40": Gpu(40, 312, 19.5, 1555),
    "l40s": Gpu(48, 362, 91.6, 864),
    "l4": Gpu(24, 121, 30.3, 300),
    "a10": Gpu(24, 125, 31.2, 600),
    "rtx4090": Gpu(24, 165, 82.6, 1008),
    "rtx3090": Gpu(24, 71, 35.6, 936),
}
"""From NVIDIA's data sheets and, for GeForce, the white papers on the Ada and GA102 architectures. Rates published only
with sparsity are halved. ``h100``, ``h200`` and ``a100`` are the SXM modules."""


def check_device(name: str) -> None:
    """Check that the package can plan for a device of this name.

    Raises:
        UserError: the name is unknown.
    """
    known = [THIS, *GPUS]
    if name not in known:
        raise UserError(f"setting 'device': found {name!r}, expected {', '.join(known)}{closest(name, known)}")


def planned_devices(memory: str | None, device: str | None) -> tuple[int | None, str | None, int | None]:
    """Memory of each device in bytes, its name and the number of devices, as the options of a plan give them.

    Either may begin with the number: ``8x80GiB``, ``8xh100``.

    Raises:
        UserError: one of them is invalid, or they have different numbers.
    """
    counts = set()
    sizes_and_names = []
    for text in (memory, device):
        found = re.fullmatch(r"([1-9]\d*) ?x ?(.+)", text or "")
        counts |= {int(found[1])} if found else set()
        sizes_and_names.append(found[2] if found else text)
    size, name = sizes_and_names
    if len(counts) > 1:
        raise UserError(f"settings 'memory' and 'device': found {memory!r} and {device!r}; give one number of devices")
    if name is not None:
        check_device(name)
    if name == THIS and counts:
        raise UserError(f"setting 'device': {THIS!r} is a single device; for several name a GPU, such as 8xh100")
    return None if size is None else size_in_bytes(size), name, next(iter(counts), None)
