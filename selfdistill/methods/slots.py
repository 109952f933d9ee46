"""The slots that a method fills."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from numbers import Real
from types import NoneType
from typing import Any, Protocol, TypeVar, get_args, runtime_checkable

from selfdistill.config import MethodName, Settings, TrainConfig
from selfdistill.data import ChatFormat, ContextEncoder, Example, Verdict, is_own, own_function
from selfdistill.errors import UserError, closest
from selfdistill.loss import CrossEntropy, Divergence, Target, Weighting
from selfdistill.methods.examples import ExampleSource
from selfdistill.methods.sequences import Completion, DrawnSamples, SequenceSource
from selfdistill.model import Sampling, TeacherRule

Checker = Callable[[Sequence[Completion], ChatFormat], list[Verdict]]
"""Maps samples to one verdict each, whatever the other samples are."""


@runtime_checkable
class Selection(Protocol):
    """Chooses which of a step's samples are learnt, and how."""

    @property
    def gates(self) -> bool:
        """Whether it may leave samples out."""
        ...

    def __call__(
        self, samples: Sequence[Completion], verdicts: Sequence[Verdict], encode: ContextEncoder
    ) -> list[Completion]:
        """The samples to learn, in their order; another completion of its example may replace a sample.

        Each may get a factor on its loss, and its own context: an example whose ``teacher_ids`` are the messages
        that ``encode`` turned into token ids. The result depends only on the arguments, so a resumed run repeats it.

        Args:
            samples: of one step; those of a prompt are adjacent.
            verdicts: of the method's checker, one per sample; empty without a checker.
            encode: encodes a context made of a sample, or returns None if it cannot be shown to the teacher.
        """
        ...

    def longest(self, example: Example, tokens: int, encode: ContextEncoder) -> Example:
        """The example with about the longest context that samples of this many tokens can give.

        For memory plans, and for resumed runs, which must show samples to the teacher in the same words.
        """
        ...


LossAt = Callable[[int, int], Divergence]
"""Maps a step of the stage (from 0), and the number of steps, to the loss of that step."""

State = dict[str, Any]
"""What a controller remembers. It is JSON, for checkpoints, and is never changed in place."""


@runtime_checkable
class Controller(Protocol):
    """Sets one number of a method at each step, and may learn from the steps before.

    The same state gives the same number, so a resumed run continues exactly.
    """

    @property
    def start(self) -> State:
        """The state before the first step of a stage."""
        ...

    def value(self, state: State, step: int, steps: int) -> float:
        """The number at step ``step`` (from 0) of a stage with this many steps."""
        ...

    def update(self, state: State, metrics: dict[str, Any], step: int, steps: int) -> State:
        """The state after the step with these metrics; a skipped step may have no loss."""
        ...

    def applied(self, method: Method, value: float) -> Method:
        """The method with this number."""
        ...


class Schedule:
    """What a controller has that remembers nothing: its number depends on the step alone."""

    @property
    def start(self) -> State:
        """See :class:`Controller`."""
        return {}

    def update(self, state: State, metrics: dict[str, Any], step: int, steps: int) -> State:
        """See :class:`Controller`."""
        return state


OwnSettings = TypeVar("OwnSettings", bound=Settings)


