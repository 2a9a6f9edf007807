import logging
import re
import warnings

import pytest

from support.models import lora, text_model, trainer
from support.upstream import ALLOWED, Upstream
from support.warnings import LOGGERS, WarningRecorder, stale

PEFT = "`is_gradient_checkpointing` is deprecated and will be removed in v6. Use another."


def test_a_foreign_python_warning_fails():
    with WarningRecorder() as recorder:
        warnings.warn("the sky falls", UserWarning, stacklevel=1)
    with pytest.raises(AssertionError, match="the sky falls"):
        recorder.assert_clean()


@pytest.mark.parametrize("name", LOGGERS)
def test_a_foreign_log_record_fails(name):
    with WarningRecorder() as recorder:
        logging.getLogger(f"{name}.some.module").warning("the %s falls", "moon")
        logging.getLogger(f"{name}.some.module").info("all is well")
    assert [record.text for record in recorder.seen] == ["the moon falls"]
    with pytest.raises(AssertionError, match="the moon falls"):
        recorder.assert_clean()


def test_loggers_that_are_silenced_or_do_not_propagate_are_heard():
    quiet, alone = logging.getLogger("transformers"), logging.getLogger("trl.alone")
    before = quiet.level
    quiet.setLevel(logging.ERROR)
    alone.propagate = False
    try:
        with WarningRecorder() as recorder:
            quiet.warning("one")
            alone.warning("two")
        assert {record.text for record in recorder.seen} == {"one", "two"}
        assert quiet.level == logging.ERROR
        assert alone.handlers == []
    finally:
        quiet.setLevel(before)
        alone.propagate = True


def test_what_is_said_once_is_heard_in_every_recording():
    from accelerate import PartialState
    from accelerate.logging import get_logger
    from transformers.utils import logging as transformers_logging

    PartialState()
    speakers = [transformers_logging.get_logger("transformers.x"), get_logger("trl.x")]
    for _ in range(2):
        with WarningRecorder() as recorder:
            for speaker in speakers:
                speaker.warning_once("only once")
                speaker.warning_once("only once")
            warnings.warn("only here", UserWarning, stacklevel=1)
        assert len(recorder.matching("only once")) == 2
        assert len(recorder.matching("only here")) == 1


def test_upstreams_own_warning_is_allowed_and_no_longer_stale():
    entry = next(entry for entry in ALLOWED if entry.matches(PEFT))
    with WarningRecorder() as recorder:
        warnings.warn(PEFT, FutureWarning, stacklevel=1)
    recorder.assert_clean()
    assert len(recorder.seen) == 1
    assert entry not in stale()


def test_an_unmatched_entry_for_the_installed_version_is_stale(monkeypatch):
    import torch

    never = Upstream("nobody says this", "torch", torch.__version__.split("+")[0], "2026-11-22", "a test")
    monkeypatch.setattr("support.warnings.ALLOWED", (never,))
    assert stale() == [never]


@pytest.mark.parametrize("entry", ALLOWED, ids=lambda entry: entry.pattern[:40])
def test_entries_are_dated_explained_and_usable_by_pytest(entry):
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", entry.seen_on)
    assert entry.reason
    assert re.compile(entry.pattern).match("") is None  # an empty pattern would allow everything
    assert "(?:" not in entry.pattern  # a colon would end the field


def test_a_trainer_with_a_wrong_value_is_caught_and_a_right_one_is_clean(tmp_path):
    with WarningRecorder() as recorder:
        trainer("sft", tmp_path, peft_options(), trainer_options={"peft_config": lora()}).train()
    recorder.assert_clean()

    with WarningRecorder() as recorder:
        options = {"model_init_kwargs": {"dtype": "float32"}}
        trainer("sft", tmp_path, text_model(), max_steps=1, **options)
    with pytest.raises(AssertionError, match="model_init_kwargs"):
        recorder.assert_clean()


def peft_options():
    return text_model("llama", layers=2)


def test_filters_are_restored():
    filters = list(warnings.filters)
    with WarningRecorder():
        pass
    assert warnings.filters == filters
    with pytest.raises(UserWarning, match="again an error"):
        warnings.warn("again an error", UserWarning, stacklevel=1)
