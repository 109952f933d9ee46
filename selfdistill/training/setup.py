"""Set up a run: its processes, and its stages with their examples."""

from __future__ import annotations

import hashlib
import json
import os
import random
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from statistics import mean
from typing import Any, Protocol, TypeVar

from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import GradientAccumulationPlugin

from selfdistill.config import LearnConfig, TrainConfig, TrainingSettings, default_learning_rate
from selfdistill.data import ChatFormat, Demonstration, Example, first_ten, notes_on_rendered
from selfdistill.errors import UserError
from selfdistill.evaluation import check_answers
from selfdistill.loss import check_skip
from selfdistill.methods import (
    FROZEN,
    Method,
    Part,
    check_losses,
    check_steps,
    repeated_prompts,
    rules_of,
    scorer_judges,
    stages_of,
    with_teachers_window,
)
from selfdistill.model import (
    LoadedModel,
    TeacherRule,
    add_lora,
    check_room,
    deterministic,
    freeze_vision,
    has_gpu,
    network_fingerprint,
    refuse_autocast,
    resolved_precision,
    start_fingerprint,
)
from selfdistill.runtime import barrier, connect, say_note, world_size
from selfdistill.training.schedule import check_shares, steps_of
from selfdistill.training.selection import BatchPart


class _HasMethod(Protocol):
    @property
    def method(self) -> Method: ...


APart = TypeVar("APart", bound=_HasMethod)


@dataclass
class EncodedPart:
    """A part of a stage's steps, with its examples."""

    name: str
    method: Method
    share: float
    """Of every batch, on average over the steps."""
    examples: list[Example]
    dropped: int
    """Number of rows dropped because they are too long."""
    window: int | None
    """Limit for prompt plus completion, in tokens, of all models that score them; None if there is none."""
    all_drawn: list[Example] = field(default_factory=list)
    """All samples that the method drew before the first step; it may learn some of them only."""
    same_samples: bool = False
    """Whether it learns from the samples of the first part, whose examples it has."""
    demonstrated: float | None = None
    """Mean number of tokens of the demonstrated completions; None if there are none."""

    @property
    def counted(self) -> str:
        """What it learns from, and how much of it."""
        dropped = f" ({self.dropped} too long, dropped)" if self.dropped else ""
        return self.method.examples.counted(len(self.examples)) + dropped


@dataclass
class Stage:
    """A stage of the method: what its steps sum up, and which steps they are."""

    parts: list[EncodedPart]
    first_step: int = 0
    steps: int = 0

    @property
    def task(self) -> EncodedPart:
        """The method's own part."""
        return self.parts[0]

    @property
    def own_samples(self) -> list[EncodedPart]:
        """The parts with samples of their own; they divide a batch."""
        return [part for part in self.parts if not part.same_samples]


def by_sequence(parts: Iterable[APart]) -> list[list[APart]]:
    """The parts in groups with equal sequences; those of a group are sampled by one call."""
    groups: dict[Any, list[APart]] = {}
    for part in parts:
        groups.setdefault(part.method.sequence, []).append(part)
    return list(groups.values())


@contextmanager
def accelerator_state_kept() -> Iterator[None]:
    """Restore at the end the state that all accelerators of the process share, such as their precision."""
    states = (AcceleratorState, GradientState)
    before = [dict(state._shared_state) for state in states]
    try:
        yield
    finally:
        for state, values in zip(states, before, strict=True):
            state._shared_state.clear()
            state._shared_state.update(values)


def make_accelerator(config: TrainConfig) -> Accelerator:
    """Create the accelerator and join the process group, in the precision of the settings.

    Raises:
        UserError: the launcher's settings conflict with the run's, or autocast is already on.
    """
    refuse_autocast()
    for name, option in (("FSDP", "use_fsdp"), ("DeepSpeed", "use_deepspeed"), ("Megatron-LM", "use_megatron_lm")):
        if os.environ.get(f"ACCELERATE_{option.upper()}", "false").lower() == "true":
            raise UserError(
                f"the launcher's own {name} is enabled (--{option}, or its configuration file); disable it, and use "
                "fsdp true to shard a model"
            )
    AcceleratorState._reset_state()  # it would refuse a precision other than that of the process's first run
    accelerator = Accelerator(
        mixed_precision=resolved_precision(config.mixed_precision),
        # The launcher's number would divide the gradient.
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
        log_with=None if config.report_to == "none" else config.report_to,
        project_dir=config.output_dir,
    )
    processes = accelerator.num_processes
    if world_size() != processes:
        raise UserError(
            f"{world_size()} processes were started, but accelerate joined {processes}; on CPUs "
            "set ACCELERATE_USE_CPU=true in the environment, on GPUs give each process its own"
        )
    barrier()  # a process that exits with an error must not do so while another is still joining
    connect(accelerator.device)
    if config.fsdp and processes == 1:
        raise UserError(
            "setting 'fsdp' shards a model across processes, found only one; start several, or leave fsdp out"
        )
    check_parts_are_equal(config, processes)
    return accelerator


