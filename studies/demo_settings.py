"""Choose the demo's settings on the validation phrasings: train one method, measure it along the way.

    python studies/demo_settings.py runs/warm sdft '{"temperature": 0.3, "max_steps": 40}' 10 20 30 40
    python studies/demo_settings.py runs/sft sft '{"learning_rate": 5e-5}' 10 20 30

The settings are those of the demo (``selfdistill/demo.py``) with the given ones above them. Prints one line per
measurement: new facts (validation phrasings), prior (validation questions), KL from the base. Nothing is read
of the test part.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from selfdistill import demo
from selfdistill.data.bundled import packaged
from selfdistill.model.loading import load_model, to_best_device


def main(folder: str, method: str, overrides: str, evaluations: list[int]) -> None:
    settings = {**(demo.SDFT if method == "sdft" else demo.SFT), **json.loads(overrides)}
    settings["data"] = packaged("knowledge.train.jsonl")
    base = to_best_device(load_model(demo.SHARED["model"]))
    panel = demo.Panel(base, part="validation")
    panel.measure("base", base)
    if method == "sdft":
        print(f"teacher: new {panel.teacher(base, settings['context']):.3f}")
    del base
    for point in demo.learn(panel, settings, evaluations, Path(folder)):
        print(f"{method} step {point.step}: new {point.new:.3f}  prior {point.prior:.3f}  KL {point.kl:.3f}")


if __name__ == "__main__":
    main(*sys.argv[1:4], [int(step) for step in sys.argv[4:]])
