"""BERTScore: bert-score's numbers where it works, and what it dies of or gets wrong without saying."""

import json
import logging
import shutil
import subprocess
import sys
import threading
import warnings
from collections import defaultdict
from pathlib import Path

import pytest

from forge.errors import ConflictError, ForgeError, ForgeWarning, NonFiniteError, UnsupportedError
from forge.evaluation.bert_score import BertScore, BertScores
from support.encoders import ENCODERS, LAYERS, POSITIONS, save_encoder

EXACT = 1e-6
# What ConvBERT makes of a text depends on the padding beside it, so bert-score is itself only without any.
ALONE = {"convbert"}
# bert-score looks for layers that transformers 5 calls otherwise.
BEYOND = {"squeezebert"}


@pytest.fixture(scope="module")
def pairs(conversations):
    """Answers of real people, beside what they say next: 44 pairs with doubles among them."""
    talks = [talk for talk in conversations[:200] if len(talk) > 4][:40]
    candidates, references = ([talk[turn]["content"] for talk in talks] for turn in (1, 3))
    return [*candidates, *candidates[:4]], [*references, *references[:2], *candidates[:2]]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The folder of a tiny encoder, made once."""
    made = {}

    def make(name, called=None, **options):
        key = (name, called, *options.items())
        if key not in made:
            made[key] = save_encoder(name, tmp_path_factory.mktemp("encoders") / (called or name), **options)
        return made[key]

    return make


def theirs(folder, num_layers, candidates, references, **options):
    """bert-score's own numbers: three lists."""
    import bert_score

    scorer = bert_score.BERTScorer(model_type=str(folder), num_layers=num_layers, device="cpu")
    return [column.tolist() for column in scorer.score(candidates, references, **options)]


def ours(scores):
    return [scores.precision, scores.recall, scores.f1]


def furthest(found, expected):
    return max(
        abs(a - b) for mine, other in zip(found, expected, strict=True) for a, b in zip(mine, other, strict=True)
    )


class TestTheirNumbers:
    @pytest.mark.parametrize(("num_layers", "batch_size"), [(0, 64), (4, 7), (6, 64), (6, 1)])
    def test_on_a_real_encoder(self, minilm, pairs, num_layers, batch_size):
        scores = BertScore(minilm, num_layers, batch_size=batch_size).score(*pairs)
        expected = theirs(minilm, num_layers, *pairs, batch_size=batch_size)
        assert furthest(ours(scores), expected) < EXACT
        assert len(set(scores.f1)) > 35  # nothing is compared that is the same for all

    def test_with_several_references(self, minilm, pairs):
        candidates, references = pairs
        candidates = candidates[:30]
        several = [references[place : place + 1 + place % 3] for place in range(30)]
        scorer = BertScore(minilm, 6)
        scores = scorer.score(candidates, several)
        assert furthest(ours(scores), theirs(minilm, 6, candidates, several)) < EXACT
        assert scores.mean > scorer.score(candidates, references[:30]).mean

    def test_texts_and_lists_of_texts_may_be_mixed(self, minilm):
        score = BertScore(minilm, 6).score
        mixed = score(["Good morning!", "No."], ["Hello!", ["Yes.", "No, thanks."]])
        assert mixed.f1[0] == pytest.approx(score(["Good morning!"], ["Hello!"]).f1[0], abs=EXACT)
        assert mixed.f1[1] == pytest.approx(max(score(["No.", "No."], ["Yes.", "No, thanks."]).f1), abs=EXACT)

    @pytest.mark.parametrize("name", sorted(set(ENCODERS) - BEYOND))
    def test_on_every_architecture(self, name, saved, pairs):
        candidates, references = (texts[:24] for texts in pairs)
        batch_size = 1 if name in ALONE else 8
        for num_layers in (LAYERS - 1, LAYERS):
            scores = BertScore(saved(name), num_layers, batch_size=8).score(candidates, references)
            expected = theirs(saved(name), num_layers, candidates, references, batch_size=batch_size)
            assert furthest(ours(scores), expected) < EXACT
        assert max(scores.f1) - min(scores.f1) > 0.05

    @pytest.mark.filterwarnings("ignore:The given NumPy array is not writable:UserWarning")  # bert-score's pandas
    def test_with_a_baseline(self, saved, pairs, monkeypatch):
        """The model is not the baseline's, which is of twelve layers: only the arithmetic is bert-score's."""
        import bert_score

        folder = saved("roberta", "roberta-base")
        path = Path(bert_score.__file__).parent / "rescale_baseline/en/roberta-base.tsv"
        scorer = bert_score.BERTScorer(
            str(folder), 2, device="cpu", lang="en", rescale_with_baseline=True, baseline_path=str(path)
        )
        expected = [column.tolist() for column in scorer.score(*pairs)]
        monkeypatch.setattr("forge.evaluation.known_encoders._other_depth", lambda *_: False)
        scores = BertScore(folder, 2, rescale_with_baseline=True).score(*pairs)
        assert furthest(ours(scores), expected) < EXACT
        assert scores.rescaled
        assert "rescaled" in scores.describe()

    def test_windows_and_the_cache_change_nothing(self, saved, pairs, monkeypatch):
        whole = BertScore(saved("bert"), 2, batch_size=8).score(*pairs)
        monkeypatch.setattr("forge.evaluation.bert_score.WINDOW", 2)
        scorer = BertScore(saved("bert"), 2, batch_size=8)
        for _ in range(2):
            assert furthest(ours(scorer.score(*pairs)), ours(whole)) < EXACT

    def test_a_checkpoint_in_16_bits_is_computed_in_32(self, saved, pairs, tmp_path):
        """bert-score follows the checkpoint, and its numbers then depend on the batch."""
        import torch
        from transformers import AutoModel, AutoTokenizer

        model = AutoModel.from_pretrained(saved("bert"), dtype=torch.bfloat16)
        for folder, dtype in (("half", torch.bfloat16), ("whole", torch.float32)):
            model.to(dtype).save_pretrained(tmp_path / folder)
            AutoTokenizer.from_pretrained(saved("bert")).save_pretrained(tmp_path / folder)
        scores = BertScore(tmp_path / "half", 2).score(*pairs)
        assert furthest(ours(scores), theirs(tmp_path / "whole", 2, *pairs)) < EXACT


