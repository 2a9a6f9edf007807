"""A run with a cache learns what it learns without; nothing stale is served, and what cannot be served is refused."""

from __future__ import annotations

import copy
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
    assert runs.lowest == 2  # what is read is held against the layers once in training, and once in evaluation
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
    # The states are stored as they were computed; batches of other lengths round otherwise.
    assert losses(made) == pytest.approx(losses(without), abs=2e-4)
    assert cache.hits > 0
    cache.detach()


def test_states_in_fewer_bits(tmp_path):
    without = make("sft", tmp_path)
    without.train()
    made = make("sft", tmp_path)
    cache = PrefixCache(tmp_path / "cache", dtype=torch.bfloat16).attach(made)
    made.train()
    assert losses(made) == pytest.approx(losses(without), abs=2e-4)
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
    expected = model(
        input_ids=ids, attention_mask=mask, use_cache=False
    ).logits  # nothing is stored yet: two rows are, now
    cache.clear()
    model(input_ids=ids[1:3], attention_mask=mask[1:3], use_cache=False)
    model(input_ids=ids[1:3], attention_mask=mask[1:3], use_cache=False)
    sizes.clear()
    found = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    assert sizes == [2]
    torch.testing.assert_close(found[mask.bool()], expected[mask.bool()])
    assert truncation_of(model).shortcut.served == pytest.approx(18 / 32)
    sizes.clear()
    torch.testing.assert_close(
        model(input_ids=ids, attention_mask=mask, use_cache=False).logits[mask.bool()], expected[mask.bool()]
    )
    assert sizes == []
    cache.detach()


def test_other_weights_are_other_keys(tmp_path):
    made = make("plain", tmp_path)
    cache = PrefixCache(tmp_path / "cache").attach(made)
    ids = torch.randint(3, 200, (2, 9))
    model = made.model.eval()
    for _ in range(3):
        model(input_ids=ids, use_cache=False)
    with torch.no_grad():
        unwrap(model).model.layers[1].mlp.up_proj.weight[0, 0] += 1
    served = model(input_ids=ids, use_cache=False).logits
    cache.detach()
    torch.testing.assert_close(served, model(input_ids=ids, use_cache=False).logits)


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
    with pytest.warns(ForgeWarning, match="The PrefixCache was detached"):
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
        model(input_ids=ids, use_cache=False)
    model.to(torch.bfloat16)
    served = [model(input_ids=ids, use_cache=False).logits for _ in range(3)]
    cache.detach()
    for logits in served:
        assert logits.dtype == torch.bfloat16
        torch.testing.assert_close(logits, model(input_ids=ids, use_cache=False).logits)


def test_generation_is_left_alone(tmp_path):
    made = make("plain", tmp_path)
    model = made.model.eval()
    ids = torch.randint(3, 200, (2, 9))
    expected = model.generate(input_ids=ids, max_new_tokens=5, do_sample=False)
    cache = PrefixCache(tmp_path / "cache").attach(made)
    for _ in range(3):
        model(input_ids=ids, use_cache=False)
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
    model(input_ids=ids, use_cache=False)
    weight = unwrap(model).model.layers[1].mlp.down_proj.weight
    weight.data.mul_(3)  # .data leaves no trace that torch would count
    with pytest.raises(ConflictError, match="off what the frozen layers compute"):
        model(input_ids=ids, use_cache=False)
    cache.detach()


def leak(model, share):
    """Let the highest layer read something of the lowest beside the hidden states."""
    layers, kept = decoder_layers(model), {}
    layers[0].mlp.register_forward_hook(lambda _, args, out: kept.update(states=out))
    layers[3].register_forward_pre_hook(
        lambda _, args: (args[0] + share * kept.pop("states", torch.zeros_like(args[0])), *args[1:])
    )


def test_layers_that_read_more_than_hidden_states_are_found(tmp_path):
    made = make("plain", tmp_path)
    leak(made.model, 1.0)
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
    offload = Offload(layers, move=lambda layer, device: moved.append((layers.index(layer), str(device))))
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
    watch._offload._home = torch.device("meta")

    def move(layer, device):
        events.append((made.state.global_step, str(device)))
        for module in layer.modules():  # as bitsandbytes does: other objects with the same values
            for name, parameter in list(module._parameters.items()):
                if parameter is not None:
                    module._parameters[name] = torch.nn.Parameter(parameter.detach().clone(), requires_grad=False)

    watch._offload._move = move
    made.train()
    assert cache.misses == 8  # nothing was taken for changed
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


