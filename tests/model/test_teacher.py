"""The teacher follows the student as its kind says, and leaves the student as it was."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from itertools import cycle
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from selfdistill.model.device import captured
from selfdistill.model.forward import ForwardPass
from selfdistill.model.loading import LoadedModel
from selfdistill.model.lora import add_lora
from selfdistill.model.teacher import Teacher, TeacherRule, staging_bytes

Loader = Callable[..., LoadedModel]
CONTEXTS, COMPLETIONS = [[1, 2, 3], [9] * 7], [[4, 5], [6, 7, 8]]


def move(model: Any, step: int, size: float = 0.01) -> None:
    """What an optimizer step might do to every trained weight, the same for the same step."""
    generator = torch.Generator().manual_seed(step)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter.dtype) * size)


def trained(model: Any) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


def of_teacher(teacher: Teacher) -> dict[str, Tensor]:
    """The weights that score, named as the student's."""
    with teacher.model() as network:
        parameters = dict(network.named_parameters())
    lora = any(".teacher." in name for name in parameters)
    return {
        name.replace(".teacher.", ".default."): parameter.detach().clone()
        for name, parameter in parameters.items()
        if not lora or ".teacher." in name
    }


@torch.no_grad()
def logits(scorer: ForwardPass, model: Any) -> Tensor:
    scores = scorer(model, CONTEXTS, COMPLETIONS)
    return scores.head(scores.hidden_ND)


def student_and_teacher(load: Loader, lora: bool, kind: Any, **options: Any) -> tuple[LoadedModel, Teacher]:
    loaded = load(dtype=options.pop("dtype", "float32"))
    if lora:
        add_lora(loaded, 4, None, 0)
        move(loaded.model, 99)  # away from B = 0
    return loaded, Teacher(loaded, TeacherRule(kind, **options))


both = pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])


@both
def test_an_ema_is_the_weighted_sum_of_all_students_so_far(load: Loader, lora: bool) -> None:
    rate = 0.3
    loaded, teacher = student_and_teacher(load, lora, "ema", ema_rate=rate)
    students = [trained(loaded.model)]
    for step in range(1, 8):
        move(loaded.model, step)
        teacher.update(step)
        students.append(trained(loaded.model))
    n = len(students) - 1
    shares = [(1 - rate) ** n] + [rate * (1 - rate) ** (n - k) for k in range(1, n + 1)]
    assert sum(shares) == pytest.approx(1)
    averages = of_teacher(teacher)
    assert averages.keys() == students[0].keys()
    for name, average in averages.items():
        closed_form = sum(share * s[name].double() for share, s in zip(shares, students, strict=True))
        torch.testing.assert_close(average.double(), closed_form, atol=1e-6, rtol=0)
        assert not torch.equal(average, students[-1][name])


def test_only_an_average_waits_for_the_student_to_move(load: Loader) -> None:
    for kind, stays in (("ema", True), ("snapshot", False)):
        loaded, teacher = student_and_teacher(load, False, kind, snapshot_steps=2)
        before = of_teacher(teacher)
        move(loaded.model, 1)
        teacher.update(2, student_moved=False)
        after = of_teacher(teacher)
        assert all(torch.equal(before[name], after[name]) for name in before) == stays


def test_the_average_of_a_bfloat16_model_is_float32_and_moves_where_a_bfloat16_one_would_not(load: Loader) -> None:
    loaded, teacher = student_and_teacher(load, False, "ema", dtype="bfloat16", ema_rate=0.01)
    start = trained(loaded.model)
    name = "model.layers.0.mlp.up_proj.weight"
    naive = start[name].clone()
    with torch.no_grad():
        for parameter in loaded.model.parameters():
            parameter.mul_(1.0625)  # exact in bfloat16, up to one rounding
    target = trained(loaded.model)[name]
    for step in range(1, 101):
        teacher.update(step)
        naive.lerp_(target, 0.01)
    assert torch.equal(naive, start[name])  # each step is less than half of the last bit
    average = teacher.state_dict()[name]
    assert average.dtype == torch.float32
    expected = target.double() + (start[name].double() - target.double()) * 0.99**100
    torch.testing.assert_close(average.double(), expected, atol=1e-6, rtol=1e-5)
    scoring = of_teacher(teacher)[name]
    assert scoring.dtype == torch.bfloat16
    assert torch.equal(scoring, average.bfloat16())
    assert not torch.equal(scoring, start[name])


