"""Pictures for image-text models: the tokens that the processor writes in prompts, and what the model sees for them.

Legend: B sequences, L padded length, V vocabulary.
"""

from __future__ import annotations

import copy
import importlib.util
import inspect
import json
import re
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from torch import Tensor, nn
from transformers import AutoProcessor, PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from selfdistill.data import Picture, PictureRefusal, pictures_in
from selfdistill.errors import UserError, one_line
from selfdistill.model.files import local_folder
from selfdistill.model.head import unwrap
from selfdistill.model.picture_features import Features, Recent, joined, joined_features, takes_features

KEPT_BYTES = 2**28
"""Maximum bytes of cached processed pictures, and as many of cached features; others are made again."""
PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json")
"""One of them is with every model that reads pictures."""
_TYPES = ("token_type_ids", "mm_token_type_ids")
"""Argument names for the mask of picture tokens."""
_OF_TEXT = ("input_ids", "attention_mask", "text_replacement_offsets", *_TYPES)
"""A processor's outputs for the text; all others are for the pictures."""
_OFFSETS = "text_replacement_offsets"


def has_image_text_architecture(config: PretrainedConfig) -> bool:
    """Whether ``config.json`` names an image-text model, which reads pictures only with the files of its processor."""
    kind = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.get(config.model_type)
    return kind is not None and kind in (config.architectures or [])


def reads_pictures(config: PretrainedConfig, folder: Path | None) -> bool:
    """Whether a model is an image-text model with the files of its processor."""
    return has_image_text_architecture(config) and folder is not None and _has_processor(folder)


def _has_processor(folder: Path) -> bool:
    return any((folder / name).is_file() for name in PROCESSOR_FILES)


def fetch_processor_files(path: str) -> None:
    """Download the files by which :func:`reads_pictures` decides, unless they are here or the hub is not reached.

    Without them a model of the hub would be of another class on its first use than later.

    Args:
        path: folder or hub id of a model with an image-text architecture.
    """
    folder = local_folder(path)
    if Path(path).is_dir() or (folder is not None and _has_processor(folder)):
        return
    for name in PROCESSOR_FILES:
        with suppress(EntryNotFoundError):  # also raised if the hub is not reached
            hf_hub_download(path, name)


def is_image_text(folder: Path) -> bool:
    """Whether a folder holds an image-text model with the files of its processor."""
    values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    kind = {name: values[name] for name in ("model_type", "architectures") if name in values}
    return reads_pictures(PretrainedConfig(**kind), folder)


def load_processor(path: str, tokenizer: Any, name: str) -> Any:
    """The processor of an image-text model, with this tokenizer in it.

    If the processor has a chat template, the tokenizer gets it.

    Raises:
        UserError: the processor cannot be loaded, at least by this release of transformers.
    """
    try:
        processor: Any = AutoProcessor.from_pretrained(path, trust_remote_code=False)
    except Exception as error:  # a missing package, an unknown file format
        reason = one_line(error)
        advice = "" if importlib.util.find_spec("torchvision") else "; it may need torchvision, which is not installed"
        raise UserError(f"model {name!r}: its processor cannot be loaded ({reason[:200]}){advice}") from None
    if processor.chat_template:
        tokenizer.chat_template = processor.chat_template
    processor.tokenizer = tokenizer
    return processor


def pictures_for(model: Any, path: str, tokenizer: Any, name: str) -> PictureInputs | None:
    """A model's picture support, from its processor's files in a folder or hub id; None if it reads no pictures.

    Raises:
        UserError: its processor cannot be loaded or used.
    """
    model = unwrap(model)
    if not reads_pictures(model.config, local_folder(path)):
        return None
    return PictureInputs(load_processor(path, tokenizer, name), model, name)


