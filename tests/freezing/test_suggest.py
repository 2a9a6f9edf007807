"""The probe against plain backward passes, the rule against numbers made up for it, and the model before and after."""

import json
import math
from dataclasses import astuple
from itertools import islice, pairwise

import peft
import pytest
import torch
from torch.nn.functional import dropout

from forge.errors import ForgeError, NonFiniteError, UnsupportedError
from forge.freezing import setup_lp_lora_style
from forge.freezing.costs import step_costs
from forge.freezing.probe import MOST_BATCHES, Probed
from forge.freezing.suggest import _suggestion, ratio_of, suggest_freeze_ratio
from forge.models.flops import training_flops
from forge.models.layers import decoder_layers, unwrap
from forge.models.truncation import layers_in_ratio
from support.backward import BackwardProbe
from support.models import lora, nf4_model, text_model

FAMILIES = ["llama", "gpt2", "falcon_7b", "gemma3", "qwen3_moe"]


def make_batches(number=3, rows=3, length=10, seed=1):
    """Random tokens; the first row is padded on the right, the second on the left, and its first half not learnt."""
    generator = torch.Generator().manual_seed(seed)
    batches = []
    for _ in range(number):
        ids = torch.randint(3, 200, (rows, length), generator=generator)
        mask = torch.ones_like(ids)
        mask[0, length - 3 :] = 0
        labels = ids.masked_fill(mask == 0, -100)
        if rows > 1:
            mask[1, :2] = 0
            labels[1, : length // 2] = -100
        batches.append({"input_ids": ids, "attention_mask": mask, "labels": labels})
    return batches


def adapted(model, **changes):
    special = {
        "gpt2": {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True},
        "qwen3_moe": {"target_modules": ["q_proj", "o_proj"]},
        "deepseek_v3": {"target_modules": ["o_proj"]},
    }
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return peft.get_peft_model(model, lora(**special.get(model.config.model_type, {}), **changes))


def with_lora(model, **changes):
    """Adapters that have learnt something: with B away from 0, so that A has a gradient too."""
    wrapped = adapted(model, **changes)
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(len(name)))
    return wrapped


def by_hand(model, batches):
    """Per layer the gradient's sum of absolute values and its norm, from whole backward passes in evaluation."""
    model.eval()
    layers = decoder_layers(model)
    sums, squares = [0.0] * len(layers), [0.0] * len(layers)
    for batch in batches:
        model.zero_grad()
        model(**batch).loss.backward()
        for index, layer in enumerate(layers):
            gradients = [p.grad.double() for p in layer.parameters() if p.grad is not None]
            sums[index] += sum(g.abs().sum().item() for g in gradients) / len(batches)
            squares[index] += sum(g.square().sum().item() for g in gradients) / len(batches)
    model.zero_grad()
    return sums, [math.sqrt(square) for square in squares]


def sums_of(suggestion):
    return [layer.gradient_sum for layer in suggestion.layers]


def norms_of(suggestion):
    return [layer.gradient_norm for layer in suggestion.layers]


def damp(model, indices, factor=1e-3):
    """Make the adapters of some layers count for little, so that their gradients are small."""
    for index in indices:
        for module in decoder_layers(model)[index].modules():
            if isinstance(getattr(module, "scaling", None), dict):
                module.scaling = {name: factor * value for name, value in module.scaling.items()}


def make_identity(model, indices):
    for index in indices:
        layer = decoder_layers(model)[index]
        torch.nn.init.zeros_(layer.self_attn.o_proj.weight)
        torch.nn.init.zeros_(layer.mlp.down_proj.weight)


@pytest.mark.parametrize("method", ["full", "lora"])
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_those_of_plain_backward_passes(family, method):
    model, batches = text_model(family), make_batches()
    model = with_lora(model) if method == "lora" else model
    suggestion = suggest_freeze_ratio(model, batches)
    sums, norms = by_hand(model, batches)
    assert sums_of(suggestion) == pytest.approx(sums, rel=1e-4)
    assert norms_of(suggestion) == pytest.approx(norms, rel=1e-4)
    assert min(sums) > 0


