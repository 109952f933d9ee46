"""What a comparison concludes, from runs whose numbers are made up."""

from __future__ import annotations

import pytest

from selfdistill.comparison import Compared, matched, mean_points, points_of, sentences, table
from selfdistill.evaluate import Evaluation


def point(step: int, accuracy: float, prior: float | None, kl: float) -> Evaluation:
    found: Evaluation = {"step": step, "accuracy": accuracy, "items": 20, "kl_base": kl, "seconds": 10.0 * step}
    if prior is not None:
        right = round(prior * 100)
        found["prior"] = {"p": {"accuracy": prior, "items": 100, "correct": [i < right for i in range(100)]}}
        found["prior_accuracy"] = prior
    return found


def run(method: str, seed: int, *points: tuple[float, float | None, float]) -> Compared:
    steps = [point(10 * number, *values) for number, values in enumerate(points)]
    return Compared(method, 1e-4, seed, f"{method}-seed{seed}", steps)


BASE = (0.0, 0.8, 0.0)


def pairs(prior_of_sdft: list[float], prior_of_sft: list[float]) -> list[Compared]:
    runs = []
    for seed, (own, other) in enumerate(zip(prior_of_sdft, prior_of_sft, strict=True)):
        runs.append(run("sft", seed, BASE, (0.4, 0.75, 0.5), (0.7, other, 1.0), (0.9, 0.4, 1.5)))
        runs.append(run("sdft", seed, BASE, (0.2, 0.8, 0.2), (0.5, 0.75, 0.3), (0.65, own, 0.4)))
    return runs


def test_matched_is_the_first_that_is_as_good_or_the_best() -> None:
    sft = run("sft", 0, (1.0, 0.8, 0.0), (0.4, 0.75, 0.5), (0.7, 0.6, 1.0), (0.9, 0.4, 1.5))
    assert matched(sft.evaluations, 0.7)["step"] == 20  # not the base, though it is better
    assert matched(sft.evaluations, 0.65)["step"] == 20
    assert matched(sft.evaluations, 0.95)["step"] == 30


def test_less_forgotten_is_said_where_the_interval_over_seeds_excludes_zero() -> None:
    said = sentences(pairs([0.72, 0.74, 0.70], [0.55, 0.58, 0.54]), "Three steps.")
    assert said.startswith("Three steps. At learning rate 0.0001 sdft ends at 0.65 on the new task, sft at 0.90")
    assert "(3 of 3 runs reach it; otherwise at its best), it is at 0.70" in said
    assert "sdft answers 0.720 of the prior questions, sft 0.557, the base 0.800: a difference of +0.163" in said
    assert "KL(base||model) 0.40 and sft 1.00, 2.50 times as far" in said
    assert said.endswith("So sdft forgot less than sft for as much learnt.")


def test_more_forgotten_is_said_as_well() -> None:
    said = sentences(pairs([0.52, 0.50, 0.51], [0.70, 0.69, 0.71]), "")
    assert said.endswith("So sdft forgot more than sft for as much learnt.")


def test_nothing_is_claimed_where_the_interval_has_zero_in_it() -> None:
    said = sentences(pairs([0.72, 0.55, 0.66], [0.60, 0.62, 0.64]), "")
    assert "So no difference in what was forgotten is shown; with 100 prior items" in said


def test_a_single_seed_is_judged_by_its_items() -> None:
    assert "95% interval over items" in sentences(pairs([0.72], [0.50]), "")
    assert sentences(pairs([0.72], [0.50]), "").endswith("So sdft forgot less than sft for as much learnt.")
    assert "no difference in what was forgotten is shown" in sentences(pairs([0.72], [0.72]), "")


def test_without_prior_abilities_nothing_is_said_of_forgetting() -> None:
    runs = [run(method, 0, (0.0, None, 0.0), (0.5, None, kl)) for method, kl in (("sft", 1.0), ("sdft", 0.5))]
    said = sentences(runs, "")
    assert "2.00 times as far" in said
    assert said.endswith("nothing is known of forgetting.")


def test_failed_runs_count_for_nothing() -> None:
    runs = pairs([0.72, 0.74], [0.55, 0.58])
    broken = Compared("sft", 1e-4, 2, "sft-seed2", [point(0, *BASE)], failed="the loss is nan")
    assert sentences([*runs, broken], "") == sentences(runs, "")
    assert table([*runs, broken]) == table(runs)
    assert points_of([broken]) == {}
    assert "is finished" in sentences([broken], "")


def test_the_table_has_means_over_seeds_of_every_step() -> None:
    rows = table(pairs([0.72, 0.74, 0.70], [0.55, 0.58, 0.54]))
    assert [(row["method"], row["steps"], row["seeds"]) for row in rows] == [
        (method, steps, 3) for method in ("sft", "sdft") for steps in (10, 20, 30)
    ]
    last = rows[-1]
    assert last["accuracy"] == pytest.approx((0.65, 0.65, 0.65))
    assert last["prior_accuracy"][0] == pytest.approx(0.72)
    assert last["prior_accuracy"][1:] == pytest.approx((0.72 - 0.0497, 0.72 + 0.0497), abs=1e-3)
    assert last["seconds"] == 300


def test_points_are_prior_against_new_with_their_mean() -> None:
    points = points_of(pairs([0.72, 0.74], [0.55, 0.59]))
    assert points["sdft"][1] == [(0.8, 0.0), (0.8, 0.2), (0.75, 0.5), (0.74, 0.65)]
    assert mean_points(points["sft"])[2] == pytest.approx((0.57, 0.7))
