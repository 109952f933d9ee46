"""A user's own method: what it fills the slots with is checked, and what its code raises becomes one line."""

from __future__ import annotations

import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from selfdistill.config import TrainConfig
from selfdistill.data import is_own
from selfdistill.errors import UserError, found_value, named_error
from selfdistill.loss import CrossEntropy, Divergence
from selfdistill.methods.slots import Method, function_of

_PACKAGE = str(Path(__file__).parents[1])


@contextmanager
def own_errors(name: str, *, computes: bool = True) -> Iterator[None]:
    """Say in one line what is raised while the code of a user's method may run; other methods' errors stay as they are.

    So do errors that the machine may cause, such as no memory, if they do not come from the user's file, or come from
    the package's code that it calls.

    Args:
        name: of the method.
        computes: whether the code may compute, so that errors may be the machine's.

    Raises:
        UserError: names the last line of the user's file that ran, else of the package.
    """
    try:
        yield
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        if not is_own(name):
            raise
        frames = traceback.extract_tb(error.__traceback__)
        file = getattr(getattr(function_of(name), "__code__", None), "co_filename", None)
        own = [number for number, frame in enumerate(frames) if frame.filename == file]
        called = frames[own[-1] + 1 :] if own else frames
        from_package = not own or any(frame.filename.startswith(_PACKAGE) for frame in called)
        if computes and from_package and isinstance(error, MemoryError | OSError | RuntimeError):
            raise
        last = frames[own[-1]] if own else frames[-1]
        what = named_error(error)
        raise UserError(f"method {name!r} failed ({Path(last.filename).name}:{last.lineno}): {what}") from error


def own_stages(config: TrainConfig) -> tuple[Method, ...]:
    """What the user's method makes of the settings.

    Raises:
        UserError: it cannot be imported, raises an error, returns something else, or its slots do not fit together.
    """
    function = function_of(config.method)
    with own_errors(config.method, computes=False):
        found = function(config)
    stages = (found,) if isinstance(found, Method) else found
    if not (isinstance(stages, tuple) and stages and all(isinstance(stage, Method) for stage in stages)):
        shown = found_value(found)
        raise UserError(f"method {config.method!r} returned {shown}, expected a Method, or a tuple of them for stages")
    for problem in _problems(stages):
        raise UserError(f"method {config.method!r}: {problem}")
    return stages


def _problems(stages: Sequence[Method]) -> Iterator[str]:
    """Slots that do not fit together."""
    tasks = list(dict.fromkeys(stage.teacher for stage in stages if stage.teacher))
    if len(tasks) > 1:
        yield f"slot 'teacher': found {tasks[0]} and {tasks[1]} in different stages, expected one rule for all"
    for stage in stages:
        also = [(f"also {name!r}, ", other) for name, other in stage.also]
        beside = [(f"part {part.name!r}, ", part.method) for part in stage.beside]
        for where, method in (("", stage), *also, *beside):
            if problem := _of_loss(method, method.loss):
                yield f"{where}slot 'loss': {problem}"
            if method.relative_weights and method.weighting is None:
                yield f"{where}slot 'relative_weights': found True without 'weighting'; give one, or leave this out"
            sampling = method.sequence.sampling
            if method.importance_cap is not None and sampling and not sampling.is_full:
                yield (
                    f"{where}slot 'importance_cap': needs samples from the full distribution, found {sampling}; use a "
                    "temperature above 0, top_p 1 and top_k 0, or leave this out"
                )
            teacher = method.teacher
            if teacher and teacher.moves and teacher not in tasks:
                yield (
                    f"{where}slot 'teacher': found {teacher}, but only the task's teacher follows the student; give "
                    "the task the same rule, or use FROZEN here"
                )
        for where, method in beside:
            for slot in ("also", "beside", "controller"):
                if getattr(method, slot):
                    yield f"{where}slot {slot!r}: only the task's is used; leave it out here"


def _of_loss(method: Method, loss: object) -> str | None:
    """Why the method cannot have this loss, in its first step or a later one."""
    if not isinstance(loss, Divergence | CrossEntropy):
        return f"found {loss!r:.60}, expected Divergence or CrossEntropy"
    if isinstance(loss, Divergence) and method.teacher is None:
        return "found a Divergence without a teacher; fill slot 'teacher', or use CrossEntropy()"
    if isinstance(loss, Divergence) and loss.needs_base and not method.needs_base:
        return "found a loss that needs the model before training, but 'loss' does not; set weighs_base=True"
    return None


def check_losses(name: str, method: Method, steps: int) -> None:
    """Check the loss of every step of a stage, if the method is the user's and changes it.

    Args:
        name: of the method.
        method: of a part of the stage.
        steps: of the stage.

    Raises:
        UserError: ``loss_at`` fails, or returns what the step cannot use.
    """
    if method.loss_at is None or not is_own(name):
        return
    for step in range(steps):
        with own_errors(name):
            loss = method.loss_at(step, steps)
        if problem := _of_loss(method, loss):
            raise UserError(f"method {name!r}: slot 'loss_at' at step {step} of {steps}: {problem}")
