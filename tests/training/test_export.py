"""Export: what is written is the model that was trained, whole, loadable by transformers alone, without pickles."""

from __future__ import annotations

import errno
import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from selfdistill.cli import main
from selfdistill.config.commands import ExportConfig
from selfdistill.config.train import TrainConfig
from selfdistill.errors import UserError
from selfdistill.methods import METHODS, Method
from selfdistill.model import network_fingerprint
from selfdistill.model.files import local_folder
from selfdistill.model.loading import adopt, load_model
from selfdistill.training.export import export, whole_folder
from selfdistill.training.train import train

IDS = torch.arange(40, 52)[None]


@pytest.fixture
def trained(settings: Callable[..., TrainConfig], model_folder: Callable[..., Path]) -> Callable[..., Path]:
    """Run folder of two large steps of SFT."""

    def make(**values: Any) -> Path:
        defaults: dict[str, Any] = {
            "model": str(model_folder()),
            "method": "sft",
            "max_steps": 2,
            "learning_rate": 1e-2,
        }
        return train(settings(**(defaults | values))).parent

    return make


def model_of(run: Path) -> str:
    return str(yaml.safe_load((run / "config.yaml").read_text())["model"])


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits.float()


def adapter_logits(base: Path, adapter: Path) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    return logits(PeftModel.from_pretrained(model, adapter))


def refused(message: str, **values: Any) -> None:
    with pytest.raises(UserError) as caught:
        export(ExportConfig(**values))
    assert str(caught.value) == message


def test_a_whole_model_is_copied_to_the_byte(trained: Callable[..., Path], tmp_path: Path) -> None:
    run = trained()
    out = export(ExportConfig(run=str(run), output_dir=str(tmp_path / "deep" / "out")))
    files = {path.name: path.read_bytes() for path in (run / "final").iterdir()}
    assert {path.name: path.read_bytes() for path in out.iterdir()} == files
    assert {"model.safetensors", "tokenizer.json", "README.md"} <= files.keys()
    assert torch.equal(
        logits(AutoModelForCausalLM.from_pretrained(out)), logits(AutoModelForCausalLM.from_pretrained(run / "final"))
    )


def test_transformers_4_finds_the_rotary_base_where_it_looks(
    trained: Callable[..., Path], model_folder: Callable[..., Path], tmp_path: Path
) -> None:
    base = tmp_path / "base"
    shutil.copytree(model_folder(), base)
    values = json.loads((base / "config.json").read_text())
    values["rope_parameters"] = {"rope_type": "default", "rope_theta": 5e5}
    (base / "config.json").write_text(json.dumps(values))
    final = trained(model=str(base)) / "final"
    written = json.loads((final / "config.json").read_text())
    assert written["rope_theta"] == 5e5
    read = AutoConfig.from_pretrained(final).to_dict()
    assert "rope_theta" not in read
    assert read["rope_parameters"] == values["rope_parameters"] == written["rope_parameters"]
    del written["rope_theta"]  # as saved before there was this copy: the same network
    before = network_fingerprint(load_model(str(final)))
    (final / "config.json").write_text(json.dumps(written))
    assert network_fingerprint(load_model(str(final))) == before


def test_an_adapter_is_copied_or_merged(
    trained: Callable[..., Path], model_folder: Callable[..., Path], tmp_path: Path
) -> None:
    base, run = model_folder(), trained(lora_rank=2)
    want = adapter_logits(base, run / "final")
    assert (want - logits(AutoModelForCausalLM.from_pretrained(base))).abs().max() > 1e-2  # it learnt something

    copied = export(ExportConfig(run=str(run), output_dir=str(tmp_path / "copied")))
    assert torch.equal(adapter_logits(base, copied), want)
    assert not (copied / "config.json").exists()

    merged = export(ExportConfig(run=str(run / "final"), output_dir=str(tmp_path / "merged"), merge=True))
    model = AutoModelForCausalLM.from_pretrained(merged)
    assert type(model) is LlamaForCausalLM
    torch.testing.assert_close(logits(model), want, atol=1e-4, rtol=1e-5)
    assert len(AutoTokenizer.from_pretrained(merged)) == len(AutoTokenizer.from_pretrained(base))
    assert not (merged / "adapter_config.json").exists()
    assert "merged into its base" in (merged / "README.md").read_text()
    weights = merged / "model.safetensors"
    assert weights.stat().st_mode == (merged / "tokenizer.json").stat().st_mode
    for folder in (copied, merged):
        kinds = {path.suffix for path in folder.rglob("*") if path.is_file()}
        assert kinds <= {".safetensors", ".json", ".jinja", ".md"}