class TestWhatItDiesOf:
    EMPTY = ("", " \n\t", "\u200b", "\x01")

    @pytest.mark.parametrize("empty", EMPTY)
    def test_texts_without_a_token_score_nothing_and_leave_the_others_alone(self, minilm, empty):
        scorer = BertScore(minilm, 6)
        alone = scorer.score(["Good morning!"], ["Hello!"])
        scores = scorer.score(["Good morning!", empty, "Hello!", empty], ["Hello!", "Hello!", empty, empty])
        assert scores.precision[1:] == scores.recall[1:] == scores.f1[1:] == (0, 0, 0)
        assert scores.f1[0] == pytest.approx(alone.f1[0], abs=EXACT)
        assert scores.empty == 3
        assert "3 pairs scored 0, being empty" in scores.describe()

    def test_a_text_of_special_tokens_only_is_empty(self, minilm):
        scores = BertScore(minilm, 6).score(["[SEP]", "[CLS][SEP]"], ["Hello!", "[SEP]"])
        assert scores.f1 == (0, 0)
        assert scores.empty == 2

    def test_all_may_be_empty(self, saved):
        scores = BertScore(saved("bert"), 2).score(["", " "], ["a", ""])
        assert (scores.mean, scores.empty) == (0, 2)

    def test_an_empty_reference_among_others_is_passed_over(self, saved):
        scorer = BertScore(saved("bert"), 2)
        with_empty = scorer.score(["hello there"], [["", "hi there", "  "]])
        assert with_empty.f1 == pytest.approx(scorer.score(["hello there"], ["hi there"]).f1, abs=EXACT)
        assert with_empty.empty == 0

    def test_empty_scores_nothing_on_the_scale_of_a_baseline_too(self, saved, monkeypatch):
        monkeypatch.setattr("forge.evaluation.known_encoders._other_depth", lambda *_: False)
        scorer = BertScore(saved("roberta", "roberta-base"), 2, rescale_with_baseline=True)
        assert scorer.score(["", "one"], ["text", ""]).f1 == (0, 0)

    @pytest.mark.parametrize("name", ["bert", "roberta", "t5", "bart", "longformer"])
    def test_a_tokenizer_without_a_maximum(self, name, saved):
        """bert-score: OverflowError; a text that is longer than the encoder: IndexError."""
        folder = saved(name, f"{name}-unlimited", max_length=None)
        scorer = BertScore(folder, 2)
        assert scorer.max_tokens == (ENCODERS[name][3] or 512)
        long, short = "many words " * 90, "a few words"
        scores = scorer.score([long, short], [short, short])
        assert scores.f1[1] == pytest.approx(1, abs=EXACT)
        assert scores.cut == 1
        assert "1 text compared in part" in scores.describe()

    @pytest.mark.parametrize("name", [name for name in ENCODERS if ENCODERS[name][3]])
    def test_the_longest_text_is_one_that_the_encoder_has_positions_for(self, name, saved):
        import torch

        scorer = BertScore(saved(name, f"{name}-long", max_length=10**6), LAYERS).load()
        assert scorer.max_tokens == ENCODERS[name][3]
        module = scorer._loaded_encoder.module
        ids = torch.full((1, scorer.max_tokens), 10)
        assert torch.isfinite(module(ids, attention_mask=torch.ones_like(ids))[0]).all()
        if any("position" in path and "Embedding" in type(m).__name__ for path, m in module.named_modules()):
            longer = torch.full((1, scorer.max_tokens + 1), 10)
            if name in {"longformer", "pegasus"}:  # pads to its window, or computes its positions
                return
            with pytest.raises((IndexError, RuntimeError)):
                module(longer, attention_mask=torch.ones_like(longer))

    def test_a_text_at_the_limit_is_not_cut(self, saved):
        scorer = BertScore(saved("bert"), 2)
        at_the_limit = "a" * (scorer.max_tokens - 2)
        assert scorer.score([at_the_limit], ["b"]).cut == 0
        assert scorer.score([at_the_limit + "a"], ["b"]).cut == 1

    def test_layers_that_transformers_5_calls_otherwise(self, saved, pairs):
        name = "squeezebert"
        assert BertScore(saved(name), 0).score(*pairs).mean != BertScore(saved(name), LAYERS).score(*pairs).mean


