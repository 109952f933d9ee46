"""A model of fake tensors, which have shapes and data types but no data, and a count of live tensors.

A pass over such a model runs the same code and makes the same tensors as with the real one, in seconds and without its
memory. So a run's memory is known before any weights are read. Token ids, positions and masks are ordinary tensors,
because their values decide which code runs.

Source: PyTorch's ``torch._subclasses.fake_tensor.FakeTensorMode``.
"""

from __future__ import annotations

import copy
import weakref
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from selfdistill.errors import UserError
from selfdistill.model.adapters import read_config
from selfdistill.model.compiled import layers_of
from selfdistill.model.dropout import disable_dropout
from selfdistill.model.files import local_folder, resolve
from selfdistill.model.four_bits import add_scales, pack_weights, replace_layers, weight_tensors
from selfdistill.model.head import unwrap
from selfdistill.model.loading import LoadedModel, context_window, load_tokenizer, with_special_tokens
from selfdistill.model.lora import add_lora
from selfdistill.model.matching import refuse_unlike
from selfdistill.model.pictures import PictureInputs, pictures_for
from selfdistill.model.prefix_cache import in_attention_dtype
from selfdistill.model.quantisation import loading_options
from selfdistill.model.weights import auto_class, causal_config, first_line


def fake_model(
    name: str,
    *,
    dtype: str,
    adapter_base: str | None = None,
    lora_rank: int = 0,
    like: LoadedModel | None = None,
    layers: int | None = None,
    trained: bool = True,
    load_in_4bit: bool = False,
) -> LoadedModel:
    """A model as fake tensors on the CPU, with its real tokenizer; reads ``config.json`` and no weights.

    The start-up probes need data, so their usual results are assumed: the head is separate from the body, and a pass
    can continue from a cache unless the model has a recurrent state.

    Args:
        name: the value of ``--model``. An adapter counts as its base, into which training merges it.
        dtype: of the weights, or ``auto`` (as saved).
        adapter_base: the base of an adapter, if it is not where ``adapter_config.json`` says.
        lora_rank: rank of the adapter to train; 0: none.
        like: the model itself, or another fake of it; then no file is read.
        layers: how many of its first layers to use; None: all.
        trained: whether it will be trained; a teacher may have quantised weights, which cannot be trained.
        load_in_4bit: with 4-bit weights; needs ``lora_rank``.

    Raises:
        UserError: ``config.json`` or the tokenizer cannot be used, or the weights are quantised.
    """
    if like is not None:
        whole = unwrap(like.model)
        saved = whole.dtype if dtype == "auto" else getattr(torch, dtype)
        model = _without_data(name, type(whole)._from_config, _with_layers(whole.config, layers), saved)
        tokenizer, pictures = like.tokenizer, like.pictures
    else:
        model, tokenizer, pictures = _from_files(name, dtype, adapter_base, trained)
    with torch.device("meta"):
        disable_dropout(model.eval())
        if load_in_4bit:
            replace_layers(model)
        loaded = with_special_tokens(model, tokenizer, name, pictures and pictures.for_plan())
        loaded.separate_head = True
        layers_of_cache = DynamicCache(config=model.config.get_text_config()).layers
        kept = all(isinstance(layer, DynamicLayer) for layer in layers_of_cache)
        loaded.continues_cache = kept and loaded.continues_cache is not False
        if lora_rank:
            add_lora(loaded, lora_rank, None, 0)
        if load_in_4bit:
            pack_weights(loaded.model)
    with FakeTensorMode(allow_non_fake_inputs=True):
        loaded.model.to_empty(device="cpu")
        if load_in_4bit:
            add_scales(loaded.model, unwrap(loaded.model).dtype)
    unwrap(loaded.model).tie_weights()
    return loaded


def _without_data(name: str, made: Callable[..., Any], config: Any, dtype: torch.dtype) -> Any:
    """A model on the meta device: only its making is, as a starter model is converted when its files are found."""
    try:
        with torch.device("meta"):
            return made(config, dtype=dtype)
    except Exception as error:  # model code may raise anything on tensors without data
        raise UserError(f"model {name!r}: its memory cannot be planned: {first_line(error)}") from None


