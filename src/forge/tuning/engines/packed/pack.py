"""K adapters on one frozen base: a batch holds rows for each of them, and one pass computes all gradients."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from ..ground import IGNORED, Row
from .layout import Layout
from .linear import PackedLinear, Turn, install, take_out
from .loss import decoder_of, head_of, weighted_loss
from .slots import Hyper, Slots

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from .skeleton import Adapter


class Pack:
    """The base with packed layers, and the slots' numbers.

    Losses are what the standard trainers make of them: for each slot the mean over the tokens of its whole optimizer
    step; the slots' losses are summed, so that each one's gradient is its own.

    Args:
        model: the base, all of it frozen; `take_out` gives it back as it was.
        pad: a token that fills rows up.
        autocast: the dtype of products under autocast, None without.
        dtype: of the adapters.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        pad: int = 0,
        autocast: torch.dtype | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.model = model
        self._pad, self._autocast = pad, autocast
        self._head, self._decoder = head_of(model), decoder_of(model)
        self._vocabulary = int(model.get_input_embeddings().weight.shape[0])
        self._device: torch.device = model.get_input_embeddings().weight.device
        self._turn = Turn()
        self._layers: dict[str, PackedLinear] = {}
        self.adapters: list[Adapter] = []
        self.slots = Slots(Layout({}, 1), self._device, dtype)
        self._renew()
        # Of the optimizer step that each slot is in: the sum of its tokens' losses.
        self.step_loss = torch.zeros(0, device=self._device, dtype=torch.float64)

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return self._device

    def append(self, adapter: Adapter, hyper: Hyper) -> None:
        """Give an adapter a slot, the last one."""
        self.adapters.append(adapter)
        self._fit(Layout.of(self.adapters), len(self.slots))
        row = torch.zeros(self.slots.layout.size, dtype=self.slots.dtype)
        self.slots.layout.write(row, {name: _as(pair, self.slots.dtype) for name, pair in adapter.factors.items()})
        self.slots.append(row.to(self._device), hyper)
        self.step_loss = torch.cat([self.step_loss, self.step_loss.new_zeros(1)])
        self._renew()

    def keep(self, places: Sequence[int]) -> None:
        """Keep these slots, in this order."""
        self.slots.keep(places)
        self.adapters = [self.adapters[place] for place in places]
        self.step_loss = self.step_loss[list(places)]
        self._fit(Layout.of(self.adapters), len(places))
        self._renew()

    def adapter(self, place: int) -> Adapter:
        """A slot's adapter as it is now, on the host."""
        first = self.adapters[place]
        factors = self.slots.layout.read(self.slots.theta[place], _ranks(first))
        return type(first)({name: (a.cpu(), b.cpu()) for name, (a, b) in factors.items()}, first.scales, first.dropout)

    def backward(self, places: Sequence[int], rows: Sequence[Sequence[Row]], tokens: Sequence[int]) -> None:
        """Add the gradients of a micro-batch.

        Args:
            places: the slots that have rows in it.
            rows: of each of them.
            tokens: that each of them learns in its whole optimizer step.
        """
        self._mode(training=True)
        with self._batch(places, rows) as batch, torch.enable_grad():
            weights = torch.tensor([1 / max(1, count) for count in tokens], device=self._device, dtype=torch.float64)
            total, each = self._losses(batch, weights)
            torch.autograd.backward(total)
            index = torch.tensor(list(places), device=self._device)[batch.slot]
            self.step_loss.index_add_(0, index, each.to(self.step_loss.dtype))

    def step(self, ends: Sequence[int]) -> Tensor:
        """Let the optimizer step in these slots; (slots,) of gradient norms."""
        mask = torch.zeros(len(self.slots), dtype=torch.bool, device=self._device)
        mask[list(ends)] = True
        norms = self.slots.step(mask)
        self.step_loss = self.step_loss * ~mask
        return norms

    def forget_gradients(self, places: Sequence[int]) -> None:
        """Undo `backward` since the last step of these slots."""
        self.slots.grad[list(places)] = 0.0
        self.step_loss[list(places)] = 0.0

    @torch.no_grad()
    def evaluate(self, places: Sequence[int], rows: Sequence[Row]) -> Tensor:
        """The losses of rows under some slots' adapters.

        Args:
            places: the slots.
            rows: the same for each of them.

        Returns:
            (slots in places,), the sum over the learnt tokens in nats.
        """
        self._mode(training=False)
        with self._batch(places, [rows] * len(places)) as batch:
            weights = torch.ones(len(places), device=self._device, dtype=torch.float64)
            _, each = self._losses(batch, weights)
            sums = torch.zeros(len(places), device=self._device, dtype=torch.float64)
            return sums.index_add_(0, batch.slot, each.double())

    @contextmanager
    def bare(self) -> Iterator[PreTrainedModel]:
        """The base with its own layers, for as long as the block runs."""
        take_out(self.model, self._layers)
        names = list(self._layers)
        self._layers = {}
        try:
            yield self.model
        finally:
            self._layers = install(self.model, names, self._turn)

    def take_out(self) -> None:
        """Give the base its own layers back."""
        take_out(self.model, self._layers)
        self._layers = {}

    def state_dict(self) -> dict[str, Any]:
        """All that is needed to go on."""
        return {
            "slots": self.slots.state_dict(),
            "shapes": dict(self.slots.layout.shapes),
            "rank": self.slots.layout.rank,
            "step_loss": self.step_loss.cpu(),
            "adapters": [
                {"ranks": _ranks(one), "scales": dict(one.scales), "dropout": one.dropout} for one in self.adapters
            ],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """What `state_dict` gave."""
        from .skeleton import Adapter

        layout = Layout(state["shapes"], state["rank"])
        self.slots = Slots(layout, self._device, self.slots.dtype)
        self.slots.load_state_dict(state["slots"])
        self.adapters = [
            Adapter(layout.read(self.slots.theta[place], one["ranks"]), one["scales"], one["dropout"])
            for place, one in enumerate(state["adapters"])
        ]
        self.step_loss = state["step_loss"].to(self._device)
        self._install()
        self._renew()

    def _losses(self, batch: _Batch, weights: Tensor) -> tuple[Tensor, Tensor]:
        """The weighted sum of all learnt tokens' losses, and each token's own."""
        with self._precision():
            hidden = self._decoder(input_ids=batch.ids, attention_mask=batch.mask, use_cache=False).last_hidden_state
            learnt = hidden.flatten(0, 1).index_select(0, batch.learnt)
            wide = torch.float64 if learnt.dtype == torch.float64 else torch.float32
            return weighted_loss(
                learnt, self._head, batch.targets, weights.to(wide)[batch.slot], vocabulary=self._vocabulary
            )

    def _mode(self, *, training: bool) -> None:
        if self.model.training is not training:
            self.model.train(training)

    def _precision(self) -> Any:
        if self._autocast is None:
            return nullcontext()
        return torch.autocast(self._device.type, dtype=self._autocast)

    @contextmanager
    def _batch(self, places: Sequence[int], rows: Sequence[Sequence[Row]]) -> Iterator[_Batch]:
        slots = self.slots
        parameters = slots.theta.detach().requires_grad_()
        parameters.grad = slots.grad  # which backward adds to, in place
        scales, dropout = self._scales, self._dropout
        if list(places) != list(range(len(slots))):
            index = torch.tensor(list(places), device=self._device)
            parameters, scales = parameters.index_select(0, index), scales.index_select(1, index)
            dropout = None if dropout is None else dropout[index]
        # One split, whose backward is one concatenation, and not a slice a module, each with a gradient of full size.
        parts = torch.split(parameters, slots.layout.widths, dim=1)
        for number, (name, layer) in enumerate(self._layers.items()):
            layer.bind(*slots.layout.shaped(name, parts[2 * number], parts[2 * number + 1]), scales[number])
        with self._turn.of(len(places), dropout):
            yield _collate(rows, self._pad, self._device)
        for layer in self._layers.values():
            layer.release()

    def _fit(self, layout: Layout, slots: int) -> None:
        """Lay the slots out anew where the modules or the largest rank are others."""
        if layout != self.slots.layout:
            self.slots = self.slots.moved(layout, [_ranks(one) for one in self.adapters[:slots]])
        self._install()

    def _install(self) -> None:
        wanted = self.slots.layout.shapes
        if list(wanted) != list(self._layers):
            self.take_out()
            self._layers = install(self.model, list(wanted), self._turn)

    def _renew(self) -> None:
        """Write down what the layers multiply and drop, slot by slot."""
        names, dtype = self.slots.layout.shapes, self.slots.dtype
        scales = [[one.scales.get(name, 0.0) for one in self.adapters] for name in names]
        self._scales = torch.tensor(scales, device=self._device, dtype=dtype)
        shares = [one.dropout for one in self.adapters]
        self._dropout = torch.tensor(shares, device=self._device) if any(shares) else None


@dataclass(frozen=True)
class _Batch:
    """Rows as tensors.

    Args:
        ids: (rows, length).
        mask: the same, 0 where padding is.
        learnt: (learnt tokens,), where the tokens before them are in the flattened ids.
        targets: (learnt tokens,).
        slot: (learnt tokens,), which of the batch's slots each belongs to.
    """

    ids: Tensor
    mask: Tensor
    learnt: Tensor
    targets: Tensor
    slot: Tensor


def _collate(rows: Sequence[Sequence[Row]], pad: int, device: torch.device) -> _Batch:
    """Rows of the first slot, then of the second, and so on; slots with fewer rows get empty ones."""
    height = max(map(len, rows))
    length = max(2, *(len(row.input_ids) for own in rows for row in own))
    ids = torch.full((len(rows) * height, length), pad)
    labels = torch.full_like(ids, IGNORED)
    mask = torch.zeros_like(ids)
    mask[:, 0] = 1  # a row in which no token sees any other makes NaN of itself
    for slot, own in enumerate(rows):
        for place, row in enumerate(own, slot * height):
            end = len(row.input_ids)
            ids[place, :end] = torch.tensor(row.input_ids)
            labels[place, :end] = torch.tensor(row.labels)
            mask[place, :end] = 1
    # Found on the host: looking for them on a GPU would make it wait.
    line, column = (labels[:, 1:] != IGNORED).nonzero(as_tuple=True)
    parts = ids, mask, line * length + column, labels[line, column + 1], line.div(height, rounding_mode="floor")
    return _Batch(*(part.to(device, non_blocking=True) for part in parts))


def _ranks(adapter: Adapter) -> dict[str, int]:
    return {name: down.shape[0] for name, (down, _) in adapter.factors.items()}


def _as(pair: tuple[Tensor, Tensor], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return pair[0].to(dtype), pair[1].to(dtype)
