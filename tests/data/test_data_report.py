"""What the report counts, what the previews show, and the four small functions that evaluation builds on."""

import json

import pytest
import torch
from chat_families import OWN, assistant, own, system, user, with_template
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import GenerationConfig, PreTrainedTokenizerFast

from forge import ConflictError, ForgeError
from forge.data import (
    encode_prompt,
    pad_token_id,
    prepare_dataset,
    preview,
    question_and_reference,
    stop_token_ids,
)
from forge.data.lengths import Lengths, lost, shortest_that_keeps
from forge.errors import UnsupportedError
from support.tokenizer import tiny_tokenizer

ROWS = [{"messages": [user("q" * n), assistant("a" * n)]} for n in range(1, 41)]


def sentencepiece_like():
    """A tokenizer in the manner of Llama 2: words begin with a bar, what it does not know is bytes."""
    letters = [chr(code) for code in range(0x21, 0x7F)] + ["\u2581"]
    words = ["\u2581w", "\u2581wo", "rd"]
    vocabulary = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *letters, *words]
    backend = Tokenizer(
        models.BPE(
            vocab={token: index for index, token in enumerate(vocabulary)},
            merges=[("\u2581", "w"), ("\u2581w", "o"), ("r", "d")],
            unk_token="<unk>",
            byte_fallback=True,
            fuse_unk=True,
        )
    )
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>", model_max_length=512
    )
    tokenizer.chat_template = OWN["llama2"]
    return tokenizer


