"""The result of a check: each layout's numbers, the verdict, the table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from selfdistill.evaluation.spill import STEPS, Spill, Trial
from selfdistill.evaluation.statistics import paired, share_interval
from selfdistill.runtime import Printable, result_table

UNLIKELY = 4
"""Exit code when self-distillation is unlikely to help."""
KNOWN = 0.9
"""A student with at least this accuracy knows the task, unless the teacher is right on at least two more rows."""


@dataclass(frozen=True)
class Layout:
    """The results of one context layout."""

    context: str
    items: int
    """Rows that fit this layout and were evaluated."""
    accuracy: float | None
    """Accuracy of the teacher's greedy replies; None if no row has anything to score them with."""
    logp: float | None
    """Mean log-probability of the demonstration's tokens under the teacher, nats; None without completions."""
    kl: float
    """KL(teacher||student) along the student's samples, nats per token."""
    kl_by_position: list[float]
    """The same for each of the first completion tokens. A high start reflects framing or style, not skill."""
    length: float
    """Mean length of the teacher's replies, in tokens."""
    truncated: float
    """Share of the teacher's replies truncated at the length limit."""
    prompt_length: float
    """Mean length of the teacher's prompts, in tokens."""
    turns: float | None = None
    """Mean number of the teacher's turns in an episode; None without an environment."""
    invalid_calls: float | None = None
    """Mean number of invalid calls in an episode; None as above."""
    hint: float = 1.0
    """Share of the demonstration that the teacher sees."""
    trial: Trial | None = None
    """What a few steps of SDFT with this hint learn; None if no step was taken."""


@dataclass(frozen=True)
class Cost:
    """The expected cost of a step of training, or why it is unknown."""

    seconds: float | None = None
    gib: float | None = None
    """Peak memory."""
    rows: int | None = None
    """Rows per micro-batch that the peak is for."""
    unknown: str | None = None
    """Why there are none of these; None if there are, or if nothing was measured."""


@dataclass(frozen=True, repr=False)
class CheckResult(Printable):
    """The result of ``selfdistill check``."""

    model: str
    data: str
    items: int
    """Rows evaluated."""
    dropped: int
    """Sampled rows dropped because even the student's prompt is too long (``on_long_prompt: drop``)."""
    student_accuracy: float | None
    """Accuracy of the student's greedy replies; None if no row has anything to score them with."""
    student_accuracy_on_best: float | None
    """The same on the rows that fit the best layout."""
    student_logp: float | None
    """Mean log-probability of the demonstration's tokens under the student, nats; None without completions."""
    student_length: float
    """Mean length of the student's replies, in tokens."""
    student_truncated: float
    """Share of the student's replies truncated at the length limit."""
    student_turns: float | None
    """Mean number of the student's turns per episode; None without an environment."""
    student_invalid_calls: float | None
    """Mean number of the student's invalid calls per episode; None without an environment."""
    layouts: list[Layout]
    """Best first: by right replies, then by rows that fit, then by ``logp``."""
    skipped: dict[str, str]
    """Layouts that could not be evaluated, with the reason."""
    teacher_kl: float
    """KL(teacher||base) along the teacher's own greedy replies, nats per token, with the best layout."""
    fine_tuned_accuracy: float | None
    """Accuracy of the model ``fine_tuned`` on the rows of the best layout; None without such a model, or if replies are
    not scored."""
    fine_tuned_kl: float | None
    """KL(fine-tuned||base) along the fine-tuned model's own greedy replies, nats per token; None without such a
    model."""
    batch_size: int
    """Prompts per step of the training run whose cost is estimated."""
    lora_rank: int
    """Rank of that run's adapter; 0: full fine-tuning."""
    seconds_per_step: float | None
    """Expected duration of a step at ``batch_size``; None if the cost was not measured."""
    memory_gib: float | None
    """Expected peak memory, in GiB, with an EMA teacher and ``memory_rows`` rows per micro-batch; None as above."""
    memory_rows: int | None
    """``batch_size``, or the number of rows of the best layout if smaller; None as above."""
    cost_unknown: str | None
    """Why there are none of these three though they were requested; None otherwise."""
    spill: Spill | None
    """How a few steps on the task change the model on unrelated prompts; None if neither it nor ``hints`` is
    requested."""
    hints: list[Layout] | None
    """The best layout that can show part of the demonstration, at increasing shares of it; None if not requested, or if
    there is no such layout."""
    known: bool
    """Whether the student's accuracy on the rows of the best layout is at least ``KNOWN``."""
    verdict: str
    exit_code: int
    """0: worth trying, or unknown; 4: unlikely to help."""
    seconds: float
    """Duration of the check."""

    @property
    def best(self) -> Layout:
        return self.layouts[0]

    def print(self, console: Console) -> None:
        """Print a table of the layouts, then the verdict."""
        _print(self, console)

    def to_dict(self) -> dict[str, Any]:
        """All fields, for ``--json``, plus ``best`` and ``ceiling``, the best layout's name and accuracy."""
        return {**asdict(self), "best": self.best.context, "ceiling": self.best.accuracy}


