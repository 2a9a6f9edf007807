"""The encoder behind BERTScore: what can be known without its weights, and loading it as far as the chosen layer.

bert-score chooses a model's class by its name ("t5" in it), its layer by a table of hub ids, and says nothing of
weights that a checkpoint lacks. Here all three come from the model itself: its config, built without memory, tells the
class, the layers and the longest text; what the loader had to invent is refused.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ForgeError, NonFiniteError, UnsupportedError
from ..models.anatomy import load_config
from .known_encoders import default_layer, known_id

if TYPE_CHECKING:
    from torch import nn

UNLIMITED = 512
"""Tokens that an encoder reads which has relative positions only (T5, XLNet) and whose tokenizer names no limit."""

# Where encoders keep their layers: bert-score's own list, then what transformers 5 calls SqueezeBERT's and T5's stack.
_LAYER_LISTS = ("layer", "encoder.block", "encoder.layer", "encoder.layers", "transformer.layer", "layers", "block")
_WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")


@dataclass(frozen=True)
class Encoder:
    """An encoder before its weights are loaded; made by `find_encoder`.

    Args:
        name: A hub id or a local folder.
        known_as: The id under which bert-score has a layer and perhaps a baseline for it; None if it has none.
        num_layers: The layer whose output is compared; 0 is the embeddings.
        of_layers: How many the encoder has.
        max_tokens: The longest text that it has positions for, special tokens included; None where nothing limits it.
        config: transformers' own.
    """

    name: str
    known_as: str | None
    num_layers: int
    of_layers: int
    max_tokens: int | None
    config: Any

    @property
    def label(self) -> str:
        """The name without the folders that lead to it."""
        return Path(self.name).name if Path(self.name).is_dir() else self.name


def find_encoder(name: str, num_layers: int | None) -> Encoder:
    """Read an encoder's config and check all that it can tell; the weights are not read.

    Args:
        name: A hub id or a local folder.
        num_layers: The layer to compare; None for bert-score's choice, where it has one, else the last, with a warning.

    Raises:
        UnsupportedError: There is no such model here, or it is no encoder that BERTScore can use.
        ForgeError: A layer that it does not have.
    """
    config = _config(name)
    _refuse_decoders(name, config)
    skeleton = _skeleton(name, config)
    of_layers = _count_layers(skeleton, name)
    known_as = known_id(name, of_layers)
    if num_layers is None:
        num_layers = default_layer(name, known_as, of_layers)
    elif isinstance(num_layers, bool) or not isinstance(num_layers, int) or not 0 <= num_layers <= of_layers:
        raise ForgeError(
            f"num_layers={num_layers!r}: {name} has {of_layers} layers; give a whole number from 0 to that."
        )
    _check_weights_are_here(name)
    return Encoder(name, known_as, num_layers, of_layers, _max_tokens(skeleton, config), config)


@dataclass(frozen=True)
class LoadedEncoder:
    """An encoder with its weights, up to the layer that is compared; made by `load_encoder`.

    Args:
        module: in evaluation mode, on its device.
        feels_padding: whether the padding beside a text changes its embedding, as ConvBERT's convolutions do.
        digest: of its weights, which tells it from another of the same name.
    """

    module: nn.Module
    feels_padding: bool
    digest: str


def load_encoder(encoder: Encoder, device: str) -> LoadedEncoder:
    """The encoder up to its layer, in float32.

    float32 whatever the checkpoint's: in 16 bits a text's score would depend on the texts beside it, and the baselines
    were made in float32.

    Raises:
        UnsupportedError: The weights cannot be read, some that the scores depend on are not among them, or the encoder
            does not run as BERTScore needs it to.
        NonFiniteError: Some of them are NaN or infinite.
    """
    import torch
    import xxhash
    from safetensors import SafetensorError

    try:
        model, info = _auto_class(encoder.config).from_pretrained(
            encoder.name, dtype=torch.float32, output_loading_info=True
        )
    except (OSError, RuntimeError, SafetensorError, ValueError) as error:
        raise UnsupportedError(f"The weights of {encoder.name} cannot be loaded: {error}") from error
    names = {id(parameter): name for name, parameter in model.named_parameters(remove_duplicate=False)}
    invented = {id(model.get_parameter(name)) for name in _invented(info) if name in set(names.values())}
    cut = _cut(_encoder_of(model), encoder.num_layers).eval().requires_grad_(False)
    # A pooler comes after the last layer, so no score depends on it; many checkpoints have none.
    used = [(name, parameter) for name, parameter in cut.named_parameters() if "pooler" not in name.split(".")]
    if lacking := [name for name, parameter in used if id(parameter) in invented]:
        raise UnsupportedError(
            f"{encoder.name} has no weights for {len(lacking)} of the {len(used)} tensors that BERTScore reads, such "
            f"as {lacking[0]}, and random ones give meaningless scores. Is it a checkpoint of another architecture "
            f"than {type(model).__name__}? Pass a complete one."
        )
    if broken := [name for name, parameter in used if not bool(torch.isfinite(parameter).all())]:
        raise NonFiniteError(f"{encoder.name}: {broken[0]} has values that are not finite. Pass another checkpoint.")
    digest = xxhash.xxh3_64()
    for name, parameter in used:
        digest.update(name.encode())
        digest.update(parameter.detach().contiguous().numpy())
    cut = cut.to(device)
    return LoadedEncoder(cut, _feels_padding(cut, encoder), digest.hexdigest())


def find_tokenizer(encoder: Encoder) -> Any:
    """The encoder's tokenizer, which cuts texts at what the encoder reads.

    Raises:
        UnsupportedError: It cannot be loaded, or has no vocabulary.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(encoder.name, use_fast=False)  # as bert-score loads it
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError) as error:
        raise UnsupportedError(
            f"The tokenizer of {encoder.name} cannot be loaded: {error} Pass a folder to which both the encoder and "
            "its tokenizer were saved."
        ) from error
    # Where its files are missing, transformers makes one that knows nothing, and all texts are alike.
    if len(set(tokenizer.get_vocab()) - set(tokenizer.all_special_tokens)) < 2:
        raise UnsupportedError(
            f"The tokenizer of {encoder.name} has special tokens only, so its vocabulary is missing. Pass a folder "
            "to which both the encoder and its tokenizer were saved."
        )
    own = tokenizer.model_max_length if tokenizer.model_max_length < 10**9 else None  # 10**30 stands for none
    tokenizer.model_max_length = min((limit for limit in (own, encoder.max_tokens) if limit), default=UNLIMITED)
    return tokenizer


