"""Conclusions of a comparison: means over seeds, models matched by accuracy, and the summary sentence."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Any

from selfdistill.errors import number_of
from selfdistill.evaluation import Evaluation, seeds_interval, sign_test


def reference(runs: Sequence[Compared]) -> str:
    """The method that the others are compared with: ``sdft`` if there is one, else the first."""
    methods = [run.method for run in runs] or ["sdft"]
    return next((method for method in methods if method.split()[0] == "sdft"), methods[0])


@dataclass(frozen=True)
class Compared:
    """One run of a comparison."""

    method: str
    """Method and varied setting: ``sdft teacher=frozen``."""
    learning_rate: float
    seed: int
    folder: str
    """Path within the comparison's folder."""
    evaluations: Sequence[Evaluation]
    """Lines of its ``evaluations.jsonl``; the first is the base's."""
    failed: str | None = None
    """Why it failed; None if it finished."""

    @property
    def name(self) -> str:
        return f"{self.method} {self.learning_rate:g} seed {self.seed}"


def table(runs: Sequence[Compared]) -> list[dict[str, Any]]:
    """One entry per method, learning rate and evaluated step: means over seeds as (mean, low, high)."""
    rows = []
    for method, rate in dict.fromkeys((run.method, run.learning_rate) for run in runs):
        group = [run for run in _finished(runs) if (run.method, run.learning_rate) == (method, rate)]
        for points in zip(*(run.evaluations[1:] for run in group), strict=True):
            row = {"method": method, "learning_rate": rate, "steps": points[0]["step"], "seeds": len(points)}
            for key in ("accuracy", "prior_accuracy", "kl_base"):
                most = math.inf if key == "kl_base" else 1.0
                row[key] = _within(seeds_interval([p[key] for p in points]), most) if key in points[0] else None
            row["seconds"] = mean(point["seconds"] for point in points)
            rows.append(row)
    return rows


def _within(values: tuple[float, float | None, float | None], most: float) -> tuple[float, float | None, float | None]:
    """Clip an interval to the range from 0 to ``most``."""
    middle, low, high = values
    return middle, None if low is None else max(low, 0.0), None if high is None else min(high, most)


@dataclass(frozen=True)
class Matched:
    """A run at a given accuracy, interpolated between two of its evaluations."""

    reached: bool
    """False: it never reached that accuracy, and this is its best evaluation."""
    accuracy: float
    kl_base: float
    right: dict[str, list[float]]
    """Score of each prior item: 0, 1 or, if interpolated, a value between."""

    @property
    def prior_accuracy(self) -> float:
        """Mean over prior files."""
        return mean(mean(items) for items in self.right.values())


def matched(evaluations: Sequence[Evaluation], accuracy: float) -> Matched:
    """The point of a run with at least ``accuracy`` on the new task and the highest prior accuracy.

    This is where it first reaches that accuracy, linearly interpolated between evaluations, or a later evaluation with
    at least that accuracy, so that recovery counts. Without prior abilities: the point nearest to the base.
    """
    first = _reached(evaluations, accuracy)
    at = next((n for n, e in enumerate(evaluations) if e["accuracy"] >= accuracy), len(evaluations))
    later = [_reached([e], accuracy) for e in evaluations[at + 1 :] if e["accuracy"] >= accuracy]
    return max([first, *later], key=lambda point: point.prior_accuracy if point.right else -point.kl_base)


def _reached(evaluations: Sequence[Evaluation], accuracy: float) -> Matched:
    """The point where a run first reaches ``accuracy``, else its best evaluation."""
    at = next((n for n, e in enumerate(evaluations) if e["accuracy"] >= accuracy), None)
    reached = at is not None
    if at is None:
        at = max(range(len(evaluations)), key=lambda n: evaluations[n]["accuracy"])
    after, before = evaluations[at], evaluations[max(at - 1, 0)]
    share = 1.0  # of ``after``
    if reached and after["accuracy"] > before["accuracy"]:
        share = (accuracy - before["accuracy"]) / (after["accuracy"] - before["accuracy"])

    def mixed(a: float, b: float) -> float:
        return share * b + (1 - share) * a

    right = {
        name: [mixed(a, b) for a, b in zip(before["prior"][name]["correct"], prior["correct"], strict=True)]
        for name, prior in after.get("prior", {}).items()
    }
    new, kl = (mixed(before[key], after[key]) for key in ("accuracy", "kl_base"))
    return Matched(reached, new, kl, right)


