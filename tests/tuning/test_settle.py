"""What is refused, and that it is refused before any weight is loaded."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import transformers

from forge import ConflictError, ForgeError, UnsupportedError, estimate_model_memory, get_preset, prepare_dataset
from forge.tuning import LoRATuner, TuningConfig
from forge.tuning.fit import Room
from forge.tuning.record import params_of
from forge.tuning.run_folder import RunFolder
from forge.tuning.settle import settle


@pytest.fixture(autouse=True)
def _no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    def loaded(*_: Any, **__: Any) -> None:
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", loaded)


def settled(tuner: LoRATuner) -> Any:
    return settle(
        tuner.model_or_id,
        tuner.train,
        tuner.validation,
        preset=tuner.preset,
        config=tuner.config,
        tokenizer=tuner.tokenizer,
        folder=RunFolder(tuner.config.output_dir),
    )


def preferences(count: int = 20) -> list[dict[str, str]]:
    return [{"prompt": f"q {n}", "chosen": f"good {n}", "rejected": f"bad {n}"} for n in range(count)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, r"needs a model.* and data to train on"),
        ({"train": [{"text": "a"}]}, r"needs a model"),
        ({"model_or_id": "m"}, r"needs data to train on"),
        ({"model_or_id": "m", "train": "d", "config": {"learning_rate": 1}}, r"give a TuningConfig"),
    ],
)
def test_what_is_missing_is_said_at_once(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConflictError, match=message):
        LoRATuner(**arguments)


def test_what_the_config_names_need_not_be_an_argument() -> None:
    config = TuningConfig(model_name="m", train_data="t.jsonl", validation_data="v.jsonl", preset="dpo")
    tuner = LoRATuner(config=config)
    assert (tuner.model_or_id, tuner.train, tuner.validation, tuner.preset) == ("m", "t.jsonl", "v.jsonl", "dpo")
    other = LoRATuner("n", "u.jsonl", 0.5, preset="lora", config=config)
    assert (other.model_or_id, other.train, other.validation, other.preset) == ("n", "u.jsonl", 0.5, "lora")


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({"preset": "sft"}, UnsupportedError, "trains all weights"),
        ({"model": "no/such-model"}, ForgeError, "no/such-model"),
        ({"train": "no_such_file.jsonl"}, ForgeError, "no_such_file"),
        ({"train": [{"a": 1}]}, ForgeError, "format"),
        ({"train": preferences(), "validation": 4}, ConflictError, "preset='dpo'"),
        ({"overrides": {"save_only_model": True}}, ConflictError, "could not go on"),
        ({"overrides": {"save_strategy": "no"}}, ConflictError, "begin anew"),
        ({"overrides": {"push_to_hub": True, "hub_strategy": "end"}}, ConflictError, "publish checkpoints"),
        ({"overrides": {"eval_strategy": "epoch", "load_best_model_at_end": True}}, ConflictError, "trainer refuses"),
        ({"mlflow_enabled": True, "mlflow_tracking_uri": "gopher://host"}, ForgeError, "gopher"),
        ({"preset": "dpo"}, ConflictError, "preset='qlora'"),
        ({"preset": "dpo", "overrides": {"bias": "all"}}, ConflictError, "second adapter"),
        ({"validation": 2000}, ForgeError, "2000"),
        ({"overrides": {"use_peft": False, "precision": "bf16"}}, ForgeError, "weights"),
        ({"bert_score": "/no/such/encoder"}, ForgeError, "encoder"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_will_not_do_is_refused_before_weights(
    make_tuner: Callable[..., LoRATuner], tmp_path: Path, changes: dict[str, Any], kind: type, message: str
) -> None:
    with pytest.raises(kind, match=message):
        make_tuner(**changes).run()
    assert not (tmp_path / "run").exists()


def test_a_run_that_does_not_fit_is_refused_before_weights(
    make_tuner: Callable[..., LoRATuner], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("forge.tuning.fit.room_here", lambda device: Room(2**20, "a very small machine"))
    with pytest.raises(UnsupportedError, match=r"does not fit.*a very small machine has 0\.00 GiB.*max_length"):
        make_tuner().run()
    assert not (tmp_path / "run").exists()


def test_a_named_card_is_asked_instead_of_this_machine(make_tuner: Callable[..., LoRATuner], tmp_path: Path) -> None:
    huge = transformers.LlamaConfig(
        hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64, num_key_value_heads=8,
        vocab_size=256,
    )  # fmt: skip
    huge.save_pretrained(tmp_path / "huge")
    from support.tokenizer import tiny_tokenizer

    tuner = make_tuner(str(tmp_path / "huge"), gpu="24GB", tokenizer=tiny_tokenizer())
    with pytest.raises(UnsupportedError, match=r"does not fit: it needs \d+.*24"):
        tuner.run()
    assert settled(make_tuner(gpu="24GB", output_dir=str(tmp_path / "other"))).estimate["total_estimated_gb"] < 20


def test_the_estimate_is_of_this_run(make_tuner: Callable[..., LoRATuner], tiny_folder: Path) -> None:
    tuner = make_tuner()
    found = settled(tuner)
    longest = max(len(row) for row in found.data.train["input_ids"])
    assert longest < 64
    batch = found.preset.choices["per_device_train_batch_size"].value
    expected = estimate_model_memory(str(tiny_folder), batch, longest, preset=found.preset, trainer="sft")
    assert found.estimate["total_estimated_gb"] == expected["total_estimated_gb"]
    frozen = settled(make_tuner(freeze_ratio=0.5, ema=True))
    assert frozen.estimate["total_estimated_gb"] != expected["total_estimated_gb"]


@pytest.mark.parametrize("name", ["lora", "qlora", "dpo"])
@pytest.mark.parametrize(
    "overrides", [{}, {"lora_r": 8, "learning_rate": 7e-6, "target_modules": ["q_proj", "v_proj"]}]
)
def test_params_give_the_same_recipe_without_the_model(tiny_folder: Path, name: str, overrides: dict[str, Any]) -> None:
    import json

    shown = get_preset(name, model=tiny_folder, max_length=128, **overrides)
    params = json.loads(json.dumps(params_of(shown)))
    again = get_preset(name, **params)
    assert values(again) == values(shown)
    assert values(get_preset(name, max_length=128, **overrides)) != values(shown) or "target_modules" in overrides


def values(preset: Any) -> dict[str, Any]:
    return {
        name: list(value) if isinstance(value := choice.value, tuple) else value
        for name, choice in preset.choices.items()
    }


def test_a_tenth_is_held_out_when_nobody_says(
    make_tuner: Callable[..., LoRATuner], rows: list[Any], tmp_path: Path
) -> None:
    from datasets import Dataset, DatasetDict

    found = settled(LoRATuner(make_tuner().model_or_id, rows, preset="lora", config=make_tuner().config))
    assert len(found.data.validation) == 4
    both = DatasetDict(train=Dataset.from_list(rows[:30]), validation=Dataset.from_list(rows[30:37]))
    assert (
        len(
            settled(
                LoRATuner(make_tuner().model_or_id, both, preset="lora", config=make_tuner().config)
            ).data.validation
        )
        == 7
    )


def test_prepared_data_are_taken_as_they_are(make_tuner: Callable[..., LoRATuner], rows: list[Any]) -> None:
    from support.tokenizer import tiny_tokenizer

    ready = prepare_dataset(rows, tiny_tokenizer(), validation=5)
    tuner = make_tuner(train=ready)
    with pytest.raises(ConflictError, match="leave validation out"):
        settled(tuner)
    tuner.validation = None
    assert settled(tuner).data is ready
    tuner.train = prepare_dataset(rows * 1, tiny_tokenizer(), validation=5)
    tuner.config = tuner.config.replace(max_length=8)
    with pytest.raises(ConflictError, match="max_length=8 would cut"):
        settled(tuner)
    tuner.config = tuner.config.replace(max_length=64)
    tuner.train = prepare_dataset(rows, tiny_tokenizer())
    with pytest.raises(ConflictError, match="nothing to validate on"):
        settled(tuner)


def test_a_live_model_that_is_not_quantised_cannot_be_qlora(
    make_tuner: Callable[..., LoRATuner], text_model: Callable[..., Any], tokenizer: Any
) -> None:
    with pytest.raises(ForgeError, match=r"quantised|nf4"):
        settled(make_tuner(text_model("llama", layers=2), preset="qlora", tokenizer=tokenizer))
    with pytest.raises(ForgeError, match="tokenizer="):
        settled(make_tuner(text_model("llama", layers=2)))


def test_a_live_model_with_adapters_is_refused(
    make_tuner: Callable[..., LoRATuner], text_model: Callable[..., Any], tokenizer: Any
) -> None:
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(text_model("llama", layers=2), LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(ConflictError, match="safe_unload_peft_adapters"):
        settled(make_tuner(model, tokenizer=tokenizer))
    with pytest.raises(ConflictError, match="give an id"):
        settled(make_tuner(3, tokenizer=tokenizer))


def test_callbacks_that_are_none_and_presets_for_other_machines(make_tuner: Callable[..., LoRATuner]) -> None:
    for wrong in (["x"], transformers.ProgressCallback, "early"):
        with pytest.raises(ConflictError, match="TrainerCallbacks"):
            make_tuner(callbacks=wrong)
    with pytest.raises(ForgeError, match="ampere"):
        settled(make_tuner(preset=get_preset("lora", hardware="ampere")))


def test_it_refuses_to_run_in_many_processes(
    make_tuner: Callable[..., LoRATuner], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UnsupportedError, match="WORLD_SIZE=2"):
        make_tuner().run()


def test_the_record_has_nothing_that_json_changes(make_tuner: Callable[..., LoRATuner]) -> None:
    import json

    record = settled(make_tuner(judge=None, mlflow_tracking_uri="http://user:hunter2@host:5000")).record
    assert json.loads(json.dumps(record)) == record
    assert "hunter2" not in json.dumps(record)
    assert record["data"]["train"]["rows"] == 32
    assert record["seed"] == 42
    assert record["versions"]["transformers"] == transformers.__version__
