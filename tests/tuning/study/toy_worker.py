"""A worker of a study that trains nothing, and a nursery that starts such workers quickly so that they can be killed.

The worker follows the same loop as a real one: ask, advance to a rung, save a checkpoint, report, decide, finish. Its
"training" is a sleep, its loss a function of the parameters and of how far it came. Each quarter it trains is a line
in `trained.jsonl`, so that a test can count what was done twice.

    with Nursery() as nursery:
        pid = nursery.start(Plan(url=None, folder=str(tmp_path), n_trials=8))
        os.kill(pid, signal.SIGKILL)
        assert nursery.wait(pid) == -signal.SIGKILL

The nursery is a process of one thread that has everything imported, and forks.
"""

import hashlib
import json
import math
import os
import random
import subprocess
import sys
import time
import traceback
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

RUNGS = (25, 50, 100)


@dataclass
class Plan:
    """What a worker is to do; `die_at`: it kills itself before that SQL statement of its own."""

    folder: str
    url: str | None = None
    n_trials: int = 8
    seed: int = 1
    slots: int = 2
    train_s: float = 0.0
    die_at: int | None = None
    limit_gb: float = 8.0
    settings: dict[str, Any] = field(default_factory=lambda: {"model": "toy"})


def space() -> dict[str, Any]:
    from optuna.distributions import CategoricalDistribution, FloatDistribution

    return {
        "learning_rate": FloatDistribution(1e-5, 1e-3, log=True),
        "lora_r": CategoricalDistribution([4, 8, 16, 32]),
        "lora_dropout": FloatDistribution(0.0, 0.1),
    }


PRIORS = [
    ("preset", {"learning_rate": 2e-4, "lora_r": 16, "lora_dropout": 0.0}),
    ("scaling", {"learning_rate": 5e-4, "lora_r": 8}),
]


def make_sampler(seed: int, number: int) -> Any:
    import optuna

    from forge.tuning.study.storage import quiet

    with quiet():
        return optuna.samplers.TPESampler(seed=seed * 10_007 + number, multivariate=True, n_startup_trials=3)


def excess_gb(params: dict[str, Any], limit_gb: float) -> float:
    return float(params["lora_r"]) * 0.2 + 4 - limit_gb


def loss(params: dict[str, Any], percent: int) -> float:
    digest = hashlib.sha256(json.dumps(params, sort_keys=True).encode()).digest()[0] / 2560
    best = (math.log10(params["learning_rate"]) + 3.7) ** 2 + 0.05 * abs(math.log2(params["lora_r"]) - 4)
    return 2 + best + digest + params["lora_dropout"] + (1 - percent / 100)


def open_ledger(plan: Plan) -> tuple[Any, Any]:
    from forge.tuning.study.ledger import Ledger
    from forge.tuning.study.storage import open_storage

    storage = open_storage(plan.url, Path(plan.folder))
    if plan.die_at is not None:
        die_before_statement(storage.engine, plan.die_at)
    ledger = Ledger.open(
        *(storage, "toy"),
        direction="minimize",
        n_trials=plan.n_trials,
        space_distributions=space(),
        make_sampler=make_sampler,
        seed=plan.seed,
        priors=PRIORS,
        settings=plan.settings,
    )
    return storage, ledger


def die_before_statement(engine: Any, number: int) -> None:
    from sqlalchemy import event

    done = {"statements": 0}

    def count(*_: Any) -> None:
        done["statements"] += 1
        if done["statements"] == number:
            os.kill(os.getpid(), 9)

    event.listen(engine, "before_cursor_execute", count)
    event.listen(engine, "commit", count)


def work(plan: Plan) -> None:
    from forge.tuning.study.storage import close_storage

    storage, ledger = open_ledger(plan)
    with ledger:
        crew = ledger.claim()
        while crew is not None:
            train(plan, ledger, crew)
            crew.release()
            crew = ledger.claim_dead()
    close_storage(storage)


def train(plan: Plan, ledger: Any, crew: Any) -> None:
    checkpoint = Path(plan.folder) / crew.folder / "engine.json"
    tasks = {asked.number: asked.params for asked in ledger.running(crew)}
    saved: dict[str, Any] = json.loads(checkpoint.read_text()) if checkpoint.exists() else {"slots": {}, "arrivals": []}
    # The whole group that arrived last is decided again, with those of it that are finished by now.
    decide(ledger, [tuple(arrival) for arrival in saved["arrivals"]])
    on_the_way = {asked.number for asked in ledger.running(crew)}
    slots = {number: int(saved["slots"].get(str(number), 0)) for number in tasks if number in on_the_way}
    while True:
        while len(slots) < plan.slots:
            asked = ledger.ask(crew, excess_gb=lambda params: excess_gb(params, plan.limit_gb))
            if asked is None:
                break
            slots[asked.number], tasks[asked.number] = 0, asked.params
        if not slots:
            return
        slots = {number: percent + 25 for number, percent in slots.items()}
        for number, percent in slots.items():
            time.sleep(plan.train_s)
            note(plan, {"number": number, "percent": percent, "crew": crew.number, "pid": os.getpid()})
        arrivals = [(n, percent, loss(tasks[n], percent)) for n, percent in slots.items() if percent in RUNGS]
        crew.confirm()
        save(checkpoint, {"slots": slots, "arrivals": arrivals})
        decide(ledger, arrivals)
        on_the_way = {asked.number for asked in ledger.running(crew)}
        slots = {number: percent for number, percent in slots.items() if number in on_the_way}


