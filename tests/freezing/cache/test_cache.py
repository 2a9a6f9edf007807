"""A run with a cache learns what it learns without; nothing stale is served, and what cannot be served is refused."""

from __future__ import annotations

import logging

import peft
import pytest
import torch
import trl
from transformers import TrainerCallback

from forge.errors import ConflictError, ForgeError, ForgeWarning, UnsupportedError
from forge.freezing import PrefixCache, setup_lp_lora_style
from forge.freezing.cache.offload import Offload
from forge.models.layers import decoder_layers, unwrap
from forge.models.truncation import truncation_of
from support.models import checkpointing, lora, nf4_model, text_model, trainer

LAYERS = 4


class Runs(TrainerCallback):
    """Counts how often the lowest layer's own computation ran, and how often the lowest trained one's."""

    def __init__(self, model):
        self.lowest = self.trained = 0
        layers = decoder_layers(model)
        next(layers[0].children()).register_forward_pre_hook(self._on_lowest)
        next(layers[2].children()).register_forward_pre_hook(self._on_trained)

    def _on_lowest(self, *_):
        self.lowest += 1

    def _on_trained(self, *_):
        self.trained += 1


def make(kind, folder, family="llama", *, adapter=None, model=None, **args):
    """A trainer of three epochs over eight rows, with the lower half frozen."""
    torch.manual_seed(0)
    model = text_model(family, layers=LAYERS) if model is None else model
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    targets = ["q_proj", "v_proj", "c_attn", "query_key_value", "qkv_proj"]
    config = adapter or lora(target_modules=targets, lora_dropout=0.1, fan_in_fan_out=family == "gpt2")
    options = dict(args.pop("trainer_options", {}))
    if kind == "plain":
        model = peft.get_peft_model(model, config)
    else:
        options["peft_config"] = config
    args = {"max_steps": -1, "num_train_epochs": 3, "rows": 8, **args}
    made = trainer(kind, folder, model, trainer_options=options, **args)
    setup_lp_lora_style(made.model, 0.5)
    return made


def losses(made):
    return [entry["loss"] for entry in made.state.log_history if "loss" in entry]


def assert_same_run(with_cache, without):
    assert losses(with_cache) == pytest.approx(losses(without), abs=1e-6)
    for (name, one), (_, other) in zip(
        with_cache.model.named_parameters(), without.model.named_parameters(), strict=True
    ):
        torch.testing.assert_close(one, other, msg=name)


@pytest.mark.parametrize("kind", ["plain", "sft", "dpo"])
@pytest.mark.parametrize("how", ["off", "reentrant"])
def test_the_same_run_in_every_trainer(tmp_path, kind, how):
    args = checkpointing(how != "off", use_reentrant=how == "reentrant")
    without = make(kind, tmp_path, **args)
    without.train()
    made = make(kind, tmp_path, **args)
    cache = PrefixCache(tmp_path / "cache").attach(made)
    runs = Runs(made.model)
    made.train()
    assert_same_run(made, without)
    assert cache.hits > 0
    assert runs.lowest < runs.trained
    cache.detach()


@pytest.mark.parametrize("family", ["qwen3", "gemma3", "phi3", "gpt2", "falcon_7b", "falcon_40b", "gpt_neox"])
def test_every_family(tmp_path, family):
    without = make("plain", tmp_path, family)
    without.train()
    made = make("plain", tmp_path, family)
    cache = PrefixCache(tmp_path / "cache").attach(made)
    made.train()
    assert_same_run(made, without)
    assert cache.hits > 0
    cache.detach()


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_experts_without_the_auxiliary_loss(tmp_path, family):
    adapter = lora(target_modules=["q_proj"])  # for both models: freezing the first must not change it
    off = {"router_aux_loss_coef": 0.0} if "router_aux_loss_coef" in trl.SFTConfig.__dataclass_fields__ else {}
    without = make("sft", tmp_path, family, adapter=adapter, **off)
    without.train()
    made = make("sft", tmp_path, family, adapter=adapter, **off)
    cache = PrefixCache(tmp_path / "cache").attach(made)
    made.train()
    assert_same_run(made, without)
    cache.detach()


def test_the_prefix_runs_for_one_epoch_alone(tmp_path):
    made = make("sft", tmp_path, rows=8, per_device_train_batch_size=2)
    cache = PrefixCache(tmp_path / "cache").attach(made)
    runs = Runs(made.model)
    made.train()
    steps = 12
    # Once more in the second epoch, where what was read is held against what the layers compute.
    assert runs.lowest == 4 + 1
    assert runs.trained == steps + 1  # and once more in the first, to see that a pass without the prefix is the same
    assert cache.num_samples == len({tuple(row["input_ids"]) for row in made.train_dataset})
    shares = [entry["prefix_cache_hit_share"] for entry in made.state.log_history if "prefix_cache_hit_share" in entry]
    assert shares[-1] == 1.0
    cache.detach()


