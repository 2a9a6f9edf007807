import os
import signal
import threading
from typing import Any

import pytest
from transformers import TrainerControl, TrainerState

from forge.tuning import TuningInterrupted
from forge.tuning.interruption import StopAtStep


def step(stop: StopAtStep) -> TrainerControl:
    control: Any = TrainerControl()
    stop.on_step_end(None, TrainerState(), control)  # type: ignore[arg-type]
    return control


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_saves_and_stops_at_the_end_of_the_step(
    number: signal.Signals, caplog: pytest.LogCaptureFixture
) -> None:
    with StopAtStep() as stop:
        before = step(stop)
        assert not before.should_save
        assert not before.should_training_stop
        os.kill(os.getpid(), number)
        after = step(stop)
    assert after.should_save
    assert after.should_training_stop
    assert stop.asked == number
    assert number.name in caplog.text


def test_the_second_signal_stops_at_once() -> None:
    with StopAtStep():
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(TuningInterrupted, match=r"last checkpoint.*Run the same again"):
            os.kill(os.getpid(), signal.SIGINT)


def test_the_handlers_are_put_back() -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with StopAtStep():
        assert signal.getsignal(signal.SIGINT) != before[0]
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_in_another_thread_nothing_is_changed() -> None:
    before = signal.getsignal(signal.SIGINT)
    seen = []

    def work() -> None:
        with StopAtStep() as stop:
            seen.append((signal.getsignal(signal.SIGINT), step(stop).should_save))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [(before, False)]


def test_it_is_a_keyboard_interrupt() -> None:
    # so that `except Exception` in somebody's loop does not swallow it
    assert issubclass(TuningInterrupted, KeyboardInterrupt)
    assert not issubclass(TuningInterrupted, Exception)
