import json
import re
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard

from forge.errors import ConflictError, ForgeError, UnknownNameError
from forge.reporting.card import model_card, write_model_card
from forge.reporting.private import hub_id, last_part, public

RESULTS = [
    {"name": "Held-out loss", "type": "loss", "base": 2.5, "tuned": 1.75, "interval": (-0.9, -0.6), "better": "lower"},
    {"name": "BERTScore F1", "type": "bertscore", "base": 0.8, "tuned": 0.85, "better": "higher"},
    {"name": "LLM judge", "type": "llm_judge_score", "base": 40.0, "tuned": None},
]
FULL = {
    "base_model": "Qwen/Qwen3-0.6B",
    "objective": "sft",
    "base_revision": "c1899de",
    "license": "apache-2.0",
    "preset": "qlora",
    "recipe": {"lora_r": (16, "enough for most tasks"), "learning_rate": (2e-4, "ten times that of all weights")},
    "data": {
        "train": {"source": "owner/chats", "rows": 1500, "tokens": 123456, "fingerprint": "9f2c"},
        "validation": {"source": "/home/ada/data/validation.jsonl", "rows": 64, "fingerprint": "77aa"},
    },
    "results": RESULTS,
    "intervals": "95%, paired bootstrap over 64 samples",
    "environment": {"torch": "2.13.0", "GPU": "RTX 4090"},
    "not_measured": ["speed"],
    "limitations": ["It has seen English alone."],
    "tags": ["chat"],
}
HOSTILE = (
    "a|b`c`<script>x</script>\n---\n# h: [l](javascript:x) *e* _u_ $m$ \"q\" 'p' \\ {{x}} ~~s~~\u202e\x00\ud83d - é日"
)


def parsed(**described):
    """The card as the hub reads it, checked for its structure; its body as lines."""
    text = model_card(**described)
    text.encode()
    card = ModelCard(text)
    data = card.data.to_dict()
    json.dumps(data, allow_nan=False)
    assert data["library_name"] == "peft"
    assert data["pipeline_tag"] == "text-generation"
    assert all(isinstance(tag, str) and tag for tag in data["tags"])
    # What the hub reads is what is written: none of it is lost or turned into something else.
    block = re.match(r"---\n(.*?)\n---\n", text, re.DOTALL)[1]
    assert yaml.safe_load(block) == data
    assert ModelCard(str(card)).data.to_dict() == data
    for index in data.get("model-index", []):
        assert isinstance(index["name"], str)
        for result in index["results"]:
            assert result["task"] == {"type": "text-generation"}
            assert all(isinstance(result["dataset"][key], str) and result["dataset"][key] for key in ("name", "type"))
            assert all(set(metric) == {"type", "name", "value"} for metric in result["metrics"])
    return data, card.text


def tables(text):
    """Each table as rows of cells, split where GitHub's Markdown splits them."""
    found, rows = [], []
    for line in [*text.splitlines(), ""]:
        if line.startswith("|"):
            rows.append([cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]])
        elif rows:
            found.append(rows)
            rows = []
    return found


def test_what_the_hub_reads():
    data, _ = parsed(**FULL)
    assert data["base_model"] == "Qwen/Qwen3-0.6B"
    assert data["license"] == "apache-2.0"
    assert data["datasets"] == ["owner/chats"]
    assert data["tags"][0] == "base_model:adapter:Qwen/Qwen3-0.6B"
    assert {"lora", "sft", "trl", "transformers", "forge", "chat"} < set(data["tags"])
    assert "language" not in data
    (index,) = data["model-index"]
    assert index["name"] == "Qwen3-0.6B-sft-lora"
    (result,) = index["results"]
    assert result["dataset"] == {"name": "validation.jsonl", "type": "local"}
    assert [(m["type"], m["name"], m["value"]) for m in result["metrics"]] == [
        ("loss", "Held-out loss", 1.75),
        ("bertscore", "BERTScore F1", 0.85),
    ]


