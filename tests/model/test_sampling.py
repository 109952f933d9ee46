"""Sampling: against ``generate``, an independently written policy, and the model's own log-probabilities."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from odd_models import NAMES, odd_model
from transformers import Gemma2Config, Gemma2ForCausalLM, OpenAIGPTConfig, OpenAIGPTLMHeadModel
from waits import Waits

from selfdistill.errors import UserError
from selfdistill.model.dropout import disable_dropout
from selfdistill.model.loading import LoadedModel
from selfdistill.model.preallocated import PREALLOCATED_TOKENS
from selfdistill.model.prefix_cache import can_continue_cache
from selfdistill.model.sampling import Rollout, Sampling, choose, sample, sample_seed

Loader = Callable[..., LoadedModel]
GREEDY = Sampling(20, temperature=0)
MANY_ENDS = (257, *range(40, 75))  # so that samples end at unlike lengths


def prompts(*lengths: int) -> list[list[int]]:
    draw = random.Random(7)
    return [[draw.randrange(256) for _ in range(length)] for length in lengths]


def tiny_gemma2() -> Any:
    """Alternating windows of 6 tokens, shorter than the prompts: the cache has layers of two kinds."""
    config = Gemma2Config(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        sliding_window=6,
        initializer_range=0.3,
        pad_token_id=258,
        eos_token_id=257,
        bos_token_id=256,
        attn_implementation="eager",
    )
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return Gemma2ForCausalLM(config).eval()


def generated(loaded: LoadedModel, batch: list[list[int]], limit: int) -> list[list[int]]:
    """What ``generate`` says, greedy and left-padded, up to and with the first end token."""
    width = max(map(len, batch))
    out = loaded.model.generate(
        input_ids=torch.tensor([[258] * (width - len(p)) + p for p in batch]),
        attention_mask=torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in batch]),
        do_sample=False,
        max_new_tokens=limit,
        eos_token_id=list(loaded.end_token_ids),
        pad_token_id=258,
    )[:, width:].tolist()
    ends = [next((i + 1 for i, t in enumerate(ids) if t in loaded.end_token_ids), limit) for ids in out]
    return [ids[:end] for ids, end in zip(out, ends, strict=True)]


# --- greedy ---


@pytest.mark.parametrize("options", [{}, {"tied": True}, {"ends": MANY_ENDS}], ids=["untied", "tied", "many ends"])
def test_greedy_equals_generate_token_for_token(load: Loader, options: dict[str, Any]) -> None:
    loaded = load(**options)
    batch = prompts(5, 1, 40, 17, 2, 3, 64)
    rollouts = sample(loaded, batch, GREEDY)
    assert [r.ids for r in rollouts] == generated(loaded, batch, 20)
    assert [r.ids for r in rollouts] == [generated(loaded, [prompt], 20)[0] for prompt in batch]
    assert all(r.logps == [0.0] * len(r.ids) for r in rollouts)
    if options.get("ends"):
        assert len({len(r.ids) for r in rollouts}) > 2  # rows did leave the batch at unlike times


def test_greedy_equals_generate_with_sliding_windows(load: Loader) -> None:
    loaded = replace(load(), model=tiny_gemma2(), end_token_ids=MANY_ENDS)
    batch = prompts(5, 1, 40, 17, 8)
    assert [r.ids for r in sample(loaded, batch, GREEDY)] == generated(loaded, batch, 20)


@pytest.mark.parametrize("name", NAMES)
def test_greedy_equals_generate_for_models_of_all_kinds(load: Loader, name: str) -> None:
    model, _ = odd_model(name)
    loaded = replace(load(), model=model, end_token_ids=(257, *range(0, 300, 9)), window=None, continues_cache=None)
    disable_dropout(model)
    beginning, *rest = prompts(50, 5, 1, 40, 17)
    batch = [beginning + tail for tail in rest]
    batch.append(batch[2])
    rollouts = sample(loaded, batch, GREEDY)
    assert [r.ids for r in rollouts] == [generated(loaded, [prompt], 20)[0] for prompt in batch]
    assert sample(loaded, batch[:1], GREEDY)[0].ids == rollouts[0].ids  # without padding there is no mask


def test_memory_for_new_tokens_is_set_aside_again_when_it_is_used_up(load: Loader) -> None:
    loaded = load(ends=(257,))
    batch = prompts(5, 30)
    limit = 2 * PREALLOCATED_TOKENS + 10
    rollouts = sample(loaded, batch, Sampling(limit, temperature=0))
    assert max(len(r.ids) for r in rollouts) == limit
    assert [r.ids for r in rollouts] == generated(loaded, batch, limit)


def test_a_model_without_a_cache_is_refused(load: Loader) -> None:
    config = OpenAIGPTConfig(vocab_size=300, n_embd=32, n_layer=2, n_head=4)
    loaded = replace(load(), model=OpenAIGPTLMHeadModel(config).eval(), continues_cache=None)
    with pytest.raises(UserError, match="does not support a key/value cache"):
        sample(loaded, prompts(5, 3), GREEDY)


@pytest.mark.parametrize("windows", [False, True])
def test_equal_prompts_and_a_common_beginning_are_read_once_and_change_no_token(load: Loader, windows: bool) -> None:
    loaded = load(ends=MANY_ENDS)
    if windows:
        loaded = replace(loaded, model=tiny_gemma2())
    beginning, *rest = prompts(50, 5, 1, 40, 17)
    batch = [beginning + tail for tail in rest]
    batch = [*batch, batch[2], beginning, batch[0]]
    assert can_continue_cache(loaded)  # its probe's passes are not counted
    read = []
    hook = loaded.model.register_forward_pre_hook(
        lambda _m, _a, kw: read.append(kw["input_ids"].shape), with_kwargs=True
    )
    rollouts = sample(loaded, batch, GREEDY)
    hook.remove()
    assert [r.ids for r in rollouts] == generated(loaded, batch, 20)
    # Five unlike prompts; the shortest, which all begin with, keeps its last token for the second pass. Padding that
    # lies between the beginning and the rest would shorten a sliding window.
    assert read[0] == ((5, 90) if windows else (1, 49))
    assert windows or read[1] == (5, 41)


# --- what a sample depends on ---


def one_by_one(loaded: LoadedModel, batch: list[list[int]], sampling: Sampling, seeds: list[int]) -> list[Rollout]:
    return [sample(loaded, [p], sampling, [s])[0] for p, s in zip(batch, seeds, strict=True)]


@pytest.mark.parametrize("sampling", [Sampling(16), Sampling(16, temperature=0.7, top_p=0.9, top_k=40)])
@pytest.mark.parametrize("options", [{}, {"ends": MANY_ENDS}], ids=["one end", "many ends"])
def test_a_sample_is_the_same_in_any_batch_in_any_order_and_alone(
    load: Loader, sampling: Sampling, options: dict[str, Any]
) -> None:
    loaded = load(**options)
    batch = prompts(5, 1, 40, 17, 2, 9, 9, 30)
    seeds = [sample_seed(0, 3, row, 0) for row in range(8)]
    together = sample(loaded, batch, sampling, seeds)
    alone = one_by_one(loaded, batch, sampling, seeds)
    backwards = sample(loaded, batch[::-1], sampling, seeds[::-1])[::-1]
    some = sample(loaded, batch[2:5], sampling, seeds[2:5])
    for other, expected in ((alone, together), (backwards, together), (some, together[2:5])):
        assert [r.ids for r in other] == [r.ids for r in expected]
        assert [r.truncated for r in other] == [r.truncated for r in expected]
        for a, b in zip(other, expected, strict=True):
            assert a.logps == pytest.approx(b.logps, abs=1e-4)


def test_a_sample_draws_nothing_from_the_global_generator(load: Loader) -> None:
    loaded, batch = load(), prompts(4, 6)
    torch.manual_seed(1)
    first = sample(loaded, batch, Sampling(8), [5, 6])
    state = torch.get_rng_state()
    torch.manual_seed(2)
    second = sample(loaded, batch, Sampling(8), [5, 6])
    assert [r.ids for r in first] == [r.ids for r in second]
    torch.manual_seed(1)
    assert torch.equal(state, torch.get_rng_state())


def test_a_token_with_which_no_sample_ends_waits_for_the_device_once(load: Loader) -> None:
    loaded, batch = replace(load(), end_token_ids=(-1,)), prompts(5, 9)

    def waits(tokens: int) -> int:
        with Waits() as seen:
            sample(loaded, batch, Sampling(tokens), [1, 2])
        return seen.count

    # That is for the list of those that end, which is not counted here; transformers looks for padding in the mask.
    assert waits(12) - waits(4) <= 8


def test_tokens_and_time_are_counted(load: Loader) -> None:
    loaded, began = load(ends=MANY_ENDS), time.monotonic()
    rollouts = [r for seeds in ([1, 2], [3, 4]) for r in sample(loaded, prompts(3, 9), Sampling(20), seeds)]
    assert loaded.rollout_count.tokens == sum(len(r.ids) for r in rollouts)
    assert 0 < loaded.rollout_count.seconds <= time.monotonic() - began


def test_a_longer_limit_only_goes_on(load: Loader) -> None:
    loaded, batch = load(ends=MANY_ENDS), prompts(4, 6, 8)
    short, long = (sample(loaded, batch, Sampling(limit), [1, 2, 3]) for limit in (4, 12))
    assert [r.ids for r in short] == [r.ids[:4] for r in long]


def test_seeds_differ_in_each_of_the_four_numbers_and_are_fixed_for_all_time() -> None:
    seeds = {
        sample_seed(seed, step, row, generation)
        for seed in range(3)
        for step in range(12)
        for row in range(12)
        for generation in range(3)
    }
    assert len(seeds) == 3 * 12 * 12 * 3
    assert all(0 <= seed < 2**63 for seed in seeds)
    # `printf 1/22/3/0 | sha256sum | cut -c-16`, shifted right by one bit.
    assert sample_seed(1, 22, 3, 0) == 8361051147829644729


# --- ends ---


def test_a_sample_stops_at_each_of_the_end_tokens_and_keeps_it(load: Loader) -> None:
    loaded = load(ends=MANY_ENDS)
    rollouts = sample(loaded, prompts(6) * 60, Sampling(12), list(range(60)))
    last = {r.ids[-1] for r in rollouts if not r.truncated}
    assert len(last) > 5  # many kinds of end
    assert last <= set(MANY_ENDS)
    assert 0 < sum(r.truncated for r in rollouts) < 60
    for rollout in rollouts:
        assert not set(rollout.ids[:-1]) & set(MANY_ENDS)
        assert len(rollout.ids) == len(rollout.logps) <= 12
        assert rollout.truncated == (rollout.ids[-1] not in MANY_ENDS)
        assert not rollout.truncated or len(rollout.ids) == 12


def test_an_end_token_at_the_limit_is_not_a_truncation(load: Loader) -> None:
    loaded = load()
    (free,) = sample(replace(loaded, end_token_ids=(257,)), prompts(6), Sampling(5, temperature=0))
    assert free.truncated
    stop = free.ids[4]
    assert stop not in free.ids[:4]
    (ended,) = sample(replace(loaded, end_token_ids=(stop,)), prompts(6), Sampling(5, temperature=0))
    assert ended.ids == free.ids
    assert not ended.truncated


# --- the policy ---


@pytest.mark.parametrize("templated", [False, True])
def test_without_a_template_a_sample_stops_where_the_next_turn_begins(
    load: Loader, monkeypatch: pytest.MonkeyPatch, templated: bool
) -> None:
    loaded = load() if templated else load(template=None)
    texts = ["Yes.\n\nUser: more", "Yes,\n\nand no.\n\nUser: more", "One\nUser: two\n User: three"]
    scripts = [loaded.tokenizer(text)["input_ids"] for text in texts]
    alive = list(range(3))
    at = 0

    def scripted(logits_BV: torch.Tensor, _sampling: Sampling, _uniform_B: Any) -> tuple[torch.Tensor, torch.Tensor]:
        nonlocal at, alive
        if len(logits_BV) < len(alive):  # a finished sample left the batch
            marker = "\n\nUser:"
            alive = [row for row in alive if marker not in loaded.tokenizer.decode(scripts[row][:at])]
        tokens = torch.tensor([(scripts[row] + [0] * 99)[at] for row in alive])
        at += 1
        return tokens, torch.zeros(len(alive))

    monkeypatch.setattr("selfdistill.model.sampling.choose", scripted)
    rollouts = sample(loaded, prompts(3, 4, 5), Sampling(30, 0))
    said = [loaded.tokenizer.decode(rollout.ids) for rollout in rollouts]
    if templated:
        assert all(len(rollout.ids) == 30 and rollout.truncated for rollout in rollouts)
        return
    assert said[:2] == ["Yes.\n\nUser:", "Yes,\n\nand no.\n\nUser:"]
    assert [rollout.truncated for rollout in rollouts] == [False, False, True]
    assert loaded.chat().decode(rollouts[1].ids) == "Yes,\n\nand no."


def policy(logits: np.ndarray, sampling: Sampling) -> np.ndarray:
    """softmax(logits / temperature), its top k, then its smallest set of at least top_p mass; float64."""
    scaled = logits.astype(np.float64) / sampling.temperature
    p = np.exp(scaled - scaled.max())
    p /= p.sum()
    by_size = sorted(range(len(p)), key=lambda v: -p[v])
    if sampling.top_k:
        by_size = by_size[: sampling.top_k]
    total, mass, kept = sum(p[v] for v in by_size), 0.0, []
    for v in by_size:
        if mass >= sampling.top_p:
            break
        kept.append(v)
        mass += p[v] / total
    cut = np.zeros_like(p)
    cut[kept] = p[kept] / p[kept].sum()
    return cut


POLICIES = [
    Sampling(1),
    Sampling(1, temperature=0.5),
    Sampling(1, temperature=2.0, top_k=5),
    Sampling(1, top_p=0.6),
    Sampling(1, temperature=1.3, top_k=12, top_p=0.8),
    Sampling(1, top_k=1),
    Sampling(1, top_p=1e-6),
    Sampling(1, top_k=1000),
]


@pytest.mark.parametrize("sampling", POLICIES)
def test_choose_inverts_the_cumulative_distribution_of_the_policy(sampling: Sampling) -> None:
    generator = torch.Generator().manual_seed(3)
    logits_BV = torch.randn(400, 30, generator=generator) * 2
    uniform_B = torch.rand(400, generator=generator, dtype=torch.float64)
    uniform_B[:3] = torch.tensor([0.0, 1 - 2**-53, 0.5], dtype=torch.float64)
    token_B, logp_B = choose(logits_BV, sampling, uniform_B)
    for logits, uniform, token, logp in zip(logits_BV.numpy(), uniform_B, token_B, logp_B, strict=True):
        p = policy(logits, sampling)
        below, edge = p[:token].sum(), p[: token + 1].sum()
        assert p[token] > 0
        # float32 logits are divided in float32: the edges agree to that.
        assert below - 1e-6 <= uniform <= edge + 1e-6
        assert float(logp) == pytest.approx(np.log(p[token]), abs=1e-5)


def test_choose_never_takes_a_token_without_mass() -> None:
    logits_BV = torch.tensor([[-torch.inf, 0.0, -torch.inf, 0.0, -torch.inf]] * 4)
    uniform_B = torch.tensor([0.0, 0.49, 0.51, 1 - 2**-53], dtype=torch.float64)
    assert choose(logits_BV, Sampling(1), uniform_B)[0].tolist() == [1, 1, 3, 3]


@pytest.mark.parametrize(
    "sampling", [Sampling(1), Sampling(1, temperature=0.6, top_k=20), Sampling(1, temperature=1.5, top_p=0.7)]
)
def test_frequencies_over_seeds_are_those_of_the_policy(load: Loader, sampling: Sampling) -> None:
    loaded, (prompt,), count = load(), prompts(7), 4000
    seeds = [sample_seed(0, step, 0, 0) for step in range(count)]
    tokens = [r.ids[0] for r in sample(loaded, [prompt] * count, sampling, seeds)]
    with torch.no_grad():
        p = policy(loaded.model(torch.tensor([prompt])).logits[0, -1].numpy(), sampling)
    seen = np.bincount(tokens, minlength=300)
    assert seen[p == 0].sum() == 0
    expected = p * count
    frequent = expected >= 5
    assert frequent.sum() > 10
    deviation = (seen - expected)[frequent] / np.sqrt(expected * (1 - p))[frequent]
    assert np.abs(deviation).max() < 4.5
    chi_square, freedom = (deviation**2).sum(), frequent.sum()
    assert abs(chi_square - freedom) < 4 * np.sqrt(2 * freedom)


@pytest.mark.parametrize("sampling", [Sampling(10), Sampling(10, temperature=0.6, top_k=30, top_p=0.9)])
def test_logps_are_those_of_the_policy_along_the_sample(load: Loader, sampling: Sampling) -> None:
    loaded = load(ends=MANY_ENDS)
    batch = prompts(3, 12, 30, 1)
    for prompt, rollout in zip(batch, sample(loaded, batch, sampling, [1, 2, 3, 4]), strict=True):
        with torch.no_grad():
            logits_TV = loaded.model(torch.tensor([prompt + rollout.ids])).logits[0, len(prompt) - 1 : -1].numpy()
        expected = [np.log(policy(row, sampling)[token]) for row, token in zip(logits_TV, rollout.ids, strict=True)]
        assert rollout.logps == pytest.approx(expected, abs=1e-4)
