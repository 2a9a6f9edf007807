"""PrefixCache: what the frozen layers compute, computed once."""

from __future__ import annotations

import logging
import math
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ...assets import cache_folder
from ...errors import ConflictError, ForgeError, ForgeWarning, UnsupportedError
from ...models.below import modules_beside
from ...models.layers import decoder_layers, decoder_layers_path, text_attribute, unwrap
from ...models.truncation import Truncation, truncation_of
from .callback import CacheWatch
from .fingerprint import Unchanged, dropout_below, fingerprint
from .samples import find_samples
from .serving import Idle, Serving
from .size import CacheSize, size_of
from .store import StateStore

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import Trainer

logger = logging.getLogger(__name__)

_GB = 2**30
# How far a state may be from its stored twin: batches of other lengths are multiplied in another order.
_EXACT, _ROUNDED = 1e-3, 6e-2


class PrefixCache:
    """Computes the frozen layers once per sample: the first epoch fills the cache, later ones and later runs read it.

    The states at the boundary are stored unpadded, per sample, in memory-mapped files, under a key made of the sample's
    content, the weights below the boundary, the boundary and the dtype. Whatever changes, a stale state is never read.
    Shuffling, padding, accumulation, resuming and evaluation work as without it; processes that train together or
    after one another share the files.

    >>> cache = PrefixCache(max_gb=20)
    >>> cache
    PrefixCache(max_gb=20, not attached)

    Use it with `setup_lp_lora_style(trainer.model, 0.5)` and then `cache.attach(trainer)`, before `trainer.train()`.

    Args:
        path: a folder for the files; `~/.cache/forge/prefix` by default (`$FORGE_CACHE`, `$XDG_CACHE_HOME`). On a fast
            local disk: docs/freezing.md says how fast it must be.
        max_gb: GiB that the files of one model and boundary may take; over it, or with too little disk, what fits is
            cached, the rest is computed, and a warning says so.
        dtype: what the states are stored in, such as `torch.bfloat16`; by default as they are computed, which loses
            nothing.
        offload_prefix: move the frozen layers' weights to the host once an epoch has been read from the cache alone.
            They come back when a sample is not in it.

    Raises:
        ForgeError: a size that is none, or a dtype that is not of floats.
    """

    def __init__(
        self,
        path: str | Path | None = None,
        *,
        max_gb: float = 50.0,
        dtype: torch.dtype | None = None,
        offload_prefix: bool = False,
    ) -> None:
        if isinstance(max_gb, bool) or not isinstance(max_gb, (int, float)) or not 0 < max_gb < math.inf:
            raise ForgeError(f"max_gb={max_gb!r}: give the GiB that the cache may take on the disk, above 0.")
        if dtype is not None and (not isinstance(dtype, torch.dtype) or not dtype.is_floating_point):
            raise ForgeError(f"dtype={dtype!r}: give torch.bfloat16, torch.float16 or torch.float32, or None.")
        self.path = cache_folder() / "prefix" if path is None else Path(path).expanduser()
        self.max_gb = max_gb
        self.dtype = dtype
        self.offload_prefix = offload_prefix
        self._trainer: Any = None
        self._watch: Any = None
        self._model: nn.Module | None = None
        self._truncation: Truncation | None = None
        self._serving: dict[str, Serving] = {}
        self._handles: list[Any] = []
        self._fingerprint = ""
        self._unchanged: Unchanged | None = None
        self._proven = False
        self._proof: Any = None
        self._random: Any = None
        self._warned = False

    def __repr__(self) -> str:
        if self._model is None:
            return f"PrefixCache(max_gb={self.max_gb:g}, not attached)"
        return f"PrefixCache({self.num_samples} samples, {self.nbytes / _GB:.2f} of {self.max_gb:g} GiB, {self.path})"

    @property
    def num_samples(self) -> int:
        """How many samples are stored for the model that it is attached to."""
        return sum(each.store.num_samples for each in self._serving.values() if each.store is not None)

    @property
    def nbytes(self) -> int:
        """What they take on the disk."""
        return sum(each.store.nbytes for each in self._serving.values() if each.store is not None)

    @property
    def hits(self) -> int:
        """How many samples were read instead of computed, since `attach`."""
        return sum(each.hits for each in self._serving.values())

    @property
    def misses(self) -> int:
        """How many samples were computed, since `attach`."""
        return sum(each.missed for each in self._serving.values())

    def attach(self, trainer: Trainer) -> PrefixCache:
        """Let a trainer's model read its frozen layers from the cache, and fill it.

        Args:
            trainer: whose model has been through `setup_lp_lora_style`; `Trainer`, `SFTTrainer`, `DPOTrainer`.

        Returns:
            The cache itself.

        Raises:
            ConflictError: no layer is frozen, there is dropout below the boundary, or a router's auxiliary loss looks
                at the frozen layers.
            UnsupportedError: a model or a run that it cannot serve: images, torch.compile, sharded weights.
            ForgeError: it is attached already, the model has another one, or the folder cannot be written to.
        """
        model: Any = trainer.model
        if self._model is not None:
            raise ForgeError("This PrefixCache is attached already: detach() it first.")
        truncation = truncation_of(model)
        if truncation is None or truncation.depth == 0:
            raise ConflictError(
                "No layer of the trainer's model is frozen, so there is nothing to cache. Call "
                "setup_lp_lora_style(trainer.model, freeze_ratio=0.5) first."
            )
        if truncation.shortcut is not None:
            raise ForgeError("The model has a PrefixCache already: detach() that one first.")
        _refuse(trainer, model, truncation.depth)
        self.path.mkdir(parents=True, exist_ok=True)
        self._model, self._truncation = model, truncation
        truncation.shortcut, truncation.on_restore = Idle(), self.detach
        self.renew()
        base: Any = unwrap(model)
        decoder = base.get_submodule(decoder_layers_path(base).rpartition(".")[0])
        self._handles = [
            decoder.register_forward_pre_hook(self._before, with_kwargs=True),
            decoder.register_forward_hook(self._after, with_kwargs=True, always_call=True),
        ]
        self._watch = CacheWatch(self, list(decoder_layers(model))[: truncation.depth])
        self._trainer = trainer
        trainer.callback_handler.callbacks.insert(0, self._watch)  # before the trackers, or they would not see its key
        return self

    def detach(self) -> None:
        """Compute the frozen layers again; the files stay. Does nothing where it is not attached."""
        for handle in self._handles:
            handle.remove()
        if self._trainer is not None:
            self._watch.offload.come_back()
            self._trainer.remove_callback(self._watch)
        if self._truncation is not None:
            self._truncation.shortcut = self._truncation.on_restore = None
        for each in self._serving.values():
            if each.store is not None:
                each.store.close()
        self._handles, self._model, self._truncation, self._trainer, self._serving = [], None, None, None, {}

    def clear(self) -> None:
        """Delete the files of the model that it is attached to."""
        for each in self._serving.values():
            if each.store is not None:
                each.store.clear()

    def flush(self) -> None:
        """Bring what was stored to the disk itself, where a loss of power does not reach it."""
        for each in self._serving.values():
            if each.store is not None:
                each.store.flush()

    def renew(self) -> None:
        """Look at the weights below the boundary again: other weights, other files."""
        assert self._model is not None
        assert self._truncation is not None
        found = fingerprint(self._model, self._truncation.depth)
        self._unchanged = Unchanged(self._model, self._truncation.depth)
        if found != self._fingerprint:
            for each in self._serving.values():
                if each.store is not None:
                    each.store.close()
            self._serving, self._fingerprint, self._proven = {}, found, False

    def estimate(self, model: nn.Module, dataset: Any) -> CacheSize:
        """What the cache of a dataset will take, before anything is computed.

        Args:
            model: that has been through `setup_lp_lora_style`.
            dataset: tokenised, as `trainer.train_dataset` is; or the number of its tokens.

        Returns:
            Its size, whether it fits, and how fast the disk must be for it to pay.

        Raises:
            ForgeError: no layer is frozen, or the dataset holds no token ids.
        """
        return size_of(model, dataset, path=self.path, max_gb=self.max_gb, dtype=self.dtype)

    def forget_unstored(self) -> None:
        """Begin to count anew what found no room."""
        for each in self._serving.values():
            each.unstored = 0

    @property
    def unstored(self) -> int:
        """How many samples found no room, since this epoch began."""
        return sum(each.unstored for each in self._serving.values())

    def _before(self, decoder: Any, args: Any, kwargs: Any) -> Any:
        """The decoder is called: look up what is in the batch."""
        assert self._truncation is not None
        self._truncation.shortcut = Idle()
        if _looks_inside(decoder, kwargs):
            return None
        ids = kwargs.get("input_ids", args[0] if args else None)
        if ids is None:
            raise UnsupportedError(
                "The decoder is called with embeddings in the place of token ids, by which a PrefixCache knows a "
                "sample. Train without the cache: detach()."
            )
        host = {name: _host(kwargs.get(name)) for name in ("attention_mask", "position_ids", "token_type_ids")}
        samples = find_samples(ids.cpu(), **host)
        if len({sample.row for sample in samples}) < len(samples) and _makes_kv_cache(decoder, kwargs):
            raise ConflictError(
                "The rows of this batch are packed, and use_cache is on, with which attention lets a document see the "
                "ones before it in its row. Set model.config.use_cache = False."
            )
        if not self._unchanged:
            self.renew()
        serving = self._serving_for(ids.device)
        serving.begin(samples, (ids.shape[0], ids.shape[1]), serve=self._proof is not None)
        self._truncation.shortcut = serving
        if self._proof is None and not self._proven:
            self._random = _random_state(ids.device)
        return args, kwargs | {"use_cache": False}

    def _after(self, decoder: Any, args: Any, kwargs: Any, output: Any) -> None:
        """The decoder is done: the first time, hold a pass without the layers below against this one."""
        assert self._truncation is not None
        serving: Any = self._truncation.shortcut
        if isinstance(serving, Idle):
            return
        samples = serving.samples
        serving.end()
        store = serving.store
        if output is None or store is None or self._proof is not None:
            return
        if store.full is not None and not self._warned:
            self._warned = True
            warnings.warn(
                f"The prefix cache is full with {store.num_samples} samples; the others are computed as before. "
                f"{store.full}",
                ForgeWarning,
                stacklevel=2,
            )
        if not self._proven and all(sample.key in store for sample in samples):
            self._proven = True
            self._prove(decoder, args, kwargs, output, samples)

    def _prove(self, decoder: Any, args: Any, kwargs: Any, output: Any, samples: Any) -> None:
        """Layers above may read more of those below than their output: keys and values that they share, say."""
        self._proof = output[0]
        device = output[0].device
        devices = [device] if device.type == "cuda" else []
        try:
            with torch.no_grad(), torch.random.fork_rng(devices=devices), warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="None of the inputs have requires_grad")  # and none should
                _set_random_state(self._random, device)
                without = decoder(*args, **kwargs)[0]
        finally:
            self._proof = None
        for sample in samples:
            one = without[sample.row, sample.start : sample.stop].float()
            other = output[0][sample.row, sample.start : sample.stop].detach().float()
            off = float(((one - other).norm(dim=-1) / other.norm(dim=-1).clamp_min(1e-12)).max())
            if not off <= _ROUNDED:
                raise UnsupportedError(
                    f"Without its frozen layers, and with their output, {type(decoder).__name__} computes something "
                    f"else ({off:.1%} off): layers above the boundary read more of those below than their hidden "
                    "states. A PrefixCache cannot serve it. Train without the cache: detach()."
                )

    def _serving_for(self, device: torch.device) -> Serving:
        """The states of one way to compute: autocast rounds otherwise than the weights' own dtype."""
        assert self._model is not None
        model: Any = self._model
        dtype = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None
        name = f"{self._fingerprint}-{str(dtype or 'own').removeprefix('torch.')}"
        if name not in self._serving:
            exact = dtype is None and all(p.dtype in (torch.float32, torch.float64) for p in model.parameters())
            attention = str(unwrap(model).config._attn_implementation)  # type: ignore[union-attr]

            def open_store(width: int, computed: torch.dtype) -> StateStore:
                stored = self.dtype or computed
                folder = self.path / f"{name}-{str(stored).removeprefix('torch.')}"
                return StateStore(folder, width=width, dtype=stored, max_bytes=int(self.max_gb * _GB))

            self._serving[name] = Serving(
                open_store,
                tolerance=_EXACT if exact and self.dtype in (None, torch.float32) else _ROUNDED,
                flash="flash" in attention,
                on_run=self._watch.offload.come_back,
            )
        return self._serving[name]


