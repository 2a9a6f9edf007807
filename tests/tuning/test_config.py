import copy
import dataclasses
import json
import pickle
import subprocess
import sys

import pytest

from forge import BertScore, get_preset
from forge.errors import ConflictError, ForgeError
from forge.evaluation import get_judge, register_judge
from forge.evaluation.judges import Judge, registry
from forge.tuning.config import TuningConfig
from forge.tuning.config.config import FIELDS
from forge.tuning.config.rules import RULES
from forge.tuning.search.space import SearchSpace

NAN, INF = float("nan"), float("inf")
TEXTS = ("", "  ", 3, True, ["x"], b"x", "two\nlines", "\0", "half \ud83d")
COUNTS = (0, -1, 1.0, NAN, True, "2", [], 10**400 * -1)
FLAGS = (0, 1, "true", None, "")

WRONG = {
    "model_name": TEXTS,
    "preset": ("", "qlorra", "sft", None, 1, True, ["qlora"], "QLORA"),
    "num_train_epochs": (0, -1, NAN, INF, True, "3", [], 10**400),
    "effective_batch_size": COUNTS,
    "learning_rate": (0, -1e-4, NAN, INF, True, "2e-4", []),
    "max_length": (*COUNTS, 1),
    "overrides": (None, [], "lora_r=3", 3, True, [("lora_r", 3)]),
    "freeze_ratio": (1, 1.0, -0.1, NAN, INF, True, None, "0.5"),
    "prefix_cache": (*FLAGS, True),
    "ema": FLAGS,
    "train_data": TEXTS,
    "validation_data": (0, -1, 0.0, 1.0, 1.5, NAN, True, False, "", []),
    "n_trials": (*COUNTS, None),
    "space": ("auto", 3, True, [], {"lora_r": [0]}, {"lr": [1e-4]}, {"learning_rate": {"low": 1}}),
    "sampler": ("", "TPE", None, 1, ["tpe"]),
    "objective": ("", "accuracy", 1, True),
    "score_every_trial": FLAGS,
    "finalists": (*COUNTS, None),
    "pack": (*COUNTS, None, "8", "most"),
    "engine": ("", "pack", None, 1),
    "workers": (*COUNTS, None),
    "launcher": ("", "slurm", None, 1),
    "study_name": TEXTS,
    "storage": (*TEXTS, "study.db"),
    "judge": ("", "gpt", 0, 1, 1.0, [], object(), Judge),
    "bert_score": ("", 0, 1, None, [], object()),
    "max_eval_samples": COUNTS,
    "judge_samples": COUNTS,
    "max_new_tokens": (*COUNTS, None),
    "eval_batch_size": (*COUNTS, None),
    "gpu": ("", "RTX 9999", 24, True, [], "0GB"),
    "seed": (-1, 2**32, 1.0, NAN, True, None, "42"),
    "output_dir": (*TEXTS, None),
    "report_to": ("mlflow", ("wandb", "mlflow"), "wandbb", "", None, 3, True, [1], {"wandb": 1}),
    "mlflow_enabled": FLAGS,
    "mlflow_tracking_uri": TEXTS,
    "mlflow_experiment_name": (*TEXTS, None),
    "project_id": (1.0, True, "", " ", [], NAN),
}
RIGHT = {
    "model_name": "owner/model",
    "preset": "dpo",
    "num_train_epochs": 1.5,
    "effective_batch_size": 4,
    "learning_rate": 1e-5,
    "max_length": 128,
    "overrides": {"lora_r": 4, "target_modules": ["q_proj", "v_proj"], "run_name": "no"},
    "freeze_ratio": 0.25,
    "prefix_cache": True,
    "ema": True,
    "train_data": "train.jsonl",
    "validation_data": 0.1,
    "n_trials": 7,
    "space": SearchSpace(lora_r=[8, 16], learning_rate={"low": 1e-4, "high": 1e-3, "log": True}),
    "sampler": "gp",
    "objective": "loss",
    "score_every_trial": True,
    "finalists": 5,
    "pack": 8,
    "engine": "shared",
    "workers": 2,
    "launcher": "ray",
    "study_name": "chats",
    "storage": "sqlite:///study.db",
    "judge": "local",
    "bert_score": "owner/encoder",
    "max_eval_samples": None,
    "judge_samples": 5,
    "max_new_tokens": 16,
    "eval_batch_size": 2,
    "gpu": "24GB",
    "seed": 7,
    "output_dir": "elsewhere",
    "report_to": ("tensorboard", "wandb"),
    "mlflow_enabled": True,
    "mlflow_tracking_uri": "http://127.0.0.1:5000",
    "mlflow_experiment_name": "1e-4",
    "project_id": "007",
}