def test_the_routers_loss_is_part_of_the_gradient():
    """It hangs on what the routers said inside layers that the probe checkpoints."""
    model, batches = text_model("qwen3_moe"), make_batches()
    without = sums_of(suggest_freeze_ratio(model, batches))
    model.config.output_router_logits, model.router_aux_loss_coef = True, 10.0
    found = sums_of(suggest_freeze_ratio(model, batches))
    assert found == pytest.approx(by_hand(model, batches)[0], rel=1e-4)
    assert found != pytest.approx(without, rel=0.05)


@pytest.mark.parametrize("family", FAMILIES)
def test_importance_is_block_influence_over_real_tokens(family):
    model, batches = text_model(family), make_batches(2)
    found = [layer.importance for layer in suggest_freeze_ratio(model, batches).layers]
    last = {}
    decoder_layers(model)[-1].register_forward_hook(
        lambda module, args, output: last.update(out=output[0] if isinstance(output, tuple) else output)
    )
    expected = [0.0] * 4
    for batch in batches:
        with torch.no_grad():
            states = model.eval()(**batch, output_hidden_states=True).hidden_states
        states = [*states[:4], last["out"]]  # the last one of `hidden_states` has passed the final norm
        real = [(row, place) for row in range(3) for place in range(10) if batch["attention_mask"][row, place]]
        for index in range(4):
            for row, place in real:
                before, after = (states[index + n][row, place].double() for n in (0, 1))
                cosine = (before @ after / before.norm() / after.norm()).item()
                expected[index] += (1 - cosine) / len(real) / len(batches)
    assert found == pytest.approx(expected, rel=1e-3, abs=1e-6)


def test_padding_changes_nothing():
    """More of it on the right; and what stands there."""
    model, [batch] = text_model(), make_batches(1)
    batch["labels"][1, :5] = -100
    longer = {
        name: torch.nn.functional.pad(tensor, (0, 4), value=fill)
        for (name, tensor), fill in zip(batch.items(), (7, 0, -100), strict=True)
    }
    one, other = suggest_freeze_ratio(model, [batch]), suggest_freeze_ratio(model, [longer])
    assert one.tokens == other.tokens == batch["attention_mask"].sum()
    assert sums_of(one) == pytest.approx(sums_of(other), rel=1e-3)
    assert [x.importance for x in one.layers] == pytest.approx([x.importance for x in other.layers], rel=1e-3)


def test_batches_are_averaged_and_their_order_does_not_matter():
    model, batches = text_model(), make_batches(3)
    together, turned = suggest_freeze_ratio(model, batches), suggest_freeze_ratio(model, batches[::-1])
    single = [suggest_freeze_ratio(model, [batch]) for batch in batches]
    for index in range(4):
        layer, alone = together.layers[index], [each.layers[index] for each in single]
        assert layer.gradient_sum == pytest.approx(sum(x.gradient_sum for x in alone) / 3)
        assert layer.gradient_norm**2 == pytest.approx(sum(x.gradient_norm**2 for x in alone) / 3)
        assert layer.importance == pytest.approx(sum(x.importance for x in alone) / 3)
        assert turned.layers[index].gradient_sum == pytest.approx(layer.gradient_sum)
        assert turned.boundaries[index].error == pytest.approx(together.boundaries[index].error)
    assert len({round(each.layers[0].gradient_sum, 3) for each in single}) == 3


def test_labels_that_are_missing_are_all_real_tokens():
    model, [batch] = text_model(), make_batches(1)
    batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    expected = sums_of(suggest_freeze_ratio(model, [batch]))
    for labels in ({}, {"labels": None}):
        without = {name: batch[name] for name in ("input_ids", "attention_mask")} | labels
        assert sums_of(suggest_freeze_ratio(model, [without])) == expected
        assert "labels" not in without or without["labels"] is None  # the caller's batch is his