@pytest.mark.parametrize("numbers", [1, 100, 2**25], ids=["rows", "a few rows", "whole weights"])
def test_an_average_is_moved_in_parts(load: Loader, monkeypatch: pytest.MonkeyPatch, numbers: int) -> None:
    """Whatever their size; weights that are float32 in a bfloat16 model are not rounded on the way."""
    monkeypatch.setattr("selfdistill.model.teacher.PART_NUMBERS", numbers)
    loaded = load(dtype="bfloat16")
    loaded.model.model.norm.float()
    loaded.model.model.norm.shift = torch.nn.Parameter(torch.tensor(0.3, dtype=torch.bfloat16))  # a scalar
    teacher = Teacher(loaded, TeacherRule("ema", ema_rate=0.3))
    expected = {name: weight.float() for name, weight in trained(loaded.model).items()}
    assert staging_bytes(loaded.model.parameters()) <= max(2 * numbers, 2 * 64)  # a row of 64 is not cut
    for step in range(1, 4):
        teacher.wait()
        move(loaded.model, step)
        teacher.update(step)
        for name, weight in trained(loaded.model).items():
            expected[name].lerp_(weight.float(), 0.3)
    found = teacher.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    scoring = of_teacher(teacher)
    assert all(torch.equal(t, expected[name].to(t.dtype)) for name, t in scoring.items())
    assert scoring["model.norm.weight"].dtype == torch.float32


def test_an_average_beside_a_gpu_moves_there_and_never_on_the_stream_that_captures(
    load: Loader, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PyTorch's pool, on a CPU that is taken for a GPU: the 33rd new stream is the first one again."""
    device, numbers = torch.device("cuda", 89), cycle(range(32))
    used: list[int] = []
    devices: dict[int, torch.device] = {}  # of threads; a new one has GPU 0, where entering a stream makes a context

    def new(where: torch.device) -> SimpleNamespace:
        return SimpleNamespace(number=next(numbers), device=where, wait_stream=lambda _: None, synchronize=lambda: None)

    def use(stream: SimpleNamespace) -> contextlib.AbstractContextManager[None]:
        assert devices.get(threading.get_ident(), torch.device("cuda", 0)) == stream.device
        used.append(stream.number)
        return contextlib.nullcontext()

    monkeypatch.setattr(torch.cuda, "set_device", lambda chosen: devices.update({threading.get_ident(): chosen}))
    torch.cuda.set_device(device)
    monkeypatch.setattr(torch.cuda, "Stream", new)
    monkeypatch.setattr(torch.cuda, "stream", use)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: SimpleNamespace(wait_stream=lambda _: None))
    monkeypatch.setattr(torch.cuda, "graph", lambda *_, **__: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: None)
    captured(lambda: torch.zeros(1), device)
    [capture] = used
    _, teacher = student_and_teacher(load, False, "ema", dtype="bfloat16")
    weight = SimpleNamespace(device=device)
    monkeypatch.setattr(teacher, "_student", SimpleNamespace(parameters=lambda: iter([weight])))
    for step in range(1, 34):
        teacher.update(step)
    teacher.wait()
    assert len(used) == 1 + 33
    assert capture not in used[1:]
    assert len({*used}) == next(numbers) == 2  # no stream is made but these