def test_a_copy_of_the_model_has_no_cache(tmp_path):
    made = make("plain", tmp_path)
    cache = PrefixCache(tmp_path / "cache").attach(made)
    made.train()
    ids = torch.randint(3, 200, (2, 9))
    again = copy.deepcopy(made.model).eval()
    hits = cache.hits
    torch.testing.assert_close(again(input_ids=ids).logits, made.model.eval()(input_ids=ids).logits)
    assert (cache.hits, truncation_of(again).shortcut) == (hits, None)
    cache.detach()


def test_adapters_below_the_boundary_are_refused(tmp_path):
    """Frozen ones too: their output is in no key."""
    other = peft.get_peft_model(text_model(layers=LAYERS), lora(init_lora_weights=False))
    other.save_pretrained(tmp_path / "other")
    made = make("plain", tmp_path)
    cache = PrefixCache(tmp_path / "cache").attach(made)
    made.train()
    made.model.load_adapter(tmp_path / "other", "other")
    made.model.set_adapter("other")
    made.model.requires_grad_(False)
    with pytest.raises(ConflictError, match="A frozen layer has got an adapter"):
        made.model.eval()(input_ids=torch.randint(3, 200, (2, 9)), use_cache=False)
    cache.detach()


def test_states_that_float16_cannot_hold(tmp_path):
    made = make("sft", tmp_path)
    unwrap(made.model).model.layers[1].mlp.down_proj.weight.data.mul_(1e8)
    cache = PrefixCache(tmp_path / "cache", dtype=torch.float16).attach(made)
    with pytest.raises(ConflictError, match=r"Hidden states reach .*float16 ends at 6\.55e\+04"):
        made.train()
    cache.detach()


def test_padding_with_labels_is_refused(tmp_path):
    from support.data import lm_tokens

    rows = lm_tokens(8).map(lambda row: {"labels": row["input_ids"]})
    made = make("plain", tmp_path, trainer_options={"train_dataset": rows})
    cache = PrefixCache(tmp_path / "cache").attach(made)
    with pytest.raises(ConflictError, match="Padding carries labels"):
        made.train()
    cache.detach()


def test_what_was_refused_is_refused_again(tmp_path):
    """Whoever runs the cell a second time must not train on what the first found wrong."""
    made = make("plain", tmp_path)
    model = made.model
    noise = lambda _, args, out: out + torch.randn_like(out) * (0.1 if model.training else 0)  # noqa: E731
    unwrap(model).model.embed_tokens.register_forward_hook(noise)
    cache = PrefixCache(tmp_path / "cache").attach(made)
    made.evaluate(made.train_dataset)
    for _ in range(2):
        with pytest.raises(ConflictError, match="off what the frozen layers compute"):
            made.train()
    cache.detach()


def test_layers_that_leak_are_refused_again(tmp_path):
    made = make("plain", tmp_path)
    leak(made.model, 0.05)
    cache = PrefixCache(tmp_path / "cache", max_gb=3_000 / 2**30).attach(made)
    for _ in range(2):
        with pytest.raises(UnsupportedError, match="read more of those below"), pytest.warns(match="cache is full"):
            made.train()
        cache._warned = False
    cache.detach()


def test_dropout_above_the_boundary_does_not_disturb_the_proof(tmp_path):
    made = make("plain", tmp_path, adapter=lora(target_modules=["q_proj"], lora_dropout=0.5))
    for name, parameter in made.model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_()
    cache = PrefixCache(tmp_path / "cache").attach(made)
    made.train()
    assert cache.hits > 0
    cache.detach()


def test_another_trainer_is_not_served(tmp_path):
    """Nobody asked whether its run may be: noise on the embeddings, say, comes with it."""
    first = make("plain", tmp_path)
    cache = PrefixCache(tmp_path / "cache").attach(first)
    first.train()
    counted = cache.hits, cache.misses
    second = trainer("plain", tmp_path, first.model, max_steps=2)
    second.train()
    assert (cache.hits, cache.misses) == counted
    cache.detach()


def test_keys_and_values_are_there_for_those_who_want_them(tmp_path):
    made = make("plain", tmp_path)
    cache = PrefixCache(tmp_path / "cache").attach(made)
    made.train()
    model, ids = made.model.eval(), torch.randint(3, 200, (1, 9))
    model.config.use_cache = True  # the Trainer has switched it off
    expected = model(input_ids=ids).logits[:, -1]
    begun = model(input_ids=ids[:, :-1])
    found = model(input_ids=ids[:, -1:], past_key_values=begun.past_key_values).logits[:, -1]
    torch.testing.assert_close(found, expected)
    cache.detach()


