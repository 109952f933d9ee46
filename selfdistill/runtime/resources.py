"""Disk space and memory: what is free, and whether it is enough."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from selfdistill.errors import UserError

if TYPE_CHECKING:  # torch takes a second to import
    import torch


def free_bytes(path: Path) -> int:
    """Free disk space where ``path`` is or will be."""
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


def free_memory(device: torch.device) -> int | None:
    """Bytes that can still be had on a device; None where it does not say."""
    if device.type == "cuda":
        import torch

        own = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + own
    if device.type != "cpu":
        return None
    free = int(psutil.virtual_memory().available)
    group = Path("/sys/fs/cgroup")
    if (group / "memory.max").exists() and (most := (group / "memory.max").read_text().strip()).isdecimal():
        held = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        files = int(held["inactive_file"]) + int(held["active_file"])  # given back when they are needed
        free = min(free, int(most) - int((group / "memory.current").read_text()) + files)
    return free


def check_memory(needed: int, device: torch.device) -> str:
    """Refuse to start what cannot fit into memory; returns a line for the start of a run.

    ``needed`` is what is surely still to come: gradients and the optimizer's moments. Activations come on top.

    Raises:
        UserError: with both sizes.
    """
    free = free_memory(device)
    sizes = f"{needed / 2**30:.2f} GiB for gradients and moments, and activations"
    if free is None:
        return f"memory to come: {sizes}"
    if free < needed:
        raise UserError(
            f"{free / 2**30:.1f} GiB of memory are free on {device}, training needs {sizes}, beside the weights that "
            "are loaded: free some, or train an adapter (--lora_rank 16)"
        )
    return f"memory to come: {sizes}; {free / 2**30:.1f} GiB are free"


def check_disk(path: Path, needed: int) -> None:
    """Refuse to start what the disk cannot hold.

    Raises:
        UserError: with both sizes.
    """
    free = free_bytes(path)
    if free < needed:
        raise UserError(
            f"{path}: {free / 2**30:.1f} GiB free, checkpoints and final model need about {needed / 2**30:.1f} GiB; "
            "free some, or lower --save_total_limit, or --save_steps 0 for the final model only"
        )
