"""The examples run, and the one from scratch computes what the package computes."""

from __future__ import annotations

import ast
import copy
import json
import re
import runpy
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import ENDS, add_gradient, gradients, largest_difference
from safetensors.torch import load_file

from selfdistill.config.train import TrainConfig
from selfdistill.training.trainer import Trainer

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
SCRIPT = EXAMPLES / "sdft_from_scratch.py"


@pytest.fixture(scope="module")
def scratch() -> SimpleNamespace:
    """The functions of the script."""
    return SimpleNamespace(**runpy.run_path(str(SCRIPT)))


@pytest.fixture
def run(settings: Callable[..., TrainConfig]) -> Trainer:
    """A run of the package by the script's method, after a large step that parts student and teacher."""
    run = Trainer(settings(context="turns:repeats=2", batch_size=4, num_generations=2, learning_rate=1e-2))
    run.step(0)
    return run


def test_the_script_uses_nothing_of_the_package() -> None:
    nodes = list(ast.walk(ast.parse(SCRIPT.read_text(encoding="utf-8"))))
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)}
    assert {name.partition(".")[0] for name in names} == {"argparse", "copy", "json", "random", "torch", "transformers"}


def test_student_and_teacher_see_the_packages_prompts(scratch: SimpleNamespace, run: Trainer) -> None:
    assert len(run.stage.task.examples) == 6
    for example in run.stage.task.examples:
        prompt, completion = example.demonstration.prompt[0]["content"], example.demonstration.completion
        assert scratch.prompt_ids(run.loaded.tokenizer, prompt) == example.student_ids
        assert scratch.prompt_ids(run.loaded.tokenizer, prompt, completion) == example.teacher_ids


def test_the_scripts_loss_and_gradient_are_the_packages(scratch: SimpleNamespace, run: Trainer) -> None:
    completions = run.stage.task.method.sequence(run.loaded, run.stage.task.examples[:4], 7)
    assert len({len(c.ids) for c in completions}) > 2
    student = copy.deepcopy(run.loaded.model)
    student.zero_grad()
    assert run.teacher is not None
    with run.teacher.model() as network:
        teacher = copy.deepcopy(network)
    student_prompts = [c.example.student_ids for c in completions]
    teacher_prompts = [c.example.teacher_ids for c in completions]
    loss = scratch.sdft_loss(student, teacher, student_prompts, teacher_prompts, [c.ids for c in completions])
    loss.backward()
    expected = gradients(student)
    result = add_gradient(run, completions)
    assert result.loss == pytest.approx(float(loss.detach()), abs=1e-5)
    assert result.loss > 0.01
    assert max(float(g.abs().max()) for g in expected.values()) > 1e-2
    assert largest_difference(gradients(run.loaded.model), expected) < 1e-5


def test_the_scripts_teacher_follows_as_the_packages_does(scratch: SimpleNamespace, run: Trainer) -> None:
    assert run.teacher is not None
    with run.teacher.model() as network:
        teacher = copy.deepcopy(network)
        before = {name: p.clone() for name, p in network.named_parameters()}
        run.teacher.update(2)
        scratch.follow(teacher, run.loaded.model, run.config.ema_rate)
        expected = dict(network.named_parameters())
        assert largest_difference(before, expected) > 1e-5
        assert largest_difference(dict(teacher.named_parameters()), expected) < 1e-7


def test_the_script_samples_what_the_package_does_where_the_student_is_certain(
    scratch: SimpleNamespace, run: Trainer
) -> None:
    model = copy.deepcopy(run.loaded.model)
    model.lm_head.weight.data.mul_(1e4)  # all probability on one token, so that no draw matters
    rows = run.stage.task.examples
    completions = run.stage.task.method.sequence(replace(run.loaded, model=model), rows, 0)[
        :: run.config.num_generations
    ]
    found = [scratch.sample(model, row.student_ids, set(ENDS), 10) for row in rows]
    assert found == [c.ids for c in completions]
    assert {c.truncated for c in completions} == {True, False}