def test_shares_add_up():
    suggestion = suggest_freeze_ratio(text_model(), make_batches())
    sums, norms = sums_of(suggestion), norms_of(suggestion)
    for boundary in suggestion.boundaries:
        k = boundary.frozen_layers
        assert boundary.gradient_share == pytest.approx(sum(sums[:k]) / sum(sums))
        assert boundary.squared_share == pytest.approx(sum(n**2 for n in norms[:k]) / sum(n**2 for n in norms))
        assert boundary.share == boundary.gradient_share
    assert [b.frozen_layers for b in suggestion.boundaries] == [0, 1, 2, 3]
    assert suggestion.boundaries[0].gradient_share == suggestion.boundaries[0].importance_share == 0


def test_layers_that_learn_little_may_go_and_others_not():
    batches = make_batches()
    low, high = with_lora(text_model()), with_lora(text_model())
    damp(low, [0, 1, 2])
    damp(high, [1, 2, 3])
    assert suggest_freeze_ratio(low, batches).frozen_layers == 3
    assert suggest_freeze_ratio(low, batches).freeze_ratio == 0.75
    assert suggest_freeze_ratio(high, batches).frozen_layers == 0


def test_a_model_in_which_nothing_trains_is_judged_by_importance():
    batches = make_batches()
    lower, upper = text_model().requires_grad_(False), text_model().requires_grad_(False)
    make_identity(lower, [0, 1, 2])
    make_identity(upper, [1, 2, 3])
    found = suggest_freeze_ratio(lower, batches)
    assert (found.frozen_layers, found.measure) == (3, "importance")
    assert [layer.importance for layer in found.layers[:3]] == pytest.approx([0, 0, 0], abs=1e-6)
    assert found.layers[0].gradient_sum is found.boundaries[1].squared_share is None
    assert "attach the adapters and probe again" in found.reason
    assert "SGD" not in str(found)
    assert suggest_freeze_ratio(upper, batches).frozen_layers == 0


def test_nf4(tmp_path):
    model, batches = nf4_model(tmp_path), make_batches(2)
    assert any(parameter.requires_grad for parameter in model.parameters())  # its norms, which no trainer trains alone
    bare = suggest_freeze_ratio(model, batches)
    assert bare.measure == "importance"
    assert bare.boundaries[2].cost.plain == pytest.approx(0.75, abs=0.05)  # as with adapters
    model = with_lora(model)
    suggestion = suggest_freeze_ratio(model, batches)
    assert suggestion.measure == "gradient"
    assert sums_of(suggestion) == pytest.approx(by_hand(model, batches)[0], rel=1e-4)


def test_fresh_adapters_have_the_gradient_of_their_second_matrix():
    model, batches = adapted(text_model()), make_batches()
    assert sums_of(suggest_freeze_ratio(model, batches)) == pytest.approx(by_hand(model, batches)[0], rel=1e-4)
    for name, parameter in model.named_parameters():
        if "lora_A" in name:
            parameter.requires_grad_(False)
    assert min(sums_of(suggest_freeze_ratio(model, batches))) > 0


def test_layers_that_are_frozen_already():
    model, batches = with_lora(text_model()), make_batches()
    decoder_layers(model)[:2].requires_grad_(False)
    found = suggest_freeze_ratio(model, batches)
    assert sums_of(found)[:2] == norms_of(found)[:2] == [0, 0]
    assert (found.already_frozen, found.frozen_layers) == (2, 2)
    assert "Layers 0-1 do not train as it is." in found.reason
    assert found.boundaries[1].cost.plain == found.boundaries[2].cost.plain == 1 > found.boundaries[3].cost.plain


@pytest.mark.parametrize("method", ["full", "lora"])
def test_what_is_suggested_is_what_gets_frozen(method):
    model, batches = text_model(), make_batches()
    model = adapted(model) if method == "lora" else model
    first = suggest_freeze_ratio(model, batches, tolerance=0.6)
    assert 0 < first.frozen_layers < 3
    assert len(setup_lp_lora_style(model, freeze_ratio=first.freeze_ratio).frozen_layers) == first.frozen_layers
    again = suggest_freeze_ratio(model, batches, tolerance=0)
    assert again.frozen_layers == again.already_frozen == first.frozen_layers
    upper = slice(first.frozen_layers, None)  # cutting backward off below changes nothing above
    assert sums_of(again)[upper] == pytest.approx(sums_of(first)[upper], rel=1e-4)


