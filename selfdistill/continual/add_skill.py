"""Add a skill to a state: check the teacher, train, evaluate everything, and accept only if the gates pass.

An addition runs step by step in the state's ``pending`` folder. Each step leaves a file and is skipped if its file
exists, so the same command resumes where it was interrupted. Accepting is one rename (:mod:`ledger`).
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from selfdistill.config import LearnConfig, TrainConfig, load_saved
from selfdistill.continual.gates import (
    compared,
    reasons_against,
    refuse_failed,
    say_drop_not_shown,
    say_if_few,
    say_prior_detects,
    to_keep,
)
from selfdistill.continual.ledger import MEASURED_WITH, NO_IMPROVEMENT, PENDING, START, Ledger, settings_of
from selfdistill.continual.lengths import check_anchor_lengths, date_shown, fitting_rows
from selfdistill.continual.pending import already_learnt, begin, check_replaced
from selfdistill.continual.rehearsal import MEMORY, as_shown, check_batch, cost_of, keep_prompts, run_config, total
from selfdistill.continual.splits import HELD_OUT, split_rows
from selfdistill.continual.stream import learn_stream
from selfdistill.continual.teacher import check_teacher, reasons_against_teacher
from selfdistill.data import JUDGE, Demonstration, Rows, load_demonstrations, load_prompts, located
from selfdistill.errors import RERUN, RESUME, CannotResume, RunFailed, RunStopped, UserError
from selfdistill.evaluation import (
    Evaluation,
    EvaluationSet,
    check_inputs,
    encode_priors,
    judge_of,
    load_prior,
    prior_scores,
    say_learnt,
)
from selfdistill.methods import check_steps, lacks_of, stages_of
from selfdistill.model import (
    LoadedModel,
    load_for_training,
    refuse_float16,
    resolved_precision,
    start_fingerprint,
    training_precision,
    use_engine,
)
from selfdistill.runtime import StepsFile, StopRequests, folder_lock, read_lines, say, write_json
from selfdistill.training import OnStep, check_disk_for_merged, chosen_rows, size_text, take_whole, train, whole_folder

_PUT_BACK = "an adapter, whose merged weights cannot be compared; if it was moved, put it or a link to it back there"
"""What can be done about the base of a state if it has no fingerprint."""


def add(config: LearnConfig, in_memory: Mapping[str, Rows] | None = None) -> dict[str, Any]:
    """Learn a skill, or resume learning it, and accept it if the gates pass.

    Args:
        config: settings of the addition.
        in_memory: rows by the setting, ``data`` or ``test``, that would name their file.

    Returns:
        ``name``, ``replaces``, ``accepted``, ``reasons`` (for refusal), ``date`` (when that was decided), ``data``
        (SHA-256 of its rows), ``check`` (of the teacher), ``base`` and ``before`` (:data:`Evaluation` of the base and
        of the current model on the new skill). If reached, also ``training`` (its cost, see
        :func:`selfdistill.continual.rehearsal.cost_of`, and ``rehearsed``, the number of earlier skills' prompts used
        as anchors), ``after`` (of the new model: ``skills`` by name, and the prior abilities), and what
        :func:`selfdistill.continual.gates.compared` returns.

    Raises:
        UserError: a mistake the user can fix.
        RunStopped: a signal arrived; the same command resumes.
    """
    name = config.name or re.sub(r"[^\w.-]+", "-", Path(config.data).name.partition(".")[0]).strip("-.")
    config = LearnConfig(**config.model_dump() | {"name": name})
    run = run_config(config, "model", config.context, Path(PENDING), rehearses=False)  # validate before any long work
    stages = stages_of(run)
    splits = split_rows(config, lacks_of(stages), in_memory or {})
    if config.action == "stream":
        check_steps(config.chunk_steps, run.method, stages, "chunk_steps")
    elif config.max_steps is not None:
        check_steps(config.max_steps, run.method, stages)
    check_inputs(run.model_copy(update={"data": ""}))  # its rows have been read
    if not (Path(config.state) / START).is_dir():
        check_batch(run)  # with an existing state, begin() checks, rehearsal included
    if config.prior:
        load_prior(config.prior)
    with folder_lock(Path(config.state), f"state {config.state!r}"), StopRequests() as stop:
        ledger = _opened(config, run, splits["train"])
        if ledger.template_date is not None:
            config = config.model_copy(update={"template_date": ledger.template_date})
        if config.mixed_precision == "auto":
            config = config.model_copy(update={"mixed_precision": ledger.measured_with["mixed_precision"]})
        if learnt := already_learnt(ledger, config, splits):
            return learnt
        check_replaced(config, ledger.skills)
        if not ledger.interrupted:
            refuse_failed(ledger, config)
        used = begin(ledger, config, splits)
        say("rows: " + ", ".join(f"{len(rows)} for {split}" for split, rows in used.items()))
        say_if_few(len(used["test"]), config)
        say_learnt(used["test"], used["train"])
        try:
            result = _NewSkill(ledger, stop).result()
        except RunStopped as stopped:
            message = f"state {config.state!r}: stopped while learning {config.data}; {RERUN}"
            raise RunStopped(message, stopped.signal_number) from None
        except UserError as error:  # of the run in it
            error.args = (str(error).replace(RESUME, RERUN),)
            raise
        write_json(ledger.pending / "result.json", result)
        if result["accepted"]:
            skill = ledger.accept(name)
            before, after = result["before"]["accuracy"], result["after"]["skills"][name]
            score, items = after["accuracy"], after["items"]
            if score <= before:
                said = f"{before:.3f} before, {score:.3f} after on {items} items: {NO_IMPROVEMENT}"
                undo = f"selfdistill learn --state {shlex.quote(config.state)} rollback"
                say(f"note: {name}: {said}{'' if config.test else HELD_OUT}; to undo: {undo}")
            say_drop_not_shown(result["prior_change"], config)
            say(f"accepted: {skill.name} is skill {skill.number} of {config.state}; {to_keep(after)}")
        else:
            refused = ledger.refuse(name)
            place = f"{refused.folder} ({size_text(refused.bytes)})"
            say(f"refused: {name}. {config.state} is unchanged; the attempt is in {place}")
    return result


def _opened(config: LearnConfig, run: TrainConfig, rows: Sequence[Demonstration]) -> Ledger:
    """Open the state, creating it if it does not exist; one that does must fit the settings."""
    if not (Path(config.state) / START).is_dir():
        _create(config, run, rows)
        return Ledger(config.state)
    ledger = Ledger(config.state)
    if config.model and ledger.base != _absolute(config.model):
        _move_base(ledger, config, config.model)
    if os.path.isabs(ledger.base) and not os.path.isdir(ledger.base):
        advice = "if it was moved, give its new location as model" if ledger.weights else f"it is {_PUT_BACK}"
        raise UserError(f"state {config.state!r}: its base {ledger.base!r} does not exist; {advice}")
    if config.prior and _texts(config.prior) != (_texts(ledger.prior) if ledger.prior else None):
        raise UserError(f"setting 'prior': {config.state} started with other questions, or none; leave it out")
    if not ledger.has_date:
        ledger.set_date(_date_of_older(ledger, run))
    _refuse_other_measure(ledger, config)
    return ledger


def _move_base(ledger: Ledger, config: LearnConfig, model: str) -> None:
    """Record that the base is now at ``model``, unless that has different weights."""
    started = f"setting 'model': {config.state} started from {ledger.base!r}"
    if not ledger.weights:
        raise UserError(f"{started}, {_PUT_BACK}, and leave model out")
    moved = load_for_training(model, dtype=ledger.measured_with["dtype"], adapter_base=config.adapter_base)
    if start_fingerprint(moved) != ledger.weights:
        raise UserError(f"{started}, but {model!r} has different weights; leave it out")
    ledger.move_base(_absolute(model))


def _refuse_other_measure(ledger: Ledger, config: LearnConfig) -> None:
    """Refuse settings with which scores could not be compared with those in the state."""
    fixed = dict(ledger.measured_with)
    if config.mixed_precision == "auto":  # becomes the state's
        del fixed["mixed_precision"]
    if config.template_date is not None and ledger.template_date is not None:
        fixed["template_date"] = ledger.template_date
    for key, value in fixed.items():
        if getattr(config, key) != value:
            raise UserError(f"setting {key!r}: all scores in {config.state} were measured with {value!r}; use the same")


def _create(config: LearnConfig, run: TrainConfig, rows: Sequence[Demonstration]) -> None:
    """Create the state and measure its base, unless rows or anchors of the first run are too long."""
    root = Path(config.state)
    if others := [path.name for path in root.iterdir() if path.name != f".{START}.unfinished"]:
        raise UserError(f"state {config.state!r}: not a state, contains {others[0]!r}; give another folder")
    if not config.model:
        raise UserError(f"state {config.state!r} does not exist yet; give the base as model")
    check_replaced(config, [])
    first = run.model_copy(update={"model": config.model})
    fitting_rows(first, config, chosen_rows(rows, config))  # again in begin(), but the base is measured before
    check_anchor_lengths(first, config, [])
    with whole_folder(root / START, "free disk space, then add it again") as folder:
        if config.prior:
            say_prior_detects([len(rows) for rows in load_prior(config.prior).values()])
            (folder / "prior").mkdir()
            for name, text in _texts(config.prior).items():
                (folder / "prior" / name).write_bytes(text)
        prior = str(folder / "prior") if config.prior else None
        base = load_for_training(config.model, dtype=config.dtype, adapter_base=config.adapter_base)
        if not config.lora_rank:
            refuse_float16(base.model, config.model)
        date = base.chat(date=config.template_date).date
        precision = resolved_precision(config.mixed_precision)
        settled = config.model_copy(update={"template_date": date, "mixed_precision": precision})
        write_json(folder / "base.json", measure_model(base, [], prior, settled))
        state = {"model": _absolute(config.model), "weights": start_fingerprint(base), "template_date": date}
        state |= {key: getattr(settled, key) for key in MEASURED_WITH}
        (folder / "state.yaml").write_text(yaml.safe_dump(state), encoding="utf-8")


def _date_of_older(ledger: Ledger, run: TrainConfig) -> str | None:
    """The date for a state of an older release: that of its first skill's run, also a pending one's, else the given
    one, else today.

    None if the chat template does not read the clock.
    """
    folders = [*(skill.folder for skill in ledger.skills), ledger.pending]
    first = folders[0] / "run" / "config.yaml"
    date = load_saved(first, TrainConfig).get("template_date") if first.exists() else None
    return date_shown(run.model_copy(update={"model": ledger.base, "template_date": date or run.template_date}))


def _texts(prior: str) -> dict[str, bytes]:
    """The contents of the prior files, by the name that a folder of them needs; a single file may have any other."""
    path = Path(located(prior))
    files = path.glob("*.jsonl") if path.is_dir() else [path]
    return {f"{file.stem}.jsonl": file.read_bytes() for file in files}


def _absolute(model: str) -> str:
    return os.path.abspath(model) if os.path.isdir(model) else model


def measure_model(loaded: LoadedModel, folders: list[tuple[str, Path]], prior: str | None, config: LearnConfig) -> Any:
    """Evaluate a model on each skill's test, with that skill's settings, and on prior abilities."""
    use_engine(loaded, config)
    learnt_with = [settings_of(folder) for _, folder in folders]
    judges = {settings.judge_model for settings in learnt_with if settings.scorer == JUDGE}
    moved = {config.judge_model} if config.judge_model or len(judges) > 1 else judges
    with training_precision(loaded.model, config.mixed_precision):
        skills: dict[str, Evaluation] = {}
        for (name, folder), settings in zip(folders, learnt_with, strict=True):
            if settings.template_date is None:  # of an older release
                settings = settings.model_copy(update={"template_date": config.template_date})
            if config.judge_url and settings.judge_model in moved:
                settings = settings.model_copy(update={"judge_url": config.judge_url})
            rows = load_demonstrations(str(folder / "test.jsonl"))
            skills[name] = EvaluationSet(loaded, rows, {}, settings).ask(
                loaded, judge_of(settings), who="model", rows=f"skill {name}"
            )[0]
        chat = loaded.chat_for(config)
        priors = encode_priors(loaded, chat, load_prior(prior)) if prior else []
        return {"skills": skills, **prior_scores(loaded, chat, priors, config.batch_size, "model")}


def _remove_checkpoints(run: Path) -> None:
    for checkpoint in run.glob("checkpoint-*"):
        shutil.rmtree(checkpoint, ignore_errors=True)


class _NewSkill:
    """The addition in ``pending``."""

    def __init__(self, ledger: Ledger, stop: StopRequests) -> None:
        self._ledger, self._folder, self._stop = ledger, ledger.pending, stop
        self._config = settings_of(self._folder)
        asked = json.loads((self._folder / "asked.json").read_text(encoding="utf-8"))
        self._name, self._data = str(asked["name"]), str(asked["data"])
        self._new = [(self._name, self._folder)]
        self._all = [*((skill.name, skill.folder) for skill in ledger.skills), *self._new]

    def result(self) -> dict[str, Any]:
        """Run the remaining steps and decide whether to accept."""
        result: dict[str, Any] = {"name": self._name, "data": self._data, "replaces": self._config.replaces}
        result |= self._step("before", self._before)
        run = run_config(self._config, self._ledger.model, self._config.context, self._folder)
        result["check"] = self._step("check", lambda: check_teacher(run))
        is_past = self._ledger.interrupted is not None  # what has begun to learn from its teacher goes on
        reasons = [] if is_past else reasons_against_teacher(result["check"], self._config.min_teacher)
        if not reasons:
            try:
                result["training"] = self._train(result["check"]["context"])
                result["after"] = self._step("after", lambda: self._on(str(self._folder / "model"), self._all, True))
                result |= compared(self._ledger, result["after"], self._config)
                reasons += reasons_against(result, self._config)
            except RunFailed as failed:
                reasons.append(str(failed))
        finished = time.strftime("%Y-%m-%d %H:%M:%S")
        return result | {"date": finished, "accepted": not reasons, "reasons": reasons}

    def _step(self, name: str, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The result of a step, read from its file or computed."""
        file = self._folder / f"{name}.json"
        if not file.exists():
            self._stop_where_asked()
            write_json(file, measure())
        self._stop_where_asked()
        found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        return found

    def _stop_where_asked(self) -> None:
        if self._stop.received is not None:
            raise RunStopped("stopped", self._stop.received)

    def _on(self, model: str, folders: list[tuple[str, Path]], prior: bool) -> dict[str, Any]:
        config = self._config
        loaded = load_for_training(model, dtype=config.dtype, adapter_base=config.adapter_base)
        if model == self._ledger.base:
            self._ledger.refuse_other_weights(start_fingerprint(loaded))
        if not config.lora_rank:
            refuse_float16(loaded.model, model)
        found: dict[str, Any] = measure_model(loaded, folders, self._ledger.prior if prior else None, config)
        return found

    def _before(self) -> dict[str, Any]:
        """Evaluate the base and the current model on the new skill."""
        ledger = self._ledger
        base = self._on(ledger.base, self._new, False)["skills"][self._name]
        now = base if not ledger.skills else self._on(ledger.model, self._new, False)["skills"][self._name]
        return {"base": base, "before": now}

    def _train(self, context: str) -> dict[str, Any]:
        """Train and return the cost. Leaves the complete model in ``model``, and no checkpoints in ``run``.

        Raises:
            RunFailed: the training failed; no checkpoints are left then either.
        """
        model = self._folder / "model"
        run = run_config(self._config, self._ledger.model, context, self._folder)
        folder = Path(run.output_dir)
        if not model.is_dir():
            self._forget_dropped(run)
            if run.lora_rank:
                check_disk_for_merged(run.model, run.adapter_base, self._folder)
            try:
                take_whole(self._trained(run), model, run.model)
            except RunFailed:  # nothing resumes from them; a stream has a run for each chunk
                for failed in (folder, *self._folder.glob("chunks/*/run")):
                    _remove_checkpoints(failed)
                raise
            self._stop_where_asked()
        _remove_checkpoints(folder)
        shutil.rmtree(folder / "final", ignore_errors=True)
        if self._config.action == "stream":
            chunks = [line.get("training") for line in read_lines(self._folder / "stream.jsonl")]
            cost = total([chunk for chunk in chunks if chunk])
        else:
            cost = cost_of(run, len(self._config.anchors))
        memory = self._folder / MEMORY
        rehearses = memory.exists() and run.anchor_share > 0
        return cost | {"rehearsed": len(load_prompts(str(memory))) if rehearses else 0}

    def _forget_dropped(self, run: TrainConfig) -> None:
        """Keep only the prompts of rows that can be learnt; which ones these are depends on the context."""
        if self._config.on_long_prompt == "drop":
            rows = load_demonstrations(str(self._folder / "train.jsonl"))
            keep_prompts(self._folder, self._config, as_shown(self._config, fitting_rows(run, self._config, rows)))

    def _trained(self, run: TrainConfig) -> Path:
        """Train, and return the folder of the final model, which may be an adapter."""
        folder = Path(run.output_dir)
        if self._config.action == "stream":
            return learn_stream(run, self._config, self._folder, self._stop)
        if (folder / "final").is_dir():
            return folder / "final"
        along = StepsFile(self._folder / "along.jsonl", run.max_steps or 2**62) if self._config.eval_steps else None
        if folder.exists():  # a run that began under an older release keeps its own date
            run = run.model_copy(update={"template_date": None})
        try:
            return train(run, resume=folder.exists(), on_step=self._look(along) if along else None)
        except CannotResume as error:
            state = shlex.quote(self._config.state)
            discard = f"discard the addition with selfdistill learn --state {state} discard"
            raise CannotResume(error.found, discard) from error

    def _look(self, along: StepsFile) -> OnStep:
        """A callback that writes the scores of all skills to ``along.jsonl`` every ``eval_steps`` steps."""

        def look(step: int, loaded: LoadedModel, _metrics: dict[str, Any]) -> None:
            if step % self._config.eval_steps == 0 and step not in along.steps:
                found = measure_model(loaded, self._all, self._ledger.prior, self._config)
                scores = {name: evaluation["accuracy"] for name, evaluation in found["skills"].items()}
                along.write({"step": step, "skills": scores, "prior_accuracy": found.get("prior_accuracy")})

        return look
