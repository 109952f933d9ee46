"""Model folders for use elsewhere: written atomically, with a model card, without pickles."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor
from transformers import GenerationConfig

from selfdistill.config import ExportConfig, TrainConfig
from selfdistill.errors import RERUN, UserError
from selfdistill.evaluation import note_on_chats, run_of
from selfdistill.model import LICENCES, LoadedModel, files_that_go_along, load_model, merged, resolve, start_fingerprint
from selfdistill.runtime import check_folder_writable, corruption, fsync, replace_folder, say
from selfdistill.training.checkpoint import checkpoint_at, list_checkpoints, load_weights, saved_position, settings_of
from selfdistill.training.model_card import learnt_in_4bit, merged_card, model_card
from selfdistill.training.setup import choose_weights

_MODEL_FILES = (
    *("*.safetensors", "*.json", "*.jinja", "additional_chat_templates/*.jinja", "*.txt", "*.model", "*.md"),
    *LICENCES,
)
"""Files to copy: weights, settings, tokenizer, card. No code, and no pickled files, which can run code when read."""


@contextmanager
def whole_folder(folder: Path, advice: str, *, replace: bool = False) -> Iterator[Path]:
    """Yield a hidden folder to write a model into, and rename it to ``folder`` on success: ``folder`` is never partial.

    With ``replace`` it takes the place of an earlier ``folder``, which stays until the new one is on the disk.

    Raises:
        UserError: it cannot be written; the message ends with ``advice``.
    """
    temporary = folder.parent / f".{folder.name}.unfinished"
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        yield temporary
        for path in (temporary, *temporary.rglob("*")):
            fsync(path)
        if replace:
            replace_folder(folder, temporary)
        else:
            temporary.rename(folder)
        fsync(folder.parent)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{folder}: cannot write the model ({error}); {advice}") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_model(
    folder: Path, model: Any, loaded: LoadedModel, card: str, state: dict[str, Tensor] | None = None
) -> None:
    """Write a model into an existing folder, with the card and what of its base's files belongs beside it.

    Args:
        folder: where to write.
        model: what to write: all weights, or of a ``PeftModel`` the adapter ``default``.
        loaded: its tokenizer, and the folder of its base's files.
        card: text of ``README.md``.
        state: replaces the model's own weights, which may be sharded.
    """
    options: dict[str, Any] = {} if state is None else {"state_dict": state}
    generation = model.generation_config
    if hasattr(model, "peft_config"):
        options["selected_adapters"] = ["default"]
        base = Path(model.peft_config["default"].base_model_name_or_path)
        if base.is_dir():  # must be found from any working directory
            model.peft_config["default"].base_model_name_or_path = str(base.absolute())
        model.save_pretrained(folder, **options)
    else:
        try:
            # With more end tokens it counts as changed, and save_pretrained refuses flags that it accepts unchanged.
            model.generation_config = GenerationConfig()
            model.save_pretrained(folder, **options)
        finally:
            model.generation_config = generation
        _name_rotary_base(folder / "config.json")
    if generation is not None:
        generation.to_json_file(folder / "generation_config.json", use_diff=True, keys_to_pop=["compile_config"])
    loaded.tokenizer.save_pretrained(folder)
    for file in files_that_go_along(loaded.files) if loaded.files else ():
        if not (folder / file.name).exists():
            shutil.copyfile(file, folder / file.name)
    if loaded.pictures is not None and not loaded.files:
        loaded.pictures.processor.save_pretrained(folder)
    mode = (folder / "tokenizer_config.json").stat().st_mode
    for weights in folder.glob("*.safetensors"):  # safetensors makes them readable by the owner only
        weights.chmod(mode)
    (folder / "README.md").write_text(card, encoding="utf-8")  # replaces PEFT's own


def _name_rotary_base(file: Path) -> None:
    """Write the base of the rotary frequencies also where transformers 4 reads it, which would silently use 10,000.

    transformers 5 prefers the value in ``rope_parameters``, which is the same.
    """
    values = json.loads(file.read_text(encoding="utf-8"))
    for part in (values, *values.values()):  # an image-text model has it in text_config
        rope = part.get("rope_parameters") if isinstance(part, dict) else None
        if rope and "rope_theta" in rope:  # else one per kind of layer, or none
            part["rope_theta"] = rope["rope_theta"]
    file.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def unused_folder(name: str) -> Path:
    """The absolute path of a folder to write to, which does not exist or is empty.

    Raises:
        UserError: it is neither, or cannot be written.
    """
    folder = Path(name).absolute()
    if os.path.exists(folder) and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"output_dir {name!r} exists and is not an empty folder; choose another")
    check_folder_writable(folder.parent, f"output_dir {name!r}")  # where whole_folder begins it
    return folder


def model_files(folder: Path) -> list[Path]:
    """The files of a model to copy, relative to its folder."""
    return [file.relative_to(folder) for pattern in _MODEL_FILES for file in folder.glob(pattern)]


def export(config: ExportConfig, card: str | None = None) -> Path:
    """Write the final model of a run to ``output_dir``, or that of a checkpoint; returns that folder.

    Without ``merge`` the files are copied unchanged, except that ``adapter_base`` is written into the copy of an
    adapter's settings, and that ``card`` replaces the copy of ``README.md``. With ``merge`` an adapter is merged into
    its base in float32, and the result is saved in the base's data type.

    Raises:
        UserError: there is no model or no such checkpoint, ``output_dir`` is not empty or cannot be written,
            ``merge`` is set but there is no adapter, or the adapter's base cannot be loaded.
    """
    note_on_chats(run_of(Path(config.run)))
    if config.step is not None:
        return _export_checkpoint(config, config.step)
    source, output_dir = _final_folder(config.run), unused_folder(config.output_dir)
    advice = "free disk space or choose another output_dir, then export again"
    if not config.merge:
        with whole_folder(output_dir, advice) as folder:
            for file in model_files(source):
                (folder / file).parent.mkdir(exist_ok=True)
                shutil.copy(source / file, folder / file)
            if config.adapter_base:
                _name_base(folder, config.adapter_base, config.run)
            if card is not None:
                (folder / "README.md").write_text(card, encoding="utf-8")
        return output_dir
    if not (source / "adapter_config.json").is_file():
        raise UserError(f"run {config.run!r}: a full model without an adapter to merge; leave merge out")
    _write_merged(source, output_dir, config.adapter_base, advice)
    return output_dir


def _write_merged(source: Path, target: Path, adapter_base: str | None, advice: str) -> None:
    """Write the adapter in ``source``, merged into its base, to ``target``; ``advice`` is for a full disk."""
    readme = source / "README.md"
    text = readme.read_text(encoding="utf-8") if readme.is_file() else ""
    if learnt_in_4bit(text):
        say(
            "note: the adapter was trained on a 4-bit base and is merged into the original base, which computes "
            "slightly different results; measure the result with selfdistill eval"
        )
    loaded = load_model(str(source), dtype="auto", merge_adapter=True, adapter_base=adapter_base)
    card = merged_card(text, pictures=loaded.pictures is not None)
    with whole_folder(target, advice) as folder:
        write_model(folder, loaded.model, loaded, card)


def _export_checkpoint(config: ExportConfig, step: int) -> Path:
    """:func:`export` of the model after ``step``, from the run's base and the checkpoint's weights."""
    output_dir, checkpoint = unused_folder(config.output_dir), _checkpoint(config.run, step)
    saved = settings_of(checkpoint)
    if config.merge and not saved.lora_rank:
        raise UserError(f"run {config.run!r}: trained all weights, so there is no adapter to merge; leave merge out")
    position = saved_position(checkpoint)
    loaded = _base_of(config, saved, began_on_adapter="model" not in position.digests)
    if saved.lora_rank and not saved.load_in_4bit:  # which is loaded here without rounding
        before, now = position.digests.get("model", ""), start_fingerprint(loaded)
        if "" not in (before, now) and before != now:
            raise UserError(
                f"run {config.run!r}: the weights of its base {loaded.name!r} are not those with which it began; "
                "restore them"
            )
    choose_weights(loaded, saved)
    load_weights(checkpoint, loaded.model)
    model = loaded.model
    if saved.lora_rank and (config.merge or loaded.merged_adapter):
        model = merged(model, saved.model)
    card = model_card(
        saved,
        Path(config.run),
        step,
        demonstrations=None,
        fingerprint=position.digests["data"],
        adapter=hasattr(model, "peft_config"),
        pictures=loaded.pictures is not None,
    )
    with whole_folder(output_dir, "free disk space or choose another output_dir, then export again") as folder:
        write_model(folder, model, loaded, card)
        if config.adapter_base and hasattr(model, "peft_config"):
            _name_base(folder, config.adapter_base, config.run)
    return output_dir


def _base_of(config: ExportConfig, saved: TrainConfig, *, began_on_adapter: bool) -> LoadedModel:
    """The model with which a run began; ``adapter_base`` is the new place of the base of a run with LoRA.

    If the run began on a merged adapter, it is that of the adapter's base.

    Raises:
        UserError: it cannot be loaded.
    """
    moved = config.adapter_base if saved.lora_rank and not began_on_adapter else None
    base = config.adapter_base or saved.adapter_base
    return load_model(moved or saved.model, dtype=saved.dtype, merge_adapter=True, adapter_base=None if moved else base)


def _checkpoint(run: str, step: int) -> Path:
    """The intact checkpoint of a run after a step.

    Raises:
        UserError: there is none; names those that there are.
    """
    checkpoint = checkpoint_at(Path(run), step)
    if checkpoint.is_dir():
        if wrong := corruption(checkpoint):
            raise UserError(f"{checkpoint}: the checkpoint is corrupt ({wrong}); export another step")
        return checkpoint
    steps = [str(saved_position(path).step) for path in list_checkpoints(Path(run))]
    there = f"there are checkpoints of the steps {', '.join(steps)}" if steps else "it has no checkpoints"
    raise UserError(f"run {run!r}: no checkpoint of step {step}; {there} (save_steps, save_total_limit)")


def _name_base(folder: Path, adapter_base: str, run: str) -> None:
    """Write the base of an adapter into its settings, as an absolute path if it is a folder.

    Raises:
        UserError: there is no such base.
    """
    settings = folder / "adapter_config.json"
    if not settings.is_file():
        say(f"note: adapter_base is not used: {run} is not an adapter")
        return
    base = resolve(adapter_base)
    place = str(Path(base).absolute()) if Path(base).is_dir() else base
    values = json.loads(settings.read_text(encoding="utf-8")) | {"base_model_name_or_path": place}
    settings.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def take_whole(final: Path, target: Path, base: str) -> None:
    """Move the final model of a run to ``target``, merging an adapter into ``base``, wherever that is by now."""
    if (final / "adapter_config.json").exists():
        _write_merged(final, target, base, f"free disk space, then {RERUN}")
        shutil.rmtree(final)
    else:
        final.rename(target)


def _final_folder(name: str) -> Path:
    """The model folder of a run, or the folder itself."""
    folder = Path(name)
    if not folder.is_dir():
        raise UserError(f"run {name!r}: no such folder; give a run folder or a model folder")
    source = folder / "final" if (folder / "final").is_dir() else folder
    if source == folder and (folder / "config.yaml").is_file():
        raise UserError(f"run {name!r}: no final model, because it has not reached its last step; resume its training")
    if not any((source / file).is_file() for file in ("config.json", "adapter_config.json")):
        raise UserError(f"run {name!r}: neither a run folder (final) nor a model folder (config.json)")
    if not any(source.glob("*.safetensors")):
        raise UserError(f"run {name!r}: no safetensors weights in {source}; other formats are not exported")
    return source