class TestWhatItGetsWrong:
    @pytest.mark.parametrize("name", ["t5", "mt5"])
    def test_a_t5_in_a_folder_of_any_name(self, name, saved, pairs):
        """bert-score: "Not supported"."""
        candidates, references = pairs
        scores = BertScore(saved(name, "paraphraser"), 2).score(candidates, references)
        assert furthest(ours(scores), theirs(saved(name), 2, candidates, references)) < EXACT

    @pytest.mark.parametrize("name", ["bert", "roberta", "distilbert"])
    def test_another_encoder_in_a_folder_with_t5_in_it(self, name, saved, pairs, tmp_path):
        """bert-score loads a T5 with random weights, and scores with it."""
        shutil.copytree(saved(name), tmp_path / "not-t5")
        scores = BertScore(tmp_path / "not-t5", 2).score(*pairs)
        assert furthest(ours(scores), theirs(saved(name), 2, *pairs)) < EXACT

    def test_a_word_of_t5s_is_not_empty(self, saved):
        """One token and the end are two, which bert-score takes for an empty text: precision and recall 0, F1 not."""
        candidates, references = ["a", "a", "b", "cat"], ["a", "b", "cat", "a"]
        scores = BertScore(saved("t5"), 2).score(candidates, references)
        precision, recall, f1 = theirs(saved("t5"), 2, candidates, references)
        assert (precision[0], recall[0]) == (0, 0)
        assert scores.precision[0] == pytest.approx(1, abs=EXACT)
        assert scores.f1 == pytest.approx(f1, abs=EXACT)

    def test_a_text_scores_the_same_in_every_batch_also_with_convolutions(self, saved, pairs):
        scorer = BertScore(saved("convbert"), 2)
        together = scorer.score(*pairs).f1
        alone = [BertScore(saved("convbert"), 2).score([c], [r]).f1[0] for c, r in list(zip(*pairs, strict=True))[:5]]
        assert together[:5] == pytest.approx(alone, abs=EXACT)
        assert scorer._loaded_encoder.feels_padding

    def test_weights_that_are_not_in_the_checkpoint_are_refused(self, saved, tmp_path):
        from safetensors.torch import load_file, save_file

        shutil.copytree(saved("bert"), tmp_path / "lacking")
        weights = load_file(tmp_path / "lacking/model.safetensors")
        for name in [name for name in weights if "layer.1.output" in name]:
            del weights[name]
        save_file(weights, tmp_path / "lacking/model.safetensors", metadata={"format": "pt"})
        with pytest.raises(UnsupportedError, match=r"no weights for 4 of .* such as encoder.layer.1.output"):
            BertScore(tmp_path / "lacking", 2).load()
        # Layers that are not used may lack theirs, and so may the pooler.
        assert BertScore(tmp_path / "lacking", 1).score(["a"], ["a"]).mean == pytest.approx(1, abs=EXACT)

    def test_a_checkpoint_without_a_pooler_is_complete(self, saved, pairs):
        def without_pooler(model):
            model.pooler = None

        folder = saved("bert", "headless", change=without_pooler)
        assert (
            furthest(ours(BertScore(folder, 2).score(*pairs)), ours(BertScore(saved("bert"), 2).score(*pairs))) < EXACT
        )

    def test_weights_that_are_not_finite_are_refused(self, saved):
        def broken(model):
            model.encoder.layer[0].output.dense.weight.data[0, 0] = float("nan")

        with pytest.raises(NonFiniteError, match=r"encoder\.layer\.0\.output\.dense\.weight"):
            BertScore(saved("bert", "broken", change=broken), 2).score(["a"], ["b"])

    def test_an_overflow_in_the_encoder_is_no_score(self, saved):
        def huge(model):
            model.encoder.layer[1].output.LayerNorm.weight.data.fill_(3e38)

        with pytest.raises(NonFiniteError, match="computed NaN for 'ab' against 'cd'"):
            BertScore(saved("bert", "huge", change=huge), 2).score(["ab"], ["cd"])

    def test_a_tokenizer_of_another_model(self, saved, tmp_path):
        shutil.copytree(saved("bert"), tmp_path / "mixed")
        for path in saved("roberta").glob("*token*"):
            shutil.copy(path, tmp_path / "mixed")
        (tmp_path / "mixed/vocab.txt").unlink(missing_ok=True)
        with pytest.raises(UnsupportedError, match="do not belong together"):
            BertScore(tmp_path / "mixed", 2).score(["hello"], ["πού;"])


