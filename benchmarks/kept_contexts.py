"""A frozen teacher's time in the first epoch against the second, where contexts are ten times as long as completions.

    python benchmarks/kept_contexts.py [--mixed_precision no]

The starter model scores 32 completions of 24 tokens, 8 at a time, under contexts of 240 tokens that share no beginning;
first when nothing was read, then when what it read is kept.
"""

from __future__ import annotations

import argparse
import time
from statistics import median

import torch

from selfdistill.model.forward import ForwardPass
from selfdistill.model.loading import load_model
from selfdistill.model.precision import cached_casts, resolved_precision

ROWS, BATCH, COMPLETION = 32, 8, 24


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--mixed_precision", default="auto")
    options = parser.parse_args()
    loaded = load_model("smollm2-135m")
    generator = torch.Generator().manual_seed(0)
    vocabulary = loaded.model.config.vocab_size
    contexts = torch.randint(vocabulary, (ROWS, 10 * COMPLETION), generator=generator).tolist()
    completions = torch.randint(vocabulary, (ROWS, COMPLETION), generator=generator).tolist()
    scorer = ForwardPass(loaded)
    enabled = resolved_precision(options.mixed_precision) == "bf16"

    def epoch(kept: object) -> float:  # the sum, for one batch may read what others need
        seconds = []
        for start in range(0, ROWS, BATCH):
            rows = slice(start, start + BATCH)
            began = time.perf_counter()
            with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=enabled), cached_casts(loaded.model):
                scorer(loaded.model, contexts[rows], completions[rows], kept)
            seconds.append(time.perf_counter() - began)
        return sum(seconds)

    epoch(None)  # warm-up
    ratios, whole = [], []
    for _ in range(3):
        nothing = epoch(None)
        kept = scorer.keep(contexts, 2**31)
        first, second = epoch(kept), epoch(kept)
        ratios.append(second / first)
        whole.append(first / nothing)
    print(
        f"contexts of {10 * COMPLETION} tokens, completions of {COMPLETION}: second epoch {median(ratios):.2f} of the "
        f"first, which takes {median(whole):.2f} of the time without keeping (medians of 3, {BATCH} rows)"
    )


if __name__ == "__main__":
    main()
