"""MonitorCallback: what is measured at each step, what is judged, what is shown and written.

callback.py     MonitorCallback: the trainer's events
attachment.py   what attach() puts on one trainer
run.py          one train(): from tensors on the device to an entry of the log
guard.py        whether a step may reach the weights; watch.py: the judgements on one number
loss.py         the loss of every step; gradients.py: norms by group, update ratio
throughput.py   tokens, FLOPs, waiting; device.py, system.py: memory, GPU, CPU
events.py       what was noticed
display.py      the live table; journal.py: metrics.jsonl; report.py: report.html and plots
"""

from __future__ import annotations

from .callback import MonitorCallback

__all__ = ["MonitorCallback"]
