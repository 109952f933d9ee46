"""Steps of several parts: how a batch is divided, the gradient against plain code, resuming, processes, anchors."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from children import train_together
from conftest import (
    ENDS,
    Cut,
    assert_same_run,
    crash_at,
    final_weights,
    gradients,
    largest_difference,
    metrics_of,
    needs,
    row_log_probs,
)
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import selfdistill as sd
from selfdistill.cli import main
from selfdistill.config.train import TrainConfig
from selfdistill.data import Verdict, anchor_prompts
from selfdistill.errors import UserError
from selfdistill.evaluation import check_inputs
from selfdistill.methods import FROZEN, METHODS, Method, Part, sequences, stages_of
from selfdistill.methods.examples import OtherRows
from selfdistill.methods.hints import HintContexts, hint_of
from selfdistill.methods.offline_distillation import offline_distillation
from selfdistill.methods.samples_file import SAMPLES_FILE
from selfdistill.methods.sdft import sdft
from selfdistill.methods.sdpo import sdpo
from selfdistill.methods.sequences import Completion, DrawnSamples
from selfdistill.methods.sft import sft
from selfdistill.model.forward import ForwardPass
from selfdistill.model.loading import load_model
from selfdistill.training.schedule import check_shares, positions_of
from selfdistill.training.selection import BatchPart
from selfdistill.training.setup import batch_unit
from selfdistill.training.stopwatch import Stopwatch
from selfdistill.training.train import train
from selfdistill.training.trainer import Trainer

Settings = Callable[..., TrainConfig]


@pytest.fixture
def anchored(settings: Settings, tmp_path: Path) -> Settings:
    """Settings with two sources of anchors: lines of text, and chats with a system turn and earlier turns."""
    (tmp_path / "lines.txt").write_text("Who?\n\nWhy is that so?\nWhen\nHow far is it\n", encoding="utf-8")
    system, asked = {"role": "system", "content": "Be brief."}, {"role": "user", "content": "And then?"}
    told = {"role": "assistant", "content": "Rain."}
    rows = [{"prompt": [system, asked]}, {"prompt": [asked, told, asked], "completion": "No."}, {"prompt": "Name it."}]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")

    def make(out: str = "run", **values: Any) -> TrainConfig:
        sources = f"{tmp_path / 'lines.txt'},{tmp_path / 'chats.jsonl'}"
        return settings(out, **({"anchors": sources, "anchor_share": 0.5, "batch_size": 8} | values))

    return make


# --- the division of a batch ---


@given(
    beside=st.lists(st.floats(0.01, 0.3), min_size=0, max_size=3),
    units=st.integers(2, 40),
    unit=st.sampled_from([1, 4]),
    seed=st.integers(0, 5),
)
def test_shares_are_exact_on_average_and_whole_at_every_step(
    beside: list[float], units: int, unit: int, seed: int
) -> None:
    shares, batch_size = [1 - sum(beside), *beside], units * unit
    try:
        check_shares(shares, batch_size, unit)
    except UserError:
        return
    ends = [0] * len(shares)
    for step in range(60):
        found = positions_of(shares, step, batch_size, seed, unit)
        assert sum(map(len, found)) == batch_size
        assert [positions.start for positions in found] == ends  # nothing is left out, nothing comes twice
        ends = [positions.stop for positions in found]
        assert len(found[0]) >= unit
        for share, positions in zip(beside, found[1:], strict=True):
            assert len(positions) % unit == 0
            assert abs(len(positions) - share * batch_size) < unit
            assert abs(positions.stop - share * batch_size * (step + 1)) < unit


def test_one_part_has_every_batch_whole() -> None:
    assert [positions_of([1.0], step, 5, seed=3, unit=1) for step in (0, 7)] == [[range(5)], [range(35, 40)]]


def test_the_seed_decides_at_which_steps_a_fraction_is_rounded_up() -> None:
    def counts(seed: int) -> list[int]:
        return [len(positions_of([0.9, 0.1], step, 4, seed, unit=1)[1]) for step in range(10)]

    assert {sum(counts(seed)) for seed in range(20)} == {4}
    assert len({tuple(counts(seed)) for seed in range(20)}) > 1


@pytest.mark.parametrize(("batch_size", "fits"), [(1, False), (2, True)])
def test_a_batch_needs_room_for_every_part(anchored: Settings, tmp_path: Path, batch_size: int, fits: bool) -> None:
    config = anchored(anchors=str(tmp_path / "lines.txt"), batch_size=batch_size)
    if fits:
        Trainer(config).step(0)
        return
    with pytest.raises(UserError, match="'batch_size': 1 is too small for 2 parts of a step, which need 2; raise it"):
        Trainer(config)


@pytest.mark.parametrize(
    ("shares", "batch_size", "says"),
    [
        ([0.05, 0.95], 8, "which need 20; raise it, or lower a share, such as anchor_share"),
        ([0.1, 0.9], 9, "which need 10; raise it, or lower a share, such as anchor_share"),
        ([0.1, 0.45, 0.45], 9, "which need 11; raise it, or lower a share, such as anchor_share"),
        ([0.75, 0.25], 1, "which need 2; raise it, or leave out one, such as a source of anchors"),
    ],
)
def test_a_batch_too_small_for_a_large_share_names_one_that_is_not(
    shares: list[float], batch_size: int, says: str
) -> None:
    with pytest.raises(UserError, match=f"{says}$") as told:
        check_shares(shares, batch_size, unit=1)
    named = int(re.findall(r"need (\d+)", str(told.value))[0])
    check_shares(shares, named, unit=1)
    with pytest.raises(UserError):
        check_shares(shares, named - 1, unit=1)


def test_a_batch_too_small_for_processes_that_share_the_weights_says_why() -> None:
    with pytest.raises(
        UserError, match=r"8 is too small for 2 parts of a step \(each a multiple of 8, with fsdp\), which"
    ):
        check_shares([0.75, 0.25], 8, unit=8)


# --- the gradient, against plain code ---


def kl(log_a_TV: Tensor, log_b_TV: Tensor) -> Tensor:
    return (log_a_TV.exp() * (log_a_TV - log_b_TV)).sum(-1)


def plain(run: Trainer, base: Any, part: BatchPart, student: Any) -> Tensor:
    """A part's loss row by row: SFT or SDFT on the task, SFT on rows replayed, KL to the base on anchors."""
    values: list[Tensor] = []
    for c in part.completions:
        log_p_TV = row_log_probs(student, c.example.student_ids, c.ids)
        if part.name.startswith("anchors:"):
            with torch.no_grad():
                log_q_TV = row_log_probs(base, c.example.student_ids, c.ids)
            b = run.config.jsd_weight
            log_m_TV = ((1 - b) * log_p_TV.exp() + b * log_q_TV.exp()).log()
            divergences = {
                "forward_kl": kl(log_q_TV, log_p_TV),
                "reverse_kl": kl(log_p_TV, log_q_TV),
                "jsd": b * kl(log_q_TV, log_m_TV) + (1 - b) * kl(log_p_TV, log_m_TV),
            }
            values.append(divergences[run.config.anchor_divergence])
        elif run.config.method == "sft" or part.name == "replay":
            values.append(-log_p_TV[torch.arange(len(c.ids)), torch.tensor(c.ids)])
        else:
            with torch.no_grad(), run.teacher.model() as network:  # type: ignore[union-attr]
                log_q_TV = row_log_probs(network, c.example.teacher_ids or [], c.ids)
            values.append(kl(log_q_TV, log_p_TV))
    if run.config.loss_normalisation == "token":
        return torch.cat(values).mean()
    return torch.stack([row_T.mean() for row_T in values]).mean()


