"""The command line: what a user can get wrong is one line and exit code 2; what is right trains, resumes, measures."""

from __future__ import annotations

import errno
import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BertConfig, BertForMaskedLM

from selfdistill import checkpoint, guards
from selfdistill.cli import main
from selfdistill.config import CheckConfig, EvalConfig, TrainConfig

ROWS = [{"prompt": f"q{i}", "completion": "ab" * (1 + i % 3)} for i in range(4)]
BASE = "--model model --data train.jsonl --max_completion_length 8 --batch_size 2"
TRAIN = f"train {BASE} --output_dir run --max_steps 1 --save_steps 0"
SFT = f"{TRAIN} --method sft"
SDFT = f"{TRAIN} --context turns"


@pytest.fixture
def here(tmp_path: Path, model_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to work in, with a tiny ``model`` and ``train.jsonl``."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(model_folder(), "model")
    jsonl("train.jsonl", ROWS)
    return tmp_path


def jsonl(name: str, rows: list[Any]) -> None:
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def fails(capsys: pytest.CaptureFixture[str], arguments: str, message: str, code: int = 2) -> None:
    """``message`` is the whole error; where it ends with ``...`` a library's words or more rows follow."""
    capsys.readouterr()
    assert main(shlex.split(arguments)) == code
    out, err = capsys.readouterr()
    lines = [line for line in err.splitlines() if not line.startswith("note: ")]
    assert lines[-1].startswith("selfdistill: error: ")
    found = lines[-1].removeprefix("selfdistill: error: ")
    if message == "?":
        with open("/tmp/found.txt", "a") as f:
            f.write(repr((os.environ["PYTEST_CURRENT_TEST"], arguments, out, lines)) + "\n")
        return
    if message.endswith("..."):
        assert found.startswith(message[:-3])
        assert len(found) > len(message)
    else:
        assert found == message
    assert sum(line.startswith("selfdistill: error: ") for line in lines) == 1
    assert "Traceback" not in out + err
    assert not Path("run/final").exists()


ROW = '{"prompt": "q", "completion": "a"}\n'
DATA: list[tuple[str, str | bytes | None, str, str]] = [
    # name of the file, its content (None: no such file), the rest of the command, message
    ("none.jsonl", None, SFT, "?"),
    ("empty.jsonl", "", SFT, "?"),
    ("json.jsonl", ROW + '{"prompt": "q", \n', SFT, "?"),
    ("latin.jsonl", b'{"prompt": "\xe9", "completion": "a"}\n', SFT, "?"),
    ("column.jsonl", '{"prompt": "q", "response": "a"}\n', SFT, "?"),
    ("mixed.jsonl", ROW + '{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}', SFT, "?"),
    ("many.jsonl", '{"prompt": "q", "completion": ""}\n' * 12, SFT, "?"),
    ("null.jsonl", '{"prompt": null, "completion": "a"}\n', SFT, "?"),
    ("list.json", '{"prompt": "q", "completion": "a"}', SFT, "?"),
    ("rows.csv", "prompt,completion\nq,a\n", SFT, "?"),
    ("damaged.parquet", b"PAR1 nothing", SFT, "?"),
    ("folder/readme.txt", "no rows", SFT.replace("train.jsonl", "folder"), "?"),
    ("long.jsonl", json.dumps({"prompt": "q" * 600, "completion": "a"}), SFT, "?"),
    ("long.jsonl", json.dumps({"prompt": "q" * 300, "completion": "a"}), SDFT, "?"),
    ("short.jsonl", ROW, SFT + " --max_prompt_length 3", "?"),
    ("reply.jsonl", '{"prompt": "q", "completion": "aaaaaaaaaa"}\n', SFT, "?"),
    ("reply.jsonl", '{"prompt": "q", "completion": "aaaaaaaaaa"}\n', SFT + " --on_long_prompt drop", "?"),
    ("train.jsonl", ROW, SFT + " --max_completion_length 600", "?"),
    ("train.jsonl", ROW, SDFT + " --context document", "?"),
    ("train.jsonl", ROW, SDFT + " --context few_shot:k=3", "?"),
    ("train.jsonl", ROW, SDFT + " --context turn", "?"),
    ("train.jsonl", ROW, SDFT + " --context turns:repeat=2", "?"),
    ("train.jsonl", ROW, SDFT + " --context turns:repeats=0", "?"),
    ("train.jsonl", ROW, SDFT + " --context example:reasoning=yes", "?"),
    ("train.jsonl", ROW, SDFT + " --context template", "?"),
    ("train.jsonl", ROW, SDFT + " --context template:file=none.txt", "?"),
    ("template.txt", "Look: {demonstration}", SDFT + " --data train.jsonl --context template:file=template.txt", "?"),
    ("template.txt", "{document} {prompt}", SDFT + " --data train.jsonl --context template:file=template.txt", "?"),
    ("train.jsonl", ROW, SFT + " --split test --data folder-that-is-not", "?"),
    ("train.jsonl", ROW, SFT + """ --chat_template_kwargs '{"hint": [], "tokenize": true}'""", "?"),
]


@pytest.mark.parametrize(("name", "content", "command", "message"), DATA, ids=[f"{i}-{row[0]}" for i, row in enumerate(DATA)])
def test_data_that_is_wrong(
    here: Path, capsys: pytest.CaptureFixture[str], name: str, content: str | bytes | None, command: str, message: str
) -> None:
    if content is not None:
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_bytes(content if isinstance(content, bytes) else content.encode())
    if "--data train.jsonl" in command and name.endswith((".jsonl", ".json", ".csv", ".parquet")):
        command = command.replace("--data train.jsonl", f"--data {name}")
    fails(capsys, command, message.replace("HERE", str(here)))


CONFIG: list[tuple[str, str]] = [
    ("", "?"),
    ("trian", "?"),
    ("train", "?"),
    (f"{SFT} --learning_rte 3", "?"),
    (f"{SFT} --learning-rate=3", "?"),
    (f"{SFT} --learning_r 3", "?"),
    (f"{SFT} extra", "?"),
    (f"{SFT} --model", "?"),
    (f"{SFT} --method ppo", "?"),
    (f"{SFT} --max_steps 1.5", "?"),
    (f"{SFT} --max_steps -3", "?"),
    (f"{SFT} --learning_rate fast", "?"),
    (f"{SFT} --learning_rate 0", "?"),
    (f"{SFT} --learning_rate inf", "?"),
    (f"{SFT} --temperature nan", "?"),
    (f"{SFT} --top_p 1.5", "?"),
    (f"{SFT} --gradient_checkpointing perhaps", "?"),
    (f"{SFT} --chat_template_kwargs '{{thinking'", "?"),
    (f"{SFT} --batch_size 0 --ema_rate 2", "?"),
    (f"{SFT} --batch_size 5 --gradient_accumulation_steps 2", "?"),
    (f"{SFT} --importance_cap 2 --top_p 0.9", "?"),
    (f"{SFT} --support sampled", "?"),
    (f"{SDFT} --skip_first_tokens 3", "?"),
    (f"{SFT} --config none.yaml", "?"),
    (f"{SFT} --config broken.yaml", "?"),
    (f"{SFT} --config latin.yaml", "?"),
    (f"{SFT} --config list.yaml", "?"),
    (f"{SFT} --config empty.yaml", "?"),
    (f"{SFT} --config unknown.yaml", "?"),
    (f"{SFT} --config type.yaml", "?"),
    (f"train {BASE} --resume", "?"),
    ("train --resume --output_dir nowhere", "?"),
    (f"check {BASE} --context turns", "?"),
    (f"check {BASE} --contexts", "?"),
    (f"check {BASE} --contexts turns nonsense", "?"),
    (f"check {BASE} --sample 1", "?"),
    (f"check {BASE} --output_dir run", "?"),
    (f"eval {BASE} --scorer exakt", "?"),
    (f"eval {BASE} --prior none", "?"),
    (f"eval {BASE} --base none/model/here", "?"),
    (f"eval {BASE} --json nowhere/result.json", "?"),
    ("demo --seed x", "?"),
    ("demo --seed -1", "?"),
]


@pytest.mark.parametrize(("command", "message"), CONFIG, ids=[row[0].replace(SFT, "sft").replace(BASE, "") for row in CONFIG])
def test_settings_that_are_wrong(here: Path, capsys: pytest.CaptureFixture[str], command: str, message: str) -> None:
    Path("broken.yaml").write_text("max_steps: [1\n")
    Path("latin.yaml").write_bytes(b"split: \xe9\n")
    Path("list.yaml").write_text("- max_steps\n")
    Path("empty.yaml").write_text("")
    Path("unknown.yaml").write_text("learning_rte: 1\n")
    Path("type.yaml").write_text("warmup_steps: many\n")
    fails(capsys, command, message)


def not_causal(model: Path) -> None:
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    BertForMaskedLM(BertConfig(vocab_size=300, **small)).save_pretrained(model)


def only_pickle(model: Path) -> None:
    torch.save(load_file(model / "model.safetensors"), model / "pytorch_model.bin")
    (model / "model.safetensors").unlink()


def no_end_token(model: Path) -> None:
    for name in ("config.json", "generation_config.json", "tokenizer_config.json"):
        values = json.loads((model / name).read_text())
        (model / name).write_text(json.dumps(values | {"eos_token_id": None, "eos_token": None}))


def missing_weights(model: Path) -> None:
    weights = load_file(model / "model.safetensors")
    weights.pop("model.norm.weight")
    save_file(weights, model / "model.safetensors", {"format": "pt"})


def other_shape(model: Path) -> None:
    values = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(values | {"hidden_size": 64}))


