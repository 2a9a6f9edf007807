"""The allow-list: warnings that the libraries give whatever a configuration says, with where and when they were seen.

A warning that another value in a configuration would avoid does not belong here: forge chooses that value instead.
The recorder checks against this list, and conftest hands it to pytest, which otherwise makes every warning an error.
"""

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Upstream:
    """One warning of upstream's own; `pattern` is a regular expression that begins at the start of the text."""

    pattern: str
    library: str
    version: str
    seen_on: str
    reason: str
    category: str | None = None

    def matches(self, text: str) -> bool:
        return re.match(self.pattern, text, re.DOTALL) is not None

    @property
    def pytest_filter(self) -> str | None:
        """Return the line for pytest's `filterwarnings`, whose fields end at a colon; None for a log record."""
        return f"ignore:{self.pattern.replace(':', '.')}:{self.category}" if self.category else None


ALLOWED = (
    Upstream(
        pattern=r"`is_gradient_checkpointing` is deprecated and will be removed in v6",
        library="peft",
        version="0.21.2",
        seen_on="2026-11-22",
        reason="get_peft_model reads transformers' old attribute; so does trl 1.16.0 in DPOTrainer",
        category="FutureWarning",
    ),
    Upstream(
        pattern=r"`gradient_checkpointing_(en|dis)able` is deprecated and will be removed in v6",
        library="trl",
        version="1.16.0",
        seen_on="2026-11-22",
        reason="DPOTrainer's reference pass switches checkpointing off and on by transformers' old methods; "
        "so does peft 0.21.2 in prepare_model_for_kbit_training",
        category="FutureWarning",
    ),
    Upstream(
        pattern=r"`torch\.jit\.\w+` is deprecated",
        library="torch",
        version="2.13.0",
        seen_on="2026-11-22",
        reason="torch itself, or a library that trl imports, still scripts a function at import",
        category="DeprecationWarning",
    ),
    Upstream(
        pattern=r"Failed to load CPU gemm_4bit_forward from kernels-community",
        library="bitsandbytes",
        version="0.50.2",
        seen_on="2026-11-22",
        reason="logged at import on CPUs with avx512_bf16 unless the optional package kernels can reach the model hub",
    ),
    Upstream(
        pattern=r"The installed version of bitsandbytes was compiled without GPU support",
        library="bitsandbytes",
        version="0.46.1",
        seen_on="2026-11-22",
        reason="logged at import on a machine without a GPU; peft imports it whether it is used or not",
    ),
    Upstream(
        pattern=r"_check_is_size will be removed in a future PyTorch release",
        library="bitsandbytes",
        version="0.46.1",
        seen_on="2026-11-22",
        reason="its CPU kernels for nf4 call what torch 2.13.0 deprecates",
        category="FutureWarning",
    ),
    Upstream(
        pattern=r"Could not find a config file in  - will assume",
        library="peft",
        version="0.18.0",
        seen_on="2026-11-22",
        reason="saving an adapter of a model that was built from a config and so has no name: the two spaces say so",
        category="UserWarning",
    ),
    Upstream(
        pattern=r"Unsupported layer type '.*' encountered, proceed at your own risk",
        library="peft",
        version="0.18.0",
        seen_on="2026-11-22",
        reason="once per fused expert: before 0.19 its wrapper asked the module around it for in_features",
        category="UserWarning",
    ),
    Upstream(
        pattern=r"`loss_type=None` was set in the config but it is unrecognized",
        library="transformers",
        version="5.23.0",
        seen_on="2026-11-22",
        reason="GPT2LMHeadModel asks for its loss by class name and falls back to the causal one, which is right",
    ),
    Upstream(
        pattern=r"mtime may not be reliable on this filesystem",
        library="transformers",
        version="5.23.0",
        seen_on="2026-11-22",
        reason="checkpoints of tiny models are written within one tick of the file system's clock",
        category="UserWarning",  # of transformers 5.0; later a log record
    ),
    Upstream(
        pattern=r"Model has `tie_word_embeddings=True` and a tied layer is part of the adapter",
        library="peft",
        version="0.18.0",
        seen_on="2026-11-22",
        reason="it asks the config, not the model: the tiny models' embeddings are not tied",
        category="UserWarning",
    ),
)
