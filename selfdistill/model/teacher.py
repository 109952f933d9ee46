"""The teacher: the weights that score the rollouts, and how they follow the student.

One rule covers all kinds: after optimizer step n, every teacher weight becomes ``teacher + rate(n) * (student -
teacher)``. ``ema`` has a constant rate, and 0 after a step that did not change the student. ``snapshot`` has a rate of
1 every few steps and 0 in between, ``frozen`` a rate of 0, and ``live`` is the student itself.

Full fine-tuning: the teacher is a second copy of the trained weights. The average is kept in float32. If the model's
data type is smaller, the scoring copy is refreshed from the average (at a rate of 0.01, a bfloat16 average would hardly
move). Then the average is in CPU memory, unless it is sharded, and a thread updates it while the next step samples, a
part of a weight at a time.

LoRA: the frozen teacher is the base with the adapter disabled, which costs nothing. A moving teacher is a second
adapter, initially equal to the student's. The factors A and B are averaged separately: the teacher's weight change is
avg(B) avg(A), not the average of the products B A. The two differ by second-order terms in the factors' motion within
the averaging time, and avg(B) avg(A) keeps the rank.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from selfdistill.model.device import side_streams, staging
from selfdistill.model.fsdp import distribute_like, local_tensor
from selfdistill.model.loading import LoadedModel

TeacherKind = Literal["ema", "frozen", "live", "snapshot"]
ADAPTER = "teacher"
PART_NUMBERS = 2**25
"""Maximum numbers of a weight that are moved at a time, if a row has no more: 64 MiB in bfloat16. PyTorch rounds pinned
memory up to a power of two."""


@dataclass(frozen=True)
class TeacherRule:
    """Whose weights score, and how they follow the student's."""

    kind: TeacherKind
    ema_rate: float = 0.01
    """Weight of the student in the average's update at each step (``ema``)."""
    snapshot_steps: int = 50
    """Steps between copies (``snapshot``)."""
    model: str | None = None
    """A separate model (``frozen``); None: the student's own weights."""

    @property
    def moves(self) -> bool:
        """Whether weights of its own follow the student's."""
        return self.kind in ("ema", "snapshot")


