"""Before training: is the teacher better than the student, and which context is best?

On a sample of the demonstrations, each context layout is evaluated: the teacher's greedy accuracy, the log-probability
it gives the demonstration, and its KL from the student along the student's samples. The student can hardly exceed its
teacher, so the best teacher's accuracy is the expected ceiling.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from selfdistill.config import SHARED_WITH_CHECK, CheckConfig, TrainConfig
from selfdistill.data import (
    Demonstration,
    Lacks,
    Rows,
    check_scorer,
    context_spec,
    hintable,
    load_demonstrations,
    no_part,
    notes_on_episodes,
    nothing_to_show,
    parse_context,
    turns_of,
)
from selfdistill.errors import EngineFailed, UserError
from selfdistill.evaluation.check_result import UNLIKELY, CheckResult, Cost, Layout, knows, verdict_on
from selfdistill.evaluation.measure import Measure
from selfdistill.evaluation.spill import read_anchors
from selfdistill.methods import scorer_judges, shows_parts, stages_of
from selfdistill.model import (
    LoadedModel,
    load_for_training,
    load_matching,
    refuse_autocast,
    refuse_float16,
    use_engine,
    with_lora,
)
from selfdistill.runtime import ProgressBar, say, say_note

LAYOUTS = (
    "turns:repeats=1",
    "turns:repeats=2",
    "turns:repeats=4",
    "example:reasoning=true",
    "example:reasoning=false",
    "few_shot:k=3",
    "few_shot:k=3,this=true",
)
DOCUMENT_LAYOUTS = ("document:repeats=1", "document:repeats=2", "document:show=document")
UNMEASURED = "example:reasoning=true"
"""The layout that comes first if no measurement separates the layouts: it resembles the one in TRL's SDFT."""
SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)
"""Shares of the demonstration that ``hints`` measures."""


def best_context(config: TrainConfig, demonstrations: Rows | None = None, loaded: LoadedModel | None = None) -> str:
    """Find the best layout for a training run with ``context: auto``, and print the check.

    The cost is not measured; the run plans its own memory.

    Args:
        config: settings of the run.
        demonstrations: the training data, if already loaded; else ``config.data`` is read.
        loaded: the model, if already loaded.
    """
    say(
        "context auto: first measuring on some rows which context makes the best teacher; to skip this, name one, such "
        "as turns"
    )
    result = check_run(config, demonstrations, loaded)
    say(repr(result))
    if result.exit_code == UNLIKELY:
        say(f"note: self-distillation is unlikely to help; training anyway, with {result.best.context}")
    return result.best.context


def check_run(
    config: TrainConfig, demonstrations: Rows | None = None, loaded: LoadedModel | None = None
) -> CheckResult:
    """Check the teacher of a training run with its context or, for ``auto``, with all layouts that suit its method.

    Args:
        config: settings of the run.
        demonstrations: the training data, if already loaded; else ``config.data`` is read.
        loaded: the model, if already loaded; not used with a ``teacher_model``.

    Raises:
        UserError: settings, data or model are invalid, or no layout fits.
    """
    own: dict[str, Any] = {"model": config.model}
    if config.teacher_model:
        own = {"model": config.teacher_model, "adapter_base": None}
    contexts = [] if config.context == "auto" else [config.context]
    if not contexts and any(shows_parts(part.method) for parts in stages_of(config) for part in parts):
        contexts = hintable(LAYOUTS)
    settings = {name: getattr(config, name) for name in SHARED_WITH_CHECK} | own
    loaded = None if config.teacher_model else loaded
    if loaded is None:
        loaded = load_for_training(
            own["model"],
            dtype=config.dtype,
            adapter_base=settings["adapter_base"],
            load_in_4bit=config.load_in_4bit and not config.teacher_model,
        )
    if not config.lora_rank and not config.teacher_model:  # fail early: measuring takes minutes
        refuse_float16(loaded.model, own["model"])
    data = config.data if demonstrations is None else demonstrations
    rows = load_demonstrations(data, split=config.split, turns=config.turns)
    return _checked(CheckConfig(**settings, contexts=contexts), rows, loaded, cost=False)


def check(
    config: CheckConfig,
    demonstrations: Rows | None = None,
    loaded: LoadedModel | None = None,
    *,
    anchors: Sequence[Demonstration] | None = None,
    cost: bool = True,
) -> CheckResult:
    """Evaluate the student, and the teacher with each context layout.

    Args:
        config: settings.
        demonstrations: the data, if already loaded; else ``config.data`` is read.
        loaded: the model, if already loaded; else ``config.model`` is loaded.
        anchors: prompts on which ``spill`` and ``hints`` measure, if already loaded; else ``config.anchors`` are read.
        cost: also estimate time and memory of a training step, from one forward and backward pass.

    Raises:
        UserError: settings, data or model are invalid, or no layout fits.
    """
    data = config.data if demonstrations is None else demonstrations
    rows = load_demonstrations(
        data, split=config.split, turns=config.turns, note=say_note, lacks=_lacks(config.contexts)
    )
    return _checked(config, rows, loaded, cost, anchors)


def _lacks(specs: Sequence[str]) -> Lacks:
    """Refuse a row only if every given context refuses it; without contexts, if it has nothing to show."""
    if not specs:
        return nothing_to_show
    contexts = [parse_context(spec) for spec in specs]

    def lacks(demonstration: Demonstration) -> str | None:
        problems = [context.lacks(demonstration) for context in contexts]
        return problems[0] if all(problems) else None

    return lacks