@pytest.mark.parametrize("relative", [False, True])
def test_the_copy_of_an_adapter_names_the_base_that_is_given(
    trained: Callable[..., Path],
    model_folder: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    relative: bool,
) -> None:
    base, moved = tmp_path / "base", tmp_path / "moved"
    shutil.copytree(model_folder(), base)
    run = trained(model=str(base), lora_rank=2)
    before = (run / "final" / "adapter_config.json").read_bytes()
    base.rename(moved)
    monkeypatch.chdir(tmp_path)
    out = export(ExportConfig(run=str(run), output_dir="out", adapter_base="moved" if relative else str(moved)))
    written = json.loads((out / "adapter_config.json").read_text())
    assert written == json.loads(before) | {"base_model_name_or_path": str(moved)}
    assert (run / "final" / "adapter_config.json").read_bytes() == before
    monkeypatch.chdir("/")
    assert torch.equal(logits(load_model(str(out)).model), adapter_logits(moved, run / "final"))
    refused(
        "model 'gone/gone/gone': no such folder",
        run=str(run),
        output_dir=str(tmp_path / "other"),
        adapter_base="gone/gone/gone",
    )
    assert not (tmp_path / "other").exists()


def test_a_base_is_not_used_where_the_model_is_no_adapter(
    trained: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = trained()
    capsys.readouterr()
    export(ExportConfig(run=str(run), output_dir=str(tmp_path / "out"), adapter_base="smollm2-135m"))
    assert f"note: adapter_base is not used: {run} is not an adapter" in capsys.readouterr().err


def test_merged_in_float32_and_saved_in_the_bases_data_type(
    trained: Callable[..., Path], model_folder: Callable[..., Path], tmp_path: Path
) -> None:
    base = tmp_path / "base"
    AutoModelForCausalLM.from_pretrained(model_folder(), dtype=torch.bfloat16).save_pretrained(base)
    AutoTokenizer.from_pretrained(model_folder()).save_pretrained(base)
    run = trained(model=str(base), lora_rank=2)
    merged = export(ExportConfig(run=str(run), output_dir=str(tmp_path / "out"), merge=True))
    model = AutoModelForCausalLM.from_pretrained(merged)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}

    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), run / "final")
    name = "model.layers.0.self_attn.q_proj"
    layer = adapted.get_submodule(f"base_model.model.{name}")
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    want = (layer.base_layer.weight + layer.scaling["default"] * b @ a).to(torch.bfloat16)
    assert torch.equal(model.get_submodule(name).weight, want)


def test_what_is_no_part_of_the_model_stays_behind(model_folder: Callable[..., Path], tmp_path: Path) -> None:
    source = tmp_path / "source"
    LlamaForCausalLM.from_pretrained(model_folder()).save_pretrained(source)
    for name in (
        "training_args.bin",
        "optimizer.pt",
        ".gitattributes",
        "checkpoint-10/x.json",
        "model.py",
        "additional_chat_templates/x.jinja",
    ):
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_text("x")
    out = export(ExportConfig(run=str(source), output_dir=str(tmp_path / "out")))
    found = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
    assert found == {"config.json", "generation_config.json", "model.safetensors", "additional_chat_templates/x.jinja"}


GO_ALONG = (
    *("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json", "chat_template.json"),
    *("LICENSE", "LICENSE.md", "LICENCE.txt", "NOTICE", "USE_POLICY.md"),
)
STAY = (
    *("LICENSE.py", "NOTICE.bin", "modeling.py", "pytorch_model.bin", "model.safetensors.index.json", "README.md"),
    *("notes.json", "LICENSES/third.txt", "original/params.json"),
)