def test_the_tables_are_complete():
    assert set(FIELDS) == set(WRONG) == set(RIGHT) == set(RULES)


@pytest.mark.parametrize(
    ("name", "value"), [pytest.param(n, v, id=f"{n}-{i}") for n, vs in WRONG.items() for i, v in enumerate(vs)]
)
def test_every_wrong_value_is_named_with_rule_and_remedy(name, value):
    with pytest.raises(ConflictError) as raised:
        TuningConfig(**{name: value})
    head, line = str(raised.value).split("\n")
    assert head == "TuningConfig: 1 value will not do."
    assert line.startswith(f"  {name}=")
    assert line.endswith((".", "?", "2**30."))
    assert ": " in line


def test_the_right_values_are_taken_as_they_are():
    config = TuningConfig(**RIGHT)
    for name, value in RIGHT.items():
        if name != "overrides":
            assert getattr(config, name) == value
            assert type(getattr(config, name)) is type(value)


def test_all_that_is_wrong_is_said_at_once():
    with pytest.raises(ConflictError) as raised:
        TuningConfig(**{name: values[0] for name, values in WRONG.items()})
    text = str(raised.value)
    assert text.startswith(f"TuningConfig: {len(FIELDS)} values will not do.\n")
    assert [line.split("=")[0].strip() for line in text.splitlines()[1:]] == list(FIELDS)


def test_errors_name_what_is_near_and_what_helps():
    with pytest.raises(ConflictError, match="Did you mean 'qlora' or 'lora'"):
        TuningConfig(preset="qlorra")
    with pytest.raises(ConflictError, match=r"trains all weights.*Take preset='lora'"):
        TuningConfig(preset="sft")
    with pytest.raises(ConflictError, match="mlflow_enabled=True"):
        TuningConfig(report_to="mlflow")
    with pytest.raises(ConflictError, match=r"registered are gemini, gigachat, local, openai.*register"):
        TuningConfig(judge="gemini-2.5-flash")
    with pytest.raises(ConflictError, match=r"Set freeze_ratio=0.5"):
        TuningConfig(prefix_cache=True)
    TuningConfig(prefix_cache=True, freeze_ratio=0.5)
    TuningConfig(prefix_cache=True, overrides={"layers_to_transform": [3]})


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ({"lora_rr": 4}, r"overrides\['lora_rr'\]=4: .*Did you mean 'lora_r'"),
        ({"lr": 1}, "Use learning_rate"),
        ({"seed": 3}, "Set seed beside overrides"),
        ({"report_to": "wandb"}, "Set report_to beside overrides"),
        ({"model": "x"}, "Set model_name"),
        ({"hardware": "cpu"}, "Unknown setting 'hardware'"),
        ({"use_peft": False}, "a tuner makes adapters"),
        ({"r": 4, "lora_r": 8}, "given twice, as 4 and 8"),
        ({"lora_dropout": 2}, r"a share in \[0, 1\)"),
        ({"learning_rate": "1e-4"}, "a number"),
        ({"max_length": 1}, "at least 2 tokens"),
        ({"weight_decay": NAN}, "not finite|at least 0"),
        ({"adam_beta1": INF}, "not finite"),
        ({"optim_args": object()}, "a object cannot be written"),
        ({"lr_scheduler_kwargs": {1: 2}}, "the name 1 is no text"),
        ({3: 4}, "as text"),
    ],
)
def test_overrides_are_checked_as_get_preset_does(overrides, said):
    with pytest.raises(ConflictError, match=said) as raised:
        TuningConfig(overrides=overrides)
    assert len(str(raised.value).splitlines()) == 2


def test_a_token_among_the_overrides_is_refused_and_not_repeated():
    with pytest.raises(ConflictError, match="HF_TOKEN") as raised:
        TuningConfig(overrides={"hub_token": "hf_sesame", "lora_r": 0})
    assert "sesame" not in str(raised.value)
    assert "overrides['lora_r']=0" in str(raised.value)


