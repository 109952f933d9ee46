"""Settings that methods read, and the names of the methods."""

from __future__ import annotations

import difflib
import os
import re
from functools import partial
from typing import Annotated, Any, Literal, get_args

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    field_validator,
)

from selfdistill.config.base import EpisodeSettings
from selfdistill.data import PACKAGE, anchor_kinds, by_name, is_packaged, known_or_own

MethodName = Literal[
    "sdft",
    "sft",
    "dft",
    "cpt",
    "sft_reinvoke",
    "sft_from_teacher",
    "offline_distillation",
    "grpo",
    "sdpo",
    "pope",
    "sort",
    "trapo",
    "actguide",
    "npo",
    "opsd",
    "vopd",
    "isdft",
    "veto",
    "atesd",
    "eaft",
    "msd",
    "t3s",
    "ssd",
]
"""The package's methods."""


def _known_method(name: str) -> str:
    """The name of a method of the package, or of the user's function.

    Raises:
        ValueError: it is neither.
    """
    if name.lower() == "past":
        raise ValueError("a method that trains; PaST adds weights of trained models: use the command merge")
    return known_or_own(name, get_args(MethodName))


OwnOrMethodName = Annotated[str, BeforeValidator(partial(by_name, use="method")), AfterValidator(_known_method)]
"""One of them, or the user's function by its name."""

UNTEMPERED = "untempered samples of the student: use temperature 1, top_p 1 and top_k 0"
"""What a method needs whose loss counts samples as the student's own; the end of a message."""

SHORTEST = "shortest"
"""The value of ``hint`` for the shortest beginning of each demonstration with which the teacher is right."""


def anchor_sources(value: Any) -> Any:
    """The given ``anchors`` as a list: one source, several separated by commas, ``none`` or None.

    Raises:
        ValueError: a source is empty, named twice or misspelt, ``none`` is combined with others, or the package has no
            such kind.
    """
    if isinstance(value, str):
        value = [source.strip() for source in value.split(",") if source.strip()] or [""]
    if value is None or value in (["none"], ("none",)):
        return ()
    if not isinstance(value, list | tuple):
        return value  # pydantic reports the wrong type
    if "" in value:  # such as a shell variable that is not set
        raise ValueError(f"{PACKAGE}, a file or none")
    names = [source for source in value if isinstance(source, str)]
    if any(map(_is_sentence, names)):
        raise ValueError(f"{PACKAGE}, a file or none; write the prompts to a file, one per line")
    for name in names:
        if is_packaged(name):
            anchor_kinds(name)  # refuses unknown ones
        elif _is_misspelt(name):
            raise ValueError(f"{PACKAGE}, a file or none; did you mean {PACKAGE}?")
    if "none" in value:
        raise ValueError("none, or sources without it")
    sources = [os.fspath(source) if isinstance(source, os.PathLike) else source for source in value]
    places = [os.path.normpath(source) if isinstance(source, str) else source for source in sources]
    if twice := [source for number, source in enumerate(sources) if places[number] in places[:number]]:
        raise ValueError(f"each source once, and {twice[0]!r} is named twice")
    return sources


def _is_sentence(source: str) -> bool:
    """Whether a source is a prompt rather than a path: several words, of which the last is no file name."""
    return bool(re.search(r"\s", source)) and not re.search(r"\.\w+$|/", source) and not os.path.exists(source)


def _is_misspelt(source: str) -> bool:
    """Whether a source is nearly the package's: one word, perhaps with kinds, and no file."""
    is_word = re.fullmatch(r"\w+(:.*)?", source) and not os.path.exists(source)
    return bool(is_word and difflib.get_close_matches(source.partition(":")[0], [PACKAGE]))


