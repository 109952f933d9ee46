"""Before training: is the teacher better than the student, and which context is best?

On a sample of the demonstrations, each context layout is evaluated: the teacher's greedy accuracy, the log-probability
it gives the demonstration, and its KL from the student along the student's samples. The student can hardly exceed its
teacher, so the best teacher's accuracy is the expected ceiling.

Legend: N completion tokens of all examples without padding.
"""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch

from selfdistill.config import LEARNING_RATE, CheckConfig, TrainConfig
from selfdistill.data import (
    Demonstration,
    Example,
    Lacks,
    Rows,
    context_of,
    context_spec,
    doubt_about,
    encode,
    hintable,
    is_scorable,
    load_demonstrations,
    notes_on,
    notes_on_episodes,
    nothing_to_show,
    parse_context,
)
from selfdistill.errors import EngineFailed, UserError
from selfdistill.evaluation.answers import Answers, answer, check_answers
from selfdistill.evaluation.check_result import UNLIKELY, CheckResult, Layout, verdict_on
from selfdistill.evaluation.distances import kl_along, summed_loss
from selfdistill.evaluation.judge import judge_of
from selfdistill.evaluation.spill import Spill, TrialSettings, measure_spill, task_loss
from selfdistill.loss import CrossEntropy, Divergence
from selfdistill.methods import shows_parts, stages_of
from selfdistill.model import (
    ForwardPass,
    LoadedModel,
    PrefixCache,
    Rollout,
    Sampling,
    load_for_training,
    load_matching,
    refuse_float16,
    resolved_precision,
    sample,
    sample_seed,
    use_engine,
)
from selfdistill.runtime import ProgressBar, clock, peak_memory, say, say_note

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
"""The layout that comes first where nothing tells layouts apart: much like the one that TRL's SDFT has."""
SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)
"""Shares of the demonstration that ``hints`` measures."""
KEPT_BYTES, POSITIONS = 2**28, 8
"""Bytes for the prefix cache of the student's prompts, and as many for one layout's; leading completion tokens whose KL
is listed individually."""


def best_context(config: TrainConfig, demonstrations: Rows | None = None, loaded: LoadedModel | None = None) -> str:
    """Find the best layout for a training run with ``context: auto``, and print the check.

    The cost is not measured, because full fine-tuning may need far more memory than the run itself.

    Args:
        config: settings of the run.
        demonstrations: the training data, if already loaded; else ``config.data`` is read.
        loaded: the model, if already loaded.
    """
    result = check_run(config, demonstrations, loaded)
    say(repr(result))
    if result.exit_code == UNLIKELY:
        say(f"note: self-distillation is unlikely to help; training anyway, with {result.best.context}")
    return result.best.context


def check_run(
    config: TrainConfig, demonstrations: Rows | None = None, loaded: LoadedModel | None = None
) -> CheckResult:
    """Check the teacher of a training run, with its context, or with all layouts if that is ``auto``."""
    shared = CheckConfig.model_fields.keys() & TrainConfig.model_fields.keys()
    own: dict[str, Any] = {"model": config.model}
    if config.teacher_model:
        own = {"model": config.teacher_model, "adapter_base": None}
    contexts = [] if config.context == "auto" else [config.context]
    if not contexts and any(shows_parts(part.method) for parts in stages_of(config) for part in parts):
        contexts = hintable(LAYOUTS)
    settings = {name: getattr(config, name) for name in shared} | own
    loaded = None if config.teacher_model else loaded
    if loaded is None:
        loaded = load_for_training(
            own["model"],
            dtype=config.dtype,
            adapter_base=settings["adapter_base"],
            load_in_4bit=config.load_in_4bit and not config.teacher_model,
        )
    if not config.lora_rank and not config.teacher_model:  # before it is measured for minutes
        refuse_float16(loaded.model, own["model"])
    data = config.data if demonstrations is None else demonstrations
    rows = load_demonstrations(data, split=config.split, turns=config.turns)
    return _checked(CheckConfig(**settings, contexts=contexts), rows, loaded, cost=False)


