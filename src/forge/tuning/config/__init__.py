"""TuningConfig, from arguments, a file, the environment or a request.

config.py     the value itself
rules.py      what each field may be; check.py: all that is wrong, said at once
values.py     what is kept of a value, and what is shown
files.py      YAML and JSON
settings.py   the environment and requests
project.py    the data of a request's project
found.py      what was found where, before it is a config
"""

from .config import TuningConfig

__all__ = ["TuningConfig"]