@dataclass(frozen=True)
class Method:
    """A method as the loop sees it, one of its stages, or a further part of its steps."""

    examples: ExampleSource
    """The training data, and what the teacher sees."""
    sequence: SequenceSource
    """Whose tokens are scored. If it samples from longer prompts than the examples', it also has the methods of
    ``LearnsOtherPrompts`` or ``SamplesOtherPrompts`` (``selfdistill.methods``), which the plan of memory asks."""
    loss: Divergence | CrossEntropy
    """The per-token loss; that of the first step, with ``loss_at``. It, or ``weighs_base``, says whether any step needs
    the model before the first step."""
    loss_at: LossAt | None = None
    """The loss of each step, if it changes from step to step. It depends only on the step, so a resumed run has
    nothing to restore."""
    controller: Controller | None = None
    """Changes the method according to earlier steps; only the first part's controller is used."""
    teacher: TeacherRule | None = None
    """Whose weights score the tokens; None: no teacher."""
    drawn: DrawnSamples | None = None
    """Replaces the examples' completions once, before the first step."""
    skip_first_tokens: int = 0
    """Leading tokens of each completion with zero weight."""
    importance_cap: float | None = None
    """Weight each completion by its truncated importance ratio (see :mod:`selfdistill.loss.token_weights`)."""
    weighting: Weighting | None = None
    """Per-token factor computed from the distributions at each token."""
    relative_weights: bool = False
    """Divide each token's factor by its mean over the completion, which takes a second pass through the heads."""
    weighs_base: bool = False
    """Whether the factor, or the loss of a later step, depends on the model before the first step."""
    base_sees_context: bool = False
    """Whether that model reads the teacher's context, in place of the student's prompt."""
    checker: Checker | None = None
    """Gives each sample a verdict."""
    select: Selection | None = None
    """Chooses after sampling what is learnt, with which factor and context; None: every sample, unchanged."""
    weight: float = 1.0
    """Factor on the loss."""
    also: tuple[tuple[str, Method], ...] = ()
    """Further methods, by name, that learn from the same samples. Each is a part of the step, with its own weight.
    Their ``drawn``, ``sequence`` and ``examples`` are not used."""
    beside: tuple[Part, ...] = ()
    """Further parts of the step, with samples of their own; the task has what their shares and anchors' leave."""

    def __post_init__(self) -> None:
        """Check what a user's own method fills the slots with.

        Raises:
            TypeError: a value is not of the slot's kind.
        """
        for slot, kinds in _KINDS.items():
            found = getattr(self, slot)
            if isinstance(found, type) or not isinstance(found, kinds):
                expected = " or ".join(_KIND_NAMES.get(kind, kind.__name__) for kind in kinds)
                raise TypeError(f"slot {slot!r}: found {found!r:.60}, expected {expected}")
        for pair in self.also:
            named = isinstance(pair, tuple) and len(pair) == 2 and isinstance(pair[0], str)
            if not (named and isinstance(pair[1], Method)):
                raise TypeError(f"slot 'also': found {pair!r:.60}, expected pairs, as also=(('name', method),)")
        for part in self.beside:
            if not isinstance(part, Part) or part.same_samples:
                raise TypeError(f"slot 'beside': found {part!r:.60}, expected beside=(Part('name', method, share),)")

    @property
    def needs_base(self) -> bool:
        """Whether the model before the first step also scores the tokens."""
        return self.weighs_base or (isinstance(self.loss, Divergence) and self.loss.needs_base)

    @property
    def keeps_contexts(self) -> bool:
        """Whether what a frozen teacher computes of its contexts is kept for later steps.

        Contexts that are made after sampling are read once. A teacher that is compared with the base reads its contexts
        as the base does, because kept ones differ by rounding, which would decide between equal probabilities.
        """
        is_frozen = self.teacher is not None and self.teacher.kind == "frozen"
        return is_frozen and self.select is None and not self.weighs_base

    def at(self, step: int, steps: int, control: float | None = None) -> Method:
        """The method at step ``step`` (from 0) of a stage with this many steps, with its controller's number."""
        method = self if self.loss_at is None else replace(self, loss=self.loss_at(step, steps))
        if self.controller is None or control is None:
            return method
        return self.controller.applied(method, control)


_KINDS: dict[str, tuple[Any, ...]] = {
    "examples": (ExampleSource,),
    "sequence": (SequenceSource,),
    "loss": (Divergence, CrossEntropy),
    "loss_at": (Callable, NoneType),
    "controller": (Controller, NoneType),
    "teacher": (TeacherRule, NoneType),
    "drawn": (DrawnSamples, NoneType),
    "weighting": (Callable, NoneType),
    "checker": (Callable, NoneType),
    "select": (Selection, NoneType),
    "weight": (Real,),
    "also": (tuple,),
    "beside": (tuple,),
}
"""What fills a slot."""
_KIND_NAMES = {Callable: "a function", NoneType: "None", Real: "a number"}


@dataclass(frozen=True)
class Part:
    """One of the methods that a step sums up."""

    name: str
    """For messages and metrics; unique among the parts of a step."""
    method: Method
    share: float
    """Its share of every batch, on average over the steps; the shares of parts with their own samples sum to 1."""
    same_samples: bool = False
    """Whether it learns from the samples of the step's first part."""

    def __post_init__(self) -> None:
        """Check what a user's own method gives.

        Raises:
            TypeError: a value is not of the field's kind.
        """
        if not (isinstance(self.name, str) and isinstance(self.method, Method)):
            raise TypeError(f"Part: found {self.name!r:.60} and {self.method!r:.60}, expected a name and a Method")
        if not (isinstance(self.share, Real) and 0 < self.share <= 1):
            raise TypeError(f"Part {self.name!r}: found share {self.share!r:.60}, expected a number above 0, at most 1")


