"""Samples drawn before the first step are kept as they are drawn: a run that stops there resumes with what it has.

Six rows in batches of two, so three batches are drawn.
"""

from __future__ import annotations

import json
import os
import resource
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from children import Child, started_together, train_together
from conftest import ENDS, Cut, assert_same_run, final_weights, largest_difference, same

from selfdistill.cli import main
from selfdistill.config.files import dump_yaml
from selfdistill.config.train import TrainConfig
from selfdistill.errors import CannotResume, EngineFailed, RunStopped, UserError
from selfdistill.methods.samples_file import SAMPLES_FILE, SamplesFile
from selfdistill.methods.sequences import DrawnSamples
from selfdistill.training.train import train

Settings = Callable[..., TrainConfig]

DRAWING: dict[str, dict[str, Any]] = {
    "sft_from_teacher": {"method": "sft_from_teacher"},
    "offline_distillation": {"method": "offline_distillation"},
    "ssd": {"method": "ssd"},
    "pope": {"method": "pope", "num_generations": 2, "method_settings": {"tries": 2}},
    "npo": {"method": "npo", "num_generations": 2, "method_settings": {"tries": 2}},
    "hint": {"hint": "shortest"},
}


@pytest.fixture
def make(all_of_them: Settings) -> Settings:
    def of(out: str = "run", **values: Any) -> TrainConfig:
        return all_of_them(out, **({"method": "ssd", "max_steps": 2, "save_steps": 2} | values))

    return of


def file_of(config: TrainConfig) -> Path:
    return Path(config.output_dir) / SAMPLES_FILE


def happens_after(batches: int, what: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> None:
    """``what`` happens after as many batches are kept."""
    append, kept = SamplesFile.append, []

    def appended(file: SamplesFile, samples: Sequence[Any]) -> None:
        append(file, samples)
        kept.append(samples)
        if len(kept) == batches:
            what()

    monkeypatch.setattr(SamplesFile, "append", appended)


def cut() -> None:
    raise Cut


def cut_after(batches: int, config: TrainConfig, what: Callable[[], object] = cut, *, resume: bool = False) -> None:
    with pytest.MonkeyPatch.context() as patched:
        happens_after(batches, what, patched)
        with pytest.raises(Cut):
            train(config, resume=resume)


def resumed(config: TrainConfig) -> list[list[int]]:
    """Resume the run; returns the rows of each batch that it draws."""
    drawn: list[list[int]] = []
    kinds = [DrawnSamples, *DrawnSamples.__subclasses__()]
    with pytest.MonkeyPatch.context() as patched:
        for kind in kinds:

            def counted(fixed: Any, loaded: Any, examples: Any, draw: Any = kind.draw) -> list[list[int]]:
                drawn.append([x.demonstration.row for x in examples])
                found: list[list[int]] = draw(fixed, loaded, examples)
                return found

            patched.setattr(kind, "draw", counted)
        train(config, resume=True)
    return drawn


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in ("ssd", "pope") else pytest.mark.slow) for name in DRAWING]
)
def test_a_run_cut_off_while_it_draws_resumes_to_the_bits_of_one_that_was_not(make: Settings, name: str) -> None:
    whole, stopped = (make(out, **DRAWING[name]) for out in ("whole", "stopped"))
    train(whole)
    cut_after(2, stopped)
    kept = file_of(stopped).read_bytes()
    assert kept.count(b"\n") == 4
    assert file_of(whole).read_bytes().startswith(kept)
    assert resumed(stopped) == [[4, 5]]
    assert file_of(stopped).read_bytes() == file_of(whole).read_bytes()
    assert_same_run(whole, stopped)


def test_what_several_models_draw_is_kept(make: Settings, model_folder: Callable[..., Path]) -> None:
    own = {"tries": 2, "later": [str(model_folder(ends=ENDS, seed=2))]}
    whole, stopped = (make(out, **DRAWING["npo"] | {"method_settings": own}) for out in ("whole", "stopped"))
    train(whole)
    cut_after(4, stopped)
    assert resumed(stopped) == [[2, 3], [4, 5]]
    assert file_of(stopped).read_bytes() == file_of(whole).read_bytes()
    assert_same_run(whole, stopped)


