"""The command line: what a user can get wrong is one line and exit code 2; what is right trains, resumes, measures."""

from __future__ import annotations

import errno
import importlib
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BertConfig, BertForMaskedLM

from selfdistill.cli import main
from selfdistill.cli_parser import COMMANDS, MAIN, TOPICS, parse
from selfdistill.config.commands import CheckConfig, CompareConfig, EvalConfig
from selfdistill.config.method import MethodName
from selfdistill.config.train import TrainConfig
from selfdistill.data.contexts import CONTEXTS
from selfdistill.errors import UserError
from selfdistill.training import checkpoint, disk

ROWS = [{"prompt": f"q{i}", "completion": "ab" * (1 + i % 3)} for i in range(4)]
BASE = "--model model --data train.jsonl --max_completion_length 8 --batch_size 2"
TRAIN = f"train {BASE} --output_dir run --max_steps 1 --save_steps 0"
SFT = f"{TRAIN} --method sft"
SDFT = f"{TRAIN} --context turns"


@pytest.fixture
def here(tmp_path: Path, model_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to work in, with a tiny ``model`` of one layer and ``train.jsonl``."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(model_folder(layers=1), "model")
    jsonl("train.jsonl", ROWS)
    return tmp_path


METHODS = f"{', '.join(get_args(MethodName))} or python:package.module.function"


def jsonl(name: str, rows: list[Any]) -> None:
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def fails(capsys: pytest.CaptureFixture[str], arguments: str, message: str, code: int = 2) -> None:
    """``message`` is the whole error; where it ends with ``...`` a library's words or more rows follow."""
    capsys.readouterr()
    assert main(shlex.split(arguments)) == code
    out, err = capsys.readouterr()
    lines = [line for line in err.splitlines() if not line.startswith("note: ")]
    start = "selfdistill: " if code > 128 else "selfdistill: error: "
    assert lines[-1].startswith(start)
    found = lines[-1].removeprefix(start)
    if message.endswith("..."):
        assert found.startswith(message[:-3])
        assert len(found) > len(message)
    else:
        assert found == message
    assert sum(line.startswith(start) for line in lines) == 1
    assert "Traceback" not in out + err
    assert "final model" not in out


ROW = '{"prompt": "q", "completion": "a"}\n'
DATA: list[tuple[str, str | bytes | None, str, str]] = [
    # name of the file, its content (None: no such file), the rest of the command, message
    ("none.jsonl", None, SFT, "none.jsonl: no such file or folder (looked from HERE); check the path"),
    ("empty.jsonl", "", SFT, "empty.jsonl: no rows, expected at least one"),
    ("json.jsonl", ROW + '{"prompt": "q", \n', SFT, "json.jsonl: 1 bad row: line 2, invalid JSON at character 17: ..."),
    (
        "latin.jsonl",
        b'{"prompt": "\xe9", "completion": "a"}\n',
        SFT,
        "latin.jsonl: not UTF-8: line 1, byte 13 is 0xe9; save it as UTF-8",
    ),
    (
        "column.jsonl",
        '{"prompt": "q", "response": "a"}\n',
        SFT,
        "column.jsonl: 1 bad row: line 1, column 'completion': missing, found 'response'; rename it to 'completion'",
    ),
    (
        "mixed.jsonl",
        ROW + '{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}',
        SFT,
        "mixed.jsonl: 1 bad row: line 2, has 'messages' but line 1 has 'prompt'; use one form in the whole set",
    ),
    (
        "many.jsonl",
        '{"prompt": "q", "completion": ""}\n' * 12,
        SFT,
        "many.jsonl: all 12 rows: column 'completion': found empty text, expected text or a list of one assistant "
        "message",
    ),
    (
        "null.jsonl",
        '{"prompt": null, "completion": "a"}\n',
        SFT,
        "null.jsonl: 1 bad row: line 1, column 'prompt': found null, expected text or a list of messages",
    ),
    ("list.json", '{"prompt": "q", "completion": "a"}', SFT, "list.json: found an object, expected a list of rows"),
    (
        "rows.arrow",
        b"ARROW1",
        SFT,
        "rows.arrow: cannot read file type '.arrow', expected .jsonl, .json, .csv, .tsv or .parquet (text also "
        "compressed as .gz or .zst)",
    ),
    ("damaged.parquet", b"PAR1 nothing", SFT, "damaged.parquet: not a readable parquet file: ..."),
    (
        "folder/readme.txt",
        "no rows",
        SFT.replace("train.jsonl", "folder"),
        "folder: no .jsonl, .json, .csv, .tsv or .parquet (text also compressed as .gz or .zst) file in this folder, "
        "in its subfolder data, or in one named after a split",
    ),
    (
        "long.jsonl",
        json.dumps({"prompt": "q" * 600, "completion": "a"}),
        SFT,
        "1 of 1 rows do not fit: long.jsonl:1: prompt has 619 tokens, limit 504; "
        "shorten the prompts (the context window is 512 tokens), or drop them with on_long_prompt drop",
    ),
    (
        "long.jsonl",
        json.dumps({"prompt": "q" * 300, "completion": "a"}),
        SDFT,
        "1 of 1 rows do not fit: long.jsonl:1: teacher's prompt has 641 tokens, limit 504; "
        "choose a shorter context, or drop them with on_long_prompt drop",
    ),
    (
        "long.jsonl",
        json.dumps({"prompt": "q" * 233, "completion": "a"}),
        SDFT,
        "1 of 1 rows do not fit: long.jsonl:1: teacher's prompt has 507 tokens, limit 504; "
        "lower max_completion_length (the context window is 512 tokens), "
        "choose a shorter context, or drop them with on_long_prompt drop",
    ),
    (
        "long.jsonl",
        json.dumps({"prompt": "q" * 600, "completion": "a"}),
        SDFT + " --max_prompt_length 20",
        "1 of 1 rows do not fit: long.jsonl:1: prompt has 619 tokens, limit 20; "
        "shorten the prompts (the context window is 512 tokens), or drop them with on_long_prompt drop",
    ),
    (
        "short.jsonl",
        ROW,
        SFT + " --max_prompt_length 3",
        "1 of 1 rows do not fit: short.jsonl:1: prompt has 20 tokens, limit 3; raise max_prompt_length, "
        "or drop them with on_long_prompt drop",
    ),
    (
        "reply.jsonl",
        '{"prompt": "q", "completion": "aaaaaaaaaa"}\n',
        SFT,
        "1 of 1 rows do not fit: reply.jsonl:1: completion has 11 tokens, limit 8 (max_completion_length); "
        "raise max_completion_length, or drop them with on_long_prompt drop",
    ),
    (
        "reply.jsonl",
        json.dumps({"prompt": "q", "completion": "a" * 600}),
        SFT,
        "1 of 1 rows do not fit: reply.jsonl:1: completion has 601 tokens, limit 8 (max_completion_length); "
        "shorten the completions (the context window is 512 tokens), or drop them with on_long_prompt drop",
    ),
    (
        "reply.jsonl",
        '{"prompt": "q", "completion": "aaaaaaaaaa"}\n',
        SFT + " --on_long_prompt drop",
        "1 of 1 rows do not fit: reply.jsonl:1: completion has 11 tokens, limit 8 (max_completion_length); "
        "raise max_completion_length",
    ),
    (
        "train.jsonl",
        ROW,
        SFT + " --max_completion_length 600",
        "setting 'max_completion_length': 600 leaves no room for a prompt in the model's context window of 512 tokens",
    ),
    (
        "train.jsonl",
        ROW,
        SDFT + " --context document",
        "train.jsonl: 1 bad row: line 1, column 'document': missing, which context 'document' shows the teacher; add "
        "it or use another context",
    ),
    (
        "train.jsonl",
        ROW,
        SDFT + " --context few_shot:k=3",
        "context 'few_shot' needs 3 other demonstrations, found 0; lower k or add rows",
    ),
    (
        "train.jsonl",
        ROW,
        SDFT + " --context turn",
        f"unknown context 'turn', expected one of {', '.join(CONTEXTS)}; did you mean turns?",
    ),
    (
        "train.jsonl",
        ROW,
        SDFT + " --context turns:repeat=2",
        "context 'turns:repeat=2': turns has no option 'repeat'; its options are repeats, show; did you mean repeats?",
    ),
    (
        "train.jsonl",
        ROW,
        SDFT + " --context turns:repeats=0",
        "context 'turns:repeats=0': option 'repeats': found '0', expected an integer of 1 or more",
    ),
    (
        "train.jsonl",
        ROW,
        SDFT + " --context example:reasoning=yes",
        "context 'example:reasoning=yes': option 'reasoning': found 'yes', expected true or false",
    ),
    (
        "train.jsonl",
        ROW,
        SDFT + " --context template",
        "context 'template' needs a template file; write template:file=PATH",
    ),
    (
        "train.jsonl",
        ROW,
        SDFT + " --context template:file=none.txt",
        "context 'template': cannot read file 'none.txt' (No such file or directory)",
    ),
    (
        "template.txt",
        "Look: {demonstration}",
        SDFT + " --data train.jsonl --context template:file=template.txt",
        "context 'template': template.txt has no {prompt}, so the question would be missing",
    ),
    (
        "template.txt",
        "{document} {prompt}",
        SDFT + " --data train.jsonl --context template:file=template.txt",
        "train.jsonl: all 4 rows: column 'document': missing, which context 'template' shows the teacher; add it or "
        "use another context",
    ),
    (
        "template.txt",
        "Answer this: {prompt}",
        SDFT + " --data train.jsonl --context template:file=template.txt",
        "context 'template': template.txt has neither {demonstration} nor {document}, so the teacher would see "
        "the same as the student",
    ),
    (
        "train.jsonl",
        ROW,
        SFT + " --split test --data folder-that-is-not",
        "folder-that-is-not: no such file, and the hub was not asked for a data set, because offline mode "
        "(HF_HUB_OFFLINE) is on",
    ),
    (
        "train.jsonl",
        ROW,
        SFT + """ --chat_template_kwargs '{"hint": [], "tokenize": true}'""",
        "setting 'chat_template_kwargs': 'tokenize' is reserved; leave it out",
    ),
]


@pytest.mark.parametrize(
    ("name", "content", "command", "message"), DATA, ids=[f"{i}-{row[0]}" for i, row in enumerate(DATA)]
)
def test_data_that_is_wrong(
    here: Path, capsys: pytest.CaptureFixture[str], name: str, content: str | bytes | None, command: str, message: str
) -> None:
    if content is not None:
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_bytes(content if isinstance(content, bytes) else content.encode())
    if "--data train.jsonl" in command and name.endswith((".jsonl", ".json", ".arrow", ".parquet")):
        command = command.replace("--data train.jsonl", f"--data {name}")
    fails(capsys, command, message.replace("HERE", str(here)))


CONFIG: list[tuple[str, str]] = [
    ("", "no command, expected one of demo, check, train, ask, eval, compare, learn, questions, report, export, merge"),
    (
        "trian",
        "unknown command 'trian', expected one of demo, check, train, ask, eval, compare, learn, questions, report, "
        "export, merge; did you mean train?",
    ),
    (
        "train",
        "setting 'model' is required: folder, hub id or smollm2-135m (the starter model, downloaded once from the "
        "package index); setting 'output_dir' is required: the run folder",
    ),
    (
        f"compare --test d.jsonl {BASE}",
        "setting 'output_dir' is required: folder of the comparison, with a run folder for each run",
    ),
    (
        "learn add d.jsonl --state s --model model --stop_on_collapse",
        "setting 'stop_on_collapse' is for train and compare; learn has gates instead",
    ),
    (
        f"{SFT} --method isdft --pull 2",
        """unknown option --pull; write this setting of isdft as --method_settings '{"pull": 2}'""",
    ),
    (
        f"{SFT} --method=sdpo --show=both",
        """unknown option --show; write this setting of sdpo as --method_settings '{"show": "both"}'""",
    ),
    (f"{SFT} --method sdft --pull 2", "unknown option --pull; it is a setting of isdft"),
    ("eval --model m --data d.jsonl --pull 2", "unknown option --pull; see --help for the names"),
    (f"{SFT} --margin 2", "unknown option --margin; see --help for the names"),
    (f"{SFT} --temp 2", "unknown option --temp; did you mean --temperature?"),
    (f"{SFT} --lr 3", "unknown option --lr; did you mean --learning_rate?"),
    (f"{SFT} --learning_rte 3", "unknown option --learning_rte; did you mean --learning_rate?"),
    (f"{SFT} --learning-rate=3", "unknown option --learning-rate; did you mean --learning_rate?"),
    (f"{SFT} --learning_r 3", "unknown option --learning_r; did you mean --learning_rate?"),
    (f"{SFT} extra", "unknown argument extra; see --help for the names"),
    (f"{SFT} --model", "--model: expected one argument"),
    (f"{SFT} --method sdtf", f"setting 'method': found 'sdtf', expected: {METHODS}; did you mean sdft?"),
    (f"{SFT} --method ppo", "setting 'method': found 'ppo', expected: sdft, sft, dft, cpt, ..."),
    (f"{SFT} --max_steps 1.5", "setting 'max_steps': found '1.5', expected: a whole number"),
    (f"{SFT} --max_steps -3", "setting 'max_steps': found -3, expected: 1 or more"),
    (f"{SFT} --learning_rate fast", "setting 'learning_rate': found 'fast', expected: a number"),
    (f"{SFT} --learning_rate 0", "setting 'learning_rate': found 0.0, expected: a number above 0"),
    (f"{SFT} --learning_rate inf", "setting 'learning_rate': found 'inf', expected: a finite number"),
    (f"{SFT} --temperature nan", "setting 'temperature': found 'nan', expected: a finite number"),
    (f"{SFT} --top_p 1.5", "setting 'top_p': found 1.5, expected: 1 or less"),
    (
        f"{SFT} --lora_alpha 8",
        "setting 'lora_alpha' needs an adapter: add lora_rank, or leave it out",
    ),
    (
        f"{SFT} --gradient_checkpointing true --torch_compile true",
        "setting 'torch_compile' does not work with gradient_checkpointing: leave one of them out",
    ),
    (
        f"{SFT} --gradient_checkpointing perhaps",
        "setting 'gradient_checkpointing': found 'perhaps', expected: true or false",
    ),
    (
        f"{SFT} --chat_template_kwargs '{{thinking'",
        "setting 'chat_template_kwargs': found '{thinking', expected: an object such as {\"enable_thinking\": false}",
    ),
    (
        f"{SFT} --batch_size 0 --ema_rate 2",
        "setting 'batch_size': found 0, expected: 1 or more; setting 'ema_rate': found 2.0, expected: 1 or less",
    ),
    (
        f"{SFT} --batch_size 5 --gradient_accumulation_steps 2",
        "setting 'gradient_accumulation_steps': 2 does not divide batch_size 5",
    ),
    (
        f"{SFT} --importance_cap 2 --top_p 0.9",
        "setting 'importance_cap' needs samples from the full distribution: use top_p 1 and top_k 0",
    ),
    (
        f"{SFT} --support sampled",
        "setting 'support': 'sampled' is the policy gradient of reverse_kl, found divergence 'forward_kl': "
        "add divergence reverse_kl",
    ),
    *(
        (
            f"{SFT} --support sampled --divergence reverse_kl {options}",
            "setting 'support': 'sampled' needs untempered samples of the student: use temperature 1, top_p 1 and "
            "top_k 0",
        )
        for options in ("--temperature 0.9", "--top_p 0.9", "--top_k 50")
    ),
    (
        f"{SDFT} --scorer exakt",
        "setting 'scorer': found 'exakt', expected: exact, contains, choice, regex, tool_call, code, judge or "
        "python:package.module.function; did you mean exact?",
    ),
    (
        f"{SDFT} --skip_first_tokens 3",
        "skip_first_tokens: 3 would mask 12 of 18 completion tokens and all of 2 of 4 completions; set it to "
        "at most 2 or use longer completions",
    ),
    (f"{SFT} --config none.yaml", "none.yaml: no such file (looked from HERE); check the path"),
    (
        f"{SFT} --config broken.yaml",
        "broken.yaml: not a valid YAML file: line 2, column 1: while parsing a flow sequence, expected ',' or ']', but "
        "got '<stream end>'",
    ),
    (f"{SFT} --config latin.yaml", "latin.yaml: not a valid YAML file: ..."),
    (f"{SFT} --config nowhen.yaml", "nowhen.yaml: not a valid YAML file: month must be in 1..12"),
    (f"{SFT} --config deep.yaml", "deep.yaml: not a valid YAML file: nested too deeply"),
    (f"{SFT} --config list.yaml", "list.yaml: found a list, expected a mapping of setting names to values"),
    (f"{SFT} --config empty.yaml", "empty.yaml: found nothing, expected a mapping of setting names to values"),
    (f"{SFT} --config unknown.yaml", "unknown.yaml: unknown setting 'learning_rte'; did you mean learning_rate?"),
    (f"{SFT} --config type.yaml", "setting 'warmup_steps': found 'many', expected: a whole number"),
    (f"train {BASE} --resume", "--resume needs the run folder: give --output_dir"),
    (f"{SFT} --resume maybe", "option --resume: found 'maybe', expected true, false or no value"),
    (
        "train --resume --output_dir nowhere",
        "nowhere/config.yaml: no such file, so there is no run to resume; check output_dir",
    ),
    ("learn add --data x", "learn takes data without --data: selfdistill learn ACTION DATA"),
    ("learn add --data=x --state s", "learn takes data without --data: selfdistill learn ACTION DATA"),
    ("learn --action add x", "learn takes action without --action: selfdistill learn ACTION DATA"),
    ("export --run r", "export takes run without --run: selfdistill export RUN"),
    ("report --runs a b", "report takes runs without --runs: selfdistill report RUNS"),
    ("ask r --question hi", "ask takes question without --question: selfdistill ask RUN QUESTION"),
    (f"check {BASE} --context turns", "unknown option --context; did you mean --contexts?"),
    (f"check {BASE} --contexts", "--contexts: expected at least one argument"),
    (
        f"check {BASE} --contexts turns nonsense",
        f"unknown context 'nonsense', expected one of {', '.join(CONTEXTS)}",
    ),
    (f"check {BASE} --sample 1", "setting 'sample': found 1, expected: 2 or more"),
    (f"check {BASE} --output_dir run", "unknown option --output_dir; see --help for the names"),
    (
        f"eval {BASE} --scorer exakt",
        "setting 'scorer': found 'exakt', expected: exact, contains, choice, regex, tool_call, code, judge or "
        "python:package.module.function; did you mean exact?",
    ),
    (f"eval {BASE} --prior none", "prior 'none': no such .jsonl file, or a folder without any; check the path"),
    (f"eval {BASE} --base none/model/here", "model 'none/model/here': no such folder"),
    (
        f"eval {BASE} --json nowhere/result.json",
        "--json nowhere/result.json: cannot be written; give a file in an existing folder, or -",
    ),
    (
        "learn --state state",
        "no action: give one of add, stream, status, history, rollback, restore, discard, export after learn, even "
        "with --config; see selfdistill learn --help",
    ),
    (
        "compare --model m --data d.jsonl --test t.jsonl --methods sft sdft grpo --output_dir out",
        "option --methods takes several values with commas between them: --methods sft,sdft,grpo",
    ),
    ("demo --seed x", "setting 'seed': found 'x', expected: a whole number"),
    ("demo --seed -1", "setting 'seed': found -1, expected: 0 or more"),
]


@pytest.mark.parametrize(
    ("command", "message"), CONFIG, ids=[row[0].replace(SFT, "sft").replace(BASE, "") for row in CONFIG]
)
def test_settings_that_are_wrong(here: Path, capsys: pytest.CaptureFixture[str], command: str, message: str) -> None:
    Path("broken.yaml").write_text("max_steps: [1\n")
    Path("latin.yaml").write_bytes(b"split: \xe9\n")
    Path("nowhen.yaml").write_text("template_date: 2026-13-01\n")
    Path("deep.yaml").write_text(f"vary: {'[' * 5000}")
    Path("list.yaml").write_text("- max_steps\n")
    Path("empty.yaml").write_text("")
    Path("unknown.yaml").write_text("learning_rte: 1\n")
    Path("type.yaml").write_text("warmup_steps: many\n")
    fails(capsys, command, message.replace("HERE", str(here)))


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
    (model / "chat_template.jinja").unlink()  # whose end of turn would do


def missing_weights(model: Path) -> None:
    weights = load_file(model / "model.safetensors")
    weights.pop("model.norm.weight")
    save_file(weights, model / "model.safetensors", {"format": "pt"})


def other_shape(model: Path) -> None:
    values = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(values | {"hidden_size": 64}))


