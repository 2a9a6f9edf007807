import json
from collections import defaultdict

import datasets
import pytest

from forge.data.source import load
from forge.errors import ConflictError, ForgeError
from forge.tuning.config import TuningConfig
from forge.tuning.config.settings import VARIABLES

REQUEST = {
    "project_id": 123,
    "fine_tuning_params": {
        "use_llm_judge": True,
        "judge_model_id": "gemini",
        "base_model_name": "Qwen/Qwen3-0.6B",
        "n_trials": 20,
    },
}
ENVIRON = {
    "LORA_MODEL_NAME": "env/model",
    "LORA_N_TRIALS": "3",
    "LORA_NUM_EPOCHS": "1.5",
    "LORA_BATCH_SIZE": "4",
    "LORA_LEARNING_RATE": "1e-4",
    "MLFLOW_ENABLED": "true",
    "MLFLOW_TRACKING_URI": "http://env:5000",
    "MLFLOW_EXPERIMENT_NAME": "env",
}
# field: (default, environment, request, argument), None where a source has no say
SOURCES = {
    "model_name": (None, "env/model", "request/model", "argument/model"),
    "n_trials": (20, 3, 30, 4),
    "num_train_epochs": (None, 1.5, None, 2.5),
    "effective_batch_size": (None, 4, None, 8),
    "learning_rate": (None, 1e-4, None, 1e-5),
    "mlflow_enabled": (False, True, None, False),
    "mlflow_tracking_uri": (None, "http://env:5000", None, "http://argument"),
    "mlflow_experiment_name": ("forge", "env", None, "argument"),
    "judge": (None, None, "gemini", "local"),
    "project_id": (None, None, 123, "label"),
    "train_data": (None, None, "project", "argument.jsonl"),
    "validation_data": (None, None, "project", 0.5),
}


@pytest.fixture
def environ(monkeypatch):
    """The process's own environment has none of the variables."""
    for variable in VARIABLES:
        monkeypatch.delenv(variable, raising=False)
    return monkeypatch


@pytest.fixture
def folder(tmp_path):
    made = tmp_path / "data"
    made.mkdir()
    for name in ("train.jsonl", "validation.jsonl"):
        (made / name).write_text(json.dumps({"prompt": name, "completion": "x"}) + "\n")
    return made


def request(**params):
    return {"fine_tuning_params": params}


def test_the_table_of_sources_covers_every_variable():
    assert {name for name, _ in VARIABLES.values()} <= set(SOURCES)
    assert set(ENVIRON) == set(VARIABLES)
    assert len(VARIABLES) == 8


def test_the_request_as_it_comes(environ):
    config = TuningConfig.from_request(REQUEST)
    assert config == TuningConfig(project_id=123, judge="gemini", model_name="Qwen/Qwen3-0.6B", n_trials=20)
    for text in (json.dumps(REQUEST), json.dumps(REQUEST).encode()):
        assert TuningConfig.from_request(text) == config


def test_the_request_with_its_project(environ, folder):
    config = TuningConfig.from_request(REQUEST, projects={123: folder})
    assert config.train_data == str(folder / "train.jsonl")
    assert config.validation_data == str(folder / "validation.jsonl")
    assert [row["prompt"] for row in load(config.train_data)] == ["train.jsonl"]


@pytest.mark.parametrize("name", SOURCES)
@pytest.mark.parametrize("mask", range(8))
def test_argument_over_request_over_environment_over_default(name, mask, folder):
    default, environment, requested, argument = SOURCES[name]
    expected = default
    environ, body, projects, arguments = {}, {"fine_tuning_params": {}}, None, {}
    if mask & 1 and environment is not None:
        expected, environ = environment, ENVIRON
    if mask & 2 and requested is not None:
        expected, projects = requested, {123: folder}
        keys = {"base_model_name": "request/model", "n_trials": 30, "judge_model_id": "gemini"}
        body = {"project_id": 123, "fine_tuning_params": keys}
        if requested == "project":
            expected = str(folder / ("train.jsonl" if name == "train_data" else "validation.jsonl"))
    if mask & 4:
        expected, arguments = argument, {name: argument}
    config = TuningConfig.from_request(body, projects=projects, environ=environ, **arguments)
    assert getattr(config, name) == expected
    if not mask & 2:
        assert getattr(TuningConfig.from_env(environ, **arguments), name) == expected


