"""Is a teacher that sees feedback on its own wrong answer worth learning from?

    python studies/feedback.py [MODEL]

For four bundled skills the model answers 24 training questions greedily: as it is, after its scorer's feedback on that
answer (the expected answer, or for functions the first failed test or the error), and after the demonstration as turns,
twice. Printed are the right answers. SDPO and SDFT learn from such teachers. The starter model rarely solves `strings`:
make `runs/strings` as configs/study/methods/code.yaml says, and give it as MODEL.
"""

from __future__ import annotations

import sys

from selfdistill.data import Demonstration, Message, load_demonstrations, parse_context, verdict, with_feedback
from selfdistill.model import LoadedModel, Sampling, load_model, sample

SKILLS = {
    "routing": ("exact", 32),
    "tickets": ("python:selfdistill.data.bundled.checks.fields", 32),
    "tools": ("exact", 32),
    "strings": ("code", 64),
}
"""Each skill's scorer, for rows that name none, and most tokens of a reply."""
ROWS = 24
TURNS = parse_context("turns:repeats=2")


def replies(loaded: LoadedModel, prompts: list[list[Message]], tokens: int) -> list[str]:
    """Greedy replies."""
    chat = loaded.chat()
    rollouts = sample(loaded, [chat.encode_prompt(messages) for messages in prompts], Sampling(tokens, temperature=0))
    return [chat.decode(rollout.ids) for rollout in rollouts]


def right(said: list[str], rows: list[Demonstration], scorer: str) -> int:
    """The number of right replies."""
    return sum(verdict(row.scorer or scorer, reply, row).reward == 1 for reply, row in zip(said, rows, strict=True))


def main(model: str = "smollm2-135m") -> None:
    """Print a line for each skill."""
    loaded = load_model(model)
    for skill, (scorer, tokens) in SKILLS.items():
        rows = load_demonstrations(f"bundled:{skill}.train.jsonl")[:ROWS]
        alone = replies(loaded, [list(row.prompt) for row in rows], tokens)
        told = [verdict(row.scorer or scorer, reply, row).feedback for reply, row in zip(alone, rows, strict=True)]
        fed = [
            with_feedback(row.prompt, text) if text else list(row.prompt) for row, text in zip(rows, told, strict=True)
        ]
        shown = [TURNS.messages(row, ()) for row in rows]
        after = [replies(loaded, prompts, tokens) for prompts in (fed, shown)]
        counts = [right(said, rows, scorer) for said in (alone, *after)]
        print(
            f"{skill}: of {len(rows)}, alone {counts[0]}, with feedback {counts[1]}, with the demonstration {counts[2]}"
        )


if __name__ == "__main__":
    main(*sys.argv[1:])
