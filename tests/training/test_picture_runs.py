"""Runs with pictures: what they learn, what they share and leave alone, and that they resume and load elsewhere."""

from __future__ import annotations

import json
import math
import random
import re
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import (
    Cut,
    add_gradient,
    assert_same_run,
    crash_at,
    gradients,
    largest_difference,
    metrics_of,
    share_apart,
)
from picture_models import ALL, FAMILIES, PictureFamily, is_vision
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor

import selfdistill
from selfdistill.config import ExportConfig, MergeConfig, TrainConfig
from selfdistill.data import (
    Verdict,
    anchor_prompts,
    draw_shapes,
    encode,
    load_demonstrations,
    parse_context,
    pictures_in,
)
from selfdistill.data.shapes import COLOURS, draw_shape
from selfdistill.errors import UserError
from selfdistill.evaluation import spill
from selfdistill.loss import CrossEntropy, Divergence
from selfdistill.methods import hints
from selfdistill.methods.prefixes import continued
from selfdistill.model import ForwardPass, Sampling, fake_model, load_model, make_optimizer, pictures
from selfdistill.training import export, merge, train
from selfdistill.training.memory import MemoryPlanner
from selfdistill.training.planned_parts import planned_stages
from selfdistill.training.token_views import token_views
from selfdistill.training.traced_step import Device
from selfdistill.training.trainer import Trainer

family = pytest.mark.parametrize("family", ALL, ids=lambda family: family.name)
one_family = pytest.mark.parametrize(
    "family", [pytest.param(f, id=f.name, marks=() if f.name == "gemma3" else pytest.mark.slow) for f in FAMILIES]
)
"""For what the families share."""
BY_NAME = {family.name: family for family in FAMILIES}
Make = Callable[..., TrainConfig]


def rows_of(folder: Path, name: str, count: int) -> list[dict[str, Any]]:
    """The package's drawn shapes, asked for and answered in one letter each."""
    rows = draw_shapes(folder / f"{name}.jsonl", count)
    return [{**row, "prompt": "?", "completion": row["completion"][0]} for row in rows]


def copied(rows: Sequence[dict[str, Any]], seed: int = 0) -> list[dict[str, Any]]:
    """The rows after an earlier turn with the same picture, whose answer, whatever it is, is to be given again."""
    chance, made = random.Random(seed), []
    turn = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "?"}]}
    for row in rows:
        said = chance.choice(COLOURS)[0]
        earlier = {"role": "assistant", "content": said}
        made.append({"prompt": [turn, earlier, turn], "completion": said, "images": row["images"] * 2})
    return made


@pytest.fixture
def make(tmp_path: Path, write_rows: Callable[..., Path]) -> Make:
    """Settings of a run on eight drawn rows."""

    def configure(family: PictureFamily = BY_NAME["llava"], out: str = "run", **values: Any) -> TrainConfig:
        folder = tmp_path / family.name
        if not folder.exists():
            family.write(folder)
        defaults: dict[str, Any] = {
            "model": str(folder),
            "data": str(values.pop("data", None) or write_rows(rows_of(tmp_path, "a", 8), name="a.jsonl")),
            "output_dir": str(tmp_path / out),
            "context": "turns",
            "max_completion_length": 3,
            "batch_size": 4,
            "max_steps": 3,
            "learning_rate": 3e-3,
            "lr_scheduler_type": "constant",
            "warmup_steps": 0,
            "save_steps": 0,
            "drift_steps": 0,
            "view_rows": 0,
            "mixed_precision": "no",
        }
        return TrainConfig(**(defaults | values))

    return configure


def weights(folder: str | Path) -> dict[str, torch.Tensor]:
    return load_file(Path(folder) / "model.safetensors")


def accuracy(model: Path | str, data: Path) -> float:
    return selfdistill.evaluate(str(model), str(data), max_completion_length=2, progress=False).accuracy


# --- what is learnt ---