def _config(name: str) -> Any:
    remedy = (
        "Pass a folder that save_pretrained wrote, such as forge.assets.minilm() with num_layers=6, or a hub id where "
        "the hub can be reached."
    )
    if not isinstance(name, str) or not name:
        raise ForgeError(f"model_type={name!r}: it must be a hub id or a folder. {remedy}")
    try:
        return load_config(name)
    except ForgeError:
        raise
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UnsupportedError(f"The encoder {name!r} cannot be had: {reason} {remedy}") from error


def _refuse_decoders(name: str, config: Any) -> None:
    """BERTScore compares tokens in the context of the whole sentence; a decoder's know only what is to their left."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MASKED_LM_MAPPING

    both_ways = config.model_type == "xlnet" or getattr(config, "use_bidirectional_attention", False) is True
    decodes = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING and type(config) not in MODEL_FOR_MASKED_LM_MAPPING
    if config.is_encoder_decoder or both_ways:
        return
    if decodes or getattr(config, "is_decoder", False):
        raise UnsupportedError(
            f"{name} is a decoder ({config.model_type}): its tokens see only what is to their left, and BERTScore "
            "needs an encoder, such as roberta-large, or forge.assets.minilm() with num_layers=6."
        )


def _auto_class(config: Any) -> Any:
    """T5's kin have classes without the decoder; the name of the model plays no part."""
    from transformers import MODEL_FOR_TEXT_ENCODING_MAPPING, AutoModel, AutoModelForTextEncoding

    whole = not config.is_encoder_decoder or type(config) not in MODEL_FOR_TEXT_ENCODING_MAPPING
    return AutoModel if whole else AutoModelForTextEncoding


def _skeleton(name: str, config: Any) -> nn.Module:
    import torch

    config = copy.deepcopy(config)  # building a model writes into its config
    config._attn_implementation = "eager"
    try:
        with torch.device("meta"):
            return _encoder_of(_auto_class(config).from_config(config))
    except (ImportError, KeyError, TypeError, ValueError) as error:
        raise UnsupportedError(
            f"{name} ({config.model_type}) is no encoder that BERTScore can use: {str(error).strip().splitlines()[0]}"
        ) from error


