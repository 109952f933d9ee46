"""The script for a GPU, on a CPU: its checks run, what fails fails the whole, and what was packed is verified."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import zipfile
from collections.abc import Callable
from contextlib import nullcontext
from importlib import import_module
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "gpu"
CHECKS = """
import time
from bench import Check, NotRun

def right(bench, found):
    found.add("speed", 2.5, "m/s", at_least=2)
    found.add("word", "yes")

def wrong(bench, found):
    found.add("error", float("nan"), at_most=1e-5)

def absent(bench, found):
    raise NotRun("there is none")

def hangs(bench, found):
    found.add("begun", 1)
    time.sleep(600)

def breaks(bench, found):
    raise ValueError("first line\\nlast line")

CHECKS = [Check(f.__name__, "", 60, f) for f in (right, wrong, absent, hangs, breaks)]
"""

BITSANDBYTES = {"8 bits", "4 bits", "full on bfloat16, 8-bit moments, EMA", "QLoRA"}
"""Checks that need it."""


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    """The script with checks that need no model, and two seconds for each."""
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "checks.py").write_text(CHECKS, encoding="utf-8")
    monkeypatch.setattr(sys, "path", list(sys.path))
    spec = importlib.util.spec_from_file_location("gpu_script", SCRIPT / "__main__.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.path.insert(0, str(tmp_path / "own"))
    monkeypatch.setattr(module, "CPU_SECONDS", 2.0)
    monkeypatch.setattr(module, "LEAST_SECONDS", 0.0)
    return module


@pytest.fixture
def pack(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(SCRIPT)
    return import_module("pack")


@pytest.fixture
def packed(pack: ModuleType, tmp_path: Path) -> Path:
    """A folder as ``pack`` makes it: a wheel and half of a starter model, and its other half."""
    for number, data in ((1, b"first "), (2, b"second")):
        folder = tmp_path / "packed" / str(number)
        folder.mkdir(parents=True)
        (folder / f"starter.whl{pack.PART}{number}").write_bytes(data)
        if number == 1:
            with zipfile.ZipFile(folder / "thing.whl", "w") as wheel:
                wheel.writestr("thing.py", "VALUE = 1")
        sums = {file.name: pack.sha256(file) for file in folder.iterdir()}
        (folder / pack.MANIFEST).write_text(json.dumps(sums), encoding="utf-8")
    return tmp_path / "packed"


def started(script: ModuleType, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["gpu", "--device", "cpu", *arguments])
    code: int = script.main()
    return code


@pytest.mark.slow
def test_all_checks_pass_on_a_cpu(tmp_path: Path) -> None:
    """But those that take the starter model or half a minute to compile, or need a package that is not installed."""
    command = [sys.executable, str(SCRIPT), "--device", "cpu", "--out", str(tmp_path), "--minutes", "20"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    kept = json.loads((tmp_path / "gpu.json").read_text(encoding="utf-8"))
    assert kept["device"] == "cpu"
    assert kept["torch"]
    outcomes = {check["name"]: check["outcome"] for check in kept["checks"]}
    need: dict[str, set[str]] = {"bitsandbytes": BITSANDBYTES, "trl": {"TRL"}}
    absent = [names for package, names in need.items() if importlib.util.find_spec(package) is None]
    assert {name for name, outcome in outcomes.items() if outcome != "passed"} == {
        "rescored",
        "compile",
        "study",
    }.union(*absent)
    assert "| greedy | tokens that are those of generate | 1 (at least 1) |" in done.stdout


@pytest.mark.slow
def test_what_fails_fails_the_run_and_stops_nothing(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert started(script, monkeypatch, "--out", str(tmp_path)) == 1
    checks: dict[str, Any] = {
        check["name"]: check for check in json.loads((tmp_path / "gpu.json").read_text(encoding="utf-8"))["checks"]
    }
    assert {name: check["outcome"] for name, check in checks.items()} == {
        "right": "passed",
        "wrong": "failed",
        "absent": "not run",
        "hangs": "failed",
        "breaks": "failed",
    }
    assert checks["wrong"]["why"] == "error is nan (at most 1e-05)"
    assert checks["absent"]["why"] == "there is none"
    assert checks["hangs"]["why"] == "stopped after 2 s"
    assert checks["breaks"]["why"] == "ValueError: last line"
    assert [number["value"] for number in checks["right"]["numbers"]] == [2.5, "yes"]
    assert [number["name"] for number in checks["hangs"]["numbers"]] == ["begun"]
    said = capsys.readouterr()
    assert "| wrong | error | **fails** nan (at most 1e-05) |" in said.out
    assert said.err.splitlines()[-1] == "NOT RUN: absent: there is none"


@pytest.mark.parametrize(
    ("module", "names"),
    [("few_bits", ["8 bits", "4 bits"]), ("shape", ["full on bfloat16, 8-bit moments, EMA", "QLoRA"])],
)
def test_checks_that_need_bitsandbytes_are_not_run_without_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, module: str, names: list[str]
) -> None:
    monkeypatch.syspath_prepend(SCRIPT.parent)
    monkeypatch.syspath_prepend(SCRIPT)
    checks = {check.name: check for check in import_module(module).CHECKS}
    bench = import_module("bench")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for name in names:
        with pytest.raises(bench.NotRun, match="bitsandbytes is not installed"):
            checks[name].run(bench.Bench("cpu", tmp_path, tmp_path), None)


def test_weights_of_4_bits_may_differ_in_the_last_bits_of_their_scales(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(SCRIPT.parent)
    monkeypatch.syspath_prepend(SCRIPT)
    alike = import_module("few_bits").rounded_alike
    codes = torch.tensor([-1.0, -0.6962, 0.0, 0.0796, 1.0])
    scale = torch.tensor(0.0123)
    assert alike(codes * scale.nextafter(torch.tensor(1.0)), codes * scale) == 1
    assert alike(codes.roll(1) * scale, codes * scale) == 0
    assert alike(codes * scale * (1 + 1 / 127), codes * scale) == pytest.approx(1 / 5)  # another scale; 0 stays 0


def test_prompts_of_the_check_of_sharing_begin_alike(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.syspath_prepend(SCRIPT.parent)
    monkeypatch.syspath_prepend(SCRIPT)
    speed, bench = import_module("speed"), import_module("bench")
    numbers: list[Any] = []
    speed.check_sharing(bench.Bench("cpu", tmp_path, tmp_path), bench.Found(numbers.append))
    saved = [number for number in numbers if number.is_bounded]
    assert [number.name.partition(":")[0] for number in saved] == ["student", "teacher"]
    assert all(number.passes for number in saved)
    monkeypatch.setattr(speed, "rows", lambda *args, alike: import_module("models").rows(*args))
    apart = speed.timed_step(bench.Bench("cpu", tmp_path, tmp_path), "apart", alike=True).contexts
    assert not any(speed.shared_prefixes(contexts, 64) for contexts in apart.values())


@pytest.mark.parametrize("right", [True, False])
def test_decoding_with_graphs_must_give_the_samples_of_decoding_without(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, right: bool
) -> None:
    monkeypatch.syspath_prepend(SCRIPT.parent)
    monkeypatch.syspath_prepend(SCRIPT)
    graphs, bench = import_module("graphs"), import_module("bench")
    monkeypatch.setattr(graphs, "token_costs", lambda *_, **__: [graphs.TokenTimes(1, 1)] * 2)
    if not right:
        steps = graphs.decoding_steps.FixedSteps
        monkeypatch.setattr(steps, "__call__", lambda self, token_B, call=steps.__call__: -call(self, token_B))
    numbers: list[Any] = []
    graphs.check_graphs(bench.Bench("cpu", tmp_path, tmp_path), bench.Found(numbers.append))
    assert [number.passes for number in numbers if "share" in number.name] == [right] * 2
    assert all(number.passes for number in numbers) is right
    assert len(numbers) == 5 + 2 * 4
    assert not [number.name for number in numbers if "captured" in number.name]  # a CPU captures nothing


@pytest.mark.parametrize("captures", [True, False])
def test_no_time_is_said_to_be_of_a_capture_that_failed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, captures: bool
) -> None:
    """On a CPU that is taken for a GPU, with a PyTorch with which runs do not capture."""
    monkeypatch.syspath_prepend(SCRIPT.parent)
    monkeypatch.syspath_prepend(SCRIPT)
    graphs = import_module("graphs")
    monkeypatch.setattr(torch, "__version__", "2.11.0")
    monkeypatch.setattr(graphs, "token_costs", lambda *_, **__: [graphs.TokenTimes(1, 1)] * 2)

    def capture(run: Callable[[], Tensor], _device: torch.device) -> Callable[[], Tensor]:
        if not captures:
            raise RuntimeError("operation not permitted when stream is capturing")
        return run

    monkeypatch.setattr(graphs.decoding_steps, "captured", capture)
    numbers: list[Any] = []
    fake = SimpleNamespace(cuda=True, device="cpu", out=tmp_path, scratch=tmp_path)
    with nullcontext() if captures else pytest.raises(RuntimeError, match="was not captured"):
        graphs.check_graphs(fake, import_module("bench").Found(numbers.append))
    assert numbers[0].text().startswith("no")
    named = [number.name for number in numbers if ": a token, captured" in number.name]
    assert len(named) == (4 if captures else 0)


@pytest.mark.parametrize(
    ("device", "own", "passes"), [("cpu", 0.33001, True), ("cpu", 0.3302, False), ("cuda", 0.34, False)]
)
def test_losses_that_are_not_those_of_trl_fail(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, device: str, own: float, passes: bool
) -> None:
    monkeypatch.syspath_prepend(SCRIPT.parent)
    monkeypatch.syspath_prepend(SCRIPT)
    others, bench = import_module("others"), import_module("bench")
    result = SimpleNamespace(own_s=1.0, trl_s=2.0, own_loss=own, trl_loss=0.33)
    monkeypatch.setitem(sys.modules, "against_trl", SimpleNamespace(compare=lambda *_, **__: result))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    for name in ("small_model", "starter", "rows"):
        monkeypatch.setattr(others, name, lambda *_: "")
    numbers: list[Any] = []
    others.check_trl(bench.Bench(device, tmp_path, tmp_path), bench.Found(numbers.append))
    assert [number.passes for number in numbers if number.is_bounded] == [passes] * 2  # full and LoRA


def test_whether_results_are_right_and_memory_is_as_planned_is_checked_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(SCRIPT.parent)
    monkeypatch.syspath_prepend(SCRIPT)
    monkeypatch.delitem(sys.modules, "checks", raising=False)
    names = [check.name for check in import_module("checks").CHECKS]
    shapes = [check.name for check in import_module("shape").CHECKS]
    assert names[: 3 + len(shapes)] == ["agree", "greedy", "graphs", *shapes]
    assert names[-2:] == ["TRL", "study"]
    assert len(names) == len({*names})
    monkeypatch.delitem(sys.modules, "checks")


def test_no_study_is_begun_that_would_be_stopped(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.syspath_prepend(SCRIPT.parent)
    monkeypatch.syspath_prepend(SCRIPT)
    others, bench = import_module("others"), import_module("bench")
    monkeypatch.setattr(others, "starter", lambda _: "")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: None)
    with pytest.raises(bench.NotRun, match=r"^150 s are left, and a first run may take 180 s$"):
        others.check_study(bench.Bench("cuda", tmp_path, tmp_path, 150.0), None)
    numbers: list[Any] = []
    others.check_study(bench.Bench("cuda", tmp_path, tmp_path, 200.0), bench.Found(numbers.append))
    assert numbers[0].text() == "0 (at least 1)"  # it was begun


def test_a_check_that_is_none_is_refused(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert started(script, monkeypatch, "--out", str(tmp_path), "--only", "rigth") == 2
    found = capsys.readouterr().err
    assert found == "error: --only 'rigth': expected one of right, wrong, absent, hangs, breaks\n"


def test_what_was_packed_is_joined_and_can_be_imported(pack: ModuleType, packed: Path, tmp_path: Path) -> None:
    site = pack.unpack(packed, tmp_path / "work")
    assert (site / "thing.py").read_text(encoding="utf-8") == "VALUE = 1"
    assert (tmp_path / "work" / "wheels" / "starter.whl").read_bytes() == b"first second"


def test_libraries_for_other_devices_are_left_out(pack: ModuleType, tmp_path: Path) -> None:
    wheel, names = tmp_path / "bitsandbytes-1-any.whl", ["cpu", "cuda121", "cuda128", "cuda130", "cuda1301", "rocm71"]
    with zipfile.ZipFile(wheel, "w") as file:
        for name in ("__init__.py", *(f"libbitsandbytes_{name}.so" for name in names)):
            file.writestr(f"bitsandbytes/{name}", name)
    pack.leave_out(pack.OTHER_DEVICES, wheel)
    assert [path.name for path in tmp_path.iterdir()] == [wheel.name]
    with zipfile.ZipFile(wheel) as file:
        kept = [f"bitsandbytes/libbitsandbytes_{name}.so" for name in ("cpu", "cuda128", "cuda130")]
        assert file.namelist() == ["bitsandbytes/__init__.py", *kept]
        assert file.read(kept[0]) == b"libbitsandbytes_cpu.so"


def change(file: Path) -> None:
    file.write_bytes(file.read_bytes() + b"x")


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda packed: change(packed / "2" / "starter.whl.part2"), "does not have its SHA-256"),
        (lambda packed: (packed / "1" / "thing.whl").unlink(), "is missing"),
        (lambda packed: (packed / "1").rename(packed / "3"), r"found \['2', '3'\]"),
        (lambda packed: (packed / "2" / "sha256.json").unlink(), "was not carried whole"),
    ],
    ids=["changed", "missing", "a folder missing", "no manifest"],
)
def test_what_was_not_carried_whole_is_refused(
    pack: ModuleType, packed: Path, tmp_path: Path, harm: Callable[[Path], object], message: str
) -> None:
    harm(packed)
    with pytest.raises(pack.PackError, match=message):
        pack.unpack(packed, tmp_path / "work")


def test_packages_that_the_pack_takes_for_granted_are_looked_for_first(
    pack: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pack, "THERE", ("json", "no_such_package", "nor_this"))
    with pytest.raises(pack.PackError, match=r"^this machine lacks no_such_package, nor_this, which the pack does not"):
        pack.unpack(tmp_path / "not packed", tmp_path / "work")


def test_a_failed_try_to_pack_leaves_nothing(pack: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = "ERROR: no matching distribution\n[notice] To update, run: pip install --upgrade pip\n"
    failed = SimpleNamespace(returncode=1, stderr=said)
    monkeypatch.setattr("subprocess.run", lambda *_, **__: failed)
    with pytest.raises(pack.PackError, match=r"^ERROR: no matching distribution$"):
        pack.pack(tmp_path / "packed", "3.12")
    assert list(tmp_path.iterdir()) == []
