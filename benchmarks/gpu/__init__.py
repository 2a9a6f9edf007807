"""The GPU matrix: real training steps of random-init models, on a bare CUDA machine without network.

matrix.py     the cells, in groups; a group is a module with `cells(...)` and `measure(settings)`
presets.py    group: every preset against TRL's own defaults
models.py     model shapes, and the checkpoint, tokenizer and texts that stand in for downloads
report.py     rows -> Markdown
"""