def test_the_process_environment_is_read(environ):
    for variable, text in ENVIRON.items():
        environ.setenv(variable, text)
    config = TuningConfig.from_env()
    assert {name: getattr(config, name) for name, _ in VARIABLES.values()} == {
        name: SOURCES[name][1] for name, _ in VARIABLES.values()
    }
    assert TuningConfig.from_request(REQUEST).learning_rate == 1e-4
    assert TuningConfig().n_trials == 20


@pytest.mark.parametrize("variable", VARIABLES)
def test_blank_variables_are_not_set(variable):
    assert TuningConfig.from_env({variable: ""}) == TuningConfig.from_env({variable: " \t"}) == TuningConfig()


@pytest.mark.parametrize(
    ("text", "value"),
    [
        *((text, True) for text in ("true", "True", "TRUE", "1", "yes", "YES", "on", "On", " true ")),
        *((text, False) for text in ("false", "False", "0", "no", "No", "off", "OFF")),
    ],
)
def test_booleans_of_the_environment(text, value):
    assert TuningConfig.from_env({"MLFLOW_ENABLED": text}).mlflow_enabled is value


WRONG_VARIABLES = {
    "LORA_MODEL_NAME": ("a\nb",),
    "LORA_N_TRIALS": ("0", "-3", "2.0", "ten", "1e3", "1_000", "٣", "9" * 30, "nan"),
    "LORA_NUM_EPOCHS": ("0", "-1", "nan", "inf", "three", "1e999", "1,5", "0x10"),
    "LORA_BATCH_SIZE": ("0", "-3", "2.0", "ten"),
    "LORA_LEARNING_RATE": ("0", "-1e-4", "nan", "inf", "2e-4x", "1e", "."),
    "MLFLOW_ENABLED": ("2", "ja", "enabled", "t"),
    "MLFLOW_TRACKING_URI": ("a\nb",),
    "MLFLOW_EXPERIMENT_NAME": ("a\nb",),
}


@pytest.mark.parametrize(
    ("variable", "text"),
    [pytest.param(v, t, id=f"{v}-{i}") for v, texts in WRONG_VARIABLES.items() for i, t in enumerate(texts)],
)
def test_a_wrong_variable_is_named_with_its_value(variable, text):
    with pytest.raises(ConflictError) as raised:
        TuningConfig.from_env({variable: text})
    head, line = str(raised.value).splitlines()
    assert head == "TuningConfig from the environment: 1 value will not do."
    assert line.startswith(f"  {variable}=")
    assert repr(text) in line
    # What is decided elsewhere is not read.
    name = VARIABLES[variable][0]
    assert TuningConfig.from_env({variable: text}, **{name: SOURCES[name][3]}) == TuningConfig(
        **{name: SOURCES[name][3]}
    )


def test_all_wrong_variables_are_named_at_once():
    with pytest.raises(ConflictError) as raised:
        TuningConfig.from_env({name: texts[0] for name, texts in WRONG_VARIABLES.items()}, sede=3, seed=-1)
    lines = [line.strip() for line in str(raised.value).splitlines()[1:]]
    assert [line.split("=")[0] for line in lines] == [
        *VARIABLES,
        "sede: Unknown field 'sede'. Did you mean 'seed'?",
        "seed",
    ]


