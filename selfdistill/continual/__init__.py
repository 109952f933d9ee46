"""Continual learning: one model, skill after skill."""

from selfdistill.continual.learn import LearnResult, learn

__all__ = ["LearnResult", "learn"]
