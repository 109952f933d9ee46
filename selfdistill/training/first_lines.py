"""The lines with which a run begins."""

from __future__ import annotations

from selfdistill.config import TrainConfig
from selfdistill.data import default_scorer
from selfdistill.errors import number_of
from selfdistill.methods import rules_of, scorer_judges, unused_settings, uses
from selfdistill.model import describe_lora, keeps_episodes
from selfdistill.runtime import is_distributed
from selfdistill.training.schedule import fewest_of_first, positions_of
from selfdistill.training.setup import batch_unit
from selfdistill.training.trainer import Trainer

FEW_STEPS = 5
"""A run with fewer steps gets a note: with the default rates it hardly changes a model."""
OF_ANCHORS = ("anchor_share", "anchor_divergence")
"""Settings that every method uses, but only with anchors."""


def first_lines(trainer: Trainer, *, all_rows: bool = True) -> list[str]:
    """Lines that describe the run, printed at its start.

    Args:
        trainer: of the run.
        all_rows: whether the trainer has all rows of the run; else nothing is said on whether they fill a batch.
    """
    config, first = trainer.config, trainer.stages[0]
    task = first.task.method
    scores = task.checker is not None and scorer_judges(config)
    lines = [
        f"{config.method} on {stage.task.counted}, {number_of(stage.steps, 'step')} of {config.batch_size}, "
        f"learning rate {config.learning_rate:g}"
        for stage in trainer.stages
    ]
    lines += [f"{part.name}: {part.counted}, {part.share:.1%} of every batch" for part in first.own_samples[1:]]
    for part in first.parts:
        if part.same_samples:
            lines.append(f"{part.name}: on the same samples, with weight {part.method.weight:g}")
    trained = _millions(sum(p.numel() for p in trainer.parameters))
    bits = " in 4 bits" if config.load_in_4bit else ""
    arithmetic = " with bfloat16 arithmetic" if config.mixed_precision == "bf16" else ""
    lines.append(f"model: {config.model}, {trained} trainable parameters, on {trainer.loaded.device}{bits}{arithmetic}")
    if config.lora_rank:
        lines.append(describe_lora(trainer.loaded))
    if rules := rules_of(task):
        limits = f"up to {rules.max_turns} turns and {rules.max_length} tokens"
        judge = ", whose last replies the scorer judges" if scores else ""
        lines.append(f"environment: {rules.environment}, episodes of {limits}{judge}")
        if rules.max_turns > 1 and trainer.loaded.engine is None and not keeps_episodes(trainer.loaded):
            lines.append(
                "note: this model (sliding windows, recurrent layers or positions of its own) reads each episode anew "
                "at every turn; an engine keeps what it has read (setting engine)"
            )
    if scores:
        rows = [example.demonstration for example in first.task.examples]
        lines.append(f"scorer: {', '.join(sorted({default_scorer(row, config.scorer) for row in rows}))}")
    if trainer.teacher:
        lines += [trainer.teacher.describe(), *_context(trainer)]
        if trainer.prefix_caches.get(trainer.teacher.rule):
            lines.append(f"its contexts are cached for later epochs, up to {config.teacher_cache_mib} MiB")
    others = [teacher for teacher in trainer.teachers.values() if teacher is not trainer.teacher]
    lines += [f"also scoring: {teacher.describe().removeprefix('teacher: ')}" for teacher in others]
    if is_distributed():
        shares = " and the weights" if config.fsdp else ""
        lines.append(f"{trainer.accelerator.num_processes} processes, which share every batch{shares}")
    lines += [*(_unfilled(trainer) if all_rows else []), *_few_steps(config), *_unused(config), *_never_drawn(trainer)]
    lines += _unlearnt_end(trainer)
    if not trainer.forward_pass.fused:
        lines.append("the LM head cannot be fused into the loss: full logits need more memory")
    return lines


def _millions(count: int) -> str:
    """A number of parameters: in millions, or in full if there are fewer."""
    return f"{count / 1e6:.1f} M" if count >= 1e6 else f"{count:,}"


def _unfilled(trainer: Trainer) -> list[str]:
    """Notes on data of which every step needs more than there are."""
    config, lines = trainer.config, []
    for stage in trainer.stages:
        shares = [part.share for part in stage.own_samples]
        fewest = fewest_of_first(shares, config.batch_size, batch_unit(config))
        if len(stage.task.examples) < fewest:
            part = f"their part ({fewest} or more) of " if len(shares) > 1 else ""
            lines.append(
                f"note: {stage.task.method.examples.counted(len(stage.task.examples))} do not fill {part}a batch of "
                f"{config.batch_size}, so every step repeats some; lower batch_size, and set the number of steps with "
                "max_steps"
            )
    return list(dict.fromkeys(lines))


def _few_steps(config: TrainConfig) -> list[str]:
    """A note on a run of a few steps."""
    assert config.max_steps is not None, "a trainer resolves its settings"
    if config.max_steps >= FEW_STEPS:
        return []
    steps = number_of(config.max_steps, "step")
    return [f"note: this run has only {steps}, which teaches a model little; raise max_steps"]


def _unused(config: TrainConfig) -> list[str]:
    """Notes on settings without effect."""
    unused = unused_settings(config)
    ignored = [name for name in unused if name not in OF_ANCHORS]
    without_anchors = [name for name in unused if name in OF_ANCHORS]
    lines = []
    if ignored:
        lines.append(f"note: {config.method} ignores these settings: {', '.join(ignored)}")
    if without_anchors:
        lines.append(f"note: without anchors, these settings have no effect: {', '.join(without_anchors)}")
    if config.anchors and not config.anchor_share:
        lines.append("note: anchor_share is 0, so no anchors are used")
    return lines


def _never_drawn(trainer: Trainer) -> list[str]:
    """Notes on parts of which no step has an example, because their share is so small."""
    config, stage = trainer.config, trainer.stages[0]
    shares = [part.share for part in stage.own_samples]
    after = positions_of(shares, stage.steps, config.batch_size, config.seed, batch_unit(config))
    return [
        f"note: {part.name} is in none of the {number_of(stage.steps, 'step')}; raise batch_size or its share "
        "(of anchors: anchor_share)"
        for part, positions in zip(stage.own_samples, after, strict=True)
        if positions.start == 0
    ]


def _unlearnt_end(trainer: Trainer) -> list[str]:
    """A note on an end token that LoRA may be unable to teach: its rows in embedding and head stay as they are."""
    end = trainer.loaded.new_end
    if not trainer.config.lora_rank or end is None:
        return []
    return [
        f"note: LoRA leaves embedding and head as they are, so a base that never learnt {end!r} may not learn "
        "to end with it; begin with a chat model, or leave lora_rank out"
    ]


def _context(trainer: Trainer) -> list[str]:
    if not uses(trainer.config, "context"):
        return []
    hint = f", hint: {trainer.config.hint}" if trainer.config.hint != "1" and uses(trainer.config, "hint") else ""
    return [f"context: {trainer.config.context}{hint}"]