def adapter_without_base(model: Path) -> None:
    (model / "config.json").unlink()
    (model / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "base_model_name_or_path": "gone/gone/gone"}))


def as_adapter(text: str) -> Callable[[Path], Any]:
    return lambda model: (model / "adapter_config.json").write_text(text)


MODEL: list[tuple[str, Callable[[Path], Any], str, str]] = [
    ("no folder", lambda m: shutil.rmtree(m), "--model ./model", "?"),
    ("a file", lambda m: None, "--model train.jsonl", "?"),
    ("empty folder", lambda m: (shutil.rmtree(m), m.mkdir()), "", "?"),
    ("no config.json", lambda m: (m / "config.json").unlink(), "", "?"),
    ("config.json is not JSON", lambda m: (m / "config.json").write_text("{"), "", "?"),
    ("unknown architecture", lambda m: (m / "config.json").write_text('{"model_type": "llamma"}'), "", "?"),
    ("own code", lambda m: (m / "config.json").write_text('{"model_type": "x", "auto_map": {"AutoConfig": "c.C"}}'), "", "?"),
    ("not causal", not_causal, "", "?"),
    ("no weights", lambda m: (m / "model.safetensors").unlink(), "", "?"),
    ("only pickle", only_pickle, "", "?"),
    ("damaged weights", lambda m: (m / "model.safetensors").write_bytes(b"nothing"), "", "?"),
    ("cut weights", lambda m: (m / "model.safetensors").write_bytes((m / "model.safetensors").read_bytes()[:-64]), "", "?"),
    ("missing weights", missing_weights, "", "?"),
    ("other shape", other_shape, "", "?"),
    ("no end token", no_end_token, "", "?"),
    ("no tokenizer", lambda m: [(m / n).unlink() for n in ("tokenizer.json", "tokenizer_config.json")], "", "?"),
    ("damaged tokenizer", lambda m: (m / "tokenizer.json").write_text("{}"), "", "?"),
    ("unknown name", lambda m: None, "--model smollm2-136m", "?"),
    ("unknown hub id", lambda m: None, "--model nobody/nothing", "?"),
    ("adapter, base gone", adapter_without_base, "", "?"),
    ("adapter not JSON", as_adapter("{"), "", "?"),
    ("adapter without base", as_adapter('{"peft_type": "LORA"}'), "", "?"),
    ("no room in the window", lambda m: None, "--max_completion_length 512", "?"),
]