def _encoder_of(model: nn.Module) -> nn.Module:
    """The encoder of an encoder-decoder, and of T5's classes that have nothing else."""
    return model.encoder if hasattr(model, "encoder") and hasattr(model, "decoder") else model  # type: ignore[return-value]


def _layer_list(model: Any) -> str | None:
    from torch import nn

    modules = dict(model.named_modules())
    return next((path for path in _LAYER_LISTS if isinstance(modules.get(path), nn.ModuleList)), None)


def _count_layers(model: Any, name: str) -> int:
    if isinstance(getattr(model, "n_layers", None), int):
        return int(model.n_layers)
    if hasattr(getattr(model, "encoder", None), "albert_layer_groups"):
        return int(model.encoder.config.num_hidden_layers)
    if path := _layer_list(model):
        return len(model.get_submodule(path))
    raise UnsupportedError(
        f"{name}: {type(model).__name__} keeps its layers where neither bert-score nor forge finds them. Use an "
        "encoder of a family that bert-score's table lists: BERT, RoBERTa, DeBERTa, ELECTRA, ALBERT, MPNet, BART, T5."
    )


def _cut(model: Any, num_layers: int) -> Any:
    """Drop the layers above, as bert-score's `get_model` does: a norm after the last layer stays, after the cut."""
    from torch import nn

    if isinstance(getattr(model, "n_layers", None), int):  # XLM counts
        model.n_layers = num_layers
    elif hasattr(getattr(model, "encoder", None), "albert_layer_groups"):  # ALBERT runs one layer again and again
        model.encoder.config.num_hidden_layers = num_layers
    elif path := _layer_list(model):
        model.set_submodule(path, nn.ModuleList(list(model.get_submodule(path))[:num_layers]))
    return model


def _max_tokens(model: nn.Module, config: Any) -> int | None:
    """Positions that a text can have; RoBERTa and its kin begin counting after the padding token's id."""
    from torch import nn

    for path, module in model.named_modules():
        if isinstance(module, nn.Embedding) and path.rpartition(".")[2] in ("position_embeddings", "embed_positions"):
            offset = getattr(module, "offset", 0) if module.padding_idx is None else module.padding_idx + 1
            return module.num_embeddings - int(offset)
    positions = getattr(config, "max_position_embeddings", None)
    return positions if isinstance(positions, int) and positions > 0 else None


def _feels_padding(model: Any, encoder: Encoder) -> bool:
    """Run eight tokens, and the same eight before eight of padding that the mask hides."""
    import torch

    first, device = model.get_input_embeddings().num_embeddings // 4, next(model.parameters()).device
    alone = torch.arange(first, first + 8, device=device).unsqueeze(0)
    padded = torch.cat([alone, torch.full_like(alone, encoder.config.pad_token_id or 0)], dim=1)
    try:
        with torch.no_grad():
            expected = model(alone, attention_mask=torch.ones_like(alone))[0]
            found = model(padded, attention_mask=(torch.arange(16, device=device) < 8).long().unsqueeze(0))[0][:, :8]
    except (AttributeError, IndexError, NameError, RuntimeError, TypeError, ValueError) as error:
        raise UnsupportedError(
            f"{encoder.name} ({encoder.config.model_type}) does not run up to layer {encoder.num_layers} on token ids "
            f"and a mask: {error}. Choose another num_layers, or another encoder."
        ) from error
    return float((found - expected).abs().max()) > 1e-4 * float(expected.abs().max())


def _invented(info: dict[str, Any]) -> set[str]:
    """Parameters that the loader filled at random: the checkpoint lacks them, or has them in another shape."""
    mismatched = info.get("mismatched_keys", ())
    return set(info["missing_keys"]) | {key if isinstance(key, str) else key[0] for key in mismatched}


def _check_weights_are_here(name: str) -> None:
    """What would otherwise be missed when the model is trained and its answers are to be scored."""
    from huggingface_hub import constants, try_to_load_from_cache

    folder = Path(name)
    if folder.is_dir():
        here = any(folder.glob("*.safetensors")) or any(folder.glob("*.bin"))
    else:
        here = not constants.HF_HUB_OFFLINE or any(isinstance(try_to_load_from_cache(name, f), str) for f in _WEIGHTS)
    if not here:
        raise UnsupportedError(
            f"{name} has a config and no weights{'' if folder.is_dir() else ' in the cache, and the hub is offline'}. "
            "Pass a folder that has both, such as forge.assets.minilm() with num_layers=6."
        )