def test_a_later_run_reads_what_an_earlier_one_stored(tmp_path):
    first = make("sft", tmp_path, num_train_epochs=2)
    cache = PrefixCache(tmp_path / "cache").attach(first)
    first.train()
    cache.detach()
    second = make("sft", tmp_path, num_train_epochs=2, learning_rate=5e-3)
    cache = PrefixCache(tmp_path / "cache").attach(second)
    runs = Runs(second.model)
    second.train()
    assert cache.misses == 0
    assert runs.lowest == 1
    cache.detach()


def test_accumulation_evaluation_and_resuming(tmp_path):
    """Two runs, one of them stopped after a checkpoint and resumed, both with evaluation and accumulation."""
    from support.data import sft_messages

    def prepared(**args):
        options = {"eval_dataset": sft_messages(6, seed=1)}
        return make(
            "sft",
            tmp_path / "out",
            trainer_options=options,
            gradient_accumulation_steps=2,
            eval_strategy="epoch",
            **args,
        )

    without = prepared()
    without.train()
    first = prepared(save_strategy="epoch")
    with_cache = PrefixCache(tmp_path / "cache").attach(first)
    first.train()
    with_cache.detach()
    assert_same_run(first, without)
    evaluated = [[e["eval_loss"] for e in t.state.log_history if "eval_loss" in e] for t in (first, without)]
    assert evaluated[0] == pytest.approx(evaluated[1], abs=1e-6)
    resumed = prepared()
    cache = PrefixCache(tmp_path / "cache").attach(resumed)
    runs = Runs(resumed.model)
    resumed.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
    assert_same_run(resumed, without)
    assert cache.misses == 0
    assert runs.lowest == 1
    cache.detach()


def test_evaluation_is_read_too(tmp_path):
    made = make("sft", tmp_path)
    cache = PrefixCache(tmp_path / "cache").attach(made)
    first = made.evaluate(made.train_dataset)["eval_loss"]
    misses = cache.misses
    made.evaluate(made.train_dataset)
    assert cache.misses == misses
    cache.detach()
    assert made.evaluate(made.train_dataset)["eval_loss"] == pytest.approx(first, abs=1e-6)


@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_bf16_autocast(tmp_path, kind):
    without = make(kind, tmp_path, bf16=True)
    without.train()
    made = make(kind, tmp_path, bf16=True)
    cache = PrefixCache(tmp_path / "cache").attach(made)
    made.train()
    assert losses(made) == pytest.approx(losses(without), rel=1e-2)
    assert cache.hits > 0
    cache.detach()


def test_states_in_fewer_bits(tmp_path):
    without = make("sft", tmp_path)
    without.train()
    made = make("sft", tmp_path)
    cache = PrefixCache(tmp_path / "cache", dtype=torch.bfloat16).attach(made)
    made.train()
    assert losses(made) == pytest.approx(losses(without), rel=1e-2)
    assert losses(made) != losses(without)
    half = cache.nbytes
    cache.detach()
    whole = PrefixCache(tmp_path / "cache").attach(made)
    made.evaluate(made.train_dataset)
    assert whole.nbytes > 1.5 * half
    whole.detach()


def test_nf4(tmp_path):
    def run(cached):
        made = make("sft", tmp_path, model=nf4_model(tmp_path / "nf4", layers=LAYERS))
        cache = PrefixCache(tmp_path / "cache").attach(made) if cached else None
        made.train()
        if cache is not None:
            assert cache.hits > 0
            cache.detach()
        return made

    assert_same_run(run(True), run(False))


@pytest.mark.parametrize("padding_free", [False, True])
def test_packed_rows_are_kept_by_document(tmp_path, padding_free):
    args = {"padding_free": True, "max_length": None} if padding_free else {"packing": True}
    args |= {"per_device_train_batch_size": 4 if padding_free else 1}
    without = make("sft", tmp_path, **args)
    without.train()
    made = make("sft", tmp_path, **args)
    cache = PrefixCache(tmp_path / "cache").attach(made)
    made.train()
    assert_same_run(made, without)
    assert cache.hits > 0
    assert cache.num_samples > 1
    cache.detach()