def divided(tokenizer: Any) -> tuple[Any, Any]:
    """A processor's tokenizer and the processor itself; for a plain tokenizer, the processor is None."""
    if not hasattr(tokenizer, "image_processor"):
        return tokenizer, None
    own = tokenizer.tokenizer
    own.chat_template = tokenizer.chat_template or own.chat_template
    return own, tokenizer


class PictureInputs:
    """Pictures processed by a model's processor, one at a time, so that each is processed the same in every batch.

    Args:
        processor: the model's.
        model: the model, whose body takes the inputs.
        name: the name given by the user, for messages.

    Raises:
        UserError: the processor is of an unknown kind.
    """

    def __init__(self, processor: Any, model: Any, name: str) -> None:
        self.processor, self._name = processor, name
        token, ids = getattr(processor, "image_token", None), getattr(processor, "image_token_ids", [None])
        if not isinstance(token, str) or len(ids) != 1 or not isinstance(ids[0], int):
            raise UserError(
                f"model {name!r}: {type(processor).__name__} names no token for pictures; use another model"
            )
        self.token: str = token
        """What the chat template writes for a picture."""
        self.token_id: int = ids[0]
        """The token that the model replaces by picture features."""
        self._types = [x for x in _TYPES if x in inspect.signature(model.base_model.forward).parameters]
        self._takes_features, self._keeps_features = takes_features(model), False
        self._pixels: Recent[dict[str, Tensor]] = Recent(KEPT_BYTES)
        self._features: Recent[Features] = Recent(KEPT_BYTES)
        self._texts: dict[str, str] = {}

    def for_plan(self) -> PictureInputs:
        """The same for a model of fake tensors, whose features do not stay."""
        other = copy.copy(self)
        other._features = Recent(0)
        return other

    def keep_features(self, keep: bool) -> None:
        """From now on keep features of pictures for later passes, or do not; only while no vision tower is trained."""
        self._keeps_features = keep and self._takes_features
        self._features = self._features.emptied()

    def expanded(self, pictures: Sequence[Picture]) -> list[str]:
        """The text that replaces each picture's token in the prompt.

        Raises:
            PictureRefusal: the processor rejects a picture.
        """
        for number, picture in enumerate(pictures, 1):
            if picture.digest not in self._texts:
                self._pixels(picture.digest, partial(self._processed, picture, number))
        return [self._texts[picture.digest] for picture in pictures]

    def check(self, prompts: Sequence[Sequence[int]]) -> None:
        """Check that whole prompts with picture tokens have their pictures.

        Raises:
            UserError: the pictures of one were lost.
        """
        if any(self.token_id in prompt and not pictures_in(prompt) for prompt in prompts):
            raise UserError(f"model {self._name!r}: rows with pictures do not work with this method; use sft or sdft")

    def inputs(
        self, model: Any, prompts: Sequence[Sequence[int]], ids_BL: Tensor, starts: Sequence[int]
    ) -> dict[str, Any]:
        """The model's additional inputs for a batch of prompts; none if no prompt has pictures.

        These are the pixels, or the features if they are kept.

        Args:
            model: the model that will take them.
            prompts: the prompts; some may have pictures.
            ids_BL: token ids of the padded sequences.
            starts: where each prompt begins in its sequence.

        Raises:
            UserError: a prompt has picture tokens, but its pictures were lost.
        """
        self.check(prompts)
        pictures = [picture for prompt in prompts for picture in pictures_in(prompt)]
        if not pictures:
            return {}
        inputs: dict[str, Any]
        if self._keeps_features:
            inputs = joined_features([self.features(model, picture) for picture in pictures])
        else:
            inputs = joined([self._seen(picture, model) for picture in pictures])
        if self._types:
            in_prompt_BL = torch.zeros_like(ids_BL)
            for row, (start, prompt) in enumerate(zip(starts, prompts, strict=True)):
                in_prompt_BL[row, start : start + len(prompt)] = 1
            types_BL = in_prompt_BL * (ids_BL == self.token_id)
            inputs |= dict.fromkeys(self._types, types_BL)
        return inputs

    def features(self, model: Any, picture: Picture) -> Features:
        """What the vision tower and its connector make of a picture alone, in the arithmetic of this place.

        So they do not depend on the batch, nor on which features are kept.
        """
        causal = unwrap(model)
        tower = vision_weights(causal)[0]
        kind = tower.device.type
        arithmetic = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        key = (picture.digest, id(tower), arithmetic)
        return self._features(key, lambda: Features.of(causal.base_model, tower, self._seen(picture, model)))

    def feature_bytes(self, model: Any, picture: Picture) -> int:
        """Bytes of a picture's features that are kept."""
        return self.features(model, picture).nbytes if self._keeps_features else 0

    def allowed(self, logits_BV: Tensor) -> Tensor:
        """Logits without the picture token, which no reply may contain: the model would expect a picture."""
        logits_BV = logits_BV.clone()
        logits_BV[:, self.token_id] = -torch.inf  # unlike an index on the device, this copies nothing to it
        return logits_BV

    def _seen(self, picture: Picture, model: Any) -> dict[str, Tensor]:
        """A picture's pixels and what else its processor makes of it, on the model's device and in its data type."""
        made = self._pixels(picture.digest, partial(self._processed, picture, 1))
        device, dtype = next(model.parameters()).device, unwrap(model).dtype
        return {key: value.to(device, dtype if value.is_floating_point() else None) for key, value in made.items()}

    def _processed(self, picture: Picture, number: int) -> dict[str, Tensor]:
        """What the processor makes of a picture, the prompt's ``number``-th."""
        try:
            made = self.processor(
                text=[self.token], images=[picture.decoded()], return_tensors="pt", return_text_replacement_offsets=True
            )
            if _OFFSETS not in made:
                raise UserError(
                    f"model {self._name!r}: {type(self.processor).__name__} does not say what it writes for a picture; "
                    "use another model, or a newer transformers"
                )
            (text,) = [found["replacement"] for found in made[_OFFSETS][0]]
        except UserError:
            raise
        except Exception as error:  # processors are programs and may raise anything
            reason = one_line(error)
            name = f"picture {number}" + (f" ({picture.path})" if picture.path else "")
            raise PictureRefusal(f"model {self._name!r}: its processor rejects {name}: {reason}") from None
        self._texts[picture.digest] = text
        return {key: value for key, value in made.items() if key not in _OF_TEXT}


