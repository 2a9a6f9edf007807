import peft
import pytest
import torch

from forge.freezing import setup_lp_lora_style
from forge.freezing.cache.fingerprint import Unchanged, fingerprint
from forge.models.layers import unwrap
from support.models import lora, nf4_model, text_model


def model(**config):
    made = text_model(layers=4)
    for name, value in config.items():
        setattr(made.config, name, value)
    made = peft.get_peft_model(made, lora())
    setup_lp_lora_style(made, 0.5)
    return made


def test_the_same_model_has_the_same():
    assert fingerprint(model(), 2) == fingerprint(model(), 2)


@pytest.mark.parametrize("config", [{"rms_norm_eps": 1e-3}, {"_attn_implementation": "eager"}, {"hidden_act": "gelu"}])
def test_what_is_computed_counts(config):
    assert fingerprint(model(**config), 2) != fingerprint(model(), 2)


@pytest.mark.parametrize("config", [{"use_cache": False}, {"pad_token_id": 7}, {"router_aux_loss_coef": 0.1}])
def test_what_trainers_write_into_the_config_does_not(config):
    assert fingerprint(model(**config), 2) == fingerprint(model(), 2)


def test_the_boundary_counts():
    made = model()
    assert fingerprint(made, 2) != fingerprint(made, 1)


@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "model.layers.1.mlp.down_proj.weight"])
def test_every_weight_below_counts(name):
    made = model()
    before = fingerprint(made, 2)
    unwrap(made).get_parameter(name).data[-1, -1] += 1e-6
    assert fingerprint(made, 2) != before


@pytest.mark.parametrize("name", ["model.layers.2.mlp.down_proj.base_layer.weight", "lm_head.weight"])
def test_no_weight_above_does(name):
    made = model()
    before = fingerprint(made, 2)
    unwrap(made).get_parameter(name).data[-1, -1] += 1
    assert fingerprint(made, 2) == before


@pytest.mark.parametrize("attribute", ["absmax", "code"])
def test_constants_of_quantisation_count(tmp_path, attribute):
    made = peft.get_peft_model(nf4_model(tmp_path, layers=4), lora())
    setup_lp_lora_style(made, 0.5)
    before = fingerprint(made, 2)
    assert fingerprint(made, 2) == before
    getattr(unwrap(made).model.layers[0].mlp.up_proj.weight.quant_state, attribute)[0] += 1
    assert fingerprint(made, 2) != before


def _assigned(made):
    layer = unwrap(made).model.layers[0].mlp.up_proj
    layer.load_state_dict({"weight": layer.weight + 1}, assign=True)
    layer.requires_grad_(False)


CHANGES = {
    "in-place": lambda made: unwrap(made).model.embed_tokens.weight.add_(1),
    "loaded": lambda made: unwrap(made).model.layers[1].load_state_dict(unwrap(made).model.layers[0].state_dict()),
    "assigned": _assigned,
    "cast": lambda made: made.to(torch.bfloat16),
}


@pytest.mark.parametrize("how", CHANGES)
def test_changes_are_seen(how):
    made = model()
    unchanged = Unchanged(made, 2)
    assert unchanged
    with torch.no_grad():
        unwrap(made).model.layers[3].mlp.up_proj.base_layer.weight.add_(1)
        assert unchanged
        CHANGES[how](made)
    assert not unchanged