@pytest.mark.parametrize("name", [pytest.param("llava", marks=pytest.mark.slow), "idefics3"])
def test_a_tiny_model_learns_colours_from_demonstrations(
    make: Make, write_rows: Callable[..., Path], tmp_path: Path, name: str
) -> None:
    test = write_rows(rows_of(tmp_path, "t", 24), name="t.jsonl")
    data = write_rows(rows_of(tmp_path, "l", 48), name="l.jsonl")
    config = make(BY_NAME[name], data=data, method="sft", max_steps=50, batch_size=16)
    final = train(config)
    assert accuracy(config.model, test) < 0.5
    assert accuracy(final, test) > 0.8


@pytest.mark.slow
def test_a_tiny_model_teaches_itself_colours_from_demonstrations_in_its_context(
    make: Make, write_rows: Callable[..., Path], tmp_path: Path
) -> None:
    """It has first learnt to repeat what an earlier turn says, whatever the picture: so its teacher is right."""
    test = write_rows(rows_of(tmp_path, "t", 24), name="t.jsonl")
    before = write_rows(copied(rows_of(tmp_path, "c", 128)), name="c.jsonl")
    copies = train(make(out="copies", data=before, method="sft", max_steps=100, batch_size=16))
    assert accuracy(copies, test) < 0.5
    data = write_rows(rows_of(tmp_path, "l", 48), name="l.jsonl")
    final = train(make(model=str(copies), data=data, max_completion_length=2, max_steps=50, batch_size=16))
    assert accuracy(final, test) > 0.8


# --- how ---


def assert_same_gradients(one: TrainConfig, other: TrainConfig) -> None:
    """Of the first four examples, to 1e-5 of the largest."""
    found = []
    for config in (one, other):
        run = Trainer(config)
        add_gradient(run, run.stage.task.method.sequence(run.loaded, run.stage.task.examples[:4], 0))
        found.append(gradients(run.loaded.model))
    scale = max(float(gradient.abs().max()) for gradient in found[0].values())
    assert largest_difference(*found) < 1e-5 * scale


@family
def test_one_batch_and_many_single_rows_give_the_same_gradient(make: Make, family: PictureFamily) -> None:
    assert_same_gradients(*(make(family, method="sft", gradient_accumulation_steps=size) for size in (1, 4)))


@one_family
def test_weights_and_arithmetic_in_bfloat16(make: Make, family: PictureFamily) -> None:
    for number, values in enumerate(({"dtype": "bfloat16"}, {"mixed_precision": "bf16", "lora_rank": 2})):
        config = make(family, out=str(number), max_steps=2, **values)
        train(config)
        assert all(math.isfinite(step["loss"]) for step in metrics_of(config))


def test_a_frozen_teachers_kept_contexts_change_nothing(
    make: Make, write_rows: Callable[..., Path], tmp_path: Path
) -> None:
    bare = [{"prompt": f"What is {i}?", "completion": "a"} for i in range(4)]
    data = write_rows([*rows_of(tmp_path, "k", 4), *bare], name="k.jsonl")
    settings = {"data": data, "teacher": "frozen", "batch_size": 3, "max_steps": 6}
    kept, not_kept = (make(out=str(mib), teacher_cache_mib=mib, **settings) for mib in (64, 0))
    one, other = (weights(train(config)) for config in (kept, not_kept))
    assert share_apart(one, other) < 1e-4


def test_what_the_teacher_sees_has_a_word_for_each_picture(make: Make) -> None:
    (view,) = token_views(Trainer(make(view_rows=1)))
    seen = view["teacher_sees"]
    assert (seen.count("[picture]"), seen.count("image")) == (2, 0)
    assert re.sub(r"\s", "", seen).count("[picture]?") == 2


@family
def test_recomputed_activations_change_nothing(make: Make, family: PictureFamily) -> None:
    assert_same_gradients(*(make(family, method="sft", gradient_checkpointing=again) for again in (False, True)))


