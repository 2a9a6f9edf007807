"""The examples run as a user runs them: on a model of one's own (a tiny one, quickly), and on the real one."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


def run(script, *arguments, cwd):
    command = [sys.executable, "-W", "ignore", str(EXAMPLES / script), *map(str, arguments)]
    result = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


def losses(output):
    found = re.search(r"held-out loss: ([\d.]+) before, ([\d.]+) after", output)
    return float(found[1]), float(found[2])


@pytest.fixture
def own_model(tmp_path, tokenizer):
    from support.models import text_model

    text_model(layers=2).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize(("preset", "freeze_ratio"), [("qlora", 0), ("qlora", 0.5), ("sft", 0)])
def test_own_model_and_data(preset, freeze_ratio, own_model, tmp_path):
    from support.data import sft_messages

    rows = [{"messages": row["messages"]} for row in sft_messages(40)]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    output = run(
        "train_with_forge.py", "--model", own_model, "--data", "chats.jsonl", "--preset", preset, "--max-steps", 3,
        "--freeze-ratio", freeze_ratio, cwd=tmp_path,
    )  # fmt: skip
    before, after = losses(output)
    assert after < before
    assert ("backward stops below" in output) == (freeze_ratio > 0)
    assert ("reloaded adapter: logits identical" in output) == (preset == "qlora")
    assert (tmp_path / "outputs/train_with_forge/adapter_model.safetensors").exists() == (preset == "qlora")


def test_the_tuned_model_is_compared_with_its_base_on_what_was_held_out(own_model, minilm, tmp_path):
    from support.data import sft_messages

    rows = [{"messages": row["messages"]} for row in sft_messages(60, seed=3)]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run(
        "train_with_forge.py", "--model", own_model, "--data", "chats.jsonl", "--preset", "lora", "--max-steps", 2,
        cwd=tmp_path,
    )  # fmt: skip
    output = run("evaluate_with_forge.py", "--model", own_model, "--max-new-tokens", 4, cwd=tmp_path)
    lines = (tmp_path / "outputs/train_with_forge/held_out.jsonl").read_text().splitlines()
    held_out = [json.loads(line) for line in lines]
    questions = {row["messages"][0]["content"] for row in held_out}
    assert len(held_out) == len(questions) > 0
    found = json.loads((tmp_path / "outputs/evaluate_with_forge/comparison.json").read_text())
    assert {sample["prompt"][0]["content"] for sample in found["results"][1]["samples"]} == questions
    assert [result["model"] for result in found["results"]] == ["base", "tuned"]
    assert "Evaluation, side by side" in output
    assert output.count("reference  ") == min(3, len(held_out))


def test_text_only_data(own_model, tmp_path):
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": f"number {i}"}) + "\n" for i in range(20)))
    output = run("train_with_forge.py", "--model", own_model, "--data", "texts.jsonl", "--max-steps", 1, cwd=tmp_path)
    assert "held-out loss" in output


def test_a_missing_data_file_is_said_before_anything_is_loaded(tmp_path):
    command = [sys.executable, "-W", "ignore", str(EXAMPLES / "train_with_forge.py"), "--data", "nope.jsonl"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert result.stderr.strip().splitlines()[-1].startswith("error: dataset: no file 'nope.jsonl' (looked for")


def test_train_on_the_real_model(smollm2, conversations, tmp_path):
    output = run("train_with_forge.py", "--max-steps", 3, "--max-length", 64, cwd=tmp_path)
    before, after = losses(output)
    assert after < before
    assert "reloaded adapter: logits identical" in output
    assert output.count("\nuser    ") == 3
    assert re.search(r"peak memory \d+\.\d+ GiB", output)


def test_dpo_on_ones_own_model(own_model, tmp_path, conversations):
    output = run("dpo_with_forge.py", "--model", own_model, "--pairs", 8, cwd=tmp_path)
    assert re.search(r"eval_loss: 0\.693\d before", output)
    assert (tmp_path / "outputs/dpo_with_forge/adapter_model.safetensors").exists()


@pytest.mark.long
def test_dpo_on_the_real_model(smollm2, conversations, tmp_path):
    output = run("dpo_with_forge.py", "--pairs", 24, cwd=tmp_path)
    before, after = re.search(r"eval_loss: ([\d.]+) before, ([\d.]+) after", output).groups()
    assert float(after) < float(before)
