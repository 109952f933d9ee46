"""What a comparison says: means over seeds, models matched by what they have learnt, and the sentence that follows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Any

from selfdistill.evaluate import Evaluation
from selfdistill.statistics import mean_interval, seeds_interval, smallest_difference

REFERENCE = "sdft"
"""The method with which the others are compared."""


@dataclass(frozen=True)
class Compared:
    """One run of a comparison."""

    method: str
    learning_rate: float
    seed: int
    folder: str
    """Within the comparison's."""
    evaluations: Sequence[Evaluation]
    """Lines of its ``evaluations.jsonl``, the base's first."""
    failed: str | None = None
    """Why it did not reach its end."""

    @property
    def name(self) -> str:
        return f"{self.method} {self.learning_rate:g} seed {self.seed}"


def table(runs: Sequence[Compared]) -> list[dict[str, Any]]:
    """A row for each method, learning rate and evaluated step: means over seeds as (mean, low, high)."""
    rows = []
    for method, rate in dict.fromkeys((run.method, run.learning_rate) for run in runs):
        group = [run for run in _finished(runs) if (run.method, run.learning_rate) == (method, rate)]
        for points in zip(*(run.evaluations[1:] for run in group), strict=True):
            row = {"method": method, "learning_rate": rate, "steps": points[0]["step"], "seeds": len(points)}
            for key in ("accuracy", "prior_accuracy", "kl_base"):
                row[key] = seeds_interval([point[key] for point in points]) if key in points[0] else None
            row["seconds"] = mean(point["seconds"] for point in points)
            rows.append(row)
    return rows


def matched(evaluations: Sequence[Evaluation], accuracy: float) -> Evaluation:
    """The first evaluation that is as good on the new task; where none is, the best, and of several the first."""
    trained = evaluations[1:]
    return next((e for e in trained if e["accuracy"] >= accuracy), max(trained, key=lambda e: e["accuracy"]))


def sentences(runs: Sequence[Compared], budget: str) -> str:
    """What may be concluded of self-distillation against each other method, with how sure that is."""
    finished = _finished(runs)
    own = {(run.learning_rate, run.seed): run for run in finished if run.method == REFERENCE}
    said = []
    for method, rate in dict.fromkeys((run.method, run.learning_rate) for run in finished):
        others = [r for r in finished if (r.method, r.learning_rate) == (method, rate) and (rate, r.seed) in own]
        if method != REFERENCE and others:
            said.append(_against(method, rate, [(own[rate, other.seed], other) for other in others]))
    if not said:
        return f"No run of {REFERENCE} and of another method at the same learning rate and seed is finished."
    return " ".join([budget, *said])


def _against(method: str, rate: float, pairs: Sequence[tuple[Compared, Compared]]) -> str:
    """self-distillation at its last step against a method where it is first as good."""
    own = [run.evaluations[-1] for run, _ in pairs]
    theirs = [matched(other.evaluations, mine["accuracy"]) for mine, (_, other) in zip(own, pairs, strict=True)]
    reached = sum(a["accuracy"] >= b["accuracy"] for a, b in zip(theirs, own, strict=True))
    ends = [other.evaluations[-1] for _, other in pairs]
    count = len(pairs)
    text = (
        f"At learning rate {rate:g} {REFERENCE} ends at {_mean(own, 'accuracy'):.2f} on the new task, {method} at "
        f"{_mean(ends, 'accuracy'):.2f} ({_seeds(count)}). Where {method} is first as good ({reached} of {count} runs "
        f"reach it; otherwise at its best), it is at {_mean(theirs, 'accuracy'):.2f}, and "
    )
    ratios = [b["kl_base"] / a["kl_base"] for a, b in zip(own, theirs, strict=True)]
    moved = f"{REFERENCE} has KL(base||model) {_mean(own, 'kl_base'):.2f} and {method} {_mean(theirs, 'kl_base'):.2f}"
    moved += f", {mean(ratios):.2f} times as far"
    if "prior_accuracy" not in own[0]:
        return f"{text}{moved}. No prior abilities were measured, so nothing is known of forgetting."
    differences = [a["prior_accuracy"] - b["prior_accuracy"] for a, b in zip(own, theirs, strict=True)]
    difference, low, high = seeds_interval(differences)
    source = "over seeds"
    if low is None or high is None:
        (low, high), source = _over_items(theirs[0], own[0]), "over items"
    text += (
        f"{REFERENCE} answers {_mean(own, 'prior_accuracy'):.3f} of the prior questions, {method} "
        f"{_mean(theirs, 'prior_accuracy'):.3f}, the base {pairs[0][0].evaluations[0]['prior_accuracy']:.3f}: "
        f"a difference of {difference:+.3f} (95% interval {source} {low:+.3f} to {high:+.3f}); {moved}. "
    )
    if low > 0:
        return text + f"So {REFERENCE} forgot less than {method} for as much learnt."
    if high < 0:
        return text + f"So {REFERENCE} forgot more than {method} for as much learnt."
    items = sum(prior["items"] for prior in own[0]["prior"].values())
    return text + (
        f"So no difference in what was forgotten is shown; with {items} prior items one model would have to differ "
        f"from another by about {smallest_difference(items):.2f}."
    )


def assumption(teacher: dict[str, Any], moved: dict[str, float]) -> str:
    """The two conditions of the method (arXiv 2601.19897): the teacher is near-optimal, and near the base.

    Args:
        teacher: its ``accuracy`` and ``kl`` on the test rows, as :meth:`Examiner.teacher` gives them.
        moved: KL(model||base) of trained models on the same rows, by name.
    """
    models = ", ".join(f"{kl:.2f} after {name}" for name, kl in moved.items())
    return (
        f"In-context assumption: the teacher is right on {teacher['accuracy']:.2f} and {teacher['kl']:.2f} nats per "
        f"token from the base along its own replies to the test rows; trained models along theirs: {models}."
    )


def _over_items(first: Evaluation, second: Evaluation) -> tuple[float, float]:
    pairs = ((prior["correct"], second["prior"][name]["correct"]) for name, prior in first["prior"].items())
    return mean_interval(*([int(b) - int(a) for a, b in zip(*pair, strict=True)] for pair in pairs))


def _finished(runs: Sequence[Compared]) -> list[Compared]:
    return [run for run in runs if run.failed is None]


def _mean(evaluations: Sequence[Evaluation], key: str) -> float:
    return mean(evaluation[key] for evaluation in evaluations)


def _seeds(count: int) -> str:
    return "mean of " + f"{count} seeds" if count > 1 else "1 seed"


def points_of(runs: Sequence[Compared]) -> dict[str, list[list[tuple[float, float]]]]:
    """Trade-off points (prior, new) of each finished run, by method and learning rate, the base's first.

    Where no prior abilities were measured, -KL(base||model) takes their place.
    """
    rates = {run.learning_rate for run in runs}
    groups: dict[str, list[list[tuple[float, float]]]] = {}
    for run in _finished(runs):
        name = run.method if len(rates) == 1 else f"{run.method} {run.learning_rate:g}"
        points = [(e.get("prior_accuracy", -e["kl_base"]), e["accuracy"]) for e in run.evaluations]
        groups.setdefault(name, []).append(points)
    return groups


def mean_points(seeds: Sequence[Sequence[tuple[float, float]]]) -> list[tuple[float, float]]:
    """The mean point of each step over seeds."""
    steps = zip(*seeds, strict=True)
    return [(mean(x for x, _ in at), mean(y for _, y in at)) for at in steps]
