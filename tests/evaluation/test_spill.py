"""Spill: what a few steps on the task do to other prompts, against a slow computation; and what is said of it."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import selfdistill as sd
from selfdistill.cli import main
from selfdistill.config.commands import CheckConfig, run_settings
from selfdistill.config.train import TrainConfig
from selfdistill.data.bundled import anchor_prompts, is_packaged
from selfdistill.data.chat_format import ChatFormat
from selfdistill.data.contexts import parse_context
from selfdistill.data.demonstrations import load_demonstrations
from selfdistill.data.prompts import load_prompts
from selfdistill.errors import UserError
from selfdistill.evaluation import measure, spill
from selfdistill.evaluation.check import best_context, check
from selfdistill.evaluation.spill import Spill, Trial
from selfdistill.model.fingerprints import weights_fingerprint
from selfdistill.model.loading import LoadedModel
from selfdistill.model.lora import add_lora
from selfdistill.model.sampling import Sampling, sample, sample_seed
from selfdistill.runtime import result_console

LONG = {"prompt": "q", "completion": "ab " * 20}
Sequences = list[tuple[list[int], list[int]]]
"""Prompts and completions as token ids."""


def config_of(folder: Path, data: Path, **settings: object) -> CheckConfig:
    values = {
        "max_completion_length": 6,
        "sample": 4,
        "batch_size": 2,
        "mixed_precision": "no",
        "spill": True,
    } | settings
    return CheckConfig(model=str(folder), data=str(data), contexts=["turns:repeats=2"], **values)


def log_probabilities(model: torch.nn.Module, prompt: list[int], completion: list[int]) -> torch.Tensor:
    """Of every token at each place of the completion; one row, one pass."""
    logits = model(input_ids=torch.tensor([prompt + completion])).logits[0]
    return logits[len(prompt) - 1 : -1].log_softmax(-1)


def slow_trial(
    loaded: LoadedModel, loss_at: Callable[[int], torch.Tensor], demos: Sequences, answers: Sequences, rate: float
) -> Trial:
    """Steps of AdamW and what they do, in plain PyTorch."""
    model = loaded.model

    def logp() -> float:
        means = [log_probabilities(model, p, c)[range(len(c)), c].mean() for p, c in demos]
        return float(torch.stack(means).mean())

    with torch.no_grad():
        before, gained = [log_probabilities(model, *pair) for pair in answers], -logp()
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0)
    for step in range(spill.STEPS):
        optimizer.zero_grad()
        loss_at(step).backward()
        optimizer.step()
    with torch.no_grad():
        gained += logp()
        after = [log_probabilities(model, *pair) for pair in answers]
    moved = torch.cat([(q.exp() * (q - p)).sum(-1) for q, p in zip(before, after, strict=True)])
    return Trial(gained, float(moved.mean()))


@pytest.mark.parametrize(("lora_rank", "rate"), [(0, 1e-3), (2, 3e-2)])
def test_the_trials_equal_plain_pytorch(
    model_folder: Callable[..., Path],
    load: Callable[..., LoadedModel],
    write_rows: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    lora_rank: int,
    rate: float,
) -> None:
    monkeypatch.setattr(spill, "STEPS", 3)
    monkeypatch.setattr(spill, "ROWS", 3)  # a pass for the first three, and one for the last
    data = write_rows([{"prompt": f"q{i}", "completion": f"ab cd ef g{i}"} for i in range(4)])
    result = check(config_of(model_folder(), data, learning_rate=rate, hints=True, lora_rank=lora_rank))
    found, teacher = result.spill, load()
    assert found is not None
    assert result.hints is not None
    chat, context = ChatFormat(teacher.tokenizer, teacher.end_token_ids, {}), parse_context("turns:repeats=2")
    rows = load_demonstrations(str(data))
    students = [chat.encode_prompt(row.prompt) for row in rows]
    demos = [(ids, chat.encode_completion(row.completion)) for ids, row in zip(students, rows, strict=True)]
    prompts = anchor_prompts()
    general = [chat.encode_prompt(row.prompt) for row in random.Random(0).sample(prompts, len(prompts))]
    general = [ids for ids in general if len(ids) + 16 <= 512][:16]  # the model's context window
    answers = [(ids, r.ids) for ids, r in zip(general, sample(teacher, general, Sampling(16, 0)), strict=True)]

    def sft(_step: int) -> torch.Tensor:
        logps = [log_probabilities(student.model, ids, demo)[range(len(demo)), demo].sum() for ids, demo in demos]
        return -torch.stack(logps).sum()

    def sdft(words: int) -> Callable[[int], torch.Tensor]:
        """With this many words of the demonstration."""
        parts = [replace(row, privileged_context=" ".join(row.completion.split()[:words])) for row in rows]
        shown = [chat.encode_prompt(context.messages(row, parts)) for row in parts] if words else students

        def loss_at(step: int) -> torch.Tensor:
            seeds, loss = [sample_seed(0, step, row.row, 0) for row in rows], torch.zeros(())
            samples = sample(student, students, Sampling(6), seeds)
            for ids, taught, rollout in zip(students, shown, samples, strict=True):
                with torch.no_grad():
                    q = log_probabilities(teacher.model, taught, rollout.ids)
                loss += (q.exp() * (q - log_probabilities(student.model, ids, rollout.ids))).sum()
            return loss

        return loss_at

    nothing, *hints = [hint.trial for hint in result.hints]
    assert hints[-1] is found.sdft
    assert nothing is not None
    assert max(abs(nothing.gain), nothing.moved) < 1e-4  # its teacher is the student
    assert len({hint.gain for hint in hints if hint}) == 4
    learnt = [(sdft(words), trial) for words, trial in enumerate(hints, 1)]
    for loss_at, trial in ((sft, found.sft), *learnt):
        student = load()
        if lora_rank:
            add_lora(student, lora_rank, None, 0)
        expected = slow_trial(student, loss_at, demos, answers, rate)
        assert trial is not None
        assert trial.gain == pytest.approx(expected.gain, rel=0.01)
        assert trial.moved == pytest.approx(expected.moved, rel=0.01)
        assert trial.moved > 1e-4


def test_the_weights_stay_as_they_were_and_the_seed_repeats_the_numbers(
    load: Callable[..., LoadedModel], model_folder: Callable[..., Path], write_rows: Callable[..., Path]
) -> None:
    data, loaded = write_rows(count=4), load(tied=True)
    before = weights_fingerprint(loaded.model)
    first, again, other = (
        check(config_of(model_folder(tied=True), data, seed=seed), loaded=loaded).to_dict() for seed in (0, 0, 1)
    )
    assert weights_fingerprint(loaded.model) == before
    assert all(parameter.grad is None for parameter in loaded.model.parameters())
    assert first["spill"]["sft"]["moved"] > 0
    assert first["spill"] == again["spill"]
    assert first["spill"] != other["spill"]


@pytest.mark.parametrize(
    ("free", "error", "reason"),
    [
        (0, None, r"its steps need more than 0\.0 GiB, and there are 0\.0"),
        (2**40, torch.OutOfMemoryError("CUDA out of memory"), "its steps ran out of memory"),
    ],
)
def test_steps_that_need_too_much_memory_lose_nothing_that_was_measured(
    model_folder: Callable[..., Path],
    write_rows: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    free: int,
    error: Exception | None,
    reason: str,
) -> None:
    calls = []

    def backward(*_: object, **__: object) -> None:
        if error is None:
            pytest.fail("took a step")
        calls.append(1)
        raise error

    monkeypatch.setattr(measure, "free_memory", lambda _: free)
    monkeypatch.setattr(torch.Tensor, "backward", backward)
    result = check(config_of(model_folder(), write_rows(count=4), hints=True))
    assert result.layouts[0].items == 4
    assert result.cost_unknown
    assert result.hints is not None
    assert {hint.trial for hint in result.hints} == {None}
    assert len(calls) == (2 if error else 0), "the cost, and the first step"
    assert re.search(rf"Spill: not measured: {reason}\. ", " ".join(repr(result).split()))


def test_a_trial_holds_a_copy_gradients_and_moments(load: Callable[..., LoadedModel]) -> None:
    loaded = load()
    assert spill.bytes_of_steps(loaded, 0) == 16 * sum(p.numel() for p in loaded.model.parameters())
    half = load(dtype="bfloat16")
    assert spill.bytes_of_steps(half, 0) == 12 * sum(p.numel() for p in half.model.parameters())
    assert spill.bytes_of_steps(half, 8) == 2 * sum(p.numel() for p in half.model.parameters()), "a copy"


def test_all_hints_learn_from_the_same_rows(
    model_folder: Callable[..., Path], write_rows: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """A row that fits with half of the demonstration alone is in no line of the table."""
    rows = [{"prompt": f"q{i}", "completion": "ab cd ef gh"} for i in range(3)]
    few, more = (write_rows(part, name=f"{len(part)}.jsonl") for part in (rows, [*rows, LONG]))
    own: dict[str, Any] = {"hints": True, "on_long_prompt": "drop", "max_prompt_length": 140, "learning_rate": 1e-3}
    found, expected = (check(config_of(model_folder(), data, **own)) for data in (more, few))
    assert (found.items, expected.items) == (4, 3)
    assert found.hints == expected.hints
    found.print(result_console())
    printed = " ".join(capsys.readouterr().out.split())
    assert "gain │ moved" in printed.replace("┃", "│")
    assert "gain and moved: what 8 steps of SDFT with each hint gain on the demonstrations, and how far" in printed
    learnt = found.to_dict()["hints"][2]["trial"]
    assert learnt["gain"] != 0
    assert f"{learnt['gain']:+.2f}" in printed
    assert f"{learnt['moved']:.3f}" in printed


def test_hints_alone_say_what_is_learnt(
    model_folder: Callable[..., Path], write_rows: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spill, "STEPS", 1)
    config = config_of(model_folder(), write_rows(count=4), hints=True, spill=False, learning_rate=1e-3)
    found, both = check(config), check(config.model_copy(update={"spill": True}))
    assert found.hints is not None
    assert all(hint.trial for hint in found.hints)
    assert (found.hints, found.spill) == (both.hints, both.spill)


def test_what_the_numbers_say() -> None:
    found = Spill(Trial(gain=5.5, moved=0.416), Trial(gain=-0.1, moved=0.217), prompts="general prompts")
    assert found.sentence() == (
        "after 8 steps, in nats per token: SFT +5.50 on the demonstrations, drift 0.42 on general prompts; SDFT "
        "-0.10 on the demonstrations, drift 0.22 on general prompts. To reduce it, train with anchors "
        "(package, or prompts of your own)"
    )


def drawn(folder: Path, sources: dict[str, list[str]], loaded: LoadedModel, **settings: object) -> list[str]:
    """The prompts that are drawn of these sources."""
    config = config_of(folder, folder, **settings)
    anchors = {name: load_prompts([{"prompt": text} for text in texts]) for name, texts in sources.items()}
    rows = spill.drawn_anchors(config, anchors, loaded, ChatFormat(loaded.tokenizer, loaded.end_token_ids, {}))
    return [str(row.prompt[0]["content"]) for row in rows]


@pytest.mark.parametrize("form", ["file", "rows", "two files"])
def test_it_is_measured_on_anchors_of_your_own(
    form: str,
    model_folder: Callable[..., Path],
    write_rows: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """The package's prompts as one's own give the package's numbers; others give others."""
    monkeypatch.setattr(spill, "STEPS", 2)
    few = [row for row in anchor_prompts() if len(str(row.prompt)) < 200][:6]
    monkeypatch.setattr(
        spill, "anchor_prompts", lambda source, note: few if is_packaged(source) else anchor_prompts(source, note)
    )
    rows = [{"prompt": [dict(turn) for turn in row.prompt], "completion": "Not used."} for row in few]
    paths = [str(write_rows(part, name=f"{n}.jsonl")) for n, part in enumerate((rows, rows[:3], rows[3:]))]
    config = config_of(model_folder(), write_rows(count=4), learning_rate=1e-3, sample=2)
    given: Any = {"file": paths[0], "rows": rows, "two files": ",".join(paths[1:])}[form]
    settings = config.model_dump(exclude_unset=True)
    found = sd.check(**settings, anchors=given, progress=False).spill
    package = check(config).spill
    assert found is not None
    assert package is not None
    for mine, theirs in ((found.sft, package.sft), (found.sdft, package.sdft)):
        assert mine is not None
        assert theirs is not None
        assert (mine.gain, mine.moved) == pytest.approx((theirs.gain, theirs.moved), rel=1e-3)
    other = sd.check(**settings, anchors=[{"prompt": "Who?"}], progress=False).spill
    assert other is not None
    assert other.sft is not None
    assert other.sft.moved != pytest.approx(found.sft.moved if found.sft else 0, rel=1e-2)
    assert package.prompts == "general prompts"
    assert (
        found.prompts
        == {
            "file": "6 prompts of 0.jsonl",
            "rows": "6 prompts of the given rows",
            "two files": "6 prompts of 1.jsonl, 2.jsonl",
        }[form]
    )
    assert f" on {found.prompts}; SDFT" in found.sentence()