class MethodSettings(EpisodeSettings):
    """Settings that methods read to fill their slots. A method uses only the settings that it reads."""

    context: str = "auto"
    """How the teacher sees the demonstration, e.g. ``turns:repeats=2``. ``auto``: measure several and use the best."""
    hint: str = "1"
    """How much of the demonstration the teacher sees, counted in words: a share such as ``0.5``; two, such as
    ``0.2:1``, for the first and the last step; or ``shortest``: for each row the shortest beginning, in tenths, with
    which the model's greedy reply is right."""
    temperature: float = Field(default=1.0, gt=0)
    """Sampling temperature of rollouts. The divergence always compares the untempered distributions."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Nucleus sampling: sample from the smallest set of tokens with at least this mass."""
    top_k: int = Field(default=0, ge=0)
    """Sample from the k most likely tokens; 0: from all."""
    num_generations: int | None = Field(default=None, ge=1)
    """Rollouts per prompt. Default 1 (the paper found no gain from more), or 8 for ``grpo``, its relatives and ``sdpo``
    (per group for ``pope``)."""
    cold_start_steps: int = Field(default=0, ge=0)
    """Initial steps of ``sdft`` in which demonstrations replace rollouts, all at first, then ever fewer. For a model
    whose own samples never come close to the demonstration."""
    teacher: Literal["ema", "frozen", "live", "snapshot"] = "ema"
    """The teacher's weights: a float32 moving average of the student, the initial weights, the student itself, or a
    copy every ``snapshot_steps`` steps."""
    ema_rate: float = Field(default=0.01, gt=0, le=1)
    """Share of the student in the average per step. Official code: 0.01; the paper tried 0.01, 0.02, 0.05."""
    snapshot_steps: int = Field(default=50, ge=1)
    """Steps between copies of the student into a ``snapshot`` teacher."""
    divergence: Literal["forward_kl", "reverse_kl", "jsd"] = "forward_kl"
    """forward_kl = KL(teacher||student), which the published results use."""
    jsd_weight: float = Field(default=0.5, gt=0, lt=1)
    """b in the mixture M = (1-b) student + b teacher; loss b KL(teacher||M) + (1-b) KL(student||M)."""
    support: Literal["full", "top_k", "sampled"] = "full"
    """Vocabulary entries over which the divergence is summed."""
    support_top_k: int = Field(default=100, ge=1)
    """Number of tokens in the ``top_k`` support."""
    support_tail: Literal["bucket", "renormalise"] = "bucket"
    """Beyond the top k: one bucket with the exact remaining mass, or both distributions renormalised."""
    entry_clip: float | None = Field(default=None, gt=0)
    """Each vocabulary entry adds at most this many nats to a token's divergence. Default: no limit, or 0.05 for
    ``opsd`` (arXiv 2601.18734). Not with the ``sampled`` support."""
    sampled_baseline: bool = True
    """Use the closed-form baseline of the ``sampled`` support (vOPD, arXiv 2605.07865)."""
    target_teacher: float = Field(default=1.0, ge=0)
    """a in the target softmax(a log teacher + b log student + d log base) that replaces the teacher."""
    target_student: float = Field(default=0.0, ge=0)
    """b: above 0, the target stays nearer to the student, with no gradient through it (Veto, arXiv 2601.07155)."""
    target_base: float = Field(default=0.0, ge=0)
    """d: above 0, the target stays nearer to the model before training, which sees only the prompt."""
    skip_first_tokens: int = Field(default=0, ge=0)
    """Leading completion tokens excluded from the loss; 3 in the official code. Refused if it would exclude most."""
    importance_cap: float | None = Field(default=None, gt=0)
    """Weight each rollout by its mean of min(p_now/p_sampled, cap), for rollouts that are not exactly on-policy.
    Default: none, or 2 with an engine."""
    success_reward: float = Field(default=1.0, gt=0, le=1)
    """Smallest reward of a sample that counts as right, for ``sdpo``, ``pope``, ``actguide``, ``sort``, ``npo`` and
    ``hint`` ``shortest``. Below 1 for scorers that give a part, such as the share of tests passed."""
    general_prompts: str | None = None
    """Prompts for the second stage of ``sft_reinvoke``, as in ``anchors``; default: those of the package."""
    anchors: tuple[str, ...] = ()
    """Prompts on which the model should answer as before the run: ``package`` (general prompts of many kinds),
    ``package:list+code`` (only these kinds), or a text file with one prompt per line, or rows with ``prompt`` or
    ``messages``, such as your own traffic. They need no answers. Several sources, separated by commas, get
    equal shares. ``none``: no anchors."""
    anchor_share: float = Field(default=0.25, ge=0, lt=1)
    """Share of every batch that is anchors, on average over the steps."""
    anchor_divergence: Literal["forward_kl", "reverse_kl", "jsd"] = "forward_kl"
    """On anchors, between the model before the run and the student; forward_kl = KL(before||student), and jsd has
    ``jsd_weight``."""
    method_settings: dict[str, Any] = Field(default_factory=dict)
    """Settings that only the chosen method knows, e.g. ``{"pull": 0.01}`` for ``isdft``."""

    @field_validator("hint", mode="before")
    @classmethod
    def _hint(cls, value: Any) -> Any:
        """Also accept a share as a number."""
        text = str(value) if isinstance(value, int | float) else value
        if not isinstance(text, str) or text == SHORTEST:
            return text
        shares = text.split(":")
        if len(shares) > 2 or not all(re.fullmatch(r"0?\.\d+|1\.0*|[01]|0\.0*", share) for share in shares):
            raise ValueError("a share from 0 to 1, two of them as in 0.2:1, or shortest")
        return ":".join(f"{float(share):g}" for share in shares)

    @field_validator("general_prompts")
    @classmethod
    def _general_prompts(cls, value: str | None) -> str | None:
        if value is not None and is_packaged(value):
            anchor_kinds(value)  # refuses unknown ones
        return value

    _sources = field_validator("anchors", mode="before")(anchor_sources)

    @property
    def is_untempered(self) -> bool:
        """Whether samples come from the student's own distribution."""
        return self.temperature == 1 and self.top_p == 1 and self.top_k == 0
