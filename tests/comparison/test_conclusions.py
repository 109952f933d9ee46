"""What a comparison concludes, from runs whose numbers are made up."""

from __future__ import annotations

from dataclasses import replace

import pytest

from selfdistill.comparison.conclusions import (
    Compared,
    assumption,
    bases_of,
    matched,
    mean_points,
    points_of,
    sentences,
    table,
)
from selfdistill.evaluation.evaluate import Evaluation


def point(step: int, accuracy: float, prior: float | None, kl: float) -> Evaluation:
    found: Evaluation = {"step": step, "accuracy": accuracy, "items": 20, "kl_base": kl, "seconds": 10.0 * step}
    found["correct"] = [item < round(accuracy * 20) for item in range(20)]
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


def test_matched_lies_between_the_evaluations_around_it() -> None:
    sft = run("sft", 0, BASE, (0.4, 0.75, 0.5), (0.7, 0.6, 1.0), (0.9, 0.4, 1.5))
    found = matched(sft.evaluations, 0.6)
    assert found.reached
    assert found.accuracy == pytest.approx(0.6)
    assert found.kl_base == pytest.approx(0.5 / 3 + 2 / 3)
    assert found.prior_accuracy == pytest.approx(0.75 / 3 + 0.4)
    assert found.right["p"][50] == 1
    assert found.right["p"][70] == pytest.approx(1 / 3)  # right at .4, wrong at .7
    assert found.right["p"][80] == 0
    assert matched(sft.evaluations, 0.7).kl_base == 1.0
    assert matched(sft.evaluations, 0.0).kl_base == 0.0  # as good as the base is the base
    best = matched(sft.evaluations, 0.95)
    assert (best.reached, best.accuracy, best.kl_base) == (False, 0.9, 1.5)


def test_less_forgotten_is_said_where_neither_seeds_nor_questions_explain_it() -> None:
    said = sentences(pairs([0.72, 0.74, 0.70], [0.55, 0.58, 0.54]), "Three steps.")
    assert said.startswith("Three steps. At learning rate 0.0001 sdft ends at 0.65 on the new task, sft at 0.90")
    assert "At equal accuracy, sdft has a prior accuracy of 0.720, sft 0.589, the base 0.800" in said
    assert "a difference of +0.131 (95% interval over seeds +0.1" in said
    assert "KL(base||model) is 0.40 for sdft and 0.92 for sft: sft drifted 2.29 times as far" in said
    assert said.endswith("So at equal accuracy, sdft forgot less than sft.")


def test_prior_files_count_alike_whatever_their_size() -> None:
    """Of the large file sdft is right on 4 of 100 questions fewer, of the small one on 10 of 10 more."""

    def with_files(method: str, large: int, small: int) -> Compared:
        start, end = point(0, 0.0, 0.8, 0.0), point(10, 0.5, 0.8, 0.3)
        end["prior"]["p"]["correct"] = [item < large for item in range(100)]
        right = {start["step"]: 10, end["step"]: small}
        for one in (start, end):
            one["prior"]["small"] = {"correct": [item < right[one["step"]] for item in range(10)]}
        return Compared(method, 1e-4, 0, method, [start, end])

    sft, sdft = with_files("sft", 80, 0), with_files("sdft", 76, 10)
    assert matched(sdft.evaluations, 0.5).prior_accuracy == pytest.approx((0.76 + 1.0) / 2)
    said = sentences([sft, sdft], "")
    assert "a difference of +0.480" in said
    assert float(said.partition("p over questions ")[2][:5]) == pytest.approx(2 / 2**10, abs=0.0015)


def test_more_forgotten_is_said_as_well() -> None:
    said = sentences(pairs([0.52, 0.50, 0.51], [0.70, 0.69, 0.71]), "")
    assert said.endswith("So at equal accuracy, sdft forgot more than sft.")


def test_a_run_did_not_forget_more_than_itself() -> None:
    """The best of several noisy evaluations counts for the other method, which its own last one cannot beat."""
    runs = []
    for seed, last in enumerate((0.50, 0.52, 0.51)):
        points = (BASE, (0.5, 0.76, 0.3), (0.6, 0.7, 0.4), (0.55, last, 0.4))
        runs += [run(method, seed, *points) for method in ("sft", "sdft")]
    said = sentences(runs, "")
    assert "a difference of -0.2" in said
    assert "interval over seeds -0.2" in said
    assert (
        "The best evaluation counts for sft and the last for sdft; with the best of both, the difference is +0.000."
        in said
    )
    assert said.endswith(
        "So there is no significant difference in forgetting; more seeds or prior questions could show one."
    )