class TestBeforeATraining:
    def test_making_one_reads_no_weights(self, saved, tmp_path):
        shutil.copytree(saved("bert"), tmp_path / "bert")
        (tmp_path / "bert/model.safetensors").write_bytes(b"no weights")
        scorer = BertScore(tmp_path / "bert", 2)
        with pytest.raises(UnsupportedError, match="cannot be loaded"):
            scorer.load()

    @pytest.mark.parametrize("num_layers", [-1, LAYERS + 1, True, 2.0, "2"])
    def test_a_layer_that_is_not_there(self, saved, num_layers):
        with pytest.raises(ForgeError, match=f"has {LAYERS} layers"):
            BertScore(saved("bert"), num_layers)

    def test_no_layer_for_an_unknown_model_is_the_last_and_says_so(self, saved):
        with pytest.warns(ForgeWarning, match=f"its last is used: {LAYERS}. Pass num_layers={LAYERS}") as caught:
            scorer = BertScore(saved("bert"))
        assert scorer.num_layers == LAYERS
        assert caught[0].filename == __file__

    @pytest.mark.parametrize(
        "place", ["sshleifer/tiny-mbart", "sshleifer--tiny-mbart", "models--sshleifer--tiny-mbart/snapshots/0a1b"]
    )
    def test_bert_scores_layer_for_a_folder_that_is_called_as_a_model_it_knows(self, saved, tmp_path, place, caplog):
        shutil.copytree(saved("bart"), tmp_path / place)
        with caplog.at_level(logging.INFO, "forge"):
            assert BertScore(tmp_path / place).num_layers == 2
        assert "layer 2 of 3, bert-score's choice for sshleifer/tiny-mbart" in caplog.text

    @pytest.mark.parametrize("place", ["roberta-large", "somebody--tiny-mbart", "my-tiny-mbart"])
    def test_another_models_layer_is_not_taken(self, saved, tmp_path, place):
        shutil.copytree(saved("roberta"), tmp_path / place)
        with pytest.warns(ForgeWarning, match="its last is used"):
            assert BertScore(tmp_path / place).num_layers == LAYERS

    def test_a_model_that_is_not_here_names_what_helps(self):
        with pytest.raises(UnsupportedError, match=r"'roberta-large' cannot be had.*forge\.assets\.minilm\(\)"):
            BertScore()

    @pytest.mark.parametrize("name", ["/no/such/folder", "./encoders/none"])
    def test_a_folder_that_is_not_there(self, name):
        with pytest.raises(ForgeError, match="There is no folder"):
            BertScore(name)

    def test_a_folder_without_weights(self, saved, tmp_path):
        shutil.copytree(saved("bert"), tmp_path / "bert")
        (tmp_path / "bert/model.safetensors").unlink()
        with pytest.raises(UnsupportedError, match="a config and no weights"):
            BertScore(tmp_path / "bert", 2)

    def test_a_folder_without_a_tokenizer(self, saved, tmp_path):
        shutil.copytree(saved("bert"), tmp_path / "bert")
        for path in (tmp_path / "bert").iterdir():
            if path.name not in {"config.json", "model.safetensors"}:
                path.unlink()
        with pytest.raises(UnsupportedError, match="its vocabulary is missing"):
            BertScore(tmp_path / "bert", 2)

    @pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3"])
    def test_a_decoder(self, family, text_model, tokenizer, tmp_path):
        text_model(family).save_pretrained(tmp_path)
        tokenizer.save_pretrained(tmp_path)
        with pytest.raises(UnsupportedError, match=r"is a decoder .*only what is to their left"):
            BertScore(tmp_path, 2)

    def test_no_encoder_at_all(self, tmp_path):
        from transformers import ResNetConfig

        ResNetConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1]).save_pretrained(tmp_path)
        with pytest.raises(UnsupportedError, match="ResNetModel keeps its layers where"):
            BertScore(tmp_path, 2)

    @pytest.mark.parametrize(("lang", "num_layers"), [("en", 2), ("xx", 2)])
    def test_no_baseline(self, saved, lang, num_layers):
        with pytest.raises(UnsupportedError, match=f"no baseline for .*bert in '{lang}'"):
            BertScore(saved("bert"), num_layers, lang=lang, rescale_with_baseline=True)

    def test_no_baseline_in_this_language_names_those_there_are(self, saved, monkeypatch):
        monkeypatch.setattr("forge.evaluation.known_encoders._other_depth", lambda *_: False)
        with pytest.raises(UnsupportedError, match="for this model in: en"):
            BertScore(saved("roberta", "roberta-base"), 2, lang="de", rescale_with_baseline=True)

    @pytest.mark.parametrize("options", [{"batch_size": 0}, {"batch_size": 2.5}, {"lang": ""}, {"device": "cuda:99"}])
    def test_options_that_are_none(self, saved, options):
        with pytest.raises(ForgeError, match=next(iter(options))):
            BertScore(saved("bert"), 2, **options)


