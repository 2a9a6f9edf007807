"""Tiny encoders from configs, saved with a tokenizer that makes many tokens of few: what BERTScore is tested on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

POSITIONS = 40
LAYERS = 3
_BERT = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
_ROBERTA = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
_T5 = ["<pad>", "</s>", "<unk>"]
_COMMON: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "max_position_embeddings": POSITIONS,
}
_SEQ2SEQ: dict[str, Any] = {
    "d_model": 32,
    "encoder_layers": LAYERS,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "forced_eos_token_id": None,
}
_T5_SIZES: dict[str, Any] = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": LAYERS, "num_heads": 4}
_DEBERTA = {**_COMMON, "relative_attention": True, "pos_att_type": "c2p|p2c"}

# name: config class, its arguments, the kind of tokenizer, positions that a text has
ENCODERS: dict[str, tuple[str, dict[str, Any], str, int | None]] = {
    "bert": ("BertConfig", _COMMON, "bert", POSITIONS),
    "roberta": ("RobertaConfig", _COMMON, "roberta", POSITIONS - 2),
    "xlm_roberta": ("XLMRobertaConfig", _COMMON, "roberta", POSITIONS - 2),
    "camembert": ("CamembertConfig", _COMMON, "roberta", POSITIONS - 2),
    "distilbert": (
        "DistilBertConfig",
        {"dim": 32, "hidden_dim": 48, "n_layers": LAYERS, "n_heads": 4, "max_position_embeddings": POSITIONS},
        "bert",
        POSITIONS,
    ),
    "albert": ("AlbertConfig", {**_COMMON, "embedding_size": 16}, "bert", POSITIONS),
    "deberta": ("DebertaConfig", _DEBERTA, "bert", POSITIONS),
    "deberta_v2": (
        "DebertaV2Config",
        {**_DEBERTA, "position_buckets": 16, "norm_rel_ebd": "layer_norm", "position_biased_input": False},
        "bert",
        POSITIONS,
    ),
    "electra": ("ElectraConfig", {**_COMMON, "embedding_size": 16}, "bert", POSITIONS),
    "mpnet": ("MPNetConfig", _COMMON, "roberta", POSITIONS - 2),
    "convbert": ("ConvBertConfig", {**_COMMON, "embedding_size": 16}, "bert", POSITIONS),
    "longformer": ("LongformerConfig", {**_COMMON, "attention_window": 4}, "roberta", POSITIONS - 2),
    "xlnet": ("XLNetConfig", {"d_model": 32, "n_layer": LAYERS, "n_head": 4, "d_inner": 48}, "bert", None),
    "xlm": (
        "XLMConfig",
        {"emb_dim": 32, "n_layers": LAYERS, "n_heads": 4, "max_position_embeddings": POSITIONS},
        "bert",
        POSITIONS,
    ),
    "modernbert": (
        "ModernBertConfig",
        {**_COMMON, "cls_token_id": 2, "sep_token_id": 3, "bos_token_id": 2, "eos_token_id": 3, "local_attention": 8},
        "bert",
        POSITIONS,
    ),
    "bart": ("BartConfig", {**_SEQ2SEQ, "max_position_embeddings": POSITIONS}, "roberta", POSITIONS),
    "pegasus": ("PegasusConfig", {**_SEQ2SEQ, "max_position_embeddings": POSITIONS}, "t5", POSITIONS),
    "t5": ("T5Config", _T5_SIZES, "t5", None),
    "mt5": ("MT5Config", _T5_SIZES, "t5", None),
    "squeezebert": ("SqueezeBertConfig", {**_COMMON, "embedding_size": 32}, "bert", POSITIONS),
}


def save_encoder(name: str, folder: Path, *, max_length: int | None = 32, change: Callable[[Any], Any] = id) -> Path:
    """Save a tiny encoder with random weights of the spread that real ones have, and its tokenizer.

    Args:
        name: of `ENCODERS`.
        folder: which is made.
        max_length: of the tokenizer; None for one that names none.
        change: called with the model before it is saved.
    """
    import torch
    import transformers

    config_class, arguments, kind, _ = ENCODERS[name]
    tokenizer = tokenizer_of(kind)
    if max_length is not None:
        tokenizer.model_max_length = max_length
    special = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id}
    torch.manual_seed(0)
    config = getattr(transformers, config_class)(**{**special, **arguments})
    model = transformers.AutoModel.from_config(config)
    with torch.no_grad():  # with the spread of 0.02 that models begin with, every token is like every other
        for parameter_name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.3 if "embed" in parameter_name or "shared" in parameter_name else 0.15)
    change(model)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def tokenizer_of(kind: str) -> Any:
    """A real fast tokenizer: "bert" (by character), "roberta" (by byte), or "t5" (by character, and begins no text)."""
    from transformers import BertTokenizer, PreTrainedTokenizerFast, RobertaTokenizer

    letters = [chr(code) for code in range(33, 127) if not chr(code).isupper()]
    if kind == "bert":
        words = [*_BERT, *letters, *(f"##{letter}" for letter in letters)]
        return BertTokenizer(vocab={word: index for index, word in enumerate(words)})
    if kind == "roberta":
        symbols = _ROBERTA + sorted(pre_tokenizers.ByteLevel.alphabet())
        return RobertaTokenizer(vocab={symbol: index for index, symbol in enumerate(symbols)}, merges=[])
    vocabulary = {symbol: index for index, symbol in enumerate([*_T5, *letters])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split("", "isolated")]
    )
    backend.decoder = decoders.Fuse()
    backend.post_processor = processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
