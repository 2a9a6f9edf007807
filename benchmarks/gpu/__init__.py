"""The GPU matrix: real training steps of random-init models, on a bare CUDA machine without network.

matrix.py     the cells, in groups; a group is a module with `cells(...)` and `measure(settings)`
presets.py    group: every preset against TRL's own defaults
callbacks.py  group: what callbacks add to a step
freezing.py   group: what frozen layers save
memory.py     group: the memory of a run, beside its estimates (memory_cells.py, memory_training.py, peers.py)
shapes.py     the shapes of models
models.py     the checkpoint, tokenizer and texts that stand in for downloads
report.py     rows -> Markdown (memory_report.py: of the memory group, and its chart)
"""
