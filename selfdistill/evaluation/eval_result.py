"""The result of an evaluation, and its table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from rich.markup import escape

from selfdistill.errors import number_of
from selfdistill.evaluation.statistics import smallest_difference
from selfdistill.runtime import Printable, result_table


@dataclass(frozen=True, repr=False)
class EvalResult(Printable):
    """The results of a model, and of its base if given."""

    model: str
    data: str
    details: dict[str, Any]
    """All results, as ``selfdistill eval --json`` writes them."""
    replies: list[dict[str, Any]] = field(default_factory=list)
    """The model's greedy reply to each row, as ``selfdistill eval --replies`` writes it; of a base, empty."""

    @property
    def accuracy(self) -> float:
        """Accuracy on the new task."""
        return float(self.details["accuracy"])

    @property
    def interval(self) -> tuple[float, float]:
        """95% interval of the accuracy."""
        low, high = self.details["accuracy_interval"]
        return low, high

    @property
    def items(self) -> int:
        """Number of rows of the new task."""
        return int(self.details["items"])

    @property
    def prior_accuracy(self) -> float | None:
        """Mean accuracy over the prior files; None without priors."""
        return self.details.get("prior_accuracy")

    @property
    def kl(self) -> float | None:
        """KL(base||model) on general prompts, nats per token; None without a base."""
        return self.details.get("kl_base")

    @property
    def base(self) -> EvalResult | None:
        """The base's result on the same items, without a context; None without a base."""
        of_base = self.details.get("base")
        if of_base is None:
            return None
        name = self.details["settings"]["base"]
        settings = {**self.details["settings"], "model": name, "base": None, "context": None}
        same = {key: self.details[key] for key in ("scorers", "dropped")}
        return EvalResult(name, self.data, {**of_base, **same, "settings": settings})

    def print(self, console: Console) -> None:
        """Print a table with one line per score, next to the base's if given."""
        _print(self.model, self.data, self.details, console)


def summary(evaluation: Mapping[str, Any]) -> str:
    """The main numbers of an evaluation in one line."""
    what = "success" if "episode/reward" in evaluation else "accuracy"
    parts = [f"{what} {evaluation['accuracy']:.3f} on {number_of(evaluation['items'], 'row')}"]
    if "episode/reward" in evaluation:
        parts.append(f"reward {evaluation['episode/reward']:.3f}, {evaluation['episode/turns']:.1f} turns")
    if "prior_accuracy" in evaluation:
        parts.append(f"prior accuracy {evaluation['prior_accuracy']:.3f}")
    if "kl_base" in evaluation:
        parts.append(f"KL(base||model) {evaluation['kl_base']:.3f}")
    return "  ".join(parts)