def test_lengths_are_counted():
    tokenizer = tiny_tokenizer()
    data = prepare_dataset(ROWS, tokenizer, validation=8)
    for split, report in ((data.train, data.report.train), (data.validation, data.report.validation)):
        lengths = sorted(len(row["input_ids"]) for row in split)
        assert report.lengths.total == report.tokens == sum(lengths)
        assert (report.lengths.min, report.lengths.max) == (lengths[0], lengths[-1])
        learnt = sum(label != -100 for row in split for label in row["labels"])
        assert all(row["assistant_masks"] == [int(label != -100) for label in row["labels"]] for row in split)
        assert report.supervised_tokens == learnt
        assert report.supervised_share == learnt / sum(lengths)
        assert report.lengths.median == lengths[(len(lengths) - 1) // 2]


def test_max_length_cuts_the_end_and_drops_what_has_no_answer_left():
    tokenizer = tiny_tokenizer()
    whole, data = prepare_dataset(ROWS, tokenizer), prepare_dataset(ROWS, tokenizer, max_length=60)
    lengths = [len(row["input_ids"]) for row in whole.train]
    # "<|im_start|>user\n", the question, "<|im_end|>\n<|im_start|>assistant\n": 6 + n + 2 + 11 tokens before an answer.
    gone = [n - 1 for n in range(1, 41) if 19 + n >= 60]
    assert data.report.train.dropped == ({"nothing of the answer left after max_length": gone} if gone else {})
    kept = [length for row, length in enumerate(lengths) if row not in gone]
    assert (data.report.train.truncated_rows, data.report.train.truncated_tokens) == lost(kept, 60)
    assert data.report.train.truncated_rows > 0
    expected = [row["input_ids"][:60] for row in whole.train]
    assert [row["input_ids"] for row in data.train] == [row for n, row in enumerate(expected) if n not in gone]
    short = prepare_dataset(ROWS, tokenizer, max_length=40)
    assert short.report.train.dropped == {"nothing of the answer left after max_length": list(range(20, 40))}
    for row in short.train:
        assert len(row["input_ids"]) <= 40
        assert any(label != -100 for label in row["labels"])
    with pytest.raises(ConflictError, match="max_length=1"):
        prepare_dataset(ROWS, tokenizer, max_length=1)
    with pytest.raises(ForgeError, match=r"Nothing of train is left .*max_length: 40"):
        prepare_dataset(ROWS, tokenizer, max_length=5)


def test_preferences_whose_prompt_fills_the_length_are_dropped():
    rows = [{"prompt": "p" * n, "chosen": "yes", "rejected": "no"} for n in (1, 100)]
    data = prepare_dataset(rows, tiny_tokenizer(), max_length=64)
    assert data.report.train.dropped == {"nothing of the answer left after max_length": [1]}
    assert data.train[0]["prompt"] == [user("p")]
    both = [{"prompt": f"{n}", "chosen": "y" * n, "rejected": "n"} for n in (1, 100)]
    assert "DPOConfig(max_length=64)" in prepare_dataset(both, tiny_tokenizer(), max_length=64).report.warnings[0]


def test_the_trainers_own_limit_is_warned_of():
    long = [{"messages": [user("q"), assistant("a" * n)]} for n in (10, 1500)]
    report = prepare_dataset(long, tiny_tokenizer()).report
    beyond = report.train.lengths.max - 1024
    assert report.warnings == (
        f"SFTConfig cuts rows to max_length=1,024 unless told otherwise: 1 training rows would lose {beyond} tokens. "
        "Pass SFTConfig(max_length=None)",
    )
    assert not prepare_dataset(long, tiny_tokenizer(), max_length=1024).report.warnings
    pairs = [{"prompt": "q", "chosen": "a" * 1500, "rejected": "b"}]
    assert "DPOConfig cuts" in prepare_dataset(pairs, tiny_tokenizer()).report.warnings[0]


def test_the_length_that_keeps_99_percent():
    lengths = [3, 5, 8, 100, 40, 40, 7]
    best = shortest_that_keeps(lengths)
    total = sum(lengths)
    assert lost(lengths, best)[1] <= 0.01 * total < lost(lengths, best - 1)[1]
    assert Lengths.of([]) == Lengths(0, 0, 0, 0, 0)


def test_the_report_reads_and_serialises():
    rows = [*ROWS, ROWS[3], {"messages": [user("a"), assistant(" ")]}]
    report = prepare_dataset(rows, own("phi3_ends"), max_length=64, validation=0.1).report
    said = " ".join(str(report).split())
    for part in (
        "Format: messages",
        "40",
        "learnt",
        "dropped: exact duplicate of an earlier row",
        "1 (row 40)",
        "cut to 64",
    ):
        assert part in said
    assert "an answer ends with <|end|>" in said
    assert "the tokenizer's end token is <|endoftext|>, but answers end with <|end|>" in said
    assert "Batches are padded with <|endoftext|>. " in said
    assert "Validation: 10.0% of the rows" in said
    found = json.loads(json.dumps(report.to_dict()))
    assert found["splits"]["train"]["dropped"]["empty answer"] == [41]
    assert found["splits"]["validation"]["supervised_share"] == report.validation.supervised_share
    assert found["template"] == "prefix"
    counted = found["splits"]["train"]
    lost_rows = sum(map(len, counted["dropped"].values()))
    assert counted["rows_in"] == counted["rows_out"] + lost_rows
    report.print()


def test_a_preview_shows_every_token_and_what_is_learnt(capsys):
    tokenizer = tiny_tokenizer()
    data = prepare_dataset(
        [{"messages": [system("s"), user("q\n?"), assistant("ja 🦊"), user("w"), assistant("z")]}], tokenizer
    )
    shown = data.preview(0)
    row = data.train[0]
    assert [token.id for token in shown.tokens] == row["input_ids"]
    assert [token.learnt for token in shown.tokens] == [label != -100 for label in row["labels"]]
    assert "".join(token.text for token in shown.tokens) == tokenizer.decode(row["input_ids"])
    assert {token.text for token in shown.tokens if token.special} == {"<|im_start|>", "<|im_end|>"}
    text = str(shown)
    assert "assistant\xb6\n\xabja 🦊<|im_end|>\xbb\xb6\n" in text
    assert "q\xb6\n?" in text
    assert text.count("\xab") == text.count("\xbb") == 2
    assert repr(shown) == f"Preview({len(row['input_ids'])} tokens, {sum(x != -100 for x in row['labels'])} learnt)"
    shown.print()
    assert capsys.readouterr().out.rstrip() == text.rstrip()
    html = shown._repr_html_()
    assert "<b>&lt;|im_end|&gt;</b>" in html
    assert "\xabja 🦊" in html
    assert str(data.preview(row)) == str(preview(row, tokenizer)) == text
    assert str(preview({"messages": row["messages"]}, tokenizer)) == text


def test_a_preview_of_preferences_shows_both_answers():
    row = {"prompt": "q", "chosen": "good", "rejected": "bad"}
    data = prepare_dataset([row, {**row, "prompt": "r"}], tiny_tokenizer(), validation=1)
    shown = data.preview(0, split="validation")
    assert list(shown.parts) == ["chosen", "rejected"]
    assert "\xabgood<|im_end|>\xb6\n\xbb" in str(shown)
    assert "\xabbad<|im_end|>\xb6\n\xbb" in str(shown)
    with pytest.raises(ConflictError, match="no row 5: train has 1 rows"):
        data.preview(5)
    with pytest.raises(ForgeError, match="empty answer"):
        preview({"prompt": "q", "completion": ""}, tiny_tokenizer())
    with pytest.raises(ConflictError, match="no validation set"):
        prepare_dataset([row], tiny_tokenizer()).preview(0, split="validation")


def test_a_preview_in_colour():
    from io import StringIO

    import rich.console

    out = StringIO()
    console = rich.console.Console(file=out, force_terminal=True, color_system="standard", highlight=False)
    data = prepare_dataset(ROWS[:1], tiny_tokenizer())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rich.console, "Console", lambda **_: console)
        data.preview().print()
    assert "\x1b[32ma" in out.getvalue()  # green
    assert "\x1b[1;32m<|im_end|>" in out.getvalue()  # bold


