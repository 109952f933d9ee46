"""Scores: aligned to the completion tokens, whatever the batch, the padding and the model's head."""

from __future__ import annotations

import gc
import math
import random
from collections.abc import Callable
from dataclasses import replace
from itertools import combinations, pairwise
from typing import Any

import pytest
import torch
from odd_models import NAMES, SIZE, long_rope, odd_model
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)

from selfdistill.loss.chunked import chunked_loss
from selfdistill.loss.divergence import CrossEntropy
from selfdistill.model.compiled import CompiledLayers
from selfdistill.model.dropout import disable_dropout
from selfdistill.model.forward import ForwardPass, similar_lengths
from selfdistill.model.head import body_and_head, head_agrees
from selfdistill.model.loading import LoadedModel, adopt
from selfdistill.model.lora import add_lora
from selfdistill.model.prefix_cache import (
    READ_TOKENS,
    PrefixCache,
    can_continue_cache,
    has_full_attention,
    shared_prefixes,
)

Loader = Callable[..., LoadedModel]


def texts(*lengths: int, seed: int = 7) -> list[list[int]]:
    draw = random.Random(seed)
    return [[draw.randrange(256) for _ in range(length)] for length in lengths]


CONTEXTS = texts(5, 1, 40, 17, 2)
COMPLETIONS = texts(3, 9, 1, 6, 12, seed=8)


def logits(scores: Any) -> Tensor:
    return scores.head(scores.hidden_ND)


@torch.no_grad()
def full_forward(model: Any, contexts: list[list[int]], completions: list[list[int]]) -> Tensor:
    """Row by row, no padding, the model's own logits; those before each completion token."""
    rows = []
    for context, completion in zip(contexts, completions, strict=True):
        own_LV = model(input_ids=torch.tensor([context + completion])).logits[0]
        rows.append(own_LV[len(context) - 1 : len(context) - 1 + len(completion)])
    return torch.cat(rows)