def _print(model: str, data: str, result: dict[str, Any], console: Console) -> None:
    base, tests = result.get("base"), result.get("paired", {})
    sides = [result, base] if base else [result]
    columns = ("base", "difference", "p") if base else ()
    table = result_table("measured", "items", "model", *columns, title=f"{model} on {data}")

    def score(name: str, items: int, of_sides: Sequence[Any], keys: tuple[str, str], test: Any) -> None:
        """A line with a score, its interval and, next to the base's, the difference."""
        (value, interval), (mine, *others) = keys, of_sides
        cells = [f"{mine[value]:.3f} {_interval(*mine[interval])}"]
        for theirs in others:
            cells += [f"{theirs[value]:.3f}", f"{test['difference']:+.3f} {_interval(test['low'], test['high'])}"]
            cells.append(_p_value(test["p"]) if "p" in test else "")
        table.add_row(escape(name), str(items), *cells)

    def number(name: str, *of_sides: str) -> None:
        """A line with a number of the model, and of its base if it has one."""
        table.add_row(escape(name), "", *map(escape, of_sides))

    items, plays = result["items"], "episode/reward" in result
    if context := result["settings"]["context"]:
        number("context of each new question", context, *(["none"] if base else []))
    name = f"new task, {'success' if plays else 'accuracy'} ({', '.join(result['scorers'])})"
    score(name, items, sides, ("accuracy", "accuracy_interval"), tests.get("accuracy"))
    if "accuracy_lenient" in result:
        number("the same, lenient judge", *(f"{side['accuracy_lenient']:.3f}" for side in sides))
    for k in result.get("pass@k", {}):
        of_k = [side["pass@k"][k] for side in sides]
        score(f"new task, pass@{k}", items, of_k, ("value", "interval"), tests.get(f"pass@{k}"))
    if plays:
        rewards = (f"{side['episode/reward']:.3f} {_interval(*side['episode/reward_interval'])}" for side in sides)
        number("mean reward", *rewards)
        for key in ("turns", "invalid_calls"):
            number(f"{key.replace('_', ' ')} per episode", *(f"{side[f'episode/{key}']:.2f}" for side in sides))
    lengths = {f"tokens per {'episode' if plays else 'reply'}": "completion/length"}
    if any(side["completion/thinking"] for side in sides):
        lengths |= {"  of these thinking": "completion/thinking", "  of these answer": "completion/said"}
    for label, key in lengths.items():
        number(label, *(f"{side[key]:.1f}" for side in sides))
    cut = "episodes cut" if plays else "truncated replies"
    number(cut, *(f"{side['completion/truncated']:.1%}" for side in sides))
    if result["dropped"]:
        number("dropped rows (too long)", str(result["dropped"]))
    for name, prior in result.get("prior", {}).items():
        of_prior = [side["prior"][name] for side in sides]
        test = tests.get("prior", {}).get(name)
        score(f"prior: {name}", prior["items"], of_prior, ("accuracy", "interval"), test)
        if prior["accuracy_norm"] is not None:
            number("  normalised by length", *(f"{one['accuracy_norm']:.3f}" for one in of_prior))
        if cells := _truncated(of_prior):
            number("  truncated replies", *cells)
    if len(result.get("prior", {})) > 1:
        count = sum(prior["items"] for prior in result["prior"].values())
        score("prior, mean", count, sides, ("prior_accuracy", "prior_interval"), tests.get("prior_accuracy"))
    for prompts, between in result.get("distance", {}).items():
        where = f"on {prompts.replace('_', ' ')} prompts"
        number(f"KL(base||model) {where}", f"{between['kl_base']:.3f}")
        number(f"KL(model||base) {where}", f"{between['kl_model']:.3f}")
        number(f"greedy replies changed {where}", f"{between['changed']:.0%}")
    console.print(table)
    explained = " p: p-value of a paired test. KL: in nats per token." if base else ""
    console.print(f"In parentheses: 95% intervals.{explained}", highlight=False, markup=False)
    if base:
        console.print(detected(items, tests["accuracy"]["unlike"]), highlight=False)


def detected(items: int, unlike: float) -> str:
    """A sentence on the smallest difference that this many items can detect.

    Args:
        items: questions that both models answer.
        unlike: observed share of them on which only one is right. If it is too small for any difference to be detected,
            one half takes its place: a pair of models that differs more may be told apart.
    """
    for share in (unlike, 0.5):
        smallest = smallest_difference(items, share) if share else None
        if smallest is not None:
            return (
                f"{items} items detect a difference in accuracy of {smallest:.2f} about 3 times in 4, if only one of "
                f"the two models is right on {share:.0%} of them."
            )
    few = "1 item is" if items == 1 else f"{items} items are"
    return f"{few} too few to detect even a difference in accuracy of 0.50."


def _truncated(priors: Sequence[dict[str, Any]]) -> list[str]:
    """The share of truncated replies of the model and its base on a prior; empty if there are none."""
    counts = [(prior.get("truncated") or 0, prior["items"]) for prior in priors]  # older results lack it
    return [f"{count / items:.1%}" for count, items in counts] if any(count for count, _ in counts) else []


def _p_value(p: float) -> str:
    return "<0.001" if p < 0.001 else f"{p:.3f}"


def _interval(low: float, high: float) -> str:
    return f"({low:.2f}, {high:.2f})"
