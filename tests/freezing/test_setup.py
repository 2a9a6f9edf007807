"""What is frozen, what is refused, and that the way back leads to where it began."""

from __future__ import annotations

import warnings

import numpy as np
import peft
import pytest
import torch
import transformers

from forge.errors import ConflictError, ForgeError, ForgeWarning, UnsupportedError
from forge.freezing import FreezeReport, setup_lp_lora_style, unfreeze
from forge.models.layers import decoder_layers
from forge.models.truncation import truncated_layers
from support.models import lora, nf4_model, text_model, trainer

LAYERS = 4


def snapshot(model):
    """All that freezing may touch."""
    configs = {name: repr(config.to_dict()) for name, config in getattr(model, "peft_config", {}).items()}
    tuner = getattr(model, "base_model", None)
    return {
        "parameters": {name: (id(p), p.requires_grad, p.detach().clone()) for name, p in model.named_parameters()},
        "modules": {name: (id(module), type(module), module.training) for name, module in model.named_modules()},
        "attributes": {name: sorted(vars(module)) for name, module in model.named_modules()},
        "configs": configs,
        "targeted": list(getattr(tuner, "targeted_module_names", ())),
    }


def assert_as_before(before, model):
    after = snapshot(model)
    assert after["modules"] == before["modules"]
    assert after["attributes"] == before["attributes"]
    assert (after["configs"], after["targeted"]) == (before["configs"], before["targeted"])
    assert after["parameters"].keys() == before["parameters"].keys()
    for name, (identity, trains, value) in before["parameters"].items():
        assert after["parameters"][name][:2] == (identity, trains)
        assert torch.equal(after["parameters"][name][2], value)


def adapted(family="llama", **changes):
    return peft.get_peft_model(text_model(family, layers=LAYERS), lora(**changes))


MODELS = {
    "plain": lambda folder: text_model(layers=LAYERS),
    "lora": lambda folder: adapted(),
    "dora": lambda folder: adapted(use_dora=True),
    "excluding": lambda folder: adapted(exclude_modules=["v_proj", "o_proj"]),
    "ia3": lambda folder: peft.get_peft_model(
        text_model(layers=LAYERS),
        peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
    ),
    "loha": lambda folder: peft.get_peft_model(text_model(layers=LAYERS), peft.LoHaConfig(target_modules=["q_proj"])),
    "modules_to_save": lambda folder: adapted(target_modules=["q_proj"], modules_to_save=["input_layernorm"]),
    "experts": lambda folder: adapted(
        "qwen3_moe",
        target_modules=["q_proj"],
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    ),
    "nf4": lambda folder: nf4_model(folder, layers=LAYERS),
    "nf4-lora": lambda folder: peft.get_peft_model(
        peft.prepare_model_for_kbit_training(nf4_model(folder, layers=LAYERS)), lora()
    ),
}


@pytest.mark.parametrize("which", MODELS)
def test_there_and_back(which, tmp_path):
    model = MODELS[which](tmp_path).train()
    before = snapshot(model)
    ids = torch.randint(3, 200, (2, 9))
    logits = model.eval()(ids).logits
    model.train()
    report = setup_lp_lora_style(model, 0.5)
    assert not any(p.requires_grad for layer in decoder_layers(model)[:2] for p in layer.parameters())
    assert truncated_layers(model) == 2
    wrapped = [name for name, module in decoder_layers(model)[:2].named_modules() if hasattr(module, "base_layer")]
    assert not wrapped
    assert report.adapters_removed == 0 or which not in ("plain", "nf4")
    torch.testing.assert_close(model.eval()(ids).logits, logits)
    model.train()
    report.undo()
    assert_as_before(before, model)
    report.undo()  # nothing
    assert_as_before(before, model)


@pytest.mark.parametrize("which", ["lora", "experts", "excluding"])
def test_the_checkpoint_holds_no_frozen_layer_and_loads_without_one(which, tmp_path, no_foreign_warnings):
    model = MODELS[which](tmp_path)
    setup_lp_lora_style(model, 0.5)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_()
    model.save_pretrained(tmp_path / "adapter")
    saved = set(peft.get_peft_model_state_dict(model))
    assert saved
    assert not any(f"layers.{index}." in name for name in saved for index in (0, 1))
    family = "qwen3_moe" if which == "experts" else "llama"
    again = peft.PeftModel.from_pretrained(text_model(family, layers=LAYERS), tmp_path / "adapter")
    assert set(peft.get_peft_model_state_dict(again)) == saved
    ids = torch.randint(3, 200, (2, 9))
    torch.testing.assert_close(again.eval()(ids).logits, model.eval()(ids).logits)


