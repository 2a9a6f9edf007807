"""Trainers that train at the same time, a step of one after a step of another.

On a machine that others use too, two runs after one another are not comparable. Here every trainer has a thread, and
one of them holds the baton: a round is one step of each, in random order, so that a disturbance of a few seconds hits
all alike and a ratio within a round means something. A step is timed twice, by the clock and by the CPU time of its
thread, which other processes lengthen less.

    turns = Turns({"one": trainer, "other": another})
    turns.round()
    turns.stop()
    turns.steps["one"][-1].cpu_s / turns.steps["other"][-1].cpu_s
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from transformers import Trainer, TrainerCallback


@dataclass(frozen=True)
class Seconds:
    """By the clock, and by the CPU time of the thread."""

    wall_s: float
    cpu_s: float

    @classmethod
    def now(cls) -> Seconds:
        """Two readings, from which others are subtracted."""
        return cls(time.perf_counter(), time.thread_time())

    def __sub__(self, other: Seconds) -> Seconds:
        return Seconds(self.wall_s - other.wall_s, self.cpu_s - other.cpu_s)


class _Stopped(BaseException):
    """Ends a training from within; no error, so nothing handles it."""


class _Player(TrainerCallback):
    """Stands last in a trainer's list: gives the baton away before each step, and times the step."""

    def __init__(self, trainer: Trainer, given_back: threading.Semaphore) -> None:
        self.trainer = trainer
        self.steps: list[Seconds] = []
        self.turns: list[Seconds] = []
        self.done = False
        self.stopping = False
        self.error: BaseException | None = None
        self.baton = threading.Semaphore(0)
        self._given_back = given_back
        self._begin = self._turn = Seconds(0, 0)

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        """Wait for the turn."""
        self._give_back()
        self._take()
        self._begin = Seconds.now()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Take the time."""
        self.steps.append(Seconds.now() - self._begin)

    def play(self) -> None:
        """What the thread does."""
        try:
            self._take()
            self.trainer.train()
        except _Stopped:
            pass
        except BaseException as error:  # noqa: BLE001  (raised again where the turns are given)
            self.error = error
        finally:
            self.done = True
            self._give_back()

    def _take(self) -> None:
        self.baton.acquire()
        if self.stopping:
            raise _Stopped
        self._turn = Seconds.now()

    def _give_back(self) -> None:
        self.turns.append(Seconds.now() - self._turn)
        self._given_back.release()


class Turns:
    """Gives each trainer its turn; see the module.

    Args:
        trainers: by name, ready to train; `stop` must be called before they are used otherwise.
        seed: of the order within each round.
    """

    def __init__(self, trainers: Mapping[str, Trainer], *, seed: int = 0) -> None:
        self._given_back = threading.Semaphore(0)
        self._players = {name: _Player(trainer, self._given_back) for name, trainer in trainers.items()}
        self._rng = random.Random(seed)
        for player in self._players.values():
            player.trainer.add_callback(player)
            threading.Thread(target=player.play, daemon=True).start()
        self.round()  # each comes as far as its first step

    @property
    def steps(self) -> dict[str, list[Seconds]]:
        """Of each trainer, its steps so far: from `on_step_begin` to `on_step_end`, the other callbacks' included."""
        return {name: player.steps for name, player in self._players.items()}

    @property
    def whole(self) -> dict[str, Seconds]:
        """Of each trainer, the time of its whole training so far: data, steps, ends of epochs."""
        return {
            name: Seconds(sum(turn.wall_s for turn in player.turns), sum(turn.cpu_s for turn in player.turns))
            for name, player in self._players.items()
        }

    def round(self) -> bool:
        """One step of each trainer that is not done; returns whether there was one.

        Raises:
            BaseException: whatever a training raised.
        """
        waiting = [player for player in self._players.values() if not player.done]
        for player in self._rng.sample(waiting, len(waiting)):
            player.baton.release()
            self._given_back.acquire()
            if player.error is not None:
                self.stop()
                raise player.error
        return bool(waiting)

    def stop(self) -> None:
        """End the trainings where they are."""
        for player in self._players.values():
            player.stopping = True
            player.baton.release()
        for player in self._players.values():
            while not player.done:
                self._given_back.acquire()
            player.trainer.remove_callback(player)