# The rule, its noise and its numbers


def probed(absolute, trains=None):
    depth = len(absolute[0])
    trains = trains or (True,) * depth
    squared = [[x * x for x in batch] for batch in absolute]
    return Probed(absolute, squared, [[1.0] * depth] * len(absolute), trains, tokens=99, row_length=8)


def decided(absolute, tolerance=0.25, **changes):
    return _suggestion(probed(absolute, **changes), [None] * len(absolute[0]), tolerance)


@pytest.mark.parametrize(
    ("layers", "tolerance", "frozen"),
    [
        ([1, 1, 1, 1], 0.25, 1),  # alike: the share itself
        ([1, 1, 1, 1], 0.24, 0),
        ([1, 1, 1, 1], 0.5, 2),
        ([0, 0, 0, 1], 0.0, 3),  # one always trains
        ([0, 1, 0, 0], 0.99, 1),
        ([3, 1, 0, 0], 0.7, 0),
        ([1], 0.9, 0),
    ],
)
def test_the_rule(layers, tolerance, frozen):
    suggestion = decided([layers] * 3, tolerance)
    assert suggestion.frozen_layers == frozen
    assert suggestion.freeze_ratio == ratio_of(frozen, len(layers))
    assert not suggestion.within_noise
    assert suggestion.plausible == (frozen, frozen)
    assert "no promise" in suggestion.reason


def test_the_only_layer_trains():
    assert decided([[1.0]] * 2, 0.9).reason.startswith("The only layer there is has to train.")


def test_noise_that_could_move_the_boundary_is_told():
    quiet = [[1.0, 1.0, 1.0, 1.0]] * 4
    noisy = [[1.8, 0.2, 1.0, 1.0], [0.2, 1.8, 1.0, 1.0]] * 2
    sure, unsure = decided(quiet, 0.26), decided(noisy, 0.26)
    assert sure.frozen_layers == unsure.frozen_layers == 1
    assert (sure.within_noise, sure.plausible) == (False, (1, 1))
    assert (unsure.within_noise, unsure.plausible) == (True, (0, 1))
    assert "Within noise: other batches could have said 0 to 1 layers." in unsure.reason
    assert "within noise" in repr(unsure)


def test_the_noise_of_one_batch_is_not_known():
    suggestion = decided([[1.0, 1.0]])
    assert suggestion.within_noise
    assert suggestion.plausible is suggestion.boundaries[1].error is None
    assert "Of one batch the noise is not known" in suggestion.reason


def test_the_error_is_the_spread_of_the_share_over_many_probes():
    torch.manual_seed(0)
    draws = 1 + 0.3 * torch.rand(400, 16, 3)
    draws *= 1 + torch.rand(400, 16, 1)  # a batch's level moves all its layers, and no share
    shares, errors = [], []
    for values in draws.tolist():
        boundary = decided(values).boundaries[1]
        shares.append(boundary.gradient_share)
        errors.append(boundary.error)
    assert sum(errors) / 400 == pytest.approx(torch.tensor(shares).std().item(), rel=0.1)


def test_a_share_comes_to_its_layers_however_it_is_rounded():
    for layers in (*range(1, 101), 126, 333):
        shares = [ratio_of(frozen, layers) for frozen in range(layers)]
        assert [int(share * layers) for share in shares] == list(range(layers))
        assert [layers_in_ratio(share, layers) for share in shares] == list(range(layers))
        assert shares == sorted(shares)
        assert 0 <= shares[0] <= shares[-1] < 1
        # what is printed is what may be typed
        assert all(len(f"{share:g}") <= 6 and float(f"{share:g}") == share for share in shares)
    assert [ratio_of(k, 32) for k in (0, 8, 16, 24)] == [0, 0.25, 0.5, 0.75]


