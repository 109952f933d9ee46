"""How a batch is divided: exactly once each, little padding, bounded memory."""

from __future__ import annotations

import random

import pytest

from selfdistill.training.micro_batches import cut


@pytest.mark.parametrize("equal", [False, True])
@pytest.mark.parametrize("seed", range(50))
def test_every_sequence_is_in_one_micro_batch_within_the_memory_of_the_longest(seed: int, equal: bool) -> None:
    chance = random.Random(seed)
    lengths = [chance.randint(1, 600) for _ in range(chance.randint(1, 40))]
    size = chance.randint(1, len(lengths))
    batches = cut(lengths, size, equal=equal)
    assert sorted(number for batch in batches for number in batch) == list(range(len(lengths)))
    assert all(len(batch) * max(lengths[n] for n in batch) <= size * max(lengths) for batch in batches)
    assert len(batches) <= -(-len(lengths) // size)
    if equal:
        assert [len(batch) for batch in batches[:-1]] == [size] * (len(batches) - 1)


def test_one_micro_batch_keeps_the_order() -> None:
    assert cut([5, 3, 9], 3, equal=False) == [[0, 1, 2]]
    assert cut([], 1, equal=False) == []


def test_sorting_saves_padding_and_passes() -> None:
    chance = random.Random(0)
    lengths = [round(40 + 600 * chance.random() ** 3) for _ in range(32)]
    as_they_came = [list(range(start, start + 4)) for start in range(0, 32, 4)]
    padded = [sum(len(b) * max(lengths[n] for n in b) for b in x) for x in (as_they_came, cut(lengths, 4, equal=True))]
    assert padded[1] < 1.2 * sum(lengths) < 1.5 * sum(lengths) < padded[0]
    assert len(cut(lengths, 4, equal=False)) < len(as_they_came)