def test_what_people_read():
    _, text = parsed(**FULL)
    recipe, data, results, environment = tables(text)
    assert recipe[2:] == [
        ["lora_r", "16", "enough for most tasks"],
        ["learning_rate", "0.0002", "ten times that of all weights"],
    ]
    assert data[2:] == [
        ["train", "owner/chats", "1,500", "123,456", "9f2c"],
        ["validation", "validation.jsonl", "64", "not recorded", "77aa"],
    ]
    assert results[2:] == [
        ["Held-out loss (lower is better)", "2.5", "1.75", "-0.75 (-0.9 to -0.6)"],
        ["BERTScore F1 (higher is better)", "0.8", "0.85", "+0.05"],
        ["LLM judge", "40", "not measured", r"-"],
    ]
    assert environment[2:] == [["torch", "2.13.0"], ["GPU", "RTX 4090"]]
    headings = re.findall(r"^#+ .*", text, re.MULTILINE)
    assert headings == [
        "# Qwen3-0.6B-sft-lora", "## How to use it", "## Recipe", "## Data", "## Results", "## Environment",
        "## Limitations",
    ]  # fmt: skip
    assert "supervised fine-tuning" in text
    assert "revision c1899de" in text
    assert "Not measured: LLM judge; speed; bias, safety and factual correctness." in text
    assert "It has seen English alone." in text
    assert "95%, paired bootstrap over 64 samples" in text


def test_results_of_rows_that_were_held_out():
    for source, kind, name in (("owner/chats", "owner/chats", "owner/chats"), ("/x/y.csv", "local", "y.csv")):
        data, _ = parsed(base_model="owner/base", data={"train": {"source": source}, "validation": {}}, results=RESULTS)
        assert data["model-index"][0]["results"][0]["dataset"] == {"name": name, "type": kind}


def test_the_objective_is_told():
    data, text = parsed(base_model="owner/base", objective="dpo")
    assert "dpo" in data["tags"]
    assert "sft" not in data["tags"]
    assert "direct preference optimization" in text


def test_what_is_missing_is_said():
    data, text = parsed(base_model="owner/base")
    assert set(data) == {"base_model", "library_name", "pipeline_tag", "tags"}
    assert "Under which license it may be used is not known" in text
    assert "No license was given" in text
    for heading, said in (("Recipe", "Not recorded."), ("Data", "Not recorded."), ("Results", "Nothing was measured.")):
        assert f"## {heading}\n\n{said}" in text
    assert tables(text) == []


@pytest.mark.parametrize(
    ("license", "expected"),
    [
        ("mit", {"license": "mit"}),
        ("cc-by-sa-4.0", {"license": "cc-by-sa-4.0"}),
        ("Our own: ask!", {"license": "other", "license_name": "Our own: ask!"}),
        (None, {}),
        ("", {}),
    ],
)
def test_licenses(license, expected):
    data, _ = parsed(base_model="owner/base", license=license)
    assert {key: value for key, value in data.items() if key.startswith("license")} == expected


def test_numbers_that_are_none():
    results = [
        {"name": "a", "base": float("nan"), "tuned": 1.0},
        {"name": "b", "base": 1.0, "tuned": float("inf")},
        {"name": "c", "tuned": 2, "interval": None},
        {"name": "d", "base": 1.0, "tuned": 1.0, "interval": (None, None)},
    ]
    data, text = parsed(base_model="owner/base", results=results)
    assert [metric["name"] for metric in data["model-index"][0]["results"][0]["metrics"]] == ["a", "c", "d"]
    assert tables(text)[0][2:] == [
        ["a", "nan", "1", "-"],
        ["b", "1", "inf", "-"],
        ["c", "not measured", "2", "-"],
        ["d", "1", "1", "+0"],
    ]
    data, _ = parsed(base_model="owner/base", results=results[1:2])
    assert "model-index" not in data
    assert "model_name" not in data


LOCAL = [
    "/home/ada/models/secret-base", "/root/x/secret-base/", "~/secret-base", "./secret-base", "../up/secret-base",
    r"C:\Users\ada\secret-base", "file:///home/ada/secret-base", "/home/ada/my models/secret-base", "a/b/secret-base",
]  # fmt: skip


@pytest.mark.parametrize("path", LOCAL)
def test_a_local_base_is_told_by_its_name_alone(path):
    data, text = parsed(base_model=path, license="mit", recipe={"model": path}, environment={"cache": path})
    assert "base_model" not in data
    assert not any(tag.startswith("base_model") for tag in data["tags"])
    assert 'base_id = "path/to/secret-base"' in text
    for private in ("ada", "/root", "up/", "my models", "C:", "~", "file:", "a/b"):
        assert private not in text.replace("adapter", "").replace("metadata", "")


@pytest.mark.parametrize("path", [*LOCAL, "secret-base", "data/secret-base.jsonl", "~ada", "/home/ada", "~"])
def test_local_data_are_never_published(path):
    data, text = parsed(
        base_model="owner/base",
        data={"train": {"source": path, "rows": 3, "fingerprint": "9f2c"}},
        results=RESULTS,
        recipe={"train_file": path},
        limitations=[f"Rows of {path} are short.", path],
        tags=[path],
    )
    assert "datasets" not in data
    assert data["model-index"][0]["results"][0]["dataset"]["type"] == "local"
    everything = (text + json.dumps(data)).replace("adapter", "")
    for private in ("ada", "/root", "up/", "C:", "file:"):
        if "my models" not in path:
            assert private not in everything
    assert "9f2c" in text


