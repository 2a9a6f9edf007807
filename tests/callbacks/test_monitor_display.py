from io import StringIO

import pytest
from rich.console import Console
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from forge import MonitorCallback
from forge.callbacks.monitor.display import ROWS, Display
from forge.callbacks.monitor.events import Event
from support.models import trainer


def console(terminal):
    return Console(file=StringIO(), force_terminal=terminal, width=120, highlight=False, color_system=None)


def text_of(display):
    rendered = Console(file=StringIO(), width=120, color_system=None)
    rendered.print(display.render())
    return rendered.file.getvalue()


ENTRY = {"loss": 2.5, "grad_norm": 0.31, "learning_rate": 2e-4, "tokens_per_second": 1234.5, "eta_s": 3725.0}


def test_lines_where_there_is_no_terminal():
    display = Display(console(terminal=False))
    display.start(100)
    display.count(1, 99.0)
    display.count(2, 98.0)
    display.show(10, ENTRY)
    display.show(10, {"eval_one_loss": 2.25, "eval_two_loss": 3.0})
    display.show(10, {"train_runtime": 1.0, "nonfinite_steps": 1})
    display.stop()
    assert display._console.file.getvalue().splitlines() == [
        "step 1/100  about 1:39 left, by this step",
        "step 10/100  loss 2.5000  grad norm 0.31  lr 2.00e-04  tok/s 1,234  1:02:05 left",
        "step 10/100  eval loss 2.2500",
    ]


def test_a_live_table_on_a_terminal():
    display = Display(console(terminal=True))
    display.start(100)
    for step in range(1, 2 * ROWS):
        display.show(step, {**ENTRY, "mfu": 0.41, "memory/peak_allocated_gb": 12.345})
    display.show(2 * ROWS, {**ENTRY, "nonfinite_steps": 2, "loss": float("nan")})
    display.add_event(Event(2 * ROWS, "nonfinite", "the loss is nan; the update was dropped"))
    seen = text_of(display)
    display.stop()
    display.stop()
    lines = seen.splitlines()
    assert lines[0].startswith(f"step {2 * ROWS}/100")
    assert "1:02:05 left" in lines[0]
    assert lines[1].split() == ["step", "loss", "grad", "norm", "lr", "tok/s", "MFU", "GPU", "GiB", "bad", "steps"]
    assert len(lines) == 2 + ROWS + 1
    assert lines[-2].split()[:2] == [str(2 * ROWS), "nan"]
    assert "the update was dropped" in lines[-1]
    assert "41.0%" in seen
    assert "\x1b[" in display._console.file.getvalue()  # it moved the cursor: it was drawn in place


@pytest.mark.parametrize("disable_tqdm", [True, False])
def test_it_takes_the_place_of_the_progress_bar(disable_tqdm, tmp_path, capsys):
    monitor = MonitorCallback()
    subject = trainer(
        "plain", tmp_path, max_steps=2, disable_tqdm=disable_tqdm, trainer_options={"callbacks": [monitor]}
    )
    monitor.attach(subject)
    before = list(subject.callback_handler.callbacks)
    assert type(before[-1]) is (PrinterCallback if disable_tqdm else ProgressCallback)
    subject.train()
    assert subject.callback_handler.callbacks == before  # evaluate() and the like show what they always did
    output = capsys.readouterr()
    assert [line[:8] for line in output.out.splitlines()] == ["step 1/2", "step 1/2", "step 2/2"]
    assert "%|" not in output.err


def test_the_bar_moves_between_entries():
    display = Display(console(terminal=True))
    display.start(100, step=40)
    display.count(41, 590.0)
    assert text_of(display).startswith("step 41/100")
    assert "9:50 left" in text_of(display)
    display.stop()


def test_an_evaluation_shows_how_far_it_is():
    display = Display(console(terminal=True))
    display.start(100)
    display.show(50, ENTRY)
    for _ in range(3):
        display.show_evaluation([0] * 8)
    assert "evaluating: batch 3/8" in text_of(display)
    display.end_evaluation()
    assert "1:02:05 left" in text_of(display)
    display.show_evaluation([0] * 8)
    display.stop()
    assert "evaluating" not in display._console.file.getvalue().rpartition("1:02:05 left")[2]


def test_display_false_leaves_theirs(tmp_path, capsys):
    monitor = MonitorCallback(display=False)
    subject = trainer("plain", tmp_path, max_steps=2, trainer_options={"callbacks": [monitor]})
    monitor.attach(subject)
    subject.train()
    assert "'tokens_per_second'" in capsys.readouterr().out
