"""The training loop: step, log, evaluate, save; stop on a signal or a collapse.

Data order, learning rate and the random state of every sample depend only on the seed and the step. So a resumed run
gives the same numbers as an uninterrupted one.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Any, NoReturn

from selfdistill.config import dump_yaml
from selfdistill.errors import RESUME, EngineFailed, RunCollapsed, RunFailed, RunStopped, UserError
from selfdistill.evaluation import Evaluator, summary
from selfdistill.methods import ColdStart, DatasetCompletions, own_errors, rules_of
from selfdistill.model import LoadedModel
from selfdistill.runtime import (
    MetricsFile,
    ProgressBar,
    RaisedOnAllRanks,
    StepsFile,
    StopRequests,
    Tracker,
    all_gather,
    barrier,
    broadcast_from_rank0,
    corruption,
    is_out_of_memory,
    is_rank0,
    read_lines,
    say,
    say_note,
    world_size,
    write_atomically,
)
from selfdistill.training.checkpoint import Position, checkpoint_at, load_checkpoint, save_checkpoint
from selfdistill.training.collapse import COLLAPSE_WINDOW, TRUNCATED, TRUNCATED_SIGN, CollapseGuard
from selfdistill.training.token_views import token_views
from selfdistill.training.trainer import Trainer

OnStep = Callable[[int, LoadedModel, dict[str, Any]], object]
"""Called in every process after every step, and after its evaluation if it has one, with the step's number, the model
and the step's line of ``metrics.jsonl``, to which an evaluation adds ``eval/accuracy`` and other scores. Returning True
in any process ends training in all."""

TRACKED = ("accuracy", "prior_accuracy", "kl_base", "episode/reward", "episode/turns", "episode/invalid_calls")
"""Scores of an evaluation that go to the tracker and to ``on_step``."""
LARGE_GAP = 0.1
"""Mean difference between the engine's and the student's log-probabilities, in nats, that is said."""


class Loop:
    """Runs the steps after ``position`` and writes their files to ``output_dir``."""

    def __init__(self, trainer: Trainer, output_dir: Path, position: Position) -> None:
        config, step = trainer.config, position.step
        assert config.max_steps is not None
        self._trainer, self._output_dir = trainer, output_dir
        self._position, self._max_steps = position, config.max_steps
        self.step = step
        """Step of the current model; after a collapse, that of the restored checkpoint."""
        self._saved = step
        """Step of the last checkpoint, or the one at which the loop begins."""
        self._gap_was_said = False
        self._metrics = MetricsFile(output_dir / "metrics.jsonl", step)
        self._reporter = ProgressBar("step", config.max_steps, start=step, every=config.logging_steps)
        self._tracker = Tracker(trainer.accelerator, config, output_dir, step)
        self._watch = _Watch(trainer, output_dir, step, self._tracker)
        self._guard = CollapseGuard([stage.task.demonstrated for stage in trainer.stages])
        self._said: set[tuple[int, str]] = set()
        """Stage and name of each sign already reported."""
        self.signs: list[str] = []
        """The reported signs of collapse, each with its step."""
        for line in read_lines(output_dir / "metrics.jsonl"):
            if line["step"] <= step:  # rank 0 may not have removed the later lines yet
                self._signs(line)

    def go_on(self, on_step: OnStep | None) -> None:
        """Run all remaining steps; ``on_step`` as in :func:`selfdistill.training.train.train`.

        Raises:
            RunStopped: a signal stopped the run; its progress is saved.
            RunFailed: too many consecutive steps were skipped.
            RunCollapsed: with ``stop_on_collapse``; the model of an evaluation before the collapse is restored.
        """
        start = self._position.step
        with self._watch, self._metrics, self._tracker, self._reporter, StopRequests() as stop:
            # An interrupted run may have missed the evaluation of its last step.
            self._watch.look(start, last=start == self._max_steps)
            if on_step and start == 0:
                on_step(0, self._trainer.loaded, {})
            for step in range(start + 1, self._max_steps + 1):
                metrics = self._step(step)
                with self._progress_kept():
                    last = step == self._max_steps
                    metrics |= self._watch.look(step, last=last)
                    enough = on_step is not None and on_step(step, self._trainer.loaded, metrics) is True
                # A signal, or the True of ``on_step``, may reach any rank.
                asked = all_gather([(stop.received or 0, enough)])
                received = max(number for number, _ in asked)
                if any(ends for _, ends in asked) and not last:
                    last = True
                    say(f"the run ends early, after step {step} of {self._max_steps}")
                    with self._progress_kept():
                        self._watch.look(step, last=True)
                every = self._trainer.config.save_steps
                due = bool(every) and (last or step % every == 0)
                if received or due or self._is_spared(step):
                    self._save()
                if received and not last:
                    raise RunStopped(
                        f"{self._output_dir}: stopped after step {step} of {self._max_steps}; "
                        f"progress is saved, {RESUME}",
                        received,
                    )
                if last:
                    break

    def _step(self, step: int) -> dict[str, Any]:
        """Run step ``step`` (from 1); returns its metrics."""
        try:
            with own_errors(self._trainer.config.method):
                metrics = self._trainer.step(step - 1)
        except EngineFailed as error:  # before the weights changed
            self._stop(error)
        except UserError as error:  # such as a scorer's, an environment's or the method's
            if self._position.step > self._saved and not self._trainer.updated:
                self._save(together=isinstance(error, RaisedOnAllRanks))
            raise
        except (MemoryError, RuntimeError) as error:  # torch raises RuntimeError
            config = self._trainer.config
            more = config.more_micro_batches(world_size() if config.fsdp else 1)
            if more and is_out_of_memory(error):
                error.args = (f"{error}\nraise gradient_accumulation_steps to {more[0]}".strip(),)
            raise
        position, self.step = self._position, step
        self._position = position = replace(
            position,
            step=step,
            tokens=position.tokens + (0 if "skipped" in metrics else int(metrics["tokens"])),
            skipped=position.skipped + 1 if "skipped" in metrics else 0,
            control=self._trainer.control,
        )
        metrics["tokens"] = position.tokens
        self._metrics.write(metrics)
        self._tracker.write(metrics)
        self._reporter.advance(step, _note(metrics))
        if "skipped" in metrics:
            say(f"note: step {step} was skipped: {_skipped(metrics)}")
        if position.skipped >= self._trainer.config.max_skipped_steps:
            self._save()
            raise RunFailed(
                f"{self._output_dir}: {position.skipped} consecutive steps were skipped; in the last, step {step}, "
                f"{_skipped(metrics)}; they did not change the weights. Lower learning_rate, inspect these rows, or "
                "see metrics.jsonl for the onset"
            )
        if metrics.get("engine/gap", 0.0) > LARGE_GAP and not self._gap_was_said:
            self._gap_was_said = True
            say_note(
                f"step {step}: the engine's log-probabilities are {metrics['engine/gap']:.2f} nats per token away from "
                "the student's on average; see docs/engines.md"
            )
        # From rank 0, because a drift measured on two ranks may differ slightly.
        new, signs = broadcast_from_rank0(lambda: self._signs(metrics))
        for sign in new:
            say(f"note: step {step}: the run may be collapsing: {sign}")
        if signs and self._trainer.config.stop_on_collapse:
            self._stop_collapsed(step, signs[0])
        return metrics

    def _signs(self, metrics: dict[str, Any]) -> tuple[list[str], list[str]]:
        """The signs of a step: those new in its stage, and all of them."""
        number, _ = self._trainer.stage_of(metrics["step"] - 1)
        signs = self._guard.look(metrics, stage=number, sampled=self._is_sampled(metrics))
        new = [words for name, words in signs.items() if (number, name) not in self._said]
        self._said |= {(number, name) for name in signs}
        self.signs += [f"step {metrics['step']}: {words}" for words in new]
        return new, list(signs.values())

    def _is_sampled(self, metrics: dict[str, Any]) -> bool:
        """Whether all of the task's completions of a step were the student's own samples."""
        _, stage = self._trainer.stage_of(metrics["step"] - 1)
        sequence = stage.task.method.sequence
        demonstrated = sequence.steps if isinstance(sequence, ColdStart) else 0
        return metrics["step"] > demonstrated and not isinstance(sequence, DatasetCompletions)

    @property
    def skips(self) -> int:
        """Leading tokens of each completion that the task does not learn."""
        return self._trainer.stage.task.method.skip_first_tokens

    def truncated(self) -> str:
        """That nearly all samples were truncated, and what to do; "" if not, or if a sign of collapse has told it."""
        sampled = [line for line in read_lines(self._output_dir / "metrics.jsonl") if self._is_sampled(line)]
        lines = [line for line in sampled if "completion/truncated" in line]
        share = mean([line["completion/truncated"] for line in lines] or [0.0])
        if share < TRUNCATED or any(name == TRUNCATED_SIGN for _, name in self._said):
            return ""
        if not any("episode/cut" in line for line in lines):
            return (
                f"{share:.0%} of the samples were truncated at their maximum length, so the model hardly learnt to end "
                "a reply; raise max_completion_length"
            )
        after = mean(line.get("episode/cut", 0.0) for line in lines)
        return (
            f"{share:.0%} of the episodes were cut, {share - after:.0%} within a reply and {after:.0%} after one, so "
            "the model hardly learnt to end an episode; "
            + ("raise max_completion_length" if after < share / 2 else "raise max_turns or max_episode_length")
        )

    @contextmanager
    def _progress_kept(self) -> Iterator[None]:
        """Save the progress of the training if what follows a step fails: the caller's function, or an evaluation."""
        try:
            yield
        except EngineFailed as error:
            self._stop(error)
        except Exception as error:  # such as no reply from the judge, or no memory
            self._save(together=isinstance(error, RaisedOnAllRanks))  # else the ranks may be at different points
            raise

    def _stop(self, error: EngineFailed) -> NoReturn:
        """Save the progress, on all ranks together, and say where the run stopped."""
        self._save()
        raise EngineFailed(
            f"{self._output_dir}: stopped after step {self.step}: {error}; progress is saved, {RESUME}"
        ) from error

    def _save(self, *, together: bool = True) -> None:
        for file in (self._metrics, *self._watch.files):
            file.sync()
        trainer, config = self._trainer, self._trainer.config
        if together or not config.fsdp:
            self._saved = self._position.step
            save_checkpoint(
                self._output_dir,
                self._position,
                dump_yaml(config),
                trainer.loaded.model,
                trainer.optimizer,
                trainer.teacher,
                keep=config.save_total_limit,
                spared=[step for step in self._watch.measured if self._is_spared(step)],
            )
        if together:
            barrier()

    def _is_spared(self, step: int) -> bool:
        """Whether a collapsed run could still return to the checkpoint of an evaluated step."""
        newest = max(self._measured_before(self._position.step), default=1)
        return self._trainer.config.stop_on_collapse and step in self._watch.measured and step >= newest

    def _measured_before(self, step: int) -> list[int]:
        """The evaluated steps, without 0, at least ``COLLAPSE_WINDOW`` before ``step``."""
        return [other for other in self._watch.measured if 0 < other <= step - COLLAPSE_WINDOW]

    def _stop_collapsed(self, step: int, sign: str) -> NoReturn:
        """Restore the model of the last evaluation before the collapse, and say where the run stopped."""
        trainer, begun = self._trainer, f"{self._output_dir}: stopped after step {step}: {sign}"
        before = sorted(self._measured_before(step), reverse=True)
        whole = (s for s in before if corruption(checkpoint_at(self._output_dir, s)) is None)
        kept = broadcast_from_rank0(lambda: next(whole, None))
        if kept is None:
            raise RunFailed(
                f"{begun}; no checkpoint was evaluated at least {COLLAPSE_WINDOW} steps earlier, so no final model is "
                f"written. {_ADVICE}"
            )
        load_checkpoint(checkpoint_at(self._output_dir, kept), trainer.loaded.model, trainer.optimizer, trainer.teacher)
        self.step = kept
        raise RunCollapsed(f"{begun}; final is the model of step {kept}, evaluated before the collapse. {_ADVICE}")