def _looks_inside(decoder: Any, kwargs: Any) -> bool:
    """Whether somebody wants what the layers below do beside their output: generation, or the states of each."""
    asked = {}
    for name in ("output_router_logits", "output_hidden_states", "output_attentions"):
        given = kwargs.get(name)
        asked[name] = text_attribute(decoder.config, name) if given is None else given
    if asked["output_router_logits"]:
        _refuse_router()
    return bool(
        asked["output_hidden_states"]
        or asked["output_attentions"]
        or kwargs.get("past_key_values") is not None
        or kwargs.get("use_cache")
    )


def _random_state(device: torch.device) -> Any:
    return torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None


def _set_random_state(state: Any, device: torch.device) -> None:
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1], device)


def _host(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.cpu()


def _makes_kv_cache(decoder: Any, kwargs: Any) -> bool:
    given = kwargs.get("use_cache")
    return bool(text_attribute(decoder.config, "use_cache") if given is None else given)


def _refuse(trainer: Any, model: Any, depth: int) -> None:
    """Raise for runs in which the states are no function of the sample, or are not asked for one by one."""
    args = trainer.args
    for on, what in (
        (getattr(args, "torch_compile", False), "torch_compile=True compiles the layers that the cache skips"),
        (getattr(trainer, "is_fsdp_enabled", False), "FSDP shards the layers that the cache skips"),
        (getattr(trainer, "is_deepspeed_enabled", False), "DeepSpeed may shard the layers that the cache skips"),
        (getattr(args, "n_gpu", 0) > 1, f"n_gpu={getattr(args, 'n_gpu', 0)} copies the model to each GPU at each step"),
    ):
        if on:
            raise UnsupportedError(f"{what}: a PrefixCache does not work there. Train without one of the two.")
    if modules_beside(model):
        raise UnsupportedError(
            f"A PrefixCache knows a sample by its token ids, and {type(unwrap(model)).__name__} makes embeddings of "
            "images too. Train without the cache."
        )
    if getattr(args, "neftune_noise_alpha", None):
        raise ConflictError(
            f"neftune_noise_alpha={args.neftune_noise_alpha} adds noise to the embeddings, so that no two epochs have "
            "the same states. Train without the noise, or without the cache."
        )
    found = dropout_below(model, depth)
    if found:
        raise ConflictError(
            f"{found}: below the boundary it makes other states in every epoch. Set it to 0 in the config before "
            "loading the model, or train without the cache."
        )
    base: Any = unwrap(model)
    if text_attribute(base.config, "output_router_logits"):
        _refuse_router()


def _refuse_router() -> None:
    raise ConflictError(
        "The router's auxiliary loss looks at the routers of all layers, also of those that the cache would skip. "
        "Switch it off (router_aux_loss_coef=0.0 in SFTConfig, output_router_logits=False in the model's config), or "
        "train without the cache."
    )
