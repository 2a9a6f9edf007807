"""The workshop as pytest fixtures (tests/support), and upstream's own warnings taken out of pytest's way.

Heavy modules are imported where a fixture needs them, so that a test of a light module stays light.
"""

import gc
import os
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

# There is no model hub where the tests run, and a test that looks for one should fail at once instead of waiting.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("WANDB_DISABLED", "true")

_frozen = {"modules": 0}
REAL_ASSETS = {"smollm2", "minilm", "conversations"}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--stale-warnings",
        action="store_true",
        help="list the allow-list's entries that no assert_clean() of this run needed (support/upstream.py)",
    )


def pytest_configure(config: pytest.Config) -> None:
    from support.upstream import ALLOWED

    for entry in ALLOWED:
        if entry.pytest_filter:
            config.addinivalue_line("filterwarnings", entry.pytest_filter)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if REAL_ASSETS & set(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.real)


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    if config.getoption("--stale-warnings") and "support.warnings" in sys.modules:
        for entry in sys.modules["support.warnings"].stale():
            terminalreporter.write_line(f"stale warning: {entry.library} {entry.version}: {entry.pattern}")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Begin every test that could use them with the same random numbers."""
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)


@pytest.fixture(autouse=True)
def _one_thread_for_tiny_models(request: pytest.FixtureRequest) -> Iterator[None]:
    """Give each test of a tiny model one thread: more of them only wait for each other, by far on a busy machine."""
    torch = sys.modules.get("torch")
    if torch is None or any(request.node.get_closest_marker(name) for name in ("real", "long")):
        yield
        return
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _imports_left_out_of_garbage_collection() -> None:
    """Spare the collector the libraries' two million objects: each `train()` collects, which took 0.5 of its 0.7 s."""
    if len(sys.modules) > _frozen["modules"] + 500:
        gc.collect()
        gc.freeze()
        _frozen["modules"] = len(sys.modules)


@pytest.fixture(autouse=True)
def _own_judges(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Run every test without a judge that the environment names, and forget the judges it registered."""
    monkeypatch.delenv("FORGE_JUDGE", raising=False)
    yield
    if registry := sys.modules.get("forge.evaluation.judges.registry"):
        registry._registered.clear()


@pytest.fixture
def warning_recorder() -> Iterator[Any]:
    """Record all warnings of the test: `warning_recorder.assert_clean()`, `.seen`, `.matching(part)`."""
    from support.warnings import WarningRecorder

    with WarningRecorder() as recorder:
        yield recorder


@pytest.fixture
def no_foreign_warnings(warning_recorder: Any) -> Iterator[None]:
    """Fail the test at its end if it caused a warning that is not upstream's own."""
    yield
    warning_recorder.assert_clean()


@pytest.fixture
def inject_nan() -> Callable[..., Any]:
    """`with inject_nan(trainer, step=3, where="loss" | "gradient" | "weight") as fault: trainer.train()`."""
    from support.nan import inject_nan

    return inject_nan


@pytest.fixture
def backward_probe() -> type[Any]:
    """`with backward_probe(model) as probe: ...; probe.visited, probe.saved_bytes, probe.forwards`."""
    from support.backward import BackwardProbe

    return BackwardProbe


@pytest.fixture
def kill_and_resume(tmp_path: Path) -> Callable[..., Any]:
    """`killed, resumed = kill_and_resume("module:function", printed("step 7"), arguments={...})`, in `tmp_path`."""
    from support.resume import kill_and_resume

    return partial(kill_and_resume, cwd=tmp_path)


@pytest.fixture
def device_reads() -> type[Any]:
    """`with device_reads() as reads: trainer.train()`, then `reads.assert_none(inside="forge")`."""
    from support.syncs import DeviceReads

    return DeviceReads


@pytest.fixture
def scripted_judge() -> type[Any]:
    """`with scripted_judge([reply, ...]) as judge: ...` with `judge.url` and `judge.requests`."""
    from support.judge import ScriptedJudge

    return ScriptedJudge


@pytest.fixture
def tokenizer() -> Any:
    """A tokenizer of 246 tokens with a chat template."""
    from support.tokenizer import tiny_tokenizer

    return tiny_tokenizer()


@pytest.fixture
def text_model() -> Callable[..., Any]:
    """`text_model("llama", layers=4)`: a tiny model of the family whose vocabulary fits `tokenizer`."""
    from support.models import text_model

    return text_model


@pytest.fixture
def tiny_model() -> Callable[..., Any]:
    """`tiny_model("mixtral")`: the smallest model of the family (for its anatomy; its vocabulary is 64)."""
    from support.families import tiny_model

    return tiny_model


@pytest.fixture
def tiny_config() -> Callable[..., Any]:
    """`tiny_config("mixtral")`: its config."""
    from support.families import tiny_config

    return tiny_config


@pytest.fixture
def make_trainer(tmp_path: Path) -> Callable[..., Any]:
    """`make_trainer("plain" | "sft" | "dpo", model, max_steps=3, trainer_options={...})` on the CPU, in `tmp_path`."""
    from support.models import trainer

    return lambda kind, model=None, **options: trainer(kind, tmp_path, model, **options)


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The folder of the real SmolLM2-135M-Instruct."""
    from forge.assets import smollm2

    return smollm2()


@pytest.fixture(scope="session")
def minilm() -> Path:
    """The folder of the real all-MiniLM-L6-v2."""
    from forge.assets import minilm

    return minilm()


@pytest.fixture(scope="session")
def conversations() -> list[Any]:
    """The real conversations."""
    from forge.assets import conversations

    return conversations()