@pytest.fixture
def with_files(model_folder: Callable[..., Path]) -> Callable[[Path], str]:
    """A copy of the tiny model with files of every kind beside it."""

    def make(folder: Path) -> str:
        shutil.copytree(model_folder(), folder)
        for name in (*GO_ALONG, *STAY):
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text(f"the base's {name}")
        (folder / "generation_config.json").write_text('{"eos_token_id": [257], "top_k": 7}')
        return str(folder)

    return make


def files_of_base(folder: Path) -> set[str]:
    texts = {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    return {name for name, text in texts.items() if text.startswith(b"the base's ")}


@pytest.mark.parametrize("rank", [0, 2])
def test_files_of_the_base_go_along(
    trained: Callable[..., Path], with_files: Callable[[Path], str], tmp_path: Path, rank: int
) -> None:
    run = trained(model=with_files(tmp_path / "base"), lora_rank=rank)
    out = export(ExportConfig(run=str(run), output_dir=str(tmp_path / "out"), merge=rank > 0))
    for folder in (run / "final", out):
        assert files_of_base(folder) == set(GO_ALONG)
        assert json.loads((folder / "generation_config.json").read_text())["top_k"] == 7
        assert (folder / "README.md").read_text().startswith("---\n")  # the model's own card


@pytest.mark.parametrize("rank", [0, 2])
def test_flags_without_effect_are_no_reason_to_write_no_model(
    trained: Callable[..., Path], model_folder: Callable[..., Path], tmp_path: Path, rank: int
) -> None:
    base = tmp_path / "base"
    shutil.copytree(model_folder(template="{% for m in messages %}{{ m.content }}<|stop|>{% endfor %}"), base)
    flags = {"temperature": 0.7, "early_stopping": True}  # of sampling and beams, and neither is asked for
    (base / "generation_config.json").write_text(json.dumps(flags | {"eos_token_id": 257}))
    run = trained(model=str(base), lora_rank=rank)
    out = export(ExportConfig(run=str(run), output_dir=str(tmp_path / "out"), merge=rank > 0))
    for folder in (run / "final", out):
        saved = json.loads((folder / "generation_config.json").read_text())
        assert flags.items() <= saved.items()
        assert saved["eos_token_id"] == [257, 259]  # <|im_end|> and <|stop|>
    assert load_model(str(out)).end_token_ids == (257, 259)


def test_files_go_along_when_an_adapter_is_merged_and_trained_further(
    trained: Callable[..., Path], with_files: Callable[[Path], str], tmp_path: Path
) -> None:
    first = trained(model=with_files(tmp_path / "base"), lora_rank=2, out="first")
    second = trained(model=str(first), out="second")
    assert files_of_base(second / "final") == set(GO_ALONG)


def test_files_go_along_with_a_model_that_the_caller_has_loaded(
    settings: Callable[..., TrainConfig], with_files: Callable[[Path], str], tmp_path: Path
) -> None:
    folder = with_files(tmp_path / "base")
    loaded = adopt(AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder))
    final = train(settings(model=folder, method="sft", max_steps=1), loaded=loaded)
    assert files_of_base(final) == set(GO_ALONG)