@family
def test_the_vision_tower_stays_and_the_teacher_shares_it(make: Make, family: PictureFamily) -> None:
    run = Trainer(make(family))
    assert run.teacher is not None
    students = dict(run.loaded.model.named_parameters())
    teachers = dict(run.teacher.networks[0].named_parameters())
    assert {name for name in students if students[name] is teachers[name]} == set(filter(is_vision, students))
    assert not any(map(is_vision, run.teacher.state_dict()))
    config = make(family, out="trained")
    before, after = weights(config.model), weights(train(config))
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved
    assert not any(map(is_vision, moved))


def pictures_read(run: Trainer, steps: int) -> list[int]:
    """How many pictures the vision towers read in each step."""
    assert run.teacher is not None
    read, counts = [0], []
    for tower in {network.base_model.vision_tower for network in (run.loaded.model, *run.teacher.networks)}:
        tower.register_forward_hook(lambda _, __, output: read.append(len(output.last_hidden_state)))
    for step in range(steps):
        run.step(step)
        counts.append(sum(read))
        read.clear()
    return counts


def test_a_frozen_vision_tower_reads_each_picture_once(make: Make) -> None:
    assert pictures_read(Trainer(make(batch_size=4, num_generations=2)), 3) == [4, 4, 0]


def test_a_trained_vision_tower_reads_every_copy_in_every_pass(make: Make) -> None:
    """As documented: once per prompt, then per sample twice with the context ``turns`` and once by the student."""
    run = Trainer(make(batch_size=4, train_vision_tower=True))
    assert pictures_read(run, 3) == [4 + 2 * 4 + 4] * 3


@pytest.mark.parametrize("teacher", ["ema", pytest.param("frozen", marks=pytest.mark.slow)])
def test_a_run_is_the_same_to_the_bit_however_many_features_are_kept(
    make: Make, monkeypatch: pytest.MonkeyPatch, teacher: str
) -> None:
    whole, without = (make(out=out, batch_size=3, teacher=teacher, save_steps=3) for out in ("whole", "without"))
    train(whole)
    monkeypatch.setattr(pictures, "KEPT_BYTES", 0)
    train(without)
    assert_same_run(whole, without)


@family
def test_an_adapter_learns_the_same_from_kept_features(make: Make, family: PictureFamily) -> None:
    found = []
    for keep in (True, False):
        run = Trainer(make(family, lora_rank=2))
        assert run.loaded.pictures is not None
        run.loaded.pictures.keep_features(keep)
        add_gradient(run, run.stage.task.method.sequence(run.loaded, run.stage.task.examples[:4], 0))
        found.append(gradients(run.loaded.model))
    scale = max(float(gradient.abs().max()) for gradient in found[0].values())
    assert largest_difference(*found) < 1e-5 * scale


def test_the_vision_tower_is_trained_on_request(make: Make) -> None:
    config = make(train_vision_tower=True, method="sft")
    before, after = weights(config.model), weights(train(config))
    assert any("vision_tower" in name and not torch.equal(before[name], after[name]) for name in before)
    with pytest.raises(UserError, match="'train_vision_tower' does not work with lora_rank"):
        make(train_vision_tower=True, lora_rank=2)