def test_a_name_given_twice_must_agree_with_itself():
    for name in ("learning_rate", "num_train_epochs", "effective_batch_size", "max_length"):
        with pytest.raises(ConflictError, match=rf"overrides\['{name}'\]=8: {name}=4(\.0)? is given too"):
            TuningConfig(**{name: 4}, overrides={name: 8})
        assert TuningConfig(**{name: 4}, overrides={name: 4}).preset_overrides() == {name: 4}
    assert TuningConfig(overrides={"max_length": None}).preset_overrides() == {"max_length": None}
    with pytest.raises(ConflictError, match="max_length=4 is given too"):
        TuningConfig(max_length=4, overrides={"max_length": None})


def test_get_preset_takes_the_overrides():
    config = TuningConfig(learning_rate=1e-5, max_length=64, overrides={"r": 4, "target_modules": ("q_proj",)})
    found = config.preset_overrides()
    assert found == {"learning_rate": 1e-5, "max_length": 64, "lora_r": 4, "target_modules": ["q_proj"]}
    preset = get_preset(config.preset, hardware="cpu", **found)
    assert preset.get_lora_config().r == 4
    assert preset.get_sft_config().learning_rate == 1e-5
    found["target_modules"].append("v_proj")
    assert config.preset_overrides()["target_modules"] == ["q_proj"]


def test_every_name_of_every_recipe_is_known():
    for name in ("qlora", "lora", "dpo"):
        preset = get_preset(name, hardware="cpu")
        for setting, choice in preset.choices.items():
            if setting not in (*RULES, "use_peft"):
                TuningConfig(preset=name, overrides={setting: choice.value})


def test_dtypes_are_kept_by_name():
    import torch

    assert TuningConfig(overrides={"dtype": torch.float16}).preset_overrides() == {"dtype": "float16"}


def test_nothing_can_be_changed_from_outside():
    given = {"target_modules": ["q_proj"], "lr_scheduler_kwargs": {"power": 2}}
    config = TuningConfig(overrides=given)
    given["target_modules"].append("v_proj")
    given["lora_r"] = 4
    assert config.preset_overrides() == {"target_modules": ["q_proj"], "lr_scheduler_kwargs": {"power": 2}}
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.seed = 3
    with pytest.raises(TypeError):
        config.overrides["lora_r"] = 4
    with pytest.raises(TypeError):
        config.overrides["lr_scheduler_kwargs"]["power"] = 4
    with pytest.raises(AttributeError, match="cannot be changed"):
        config.overrides._held = {}
    trackers = ["wandb"]
    config = TuningConfig(report_to=trackers)
    trackers.append("trackio")
    assert config.report_to == ("wandb",)


def test_equal_configs_are_one_key_and_survive_copies():
    first, second = TuningConfig(**RIGHT), TuningConfig(**RIGHT)
    assert first == second
    assert len({first, second, TuningConfig()}) == 2
    for other in (copy.copy(first), copy.deepcopy(first), pickle.loads(pickle.dumps(first)), first.replace()):
        assert other == first
        assert hash(other) == hash(first)
        assert other.to_dict() == first.to_dict()
    assert TuningConfig(num_train_epochs=1).to_dict() == TuningConfig(num_train_epochs=1.0).to_dict()
    for name, value in RIGHT.items():
        other = first.replace(
            **{name: getattr(TuningConfig(), name), **({"prefix_cache": False} if value == 0.25 else {})}
        )
        assert other != first


def test_a_judge_without_a_hash_is_no_obstacle():
    class Own(Judge):
        name = "own"
        __hash__ = None

        def __eq__(self, other):
            return isinstance(other, Own)

        def reply(self, question):
            return '{"score": 1}'

    config = TuningConfig(judge=Own(cache=False))
    assert config == TuningConfig(judge=Own(cache=False))
    assert hash(config) == hash(TuningConfig(judge=Own(cache=False)))
    assert config.to_dict()["judge"] == "own"
    assert repr(config) == "TuningConfig(judge='own')"


