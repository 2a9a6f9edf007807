import json

import pytest
import yaml

from forge.errors import ConflictError, ForgeError
from forge.tuning.config import TuningConfig
from forge.tuning.config.config import FIELDS

FULL = {
    "model_name": "owner/model",
    "preset": "dpo",
    "num_train_epochs": 1.5,
    "effective_batch_size": 4,
    "learning_rate": 1e-5,
    "max_length": 128,
    "overrides": {
        "lora_r": 4,
        "target_modules": ["q_proj", "v_proj"],
        "run_name": "no",
        "eval_strategy": "no",
        "packing": True,
        "lr_scheduler_kwargs": {"a": [1, 2.5e-7, None, "1e-4", "~", "", "007", "1:30", "2024-01-01", "ÿ: #", " x "]},
    },
    "freeze_ratio": 0.25,
    "prefix_cache": True,
    "ema": True,
    "train_data": "données/train.jsonl",
    "validation_data": 0.1,
    "n_trials": 7,
    "judge": "local",
    "bert_score": False,
    "max_eval_samples": None,
    "judge_samples": 5,
    "max_new_tokens": 16,
    "eval_batch_size": 2,
    "gpu": "24",
    "seed": 7,
    "output_dir": "~/runs",
    "report_to": ("tensorboard", "wandb"),
    "mlflow_enabled": True,
    "mlflow_tracking_uri": "http://127.0.0.1:5000",
    "mlflow_experiment_name": "1e-4",
    "project_id": "007",
}


def written(tmp_path, text, name="run.yaml"):
    path = tmp_path / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def from_text(tmp_path, text, name="run.yaml", **arguments):
    return TuningConfig.from_file(written(tmp_path, text, name), **arguments)


@pytest.mark.parametrize("name", ["run.yaml", "run.yml", "run.json", "RUN.YAML", "sub/folder/run.json"])
@pytest.mark.parametrize("values", [FULL, {}, {"project_id": 123, "validation_data": 64, "judge": True}])
def test_from_config_to_file_and_back(tmp_path, name, values):
    config = TuningConfig(**values)
    path = config.to_file(tmp_path / name)
    assert path == tmp_path / name
    assert TuningConfig.from_file(path) == config
    assert TuningConfig.from_file(str(path)).to_dict() == config.to_dict()
    text = path.read_text(encoding="utf-8")
    # Another reader of either format finds the same.
    found = json.loads(text) if path.suffix.lower() == ".json" else yaml.safe_load(text)
    assert list(found) == list(FIELDS)
    assert found == config.to_dict()
    assert [file.name for file in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize("name", ["mlflow_experiment_name", "model_name", "output_dir", "project_id", "train_data"])
@pytest.mark.parametrize(
    "text", ["1e-4", "no", "on", "null", "~", "007", "0x1F", "0o7", "1_000", "1:30", "2024-01-01", ".inf", ".5", "=",
             "<<", "true", "- a", "a: b", "# x", "*a", "&a", "!a", "'", '"', "日本", "x" * 99, "a " * 90 + "b"],
)  # fmt: skip
def test_texts_that_look_like_something_else_come_back(tmp_path, name, text):
    config = TuningConfig(**{name: text})
    assert TuningConfig.from_file(config.to_file(tmp_path / "run.yaml")) == config


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("learning_rate: 1e-4", {"learning_rate": 1e-4}),
        ("learning_rate: 1E-4", {"learning_rate": 1e-4}),
        ("learning_rate: 2.0e-4", {"learning_rate": 2e-4}),
        ("learning_rate: .001", {"learning_rate": 1e-3}),
        ("num_train_epochs: 3", {"num_train_epochs": 3.0}),
        ("overrides: {weight_decay: 1e-2}", {"overrides": {"weight_decay": 0.01}}),
        ("ema: on", {"ema": True}),
        ("ema: Yes", {"ema": True}),
        ("mlflow_enabled: NO", {}),
        ("bert_score: off", {"bert_score": False}),
        ("judge: yes", {"judge": True}),
        ("mlflow_experiment_name: no", {"mlflow_experiment_name": "no"}),
        ("model_name: on", {"model_name": "on"}),
        ("overrides: {eval_strategy: no}", {"overrides": {"eval_strategy": "no"}}),
        ("overrides: {run_name: 'off'}", {"overrides": {"run_name": "off"}}),
        ("overrides: {packing: true}", {"overrides": {"packing": True}}),
        ("project_id: 007", {"project_id": "007"}),
        ("project_id: 2024-01-01", {"project_id": "2024-01-01"}),
        ("project_id: 1:30", {"project_id": "1:30"}),
        ("project_id: 7", {"project_id": 7}),
        ("train_data:\nvalidation_data: ~", {}),
        ("\ufeffseed: 3\r\nema: true\r\n", {"seed": 3, "ema": True}),
        ("{}", {}),
        ("mlflow_experiment_name: !word maybe", {"mlflow_experiment_name": "maybe"}),
    ],
)  # fmt: skip
def test_yaml_as_people_write_it(tmp_path, text, values):
    assert from_text(tmp_path, text) == TuningConfig(**values)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("learning_rate: '1e-4'", r"learning_rate='1e-4': it must be a number"),
        ("n_trials: 010", r"n_trials='010': it must be a whole number"),
        ("n_trials: 5.0", r"n_trials=5\.0: it must be a whole number"),
        ("learning_rate: .nan", r"learning_rate=nan: it must be a number"),
        ("learning_rate: 1e999", r"learning_rate=inf: it must be a number"),
        ("ema: 'on'", r"ema='on': it must be True or False"),
        ("ema: y", r"ema='y': it must be True or False"),
        ("ema: 1", r"ema=1: it must be True or False"),
        ("overrides: {packing: off}", r"overrides\['packing'\]=off: .*quote it"),
        ("overrides: {target_modules: [q_proj, no]}", r"overrides\['target_modules'\]\[1\]=no: .*quote it"),
        ("n_trails: 5", r"n_trails: Unknown field 'n_trails'\. Did you mean 'n_trials'"),
        ("report_to: no", r"report_to='no': Unknown tracker 'no'"),
        ("seed: 3\nema: true\nseed: 4", r"run\.yaml, line 3, column 1: the key 'seed' again"),
        ("overrides:\n  r: 3\n  r: 4", r"run\.yaml, line 3, column 3: the key 'r' again"),
        ("seed: 3\n ema: true", r"run\.yaml, line 2"),
        ("seed: [3", r"run\.yaml, line \d"),
        ("seed: 3\n---\nseed: 4", r"run\.yaml, line 2"),
        ("seed: !!python/object/apply:os.getcwd []", r"run\.yaml, line 1"),
        ("a: &a [1]\noverrides: {x: *a}", r"line 2, column 16: aliases \(\*name\) are not read"),
        ("overrides: &a {x: *a}", r"aliases"),
        ("3: 4", r"the key 3 is no text"),
        ("on: 4", r"on: Unknown field 'on'"),
        ("<<: {seed: 3}", r"<<: Unknown field"),
        ("seed: 3\nmodel_name: \x07", r"run\.yaml, line 2: a character that YAML does not allow"),
        ("", r"holds nothing, where a mapping of fields belongs"),
        ("- seed", r"holds a list"),
        ("seed", r"holds a str"),
        (b"seed: 3\ngpu: \xff", r"run\.yaml, line 2: byte 0xff is not UTF-8"),
        ("overrides: " + "[" * 5000, r"line 1|too deeply"),
    ],
)  # fmt: skip
def test_broken_yaml_says_where(tmp_path, text, said):
    with pytest.raises(ForgeError, match=said):
        from_text(tmp_path, text)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"seed": 3,\n "ema": tru}', r"run\.json, line 2, column 9: no JSON: Expecting value"),
        ('{"seed": 3, "seed": 4}', r"run\.json has the key 'seed' twice"),
        ('{"overrides": {"r": 3, "r": 3}}', r"has the key 'r' twice"),
        ('{"learning_rate": NaN}', r"learning_rate=nan"),
        ('{"learning_rate": "1e-4"}', r"learning_rate='1e-4': it must be a number"),
        ('{"ema": "on"}', r"ema='on'"),
        ('{"n_trails": 5}', r"Did you mean 'n_trials'"),
        ("[]", r"holds a list"),
        ("null", r"holds nothing"),
        ("", r"line 1, column 1: no JSON"),
        ('{"seed": ' + "9" * 5000 + "}", r"Write a shorter one"),
        ("[" * 100000, r"too deeply"),
    ],
)
def test_broken_json_says_where(tmp_path, text, said):
    with pytest.raises(ForgeError, match=said):
        from_text(tmp_path, text, "run.json")