def adapter_without_base(model: Path) -> None:
    (model / "config.json").unlink()
    (model / "model.safetensors").rename(model / "adapter_model.safetensors")
    (model / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "base_model_name_or_path": "gone/gone/gone"})
    )


def pickled_adapter(model: Path) -> None:
    adapter_without_base(model)
    (model / "adapter_model.safetensors").rename(model / "adapter_model.bin")


def as_adapter(text: str) -> Callable[[Path], Any]:
    def change(model: Path) -> None:
        (model / "adapter_config.json").write_text(text)
        shutil.copy(model / "model.safetensors", model / "adapter_model.safetensors")

    return change


MODEL: list[tuple[str, Callable[[Path], Any], str, str]] = [
    ("no folder", lambda m: shutil.rmtree(m), "--model ./model", "model './model': no such folder"),
    (
        "a file",
        lambda m: None,
        "--model train.jsonl",
        "model 'train.jsonl': this is a file; give the folder that holds config.json and the weights",
    ),
    (
        "empty folder",
        lambda m: (shutil.rmtree(m), m.mkdir()),
        "",
        "model 'model': the folder has neither config.json nor adapter_config.json",
    ),
    (
        "unfinished run",
        lambda m: (shutil.rmtree(m), m.mkdir(), (m / "config.yaml").touch()),
        "",
        "model 'model': a run folder without a final model; resume its training",
    ),
    (
        "no config.json",
        lambda m: (m / "config.json").unlink(),
        "",
        "model 'model': the folder has neither config.json nor adapter_config.json",
    ),
    (
        "config.json is not JSON",
        lambda m: (m / "config.json").write_text("{"),
        "",
        "model 'model': config.json cannot be read: ...",
    ),
    (
        "unknown architecture",
        lambda m: (m / "config.json").write_text('{"model_type": "llamma"}'),
        "",
        "model 'model': The checkpoint you are trying to load has model type `llamma`...",
    ),
    (
        "own code",
        lambda m: (m / "config.json").write_text('{"model_type": "x", "auto_map": {"AutoConfig": "c.C"}}'),
        "",
        "model 'model': needs code from its own folder, which is never run",
    ),
    ("not causal", not_causal, "", "model 'model': BertForMaskedLM is not a causal language model; use one"),
    ("no weights", lambda m: (m / "model.safetensors").unlink(), "", "model 'model': cannot be loaded: ..."),
    (
        "only pickle",
        only_pickle,
        "",
        "model 'model': its weights are pickled (.bin), which can run code; convert them to safetensors",
    ),
    (
        "damaged weights",
        lambda m: (m / "model.safetensors").write_bytes(b"nothing"),
        "",
        "model 'model': cannot be loaded: ...",
    ),
    (
        "cut weights",
        lambda m: (m / "model.safetensors").write_bytes((m / "model.safetensors").read_bytes()[:-64]),
        "",
        "model 'model': cannot be loaded: ...",
    ),
    (
        "missing weights",
        missing_weights,
        "",
        "model 'model': weights are missing or have a different shape from config.json: model.norm.weight",
    ),
    (
        "other shape",
        other_shape,
        "",
        "model 'model': weights are missing or have a different shape from config.json: lm_head.weight and 11 more",
    ),
    (
        "no end token",
        no_end_token,
        "",
        "model 'model': neither the tokenizer nor generation_config.json names an end token, so replies "
        "would never stop; set eos_token in tokenizer_config.json",
    ),
    (
        "no tokenizer",
        lambda m: [(m / n).unlink() for n in ("tokenizer.json", "tokenizer_config.json")],
        "",
        "model 'model': no usable tokenizer in tokenizer.json and tokenizer_config.json (...",
    ),
    (
        "damaged tokenizer",
        lambda m: (m / "tokenizer.json").write_text("{}"),
        "",
        "model 'model': no usable tokenizer in tokenizer.json and tokenizer_config.json (...",
    ),
    (
        "unknown name",
        lambda m: None,
        "--model smollm2-136m",
        "model 'smollm2-136m': no such folder, and the model hub was not asked, because offline mode "
        "(HF_HUB_OFFLINE) is on; give a folder, a hub id or one of: smollm2-135m",
    ),
    (
        "misspelt folder",
        lambda m: (m / "final").mkdir(),
        "--model model/finl",
        "model 'model/finl': no such folder; did you mean final?",
    ),
    (
        "unknown hub id",
        lambda m: None,
        "--model nobody/nothing",
        "model 'nobody/nothing': no such folder, and the model hub was not asked, because offline mode "
        "(HF_HUB_OFFLINE) is on; give a folder, a hub id or one of: smollm2-135m",
    ),
    (
        "adapter, base gone",
        adapter_without_base,
        "",
        "model 'model': an adapter whose base cannot be loaded: model 'gone/gone/gone': no such folder; if it was "
        "moved, give its new location as adapter_base",
    ),
    (
        "adapter pickled",
        pickled_adapter,
        "",
        "model 'model': the adapter has no adapter_model.safetensors, and pickled weights (.bin) are never read, "
        "because they can run code; convert them to safetensors",
    ),
    ("adapter not JSON", as_adapter("{"), "", "model 'model': cannot be loaded: ..."),
    (
        "adapter without base",
        as_adapter('{"peft_type": "LORA"}'),
        "",
        "model 'model': adapter_config.json names no base model; give it as adapter_base",
    ),
    (
        "no room in the window",
        lambda m: None,
        "--max_completion_length 512",
        "setting 'max_completion_length': 512 leaves no room for a prompt in the model's context window of 512 tokens",
    ),
]