@pytest.mark.parametrize(
    ("arguments", "frozen", "boundary"),
    [
        ({}, (0, 1), 2),
        ({"freeze_ratio": 0.75}, (0, 1, 2), 3),
        ({"freeze_ratio": 0.0}, (), 0),
        ({"frozen_layers": 1}, (0,), 1),
        ({"frozen_layers": range(3)}, (0, 1, 2), 3),
        ({"frozen_layers": [3, 0]}, (0, 3), 1),
        ({"frozen_layers": [-1]}, (3,), 0),
        ({"frozen_layers": []}, (), 0),
    ],
)
def test_by_share_by_number_and_by_list(arguments, frozen, boundary):
    model = adapted()
    report = setup_lp_lora_style(model, **arguments)
    assert (report.frozen_layers, report.boundary) == (frozen, boundary)
    assert report.trainable_layers == tuple(index for index in range(4) if index not in frozen)
    assert report.freeze_ratio == len(frozen) / 4
    trains = {int(n.split(".layers.")[1].split(".")[0]) for n, p in model.named_parameters() if p.requires_grad}
    assert trains == set(range(4)) - set(frozen)
    assert truncated_layers(model) == boundary


def test_called_again_it_begins_where_the_model_began():
    model = adapted()
    before = snapshot(model)
    first = setup_lp_lora_style(model, 0.75)
    assert setup_lp_lora_style(model, 0.75) == first
    second = setup_lp_lora_style(model, frozen_layers=1)
    assert second.frozen_layers == (0,)
    assert truncated_layers(model) == 1
    first.undo()
    assert_as_before(before, model)


def test_what_was_learnt_above_stays():
    model = adapted()
    report = setup_lp_lora_style(model, 0.5)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.fill_(0.5)
    report.undo()
    learnt = {
        int(n.split(".layers.")[1].split(".")[0]) for n, p in model.named_parameters() if "lora_B" in n and p.any()
    }
    assert learnt == {2, 3}
    with pytest.raises(ConflictError, match="is not as it begins"):
        setup_lp_lora_style(model, 0.75)
    assert truncated_layers(model) == 0


def test_the_users_config_stays_as_it_is():
    """It may be given to another model next, whose frozen layers are others."""
    config = lora()
    model = peft.get_peft_model(text_model(layers=LAYERS), config)
    setup_lp_lora_style(model, 0.5)
    assert config.exclude_modules is None
    second = peft.get_peft_model(text_model(layers=LAYERS), config)
    assert sum("lora_A" in name for name, _ in second.named_parameters()) == 28


def test_the_counts():
    model = adapted()
    all_adapters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    report = setup_lp_lora_style(model, 0.5)
    assert report.trainable_parameters == report.frozen_parameters == all_adapters // 2
    assert report.adapters_removed == 14
    assert report.embeddings_frozen == ()
    assert str(report).startswith("2 of 4 decoder layers frozen (0-1); backward stops below layer 2")


def test_the_report_prints(capsys):
    setup_lp_lora_style(text_model("gpt2", layers=LAYERS), 0.5).print()
    out = capsys.readouterr().out
    assert "2 of 4: 0-1" in out
    assert "transformer.wpe.weight" in out


def test_a_tied_head_is_frozen_with_the_embeddings():
    model = text_model("qwen2", layers=LAYERS)
    setup_lp_lora_style(model, 0.5)
    assert not model.lm_head.weight.requires_grad
    with pytest.raises(ConflictError, match=r"embed_tokens\.weight trains below"):
        setup_lp_lora_style(model, 0.5, freeze_embeddings=False)
    assert all(p.requires_grad for p in model.parameters())


def test_embeddings_that_stay_as_they_are():
    model = text_model(layers=LAYERS)
    report = setup_lp_lora_style(model, 0.0, freeze_embeddings=False)
    assert truncated_layers(model) == 0
    assert all(p.requires_grad for p in model.parameters())
    assert report.boundary == 0
    setup_lp_lora_style(adapted(), 0.5, freeze_embeddings=False)  # they do not train anyway
    report = setup_lp_lora_style(model, 0.0)
    assert report.embeddings_frozen == ("model.embed_tokens.weight",)