def check(
    config: CheckConfig, demonstrations: Rows | None = None, loaded: LoadedModel | None = None, *, cost: bool = True
) -> CheckResult:
    """Evaluate the student, and the teacher with each context layout.

    Args:
        config: settings.
        demonstrations: the data, if already loaded; else ``config.data`` is read.
        loaded: the model, if already loaded; else ``config.model`` is loaded.
        cost: also estimate time and memory of a training step, from one forward and backward pass.

    Raises:
        UserError: settings, data or model are invalid, or no layout fits.
    """
    data = config.data if demonstrations is None else demonstrations
    rows = load_demonstrations(
        data, split=config.split, turns=config.turns, note=say_note, lacks=_lacks(config.contexts)
    )
    return _checked(config, rows, loaded, cost)


def _lacks(specs: Sequence[str]) -> Lacks:
    """What a row must have for any of the contexts, or for any at all if none is given."""
    if not specs:
        return nothing_to_show
    contexts = [parse_context(spec) for spec in specs]

    def lacks(demonstration: Demonstration) -> str | None:
        problems = [context.lacks(demonstration) for context in contexts]
        return problems[0] if all(problems) else None

    return lacks


def _checked(config: CheckConfig, rows: list[Demonstration], loaded: LoadedModel | None, cost: bool) -> CheckResult:
    began = time.monotonic()
    specs = config.contexts or [*LAYOUTS, *(DOCUMENT_LAYOUTS if any(row.document for row in rows) else ())]
    contexts = [parse_context(spec) for spec in specs]
    can_hint = {context_spec(parse_context(spec)) for spec in hintable(specs)} if config.hints else set()
    if loaded is None:
        loaded = load_for_training(config.model, dtype=config.dtype, adapter_base=config.adapter_base)
    use_engine(loaded, config)
    for note in [*notes_on_episodes(rows), *loaded.notes]:
        say_note(note)
    tuned = load_matching(config.fine_tuned, loaded, dtype=config.dtype) if config.fine_tuned else None
    measure = _Measure(config, rows, loaded)
    layouts, skipped = [], {}
    with ProgressBar("layout", len(contexts), every=1) as reporter:
        for number, context in enumerate(contexts):
            name = context_spec(context)
            try:
                layouts.append(measure.layout(name))
            except EngineFailed:  # says nothing about the layout
                raise
            except UserError as error:
                skipped[name] = str(error)
            reporter.advance(number + 1, name)
    if not layouts:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in skipped.items())
        raise UserError(f"no context layout could be evaluated: {reasons}")
    layouts.sort(key=lambda layout: (-(layout.accuracy or 0), -(layout.logp or 0), layout.context != UNMEASURED))
    teacher_kl, tuned_accuracy, tuned_kl = measure.closeness(layouts[0].context, tuned)
    seconds, memory, memory_rows = measure.cost(layouts[0].context) if cost else (None, None, None)
    spill = measure.spill(layouts[0].context) if config.spill else None
    best = next((layout.context for layout in layouts if layout.context in can_hint), None)
    hints = [measure.layout(best, share) for share in SHARES] if best else None
    verdict, exit_code = verdict_on(*measure.student_on(layouts[0].context), layouts[0])
    return CheckResult(
        model=config.model,
        data=config.data,
        items=len(measure.rows),
        dropped=measure.dropped,
        student_accuracy=measure.accuracy_of(measure.student),
        student_logp=measure.student_logp,
        student_length=sum(measure.student.lengths) / len(measure.rows),
        student_truncated=measure.student.truncated / len(measure.rows),
        layouts=layouts,
        skipped=skipped,
        teacher_kl=teacher_kl,
        fine_tuned_accuracy=tuned_accuracy,
        fine_tuned_kl=tuned_kl,
        seconds_per_step=seconds,
        memory_gib=memory,
        memory_rows=memory_rows,
        spill=spill,
        hints=hints,
        verdict=verdict,
        exit_code=exit_code,
        seconds=time.monotonic() - began,
    )