def test_within_a_callers_autocast_it_is_refused(
    model_folder: Callable[..., Path], write_rows: Callable[..., Path]
) -> None:
    """Its steps would compute with casts of the weights from before them, and move the model too little."""
    config = config_of(model_folder(), write_rows(count=4), mixed_precision="bf16")
    with (
        torch.autocast("cpu", torch.bfloat16),
        pytest.raises(UserError, match=r"^torch\.autocast is on, .* a step; call"),
    ):
        check(config)


def test_sources_of_anchors_are_drawn_in_turn(
    model_folder: Callable[..., Path], load: Callable[..., LoadedModel]
) -> None:
    many, few = [f"many {n}" for n in range(40)], [f"few {n}" for n in range(3)]
    found = drawn(model_folder(), {"many": many, "few": few}, load())
    assert len(found) == len(set(found)) == 16
    assert sum(text in few for text in found) == 3
    assert [text.split()[0] for text in found[:6]] == ["many", "few"] * 3
    assert [text for text in found if text in many] != many[:13]
    half = drawn(model_folder(), {"many": many, "more": [f"more {n}" for n in range(40)]}, load())
    assert sum(text in many for text in half) == 8


def test_anchors_that_are_too_long_are_named_or_counted(
    model_folder: Callable[..., Path], load: Callable[..., LoadedModel], capsys: pytest.CaptureFixture[str]
) -> None:
    sources = {"own.txt": ["Who?", "long " * 30]}
    with pytest.raises(UserError, match=r"^1 of 2 rows do not fit: data\[1\]: prompt has \d+ tokens, limit 60; raise"):
        drawn(model_folder(), sources, load(), max_prompt_length=60)
    assert drawn(model_folder(), sources, load(), max_prompt_length=60, on_long_prompt="drop") == ["Who?"]
    assert "note: dropped 1 of 2 prompts of own.txt: too long\n" in capsys.readouterr().err


