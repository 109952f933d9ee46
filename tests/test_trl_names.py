"""Other projects' names that are unknown here: the page about TRL and the messages say the same."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

import selfdistill as sd
from selfdistill.cli_parser import parse
from selfdistill.config.train import TrainConfig
from selfdistill.config.trl_names import ARGUMENTS, TRL_NAMES

(PAGE,) = (Path(__file__).parents[1] / "docs").rglob("trl.md")
HERE = {*TrainConfig.model_fields, *ARGUMENTS}


def rows() -> list[tuple[str, str]]:
    """The rows of the tables with two columns: what is TRL's, and what is here. ``a; b`` on both sides are two rows."""
    found = []
    for line in re.findall(r"^\| [^|]* \| [^|]* \|$", PAGE.read_text(encoding="utf-8"), re.MULTILINE):
        cells = [cell.strip() for cell in line.strip("|").split(" | ")]
        if line.startswith("| ") and cells[0] not in ("TRL", "TRL 1.16", "there"):
            parts = [cell.split("; ") for cell in cells]
            found += zip(*parts, strict=True) if len(parts[0]) == len(parts[1]) else [(cells[0], cells[1])]
    return found


def named(cell: str) -> list[str]:
    """The words that begin code or a link."""
    return re.findall(r"[`\[](\w+)", cell)


def settings(text: str) -> set[str]:
    """The settings here that a text names."""
    return {*named(text)} & HERE


ROWS = [(named(theirs), settings(ours)) for theirs, ours in rows() if "Trainer" not in theirs]


@pytest.mark.parametrize("name", TRL_NAMES)
def test_the_page_names_the_settings_that_the_message_names(name: str) -> None:
    assert settings(TRL_NAMES[name]) in [ours for theirs, ours in ROWS if name in theirs]


@pytest.mark.parametrize(("theirs", "ours"), ROWS, ids=[theirs[0] for theirs, _ in ROWS])
def test_a_message_names_the_settings_that_the_page_names(theirs: list[str], ours: set[str]) -> None:
    assert ours in [settings(TRL_NAMES[name]) for name in theirs if name in TRL_NAMES], f"{PAGE.name} and TRL_NAMES"


def test_no_name_exists_here() -> None:
    assert not {*TRL_NAMES} & HERE
    assert {setting for text in TRL_NAMES.values() for setting in named(text)} <= HERE


PYTHON: list[tuple[dict[str, Any], str]] = [
    ({"per_device_train_batch_size": 2}, "batch_size, of the whole optimizer step"),
    ({"peft_config": None}, "lora_rank and lora_alpha"),
    ({"eval_dataset": []}, "test"),
    ({"processing_class": None}, "tokenizer, in Python with a loaded model"),
    ({"torch_dtype": "bfloat16"}, "dtype"),
    ({"max_new_tokens": 32}, "max_completion_length"),
    ({"r": 16}, "lora_rank"),
    ({"topk": 20}, "support_top_k, with support top_k"),
    ({"alpha": 0.5}, "divergence with jsd_weight"),
    ({"beta": 0.5}, "divergence with jsd_weight, or for a KL to a reference model anchors or target_base"),
    ({"sync_ref_model": True}, "teacher ema, or for a KL to a reference model anchors or target_base"),
    ({"distillation_weight": 0.5}, "1 minus it as grpo in method_settings"),
    ({"loss_type": "dapo"}, "loss_normalisation sequence for grpo, token for dapo; no other"),
    ({"min_p": 0.1}, "not available; sampling has temperature, top_p and top_k"),
    ({"push_to_hub": True}, "nothing is uploaded; export the run and upload that folder"),
]


@pytest.mark.parametrize(("settings", "here"), PYTHON, ids=str)
def test_python_says_the_name_here(settings: dict[str, Any], here: str) -> None:
    with pytest.raises(sd.UserError) as error:
        sd.train("model", "data.jsonl", output_dir="run", **settings)
    assert str(error.value) == f"unknown setting '{next(iter(settings))}'; here: {here}"


COMMANDS = [
    ("train --bf16 true", "unknown option --bf16; here: --mixed_precision bf16"),
    ("train --peft_config x", "unknown option --peft_config; here: --lora_rank and --lora_alpha"),
    ("train --resume_from_checkpoint x", "unknown option --resume_from_checkpoint; here: --resume"),
    ("train --callbacks x", "unknown option --callbacks; here: on_step, in Python"),
    ("eval --bf16 true", "unknown option --bf16; here: --mixed_precision bf16"),
    (
        "train --topk 20 --alpha=0.5 --batch_size 8 --seq_kd --quux x",
        "unknown option --topk; here: --support_top_k, with --support top_k; unknown option --alpha; here: "
        "--divergence with --jsd_weight; unknown option --seq_kd; here: --method sft_from_teacher, whose teacher is "
        "the model itself; unknown option --quux; see --help for the names",
    ),
    ("eval --topk 20", "unknown option --topk; see --help for the names"),
    ("eval --teacher_update_rate x", "unknown option --teacher_update_rate; see --help for the names"),
]


@pytest.mark.parametrize(("command", "message"), COMMANDS)
def test_the_command_line_says_the_option_here(command: str, message: str) -> None:
    with pytest.raises(sd.UserError) as error:
        parse(command.split())
    assert str(error.value) == message


def test_a_settings_file_says_all_names_here(tmp_path: Path) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text("reward_funcs: f\nseed: 1\nlmbda: 1.0\nlearning_rte: 1\nquux: 1\n")
    with pytest.raises(sd.UserError) as error:
        parse(["train", "--config", str(file)])
    assert str(error.value) == (
        f"{file}: unknown setting 'reward_funcs'; here: scorer; unknown setting 'lmbda'; here: always 1 with sdft; "
        "unknown setting 'learning_rte'; did you mean learning_rate?; unknown setting 'quux'; there is no such setting "
        "here"
    )
