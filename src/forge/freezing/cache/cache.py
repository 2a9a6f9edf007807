"""PrefixCache: what the frozen layers compute, computed once."""

from __future__ import annotations

import math
import shutil
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ...assets import cache_folder
from ...compat import wrapped_by_adapter
from ...errors import ConflictError, ForgeError, ForgeWarning, UnsupportedError
from ...models.layers import decoder_layers, unwrap
from ...models.truncation import Truncation, truncation_of
from .callback import CacheWatch
from .calls import by_name, looks_inside, makes_kv_cache, on_host, refuse_labelled_padding, scaled_positions
from .fingerprint import Unchanged, decoder_of, fingerprint
from .proof import Proof
from .refusals import refuse
from .samples import find_samples
from .serving import Idle, Serving
from .size import CacheSize, size_of
from .store import StateStore

if TYPE_CHECKING:
    from torch import nn
    from transformers import Trainer

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
        if dtype not in (None, torch.bfloat16, torch.float16, torch.float32):
            raise ForgeError(f"dtype={dtype!r}: give torch.bfloat16, torch.float16 or torch.float32, or None.")
        if path is not None and not isinstance(path, (str, Path)):
            raise ForgeError(f"path={path!r}: give a folder, or None for {cache_folder() / 'prefix'}.")
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
        self._proof = Proof()
        self._hits = self._misses = 0
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
        """How many samples were read instead of computed."""
        return self._hits + sum(each.hits for each in self._serving.values())

    @property
    def misses(self) -> int:
        """How many samples were computed."""
        return self._misses + sum(each.missed for each in self._serving.values())

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
        if not hasattr(trainer, "callback_handler"):
            raise ForgeError(f"attach() takes a Trainer, not a {type(trainer).__name__}.")
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
        refuse(trainer, model, truncation.depth)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ForgeError(f"{self.path} cannot be made ({error.strerror}). Give the cache another path.") from error
        self._model, self._truncation, self._trainer = model, truncation, trainer
        truncation.shortcut, truncation.on_restore = Idle(), self._left
        self._renew()
        decoder = decoder_of(model)
        self._handles = [
            model.register_forward_pre_hook(refuse_labelled_padding, with_kwargs=True),
            decoder.register_forward_pre_hook(self._before, with_kwargs=True),
            decoder.register_forward_hook(self._after, with_kwargs=True, always_call=True),
        ]
        self._watch = CacheWatch(self, list(decoder_layers(model))[: truncation.depth])
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
        self._close()
        self._handles, self._model, self._truncation, self._trainer = [], None, None, None
        self._fingerprint = ""

    def clear(self) -> None:
        """Delete the files of the model that it is attached to, those of earlier runs too."""
        found = self._fingerprint
        self._close()
        for folder in self.path.glob(f"{found}-*") if found else ():
            shutil.rmtree(folder, ignore_errors=True)

    def flush(self) -> None:
        """Bring what was stored to the disk itself, where a loss of power does not reach it."""
        for each in self._serving.values():
            if each.store is not None:
                each.store.flush()

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

    def __reduce__(self) -> Any:
        return _detached, (self.path, self.max_gb, self.dtype, self.offload_prefix)  # a copied model has no cache

    def _renew(self) -> None:
        """Look at the weights below the boundary again: other weights, other files; and everything is checked anew."""
        assert self._model is not None
        assert self._truncation is not None
        layers = list(decoder_layers(self._model))[: self._truncation.depth]
        if any(wrapped_by_adapter(module) is not None for layer in layers for module in layer.modules()):
            raise ConflictError(
                "A frozen layer has got an adapter, whose output a PrefixCache does not know. Load it with "
                "exclude_modules=report.exclude_modules, or call setup_lp_lora_style and attach again, or detach()."
            )
        found = fingerprint(self._model, self._truncation.depth)
        self._unchanged = Unchanged(self._model, self._truncation.depth)
        if found != self._fingerprint:
            self._close()
        self._fingerprint, self._proof = found, Proof()
        for each in self._serving.values():
            each.checked.clear()

    def _moved(self) -> None:
        """The layers' weights are elsewhere, and the same."""
        if self._model is not None and self._truncation is not None:
            self._unchanged = Unchanged(self._model, self._truncation.depth)

    def _close(self) -> None:
        """Close the files, and keep count."""
        self._hits, self._misses = self.hits, self.misses
        for each in self._serving.values():
            if each.store is not None:
                each.store.close()
        self._serving = {}

    def _left(self) -> None:
        """The layers are given back while the cache stands for some of them."""
        self.detach()
        warnings.warn(
            "The PrefixCache was detached: the layers that it stood for are not frozen any more, or frozen anew. "
            "attach(trainer) again if you want it.",
            ForgeWarning,
            stacklevel=2,
        )

    def _forget_unstored(self) -> None:
        """Begin to count anew what found no room."""
        for each in self._serving.values():
            each.unstored = 0

    @property
    def _unstored(self) -> int:
        """How many samples found no room, since this epoch began."""
        return sum(each.unstored for each in self._serving.values())

    def _before(self, decoder: Any, args: Any, kwargs: Any) -> Any:
        """The decoder is called: look up what is in the batch."""
        if self._truncation is None:  # this is a copy of the model
            return None
        self._truncation.shortcut = Idle()
        given = by_name(decoder, args, kwargs)
        in_run = self._trainer.is_in_train
        # Another trainer's training was never asked whether the cache may serve it; and outside of a run somebody may
        # want the keys and values that attention would keep, also of the layers below.
        if looks_inside(decoder, given) or not (
            in_run or (not decoder.training and not makes_kv_cache(decoder, given))
        ):
            self._watch.offload.come_back()
            return None
        ids = given.get("input_ids")
        if ids is None:
            raise UnsupportedError(
                "The decoder is called with embeddings in the place of token ids, by which a PrefixCache knows a "
                "sample. Train without the cache: detach()."
            )
        host = {name: on_host(given.get(name), name) for name in ("attention_mask", "position_ids", "token_type_ids")}
        samples = find_samples(ids.cpu(), **host, context=scaled_positions(decoder.config, ids.shape[1]))
        if len({sample.row for sample in samples}) < len(samples) and makes_kv_cache(decoder, given):
            raise ConflictError(
                "The rows of this batch are packed, and use_cache is on, with which attention lets a document see the "
                "ones before it in its row. Set model.config.use_cache = False."
            )
        if not self._unchanged:
            self._renew()
        serving = self._serving_for(ids.device)
        shape = (ids.shape[0], ids.shape[1])
        serving.begin(samples, shape, training=decoder.training, serve=self._proof.running)
        self._truncation.shortcut = serving
        self._proof.begin(ids.device)
        return args, kwargs | {"use_cache": False}

    def _after(self, decoder: Any, args: Any, kwargs: Any, output: Any) -> None:
        """The decoder is done: the first time, hold a pass without the layers below against this one."""
        serving: Any = self._truncation.shortcut if self._truncation is not None else None
        if not isinstance(serving, Serving):
            return
        samples = serving.samples
        serving.end()
        store = serving.store
        if output is None or store is None or self._proof.running:
            return
        if store.full is not None and not self._warned:
            self._warned = True
            warnings.warn(
                f"The prefix cache is full with {store.num_samples} samples; the others are computed as before. "
                f"{store.full}",
                ForgeWarning,
                stacklevel=2,
            )
        if not self._proof.done and any(sample.key in store for sample in samples):
            counted = serving.hits, serving.missed
            self._proof.hold(lambda: decoder(*args, **kwargs), output, samples, serving.tolerance)
            serving.hits, serving.missed = counted

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


def _detached(path: Path, max_gb: float, dtype: torch.dtype | None, offload_prefix: bool) -> PrefixCache:
    return PrefixCache(path, max_gb=max_gb, dtype=dtype, offload_prefix=offload_prefix)
