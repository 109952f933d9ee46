"""Model families: their chat templates (``templates/``), special tokens and end tokens, each with a tiny random model.

The templates are written from each family's rules, in our own words; they are not the vendors' files. Names of tokens
are the families' own. ``python tests/families.py`` prints the table of ``docs/templates.md``.
"""

from __future__ import annotations

import html
import os
from dataclasses import dataclass, replace
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

from conftest import write_model
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

TEMPLATES = Path(__file__).parent / "templates"


@dataclass(frozen=True)
class Family:
    """What a family's files say, and what its template does."""

    name: str
    """Of the template's file."""
    title: str
    end: str
    """The token that the template writes after a reply."""
    special: tuple[str, ...]
    """Special tokens, without ``end``."""
    eos: str = ""
    """The tokenizer's ``eos_token``; default: ``end``."""
    ends: tuple[str, ...] = ()
    """End tokens of ``generation_config.json``; default: ``eos``."""
    bare: str = ""
    """The end token that a base model of the family names alone, though its template writes another."""
    bos: str | None = None
    adds_bos: bool = False
    """Whether the tokenizer puts ``bos`` in front of every text."""
    added: tuple[str, ...] = ()
    """Added tokens that are not special."""
    swallows: bool = False
    """Whether special tokens take the white space after them along (``rstrip``)."""
    plain_markers: bool = False
    """Whether the template's role markers are plain text."""
    system: str = "kept"
    """What becomes of a system turn: ``kept``, ``merged`` (into the first or last user turn) or ``left out``."""
    own_system: bool = False
    """Whether the template begins with a system turn of its own where there is none."""
    dated: bool = False
    """Whether the template reads the clock."""
    alternates: bool = False
    """Whether the template refuses turns that do not alternate."""
    changes: str = "nothing"
    """What the template does to earlier replies."""
    thinks: bool = False
    """Whether models of the family think, between ``<think>`` and ``</think>``."""
    opens: str = ""
    """With what the prompt begins the reply."""

    @property
    def template(self) -> str:
        return (TEMPLATES / f"{self.name}.jinja").read_text(encoding="utf-8")

    @property
    def end_tokens(self) -> tuple[str, ...]:
        return self.ends or (self.eos or self.end,)

    def tokenizer(self) -> PreTrainedTokenizerFast:
        """One token per byte, then the family's tokens."""
        special, names = [self.end, *self.special], sorted(pre_tokenizers.ByteLevel.alphabet())
        vocabulary = {name: i for i, name in enumerate([*names, *special, *self.added])}
        core = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
        core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        core.decoder = decoders.ByteLevel()
        core.add_special_tokens([AddedToken(name, rstrip=self.swallows, normalized=False) for name in special])
        core.add_tokens([AddedToken(name, normalized=False) for name in self.added])
        if self.adds_bos:
            assert self.bos is not None
            core.post_processor = processors.TemplateProcessing(
                single=f"{self.bos} $A", pair=f"{self.bos} $A $B", special_tokens=[(self.bos, vocabulary[self.bos])]
            )
        made = PreTrainedTokenizerFast(tokenizer_object=core, eos_token=self.eos or self.end, bos_token=self.bos)
        made.chat_template = self.template
        return made

    def write(self, folder: Path) -> None:
        """Write a tiny random model of the family."""
        tokenizer = self.tokenizer()
        write_model(folder, ends=tuple(tokenizer.convert_tokens_to_ids(list(self.end_tokens))), room=1024)
        tokenizer.save_pretrained(folder)

    @property
    def as_base(self) -> Family:
        """The family as its base models are published: with a template, but the end of a text as the only end token."""
        return replace(self, eos=self.bare, ends=(self.bare,))

    @property
    def with_special_tags(self) -> Family:
        """The family with thinking tags that are special tokens."""
        tags = ("<think>", "</think>")
        return replace(self, special=(*self.special, *tags), added=tuple(t for t in self.added if t not in tags))


CHATML = ("<|im_start|>", "<|endoftext|>")
LLAMA = ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>")
TAGS = ("<think>", "</think>")
TRIMS = "trims their white space"


def wide(name: str) -> str:
    """A token of DeepSeek's, between fullwidth bars."""
    return f"<\uff5c{name}\uff5c>"