class Teacher:
    """The teacher of one run.

    Args:
        loaded: the student before training; with LoRA a ``PeftModel`` whose adapter is ``default``.
        rule: whose weights score, and how they follow the student's.
        other: a separate teacher model with the student's architecture and vocabulary; requires ``frozen``.
        sharded: whether student and ``networks`` will be sharded; :meth:`bind` must follow before any other use.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        rule: TeacherRule,
        *,
        other: LoadedModel | None = None,
        sharded: bool = False,
    ) -> None:
        self.rule = rule
        self.kind = kind = rule.kind
        self._student = loaded.model
        self._other = None if other is None else other.name
        self._lora = hasattr(loaded.model, "peft_config") and other is None
        self._copy: nn.Module | None = None
        self._thread = ThreadPoolExecutor(1, "teacher")
        self._moving: Future[None] | None = None
        """The last update, if it may not be done yet."""
        if other is not None:
            assert kind == "frozen", "another model does not follow the student"
            self._copy = other.model.requires_grad_(False).eval()
        elif self._lora and rule.moves:
            loaded.model.add_adapter(ADAPTER, loaded.model.peft_config["default"])
            loaded.model.set_adapter("default")
            parameters = dict(loaded.model.named_parameters())
            for name, parameter in parameters.items():
                if f".{ADAPTER}." in name:
                    parameter.data.copy_(parameters[_students_name(name)])
                    parameter.requires_grad_(False)
        elif not self._lora and kind != "live":
            # Frozen weights, such as those of a vision tower, never move: the two share them.
            shared = {id(p): p for p in loaded.model.parameters() if not p.requires_grad}
            self._copy = copy.deepcopy(loaded.model, dict(shared)).requires_grad_(False).eval()
        if not sharded:  # an average of whole weights would need memory in every process, and not be used
            self.bind()

    def bind(self) -> None:
        """Look up the weights, which sharding replaces, and initialise the average from them."""
        students = dict(self._student.named_parameters())
        self._scoring: dict[str, Tensor] = {}  # the teacher's weights used for scoring, by name
        if self._copy is not None:
            self._scoring = {name: p for name, p in self._copy.named_parameters() if p is not students.get(name)}
        elif self._lora and self.rule.moves:
            self._scoring = {name: p for name, p in students.items() if f".{ADAPTER}." in name}
        self._followed: dict[str, Tensor] = {}  # the student's
        self._average: dict[str, Tensor] = {}  # the float32 average; the scoring weights themselves if float32
        if self.rule.moves:
            self._followed = {name: students[_students_name(name)] for name in self._scoring}
            self._average = {name: _averaged(t.detach()) for name, t in self._scoring.items()}
        self._staging = self._make_staging()

    def _make_staging(self) -> Tensor | None:
        """Memory beside the average for the part of a weight that is moved; None if no average is separate."""
        if not self._is_apart:
            return None
        place = next(a.device for name, a in self._average.items() if a.dtype != self._scoring[name].dtype)
        return staging(staging_bytes(self._followed.values()), place, next(self._student.parameters()).device.type)

    @property
    def networks(self) -> list[nn.Module]:
        """Networks of the teacher other than the student."""
        return [] if self._copy is None else [self._copy]

    def rate(self, step: int, *, student_moved: bool) -> float:
        """Share of the student in the teacher's update after step ``step`` (from 1)."""
        if self.kind == "ema":
            return self.rule.ema_rate if student_moved else 0.0
        if self.kind == "snapshot":
            return 1.0 if step % self.rule.snapshot_steps == 0 else 0.0
        return 0.0

    @torch.no_grad()
    def update(self, step: int, *, student_moved: bool = True) -> None:
        """Move towards the student after step ``step`` (from 1).

        An average follows only actual changes of the student: a step that did not change it does not move the average.
        A snapshot is taken every ``snapshot_steps`` steps, whether or not the last one changed the student.

        An average that is separate from the scoring weights is updated in a thread. Reading the teacher waits for it;
        before the student changes, call :meth:`wait`.
        """
        self.wait()
        rate = self.rate(step, student_moved=student_moved)
        if not self._average or rate == 0:
            return
        if self._is_apart:
            device = next(self._student.parameters()).device
            stream = None
            if device.type == "cuda":  # in parallel with sampling's kernels, but after the optimizer's
                stream = side_streams(device).average
                stream.wait_stream(torch.cuda.current_stream(device))
            self._moving = self._thread.submit(self._move, rate, stream)
            return
        averages = [local_tensor(average) for average in self._average.values()]
        followed = [local_tensor(self._followed[name].data) for name in self._average]
        torch._foreach_lerp_(averages, [f.to(a.dtype) for a, f in zip(averages, followed, strict=True)], rate)

    @torch.no_grad()
    def _move(self, rate: float, stream: torch.cuda.Stream | None) -> None:
        """Move the average and round it into the scoring weights, a part at a time."""
        assert self._staging is not None
        if stream is not None:  # else entering the stream in this thread would make a context on GPU 0
            torch.cuda.set_device(stream.device)
        with nullcontext() if stream is None else torch.cuda.stream(stream):
            for average, student, scoring in self._parts():
                if average.dtype == scoring.dtype:  # a float32 weight of a model with smaller ones
                    average.lerp_(student.to(average.dtype), rate)
                    continue
                staged = self._staging[: student.nbytes].view(student.dtype).view(student.shape)
                average.lerp_(staged.copy_(student).to(average.dtype), rate)
                scoring.copy_(staged.copy_(average))
        if stream is not None:
            stream.synchronize()

    def _parts(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Parts of the average, and the same of the student's and the scoring weights."""
        for name, average in self._average.items():
            student, scoring = self._followed[name].data, self._scoring[name].data
            yield from zip(_parts_of(average), _parts_of(student), _parts_of(scoring), strict=True)

    @property
    def _is_apart(self) -> bool:
        """Whether the average and the scoring weights are separate tensors."""
        return any(self._scoring[name].dtype != average.dtype for name, average in self._average.items())

    def wait(self) -> None:
        """Wait until the last update is done."""
        moving, self._moving = self._moving, None
        if moving is not None:
            moving.result()

    @contextmanager
    def model(self) -> Iterator[Any]:
        """The scoring network, under ``no_grad``; reactivates the student's adapter afterwards."""
        self.wait()
        with torch.no_grad():
            if not self._lora:
                yield self._student if self._copy is None else self._copy
            elif self.kind == "live":
                yield self._student
            elif self.kind == "frozen":
                with self._student.disable_adapter():
                    yield self._student
            else:
                self._student.set_adapter(ADAPTER, inference_mode=True)
                try:
                    yield self._student
                finally:
                    self._student.set_adapter("default")

    def state_dict(self) -> dict[str, Tensor]:
        """The state for a checkpoint: the float32 moving average, sharded if the teacher is.

        Empty for ``frozen`` and ``live``.
        """
        self.wait()
        return dict(self._average)

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Load a saved average."""
        self.wait()
        if state.keys() != self._average.keys():
            raise ValueError(f"teacher state has {len(state)} tensors, expected {len(self._average)}")
        for name, average in self._average.items():
            average.copy_(distribute_like(state[name], average))
        if self._is_apart:
            for average, _, scoring in self._parts():
                scoring.copy_(average)

    @property
    def memory_bytes(self) -> int:
        """Memory in bytes beyond the student's own, on its device."""
        device = next(self._student.parameters()).device
        held = [local_tensor(t) for t in (*self._scoring.values(), *self._average.values()) if t.device == device]
        own = {t.data_ptr(): t.numel() * t.element_size() for t in held}
        return sum(own.values())

    def describe(self) -> str:
        """One line about kind and memory, for the start of a run."""
        follows = {
            "ema": f"float32 average of the student, rate {self.rule.ema_rate:g}",
            "snapshot": f"copy of the student every {self.rule.snapshot_steps} steps",
            "frozen": self._other or ("initial weights, adapter disabled" if self._lora else "initial weights"),
            "live": "the student itself",
        }[self.kind]
        return f"teacher: {self.kind} ({follows}), {self.memory_bytes / 2**20:.0f} MiB beyond the student"


def _averaged(weight: Tensor) -> Tensor:
    """The weight in float32: itself if it is float32, else a copy, on the CPU unless the weight is sharded."""
    if weight.dtype != torch.float32 and not isinstance(weight, DTensor):
        weight = weight.cpu()
    return weight.float()


def _parts_of(weight: Tensor, shares: int = 1) -> tuple[Tensor, ...]:
    """A weight, or this rank's shard of it, or the largest of ``shares`` shards, cut by rows; each part is a view."""
    rows = torch.atleast_1d(local_tensor(weight))
    rows = rows[: -(-len(rows) // shares)]
    return rows.split(max(1, PART_NUMBERS * len(rows) // max(1, rows.numel())))


def staging_bytes(weights: Iterable[Tensor], shares: int = 1) -> int:
    """Bytes of the largest part that is moved of these weights, if they are smaller than float32.

    Args:
        weights: the student's.
        shares: number of ranks among which they will be sharded.
    """
    smaller = (weight.detach() for weight in weights if weight.dtype != torch.float32)
    return max((part.nbytes for weight in smaller for part in _parts_of(weight, shares)), default=0)


def _students_name(name: str) -> str:
    """Name of the student weight that a teacher weight follows."""
    return name.replace(f".{ADAPTER}.", ".default.")
