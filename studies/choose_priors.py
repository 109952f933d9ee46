"""Choose prior questions that a model answers nearly always, and some that it nearly never does.

    python studies/choose_priors.py COUNT CHOSEN.jsonl CANDIDATES.jsonl [MORE.jsonl...]

Each candidate is asked greedily and SAMPLES times at TEMPERATURE. Five of six chosen questions were answered by at
least STEADY of the samples, the others by at most SELDOM; what is between is left out. The greedy answer alone would
not do: many a question is right by luck, and of questions chosen for that any change of the model loses some. Where
there are more than enough, the questions of the first file go first, the others are drawn. It stays with the first
draw of which the greedy accuracy and the mean over samples differ by at most AGREE, else with the one of which they
differ least.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from selfdistill.data import Demonstration, load_demonstrations
from selfdistill.evaluation import answer, check_answers
from selfdistill.model import LoadedModel, Sampling, load_model, sample_seed, to_best_device, training_precision

MODEL = "smollm2-135m"
SAMPLES, TEMPERATURE, LENGTH = 8, 0.3, 48
STEADY, SELDOM = 6, 2
AGREE, DRAWS = 0.02, 1000


@dataclass(frozen=True)
class Asked:
    """A candidate, as a line of its file, and how it was answered."""

    line: str
    file: int
    greedy: bool
    right: int
    """Of the samples."""


def asked(loaded: LoadedModel, files: Sequence[str]) -> list[Asked]:
    """Ask the questions of files."""
    texts = [Path(file).read_text(encoding="utf-8").splitlines() for file in files]
    lines = [(line, number) for number, text in enumerate(texts) for line in text if line.strip()]
    rows: list[Demonstration] = [row for file in files for row in load_demonstrations(file)]
    chat = loaded.chat()
    prompts = [chat.encode_prompt(row.prompt) for row in rows]
    check_answers(rows, "contains")

    def correct(times: int, temperature: float) -> list[bool]:
        seeds = [sample_seed(0, 0, row, time) for time in range(times) for row in range(len(rows))]
        many = answer(
            loaded,
            prompts * times,
            rows * times,
            chat,
            Sampling(LENGTH, temperature),
            batch_size=64,
            scorer="contains",
            seeds=seeds,
        )
        return many.correct

    with training_precision(loaded.model, "auto"):
        greedy, samples = correct(1, 0), correct(SAMPLES, TEMPERATURE)
    return [Asked(*place, greedy[row], sum(samples[row :: len(rows)])) for row, place in enumerate(lines)]


def means(questions: Sequence[Asked]) -> tuple[float, float]:
    """Greedy accuracy, and the mean over samples."""
    count = len(questions)
    return sum(q.greedy for q in questions) / count, sum(q.right for q in questions) / count / SAMPLES


def chosen(candidates: Sequence[Asked], count: int) -> list[Asked]:
    """The questions to take, shuffled."""
    few = count // 6
    steady = [q for q in candidates if q.right >= STEADY]
    seldom = [q for q in candidates if q.right <= SELDOM]
    if len(steady) < count - few or len(seldom) < few:
        raise SystemExit(f"{len(steady)} steady and {len(seldom)} others, expected {count - few} and {few}: write more")

    def draw(seed: int) -> list[Asked]:
        chance = random.Random(seed)

        def first(questions: list[Asked], number: int) -> list[Asked]:
            return sorted(questions, key=lambda q: (q.file > 0, chance.random()))[:number]

        taken = first(steady, count - few) + first(seldom, few)
        return chance.sample(taken, count)

    def gap(questions: list[Asked]) -> float:
        greedy, mean = means(questions)
        return max(abs(greedy - mean), AGREE)

    draws = (draw(seed) for seed in range(DRAWS))
    best = next(draws)
    for other in draws:
        if gap(best) == AGREE:
            break
        best = min(best, other, key=gap)
    return best


def main(count: int, file: str, candidates: Sequence[str]) -> None:
    found = chosen(asked(to_best_device(load_model(MODEL)), candidates), count)
    Path(file).write_text("".join(f"{q.line}\n" for q in found), encoding="utf-8")
    print("greedy {:.3f}, mean of samples {:.3f}".format(*means(found)))


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], sys.argv[3:])
