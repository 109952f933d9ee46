"""Models beside another one, such as a teacher or the base: whether a token id means the same to both."""

from __future__ import annotations

from typing import Any

from selfdistill.errors import UserError
from selfdistill.model.loading import LoadedModel, load_model
from selfdistill.runtime import say_note


def load_matching(name: str, other: LoadedModel, *, dtype: str, reads_chats: bool = False) -> LoadedModel:
    """Load a model to compare with ``other``, on the device of ``other``.

    Args:
        name: as in :func:`selfdistill.model.loading.load_model`.
        other: the model that is there.
        dtype: of the weights.
        reads_chats: whether it reads the prompts of ``other``, as a teacher does, and not its own.

    Raises:
        UserError: the model cannot be loaded, or does not fit; see :func:`refuse_unlike`.
    """
    loaded = matched(load_model(name, dtype=dtype), other, reads_chats=reads_chats)
    if reads_chats and loaded.chat().turn != other.chat().turn:
        say_note(
            f"model {name!r} reads chats in the format of model {other.name!r}, not in that of its own chat template; "
            "it may do worse than in its own"
        )
    return loaded


def matched(loaded: LoadedModel, other: LoadedModel, *, reads_chats: bool = False) -> LoadedModel:
    """Move a model to the device of ``other`` and sample from it in the same way, to compare the two.

    Raises:
        UserError: they do not fit; see :func:`refuse_unlike`.
    """
    refuse_unlike(loaded.name, loaded.model.config, loaded.tokenizer, other, reads_chats=reads_chats)
    loaded.model.to(other.device)
    loaded.engine = other.engine
    return loaded


def refuse_unlike(name: str, config: Any, tokenizer: Any, other: LoadedModel, *, reads_chats: bool) -> None:
    """Refuse a model if tokens differ from those of ``other``, or the width of the logits does.

    Compared are the tokens of ordinary texts whose ids both have: one tokenizer may have more, and fine-tuning may have
    renamed control tokens. With ``reads_chats`` those in chats of ``other`` are compared, too.

    Raises:
        UserError: names the first token or both widths.
    """
    own, others = ({number: token for token, number in one.get_vocab().items()} for one in (tokenizer, other.tokenizer))
    control = tokenizer.added_tokens_decoder.keys() | other.tokenizer.added_tokens_decoder.keys()
    if reads_chats:
        control -= _added_in_chats(other)
    unlike = [number for number in (own.keys() & others.keys()) - control if own[number] != others[number]]
    if unlike:
        first = min(unlike)
        raise UserError(
            f"model {name!r} has a different tokenizer from model {other.name!r}: token {first} is {own[first]!r}, not "
            f"{others[first]!r}; use models with the same tokenizer"
        )
    size, other_size = (one.get_text_config().vocab_size for one in (config, other.model.config))
    if size != other_size:
        raise UserError(
            f"model {name!r} has a vocabulary of {size} tokens, model {other.name!r} one of {other_size}, with the "
            "padding after the tokenizer's tokens; use models with the same vocab_size in config.json"
        )


def _added_in_chats(loaded: LoadedModel) -> set[int]:
    """Ids of the added tokens that a model's chats have: of texts, and those around a turn, but the first of a text.

    Models trained further from one base often share the first token, but not its name.
    """
    chat = loaded.chat()
    added = loaded.tokenizer.added_tokens_decoder.items()
    around = {number for number, token in added if not token.special or str(token) in chat.turn_names}
    return around if chat.turn_end_id is None else around | {chat.turn_end_id}
