"""Merge: the sum of weights is that of plain PyTorch, in whole files, in shards and with adapters."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import largest_difference, same
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from selfdistill.cli import main
from selfdistill.config.commands import MergeConfig
from selfdistill.errors import UserError
from selfdistill.model.loading import load_model
from selfdistill.training.merge import merge

Folders = Callable[..., Path]


def state(folder: Path, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    return {name: value.to(dtype) for name, value in model.state_dict().items()}


def saved(source: Path, folder: Path, *, dtype: torch.dtype = torch.float32, **options: Any) -> Path:
    model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype)
    model.save_pretrained(folder, **options)
    AutoTokenizer.from_pretrained(source).save_pretrained(folder)
    return folder


def adapter(base: Path, folder: Path, seed: int = 3, **options: Any) -> Path:
    """A LoRA adapter whose factors are all random."""
    settings: dict[str, Any] = {"r": 3, "lora_alpha": 5, "target_modules": ["q_proj", "down_proj"]}
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(**settings | options))
    random = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=random) / 4
    model.save_pretrained(folder)
    return folder


def merged_state(base: Path, folder: Path) -> dict[str, Tensor]:
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base).double(), folder).merge_and_unload()
    return {name: value.double() for name, value in model.state_dict().items()}


def hashes(*folders: Path) -> list[str]:
    files = sorted(file for folder in folders for file in folder.rglob("*") if file.is_file())
    return [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]


def run(output_dir: Path, **values: Any) -> Path:
    return merge(
        MergeConfig(output_dir=str(output_dir), **{k: str(v) if k != "scale" else v for k, v in values.items()})
    )


@pytest.fixture
def three(model_folder: Folders) -> tuple[Path, Path, Path]:
    return model_folder(), model_folder(seed=1), model_folder(seed=2)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("scale", [1.0, 0.3, -1.0])
def test_the_sum_is_that_of_the_weights(model_folder: Folders, tmp_path: Path, scale: float, tied: bool) -> None:
    target, learnt, before = (model_folder(seed=seed, tied=tied) for seed in range(3))
    was = hashes(target, learnt, before)
    out = run(tmp_path / "out", model=target, add=learnt, subtract=before, scale=scale)
    a, b, t = state(learnt), state(before), state(target)
    expected = {name: t[name] + scale * (a[name] - b[name]) for name in t}
    assert largest_difference(state(out), expected) < 1e-6
    assert hashes(target, learnt, before) == was
    assert {file.name for file in target.iterdir()} | {"README.md"} == {file.name for file in out.iterdir()}
    loaded = load_model(str(out))  # as all commands do
    assert len(loaded.tokenizer) == len(AutoTokenizer.from_pretrained(target))
    assert f"plus {scale:g} times the difference" in (out / "README.md").read_text(encoding="utf-8")


def test_what_was_learnt_and_is_taken_away_again_is_gone(three: tuple[Path, Path, Path], tmp_path: Path) -> None:
    target, learnt, before = three
    there = run(tmp_path / "there", model=target, add=learnt, subtract=before)
    back = run(tmp_path / "back", model=there, add=learnt, subtract=before, scale=-1)
    assert largest_difference(state(back), state(target)) < 1e-6


@pytest.mark.parametrize("which", [0, 1, 2])
def test_any_of_them_may_be_in_shards(three: tuple[Path, Path, Path], tmp_path: Path, which: int) -> None:
    whole = run(tmp_path / "whole", **dict(zip(("model", "add", "subtract"), three, strict=True)))
    folders = list(three)
    folders[which] = saved(three[which], tmp_path / "shards", max_shard_size="30KB")
    assert len(list(folders[which].glob("model-*.safetensors"))) > 3
    out = run(tmp_path / "out", **dict(zip(("model", "add", "subtract"), folders, strict=True)))
    assert same(state(out), state(whole))
    assert len(list(out.glob("*.safetensors"))) == len(list(folders[0].glob("*.safetensors")))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_target_keeps_its_data_type_and_what_rounding_costs_is_said(
    three: tuple[Path, Path, Path], tmp_path: Path, dtype: torch.dtype, capsys: pytest.CaptureFixture[str]
) -> None:
    target = saved(three[0], tmp_path / "half", dtype=dtype)
    out = run(tmp_path / "out", model=target, add=three[1], subtract=three[2], scale=0.1)
    found, t, a, b = state(out, dtype), state(target), state(three[1]), state(three[2])
    vector = {name: 0.1 * (a[name] - b[name]) for name in t}
    assert same(found, {name: (t[name].float() + vector[name].float()).to(dtype) for name in t})
    assert {value.dtype for file in out.glob("*.safetensors") for value in load_file(file).values()} == {dtype}
    norm, size, lost = (
        sum(float(x.square().sum()) for x in values) ** 0.5
        for values in (vector.values(), t.values(), [found[name].double() - t[name] - vector[name] for name in t])
    )
    said = capsys.readouterr().err
    assert f"added a task vector of norm {norm:.4g}, {norm / size:.2%} of the target's" in said
    assert f"rounding to its data type changed the vector by {lost / norm:.1%}" in said


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"init_lora_weights": "gaussian"}], ids=str)
def test_an_adapter_is_its_own_task_vector(three: tuple[Path, Path, Path], tmp_path: Path, options: Any) -> None:
    target, base, _ = three
    lora = adapter(base, tmp_path / "lora", **options)
    out = run(tmp_path / "out", model=target, add=lora, scale=0.5)
    a, b, t = merged_state(base, lora), state(base), state(target)
    assert largest_difference(state(out), {name: t[name] + 0.5 * (a[name] - b[name]) for name in t}) < 1e-6
    untouched = [name for name in t if "q_proj" not in name and "down_proj" not in name]
    assert len(untouched) > 10
    assert all(torch.equal(state(out)[name], t[name]) for name in untouched)
    named = run(tmp_path / "named", model=target, add=lora, subtract=base, scale=0.5)
    assert same(state(named), state(out))


def test_adapters_of_one_base_are_added_and_the_result_is_a_full_model(
    three: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    base = three[0]
    first, second = adapter(base, tmp_path / "first"), adapter(base, tmp_path / "second", seed=4)
    out = run(tmp_path / "out", model=first, add=second)
    a, b, t = merged_state(base, second), state(base), merged_state(base, first)
    assert largest_difference(state(out), {name: t[name] + a[name] - b[name] for name in t}) < 1e-6
    assert not list(out.glob("adapter*"))
    assert load_model(str(out)).merged_adapter is False


@pytest.mark.parametrize(
    ("subtract", "scale", "why"), [(1, 1.0, "the two models are equal"), (2, 0.0, "the scale is 0")]
)
def test_a_vector_of_zeros_changes_nothing_and_that_is_said(
    three: tuple[Path, Path, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    subtract: int,
    scale: float,
    why: str,
) -> None:
    out = run(tmp_path / "out", model=three[0], add=three[1], subtract=three[subtract], scale=scale)
    assert f"note: {why}, so the target is unchanged" in capsys.readouterr().err
    name = "model.safetensors"
    assert (out / name).read_bytes() == (three[0] / name).read_bytes()


def test_one_tensor_is_written_at_a_time(
    three: tuple[Path, Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[str] = []
    module = sys.modules[merge.__module__]
    monkeypatch.setattr(module, "overwrite_tensor", lambda file, name, value: written.append(name))
    run(tmp_path / "out", model=three[0], add=three[1], subtract=three[2])
    changed = {name for name, value in state(three[1]).items() if not torch.equal(value, state(three[2])[name])}
    assert sorted(written) == sorted(changed)


# --- the command ---


def test_the_command(three: tuple[Path, Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target, learnt, before = map(str, three)
    out = str(tmp_path / "out")
    assert (
        main(["merge", "--model", target, "--add", learnt, "--subtract", before, "--output_dir", out, "--json", "-"])
        == 0
    )
    assert json.loads(capsys.readouterr().out) == {"output_dir": out}
    assert (tmp_path / "out" / "model.safetensors").is_file()
    assert main(["merge", "--model", target, "--add", learnt, "--subtract", before, "--output_dir", out]) == 2
    assert f"error: output_dir '{out}' exists and is not an empty folder; choose another" in capsys.readouterr().err


# --- what does not match ---


def refused(message: str, tmp_path: Path, **values: Any) -> None:
    with pytest.raises(UserError) as error:
        run(tmp_path / "refused", **values)
    assert str(error.value) == message
    assert not (tmp_path / "refused").exists()


def test_models_of_other_sizes(three: tuple[Path, Path, Path], model_folder: Folders, tmp_path: Path) -> None:
    target, learnt, _ = three
    wide = model_folder(head_dim=16)
    advice = "; all three must have the same architecture and size"
    refused(
        f"model '{wide}' does not match '{target}': tensor model.layers.0.self_attn.k_proj.weight is 32 x 32 in "
        f"place of 16 x 32{advice}",
        tmp_path,
        model=target,
        add=learnt,
        subtract=wide,
    )
    tied = model_folder(tied=True)
    refused(
        f"model '{tied}' does not match '{target}': it has no tensor lm_head.weight{advice}",
        tmp_path,
        model=target,
        add=tied,
        subtract=learnt,
    )
    refused(
        f"model '{target}' does not match '{tied}': it has a further tensor lm_head.weight{advice}",
        tmp_path,
        model=tied,
        add=target,
        subtract=learnt,
    )


def test_a_whole_model_needs_what_it_was_before(three: tuple[Path, Path, Path], tmp_path: Path) -> None:
    refused(
        f"setting 'subtract': '{three[1]}' is not an adapter, so give the model it was trained from",
        tmp_path,
        model=three[0],
        add=three[1],
    )


@pytest.mark.parametrize(
    "options",
    [
        {"use_dora": True},
        {"modules_to_save": ["lm_head"]},
        {"rank_pattern": {"q_proj": 2}},
        {"target_modules": ["embed_tokens"]},
        {"init_lora_weights": "pissa"},
        {"init_lora_weights": "olora"},
    ],
    ids=str,
)
def test_adapters_that_are_more_than_lora(three: tuple[Path, Path, Path], tmp_path: Path, options: Any) -> None:
    lora = adapter(three[0], tmp_path / "lora", **options)
    refused(
        f"model '{lora}': the adapter is more than LoRA on linear layers; merge it first with selfdistill export "
        "--merge true, and give the result",
        tmp_path,
        model=three[0],
        add=lora,
    )


def test_an_adapter_of_another_base(three: tuple[Path, Path, Path], model_folder: Folders, tmp_path: Path) -> None:
    lora = adapter(model_folder(head_dim=16), tmp_path / "lora")
    settings = json.loads((lora / "adapter_config.json").read_text(encoding="utf-8"))
    (lora / "adapter_config.json").write_text(
        json.dumps(settings | {"base_model_name_or_path": str(three[0])}), encoding="utf-8"
    )
    refused(
        f"model '{lora}': the adapter changes model.layers.0.self_attn.q_proj.weight of 64 x 32, and the files of its "
        f"base '{three[0]}' have no such tensor; merge it first with selfdistill export --merge true, and give the "
        "result",
        tmp_path,
        model=three[0],
        add=lora,
    )


def test_files_that_cannot_be_read(three: tuple[Path, Path, Path], tmp_path: Path) -> None:
    for name, damage, message in (
        ("gone", lambda folder: (folder / "model.safetensors").unlink(), "has neither model.safetensors nor"),
        ("cut", lambda folder: (folder / "model.safetensors").write_bytes(b"x" * 50), "its weights cannot be read ("),
    ):
        broken = tmp_path / name
        shutil.copytree(three[1], broken)
        damage(broken)
        with pytest.raises(UserError, match=rf"^model '{broken}': its weights cannot be read \(") as error:
            run(tmp_path / "out", model=three[0], add=broken, subtract=three[2])
        assert message in str(error.value)
    refused(
        "model 'someone/unknown': not on this machine; download it first, or give a folder",
        tmp_path,
        model=three[0],
        add="someone/unknown",
    )


def test_an_adapter_that_cannot_be_read(three: tuple[Path, Path, Path], tmp_path: Path) -> None:
    broken = adapter(three[0], tmp_path / "broken")
    (broken / "adapter_model.safetensors").write_bytes(b"x" * 50)
    with pytest.raises(UserError, match=rf"^model '{broken}': its weights cannot be read \("):
        run(tmp_path / "out", model=three[0], add=broken)


def test_quantised_tensors_are_left_if_equal_and_refused_if_not(three: tuple[Path, Path, Path], tmp_path: Path) -> None:
    folders = []
    for number, source in enumerate(three):
        folders.append(tmp_path / f"model-{number}")
        shutil.copytree(source, folders[-1])
        tensors = load_file(source / "model.safetensors")
        tensors["scale_table"] = torch.tensor([1, 2, 3 + (number == 0)], dtype=torch.int8)
        save_file(tensors, folders[-1] / "model.safetensors", metadata={"format": "pt"})
    out = run(tmp_path / "out", model=folders[0], add=folders[1], subtract=folders[2])
    assert load_file(out / "model.safetensors")["scale_table"].tolist() == [1, 2, 4]
    refused(
        f"model '{folders[0]}': tensor scale_table is quantised (I8) and differs from that of '{folders[1]}'; such "
        "tensors cannot be added, so use the original models",
        tmp_path,
        model=folders[2],
        add=folders[0],
        subtract=folders[1],
    )
