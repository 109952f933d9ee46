"""All settings, with their defaults, units and sources."""

from selfdistill.config.base import EngineSettings, EpisodeSettings, ModelSettings, Settings, TaskSettings
from selfdistill.config.commands import (
    SHARED_WITH_CHECK,
    AskConfig,
    CheckConfig,
    CompareConfig,
    DemoConfig,
    EvalConfig,
    ExportConfig,
    LearnConfig,
    MergeConfig,
    QuestionsConfig,
    ReportConfig,
    run_settings,
)
from selfdistill.config.files import (
    MAY_CHANGE,
    changes,
    continued,
    dump_yaml,
    load_saved,
    load_yaml,
    refuse_changes,
    with_runs_of,
    without_defaults,
)
from selfdistill.config.method import SHORTEST, MethodName, MethodSettings
from selfdistill.config.train import LEARNING_RATE, LORA_LEARNING_RATE, OPEN, TrainConfig, TrainingSettings
from selfdistill.config.trl_names import trl_hint

__all__ = [
    "LEARNING_RATE",
    "LORA_LEARNING_RATE",
    "MAY_CHANGE",
    "OPEN",
    "SHARED_WITH_CHECK",
    "SHORTEST",
    "AskConfig",
    "CheckConfig",
    "CompareConfig",
    "DemoConfig",
    "EngineSettings",
    "EpisodeSettings",
    "EvalConfig",
    "ExportConfig",
    "LearnConfig",
    "MergeConfig",
    "MethodName",
    "MethodSettings",
    "ModelSettings",
    "QuestionsConfig",
    "ReportConfig",
    "Settings",
    "TaskSettings",
    "TrainConfig",
    "TrainingSettings",
    "changes",
    "continued",
    "dump_yaml",
    "load_saved",
    "load_yaml",
    "refuse_changes",
    "run_settings",
    "trl_hint",
    "with_runs_of",
    "without_defaults",
]