def test_folders_that_look_like_ids_are_folders(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert parsed(base_model="owner/base", data={"train": {"source": "owner/data"}})[0]["datasets"] == ["owner/data"]
    for folder in ("owner/base", "owner/data"):
        Path(folder).mkdir(parents=True)
    data, _ = parsed(base_model="owner/base", data={"train": {"source": "owner/data"}})
    assert "base_model" not in data
    assert "datasets" not in data


def test_the_home_folder_of_this_machine_is_not_told(tmp_path, monkeypatch):
    home = tmp_path / "people" / "ada lovelace"
    home.mkdir(parents=True)
    monkeypatch.setenv("HOME", str(home))
    assert "ada" not in public(f"kept in {home}, and in {home}/runs/one.")
    assert last_part(str(home)) == ""


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("2/3 and/or 5 tokens/s", "2/3 and/or 5 tokens/s"),
        ("https://host/a/b", "https://host/a/b"),
        ("owner/name", "owner/name"),
        ("see https://ada:s3cret@host/a/b?token=abc.", "see https://host/a/b?token="),
        ("read '/srv/a/b.json' now", "read 'b.json' now"),
        ("key hf_abcdefghijklmnopqrst", "key [removed]"),
        ("/srv/a b/c.json", "c.json"),
        ("float16", "float16"),
        (
            r"(?:.*\.)?(?:layers|h)\.\d+\.(?:.*\.)?(?:[qkvo]_proj|w[123])",
            r"(?:.*\.)?(?:layers|h)\.\d+\.(?:.*\.)?(?:[qkvo]_proj|w[123])",
        ),
        (r"model\.layers\.0\.q_proj", r"model\.layers\.0\.q_proj"),
        (r".\d+\.q_proj", r".\d+\.q_proj"),
        ("~5 minutes, 10/20/30", "~5 minutes, 10/20/30"),
        ("data/train.jsonl", "train.jsonl"),
        ("runs/a/b", "b"),
        ("seen in ../up/x.json, ./y/z.json and ~bob", "seen in x.json, z.json and "),
        ("model.layers.0.mlp/x", "model.layers.0.mlp/x"),
        ("", ""),
    ],
)
def test_what_is_public(text, expected):
    assert public(text) == expected


def test_a_recipe_as_presets_make_it_is_not_changed():
    from forge import get_preset

    for name in ("qlora", "dpo"):
        for setting, choice in get_preset(name, hardware="ampere").choices.items():
            assert public(str(choice.value)) == str(choice.value), setting
            assert public(choice.reason) == choice.reason, setting


def test_a_home_folder_has_no_name():
    _, text = parsed(base_model="owner/base", data={"train": {"source": "/home/ada"}})
    assert tables(text)[0][2][:2] == ["train", "a local folder"]


def test_ids():
    assert hub_id("gpt2") == "gpt2"
    assert hub_id("owner_1/A.b-c_2") == "owner_1/A.b-c_2"
    assert hub_id("/c/hub/models--gpt2/snapshots/607a") == "gpt2"
    assert hub_id("/c/hub/datasets--owner--chats/snapshots/607a/train.jsonl") == "owner/chats"
    for name in (
        "",
        "llama",
        "train",
        "a b/c",
        "owner/na me",
        "-x",
        "owner/..",
        "x.csv",
        "owner/x.jsonl",
        "a//b",
        "a\nb",
        "ü/x",
    ):
        assert hub_id(name) is None