def test_sentencepiece_keeps_its_spaces_and_masks():
    tokenizer = sentencepiece_like()
    messages = [user("word wörd"), assistant("a word ñ"), user("w"), assistant("word")]
    data = prepare_dataset([{"messages": messages}], tokenizer)
    shown = data.preview()
    assert "".join(token.text for token in shown.tokens if token.learnt).replace("</s>", "|").split("|")[:2] == [
        " a word ñ ",
        " word ",
    ]
    assert data.report.stop_tokens == ("</s>",)
    plain = prepare_dataset([{"text": "word word"}], tokenizer).train[0]
    assert tokenizer.convert_ids_to_tokens(plain["input_ids"])[-1] == "</s>"
    pair = prepare_dataset([{"prompt": "[INST] word [/INST]", "completion": " word"}], sentencepiece_like()).train[0]
    assert pair["completion"] == [assistant(" word")]  # no control tokens in this vocabulary


def test_padding_tokens():
    assert pad_token_id(tiny_tokenizer()) == 0
    for reserved in ("<|finetune_right_pad_id|>", "<pad>", "<|pad|>"):
        tokenizer = with_template(OWN["llama3_dated"] + reserved, "llama3")
        tokenizer.add_tokens([reserved])
        assert tokenizer.pad_token is None
        own_pad = tokenizer.convert_tokens_to_ids(reserved)
        # The tiny tokenizer has <|pad|> of its own, which comes after the others in rank.
        assert pad_token_id(tokenizer) == own_pad
        assert tokenizer.pad_token is None
    bare = sentencepiece_like()
    assert pad_token_id(bare) == bare.eos_token_id
    bare.eos_token = None
    with pytest.raises(UnsupportedError, match=r"tokenizer\.pad_token"):
        pad_token_id(bare)


def test_stop_tokens():
    tokenizer = own("phi3_ends")
    end, over = tokenizer.convert_tokens_to_ids("<|end|>"), tokenizer.eos_token_id
    assert stop_token_ids(tokenizer) == [over, end]
    assert stop_token_ids(tokenizer, GenerationConfig(eos_token_id=[7, end])) == [7, end, over]
    assert stop_token_ids(tokenizer, GenerationConfig(eos_token_id=9)) == [9, over, end]
    assert stop_token_ids(tiny_tokenizer(chat_template=None)) == [2]
    assert stop_token_ids(tiny_tokenizer(chat_template="{{ raise_exception('no') }}")) == [2]