def test_anchors_are_checked_before_the_model_is_loaded(
    write_rows: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_rows(count=4)
    command = ["check", "--model", "nowhere", "--data", str(data)]
    assert main([*command, "--spill", "true", "--anchors", "none.txt"]) == 2
    assert capsys.readouterr().err.endswith("selfdistill: error: none.txt: cannot be read: No such file or directory\n")
    with pytest.raises(
        UserError, match=r"^anchors: 1 bad row: anchors\[0\], column 'prompt': missing, found 'question'"
    ):
        sd.check("nowhere", str(data), spill=True, anchors=[{"question": "Who?"}])
    main([*command, "--anchors", "package"])
    assert "note: setting 'anchors' has no effect without spill or hints\n" in capsys.readouterr().err


@pytest.mark.parametrize("none", [None, "none"])
def test_without_anchors_it_is_not_measured(
    none: str | None, model_folder: Callable[..., Path], write_rows: Callable[..., Path]
) -> None:
    result = check(config_of(model_folder(), write_rows(count=4), anchors=none))
    assert "Spill: not measured: there are no anchors to measure on (setting 'anchors')." in " ".join(
        repr(result).split()
    )
    assert result.spill is not None
    assert result.spill.prompts is None


def test_the_anchors_of_a_check_do_not_change_the_plan_of_its_run(tmp_path: Path) -> None:
    assert "anchors" not in run_settings(config_of(tmp_path, tmp_path, anchors="package"))


def test_it_is_left_out_where_it_makes_no_sense(
    model_folder: Callable[..., Path],
    write_rows: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    folder = model_folder()
    half = tmp_path / "half"
    AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float16).save_pretrained(half)
    AutoTokenizer.from_pretrained(folder).save_pretrained(half)
    result = check(config_of(half, write_rows(count=4), dtype="auto"))
    assert result.spill is not None
    assert result.spill.sft is None
    assert "Spill: not measured: model " in repr(result)
    assert "its trainable weights are float16" in " ".join(repr(result).split())
    answers = write_rows([{"prompt": f"q{n}", "answer": "ab", "privileged_context": "hint"} for n in range(4)])
    result = check(config_of(folder, answers))
    assert "Spill: not measured: no row has a completion" in " ".join(repr(result).split())
    assert json.loads(json.dumps(result.to_dict()))["spill"]["sdft"] is None
    monkeypatch.setattr(measure, "Trials", lambda *_: pytest.fail("measured the spill"))
    assert check(config_of(folder, write_rows(count=4), spill=False)).spill is None
    result = check(config_of(folder, write_rows(count=4), spill=False, hints=True, anchors="none"))
    assert result.hints is not None
    assert {hint.trial for hint in result.hints} == {None}
    assert "moved" not in repr(result)
    settings = {"output_dir": "unused", "max_completion_length": 6}
    best_context(TrainConfig(model=str(folder), data=str(write_rows(count=4)), **settings))