_ADVICE = "Lower learning_rate, use a frozen or slower teacher, or see metrics.jsonl for the onset"


class _Watch:
    """Evaluations and token views during training, each in a file, and the replies of the last evaluation."""

    def __init__(self, trainer: Trainer, output_dir: Path, start: int, tracker: Tracker) -> None:
        self._trainer, self._metrics, self._tracker = trainer, output_dir / "metrics.jsonl", tracker
        start = start or -1  # a restart from step 0 also rewrites the lines of step 0
        self._evaluations = StepsFile(output_dir / "evaluations.jsonl", start) if trainer.evaluator else None
        self._replies = output_dir / "test_replies.jsonl"
        if trainer.evaluator:
            with StepsFile(self._replies, start):  # drops those of a step that is repeated
                pass
        plays = any(rules_of(stage.task.method) for stage in trainer.stages)
        views = trainer.config.view_rows and (trainer.teacher or plays)
        self._views = StepsFile(output_dir / "token_views.jsonl", start) if views else None
        self.files = [file for file in (self._evaluations, self._views) if file is not None]

    @property
    def measured(self) -> set[int]:
        """Steps after which the model was evaluated."""
        return self._evaluations.steps if self._evaluations else set()

    def look(self, step: int, *, last: bool) -> dict[str, float]:
        """Evaluate after optimizer step ``step``, if due; 0: before the first. Returns the scores of an evaluation."""
        trainer, config = self._trainer, self._trainer.config
        ends = last or step == 0
        if self._views and ends and step not in self._views.steps:
            with own_errors(config.method):
                for view in token_views(trainer):
                    self._views.write({"step": step, **view})
        due = ends or (config.eval_steps and step % config.eval_steps == 0)
        if self._evaluations and trainer.evaluator and due and step not in self._evaluations.steps:
            found = trainer.evaluator.base
            if step:
                found = trainer.evaluator.measure(trainer.loaded, f"model after step {step}")
            self._write_replies(trainer.evaluator, step)  # first, so that no evaluation lacks its replies
            self._evaluations.write({"step": step, **found, "seconds": self._seconds() if step else 0.0})
            scores = {f"eval/{key}": found[key] for key in TRACKED if key in found}
            self._tracker.write({"step": step, **scores})
            say(f"step {step}: {summary(found)}")
            return scores
        return {}

    def _write_replies(self, evaluator: Evaluator, step: int) -> None:
        """Keep the replies of the base and, after step 0, of the model that was just measured."""
        lines = [{"step": 0, **line} for line in evaluator.base_replies]
        lines += [{"step": step, **line} for line in evaluator.replies if step]
        if is_rank0():
            write_atomically(self._replies, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))

    def _seconds(self) -> float:
        """Seconds spent on training steps, without evaluations and drift."""
        return sum(line["time/step_s"] - line["time/drift_s"] for line in read_lines(self._metrics))

    def __enter__(self) -> None:
        return None

    def __exit__(self, *_: object) -> None:
        for file in self.files:
            file.__exit__()


