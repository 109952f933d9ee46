"""Metrics of a run: the table of their names, ``metrics.jsonl``, and trackers."""

from __future__ import annotations

import json
import os
import re
import secrets
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from selfdistill.config import Settings
from selfdistill.data import is_data_file
from selfdistill.errors import UserError, one_line
from selfdistill.runtime.console import say_note
from selfdistill.runtime.distributed import is_rank0
from selfdistill.runtime.files import write_atomically

if TYPE_CHECKING:
    from typing_extensions import Self  # in typing from Python 3.11 on

METRICS = {
    "step": "optimizer steps done",
    "epoch": "passes over the data",
    "loss": "training loss, nats per token",
    "loss/PART": "mean loss of a part of the step, such as ``task``; only if steps have several parts",
    "share/PART": "its share of the batch's examples, times its method's weight: its weight in ``loss``",
    "kl/forward": "KL(teacher||student), nats per token over the retained tokens",
    "kl/reverse": "KL(student||teacher), nats per token over the retained tokens",
    "drift/student": "KL(base||student) on a few fixed prompts, nats per token; every ``drift_steps``",
    "drift/teacher": "KL(base||teacher) on the same prompts, without the demonstration, nats per token; not "
    "of a separate teacher",
    "completion/length": "mean tokens per completion",
    "completion/truncated": "share of completions truncated at the length limit, or of episodes that were cut",
    "episode/turns": "mean replies per episode; with an environment, as are the next five",
    "episode/invalid_calls": "mean calls per episode that could not be run as written",
    "episode/cut": "share of episodes cut after a complete reply: by ``max_turns``, ``max_episode_length`` or the chat "
    "template",
    "episode/reward": "mean reward of the episodes; only if the environment judges",
    "episode/success": "share of the episodes with reward 1",
    "turn_loss/NUMBER": "loss per retained token of the n-th replies of all episodes, from 1, without factors such as "
    "advantages",
    "entropy": "student entropy over the retained tokens, nats per token; with ``grpo`` and the like only over samples "
    "with an advantage",
    "reward": "mean reward of the samples without help; only for methods with a checker, such as ``grpo``",
    "reward/helped": "the same of samples with a part of the demonstration, by ``pope``, ``trapo`` or ``actguide``",
    "teacher_gain/right": "mean log q - log p of the learnt samples that are right, nats per retained token, q the "
    "teacher's and p the student's probability; only for methods with a checker and a teacher, such as ``sdpo``",
    "teacher_gain/wrong": "the same for the other learnt samples; lower if the teacher helps",
    "learnt": "share of the samples that are learnt; only for methods that may leave some out, such as ``sdpo``",
    "unfit": "share of the samples whose context is too long, or that the chat template does not show",
    "control": "value chosen by the method's controller, such as the share of the demonstration that the teacher sees",
    "importance": "mean importance weight of the completions",
    "engine/gap": "mean difference between a token's log-probability by engine and by student, nats; with an engine",
    "engine/gap_max": "the largest of these differences",
    "learning_rate": "learning rate of this step",
    "grad_norm": "global gradient norm before clipping",
    "tokens": "tokens of the completions selected so far, once for each part; also those without a gradient, such as "
    "skipped ones",
    "skipped": "why the step was skipped, and its rows; only if it was",
    "rollout/tokens_per_second": "tokens sampled from the student in this step, learnt or not, per second, without "
    "``time/sync_s``, checks and environments; only if it samples",
    "time/rollout_s": "sampling and checking the samples, seconds",
    "time/sync_s": "of that, sending the student's weights to the engine, seconds",
    "time/teacher_s": "the teacher's forward pass, seconds",
    "time/student_s": "the student's forward and backward pass, seconds",
    "time/update_s": "clipping, optimizer step and teacher update, seconds",
    "time/drift_s": "measuring both drifts, seconds; close to 0 at steps without a measurement",
    "time/of/PART_s": "a part's share of ``time/step_s``, an estimate; only if steps have several parts. Its passes "
    "are measured. Time shared with other parts, as in sampling and the update, is divided in proportion to the tokens",
    "time/step_s": "the whole step, seconds",
}
"""Every key of a line in metrics.jsonl, with its meaning and unit."""
_PLACEHOLDERS = {
    "^(loss|share)/.+": r"\1/PART",
    "^time/of/.+_s": "time/of/PART_s",
    r"^turn_loss/\d+": "turn_loss/NUMBER",
}


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSON Lines file, without an incomplete last line; empty if there is no file."""
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    return [json.loads(line) for line in text.split("\n")[:-1]]  # not splitlines: text may contain U+2028


class StepsFile:
    """Append-only JSON Lines file in which each line has a ``step``.

    Opening it for a resumed run drops the lines after ``start_step``, because those steps are repeated.
    """

    def __init__(self, path: Path, start_step: int) -> None:
        lines = []
        self.steps: set[int] = set()
        """Steps of the lines in the file."""
        if path.exists():
            for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
                try:
                    step = json.loads(line)["step"]
                except (ValueError, KeyError):
                    continue  # an incomplete last line, left by a crash
                if step <= start_step:
                    lines.append(line + "\n")
                    self.steps.add(step)
        self.file: TextIO | None = None
        if is_rank0():
            write_atomically(path, "".join(lines))
            self.file = path.open("a", encoding="utf-8")

    def write(self, values: dict[str, Any]) -> None:
        """Append one line."""
        self.steps.add(int(values["step"]))
        if self.file:
            self.file.write(json.dumps(values, ensure_ascii=False) + "\n")
            self.file.flush()

    def sync(self) -> None:
        """Flush the lines to disk."""
        if self.file:
            os.fsync(self.file.fileno())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self.file:
            self.file.close()


class MetricsFile(StepsFile):
    """``metrics.jsonl``: one line per step, with the keys of ``METRICS``."""

    def write(self, values: dict[str, Any]) -> None:
        """Append one step."""
        unknown = {_in_table(key) for key in values} - METRICS.keys()
        assert not unknown, f"metrics missing from the table: {sorted(unknown)}"
        super().write(values)


def _in_table(metric: str) -> str:
    """The name under which the table has a metric; the names of parts and the numbers of turns are placeholders."""
    for pattern, name in _PLACEHOLDERS.items():
        metric = re.sub(pattern, name, metric)
    return metric


def public_name(name: str) -> str:
    """A model or data set name safe to publish: the hub id, or a path's last part; a file's name is a path.

    Of ``run/final`` it is the run, and of a state's ``0001-skill/model`` the skill.
    """
    if not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name) or is_data_file(name) or os.path.exists(name):
        path = Path(os.path.abspath(name))
        of_skill = path.name == "model" and re.match(r"\d{4}-", path.parent.name)
        name = path.parent.name if path.name == "final" or of_skill else path.name
    return " ".join(name.encode("utf-8", "replace").decode().split())


def public_settings(config: Settings) -> dict[str, bool | int | float | str | None]:
    """Settings that are safe to publish, in types that trackers accept.

    Paths are reduced to their last part, and network addresses are dropped, also in lists and mappings, which become
    JSON.
    """
    found = _public(config.model_dump())
    return {key: json.dumps(value) if isinstance(value, list | dict) else value for key, value in found.items()}


def _public(value: Any) -> Any:
    """The value without network addresses and folder names."""
    if isinstance(value, Mapping):
        return {key: _public(part) for key, part in value.items() if not _is_address(part)}
    if isinstance(value, tuple | list):
        return [_public(part) for part in value if not _is_address(part)]
    return _public_text(value) if isinstance(value, str) else value


def _is_address(value: Any) -> bool:
    return isinstance(value, str) and "://" in value


def _public_text(value: str) -> str:
    """The value without folder names; a context such as ``template:file=PATH`` contains a path, too."""
    head, equals, tail = value.rpartition("=")
    if "/" in head:  # a path with "=" in it
        return public_name(value)
    return head + equals + public_name(tail) if "/" in tail else value


_ONLY_WHAT_IS_SENT = {
    "console": "off",
    "disable_code": True,
    "disable_git": True,
    "program": "selfdistill",
    "x_disable_machine_info": True,
    "x_disable_meta": True,
    "x_save_requirements": False,
}
"""Settings with which wandb does not collect by itself: command line, names of host and user, paths, git's remote,
installed packages and what is printed. A release of wandb without one of them refuses to start."""


def check_tracker(name: str) -> None:
    """Reject a tracker whose package is missing, before any work is done.

    Raises:
        UserError: the package is missing; names the command that installs it.
    """
    from accelerate.tracking import get_available_trackers

    if name != "none" and name not in [str(tracker) for tracker in get_available_trackers()]:
        raise UserError(f"setting 'report_to': {name} is not installed: pip install {name}, or leave report_to out")


class Tracker:
    """Sends every line of ``metrics.jsonl`` through accelerate to the tracker of ``report_to``; no-op for ``none``.

    TensorBoard files go to ``tensorboard`` in the run folder. For other trackers, the file ``tracker_id`` in it
    identifies the run, so that a resumed run continues the same record.

    Args:
        accelerator: created with ``log_with``.
        config: the run's resolved settings; :func:`public_settings` of them are sent.
        output_dir: the run folder.
        start_step: steps already done; TensorBoard hides its records of later steps.

    Raises:
        UserError: the tracker does not start.
    """

    def __init__(self, accelerator: Any, config: Settings, output_dir: Path, start_step: int) -> None:
        self._accelerator, self._failed = accelerator, False
        if not accelerator.log_with or not is_rank0():
            return
        name = str(accelerator.log_with[0])
        options: dict[str, Any]
        if name == "tensorboard":
            project, options = "tensorboard", {"purge_step": start_step + 1}
        else:
            project = "selfdistill"
            file = output_dir / "tracker_id"
            if start_step == 0 or not file.exists():
                write_atomically(file, secrets.token_hex(4))
            identity, run = file.read_text(encoding="utf-8").strip(), public_name(str(output_dir))
            options = {"name": f"{run}-{identity}", "resume": "allow"}
            if name == "wandb":
                options |= {"id": identity, "dir": str(output_dir), "settings": _ONLY_WHAT_IS_SENT}
        try:
            with redirect_stdout(sys.stderr):  # trackio prints
                accelerator.init_trackers(project, config=public_settings(config), init_kwargs={name: options})
        except Exception as error:  # each tracker has its own errors
            raise UserError(f"report_to {name!r}: cannot start ({one_line(error)}); fix that or leave it out") from None

    def write(self, metrics: dict[str, Any]) -> None:
        """Send the metrics of one step. A tracker that fails is noted and not used again."""
        numbers = {k: v for k, v in metrics.items() if k != "step" and isinstance(v, int | float)}
        if not self._failed:
            with self._noted():
                self._accelerator.log(numbers, step=int(metrics["step"]))

    def __enter__(self) -> Tracker:
        return self

    def __exit__(self, *_: object) -> None:
        # Not end_training(), which would also end the process group, and the model is still to be written.
        with redirect_stdout(sys.stderr):
            for tracker in self._accelerator.trackers:
                with self._noted():
                    tracker.finish()

    @contextmanager
    def _noted(self) -> Iterator[None]:
        """Note the tracker's first failure instead of ending the run."""
        try:
            yield
        except Exception as error:
            if not self._failed:
                name = self._accelerator.log_with[0]
                say_note(f"report_to {str(name)!r} failed ({one_line(error)}); metrics.jsonl has all metrics")
            self._failed = True
