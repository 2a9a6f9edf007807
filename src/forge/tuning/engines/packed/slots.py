"""The slots of a pack: the adapters' numbers, their optimizer and their schedules, as tensors with one row a slot."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from ....errors import UnsupportedError

if TYPE_CHECKING:
    from torch import Tensor

    from .layout import Layout

SCHEDULES = ("linear", "cosine", "constant", "constant_with_warmup")
_ADAMW = ("adamw_torch", "adamw_torch_fused", "adamw_bnb_8bit", "paged_adamw", "paged_adamw_8bit", "adamw_8bit")


@dataclass(frozen=True)
class Hyper:
    """What may differ from slot to slot.

    Args:
        learning_rate: the peak.
        warmup: optimizer steps.
        total: optimizer steps.
        schedule: one of `SCHEDULES`.
        weight_decay: decoupled.
        beta1: of AdamW.
        beta2: of AdamW.
        epsilon: of AdamW.
        max_norm: of the gradient; 0 for no clipping.
    """

    learning_rate: float
    warmup: int
    total: int
    schedule: str = "linear"
    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8
    max_norm: float = 1.0

    @classmethod
    def of(cls, args: Any, total: int) -> Hyper:
        """Those of the Trainer's arguments.

        Args:
            args: `TrainingArguments`.
            total: optimizer steps.

        Raises:
            UnsupportedError: an optimizer or a schedule that has no rows here.
        """
        optim, schedule = str(getattr(args.optim, "value", args.optim)), str(args.lr_scheduler_type.value)
        if optim not in _ADAMW or getattr(args, "lr_scheduler_kwargs", None):
            raise UnsupportedError(
                f"optim={optim!r} (lr_scheduler_kwargs={args.lr_scheduler_kwargs!r}): packed trials train with AdamW "
                "and the plain schedules. Leave both out, or search with engine='shared'."
            )
        if schedule not in SCHEDULES:
            raise UnsupportedError(
                f"lr_scheduler_type={schedule!r}: packed trials know {', '.join(SCHEDULES)}. Take one of these, or "
                "search with engine='shared'."
            )
        return cls(
            learning_rate=float(args.learning_rate),
            warmup=int(args.get_warmup_steps(total)),
            total=total,
            schedule=schedule,
            weight_decay=float(args.weight_decay),
            beta1=float(args.adam_beta1),
            beta2=float(args.adam_beta2),
            epsilon=float(args.adam_epsilon),
            max_norm=float(args.max_grad_norm or 0.0),
        )


class Slots:
    """Parameters, gradients, moments: matrices (slots, size) that the modules' factors are views of.

    AdamW is Loshchilov and Hutter's, arXiv:1711.05101, as torch.optim.AdamW computes it; the schedules are those of
    transformers' `get_scheduler`, the clipping that of `torch.nn.utils.clip_grad_norm_`, each slot for itself. A slot
    whose gradient is not finite takes no step and keeps its moments, and the others never see it.

    Args:
        layout: of the columns.
        device: of all tensors.
        dtype: of the parameters; float32, or float64 in proofs.
    """

    def __init__(self, layout: Layout, device: torch.device, dtype: torch.dtype = torch.float32) -> None:
        self.layout, self.device, self.dtype = layout, device, dtype
        empty = torch.zeros(0, layout.size, device=device, dtype=dtype)
        self.theta, self.grad, self.mean, self.square = (empty.clone() for _ in range(4))
        self.hypers: list[Hyper] = []
        none = torch.zeros(0, dtype=torch.long, device=device)
        self.done = none.clone()  # steps of the schedule
        self.updates = none.clone()  # steps of the optimizer, without those that were skipped
        self._renew()

    def __len__(self) -> int:
        return len(self.hypers)

    def append(self, row: Tensor, hyper: Hyper) -> None:
        """Add a slot at its first step.

        Args:
            row: its parameters, shaped (size,).
            hyper: its settings.
        """
        self.hypers.append(hyper)
        self.theta = torch.cat([self.theta, row[None].to(self.theta)])
        self.grad, self.mean, self.square = (_longer(matrix) for matrix in (self.grad, self.mean, self.square))
        self.done, self.updates = (torch.cat([each, each.new_zeros(1)]) for each in (self.done, self.updates))
        self._renew()

    def keep(self, places: Sequence[int]) -> None:
        """Keep these slots, in this order, and forget the others."""
        index = torch.tensor(list(places), device=self.device, dtype=torch.long)
        for name in ("theta", "grad", "mean", "square", "done", "updates"):
            setattr(self, name, getattr(self, name).index_select(0, index))
        self.hypers = [self.hypers[place] for place in places]
        self._renew()

    def moved(self, layout: Layout, ranks: Sequence[Mapping[str, int]]) -> Slots:
        """The same slots under another layout.

        Args:
            layout: the other one.
            ranks: of each slot, by module.
        """
        other = Slots(layout, self.device, self.dtype)
        other.hypers = list(self.hypers)
        other.done, other.updates = self.done.clone(), self.updates.clone()
        for name in ("theta", "grad", "mean", "square"):
            matrix = torch.zeros(len(self), layout.size, device=self.device, dtype=self.dtype)
            for place, own in enumerate(ranks):
                layout.write(matrix[place], self.layout.read(getattr(self, name)[place], own))
            setattr(other, name, matrix)
        other._renew()
        return other

    def step(self, ends: Tensor) -> Tensor:
        """An optimizer step of the slots whose step ends here; their gradients are zero afterwards.

        Args:
            ends: (slots,), bool.

        Returns:
            (slots,), the gradient's norm before clipping; 0 where no step ended.
        """
        norm = torch.linalg.vector_norm(self.grad, dim=1)
        finite = ends & torch.isfinite(norm)
        moves = finite[:, None]
        clip = torch.where(self._max_norm > 0, (self._max_norm / (norm + 1e-6)).clamp(max=1.0), 1.0)
        gradient = torch.where(moves, self.grad * self._column(clip), 0.0)
        self.updates += finite
        mean = self.mean.lerp(gradient, self._column(1 - self._beta1))
        square = self.square * self._column(self._beta2) + gradient * gradient * self._column(1 - self._beta2)
        self.mean, self.square = torch.where(moves, mean, self.mean), torch.where(moves, square, self.square)
        # Powers in double precision: 1 - beta2 would lose four of its digits in single.
        count, rate = self.updates.clamp(min=1), self.rates()
        root = self.square.sqrt() / self._column((1 - self._beta2**count).sqrt()) + self._column(self._epsilon)
        update = self.mean / root * self._column(rate / (1 - self._beta1**count))
        self.theta -= torch.where(moves, self.theta * self._column(rate * self._decay) + update, 0.0)
        self.grad.masked_fill_(ends[:, None], 0.0)  # in place: the modules' gradients are views of it
        self.done += ends
        return torch.where(ends, norm, 0.0)

    def rates(self) -> Tensor:
        """(slots,), the learning rate of the next step."""
        step, warmup, total = self.done.double(), self._warmup, self._total
        span = (total - warmup).clamp(min=1)
        linear = ((total - step) / span).clamp(min=0)
        cosine = (0.5 * (1 + torch.cos(math.pi * (step - warmup) / span))).clamp(min=0)
        after = torch.where(self._kind == 0, linear, torch.where(self._kind == 1, cosine, 1.0))
        warm = (step < warmup) & (self._kind != SCHEDULES.index("constant"))
        return self._peak * torch.where(warm, step / warmup.clamp(min=1), after)

    def state_dict(self) -> dict[str, Any]:
        """All that is needed to go on, on the host."""
        tensors = {name: getattr(self, name).cpu() for name in _TENSORS}
        return {**tensors, "hypers": [vars(hyper) for hyper in self.hypers]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """What `state_dict` gave, of the same layout."""
        for name in _TENSORS:
            setattr(self, name, state[name].to(self.device))
        self.hypers = [Hyper(**values) for values in state["hypers"]]
        self._renew()

    def _column(self, values: Tensor) -> Tensor:
        return values.to(self.dtype)[:, None]

    def _renew(self) -> None:
        """Write the settings as rows of double precision, one number a slot."""

        def row(name: str) -> Tensor:
            values = [float(getattr(hyper, name)) for hyper in self.hypers]
            return torch.tensor(values, device=self.device, dtype=torch.float64)

        self._peak, self._warmup, self._total = row("learning_rate"), row("warmup"), row("total")
        self._decay, self._max_norm = row("weight_decay"), row("max_norm")
        self._beta1, self._beta2, self._epsilon = row("beta1"), row("beta2"), row("epsilon")
        kinds = [SCHEDULES.index(hyper.schedule) for hyper in self.hypers]
        self._kind = torch.tensor(kinds, device=self.device, dtype=torch.long)


_TENSORS = ("theta", "grad", "mean", "square", "done", "updates")


def _longer(matrix: Tensor) -> Tensor:
    return torch.cat([matrix, matrix.new_zeros(1, matrix.shape[1])])