def test_bases_that_answered_differently_are_said() -> None:
    runs = pairs([0.72, 0.74, 0.70], [0.55, 0.58, 0.54])
    assert "same answers" not in sentences(runs, "")
    start = run("sft", 0, (0.0, 0.78, 0.0)).evaluations
    moved = [replace(one, evaluations=[*start, *one.evaluations[1:]]) if one.seed == 2 else one for one in runs]
    said = sentences(moved, "Three steps.")
    assert said.startswith(
        "Three steps. The base did not give the same answers in all runs (new task 0.000, prior 0.780 or 0.800), as "
        "happens on another machine or with another release: differences of that size say nothing about the methods. "
    )
    assert bases_of(points_of(moved)) == [(0.8, 0.0), (0.78, 0.0)]
    other = [replace(one, failed="no") if one.seed == 2 else one for one in moved]
    assert "same answers" not in sentences(other, "")


def test_each_run_has_learnt_something_if_it_ends_above_its_own_base() -> None:
    low, high = (0.2, 0.8, 0.0), (0.4, 0.8, 0.0)
    runs = [run("sft", seed, base, (0.6, 0.7, 0.3)) for seed, base in enumerate((low, high))]
    runs += [run("sdft", seed, base, (0.4, 0.8, 0.1)) for seed, base in enumerate((low, high))]
    assert "in 1 of 2 runs sdft learnt nothing" in sentences(runs, "")


@pytest.mark.parametrize(
    ("own", "others"),
    [
        ([0.72, 0.55, 0.66], [0.60, 0.62, 0.64]),  # the seeds differ
        ([0.72, 0.73, 0.72], [0.70, 0.70, 0.70]),  # the seeds agree, and few questions of 100 make the difference
    ],
)
def test_nothing_is_claimed_where_seeds_or_questions_may_explain_it(own: list[float], others: list[float]) -> None:
    assert "So there is no significant difference in forgetting" in sentences(pairs(own, others), "")


def test_one_seed_concludes_nothing() -> None:
    said = sentences(pairs([0.75], [0.40]), "")
    assert "(p over questions below 0.001)" in said
    assert said.endswith("One seed shows at most a direction: no conclusion.")


@pytest.mark.parametrize(("own", "others"), [([0.75, 0.75], [0.40, 0.40]), ([0.72, 0.72, 0.72], [0.70, 0.70, 0.70])])
def test_seeds_that_agree_conclude_nothing(own: list[float], others: list[float]) -> None:
    said = sentences(pairs(own, others), "")
    assert "(p over questions" in said
    assert said.endswith("All seeds have the same difference, so its spread over seeds is unknown: no conclusion.")


def test_nothing_is_concluded_where_the_other_method_did_not_learn_as_much() -> None:
    runs = []
    for seed in range(3):
        runs.append(run("sft", seed, BASE, (0.1, 0.3, 0.5), (0.05, 0.2, 1.0)))
        runs.append(run("sdft", seed, BASE, (0.5, 0.8, 0.2), (0.9, 0.75, 0.3)))
    said = sentences(runs, "")
    assert "sft reaches that accuracy in only 0 of 3 runs; in the others its best evaluation counts (mean 0.10)" in said
    assert said.endswith("forgetting cannot be compared.")


def test_where_nothing_was_learnt_nothing_is_compared() -> None:
    runs = [run("sft", 0, BASE, (0.0, 0.7, 0.3)), run("sdft", 0, BASE, (0.0, 0.8, 0.1))]
    said = sentences(runs, "")
    assert said.endswith("neither sdft nor sft learnt anything, so there is nothing to compare.")
    runs[0] = run("sft", 0, BASE, (0.3, 0.7, 0.3))
    assert sentences(runs, "").endswith(": sdft learnt nothing, so there is nothing to compare.")


def test_one_seed_that_learns_nothing_does_not_speak_for_the_others() -> None:
    runs = [run("sft", seed, BASE, (0.6, 0.7, 0.3)) for seed in range(3)]
    runs += [run("sdft", seed, BASE, (new, 0.8, 0.1)) for seed, new in enumerate((0.9, 0.9, 0.0))]
    said = sentences(runs, "")
    assert said.endswith("in 1 of 3 runs sdft learnt nothing, so forgetting at equal accuracy cannot be compared.")