def test_files_go_along_from_the_snapshot_of_a_hub_model(
    settings: Callable[..., TrainConfig],
    with_files: Callable[[Path], str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cache = tmp_path / "cache" / "models--someone--model"
    with_files(cache / "snapshots" / "abc")
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("abc")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    assert local_folder("someone/model") == cache / "snapshots" / "abc"
    assert local_folder("someone/else") is None
    assert local_folder("no/hub/id") is None
    loaded = adopt(
        AutoModelForCausalLM.from_pretrained(cache / "snapshots" / "abc"),
        AutoTokenizer.from_pretrained(cache / "snapshots" / "abc"),
    )
    loaded.files = local_folder("someone/model")
    final = train(settings(method="sft", max_steps=1), loaded=loaded)
    assert files_of_base(final) == set(GO_ALONG)


def test_refusals(
    trained: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    trained()
    monkeypatch.chdir(tmp_path)
    Path("full").mkdir()
    Path("full/notes.txt").write_text("mine")
    for taken in ("full", "full/notes.txt"):
        message = f"output_dir {taken!r} exists and is not an empty folder; choose another"
        refused(message, run="run", output_dir=taken)
    assert Path("full/notes.txt").read_text() == "mine"
    with monkeypatch.context() as patch:  # of another user
        patch.setattr("selfdistill.runtime.files.os.access", lambda path, _: Path(path).name != "full")
        message = f"output_dir 'full/new': {tmp_path}/full is not a folder that you may write to; choose another place"
        refused(message, run="run", output_dir="full/new", merge=True)
    refused("run 'gone': no such folder; give a run folder or a model folder", run="gone", output_dir="out")
    refused("run 'full': neither a run folder (final) nor a model folder (config.json)", run="full", output_dir="out")
    message = "run 'run': a full model without an adapter to merge; leave merge out"
    refused(message, run="run", output_dir="out", merge=True)
    (Path("run/final/model.safetensors")).unlink()
    message = "run 'run': no safetensors weights in run/final; other formats are not exported"
    refused(message, run="run", output_dir="out")
    Path("run/final").rename("elsewhere")
    message = "run 'run': no final model, because it has not reached its last step; resume its training"
    refused(message, run="run", output_dir="out")
    assert not Path("out").exists()
    assert main(["export", "run", "--output_dir", "out"]) == 2
    assert capsys.readouterr().err.endswith(f"selfdistill: error: {message}\n")


@pytest.mark.parametrize("lora_rank", [0, 2])
def test_a_checkpoint_gives_the_model_of_a_run_that_ends_there(
    settings: Callable[..., TrainConfig], trained: Callable[..., Path], tmp_path: Path, lora_rank: int
) -> None:
    run = trained(lora_rank=lora_rank, max_steps=3, save_steps=1, lr_scheduler_type="constant", save_total_limit=9)
    out, ended = tmp_path / "out", {"output_dir": str(tmp_path / "ended"), "model": model_of(run)}
    assert export(ExportConfig(run=str(run), output_dir=str(out), step=2)) == out
    own = {"method": "sft", "learning_rate": 1e-2, "lr_scheduler_type": "constant", "lora_rank": lora_rank}
    final = train(settings(**own, **ended, max_steps=2))
    name = "adapter_model.safetensors" if lora_rank else "model.safetensors"
    found, expected, last = (load_file(folder / name) for folder in (out, final, run / "final"))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    assert any(not torch.equal(found[key], last[key]) for key in expected)
    assert {file.name for file in out.iterdir()} == {file.name for file in final.iterdir()}
    card = (out / "README.md").read_text()
    assert "- It ended early, after step 2 of 3" in card
    of_final = (final / "README.md").read_text()
    assert re.findall("fingerprint `.+?`", card) == re.findall("fingerprint `.+?`", of_final) != []


def test_the_adapter_of_a_checkpoint_is_merged(trained: Callable[..., Path], tmp_path: Path) -> None:
    run = trained(lora_rank=2, save_steps=1)
    for merge in (False, True):
        export(ExportConfig(run=str(run), output_dir=str(tmp_path / f"{merge}"), step=1, merge=merge))
    base = model_of(run)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "True", dtype=torch.float32)
    torch.testing.assert_close(logits(merged), adapter_logits(Path(base), tmp_path / "False"), rtol=1e-4, atol=1e-4)


def test_a_checkpoint_of_a_run_whose_base_moved_or_changed(
    trained: Callable[..., Path], model_folder: Callable[..., Path], tmp_path: Path
) -> None:
    base, moved = tmp_path / "base", tmp_path / "moved"
    shutil.copytree(model_folder(), base)
    run = trained(model=str(base), lora_rank=2, save_steps=1)
    export(ExportConfig(run=str(run), output_dir=str(tmp_path / "before"), step=1))
    base.rename(moved)
    export(ExportConfig(run=str(run), output_dir=str(tmp_path / "after"), step=1, adapter_base=str(moved)))
    before, after = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("before", "after"))
    assert all(torch.equal(before[key], after[key]) for key in before)
    named = json.loads((tmp_path / "after" / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert named == str(moved)
    changed = load_model(str(moved))
    with torch.no_grad():
        changed.model.get_input_embeddings().weight.add_(1)
    changed.model.save_pretrained(moved)
    with pytest.raises(UserError, match="are not those with which it began; restore them"):
        export(ExportConfig(run=str(run), output_dir=str(tmp_path / "no"), step=1, adapter_base=str(moved)))


def test_a_checkpoint_of_a_run_that_began_on_another_runs_adapter(
    trained: Callable[..., Path], model_folder: Callable[..., Path], tmp_path: Path
) -> None:
    base, moved = tmp_path / "base", tmp_path / "moved"
    shutil.copytree(model_folder(), base)
    first = trained(model=str(base), lora_rank=2, out="first")
    second = trained(model=str(first), lora_rank=2, out="second", max_steps=1, save_steps=1)
    base.rename(moved)
    out = export(ExportConfig(run=str(second), output_dir=str(tmp_path / "out"), step=1, adapter_base=str(moved)))
    exported, final = (logits(AutoModelForCausalLM.from_pretrained(folder)) for folder in (out, second / "final"))
    assert torch.equal(exported, final)
    shutil.rmtree(first)
    with pytest.raises(UserError, match=f"model '{first}'.*"):
        export(ExportConfig(run=str(second), output_dir=str(tmp_path / "no"), step=1, adapter_base=str(moved)))


def test_a_checkpoint_needs_no_method_that_was_given_in_python(
    settings: Callable[..., TrainConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def mine(config: TrainConfig) -> Method:
        return METHODS["sft"](config)[0]

    run = train(settings(method=mine, max_steps=1, save_steps=1)).parent
    monkeypatch.setattr(sys.modules["selfdistill.data.named"], "_given", {})
    export(ExportConfig(run=str(run), output_dir=str(tmp_path / "out"), step=1))
    assert "The method is a function of its user" in (tmp_path / "out" / "README.md").read_text()


def test_checkpoints_that_cannot_be_exported(trained: Callable[..., Path], tmp_path: Path) -> None:
    run, out = trained(save_steps=1), str(tmp_path / "out")
    there = "there are checkpoints of the steps 1, 2 (save_steps, save_total_limit)"
    refused(f"run '{run}': no checkpoint of step 7; {there}", run=str(run), output_dir=out, step=7)
    refused(
        f"run '{tmp_path}': no checkpoint of step 7; it has no checkpoints (save_steps, save_total_limit)",
        run=str(tmp_path),
        output_dir=out,
        step=7,
    )
    message = f"run '{run}': trained all weights, so there is no adapter to merge; leave merge out"
    refused(message, run=str(run), output_dir=out, step=1, merge=True)
    checkpoint = run / "checkpoint-00000001"
    (checkpoint / "state.json").unlink()
    refused(
        f"{checkpoint}: the checkpoint is corrupt (state.json is missing); export another step",
        run=str(run),
        output_dir=out,
        step=1,
    )


def test_the_command(trained: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, out = trained(lora_rank=2), tmp_path / "out"
    out.mkdir()  # empty, so it may be used
    capsys.readouterr()
    assert main(["export", str(run), "--output_dir", str(out), "--merge", "true", "--json", "-"]) == 0
    assert json.loads(capsys.readouterr().out) == {"output_dir": str(out)}
    AutoModelForCausalLM.from_pretrained(out)


def test_a_new_folder_takes_the_place_of_one_that_cannot_be_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    removes = shutil.rmtree

    def in_use(folder: Path, ignore_errors: bool = False) -> None:
        if folder.name == ".out.removed":
            raise OSError(errno.ENOTEMPTY, "Directory not empty", str(folder))
        removes(folder, ignore_errors=ignore_errors)

    monkeypatch.setattr(shutil, "rmtree", in_use)
    for content in ("earlier", "later"):
        with whole_folder(tmp_path / "out", "advice", replace=True) as folder:
            (folder / "card").write_text(content)
    assert (tmp_path / "out" / "card").read_text() == "later"


def test_a_failed_write_leaves_nothing(tmp_path: Path) -> None:
    def fill() -> None:
        with whole_folder(tmp_path / "out", "advice") as folder:
            (folder / "half.safetensors").write_text("x")
            raise OSError(28, "No space left on device")

    with pytest.raises(UserError, match=r"out: cannot write the model \(.*No space left.*\); advice$"):
        fill()
    assert list(tmp_path.iterdir()) == []
