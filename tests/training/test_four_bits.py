"""Runs with weights of 4 bits: what they compute, where they end, and what is saved."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ENDS, byte_tokenizer, final_weights, metrics_of
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from selfdistill.config import ExportConfig, TrainConfig
from selfdistill.errors import UserError
from selfdistill.model import LoadedModel, load_model, tensor_bytes, weight_tensors
from selfdistill.model.four_bits import dequantised
from selfdistill.model.quantisation import import_bitsandbytes
from selfdistill.training.export import export
from selfdistill.training.train import train
from selfdistill.training.trainer import Trainer

pytest.importorskip("bitsandbytes")
QLORA: dict[str, Any] = {"lora_rank": 4, "load_in_4bit": True}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A model whose layers are of whole blocks, and the same with its weights rounded through NF4."""
    path = tmp_path_factory.mktemp("models")
    config = LlamaConfig(
        vocab_size=260,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=False,
        initializer_range=0.1,
        attention_bias=True,
        bos_token_id=None,
        eos_token_id=257,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    model.generation_config.eos_token_id = list(ENDS)
    for name in ("whole", "rounded"):
        if name == "rounded":
            values = dequantised(load_model(str(path / "whole"), load_in_4bit=True).model)
            assert len(values) == 14
            model.load_state_dict(model.state_dict() | values)
        model.save_pretrained(path / name)
        byte_tokenizer().save_pretrained(path / name)
    return {name: str(path / name) for name in ("whole", "rounded")}


def logps(loaded: Any) -> Tensor:
    """Log-probabilities of a few sequences."""
    ids = torch.randint(256, (8, 24), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return torch.as_tensor(loaded(input_ids=ids).logits).float().log_softmax(-1)


def kl(p: Tensor, q: Tensor) -> float:
    return float((p.exp() * (p - q)).sum(-1).mean())


def live_bytes() -> int:
    """Bytes of all tensors alive that have data, each memory once."""
    gc.collect()
    tensors = (thing for thing in gc.get_objects() if isinstance(thing, torch.Tensor))
    return tensor_bytes(tensor for tensor in tensors if tensor.device.type == "cpu")


@pytest.mark.parametrize("values", [{}, {"teacher": "frozen"}, {"method": "sft", "gradient_checkpointing": True}])
def test_a_step_is_that_of_lora_on_the_rounded_weights(
    settings: Callable[..., TrainConfig], folders: dict[str, str], values: dict[str, Any]
) -> None:
    values = {"lora_rank": 4, "temperature": 1e-3, **values}  # the same samples
    four = Trainer(settings("four", model=folders["whole"], load_in_4bit=True, **values))
    plain = Trainer(settings("plain", model=folders["rounded"], **values))
    for trainer in (four, plain):
        for name, weight in trainer.loaded.model.named_parameters():
            if ".lora_B." in name:  # zeros, at which those of A have no gradient
                torch.nn.init.normal_(weight, std=0.1, generator=torch.Generator().manual_seed(len(name)))
        trainer.optimizer.zero_grad = lambda set_to_none=True: None  # type: ignore[method-assign]
    found, expected = four.step(0), plain.step(0)
    assert found["loss"] == pytest.approx(expected["loss"], rel=1e-4)
    gradients = {name: weight.grad for name, weight in four.loaded.model.named_parameters() if weight.requires_grad}
    wanted = {name: weight.grad for name, weight in plain.loaded.model.named_parameters() if weight.requires_grad}
    assert gradients.keys() == wanted.keys()
    for name, gradient in gradients.items():
        assert gradient is not None
        assert gradient.dtype == torch.float32
        torch.testing.assert_close(gradient, wanted[name], rtol=1e-3, atol=1e-5)


def test_a_frozen_teacher_is_the_quantised_base(settings: Callable[..., TrainConfig], folders: dict[str, str]) -> None:
    trainer = Trainer(settings(model=folders["whole"], teacher="frozen", **QLORA))
    for step in range(3):
        trainer.step(step)
    assert trainer.teacher is not None
    assert trainer.teacher.memory_bytes == 0
    base = AutoModelForCausalLM.from_pretrained(folders["rounded"], dtype=torch.float32)
    with trainer.teacher.model() as network:
        torch.testing.assert_close(logps(network), logps(base), rtol=0, atol=1e-5)
    assert kl(logps(trainer.loaded.model), logps(base)) > 1e-6


@pytest.mark.parametrize(
    "values",
    [
        pytest.param({"teacher": "snapshot", "snapshot_steps": 2}, marks=pytest.mark.slow),
        {"mixed_precision": "bf16"},
        pytest.param({}, marks=pytest.mark.slow),
    ],
)
def test_a_run_resumes_bit_by_bit(
    settings: Callable[..., TrainConfig], folders: dict[str, str], values: dict[str, Any]
) -> None:
    values = {"model": folders["whole"], "save_steps": 2, "lr_scheduler_type": "constant", **QLORA, **values}
    whole = settings("whole", **values)
    train(whole)
    for max_steps in (2, 6):
        part = settings("parts", **values | {"max_steps": max_steps})
        train(part, resume=max_steps > 2)
    ends, found = final_weights(whole), final_weights(part)
    assert {weight.dtype for weight in found.values()} == {torch.float32}
    assert all(".lora_" in name for name in found)
    assert all(torch.equal(ends[name], found[name]) for name in ends)
    with pytest.raises(UserError, match="load_in_4bit was True"):
        train(part.model_copy(update={"load_in_4bit": False}), resume=True)


@pytest.mark.slow
def test_a_run_ends_where_lora_on_the_rounded_weights_does(
    settings: Callable[..., TrainConfig], folders: dict[str, str]
) -> None:
    """Up to rounding; and LoRA on the weights as they were ends nearer to it than to where it began."""
    values: dict[str, Any] = {"method": "sft", "max_steps": 30, "learning_rate": 6e-3, "batch_size": 6, "lora_rank": 4}
    runs = {
        "whole": settings("whole", model=folders["whole"], **values),
        "rounded": settings("rounded", model=folders["rounded"], **values),
        "four": settings("four", model=folders["whole"], load_in_4bit=True, **values),
    }
    ends = {}
    for name, config in runs.items():
        trained: list[LoadedModel] = []

        def on_step(_step: int, loaded: LoadedModel, _metrics: Any, trained: list[LoadedModel] = trained) -> None:
            trained[:] = [loaded]

        train(config, on_step=on_step)
        ends[name] = logps(trained[0].model)
        assert metrics_of(config)[-1]["loss"] < 0.6 * metrics_of(config)[0]["loss"]
    start, saved = (logps(load_model(name).model) for name in (folders["whole"], runs["four"].output_dir))
    learnt = kl(ends["whole"], start)
    assert kl(ends["rounded"], ends["four"]) < 1e-3 * learnt
    assert kl(ends["whole"], ends["four"]) < 0.7 * learnt
    assert kl(ends["whole"], saved) < 0.5 * learnt


def test_evaluation_anchors_and_drift_see_the_quantised_base(
    settings: Callable[..., TrainConfig], folders: dict[str, str], write_rows: Callable[..., Path], tmp_path: Path
) -> None:
    anchors = tmp_path / "anchors.txt"
    anchors.write_text("Tell me what a lighthouse is for.\nWho keeps it?\n", encoding="utf-8")
    test = str(write_rows(count=2, name="test.jsonl"))
    values: dict[str, Any] = {"test": test, "anchors": str(anchors), "anchor_share": 0.5, "drift_steps": 1}
    config = settings(model=folders["whole"], mixed_precision="bf16", **QLORA, **values)
    train(config)
    assert 0 <= metrics_of(config)[0]["drift/student"] < 1e-3


def test_an_export_is_merged_into_weights_that_are_not_quantised(
    settings: Callable[..., TrainConfig], folders: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = settings(model=folders["whole"], method="sft", learning_rate=3e-3, **QLORA)
    train(config)
    run, merged = config.output_dir, tmp_path / "merged"
    adapter = export(ExportConfig(run=run, output_dir=str(tmp_path / "adapter")))
    assert not (adapter / "model.safetensors").exists()
    capsys.readouterr()
    export(ExportConfig(run=run, output_dir=str(merged), merge=True))
    assert "trained on a 4-bit base" in capsys.readouterr().err
    whole = load_model(str(merged))
    torch.testing.assert_close(logps(whole.model), logps(load_model(str(adapter)).model), rtol=0, atol=1e-4)
    base = AutoModelForCausalLM.from_pretrained(folders["whole"], dtype=torch.float32)
    assert torch.equal(whole.model.get_input_embeddings().weight, base.get_input_embeddings().weight)


def test_weights_are_quantised_while_they_are_read(
    folders: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = LlamaConfig.from_pretrained(folders["whole"])
    config.update({"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 3})
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    functional = import_bitsandbytes("the test").functional
    quantize, calls, held = functional.quantize_4bit, [], []

    def watched(*args: Any, **kwargs: Any) -> Any:
        calls.append(None)
        if len(calls) in (7, 21):  # counting takes long
            held.append(live_bytes())
        return quantize(*args, **kwargs)

    monkeypatch.setattr(functional, "quantize_4bit", watched)
    before = live_bytes()
    loaded = load_model(str(tmp_path), load_in_4bit=True)
    assert len(calls) == 3 * 7
    one = 4 * 256 * 512
    assert max(held) - before <= tensor_bytes(weight_tensors(loaded.model)) + one + 10_000


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no adapter": ({"lora_rank": 0}, "needs an adapter, because its weights stay fixed: add lora_rank"),
    "fsdp": ({"fsdp": True}, "does not work with fsdp: leave one of them out"),
    "compiled": ({"torch_compile": True}, "does not work with torch_compile: leave one of them out"),
    "engine": ({"engine": "vllm"}, "does not work with an engine, found 'vllm': leave one out"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_settings_that_do_not_go_together_are_refused(settings: Callable[..., TrainConfig], name: str) -> None:
    values, message = REFUSED[name]
    with pytest.raises(UserError) as caught:
        settings(**QLORA | values)
    assert str(caught.value) == f"setting 'load_in_4bit' {message}"


def test_models_that_cannot_be_quantised_are_refused(
    settings: Callable[..., TrainConfig], folders: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = settings("of an adapter", model=folders["whole"], **QLORA)
    with pytest.raises(UserError, match=r"^setting 'load_in_4bit' quantises a model while reading its files"):
        train(config, loaded=load_model(folders["whole"]))
    quantised = AutoModelForCausalLM.from_pretrained(folders["whole"], dtype=torch.float32)
    quantised.config.quantization_config = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    quantised.save_pretrained(tmp_path / "quantised")
    byte_tokenizer().save_pretrained(tmp_path / "quantised")
    with pytest.raises(UserError, match="its weights are quantised"):
        train(config.model_copy(update={"model": str(tmp_path / "quantised")}))
    train(config)
    adapter = config.output_dir
    with pytest.raises(UserError, match="an adapter, which cannot be merged into 4-bit weights; merge it first"):
        train(settings("second", model=adapter, **QLORA))
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(UserError, match=r"^setting 'load_in_4bit' needs bitsandbytes"):
        train(settings("third", model=folders["whole"], **QLORA))
