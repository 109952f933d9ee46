"""The example from scratch runs and computes what the package computes."""

from __future__ import annotations

import ast
import copy
import re
import runpy
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import ENDS, gradients, largest_difference
from safetensors.torch import load_file

from selfdistill.config.train import TrainConfig
from selfdistill.training.stopwatch import Stopwatch
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
    assert len(run.stage.examples) == 6
    for example in run.stage.examples:
        prompt, completion = example.demonstration.prompt[0]["content"], example.demonstration.completion
        assert scratch.prompt_ids(run.loaded.tokenizer, prompt) == example.student_ids
        assert scratch.prompt_ids(run.loaded.tokenizer, prompt, completion) == example.teacher_ids


def test_the_scripts_loss_and_gradient_are_the_packages(scratch: SimpleNamespace, run: Trainer) -> None:
    completions = run.stage.method.sequence(run.loaded, run.stage.examples[:4], 7)
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
    result = run.gradient.add(run.stage.method, completions, Stopwatch(run.loaded.device))
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
    rows = run.stage.examples
    completions = run.stage.method.sequence(replace(run.loaded, model=model), rows, 0)[:: run.config.num_generations]
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