@pytest.mark.parametrize("micro_batches", [1, 4])
@pytest.mark.parametrize(
    "values",
    [
        {"teacher": "ema", "ema_rate": 0.3, "num_generations": 2},
        {"teacher": "frozen", "anchor_divergence": "reverse_kl"},
        {"teacher": "frozen", "anchor_divergence": "jsd", "jsd_weight": 0.1},
        {"teacher": "frozen", "lora_rank": 4},
        {"teacher": "ema", "ema_rate": 0.3, "lora_rank": 4},
        {"method": "sft", "max_completion_length": 20, "loss_normalisation": "token"},
    ],
    ids=["ema", "reverse", "jsd", "lora", "lora ema", "sft"],
)
def test_a_steps_gradient_is_the_sum_of_its_parts_by_share(
    anchored: Settings, values: dict[str, Any], micro_batches: int
) -> None:
    config = anchored(learning_rate=1e-2, gradient_accumulation_steps=micro_batches, **values)
    base = load_model(config.model).model
    run = Trainer(config)
    run.step(0)
    parts = []
    for part, count in zip(run.stage.parts, (4, 3, 1), strict=True):
        completions: list[Completion] = part.method.sequence(run.loaded, part.examples[:count], 5)
        parts.append(BatchPart(part.name, part.method, completions, count / 8))
    assert [part.name for part in parts] == ["task", "anchors:lines", "anchors:chats"]
    student = copy.deepcopy(run.loaded.model)
    losses = [plain(run, base, part, student) for part in parts]
    sum(part.weight * loss for part, loss in zip(parts, losses, strict=True)).backward()  # type: ignore[union-attr]
    results = run.gradient.add(parts, Stopwatch(run.loaded.device))
    for result, loss in zip(results, losses, strict=True):
        assert result.loss == pytest.approx(float(loss.detach()), abs=1e-5)
        assert result.loss > 1e-4
    expected = gradients(student)
    assert max(float(g.abs().max()) for g in expected.values()) > 1e-3
    assert largest_difference(gradients(run.loaded.model), expected) < 1e-5


def test_metrics_tell_how_the_loss_divides(anchored: Settings) -> None:
    config = anchored(max_steps=3)
    train(config)
    for line in metrics_of(config):
        names = ("task", "anchors:lines", "anchors:chats")
        assert [line[f"share/{name}"] for name in names] == [0.5, 0.25, 0.25]
        total = sum(line[f"share/{name}"] * line[f"loss/{name}"] for name in names)
        assert line["loss"] == pytest.approx(total, abs=1e-7)
    first, last = metrics_of(config)[0], metrics_of(config)[-1]
    assert first["loss/anchors:lines"] == pytest.approx(0, abs=1e-6)  # the student is still the model before the run
    assert last["loss/anchors:lines"] > 1e-6