WRONG_REQUESTS = [
    ({"project_id": 1.0}, "project_id=1.0: it must be a whole number or a name"),
    ({"project_id": True}, "project_id=True: "),
    ({"project_id": ""}, "project_id='': "),
    ({"project_id": [1]}, "project_id=[1]: "),
    ({"projekt_id": 1}, "'projekt_id': Unknown key of a request 'projekt_id'. Did you mean 'project_id'?"),
    ({"x": 1}, "'x': Unknown key of a request 'x'. Known: fine_tuning_params, project_id."),
    ({"fine_tuning_params": []}, "fine_tuning_params=[]: it must be an object"),
    ({"fine_tuning_params": "n_trials=20"}, "fine_tuning_params='n_trials=20': it must be an object"),
    (request(n_trial=5), "fine_tuning_params.'n_trial': Unknown key of fine_tuning_params 'n_trial'. Did you mean"),
    (request(n_trials=4), "fine_tuning_params.n_trials=4: it must be a whole number from 5 to 100."),
    (request(n_trials=101), "fine_tuning_params.n_trials=101: it must be a whole number from 5 to 100."),
    (request(n_trials="20"), "fine_tuning_params.n_trials='20': "),
    (request(n_trials=20.0), "fine_tuning_params.n_trials=20.0: "),
    (request(n_trials=True), "fine_tuning_params.n_trials=True: "),
    (request(base_model_name=""), "fine_tuning_params.base_model_name='': "),
    (request(base_model_name=3), "fine_tuning_params.base_model_name=3: "),
    (request(use_llm_judge="true"), "fine_tuning_params.use_llm_judge='true': it must be true or false"),
    (request(use_llm_judge=1), "fine_tuning_params.use_llm_judge=1: "),
    (request(judge_model_id=True), "fine_tuning_params.judge_model_id=True: it must be the name of a judge"),
    (request(judge_model_id=3), "fine_tuning_params.judge_model_id=3: "),
    (request(judge_model_id=""), "fine_tuning_params.judge_model_id='': "),
    (
        request(use_llm_judge=True, judge_model_id="gemini-2.5-flash"),
        "fine_tuning_params.judge_model_id='gemini-2.5-flash': no judge has that name; registered are gemini,",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("body", "said"), WRONG_REQUESTS)
def test_a_wrong_request_is_told_by_its_path(body, said):
    with pytest.raises(ConflictError) as raised:
        TuningConfig.from_request(body, environ=ENVIRON, n_trials=5, model_name="m", judge="local")
    head, line = str(raised.value).splitlines()
    assert head == "TuningConfig from a request: 1 value will not do."
    assert line.strip().startswith(said)


def test_all_that_is_wrong_in_a_request_is_said_at_once():
    params = {"use_llm_judge": "yes", "judge_model_id": "gpt", "base_model_name": 3, "n_trials": 3, "epochs": 3}
    with pytest.raises(ConflictError) as raised:
        TuningConfig.from_request(
            {"project_id": 9, "params": {}, "fine_tuning_params": params},
            projects={1: "x"},
            environ={"LORA_BATCH_SIZE": "x", "LORA_LEARNING_RATE": "-1"},
            seed=-1,
        )
    lines = [line.strip().split("=")[0].split(":")[0] for line in str(raised.value).splitlines()[1:]]
    inside = "fine_tuning_params."
    assert sorted(lines) == sorted(
        [
            "'params'", "project_id", f"{inside}'epochs'", f"{inside}use_llm_judge", f"{inside}judge_model_id",
            f"{inside}base_model_name", f"{inside}n_trials", "LORA_BATCH_SIZE", "LORA_LEARNING_RATE", "seed",
        ]
    )  # fmt: skip


def test_variables_that_the_request_goes_before_are_not_read():
    environ = {"LORA_N_TRIALS": "x", "LORA_MODEL_NAME": "a\nb"}
    assert TuningConfig.from_request(REQUEST, environ=environ).n_trials == 20
    with pytest.raises(ConflictError, match=r"1 value will not do\.\n  fine_tuning_params\.n_trials=3"):
        TuningConfig.from_request(request(n_trials=3, base_model_name="m"), environ=environ)


@pytest.mark.parametrize("count", [5, 100])
def test_the_bounds_of_trials_are_those_of_requests_alone(count):
    assert TuningConfig.from_request(request(n_trials=count), environ={}).n_trials == count
    assert TuningConfig.from_request({}, environ={"LORA_N_TRIALS": "1"}).n_trials == 1
    assert TuningConfig.from_request({}, environ={}, n_trials=1000).n_trials == 1000


@pytest.mark.parametrize(
    ("params", "judge"),
    [
        ({}, None),
        ({"use_llm_judge": None, "judge_model_id": None}, None),
        ({"use_llm_judge": True}, True),
        ({"use_llm_judge": False}, None),
        ({"use_llm_judge": True, "judge_model_id": "openai"}, "openai"),
        ({"use_llm_judge": False, "judge_model_id": "openai"}, None),
        ({"use_llm_judge": False, "judge_model_id": "unheard of"}, None),
        ({"judge_model_id": "openai"}, "openai"),
    ],
)
def test_which_judge_a_request_means(params, judge):
    assert TuningConfig.from_request(request(**params), environ={}).judge is judge or judge == "openai"
    assert TuningConfig.from_request(request(**params), environ={}).judge == judge


@pytest.mark.parametrize("body", [{}, {"project_id": None}, {"fine_tuning_params": None}, {"fine_tuning_params": {}}])
def test_null_is_not_given(body):
    assert TuningConfig.from_request(body, environ={}) == TuningConfig()


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("{", "The request, line 1, column 2: no JSON"),
        ('{"project_id": 1, "project_id": 2}', "The request has the key 'project_id' twice"),
        ("[]", "The request is a list"),
        (None, "The request is a NoneType"),
        (3, "The request is a int"),
        (b"\xff", "not UTF-8"),
    ],
)
def test_what_is_no_request(body, said):
    with pytest.raises(ForgeError, match=said):
        TuningConfig.from_request(body)