def say_signs(loop: Loop, output_dir: Path) -> None:
    """Report signs of collapse, samples that were nearly all truncated, and steps without a gradient."""
    if loop.signs:
        say(f"note: the run showed signs of collapse: {'; '.join(loop.signs)}. See docs/reliability.md")
    if truncated := loop.truncated():
        say(f"note: {truncated}")
    masked, idle = without_gradient(output_dir, loop.skips)
    if masked:
        say(
            f"note: in {masked} of {loop.step} steps no sample taught anything, because skip_first_tokens {loop.skips} "
            "masked them all; lower it"
        )
    if idle:
        say(
            f"note: in {idle} of {loop.step} steps no sample taught anything, for example because all samples of a "
            "prompt had the same reward; try easier prompts, a more lenient scorer or a higher num_generations"
        )


def without_gradient(output_dir: Path, skips: int) -> tuple[int, int]:
    """Numbers of steps whose gradient was zero: those with at most ``skips`` tokens, and others that have rewards."""
    lines = read_lines(output_dir / "metrics.jsonl")
    idle = [line for line in lines if line.get("grad_norm") == 0]  # a skipped step may have none
    masked = [line for line in idle if 0 < line["completion/length"] <= skips]
    rewarded = [line for line in idle if "reward" in line or "reward/helped" in line]
    return len(masked), sum(line not in masked for line in rewarded)


