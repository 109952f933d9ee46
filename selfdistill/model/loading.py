"""Safe loading of models, tokenizers and adapters."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoTokenizer, PreTrainedModel

from selfdistill.config import EngineSettings, ModelSettings
from selfdistill.data import ChatFormat
from selfdistill.errors import UserError
from selfdistill.model.adapters import attach, merged, read_config, without_adapter
from selfdistill.model.device import best_device, has_gpu
from selfdistill.model.dropout import disable_dropout
from selfdistill.model.files import has_tokenizer, local_folder, resolve, tokenizer_options
from selfdistill.model.pictures import PictureInputs, divided, has_own_positions, pictures_for
from selfdistill.model.rollout_count import RolloutCount
from selfdistill.model.weights import check_vocabulary, embedding_rows, first_line, load_causal
from selfdistill.runtime import library_warnings, say


@dataclass
class LoadedModel:
    """A causal language model with its tokenizer and special tokens."""

    model: Any
    """``PreTrainedModel`` or ``PeftModel`` in eval mode, dropout disabled."""
    tokenizer: Any
    name: str
    """The name given by the user."""
    end_token_ids: tuple[int, ...]
    """All tokens that end a reply: those of the generation config and the tokenizer's."""
    pad_token_id: int
    window: int | None
    """Maximum number of tokens of prompt plus completion; None if the model states no limit."""
    notes: list[str] = field(default_factory=list)
    """Decisions made while loading, to tell the user."""
    new_end: str | None = None
    """The token with which the chat template ends replies, if the model's generation config does not name it."""
    files: Path | None = None
    """Folder of the model's files on this machine, or of an adapter's base; None if there is none."""
    merged_adapter: bool = False
    """Whether an adapter was merged; a new adapter would then not fit the base that ``name`` refers to."""
    adopted: bool = False
    """Whether the caller has loaded it; see :func:`adopt`."""
    engine: EngineSettings | None = None
    """The engine that samples from the model; None: PyTorch. See :func:`selfdistill.model.engine.use_engine`."""
    rollout_count: RolloutCount = field(default_factory=RolloutCount)
    """Tokens sampled from it so far, by PyTorch or the engine, and the time."""
    continues_cache: bool | None = None
    """Result of :func:`selfdistill.model.prefix_cache.can_continue_cache`; None before its first call."""
    captures: bool | None = None
    """Whether decoding captured as a CUDA graph agreed with the model; None until it was tried."""
    pictures: PictureInputs | None = None
    """How an image-text model reads pictures; None for a model that reads none."""
    separate_head: bool | None = None
    """Result of :func:`selfdistill.model.head.head_agrees`; None before its first call."""

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def dtype(self) -> str:
        """Data type of the weights, such as ``bfloat16``."""
        return str(self.model.dtype).removeprefix("torch.")

    def chat(self, kwargs: Mapping[str, Any] | None = None, date: str | None = None) -> ChatFormat:
        """How the model's tokenizer encodes messages; see :class:`ChatFormat`."""
        return ChatFormat(self.tokenizer, self.end_token_ids, kwargs or {}, date, self.pictures)

    def chat_for(self, config: ModelSettings) -> ChatFormat:
        """The same, with the template's arguments and the date of the settings."""
        return self.chat(config.chat_template_kwargs, config.template_date)