def test_metrics_tell_of_parts_in_a_step_that_has_only_one(anchored: Settings, tmp_path: Path) -> None:
    config = anchored(anchors=str(tmp_path / "lines.txt"), anchor_share=0.25, batch_size=2, max_steps=4)
    train(config)
    lines = metrics_of(config)
    assert sorted(line["share/task"] for line in lines) == [0.5, 0.5, 1.0, 1.0]
    assert [line["loss/task"] == line["loss"] for line in lines] == [line["share/task"] == 1 for line in lines]


@pytest.mark.parametrize("method", ["sft", "sdft"])
def test_the_time_of_a_step_divides_by_what_each_part_does(
    anchored: Settings, monkeypatch: pytest.MonkeyPatch, method: Any
) -> None:
    """On a clock that runs only in sampling (a second a token), checks, passes (a second a row) and the update."""
    run = Trainer(anchored(method=method, teacher="frozen"))
    now, sampled = 0.0, [0, 0, 0]

    def taking(real: Any, seconds: Callable[..., float]) -> Any:
        def slow(*args: Any, **options: Any) -> Any:
            nonlocal now
            found = real(*args, **options)
            now += seconds(found, *args)
            return found

        return slow

    def of_samples(found: Any, *_: Any) -> float:
        counts = [4, 2, 2] if method == "sdft" else [0, 2, 2]
        lengths = iter([len(rollout.ids) for rollout in found])
        sampled[:] = [sum(next(lengths) for _ in range(count)) for count in counts]
        return sum(sampled)

    def checked(samples: Any, _: Any) -> list[Verdict]:
        nonlocal now
        now += 50
        return [Verdict(1.0) for _ in samples]

    task = run.stage.task
    task.method = replace(task.method, checker=checked)
    monkeypatch.setattr("selfdistill.training.stopwatch.clock", lambda _: now)
    monkeypatch.setattr(sequences, "sample", taking(sequences.sample, of_samples))
    monkeypatch.setattr(
        ForwardPass, "__call__", taking(ForwardPass.__call__, lambda _, __, model, rows, *___: len(rows))
    )
    monkeypatch.setattr(run.optimizer, "step", taking(run.optimizer.step, lambda _: 100.0))
    line = run.step(0)

    own = round(4 * line["completion/length"])
    tokens = [own, *sampled[1:]]
    passes = [50 + (8 if method == "sdft" else 4), 4, 4]  # of student and teacher over each row, with the checks
    expected = [a + b + 100 * c / sum(tokens) for a, b, c in zip(passes, sampled, tokens, strict=True)]
    found = [line[f"time/of/{part.name}_s"] for part in run.stage.parts]
    assert found == pytest.approx(expected)
    assert sum(found) == pytest.approx(line["time/step_s"]) == pytest.approx(now)


def test_without_anchors_nothing_is_said_of_parts(settings: Settings) -> None:
    config = settings(max_steps=1)
    train(config)
    found = (Path(config.output_dir) / "metrics.jsonl").read_text(encoding="utf-8")
    assert not [name for name in json.loads(found) if name.startswith(("loss/", "share/", "time/of/"))]


# --- anchors ---


def test_anchors_are_prompts_of_text_and_chat_without_their_answers(anchored: Settings) -> None:
    run = Trainer(anchored())
    assert [len(part.examples) for part in run.stage.parts[1:]] == [4, 3]
    for part in run.stage.parts[1:]:
        for example in part.examples:
            assert example.teacher_ids == example.student_ids
            assert example.completion_ids == []
            assert not example.demonstration.completion
    system, chat, _ = (example.demonstration.prompt for example in run.stage.parts[2].examples)
    assert [message["role"] for message in system] == ["system", "user"]
    assert [message["role"] for message in chat] == ["user", "assistant", "user"]


@pytest.mark.parametrize("method", METHODS)
def test_every_method_can_have_anchors(anchored: Settings, write_rows: Callable[..., Path], method: Any) -> None:
    rows = [
        {"prompt": f"q{i}", "completion": "ab", "document": "The mill stood by the river.", "answer": "ab"}
        for i in range(4)
    ]
    more: dict[str, Any] = needs(method, anchored().model)
    config = anchored(method=method, data=str(write_rows(rows, name="rows.jsonl")), max_steps=2, **more)
    assert [[part.name for part in parts if not part.same_samples] for parts in stages_of(config)] == [
        ["task", "anchors:lines", "anchors:chats"]
    ] * len(stages_of(config))
    train(config)
    assert [line["share/task"] for line in metrics_of(config)] == [0.5, 0.5]