class TestScore:
    @pytest.fixture
    def scorer(self, saved):
        return BertScore(saved("bert"), 2)

    @pytest.mark.parametrize(
        ("candidates", "references", "message"),
        [
            (["a"], ["a", "b"], "1 candidates and 2 references"),
            ([], [], "no pairs"),
            (["a", None], ["a", "b"], r"candidates\[1\] is None"),
            (["a", "b"], ["a", float("nan")], r"references\[1\] is nan"),
            (["a"], [["b", 3]], r"references\[0\] is 3"),
            (["a"], [[]], r"references\[0\] is an empty list"),
            ("abc", "abc", "candidates is a str"),
            (["a"], "b", "references is a str"),
            (3, ["b"], "candidates is a int"),
        ],
    )
    def test_what_is_no_pair_of_texts(self, scorer, candidates, references, message):
        with pytest.raises(ConflictError, match=message):
            scorer.score(candidates, references)

    def test_the_weights_are_loaded_once(self, scorer, monkeypatch):
        import forge.evaluation.bert_score as module

        calls, real = [], module.load_encoder
        monkeypatch.setattr(module, "load_encoder", lambda *a: calls.append(a) or real(*a))
        for _ in range(3):
            scorer.score(["a"], ["b"])
        assert len(calls) == 1

    def test_references_of_earlier_calls_are_not_encoded_again(self, scorer, pairs, monkeypatch):
        import forge.evaluation.bert_score as module

        encoded, real = [], module.embed
        monkeypatch.setattr(
            module, "embed", lambda e, t, texts, *rest: encoded.append(set(texts)) or real(e, t, texts, *rest)
        )
        candidates, references = pairs
        first = scorer.score(candidates, references)
        second = scorer.score([text + "!" for text in candidates], references)
        assert encoded[0] == {*candidates, *references}
        assert not encoded[1] & set(references)
        assert first.f1 != second.f1

    def test_threads_wait_for_one_another(self, scorer, pairs):
        expected, found = scorer.score(*pairs), defaultdict(list)

        def work(number):
            candidates, references = (texts[::-1] if number % 2 else texts for texts in pairs)
            for _ in range(3):
                found[number].append(scorer.score(candidates, references))

        threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert [len(found[number]) for number in range(4)] == [3] * 4
        for number, results in found.items():
            for scores in results:
                assert (scores.f1[::-1] if number % 2 else scores.f1) == pytest.approx(expected.f1, abs=EXACT)

    def test_nothing_is_printed_or_warned_of(self, scorer, pairs, capsys):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            scorer.load()
            capsys.readouterr()  # transformers' bar
            scorer.score([*pairs[0], "", "a"], [*pairs[1], "a", ""])
        assert capsys.readouterr() == ("", "")

    def test_a_line_for_the_log(self, scorer, caplog):
        with caplog.at_level(logging.INFO, "forge"):
            scorer.score(["one two", "three"], ["one two", "three"])
        assert caplog.messages[-1] == "BERTScore 1.000 on 2 pairs (precision 1.000, recall 1.000)"

    def test_the_result_as_json(self, scorer):
        found = json.loads(json.dumps(scorer.score(["one", ""], ["two", "three"]).to_dict()))
        assert found["mean"] == pytest.approx(sum(found["f1"]) / 2)
        assert (found["encoder"], found["num_layers"], found["empty"]) == ("bert", 2, 1)
        assert len(BertScores((0.5,), (0.5,), (0.5,))) == 1

    def test_what_it_is_called(self, scorer, saved):
        assert scorer.model_type == str(saved("bert"))
        assert repr(scorer) == f"BertScore({str(saved('bert'))!r}, layer 2 of {LAYERS})"


