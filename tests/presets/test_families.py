"""Every family, the way a user goes: a folder, `model_kwargs()`, the adapter, a step back through it."""

import pytest
import torch
import transformers
from peft import get_peft_model

from forge import ConflictError, UnsupportedError, get_preset
from forge.models import read_anatomy
from support.families import FAMILIES, tiny_model

# bitsandbytes never packs FalconLinear.
NOT_QUANTIZED = {
    "falcon_7b": (ConflictError, "find no linear layer to pack"),
    "falcon_40b": (ConflictError, "find no linear layer to pack"),
}


@pytest.mark.parametrize("name", ["lora", "qlora"])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.usefixtures("no_foreign_warnings")
def test_load_adapt_and_step(family, name, tmp_path):
    tiny_model(family).save_pretrained(tmp_path)
    if name == "qlora" and family in NOT_QUANTIZED:
        error, message = NOT_QUANTIZED[family]
        with pytest.raises(error, match=message):
            get_preset(name, hardware="cpu", model=tmp_path)
        return
    if name == "qlora" and read_anatomy(tmp_path).targets.linear_parameters:
        # From 0.19 on, PEFT adapts DeepSeek's dense layers by weight, and so only where they are not packed.
        with pytest.raises(UnsupportedError, match="Choose a precision that is not quantised"):
            get_preset(name, hardware="cpu", model=tmp_path)
        return
    preset = get_preset(name, hardware="cpu", model=tmp_path)
    auto = (
        transformers.AutoModelForImageTextToText
        if hasattr(transformers.AutoConfig.from_pretrained(tmp_path), "vision_config")
        else transformers.AutoModelForCausalLM
    )
    model = get_peft_model(auto.from_pretrained(tmp_path, **preset.model_kwargs()), preset.get_lora_config())
    ids = torch.arange(8).unsqueeze(0)
    model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids).loss.backward()
    if name == "qlora":
        assert any(type(module).__name__ == "Linear4bit" for module in model.modules())
    adapters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert adapters
    assert all(p.grad is not None for p in adapters.values())
