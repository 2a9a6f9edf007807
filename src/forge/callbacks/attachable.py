"""One callback belongs to at most one trainer."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..errors import ForgeError

if TYPE_CHECKING:
    from transformers import Trainer, TrainerState


class Attachable:
    """What the callbacks with an `attach(trainer)` share: which trainer that was."""

    _trainer: Trainer | None = None

    def _claim(self, trainer: Trainer) -> bool:
        """Say whether there is anything to do: not when it is attached already.

        Raises:
            ForgeError: It is attached to another trainer.
        """
        if self._trainer is None:
            self._trainer = trainer
            return True
        if self._trainer is not trainer:
            self._refuse()
        return False

    def _release(self, trainer: Trainer) -> None:
        """Forget the trainer, when it will not train any more: the next one may be attached."""
        if self._trainer is trainer:
            self._trainer = None

    def _is_attached(self, state: TrainerState) -> bool:
        """Say whether the trainer whose state this is, is the one that it is attached to.

        Raises:
            ForgeError: It is attached to another trainer.
        """
        if self._trainer is not None and self._trainer.state is not state:
            self._refuse()
        return self._trainer is not None

    def _refuse(self) -> None:
        raise ForgeError(f"This {type(self).__name__} is attached to another trainer: make one for each trainer.")
