"""Free memory and peaks of it, and the clock of what a device does."""

from __future__ import annotations

import resource
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from selfdistill.runtime import allow_open_files, begin_peak, clock, peak_memory
from selfdistill.runtime.resources import cgroup_memory


@pytest.mark.parametrize(("device", "waited"), [("cuda:1", ["cuda:1"]), ("cpu", [])])
def test_the_clock_waits_for_the_gpu_that_it_times(
    monkeypatch: pytest.MonkeyPatch, device: str, waited: list[str]
) -> None:
    waits: list[str] = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: waits.append(str(device)))
    before = time.monotonic()
    assert before <= clock(torch.device(device)) <= time.monotonic()
    assert waits == waited


def test_the_limit_of_open_files_is_raised_as_far_as_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    limits, kind = {}, resource.RLIMIT_NOFILE
    monkeypatch.setattr(resource, "getrlimit", limits.get)
    monkeypatch.setattr(resource, "setrlimit", limits.__setitem__)
    unlimited = resource.RLIM_INFINITY
    for before, after in (
        ((1024, 524288), (10240, 524288)),
        ((1024, 4096), (4096, 4096)),
        ((256, unlimited), (10240, unlimited)),
        ((65536, 524288), (65536, 524288)),
        ((unlimited, unlimited), (unlimited, unlimited)),
    ):
        limits[kind] = before
        allow_open_files()
        assert limits[kind] == after


FILES = {1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_"), 2: ("memory.max", "memory.current", "")}


def make_group(folder: Path, version: int, limit: str, used: int, cache: tuple[int, int] = (0, 0)) -> None:
    """Write the files of a cgroup as the kernel shows them."""
    most, held, total = FILES[version]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / most).write_text(f"{limit}\n")
    (folder / held).write_text(f"{used}\n")
    inactive, active = cache
    counts = f"anon 1\ninactive_file 0\nactive_file 0\n{total}inactive_file {inactive}\n{total}active_file {active}\n"
    (folder / "memory.stat").write_text(counts)


@pytest.mark.parametrize("version", [1, 2])
def test_the_limits_of_all_cgroups_of_a_process_apply(tmp_path: Path, version: int) -> None:
    root = tmp_path / "memory" if version == 1 else tmp_path
    job = root / "slurm" / "job_7"
    make_group(job / "step_0", version, "9223372036854771712" if version == 1 else "max", 100)
    make_group(job, version, "1000", 700, cache=(150, 50))
    make_group(root / "slurm", version, "5000", 1000)
    make_group(root / "slurm" / "job_8", version, "10", 0)
    groups = tmp_path / "groups"
    lines = ["3:cpu,cpuacct:/other", "2:memory:/slurm/job_7/step_0", "0::/"]
    groups.write_text("\n".join(lines if version == 1 else ["0::/slurm/job_7/step_0"]) + "\n")
    assert min(cgroup_memory(groups, tmp_path)) == 500
    groups.write_text("4:memory:/docker/name\n0::/docker/name\n")  # of the host: the container sees its own as root
    assert cgroup_memory(groups, tmp_path) == []
    make_group(root, version, "300", 100)
    assert cgroup_memory(groups, tmp_path) == [200]


def test_without_cgroups_there_are_no_limits(tmp_path: Path) -> None:
    assert cgroup_memory(tmp_path / "none", tmp_path) == []


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux counts anew")
def test_a_peak_is_counted_anew() -> None:
    cpu = torch.device("cpu")
    begin_peak(cpu)
    before = peak_memory(cpu)
    held = torch.ones(2**26)
    with_it = peak_memory(cpu)
    del held
    begin_peak(cpu)
    assert with_it - before > 2**27
    assert peak_memory(cpu) < with_it - 2**27


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere nothing else is known")
def test_a_peak_is_not_that_of_the_process_that_started_this_one() -> None:
    asked = (
        "from types import SimpleNamespace; from selfdistill.runtime import peak_memory; "
        "print(peak_memory(SimpleNamespace(type='cpu')))"
    )
    held = torch.ones(2**27)
    said = subprocess.run([sys.executable, "-c", asked], capture_output=True, text=True, check=True).stdout
    assert int(said) < held.nbytes
