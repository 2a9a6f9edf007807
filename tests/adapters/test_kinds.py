"""The table of kinds.py, by experiment: what each adapter does to the base's own weights when it comes and trains."""

import copy
import warnings

import peft
import pytest
import torch
from adapter_state import assert_same, bytes_of, state_of
from peft import LoftQConfig, LoraConfig
from peft.tuners.lora.config import CordaConfig

from forge.adapters import attach_adapter, safe_unload_peft_adapters
from forge.adapters.kinds import _WRAPPING, may_rewrite, rewrites_targets, what_stays
from support.models import lora

TARGETS = ["q_proj", "v_proj"]
# What a type needs beside its targets to fit so small a model.
OPTIONS = {
    "ADALORA": {"total_step": 10, "tinit": 1, "tfinal": 2},
    "BOFT": {"boft_block_size": 4, "target_modules": ["q_proj"]},
    "C3A": {"block_size": 8},
    "FOURIERFT": {"n_frequency": 10},
    "IA3": {"feedforward_modules": []},
    "LN_TUNING": {"target_modules": ["input_layernorm"]},
    "LORA": {"r": 4},
    "MISS": {"r": 4},
    "OFT": {"r": 8, "oft_block_size": 0},
    "RANDLORA": {"r": 2, "target_modules": ["q_proj"]},
    "ROAD": {"group_size": 8},
    "SHIRA": {"r": 4},
    "TRAINABLE_TOKENS": {"target_modules": ["embed_tokens"], "token_indices": [1, 2]},
    "VBLORA": {"vector_length": 8, "num_vectors": 8, "target_modules": ["q_proj"]},
    "VERA": {"target_modules": ["q_proj"]},
}


def config_of(name):
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    cls = next(
        (cls for key, cls in PEFT_TYPE_TO_CONFIG_MAPPING.items() if str(getattr(key, "value", key)) == name), None
    )
    if cls is None:
        pytest.skip(f"this PEFT has no {name}")
    return cls(**{"target_modules": TARGETS, "task_type": "CAUSAL_LM", **OPTIONS.get(name, {})})


def step(model):
    model.train()
    ids = torch.arange(8)[None]
    model(input_ids=ids, labels=ids).loss.backward()
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1).step()


@pytest.mark.parametrize("name", sorted(_WRAPPING))
@pytest.mark.filterwarnings("ignore")
def test_wrapping_types_leave_the_base(text_model, name):
    config = config_of(name)
    base = text_model(layers=2).eval()
    before, own = state_of(base), {n: (p, bytes_of(p)) for n, p in base.named_parameters()}
    model = peft.get_peft_model(base, config)
    step(model)
    assert [n for n, (p, value) in own.items() if bytes_of(p) != value] == []
    assert not any(p.requires_grad for p, _ in own.values())
    assert not may_rewrite(config)
    assert what_stays(config) is None
    safe_unload_peft_adapters(model)
    assert_same(before, state_of(base))


INITS = {
    True: False,
    False: False,
    "gaussian": False,
    "orthogonal": False,
    "mica": False,
    "pissa": True,
    "pissa_niter_2": True,
    "olora": True,
    "corda": True,
    "lora_ga": True,
    "loftq": True,
}


def prepared(init, base):
    """A config, after what its initialisation wants to see of the base first."""
    options = {"loftq_config": LoftQConfig()} if init == "loftq" else {}
    options |= {"corda_config": CordaConfig()} if init == "corda" else {}
    if init == "lora_ga":
        options |= {"lora_ga_config": pytest.importorskip("peft.tuners.lora.config").LoraGAConfig()}
    try:
        config = lora(target_modules=TARGETS, init_lora_weights=init, **options)
    except (ValueError, TypeError):
        pytest.skip("not in this PEFT")

    def run():
        ids = torch.arange(40)[None]
        return base(input_ids=ids, labels=ids).loss

    if init == "corda":
        from peft.tuners.lora.corda import preprocess_corda

        preprocess_corda(base, config, run_model=lambda: [run() for _ in range(3)])
    if init == "lora_ga":
        from peft.tuners.lora.loraga import preprocess_loraga

        preprocess_loraga(base, config, train_step=lambda: run().backward())
    return config


@pytest.mark.parametrize("init", INITS)
@pytest.mark.filterwarnings("ignore")
def test_initialisations(text_model, init, monkeypatch):
    """Which of them rewrite the weights, and that each comes back."""
    base = text_model(layers=2).eval()
    if init in ("mica", "lora_ga", "orthogonal"):
        import inspect

        source = inspect.getsource(peft.tuners.lora.config)
        if f'"{init}"' not in source:
            pytest.skip(f"this PEFT has no {init}")
    if init == "loftq":  # it computes on the GPU, if it is not told otherwise
        import peft.utils.loftq_utils as loftq

        place = next(each for each in (peft.tuners.lora.layer, loftq) if hasattr(each, "loftq_init"))
        original = loftq.loftq_init

        def on_the_cpu(weight, *args, **kwargs):
            with monkeypatch.context() as patch:
                patch.setattr(torch.Tensor, "to", _to_cpu(torch.Tensor.to))
                return original(weight, *args, **kwargs)

        monkeypatch.setattr(place, "loftq_init", on_the_cpu)
    config = prepared(init, base)
    assert rewrites_targets(config) is INITS[init]
    before = state_of(base)
    own = {n: (p, bytes_of(p)) for n, p in base.named_parameters()}
    model = attach_adapter(base, config)
    changed = [n for n, (p, value) in own.items() if bytes_of(p) != value]
    assert bool(changed) is INITS[init], changed
    assert all(any(target in n for target in TARGETS) for n in changed)
    step(model)
    safe_unload_peft_adapters(model)
    assert_same(before, state_of(base))


def _to_cpu(to):
    def call(tensor, *args, **kwargs):
        args = ["cpu" if str(each) == "cuda" else each for each in args]
        if str(kwargs.get("device")) == "cuda":
            kwargs["device"] = "cpu"
        return to(tensor, *args, **kwargs)

    return call


@pytest.mark.filterwarnings("ignore")
def test_an_initialisation_of_tomorrow_is_taken_for_one_that_rewrites():
    config = LoraConfig()
    config.init_lora_weights = "tomorrow"
    assert rewrites_targets(config)
    assert "init_lora_weights='tomorrow'" in what_stays(config)


def test_every_type_of_this_peft_comes_back(text_model):
    """Of the types that are not in the table all weights are copied, so that nothing must be known of them."""
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    tried = 0
    for key, cls in PEFT_TYPE_TO_CONFIG_MAPPING.items():
        name = str(getattr(key, "value", key))
        base = text_model(layers=2).eval()
        before = state_of(base)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                fields = cls.__dataclass_fields__
                options = {"task_type": "CAUSAL_LM", **OPTIONS.get(name, {})}
                options |= {"num_virtual_tokens": 2} if "num_virtual_tokens" in fields else {}
                options = {"target_modules": TARGETS, **options} if "target_modules" in fields else options
                model = attach_adapter(base, copy.deepcopy(cls(**options)))
            except Exception:  # noqa: BLE001  (what it needs is its own affair; the base must be as before)
                assert_same(before, state_of(base))
                continue
            tried += 1
            safe_unload_peft_adapters(model)
        assert_same(before, state_of(base))
    assert tried > 15
