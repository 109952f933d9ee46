"""Weights: what a checkpoint's files hold is what the model computes with, or one line says why not."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import VOCABULARY
from odd_models import SIZE
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken
from torch import Tensor
from transformers import (
    AutoTokenizer,
    FalconConfig,
    FalconForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GptOssConfig,
    GptOssForCausalLM,
)

from selfdistill.cli import main
from selfdistill.errors import UserError
from selfdistill.model.loading import adopt, load_model

Change = Callable[[dict[str, Tensor]], None]
OWN = "model.layers.0.self_attn.q_proj"


@pytest.fixture
def changed(model_folder: Callable[..., Path], tmp_path: Path) -> Callable[..., str]:
    """A copy of the tiny model whose weights or config.json say something else."""

    def make(change: Change = lambda _: None, **config: Any) -> str:
        folder = tmp_path / "model"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(model_folder(), folder)
        weights = load_file(folder / "model.safetensors")
        change(weights)
        save_file(weights, folder / "model.safetensors", {"format": "pt"})
        values = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(values | config))
        return str(folder)

    return make


def adding(*names: str) -> Change:
    return lambda weights: weights.update({name: torch.ones(32) for name in names})


def refused(model: str, *messages: str, **options: Any) -> None:
    with pytest.raises(UserError) as caught:
        load_model(model, **options)
    text = str(caught.value)
    assert "\n" not in text
    assert text.startswith(f"model {model!r}: ")
    assert all(message in text for message in messages), text


# --- tensors that the model has no place for ---


@pytest.mark.parametrize(
    "name",
    [
        f"{OWN}.weight_scale",  # ModelOpt and compressed-tensors
        f"{OWN}.input_scale",
        f"{OWN}.weight_scale_inv",  # DeepSeek
        f"{OWN}.weight_scale_2",  # NVFP4
        f"{OWN}.qzeros",  # GPTQ and AWQ
        f"{OWN}.scales",
        f"{OWN}.weight.absmax",  # bitsandbytes
        f"{OWN}.weight.quant_state.bitsandbytes__nf4",
        f"{OWN}.SCB",
        "model.embed_tokens.weight.absmax",
        "lm_head.weight_scale",
        "lm_head.weight.quant_map",
        "layers.0.mlp.up_proj.weight_scale",  # saved without the head
        "model.layers.1.self_attn.k_scale",  # of a cache in eight bits
        "lm_head.biases_scales",
    ],
)
def test_scales_of_a_quantised_checkpoint_are_refused(changed: Callable[..., str], name: str) -> None:
    refused(
        changed(adding(name, "score.weight")), "scales of quantised weights", f": {name};", "use the original model"
    )


@pytest.mark.parametrize(
    "name",
    [
        f"{OWN}.bias",
        "model.layers.1.self_attn.q_norm.weight",
        "model.layers.1.mlp.experts.0.up_proj.weight",
        "model.layers.2.mlp.up_proj.weight",  # config.json has two layers
        "model.norm.bias",
        "lm_head.bias",
        "layers.0.mlp.up_proj.bias",  # saved without the head, whose names have no prefix
    ],
)
def test_weights_of_a_part_that_the_model_has_are_refused(changed: Callable[..., str], name: str) -> None:
    refused(changed(adding(name)), "LlamaForCausalLM, as config.json describes it, has no place for", name)


def test_parts_that_a_language_model_can_do_without_are_noted(changed: Callable[..., str]) -> None:
    unused = ("vision_tower.layers.0.up.weight", "vision_tower.layers.0.up.bias", "vision_tower.logit_scale")
    model = changed(adding(*unused, "mtp.0.fc.weight", "v_head.summary.weight", "score.weight"))
    (note,) = load_model(model).notes
    assert note == ("its files hold unused parts (number of tensors): mtp.0 (1), score (1), v_head (1) and 1 more")
    further = changed(adding("model.layers.2.mlp.up_proj.weight"), num_nextn_predict_layers=1)
    (note,) = load_model(further).notes
    assert note == "its files hold unused parts (number of tensors): layers.2 (1)"


@pytest.mark.parametrize(
    "name",
    [
        "vision_tower.blocks.0.layer_scale",
        "vision_tower.blocks.0.attn.weight_scale",
        "audio.scales",
        "v_head.weight_scale",
        "mtp.0.fc.weight_scale_inv",
    ],
)
def test_scales_of_parts_that_are_not_used_are_noted(changed: Callable[..., str], name: str) -> None:
    (note,) = load_model(changed(adding(name))).notes
    assert note.startswith("its files hold unused parts (number of tensors): ")


@pytest.mark.parametrize(
    "name", ["model.layers.0.self_attn.rotary_emb.inv_freq", "model.layers.0.self_attn.masked_bias", "position_ids"]
)
def test_buffers_of_old_checkpoints_are_no_news(changed: Callable[..., str], name: str) -> None:
    assert load_model(changed(adding(name))).notes == []


def test_causal_masks_that_old_gpt2_files_hold_are_no_news(model_folder: Callable[..., Path], tmp_path: Path) -> None:
    folder = tmp_path / "gpt2"
    GPT2LMHeadModel(GPT2Config(vocab_size=300, n_layer=2, n_head=4, n_embd=32, eos_token_id=257)).save_pretrained(
        folder
    )
    AutoTokenizer.from_pretrained(model_folder()).save_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    masks = {f"h.{layer}.attn.bias": torch.ones(1, 1, 8, 8) for layer in (0, 1)}
    bare = {name.removeprefix("transformer."): weight for name, weight in weights.items()}
    save_file(bare | masks, folder / "model.safetensors", {"format": "pt"})
    assert load_model(str(folder)).notes == []


def test_a_head_in_the_files_of_a_model_that_ties_it_is_told(model_folder: Callable[..., Path], tmp_path: Path) -> None:
    folder = tmp_path / "tied"
    shutil.copytree(model_folder(tied=True), folder)
    weights = load_file(folder / "model.safetensors")
    same = {"lm_head.weight": weights["model.embed_tokens.weight"].clone()}
    save_file(weights | same, folder / "model.safetensors", {"format": "pt"})
    assert load_model(str(folder)).notes == []
    save_file(weights | {"lm_head.weight": torch.ones(VOCABULARY, 32)}, folder / "model.safetensors", {"format": "pt"})
    (note,) = load_model(str(folder)).notes
    assert "will NOT tie" in note
    assert "\n" not in note


def test_a_model_of_another_family_loads_without_a_note(model_folder: Callable[..., Path], tmp_path: Path) -> None:
    config = FalconConfig(vocab_size=300, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, eos_token_id=257)
    FalconForCausalLM(config).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(model_folder()).save_pretrained(tmp_path)
    assert load_model(str(tmp_path)).notes == []


# --- quantisation ---

QUANTISED: dict[str, dict[str, Any]] = {
    "modelopt": {"quantization_config": {"quant_method": "modelopt", "quant_algo": "FP8"}},
    "gptq": {"quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 128}},
    "awq": {"quantization_config": {"quant_method": "awq", "bits": 4}},
    "compressed-tensors": {"quantization_config": {"quant_method": "compressed-tensors", "config_groups": {}}},
    "bitsandbytes": {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}},
    "compressed": {"compression_config": {"quantization_status": "compressed"}},
    "of a kind that config.json does not name": {"quantization": {"bits": 4, "group_size": 64}},  # MLX
    "made_up": {"quantization_config": {"quant_method": "made_up"}},
}


@pytest.mark.parametrize("kind", QUANTISED)
def test_quantised_models_are_refused(changed: Callable[..., str], kind: str) -> None:
    model = changed(**QUANTISED[kind])
    refused(model, f"its weights are quantised ({kind}), and quantised weights cannot be trained", merge_adapter=True)
    refused(model, f"its weights are quantised ({kind}), and only fp8 and mxfp4 can be read, for evaluation")


def test_modelopts_own_file_tells_of_quantisation(changed: Callable[..., str]) -> None:
    model = changed()
    (Path(model) / "hf_quant_config.json").write_text('{"producer": {"name": "modelopt"}, "quantization": {}}')
    refused(model, "quantised (modelopt)")
    (Path(model) / "hf_quant_config.json").write_text("[]")
    refused(model, "quantised (hf_quant_config.json)")


def test_fp8_weights_are_dequantised_for_evaluation_and_refused_for_training(changed: Callable[..., str]) -> None:
    original = load_model(changed()).model

    def quantise(weights: dict[str, Tensor]) -> None:
        for name in [name for name in weights if name.endswith("proj.weight")]:
            scale = weights[name].abs().max() / 448
            weights[name] = (weights[name] / scale).to(torch.float8_e4m3fn)
            weights[f"{name}_scale_inv"] = scale.reshape(1, 1)

    blocks = {"quant_method": "fp8", "weight_block_size": [128, 128], "modules_to_not_convert": ["lm_head"]}
    model = changed(quantise, quantization_config=blocks)
    loaded = load_model(model)
    assert loaded.notes == []
    for (name, found), (_, expected) in zip(loaded.model.named_parameters(), original.named_parameters(), strict=True):
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, expected, atol=0.04, rtol=0, msg=name)  # three bits after the point
    refused(model, "quantised (fp8), and quantised weights cannot be trained", merge_adapter=True)
    refused(changed(quantise), "scales of quantised weights that config.json does not mention")


def test_mxfp4_weights_are_dequantised_for_evaluation(model_folder: Callable[..., Path], tmp_path: Path) -> None:
    config = GptOssConfig(**SIZE | {"intermediate_size": 32}, head_dim=8, num_local_experts=2, num_experts_per_tok=1)
    GptOssForCausalLM(config).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(model_folder()).save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    expected = {}
    digits = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    values = torch.cat([digits, -digits])  # E2M1
    for name in [name for name in weights if name.endswith("experts.gate_up_proj")]:
        experts, inner, outer = weights.pop(name).shape
        blocks = torch.randint(0, 256, (experts, outer, inner // 32, 16), dtype=torch.uint8)
        exponents = torch.randint(120, 124, (experts, outer, inner // 32), dtype=torch.uint8)
        weights |= {f"{name}_blocks": blocks, f"{name}_scales": exponents}
        pairs = torch.stack([values[(blocks & 15).long()], values[(blocks >> 4).long()]], dim=-1).flatten(-2)
        expected[name] = (pairs * 2.0 ** (exponents.float() - 127)[..., None]).flatten(-2).transpose(1, 2)
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    values_of = json.loads((tmp_path / "config.json").read_text())
    values_of["quantization_config"] = {"quant_method": "mxfp4"}
    (tmp_path / "config.json").write_text(json.dumps(values_of))
    found = load_model(str(tmp_path)).model.state_dict()
    assert len(expected) == 2
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    refused(str(tmp_path), "quantised (mxfp4), and quantised weights cannot be trained", merge_adapter=True)


# --- tokens without a row in the embedding ---


@pytest.fixture
def with_tokens(model_folder: Callable[..., Path], tmp_path: Path) -> Callable[..., str]:
    """The tiny model with further tokens: its tokenizer has 260, its embedding 300 rows."""

    def make(*tokens: str | AddedToken, template: str = "", **named: str) -> str:
        folder = tmp_path / "model"
        shutil.copytree(model_folder(), folder)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        tokenizer.add_tokens([*(f"<fill{number}>" for number in range(VOCABULARY - len(tokenizer))), *tokens])
        tokenizer.add_special_tokens(named)
        tokenizer.chat_template += template
        tokenizer.save_pretrained(folder)
        return str(folder)

    return make


def test_tokens_that_text_can_write_need_a_row(with_tokens: Callable[..., str]) -> None:
    model = with_tokens("<tool>", "<other>", "<third>", "<fourth>")
    message = (
        "its embedding has 300 rows, and its tokenizer has 4 tokens beyond them: '<tool>', '<other>', '<third>' and 1 "
        "more; use the tokenizer that belongs to the model"
    )
    refused(model, message)


def test_an_end_token_needs_a_row(with_tokens: Callable[..., str]) -> None:
    refused(with_tokens(eos_token="<end>"), "its tokenizer has 1 token beyond them: '<end>'")


def test_the_end_token_replaces_a_pad_token_without_a_row(with_tokens: Callable[..., str]) -> None:
    note = "the tokenizer has a pad token without a row in the embedding, '[PAD]'; using its end token '<end>'"
    loaded = load_model(with_tokens(pad_token="[PAD]"))
    end = loaded.tokenizer.eos_token
    assert loaded.notes == [note.replace("<end>", end)]
    assert loaded.pad_token_id == loaded.tokenizer.pad_token_id == loaded.tokenizer.eos_token_id
    loaded.tokenizer.pad_token = "[PAD]"
    adopted = adopt(loaded.model, loaded.tokenizer)
    assert adopted.notes == loaded.notes
    assert adopted.pad_token_id == loaded.pad_token_id


@pytest.mark.parametrize("also", ["template", "eos_token", "text"])
def test_a_pad_token_that_is_used_elsewhere_needs_a_row(with_tokens: Callable[..., str], also: str) -> None:
    if also == "template":
        model = with_tokens(pad_token="[PAD]", template="[PAD]")
    elif also == "eos_token":
        model = with_tokens(pad_token="[PAD]", eos_token="[PAD]")
    else:
        model = with_tokens("[MORE]", pad_token="[PAD]")
    refused(model, "beyond them: '[MORE]'" if also == "text" else "its tokenizer has 1 token beyond them: '[PAD]'")


def test_a_token_of_the_template_needs_a_row(with_tokens: Callable[..., str]) -> None:
    model = with_tokens(AddedToken("<turn>", special=True), AddedToken("<image>", special=True), template="<turn>")
    refused(model, "its tokenizer has 1 token beyond them: '<turn>'")


def test_a_special_token_that_no_text_writes_needs_none(with_tokens: Callable[..., str]) -> None:
    # As in a text model of Gemma 3, whose tokenizer has one more token, for images.
    model = with_tokens(AddedToken("<image_soft_token>", special=True))
    note = "the tokenizer has 1 token without a row in the embedding, which no text produces: '<image_soft_token>'"
    loaded = load_model(model)
    assert loaded.notes == [note]
    assert adopt(loaded.model, loaded.tokenizer).notes == [note]


# --- what the libraries say ---


def test_what_transformers_warns_of_reaches_the_user_once(changed: Callable[..., str]) -> None:
    model = changed(bos_token_id=5_000)
    notes = load_model(model).notes
    (note,) = [note for note in notes if "bos_token_id" in note]
    assert "integer within the vocabulary (between 0 and 299), got 5000" in note
    assert "\n" not in note


@pytest.mark.parametrize("command", ["train --method sft --max_steps 1 --save_steps 0 --output_dir run", "eval"])
def test_every_command_says_what_was_noted(
    changed: Callable[..., str],
    write_rows: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    command: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    shared = (
        f"--model {changed(adding('score.weight'))} --data {write_rows()} --max_completion_length 10 --batch_size 2"
    )
    assert main([*command.split(), *shared.split()]) == 0
    note = "note: its files hold unused parts (number of tensors): score (1)"
    assert capsys.readouterr().err.splitlines().count(note) == 1
