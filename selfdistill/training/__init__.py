"""Train a model: settings in, ``final/`` out."""

from selfdistill.training.checkpoint import list_checkpoints
from selfdistill.training.export import export, take_whole, whole_folder
from selfdistill.training.train import check_output_dir, train

__all__ = ["check_output_dir", "export", "list_checkpoints", "take_whole", "train", "whole_folder"]