def test_packed_rows_that_see_each_other_are_refused(tmp_path):
    from transformers import DataCollatorWithFlattening

    from support.data import sft_text
    from support.tokenizer import tiny_tokenizer

    tokenizer = tiny_tokenizer()
    rows = sft_text(8).map(lambda row: {"input_ids": tokenizer(row["text"])["input_ids"]}, remove_columns=["text"])
    options = {"train_dataset": rows, "data_collator": DataCollatorWithFlattening()}
    made = make("plain", tmp_path, trainer_options=options)
    made.model.config.use_cache = True
    cache = PrefixCache(tmp_path / "cache").attach(made)
    with pytest.raises(ConflictError, match="use_cache is on"):
        made.train()
    made.model.config.use_cache = False
    made.train()
    assert cache.hits > 0
    cache.detach()


def test_over_max_gb_what_fits_is_cached(tmp_path):
    without = make("sft", tmp_path, per_device_train_batch_size=4)
    without.train()
    made = make("sft", tmp_path, per_device_train_batch_size=4)
    cache = PrefixCache(tmp_path / "cache", max_gb=20_000 / 2**30).attach(made)
    runs = Runs(made.model)
    with pytest.warns(ForgeWarning, match="prefix cache is full with . samples"):
        made.train()
    assert_same_run(made, without)
    assert 0 < cache.num_samples < 8
    assert cache.nbytes <= 20_000
    assert cache.hits > 0
    assert runs.lowest == 6  # in each step some row is missing, and only such rows are run
    cache.detach()


def test_only_the_rows_that_are_missing_are_run(tmp_path):
    made = make("plain", tmp_path)
    cache = PrefixCache(tmp_path / "cache").attach(made)
    model = made.model.eval()
    sizes = []
    next(decoder_layers(model)[1].children()).register_forward_pre_hook(
        lambda _, args, kwargs: sizes.append(len((*args, *kwargs.values())[0])), with_kwargs=True
    )
    ids = torch.randint(3, 200, (4, 9))
    mask = torch.ones_like(ids)
    mask[3, 5:] = 0
    expected = model(input_ids=ids, attention_mask=mask).logits  # nothing is stored yet: two rows are, now
    cache.clear()
    model(input_ids=ids[1:3], attention_mask=mask[1:3])
    model(input_ids=ids[1:3], attention_mask=mask[1:3])
    sizes.clear()
    found = model(input_ids=ids, attention_mask=mask).logits
    assert sizes == [2]
    torch.testing.assert_close(found[mask.bool()], expected[mask.bool()])
    assert truncation_of(model).shortcut.served == pytest.approx(18 / 32)
    sizes.clear()
    torch.testing.assert_close(model(input_ids=ids, attention_mask=mask).logits[mask.bool()], expected[mask.bool()])
    assert sizes == []
    cache.detach()


def test_other_weights_are_other_keys(tmp_path):
    made = make("plain", tmp_path)
    cache = PrefixCache(tmp_path / "cache").attach(made)
    ids = torch.randint(3, 200, (2, 9))
    model = made.model.eval()
    for _ in range(3):
        model(input_ids=ids)
    with torch.no_grad():
        unwrap(model).model.layers[1].mlp.up_proj.weight[0, 0] += 1
    served = model(input_ids=ids).logits
    cache.detach()
    torch.testing.assert_close(served, model(input_ids=ids).logits)


def test_another_boundary_is_another_key(tmp_path):
    made = make("plain", tmp_path)
    with_two = PrefixCache(tmp_path / "cache").attach(made)
    made.evaluate(made.train_dataset)
    with_two.detach()
    setup_lp_lora_style(made.model, 0.25)
    with_one = PrefixCache(tmp_path / "cache").attach(made)
    made.evaluate(made.train_dataset)
    assert with_one.misses > 0
    with_one.detach()


def test_freezing_anew_detaches_it(tmp_path):
    made = make("plain", tmp_path)
    cache = PrefixCache(tmp_path / "cache").attach(made)
    made.evaluate(made.train_dataset)
    setup_lp_lora_style(made.model, 0.25)
    assert repr(cache).endswith("not attached)")
    misses = cache.misses
    made.evaluate(made.train_dataset)
    assert cache.misses == misses
    cache.attach(made).detach()