def decide(ledger: Any, arrivals: list[tuple[int, int, float]]) -> None:
    for percent in RUNGS:
        group = {number: value for number, at, value in arrivals if at == percent}
        for number, value in group.items():
            ledger.report(number, percent, value)
        history = ledger.losses_at(percent, without=group)
        everything = sorted([*group.values(), *history])
        for number, value in group.items():
            if percent == 100:
                ledger.finish(number, "completed", value=value, loss=value, steps=100, adapter=f"adapters/{number}")
            elif value > everything[(len(everything) - 1) // 2]:
                ledger.finish(number, "stopped", why=f"in the worse half at {percent} %", loss=value, steps=percent)


def save(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    half = path.with_suffix(f".{os.getpid()}.part")
    half.write_text(json.dumps(content))
    half.replace(path)


def note(plan: Plan, line: dict[str, Any]) -> None:
    with (Path(plan.folder) / "trained.jsonl").open("a") as log:
        log.write(json.dumps(line) + "\n")


def trained(folder: Path) -> list[dict[str, Any]]:
    path = folder / "trained.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def story(folder: Path, url: str | None = None) -> list[dict[str, Any]]:
    """All that a study holds of its trials, in order of number, without times."""
    storage, ledger = open_ledger(Plan(str(folder), url))
    told = [
        {
            "number": trial.number,
            "state": trial.state.name,
            "values": trial.values,
            "params": trial.params,
            "user_attrs": trial.user_attrs,
            "intermediate": trial.intermediate_values,
            "system_attrs": trial.system_attrs,
        }
        for trial in ledger.study.trials
    ]
    close(storage)
    return told


def close(storage: Any) -> None:
    from forge.tuning.study.storage import close_storage

    close_storage(storage)


class Nursery:
    """Starts workers by forking, and waits for them."""

    def __init__(self) -> None:
        path = os.pathsep.join([part for part in sys.path if part])
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        )
        self._alive: set[int] = set()

    def start(self, plan: Plan) -> int:
        pid = int(self._say({"start": asdict(plan)}))
        self._alive.add(pid)
        return pid

    def wait(self, pid: int) -> int:
        """Its exit code; minus the signal that killed it."""
        code = int(self._say({"wait": pid}))
        self._alive.discard(pid)
        return code

    def has_ended(self, pid: int) -> bool:
        return self._say({"poll": pid}) == "ended"

    def __enter__(self) -> "Nursery":
        return self

    def __exit__(self, *_: object) -> None:
        for pid in self._alive:
            with suppress(ProcessLookupError):
                os.kill(pid, 9)
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait(30)

    def _say(self, message: dict[str, Any]) -> str:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(message) + "\n")
        self._process.stdin.flush()
        return self._process.stdout.readline().strip()


def nurse() -> None:
    import optuna.samplers._tpe.sampler  # noqa: F401
    import sqlalchemy.orm  # noqa: F401

    import forge.tuning.study.ledger
    import forge.tuning.study.storage  # noqa: F401

    ended: dict[int, int] = {}
    for line in sys.stdin:
        message = json.loads(line)
        if "start" in message:
            pid = os.fork()
            if pid == 0:
                _live(Plan(**message["start"]))
            print(pid, flush=True)
        elif "poll" in message:
            pid = message["poll"]
            if pid not in ended:
                found, status = os.waitpid(pid, os.WNOHANG)
                if found:
                    ended[pid] = os.waitstatus_to_exitcode(status)
            print("ended" if pid in ended else "lives", flush=True)
        else:
            pid = message["wait"]
            if pid not in ended:
                ended[pid] = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            print(ended[pid], flush=True)


def _live(plan: Plan) -> None:
    import warnings

    warnings.simplefilter("error")
    random.seed(os.getpid())
    devnull = os.open(os.devnull, os.O_RDONLY)
    os.dup2(devnull, 0)
    os.dup2(2, 1)
    try:
        work(plan)
    except BaseException:  # noqa: BLE001
        Path(plan.folder, f"error-{os.getpid()}.txt").write_text(traceback.format_exc())
        os._exit(1)
    os._exit(0)


if __name__ == "__main__":
    nurse()