@both
def test_a_frozen_teacher_never_changes(load: Loader, lora: bool) -> None:
    loaded = load()
    scorer = ForwardPass(loaded)
    base = logits(scorer, loaded.model)
    if lora:
        add_lora(loaded, 4, None, 0)  # B = 0: the student starts as the base
    teacher = Teacher(loaded, TeacherRule("frozen"))
    for step in range(1, 4):
        move(loaded.model, step)
        teacher.update(step)
        with teacher.model() as network:
            assert torch.equal(logits(scorer, network), base)
    assert float((logits(scorer, loaded.model) - base).abs().max()) > 0.01
    assert teacher.state_dict() == {}


@both
def test_a_snapshot_copies_the_student_every_n_steps_and_holds_still_between(load: Loader, lora: bool) -> None:
    loaded, teacher = student_and_teacher(load, lora, "snapshot", snapshot_steps=3)
    expected = trained(loaded.model)
    for step in range(1, 8):
        move(loaded.model, step)
        teacher.update(step)
        if step in (3, 6):
            expected = trained(loaded.model)
        found = of_teacher(teacher)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected), step


@both
def test_a_live_teacher_is_the_student_without_gradients(load: Loader, lora: bool) -> None:
    loaded, teacher = student_and_teacher(load, lora, "live")
    move(loaded.model, 1)
    teacher.update(1)
    with teacher.model() as network:
        assert network is loaded.model
        assert not ForwardPass(loaded)(network, CONTEXTS, COMPLETIONS).hidden_ND.requires_grad
        inside = logits(ForwardPass(loaded), network)
    assert torch.equal(inside, logits(ForwardPass(loaded), loaded.model))
    assert teacher.state_dict() == {}
    assert teacher.memory_bytes == 0


@both
@pytest.mark.parametrize("kind", ["ema", "snapshot", "frozen"])
def test_a_copied_teacher_starts_as_the_student(load: Loader, lora: bool, kind: Any) -> None:
    loaded = load()
    scorer = ForwardPass(loaded)
    if lora:
        add_lora(loaded, 4, None, 0)
        if kind != "frozen":
            move(loaded.model, 99)
    expected = logits(scorer, loaded.model)
    teacher = Teacher(loaded, TeacherRule(kind))
    with teacher.model() as network:
        assert torch.equal(logits(scorer, network), expected)
    assert torch.equal(logits(scorer, loaded.model), expected)


def test_a_moving_lora_teacher_scores_with_its_own_averaged_factors(load: Loader) -> None:
    loaded, teacher = student_and_teacher(load, True, "ema", ema_rate=0.5)
    base = {n: m.base_layer.weight.detach() for n, m in loaded.model.named_modules() if hasattr(m, "base_layer")}
    start = trained(loaded.model)
    move(loaded.model, 1, size=0.05)
    teacher.update(1)
    end = trained(loaded.model)
    plain = load()  # the same base, whose weights get base + scale * avg(B) avg(A)
    with torch.no_grad():
        for name, weight in base.items():
            a, b = (
                (start[f"{name}.{f}.default.weight"] + end[f"{name}.{f}.default.weight"]) / 2
                for f in ("lora_A", "lora_B")
            )
            plain.model.get_submodule(name.removeprefix("base_model.model.")).weight.copy_(weight + 2.0 * b @ a)
    expected = logits(ForwardPass(plain), plain.model)
    with teacher.model() as network:
        torch.testing.assert_close(logits(ForwardPass(loaded), network), expected, atol=1e-4, rtol=0)
    assert float((expected - logits(ForwardPass(loaded), loaded.model)).abs().max()) > 0.01