def test_weights_of_another_dtype_are_other_keys(tmp_path):
    """As with bf16_full_eval, for which the Trainer casts the model in place."""
    made = make("plain", tmp_path)
    cache = PrefixCache(tmp_path / "cache").attach(made)
    ids = torch.randint(3, 200, (2, 9))
    model = made.model.eval()
    for _ in range(3):
        model(input_ids=ids)
    model.to(torch.bfloat16)
    served = [model(input_ids=ids).logits for _ in range(3)]
    cache.detach()
    for logits in served:
        assert logits.dtype == torch.bfloat16
        torch.testing.assert_close(logits, model(input_ids=ids).logits)


def test_generation_is_left_alone(tmp_path):
    made = make("plain", tmp_path)
    model = made.model.eval()
    ids = torch.randint(3, 200, (2, 9))
    expected = model.generate(input_ids=ids, max_new_tokens=5, do_sample=False)
    cache = PrefixCache(tmp_path / "cache").attach(made)
    for _ in range(3):
        model(input_ids=ids)
    assert torch.equal(model.generate(input_ids=ids, max_new_tokens=5, do_sample=False), expected)
    states = model(input_ids=ids, output_hidden_states=True).hidden_states
    assert not torch.equal(states[0], states[2])
    cache.detach()


def test_a_wrong_state_is_found_before_it_is_used(tmp_path):
    """Whatever the key does not know of: what is read is held against the layers when it is first used."""
    made = make("plain", tmp_path)
    cache = PrefixCache(tmp_path / "cache").attach(made)
    model = made.model.eval()
    ids = torch.randint(3, 200, (2, 9))
    model(input_ids=ids)
    weight = unwrap(model).model.layers[1].mlp.down_proj.weight
    weight.data.mul_(3)  # .data leaves no trace that torch would count
    with pytest.raises(ConflictError, match="off what the frozen layers compute"):
        model(input_ids=ids)
    cache.detach()


def test_layers_that_read_more_than_hidden_states_are_found(tmp_path):
    made = make("plain", tmp_path)
    layers = decoder_layers(made.model)
    leak = {}
    layers[0].mlp.register_forward_hook(lambda _, args, out: leak.update(states=out))
    layers[3].register_forward_pre_hook(
        lambda _, args: (args[0] + leak.pop("states", torch.zeros_like(args[0])), *args[1:])
    )
    cache = PrefixCache(tmp_path / "cache").attach(made)
    with pytest.raises(UnsupportedError, match="read more of those below than their hidden states"):
        made.train()
    cache.detach()


def refused(**changes):
    return lambda folder: make("sft", folder, **changes)


def no_freezing(folder):
    return trainer("plain", folder, peft.get_peft_model(text_model(layers=LAYERS), lora()))


def with_dropout(folder):
    torch.manual_seed(0)
    model = peft.get_peft_model(text_model("gpt2", layers=LAYERS), lora(target_modules=["c_attn"], fan_in_fan_out=True))
    setup_lp_lora_style(model, 0.5)
    return trainer("plain", folder, model)


def with_attention_dropout(folder):
    model = text_model(layers=LAYERS)
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.1
    model = peft.get_peft_model(model, lora())
    setup_lp_lora_style(model, 0.5)
    return trainer("plain", folder, model)


def with_images(folder):
    model = text_model("llava", layers=LAYERS)
    model.model.vision_tower.requires_grad_(False)
    model.model.multi_modal_projector.requires_grad_(False)
    setup_lp_lora_style(model, 0.5)
    return trainer("plain", folder, model)


def with_router(folder):
    made = make("sft", folder, "mixtral", adapter=lora(target_modules=["q_proj"]))
    made.model.config.output_router_logits = True  # TRL 1.0 does not do it by itself
    return made


REFUSED = {
    "nothing-frozen": (no_freezing, ConflictError, "setup_lp_lora_style"),
    "dropout": (with_dropout, ConflictError, r"Dropout\(p=0\.1"),
    "attention-dropout": (with_attention_dropout, ConflictError, r"attention_dropout=0\.1"),
    "images": (with_images, UnsupportedError, "embeddings of images"),
    "router": (with_router, ConflictError, r"router_aux_loss_coef=0\.0"),
    "noise": (refused(neftune_noise_alpha=5.0), ConflictError, "neftune_noise_alpha"),
    "compiled": (refused(torch_compile=True), UnsupportedError, "torch_compile"),
}


@pytest.mark.parametrize("which", REFUSED)
def test_what_cannot_be_served_is_refused(which, tmp_path):
    prepare, error, message = REFUSED[which]
    made = prepare(tmp_path)
    cache = PrefixCache(tmp_path / "cache")
    with pytest.raises(error, match=message):
        cache.attach(made)
    assert not (tmp_path / "cache").exists()
    truncation = truncation_of(made.model)
    assert truncation is None or truncation.shortcut is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_gb": 0}, "max_gb=0"),
        ({"max_gb": float("inf")}, "max_gb=inf"),
        ({"max_gb": "20"}, "max_gb='20'"),
        ({"dtype": "bf16"}, "dtype='bf16'"),
        ({"dtype": torch.int8}, r"dtype=torch\.int8"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ForgeError, match=message):
        PrefixCache(**options)


