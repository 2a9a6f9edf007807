import subprocess
import sys

import pytest

import forge

PUBLIC = {
    "BayesianLoRATuner",
    "BertScore",
    "BertScores",
    "CacheSize",
    "Comparison",
    "ConflictError",
    "DataReport",
    "EMA",
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
}


def test_the_public_names():
    assert set(forge.__all__) == PUBLIC == set(forge._WHERE)
    assert set(dir(forge)) >= PUBLIC
    for name in PUBLIC:
        assert getattr(forge, name).__doc__


def test_a_name_that_is_not_there():
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        forge.nothing  # noqa: B018
    with pytest.raises(ImportError):
        from forge import nothing  # noqa: F401


def test_import_is_light():
    """Neither torch nor transformers; the time itself is in benchmarks/test_import_time.py."""
    code = "import forge, sys; print(sorted({'torch', 'transformers', 'peft', 'trl', 'rich'} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_import_has_no_side_effects():
    code = (
        "import logging, os, sys, warnings; env, filters = dict(os.environ), list(warnings.filters);"
        "import forge; assert dict(os.environ) == env and warnings.filters == filters;"
        "assert not logging.getLogger('forge').handlers"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_errors_form_one_tree():
    for name in PUBLIC:
        if name.endswith("Error"):
            assert issubclass(getattr(forge, name), forge.ForgeError)
    assert issubclass(forge.ForgeError, ValueError)
    assert issubclass(forge.ForgeWarning, UserWarning)
