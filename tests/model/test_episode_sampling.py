"""Replies turn by turn from kept states: against sampling each turn anew, in batches and alone."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from conftest import row_log_probs
from odd_models import NAMES, odd_model
from waits import Waits

from selfdistill.model.episode_sampling import TurnSampler
from selfdistill.model.loading import LoadedModel, disable_dropout
from selfdistill.model.prefix_cache import can_continue_cache
from selfdistill.model.sampling import Rollout, Sampling, sample, sample_seed

Loader = Callable[..., LoadedModel]
MANY_ENDS = (257, *range(40, 75))  # so that replies end at unlike lengths
FREE = Sampling(20)


def drawn(length: int, of: object) -> list[int]:
    draw = random.Random(str(of))
    return [draw.randrange(256) for _ in range(length)]


def conversation(
    loaded: LoadedModel, episodes: list[int], turns: int = 4, anew: bool = False
) -> dict[int, list[tuple[list[int], Rollout]]]:
    """Prompt and reply of each turn of some episodes, which end after unlike numbers of turns."""
    sampler, ids = TurnSampler(loaded, len(episodes)), {number: drawn(5 + 9 * number, number) for number in episodes}
    found: dict[int, list[tuple[list[int], Rollout]]] = {number: [] for number in episodes}
    for turn in range(turns):
        going = [number for number in episodes if turn <= number]
        seeds = [sample_seed(0, turn, number, 0) for number in going]
        prompts = [ids[number] for number in going]
        places = [episodes.index(number) for number in going]
        made = sample(loaded, prompts, FREE, seeds) if anew else sampler(places, prompts, FREE, seeds)
        for number, prompt, rollout in zip(going, prompts, made, strict=True):
            found[number].append((prompt, rollout))
            ids[number] = [*prompt, *rollout.ids, *drawn(3 + 7 * (number % 3), (number, turn))]
    return found


@torch.no_grad()
def logps(loaded: LoadedModel, prompt: list[int], ids: list[int]) -> list[float]:
    """Of the tokens, by one pass over all."""
    logp_TV = row_log_probs(loaded.model, prompt, ids)
    return logp_TV.gather(-1, torch.tensor(ids)[:, None])[:, 0].tolist()


def assert_alike(found: Rollout, wanted: Rollout) -> None:
    assert (found.ids, found.truncated) == (wanted.ids, wanted.truncated)
    assert found.logps == pytest.approx(wanted.logps, abs=2e-5)


def test_replies_from_kept_states_are_those_of_sampling_anew(load: Loader) -> None:
    loaded = load(ends=MANY_ENDS)
    found = conversation(loaded, [0, 1, 2, 3])
    assert loaded.rollout_count.tokens == sum(len(rollout.ids) for own in found.values() for _, rollout in own)
    assert loaded.rollout_count.seconds > 0
    wanted = conversation(loaded, [0, 1, 2, 3], anew=True)
    assert len({len(rollout.ids) for own in found.values() for _, rollout in own}) > 3
    for number, own in found.items():
        assert len(own) == number + 1
        for (prompt, rollout), (other, reply) in zip(own, wanted[number], strict=True):
            assert prompt == other
            assert_alike(rollout, reply)
            assert rollout.logps == pytest.approx(logps(loaded, prompt, rollout.ids), abs=1e-5)


@pytest.mark.parametrize("fixed", [False, True], ids=["growing", "fixed shapes"])
def test_replies_are_the_same_where_ends_are_looked_for_every_few_tokens(
    load: Loader, monkeypatch: pytest.MonkeyPatch, fixed: bool
) -> None:
    loaded = replace(load(ends=MANY_ENDS), captures=True)
    wanted = conversation(loaded, [0, 1, 2, 3])
    monkeypatch.setattr("selfdistill.model.sampling.tokens_per_check", lambda _kind: 6)
    monkeypatch.setattr("selfdistill.model.decoding_steps.has_graphs", lambda _kind: fixed)
    found = conversation(loaded, [0, 1, 2, 3])
    for number, own in found.items():
        for (prompt, rollout), (other, reply) in zip(own, wanted[number], strict=True):
            assert prompt == other
            assert_alike(rollout, reply)


def test_layers_keep_their_states_without_waiting_for_the_device(load: Loader) -> None:
    def waits(layers: int) -> int:
        loaded = replace(load(layers=layers), end_token_ids=(-1,))
        can_continue_cache(loaded)
        with Waits() as seen:
            conversation(loaded, [0, 1])
        return seen.count

    assert waits(4) == waits(2)


def test_an_episode_does_not_depend_on_the_others(load: Loader) -> None:
    loaded = load(ends=MANY_ENDS)
    together = conversation(loaded, [0, 1, 2, 3])
    for number, own in together.items():
        for (_, rollout), (_, alone) in zip(own, conversation(loaded, [number])[number], strict=True):
            assert_alike(rollout, alone)


@pytest.mark.parametrize("name", NAMES)
def test_models_that_cannot_go_on_read_anew(load: Loader, name: str) -> None:
    model, _ = odd_model(name)
    loaded = replace(load(), model=model, end_token_ids=(257, *range(0, 300, 9)), window=None, continues_cache=None)
    disable_dropout(model)
    found, wanted = conversation(loaded, [0, 1, 2]), conversation(loaded, [0, 1, 2], anew=True)
    for number, own in found.items():
        for (_, rollout), (_, reply) in zip(own, wanted[number], strict=True):
            assert_alike(rollout, reply)


def test_tokens_that_do_not_continue_what_was_read_are_read_anew(load: Loader) -> None:
    loaded = load(ends=MANY_ENDS)
    assert can_continue_cache(loaded)
    sampler, seeds = TurnSampler(loaded, 2), [1, 2]
    first = sampler([0, 1], [drawn(9, "a"), drawn(4, "b")], FREE, seeds)
    prompts = [[*drawn(9, "a"), *first[0].ids, 7], drawn(30, "other")]
    for rollout, reply in zip(sampler([0, 1], prompts, FREE, seeds), sample(loaded, prompts, FREE, seeds), strict=True):
        assert_alike(rollout, reply)