@pytest.mark.parametrize("name", ["run.toml", "run", "run.yaml.bak"])
def test_other_suffixes_are_refused(tmp_path, name):
    with pytest.raises(ForgeError, match=r"a config is a \.yaml, \.yml, \.json file"):
        TuningConfig.from_file(written(tmp_path, "{}", name))
    with pytest.raises(ForgeError, match=r"a config is a \.yaml"):
        TuningConfig().to_file(tmp_path / name)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(ForgeError, match=r"There is no file .*looked for"):
        TuningConfig.from_file(tmp_path / "run.yaml")


def test_arguments_go_before_the_file(tmp_path):
    path = written(tmp_path, "n_trials: 5\nseed: 3\noverrides: {lora_r: 4}\n")
    config = TuningConfig.from_file(path, n_trials=6, overrides={"lora_alpha": 8})
    assert config == TuningConfig(n_trials=6, seed=3, overrides={"lora_alpha": 8})


def test_all_that_is_wrong_in_a_file_is_said_at_once(tmp_path):
    path = written(tmp_path, "n_trials: 0\nsede: 3\npreset: qlorra\noverrides: {lora_rr: 4, packing: on, seed: 1}\n")
    with pytest.raises(ConflictError) as raised:
        TuningConfig.from_file(path, gpus="24GB", eval_batch_size=0)
    head, *lines = str(raised.value).splitlines()
    assert head == f"TuningConfig from {path}: 8 values will not do."
    found = sorted(line.strip().replace(":", "=").split("=")[0] for line in lines)
    expected = ["eval_batch_size", "gpus", "n_trials", "overrides['lora_rr']", "overrides['packing']"]
    assert found == sorted([*expected, "overrides['seed']", "preset", "sede"])


def test_credentials_do_not_reach_the_file(tmp_path):
    config = TuningConfig(mlflow_tracking_uri="https://ada:sesame@host/x")
    for name in ("run.yaml", "run.json"):
        path = config.to_file(tmp_path / name)
        assert "sesame" not in path.read_text(encoding="utf-8")
        assert TuningConfig.from_file(path).mlflow_tracking_uri == "https://host/x"