def check_parts_are_equal(config: TrainConfig, processes: int) -> None:
    """Check that all processes get equal parts of a batch, if they shard the model.

    Raises:
        UserError: they do not.
    """
    if config.fsdp and config.batch_size % (processes * config.micro_batches):
        raise UserError(
            f"setting 'fsdp' needs parts of equal size: batch_size {config.batch_size} is not a multiple of "
            f"{processes} processes times gradient_accumulation_steps {config.micro_batches}"
        )


def refuse_with_pictures(config: TrainConfig, stages: Sequence[Stage], loaded: LoadedModel) -> None:
    """Refuse settings that do not work with pictures, or only with models that read them.

    Raises:
        UserError: names the setting.
    """
    if config.train_vision_tower and loaded.pictures is None:
        raise UserError(f"setting 'train_vision_tower': model {loaded.name!r} reads no pictures; leave it out")
    if any(x.demonstration.images for stage in stages for part in stage.parts for x in part.examples):
        for name in ("fsdp", "torch_compile", "load_in_4bit", "engine"):
            if getattr(config, name) not in (False, "none"):
                raise UserError(f"setting {name!r} does not work with pictures; leave it out")


def check_engine(stages: Sequence[Stage], loaded: LoadedModel) -> None:
    """Check that an engine, if there is one, has room for the samples and episodes after all prompts.

    Raises:
        UserError: it has not.
    """
    for part in (part for stage in stages for part in stage.own_samples):
        prompts, sampling = [x.student_ids for x in part.examples], part.method.sequence.sampling
        if rules := rules_of(part.method):
            check_room(loaded, prompts, rules.max_length, "episode")
        elif sampling is not None:
            check_room(loaded, prompts, sampling.max_completion_length, "completion")


def repeating(config: TrainingSettings) -> AbstractContextManager[None]:
    """Deterministic operations while it is open, if the settings ask for them. Open it before the GPU is first used."""
    return deterministic("cuda" if has_gpu() else "cpu") if config.deterministic else nullcontext()


def chosen_rows(demonstrations: Sequence[Demonstration], config: TrainConfig | LearnConfig) -> Sequence[Demonstration]:
    """Draw ``num_demonstrations`` demonstrations with the seed; all if it is not set."""
    count = config.num_demonstrations
    if count is None or count >= len(demonstrations):
        return demonstrations
    chosen = set(random.Random(config.seed).sample(range(len(demonstrations)), count))
    return [demonstration for number, demonstration in enumerate(demonstrations) if number in chosen]


def choose_weights(loaded: LoadedModel, config: TrainConfig) -> None:
    """Add the adapter of the run, if it has one, and freeze the weights that it does not train.

    Raises:
        UserError: PEFT finds no layer that it can adapt.
    """
    if config.lora_rank:
        add_lora(loaded, config.lora_rank, config.lora_alpha, config.seed)
    if loaded.pictures is not None and not config.train_vision_tower:
        freeze_vision(loaded.model)


def make_stages(
    config: TrainConfig, demonstrations: Sequence[Demonstration], loaded: LoadedModel, chat: ChatFormat
) -> list[Stage]:
    """The method's stages, with encoded examples.

    Raises:
        UserError: rows are too long, a checker cannot use an answer, ``skip_first_tokens`` masks most tokens, or a
            teacher has no context.
    """
    check_parts(config)
    stages = []
    for parts in stages_of(config):
        encoded = [_encoded(part, config, demonstrations, loaded, chat) for part in parts if not part.same_samples]
        for number, own in enumerate(encoded):
            own.examples = [replace(example, source=number) for example in own.examples]
        same = [replace(encoded[0], name=x.name, method=x.method, same_samples=True) for x in parts if x.same_samples]
        stages.append(Stage([encoded[0], *same, *encoded[1:]]))
        for part in stages[-1].parts:
            _check_contexts(config.method, part)
    return stages


def teacher_rules(methods: Iterable[Method]) -> list[TeacherRule]:
    """The rules of all teachers of a run, each once, so that no weights are held twice."""
    methods = list(methods)
    rules = [method.teacher for method in methods if method.teacher]
    return list(dict.fromkeys([*rules, *(FROZEN for method in methods if method.needs_base)]))


def keeps_contexts(config: TrainConfig, task: Method) -> bool:
    """Whether the contexts of a task's teacher may be cached: its method says so, and it is not sharded."""
    return bool(config.teacher_cache_mib) and not config.fsdp and task.keeps_contexts


def check_parts(config: TrainConfig, processes: int | None = None) -> None:
    """Check that every step has room for all of its parts.

    Args:
        config: settings of the run.
        processes: how many it will have; None: as many as there are now.

    Raises:
        UserError: the batch is too small, or the method rejects the settings.
    """
    for parts in stages_of(config):
        shares = [part.share for part in parts if not part.same_samples]
        check_shares(shares, config.batch_size, batch_unit(config, processes))