@pytest.mark.parametrize("method", ["full", "lora"])
@pytest.mark.parametrize("family", [*FAMILIES, "qwen2", "deepseek_v3"])
def test_costs_are_the_flops_of_the_model_with_its_layers_frozen(family, method):
    def make(layers):
        return adapted(text_model(family, layers=layers)) if method == "lora" else text_model(family, layers=layers)

    model, length = make(4), 8192  # longer than gemma's window
    costs, whole = step_costs(model, length), training_flops(model).step(1, length)
    for frozen in range(4):
        for part in [unwrap(model).get_input_embeddings(), *decoder_layers(model)[:frozen]] if frozen else []:
            part.requires_grad_(False)
        if frozen and family == "gpt2":
            unwrap(model).transformer.wpe.requires_grad_(False)
        head = 2 * unwrap(model).get_output_embeddings().weight.numel()
        lower, upper = (training_flops(make(n)).forward(1, length) - head if n else 0 for n in (frozen, 4))
        step = training_flops(model).step(1, length)
        assert astuple(costs[frozen]) == pytest.approx(
            (
                step / whole,
                (step - lower) / whole,
                (step + upper - lower) / (whole + upper),
                (step + upper - 2 * lower) / (whole + upper),
            )
        )


def test_costs_of_a_model_in_which_nothing_trains_are_those_of_adapters():
    for one, other in zip(
        step_costs(text_model(), 48, as_adapted=True), step_costs(adapted(text_model(), r=1), 48), strict=True
    ):
        assert astuple(one) == pytest.approx(astuple(other), abs=0.05)


def test_a_model_whose_flops_cannot_be_counted_is_measured_all_the_same(monkeypatch):
    def refuse(*args, **options):
        raise UnsupportedError("experts")

    monkeypatch.setattr("forge.freezing.suggest.step_costs", refuse)
    suggestion = suggest_freeze_ratio(text_model(), make_batches())
    assert suggestion.boundaries[0].cost is None
    assert "PrefixCache" not in str(suggestion)


def test_what_is_printed(capsys):
    suggestion = suggest_freeze_ratio(with_lora(text_model()), make_batches())
    assert "\n" not in repr(suggestion)
    assert repr(suggestion).startswith(f"FreezeSuggestion(freeze_ratio={suggestion.freeze_ratio}, ")
    suggestion.print()
    printed = capsys.readouterr().out  # wrapped to the terminal
    assert "4 decoder layers, 3 batches, 75 tokens" in printed
    assert suggestion.reason in " ".join(printed.split())
    assert max(map(len, str(suggestion).splitlines()[1:6])) <= 80  # the rows, on any terminal
    for row in ("0 ", "0.25", "0.5", "0.75"):
        assert any(line.startswith(row) for line in printed.splitlines())
    told = json.loads(json.dumps(suggestion.to_dict()))
    assert told["freeze_ratio"] == suggestion.freeze_ratio
    assert told["layers"][2]["gradient_sum"] == suggestion.layers[2].gradient_sum
    assert told["boundaries"][3]["cost"]["checkpointed"] == suggestion.boundaries[3].cost.checkpointed


# What the probe leaves behind: nothing


def state(model):
    """All that a probe could have changed."""
    hooks = (
        "_forward_hooks",
        "_forward_pre_hooks",
        "_backward_hooks",
        "_backward_pre_hooks",
        "_forward_hooks_with_kwargs",
    )
    return {
        "values": {name: tensor.clone() for name, tensor in model.state_dict().items()},
        "trains": [p.requires_grad for p in model.parameters()],
        "gradients": [(p.grad, None if p.grad is None else p.grad.clone()) for p in model.parameters()],
        "parameters": [(id(p), p._version, dict(p._post_accumulate_grad_hooks or {})) for p in model.parameters()],
        "modules": [
            (module.training, type(module), sorted(vars(module)), [dict(vars(module)[name]) for name in hooks])
            for module in model.modules()
        ],
        "forward": [vars(module).get("forward") for module in model.modules()],
        "config": json.dumps(unwrap(model).config.to_dict(), default=str),
        "checkpointing": [getattr(module, "gradient_checkpointing", None) for module in model.modules()],
        "random": torch.get_rng_state(),
        "grad mode": torch.is_grad_enabled(),
    }


def same(one, other):
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


def assert_same(before, after):
    assert [name for name in before if not same(before[name], after[name])] == []