def sentences(runs: Sequence[Compared], budget: str) -> str:
    """The conclusions about the :func:`reference` method against each other method, with their uncertainty.

    Runs of two methods are compared at equal learning rates and seeds. If each method has one learning rate only, they
    are compared even if these differ.
    """
    finished = _finished(runs)
    said = [budget]
    said += _unlike_bases(finished)
    if failed := [run.name for run in runs if run.failed is not None]:
        said.append(f"{len(failed)} of {len(runs)} runs failed and are excluded: {', '.join(failed)}.")
    mine = reference(runs)
    rates: dict[str, set[float]] = {}
    for run in runs:
        rates.setdefault(run.method, set()).add(run.learning_rate)
    own = {(run.learning_rate, run.seed): run for run in finished if run.method == mine}
    pairs: dict[tuple[str, float], list[tuple[Compared, Compared]]] = {}
    for run in finished:
        each_has_one = len(rates[mine]) == len(rates[run.method]) == 1
        rate = min(rates[mine]) if each_has_one else run.learning_rate
        if run.method != mine and (rate, run.seed) in own:
            pairs.setdefault((run.method, run.learning_rate), []).append((own[rate, run.seed], run))
    comparisons = [_against(group) for group in pairs.values()]
    said += comparisons
    tests = sum("p over questions" in comparison for comparison in comparisons)
    if tests > 1:
        said.append(f"These are {tests} comparisons; no p is corrected for that.")
    compared = {(run.method, run.learning_rate) for group in pairs.values() for pair in group for run in pair}
    groups = dict.fromkeys((run.method, run.learning_rate) for run in finished)
    alone = [f"{method} {rate:g}" for method, rate in groups if (method, rate) not in compared]
    if not pairs:
        said.append(f"No finished runs of {mine} and another method share a learning rate and seed.")
    elif alone:
        said.append(
            f"Not compared, because no finished run of {mine} (or, for {mine}, of another method) has the same "
            f"learning rate and seed: {', '.join(alone)}."
        )
    return " ".join(said)


def _unlike_bases(runs: Sequence[Compared]) -> list[str]:
    """A sentence if the base did not give the same answers in all runs."""
    starts = [run.evaluations[0] for run in runs]
    answers = [[start["correct"], *(p["correct"] for p in start.get("prior", {}).values())] for start in starts]
    if all(of_run == answers[0] for of_run in answers):
        return []
    scores = {"accuracy": "new task", "prior_accuracy": "prior"}
    values = {words: sorted({start[key] for start in starts if key in start}) for key, words in scores.items()}
    found = ", ".join(f"{words} {' or '.join(f'{value:.3f}' for value in of)}" for words, of in values.items() if of)
    return [
        f"The base did not give the same answers in all runs ({found}), as happens on another machine or with another "
        "release: differences of that size say nothing about the methods."
    ]


Pairs = Sequence[tuple[Compared, Compared]]
"""Runs of the reference method and of another, seed by seed."""
Difference = tuple[float, float | None, float | None, float]
"""Of prior accuracies: mean over seeds, the ends of its interval, p-value over questions."""