def load_model(
    name: str,
    *,
    dtype: str = "float32",
    merge_adapter: bool = False,
    adapter_base: str | None = None,
    load_in_4bit: bool = False,
) -> LoadedModel:
    """Load a model and its tokenizer from a starter name, a folder, a run folder or a hub id.

    A run folder stands for its ``final`` folder. An adapter is loaded together with its base, and with the base's
    tokenizer if it has none of its own. Only safetensors are read, and no code from the model's folder is run.

    Args:
        name: the value of ``--model``.
        dtype: ``float32``, ``bfloat16`` or ``auto`` (as saved).
        merge_adapter: for training: merge an adapter into its base, so that a new one can be trained.
        adapter_base: the base of an adapter, if it is not where ``adapter_config.json`` says.
        load_in_4bit: quantise linear layers on the best device, see :mod:`selfdistill.model.four_bits`.

    Raises:
        UserError: the model does not exist, is not a causal LM, has no end token, or its files do not hold exactly the
            weights that it computes with; an adapter does not fit its base.
    """
    path = resolve(name)
    say(f"loading {name}")
    _keep_freed_memory()
    adapter = (Path(path) / "adapter_config.json").is_file()
    if adapter and load_in_4bit:
        raise UserError(
            f"model {name!r}: an adapter, which cannot be merged into 4-bit weights; merge it first with "
            "selfdistill export --merge true, and give the result"
        )
    torch_dtype = "auto" if dtype == "auto" else getattr(torch, dtype)
    base_path = path
    with library_warnings() as heard:
        try:
            if adapter:
                config = read_config(Path(path), name)
                base_path, base, notes = _load_base(config, name, torch_dtype, adapter_base, merge_adapter)
                model = attach(base, config, Path(path), name)
                if merge_adapter:
                    model = merged(model, name)
            else:
                model, notes = load_causal(path, name, torch_dtype, training=merge_adapter, load_in_4bit=load_in_4bit)
        except UserError:
            raise
        except (OSError, ValueError, ImportError, KeyError, RuntimeError, SafetensorError) as error:
            raise UserError(f"model {name!r}: cannot be loaded: {first_line(error)}") from None
        tokenizer = load_tokenizer(path, base_path, name, model.config.model_type)
        pictures = pictures_for(model, base_path, tokenizer, name)
    notes = [*notes, *check_vocabulary(model, tokenizer, name), *heard]
    model.eval()
    disable_dropout(model)
    loaded = with_special_tokens(model, tokenizer, name, pictures)
    loaded.files = local_folder(base_path)
    loaded.notes += notes
    if adapter and merge_adapter:
        loaded.merged_adapter = True
        loaded.notes.append(f"the adapter {name} is merged into its base, so training saves a full model")
    if adapter_base and not adapter:
        loaded.notes.append(f"adapter_base is not used: {name} is not an adapter")
    return loaded


def _load_base(
    config: Any, name: str, dtype: torch.dtype | str, adapter_base: str | None, training: bool
) -> tuple[str, Any, list[str]]:
    """The folder or hub id of an adapter's base, the base, and notes.

    Raises:
        UserError: the base is not named, or cannot be loaded.
    """
    named = adapter_base or config.base_model_name_or_path
    if not named:
        raise UserError(f"model {name!r}: adapter_config.json names no base model; give it as adapter_base")
    try:
        path = resolve(named)
        return path, *load_causal(path, named, dtype, training=training)
    except UserError as error:
        another = "" if adapter_base else "; if it was moved, give its new location as adapter_base"
        raise UserError(f"model {name!r}: an adapter whose base cannot be loaded: {error}{another}") from None


def load_tokenizer(path: str, base_path: str, name: str, model_type: str) -> Any:
    """The tokenizer of a model; for an adapter, its own tokenizer and chat template if it has them, else its base's.

    Args:
        path: folder or hub id of the model or adapter.
        base_path: folder or hub id of the adapter's base; the same as ``path`` for a model.
        name: the name given by the user, for messages.
        model_type: of ``config.json``.

    Raises:
        UserError: there is no usable tokenizer.
    """
    own = path == base_path or has_tokenizer(Path(path))
    place = path if own else base_path
    try:
        tokenizer: Any = _read_tokenizer(place, tokenizer_options(place, model_type))
    except Exception as error:  # the tokenizers library raises bare Exception
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise UserError(
            f"model {name!r}: no usable tokenizer in tokenizer.json and tokenizer_config.json ({reason})"
        ) from None
    template = Path(path) / "chat_template.jinja"
    if not own and template.is_file():
        tokenizer.chat_template = template.read_text(encoding="utf-8")
    return tokenizer