def test_a_model_that_has_not_moved_has_no_ratio() -> None:
    runs = [run("sft", 0, BASE, (0.5, 0.8, 0.3)), run("sdft", 0, BASE, (0.5, 0.8, 0.0))]
    assert "times as far" not in sentences(runs, "")


def test_without_prior_abilities_nothing_is_said_of_forgetting() -> None:
    runs = [run(method, 0, (0.0, None, 0.0), (0.5, None, kl)) for method, kl in (("sft", 1.0), ("sdft", 0.5))]
    said = sentences(runs, "")
    assert "2.00 times as far" in said
    assert said.endswith("so forgetting is unknown.")


def test_what_a_method_recovers_is_counted_for_it() -> None:
    there = [
        point(step, *scores) for step, scores in enumerate([BASE, (0.6, 0.4, 1.0), (0.5, 0.8, 0.2), (0.2, 0.9, 0.1)])
    ]
    assert matched(there, 0.5).prior_accuracy == pytest.approx(0.8)
    assert matched(there, 0.6).prior_accuracy == pytest.approx(0.4)
    without = [{key: value for key, value in at.items() if "prior" not in key} for at in there]
    assert matched(without, 0.5).kl_base == pytest.approx(0.2)


def at(rate: float, runs: list[Compared]) -> list[Compared]:
    return [replace(run, learning_rate=rate) for run in runs]


def test_methods_with_one_learning_rate_each_are_compared_seed_by_seed() -> None:
    runs = pairs([0.72, 0.74, 0.70], [0.55, 0.58, 0.54])
    of_sft, of_sdft = ([run for run in runs if run.method == method] for method in ("sft", "sdft"))
    third = [replace(run, method="dft") for run in of_sft]
    said = sentences([*of_sdft, *third, *at(5e-5, of_sft)], "")
    assert "At learning rate 0.0001 sdft ends at 0.65 on the new task, dft at 0.90 (means of 3 seeds)" in said
    assert "sdft ends at 0.65 on the new task, at learning rate 5e-05 sft at 0.90 (means of 3 seeds)" in said
    assert said.endswith(
        "So at equal accuracy, sdft forgot less than sft. These are 2 comparisons; no p is corrected for that."
    )
    assert "These are" not in sentences([*of_sdft, *at(5e-5, of_sft)], "")


def test_what_has_no_counterpart_at_its_learning_rate_is_named() -> None:
    runs = pairs([0.72, 0.74], [0.55, 0.58])
    of_sft = [run for run in runs if run.method == "sft"]
    alone = at(5e-5, [replace(run, method="dft") for run in of_sft])
    said = sentences([*runs, *at(1e-3, [run for run in runs if run.method == "sdft"]), *alone], "")
    assert "ends at 0.65 on the new task, sft at 0.90" in said
    assert said.endswith(
        "Not compared, because no finished run of sdft (or, for sdft, of another method) has the same learning rate "
        "and seed: sdft 0.001, "
        "dft 5e-05."
    )


def test_failed_runs_count_for_nothing() -> None:
    runs = pairs([0.72, 0.74], [0.55, 0.58])
    broken = Compared("sft", 1e-4, 2, "sft-seed2", [point(0, *BASE)], failed="the loss is nan")
    said = sentences([*runs, broken], "")
    assert said.startswith(" 1 of 5 runs failed and are excluded: sft 0.0001 seed 2. ")
    assert said.endswith(sentences(runs, ""))
    assert table([*runs, broken]) == table(runs)
    assert points_of([broken]) == {}
    assert "No finished runs" in sentences([broken], "")


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


def test_the_teachers_accuracy_is_that_of_its_rows() -> None:
    said = assumption({"accuracy": 0.5, "kl": 1.0, "items": 4}, {"sft": 2.0})
    assert "the teacher has 50% accuracy on 4 test rows and is 1.00 nats per token from the base" in said


def test_points_are_prior_against_new_with_their_mean() -> None:
    points = points_of(pairs([0.72, 0.74], [0.55, 0.59]))
    assert points["sdft"][1] == [(0.8, 0.0), (0.8, 0.2), (0.75, 0.5), (0.74, 0.65)]
    assert mean_points(points["sft"])[2] == pytest.approx((0.57, 0.7))