def test_judges_and_encoders():
    assert TuningConfig(judge=False).judge is None
    assert TuningConfig(judge=True).judge is True
    before = dict(registry._registered)
    try:
        register_judge("length")(lambda prompt, answer: 1.0)
        assert TuningConfig(judge="length").judge == "length"
        assert TuningConfig(judge=get_judge("length")).to_dict()["judge"] == "length"
    finally:
        registry._registered.clear()
        registry._registered.update(before)

    class Encoder(BertScore):
        def __init__(self):
            self._encoder = type("E", (), {"name": "owner/encoder", "model_type": "owner/encoder"})

        model_type = "owner/encoder"

    encoder = Encoder()
    config = TuningConfig(bert_score=encoder)
    assert config.bert_score is encoder
    assert config.to_dict()["bert_score"] == "owner/encoder"


def test_replace_checks_anew():
    config = TuningConfig(n_trials=5, mlflow_tracking_uri="http://ada:sesame@host:1")
    assert config.replace(seed=1).mlflow_tracking_uri == config.mlflow_tracking_uri
    assert config.replace(seed=1).n_trials == 5
    with pytest.raises(ConflictError, match=r"(?s)2 values.*n_trails: .*Did you mean 'n_trials'.*seed=-1"):
        config.replace(n_trails=3, seed=-1)


def test_paths_are_kept_as_text(tmp_path):
    config = TuningConfig(
        model_name=tmp_path, train_data=tmp_path / "t.jsonl", output_dir=tmp_path, bert_score=tmp_path
    )
    assert config.train_data == str(tmp_path / "t.jsonl")
    assert json.loads(json.dumps(config.to_dict()))["output_dir"] == str(tmp_path)


def test_numbers_of_numpy_become_those_of_python():
    import numpy as np

    config = TuningConfig(n_trials=np.int64(5), learning_rate=np.float32(0.5), validation_data=np.float64(0.5))
    assert (type(config.n_trials), type(config.learning_rate), type(config.validation_data)) == (int, float, float)
    with pytest.raises(ConflictError):
        TuningConfig(ema=np.bool_(True))


SECRETS = (
    "http://ada:sesame@host:5000/x",
    "https://ada:ses@me-sesame@host/x",
    "https://sesame@host",
    "http://ada:pa/sesame@host:5000",
    "https://host/x?token=sesame",
    "https://host/x?a=1&api_key=sesame&b=2",
    "postgresql+psycopg2://ada:sesame@host/db",
    "mysql://ada:sesame@host/db?ssl=1",
)


@pytest.mark.parametrize("uri", SECRETS)
def test_credentials_are_used_and_never_shown(uri, tmp_path):
    config = TuningConfig(mlflow_tracking_uri=uri)
    assert config.mlflow_tracking_uri == uri
    assert "host" in repr(config)
    config.to_file(tmp_path / "c.yaml")
    for text in (repr(config), str(config), json.dumps(config.to_dict()), (tmp_path / "c.yaml").read_text()):
        assert "sesame" not in text
        assert "ada" not in text
    with pytest.raises(ConflictError) as raised:
        TuningConfig(mlflow_tracking_uri=uri + "\n", train_data=[uri])
    assert "sesame" not in str(raised.value)
    with pytest.raises(ConflictError) as raised:
        TuningConfig.from_env({"MLFLOW_TRACKING_URI": uri + "\0"})
    assert "sesame" not in str(raised.value)


@pytest.mark.parametrize(
    "uri", ["http://127.0.0.1:5000", "sqlite:///a@b.db", "/home/x@y/runs", "databricks", "https://h/x@y?a=b@c"]
)
def test_addresses_without_credentials_stay_as_they_are(uri):
    assert TuningConfig(mlflow_tracking_uri=uri).to_dict()["mlflow_tracking_uri"] == uri


def test_the_repr_shows_what_differs():
    assert repr(TuningConfig()) == "TuningConfig()"
    assert repr(TuningConfig(seed=1, judge=False)) == "TuningConfig(seed=1)"
    names = [part.split("=")[0] for part in repr(TuningConfig(**RIGHT))[13:-1].split(", ") if "=" in part]
    assert names == list(FIELDS)


def test_errors_are_of_forge():
    with pytest.raises(ForgeError):
        TuningConfig(n_trials=0)
    with pytest.raises(TypeError):
        TuningConfig(n_trails=3)
    with pytest.raises(TypeError):
        TuningConfig("owner/model")


def test_nothing_heavy_is_imported_for_a_config_without_overrides():
    code = """if True:
        import sys
        from forge import TuningConfig
        TuningConfig.from_env({}, judge="local", gpu="24")
        print([name for name in ("torch", "transformers", "peft", "trl", "mlflow", "yaml") if name in sys.modules])
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
