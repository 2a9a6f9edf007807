"""forge: presets, callbacks and estimates for people who fine-tune language models with transformers, PEFT and TRL.

Importing it is cheap: the names below are loaded when they are first used, and torch and transformers with them.
"""

from __future__ import annotations

# Type checkers go by the name; importing it from typing would be most of the time that this module takes.
TYPE_CHECKING = False
if TYPE_CHECKING:  # the twin of _WHERE below, for editors and type checkers
    from .adapters import attach_adapter, cleanup_peft_model, safe_unload_peft_adapters
    from .callbacks import EMA, EMACallback, MonitorCallback
    from .data import DataReport, PreparedData, Preview, prepare_dataset, preview, stop_token_ids
    from .errors import (
        ConflictError,
        ForgeError,
        ForgeWarning,
        MissingAssetError,
        NonFiniteError,
        UnknownNameError,
        UnsupportedError,
    )
    from .evaluation import (
        BertScore,
        BertScores,
        Comparison,
        EvaluationResult,
        Judge,
        Judgement,
        JudgeResult,
        Rubric,
        combined_score,
        compare_results,
        evaluate_model,
        get_judge,
        list_judges,
        register_judge,
        score_answers,
    )
    from .freezing import (
        CacheSize,
        FreezeReport,
        FreezeSuggestion,
        PrefixCache,
        setup_lp_lora_style,
        suggest_freeze_ratio,
        unfreeze,
    )
    from .hardware import Hardware
    from .memory import (
        Fit,
        MemoryEstimate,
        ModelInfo,
        TrainingPlan,
        estimate_model_memory,
        find_card,
        get_memory_savings_estimate,
        plan_training,
        print_model_info,
    )
    from .presets import Preset, get_preset, list_presets
    from .tuning import (
        BayesianLoRATuner,
        LoRATuner,
        SearchSpace,
        StudyResult,
        TuningConfig,
        TuningInterrupted,
        TuningResult,
    )

__version__ = "0.1.0"

_WHERE = {
    "BayesianLoRATuner": "tuning",
    "BertScore": "evaluation",
    "BertScores": "evaluation",
    "CacheSize": "freezing",
    "Comparison": "evaluation",
    "ConflictError": "errors",
    "DataReport": "data",
    "EMA": "callbacks",
    "EMACallback": "callbacks",
    "EvaluationResult": "evaluation",
    "Fit": "memory",
    "ForgeError": "errors",
    "ForgeWarning": "errors",
    "FreezeReport": "freezing",
    "FreezeSuggestion": "freezing",
    "Hardware": "hardware",
    "Judge": "evaluation",
    "JudgeResult": "evaluation",
    "Judgement": "evaluation",
    "LoRATuner": "tuning",
    "MemoryEstimate": "memory",
    "MissingAssetError": "errors",
    "ModelInfo": "memory",
    "MonitorCallback": "callbacks",
    "NonFiniteError": "errors",
    "PrefixCache": "freezing",
    "PreparedData": "data",
    "Preset": "presets",
    "Preview": "data",
    "Rubric": "evaluation",
    "SearchSpace": "tuning",
    "StudyResult": "tuning",
    "TrainingPlan": "memory",
    "TuningConfig": "tuning",
    "TuningInterrupted": "tuning",
    "TuningResult": "tuning",
    "UnknownNameError": "errors",
    "UnsupportedError": "errors",
    "attach_adapter": "adapters",
    "cleanup_peft_model": "adapters",
    "combined_score": "evaluation",
    "compare_results": "evaluation",
    "estimate_model_memory": "memory",
    "evaluate_model": "evaluation",
    "find_card": "memory",
    "get_judge": "evaluation",
    "get_memory_savings_estimate": "memory",
    "get_preset": "presets",
    "list_judges": "evaluation",
    "list_presets": "presets",
    "plan_training": "memory",
    "prepare_dataset": "data",
    "preview": "data",
    "print_model_info": "memory",
    "register_judge": "evaluation",
    "safe_unload_peft_adapters": "adapters",
    "score_answers": "evaluation",
    "setup_lp_lora_style": "freezing",
    "stop_token_ids": "data",
    "suggest_freeze_ratio": "freezing",
    "unfreeze": "freezing",
}

__all__ = [
    "EMA",
    "BayesianLoRATuner",
    "BertScore",
    "BertScores",
    "CacheSize",
    "Comparison",
    "ConflictError",
    "DataReport",
    "EMACallback",
    "EvaluationResult",
    "Fit",
    "ForgeError",
    "ForgeWarning",
    "FreezeReport",
    "FreezeSuggestion",
    "Hardware",
    "Judge",
    "JudgeResult",
    "Judgement",
    "LoRATuner",
    "MemoryEstimate",
    "MissingAssetError",
    "ModelInfo",
    "MonitorCallback",
    "NonFiniteError",
    "PrefixCache",
    "PreparedData",
    "Preset",
    "Preview",
    "Rubric",
    "SearchSpace",
    "StudyResult",
    "TrainingPlan",
    "TuningConfig",
    "TuningInterrupted",
    "TuningResult",
    "UnknownNameError",
    "UnsupportedError",
    "attach_adapter",
    "cleanup_peft_model",
    "combined_score",
    "compare_results",
    "estimate_model_memory",
    "evaluate_model",
    "find_card",
    "get_judge",
    "get_memory_savings_estimate",
    "get_preset",
    "list_judges",
    "list_presets",
    "plan_training",
    "prepare_dataset",
    "preview",
    "print_model_info",
    "register_judge",
    "safe_unload_peft_adapters",
    "score_answers",
    "setup_lp_lora_style",
    "stop_token_ids",
    "suggest_freeze_ratio",
    "unfreeze",
]


def __getattr__(name: str) -> object:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(f".{_WHERE[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
