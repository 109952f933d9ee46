"""The model card: ``README.md`` of a model folder, for people and the Hugging Face hub.

User input (file names, contexts) goes into code spans, so that it is never markup, and paths are not disclosed.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard, ModelCardData

from selfdistill import __version__
from selfdistill.config import MAY_CHANGE, TrainConfig, without_defaults
from selfdistill.data import is_own
from selfdistill.errors import UserError, number_of
from selfdistill.evaluation import Evaluation
from selfdistill.methods import METHODS, stages_of, uses
from selfdistill.model import STARTER_MODELS
from selfdistill.runtime import METRICS, public_name, public_settings, read_lines

ALWAYS = ("method", "learning_rate", "max_steps", "batch_size", "max_completion_length", "mixed_precision", "seed")
"""Settings in every card; others appear if they differ from the default."""
_ELSEWHERE = ("model", "data", "output_dir", *MAY_CHANGE, "test", "prior", "judge_model")
"""Settings that do not affect the weights, or appear elsewhere in the card."""
_MEASURES = {
    "accuracy": ("new task, accuracy", "accuracy_interval"),
    "accuracy_lenient": ("new task, accuracy by a lenient judge", ""),
    "completion/length": ("new task, mean tokens per reply", ""),
    "completion/truncated": ("new task, share of replies truncated at the length limit", ""),
    "prior_accuracy": ("prior abilities, mean accuracy", "prior_interval"),
    "kl_base": ("KL(base||model), nats per token", ""),
}
"""Keys of a line in evaluations.jsonl: description, and the key of the interval."""
_UNKNOWN = "Performance on other tasks is unknown and may have decreased through fine-tuning."
_ALWAYS_LIMITED = """\
- Its replies were not examined for harm or bias; those of the base model may persist.
- The licences of the base model and of the data apply; this card grants none."""
_LOADING = "## How to load"
_LOAD_MODEL = """\
```python
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "."  # the folder of this file, or its name on the hub
model = AutoModelForCausalLM.from_pretrained(folder)
tokenizer = AutoTokenizer.from_pretrained(folder)
```

It was written with transformers 5. Older releases, also in other tools, may silently compute something else.
"""
_LOAD_ADAPTER = """\
```python
from peft import PeftConfig, PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

folder = "."  # the folder of this file, or its name on the hub
base = AutoModelForCausalLM.from_pretrained(PeftConfig.from_pretrained(folder).base_model_name_or_path)
model = PeftModel.from_pretrained(base, folder)
model.generation_config = GenerationConfig.from_pretrained(folder)  # with all tokens that end a reply
tokenizer = AutoTokenizer.from_pretrained(folder)
```

This is an adapter. `base_model_name_or_path` in `adapter_config.json` names its base model; if that is a folder on
another machine, correct it there. `selfdistill export --merge true` merges both into one model.
"""


def model_card(
    config: TrainConfig,
    run: Path,
    step: int,
    *,
    demonstrations: int | None,
    fingerprint: str,
    adapter: bool,
    pictures: bool = False,
    signs: Sequence[str] = (),
) -> str:
    """The card of a run's final model: YAML front matter, then Markdown.

    The results are the last line of ``evaluations.jsonl`` up to ``step``, next to that of step 0 (the base). Without
    that file, they are the last line of ``metrics.jsonl``.

    Args:
        config: the run's resolved settings.
        run: its folder.
        step: the step after which the model was saved.
        demonstrations: number of demonstrations trained on; None if it is unknown.
        fingerprint: fingerprint of the encoded examples; see :func:`selfdistill.training.setup.data_fingerprint`.
        adapter: whether the weights are an adapter rather than a full model.
        pictures: whether it is an image-text model.
        signs: signs of collapse, as reported during the run.
    """
    base, data = public_name(config.model), public_name(config.data)
    metadata = ModelCardData(
        base_model=_on_the_hub(config.model),
        library_name="peft" if adapter else "transformers",
        pipeline_tag=_pipeline_tag(pictures),
        tags=["selfdistill", config.method, *(["lora"] if adapter else [])],
        datasets=[data] if "/" in data else None,
    )
    results, measured = _results(run, step)
    rows = "demonstrations" if demonstrations is None else number_of(demonstrations, "demonstration")
    early = f"- It ended early, after step {step} of {config.max_steps}\n" if step < (config.max_steps or 0) else ""
    parts = [
        f"---\n{metadata.to_yaml()}\n---",
        f"# {_code(base)}, taught by {_code(config.method)}",
        _method(config.method),
        f"- Base model: {_code(base)}\n"
        f"- Data: {_code(data)}, {rows}, fingerprint `{fingerprint}` (SHA-256 of the "
        "tokens of every example: student prompt, teacher prompt and completion)\n"
        f"{early}- Made with selfdistill {__version__}",
        "## Settings",
        _table(("setting", "value"), ((f"`{key}`", _code(str(value))) for key, value in _settings(config).items())),
        "All other settings have the defaults of `selfdistill train`.",
        "## Results",
        *results,
        "## Limits",
        *([f"- The run showed signs of collapse: {'; '.join(signs)}."] if signs else []),
        f"- {measured} {_UNKNOWN}\n"
        f"- It was trained on {rows} with completions of at most "
        f"{config.max_completion_length} tokens. It may reproduce mistakes in the demonstrations.\n"
        f"{_ALWAYS_LIMITED}",
        f"{_LOADING}\n\n{_code_to_load(_LOAD_ADAPTER if adapter else _LOAD_MODEL, pictures)}",
    ]
    return "\n\n".join(parts)


def _on_the_hub(model: str) -> str:
    """A model's name for the front matter."""
    return STARTER_MODELS[model].hub_id if model in STARTER_MODELS else public_name(model)


