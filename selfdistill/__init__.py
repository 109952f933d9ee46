"""Teach a language model by self-distillation: the model that sees the demonstration teaches the one that does not."""

__all__ = ["__version__"]

__version__ = "0.1.0"