@pytest.mark.parametrize(
    ("values", "copies"),
    [
        ({"teacher": "frozen"}, 1),
        ({"teacher": "frozen", "target_base": 0.5}, 1),
        ({"teacher": "ema"}, 2),
        ({"method": "sft"}, 1),
        ({"teacher": "frozen", "lora_rank": 4}, 0),
        ({"teacher": "ema", "lora_rank": 4}, 0),
        ({"method": "sft", "lora_rank": 4}, 0),
    ],
)
def test_no_weights_are_held_twice(anchored: Settings, values: dict[str, Any], copies: int) -> None:
    run = Trainer(anchored(**values))
    assert sum(len(teacher.networks) for teacher in run.teachers.values()) == copies


def test_anchors_keep_the_model_where_it_was(anchored: Settings, tmp_path: Path) -> None:
    """KL along the base's own answers to anchors, with and without them; the task is learnt either way."""
    common: dict[str, Any] = {"method": "sft", "max_steps": 40, "learning_rate": 3e-3, "max_completion_length": 20}
    drifts, losses = [], []
    for out, share in (("with", 0.5), ("without", 0.0)):
        config = anchored(out, anchor_share=share, **common)
        train(config)
        base, tuned = load_model(config.model), load_model(str(Path(config.output_dir) / "final"))
        run = Trainer(anchored("anchors"))
        total = []
        for example in run.stage.parts[1].examples:
            with torch.no_grad():
                ids = base.model.generate(torch.tensor([example.student_ids]), max_new_tokens=8, do_sample=False)
                completion = ids[0, len(example.student_ids) :].tolist()
                log_q, log_p = (row_log_probs(x.model, example.student_ids, completion) for x in (base, tuned))
            total.append(float(kl(log_q, log_p).mean()))
        drifts.append(sum(total) / len(total))
        lines = metrics_of(config)
        losses.append([lines[number].get("loss/task", lines[number]["loss"]) for number in (0, -1)])
    assert all(last < 0.5 * first for first, last in losses)
    assert drifts[0] < drifts[1] / 5