def _against(pairs: Pairs) -> str:
    """Compare the reference method at its last step with another method at equal accuracy, seed by seed."""
    mine, method = (run.method for run in pairs[0])
    own = [matched([run.evaluations[-1]], 0) for run, _ in pairs]
    theirs = [matched(other.evaluations, point.accuracy) for point, (_, other) in zip(own, pairs, strict=True)]
    text = _ends(pairs)
    if nothing := _learnt_nothing(pairs):
        return text + nothing
    count, reached = len(pairs), sum(point.reached for point in theirs)
    if reached < count:
        text += f"{method} reaches that accuracy in only {reached} of {count} runs; in the others its best evaluation "
        text += f"counts (mean {_mean(theirs, 'accuracy'):.2f}). "
    else:
        text += "At equal accuracy, "
    drift = _drift(mine, method, own, theirs)
    if not own[0].right:
        return f"{text}{drift}. No prior abilities were measured, so forgetting is unknown."
    found = _difference(own, theirs)
    difference, low, high, p = found
    interval = "" if low == high else f"95% interval over seeds {low:+.3f} to {high:+.3f}, "
    base = mean(run.evaluations[0]["prior_accuracy"] for run, _ in pairs)
    text += (
        f"{mine} has a prior accuracy of {_mean(own, 'prior_accuracy'):.3f}, {method} "
        f"{_mean(theirs, 'prior_accuracy'):.3f}, the base {base:.3f}: a difference of {difference:+.3f} "
        f"({interval}p over questions {'below 0.001' if p < 0.001 else f'{p:.3f}'}). {drift}. "
    )
    if reached < count:
        return text + f"As {method} did not reach that accuracy, forgetting cannot be compared."
    return text + _verdict(pairs, own, theirs, found)


def _ends(pairs: Pairs) -> str:
    """The accuracies with which both methods end."""
    (one, other), count = pairs[0], len(pairs)
    same_rate = other.learning_rate == one.learning_rate
    named = other.method if same_rate else f"at learning rate {other.learning_rate:g} {other.method}"
    mine = mean(run.evaluations[-1]["accuracy"] for run, _ in pairs)
    theirs = mean(run.evaluations[-1]["accuracy"] for _, run in pairs)
    return (
        f"At learning rate {one.learning_rate:g} {one.method} ends at {mine:.2f} on the new task, {named} at "
        f"{theirs:.2f} ({f'means of {count} seeds' if count > 1 else '1 seed'}). "
    )


def _learnt_nothing(pairs: Pairs) -> str | None:
    """Why forgetting cannot be compared; None if the reference method learnt something in every run."""
    mine, method = (run.method for run in pairs[0])
    start = mean(run.evaluations[0]["accuracy"] for run, _ in pairs)
    idle = sum(not _learnt(run) for run, _ in pairs)
    if not idle:
        return None
    if idle < len(pairs):
        return (
            f"The base is at {start:.2f}: in {idle} of {len(pairs)} runs {mine} learnt nothing, so forgetting at equal "
            "accuracy cannot be compared."
        )
    both = not any(_learnt(other) for _, other in pairs)
    who = f"neither {mine} nor {method} learnt anything" if both else f"{mine} learnt nothing"
    return f"The base is at {start:.2f}: {who}, so there is nothing to compare."


def _learnt(run: Compared) -> bool:
    """Whether it ends with a higher accuracy than the base."""
    return bool(run.evaluations[-1]["accuracy"] > run.evaluations[0]["accuracy"])


def _drift(mine: str, method: str, own: Sequence[Matched], theirs: Sequence[Matched]) -> str:
    """The distances of both methods from the base."""
    one, other = _mean(own, "kl_base"), _mean(theirs, "kl_base")
    text = f"KL(base||model) is {one:.2f} for {mine} and {other:.2f} for {method}"
    return f"{text}: {method} drifted {other / one:.2f} times as far" if one > 0.001 else text