class _Measure:
    """Evaluates the student once, and the teacher for each layout."""

    def __init__(self, config: CheckConfig, demonstrations: list[Demonstration], loaded: LoadedModel) -> None:
        self.config, self.pool, self.loaded = config, demonstrations, loaded
        self.bfloat16 = resolved_precision(config.mixed_precision) == "bf16"
        self.chat = loaded.chat(config.chat_template_kwargs, config.template_date)
        self.forward_pass = ForwardPass(loaded)
        scorable = [row for row in demonstrations if is_scorable(row, config.scorer)]
        self.scored = bool(scorable)
        """Whether replies are scored; if not, teacher and student are compared by their distributions alone."""
        asked = scorable or demonstrations
        chosen = random.Random(config.seed).sample(asked, min(config.sample, len(asked)))
        self.rows = self._encode(sorted(chosen, key=lambda d: d.row), None)
        self.dropped = len(chosen) - len(self.rows)
        measured = [row.demonstration for row in self.rows]
        if self.scored:
            check_answers(measured, config.scorer)
        for note in notes_on(self.rows, self.chat):
            say_note(note)
        if doubt := doubt_about(measured, config.scorer):
            say_note(doubt)
        self.kept = self.forward_pass.keep([row.student_ids for row in self.rows], KEPT_BYTES)
        self.student = self._answer([row.student_ids for row in self.rows], self.rows)
        self.student_logp = self._logp([row.student_ids for row in self.rows], self.rows, self.kept)
        began = clock(loaded.device)
        rollouts = self._rollouts()
        self.rollout_s = (clock(loaded.device) - began) / len(self.rows)
        self.teacher_ids: dict[str, list[list[int]]] = {}  # the teacher's replies by layout
        self.rollout_of = {row.demonstration.row: r for row, r in zip(self.rows, rollouts, strict=True)}

    def _encode(self, rows: Sequence[Demonstration], context: str | None, hint: float = 1) -> list[Example]:
        """Encode the rows that fit the window, with ``max_completion_length`` and with the demonstration."""
        config, window = self.config, self.loaded.window
        encoded, _ = encode(
            rows,
            None if context is None else context_of(context, hint),
            self.chat,
            max_prompt_length=config.max_prompt_length,
            max_completion_length=config.max_completion_length,
            window=window,
            on_long_prompt=config.on_long_prompt,
            pool=self.pool,
        )
        if window is None:
            return encoded
        lengths = [len(row.teacher_ids or row.student_ids) + len(row.completion_ids) for row in encoded]
        kept = [row for row, length in zip(encoded, lengths, strict=True) if length <= window]
        if len(kept) < len(encoded) and (config.on_long_prompt == "error" or not kept):
            row, length = next(pair for pair in zip(encoded, lengths, strict=True) if pair[1] > window)
            who = "prompt" if context is None else "teacher's prompt"
            raise UserError(
                f"{len(encoded) - len(kept)} of {len(encoded)} rows do not fit: {row.demonstration.source}: "
                f"{who} and demonstration have {length} tokens, limit {window} (the model's window); "
                "drop them with --on_long_prompt drop"
            )
        return kept

    def accuracy_of(self, answers: Answers) -> float | None:
        """The share of right replies; None if they are not scored."""
        return answers.accuracy if self.scored else None

    def student_on(self, context: str) -> tuple[float | None, float | None]:
        """The student's accuracy and mean log-probability of the demonstrations, on the rows that fit a layout."""
        fits = {row.demonstration.row for row in self._encode([row.demonstration for row in self.rows], context)}
        if len(fits) == len(self.rows):
            return self.accuracy_of(self.student), self.student_logp
        rows = [row for row in self.rows if row.demonstration.row in fits]
        logp = self._logp([row.student_ids for row in rows], rows, self.kept)
        if not self.scored:
            return None, logp
        right = [c for row, c in zip(self.rows, self.student.correct, strict=True) if row.demonstration.row in fits]
        return sum(right) / len(right), logp

    def _arithmetic(self) -> AbstractContextManager[Any]:
        """The precision of the training run."""
        return torch.autocast(self.loaded.device.type, torch.bfloat16, enabled=self.bfloat16)

    def _answer(self, prompts: list[list[int]], rows: Sequence[Example], loaded: LoadedModel | None = None) -> Answers:
        with self._arithmetic():
            return answer(
                loaded or self.loaded,
                prompts,
                [row.demonstration for row in rows],
                self.chat,
                max_completion_length=self.config.max_completion_length,
                batch_size=16,
                scorer=self.config.scorer,
                judge=judge_of(self.config),
                scored=self.scored,
            )

    def _rollouts(self) -> list[Rollout]:
        seeds = [sample_seed(self.config.seed, 0, row.demonstration.row, 0) for row in self.rows]
        with self._arithmetic():
            return sample(self.loaded, [row.student_ids for row in self.rows], self._sampling(), seeds)

    @torch.no_grad()
    def _logp(self, contexts: list[list[int]], rows: Sequence[Example], kept: PrefixCache | None) -> float | None:
        """Mean log-probability of the demonstrations, nats per token; None if no row has a completion."""
        pairs = [(ids, row.completion_ids) for ids, row in zip(contexts, rows, strict=True) if row.completion_ids]
        contexts, completions = [ids for ids, _ in pairs], [ids for _, ids in pairs]
        total, count = 0.0, 0
        for start in range(0, len(contexts), 8):
            part = completions[start : start + 8]
            with self._arithmetic():
                scores = self.forward_pass(self.loaded.model, contexts[start : start + 8], part, kept)
                total -= float(summed_loss(CrossEntropy(), scores, part)[0])
            count += sum(map(len, part))
        return total / count if count else None

    @torch.no_grad()
    def layout(self, context: str, hint: float = 1) -> Layout:
        """Evaluate the teacher with one layout, and this share of the demonstration.

        Raises:
            UserError: the layout does not fit the data or the window.
        """
        rows = self._encode([row.demonstration for row in self.rows], context, hint)
        prompts = [row.teacher_ids or [] for row in rows]
        kept = self.forward_pass.keep(prompts, KEPT_BYTES)
        answers = self._answer(prompts, rows)
        if hint == 1:
            self.teacher_ids[context] = answers.ids
        kl_N, place_N = [], []
        for start in range(0, len(rows), 8):
            part = slice(start, start + 8)
            ids = [self.rollout_of[row.demonstration.row].ids for row in rows[part]]
            with self._arithmetic():
                student = self.forward_pass(self.loaded.model, [row.student_ids for row in rows[part]], ids, self.kept)
                teacher = self.forward_pass(self.loaded.model, prompts[part], ids, kept)
                kl_N.append(summed_loss(Divergence(), student, ids, teacher)[1]["loss"])
            place_N += [place for row in ids for place in range(len(row))]
        kl, place = torch.cat(kl_N).cpu(), torch.tensor(place_N)
        by_position = [float(kl[place == p].mean()) for p in range(POSITIONS) if bool((place == p).any())]
        return Layout(
            context=context,
            items=len(rows),
            accuracy=self.accuracy_of(answers),
            logp=self._logp(prompts, rows, kept),
            kl=float(kl.mean()),
            kl_by_position=by_position,
            length=sum(answers.lengths) / len(rows),
            truncated=answers.truncated / len(rows),
            prompt_length=sum(map(len, prompts)) / len(rows),
            hint=hint,
        )

    def closeness(self, context: str, tuned: LoadedModel | None) -> tuple[float, float | None, float | None]:
        """KL(teacher||base); also the fine-tuned model's accuracy and KL(fine-tuned||base). Each along own replies."""
        rows = self._encode([row.demonstration for row in self.rows], context)
        prompts, base = [row.student_ids for row in rows], self.loaded
        with self._arithmetic():
            teacher = kl_along(prompts, self.teacher_ids[context], base, base, [row.teacher_ids or [] for row in rows])
        if tuned is None:
            return teacher, None, None
        answers = self._answer(prompts, rows, tuned)
        with self._arithmetic():
            return teacher, self.accuracy_of(answers), kl_along(prompts, answers.ids, tuned, base)

    def cost(self, context: str) -> tuple[float, float, int]:
        """Expected seconds per step, peak memory in GiB and its batch size, from one forward and backward pass."""
        rows = self._encode([row.demonstration for row in self.rows], context)[: self.config.batch_size]
        ids = [self.rollout_of[row.demonstration.row].ids for row in rows]
        model, device = self.loaded.model, self.loaded.device
        began = clock(device)
        task_loss(model, model, self.forward_pass, Divergence(), rows, ids, self._arithmetic).backward()
        scoring_s = clock(device) - began
        model.zero_grad(set_to_none=True)
        seconds = (scoring_s / len(rows) + self.rollout_s) * self.config.batch_size
        weights = sum(p.numel() for p in model.parameters()) * 4
        # Plus AdamW's two moments and the teacher's average.
        return seconds, (peak_memory(device) + 3 * weights) / 2**30, len(rows)

    def spill(self, context: str) -> Spill:
        """How far a few steps of SFT, and of SDFT with this context, move the model on general prompts."""
        rows = self._encode([row.demonstration for row in self.rows], context)
        rate = self.config.learning_rate or LEARNING_RATE
        settings = TrialSettings(rate, self._sampling(), self.config.seed, self._arithmetic)
        return measure_spill(self.loaded, self.forward_pass, rows, self.chat, settings)

    def _sampling(self) -> Sampling:
        """The student's policy."""
        return Sampling(self.config.max_completion_length, self.config.temperature)