def successor_model() -> LlamaForCausalLM:
    """A Llama that says v + 1 after token v: one-hot embeddings, layers that add nothing, a shifted head."""
    size = 64
    config = LlamaConfig(
        vocab_size=size,
        hidden_size=size,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=4,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        model.model.embed_tokens.weight.copy_(torch.eye(size))
        model.model.layers[0].self_attn.o_proj.weight.zero_()
        model.model.layers[0].mlp.down_proj.weight.zero_()
        model.lm_head.weight.copy_(torch.eye(size).roll(1, 0))  # row v + 1 answers to embedding v
    return model


def test_the_logits_of_a_completion_token_are_those_that_its_predecessor_predicts(load: Loader) -> None:
    loaded = replace(load(), model=successor_model(), pad_token_id=0)
    draw = random.Random(1)
    contexts = [[draw.randrange(64) for _ in range(n)] for n in (1, 4, 9)]
    completions = [[draw.randrange(64) for _ in range(n)] for n in (5, 1, 7)]
    scores = ForwardPass(loaded)(loaded.model, contexts, completions)
    before = [[context[-1], *completion[:-1]] for context, completion in zip(contexts, completions, strict=True)]
    expected = [(token + 1) % 64 for row in before for token in row]
    assert logits(scores).argmax(-1).tolist() == expected
    assert (
        float(logits(scores).softmax(-1).amax(-1).min().detach()) > 0.9
    )  # the model is sure: no near tie decided this


@pytest.mark.parametrize("tied", [False, True])
def test_scores_equal_the_models_own_logits_row_by_row(load: Loader, tied: bool) -> None:
    loaded = load(tied=tied)
    assert (loaded.model.lm_head.weight is loaded.model.model.embed_tokens.weight) == tied
    scorer = ForwardPass(loaded)
    assert scorer.fused
    scores = scorer(loaded.model, CONTEXTS, COMPLETIONS)
    assert scores.hidden_ND.shape == (sum(map(len, COMPLETIONS)), 32)
    assert [p is loaded.model.lm_head.weight for p in scores.head_parameters] == [True]
    expected = full_forward(loaded.model, CONTEXTS, COMPLETIONS)
    torch.testing.assert_close(logits(scores), expected, atol=1e-5, rtol=0)


def test_a_batch_scores_as_its_rows_do_alone(load: Loader) -> None:
    loaded = load()
    scorer = ForwardPass(loaded)
    together = logits(scorer(loaded.model, CONTEXTS, COMPLETIONS)).split([len(c) for c in COMPLETIONS])
    for i, batched in enumerate(together):
        alone = logits(scorer(loaded.model, CONTEXTS[i : i + 1], COMPLETIONS[i : i + 1]))
        torch.testing.assert_close(batched, alone, atol=1e-5, rtol=0)


@pytest.mark.parametrize("pad", [0, 17, 258])
def test_right_padding_changes_nothing(load: Loader, pad: int) -> None:
    loaded = load()
    short, long = ([CONTEXTS[0]], [COMPLETIONS[0]]), ([CONTEXTS[0], texts(90)[0]], [COMPLETIONS[0], [1]])
    alone = logits(ForwardPass(loaded)(loaded.model, *short))
    scorer = ForwardPass(replace(loaded, pad_token_id=pad), sharded=True)  # which takes one pass, whatever the padding
    padded = logits(scorer(loaded.model, *long))[: len(alone)]
    torch.testing.assert_close(padded, alone, atol=1e-5, rtol=0)


def test_a_left_padded_forward_with_position_ids_gives_the_same(load: Loader) -> None:
    loaded = load()
    ours = logits(ForwardPass(loaded)(loaded.model, CONTEXTS, COMPLETIONS)).split([len(c) for c in COMPLETIONS])
    rows = [a + b for a, b in zip(CONTEXTS, COMPLETIONS, strict=True)]
    width = max(map(len, rows))
    ids_BL = torch.tensor([[258] * (width - len(row)) + row for row in rows])
    mask_BL = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    with torch.no_grad():
        out_BLV = loaded.model(
            input_ids=ids_BL, attention_mask=mask_BL, position_ids=(mask_BL.cumsum(1) - 1).clamp(min=0)
        ).logits
    for left_LV, mine, completion in zip(out_BLV, ours, COMPLETIONS, strict=True):
        torch.testing.assert_close(left_LV[-len(completion) - 1 : -1], mine, atol=1e-5, rtol=0)


def scaled(model: Any, factor: float) -> Any:
    """With embeddings and head as large as a trained model's, so that a cap bites."""
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(factor)
    return model.eval()


def capped_or_scaled(kind: str) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(2)
        if kind == "gemma2":
            return scaled(Gemma2ForCausalLM(Gemma2Config(**SIZE, head_dim=8, final_logit_softcapping=5.0)), 20)
        if kind == "granite":
            return scaled(GraniteForCausalLM(GraniteConfig(**SIZE, logits_scaling=4.0)), 20)
        return scaled(CohereForCausalLM(CohereConfig(**SIZE, logit_scale=0.25)), 20)


def check_chunked_gradients(loaded: LoadedModel, scorer: ForwardPass) -> None:
    """Through the head in chunks, every trained weight gets the gradient that it gets through whole logits."""
    tokens = torch.tensor([token for ids in COMPLETIONS for token in ids])
    weights = torch.rand(len(tokens), generator=torch.Generator().manual_seed(0))
    scores = scorer(loaded.model, CONTEXTS, COMPLETIONS)
    value, _ = chunked_loss(
        CrossEntropy(), scores.hidden_ND, scores.head, scores.head_parameters, tokens, weights, chunk_size=3
    )
    value.backward()
    found = {name: p.grad for name, p in loaded.model.named_parameters() if p.requires_grad}
    loaded.model.zero_grad()
    whole = logits(scorer(loaded.model, CONTEXTS, COMPLETIONS))
    (weights * torch.nn.functional.cross_entropy(whole, tokens, reduction="none")).sum().backward()
    for name, parameter in loaded.model.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(found[name], parameter.grad, atol=1e-5, rtol=1e-4)


class Offset(LlamaForCausalLM):
    """Does to its logits what no configuration says."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        output.logits = output.logits * torch.linspace(1, 3, output.logits.shape[-1])
        return output


@pytest.mark.parametrize("kind", ["gemma2", "granite", "cohere"])
def test_caps_and_scales_of_logits_belong_to_the_head(load: Loader, kind: str) -> None:
    loaded = replace(load(), model=capped_or_scaled(kind))
    expected = full_forward(loaded.model, CONTEXTS, COMPLETIONS)
    scorer = ForwardPass(loaded)
    assert scorer.fused
    scores = scorer(loaded.model, CONTEXTS, COMPLETIONS)
    plain = loaded.model.get_output_embeddings()(scores.hidden_ND)
    assert float((plain - expected).detach().abs().max()) > 0.1, "without cap or scale it would be wrong"
    assert len(scores.head_parameters) == 1
    torch.testing.assert_close(logits(scores), expected, atol=1e-5, rtol=0)
    check_chunked_gradients(loaded, scorer)


def test_lora_on_the_head_is_fused(load: Loader) -> None:
    loaded = load(tied=False)
    config = LoraConfig(r=4, target_modules=["q_proj", "lm_head"], init_lora_weights=False, task_type="CAUSAL_LM")
    with torch.random.fork_rng():
        torch.manual_seed(3)
        loaded.model = get_peft_model(loaded.model, config).eval()
    scorer = ForwardPass(loaded)
    assert scorer.fused
    scores = scorer(loaded.model, CONTEXTS, COMPLETIONS)
    assert len(scores.head_parameters) == 2
    torch.testing.assert_close(logits(scores), full_forward(loaded.model, CONTEXTS, COMPLETIONS), atol=1e-5, rtol=0)
    check_chunked_gradients(loaded, scorer)


def test_a_scale_that_is_no_number_is_left_to_the_probe(load: Loader) -> None:
    loaded = load()
    loaded.model.config.logit_scale = "inv_sqrt_d_model"
    assert ForwardPass(loaded).fused


def test_models_that_change_their_logits_are_noticed_and_scored_by_their_own(load: Loader) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(2)
        loaded = replace(load(), model=scaled(Offset(LlamaConfig(**SIZE)), 20))
    expected = full_forward(loaded.model, CONTEXTS, COMPLETIONS)
    assert not head_agrees(loaded)
    scorer = ForwardPass(loaded)
    assert not scorer.fused
    scores = scorer(loaded.model, CONTEXTS, COMPLETIONS)
    assert scores.head_parameters == ()
    torch.testing.assert_close(logits(scores), expected, atol=1e-5, rtol=0)
    logits(scores).sum().backward()
    assert loaded.model.get_output_embeddings().weight.grad is not None


@pytest.mark.parametrize("tied", [False, True])
def test_an_adapter_is_scored_through_the_head_of_its_base(load: Loader, tied: bool) -> None:
    loaded = load(tied=tied)
    before = full_forward(loaded.model, CONTEXTS, COMPLETIONS)
    add_lora(loaded, 4, None, 0)
    with torch.no_grad():
        for name, parameter in loaded.model.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.05)
    scorer = ForwardPass(loaded)
    assert scorer.fused
    scores = scorer(loaded.model, CONTEXTS, COMPLETIONS)
    assert scores.head_parameters == ()  # the head is frozen
    expected = full_forward(loaded.model, CONTEXTS, COMPLETIONS)
    assert float((expected - before).abs().max()) > 0.01
    torch.testing.assert_close(logits(scores), expected, atol=1e-5, rtol=0)


def test_scoring_leaves_dropout_off_though_the_model_is_in_train_mode(load: Loader) -> None:
    loaded = load()  # its config asks for attention dropout
    assert loaded.model.config.attention_dropout == 0.1
    still = logits(ForwardPass(loaded)(loaded.model, CONTEXTS, COMPLETIONS))
    loaded.model.train()
    assert torch.equal(logits(ForwardPass(loaded)(loaded.model, CONTEXTS, COMPLETIONS)), still)


def test_dropout_modules_are_switched_off_for_good(load: Loader) -> None:
    size = {"vocab_size": 300, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}
    model = GPT2LMHeadModel(GPT2Config(**size, resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5)).train()
    assert any(isinstance(module, torch.nn.Dropout) for module in model.modules())
    disable_dropout(model)
    loaded = replace(load(), model=model)
    still = logits(ForwardPass(loaded)(model, CONTEXTS, COMPLETIONS))
    assert model.training
    assert torch.equal(logits(ForwardPass(loaded)(model, CONTEXTS, COMPLETIONS)), still)
    torch.testing.assert_close(still, full_forward(model.eval(), CONTEXTS, COMPLETIONS), atol=1e-5, rtol=0)


# --- beginnings that several contexts share ---


def shared_contexts() -> list[list[int]]:
    first, second = texts(90, 70, seed=3)
    tails = texts(9, 4, 30, 1, 6, 12, seed=4)
    return [first + tails[0], tails[1], second + tails[2], first + tails[3], second + tails[4], first + tails[5]]


def test_rows_are_grouped_by_long_common_beginnings_only() -> None:
    contexts = shared_contexts()
    groups = {tuple(sorted(rows)): length for rows, length in shared_prefixes(contexts)}
    assert groups == {(0, 3, 5): 90, (2, 4): 70}
    # A context that is itself the beginning of another keeps its last token for the pass that follows.
    assert shared_prefixes([contexts[0][:80], contexts[0]]) == [([0, 1], 79)]
    assert shared_prefixes([contexts[0][:60], contexts[0]]) == []
    assert shared_prefixes([contexts[0], contexts[0]]) == [([0, 1], 98)]


def test_documents_are_not_chained_by_a_shorter_beginning_that_all_share() -> None:
    system, *documents = texts(70, 100, 100, seed=5)
    contexts = [system + document + [i] * 5 for document in documents for i in range(3)]
    groups = sorted((sorted(rows), length) for rows, length in shared_prefixes(contexts))
    assert groups == [([0, 1, 2], 170), ([3, 4, 5], 170)]


@pytest.mark.parametrize("which", ["mixed", "all shared", "one group in order", "none shared"])
def test_a_shared_beginning_computed_once_gives_the_same_scores(load: Loader, which: str) -> None:
    loaded = load()
    rows = {
        "mixed": [0, 1, 2, 3, 4, 5],
        "all shared": [5, 2, 0, 4],
        "one group in order": [0, 3, 5],
        "none shared": [1],
    }
    contexts = [shared_contexts()[row] for row in rows[which]]
    completions = texts(3, 9, 1, 6, 12, 2, seed=8)[: len(contexts)]
    seen = []
    body, _ = body_and_head(loaded.model) or pytest.fail("not separable")
    scorer = ForwardPass(loaded)
    hook = body.register_forward_pre_hook(lambda _m, _a, kw: seen.append(kw["input_ids"].numel()), with_kwargs=True)
    with torch.no_grad():
        shared = logits(scorer(loaded.model, contexts, completions))
    hook.remove()
    assert torch.allclose(shared, full_forward(loaded.model, contexts, completions), rtol=1e-5, atol=1e-5)
    if which == "mixed":
        assert sum(seen) < 0.6 * len(contexts) * max(
            len(c) + len(d) for c, d in zip(contexts, completions, strict=True)
        )


@pytest.mark.parametrize("extra", [0, 3, 20, math.inf])
def test_no_division_into_passes_has_fewer_tokens(extra: float) -> None:
    draw = random.Random(3)
    for _ in range(50):
        lengths = [draw.choice([1, 2, 9, 10, 40, 41]) for _ in range(draw.randrange(1, 8))]
        ordered = sorted(lengths)
        cuts = [
            [0, *inner, len(lengths)] for n in range(len(lengths)) for inner in combinations(range(1, len(lengths)), n)
        ]
        costs = [sum((b - a) * ordered[b - 1] + extra for a, b in pairwise(cut)) for cut in cuts]
        passes = similar_lengths(lengths, extra)
        assert sorted(row for rows in passes for row in rows) == list(range(len(lengths)))
        assert sum(len(rows) * max(lengths[row] for row in rows) + extra for rows in passes) == min(costs)
    assert similar_lengths([], extra) == []
    assert similar_lengths([7, 40, 7], math.inf) == [[0, 1, 2]]


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("compiled", [False, True])
def test_rows_of_other_lengths_take_passes_of_their_own(load: Loader, sharded: bool, compiled: bool) -> None:
    model = load().model.double()
    loaded = replace(load(), model=model)
    contexts, completions = texts(90, 4, 100, 6, 5, 95), texts(3, 9, 1, 6, 12, 2, seed=8)
    weights_NV = torch.randn(33, model.config.vocab_size, generator=torch.Generator().manual_seed(1)).double()
    seen: list[tuple[int, ...]] = []
    scorer = ForwardPass(loaded, CompiledLayers(loaded) if compiled else None, sharded=sharded)
    body, _ = body_and_head(model) or pytest.fail("not separable")
    hook = body.register_forward_pre_hook(lambda _m, _a, kw: seen.append(kw["input_ids"].shape), with_kwargs=True)
    scores_NV = logits(scorer(model, contexts, completions))
    hook.remove()
    assert seen == ([(6, 101)] if sharded or compiled else [(3, 101), (3, 17)])
    (weights_NV * scores_NV).sum().backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    rows = [logits(scorer(model, [a], [b])) for a, b in zip(contexts, completions, strict=True)]
    torch.testing.assert_close(scores_NV, torch.cat(rows), rtol=1e-9, atol=1e-9)
    (weights_NV * torch.cat(rows)).sum().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_through_a_shared_beginning_are_those_of_whole_rows(load: Loader, checkpointing: bool) -> None:
    # GPT-2, because Llama's norms compute in float32 whatever the model's dtype.
    size = {"vocab_size": 300, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}
    model = GPT2LMHeadModel(GPT2Config(**size, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0)).eval().double()
    loaded = replace(load(), model=model)
    contexts, completions = shared_contexts(), texts(3, 9, 1, 6, 12, 2, seed=8)
    weights_NV = torch.randn(33, 300, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    scorer = ForwardPass(loaded)
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.train()
    (weights_NV * logits(scorer(model, contexts, completions))).sum().backward()
    shared = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    model.eval()
    start = 0
    for context, completion in zip(contexts, completions, strict=True):
        whole_TV = model(torch.tensor([context + completion])).logits[0, len(context) - 1 : -1]
        (weights_NV[start : start + len(completion)] * whole_TV).sum().backward()
        start += len(completion)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(shared[name], parameter.grad, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("budget", [0, 25_000, 10**9])
@pytest.mark.parametrize("lora", [False, True])
def test_kept_contexts_give_the_same_scores_as_reading_them_again(load: Loader, budget: int, lora: bool) -> None:
    loaded = load()
    if lora:
        add_lora(loaded, 2, None, 0)
    contexts = [*shared_contexts(), *texts(2, 7, seed=9)]
    contexts += [contexts[0][:90], contexts[2]]  # a beginning that is itself a context, and a repetition
    completions = texts(3, 9, 1, 6, 12, 2, 5, 5, 4, 3, seed=8)
    seen: list[int] = []
    body, _ = body_and_head(loaded.model) or pytest.fail("not separable")
    scorer, kept = ForwardPass(loaded), PrefixCache(contexts, budget)
    expected = full_forward(loaded.model, contexts, completions)
    body.register_forward_pre_hook(lambda _m, _a, kw: seen.append(kw["input_ids"].numel()), with_kwargs=True)
    with torch.no_grad():
        first = logits(scorer(loaded.model, contexts, completions, kept))
        read = sum(seen)
        seen.clear()
        again = logits(scorer(loaded.model, contexts, completions, kept))
        again_read = sum(seen)
        pairs = [(3, 1), (2, 9), (6, 0)]
        some = [
            logits(scorer(loaded.model, [contexts[i], contexts[j]], [completions[i], completions[j]], kept))
            for i, j in pairs
        ]
    assert torch.allclose(first, expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(first, again), "whether states were kept must not change a bit"
    by_row = expected.split([len(completion) for completion in completions])
    for (i, j), scores in zip(pairs, some, strict=True):
        assert torch.allclose(scores, torch.cat([by_row[i], by_row[j]]), rtol=1e-5, atol=1e-5)
    if budget == 10**9:  # later only the last token of each context and the completions are computed
        assert again_read == len(contexts) * (1 + max(map(len, completions)))
        assert read - again_read < 0.6 * sum(map(len, contexts)), "beginnings and repetitions are read once"
    else:
        held = kept.kept(body, loaded.model.config, contexts)
        assert len(held) == 0 if budget == 0 else 0 < len(held) < len(contexts)
        assert again_read > len(contexts) * (1 + max(map(len, completions)))


@pytest.mark.parametrize("name", NAMES)
def test_models_are_probed_and_all_are_scored_as_row_by_row(load: Loader, name: str) -> None:
    model, expected = odd_model(name)
    loaded = replace(load(), model=model.eval(), window=None, continues_cache=None)
    disable_dropout(model)
    contexts = [*shared_contexts(), *texts(40, 7, seed=9)]
    completions = texts(3, 9, 1, 6, 12, 2, 5, 5, seed=8)
    assert can_continue_cache(loaded) is expected
    scorer = ForwardPass(loaded)
    kept = scorer.keep(contexts, 10**9)
    assert (kept is not None) is expected
    with torch.no_grad():
        whole = full_forward(model, contexts, completions)
        for states in (None, kept):
            scores = logits(scorer(model, contexts, completions, states))
            torch.testing.assert_close(scores, whole, rtol=1e-4, atol=1e-4)


def test_a_model_is_not_probed_on_the_cpu_before_it_is_sharded(load: Loader) -> None:
    """Its passes do not continue one another, and hundreds of tokens of a large model take minutes there."""
    loaded = replace(load(), continues_cache=None)
    assert ForwardPass(loaded, sharded=True).fused
    assert loaded.continues_cache is None


def bytes_of_tensors() -> int:
    """Memory of all tensors that this process holds."""
    gc.collect()
    storages = [value.untyped_storage() for value in gc.get_objects() if type(value) is Tensor]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def test_kept_states_take_no_more_memory_than_the_budget(load: Loader) -> None:
    model, _ = odd_model("llama, one key/value head")
    loaded = replace(load(), model=model.eval(), window=None, continues_cache=None)
    body, _head = body_and_head(model) or pytest.fail("not separable")
    beginning, *tails = texts(200, *[10] * 20, seed=6)
    contexts = [beginning + tail for tail in tails]
    token_bytes = 2 * 2 * 8 * 4  # layers, keys and values, channels, bytes
    for budget, number in ((10**9, 20), ((200 + 9 * 7) * token_bytes, 7)):
        kept = ForwardPass(loaded).keep(contexts, budget)
        assert kept is not None
        before = bytes_of_tensors()
        with torch.no_grad():
            held = kept.kept(body, model.config, contexts)
            kept.cache(body, model.config, [contexts[row] for row in held])
        assert len(held) == number
        taken = bytes_of_tensors() - before
        assert 200 * token_bytes < taken <= min(budget, (200 + 20 * 10) * token_bytes)


def test_contexts_are_read_in_blocks_whatever_the_order_of_batches(load: Loader) -> None:
    loaded = load()
    contexts = [*shared_contexts(), *texts(*range(300, 324), seed=9)]
    completions = texts(*[4] * len(contexts), seed=8)
    body, _ = body_and_head(loaded.model) or pytest.fail("not separable")
    sizes: list[tuple[int, int]] = []
    scorer = ForwardPass(loaded)
    ascending, descending = scorer.keep(contexts, 10**9), scorer.keep(contexts, 10**9)
    assert ascending is not None
    assert descending is not None
    hook = body.register_forward_pre_hook(lambda _m, _a, kw: sizes.append(kw["input_ids"].shape), with_kwargs=True)
    with torch.no_grad():
        all_at_once = logits(scorer(loaded.model, contexts, completions, ascending))
        hook.remove()
        one_by_one = [
            logits(scorer(loaded.model, [contexts[row]], [completions[row]], descending))
            for row in reversed(range(len(contexts)))
        ]
        again = logits(scorer(loaded.model, contexts, completions, descending))
    read = sizes[:-1]  # the last pass scores the completions
    assert len(read) < len(contexts) / 2
    assert max(rows for rows, _ in read) > 4
    assert all(rows * width <= READ_TOKENS for rows, width in read)
    assert torch.equal(all_at_once, again)
    torch.testing.assert_close(torch.cat(one_by_one[::-1]), again, rtol=1e-4, atol=1e-4)


def test_kept_states_serve_attention_in_bfloat16_as_it_would_have_cast_them(load: Loader) -> None:
    loaded = load()
    contexts, completions = texts(30, 9, 17, seed=9), texts(3, 9, 5, seed=8)
    scorer = ForwardPass(loaded)
    kept = scorer.keep(contexts, 10**9)
    assert kept is not None
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        again = logits(scorer(loaded.model, contexts, completions))
        held = logits(scorer(loaded.model, contexts, completions, kept))
    body, _head = body_and_head(loaded.model) or pytest.fail("not separable")
    cache, _ = kept.cache(body, loaded.model.config, contexts)
    assert {t.dtype for layer in cache.layers for t in (layer.keys, layer.values)} == {torch.bfloat16}
    assert float((held - again).abs().max()) < 0.02 * float(again.abs().max())


def test_only_models_whose_layers_keep_every_token_keep_contexts(load: Loader) -> None:
    assert has_full_attention(LlamaConfig(**SIZE))
    assert not has_full_attention(Gemma2Config(**SIZE, head_dim=8, sliding_window=4))
    assert ForwardPass(load()).keep(CONTEXTS, 0) is None


def test_padding_after_a_kept_context_gets_no_position_beyond_the_window(load: Loader) -> None:
    model, _ = odd_model("gpt2, learnt positions")
    loaded = replace(load(), model=model, window=model.config.n_positions, continues_cache=None)
    contexts, completions = texts(480, 20, seed=9), texts(32, 400, seed=8)  # both within the window of 512
    scorer = ForwardPass(loaded)
    kept = scorer.keep(contexts, 10**9)
    assert kept is not None
    with torch.no_grad():
        scores = logits(scorer(model, contexts, completions, kept))
    torch.testing.assert_close(scores, full_forward(model, contexts, completions), rtol=1e-4, atol=1e-4)


def test_scores_with_longrope_do_not_depend_on_other_rows_or_padding(load: Loader) -> None:
    model = long_rope(first=64)
    loaded = adopt(model, load().tokenizer)
    assert loaded.window == 64
    contexts, completions = texts(50, 8, 30, seed=9), texts(14, 40, 3, seed=8)
    for device in (None, "cuda"):  # passes of the latter are padded
        scorer = ForwardPass(loaded, kind=device)
        kept = scorer.keep(contexts, 10**9)
        with torch.no_grad():
            whole = full_forward(model, contexts, completions)
            for states in (None, kept):
                scores = logits(scorer(model, contexts, completions, states))
                torch.testing.assert_close(scores, whole, rtol=1e-4, atol=1e-4)