def void(_):
    return None


def prepared(kind):
    model = text_model()
    if kind == "full":
        model.config.attention_dropout = 0.3
    elif kind != "full":
        model = with_lora(model, lora_dropout=0.3)
        if kind != "lora":
            model.gradient_checkpointing_enable({"use_reentrant": kind == "reentrant"})
            model.enable_input_require_grads()
    model.train()
    decoder_layers(model)[1].eval()  # a mode of its own
    first = next(p for p in decoder_layers(model)[2].parameters() if p.requires_grad)
    first.grad = torch.ones_like(first)
    decoder_layers(model)[3].register_forward_hook(lambda *_: None)
    return model


KINDS = ["full", "lora", "checkpointing", "reentrant"]


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")
@pytest.mark.parametrize("kind", KINDS)
def test_the_model_is_left_as_it_was(kind):
    model = prepared(kind)
    reference = with_lora(text_model()) if kind != "full" else text_model()

    def drawing():  # as a loader that shuffles
        for batch in make_batches():
            torch.rand(1)
            yield batch

    before = state(model)
    found = suggest_freeze_ratio(model, drawing())
    assert_same(before, state(model))
    # neither the mode, nor dropout, nor checkpointing, nor hooks on the embeddings make a difference
    assert sums_of(found) == pytest.approx(by_hand(reference, make_batches())[0], rel=1e-4)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")