@pytest.mark.parametrize("project", [123, "123", 0, "0", "abc", "a/b", "..", "0123"])
def test_a_project_is_looked_up_by_its_id(project, folder):
    for projects in ({project: folder}, {project: str(folder)}, lambda found: {project: folder}[found]):
        config = TuningConfig.from_request({"project_id": project}, projects=projects, environ={})
        assert config.train_data == str(folder / "train.jsonl")
        assert config.project_id == project


def test_numbers_and_their_texts_are_one_project(folder):
    for asked, key in ((123, "123"), ("123", 123)):
        assert TuningConfig.from_request({"project_id": asked}, projects={key: folder}, environ={}).train_data
    for asked, key in (("0123", 123), (123, "0123"), ("\uff11\uff12\uff13", 123), ("1" * 30, 1)):
        with pytest.raises(ConflictError, match="no such project"):
            TuningConfig.from_request({"project_id": asked}, projects={key: folder}, environ={})


@pytest.mark.parametrize("project", ["../data", "data", "..", "/etc", "~", ".", "data\\..", "%2e%2e"])
def test_an_id_is_no_path(project, folder, monkeypatch):
    monkeypatch.chdir(folder.parent)
    for projects in ({123: folder}, {}, defaultdict(lambda: folder), lambda found: None):
        with pytest.raises(ConflictError, match="no such project"):
            TuningConfig.from_request({"project_id": project}, projects=projects, environ={})


def test_what_is_missing_is_said_with_what_is_there(folder):
    def problem(projects, project=123):
        with pytest.raises(ConflictError) as raised:
            TuningConfig.from_request({"project_id": project}, projects=projects, environ={})
        return str(raised.value).splitlines()[1]

    said = problem(dict.fromkeys(range(20), folder))
    assert said.endswith("project_id=123: no such project. Known are 0, 1, 2, 3, 4, 5, 6, 7 and 12 more.")
    assert problem({}).endswith("Known are nothing.")
    assert "gone' is not there. Make it" in problem({123: folder / "gone"})
    (folder / "notes.txt").write_text("x")
    (folder / "train.jsonl").unlink()
    assert "holds notes.txt, validation.jsonl, and no training data: one file train.jsonl" in problem({123: folder})
    assert "where the path of a folder belongs" in problem({123: 5})
    with pytest.raises(ConflictError, match="projects is a list"):
        TuningConfig.from_request({"project_id": 123}, projects=[folder])


