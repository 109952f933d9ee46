"""Free disk space and memory."""

from __future__ import annotations

import ctypes
import re
import resource
import shutil
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from selfdistill.errors import UserError

if TYPE_CHECKING:  # importing torch takes a second
    import torch


def free_bytes(path: Path) -> int:
    """Free disk space in bytes where ``path`` is or will be."""
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


def free_memory(device: torch.device) -> int | None:
    """Free bytes on the device, or None if unknown.

    With CUDA, memory that PyTorch has cached counts as free. On the CPU, glibc first returns the memory of freed
    tensors to the system, and a cgroup's limit applies.
    """
    if device.type == "cuda":
        import torch

        own = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + own
    if device.type != "cpu":
        return None
    if sys.platform == "linux" and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)):
        trim(0)
    free = int(psutil.virtual_memory().available)
    group = Path("/sys/fs/cgroup")
    if (group / "memory.max").exists() and (most := (group / "memory.max").read_text().strip()).isdecimal():
        held = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        files = int(held["inactive_file"]) + int(held["active_file"])  # page cache, reclaimed when needed
        free = min(free, int(most) - int((group / "memory.current").read_text()) + files)
    return free


def clock(device: torch.device) -> float:
    """Seconds on a monotonic clock, read after the device has finished all queued work."""
    if device.type == "cuda":
        import torch

        torch.cuda.synchronize(device)
    return time.monotonic()


def peak_memory(device: torch.device) -> int:
    """Peak bytes so far: allocated on the device with CUDA, else resident in the process."""
    if device.type == "cuda":
        import torch

        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def size_in_bytes(text: str) -> int:
    """Bytes of a size such as ``80GiB`` or ``80GB``.

    Raises:
        UserError: the text is not a size.
    """
    found = re.fullmatch(r"([\d.]+) ?([MGT])(i?)B", text.strip())
    try:
        assert found is not None
        return int(float(found[1]) * (1024 if found[3] else 1000) ** (" MGT".index(found[2]) + 1))
    except (AssertionError, ValueError):
        raise UserError(f"setting 'memory': found {text!r}, expected a size such as 80GiB or 80GB") from None
