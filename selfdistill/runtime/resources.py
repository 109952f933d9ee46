"""Free disk space and memory."""

from __future__ import annotations

import ctypes
import gc
import re
import resource
import shutil
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from selfdistill.errors import UserError
from selfdistill.runtime.distributed import local_world_size
from selfdistill.runtime.files import existing

if TYPE_CHECKING:  # importing torch takes a second
    import torch


_OPEN_FILES = 10_240
"""Enough for thousands of sockets or event loops; macOS allows no more."""


def allow_open_files() -> None:
    """Raise this process's limit of open files as far as the system allows, to at most :data:`_OPEN_FILES`.

    The usual limit is 1,024; a process may raise its own up to the hard limit.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = _OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, _OPEN_FILES)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def free_bytes(path: Path) -> int:
    """Free disk space in bytes where ``path`` is or will be."""
    return shutil.disk_usage(existing(path)).free


def free_memory(device: torch.device) -> int | None:
    """Free bytes on the device, or None if unknown.

    With CUDA, memory that PyTorch has cached counts as free. On the CPU, glibc first returns the memory of freed
    tensors to the system, and the limits of the process's cgroups apply.
    """
    if device.type == "cuda":
        import torch

        own = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + own
    if device.type != "cpu":
        return None
    _trim()
    free = int(psutil.virtual_memory().available)
    return min([free, *cgroup_memory()])


def _trim() -> None:
    """Return the memory of freed tensors to the system, where the C library is glibc."""
    if sys.platform == "linux" and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)):
        trim(0)


def own_memory(device: torch.device) -> int | None:
    """Of the device's free bytes those for this process: its processes share a machine's memory, and none shares a GPU.

    None if they are unknown.
    """
    free = free_memory(device)
    return free if free is None or device.type != "cpu" else free // local_world_size()


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that a device or the machine has too little memory."""
    return isinstance(error, MemoryError) or bool(
        re.search("out of memory|allocate memory|STATUS_ALLOC_FAILED", str(error))
    )


_VERSION_1 = "memory.limit_in_bytes", "memory.usage_in_bytes", "total_"
_VERSION_2 = "memory.max", "memory.current", ""
"""Files with the limit and the use of a cgroup, and what counts that include its children begin with."""


def cgroup_memory(groups: Path = Path("/proc/self/cgroup"), mount: Path = Path("/sys/fs/cgroup")) -> list[int]:
    """Free bytes in each cgroup with a limit that this process is in, of version 1 or 2.

    A limit applies to a cgroup's children, too. In a container the process's own cgroup may be the root of ``mount``.

    Args:
        groups: file that names the process's cgroups.
        mount: where they are mounted.
    """
    found = []
    for line in groups.read_text().splitlines() if groups.exists() else []:
        _, controllers, path = line.split(":", 2)
        if not controllers:
            root, files = mount, _VERSION_2
        elif "memory" in controllers.split(","):
            root, files = mount / "memory", _VERSION_1
        else:
            continue
        own = root / path.lstrip("/")
        found += [_free_in(group, *files) for group in (own, *own.parents) if group.is_relative_to(root)]
    return [free for free in found if free is not None]


def _free_in(group: Path, most: str, held: str, total: str) -> int | None:
    """Free bytes in a cgroup, where page cache counts as free; None without a limit, or if a file is missing."""
    try:
        limit, used = (group / most).read_text().strip(), int((group / held).read_text())
        counts = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        cache = int(counts[f"{total}inactive_file"]) + int(counts[f"{total}active_file"])
    except (OSError, KeyError):
        return None
    return int(limit) - used + cache if limit.isdecimal() else None  # or "max"


def clock(device: torch.device) -> float:
    """Seconds on a monotonic clock, read after the device has finished all queued work."""
    if device.type == "cuda":
        import torch

        torch.cuda.synchronize(device)
    return time.monotonic()


def begin_peak(device: torch.device) -> None:
    """Let :func:`peak_memory` count from here. On CPUs only Linux can; elsewhere this does nothing.

    Raises:
        OSError: this Linux does not allow it.
    """
    if device.type == "cuda":
        import torch

        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    elif sys.platform == "linux":
        gc.collect()
        _trim()  # else memory that was freed would count
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # sets VmHWM to the present size


def peak_memory(device: torch.device) -> int:
    """Peak bytes so far: allocated on the device with CUDA, else resident in the process.

    Linux's ``ru_maxrss`` cannot be reset, and begins with the peak of the process that started this one.
    """
    if device.type == "cuda":
        import torch

        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.exists() and (peak := re.search(r"^VmHWM:\s+(\d+) kB$", status.read_text(), re.MULTILINE)):
        return int(peak[1]) * 1024
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
        raise UserError(f"setting 'memory': found {text!r}, expected a size such as 80GiB, 80GB or 8x80GiB") from None