@pytest.mark.parametrize(
    ("names", "train", "validation"),
    [
        (["train.jsonl"], "train.jsonl", None),
        (["train.json", "dev.csv"], "train.json", "dev.csv"),
        (["TRAIN.CSV", "Val.Parquet"], "TRAIN.CSV", "Val.Parquet"),
        (["train.parquet", "test.parquet"], "train.parquet", "test.parquet"),
        (["train.jsonl", "test.jsonl", "val.jsonl"], "train.jsonl", "val.jsonl"),
        (["train.jsonl", "test.jsonl", "validation.jsonl", "valid.jsonl"], "train.jsonl", "validation.jsonl"),
        (["train.jsonl", "more.jsonl", "other.csv"], "train.jsonl", None),
        (["anything.csv", "README.md", ".hidden.csv"], "anything.csv", None),
        (["anything.csv", "validation.csv"], "anything.csv", "validation.csv"),
    ],
)
def test_which_files_of_a_folder_are_taken(tmp_path, names, train, validation):
    for name in names:
        (tmp_path / name).write_text("x")
    (tmp_path / "train.txt").write_text("x")
    (tmp_path / "val.jsonl.d").mkdir()
    config = TuningConfig.from_request({"project_id": 1}, projects={1: tmp_path}, environ={})
    assert config.train_data == str(tmp_path / train)
    assert config.validation_data == (validation and str(tmp_path / validation))


@pytest.mark.parametrize(
    ("names", "said"),
    [
        ([], "holds nothing, and no training data"),
        (["a.csv", "b.csv"], "holds a.csv, b.csv, and no training data"),
        (["test.jsonl"], "holds test.jsonl, and no training data"),
        (["train.csv", "train.jsonl"], "train.csv, train.jsonl in .* could all be its training data"),
        (["train.csv", "val.csv", "val.json"], "val.csv, val.json in .* could all be its validation data"),
        ([".train.jsonl"], "holds nothing"),
    ],
)
def test_folders_in_which_nobody_can_choose(tmp_path, names, said):
    for name in names:
        (tmp_path / name).write_text("x")
    with pytest.raises(ConflictError, match=said):
        TuningConfig.from_request({"project_id": 1}, projects={1: tmp_path}, environ={})


def test_what_datasets_saved_is_taken_whole(tmp_path):
    rows = datasets.Dataset.from_list([{"prompt": "a", "completion": "b"}])
    rows.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": rows, "test": rows}).save_to_disk(tmp_path / "several")
    for name in ("one", "several"):
        config = TuningConfig.from_request({"project_id": 1}, projects={1: tmp_path / name}, environ={})
        assert (config.train_data, config.validation_data) == (str(tmp_path / name), None)
        assert len(load(config.train_data)) == 1


def test_a_mapping_may_name_the_file_itself(folder):
    config = TuningConfig.from_request({"project_id": 1}, projects={1: folder / "train.jsonl"}, environ={})
    assert (config.train_data, config.validation_data) == (str(folder / "train.jsonl"), None)


def test_data_given_as_arguments_are_not_mixed_with_those_of_the_project(folder):
    config = TuningConfig.from_request({"project_id": 1}, projects={}, environ={}, train_data="mine.jsonl")
    assert (config.train_data, config.validation_data, config.project_id) == ("mine.jsonl", None, 1)
    config = TuningConfig.from_request({"project_id": 1}, projects={1: folder}, environ={}, validation_data=0.2)
    assert (config.train_data, config.validation_data) == (str(folder / "train.jsonl"), 0.2)