def _with_hint(measure: Measure, context: str, share: float) -> Layout:
    """The teacher that sees this share of the demonstration, and what a few steps learn from it."""
    return replace(measure.layout(context, share), trial=measure.trial(context, share))


def _rank(layout: Layout) -> tuple[float, ...]:
    """The order of layouts, best first: by right replies, so that a row that is too long for one counts as wrong."""
    right = round((layout.accuracy or 0) * layout.items)
    return -right, -layout.items, -(layout.logp or 0), layout.context != UNMEASURED


def _layouts(measure: Measure, names: Sequence[str]) -> tuple[list[Layout], dict[str, str]]:
    """Evaluate each layout; of those that could not be, the reasons.

    Raises:
        UserError: none could be evaluated.
    """
    layouts, skipped = [], {}
    with ProgressBar("context layout", len(names), every=1) as reporter:
        for number, name in enumerate(names):
            try:
                layouts.append(measure.layout(name))
            except EngineFailed:  # not the layout's fault
                raise
            except UserError as error:
                skipped[name] = str(error)
            reporter.advance(number + 1, name)
    if not layouts:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in skipped.items())
        raise UserError(f"no context layout could be evaluated: {reasons}")
    return layouts, skipped


def _with_parts(config: CheckConfig, specs: Sequence[str], rows: Sequence[Demonstration]) -> set[str]:
    """The layouts in which ``hints`` can be measured; none if that is not asked for, or rows have no parts to show."""
    if not config.hints:
        return set()
    if config.environment != "none" or any(no_part(turn) for row in rows for turn in turns_of(row, "last")):
        say_note("hints are not measured, because a part of an episode cannot be shown")
        return set()
    return {context_spec(parse_context(spec)) for spec in hintable(specs)}


def _ready(config: CheckConfig, loaded: LoadedModel | None) -> LoadedModel:
    """The model, ready to be measured."""
    if loaded is None:
        loaded = load_for_training(config.model, dtype=config.dtype, adapter_base=config.adapter_base)
    if config.lora_rank:  # fail early: measuring takes minutes
        with with_lora(loaded, config.lora_rank, config.seed):
            pass
    use_engine(loaded, config)
    return loaded


def _checked(
    config: CheckConfig,
    rows: list[Demonstration],
    loaded: LoadedModel | None,
    cost: bool,
    anchors: Sequence[Demonstration] | None = None,
) -> CheckResult:
    began = time.monotonic()
    specs = config.contexts or [*LAYOUTS, *(DOCUMENT_LAYOUTS if any(row.document for row in rows) else ())]
    plays = config.environment != "none"
    contexts = [parse_context(spec, episodes=plays) for spec in specs]
    if scorer_judges(config):
        check_scorer(config.scorer)
    can_hint = _with_parts(config, specs, rows)
    general = read_anchors(config, anchors) if config.spill or can_hint else {}
    takes_steps = config.spill or bool(can_hint and general)
    if takes_steps:
        refuse_autocast()
    if not (config.spill or config.hints) and "anchors" in config.model_fields_set:
        say_note("setting 'anchors' has no effect without spill or hints")
    loaded = _ready(config, loaded)
    for note in [*([] if plays else notes_on_episodes(rows)), *loaded.notes]:
        say_note(note)
    tuned = None
    if config.fine_tuned:
        tuned = load_matching(config.fine_tuned, loaded, dtype=config.dtype, reads_chats=True)
    measure = Measure(config, rows, loaded, general)
    layouts, skipped = _layouts(measure, [context_spec(context) for context in contexts])
    layouts.sort(key=_rank)
    teacher_kl, tuned_accuracy, tuned_kl = measure.closeness(layouts[0].context, tuned)
    of_step = measure.cost(layouts[0].context) if cost else Cost()
    spill = measure.spill(layouts[0].context) if takes_steps else None
    best = next((layout.context for layout in layouts if layout.context in can_hint), None)
    hints = [_with_hint(measure, best, share) for share in SHARES] if best else None
    student, logp = measure.student_on(layouts[0].context)
    teacher = measure.teacher_said[layouts[0].context].correct
    verdict, exit_code = verdict_on(student, teacher, logp, layouts[0], len(layouts))
    accuracy = None if student is None else sum(student) / len(student)
    return CheckResult(
        model=config.model,
        data=config.data,
        items=len(measure.rows),
        dropped=measure.dropped,
        student_accuracy=measure.accuracy_of(measure.student),
        student_accuracy_on_best=accuracy,
        student_logp=measure.student_logp,
        student_length=sum(measure.student.lengths) / len(measure.rows),
        student_truncated=measure.student.truncated / len(measure.rows),
        student_turns=measure.student.turns,
        student_invalid_calls=measure.student.invalid_calls,
        layouts=layouts,
        skipped=skipped,
        teacher_kl=teacher_kl,
        fine_tuned_accuracy=tuned_accuracy,
        fine_tuned_kl=tuned_kl,
        batch_size=config.batch_size,
        lora_rank=config.lora_rank,
        seconds_per_step=of_step.seconds,
        memory_gib=of_step.gib,
        memory_rows=of_step.rows,
        cost_unknown=of_step.unknown,
        spill=spill,
        hints=hints,
        known=knows(accuracy),
        verdict=verdict,
        exit_code=exit_code,
        seconds=time.monotonic() - began,
    )