def test_the_script_trains_from_the_command_line(
    model_folder: Callable[..., Path],
    write_rows: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder, taught = model_folder(ends=ENDS), tmp_path / "taught"
    options = ["--steps=2", "--batch_size=3", "--max_completion_length=10", "--learning_rate=1e-3"]
    words = [str(SCRIPT), str(folder), str(write_rows()), *options, f"--output_dir={taught}"]
    monkeypatch.setattr(sys, "argv", words)
    runpy.run_path(str(SCRIPT), run_name="__main__")
    losses = [float(loss) for loss in re.findall(r"^step \d/2  loss (\S+)", capsys.readouterr().out, re.MULTILINE)]
    assert len(losses) == 2
    assert all(0.01 < loss < 100 for loss in losses)
    base, trained = (load_file(path / "model.safetensors") for path in (folder, taught))
    assert 1e-4 < largest_difference(base, trained) < 1e-2


# --- the notebook ---

NOTEBOOK = EXAMPLES / "quickstart.ipynb"


@pytest.fixture(scope="module")
def cells() -> list[dict[str, Any]]:
    return json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]


def shown_by(cell: dict[str, Any], names: dict[str, Any]) -> Any:
    """Run a code cell as a notebook does; the value of its last line, where that is an expression."""
    tree = ast.parse("".join(cell["source"]), cell["id"])
    *statements, last = tree.body
    if not isinstance(last, ast.Expr):
        statements, last = tree.body, None
    exec(compile(ast.Module(statements, []), cell["id"], "exec"), names)
    return last and eval(compile(ast.Expression(last.value), cell["id"], "eval"), names)


def test_the_notebook_is_valid_and_holds_no_outputs(cells: list[dict[str, Any]]) -> None:
    """The parts of the notebook format, version 4.5, that these cells have."""
    text = NOTEBOOK.read_text(encoding="utf-8")
    notebook = json.loads(text)
    assert text == json.dumps(notebook, indent=1, ensure_ascii=False) + "\n"
    assert notebook.keys() == {"cells", "metadata", "nbformat", "nbformat_minor"}
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    assert notebook["metadata"]["kernelspec"].keys() == {"display_name", "language", "name"}
    ids = [cell["id"] for cell in cells]
    assert len(set(ids)) == len(ids)
    for cell in cells:
        assert re.fullmatch(r"[a-z-]{1,64}", cell["id"])
        assert cell["metadata"] == {}
        assert all(line.endswith("\n") for line in cell["source"][:-1])
        assert not cell["source"][-1].endswith("\n")
        code = {"outputs": [], "execution_count": None} if cell["cell_type"] == "code" else {}
        assert cell == {name: cell[name] for name in ("cell_type", "id", "metadata", "source")} | code
    assert {cell["cell_type"] for cell in cells} == {"markdown", "code"}


def test_the_notebook_runs_and_shows_the_trade_off(
    cells: list[dict[str, Any]], model_folder: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a tiny model, two steps of four rows, and one seed."""
    monkeypatch.chdir(tmp_path)
    smaller = {
        '"smollm2-135m"': repr(str(model_folder(ends=ENDS, room=1024, layers=1))),
        "STEPS = 24": "STEPS = 2",
        '"batch_size": 16': '"batch_size": 4',
        "seeds=(0, 1)": "seeds=(0,)",
    }
    source = "".join(line for cell in cells if cell["cell_type"] == "code" for line in cell["source"])
    assert {text: source.count(text) for text in smaller} == dict.fromkeys(smaller, 1)
    names: dict[str, Any] = {}
    shown: dict[str, Any] = {}
    for cell in cells:
        if cell["cell_type"] == "code":
            text = "".join(cell["source"])
            for old, new in smaller.items():
                text = text.replace(old, new)
            shown[cell["id"]] = shown_by(cell | {"source": [text]}, names)
    prompts, tests = ({row["prompt"] for row in names[part]} for part in ("train_rows", "test_rows"))
    assert (len(prompts), len(tests), len(prompts & tests)) == (60, 18, 0)
    assert shown["check"]._repr_html_().count("turns:repeats=") >= 2
    assert "runs/desks: sdft on" in shown["train"]._repr_html_()
    assert "18" in shown["evaluate"]._repr_html_()
    assert isinstance(shown["generate"], str)
    page = shown["compare"]._repr_html_()
    assert page.startswith("<table>")
    assert "<svg" in page
    texts = set(re.findall(r"<text[^>]*>([^<]*)</text>", page[page.index("<svg") :]))
    assert texts >= {"new task, accuracy", "sft", "sdft", "teacher", "base"}