def test_hostile_texts_stay_texts():
    described = {
        "base_model": HOSTILE,
        "name": HOSTILE,
        "adapter_id": HOSTILE,
        "base_revision": HOSTILE,
        "license": HOSTILE,
        "preset": HOSTILE,
        "recipe": {HOSTILE: (HOSTILE, HOSTILE), "x": [HOSTILE, HOSTILE]},
        "data": {HOSTILE: {"source": HOSTILE, "rows": HOSTILE, "tokens": HOSTILE, "fingerprint": HOSTILE}},
        "results": [{"name": HOSTILE, "type": HOSTILE, "base": 1.0, "tuned": 2.0, "better": HOSTILE}],
        "intervals": HOSTILE,
        "environment": {HOSTILE: HOSTILE},
        "not_measured": [HOSTILE],
        "limitations": [HOSTILE, "- x", "1. x", "# x"],
        "tags": [HOSTILE],
    }
    data, text = parsed(**described)
    assert set(data) == {
        "library_name", "license", "license_name", "model-index", "pipeline_tag", "tags",
    }  # fmt: skip
    found = tables(text)
    assert [len(table) for table in found] == [4, 3, 3, 3]
    assert [{len(row) for row in table} for table in found] == [{3}, {5}, {4}, {2}]
    assert [line for line in text.splitlines() if line.startswith("#")][1:] == [
        "## How to use it", "## Recipe", "## Data", "## Results", "## Environment", "## Limitations",
    ]  # fmt: skip
    assert "<script" not in text.split("```")[0] + text.split("```")[2]
    assert "](javascript" not in text.replace(r"\](", "")
    assert text.count("```") == 2
    assert "\u202e" not in text
    assert "\x00" not in text
    assert "\n---\n" not in text
    compile(text.split("```python\n")[1].split("```")[0], "example", "exec")


@pytest.mark.parametrize(
    ("described", "error", "said"),
    [
        ({"base_model": ""}, ConflictError, "needs its base"),
        ({"base_model": None}, ConflictError, "needs its base"),
        ({"base_model": "x", "objective": "sf"}, UnknownNameError, "Did you mean 'sft'|Known"),
        ({"base_model": "x", "results": [{"tuned": 1.0}]}, ConflictError, "needs a name"),
        ({"base_model": "x", "results": [{"name": "a", "tuned": "1"}]}, ConflictError, "a: .*must be numbers"),
        ({"base_model": "x", "results": [{"name": "a", "tuned": True}]}, ConflictError, "must be numbers"),
        ({"base_model": "x", "results": [{"name": "a", "interval": (1,)}]}, ConflictError, "both ends"),
        ({"base_model": "x", "results": [{"name": "a", "tunde": 1}]}, UnknownNameError, "Did you mean 'tuned'"),
        ({"base_model": "x", "data": {"train": {"row": 1}}}, UnknownNameError, "Did you mean 'rows'"),
    ],
)
def test_what_is_refused(described, error, said):
    with pytest.raises(error, match=said):
        model_card(**described)
    assert issubclass(error, ForgeError)


def test_tuples_that_are_values_are_no_reasons():
    _, text = parsed(base_model="owner/base", recipe={"betas": (0.9, 0.99), "target_modules": ["q_proj", "v_proj"]})
    assert tables(text)[0] == [
        ["setting", "value"], ["---", "---"], ["betas", "0.9, 0.99"], ["target_modules", "q_proj, v_proj"],
    ]  # fmt: skip


def test_it_takes_the_place_of_pefts_own_card_and_the_example_runs(text_model, tmp_path, capsys):
    from peft import LoraConfig, get_peft_model

    from support.tokenizer import tiny_tokenizer

    base = tmp_path / "base"
    model = text_model("llama", layers=2)
    model.save_pretrained(base)
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(base)
    folder = tmp_path / "adapter"
    get_peft_model(model, LoraConfig(target_modules=["q_proj"])).save_pretrained(folder)
    assert "Framework versions" in (folder / "README.md").read_text(encoding="utf-8")

    for chat, own in ((True, False), (False, True)):
        if own:
            tokenizer.save_pretrained(folder)
        path = write_model_card(folder, base_model=str(base), chat=chat, own_tokenizer=own)
        assert path == folder / "README.md"
        text = path.read_text(encoding="utf-8")
        assert "Framework versions" not in text
        assert str(tmp_path) not in text
        assert ModelCard.load(path).data.library_name == "peft"
        assert not list(folder.glob("*.tmp"))
        code = text.split("```python\n")[1].split("```")[0]
        code = code.replace("path/to/base", str(base)).replace("path/to/this/adapter", str(folder))
        code = code.replace("max_new_tokens=128", "max_new_tokens=3")
        capsys.readouterr()
        exec(compile(code, "example", "exec"), {})
        assert capsys.readouterr().out.endswith("\n")


def test_the_example_names_what_is_on_the_hub():
    _, text = parsed(**FULL, adapter_id="owner/adapter")
    assert 'base_id = "Qwen/Qwen3-0.6B"' in text
    assert 'adapter_id = "owner/adapter"' in text
    assert text.count('revision="c1899de"') == 2
    _, text = parsed(**FULL, adapter_id="/home/ada/adapter")
    assert 'adapter_id = "path/to/this/adapter"' in text


def test_the_folder_is_made(tmp_path):
    assert write_model_card(tmp_path / "a" / "b", base_model="owner/base").is_file()