def _read_tokenizer(place: str, options: dict[str, Any]) -> Any:
    try:
        return AutoTokenizer.from_pretrained(place, trust_remote_code=False, **options)
    except TypeError:  # early releases of transformers 5 pass fix_mistral_regex on twice
        if not options:
            raise
        return AutoTokenizer.from_pretrained(place, trust_remote_code=False)


def adopt(model: Any, tokenizer: Any, name: str | None = None, *, trained: bool = True) -> LoadedModel:
    """Use a model that the caller has loaded, with its tokenizer.

    Dropout is disabled in it, and training changes its weights.

    Args:
        model: a causal language model or an image-text model; if it is not trained, also a ``PeftModel`` of one.
        tokenizer: its tokenizer, or an image-text model's processor, without which it reads no pictures.
        name: for messages and saved settings; default: where transformers loaded it from.
        trained: whether it may be trained; then all weights frozen and an adapter are refused.

    Raises:
        UserError: not a transformers model, no tokenizer, quantised weights, no end token, or what ``trained`` says.
    """
    if not isinstance(without_adapter(model, trained=trained), PreTrainedModel):
        found = type(model).__name__
        raise UserError(f"model: found {found}, expected a folder, a name or a transformers PreTrainedModel")
    tokenizer, processor = divided(tokenizer)
    if not hasattr(tokenizer, "apply_chat_template"):
        found = "none" if tokenizer is None else type(tokenizer).__name__
        raise UserError(f"tokenizer: found {found}; a loaded model needs its tokenizer: give tokenizer=...")
    if getattr(model, "is_quantized", False):
        raise UserError("model: its weights are quantised, and quantised weights are not supported; load the original")
    if trained and not any(parameter.requires_grad for parameter in model.parameters()):
        raise UserError("model: all its weights are frozen (requires_grad=False); unfreeze those to be trained")
    model.eval()
    disable_dropout(model)
    name = name or model.name_or_path or "loaded-model"
    notes = check_vocabulary(model, tokenizer, name)
    loaded = with_special_tokens(
        model, tokenizer, name, None if processor is None else PictureInputs(processor, model, name)
    )
    loaded.files, loaded.adopted = local_folder(model.name_or_path) if model.name_or_path else None, True
    loaded.notes += notes
    return loaded


def _keep_freed_memory() -> None:
    """On the CPU, let glibc keep the memory of freed tensors for the next ones.

    By default it returns large blocks to the system, and every page of the next tensor is mapped and cleared again: up
    to half a million page faults per optimizer step, a third of its time. The setting is process-wide, and resident
    memory then stays at its peak.
    """
    if sys.platform != "linux" or has_gpu():
        return
    trim_threshold, mmap_threshold = -1, -3  # the parameters' numbers in malloc.h
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    # Before glibc 2.35 the mmap threshold is at most 32 MiB. If it is refused, set nothing: setting either parameter
    # stops glibc from raising the threshold by itself.
    if mallopt is not None and (mallopt(mmap_threshold, 2**31 - 1) or mallopt(mmap_threshold, 2**25)):
        mallopt(trim_threshold, -1)  # never


def with_special_tokens(model: Any, tokenizer: Any, name: str, pictures: PictureInputs | None) -> LoadedModel:
    """The model with its end and pad tokens, its window, and notes on what was decided.

    The tokenizer and the generation config, which saved models have, get the tokens that they lack.

    Raises:
        UserError: no end token, or a tokenizer that does not tell its control tokens.
    """
    if not isinstance(tokenizer.added_tokens_decoder, Mapping):
        raise UserError(
            f"model {name!r}: {type(tokenizer).__name__} does not list its control tokens; load the tokenizer with "
            "AutoTokenizer.from_pretrained(..., fix_mistral_regex=True), which reads tokenizer.json"
        )
    notes: list[str] = []
    ends, new_end = _end_tokens(model, tokenizer, name, pictures, notes)
    pad = _pad_token(model, tokenizer, ends[0], notes)
    if not tokenizer.chat_template:
        notes.append(
            "the tokenizer has no chat template; using a plain-text layout (User:, Assistant:), where a reply ends at "
            "the next turn"
        )
    window = context_window(model.config, notes)
    # The model remembers the positions of its last prompt with pictures; continuing another pass would use them.
    never = False if pictures is not None and has_own_positions(model) else None
    return LoadedModel(
        model,
        tokenizer,
        name,
        tuple(ends),
        pad,
        window,
        notes,
        new_end=new_end,
        pictures=pictures,
        continues_cache=never,
    )