@pytest.mark.parametrize(("change", "options", "message"), [row[1:] for row in MODEL], ids=[row[0] for row in MODEL])
def test_models_that_are_wrong(
    here: Path, capsys: pytest.CaptureFixture[str], change: Callable[[Path], Any], options: str, message: str
) -> None:
    change(Path("model"))
    fails(capsys, f"{SFT} {options}", message)


def full(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guards, "free_bytes", lambda path: 2**20)


def not_empty(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("run").mkdir()
    Path("run/notes.txt").write_text("mine")


def is_a_file(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("run").write_text("mine")


def below_a_file(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("parent").write_text("mine")


def raising(number: int, where: str) -> Callable[..., Any]:
    def fail(*_: Any, **__: Any) -> None:
        raise OSError(number, os.strerror(number), where)

    return fail


def read_only(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "mkdir", raising(errno.EROFS, "run"))


def settings_not_written(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = Path.write_text
    fail = raising(errno.EACCES, "run/config.yaml")
    monkeypatch.setattr(Path, "write_text", lambda p, *a, **k: fail() if p.name == "config.yaml" else write(p, *a, **k))


def full_at_checkpoint(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "save_file", raising(errno.ENOSPC, "weights.safetensors"))


def full_at_metrics(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("selfdistill.tracking.MetricsFile.write", raising(errno.ENOSPC, "run/metrics.jsonl"))


def full_at_the_end(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.PreTrainedModel.save_pretrained", raising(errno.ENOSPC, "model.safetensors"))


def no_memory(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB.")

    monkeypatch.setattr("selfdistill.run.Run.step", fail)


def no_host_memory(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise MemoryError

    monkeypatch.setattr("selfdistill.run.Run.step", fail)


MACHINE: list[tuple[Callable[[Path, pytest.MonkeyPatch], None], str, str]] = [
    (not_empty, "", "?"),
    (is_a_file, "", "?"),
    (below_a_file, "--output_dir parent/run", "?"),
    (full, "", "?"),
    (read_only, "", "?"),
    (settings_not_written, "", "?"),
    (full_at_checkpoint, "--save_steps 1", "?"),
    (full_at_metrics, "", "?"),
    (full_at_the_end, "", "?"),
    (no_memory, "", "?"),
    (no_host_memory, "", "?"),
]


@pytest.mark.parametrize(("change", "options", "message"), MACHINE, ids=[row[0].__name__ for row in MACHINE])
def test_machines_that_are_wrong(
    here: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    change: Callable[[Path, pytest.MonkeyPatch], None],
    options: str,
    message: str,
) -> None:
    with monkeypatch.context() as patch:
        change(here, patch)
        fails(capsys, f"{SFT} {options}", message)


def test_keyboard_interrupt(here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("selfdistill.run.Run.step", interrupt)
    fails(capsys, SFT, "interrupted", code=130)


def test_defects_are_not_hidden(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def defect(*_: Any) -> None:
        raise RuntimeError("a defect")

    monkeypatch.setattr("selfdistill.run.Run.step", defect)
    with pytest.raises(RuntimeError, match="a defect"):
        main(shlex.split(SFT))


def trained(arguments: str) -> None:
    assert main(shlex.split(arguments)) == 0


def saved(run: str) -> dict[str, Any]:
    return yaml.safe_load(Path(run, "config.yaml").read_text())


def steps(run: str) -> list[int]:
    return [json.loads(line)["step"] for line in Path(run, "metrics.jsonl").read_text().splitlines()]


def weights(run: str) -> dict[str, torch.Tensor]:
    return load_file(Path(run, "final", "model.safetensors"))


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("method", ["--method sft", "--method sdft --context turns:repeats=2"])
def test_train(here: Path, capsys: pytest.CaptureFixture[str], method: str) -> None:
    trained(f"{TRAIN} {method} --max_steps 2")
    out, err = capsys.readouterr()
    assert out == f"final model: {Path('run/final')}\n"
    assert "Loading weights" not in err
    assert "model shards" not in err
    assert steps("run") == [1, 2]
    AutoModelForCausalLM.from_pretrained("run/final")


def test_train_measures_the_context_where_it_is_auto(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("selfdistill.check.best_context", lambda config: "example:reasoning=false")
    trained(TRAIN)
    assert saved("run")["context"] == "example:reasoning=false"
    trained("train --resume --output_dir run --context auto")  # decided when the run began


def test_chat_template_kwargs(here: Path) -> None:
    trained(f"""{SFT} --chat_template_kwargs '{{"enable_thinking": false, "n": [1]}}'""")
    assert saved("run")["chat_template_kwargs"] == {"enable_thinking": False, "n": [1]}


def test_config_file_is_below_the_command_line_and_reads_back(here: Path) -> None:
    Path("my.yaml").write_text(
        "model: model\ndata: train.jsonl\noutput_dir: run\nmethod: sft\nmax_completion_length: 8\nbatch_size: 2\n"
        "max_steps: 1\nsave_steps: 0\nlearning_rate: 1e-4\nseed: 7\n"
    )
    trained("train --seed 8 --config my.yaml --warmup_steps 3")
    config = saved("run")
    assert (config["seed"], config["warmup_steps"], config["learning_rate"]) == (8, 3, 1e-4)
    trained("train --config run/config.yaml --output_dir again")
    assert saved("again") == config | {"output_dir": "again"}
    assert same(weights("again"), weights("run"))


def test_resume_goes_on_to_the_same_weights(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = f"{SDFT} --max_steps 4 --save_steps 1"
    trained(f"{whole} --output_dir whole")
    with monkeypatch.context() as patch:
        from selfdistill.run import Run

        step = Run.step

        def stops(run: Run, number: int) -> dict[str, float]:
            if number == 2:
                raise KeyboardInterrupt
            return step(run, number)

        patch.setattr(Run, "step", stops)
        assert main(shlex.split(whole)) == 130
    assert steps("run") == [1, 2]
    capsys.readouterr()
    trained("train --resume --output_dir run")
    assert "continuing after step 2" in capsys.readouterr().err
    assert steps("run") == [1, 2, 3, 4]
    assert same(weights("run"), weights("whole"))


def test_resume_takes_the_same_command_and_says_what_changed(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trained(f"{SFT} --save_steps 1 --resume")  # nothing there yet: from the beginning
    assert "max_steps" not in capsys.readouterr().err
    trained(f"{SFT} --save_steps 1 --resume")
    assert steps("run") == [1]
    shutil.move("run", "moved")
    trained("train --output_dir moved --resume --max_steps 2 --save_steps 0 --save_total_limit 1 --logging_steps 2")
    assert capsys.readouterr().err.splitlines()[0].startswith("max_steps")
    assert steps("moved") == [1, 2]
    assert saved("moved")["max_steps"] == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--learning_rate 3", "?"),
        ("--seed 1 --model other --num_train_epochs 9", "?"),
        ("--config other.yaml", "?"),
    ],
)
def test_resume_refuses_other_settings(
    here: Path, capsys: pytest.CaptureFixture[str], options: str, message: str
) -> None:
    trained(SFT)
    shutil.rmtree("run/final")
    Path("other.yaml").write_text("method: sdft\nlearning_rate: null\nmax_steps: null\n")
    fails(capsys, f"train --resume --output_dir run {options}", message)


@pytest.mark.parametrize(
    ("text", "message"), [("model: [", "?"), ("speed: 3\n", "?"), ("model: model\n", "?")], ids=["cut", "unknown", "few"]
)
def test_resume_with_damaged_settings(here: Path, capsys: pytest.CaptureFixture[str], text: str, message: str) -> None:
    Path("run").mkdir()
    Path("run/config.yaml").write_text(text)
    fails(capsys, "train --resume --output_dir run", message)


def test_resume_with_a_damaged_checkpoint(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trained(f"{SFT} --save_steps 1")
    shutil.rmtree("run/final")
    Path("run/checkpoint-00000001/optimizer.safetensors").write_bytes(b"")
    fails(capsys, "train --resume --output_dir run", "?")


def test_eval_writes_json(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trained(f"eval {BASE} --json result.json")
    out, _ = capsys.readouterr()
    assert "new task" in out
    trained(f"eval {BASE} --json - --base model")
    out, err = capsys.readouterr()
    result = json.loads(out)
    assert "new task" in err
    assert result["items"] == 4
    assert result["kl_base"] == pytest.approx(0, abs=1e-5)
    assert json.loads(Path("result.json").read_text()).items() <= result.items()


def test_check_writes_json_and_advises(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = main(shlex.split(f"check {BASE} --sample 2 --contexts turns:repeats=2 example --json -"))
    result = json.loads(capsys.readouterr().out)
    assert code == result["exit_code"]
    assert code in (0, 4)
    assert {layout["context"] for layout in result["layouts"]} == {"turns:repeats=2", "example:reasoning=true"}


def test_demo_is_called(here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def demo(output_dir: str | None, seed: int) -> dict[str, Any]:
        print("a table")
        return {"output_dir": output_dir, "seed": seed}

    monkeypatch.setattr("selfdistill.demo.demo", demo)
    trained("demo --seed 3 --json -")
    out, err = capsys.readouterr()
    assert json.loads(out) == {"output_dir": None, "seed": 3}
    assert err == "a table\n"


FROZEN = {
    "train": "model data method output_dir max_steps batch_size learning_rate temperature max_completion_length context "
    "teacher ema_rate divergence lora_rank seed save_steps resume config",
    "eval": "model data prior base json",
    "check": "model data json",
    "demo": "output_dir seed json",
}


@pytest.mark.parametrize("command", FROZEN)
def test_help_names_every_option(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    kinds: dict[str, Any] = {"train": TrainConfig, "eval": EvalConfig, "check": CheckConfig}
    assert main([command, "--help"]) == 0
    out = capsys.readouterr().out
    names = {*FROZEN[command].split(), *(kinds[command].model_fields if command in kinds else ())}
    assert {name for name in names if f"\n  --{name}" not in out} == set()
    assert "``" not in out


def test_every_setting_has_a_help_text_and_shows_its_default(capsys: pytest.CaptureFixture[str]) -> None:
    assert [name for name, field in TrainConfig.model_fields.items() if not field.description] == []
    main(["train", "--help"])
    out = " ".join(capsys.readouterr().out.split())
    assert "Peak. Default 1e-5, or 1e-4 with LoRA" in out
    assert "default: forward_kl)" in out
    assert "(required)" in out


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", "import sys; from selfdistill.cli import main; sys.exit(main())", *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


def test_help_is_fast_and_imports_nothing_heavy() -> None:
    code = "import sys; from selfdistill.cli import main; main(['--help']); print(*sys.modules, file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert {"torch", "transformers", "datasets", "numpy", "rich"}.isdisjoint(done.stderr.split())
    assert all(f"\n    {command} " in done.stdout for command in FROZEN)


def test_process_prints_one_line_and_exits_with_2(here: Path) -> None:
    done = run(*shlex.split(SFT), "--data", "none.jsonl")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("selfdistill: error: none.jsonl: no such file or folder (looked from ")
    assert done.stderr.count("\n") == 1


def test_process_trains_without_noise(here: Path) -> None:
    done = run(*shlex.split(SFT))
    assert (done.returncode, done.stdout) == (0, f"final model: {Path('run/final')}\n")
    assert [line.split()[0] for line in done.stderr.splitlines()] == ["sft", "model:", "step"]


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    from selfdistill import __version__

    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"selfdistill {__version__}\n"
