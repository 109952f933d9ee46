"""Load a model, sample from it, run it forward, shard it, and keep its teacher."""

from selfdistill.model.compiled import CompiledLayers, layers_of
from selfdistill.model.forward import Scorer, Scores
from selfdistill.model.fsdp import collected, cut_like, is_sharded, joined, outside_layers_whole, own_part, shard, whole
from selfdistill.model.head import unwrap
from selfdistill.model.loading import (
    LoadedModel,
    add_lora,
    load_like,
    load_model,
    load_start,
    start_fingerprint,
    to_best_device,
    weights_fingerprint,
)
from selfdistill.model.precision import casts_kept, resolved_precision, training_arithmetic
from selfdistill.model.prefix_cache import KeptContexts
from selfdistill.model.sampling import Rollout, Sampling, sample, sample_seed
from selfdistill.model.starter import STARTER_MODELS, cache_dir
from selfdistill.model.teacher import Teacher, TeacherKind

__all__ = [
    "STARTER_MODELS",
    "CompiledLayers",
    "KeptContexts",
    "LoadedModel",
    "Rollout",
    "Sampling",
    "Scorer",
    "Scores",
    "Teacher",
    "TeacherKind",
    "add_lora",
    "cache_dir",
    "casts_kept",
    "collected",
    "cut_like",
    "is_sharded",
    "joined",
    "layers_of",
    "load_like",
    "load_model",
    "load_start",
    "outside_layers_whole",
    "own_part",
    "resolved_precision",
    "sample",
    "sample_seed",
    "shard",
    "start_fingerprint",
    "to_best_device",
    "training_arithmetic",
    "unwrap",
    "weights_fingerprint",
    "whole",
]