REFUSED = {
    "ratio-one": (adapted, {"freeze_ratio": 1.0}, ForgeError, r"freeze_ratio=1\.0: .* less than 1"),
    "ratio-below": (adapted, {"freeze_ratio": -0.1}, ForgeError, r"freeze_ratio=-0\.1"),
    "ratio-nan": (adapted, {"freeze_ratio": float("nan")}, ForgeError, "freeze_ratio=nan"),
    "ratio-text": (adapted, {"freeze_ratio": "half"}, ForgeError, "freeze_ratio='half'"),
    "ratio-bool": (adapted, {"freeze_ratio": True}, ForgeError, "freeze_ratio=True"),
    "both": (adapted, {"freeze_ratio": 0.5, "frozen_layers": 2}, ConflictError, "same thing twice"),
    "count": (adapted, {"frozen_layers": 4}, ForgeError, "less than the model's 4 layers"),
    "count-below": (adapted, {"frozen_layers": -1}, ForgeError, "at least 0"),
    "index": (adapted, {"frozen_layers": [0, 4]}, ForgeError, "holds 4: .* indices 0 to 3"),
    "index-text": (adapted, {"frozen_layers": ["0"]}, ForgeError, "holds '0'"),
    "all": (adapted, {"frozen_layers": range(4)}, ForgeError, "all 4 layers"),
    "text": (adapted, {"frozen_layers": "0-3"}, ForgeError, "a number of layers, or a list"),
    "nothing-left": (
        lambda: adapted(target_modules=["q_proj"], layers_to_transform=[0]),
        {"freeze_ratio": 0.5},
        ForgeError,
        "Nothing would train",
    ),
    "tower": (lambda: text_model("llava", layers=4), {}, ConflictError, r"model\.vision_tower.* trains, and feeds"),
    "adapted-embeddings": (
        lambda: adapted(target_modules=["q_proj", "embed_tokens"]),
        {},
        ConflictError,
        "the adapter covers the embeddings",
    ),
    "saved-embeddings": (
        lambda: adapted(target_modules=["q_proj"], modules_to_save=["embed_tokens"]),
        {},
        ConflictError,
        "the adapter covers the embeddings",
    ),
    "new-tokens": (
        lambda: adapted(target_modules=["q_proj"], trainable_token_indices=[5, 6]),
        {},
        ConflictError,
        "the adapter covers the embeddings",
    ),
    "prompts": (
        lambda: peft.get_peft_model(
            text_model(layers=4), peft.PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")
        ),
        {},
        ConflictError,
        "PromptTuningConfig: it learns what goes into the lowest layer",
    ),
    "prefixes": (
        lambda: peft.get_peft_model(
            text_model(layers=4), peft.PrefixTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")
        ),
        {},
        ConflictError,
        "PrefixTuningConfig",
    ),
    "pissa": (lambda: adapted(init_lora_weights="pissa"), {}, ConflictError, "is not as it begins"),
    "encoder": (
        lambda: transformers.BertForMaskedLM(
            transformers.BertConfig(hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=8)
        ),
        {},
        UnsupportedError,
        "is an encoder",
    ),
    "module": (lambda: torch.nn.Linear(2, 2), {}, UnsupportedError, "not of a Linear"),
    "config": (lambda: text_model().config, {}, UnsupportedError, "not of a LlamaConfig"),
    "wrapped": (lambda: torch.nn.DataParallel(text_model()), {}, UnsupportedError, "before anything wraps it"),
}


@pytest.mark.parametrize("which", REFUSED)
def test_what_is_refused_leaves_the_model_as_it_was(which):
    make, arguments, error, message = REFUSED[which]
    model = make()
    before = snapshot(model) if isinstance(model, torch.nn.Module) else None
    with pytest.raises(error, match=message):
        setup_lp_lora_style(model, **arguments)
    if before is not None:
        assert_as_before(before, model)


def test_a_share_of_less_than_a_layer_is_said():
    with pytest.warns(ForgeWarning, match="less than one"):
        report = setup_lp_lora_style(adapted(), 0.2)
    assert report.frozen_layers == ()


@pytest.mark.parametrize("which", ["llama", "gpt2", "gpt_neox", "falcon_40b", "qwen2_5_vl"])
def test_all_that_comes_before_the_first_layer_is_found(which):
    model = text_model(which, layers=LAYERS)
    for name, module in model.named_modules():
        if name in ("model.visual", "visual"):
            module.requires_grad_(False)
    report = setup_lp_lora_style(model, 0.5)
    assert report.embeddings_frozen
    model.train()
    ids = torch.randint(3, 200, (2, 9))
    model(input_ids=ids, labels=ids).loss.backward()
    without = {name for name, p in model.named_parameters() if p.requires_grad and p.grad is None}
    assert not without