def _skipped(metrics: dict[str, Any]) -> str:
    rows = metrics["skipped"]["rows"]
    more = f" and {len(rows) - 5} more" if len(rows) > 5 else ""
    return f"{metrics['skipped']['why']} ({', '.join(rows[:5])}{more})"


def _by_part(metrics: dict[str, Any]) -> str:
    """The mean loss of each part, if the step has several."""
    losses = {name.removeprefix("loss/"): loss for name, loss in metrics.items() if name.startswith("loss/")}
    return f" ({', '.join(f'{name} {loss:.3f}' for name, loss in losses.items())})" if losses else ""


def _note(metrics: dict[str, Any]) -> str:
    parts = [f"loss {metrics['loss']:.4f}{_by_part(metrics)}"] if "loss" in metrics else []
    if "kl/forward" in metrics:
        parts.append(f"KL(teacher||student) {metrics['kl/forward']:.3f}")
    if "drift/student" in metrics:
        parts.append(f"drift {metrics['drift/student']:.3f}")
    if "reward" in metrics:
        parts.append(f"reward {metrics['reward']:.3f}")
    if "learnt" in metrics:
        parts.append(f"{metrics['learnt']:.0%} learnt")
    if "episode/turns" in metrics:
        parts.append(f"{metrics['episode/turns']:.1f} turns")
    if "episode/success" in metrics:
        parts.append(f"{metrics['episode/success']:.0%} succeed")
    parts.append(
        f"{metrics['completion/length']:.0f} tokens per completion, {metrics['completion/truncated']:.0%} truncated"
    )
    parts.append(f"{metrics['time/step_s']:.1f} s/step")
    return "  ".join(parts)