def test_code_that_checkpoints_around_the_layers_is_refused(tmp_path):
    from torch.utils.checkpoint import checkpoint

    made = make("plain", tmp_path)
    layers = decoder_layers(made.model)
    boundary = layers[2]

    class Around(torch.nn.Module):
        def forward(self, hidden, **kwargs):
            return checkpoint(boundary, hidden, use_reentrant=False, **kwargs) if self.training else boundary(hidden)

    cache = PrefixCache(tmp_path / "cache").attach(made)
    layers[2] = Around()
    layers[2].train()
    with pytest.raises(UnsupportedError, match="checkpoints around the call"):
        made.train()
    layers[2] = boundary
    cache.detach()


def test_the_count_goes_on_when_the_weights_change(tmp_path):
    made = make("plain", tmp_path)
    cache = PrefixCache(tmp_path / "cache").attach(made)
    made.train()
    hits, misses = cache.hits, cache.misses
    assert hits + misses == 24
    with torch.no_grad():
        unwrap(made.model).model.layers[0].mlp.up_proj.weight.mul_(1.5)
    made.train()
    assert cache.hits + cache.misses == 48
    assert cache.misses > misses
    assert all(0 <= e.get("prefix_cache_hit_share", 0) <= 1 for e in made.state.log_history)
    cache.detach()


def test_clear_deletes_what_earlier_runs_stored(tmp_path):
    made = make("plain", tmp_path)
    cache = PrefixCache(tmp_path / "cache").attach(made)
    made.train()
    cache.detach()
    cache = PrefixCache(tmp_path / "cache").attach(made)
    cache.clear()
    assert list((tmp_path / "cache").iterdir()) == []
    made.train()
    assert cache.misses > 0
    cache.detach()


def test_a_batch_of_padding(tmp_path):
    made = make("plain", tmp_path)
    cache = PrefixCache(tmp_path / "cache").attach(made)
    model, ids = made.model.eval(), torch.randint(3, 200, (2, 9))
    for mask in (torch.ones_like(ids), torch.zeros_like(ids), torch.ones_like(ids)):
        model(input_ids=ids, attention_mask=mask, use_cache=False)
    cache.detach()


def test_what_longrope_makes_of_the_longest_row_is_in_the_key():
    from types import SimpleNamespace

    from forge.freezing.cache.calls import scaled_positions

    def config(kind):
        rope = {"rope_type": kind, "original_max_position_embeddings": 16}
        return SimpleNamespace(rope_parameters=rope, max_position_embeddings=64)

    assert scaled_positions(config("longrope"), 16) == scaled_positions(config("default"), 32) == b""
    assert scaled_positions(config("longrope"), 17) == b"long"
    with pytest.raises(UnsupportedError, match="Rows of 17 tokens are longer than 16"):
        scaled_positions(config("dynamic"), 17)
    real = text_model().config
    assert scaled_positions(real, 10_000) == b""


@pytest.mark.parametrize(("path", "message"), [(3, "path=3"), ("/proc/nope", "cannot be made")])
def test_paths_that_are_none(tmp_path, path, message):
    made = make("plain", tmp_path)
    with pytest.raises(ForgeError, match=message):
        PrefixCache(path).attach(made)
    (tmp_path / "file").write_text("")
    with pytest.raises(ForgeError, match="cannot be made"):
        PrefixCache(tmp_path / "file").attach(made)
    with pytest.raises(ForgeError, match="takes a Trainer"):
        PrefixCache(tmp_path / "cache").attach(made.model)


def test_offloaded_weights_come_back_for_whoever_needs_them(tmp_path):
    made = make("sft", tmp_path)
    cache = PrefixCache(tmp_path / "cache", offload_prefix=True).attach(made)
    watch = next(c for c in made.callback_handler.callbacks if type(c).__name__ == "CacheWatch")
    events = []
    watch._offload = Offload(
        list(decoder_layers(made.model))[:2], move=lambda layer, device: events.append(str(device))
    )
    watch._offload._home = torch.device("meta")
    watch._offload.leave()
    made.model.eval().generate(input_ids=torch.randint(3, 200, (1, 5)), max_new_tokens=2, do_sample=False)
    assert events == ["cpu", "cpu", "meta", "meta"]
    cache.detach()