def learnt_in_4bit(text: str) -> bool:
    """Whether a card's settings say that the model's base was in 4 bits."""
    return "| `load_in_4bit` | `True` |" in text


def _pipeline_tag(pictures: bool) -> str:
    return "image-text-to-text" if pictures else "text-generation"


def _code_to_load(code: str, pictures: bool) -> str:
    """The code that loads a model, with the classes of an image-text model if it is one."""
    if not pictures:
        return code
    code = code.replace("ForCausalLM", "ForImageTextToText").replace("AutoTokenizer", "AutoProcessor")
    return code.replace("tokenizer =", "processor =")


def merged_card(text: str, *, pictures: bool = False) -> str:
    """Convert the card ``text`` of an adapter for the merged model; ``pictures``: of an image-text model.

    Raises:
        UserError: the front matter is not YAML.
    """
    try:
        card = ModelCard(text, ignore_metadata_errors=True)
    except (ValueError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"README.md: its front matter cannot be read ({reason}); fix it, or delete the file") from None
    metadata: Any = card.data
    metadata.library_name = "transformers"
    metadata.pipeline_tag = _pipeline_tag(pictures)
    # PEFT's own tags say "adapter".
    metadata.tags = [tag for tag in metadata.tags or [] if not tag.startswith("base_model:adapter:")] or None
    body = card.text.partition(_LOADING)[0].strip()
    note = "The LoRA adapter is merged into its base model: this is a full model, which does not need PEFT."
    loading = f"{_LOADING}\n\n{note}\n\n{_code_to_load(_LOAD_MODEL, pictures)}"
    return "\n\n".join([f"---\n{metadata.to_yaml()}\n---", *([body] if body else []), loading])


def sum_card(model: str, add: str, subtract: str, scale: float, *, pictures: bool) -> str:
    """The card of ``model`` + ``scale`` * (``add`` - ``subtract``); ``pictures``: of image-text models."""
    names = [public_name(name) for name in (model, add, subtract)]
    metadata = ModelCardData(
        library_name="transformers", pipeline_tag=_pipeline_tag(pictures), tags=["selfdistill", "task-vector", "merge"]
    )
    target, learnt, before = map(_code, names)
    parts = [
        f"---\n{metadata.to_yaml()}\n---",
        f"# {target} with what {learnt} has learnt",
        f"The weights are those of {target} plus {scale:g} times the difference between {learnt} and {before}. Made "
        f"with selfdistill {__version__}, without training.",
        "## Limits",
        "It was not evaluated: measure whether the difference in weights transfers the skill.",
        f"{_LOADING}\n\n{_code_to_load(_LOAD_MODEL, pictures)}",
    ]
    return "\n\n".join(parts)