FAMILIES = (
    Family(
        "llama3",
        "Llama 3",
        "<|eot_id|>",
        LLAMA,
        ends=("<|end_of_text|>", "<|eot_id|>"),
        bare="<|end_of_text|>",
        bos="<|begin_of_text|>",
        adds_bos=True,
        changes=TRIMS,
    ),
    Family(
        "llama3_2",
        "Llama 3.1, 3.2",
        "<|eot_id|>",
        LLAMA,
        ends=("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"),
        bare="<|end_of_text|>",
        bos="<|begin_of_text|>",
        adds_bos=True,
        own_system=True,
        dated=True,
        changes=TRIMS,
    ),
    Family(
        "qwen2_5",
        "Qwen 2.5",
        "<|im_end|>",
        CHATML,
        ends=("<|im_end|>", "<|endoftext|>"),
        bare="<|endoftext|>",
        own_system=True,
    ),
    Family(
        "qwen3",
        "Qwen 3",
        "<|im_end|>",
        CHATML,
        ends=("<|im_end|>", "<|endoftext|>"),
        bare="<|endoftext|>",
        added=TAGS,
        changes="drops their thoughts",
        thinks=True,
    ),
    Family(
        "gemma3",
        "Gemma 3",
        "<end_of_turn>",
        ("<pad>", "<eos>", "<bos>", "<start_of_turn>"),
        eos="<eos>",
        ends=("<eos>", "<end_of_turn>"),
        bare="<eos>",
        bos="<bos>",
        adds_bos=True,
        system="merged into the first user turn",
        alternates=True,
        changes=TRIMS,
    ),
    Family(
        "mistral",
        "Mistral 7B v0.3",
        "</s>",
        ("<s>", "<unk>", "[INST]", "[/INST]"),
        bos="<s>",
        adds_bos=True,
        system="merged into the last user turn",
        alternates=True,
        changes=TRIMS,
    ),
    Family(
        "phi3",
        "Phi-3 mini",
        "<|end|>",
        ("<s>", "<|endoftext|>", "<|user|>", "<|assistant|>", "<|system|>"),
        eos="<|endoftext|>",
        ends=("<|endoftext|>", "<|end|>"),
        bare="<|endoftext|>",
        bos="<s>",
        swallows=True,
        system="left out",
    ),
    Family("phi4", "Phi-4", "<|im_end|>", (*CHATML, "<|im_sep|>"), bare="<|endoftext|>"),
    Family(
        "deepseek_r1",
        "DeepSeek-R1",
        wide("end▁of▁sentence"),
        (wide("begin▁of▁sentence"),),
        bos=wide("begin▁of▁sentence"),
        adds_bos=True,
        added=(wide("User"), wide("Assistant"), *TAGS),
        changes="drops their thoughts",
        thinks=True,
        opens="<think>\n",
    ),
    Family(
        "granite",
        "Granite 3.1",
        "<|end_of_text|>",
        ("<|start_of_role|>", "<|end_of_role|>", "<|tool_call|>"),
        bos="<|end_of_text|>",
        own_system=True,
        dated=True,
    ),
    Family("olmo2", "OLMo 2", "<|endoftext|>", ("<|pad|>",), bos="<|endoftext|>", plain_markers=True),
    Family("smollm2", "SmolLM 2", "<|im_end|>", CHATML, bare="<|endoftext|>", bos="<|im_start|>", own_system=True),
)


def table() -> str:
    """The table of ``docs/templates.md``."""

    def code(token: str) -> str:
        return f"<code>{html.escape(token).replace('|', '&#124;')}</code>"  # a bar would end the cell

    head = ("family", "end token", "some files name only", "a system turn", "earlier replies: the template", "thoughts")
    head = (*head, "a run that resumes on another day")
    lines = [head, ("---",) * len(head)]
    for family in FAMILIES:
        system = "left out, so the row is refused" if family.system == "left out" else family.system
        if family.own_system:
            system += "; the template has one of its own"
        thoughts = "yes" if family.thinks else "no"
        if family.opens:
            thoughts += f"; the prompt ends with {code(family.opens.strip())}"
        day = "its prompts keep the day on which it began" if family.dated else "the template has no date"
        named = code(family.bare) if family.bare else ""
        lines.append((family.title, code(family.end), named, system, family.changes, thoughts, day))
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


if __name__ == "__main__":
    print(table())