Parts = tuple[Part, ...]
"""The parts of a stage's steps: first the method's own, which learns the task, then those beside it."""


def divergence_of(config: TrainConfig) -> Divergence:
    """The divergence defined by the settings, from the teacher itself."""
    own: dict[str, Any] = {"weight": config.jsd_weight} if config.divergence == "jsd" else {}
    if config.support == "top_k":
        own |= {"top_k": config.support_top_k, "tail": config.support_tail}
    if config.support == "sampled":
        own |= {"baseline": config.sampled_baseline}
    return Divergence(config.divergence, config.support, clip=config.entry_clip, **own)


def target_of(config: TrainConfig) -> Target | None:
    """The target that the settings define; None for the teacher itself."""
    target = Target(config.target_teacher, config.target_student, config.target_base)
    return None if target == Target() else target


def sampling_of(config: TrainConfig) -> Sampling:
    """The sampling policy of the rollouts."""
    return Sampling(config.max_completion_length, config.temperature, config.top_p, config.top_k)


ENGINE_CAP = 2.0
"""Default cap of the importance weights of an engine's samples."""


def engine_cap(config: TrainConfig) -> float | None:
    """The cap for an engine's samples, whose probabilities differ from the trainer's by rounding.

    None without an engine, and for truncated sampling, whose probabilities are not comparable with the trainer's.
    """
    untruncated = config.top_p == 1 and config.top_k == 0
    return ENGINE_CAP if config.engine != "none" and untruncated else None


def teacher_of(config: TrainConfig) -> TeacherRule:
    """The teacher that the settings describe."""
    if config.teacher_model is not None:
        return TeacherRule("frozen", model=config.teacher_model)
    if config.teacher == "ema":
        return TeacherRule("ema", ema_rate=config.ema_rate)
    if config.teacher == "snapshot":
        return TeacherRule("snapshot", snapshot_steps=config.snapshot_steps)
    return TeacherRule(config.teacher)


FROZEN = TeacherRule("frozen")
"""The model before the first step."""


def own_settings(config: TrainConfig, kind: type[OwnSettings]) -> OwnSettings:
    """The settings that only this method knows, from ``method_settings``.

    Raises:
        UserError: an unknown name, or a value out of range.
    """
    for name in config.method_settings:
        if name not in kind.model_fields:
            known = list(kind.model_fields)
            hint = closest(name, known, whose(name))
            raise UserError(f"setting 'method_settings': {config.method} has no {name!r}{hint}")
    try:
        return kind(**config.method_settings)
    except UserError as error:
        raise UserError(f"setting 'method_settings', {error}") from None


def function_of(method: str) -> Callable[[TrainConfig], Any]:
    """The function that turns settings into a method: that of the package's file of this name, or the user's.

    Raises:
        UserError: the user's cannot be imported, or was given in another process.
    """
    if is_own(method):
        return own_function(method, "method")
    function: Callable[[TrainConfig], Any] = getattr(import_module(f"selfdistill.methods.{method}"), method)
    return function


def own_names(method: Any) -> list[str]:
    """Names of the settings that only this method knows: the fields of the settings that its file declares.

    Args:
        method: its name or, as Python may give it, its function; for anything else there are none.
    """
    if isinstance(method, str) and (method in get_args(MethodName) or is_own(method)):
        method = function_of(method)
    module = sys.modules.get(getattr(method, "__module__", ""))
    values = vars(module).values() if callable(method) and module else ()
    kinds = [value for value in values if isinstance(value, type) and issubclass(value, Settings)]
    return [name for kind in kinds if kind.__module__ == method.__module__ for name in kind.model_fields]


def whose(name: str) -> str:
    """The end of a message about an unknown setting: the methods that know it; empty if none does."""
    methods = [method for method in get_args(MethodName) if name in own_names(method)]
    return f"; it is a setting of {' and '.join(methods)}" if methods else ""