def test_prompts():
    tokenizer = tiny_tokenizer()
    row = prepare_dataset([{"messages": [user("q"), assistant("a"), user("r"), assistant("b")]}], tokenizer).train[0]
    prompt, reference = question_and_reference(row)
    assert (prompt, reference) == (row["messages"][:3], "b")
    ids = encode_prompt(tokenizer, prompt)
    assert row["input_ids"][: len(ids)] == ids
    assert tokenizer.decode(row["input_ids"][len(ids) :]) == "b<|im_end|>\n"
    assert encode_prompt(tokenizer, "abc") == tokenizer("abc")["input_ids"]
    with pytest.raises(UnsupportedError, match="no chat template"):
        encode_prompt(tiny_tokenizer(chat_template=None), prompt)
    with pytest.raises(UnsupportedError, match=r"refuses a prompt with the roles \['system', 'user'\]"):
        encode_prompt(own("gemma2"), [system("s"), user("q")])
    with pytest.raises(ConflictError, match="No format fits"):
        question_and_reference({"foo": 1})
    assert question_and_reference({"messages": [user("q")]}) is None


def test_prompts_of_tokenizers_that_end_texts():
    from tokenizers.processors import TemplateProcessing

    tokenizer = tiny_tokenizer(chat_template=None)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|im_start|> $A <|im_end|>", special_tokens=[("<|im_start|>", 1), ("<|im_end|>", 2)]
    )
    assert encode_prompt(tokenizer, "ab")[0] == 1
    assert encode_prompt(tokenizer, "ab")[-1] != 2
    assert encode_prompt(tokenizer, "<|im_start|>ab").count(1) == 1
    row = prepare_dataset([{"text": "ab"}], tokenizer).train[0]
    assert tokenizer.decode(row["input_ids"]) == "<|im_start|>ab<|im_end|>"
    pair = prepare_dataset([{"prompt": "a", "completion": "b"}], tokenizer).train[0]
    assert tokenizer.decode(pair["input_ids"]) == "<|im_start|>ab<|im_end|>"


def test_the_collator_pads_labels_with_nothing_to_learn():
    data = prepare_dataset(ROWS[:3], tiny_tokenizer())
    batch = data.collator()([data.train[0], data.train[2]])
    assert torch.equal(
        batch["attention_mask"].sum(1), torch.tensor([len(data.train[0]["labels"]), len(data.train[2]["labels"])])
    )
    assert torch.all(batch["labels"][batch["attention_mask"] == 0] == -100)


def test_preferences_need_messages_of_one_type():
    rows = [
        {"prompt": f"{x}", "chosen": [{"role": "assistant", "content": "a", "x": x}], "rejected": [assistant("b")]}
        for x in (1, "one")
    ]
    for row in rows:
        row["prompt"] = [user(row["prompt"])]
    with pytest.raises(UnsupportedError, match="no type in common"):
        prepare_dataset(rows, tiny_tokenizer())


def test_padding_with_the_end_token_is_said_to_be_harmless():
    said = " ".join(str(prepare_dataset(ROWS[:2], sentencepiece_like()).report).split())
    assert "padded with </s>, which ends answers too: harmless" in said


def test_the_tokenizer_is_left_alone():
    tokenizer = own("mistral")
    before = (tokenizer.pad_token, tokenizer.eos_token, tokenizer.chat_template, len(tokenizer), tokenizer.padding_side)
    prepare_dataset(ROWS[:4], tokenizer, validation=1).preview()
    assert (
        tokenizer.pad_token,
        tokenizer.eos_token,
        tokenizer.chat_template,
        len(tokenizer),
        tokenizer.padding_side,
    ) == before


class Slow:
    """What ByT5's tokenizer is: bytes, without places."""

    @staticmethod
    def load(chat_template=None):
        from transformers import ByT5Tokenizer

        tokenizer = ByT5Tokenizer()
        tokenizer.chat_template = chat_template
        return tokenizer


@pytest.mark.filterwarnings("ignore:This sequence already has")
def test_tokenizers_without_places():
    tokenizer = Slow.load()
    assert not tokenizer.is_fast
    row = prepare_dataset([{"text": "abc"}], tokenizer).train[0]
    assert tokenizer.decode(row["input_ids"]) == "abc</s>"
    assert row["labels"] == [-100, *row["input_ids"][1:]]
    row = prepare_dataset([{"prompt": "ab", "completion": "cd"}], tokenizer).train[0]
    assert tokenizer.decode([label for label in row["labels"] if label != -100]) == "cd</s>"
    with pytest.raises(UnsupportedError, match="Load the fast tokenizer"):
        prepare_dataset([{"messages": [user("q"), assistant("a")]}], Slow.load(OWN["smollm2"]))


