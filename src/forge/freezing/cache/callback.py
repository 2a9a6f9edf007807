"""What a PrefixCache does at the Trainer's events."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

from ...errors import ForgeWarning
from .offload import Offload

if TYPE_CHECKING:
    from torch import nn

    from .cache import PrefixCache

logger = logging.getLogger(__name__)


class CacheWatch(TrainerCallback):  # type: ignore[misc]
    """Looks at the weights anew when training begins, logs, offloads, and writes what is stored to the disk.

    | logged key | what it is |
    |---|---|
    | `prefix_cache_hit_share` | of the samples since the last entry, the share that was read and not computed |

    Args:
        cache: whose events these are.
        layers: those below the boundary.
    """

    def __init__(self, cache: PrefixCache, layers: Sequence[nn.Module]) -> None:
        self._cache = cache
        self._offload = Offload(layers, cache._moved)
        self._logged = (0, 0)
        self._misses_at_epoch = 0
        self._all_stored = False

    @property
    def offload(self) -> Offload:
        """Where the weights are."""
        return self._offload

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Other weights are other keys."""
        self._offload.come_back()
        self._cache._renew()
        if self._cache.offload_prefix and not self._offload.possible:
            warnings.warn(
                "offload_prefix=True: the model is on the CPU, where there is nothing to offload from.",
                ForgeWarning,
                stacklevel=2,
            )

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """From here on it is seen whether the epoch finds room."""
        self._cache._forget_unstored()

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """An epoch has been through the cache."""
        self._all_stored = self._cache._unstored == 0
        self._cache.flush()
        logger.info("%r: %d samples read, %d computed", self._cache, self._cache.hits, self._cache.misses)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """A whole epoch is stored and this step has read: the weights are idle."""
        quiet = self._cache.misses == self._misses_at_epoch
        self._misses_at_epoch = self._cache.misses
        if self._cache.offload_prefix and self._all_stored and quiet:
            self._offload.leave()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Add the share of hits since the last entry."""
        hits, misses = self._cache.hits - self._logged[0], self._cache.misses - self._logged[1]
        if logs is not None and hits + misses:
            logs["prefix_cache_hit_share"] = share = hits / (hits + misses)
            if state.log_history:  # the Trainer has put a copy of the entry there before it calls
                state.log_history[-1]["prefix_cache_hit_share"] = share
            self._logged = (self._cache.hits, self._cache.misses)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Whoever merges or saves wants the weights where they were."""
        self._offload.come_back()
        self._cache.flush()