@pytest.mark.parametrize(
    "values",
    [
        {"lora_rank": 0},
        pytest.param({"lora_rank": 2}, marks=pytest.mark.slow),
        pytest.param({"teacher": "frozen"}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_a_run_that_crashed_goes_on_as_if_it_had_not(make: Make, values: dict[str, Any]) -> None:
    whole, cut = (make(out=out, save_steps=2, max_steps=4, **values) for out in ("whole", "cut"))
    train(whole)
    with pytest.raises(Cut):
        train(cut, on_step=crash_at(3))
    train(cut, resume=True)
    if values.get("lora_rank"):
        assert (Path(whole.output_dir) / "final" / "adapter_model.safetensors").read_bytes() == (
            Path(cut.output_dir) / "final" / "adapter_model.safetensors"
        ).read_bytes()
    else:
        assert_same_run(whole, cut)


def test_the_shortest_hints_keep_their_pictures(
    make: Make, write_rows: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Row i is made right with i tenths of its five words: without a hint, with one to three words, or never."""
    monkeypatch.setattr(hints, "verdicts_on", lambda _, made, __: [Verdict(float(not n)) for n in range(len(made))])
    rows = [{**row, "completion": "a b c d e", "answer": "a"} for row in rows_of(tmp_path, "h", 12)]
    common: dict[str, Any] = {"data": write_rows(rows, name="h.jsonl"), "hint": "shortest", "teacher": "frozen"}
    common |= {"save_steps": 1, "max_steps": 3, "batch_size": 12, "max_completion_length": 16}
    whole, cut = (make(out=out, **common) for out in ("whole", "cut"))
    train(whole)
    with pytest.raises(Cut):
        train(cut, on_step=crash_at(2))
    train(cut, resume=True)
    assert_same_run(whole, cut)


def test_a_run_does_not_go_on_with_other_pictures(make: Make, tmp_path: Path) -> None:
    config = make(save_steps=2, max_steps=2)
    train(config)
    draw_shape("black", "square").save(tmp_path / "a0.png")
    with pytest.raises(UserError, match="the training examples have changed"):
        train(config.model_copy(update={"max_steps": 4}), resume=True)


@pytest.mark.parametrize("values", [{"method": "ssd"}, {"hint": "shortest"}], ids=str)
def test_what_was_drawn_from_another_picture_is_not_kept(
    make: Make, write_rows: Callable[..., Path], tmp_path: Path, values: dict[str, Any]
) -> None:
    data = write_rows([{**row, "answer": "a"} for row in rows_of(tmp_path, "a", 4)], name="kept.jsonl")
    keys = []
    for name in ("black", "white"):
        draw_shape(name, "square").save(tmp_path / "a0.png")
        stage = Trainer(make(out=name, data=data, **values)).stage
        drawn = stage.task.method.drawn
        assert drawn is not None
        keys.append([key for key, *_ in drawn.samples(stage.task.all_drawn)])
    assert [a == b for a, b in zip(*keys, strict=True)] == [False, True, True, True]


@family
@pytest.mark.parametrize("rank", [pytest.param(0, marks=pytest.mark.slow), 2])
def test_final_models_load_in_transformers_with_their_processor(make: Make, family: PictureFamily, rank: int) -> None:
    config = make(family, lora_rank=rank)
    final = train(config)
    picture, text = draw_shape("red", "circle"), [{"type": "image"}, {"type": "text", "text": "?"}]
    made = []
    for folder in (final, config.model):
        processor = AutoProcessor.from_pretrained(folder)
        prompt = processor.apply_chat_template([{"role": "user", "content": text}], add_generation_prompt=True)
        made.append(processor(text=[prompt], images=[picture], return_tensors="pt"))
    for name, value in made[0].items():
        assert torch.equal(value, made[1][name])
    if rank:
        settings = json.loads((final / "adapter_config.json").read_text(encoding="utf-8"))
        assert settings["exclude_modules"]
        adapter = load_file(final / "adapter_model.safetensors")
        assert not any(map(is_vision, adapter))
    plain = load_model(str(final), merge_adapter=True).model if rank else None
    model = plain or AutoModelForImageTextToText.from_pretrained(final)
    assert torch.isfinite(model(**made[0]).logits).all()
    assert_card_of_pictures(final)


def assert_card_of_pictures(folder: Path) -> None:
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert "AutoModelForImageTextToText.from_pretrained" in card
    assert "processor = AutoProcessor.from_pretrained" in card
    assert "pipeline_tag: image-text-to-text" in card


def test_cards_of_sums_and_merged_adapters_load_an_image_text_model(make: Make, tmp_path: Path) -> None:
    config = make(lora_rank=2, max_steps=1)
    run, base = str(train(config)), config.model
    full = str(export(ExportConfig(run=run, output_dir=str(tmp_path / "full"), merge=True)))
    total = merge(MergeConfig(model=base, add=full, subtract=base, output_dir=str(tmp_path / "sum")))
    for folder in (Path(full), total):
        assert_card_of_pictures(folder)


def test_the_python_interface_takes_pictures_in_memory_and_loaded_models(make: Make, tmp_path: Path) -> None:
    config = make()
    rows = [{"prompt": "?", "completion": colour[0], "images": [draw_shape(colour, "circle")]} for colour in COLOURS]
    settings: dict[str, Any] = {"max_completion_length": 2, "batch_size": 2, "max_steps": 1, "context": "turns"}
    model = AutoModelForImageTextToText.from_pretrained(config.model)
    processor = AutoProcessor.from_pretrained(config.model)
    out = tmp_path / "api"
    selfdistill.train(model, rows, tokenizer=processor, output_dir=str(out), test=rows, progress=False, **settings)
    assert len(list((out / "pictures").iterdir())) == len(COLOURS)
    assert accuracy(out, out / "data.jsonl") >= 0
    selfdistill.check(config.model, rows, max_completion_length=2, progress=False)


# --- what is planned, and what is refused ---


@pytest.mark.parametrize(
    ("family", "values"),
    [
        *(pytest.param(f, {}, marks=() if f.name == "gemma3" else pytest.mark.slow) for f in FAMILIES),
        pytest.param(BY_NAME["llava"], {"lora_rank": 2}, marks=pytest.mark.slow),
        pytest.param(BY_NAME["llava"], {"method": "sft", "gradient_checkpointing": True}, marks=pytest.mark.slow),
    ],
    ids=lambda value: value.name if isinstance(value, PictureFamily) else str(value),
)
def test_the_plan_of_memory_counts_tower_and_picture_tokens(
    make: Make, tmp_path: Path, family: PictureFamily, values: dict[str, Any]
) -> None:
    config, device = make(family, **values), Device("cpu", "no")
    plan = MemoryPlanner(config, load_demonstrations(config.data), device).plan(config)
    assert plan.untraced is None
    bare = [{name: row[name] for name in ("prompt", "completion")} for row in rows_of(tmp_path, "a", 8)]
    without = MemoryPlanner(config, load_demonstrations(bare), device).plan(config)
    assert plan.peak > without.peak
    size = sum(value.nbytes for value in weights(config.model).values())
    fixed = plan.phases[-1].bytes
    assert fixed["weights"] >= size
    if not values:
        assert fixed["teacher"] < 0.9 * size
    loaded = load_model(config.model)
    assert loaded.pictures is not None
    loaded.pictures.keep_features(True)
    seen = [picture for row in load_demonstrations(config.data) for picture in row.images]
    with torch.no_grad():
        assert fixed["pictures"] == sum(loaded.pictures.feature_bytes(loaded.model, picture) for picture in seen) > 0


@pytest.mark.parametrize(
    ("method", "own"), [("pope", {"where": "prompt"}), ("actguide", {}), ("sort", {}), ("sdpo", {"show": "sibling"})]
)
def test_the_plan_of_memory_keeps_the_pictures_of_longer_prompts(
    make: Make, write_rows: Callable[..., Path], tmp_path: Path, method: str, own: dict[str, Any]
) -> None:
    data = write_rows([{**row, "privileged_context": "a"} for row in rows_of(tmp_path, "a", 8)], name="guided.jsonl")
    config = make(BY_NAME["gemma3"], data=data, method=method, num_generations=2, method_settings=own)
    demonstrations = load_demonstrations(config.data)
    for part in planned_stages(config, demonstrations, fake_model(config.model, dtype="auto"), 4)[0]:
        teachers = [x.teacher_ids for x in part.examples if x.teacher_ids is not None]
        assert all(map(pictures_in, [*(x.student_ids for x in part.examples), *teachers, *part.other_prompts]))
    assert MemoryPlanner(config, demonstrations, Device("cpu", "no")).plan(config).untraced is None


@one_family
def test_a_sample_that_continues_a_beginning_sees_the_picture(make: Make, family: PictureFamily) -> None:
    run = Trainer(make(family, method="pope", num_generations=2))
    examples, beginnings = run.stage.task.examples[:3], [[70], [], [71, 72]]
    for one in continued(run.loaded, examples, beginnings, Sampling(6), 0.5, [1, 2, 3]):
        output = run.forward_pass(run.loaded.model, [one.example.student_ids], [one.ids])
        assert run.loaded.pictures is not None
        logp_NV = run.loaded.pictures.allowed(output.head(output.hidden_ND)).log_softmax(-1)
        logp_N = logp_NV[torch.arange(len(one.ids)), torch.tensor(one.ids)]
        first = one.given[0][1] if one.given else 0
        assert one.logps is not None
        assert logp_N[first:].tolist() == pytest.approx(one.logps[first:], abs=1e-4)


@pytest.mark.parametrize("method", ["pope", pytest.param("trapo", marks=pytest.mark.slow)])
def test_methods_that_continue_a_beginning_learn_from_rows_with_pictures(make: Make, method: str) -> None:
    config = make(method=method, num_generations=2 if method == "pope" else None, max_steps=1, scorer="contains")
    train(config)
    assert "skipped" not in metrics_of(config)[0]


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ({"engine": "vllm"}, "setting 'engine' does not work with pictures; leave it out"),
        ({"torch_compile": True}, "setting 'torch_compile' does not work with pictures; leave it out"),
    ],
)
def test_what_does_not_work_with_pictures_is_refused_in_one_line(
    make: Make, values: dict[str, Any], problem: str
) -> None:
    with pytest.raises(UserError, match=problem) as error:
        train(make(**values))
    assert "\n" not in str(error.value)


def test_pictures_of_anchors_are_refused_like_those_of_the_task(
    make: Make, write_rows: Callable[..., Path], tmp_path: Path
) -> None:
    data, anchors = write_rows(count=2), write_rows(rows_of(tmp_path, "n", 1), name="n.jsonl")
    with pytest.raises(UserError, match=r"^setting 'torch_compile' does not work with pictures; leave it out$"):
        Trainer(make(data=data, method="sft", max_completion_length=12, anchors=str(anchors), torch_compile=True))


def test_what_check_tries_out_leaves_the_vision_tower_alone(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    config, moved = make(), []

    def seen(parameters: Sequence[torch.Tensor], *arguments: Any, **options: Any) -> Any:
        moved.append(len(parameters))
        return make_optimizer(parameters, *arguments, **options)

    for name, value in (("make_optimizer", seen), ("STEPS", 1)):
        monkeypatch.setattr(spill, name, value)
    loaded = load_model(config.model)
    chat = loaded.chat({}, None)
    limits: dict[str, Any] = {"max_prompt_length": None, "max_completion_length": 3, "window": loaded.window}
    rows, _ = encode(load_demonstrations(config.data)[:2], parse_context("turns"), chat, **limits)
    settings = spill.TrialSettings(1e-3, Sampling(3), 0, 0, nullcontext)
    trials = spill.Trials(loaded, ForwardPass(loaded), anchor_prompts()[:2], chat, settings)
    for loss in (CrossEntropy(), Divergence()):
        trials(loss, rows)
    names = [name for name, _ in loaded.model.named_parameters()]
    assert moved == [sum(not is_vision(name) for name in names)] * 2
    assert moved[0] < len(names)
    trained = sum(p.numel() for name, p in loaded.model.named_parameters() if not is_vision(name))
    assert spill.bytes_of_steps(loaded, 0) == 4 * sum(p.numel() for p in loaded.model.parameters()) + 12 * trained


def test_an_engine_is_not_asked_to_sample_from_pictures(make: Make) -> None:
    config = make()
    with pytest.raises(UserError, match="'engine': prompts with pictures can be sampled only by PyTorch; leave it out"):
        selfdistill.evaluate(config.model, config.data, max_completion_length=2, engine="vllm", progress=False)