def _with_layers(config: Any, layers: int | None) -> Any:
    """A copy of a configuration with only the first ``layers`` layers; None: all."""
    config = copy.deepcopy(config)
    if layers is not None:
        text = config.get_text_config()
        count, text.num_hidden_layers = text.num_hidden_layers, layers
        for name, value in list(vars(text).items()):
            if isinstance(value, list) and len(value) == count:
                setattr(text, name, value[:layers])
    return config


def alike_layers(loaded: LoadedModel) -> list[nn.Module]:
    """A model's layers if all have the same shapes and kind; empty if not, or if unknown."""
    text = loaded.model.config.get_text_config()
    count = getattr(text, "num_hidden_layers", 0)
    listed = [value for value in vars(text).values() if isinstance(value, list) and len(value) == count]
    if any(value != value[:1] * count for value in listed):
        return []
    try:
        layers = layers_of(loaded, loaded.model, "")
    except UserError:
        return []
    shapes = {tuple((name, p.shape, p.dtype) for name, p in layer.named_parameters()) for layer in layers}
    return layers if len(layers) == count and len(shapes) == 1 else []


def _from_files(
    name: str, dtype: str, adapter_base: str | None, trained: bool
) -> tuple[Any, Any, PictureInputs | None]:
    path, base_path, config = _configured(name, adapter_base)
    loading_options(config, local_folder(base_path), name, training=trained)
    saved = config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32
    kind = auto_class(config, local_folder(base_path))
    model = _without_data(name, kind.from_config, config, saved if dtype == "auto" else getattr(torch, dtype))
    tokenizer = load_tokenizer(path, base_path, name, config.model_type)
    return model, tokenizer, pictures_for(model, base_path, tokenizer, name)


def _configured(name: str, adapter_base: str | None) -> tuple[str, str, Any]:
    """Folder or hub id of a model, and of an adapter's base, whose configuration it has."""
    path = base_path = resolve(name)
    if (Path(path) / "adapter_config.json").is_file():
        named = adapter_base or read_config(Path(path), name).base_model_name_or_path
        base_path = resolve(str(named))
    return path, base_path, causal_config(base_path, name)


def check_matching(name: str, other: LoadedModel) -> None:
    """Check, without reading weights, that there is a model that can read the chats of ``other``.

    Raises:
        UserError: ``config.json`` or the tokenizer cannot be used, or they do not fit; see :func:`refuse_unlike`.
    """
    path, base_path, config = _configured(name, None)
    refuse_unlike(name, config, load_tokenizer(path, base_path, name, config.model_type), other, reads_chats=True)


def window_of(name: str) -> int | None:
    """Maximum number of tokens of prompt plus completion of a model, from its ``config.json``; None if it has none.

    Raises:
        UserError: it cannot be used.
    """
    return context_window(_configured(name, None)[2], [])


def tensor_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the tensors, counting shared memory once, as for tied weights."""
    return sum({id(storage): storage.nbytes() for storage in (t.untyped_storage() for t in tensors)}.values())


class FilledCache:
    """Stands in for a :class:`selfdistill.model.prefix_cache.PrefixCache` that caches every requested context.

    Create it under autocast if the states should have autocast's data type.

    Args:
        loaded: the model, of fake tensors.
    """

    def __init__(self, loaded: LoadedModel) -> None:
        cache = DynamicCache(config=loaded.model.config.get_text_config())
        with torch.no_grad():
            loaded.model(input_ids=torch.zeros(1, 1, dtype=torch.long), past_key_values=cache, use_cache=True)
            layers: Any = cache.layers
            held = [layer for layer in layers if getattr(layer, "keys", None) is not None]  # others are recurrent
            self._token = [tuple(in_attention_dtype(t) for t in (layer.keys, layer.values)) for layer in held]
        self.token_bytes = tensor_bytes(t for pair in self._token for t in pair)
        """Bytes of one token's states in all layers."""

    def kept(self, body: Any, config: Any, contexts: Sequence[Sequence[int]]) -> list[int]:
        """Indices of all contexts."""
        return list(range(len(contexts)))

    def cache(self, body: Any, config: Any, contexts: Sequence[Sequence[int]]) -> tuple[DynamicCache, Tensor]:
        """As :meth:`selfdistill.model.prefix_cache.PrefixCache.cache`, with states of zeros."""
        filled = [len(context) - 1 for context in contexts]
        cache = DynamicCache(config=config)
        for number, pair in enumerate(self._token):
            keys, values = (t.new_zeros(len(filled), t.shape[1], max(filled), t.shape[3]) for t in pair)
            cache.update(keys, values, number)
        return cache, torch.tensor(filled)


