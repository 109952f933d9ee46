"""Restore the process after using a library that changes it."""

from __future__ import annotations

import gc
import os
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch


@contextmanager
def unchanged_process(environment: Mapping[str, str]) -> Iterator[None]:
    """Run with these environment variables; afterwards restore the state that a library may change.

    That is the environment (child processes would inherit it), the random states of Python, NumPy and PyTorch, the
    number of threads and the function that sets it, the precision of matrix products, and objects frozen for the
    garbage collector. Process groups of ``torch.distributed`` that the library made stay, because it still uses them.
    """
    before, python, numpy, cpu = dict(os.environ), random.getstate(), np.random.get_state(), torch.get_rng_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    set_threads, threads = torch.set_num_threads, torch.get_num_threads()
    products, frozen = torch.get_float32_matmul_precision(), gc.get_freeze_count()
    os.environ.update(environment)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(cpu)
        if cuda:
            torch.cuda.set_rng_state_all(cuda)
        torch.set_num_threads = set_threads
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)
        torch.set_float32_matmul_precision(products)
        if not frozen:
            gc.unfreeze()


@contextmanager
def environment_variable(name: str, value: str) -> Iterator[None]:
    """Set an environment variable, and restore it afterwards."""
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = before


@contextmanager
def spared_process_group() -> Iterator[None]:
    """Keep the default process group while a library destroys it together with its own groups."""
    destroy = torch.distributed.destroy_process_group

    def destroy_own(group: Any = None) -> None:
        if group is not None:
            destroy(group)

    torch.distributed.destroy_process_group = destroy_own
    try:
        yield
    finally:
        torch.distributed.destroy_process_group = destroy