def language_part(model: Any) -> nn.Module:
    """The language model within an image-text model, without its head."""
    return model.get_decoder()


def vision_weights(model: Any) -> list[nn.Parameter]:
    """The weights before the language model: those of the vision tower and the connector."""
    inside = {id(p) for part in (language_part(model), model.get_output_embeddings()) for p in part.parameters()}
    return [parameter for parameter in model.parameters() if id(parameter) not in inside]


def freeze_vision(model: Any) -> None:
    """Freeze the :func:`vision_weights`."""
    for parameter in vision_weights(model):
        parameter.requires_grad_(False)


def beside_language(model: Any) -> str:
    """A regular expression for the names of all modules of an image-text model outside its language model."""
    language = next(name for name, module in model.named_modules() if module is language_part(model))
    around, _, own = language.rpartition(".")
    return rf"{re.escape(around)}\.(?!{re.escape(own)}\.).*"


def _body(model: Any) -> Any:
    """An image-text model without its head, also inside a ``PeftModel``."""
    return unwrap(model).base_model


def has_own_positions(model: Any) -> bool:
    """Whether a model computes the positions of a prompt with pictures itself, such as two-dimensional ones."""
    return hasattr(_body(model), "rope_deltas")


def position_shift(model: Any) -> Tensor:
    """Offset of the positions after each prompt of the last pass from its number of tokens: shape (B,).

    Pictures with two-dimensional positions take fewer positions than tokens.
    """
    shift_B: Tensor = _body(model).rope_deltas[:, 0]
    return shift_B