def _verdict(pairs: Pairs, own: Sequence[Matched], theirs: Sequence[Matched], found: Difference) -> str:
    """The conclusion from the difference ``found`` if the other method reached that accuracy in every run."""
    mine, method = (run.method for run in pairs[0])
    _, low, high, p = found
    if low is None or high is None:
        return "One seed shows at most a direction: no conclusion."
    if low == high:
        return "All seeds have the same difference, so its spread over seeds is unknown: no conclusion."
    unclear = "So there is no significant difference in forgetting; more seeds or prior questions could show one."
    if p < 0.05 and low > 0:
        return f"So at equal accuracy, {mine} forgot less than {method}."
    if p < 0.05 and high < 0:
        best = [matched(run.evaluations, point.accuracy) for point, (run, _) in zip(own, pairs, strict=True)]
        fair, _, high, p = _difference(best, theirs)
        if p < 0.05 and high is not None and high < 0:
            return f"So at equal accuracy, {mine} forgot more than {method}."
        return (
            f"The best evaluation counts for {method} and the last for {mine}; with the best of both, the difference "
            f"is {fair:+.3f}. {unclear}"
        )
    return unclear


def assumption(teacher: dict[str, Any], moved: dict[str, float]) -> str:
    """The method's two assumptions (arXiv 2601.19897): the teacher is near-optimal, and near the base.

    Args:
        teacher: its ``accuracy`` and ``kl`` on ``items`` test rows, from :meth:`Evaluator.shown`.
        moved: KL(model||base) of trained models on the same rows, by name.
    """
    models = ", ".join(f"{kl:.2f} after {name}" for name, kl in moved.items())
    return (
        f"In-context assumption (the teacher is accurate, and nearer to the base than fine-tuned models): the teacher "
        f"has {teacher['accuracy']:.0%} accuracy on {number_of(teacher['items'], 'test row')} and is "
        f"{teacher['kl']:.2f} nats per token from the base along its own replies; trained models along theirs: "
        f"{models}."
    )


def _difference(own: Sequence[Matched], theirs: Sequence[Matched]) -> Difference:
    """The difference of prior accuracies, own minus theirs."""
    differences = [a.prior_accuracy - b.prior_accuracy for a, b in zip(own, theirs, strict=True)]
    return *seeds_interval(differences), _over_items(own, theirs)


def _over_items(own: Sequence[Matched], theirs: Sequence[Matched]) -> float:
    """p-value over questions: the sign test on each question's mean difference over seeds, with equal weight for every
    prior file."""
    values: list[float] = []
    for name, items in own[0].right.items():
        pairs = [(a.right[name], b.right[name]) for a, b in zip(own, theirs, strict=True)]
        values += [mean(a[item] - b[item] for a, b in pairs) / len(items) for item in range(len(items))]
    return sign_test(values)


def _finished(runs: Sequence[Compared]) -> list[Compared]:
    return [run for run in runs if run.failed is None]


def _mean(points: Sequence[Matched], key: str) -> float:
    return mean(getattr(point, key) for point in points)


def points_of(runs: Sequence[Compared]) -> dict[str, list[list[tuple[float, float]]]]:
    """Trade-off points (prior, new) of each finished run, by method and learning rate, starting with the base.

    Without prior abilities, -KL(base||model) replaces the prior accuracy.
    """
    rates = {run.learning_rate for run in runs}
    groups: dict[str, list[list[tuple[float, float]]]] = {}
    for run in _finished(runs):
        name = run.method if len(rates) == 1 else f"{run.method} {run.learning_rate:g}"
        points = [(e.get("prior_accuracy", -e["kl_base"]), e["accuracy"]) for e in run.evaluations]
        groups.setdefault(name, []).append(points)
    return groups


def bases_of(points: dict[str, list[list[tuple[float, float]]]]) -> list[tuple[float, float]]:
    """The points of :func:`points_of` at which runs start: one, unless the base scored differently."""
    return list(dict.fromkeys(run[0] for runs in points.values() for run in runs))


def mean_points(seeds: Sequence[Sequence[tuple[float, float]]]) -> list[tuple[float, float]]:
    """Average the points of each step over seeds."""
    steps = zip(*seeds, strict=True)
    return [(mean(x for x, _ in at), mean(y for _, y in at)) for at in steps]