def test_adapters_that_come_after_the_freezing_keep_their_base_frozen():
    model = text_model(layers=LAYERS)
    setup_lp_lora_style(model, 0.5)
    model = peft.get_peft_model(model, lora())
    setup_lp_lora_style(model, 0.25)
    assert all("lora" in name for name, p in model.named_parameters() if p.requires_grad)
    unfreeze(model)
    assert all("lora" in name for name, p in model.named_parameters() if p.requires_grad)


def test_the_state_of_random_numbers_stays():
    model = adapted()
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    setup_lp_lora_style(model, 0.5)
    assert torch.equal(torch.rand(3), expected)


def test_resuming_a_checkpoint(tmp_path):
    """The adapter of a frozen model is loaded into a frozen model, and training goes on as if it had not stopped."""

    def train(steps, **options):
        torch.manual_seed(0)
        made = trainer("sft", tmp_path, text_model(layers=LAYERS), trainer_options={"peft_config": lora()}, **options)
        made.args.max_steps = steps
        setup_lp_lora_style(made.model, 0.5)
        return made

    straight = train(4)
    straight.train()
    first = train(4, save_strategy="steps", save_steps=2)
    first.train()
    second = train(4)
    second.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    for (name, one), (_, other) in zip(straight.model.named_parameters(), second.model.named_parameters(), strict=True):
        torch.testing.assert_close(one, other, msg=name)


def test_a_report_is_a_value():
    report = setup_lp_lora_style(adapted(), 0.5)
    assert isinstance(report, FreezeReport)
    assert report.exclude_modules == r"(.*\.)?model\.layers\.(0|1)\..*"
    assert "undo" not in repr(report)


def test_a_search_on_one_base_begins_each_trial_anew(tmp_path):
    """Unloaded, and given another adapter: nothing of the first comes back with the second freezing."""
    base = text_model(layers=LAYERS)
    first = peft.get_peft_model(base, lora(r=4, lora_alpha=64))
    setup_lp_lora_style(first, 0.75)
    base = first.unload()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Already found a `peft_config`")  # PEFT 0.18 leaves it on the base
        second = peft.get_peft_model(base, lora(r=8, lora_alpha=4, target_modules=["q_proj"]))
    setup_lp_lora_style(second, 0.25)
    assert second.peft_config["default"].lora_alpha == 4
    adapted = [name for name, _ in second.named_parameters() if "lora_A" in name]
    assert len(adapted) == 3
    assert all("q_proj" in name for name in adapted)
    for name, parameter in second.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_()
    second.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(text_model(layers=LAYERS), tmp_path / "adapter")
    ids = torch.randint(3, 200, (2, 9))
    torch.testing.assert_close(again.eval()(ids).logits, second.eval()(ids).logits)


@pytest.mark.parametrize("how", ["merge_and_unload", "unload"])
def test_undone_after_the_adapters_are_gone(how):
    model = adapted()
    report = setup_lp_lora_style(model, 0.5)
    plain = getattr(model, how)()
    unfreeze(plain)
    report.undo()
    assert not any("lora" in name or "base_layer" in name for name, _ in plain.named_modules())
    assert truncated_layers(plain) == 0


def test_a_little_training_is_training():
    model = peft.get_peft_model(
        text_model(layers=LAYERS),
        peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
    )
    for name, parameter in model.named_parameters():
        if "ia3_l" in name and ".layers.0." in name:
            parameter.data += 0.004
    with pytest.raises(ConflictError, match="is not as it begins"):
        setup_lp_lora_style(model, 0.5)


@pytest.mark.parametrize(
    ("arguments", "frozen"),
    [
        ({"freeze_ratio": np.float32(0.5)}, (0, 1)),
        ({"frozen_layers": np.int64(3)}, (0, 1, 2)),
        ({"frozen_layers": np.arange(2)}, (0, 1)),
    ],
)
def test_numbers_of_numpy(arguments, frozen):
    assert setup_lp_lora_style(adapted(), **arguments).frozen_layers == frozen


def test_a_classifiers_head_is_no_tower():
    config = text_model(layers=LAYERS).config
    config.num_labels, config.pad_token_id = 2, 0
    model = transformers.LlamaForSequenceClassification(config)
    setup_lp_lora_style(model, 0.5)
    ids = torch.randint(3, 200, (2, 9))
    model.train()(input_ids=ids, labels=torch.tensor([0, 1])).loss.backward()
    assert model.score.weight.grad is not None