def state_card(
    text: str, base: str, skills: Sequence[tuple[str, str, str, Sequence[Evaluation]]], prior: Sequence[float]
) -> str:
    """The card of a model that has learnt skill after skill.

    Args:
        text: the card of its last run.
        base: the model before the first skill.
        skills: the name, method and data of each, and its evaluations for the base, when learnt, and now.
        prior: mean accuracy on the prior abilities of the base and of the model; empty if they were not measured.
    """
    pictures = f"pipeline_tag: {_pipeline_tag(True)}" in text
    data = [public_name(file) for _, _, file, _ in skills]
    metadata = ModelCardData(
        base_model=_on_the_hub(base),
        library_name="transformers",
        pipeline_tag=_pipeline_tag(pictures),
        tags=["selfdistill", *dict.fromkeys(method for _, method, _, _ in skills)],
        datasets=[name for name in dict.fromkeys(data) if "/" in name] or None,
    )
    rows: list[tuple[str, ...]] = []
    for (name, method, _, scores), file in zip(skills, data, strict=True):
        found = (_number(score["accuracy"], score["accuracy_interval"]) for score in scores)
        rows.append((_code(name), _code(method), _code(file), str(scores[-1]["items"]), *found))
    parts = [
        f"---\n{metadata.to_yaml()}\n---",
        f"# {_code(public_name(base))} after {number_of(len(skills), 'skill')}",
        f"- Base model: {_code(public_name(base))}\n- Made with selfdistill {__version__}",
        "## Results",
        "Accuracy on the test of each skill, in the order of learning; 95% confidence intervals in brackets.",
        _table(("skill", "method", "data", "test items", "base", "when learnt", "now"), rows),
        *(["Prior abilities, mean accuracy: {:.3f} (base), {:.3f} now.".format(*prior)] if prior else []),
        "## Limits",
        f"- Only what is listed here was measured. {_UNKNOWN}\n"
        f"- It may reproduce mistakes in the demonstrations.\n{_ALWAYS_LIMITED}",
        f"{_LOADING}\n\n{_code_to_load(_LOAD_MODEL, pictures)}",
    ]
    return "\n\n".join(parts)


def _method(name: str) -> str:
    """The first docstring line of the method's module, with papers as links; nothing of a user's own module."""
    if is_own(name):
        return "The method is a function of its user, not one of the package."
    summary = (sys.modules[METHODS[name].__module__].__doc__ or name).strip().splitlines()[0]
    return re.sub(r"arXiv (\d{4}\.\d{5})", r"[arXiv \1](https://arxiv.org/abs/\1)", summary)


def _settings(config: TrainConfig) -> dict[str, Any]:
    """Settings that affect the model and differ from the default, plus those in every card."""
    used = {name: uses(config, name) for name in ("context", "teacher", "divergence", "temperature")}
    used["scorer"] = _has_checker(config)
    always = (*ALWAYS, *(name for name in used if used[name]))
    left_out = (*_ELSEWHERE, *(name for name in used if not used[name]))
    changed = [name for name in without_defaults(config) if name not in left_out]
    values = public_settings(config)
    return {key: values[key] for key in dict.fromkeys((*always, *changed)) if key in values}


def _has_checker(config: TrainConfig) -> bool:
    """Whether the method's samples are scored; also True where a function of the user's is no longer at hand."""
    try:
        return any(part.method.checker for parts in stages_of(config) for part in parts)
    except UserError:
        return True


def _results(run: Path, step: int) -> tuple[list[str], str]:
    """Paragraphs of results, and the sentence about them in the limits."""
    if lines := [line for line in read_lines(run / "evaluations.jsonl") if line.get("step", 0) <= step]:
        last, first = lines[-1], lines[0] if lines[0].get("step") == 0 and len(lines) > 1 else {}
        after, before = _measured(last), _measured(first)
        rows = ((name, before.get(name, ""), value) for name, value in after.items())
        said = f"Measured after step {last.get('step')}; 95% confidence intervals in brackets."
        return [_table(("", "base", "this model"), rows), said], "Only what the table lists was measured."
    if lines := [line for line in read_lines(run / "metrics.jsonl") if line["step"] <= step]:
        found = {key: lines[-1][key] for key in ("loss", "kl/forward", "drift/student") if key in lines[-1]}
        rows = ((f"`{key}`", METRICS[key].replace("``", "`"), f"{value:.4g}") for key, value in found.items())
        said = f"Training metrics at the last step, {lines[-1]['step']}:"
        return [said, _table(("metric", "meaning", "value"), rows)], "It was not evaluated on held-out questions."
    return ["Nothing was measured."], "It was not evaluated on held-out questions."


def _measured(line: dict[str, Any]) -> dict[str, str]:
    """The results in a line of ``evaluations.jsonl``: description to value, as text."""
    measured = {}
    for key, (name, interval) in _MEASURES.items():
        if key in line:
            items = f" ({line['items']} items)" if key == "accuracy" else ""
            measured[name + items] = _number(line[key], line.get(interval))
    for ability, result in line.get("prior", {}).items():
        name = f"prior ability {_code(ability)} ({result['items']} items)"
        measured[name] = _number(result["accuracy"], result["interval"])
    return measured


def _number(value: float, interval: list[float] | None) -> str:
    return f"{value:.3f}" + (f" ({interval[0]:.3f} to {interval[1]:.3f})" if interval else "")


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |" for cells in lines)


def _code(text: str) -> str:
    """``text`` as a code span, in which nothing is markup."""
    text = " ".join(text.split())
    fence = "`" * (max((len(ticks) for ticks in re.findall("`+", text)), default=0) + 1)
    return f"{fence} {text} {fence}" if "`" in text else f"`{text}`"
