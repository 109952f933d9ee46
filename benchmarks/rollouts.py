"""Rollouts against ``generate``: tokens per second at batch 16, greedy, on the demo's prompts; same tokens checked.

    python benchmarks/rollouts.py [--tokens 32] [--generations 1]

``generate`` gets the same left-padded prompts. With ``--generations n`` one long prompt is
sampled n times against once, every sample of exactly ``--tokens`` tokens: the ratio of times.
Exits with 1 if the tokens differ.
"""

from __future__ import annotations

import argparse
from dataclasses import replace

import torch
from measure import alternate

from selfdistill.data.chat_format import ChatFormat
from selfdistill.data.demonstrations import load_demonstrations
from selfdistill.data.sources import packaged
from selfdistill.model.loading import load_model
from selfdistill.model.sampling import Sampling, sample

NO_TOKEN = -1
"""An end token that is never sampled."""


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--generations", type=int, default=1)
    options = parser.parse_args()
    loaded = load_model("smollm2-135m")
    chat = ChatFormat(loaded.tokenizer, loaded.end_token_ids, {})
    rows = load_demonstrations(packaged("knowledge.train.jsonl"))[::11][:16]
    prompts = [chat.encode_prompt(row.prompt) for row in rows]
    if options.generations > 1:
        long = [prompt * 12 for prompt in prompts[:1]]  # about 500 tokens
        seeds = list(range(options.generations))
        endless = replace(loaded, end_token_ids=(NO_TOKEN,))
        seconds = alternate(
            {
                "many": lambda: sample(endless, long * len(seeds), Sampling(options.tokens), seeds),
                "one": lambda: sample(endless, long, Sampling(options.tokens), seeds[:1]),
            },
            5,
        )
        print(
            f"{options.generations} generations of a prompt of {len(long[0])} tokens, {options.tokens} new tokens "
            f"each: {seconds['many'] / seconds['one']:.2f} times one ({seconds['one']:.2f} s)"
        )
        return
    width = max(map(len, prompts))
    ids_BL = torch.tensor([[loaded.pad_token_id] * (width - len(p)) + p for p in prompts])
    mask_BL = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])

    def generate() -> torch.Tensor:
        with torch.no_grad():
            return loaded.model.generate(
                input_ids=ids_BL,
                attention_mask=mask_BL,
                do_sample=False,
                max_new_tokens=options.tokens,
                pad_token_id=loaded.pad_token_id,
                eos_token_id=list(loaded.end_token_ids),
            )[:, width:]

    rollouts = sample(loaded, prompts, Sampling(options.tokens, temperature=0))
    same = all(g.tolist()[: len(r.ids)] == r.ids for g, r in zip(generate(), rollouts, strict=True))
    seconds = alternate(
        {"generate": generate, "sample": lambda: sample(loaded, prompts, Sampling(options.tokens, temperature=0))}, 5
    )
    tokens = sum(len(r.ids) for r in rollouts)
    print(
        f"batch 16, {tokens} tokens: {seconds['generate'] / seconds['sample']:.2f} times the tokens/s of generate "
        f"({tokens / seconds['sample']:.0f} against {tokens / seconds['generate']:.0f}); same tokens: {same}"
    )
    if not same:
        raise SystemExit("error: the tokens are not those of generate")


if __name__ == "__main__":
    main()