def knows(accuracy: float | None) -> bool:
    """Whether a model with this accuracy knows the task; False if its replies are not scored."""
    return accuracy is not None and accuracy >= KNOWN


def verdict_on(
    student: Sequence[bool] | None, teacher: Sequence[bool], student_logp: float | None, best: Layout, layouts: int = 1
) -> tuple[str, int]:
    """The verdict and exit code. Unknown if the teacher is right on at least two more rows, but perhaps by chance.

    Args:
        student: whether the student is right on each row of ``best``; None if they are not scored.
        teacher: the same for the teacher with ``best``.
        student_logp: mean log-probability of the demonstrations of these rows, nats per token; None without any.
        best: the best layout.
        layouts: the number of layouts that it is the best of.
    """
    items = best.items
    if best.accuracy is None or student is None:
        text = (
            "It is unknown whether the teacher is better: rows have neither completion nor answer to score replies "
            "with."
        )
        return f"{text} Add the column 'answer' to some rows to find out.", 0
    low, high = share_interval(sum(teacher), items)
    student_accuracy = sum(student) / items
    chosen = f"{best.context}, best of {layouts} layouts," if layouts > 1 else best.context
    scores = (
        f"the teacher with {chosen} is right on {best.accuracy:.0%} (95% interval {low:.0%} to {high:.0%}), the "
        f"student on {student_accuracy:.0%}"
    )
    if _is_better(student, teacher, layouts):
        text = f"Worth trying: {scores} of {items} rows. Expect at most about {best.accuracy:.0%} after training."
        if student_accuracy == 0 and best.kl > 3:
            text += (
                " The two are far apart, so the student's samples may rarely resemble the demonstration. A lower "
                "temperature or a higher learning rate helps it start."
            )
        return text, 0
    cannot_differ = not knows(student_accuracy) and knows(best.accuracy) and items * (1 - KNOWN) < 2
    if sum(teacher) - sum(student) >= 2 or cannot_differ:
        text = f"It is unknown whether self-distillation helps: {scores} of {items} rows, which are too few to tell."
        return f"{text} Raise sample, or give more rows.", 0
    text = f"Self-distillation is unlikely to help: {scores} of {items} rows; "
    if knows(student_accuracy):
        return text + "the student already knows this.", UNLIKELY
    text += "the teacher is not clearly better."
    if best.truncated > 0.5:
        text += (
            f" {best.truncated:.0%} of its replies were truncated at the length limit, so they may be right but "
            "unfinished: raise max_completion_length."
        )
    elif best.logp is not None and student_logp is not None and best.logp > student_logp:
        text += (
            f" The demonstration is more likely under the teacher ({best.logp:.2f} nats per token) than under the "
            f"student ({student_logp:.2f}), so a scorer that suits the data better may show a difference."
        )
    else:
        text += " Try other contexts, a larger model, or supervised fine-tuning."
    return text, UNLIKELY


def _is_better(student: Sequence[bool], teacher: Sequence[bool], layouts: int) -> bool:
    """Whether chance does not explain that the teacher is right more often.

    The best of several layouts is better by chance more easily, so each has its part of the level of 5% (Bonferroni).
    McNemar's exact test takes at least six rows, with seven layouts nine. Fewer suffice if the teacher is right on all
    and the student on none: on a row where both are right with the same probability q, the teacher alone is right with
    q (1 - q), at most 1/4.
    """
    level = 0.05 / layouts
    if all(teacher) and not any(student):
        return 0.25 ** len(teacher) < level
    return sum(teacher) > sum(student) and paired(student, teacher).p < level


def _print(result: CheckResult, console: Console) -> None:
    episodes = () if result.student_turns is None else ("turns", "invalid calls")
    title = f"{result.model} on {result.items} rows of {result.data}"
    cut = "cut" if episodes else "truncated"
    table = result_table("context", "right", "log p(demo)", "KL", "tokens", cut, "prompt", *episodes, title=title)
    table.add_row(
        "none (the student)",
        _number(result.student_accuracy),
        _number(result.student_logp),
        "",
        f"{result.student_length:.0f}",
        f"{result.student_truncated:.0%}",
        "",
        *_counts(result.student_turns, result.student_invalid_calls),
    )
    for layout in result.layouts:
        table.add_row(
            escape(layout.context),
            _number(layout.accuracy),
            _number(layout.logp),
            f"{layout.kl:.2f}",
            f"{layout.length:.0f}",
            f"{layout.truncated:.0%}",
            f"{layout.prompt_length:.0f}",
            *_counts(layout.turns, layout.invalid_calls),
        )
    console.print(table)
    if result.hints:
        console.print(_hints_table(result.hints))
    for name, reason in result.skipped.items():
        console.print(f"not evaluated: {name}: {reason}", markup=False, highlight=False)
    if result.dropped:
        rows = f"{result.dropped} of {result.items + result.dropped} rows"
        console.print(f"dropped: {rows}, too long", markup=False, highlight=False)
    for layout in result.layouts:
        if missing := result.items - layout.items:
            text = f"dropped with {layout.context}: {missing} of {result.items} rows, too long"
            console.print(text, markup=False, highlight=False)
    profile = " ".join(f"{value:.2f}" for value in result.best.kl_by_position)
    lines = [
        "log p(demo) and KL(teacher||student) are in nats per token; the KL is along the student's samples.",
        f"KL of {result.best.context} at completion tokens 1, 2, ...: {profile}",
        _closeness_line(result),
        *_cost_line(result),
        *_trials_line(result),
        *([f"Spill: {result.spill.sentence()}."] if result.spill else []),
        *_order_line(result),
        *_truncation_line(result),
        result.verdict,
        f"{_choice(result)}: {result.best.context}   (the check took {result.seconds:.0f} s)",
    ]
    for line in lines:
        console.print(line, markup=False, highlight=False)