@both
@pytest.mark.parametrize("kind", ["ema", "snapshot", "frozen", "live"])
@pytest.mark.parametrize("raising", [False, True], ids=["", "raising"])
def test_the_student_is_as_before_after_the_teacher_scored(load: Loader, lora: bool, kind: Any, raising: bool) -> None:
    loaded, teacher = student_and_teacher(load, lora, kind)
    move(loaded.model, 1)
    scorer = ForwardPass(loaded)
    flags = {n: p.requires_grad for n, p in loaded.model.named_parameters()}
    assert sum(flags.values()) > 0
    modes = {n: m.training for n, m in loaded.model.named_modules()}
    before = logits(scorer, loaded.model)
    with contextlib.suppress(KeyError), teacher.model() as network:
        logits(scorer, network)
        if raising:
            raise KeyError("inside")
    assert {n: p.requires_grad for n, p in loaded.model.named_parameters()} == flags
    assert {n: m.training for n, m in loaded.model.named_modules()} == modes
    assert torch.is_grad_enabled()
    if lora:
        assert loaded.model.active_adapters == ["default"]
    assert torch.equal(logits(scorer, loaded.model), before)


@both
@pytest.mark.parametrize("kind", ["ema", "snapshot"])
def test_a_saved_average_continues_in_another_teacher(load: Loader, lora: bool, kind: Any) -> None:
    options: dict[str, Any] = {"ema_rate": 0.3, "snapshot_steps": 2}
    loaded, teacher = student_and_teacher(load, lora, kind, **options)
    other_loaded, other = student_and_teacher(load, lora, kind, **options)
    for step in (1, 2, 3):
        move(loaded.model, step)
        teacher.update(step)
        move(other_loaded.model, step + (step == 3))  # the students are elsewhere
    other.load_state_dict({name: t.clone() for name, t in teacher.state_dict().items()})
    expected, found = of_teacher(teacher), of_teacher(other)
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_a_saved_average_reaches_the_copy_that_scores_in_bfloat16(load: Loader) -> None:
    _, teacher = student_and_teacher(load, False, "ema", dtype="bfloat16")
    state = {name: t + 1.0 for name, t in teacher.state_dict().items()}
    teacher.load_state_dict(state)
    assert all(torch.equal(t, state[name].bfloat16()) for name, t in of_teacher(teacher).items())


def test_the_average_of_another_kind_is_refused(load: Loader) -> None:
    _, ema = student_and_teacher(load, False, "ema")
    with pytest.raises(ValueError, match=r"^teacher state has 0 tensors, expected 21$"):
        ema.load_state_dict({})


@pytest.mark.parametrize(
    ("lora", "kind", "dtype", "bytes_per_weight"),
    [
        (False, "ema", "float32", 4),
        (False, "ema", "bfloat16", 2 + 4),
        (False, "snapshot", "float32", 4),
        (False, "frozen", "float32", 4),
        (False, "frozen", "bfloat16", 2),
        (False, "live", "float32", 0),
        (True, "ema", "float32", 4),
        (True, "frozen", "float32", 0),
        (True, "live", "float32", 0),
    ],
)
def test_memory_is_that_of_the_weights_held_beyond_the_students(
    load: Loader, lora: bool, kind: Any, dtype: str, bytes_per_weight: int
) -> None:
    loaded, teacher = student_and_teacher(load, lora, kind, dtype=dtype)
    weights = sum(p.numel() for p in loaded.model.parameters() if p.requires_grad)
    assert teacher.memory_bytes == bytes_per_weight * weights
    assert teacher.describe().startswith(f"teacher: {kind} (")


@both
def test_the_teacher_adds_nothing_that_is_trained(load: Loader, lora: bool) -> None:
    loaded = load()
    if lora:
        add_lora(loaded, 4, None, 0)
    before = set(trained(loaded.model))
    teacher = Teacher(loaded, TeacherRule("ema"))
    assert set(trained(loaded.model)) == before
    with teacher.model() as network:
        pass
    mine = {p.data_ptr() for p in loaded.model.parameters() if p.requires_grad}
    assert not mine & {t.data_ptr() for t in teacher.state_dict().values()}
    assert lora or not any(p.requires_grad for p in network.parameters())
