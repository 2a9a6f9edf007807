"""MLflow as a listener that can be deaf: what a run has to tell is written to disk, and a process beside it delivers.

Nothing that the training calls touches the network, waits, or raises.

    spool.py      the lines on disk, which only grow
    runs.py       study and trial, as tuners use them
    reading.py    whole lines, in portions
    delivery.py   lines -> MLflow, each once
    courier.py    the process beside the training, and `python -m forge.tuning.tracking FOLDER`
    names.py      what things are called there
    private.py    what nobody is told
"""

from .names import trial_params
from .runs import Status, Tracking, check_tracking, open_tracking
from .upload import upload

__all__ = ["Status", "Tracking", "check_tracking", "open_tracking", "trial_params", "upload"]
