"""The loop of one worker of a search: ask, train to the next rung, keep the better half, go on."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from ..errors import ForgeError
from .engines import Arrival, Engine, Task
from .search.halving import survivors

if TYPE_CHECKING:
    from .study.crews import Crew
    from .study.ledger import Asked, Ledger

logger = logging.getLogger("forge.tuning")

WAIT_S = 2.0


class Watcher(Protocol):
    """Who is told what happens; nothing that it does may stop the search."""

    def started(self, asked: Asked, task: Task) -> None:
        """A trial begins, or begins anew."""
        ...

    def reached(self, arrival: Arrival, *, goes_on: bool) -> None:
        """A trial stands at a rung."""
        ...

    def ended(self, number: int, status: str, attrs: Mapping[str, Any]) -> None:
        """A trial is over."""
        ...


class Worker:
    """Trains trials of a study until none is left; any number of them work on one study.

    What is decided is written to the ledger after the engine's checkpoint, and all of it may be done twice: a worker
    that is killed anywhere is followed by another one that reads the checkpoint, decides the same again, and goes on.

    Args:
        ledger: the study.
        engine: what trains.
        folder: the study's.
        make_task: from a trial's parameters to its recipe.
        excess_gb: by how much parameters exceed the memory.
        score: of a completed trial's adapter, where every trial is scored: the value, and figures by name.
        watchers: who is told.
    """

    def __init__(
        self,
        ledger: Ledger,
        engine: Engine,
        folder: Path,
        *,
        make_task: Callable[[Asked], Task],
        excess_gb: Callable[[Mapping[str, Any]], float] | None = None,
        score: Callable[[int, Path], tuple[float, Mapping[str, float]]] | None = None,
        watchers: Sequence[Watcher] = (),
    ) -> None:
        self._ledger, self._engine, self._folder = ledger, engine, folder
        self._make_task, self._excess_gb, self._score = make_task, excess_gb, score
        self._watchers = tuple(watchers)
        self._asked: dict[int, Asked] = {}

    def run(self) -> None:
        """Work as a crew, and then as every crew that was left by a process that died, until no trial is on the way.

        Raises:
            ForgeError: three trials in a row failed alike; the lease was lost.
        """
        crew: Crew | None = self._ledger.claim()
        while True:
            if crew is not None:
                try:
                    self._work(crew)
                finally:
                    crew.release()
            if not self._ledger.unfinished():
                return
            crew = self._ledger.claim_dead()
            if crew is None:  # others are at work; should one of them die, its trials are taken over
                time.sleep(WAIT_S)

    def _work(self, crew: Crew) -> None:
        checkpoint = self._folder / crew.folder
        self._go_on(crew, checkpoint)
        while True:
            self._refill(crew)
            if not self._engine.numbers:
                return
            arrivals = self._engine.advance()
            crew.confirm()  # two must not write one checkpoint
            self._engine.save(checkpoint)
            self._decide(arrivals)

    def _go_on(self, crew: Crew, checkpoint: Path) -> None:
        """What was on the way when the crew's last process ended."""
        running = {asked.number: asked for asked in self._ledger.running(crew)}
        if not running:
            return
        tasks = {number: self._make_task(asked) for number, asked in running.items()}
        self._asked.update(running)
        if any(checkpoint.glob("*")):
            self._decide(self._engine.load(checkpoint, tasks))
        for asked in self._ledger.running(crew):  # those that began after the checkpoint was written
            if asked.number not in self._engine.numbers:
                self._add(asked, tasks[asked.number])

    def _refill(self, crew: Crew) -> None:
        while self._engine.free > 0:
            if why := self._ledger.should_stop():
                raise ForgeError(f"The search stops. {why} Mend that and run the same again: it goes on.")
            asked = self._ledger.ask(crew, excess_gb=self._excess_gb)
            if asked is None:
                return
            self._asked[asked.number] = asked
            try:
                self._add(asked, self._make_task(asked))
            except ForgeError as error:
                self._finish(asked.number, "failed", why=str(error))

    def _add(self, asked: Asked, task: Task) -> None:
        self._engine.add(task)
        for watcher in self._watchers:
            watcher.started(asked, task)

    def _decide(self, arrivals: Sequence[Arrival]) -> None:
        """Who goes on and who does not: of what came to a rung together the better half, held against all before."""
        for arrival in arrivals:
            if arrival.status != "reached":
                self._end(arrival, arrival.status)
        group = {one.number: one for one in arrivals if one.status == "reached"}
        if not group:
            return
        percent = int(next(iter(group.values())).percent)
        for number, one in group.items():
            self._ledger.report(number, percent, one.loss)
        if percent >= 100:
            for one in group.values():
                self._complete(one)
            return
        before = self._ledger.losses_at(percent, without=group)
        kept = survivors({number: one.loss for number, one in group.items()}, before)
        for number, one in group.items():
            for watcher in self._watchers:
                watcher.reached(one, goes_on=number in kept)
            if number not in kept:
                better = sum(loss < one.loss for loss in (*before, *(other.loss for other in group.values())))
                said = f"At {percent}% {better} of {len(before) + len(group)} trials were better."
                self._end(one, "stopped", why=said)

    def _complete(self, arrival: Arrival) -> None:
        number = arrival.number
        if number not in self._engine.numbers:  # it was finished before the last process ended
            return
        adapter = self._folder / "trials" / str(number) / "adapter"
        self._engine.export(number, adapter)
        value, figures = arrival.loss, dict[str, Any]()
        if self._score is not None:
            value, scored = self._score(number, adapter)
            figures = dict(scored)
        for watcher in self._watchers:
            watcher.reached(arrival, goes_on=False)
        self._end(arrival, "completed", value=value, adapter=f"trials/{number}/adapter", loss=arrival.loss, **figures)

    def _end(self, arrival: Arrival, status: str, *, why: str = "", value: float | None = None, **attrs: Any) -> None:
        self._finish(
            arrival.number,
            status,
            value=value,
            why=why or arrival.why,
            trace=arrival.trace,
            engine=self._engine.name,
            steps=arrival.steps,
            total_steps=arrival.total_steps,
            tokens=arrival.tokens,
            seconds=arrival.seconds,
            curve=[list(point) for point in arrival.curve],
            **attrs,
        )

    def _finish(self, number: int, status: str, *, value: float | None = None, **attrs: Any) -> None:
        said = {name: found for name, found in attrs.items() if found not in ("", None)}
        self._ledger.finish(number, status, value=value, **said)
        if number in self._engine.numbers:
            self._engine.drop(number)
        for watcher in self._watchers:
            watcher.ended(number, status, said)
