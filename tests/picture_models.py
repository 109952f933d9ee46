"""Tiny random image-text models of some families, with their real processors and templates by the families' rules."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from conftest import ENDS, VOCABULARY, byte_tokenizer
from transformers import (
    AutoProcessor,
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3ImageProcessorPil,
    Gemma3Processor,
    Gemma3TextConfig,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3ImageProcessorPil,
    Idefics3Processor,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    ProcessorMixin,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLImageProcessorPil,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    SiglipVisionConfig,
)
from transformers.models.qwen2_5_vl.processing_qwen2_5_vl import Qwen2_5_VLProcessor
from transformers.models.qwen3_vl.processing_qwen3_vl import Qwen3VLProcessor

TEXT: dict[str, Any] = {
    "vocab_size": VOCABULARY + 50,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "bos_token_id": None,
    "eos_token_id": list(ENDS),
}
VISION: dict[str, Any] = {
    "hidden_size": 24,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "patch_size": 8,
    "image_size": 32,
}


@dataclass(frozen=True)
class PictureFamily:
    """What a family's files say."""

    name: str
    special: tuple[str, ...]
    template: str
    processor: Callable[[Any, str], Any]
    """Of a tokenizer and a template."""
    model: Callable[[Any], Any]
    """Of a processor."""

    def write(self, folder: Path, seed: int = 0) -> None:
        """Write a tiny random model with its processor."""
        tokenizer = byte_tokenizer(template=None)
        tokenizer.add_special_tokens({"additional_special_tokens": list(self.special)})
        processor = self.processor(tokenizer, self.template)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = self.model(processor)
            for parameter in model.parameters():  # distributions far from uniform; Gemma's projection begins with 0
                if parameter.ndim == 2:
                    parameter.data.mul_(4.0) if parameter.any() else parameter.data.normal_(std=0.5)
        model.generation_config.eos_token_id = list(ENDS)
        model.save_pretrained(folder)
        processor.save_pretrained(folder)


def _llava(tokenizer: Any, template: str) -> Any:
    size = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    return LlavaProcessor(
        CLIPImageProcessorPil(**size),
        tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        chat_template=template,
        num_additional_image_tokens=1,
    )


def _llava_model(processor: Any) -> Any:
    return LlavaForConditionalGeneration(
        LlavaConfig(
            text_config=LlamaConfig(**TEXT),
            vision_config=CLIPVisionConfig(**VISION),
            image_token_id=processor.image_token_id,
            vision_feature_layer=-2,
        )
    )


def _idefics3(tokenizer: Any, template: str) -> Any:
    images = Idefics3ImageProcessorPil(size={"longest_edge": 64}, max_image_size={"longest_edge": 32})
    return Idefics3Processor(images, tokenizer, image_seq_len=4, chat_template=template)


def _idefics3_model(processor: Any) -> Any:
    return Idefics3ForConditionalGeneration(
        Idefics3Config(
            text_config=LlamaConfig(**TEXT, pad_token_id=258),
            vision_config=VISION,
            image_token_id=processor.image_token_id,
            scale_factor=2,
        )
    )


def _gemma3(tokenizer: Any, template: str) -> Any:
    tokens = {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|pad|>",
        extra_special_tokens=tokens,
    )
    images = Gemma3ImageProcessorPil(size={"height": 32, "width": 32})
    return Gemma3Processor(images, tokenizer, chat_template=template, image_seq_length=4)


def _gemma3_model(processor: Any) -> Any:
    text = Gemma3TextConfig(
        **TEXT, pad_token_id=258, sliding_window=16, layer_types=["sliding_attention", "full_attention"]
    )
    return Gemma3ForConditionalGeneration(
        Gemma3Config(
            text_config=text,
            vision_config=SiglipVisionConfig(**VISION),
            mm_tokens_per_image=4,
            image_token_index=processor.tokenizer.image_token_id,
            image_token_id=processor.tokenizer.image_token_id,
        )
    )


class _NoVideos:
    """A processor of Qwen's without the one for videos, which needs torchvision; pictures are processed the same."""

    def __init__(self, image_processor: Any = None, tokenizer: Any = None, chat_template: Any = None) -> None:
        assert isinstance(self, ProcessorMixin)
        self.image_token = "<|image_pad|>"
        self.image_token_id = tokenizer.convert_tokens_to_ids(self.image_token)
        ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)


class Qwen2_5(_NoVideos, Qwen2_5_VLProcessor): ...


class Qwen3(_NoVideos, Qwen3VLProcessor): ...


