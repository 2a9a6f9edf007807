"""Every Python block of the README and the docs runs as it stands."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BLOCKS = [
    pytest.param(block, id=f"{page.name}-{number}")
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
    for number, block in enumerate(re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL))
]


@pytest.mark.parametrize("block", BLOCKS)
def test_block(block, tmp_path, tokenizer, monkeypatch):
    from transformers import AutoModelForCausalLM
    from trl import SFTTrainer

    from forge import get_preset
    from support.data import sft_messages
    from support.models import text_model

    folder = tmp_path / "model"
    text_model(layers=2).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    monkeypatch.chdir(tmp_path)
    # The blocks' own imports are part of what is tested; these are those of "the usual imports" beside them.
    names = {"AutoModelForCausalLM": AutoModelForCausalLM, "SFTTrainer": SFTTrainer, "get_preset": get_preset}
    names |= {"model_id": str(folder), "dataset": sft_messages(8)}
    # The models of the prose cannot be reached from a test.
    exec(block.replace("HuggingFaceTB/SmolLM2-135M-Instruct", str(folder)), names)
