"""Train a model: settings in, ``final/`` out."""

from selfdistill.training.checkpoint import list_checkpoints, remove_checkpoint
from selfdistill.training.disk import check_disk_for_merged
from selfdistill.training.export import export, take_whole, whole_folder
from selfdistill.training.fitting import Fit
from selfdistill.training.loop import OnStep
from selfdistill.training.memory_result import MemoryPlan, size_text
from selfdistill.training.merge import merge
from selfdistill.training.model_card import state_card
from selfdistill.training.plan import Plan, plan, plan_for
from selfdistill.training.run import Run
from selfdistill.training.schedule import steps_of
from selfdistill.training.setup import accelerator_state_kept, check_parts, chosen_rows, repeating
from selfdistill.training.train import check_output_dir, train

__all__ = [
    "Fit",
    "MemoryPlan",
    "OnStep",
    "Plan",
    "Run",
    "accelerator_state_kept",
    "check_disk_for_merged",
    "check_output_dir",
    "check_parts",
    "chosen_rows",
    "export",
    "list_checkpoints",
    "merge",
    "plan",
    "plan_for",
    "remove_checkpoint",
    "repeating",
    "size_text",
    "state_card",
    "steps_of",
    "take_whole",
    "train",
    "whole_folder",
]
