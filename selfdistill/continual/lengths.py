"""Which rows and anchors fit the limits on their lengths. Reads tokenizers and ``config.json``, and no weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from selfdistill.config import LearnConfig, TrainConfig
from selfdistill.continual.rehearsal import as_shown
from selfdistill.data import (
    ChatFormat,
    Demonstration,
    Example,
    NothingFits,
    encode,
    is_packaged,
    load_prompts,
    parse_context,
)
from selfdistill.errors import UserError
from selfdistill.methods import (
    DemonstrationExamples,
    examples_of_prompts,
    limits_of,
    stages_of,
    uses,
    with_teachers_window,
)
from selfdistill.model import LoadedModel, fake_model


def check_anchor_lengths(run: TrainConfig, config: LearnConfig, memory: Sequence[Demonstration]) -> None:
    """Check that the anchors of an addition fit into the limits on their lengths.

    Args:
        run: settings of its training.
        config: its settings.
        memory: prompts of earlier skills.

    Raises:
        UserError: prompts are too long and ``on_long_prompt`` is ``error``, or all of a source are.
    """
    files = [source for source in config.anchors if not is_packaged(source)]
    if not run.anchor_share or not (files or memory):
        return
    loaded, chat = _model_of(run)
    for source in files:
        examples_of_prompts(run, load_prompts(source), loaded, chat, run.on_long_prompt)
    try:
        examples_of_prompts(run, memory, loaded, chat, run.on_long_prompt)
    except UserError as error:
        advice = "; anchor_share 0 rehearses none" if isinstance(error, NothingFits) else ""
        raise UserError(f"prompts of earlier skills: {error}{advice}") from None


def fitting_rows(run: TrainConfig, config: LearnConfig, rows: Sequence[Demonstration]) -> list[Demonstration]:
    """What can be learnt, within all limits on lengths: rows, or their turns where some may be too long.

    In the order of the rows. The teacher's prompt counts only with a context other than ``auto``, which is not chosen
    yet.

    Args:
        run: settings of the training.
        config: settings of the addition.
        rows: its training rows.

    Raises:
        UserError: rows are too long and ``on_long_prompt`` is ``error``, or all of them are.
    """
    loaded, chat = _model_of(run)
    if config.action != "stream":
        return _of_method(run, rows, loaded, chat)
    found = _of_chunks(run, config, rows, loaded, chat)
    return [row for row in rows if row.row in found]


def _model_of(run: TrainConfig) -> tuple[LoadedModel, ChatFormat]:
    """The model without its weights."""
    loaded = fake_model(run.model, dtype=run.dtype, adapter_base=run.adapter_base, trained=False)
    return loaded, loaded.chat_for(run)


def date_shown(run: TrainConfig) -> str | None:
    """The day (YYYY-MM-DD) that the model's chat template sees; None if it does not read the clock."""
    return _model_of(run)[1].date


def _of_method(
    run: TrainConfig, rows: Sequence[Demonstration], loaded: LoadedModel, chat: ChatFormat
) -> list[Demonstration]:
    """What the method encodes of the rows; all of them, if it learns from something else, such as documents."""
    own = run.model_copy(update={"anchors": ()})
    methods = [part.method for parts in stages_of(own) for part in parts if not part.same_samples]
    sources = {(method.examples, with_teachers_window(loaded, method).window) for method in methods}
    learnt = [(source, window) for source, window in sources if isinstance(source, DemonstrationExamples)]
    found = [] if learnt else list(rows)
    for source, window in learnt:
        shown = replace(source, context=None) if source.context == "auto" else source
        found += [example.demonstration for example in shown(rows, replace(loaded, window=window), chat)[0]]
    return sorted(found, key=lambda x: ((x.turn_of or x).row, len(x.prompt)))


def _of_chunks(
    run: TrainConfig, config: LearnConfig, rows: Sequence[Demonstration], loaded: LoadedModel, chat: ChatFormat
) -> set[int]:
    """Numbers of the rows of a stream that fit in their chunk, whose rows a context may show."""
    context = run.context if uses(run, "context") and run.context != "auto" else None
    for task, *_ in stages_of(run):
        loaded = with_teachers_window(loaded, task.method)
    found: set[int] = set()
    for chunk in chunks_of(rows, config):
        try:
            encoded = encoded_rows(loaded, chat, chunk, config, config.on_long_prompt, context)
        except NothingFits as error:
            encoded, unfit = [], error
        found |= {row.demonstration.row for row in encoded}
    if not found:
        raise UserError(f"{config.data}: every row is too long: {unfit}")
    return found


def chunks_of(rows: Sequence[Demonstration], config: LearnConfig) -> list[Sequence[Demonstration]]:
    """The rows of a stream, chunk by chunk."""
    return [rows[start : start + config.chunk_size] for start in range(0, len(rows), config.chunk_size)]


def encoded_rows(
    loaded: LoadedModel,
    chat: ChatFormat,
    rows: Sequence[Demonstration],
    config: LearnConfig,
    on_long_prompt: str,
    context: str | None = None,
) -> list[Example]:
    """Encode the rows, with an environment as its episodes.

    They must be within the limits on prompt, completion and, with a context, the teacher's prompt.
    """
    examples, _ = encode(
        as_shown(config, rows),
        None if context is None else parse_context(context),
        chat,
        window=loaded.window,
        on_long_prompt=on_long_prompt,
        completion_must_fit=True,
        **limits_of(config),
    )
    return examples