def _is_fake_condition(value: Any) -> bool:
    return isinstance(value, FakeTensor) and value.dtype == torch.bool


def _working_memory(func: Any, args: Any) -> Tensor | None:
    """Hidden working memory of an operator: bitsandbytes' product holds its dequantised weights."""
    if func.name() != "bitsandbytes::gemm_4bit":
        return None
    x, _, shape = args[:3]
    weights: Tensor = x.new_empty(shape)
    return weights


@dataclass
class _Entry:
    """A tensor's memory."""

    component: str
    bytes: int


class LiveTensors(TorchDispatchMode):
    """Counts the bytes of all live tensors made while it is active, by component.

    A tensor belongs to the :attr:`component` at its creation, except casts of weights, and gradients of weights once
    they are complete.

    Args:
        models: their weights are not counted.
    """

    def __init__(self, *models: nn.Module) -> None:
        super().__init__()
        self.component = "activations"
        self.now: Counter[str] = Counter()
        """Bytes alive, by component."""
        self.peaks: dict[Any, Counter[str]] = {}
        """Bytes alive when their sum was largest, by segment and component."""
        self.begin("")
        self._entries: Any = WeakIdKeyDictionary()  # by storage
        self._hooks: list[Any] = []
        self._weights: Any = WeakIdKeyDictionary()
        for model in models:
            for weight in weight_tensors(model):
                self._weights[weight.untyped_storage()] = True
                if weight.requires_grad:
                    self._hooks.append(weight.register_post_accumulate_grad_hook(self._is_gradient))

    def begin(self, segment: Hashable) -> None:
        """Begin a new segment, with its own peak."""
        self._segment, self._most = segment, self.now.total()
        self.peaks[segment] = Counter(self.now)

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        for hook in self._hooks:
            hook.remove()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and _is_fake_condition(args[0]):
            return False  # such as whether a solver continues: another iteration needs no more memory
        inside = _working_memory(func, args)
        if inside is not None:
            self._add(inside, func, args)
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor):
                self._add(tensor, func, args)
        return made

    def _add(self, tensor: Tensor, func: Any, args: Any) -> None:
        storage = tensor.untyped_storage()
        if storage in self._entries or storage in self._weights:
            return
        is_cast = func is torch.ops.aten._to_copy.default and args[0].untyped_storage() in self._weights
        entry = _Entry("casts" if is_cast else self.component, storage.nbytes())
        self._entries[storage] = entry
        self.now[entry.component] += entry.bytes
        weakref.finalize(storage, self._freed, entry)
        if (total := self.now.total()) > self._most:
            self._most, self.peaks[self._segment] = total, Counter(self.now)

    def _freed(self, entry: _Entry) -> None:
        self.now[entry.component] -= entry.bytes

    def _is_gradient(self, weight: Tensor) -> None:
        """Move a complete gradient to the component ``gradients``."""
        assert weight.grad is not None
        entry = self._entries[weight.grad.untyped_storage()]
        self.now[entry.component] -= entry.bytes
        entry.component = "gradients"
        self.now["gradients"] += entry.bytes