@pytest.mark.parametrize("where", ["loading", "forward", "backward"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_model_is_left_as_it_was_after_an_exception(kind, where):
    model, calls = prepared(kind), []

    def fail(*_):
        calls.append(where)
        if len(calls) == 2:
            torch.rand(1)
            raise KeyError("in the middle")

    def loading():
        yield from make_batches(1)
        torch.rand(1)
        raise KeyError("in the middle")

    if where == "forward":
        decoder_layers(model)[2].mlp.register_forward_hook(fail)
    elif where == "backward":
        decoder_layers(model)[1].register_forward_hook(lambda *seen: void(seen[2].register_hook(fail)))
    before = state(model)
    with pytest.raises(KeyError, match="in the middle"):
        suggest_freeze_ratio(model, loading() if where == "loading" else make_batches())
    assert_same(before, state(model))


def test_state_sees_a_change():
    """The digest above would notice."""
    for change in (
        lambda model: model.eval(),
        lambda model: model.zero_grad(),
        lambda model: model.model.norm.weight.data.add_(1),
        lambda model: model.model.norm.weight.requires_grad_(False),
        lambda model: model.model.layers[0].register_forward_hook(lambda *_: None),
        lambda model: model.model.norm.weight.register_post_accumulate_grad_hook(lambda p: None),
        lambda model: setattr(model.model.layers[0], "forward", print),
        lambda model: setattr(model.config, "use_cache", False),
        lambda model: torch.rand(1),
    ):
        model = prepared("full")
        before = state(model)
        change(model)
        with pytest.raises(AssertionError):
            assert_same(before, state(model))


def test_hooks_that_step_do_not_run():
    """Layer-wise optimizers step when a gradient arrives."""
    model, ran = text_model(), []
    weight = model.model.layers[0].mlp.up_proj.weight
    weight.register_post_accumulate_grad_hook(lambda p: ran.append(p.grad.sum()))
    suggest_freeze_ratio(model, make_batches())
    assert not ran
    model(**make_batches(1)[0]).loss.backward()
    assert len(ran) == 1


def test_a_layers_dropout_is_off_too():
    """Some architectures drop inside the layer itself, and it is the layer that is checkpointed."""
    model, batches = text_model(), make_batches()
    expected = by_hand(model, batches)[0]
    for layer in decoder_layers(model):
        layer.register_forward_hook(lambda module, args, output: dropout(output, 0.5, training=module.training))
    assert sums_of(suggest_freeze_ratio(model.train(), batches)) == pytest.approx(expected, rel=1e-4)


def test_one_gradient_at_a_time_and_every_layer_is_recomputed():
    model, alive = text_model(), []
    for parameter in model.parameters():
        parameter.register_hook(lambda _: alive.append(sum(p.grad is not None for p in model.parameters())))
    with BackwardProbe(model) as seen:
        suggest_freeze_ratio(model, make_batches(2))
    assert max(alive) == 0  # when one arrives, none is there
    assert len(alive) == 2 * len(list(model.parameters()))
    assert seen.forwards == dict.fromkeys(range(4), 4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mixed", [False, True])
def test_half_precision(dtype, mixed):
    expected = suggest_freeze_ratio(with_lora(text_model()), make_batches())
    model = with_lora(text_model()).to(dtype)
    if mixed:  # as presets train: the adapters in fp32
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
    found = suggest_freeze_ratio(model, make_batches())
    assert sums_of(found) == pytest.approx(sums_of(expected), rel=0.05)
    assert norms_of(found) == pytest.approx(norms_of(expected), rel=0.05)


def test_mixed_precision_runs_as_trainers_run_it():
    """Under autocast: a head in fp32 takes no bf16 without."""
    model = text_model().bfloat16()
    model.lm_head.float()
    with pytest.raises(RuntimeError, match="dtype"):
        model(**make_batches(1)[0])
    expected = sums_of(suggest_freeze_ratio(text_model(), make_batches()))
    assert sums_of(suggest_freeze_ratio(model, make_batches())) == pytest.approx(expected, rel=0.05)


def test_small_gradients_survive_half_precision():
    """Without a scale of the loss they are zero in fp16."""
    rows = make_batches(1, rows=8, length=64)
    exact, half = text_model(), text_model().half()
    for model in (exact, half):
        model.lm_head.weight.data.mul_(1e-4)
    expected, found = (sums_of(suggest_freeze_ratio(model, rows)) for model in (exact, half))
    assert found == pytest.approx(expected, rel=0.1)


@pytest.mark.parametrize("kind", ["plain", "sft"])
def test_the_batches_of_a_trainer(kind, make_trainer):
    trainer = make_trainer(kind, trainer_options={"peft_config": lora()} if kind == "sft" else None)
    suggestion = suggest_freeze_ratio(trainer.model, islice(trainer.get_train_dataloader(), 4))
    assert suggestion.batches == 4
    assert min(sums_of(suggestion)) > 0
    trainer.train()


# What cannot be probed


def changed(**changes):
    [batch] = make_batches(1)
    return {name: value for name, value in (batch | changes).items() if value is not ...}


@pytest.mark.parametrize(
    ("batches", "said"),
    [
        ([], "batches is empty"),
        (make_batches(1)[0], r"one dict: it must be an iterable of batches.*\[batch\]"),
        (7, "one int"),
        ([torch.ones(2, 3)], "batch 0 is a Tensor: it must be a dict of tensors"),
        ([changed(), changed(input_ids=[[1, 2], [3, 4]])], r"batch 1 holds a list in 'input_ids'.*return_tensors"),
        ([changed(text=["a"])], "holds a list in 'text'"),
        ([changed(input_ids=..., chosen_input_ids=torch.ones(2, 3))], "no input_ids.*chosen_input_ids"),
        ([changed(input_ids=torch.ones(3, dtype=torch.long))], r"input_ids of shape \(3,\)"),
        ([changed(labels=torch.full((3, 10), -100))], "batch 0 supervises no token"),
        ([changed(labels=..., completion_mask=torch.ones(3, 10))], "DPOTrainer"),
        ([changed()] * (MOST_BATCHES + 1), f"more than {MOST_BATCHES} batches"),
    ],
)
def test_batches_that_are_none(batches, said):
    model = text_model()
    model.model.forward = None  # found before anything is run
    with pytest.raises(ForgeError, match=said):
        suggest_freeze_ratio(model, batches)


def test_a_first_token_alone_supervises_nothing():
    """The loss shifts the labels."""
    labels = torch.full((3, 10), -100)
    labels[:, 0] = 5
    with pytest.raises(ForgeError, match="supervises no token"):
        suggest_freeze_ratio(text_model(), [changed(labels=labels)])


@pytest.mark.parametrize("tolerance", [-0.1, 1, 1.5, True, "0.1", None, float("nan")])
def test_a_tolerance_that_is_none(tolerance):
    with pytest.raises(ForgeError, match="tolerance="):
        suggest_freeze_ratio(text_model(), make_batches(), tolerance=tolerance)


def test_losses_and_gradients_that_are_not_finite():
    model, batches = text_model(), make_batches()
    with torch.no_grad():
        model.model.embed_tokens.weight[250] = float("nan")
    batches[1]["input_ids"][2, 4] = 250
    with pytest.raises(NonFiniteError, match=r"The loss of batch 1 is nan"):
        suggest_freeze_ratio(model, batches)
    model = text_model()
    model.model.layers[2].mlp.up_proj.weight.register_hook(lambda gradient: gradient * float("inf"))
    with pytest.raises(NonFiniteError, match=r"The gradient of decoder layer 2 on batch 0 is (inf|nan)"):
        suggest_freeze_ratio(model, make_batches())


def test_models_that_are_none():
    import transformers

    batches = make_batches(1)
    with pytest.raises(UnsupportedError, match="not a Linear"):
        suggest_freeze_ratio(torch.nn.Linear(2, 2), batches)
    with pytest.raises(UnsupportedError, match="not a str"):
        suggest_freeze_ratio("meta-llama", batches)
    with pytest.raises(UnsupportedError, match="meta device"):
        suggest_freeze_ratio(text_model().to("meta"), batches)
    with pytest.raises(UnsupportedError, match="AutoModelForCausalLM"):
        suggest_freeze_ratio(transformers.AutoModel.from_config(text_model().config), batches)


def test_layers_that_something_else_answers_for():
    model = text_model()
    layer = model.model.layers[1]
    layer.__class__ = type("Cached", (type(layer),), {"__call__": lambda self, hidden_states, **_: hidden_states})
    with pytest.raises(UnsupportedError, match="Decoder layer 1 was not run"):
        suggest_freeze_ratio(model, make_batches(1))


def test_adapters_that_are_switched_off():
    model = with_lora(text_model())
    with model.disable_adapter():
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("lora" in name)
        with pytest.raises(ForgeError, match="No gradient reached"):
            suggest_freeze_ratio(model, make_batches(1))


def test_a_learnt_prompt_cannot_be_told_from_what_is_read():
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    with pytest.raises(UnsupportedError, match="learnt prompt"):
        suggest_freeze_ratio(peft.get_peft_model(text_model(), config), make_batches(1))


def test_real_weights_and_conversations(smollm2, conversations):
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(smollm2)
    model = transformers.AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    model = peft.get_peft_model(model, lora(r=8))
    chats = [chat[:2] for chat in conversations if len(chat) >= 2]
    batches = [
        tokenizer.apply_chat_template(
            chats[row : row + 2],
            return_dict=True,
            return_tensors="pt",
            padding=True,
            truncation=True,
            max_length=48,
        )
        for row in range(0, 6, 2)
    ]
    suggestion = suggest_freeze_ratio(model, batches)
    suggestion.print()
    assert (suggestion.num_layers, suggestion.batches, suggestion.measure) == (30, 3, "gradient")
    assert all(math.isfinite(x) and x > 0 for x in (*sums_of(suggestion), *norms_of(suggestion)))
    # The first layer does most to its input, the middle ones little: what ShortGPT found in larger models
    importance = [layer.importance for layer in suggestion.layers]
    assert max(importance) == importance[0] < 2
    assert max(importance[2:20]) < 0.5 * importance[0]
    for name in ("gradient_share", "squared_share", "importance_share"):
        shares = [getattr(boundary, name) for boundary in suggestion.boundaries]
        assert shares == sorted(shares)
        assert 0 == shares[0] < shares[-1] < 1
    assert all(boundary.error < 0.05 for boundary in suggestion.boundaries)
    costs = [boundary.cost for boundary in suggestion.boundaries]
    assert all(one.plain > other.plain and one.cached > other.cached for one, other in pairwise(costs))
    assert int(suggestion.freeze_ratio * 30) == suggestion.frozen_layers