@pytest.mark.parametrize(("change", "options", "message"), [row[1:] for row in MODEL], ids=[row[0] for row in MODEL])
def test_models_that_are_wrong(
    here: Path, capsys: pytest.CaptureFixture[str], change: Callable[[Path], Any], options: str, message: str
) -> None:
    change(Path("model"))
    fails(capsys, f"{SFT} {options}", message)


def full(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk, "free_bytes", lambda path: 0)


def not_empty(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("run").mkdir()
    Path("run/notes.txt").write_text("mine")


def is_a_file(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("run").write_text("mine")


def below_a_file(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("parent").write_text("mine")


def of_another_user(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("theirs").mkdir()
    # Root, who runs some tests, may write everything.
    monkeypatch.setattr("selfdistill.runtime.files.os.access", lambda path, _: Path(path).name != "theirs")
    monkeypatch.setattr("selfdistill.training.trainer.Trainer.__init__", lambda *_: pytest.fail("its model is loaded"))


def raising(number: int, where: str) -> Callable[..., Any]:
    def fail(*_: Any, **__: Any) -> None:
        raise OSError(number, os.strerror(number), where)

    return fail


def read_only(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "mkdir", raising(errno.EROFS, "run"))


def settings_not_written(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = Path.write_text
    fail = raising(errno.EACCES, "run/config.yaml")
    monkeypatch.setattr(Path, "write_text", lambda p, *a, **k: fail() if "config.yaml" in p.name else write(p, *a, **k))


def full_at_checkpoint(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "save_file", raising(errno.ENOSPC, "weights.safetensors"))


def full_at_metrics(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("selfdistill.runtime.tracking.MetricsFile.write", raising(errno.ENOSPC, "run/metrics.jsonl"))


def full_at_the_end(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.PreTrainedModel.save_pretrained", raising(errno.ENOSPC, "model.safetensors"))


def no_memory(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB.")

    monkeypatch.setattr("selfdistill.training.trainer.Trainer.step", fail)


def memory_reserved(size: str) -> Callable[[Path, pytest.MonkeyPatch], None]:
    def fail(*_: Any) -> None:
        raise torch.OutOfMemoryError(
            "CUDA out of memory. Tried to allocate 9.00 GiB. GPU 0 has a total capacity of 79.10 GiB of which 5.20 GiB "
            f"is free. Of the allocated memory 58.10 GiB is allocated by PyTorch, and {size} is reserved by PyTorch "
            "but unallocated. If reserved but unallocated memory is large try setting "
            "PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True to avoid fragmentation.  See documentation"
        )

    def memory_in_pieces(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("selfdistill.training.trainer.Trainer.step", fail)

    return memory_in_pieces


def cannot_repeat(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError(
            "put_ does not have a deterministic implementation, but you set 'torch.use_deterministic_algorithms'. "
            "You can turn it off."
        )

    monkeypatch.setattr("selfdistill.training.trainer.Trainer.step", fail)


def used_before(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError(
            "Deterministic behavior was enabled with either `torch.use_deterministic_algorithms(True)` or "
            "`at::Context::setDeterministicAlgorithms(true)`, but this operation is not deterministic because it uses "
            "CuBLAS and you have CUDA >= 10.2. To enable deterministic behavior in this case, you must set an "
            "environment variable before running your PyTorch application"
        )

    monkeypatch.setattr("selfdistill.training.trainer.Trainer.step", fail)


def no_host_memory(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise MemoryError

    monkeypatch.setattr("selfdistill.training.trainer.Trainer.step", fail)


MACHINE: list[tuple[Callable[[Path, pytest.MonkeyPatch], None], str, str]] = [
    (not_empty, "", "output_dir 'run' exists and is not empty: choose another, or continue it with --resume"),
    (is_a_file, "", "output_dir 'run' is a file: choose another name"),
    (
        below_a_file,
        "--output_dir parent/run",
        "output_dir 'parent/run': HERE/parent is not a folder that you may write to; choose another place",
    ),
    (
        of_another_user,
        "--output_dir theirs/run",
        "output_dir 'theirs/run': HERE/theirs is not a folder that you may write to; choose another place",
    ),
    (full, "", "run: 0.0 MiB free, the final model needs about 0.1 MiB; free some space"),
    (
        full,
        "--save_steps 1 --save_total_limit 3",
        "run: 0.0 MiB free, checkpoints and the final model need about 1.3 MiB; free some space, lower "
        "save_total_limit, or use save_steps 0 to save only the final model",
    ),
    (read_only, "", "output_dir 'run': cannot be written (Read-only file system)"),
    (settings_not_written, "", "output_dir 'run': cannot be written (Permission denied)"),
    (
        full_at_checkpoint,
        "--save_steps 1",
        "run/checkpoint-00000001: cannot write the checkpoint ([Errno 28] No space left on device: "
        "'weights.safetensors'); earlier checkpoints are intact. Free disk space, then continue with --resume",
    ),
    (full_at_metrics, "", "run/metrics.jsonl: No space left on device; free some space or choose another place"),
    (
        full_at_the_end,
        "",
        "run/final: cannot write the model ([Errno 28] No space left on device: 'model.safetensors'); free "
        "disk space, then continue with --resume, which needs a checkpoint (save_steps)",
    ),
    (
        no_memory,
        "",
        "out of memory: raise --gradient_accumulation_steps to 2 (also with --resume), or lower "
        "--max_completion_length; checkpoints are intact",
    ),
    *(
        (
            memory_reserved(size),
            "",
            "out of memory: raise --gradient_accumulation_steps to 2 (also with --resume), or lower "
            "--max_completion_length; checkpoints are intact",
        )
        for size in ("0 bytes", "512.50 KiB")
    ),
    (
        memory_reserved("13.50 GiB"),
        "",
        "out of memory: raise --gradient_accumulation_steps to 2 (also with --resume), or lower "
        "--max_completion_length; 13.50 GiB were reserved but not in use, so "
        "PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True in the environment may help; checkpoints are intact",
    ),
    (
        cannot_repeat,
        "--deterministic true",
        "setting 'deterministic': put_ does not have a deterministic implementation; leave it out",
    ),
    (
        used_before,
        "--deterministic true",
        "setting 'deterministic': found cuBLAS already in use; set CUBLAS_WORKSPACE_CONFIG=:4096:8 in the environment",
    ),
    (
        no_memory,
        "--gradient_accumulation_steps 2",
        "out of memory: raise --gradient_accumulation_steps (also with --resume), or lower --max_completion_length; "
        "checkpoints are intact",
    ),
    (
        no_host_memory,
        "",
        "out of memory: raise --gradient_accumulation_steps to 2 (also with --resume), or lower "
        "--max_completion_length; checkpoints are intact",
    ),
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
        fails(capsys, f"{SFT} {options}", message.replace("HERE", str(here)))


SAVING = [
    (
        f"check {BASE}",
        "api.check",
        "lower --batch_size, --sample or --max_completion_length, or use --dtype bfloat16",
    ),
    (f"eval {BASE}", "api.evaluate", "lower --batch_size or --max_completion_length, or use --dtype bfloat16"),
    ("ask model Why?", "api.ask", "lower --max_completion_length, or use --dtype bfloat16"),
    (
        "questions --model model --documents here --output_dir there",
        "api.make_questions",
        "lower --batch_size, or use --dtype bfloat16",
    ),
    ("export run --output_dir there", "api.export", "free some of the machine's memory"),
]


@pytest.mark.parametrize(("arguments", "function", "advice"), SAVING, ids=[row[1] for row in SAVING])
def test_out_of_memory_names_settings_that_the_command_has(
    here: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    arguments: str,
    function: str,
    advice: str,
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")

    monkeypatch.setattr(f"selfdistill.{function}", fail)
    fails(capsys, arguments, f"out of memory: {advice}")
    known = COMMANDS[arguments.split()[0]][0].model_fields
    assert all(name in known for name in re.findall(r"--(\w+)", advice))


def test_a_check_that_runs_out_of_memory_while_it_measures(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB.")

    monkeypatch.setattr("selfdistill.evaluation.measure.Measure.cost", fail)
    fails(capsys, f"check {BASE} --sample 2 --contexts turns --mixed_precision no", f"out of memory: {SAVING[0][2]}")


def test_keyboard_interrupt(here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("selfdistill.training.trainer.Trainer.step", interrupt)
    fails(capsys, SFT, "interrupted", code=130)


def test_defects_are_not_hidden(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def defect(*_: Any) -> None:
        raise RuntimeError("a defect")

    monkeypatch.setattr("selfdistill.training.trainer.Trainer.step", defect)
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


def test_an_adapter_is_trained_and_measured(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trained(f"{SFT} --lora_rank 2")
    assert saved("run")["learning_rate"] == 1e-4
    trained(f"eval {BASE} --model run --base model --json -")
    assert json.loads(capsys.readouterr().out.split("\n", 1)[1])["kl_base"] > 0
    shutil.move("model", "elsewhere")
    fails(
        capsys,
        f"eval {BASE} --model run/final",
        f"model 'run/final': an adapter whose base cannot be loaded: model '{here}/model': no such folder; if it was "
        "moved, give its new location as adapter_base",
    )
    trained(f"eval {BASE} --model run/final --adapter_base elsewhere")
    trained("ask run Hello --adapter_base elsewhere --max_completion_length 4")
    trained("export run --output_dir out --merge true --adapter_base elsewhere")
    fails(
        capsys,
        f"eval {BASE} --model run/final --adapter_base gone/gone/gone",
        "model 'run/final': an adapter whose base cannot be loaded: model 'gone/gone/gone': no such folder",
    )


def test_train_measures_the_context_where_it_is_auto(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    train_module = importlib.import_module("selfdistill.training.train")  # the package has a function of this name
    monkeypatch.setattr(train_module, "best_context", lambda *_: "example:reasoning=false")
    trained(f"{TRAIN} --save_steps 1")
    assert saved("run")["context"] == "example:reasoning=false"
    trained("train --resume --output_dir run --context auto")  # decided when the run began


def test_chat_template_kwargs(here: Path) -> None:
    trained(f"""{SFT} --chat_template_kwargs '{{"enable_thinking": false, "n": [1]}}'""")
    assert saved("run")["chat_template_kwargs"] == {"enable_thinking": False, "n": [1]}


def test_config_file_is_below_the_command_line_and_reads_back(here: Path) -> None:
    Path("my.yaml").write_text(
        "model: model\ndata: train.jsonl\noutput_dir: run\nmethod: sft\nmax_completion_length: 8\nbatch_size: 2\n"
        "max_steps: 1\nsave_steps: 0\nlearning_rate: 1e-4\nseed: 7\nmixed_precision: no\n"  # which YAML reads as false
    )
    trained("train --seed 8 --config my.yaml --warmup_steps 3")
    config = saved("run")
    assert (config["seed"], config["warmup_steps"], config["learning_rate"]) == (8, 3, 1e-4)
    assert config["mixed_precision"] == "no"
    trained("train --config run/config.yaml --output_dir again")
    assert saved("again") == config | {"output_dir": "again"}
    assert same(weights("again"), weights("run"))


def test_resume_goes_on_to_the_same_weights(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = f"{SDFT} --max_steps 4 --save_steps 1"
    trained(f"{whole} --output_dir whole")
    with monkeypatch.context() as patch:
        from selfdistill.training.trainer import Trainer

        step = Trainer.step

        def stops(run: Trainer, number: int) -> dict[str, float]:
            if number == 2:
                raise KeyboardInterrupt
            return step(run, number)

        patch.setattr(Trainer, "step", stops)
        assert main(shlex.split(whole)) == 130
    assert steps("run") == [1, 2]
    capsys.readouterr()
    trained("train --resume --output_dir run")
    assert "resuming after step 2" in capsys.readouterr().err
    assert steps("run") == [1, 2, 3, 4]
    assert same(weights("run"), weights("whole"))


def test_resume_takes_the_same_command_and_says_what_changed(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trained(f"{SFT} --save_steps 1 --resume")  # nothing there yet: from the beginning
    assert "max_steps was" not in capsys.readouterr().err
    trained(f"{SFT} --save_steps 1 --resume true")
    assert steps("run") == [1]
    shutil.move("run", "moved")
    capsys.readouterr()
    trained("train --output_dir moved --resume --max_steps 2 --save_steps 0 --save_total_limit 3 --logging_steps 2")
    change = (
        "resuming after step 1; max_steps was 1 and is now 2: the learning rate follows the new schedule from here on"
    )
    assert change in capsys.readouterr().err
    assert steps("moved") == [1, 2]
    assert saved("moved")["max_steps"] == 2
    trained("train --output_dir moved --resume --max_steps 3 --save_steps 1")
    capsys.readouterr()
    message = (
        "setting 'max_steps': found 1, but moved/checkpoint-00000003 has already done 3 steps; give 3 or more, or "
    )
    fails(capsys, "train --output_dir moved --resume --max_steps 1", message + "start a new run in another output_dir")
    assert (saved("moved")["max_steps"], steps("moved")) == (3, [1, 2, 3])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            "--learning_rate 3",
            "run/config.yaml: learning_rate was 1e-05 and is now 3.0; a resumed run keeps its settings: "
            "leave these out, or start a new run in another output_dir",
        ),
        (
            "--seed 1 --model other --num_train_epochs 9",
            "run/config.yaml: seed was 0 and is now 1; "
            "num_train_epochs was 2.0 and is now 9.0; a resumed run keeps its settings: leave these "
            "out, or start a new run in another output_dir",
        ),
        (
            "--config other.yaml",
            "run/config.yaml: method was 'sft' and is now 'sdft'; a resumed run keeps its settings: "
            "leave these out, or start a new run in another output_dir",
        ),
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
    ("text", "message"),
    [
        ("model: [", "run/config.yaml: not a valid YAML file: ..."),
        ("speed: 3\n", "run/config.yaml: unknown setting 'speed'; did you mean seed?"),
        ("model: model\n", "settings 'data' and 'documents': found neither, expected one of them"),
    ],
    ids=["cut", "unknown", "few"],
)
def test_resume_with_damaged_settings(here: Path, capsys: pytest.CaptureFixture[str], text: str, message: str) -> None:
    Path("run").mkdir()
    Path("run/config.yaml").write_text(text)
    fails(capsys, "train --resume --output_dir run", message)


@pytest.mark.parametrize("command", ["train --output_dir run", SFT])
def test_resume_in_a_folder_that_is_no_run(here: Path, capsys: pytest.CaptureFixture[str], command: str) -> None:
    Path("run").mkdir()
    Path("run/notes.txt").write_text("mine")
    message = "output_dir 'run' is not empty and has no config.yaml, so resume finds no run there; choose another"
    fails(capsys, f"{command} --resume", message)
    assert [path.name for path in Path("run").iterdir()] == ["notes.txt"]


def test_resume_with_a_damaged_checkpoint(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trained(f"{SFT} --save_steps 1")
    shutil.rmtree("run/final")
    Path("run/checkpoint-00000001/optimizer.safetensors").write_bytes(b"")
    message = "run: no checkpoint is intact: checkpoint-00000001 (optimizer.safetensors has 0 of ..."
    fails(capsys, "train --resume --output_dir run", message)


def test_settings_that_are_true_or_false_need_no_value() -> None:
    for words in ("--fsdp", "--fsdp true", "--gradient_checkpointing"):
        _, given = parse(f"train {words} --seed 1".split())
        assert given[words.split()[0].removeprefix("--")] is True
    assert parse(["train", "--fsdp", "false"])[1]["fsdp"] is False
    assert parse(["export", "run", "--merge"])[1]["merge"] is True


def test_progress_says_which_model_answers_which_rows(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trained(f"eval {BASE} --base model")
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(" on ")[0] for line in lines if " on train.jsonl, batch 2/2" in line] == ["model", "base model"]
    trained(f"{SDFT} --test train.jsonl --method grpo --num_generations 2 --save_steps 1")
    out, err = capsys.readouterr()
    for line in ("base on train.jsonl, batch 2/2  ", "model after step 1 on train.jsonl, batch 2/2  "):
        assert f"\n{line}" in f"\n{err}"
    assert "\nscorer: exact\n" in err
    assert re.search(r"\nmodel: model, \d+,\d{3} trainable parameters, on cpu", err)
    assert re.search(r"\ndisk space: \d checkpoints of [\d.]+ MiB, the final model [\d.]+ MiB\n", err)
    assert re.search(r"\nstep 0: accuracy \d\.\d{3} on 4 rows  KL\(base\|\|model\) 0\.000\n", err)
    assert re.search(r"  \d+ tokens per completion, \d+% truncated  ", err)
    assert out == "final model: run/final\n"
    assert err.endswith('\nto try it: selfdistill ask run "QUESTION"\n')


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
    assert (result["settings"]["model"], result["settings"]["base"]) == ("model", "model")
    alone = json.loads(Path("result.json").read_text())
    assert alone.pop("settings") == result.pop("settings") | {"base": None}
    assert alone.items() <= result.items()


def test_a_result_that_cannot_be_written_is_printed(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Path, "write_text", raising(errno.ENOSPC, "result.json"))
    assert main(shlex.split(f"eval {BASE} --json result.json")) == 2
    out, err = capsys.readouterr()
    assert "new task" in out
    assert err.endswith("result.json: No space left on device; free some space or choose another place\n")


@pytest.mark.parametrize("file", ["-", "result.json"])
def test_what_json_cannot_hold_is_null(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, file: str
) -> None:
    found = {"output": "page.html", "summary": [float("nan"), {"low": float("-inf")}, (0.5, None)]}
    monkeypatch.setattr("selfdistill.comparison.report", lambda _: found)
    trained(f"report run --json {file}")
    text = capsys.readouterr().out if file == "-" else Path(file).read_text()
    assert json.loads(text)["summary"] == [None, {"low": None}, [0.5, None]]


def test_a_data_file_whose_name_is_not_utf_8(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = os.fsdecode(b"caf\xe9.jsonl")
    Path("train.jsonl").rename(data)
    options = f"--model model --data {data} --max_completion_length 4"
    run = f"--test {data} --methods sdft --seeds 0 --context turns --max_steps 1 --batch_size 2 --mixed_precision no"
    trained(f"compare {options} {run} --output_dir compared")
    capsys.readouterr()
    trained(f"eval {options} --replies replies.jsonl --json result.json")
    assert "model on caf\\udce9.jsonl" in capsys.readouterr().out
    assert json.loads(Path("result.json").read_text(encoding="utf-8"))["settings"]["data"] == data
    first, *_ = Path("replies.jsonl").read_text(encoding="utf-8").splitlines()
    assert json.loads(first)["source"] == "caf\N{REPLACEMENT CHARACTER}.jsonl:1"


def test_json_over_a_file_that_is_read_only(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("result.json").write_text("{}")
    # Root, who runs some tests, may write everything; so ask the mode.
    monkeypatch.setattr("selfdistill.runtime.files.os.access", lambda path, how: bool(os.stat(path).st_mode & 0o200))
    Path("result.json").chmod(0o444)
    message = "--json result.json: cannot be written; give a file in an existing folder, or -"
    fails(capsys, f"eval {BASE} --json result.json", message)
    Path("result.json").chmod(0o644)
    trained(f"eval {BASE} --json result.json")
    assert json.loads(Path("result.json").read_text())["items"] == 4


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
    "train": "model data method output_dir max_steps batch_size learning_rate temperature max_completion_length "
    "context teacher ema_rate divergence lora_rank seed save_steps resume config",
    "eval": "model data prior base num_samples replies lm_eval_tasks json",
    "compare": "model data test prior methods seeds learning_rates eval_steps output_dir max_steps resume json config",
    "export": "output_dir merge json",
    "merge": "model add subtract scale output_dir json",
    "report": "json",
    "check": "model data json",
    "demo": "output_dir seed json",
}


@pytest.mark.parametrize("command", FROZEN)
def test_help_names_every_option(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    kinds: dict[str, Any] = {
        "train": TrainConfig,
        "eval": EvalConfig,
        "check": CheckConfig,
        "compare": CompareConfig,
    }
    assert main([command, "--help"]) == 0
    out = capsys.readouterr().out
    names = {*FROZEN[command].split(), *(kinds[command].model_fields if command in kinds else ())}
    assert {name for name in names if f"\n  --{name}" not in out} == set()
    assert "``" not in out


def test_every_setting_has_a_help_text_and_a_topic(capsys: pytest.CaptureFixture[str]) -> None:
    for command, (kind, _) in COMMANDS.items():
        assert [name for name, field in kind.model_fields.items() if not field.description] == [], command
        shown = MAIN.get(command, tuple(kind.model_fields))
        grouped = [name for names in TOPICS.values() for name in names.split()]
        assert len(grouped) == len(set(grouped))
        assert set(kind.model_fields) <= {*shown, *grouped}, command
        main([command, "--help"])
        out = capsys.readouterr().out
        assert all(re.search(rf"^  (-o TEXT, )?(--)?{name}\b", out, re.MULTILINE) for name in kind.model_fields), (
            command
        )


def test_the_help_of_train_begins_with_what_everybody_needs(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    main(["train", "--help"])
    out = capsys.readouterr().out
    titles = re.findall(r"^([a-z ]+):$", out, re.MULTILINE)
    assert titles == ["options", "main settings", *(t for t in TOPICS if t != "skills and gates"), SWITCHED]
    main_settings = out[out.index("main settings:") : out.index("model and data:")]
    assert re.findall(r"^  --(\w+)", main_settings, re.MULTILINE) == list(MAIN["train"])
    assert "Peak learning rate. Default 1e-5, or 1e-4 with LoRA" in " ".join(out.split())
    assert "[forward_kl]" in out
    assert "(required)" in out
    assert "type:" not in out
    assert max(map(len, out.splitlines())) <= 100


SWITCHED = "files and switches"


def test_a_dry_run_prints_everything_and_writes_nothing(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = set(here.rglob("*"))
    trained(f"{SDFT} --max_steps 40 --dry_run")
    out = capsys.readouterr().out
    assert set(here.rglob("*")) == before
    assert "max_steps: 40" in out
    given, _, chosen = out.partition("# settings that the run chose\n")
    chosen = chosen.partition("\n\n")[0]
    assert "learning_rate: 1.0e-05" in chosen
    assert "max_steps: 40" in given
    assert not {"learning_rate:", "mixed_precision:"} & set(given.split())
    assert "max_steps:" not in chosen
    assert "on_long_prompt" not in out  # has its default
    assert "config.yaml will have all" in out
    assert "# as the teacher sees it" in out
    assert re.search(r"[\d.]+ s per step, .* for 40 steps, peak memory [\d.]+ GiB; nothing was written", out)
    assert "MiB by plan" in out


def test_rows_that_a_dry_run_prints_do_not_control_the_terminal(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    jsonl("train.jsonl", [{"prompt": "\x1b[2Jq", "completion": "\x1b]52;c;aGk=\x1b\\a"}] * 4)
    trained(f"{SDFT} --dry_run")
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert r"\u001b[2Jq" in out
    assert r"\u001b]52;c;aGk=\u001b\a" in out


def test_a_dry_run_may_name_what_exists(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    jsonl("run", ROWS)
    trained(f"{SFT} --dry_run")
    out = capsys.readouterr().out
    assert Path("run").read_text() == Path("train.jsonl").read_text()
    assert "note: output_dir 'run' is a file: choose another name\nsft on 4 demonstrations, 1 step of 2, " in out
    assert " for 1 step, peak memory " in out
    assert "│ drift " in out
    assert "│ contexts " not in out  # SFT shows none


def test_memory_is_planned_for_another_device_and_nothing_is_loaded(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (here / "model" / "model.safetensors").unlink()
    before = set(here.rglob("*"))
    trained(f"{SDFT} --dry_run --memory 80GiB")
    out = capsys.readouterr().out
    assert set(here.rglob("*")) == before
    assert re.search(r"│ weights +│ +0\.\d │ +0\.\d │ +0\.\d │", out)
    assert re.search(r"it fits: \d\.\d MiB of 80\.0 GiB\n$", out)
    assert main(shlex.split(f"{SDFT} --dry_run --memory 0.01MB")) == 2
    assert re.search(
        r"it does not fit: .* MiB of 0\.0 MiB; no change of settings makes it fit", capsys.readouterr().out
    )
    for option in ("memory 80GiB", "device h100"):
        refused = f"option --{option.split()[0]} only makes a plan: add --dry_run"
        if "device" in option:
            refused += "; a run uses a GPU by itself if PyTorch finds one"
        fails(capsys, f"{SDFT} --{option}", refused)
    size = "expected a size such as 80GiB, 80GB or 8x80GiB"
    fails(capsys, f"{SDFT} --dry_run --memory 80", f"setting 'memory': found '80', {size}")
    trained(f"{SDFT} --dry_run --memory 2x80GiB --fsdp")
    assert "\nfor each of 2 devices, which share the weights (fsdp)\n" in capsys.readouterr().out


def test_a_named_device_has_memory_and_speed(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trained(f"{SDFT} --max_steps 40 --mixed_precision bf16 --dry_run --device h100")
    out = capsys.readouterr().out
    assert re.search(
        r"rough time, on h100 at 40% of 989 TFLOP/s and 70% of 3350 GB/s: \S+ s per step \(sampling \S+, teacher \S+, "
        r"student \S+, update \S+\), \S+ s for 40 steps, if all samples have maximum length\n"
        r"it fits: .* MiB of 74\.5 GiB\n$",
        out,
    )
    trained(f"{SDFT} --dry_run --device h100 --memory 40GiB")
    assert "MiB of 40.0 GiB" in capsys.readouterr().out
    known = "this, h200, h100, h100-pcie, a100-80, a100-40, l40s, l4, a10, rtx4090, rtx3090"
    fails(capsys, f"{SDFT} --dry_run --device cuda", f"setting 'device': found 'cuda', expected {known}")


def test_a_check_also_plans(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checked = f"check {BASE} --sample 2 --contexts turns:repeats=2 --mixed_precision no"
    assert main(shlex.split(f"{checked} --memory 2x0.01MB --device l4 --json result.json")) in (0, 4)
    out = capsys.readouterr().out
    assert "batch 2 in " in out
    assert out.index("rough time, on l4") < out.index("it does not fit: ") < out.index(": turns:repeats=2 ")
    result = json.loads(Path("result.json").read_text())
    assert result["best"] == "turns:repeats=2"
    plan = result["plan"]
    assert plan["peak"] == max(sum(phase.values()) for phase in plan["phases"].values())
    assert (plan["memory"], plan["devices"], plan["fits"], plan["nearest"]) == (10_000, 2, False, None)
    assert plan["time"]["seconds_per_step"]["total"] * plan["time"]["steps"] == pytest.approx(plan["time"]["seconds"])
    size = "expected a size such as 80GiB, 80GB or 8x80GiB"
    fails(capsys, f"{checked} --memory 80", f"setting 'memory': found '80', {size}")


def test_a_check_goes_on_without_a_plan(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("selfdistill.api.memory_plan", raising_user_error)
    assert main(shlex.split(f"check {BASE} --sample 2 --contexts turns --memory 80GiB --json result.json")) in (0, 4)
    assert "note: no memory plan: not that model" in capsys.readouterr().err
    assert json.loads(Path("result.json").read_text())["plan"] is None


def raising_user_error(**_: Any) -> None:
    raise UserError("not that model")


def test_ask_prints_both_replies(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trained(SFT)
    trained('ask run "What is it?" --base model --max_completion_length 4 --json asked.json')
    assert re.search("base .* model", capsys.readouterr().out)
    asked = json.loads(Path("asked.json").read_text())
    assert asked["question"] == "What is it?"
    assert isinstance(asked["reply"], str)
    fails(capsys, "ask run", "no question: give it in quotes after the run; see selfdistill ask --help")


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
    assert {"torch", "transformers", "datasets", "numpy"}.isdisjoint(done.stderr.split())
    assert all(f"\n    {command} " in done.stdout for command in FROZEN)


@pytest.mark.slow  # the next has the silence of the imports, and the tests above the line
def test_process_prints_one_line_and_exits_with_2(here: Path) -> None:
    done = run(*shlex.split(SFT), "--data", "none.jsonl")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("selfdistill: error: none.jsonl: no such file or folder (looked from ")
    assert done.stderr.count("\n") == 1


def test_process_trains_without_noise(here: Path) -> None:
    done = run(*shlex.split(SFT))
    assert (done.returncode, done.stdout) == (0, f"final model: {Path('run/final')}\n")
    first_words = [line.split()[0] for line in done.stderr.splitlines()]
    # A note on a single step, and at the end how to try the model.
    assert first_words == ["loading", "sft", "model:", "note:", "memory", "step", "writing", "to"]


def test_an_output_that_nobody_reads_is_no_traceback(here: Path) -> None:
    read, write = os.pipe()
    os.close(read)
    code = "import sys; from selfdistill.cli import main; sys.exit(main())"
    command = [sys.executable, "-c", code, "export", "model", "--output_dir", "out", "--json", "-"]
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True, check=False, timeout=120)
    os.close(write)
    assert (done.returncode, done.stderr) == (1, f"exported model: {here / 'out'}\n")


def test_the_json_file_is_written_whether_or_not_anybody_reads_the_table(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, write = os.pipe()
    os.close(read)
    options = ["--data", "train.jsonl", "--max_completion_length", "4", "--json", "found.json"]
    with open(write, "w", encoding="utf-8") as unread:
        monkeypatch.setattr(sys, "stdout", unread)
        with pytest.raises(SystemExit) as ended:  # by rich, which prints the table
            main(["eval", "--model", "model", *options])
    assert ended.value.code == 1
    assert json.loads((here / "found.json").read_text(encoding="utf-8"))["items"] == len(ROWS)


def test_what_the_locale_cannot_write_is_escaped(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, options, expected in (
        ("\u0436", [], "/\\u0436\n"),
        ("\U0001f600", ["--json", "-"], '/\\ud83d\\ude00"\n}\n'),
    ):
        written = io.BytesIO()
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="latin-1"))
        assert main(["export", "model", "--output_dir", name, *options]) == 0
        assert written.getvalue().decode("ascii").endswith(expected)


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    from selfdistill import __version__

    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"selfdistill {__version__}\n"


@pytest.mark.parametrize("command", COMMANDS)
def test_what_is_required_and_missing_is_one_line(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    for name, field in COMMANDS[command][0].model_fields.items():
        if field.is_required() and name not in ("runs", "run", "question", "action"):
            begin = {"ask": ["ask", "run", "q"], "export": ["export", "run"], "learn": ["learn", "status"]}
            assert main(begin.get(command, [command])) == 2
            _, err = capsys.readouterr()
            assert f"setting '{name}' is required: " in err
            assert "required: ;" not in err
            assert err.count("\n") == 1
