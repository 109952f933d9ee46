"""Load a model, sample from it, run it forward, shard it, and maintain its teacher."""

from selfdistill.model.adapters import merged
from selfdistill.model.compiled import CompiledLayers, layers_of
from selfdistill.model.device import any_length, deterministic, has_gpu, rollout_factor
from selfdistill.model.engine import (
    Engine,
    close_engine,
    engine_for,
    engine_runs,
    prompts_at_a_time,
    rest_engine,
    use_engine,
)
from selfdistill.model.episode_sampling import TurnSampler, keeps_episodes
from selfdistill.model.fake import (
    FilledCache,
    LiveTensors,
    alike_layers,
    check_matching,
    fake_model,
    tensor_bytes,
    window_of,
)
from selfdistill.model.files import LICENCES, files_that_go_along, resolve
from selfdistill.model.fingerprints import network_fingerprint, start_fingerprint
from selfdistill.model.forward import ForwardOutput, ForwardPass
from selfdistill.model.four_bits import (
    can_be_in_4bit,
    count_of,
    is_in_4bit,
    set_compute_dtype,
    weight_tensors,
)
from selfdistill.model.fsdp import (
    distribute_like,
    full_tensor,
    full_tensors,
    is_sharded,
    root_unsharded,
    shard,
    unsharded,
)
from selfdistill.model.head import body_and_head, unwrap
from selfdistill.model.loading import (
    LoadedModel,
    adopt,
    load_for_training,
    load_model,
    to_best_device,
)
from selfdistill.model.lora import add_lora, check_base, describe_lora, with_lora
from selfdistill.model.matching import load_matching, matched, refuse_unlike
from selfdistill.model.optimizer import Optim, make_optimizer, moment_bytes
from selfdistill.model.pictures import KEPT_BYTES, freeze_vision, is_image_text, vision_weights
from selfdistill.model.precision import (
    bfloat16_is_fast,
    cached_casts,
    refuse_autocast,
    refuse_float16,
    resolved_precision,
    training_precision,
    with_own_dtype,
)
from selfdistill.model.prefix_cache import PrefixCache, can_continue_cache, has_full_attention
from selfdistill.model.rollout_count import RolloutCount
from selfdistill.model.sampling import Rollout, Sampling, check_room, sample, sample_at_its_longest, sample_seed
from selfdistill.model.starter import STARTER_MODELS, cache_dir
from selfdistill.model.stored_weights import StoredWeights, overwrite_tensor, stored_bytes, stored_weights
from selfdistill.model.switches import can_checkpoint, checkpoint_activations, set_recomputing, switched_back
from selfdistill.model.teacher import Teacher, TeacherRule, staging_bytes

__all__ = [
    "KEPT_BYTES",
    "LICENCES",
    "STARTER_MODELS",
    "CompiledLayers",
    "Engine",
    "FilledCache",
    "ForwardOutput",
    "ForwardPass",
    "LiveTensors",
    "LoadedModel",
    "Optim",
    "PrefixCache",
    "Rollout",
    "RolloutCount",
    "Sampling",
    "StoredWeights",
    "Teacher",
    "TeacherRule",
    "TurnSampler",
    "add_lora",
    "adopt",
    "alike_layers",
    "any_length",
    "bfloat16_is_fast",
    "body_and_head",
    "cache_dir",
    "cached_casts",
    "can_be_in_4bit",
    "can_checkpoint",
    "can_continue_cache",
    "check_base",
    "check_matching",
    "check_room",
    "checkpoint_activations",
    "close_engine",
    "count_of",
    "describe_lora",
    "deterministic",
    "distribute_like",
    "engine_for",
    "engine_runs",
    "fake_model",
    "files_that_go_along",
    "freeze_vision",
    "full_tensor",
    "full_tensors",
    "has_full_attention",
    "has_gpu",
    "is_image_text",
    "is_in_4bit",
    "is_sharded",
    "keeps_episodes",
    "layers_of",
    "load_for_training",
    "load_matching",
    "load_model",
    "make_optimizer",
    "matched",
    "merged",
    "moment_bytes",
    "network_fingerprint",
    "overwrite_tensor",
    "prompts_at_a_time",
    "refuse_autocast",
    "refuse_float16",
    "refuse_unlike",
    "resolve",
    "resolved_precision",
    "rest_engine",
    "rollout_factor",
    "root_unsharded",
    "sample",
    "sample_at_its_longest",
    "sample_seed",
    "set_compute_dtype",
    "set_recomputing",
    "shard",
    "staging_bytes",
    "start_fingerprint",
    "stored_bytes",
    "stored_weights",
    "switched_back",
    "tensor_bytes",
    "to_best_device",
    "training_precision",
    "unsharded",
    "unwrap",
    "use_engine",
    "vision_weights",
    "weight_tensors",
    "window_of",
    "with_lora",
    "with_own_dtype",
]