class TestCache:
    def embedded(self, rows):
        import torch

        from forge.evaluation.embeddings import Embedded

        return Embedded(torch.zeros(rows, 9), torch.zeros(rows))  # 40 bytes a row

    def cache(self, rows):
        from forge.evaluation.embeddings import EmbeddingCache

        return EmbeddingCache(40 * rows)

    def test_what_was_read_longest_ago_goes(self):
        cache = self.cache(3)
        cache.add({name: self.embedded(1) for name in "abc"}, set("abc"))
        cache.get("a")
        cache.add({"d": self.embedded(1)}, {"d"})
        assert set(cache.get("abcd")) == set("acd")

    def test_what_the_call_reads_stays(self):
        cache = self.cache(3)
        for _ in range(3):
            cache.add({name: self.embedded(1) for name in "abcdef" if name not in cache.get(name)}, set("abcdef"))
        assert set(cache.get("abcdef")) == set("abc")

    def test_what_is_larger_than_all_of_it_is_not_kept(self):
        cache = self.cache(3)
        cache.add({"a": self.embedded(4)}, {"a"})
        assert len(cache) == 0

    def test_no_batch_stays_alive_behind_a_text(self):
        import torch

        from forge.evaluation.embeddings import Embedded

        batch, cache = torch.zeros(100, 9), self.cache(3)
        cache.add({"a": Embedded(batch[:2], torch.zeros(2))}, {"a"})
        assert cache.get("a")["a"].vectors.untyped_storage().nbytes() == 2 * 9 * 4


def test_importing_it_is_light_and_using_it_leaves_matplotlib_alone(minilm):
    code = f"""
import sys
import forge.evaluation.bert_score as module
assert not {{"bert_score", "matplotlib", "torch", "transformers"}} & set(sys.modules), "heavy"
module.BertScore({str(minilm)!r}, 6)
import matplotlib
assert matplotlib.get_backend(auto_select=False) is None, "a backend was chosen"
"""
    subprocess.run([sys.executable, "-W", "error::UserWarning", "-c", code], check=True, timeout=120)


assert POSITIONS > 32  # the tokenizers' own limit is the lower one, except where a test removes it
