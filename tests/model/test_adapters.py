"""Adapters: one that fits its base computes what PEFT computes, merged or not; another is refused in one line."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import (
    AdaptionPromptConfig,
    IA3Config,
    LoHaConfig,
    LoraConfig,
    OFTConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    VBLoRAConfig,
    VeraConfig,
    get_peft_model,
)
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
)

from selfdistill.config.commands import ExportConfig
from selfdistill.errors import UserError
from selfdistill.model.loading import load_model
from selfdistill.training.export import export

CAUSAL: dict[str, Any] = {"task_type": "CAUSAL_LM"}
LORA: dict[str, Any] = CAUSAL | {"r": 2}
BOTH = ["embed_tokens", "lm_head"]
MERGEABLE: dict[str, Callable[[], Any]] = {
    "rank pattern, rsLoRA": lambda: LoraConfig(
        **LORA, use_rslora=True, target_modules="all-linear", rank_pattern={"q_proj": 3}, alpha_pattern={"q_proj": 7}
    ),
    "DoRA": lambda: LoraConfig(**LORA, use_dora=True, target_modules="all-linear"),
    "modules_to_save": lambda: LoraConfig(**LORA, target_modules=["q_proj"], modules_to_save=BOTH),
    "trainable tokens": lambda: LoraConfig(**LORA, target_modules=["q_proj"], trainable_token_indices=[256, 257]),
    "LoRA of the embedding": lambda: LoraConfig(**LORA, target_modules=["q_proj", "embed_tokens"]),
    "IA3": lambda: IA3Config(**CAUSAL),
    "LoHa": lambda: LoHaConfig(**LORA, target_modules=["q_proj"]),
    "OFT": lambda: OFTConfig(**CAUSAL, r=0, oft_block_size=4, target_modules=["q_proj"]),
    "VB-LoRA": lambda: VBLoRAConfig(
        **LORA, num_vectors=4, vector_length=8, topk=2, target_modules=["q_proj"], save_only_topk_weights=False
    ),
    "PiSSA": lambda: LoraConfig(**LORA, target_modules="all-linear", init_lora_weights="pissa"),
    "OLoRA": lambda: LoraConfig(**LORA, target_modules="all-linear", init_lora_weights="olora"),
    "VeRA": lambda: VeraConfig(**LORA, target_modules=["q_proj"]),
}
OUTSIDE: dict[str, Callable[[], Any]] = {
    "PROMPT_TUNING": lambda: PromptTuningConfig(**CAUSAL, num_virtual_tokens=4),
    "PREFIX_TUNING": lambda: PrefixTuningConfig(**CAUSAL, num_virtual_tokens=4),
    "P_TUNING": lambda: PromptEncoderConfig(**CAUSAL, num_virtual_tokens=4, encoder_hidden_size=8),
    "ADAPTION_PROMPT": lambda: AdaptionPromptConfig(**CAUSAL, adapter_len=4, adapter_layers=1),
    "aLoRA": lambda: LoraConfig(**LORA, target_modules=["q_proj"], alora_invocation_tokens=[256]),
}
IDS = torch.arange(40, 60)[None]

pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT's, while the adapters are made


@torch.no_grad()
def logits(model: Any, ids: Tensor = IDS) -> Tensor:
    return model.eval()(input_ids=ids).logits.float()


@pytest.fixture
def adapter(model_folder: Callable[..., Path], tmp_path: Path) -> Callable[..., Path]:
    """An adapter of random weights beside its base, with a tokenizer; ``new`` tokens are added before."""

    def make(config: Any, *, new: int = 0, tokenizer: bool = True, **options: Any) -> Path:
        base, folder = tmp_path / "base", tmp_path / "adapter"
        for old in (base, folder):
            shutil.rmtree(old, ignore_errors=True)
        shutil.copytree(model_folder(**options), base)
        model, names = AutoModelForCausalLM.from_pretrained(base), AutoTokenizer.from_pretrained(base)
        if new:
            names.add_tokens([f"<new{number}>" for number in range(new)])
            model.resize_token_embeddings(len(names), mean_resizing=False)
        generator = torch.Generator().manual_seed(1)
        adapted = get_peft_model(model, config)
        with torch.no_grad():
            for parameter in adapted.parameters():
                if parameter.requires_grad:
                    parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
        adapted.save_pretrained(folder)
        if tokenizer:
            names.save_pretrained(folder)
        torch.save(logits(adapted, torch.arange(len(names) - 20, len(names))[None]), tmp_path / "logits.pt")
        return folder

    return make


def refused(adapter: Path, *messages: str, **options: Any) -> None:
    with pytest.raises(UserError) as caught:
        load_model(str(adapter), **options)
    text = str(caught.value)
    assert "\n" not in text
    assert text.startswith(f"model {str(adapter)!r}: ")
    assert all(message in text for message in messages), text


def change_weights(adapter: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    file = adapter / "adapter_model.safetensors"
    weights = load_file(file)
    change(weights)
    save_file(weights, file, {"format": "pt"})


# --- what can be merged, is merged rightly ---


@pytest.mark.parametrize("kind", MERGEABLE)
def test_adapters_compute_what_peft_computes_and_merge_to_the_same(
    adapter: Callable[..., Path], tmp_path: Path, kind: str
) -> None:
    folder = adapter(MERGEABLE[kind]())
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    plain = logits(base)
    expected = logits(PeftModel.from_pretrained(base, folder))
    assert float((expected - plain).abs().max()) > 0.1
    assert torch.equal(logits(load_model(str(folder)).model), expected)
    loaded = load_model(str(folder), merge_adapter=True)
    torch.testing.assert_close(logits(loaded.model), expected, atol=1e-4, rtol=0)
    assert all(parameter.requires_grad for parameter in loaded.model.parameters())
    out = export(ExportConfig(run=str(folder), output_dir=str(tmp_path / "out"), merge=True))
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(out)), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", OUTSIDE)
@pytest.mark.parametrize("merge", [False, True])
def test_adapters_outside_of_the_layers_are_refused(adapter: Callable[..., Path], kind: str, merge: bool) -> None:
    # Sampled with a cache of keys and values they would act again at every token, or never.
    folder = adapter(OUTSIDE[kind]())
    message = (
        f"an adapter of kind {kind} cannot be merged into its base, so it is not supported; use one that changes the "
        "base's layers, such as LoRA"
    )
    refused(folder, message, merge_adapter=merge)


@pytest.mark.parametrize("layer", BOTH)
def test_lora_of_tied_embeddings_is_measured_but_not_merged(adapter: Callable[..., Path], layer: str) -> None:
    folder = adapter(LoraConfig(**LORA, target_modules=["q_proj", layer]), tied=True)
    load_model(str(folder))
    message = "its adapter cannot be merged into its base: the merged model computes something else; it changes "
    refused(folder, message, merge_adapter=True)


def test_a_bias_that_the_base_lacks_cannot_be_merged(adapter: Callable[..., Path]) -> None:
    folder = adapter(LoraConfig(**LORA, target_modules=["q_proj"], lora_bias=True))
    refused(folder, "its adapter cannot be merged into its base: Impossible to merge", merge_adapter=True)


def test_an_adapter_is_merged_in_float32_into_half_precision(adapter: Callable[..., Path], tmp_path: Path) -> None:
    folder = adapter(LoraConfig(**LORA, target_modules=["q_proj"]))
    half = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.bfloat16)
    half.save_pretrained(tmp_path / "base")
    name = "model.layers.0.self_attn.q_proj.weight"
    factors = load_file(folder / "adapter_model.safetensors")
    a, b = (factors[f"base_model.model.{name.replace('weight', f'lora_{part}.weight')}"] for part in "AB")
    expected = (half.state_dict()[name].float() + 8 / 2 * b @ a).bfloat16()
    found = load_model(str(folder), dtype="auto", merge_adapter=True).model.state_dict()[name]
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, expected)


# --- a base whose embedding was resized ---


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["q_proj"], "modules_to_save": BOTH},
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
        {"target_modules": ["q_proj"]},
        {"target_modules": ["q_proj"], "trainable_token_indices": [300, 301]},
    ],
    ids=["both saved", "embedding saved", "neither trained", "tokens trained"],
)
def test_a_base_is_resized_to_the_embedding_that_its_adapter_holds(
    adapter: Callable[..., Path], tmp_path: Path, options: dict[str, Any], tied: bool
) -> None:
    folder = adapter(LoraConfig(**LORA, **options), new=50, tied=tied)
    expected, ids = torch.load(tmp_path / "logits.pt"), torch.arange(290, 310)[None]
    assert torch.equal(logits(load_model(str(folder)).model, ids), expected)
    out = export(ExportConfig(run=str(folder), output_dir=str(tmp_path / "out"), merge=True))
    whole = AutoModelForCausalLM.from_pretrained(out)
    assert whole.config.vocab_size == whole.get_input_embeddings().weight.shape[0] == 310
    torch.testing.assert_close(logits(whole, ids), expected, atol=1e-4, rtol=0)


def test_sizes_that_differ_are_named(adapter: Callable[..., Path]) -> None:
    folder = adapter(LoraConfig(**LORA, target_modules=["q_proj", "embed_tokens"]), new=50)  # no copy of the head
    refused(folder, "model.embed_tokens.base_layer.weight is 310 x 32 in the adapter and 300 x 32 in the base")
    folder = adapter(LoraConfig(**LORA, target_modules=["q_proj"]))
    change_weights(
        folder, lambda weights: weights.update({name: torch.zeros(2, 16) for name in weights if "_A" in name})
    )
    refused(folder, "model.layers.0.self_attn.q_proj.lora_A.weight is 2 x 16 in the adapter and 2 x 32 in the base")


def test_tokens_added_without_a_row_are_named(adapter: Callable[..., Path]) -> None:
    folder = adapter(LoraConfig(**LORA, target_modules=["q_proj"]))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens([f"<new{number}>" for number in range(50)])
    tokenizer.save_pretrained(folder)
    refused(folder, "its embedding has 300 rows, and its tokenizer has 10 tokens beyond them: '<new40>'")


# --- adapters and bases that do not belong together ---


def test_an_adapter_of_another_architecture(adapter: Callable[..., Path], tmp_path: Path) -> None:
    folder = adapter(LoraConfig(**LORA, target_modules=["q_proj"]))
    shutil.rmtree(tmp_path / "base")
    GPT2LMHeadModel(GPT2Config(vocab_size=300, n_layer=2, n_head=4, n_embd=32)).save_pretrained(tmp_path / "base")
    refused(folder, f"the adapter does not fit its base {str(tmp_path / 'base')!r}: Target modules", "not found")


def test_tensors_that_land_nowhere_or_are_missing(adapter: Callable[..., Path]) -> None:
    folder = adapter(LoraConfig(**LORA, target_modules=["q_proj"]))
    name = "base_model.model.model.layers.{}.self_attn.q_proj.lora_A.weight"
    change_weights(folder, lambda weights: weights.update({name.format(7): torch.zeros(2, 32)}))
    refused(folder, "the base has no place for model.layers.7.self_attn.q_proj.lora_A")
    folder = adapter(LoraConfig(**LORA, target_modules=["q_proj"]))
    change_weights(folder, lambda weights: weights.pop(name.format(1)))
    refused(folder, "adapter_model.safetensors has no model.layers.1.self_attn.q_proj.lora_A")
    folder = adapter(LoraConfig(**LORA, target_modules=["q_proj"], modules_to_save=["lm_head"]))
    change_weights(folder, lambda weights: weights.pop("base_model.model.lm_head.weight"))
    refused(folder, "adapter_model.safetensors has no", "lm_head.weight")


def test_the_head_of_another_task(adapter: Callable[..., Path]) -> None:
    folder = adapter(LoraConfig(**LORA, target_modules=["q_proj"]))
    change_weights(folder, lambda weights: weights.update({"base_model.model.score.weight": torch.zeros(2, 32)}))
    refused(folder, "the base has no place for score")


def test_settings_that_peft_does_not_know(adapter: Callable[..., Path]) -> None:
    folder = adapter(LoraConfig(**LORA, target_modules=["q_proj"]))
    settings = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(settings | {"use_tomorrows_lora": True}))
    (note,) = load_model(str(folder)).notes
    assert "Unexpected keyword arguments ['use_tomorrows_lora']" in note
    (folder / "adapter_config.json").write_text(json.dumps(settings | {"peft_type": "TOMORROW"}))
    refused(folder, "adapter_config.json cannot be read (KeyError: 'TOMORROW')")


@pytest.mark.parametrize("way", ["pissa_niter_4", "corda", "lora_ga", "loftq"])
def test_an_adapter_of_a_base_that_peft_does_not_change_again_is_refused(
    adapter: Callable[..., Path], way: str
) -> None:
    folder = adapter(LoraConfig(**LORA, target_modules=["q_proj"]))
    settings = json.loads((folder / "adapter_config.json").read_text())
    quantised = {"loftq_config": {"loftq_bits": 4, "loftq_iter": 1}} if way == "loftq" else {}
    (folder / "adapter_config.json").write_text(json.dumps(settings | {"init_lora_weights": way} | quantised))
    refused(folder, f"has init_lora_weights {way!r}, which changes the base's weights", "set init_lora_weights to true")


@pytest.mark.parametrize("way", ["gaussian", "orthogonal", "eva", "mica"])
def test_an_adapter_whose_initialisation_keeps_the_base_is_loaded(
    adapter: Callable[..., Path], tmp_path: Path, way: str
) -> None:
    folder = adapter(LoraConfig(**LORA, target_modules=["q_proj"], init_lora_weights=way))
    expected = logits(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), folder))
    assert torch.equal(logits(load_model(str(folder)).model), expected)


def test_a_quantised_base_is_refused_and_its_original_can_be_named(
    adapter: Callable[..., Path], tmp_path: Path
) -> None:
    folder = adapter(LoraConfig(**LORA, target_modules=["q_proj"]))
    base = tmp_path / "base"
    shutil.copytree(base, tmp_path / "original")
    settings = json.loads((base / "config.json").read_text())
    settings["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (base / "config.json").write_text(json.dumps(settings))
    refused(folder, "an adapter whose base cannot be loaded: ", "quantised (bitsandbytes)", "adapter_base")
    load_model(str(folder), adapter_base=str(tmp_path / "original"))


# --- where tokenizer and base are found ---


def test_an_adapter_without_a_tokenizer_has_its_bases(adapter: Callable[..., Path], tmp_path: Path) -> None:
    folder = adapter(LoraConfig(**LORA, target_modules=["q_proj"]), tokenizer=False)
    loaded = load_model(str(folder))
    assert loaded.tokenizer.get_vocab() == AutoTokenizer.from_pretrained(tmp_path / "base").get_vocab()
    assert loaded.notes == []
    out = export(ExportConfig(run=str(folder), output_dir=str(tmp_path / "out"), merge=True))
    assert AutoTokenizer.from_pretrained(out).chat_template == loaded.tokenizer.chat_template
    (folder / "chat_template.jinja").write_text("own{{ messages[0].content }}")
    assert load_model(str(folder)).tokenizer.chat_template == "own{{ messages[0].content }}"
    (tmp_path / "base" / "tokenizer.json").unlink()
    refused(folder, "no usable tokenizer")


def test_a_base_that_was_moved_is_named(adapter: Callable[..., Path], tmp_path: Path) -> None:
    folder = adapter(LoraConfig(**LORA, target_modules=["q_proj"]))
    expected = logits(load_model(str(folder)).model)
    base, moved = tmp_path / "base", str(tmp_path / "moved")
    shutil.move(base, moved)
    refused(folder, f"model {str(base)!r}: no such folder; if it was moved, give its new location as adapter_base")
    assert torch.equal(logits(load_model(str(folder), adapter_base=moved).model), expected)
    out = export(ExportConfig(run=str(folder), output_dir=str(tmp_path / "out"), merge=True, adapter_base=moved))
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(out)), expected, atol=1e-4, rtol=0)
    (note,) = load_model(moved, adapter_base=moved).notes
    assert note == f"adapter_base is not used: {moved} is not an adapter"


def test_a_named_base_must_fit(adapter: Callable[..., Path], tmp_path: Path) -> None:
    folder = adapter(LoraConfig(**LORA, target_modules=["q_proj"]))
    other = GPT2LMHeadModel(GPT2Config(vocab_size=300, n_layer=2, n_head=4, n_embd=32))
    other.save_pretrained(tmp_path / "other")
    refused(folder, "the adapter does not fit its base", "other", adapter_base=str(tmp_path / "other"))


# --- every tensor keeps its base's data type ---


def kept_in_float32(model: Any) -> set[str]:
    tensors = (*model.named_parameters(), *model.named_buffers())
    return {name for name, tensor in tensors if tensor.dtype == torch.float32}


def deepseek() -> DeepseekV3ForCausalLM:
    """A model that keeps the biases of its router in float32 beside the frequencies of positions."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 300, "hidden_size": 16, "intermediate_size": 16, "moe_intermediate_size": 8}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "kv_lora_rank": 4, "q_lora_rank": 4}
    parts = {"qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 4}
    experts = {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1}
    layers = {"num_hidden_layers": 2, "first_k_dense_replace": 1}
    return DeepseekV3ForCausalLM(DeepseekV3Config(**sizes, **heads, **parts, **experts, **layers))


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["Llama", "DeepSeek-V3", "copies", "trained tokens"])
def test_merging_keeps_every_data_type_and_late_positions(
    model_folder: Callable[..., Path], tmp_path: Path, kind: str, half: torch.dtype
) -> None:
    """The adapter is zero, so the merged model is its base, at positions where rounded frequencies would show."""
    base = tmp_path / "base"
    if kind == "DeepSeek-V3":
        deepseek().to(half).save_pretrained(base)
    else:
        AutoModelForCausalLM.from_pretrained(model_folder(), dtype=half).save_pretrained(base)
    AutoTokenizer.from_pretrained(model_folder()).save_pretrained(base)
    options: dict[str, Any] = {
        "copies": {"modules_to_save": BOTH},
        "trained tokens": {"trainable_token_indices": [256, 257]},
    }.get(kind, {})
    targets = ["q_b_proj"] if kind == "DeepSeek-V3" else ["q_proj"]
    expected = AutoModelForCausalLM.from_pretrained(base, dtype=half)
    config = LoraConfig(**LORA, target_modules=targets, **options)
    get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=half), config).save_pretrained(tmp_path / "adapter")
    merged = load_model(str(tmp_path / "adapter"), dtype="auto", merge_adapter=True).model
    assert kept_in_float32(merged) == kept_in_float32(expected)
    assert any(name.endswith("inv_freq") for name in kept_in_float32(merged))
    assert any(name.endswith("e_score_correction_bias") for name in kept_in_float32(merged)) == (kind == "DeepSeek-V3")
    assert all(tensor.dtype in (half, torch.float32) for tensor in merged.parameters())
    ids = (torch.arange(500) % 250)[None]
    assert torch.equal(logits(merged, ids)[:, -20:], logits(expected, ids)[:, -20:])


def test_memory_that_does_not_suffice_for_merging_is_one_line(
    adapter: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = adapter(MERGEABLE["DoRA"]())
    message = (
        "its adapter cannot be merged into its base: out of memory: merging needs all of its weights in float32, in "
        "the CPU's memory; free some, then load or resume it again"
    )
    for error in (
        RuntimeError("[enforce fail at alloc_cpu.cpp:117] . DefaultCPUAllocator: can't allocate memory"),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        MemoryError(),
    ):

        def fail(*_: Any, error: Exception = error, **__: Any) -> None:
            raise error

        for place in ("float", "merge_and_unload"):
            with monkeypatch.context() as patch:
                patch.setattr(PeftModel, place, fail, raising=False)
                refused(folder, message, merge_adapter=True)


def test_an_adapter_in_place_of_the_base_is_refused(adapter: Callable[..., Path], tmp_path: Path) -> None:
    folder = adapter(LoraConfig(**LORA, target_modules=["q_proj"]))
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(folder / name, tmp_path / "base")
    refused(folder, f"model {str(tmp_path / 'base')!r}: an adapter, but a base model is needed; merge it first")