def _encoded(
    part: Part, config: TrainConfig, demonstrations: Sequence[Demonstration], loaded: LoadedModel, chat: ChatFormat
) -> EncodedPart:
    method = part.method
    reading = with_teachers_window(loaded, method)
    if reading.window != loaded.window:
        say_note(
            f"prompt plus completion may have {reading.window} tokens, the context window of the separate teacher, "
            "which is smaller than the student's"
        )
    examples, dropped = method.examples(demonstrations, reading, chat)
    rendered = notes_on_rendered([example.demonstration for example in examples], chat)
    for note in (*rendered, *method.examples.notes(examples, demonstrations, loaded, chat)):
        say_note(note)
    if method.checker and scorer_judges(config):
        check_answers([example.demonstration for example in examples], config.scorer)
    lengths = [min(example.learnt_tokens, config.longest_completion) for example in examples]
    check_skip(method.skip_first_tokens, lengths)
    demonstrated = [example.learnt_tokens for example in examples if example.demonstration.completion]
    average = mean(demonstrated) if demonstrated else None
    return EncodedPart(part.name, method, part.share, examples, dropped, reading.window, demonstrated=average)


def check_first_samples(stage: Stage, parts: Sequence[BatchPart], stage_step: int) -> None:
    """Check that the stage's first samples keep most tokens, where no demonstration has told how long they are.

    Raises:
        UserError: ``skip_first_tokens`` masks most.
    """
    unseen = [part.name for part in stage.parts if part.demonstrated is None]
    for part in parts:
        if stage_step == 0 and part.name in unseen:
            lengths = [sum(completion.is_own) for completion in part.completions]
            check_skip(part.method.skip_first_tokens, lengths, "samples in the first step")


def _check_contexts(name: str, part: EncodedPart) -> None:
    """Check that the teacher has a context in each example, unless ``select`` or ``drawn`` makes it."""
    method, seen = part.method, [x.demonstration.source for x in part.examples if x.teacher_ids is None]
    made_later = method.select or method.drawn
    if seen and not made_later and (method.teacher or (method.needs_base and method.base_sees_context)):
        raise UserError(
            f"method {name!r}: slot 'examples' of part {part.name!r}: no context for the teacher in {first_ten(seen)}; "
            "use examples with one, as DemonstrationExamples(config, config.context), or a 'select' that makes it"
        )


def note_test_prompts(stage: Stage, questions: Sequence[Demonstration]) -> None:
    """Note prompts beside the task that are test questions, too: there, the test measures what those parts teach."""
    for part in stage.own_samples[1:]:
        if repeated := repeated_prompts(part.examples, questions):
            say_note(
                f"{len(repeated)} of {part.counted} are also test questions ({first_ten(repeated)}); on these, the "
                f"test measures what part {part.name!r} teaches, too"
            )


def data_fingerprint(stages: Sequence[Stage], chat: ChatFormat) -> str:
    """SHA-256 of the encoded examples; a resumed run must find them unchanged."""
    examples = [example for stage in stages for part in stage.parts for example in part.examples]
    # A row without a completion counts as with an empty one, as it did for older folders.
    ids = [[x.student_ids, x.teacher_ids, x.completion_ids or [chat.end_token_id]] for x in examples]
    seen = [picture.digest for x in examples for picture in x.demonstration.images]
    return sha256_of([*ids, *seen, *(x.later_ids for x in examples if x.later_ids)])


def model_digests(name: str, loaded: LoadedModel) -> dict[str, str]:
    """Digests of a model before training: of its weights, and of what ``config.json`` says of the network."""
    return {name: start_fingerprint(loaded), f"config.json of {name}": network_fingerprint(loaded)}


def sha256_of(values: Sequence[Any]) -> str:
    """SHA-256 of JSON values."""
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()


def batch_unit(config: TrainConfig, processes: int | None = None) -> int:
    """How many examples a part's share of a batch is a multiple of: with ``fsdp``, all processes need equal parts.

    Not of the number of micro-batches, which the memory plan may choose, and which must not change the batches.

    Args:
        config: settings of the run.
        processes: how many it will have; None: as many as there are now.
    """
    return (processes or world_size()) if config.fsdp else 1


def with_defaults(config: TrainConfig, task: EncodedPart, mixed_precision: str) -> TrainConfig:
    """Resolve the settings that depend on the data or on other settings."""
    return config.model_copy(
        update={
            "max_steps": steps_of(config, len(task.examples), task.share),
            "learning_rate": config.learning_rate or default_learning_rate(config.lora_rank),
            "lora_alpha": config.lora_alpha or (2.0 * config.lora_rank if config.lora_rank else None),
            "mixed_precision": mixed_precision,
        }
    )


def divide_steps(config: TrainConfig, stages: Sequence[Stage]) -> None:
    """Divide ``max_steps`` among the stages as evenly as possible.

    Raises:
        UserError: there are fewer steps than stages, or than a stage needs to use all that is drawn for it; or a step
            cannot use its loss.
    """
    assert config.max_steps is not None
    check_steps(config.max_steps, config.method, stages)
    ends = [config.max_steps * number // len(stages) for number in range(len(stages) + 1)]
    for stage, start, end in zip(stages, ends[:-1], ends[1:], strict=True):
        stage.first_step, stage.steps = start, end - start
        for part in stage.own_samples:
            if part.method.drawn:
                part.method.drawn.check_steps(stage.steps)
        for part in stage.parts:
            check_losses(config.method, part.method, stage.steps)