def test_attached_twice(tmp_path):
    made = make("plain", tmp_path)
    cache = PrefixCache(tmp_path / "cache").attach(made)
    with pytest.raises(ForgeError, match="attached already"):
        cache.attach(made)
    with pytest.raises(ForgeError, match="has a PrefixCache already"):
        PrefixCache(tmp_path / "other").attach(made)
    cache.detach()
    cache.detach()
    cache.attach(made).detach()
    assert not any(hooks for m in made.model.modules() for hooks in (m._forward_hooks, m._forward_pre_hooks))
    assert [type(callback).__name__ for callback in made.callback_handler.callbacks].count("CacheWatch") == 0


def test_how_large_it_will_be(tmp_path):
    made = make("sft", tmp_path)
    size = PrefixCache(tmp_path / "nowhere" / "cache", max_gb=1).estimate(made.model, made.train_dataset)
    tokens = sum(len(row["input_ids"]) for row in made.train_dataset)
    assert (size.tokens, size.bytes_per_token) == (tokens, 32 * 4)
    assert size.fits
    cache = PrefixCache(tmp_path / "cache", dtype=torch.bfloat16)
    assert cache.estimate(made.model, 1000).total_gb == 1000 * 64 / 2**30
    assert not (tmp_path / "nowhere").exists()
    with pytest.raises(ForgeError, match="has no token ids"):
        cache.estimate(made.model, [{"text": "a"}])
    with pytest.raises(ConflictError, match="No layer"):
        cache.estimate(text_model(), 10)


def test_how_large_it_will_be_for_preferences(tmp_path):
    made = make("dpo", tmp_path, num_train_epochs=1)
    size = PrefixCache(tmp_path / "cache").estimate(made.model, made.train_dataset)
    cache = PrefixCache(tmp_path / "cache").attach(made)
    made.train()
    stored = next(iter(cache._serving.values())).store
    assert size.tokens >= stored.num_tokens  # rows that are alike are stored once
    cache.detach()


def test_offload(caplog):
    moved = []
    layers = [torch.nn.Linear(1, 1, device="meta") for _ in range(2)]
    offload = Offload(layers, lambda layer, device: moved.append((layers.index(layer), str(device))))
    assert offload.possible
    offload.come_back()
    assert moved == []
    with caplog.at_level(logging.INFO):
        for _ in range(5):
            offload.leave()
            offload.leave()
            offload.come_back()
    assert moved == [(0, "cpu"), (1, "cpu"), (0, "meta"), (1, "meta")] * 3
    assert not offload.possible
    assert "came up 3 times" in caplog.text


def test_offload_when_an_epoch_is_stored(tmp_path):
    made = make("sft", tmp_path)
    cache = PrefixCache(tmp_path / "cache", offload_prefix=True).attach(made)
    events = []
    watch = next(c for c in made.callback_handler.callbacks if type(c).__name__ == "CacheWatch")
    watch._offload = Offload(list(decoder_layers(made.model))[:2], lambda layer, device: None)
    watch._offload._home = torch.device("meta")
    watch._offload._move = lambda layer, device: events.append((made.state.global_step, str(device)))
    made.train()
    # Stored in steps 1 to 4, held against the layers in 5, gone after 6 (the first that read), back at the end.
    assert next(event for event in events if event[1] == "cpu")[0] in (5, 6)
    assert events[-1] == (12, "meta")
    assert len(events) == 4
    cache.detach()


def test_offload_on_a_cpu_is_said(tmp_path):
    made = make("sft", tmp_path, num_train_epochs=1)
    cache = PrefixCache(tmp_path / "cache", offload_prefix=True).attach(made)
    with pytest.warns(ForgeWarning, match="nothing to offload from"):
        made.train()
    cache.detach()


def test_it_says_what_it_is(tmp_path):
    made = make("plain", tmp_path)
    cache = PrefixCache(tmp_path / "cache", max_gb=2)
    assert repr(cache) == "PrefixCache(max_gb=2, not attached)"
    cache.attach(made)
    assert repr(cache).startswith("PrefixCache(0 samples, 0.00 of 2 GiB")
    cache.detach()