def _end_tokens(
    model: Any, tokenizer: Any, name: str, pictures: PictureInputs | None, notes: list[str]
) -> tuple[list[int], str | None]:
    """Ids of the tokens that end a reply, and ``new_end``; tells the generation config of those that it lacks."""
    named: Any = model.generation_config.eos_token_id if model.generation_config is not None else None
    saved = list(named) if isinstance(named, list | tuple) else [named]
    saved = [token for token in saved if token is not None]
    ends = list(saved)
    if tokenizer.eos_token_id is not None and tokenizer.eos_token_id not in ends:
        ends.append(tokenizer.eos_token_id)
    written, token = ChatFormat(tokenizer, (), {}, pictures=pictures).turn_end_id, None
    if tokenizer.chat_template and written is None and ends:
        names = " or ".join(map(repr, tokenizer.convert_ids_to_tokens(ends)))
        notes.append(f"the chat template writes no control token after a reply; replies end with {names}")
    elif written is not None and written not in saved:
        token = tokenizer.convert_ids_to_tokens(written)
        notes.append(f"the chat template ends replies with {token!r}, so it is an end token, here and in saved models")
        if written not in ends:
            ends.append(written)
    if model.generation_config is not None and ends != saved:
        model.generation_config.eos_token_id = list(ends)
    if not ends:
        raise UserError(
            f"model {name!r}: neither the tokenizer nor generation_config.json names an end token, so replies would "
            "never stop; set eos_token in tokenizer_config.json"
        )
    return ends, token


def _pad_token(model: Any, tokenizer: Any, end: int, notes: list[str]) -> int:
    """Id of the pad token; the tokenizer gets ``end`` as its own if it has none that the model knows."""
    pad: int | None = tokenizer.pad_token_id
    if pad is not None and pad < embedding_rows(model):
        return pad
    lacks = "no pad token" if pad is None else f"a pad token without a row in the embedding, {tokenizer.pad_token!r}"
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(end)
    notes.append(f"the tokenizer has {lacks}; using its end token {tokenizer.pad_token!r}")
    return end


def context_window(config: Any, notes: list[str]) -> int | None:
    """Maximum number of tokens of prompt plus completion; adds a note where it is shorter than ``config.json`` says.

    LongRoPE has one set of frequencies up to a length and another beyond. transformers chooses by the longest row of a
    batch, and cached keys keep the frequencies of their pass. So a row's results would depend on its batch, and samples
    would differ from their scores. Within the first set everything is exact.
    """
    text = config.get_text_config()
    window: int | None = getattr(text, "max_position_embeddings", None)
    rope = getattr(text, "rope_parameters", None) or {}
    for part in (rope, *rope.values()):  # some models have one per kind of layer
        if isinstance(part, dict) and part.get("rope_type") == "longrope":
            first = part.get("original_max_position_embeddings")
            if first is not None and window is not None and first < window:
                notes.append(
                    f"prompt plus completion may have {first} of the model's {window} tokens: with more, LongRoPE "
                    "changes the frequencies of all positions in a batch"
                )
                window = first
    return window


def to_best_device(loaded: LoadedModel) -> LoadedModel:
    """Move the model to the device that accelerate chooses: a GPU if there is one."""
    loaded.model.to(best_device())
    return loaded


def load_for_training(
    name: str, *, dtype: str = "float32", adapter_base: str | None = None, load_in_4bit: bool = False
) -> LoadedModel:
    """Load a model to train, with any adapter merged, on the best device; see :func:`load_model`."""
    return to_best_device(
        load_model(name, dtype=dtype, merge_adapter=True, adapter_base=adapter_base, load_in_4bit=load_in_4bit)
    )