def other_line(line: bytes) -> bytes:
    return json.dumps({**json.loads(line), "ids": [1.5]}).encode()


@pytest.mark.parametrize(
    ("spoil", "again"),
    [
        pytest.param(lambda lines: [*lines[:3], lines[3][:-9]], [[2, 3], [4, 5]], id="half-written"),
        pytest.param(lambda lines: [lines[0], lines[1][:-9] + b"\n", *lines[2:]], [[0, 1], [4, 5]], id="corrupt"),
        pytest.param(lambda lines: [b"\xff\x00\n", *lines[1:]], [[0, 1], [4, 5]], id="not-text"),
        pytest.param(lambda lines: [b"7\n", b"{}\n", *lines[2:]], [[0, 1], [4, 5]], id="not-a-sample"),
        pytest.param(lambda lines: [other_line(lines[0]) + b"\n", *lines[1:]], [[0, 1], [4, 5]], id="not-ids"),
    ],
)
def test_what_is_corrupt_is_drawn_again_in_its_whole_batch(
    make: Settings, spoil: Callable[[list[bytes]], list[bytes]], again: list[list[int]]
) -> None:
    """Whole: the rounding of a sample depends on its batch."""
    whole, stopped = make("whole"), make("stopped")
    train(whole)
    cut_after(2, stopped)
    file_of(stopped).write_bytes(b"".join(spoil(file_of(stopped).read_bytes().splitlines(keepends=True))))
    assert resumed(stopped) == again
    assert file_of(stopped).read_bytes() == file_of(whole).read_bytes()
    assert same(final_weights(whole), final_weights(stopped))


def test_a_half_written_line_is_removed_before_others_are_kept(make: Settings) -> None:
    stopped = make()
    cut_after(1, stopped)
    kept = file_of(stopped).read_bytes()
    with file_of(stopped).open("ab") as file:
        file.write(b'{"source": "')
    cut_after(1, stopped, resume=True)
    lines = file_of(stopped).read_bytes()
    assert lines.startswith(kept)
    assert [len(json.loads(line)["ids"]) > 0 for line in lines.splitlines()] == [True] * 4


def test_samples_of_other_weights_are_not_used(make: Settings, model_folder: Callable[..., Path]) -> None:
    stopped = make("stopped")
    cut_after(2, stopped)
    other = str(model_folder(ends=ENDS, seed=2))
    whole, stopped = make("whole", model=other), make("stopped", model=other)
    train(whole)
    assert resumed(stopped) == [[0, 1], [2, 3], [4, 5]]
    assert file_of(stopped).read_bytes() == file_of(whole).read_bytes()


def test_a_refused_resume_keeps_nothing(make: Settings) -> None:
    config = make(max_steps=2)
    train(config)
    file_of(config).unlink()
    with pytest.raises(CannotResume, match="has already done 2 steps"):
        train(config.model_copy(update={"max_steps": 1}), resume=True)
    assert not file_of(config).exists()