AutoProcessor.register(Qwen2_5_VLConfig, Qwen2_5, exist_ok=True)
AutoProcessor.register(Qwen3VLConfig, Qwen3, exist_ok=True)


def _qwen(kind: Any) -> Callable[[Any, str], Any]:
    def make(tokenizer: Any, template: str) -> Any:
        patches = {"patch_size": 8, "merge_size": 2, "temporal_patch_size": 2}
        images = Qwen2VLImageProcessorPil(size={"shortest_edge": 16 * 16, "longest_edge": 64 * 64}, **patches)
        return kind(images, tokenizer, chat_template=template)

    return make


def _qwen_model(kind: Any, config: Any, **vision: Any) -> Callable[[Any], Any]:
    def make(processor: Any) -> Any:
        names = {"image_token_id": "<|image_pad|>", "video_token_id": "<|video_pad|>"}
        names |= {f"vision_{side}_token_id": f"<|vision_{side}|>" for side in ("start", "end")}
        tokens = {name: processor.tokenizer.convert_tokens_to_ids(token) for name, token in names.items()}
        sections = {"rope_type": "default", "mrope_section": [1, 1, 2]}
        text = {**TEXT, "pad_token_id": 258, "rope_parameters": {**sections, "rope_theta": 10000.0}}
        shared = {"depth": 2, "num_heads": 2, "patch_size": 8, "spatial_merge_size": 2, "temporal_patch_size": 2}
        return kind(config(text_config=text, vision_config={**shared, **vision}, **tokens))

    return make


_TURN = "{% for part in m.content %}{% if part.type == 'image' %}IMAGE{% else %}{{ part.text }}{% endif %}{% endfor %}"
"""A message's parts, in the order in which they stand."""

FAMILIES = (
    PictureFamily(
        "llava",
        ("<image>",),
        # Its pictures come first, each on a line of its own.
        "{% for m in messages %}<|im_start|>{{ m.role }}\n"
        "{% for part in m.content if part.type == 'image' %}<image>\n{% endfor %}"
        "{% for part in m.content if part.type == 'text' %}{{ part.text }}{% endfor %}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
        _llava,
        _llava_model,
    ),
    PictureFamily(
        "idefics3",
        (
            *("<image>", "<fake_token_around_image>", "<end_of_utterance>", "<global-img>"),
            *(f"<row_{row}_col_{column}>" for row in (1, 2) for column in (1, 2)),
        ),
        "{% for m in messages %}<|im_start|>{{ m.role | capitalize }}"
        "{% if m.content[0].type == 'image' %}:{% else %}: {% endif %}"
        + _TURN.replace("IMAGE", "<image>")
        + "<end_of_utterance>\n{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}",
        _idefics3,
        _idefics3_model,
    ),
    PictureFamily(
        "gemma3",
        ("<start_of_turn>", "<end_of_turn>"),
        "{% for m in messages %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
        + _TURN.replace("IMAGE", "<start_of_image>").replace("part.text", "part.text | trim")
        + "<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}",
        _gemma3,
        _gemma3_model,
    ),
)

_QWEN = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    + _TURN.replace("IMAGE", "<|vision_start|><|image_pad|><|vision_end|>")
    + "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_QWEN_TOKENS = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
WITH_OWN_POSITIONS = (
    PictureFamily(
        "qwen2_5_vl",
        _QWEN_TOKENS,
        _QWEN,
        _qwen(Qwen2_5),
        _qwen_model(
            Qwen2_5_VLForConditionalGeneration,
            Qwen2_5_VLConfig,
            hidden_size=24,
            intermediate_size=32,
            out_hidden_size=32,
            window_size=32,
            fullatt_block_indexes=[1],
        ),
    ),
    PictureFamily(
        "qwen3_vl",
        _QWEN_TOKENS,
        _QWEN,
        _qwen(Qwen3),
        _qwen_model(
            Qwen3VLForConditionalGeneration,
            Qwen3VLConfig,
            hidden_size=24,
            intermediate_size=32,
            out_hidden_size=32,
            num_position_embeddings=16,
            deepstack_visual_indexes=[0],
        ),
    ),
)
"""Families that compute the positions of a prompt with pictures themselves."""

ALL = [*FAMILIES, *WITH_OWN_POSITIONS]
"""All families, for ``pytest.mark.parametrize``."""


def is_vision(name: str) -> bool:
    """Whether a weight belongs to what stands before the language model."""
    return any(part in name for part in ("vision", "visual", "projector", "connector"))
