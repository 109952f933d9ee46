"""The model card: front matter that the hub reads, results as they were measured, code that loads the very folder."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import PeftModel
from transformers import LlamaForCausalLM

from selfdistill.config.commands import ExportConfig
from selfdistill.config.train import TrainConfig
from selfdistill.errors import UserError
from selfdistill.training.export import export
from selfdistill.training.model_card import merged_card, model_card
from selfdistill.training.train import train

METRICS = {"step": 7, "loss": 0.25, "kl/forward": 0.125, "drift/student": 0.0625, "entropy": 1.0}
EVALUATIONS = [
    {"step": 0, "accuracy": 0.25, "accuracy_interval": [0.2, 0.3], "items": 90, "prior_accuracy": 0.7},
    {"step": 10, "accuracy": 0.4, "accuracy_interval": [0.3, 0.5], "items": 90},
    {
        "step": 20,
        "accuracy": 0.5,
        "accuracy_interval": [0.4, 0.6],
        "items": 90,
        "completion/length": 12.5,
        "prior": {"arc|easy": {"accuracy": 0.6, "interval": [0.5, 0.7], "items": 100}},
        "prior_accuracy": 0.6,
        "prior_interval": [0.55, 0.65],
        "kl_base": 0.41,
        "seconds": 3.0,
    },
]


def settings(**values: Any) -> TrainConfig:
    defaults: dict[str, Any] = {"model": "org/base-1B", "data": "org/questions", "output_dir": "run"}
    return TrainConfig(**(defaults | {"context": "turns", "max_steps": 7, "learning_rate": 1e-5} | values))


def card(run: Path, *, adapter: bool = False, **values: Any) -> str:
    return model_card(settings(**values), run, 1000, demonstrations=12, fingerprint="f" * 64, adapter=adapter)


def lines(path: Path, rows: list[Any]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def split(text: str) -> tuple[dict[str, Any], str]:
    front, body = re.fullmatch(r"---\n(.*?)\n---\n(.*)", text, re.DOTALL).groups()  # type: ignore[union-attr]
    return yaml.safe_load(front), body


def table(body: str, heading: str) -> list[list[str]]:
    """Cells of the section's table, without its head."""
    section = body.split(f"## {heading}\n")[1].split("\n## ")[0]
    rows = [line for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", row)[1:-1]] for row in rows[2:]]


def test_front_matter(tmp_path: Path) -> None:
    assert split(card(tmp_path))[0] == {
        "base_model": "org/base-1B",
        "datasets": ["org/questions"],
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["selfdistill", "sdft"],
    }
    front, _ = split(card(tmp_path, adapter=True, method="sft", data="smollm2-135m", lora_rank=4))
    assert front["library_name"] == "peft"
    assert front["tags"] == ["selfdistill", "sft", "lora"]
    assert "datasets" not in front


def test_says_method_and_settings(tmp_path: Path) -> None:
    _, body = split(card(tmp_path, save_steps=3, teacher="frozen", weight_decay=0.5, chat_template_kwargs={"a": 1}))
    assert "[arXiv 2601.19897](https://arxiv.org/abs/2601.19897)" in body
    assert f"12 demonstrations, fingerprint `{'f' * 64}`" in body
    found = dict(table(body, "Settings"))
    assert found == {
        "`method`": "`sdft`",
        "`context`": "`turns`",
        "`teacher`": "`frozen`",
        "`divergence`": "`forward_kl`",
        "`temperature`": "`1.0`",
        "`learning_rate`": "`1e-05`",
        "`max_steps`": "`7`",
        "`batch_size`": "`32`",
        "`max_completion_length`": "`256`",
        "`mixed_precision`": "`auto`",
        "`seed`": "`0`",
        "`weight_decay`": "`0.5`",
        "`chat_template_kwargs`": '`{"a": 1}`',
    }
    _, body = split(card(tmp_path, method="sft"))
    assert "supervised fine-tuning" in body
    assert not dict(table(body, "Settings")).keys() & {"`context`", "`teacher`", "`divergence`", "`temperature`"}


def test_results_are_those_of_the_last_evaluation_beside_the_base(tmp_path: Path) -> None:
    lines(tmp_path / "metrics.jsonl", [METRICS])
    lines(tmp_path / "evaluations.jsonl", EVALUATIONS)
    _, body = split(card(tmp_path))
    assert table(body, "Results") == [
        ["new task, accuracy (90 items)", "0.250 (0.200 to 0.300)", "0.500 (0.400 to 0.600)"],
        ["new task, mean tokens per reply", "", "12.500"],
        ["prior abilities, mean accuracy", "0.700", "0.600 (0.550 to 0.650)"],
        [r"KL(base\|\|model), nats per token", "", "0.410"],
        [r"prior ability `arc\|easy` (100 items)", "", "0.600 (0.500 to 0.700)"],
    ]
    assert "after step 20" in body


def test_without_evaluations_it_shows_the_training_and_says_so(tmp_path: Path) -> None:
    lines(tmp_path / "metrics.jsonl", [{"step": 6, "loss": 9.0}, METRICS])
    _, body = split(card(tmp_path))
    found = table(body, "Results")
    assert [(row[0], row[2]) for row in found] == [
        ("`loss`", "0.25"),
        ("`kl/forward`", "0.125"),
        ("`drift/student`", "0.0625"),
    ]
    assert "not evaluated on held-out questions" in body


@pytest.mark.parametrize("name", ["a|b.jsonl", "# <b>`x``y.jsonl", "a\n---\nlicense: mit\n.jsonl", "'\": [}.jsonl"])
def test_names_are_text_and_no_markup(tmp_path: Path, name: str) -> None:
    model = tmp_path / name.replace(".jsonl", "")
    model.mkdir()
    data = tmp_path / name
    data.write_text("")
    text = card(tmp_path, model=str(model), data=str(data), context=f"template:file={data}")
    front, body = split(text)
    assert front.keys() == {"base_model", "library_name", "pipeline_tag", "tags"}
    assert front["base_model"] == " ".join(model.name.split())
    shown = " ".join(name.split())
    assert re.search(rf"(?<!`)(`+) ?{re.escape(shown)} ?\1(?!`)", body)  # within a code span
    assert dict(table(body, "Settings"))["`context`"].strip("` ").replace(r"\|", "|") == f"template:file={shown}"
    assert str(tmp_path) not in text
    assert [line for line in body.splitlines() if line.startswith("# ")] == [
        line for line in body.splitlines() if line.endswith("taught by `sdft`")
    ]


def test_a_base_given_as_a_run_is_named_by_the_run(tmp_path: Path) -> None:
    (tmp_path / "skill" / "final").mkdir(parents=True)
    front, _ = split(card(tmp_path, model=str(tmp_path / "skill" / "final")))
    assert front["base_model"] == "skill"


@pytest.mark.parametrize("kind", ["whole", "adapter", "merged"])
def test_the_code_in_it_loads_the_folder(
    model_folder: Callable[..., Path],
    write_rows: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
) -> None:
    base = model_folder(template="{% for m in messages %}{{ m.role }}: {{ m.content }} <|stop|>\n{% endfor %}")
    monkeypatch.chdir(base.parent)
    config = settings(
        model=base.name,
        data=str(write_rows()),
        output_dir=str(tmp_path / "run"),
        max_completion_length=10,
        batch_size=2,
        max_steps=1,
        save_steps=0,
        mixed_precision="no",
        lora_rank=0 if kind == "whole" else 2,
    )
    folder = train(config)
    if kind == "merged":
        folder = export(ExportConfig(run=str(tmp_path / "run"), output_dir=str(tmp_path / "out"), merge=True))
    text = (folder / "README.md").read_text(encoding="utf-8")
    front, body = split(text)
    assert front["library_name"] == ("peft" if kind == "adapter" else "transformers")
    assert front["base_model"] == base.name
    assert front["tags"][:2] == ["selfdistill", "sdft"]
    assert f"`train.jsonl`, {len(write_rows().read_text().splitlines())} demonstrations" in body
    assert str(tmp_path) not in text
    assert str(base) not in text
    assert len(table(body, "Results")) == 3
    (code,) = re.findall(r"^```python\n(.*?)^```", body, re.DOTALL | re.MULTILINE)
    monkeypatch.chdir(folder)
    found: dict[str, Any] = {}
    exec(compile(code, "README.md", "exec"), found)
    assert isinstance(found["model"], PeftModel if kind == "adapter" else LlamaForCausalLM)
    assert found["model"](input_ids=torch.tensor([found["tokenizer"]("ab")["input_ids"]])).logits.isfinite().all()
    assert found["model"].generation_config.eos_token_id == [257, 259]  # 259 is the template's


def test_merged_card_of_other_hands() -> None:
    peft = "license: mit\nlibrary_name: peft\ntags:\n- base_model:adapter:/home/x\n- lora"
    front, body = split(merged_card(f"---\n{peft}\n---\n# Theirs\n\nTheir words.\n"))
    assert front == {
        "license": "mit",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["lora"],
    }
    assert body.startswith("\n# Theirs\n\nTheir words.\n\n## How to load\n\nThe LoRA adapter is merged")
    assert split(merged_card(""))[0]["library_name"] == "transformers"
    with pytest.raises(UserError, match=r"^README\.md: its front matter cannot be read \(.*\); fix it, or delete"):
        merged_card("---\na: [\n---\n")
