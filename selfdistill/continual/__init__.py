"""Continual learning: one model, skill after skill."""

from selfdistill.continual.learn import learn

__all__ = ["learn"]