def _choice(result: CheckResult) -> str:
    """How to label the best layout."""
    is_poor = result.exit_code == UNLIKELY and not result.known
    return "No context is good enough; the least bad" if is_poor else "Best context"


def _hints_table(hints: list[Layout]) -> Table:
    title = f"the teacher with part of the demonstration, {hints[0].context}"
    learnt = ["gain", "moved"] if any(layout.trial for layout in hints) else []
    table = result_table("hint", "right", "log p(demo)", "KL", "prompt", *learnt, title=title)
    for layout in hints:
        numbers = [_number(layout.accuracy), _number(layout.logp), f"{layout.kl:.2f}", f"{layout.prompt_length:.0f}"]
        if layout.trial:
            numbers += [f"{layout.trial.gain:+.2f}", f"{layout.trial.moved:.3f}"]
        table.add_row(f"{layout.hint:g}", *numbers)
    return table


def _trials_line(result: CheckResult) -> list[str]:
    """What the last columns of the hints' table are."""
    if result.spill is None or not any(layout.trial for layout in result.hints or ()):
        return []
    return [
        f"gain and moved: what {STEPS} steps of SDFT with each hint gain on the demonstrations, and how far they move "
        f"{result.spill.prompts}, in nats per token."
    ]


def _counts(turns: float | None, invalid_calls: float | None) -> list[str]:
    """The cells that only episodes have."""
    return [f"{count:.2f}" for count in (turns, invalid_calls) if count is not None]


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _closeness_line(result: CheckResult) -> str:
    """The two conditions of the method (arXiv 2601.19897): the teacher is near-optimal, and close to the base."""
    accuracy = result.best.accuracy
    right = "" if accuracy is None else f"has {accuracy:.0%} accuracy and "
    text = f"In-context assumption: the teacher {right}is {result.teacher_kl:.2f} nats per "
    text += "token from the base along its own replies"
    if result.fine_tuned_kl is None or result.fine_tuned_accuracy is None or result.student_accuracy_on_best is None:
        return f"{text}. To tell if that is near, compare a model fine-tuned on the same rows: give it as fine_tuned."
    text += (
        f"; the fine-tuned model has {result.fine_tuned_accuracy:.0%} accuracy and is {result.fine_tuned_kl:.2f} nats "
        "from it along its own"
    )
    if result.fine_tuned_accuracy <= result.student_accuracy_on_best:
        return f"{text}. It has learnt nothing, so its distance is not comparable: fine-tune it further."
    nearer = "nearer to the base, as assumed" if result.teacher_kl < result.fine_tuned_kl else "not nearer: a bad sign"
    return f"{text}: the teacher is {nearer}."


def _cost_line(result: CheckResult) -> list[str]:
    if result.cost_unknown:
        advice = "selfdistill train --dry_run --device this names settings that fit"
        return [f"Cost of a step: unknown, because {result.cost_unknown}; {advice}."]
    if result.seconds_per_step is None:
        return []
    learnt = f"LoRA of rank {result.lora_rank}" if result.lora_rank else "full fine-tuning"
    return [
        f"Expected with batch_size {result.batch_size}: {result.seconds_per_step:.1f} s per step; "
        f"{result.memory_gib:.1f} GiB with {result.memory_rows} rows per micro-batch ({learnt}, EMA)."
    ]


def _truncation_line(result: CheckResult) -> list[str]:
    """A warning that the comparison says little, because mostly the student's replies were cut."""
    if result.student_truncated <= 0.5 or result.best.truncated > 0.5:  # of the teacher's the verdict speaks
        return []
    return [
        f"{result.student_truncated:.0%} of the student's replies were truncated at the length limit, so its accuracy "
        "may be too low: raise max_completion_length."
    ]


def _order_line(result: CheckResult) -> list[str]:
    if len({(layout.accuracy, layout.items) for layout in result.layouts}) > 1 or len(result.layouts) == 1:
        return []
    if result.best.accuracy is None and result.best.logp is None:
        return ["It is unknown which layout is best, so the one most like TRL's comes first."]
    return ["All layouts have the same accuracy, so log p(demo) alone decides their order."]