@pytest.mark.parametrize("method", ["sdft", "sft"])
def test_all_parts_sample_together_and_with_seeds_of_their_own(
    anchored: Settings, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    calls: list[tuple[int, list[int]]] = []
    draw = sequences.sample

    def counted(loaded: Any, prompts: Any, sampling: Any, seeds: Any) -> Any:
        calls.append((len(prompts), list(seeds)))
        return draw(loaded, prompts, sampling, seeds)

    monkeypatch.setattr(sequences, "sample", counted)
    run = Trainer(anchored(method=method))
    run.step(0)
    run.step(1)
    sampled = 8 if method == "sdft" else 4  # the others are demonstrations
    assert [count for count, _ in calls] == [sampled] * 2
    seeds = [seed for _, drawn in calls for seed in drawn]
    assert len(set(seeds)) == len(seeds)
    task, lines, chats = (part.examples[:3] for part in run.stage.parts)
    assert [x.demonstration.row for x in task] == [x.demonstration.row for x in lines]
    assert [x.demonstration.row for x in lines] == [x.demonstration.row for x in chats]
    drawn = sequences.seeds_of([*task, *lines, *chats], 2, seed=0, step=3)
    assert len({seed for own in drawn for seed in own}) == 18


def test_anchors_that_are_prompts_of_the_task_are_noted(
    anchored: Settings, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompt = json.loads(Path(anchored().data).read_text(encoding="utf-8").splitlines()[1])["prompt"]
    (tmp_path / "own.txt").write_text(f"Who?\n{prompt}\n", encoding="utf-8")
    Trainer(anchored(anchors=str(tmp_path / "own.txt")))
    assert "1 of 2 prompts of own.txt are also prompts of the demonstrations (own.txt:2)" in capsys.readouterr().err


def test_anchors_without_a_training_split_are_refused_with_what_to_give(settings: Settings, tmp_path: Path) -> None:
    folder = tmp_path / "traffic"
    folder.mkdir()
    for name in ("dev.jsonl", "test.jsonl"):
        (folder / name).write_text('{"prompt": "a"}\n', encoding="utf-8")
    with pytest.raises(UserError, match=r"expected validation or test \(to choose one, give its file or its rows\)$"):
        check_inputs(settings(anchors=str(folder)))
    rows = datasets.Dataset.from_list([{"prompt": "a"}])
    with pytest.raises(
        UserError, match=r"^anchors: .*expected dev or test \(to choose one, give its file or its rows\)$"
    ):
        sd.train(settings(), anchors=datasets.DatasetDict(dev=rows, test=rows))


def test_what_is_not_read_of_anchors_is_noted(
    settings: Settings, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "traffic"
    for name in ("train.jsonl", "test.jsonl", "old/rows.jsonl"):
        (folder / name).parent.mkdir(exist_ok=True, parents=True)
        (folder / name).write_text('{"prompt": "a", "user": 7}\n', encoding="utf-8")
    check_inputs(settings(anchors=str(folder)))
    said = capsys.readouterr().err
    assert f"{folder}: folders not read: old" in said
    advice = "(to choose one, give its file or its rows)"  # no setting chooses it
    assert f"{folder}: split 'train' is read; the other split is 'test' {advice}\n" in said
    assert f"{folder}: columns not used: user" in said


@pytest.mark.parametrize(
    ("given", "sources"),
    [
        *[("none", ()), (None, ()), (["none"], ())],
        *[("package", ("package",)), ("a.txt, package,", ("a.txt", "package")), (["a"], ("a",))],
    ],
)
def test_sources_of_anchors(settings: Settings, given: Any, sources: tuple[str, ...]) -> None:
    assert settings(anchors=given).anchors == sources


@pytest.mark.parametrize("given", ["", " ", ",", [""], ["package", ""]])
def test_a_source_without_a_name_is_refused(settings: Settings, given: Any) -> None:
    with pytest.raises(UserError, match=r"'anchors': found .*, expected: package, a file or none$"):
        settings(anchors=given)


def test_prompts_in_place_of_sources_are_refused(settings: Settings) -> None:
    with pytest.raises(UserError, match=r"a file or none; write the prompts to a file, one per line$"):
        settings(anchors=["How are you?", "Write a poem."])


def test_none_beside_sources_is_refused(settings: Settings) -> None:
    with pytest.raises(UserError, match=r"'anchors': found 'package,none', expected: none, or sources without it$"):
        settings(anchors="package,none")


def test_unknown_kinds_of_the_package_are_refused(settings: Settings) -> None:
    told = r"found 'package:list\+poems', expected: package:KIND, .*arithmetic, code, .*; there is no kind 'poems'$"
    for name in ("anchors", "general_prompts"):
        with pytest.raises(UserError, match=f"setting '{name}': {told}"):
            settings(**{name: "package:list+poems"})
    with pytest.raises(UserError, match="there is no kind ''"):
        settings(anchors="package:")
    with pytest.raises(UserError, match=r"there is no kind 'lists'; did you mean list\?$"):
        settings(anchors="package:lists")


def test_anchors_of_some_kinds_are_a_part(anchored: Settings) -> None:
    part = Trainer(anchored(anchors="package:list+code")).stages[0].own_samples[1]
    assert part.name == "anchors:package:list+code"
    assert part.counted == f"{len(anchor_prompts('package:code+list'))} bundled general prompts"


def test_a_source_that_is_named_twice_is_refused(settings: Settings) -> None:
    with pytest.raises(UserError, match=r"'anchors': .*expected: each source once, and 'package' is named twice"):
        settings(anchors="package,a.txt,package")
    with pytest.raises(UserError, match=r"'anchors': .*expected: each source once, and './a.txt' is named twice"):
        settings(anchors="a.txt,./a.txt")


def test_a_frozen_teacher_beside_a_moving_adapter_takes_no_memory(anchored: Settings) -> None:
    run = Trainer(anchored(teacher="ema", lora_rank=4))
    assert [teacher.memory_bytes > 0 for teacher in run.teachers.values()] == [True, False]


@pytest.mark.parametrize("kind", ["rows", "paths"])
def test_anchors_from_python(settings: Settings, tmp_path: Path, kind: str) -> None:
    (tmp_path / "own.txt").write_text("Who?\nWhen?\n", encoding="utf-8")
    anchors: Any = [{"prompt": "Who?"}, {"prompt": "When?"}] if kind == "rows" else [tmp_path / "own.txt"]
    run = sd.train(settings(max_steps=1), anchors=anchors, batch_size=4)
    (source,) = run.config.anchors
    assert source == str(run.output_dir / "anchors.jsonl" if kind == "rows" else tmp_path / "own.txt")
    assert run.metrics[0][f"share/anchors:{Path(source).stem}"] == 0.25


@pytest.mark.parametrize("call", ["train", "plan", "check", "compare", "learn"])
def test_an_empty_list_of_anchors_is_refused(settings: Settings, tmp_path: Path, call: str) -> None:
    config = settings()
    more: dict[str, Any] = {
        "train": {"output_dir": tmp_path / "made"},
        "plan": {},
        "check": {"spill": True},
        "compare": {"output_dir": tmp_path / "made", "test": config.data},
        "learn": {"state": tmp_path / "made", "model": config.model},
    }[call]
    given: tuple[Any, ...] = ("add", config.data) if call == "learn" else (config.model, config.data)
    with pytest.raises(UserError, match=r"^setting 'anchors': found an empty list; for no anchors give None$"):
        getattr(sd, call)(*given, **more, anchors=[])
    assert not (tmp_path / "made").exists()


def test_settings_without_anchors_can_be_used_again(settings: Settings, tmp_path: Path) -> None:
    first = sd.train(settings(max_steps=1), anchors=None)
    written = first.output_dir / "config.yaml"
    assert "anchors: []" in written.read_text(encoding="utf-8")
    again = sd.train(first.config, output_dir=tmp_path / "again")
    third = ["train", "--config", str(written), "--output_dir", str(tmp_path / "third")]
    assert main(third) == 0
    assert again.config.anchors == sd.Run(tmp_path / "third").config.anchors == ()


def test_sources_of_one_name_are_told_apart(anchored: Settings, tmp_path: Path) -> None:
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "lines.txt").write_text("Where?\n", encoding="utf-8")
    config = anchored(anchors=[str(tmp_path / "lines.txt"), str(tmp_path / "more" / "lines.txt")])
    assert [part.name for part in stages_of(config)[0]] == ["task", "anchors:lines", "anchors:lines-2"]
    config = anchored(anchors=["a/x.txt", "b/x.txt", "x-2.txt"])
    assert [part.name for part in stages_of(config)[0][1:]] == ["anchors:x", "anchors:x-2", "anchors:x-2-2"]


def test_anchors_that_are_test_questions_are_noted(
    anchored: Settings, write_rows: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "own.txt").write_text("Who?\nWhy?\n", encoding="utf-8")
    test = write_rows([{"prompt": "Why?", "completion": "So."}], name="test.jsonl")
    Trainer(anchored(anchors=str(tmp_path / "own.txt"), test=str(test)))
    noted = "1 of 2 prompts of own.txt are also test questions (own.txt:2); on these, the test measures what part"
    assert f"{noted} 'anchors:own' teaches, too" in capsys.readouterr().err


@pytest.mark.parametrize(("lines", "said"), [("Who?", "1 prompt of own.txt"), ("Who?\nWhy?", "2 prompts of own.txt")])
def test_anchors_are_counted_in_words(anchored: Settings, tmp_path: Path, lines: str, said: str) -> None:
    (tmp_path / "own.txt").write_text(lines, encoding="utf-8")
    part = Trainer(anchored(anchors=str(tmp_path / "own.txt"))).stages[0].parts[1]
    assert part.counted == said


@pytest.mark.parametrize("misspelt", ["pakage", "Package:list", "packages:list+code"])
def test_a_misspelt_package_is_not_looked_for_on_the_hub(settings: Settings, misspelt: str) -> None:
    with pytest.raises(UserError, match="expected: package, a file or none; did you mean package"):
        settings(anchors=misspelt)


def test_progress_tells_the_loss_by_part(anchored: Settings, capsys: pytest.CaptureFixture[str]) -> None:
    config = anchored(max_steps=1)
    train(config)
    (line,) = metrics_of(config)
    shown = [f"{name} {line[f'loss/{name}']:.3f}" for name in ("task", "anchors:lines", "anchors:chats")]
    assert f"loss {line['loss']:.4f} ({', '.join(shown)})" in capsys.readouterr().err


def test_a_missing_file_of_anchors_is_one_line(anchored: Settings, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere\.txt: cannot be read: No such file"):
        Trainer(anchored(anchors=str(tmp_path / "nowhere.txt")))


# --- resuming, processes ---


@pytest.mark.parametrize(
    "values",
    [
        {"teacher": "ema"},
        pytest.param({"method": "sft"}, marks=pytest.mark.slow),
        pytest.param({"teacher": "frozen", "lora_rank": 4}, marks=pytest.mark.slow),
    ],
)
def test_a_resumed_run_equals_one_that_was_not_interrupted_to_the_bit(
    anchored: Settings, values: dict[str, Any]
) -> None:
    common: dict[str, Any] = {"save_steps": 2, "batch_size": 5, "max_steps": 6, "anchor_share": 0.3, **values}
    whole, cut = anchored("whole", **common), anchored("cut", **common)
    train(whole)
    assert {line.get("share/anchors:lines", 0.0) for line in metrics_of(whole)} == {0.0, 0.2}  # rounded both ways

    with pytest.raises(Cut):
        train(cut, on_step=crash_at(5))
    train(cut, resume=True)
    assert_same_run(whole, cut)


@pytest.fixture
def tied(model_folder: Callable[..., Path]) -> str:
    """A model in which every weight has a gradient from the task.

    Of weights that only anchors use, the first gradient is rounding, which AdamW's first step makes as large as any.
    """
    return str(model_folder(ends=ENDS, tied=True))


def test_micro_batches_change_nothing(anchored: Settings, tied: str) -> None:
    common: dict[str, Any] = {"drift_steps": 0, "model": tied}
    one, four = anchored("one", **common), anchored("four", gradient_accumulation_steps=4, **common)
    train(one)
    train(four)
    assert largest_difference(final_weights(one), final_weights(four)) < 1e-5


def test_micro_batches_of_processes_that_share_the_weights_change_no_batch(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("selfdistill.training.setup.world_size", lambda: 2)
    for size in (1, 4):
        assert batch_unit(settings(fsdp=True, batch_size=16, gradient_accumulation_steps=size)) == 2


@pytest.mark.parametrize(
    "values", [{}, pytest.param({"fsdp": True, "gradient_accumulation_steps": 2}, marks=pytest.mark.slow)], ids=str
)
def test_two_processes_give_what_one_gives(
    anchored: Settings, tied: str, tmp_path: Path, values: dict[str, Any]
) -> None:
    common: dict[str, Any] = {"drift_steps": 0, "max_steps": 4, "model": tied}
    one, two = anchored("one", **common), anchored("two", **common, **values)
    train(one)
    train_together(two, tmp_path)
    assert largest_difference(final_weights(one), final_weights(two)) < 5e-5
    for mine, theirs in zip(metrics_of(one), metrics_of(two), strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], abs=1e-5)
        assert mine["share/anchors:chats"] == theirs["share/anchors:chats"] == 0.25


# --- parts on the same samples ---


def test_what_is_drawn_before_the_first_step_is_drawn_once_for_all_parts(
    all_of_them: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, draw, make = all_of_them(method="ssd", max_steps=2), DrawnSamples.draw, METHODS["ssd"]
    drawn: list[int] = []

    def counted(fixed: DrawnSamples, loaded: Any, examples: Any) -> list[list[int]]:
        drawn.extend(x.demonstration.row for x in examples)
        return draw(fixed, loaded, examples)

    def twice(config: TrainConfig) -> tuple[Method, ...]:
        (method,) = make(config)
        return (replace(method, also=(("again", replace(method, weight=0.5)),)),)

    monkeypatch.setattr(DrawnSamples, "draw", counted)
    monkeypatch.setitem(METHODS, "ssd", twice)
    run = Trainer(config)
    task, again = run.stage.parts
    assert again.examples == task.examples
    assert len(drawn) == len(set(drawn)) == len(task.all_drawn)
    train(config)
    assert (Path(config.output_dir) / SAMPLES_FILE).read_text(encoding="utf-8").count("\n") == len(task.all_drawn)
    assert [line["loss/again"] for line in metrics_of(config)] == [line["loss/task"] for line in metrics_of(config)]


# --- parts of a method's own ---


@pytest.fixture
def replaying(anchored: Settings, write_rows: Callable[..., Path]) -> Settings:
    """Settings of SDFT with a quarter of SFT on other rows, at half the weight, and a quarter of anchors."""
    data = write_rows([{"prompt": f"old {i}", "completion": "cd" * (1 + i % 3)} for i in range(5)], name="old.jsonl")

    def replay(config: TrainConfig) -> Method:
        (task,), (old,) = sdft(config), sft(config)
        old = replace(old, examples=OtherRows(config, str(data), old.examples), weight=0.5)
        return replace(task, beside=(Part("replay", old, 0.25),))

    return lambda out="run", **values: anchored(out, **({"method": replay, "anchor_share": 0.25} | values))


@pytest.mark.parametrize("micro_batches", [1, 4])
def test_the_gradient_of_a_step_is_the_sum_of_its_parts_and_those_of_the_method(
    replaying: Settings, monkeypatch: pytest.MonkeyPatch, micro_batches: int
) -> None:
    config = replaying(learning_rate=1e-2, max_grad_norm=1e9, gradient_accumulation_steps=micro_batches)
    base = load_model(config.model).model
    run = Trainer(config)
    run.step(0)
    student, add = copy.deepcopy(run.loaded.model), run.gradient.add
    found: dict[str, Tensor] = {}
    learnt: list[BatchPart] = []

    def kept(parts: Any, stopwatch: Any) -> Any:
        learnt.extend(parts)
        return add(parts, stopwatch)

    monkeypatch.setattr(type(run.gradient), "add", lambda _, *given: kept(*given))
    monkeypatch.setattr(run.optimizer, "step", lambda: found.update(gradients(run.loaded.model)))
    monkeypatch.setattr(run.teacher, "update", lambda *_, **__: None)
    metrics = run.step(1)
    weights = {"task": 0.5, "replay": 0.25 * 0.5, "anchors:lines": 0.125, "anchors:chats": 0.125}
    assert {part.name: len(part.completions) for part in learnt} == {
        "task": 4,
        "replay": 2,
        "anchors:lines": 1,
        "anchors:chats": 1,
    }
    assert all("old.jsonl" in c.example.demonstration.source for c in learnt[1].completions)
    losses = {part.name: plain(run, base, part, student) for part in learnt}
    sum(weights[name] * loss for name, loss in losses.items()).backward()  # type: ignore[union-attr]
    expected = gradients(student)
    assert max(float(g.abs().max()) for g in expected.values()) > 1e-3
    assert largest_difference(found, expected) < 1e-5
    for name, loss in losses.items():
        assert metrics[f"share/{name}"] == weights[name]
        assert metrics[f"loss/{name}"] == pytest.approx(float(loss.detach()), abs=1e-5)
    assert metrics["loss"] == pytest.approx(sum(weights[name] * float(losses[name].detach()) for name in weights))


def test_a_resumed_run_with_rows_replayed_is_the_uninterrupted_one_to_the_bit(replaying: Settings) -> None:
    common: dict[str, Any] = {"save_steps": 2, "batch_size": 6, "max_steps": 6, "anchor_share": 0.2, "teacher": "ema"}
    whole, cut = replaying("whole", **common), replaying("cut", **common)
    train(whole)
    assert {line["share/replay"] for line in metrics_of(whole)} == {0.5 / 6, 0.5 * 2 / 6}  # rounded both ways
    with pytest.raises(Cut):
        train(cut, on_step=crash_at(5))
    train(cut, resume=True)
    assert_same_run(whole, cut)


def test_epochs_count_the_task_and_a_plan_says_what_is_replayed(replaying: Settings) -> None:
    planned = sd.plan(replaying(anchors=None, max_steps=None, num_train_epochs=3))
    assert planned.config.max_steps == 3  # of 6 rows of the task, 6 a step
    assert "replay: 5 demonstrations of old.jsonl, 25.0% of every batch" in planned.notes


def test_a_memory_plan_counts_the_rows_that_are_replayed(replaying: Settings, tmp_path: Path) -> None:
    def lengths() -> tuple[int, int]:
        config = replaying(anchors=None, max_completion_length=100)
        return sd.memory_plan(config, memory="8GiB").plan.lengths

    before = lengths()
    (tmp_path / "old.jsonl").write_text(
        json.dumps({"prompt": "old " * 80, "completion": "cd"}) + "\n", encoding="utf-8"
    )
    after = lengths()
    assert (before[0] < after[0], after[0] > 320) == (True, True)
    assert after[1] == before[1]  # no teacher reads them


def test_a_missing_file_of_other_rows_is_one_line_and_begins_no_folder(replaying: Settings, tmp_path: Path) -> None:
    (tmp_path / "old.jsonl").unlink()
    with pytest.raises(UserError, match=r"old\.jsonl.*: no such file or folder"):
        train(replaying())
    assert not (tmp_path / "run").exists()


def test_parts_of_equal_rows_sample_together_and_with_seeds_of_their_own(
    anchored: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    seeds: list[list[int]] = []
    draw = sequences.sample

    def counted(loaded: Any, prompts: Any, sampling: Any, own: Any) -> Any:
        seeds.append(list(own))
        return draw(loaded, prompts, sampling, own)

    def twice(config: TrainConfig) -> Method:
        (task,) = sdft(config)
        return replace(task, beside=(Part("again", replace(task, weight=0.5), 0.25),))

    monkeypatch.setattr(sequences, "sample", counted)
    run = Trainer(anchored(method=twice, anchor_share=0.25))
    run.step(0)
    assert [len(own) for own in seeds] == [8]
    assert len(set(seeds[0])) == 8
    first = [part.examples[0] for part in run.stage.own_samples]
    assert [x.demonstration.row for x in first] == [0] * 4
    apart = {tuple(sequences.seeds_of([x], 1, seed=0, step=3)[0]) for x in first}
    assert len(apart) == 4


def test_samples_that_several_parts_draw_before_the_first_step_are_all_kept(
    anchored: Settings, write_rows: Callable[..., Path]
) -> None:
    data = write_rows([{"prompt": f"old {i}", "completion": "cd"} for i in range(4)], name="old.jsonl")

    def drawn(config: TrainConfig) -> Method:
        (task,) = offline_distillation(config)
        old = replace(task, examples=OtherRows(config, str(data), task.examples))
        return replace(task, beside=(Part("old", old, 0.25),))

    config = anchored(method=drawn, anchors=None, max_steps=1)
    train(config)
    lines = (Path(config.output_dir) / SAMPLES_FILE).read_text(encoding="utf-8").splitlines()
    sources = [Path(json.loads(line)["source"]).name.split(":")[0] for line in lines]
    assert sources == ["train.jsonl"] * 6 + ["old.jsonl"] * 4


def test_samples_without_room_are_a_share_of_the_samples_that_could_lack_it(
    anchored: Settings, write_rows: Callable[..., Path]
) -> None:
    data = write_rows([{"prompt": "old", "completion": "cd"}], name="old.jsonl")

    def hinted(config: TrainConfig) -> Method:
        (task,), (old,) = sdft(config), sft(config)
        seen = replace(task, select=HintContexts(hint_of(config, 1)))
        return replace(
            old, beside=(Part("seen", replace(seen, examples=OtherRows(config, str(data), task.examples)), 0.75),)
        )

    run = Trainer(anchored(method=hinted, anchors=None, teacher="frozen"))
    run.selector.config = run.config.model_copy(update={"max_prompt_length": 1})
    assert run.step(0)["unfit"] == 1


def test_what_a_part_shows_its_teacher_fits_into_the_context_window_of_that_teacher(
    all_of_them: Settings, write_rows: Callable[..., Path], model_folder: Callable[..., Path]
) -> None:
    def attempting(config: TrainConfig) -> Method:
        (taught,) = sdpo(config)
        return replace(taught, teacher=FROZEN, beside=(Part("taught", taught, 0.5),))

    rows = [{"prompt": f"q{i}", "answer": "no such reply"} for i in range(4)]
    data = {"data": str(write_rows(rows, name="hard.jsonl")), "batch_size": 4}
    longest = max(len(x.student_ids) for x in Trainer(all_of_them(method="grpo", **data)).stage.task.examples)
    small = str(model_folder(ends=ENDS, seed=1, room=longest + 10))
    values: dict[str, Any] = {"method_settings": {"show": "feedback"}, "max_completion_length": 10, "teacher": "frozen"}
    metrics = Trainer(all_of_them(method=attempting, teacher_model=small, **data, **values)).step(0)
    assert metrics["learnt"] == 1  # the task's teacher has room
    assert metrics["unfit"] == 0.5  # that of the other half has none