def test_what_needs_no_samples_is_checked_before_they_are_drawn(
    make: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise AssertionError("drew")

    config = make()
    train(config)
    monkeypatch.setattr(DrawnSamples, "draw", fail)
    with pytest.raises(CannotResume, match="seed was 0 and is now 1"):
        train(config.model_copy(update={"seed": 1}), resume=True)
    monkeypatch.setattr("selfdistill.training.disk.free_bytes", lambda _: 0)
    with pytest.raises(UserError, match=r"other: 0.0 MiB free, checkpoints and the final model need about"):
        train(make("other"))
    assert not Path(make("other").output_dir).exists()


def test_a_run_that_fails_in_its_first_batch_leaves_no_folder(make: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise EngineFailed("engine: late")

    monkeypatch.setattr(DrawnSamples, "draw", fail)
    with pytest.raises(EngineFailed, match=r"^engine: late$"):
        train(make())
    assert not Path(make().output_dir).exists()


def test_an_engine_that_fails_later_loses_no_earlier_batch(make: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    config, draw, calls = make(), DrawnSamples.draw, []

    def fail(fixed: DrawnSamples, loaded: Any, examples: Any) -> list[list[int]]:
        calls.append(examples)
        if len(calls) == 3:
            raise EngineFailed("engine: late")
        return draw(fixed, loaded, examples)

    with monkeypatch.context() as patched:
        patched.setattr(DrawnSamples, "draw", fail)
        with pytest.raises(EngineFailed) as failed:
            train(config)
    assert str(failed.value) == (
        f"{config.output_dir}: stopped before the first step, with 4 of 6 teacher's samples drawn: engine: late; "
        "they are kept, continue with resume=True"
    )
    assert resumed(config) == [[4, 5]]


@pytest.mark.parametrize("batches", [1, 3])
def test_a_signal_stops_after_the_batch(make: Settings, monkeypatch: pytest.MonkeyPatch, batches: int) -> None:
    config, handler = make(), signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patched:
        happens_after(batches, lambda: os.kill(os.getpid(), signal.SIGTERM), patched)
        with pytest.raises(RunStopped, match=f"with {2 * batches} of 6 teacher's samples drawn; they are kept") as stop:
            train(config)
    assert (stop.value.exit_code, signal.getsignal(signal.SIGTERM)) == (143, handler)
    assert len(resumed(config)) == 3 - batches


def commanded(config: TrainConfig, tmp_path: Path, what: Callable[[], object]) -> tuple[int, list[str]]:
    """Exit code and lines of a command in which ``what`` happens after the first batch is kept."""
    settings, log = tmp_path / "settings.yaml", tmp_path / "log"
    settings.write_text(dump_yaml(config), encoding="utf-8")

    def command() -> int:
        happens_after(1, what, pytest.MonkeyPatch())
        return main(["train", "--config", str(settings)])

    return Child(command, log).wait(), log.read_text().splitlines()


def test_the_command_says_how_to_resume_and_does(make: Settings, tmp_path: Path) -> None:
    whole, stopped = make("whole"), make("stopped")
    train(whole)
    code, said = commanded(stopped, tmp_path, lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert code == 143
    assert said[-2:] == [
        "stopping at the end of the step, batch or measurement; another Ctrl-C stops at once, without saving",
        f"selfdistill: {stopped.output_dir}: stopped before the first step, with 2 of 6 teacher's samples drawn; they "
        "are kept, continue with --resume",
    ]
    assert main(["train", "--output_dir", stopped.output_dir, "--resume"]) == 0
    assert_same_run(whole, stopped)


def test_a_full_disk_loses_no_sample_before_it(make: Settings, tmp_path: Path) -> None:
    """The kernel's own refusal, in the middle of a line."""
    config = make()

    def fill_up() -> None:
        size = file_of(config).stat().st_size + 30
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

    code, said = commanded(config, tmp_path, fill_up)
    assert code == 2
    assert said[-1] == (
        f"selfdistill: error: {file_of(config)}: cannot be written (File too large); free disk space, then continue "
        "with --resume"
    )
    assert not file_of(config).read_bytes().endswith(b"\n")
    assert resumed(config) == [[2, 3], [4, 5]]


def test_a_folder_in_use_is_refused(make: Settings) -> None:
    config = make()

    def second() -> None:
        with pytest.raises(UserError, match="in use by another process"):
            train(config, resume=True)
        raise Cut

    cut_after(1, config, second)
    assert resumed(config) == [[2, 3], [4, 5]]


@pytest.mark.slow
def test_a_signal_to_one_of_two_processes_stops_both(
    make: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, stopped = make("whole"), make("stopped")
    train(whole)

    def second_is_stopped() -> None:
        if os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGTERM)

    def work() -> None:
        happens_after(2, second_is_stopped, pytest.MonkeyPatch())
        train(stopped)

    for child in started_together(work, tmp_path / "log"):
        assert child.wait() == 1
        assert "with 4 of 6 teacher's samples drawn; they are kept" in child.log.read_text()
    train_together(stopped, tmp_path, resume=True)
    assert file_of(stopped).read_bytes() == file_of(whole).read_bytes()
    assert largest_difference(final_weights(whole), final_weights(stopped)) < 1e-5
