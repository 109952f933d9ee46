"""The vLLM engine against the model itself: what it samples, and from which weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ENDS, NEEDS_VLLM, VLLM
from sampled import FREE, GREEDY, frequency_pvalue, gap, own, prompts, seeds, train

from selfdistill.config import EngineSettings
from selfdistill.errors import EngineFailed, UserError
from selfdistill.model import (
    LoadedModel,
    Sampling,
    add_lora,
    engine_for,
    load_model,
    sample,
    use_engine,
    vllm_engine,
    vllm_worker,
)
from selfdistill.model.engine import close_engine
from selfdistill.model.engine_weights import hub_tensors

pytestmark = NEEDS_VLLM
Loader = Callable[..., LoadedModel]
ENGINE = EngineSettings(**VLLM)


@pytest.fixture
def load(model_folder: Callable[..., Path]) -> Loader:
    """A fresh model that an engine samples from; its heads have the fewest channels that vLLM computes on CPUs."""

    def loader(*, engine: EngineSettings = ENGINE, ends: tuple[int, ...] = ENDS, **options: Any) -> LoadedModel:
        loaded = load_model(str(model_folder(head_dim=32, ends=ends, **options)))
        use_engine(loaded, engine)
        return loaded

    return loader


# --- what it samples ---


@pytest.mark.parametrize("options", [{}, {"tied": True}, {"ends": (257,)}], ids=["untied", "tied", "one end"])
def test_greedy_tokens_are_those_of_our_loop(load: Loader, options: dict[str, Any]) -> None:
    loaded, batch = load(**options), prompts(5, 1, 40, 17, 2, 3, 64, 64)
    rollouts = sample(loaded, batch, GREEDY)
    assert rollouts == own(loaded, batch, GREEDY)
    assert all(r.logps == [0.0] * len(r.ids) for r in rollouts)
    assert any(r.truncated for r in rollouts) or len({len(r.ids) for r in rollouts}) > 2


def test_a_sample_stops_at_every_end_token_and_keeps_it(load: Loader) -> None:
    loaded, batch = load(), prompts(*[6] * 40)
    rollouts = sample(loaded, batch, FREE, seeds(40))
    ends = set(loaded.end_token_ids)
    assert all((r.ids[-1] in ends) != r.truncated for r in rollouts)
    assert all(not ends & set(r.ids[:-1]) for r in rollouts)
    assert all(len(r.ids) == 12 for r in rollouts if r.truncated)
    assert len({r.ids[-1] for r in rollouts if not r.truncated}) > 3
    assert 0 < sum(r.truncated for r in rollouts) < 40


@pytest.mark.parametrize(
    "policy",
    [
        Sampling(1, 1.0),
        Sampling(1, 0.7),
        Sampling(1, 1.0, top_p=0.8),
        Sampling(1, 0.7, top_p=0.9),
        Sampling(1, 1.0, top_k=12),
    ],
    ids=str,
)
def test_tokens_are_as_frequent_as_the_policy_says(load: Loader, policy: Sampling) -> None:
    assert frequency_pvalue(load(ends=(257,)), policy, 4000) > 0.001


@pytest.mark.parametrize("policy", [FREE, Sampling(12, 0.7)], ids=["1", "0.7"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_log_probabilities_are_those_of_the_policy(load: Loader, policy: Sampling, tied: bool) -> None:
    assert gap(load(tied=tied), policy) < 1e-3


def test_with_top_p_they_are_renormalised_over_the_kept_tokens(load: Loader) -> None:
    loaded, batch, policy = load(), prompts(9, 30), Sampling(1, 1.0, top_p=0.5)
    rollouts = sample(loaded, batch, policy, seeds(2))
    with torch.no_grad():
        for prompt, rollout in zip(batch, rollouts, strict=True):
            probs_V = loaded.model(input_ids=torch.tensor([prompt])).logits[0, -1].double().softmax(-1)
            sorted_V, order_V = probs_V.sort(descending=True)
            kept = order_V[(sorted_V.cumsum(0) - sorted_V) < 0.5]
            expected = (probs_V[rollout.ids[0]] / probs_V[kept].sum()).log()
            assert abs(float(expected) - rollout.logps[0]) < 1e-3


def test_a_sample_depends_on_its_seed_and_prompt_alone(load: Loader) -> None:
    loaded, batch, numbers = load(), prompts(5, 30, 12, 5), seeds(4)
    together = sample(loaded, batch, FREE, numbers)
    assert [sample(loaded, [p], FREE, [n])[0].ids for p, n in zip(batch, numbers, strict=True)] == [
        r.ids for r in together
    ]
    assert [r.ids for r in sample(loaded, batch[::-1], FREE, numbers[::-1])] == [r.ids for r in together[::-1]]
    assert [r.ids for r in sample(loaded, batch, FREE, seeds(4, step=1))] != [r.ids for r in together]


def test_under_autocast_an_engine_computes_as_with_weights_of_its_type(load: Loader) -> None:
    loaded, batch = load(), prompts(5, 40, 480)
    assert gap(loaded) < 1e-3
    with torch.autocast("cpu", torch.bfloat16):
        assert "bfloat16" in engine_for(loaded).describe()
        under_autocast = sample(loaded, batch, FREE, seeds(3))
        assert 1e-3 < gap(loaded) < 0.5  # rounded, but the same model
    close_engine()
    loaded.model.bfloat16()
    assert sample(loaded, batch, FREE, seeds(3)) == under_autocast
    close_engine()


def test_without_a_chat_template_a_sample_ends_where_the_next_turn_begins(load: Loader) -> None:
    loaded = load(ends=(257,), template=None, merges=(("\u010a", "\u010a"),))  # the marker has no token twice
    words = loaded.tokenizer("User:", add_special_tokens=False)["input_ids"]
    marker = [loaded.tokenizer.convert_tokens_to_ids("\u010a\u010a"), *words]
    with torch.no_grad():  # a head that writes the marker in a circle
        loaded.model.model.embed_tokens.weight.zero_()
        for position, token in enumerate(marker):
            loaded.model.model.embed_tokens.weight[token, position] = 100.0
        for layer in loaded.model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        loaded.model.lm_head.weight.zero_()
        for position, token in enumerate(marker):
            loaded.model.lm_head.weight[token, position - 1 if position else len(marker) - 1] = 10.0
    rollouts = sample(loaded, [[marker[-1]]], Sampling(30, temperature=0))
    assert rollouts == own(loaded, [[marker[-1]]], Sampling(30, temperature=0))
    assert rollouts[0].ids == marker
    assert not rollouts[0].truncated


# --- from which weights ---


@pytest.mark.parametrize("lora", [0, 4], ids=["full", "lora"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_after_optimizer_steps_they_are_the_students(
    load: Loader, monkeypatch: pytest.MonkeyPatch, lora: int, tied: bool
) -> None:
    loaded = load(tied=tied)
    if lora:
        add_lora(loaded, lora, None, seed=0)
    assert gap(loaded) < 1e-3
    for number, steps in enumerate((1, 1, 8)):  # after 1, 2 and 10
        train(loaded, steps)
        assert gap(loaded, step=number) < 1e-3
    with monkeypatch.context() as patch:  # without the synchronisation
        patch.setattr(vllm_engine, "weights_version", lambda model: ())
        train(loaded, 1)
        sample(loaded, prompts(3), GREEDY)  # the patched version is taken over once
        train(loaded, 3)
        assert gap(loaded) > 1e-2
    assert gap(loaded) < 1e-3


def test_an_adapter_that_is_off_is_off_in_the_engine(load: Loader) -> None:
    loaded = load()
    add_lora(loaded, 4, None, seed=0)
    train(loaded, 3)
    assert gap(loaded) < 1e-3
    with loaded.model.disable_adapter():
        assert gap(loaded) < 1e-3
    assert gap(loaded) < 1e-3


def test_the_packed_head_of_a_tied_model_goes_along(load: Loader, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = load(tied=True)
    assert gap(loaded) < 1e-3
    with monkeypatch.context() as patch:  # as vLLM's own reload leaves it on CPUs
        patch.setattr(vllm_worker, "pack_embeddings", lambda model: None)
        train(loaded, 3)
        assert gap(loaded) > 1e-2
    train(loaded, 1)
    assert gap(loaded) < 1e-3


def test_two_models_in_turn_are_told_apart(load: Loader) -> None:
    student, base = load(), load()
    train(student, 3)
    assert gap(student) < 1e-3
    assert gap(base) < 1e-3
    assert gap(student) < 1e-3


def test_equal_weights_are_not_sent_again(load: Loader) -> None:
    loaded, sent = load(), []
    sample(loaded, prompts(3), GREEDY)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vllm_engine, "hub_tensors", lambda loaded: sent.append(loaded) or iter(()))
        sample(loaded, prompts(4), GREEDY)
        sample(load(), prompts(4), GREEDY)  # the same files
    assert sent == []


def test_the_prefix_cache_is_reset_with_the_weights(load: Loader, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = load()
    close_engine()
    assert gap(loaded, lengths=(300,)) < 1e-3  # longer than a block of the cache
    train(loaded, 3)
    assert gap(loaded, lengths=(300,)) < 1e-3
    from vllm import LLM

    with monkeypatch.context() as patch:
        patch.setattr(LLM, "reset_prefix_cache", lambda self: True)
        train(loaded, 3)
        assert gap(loaded, lengths=(300,)) > 1e-2
    close_engine()


def test_other_adapters_than_lora_are_refused_in_a_line(load: Loader) -> None:
    from peft import LoraConfig, get_peft_model

    loaded = load()
    loaded.model = get_peft_model(loaded.model, LoraConfig(r=2, target_modules=["q_proj"], use_dora=True))
    with pytest.raises(UserError, match=r"merge it first \(selfdistill export --merge\), or leave engine out"):
        sample(loaded, prompts(3), GREEDY)
    close_engine()


# --- when it fails ---


def test_a_prompt_and_completion_beyond_the_window_are_an_error(load: Loader) -> None:
    loaded = load()
    (rollout,) = sample(loaded, prompts(500), Sampling(12, temperature=0))
    assert rollout == own(loaded, prompts(500), Sampling(12, temperature=0))[0]
    with pytest.raises(UserError, match="has up to 513 tokens, and the engine allows 512"):
        sample(loaded, prompts(3, 501), Sampling(12, temperature=0))
    assert sample(loaded, prompts(3), GREEDY) == own(loaded, prompts(3), GREEDY)  # and it goes on


def test_a_cache_too_small_for_the_window_shortens_the_length(load: Loader) -> None:
    loaded = load(room=4096, engine=EngineSettings(engine="vllm", engine_memory_gib=0.001))
    length = engine_for(loaded).length
    assert 100 < length < 4096
    with pytest.raises(UserError, match=f"the engine allows {length}: .* or raise engine_memory_gib"):
        sample(loaded, prompts(length), GREEDY)


@pytest.mark.parametrize("temperature", [0.001, 2.5])
def test_a_temperature_that_it_would_change_is_refused(load: Loader, temperature: float) -> None:
    with pytest.raises(UserError, match=r"samples at temperatures from 0\.01 to 2, found"):
        sample(load(), prompts(3), Sampling(4, temperature), seeds(1))


def test_an_error_inside_it_is_one_line_and_it_is_not_used_again(load: Loader, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = load()
    engine = engine_for(loaded)
    from vllm.v1.engine.llm_engine import LLMEngine

    def broken(self: Any) -> Any:
        raise RuntimeError("no memory left\nTraceback ...")

    with monkeypatch.context() as patch:
        patch.setattr(LLMEngine, "step", broken)
        with pytest.raises(EngineFailed) as error:
            sample(loaded, prompts(3), GREEDY)
    assert "\n" not in str(error.value)
    assert str(error.value).startswith("engine vllm failed: RuntimeError: no memory left; if it lacks memory, change ")
    with pytest.raises(EngineFailed, match="it failed earlier"):
        engine.sample(loaded, prompts(3), GREEDY, None)
    assert sample(loaded, prompts(3), GREEDY) == own(loaded, prompts(3), GREEDY)  # by another
    assert engine_for(loaded) is not engine


@pytest.mark.parametrize("stop", [KeyboardInterrupt, SystemExit])
def test_an_engine_that_was_interrupted_is_not_used_again(
    load: Loader, monkeypatch: pytest.MonkeyPatch, stop: type[BaseException]
) -> None:
    loaded = load()
    engine = engine_for(loaded)
    from vllm.v1.engine.llm_engine import LLMEngine

    def interrupted(self: Any) -> Any:
        raise stop

    with monkeypatch.context() as patch:
        patch.setattr(LLMEngine, "step", interrupted)
        with pytest.raises(stop):
            sample(loaded, prompts(3, 4), GREEDY)
    assert sample(loaded, prompts(3), GREEDY) == own(loaded, prompts(3), GREEDY)
    assert engine_for(loaded) is not engine


def test_an_engine_that_completes_nothing_is_late(load: Loader, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = load(engine=EngineSettings(engine="vllm", engine_memory_gib=0.02, engine_timeout_s=5))
    engine_for(loaded)
    from vllm.v1.engine.llm_engine import LLMEngine

    with monkeypatch.context() as patch:
        patch.setattr(LLMEngine, "step", lambda self: [])
        with pytest.raises(
            EngineFailed, match=r"no sample was completed .* 2 of 2 are pending; raise engine_timeout_s"
        ):
            sample(loaded, prompts(3, 4), GREEDY)
    close_engine()


def test_a_model_computed_otherwise_is_found_at_the_start(load: Loader, monkeypatch: pytest.MonkeyPatch) -> None:
    close_engine()
    loaded = load()
    monkeypatch.setattr(vllm_engine, "hub_tensors", lambda loaded: ((n, 2 * p) for n, p in hub_tensors(loaded)))
    with pytest.raises(EngineFailed, match=r"nats per token away from the model's, so vllm .* leave engine out"):
        sample(loaded, prompts(3), GREEDY)
    monkeypatch.undo()
    assert sample(loaded, prompts(3), GREEDY) == own(loaded, prompts(3), GREEDY)


def test_a_setting_of_none_goes_back_to_our_loop(load: Loader) -> None:
    loaded = load()
    use_engine(loaded, EngineSettings())
    assert loaded.engine is None
    assert sample(loaded, prompts(3), FREE, seeds(1)) == own(loaded, prompts(3), FREE, seeds(1))