@pytest.mark.filterwarnings("ignore:This sequence already has")
def test_a_prompt_that_runs_into_its_answer_without_places():
    from tokenizers import AddedToken

    tokenizer = Slow.load()
    tokenizer.add_tokens([AddedToken("bc")])
    with pytest.raises(UnsupportedError, match=r"cannot be told apart\. Load the fast tokenizer"):
        prepare_dataset([{"prompt": "ab", "completion": "cd"}], tokenizer)


def test_a_beginning_of_sequence_token_is_written_once():
    tokenizer = sentencepiece_like()
    tokenizer.chat_template = None
    tokenizer.add_bos_token = True
    tokenizer.update_post_processor() if hasattr(tokenizer, "update_post_processor") else None
    for text in ("word", "<s>word", ""):
        ids = encode_prompt(tokenizer, text)
        expected = tokenizer(text, add_special_tokens=not text.startswith("<s>"))["input_ids"]
        assert ids == expected
        assert ids.count(tokenizer.bos_token_id) <= 1


def test_whole_numbers_of_any_kind():
    import numpy as np

    tokenizer = tiny_tokenizer()
    rows = [{"prompt": "q", "completion": "a" * 50}]
    data = prepare_dataset(rows, tokenizer, max_length=np.int64(40))
    assert (data.report.max_length, len(data.train[0]["input_ids"])) == (40, 40)
    json.dumps(data.report.to_dict())
    assert str(data.preview(np.int64(0))) == str(data.preview(0))
    for asked in (3.0, "10", True):
        with pytest.raises(ConflictError, match="is no whole number"):
            prepare_dataset(rows, tokenizer, max_length=asked)
    with pytest.raises(ConflictError, match="neither a row nor the number of one"):
        data.preview("0")


def test_the_format_can_be_named_wherever_rows_are_read():
    tokenizer = tiny_tokenizer()
    both = {"messages": [user("q"), assistant("from messages")], "prompt": "q", "completion": "from the pair"}
    for format, said in (("messages", "from messages"), ("prompt-completion", "from the pair")):
        data = prepare_dataset([both], tokenizer, format=format)
        assert f"{said}<|im_end|>" in str(data.preview(both))
        assert str(preview(both, tokenizer, format=format)) == str(data.preview(both)) == str(data.preview(0))
        assert question_and_reference(both, chat=True, format=format) == ([user("q")], said)
    for read in (lambda: preview(both, tokenizer), lambda: question_and_reference(both)):
        with pytest.raises(ConflictError, match="more than one way"):
            read()


def test_one_is_not_many():
    data = prepare_dataset([{"prompt": "q", "completion": "a" * 50}], tiny_tokenizer(), max_length=40)
    assert "1 row, which lost" in str(data.report)
    assert "1 rows" not in str(data.report)
    validation = [{"prompt": "else", "completion": "a"}]
    held = prepare_dataset([{"prompt": "q", "completion": "a"}], tiny_tokenizer(), validation=validation)
    assert held.report.validation_from == "validation, 1 row"


def test_rows_of_which_nothing_is_left_count_as_cut():
    rows = [{"prompt": "q" * 100, "completion": "a"}, {"prompt": "q", "completion": "a" * 30}]
    tokenizer = tiny_tokenizer()
    whole = prepare_dataset(rows, tokenizer).report.train
    report = prepare_dataset(rows, tokenizer, max_length=40).report
    assert report.train.dropped == {"nothing of the answer left after max_length": [0]}
    assert report.train.lengths == whole.lengths
    assert (report.train.truncated_rows, report.train.truncated_tokens) == (2, whole.lengths.total - 80)
    assert report.max_length_keeping_99_percent == prepare_dataset(rows, tokenizer).report.max_length_keeping_99_percent
