"""The estimate: bytes by part as a Mapping in GiB, and the questions that people ask of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from ..errors import ConflictError
from .cards import Card, find_card
from .part import PARTS

if TYPE_CHECKING:
    from transformers import TrainerCallback

    from .describe import Described

GB = 2**30
Engine = Literal["trace", "analytic"]


@dataclass(frozen=True)
class Bytes:
    """What an engine and the overheads make of a scenario, in bytes.

    Args:
        parts: what is alive at the peak instant, by part.
        cuda_context: of the process, beside all tensors.
        reserved: what the caching allocator holds.
        low: the least total that the engine's band allows.
        high: the highest.
        paged: optimizer state in managed memory, in none of the sums.
        peak_phase: where in the step the peak is, in words.
    """

    parts: Mapping[str, int]
    cuda_context: int
    reserved: int
    low: int
    high: int
    paged: int
    peak_phase: str

    @property
    def allocated(self) -> int:
        """All parts together."""
        return sum(self.parts.values())

    @property
    def total(self) -> int:
        """What nvidia-smi would show."""
        return self.reserved + self.cuda_context


class Fit(str):
    """A verdict, of "yes", "no" and "uncertain"; true only for "yes".

    >>> bool(Fit("no")), bool(Fit("uncertain")), bool(Fit("yes"))
    (False, False, True)
    """

    __slots__ = ()

    def __bool__(self) -> bool:
        return self == "yes"


@dataclass(frozen=True, eq=False)
class MemoryEstimate(Mapping[str, Any]):
    """What a run will need; made by `estimate_model_memory`. `_gb` are GiB (2**30 bytes).

    The parts are what is alive at the instant when most is, and sum to `allocated_peak_gb`:

    | key | what |
    |---|---|
    | `parameters_gb` | weights as they are stored, adapters and buffers included |
    | `gradients_gb` | of the parameters that train |
    | `optimizer_gb` | its state, and an EMA's shadow |
    | `activations_gb` | what forward keeps for backward, what backward works on, the batch |
    | `logits_gb` | from the last hidden state to the loss, and back |
    | `quantization_gb` | scales and codebooks of packed weights, and weights unpacked at that instant |
    | `reference_model_gb` | the second model of DPO |
    | `workspace_gb` | cuBLAS workspaces, gradient clipping, rounding of the allocator, gathered shards |
    | `cuda_context_gb` | the CUDA context and loaded kernels; in no allocator |
    | `allocated_peak_gb` | the sum of all parts but the context: `torch.cuda.max_memory_allocated()` |
    | `reserved_peak_gb` | what the caching allocator holds for that: `torch.cuda.max_memory_reserved()` |
    | `total_estimated_gb` | reserved and context: what nvidia-smi would show for the process |
    | `low_gb`, `high_gb` | the band in which the total should be |
    | `peak_phase` | when the peak is: "forward", "loss", "backward of layer 31", "optimizer step" |
    | `engine` | "trace" or "analytic" |
    | `assumptions` | what was not said and had to be supposed |

    Args:
        model: its name.
        batch_size: rows in a micro-batch.
        sequence_length: tokens in a row.
        engine: which engine it comes from.
        assumptions: sentences.
        bytes: the numbers.
        described: the run.
        first_epoch: with `prefix_cache` the estimate of the epoch that fills the cache, else None.
    """

    model: str
    batch_size: int
    sequence_length: int
    engine: Engine
    assumptions: tuple[str, ...]
    bytes: Bytes = field(repr=False)
    described: Described = field(repr=False)
    first_epoch: MemoryEstimate | None = field(default=None, repr=False)

    def __getitem__(self, key: str) -> Any:
        """The value of one of the keys above."""
        return self._values()[key]

    def __iter__(self) -> Iterator[str]:
        """The keys above, in their order."""
        return iter(self._values())

    def __len__(self) -> int:
        """How many there are."""
        return len(self._values())

    def _values(self) -> dict[str, Any]:
        found = self.bytes
        return {
            **{f"{name}_gb": found.parts[name] / GB for name in PARTS},
            "cuda_context_gb": found.cuda_context / GB,
            "allocated_peak_gb": found.allocated / GB,
            "reserved_peak_gb": found.reserved / GB,
            "total_estimated_gb": found.total / GB,
            "low_gb": found.low / GB,
            "high_gb": found.high / GB,
            "peak_phase": found.peak_phase,
            "engine": self.engine,
            "assumptions": self.assumptions,
        }

    def fits(self, gpu: str | int) -> Fit:
        """Whether the run fits on a GPU, from its first epoch on: "yes", "no", or "uncertain" within the band.

        Args:
            gpu: "24GB", "RTX 4090", "H100", what `torch.cuda.get_device_name()` says, or bytes.

        Returns:
            A string that is true only for "yes".

        Raises:
            ConflictError: the preset is one for a CPU.
            UnknownNameError: no such GPU.
        """
        usable = self.card(gpu).usable_bytes
        most = self.heaviest.bytes
        if most.high <= usable:
            return Fit("yes")
        return Fit("no" if most.low > usable else "uncertain")

    @property
    def heaviest(self) -> MemoryEstimate:
        """The epoch that needs most: `first_epoch`, or this."""
        first = self.first_epoch
        return first if first is not None and first.bytes.high >= self.bytes.high else self

    def card(self, gpu: str | int) -> Card:
        """The GPU of that name.

        Raises:
            ConflictError: the preset is one for a CPU.
            UnknownNameError: no such GPU.
        """
        if self.described.scenario.device == "cpu":
            raise ConflictError(
                'This estimate is for the hardware profile "cpu" (fp32, no checkpointing): it says nothing of a GPU. '
                'Build the preset for one: get_preset(..., hardware="ampere").'
            )
        return find_card(gpu)

    def max_batch_size(self, gpu: str | int, *, limit: int = 1024) -> int:
        """The largest micro-batch that surely fits; 0 where not even one row does.

        Args:
            gpu: as for `fits`.
            limit: no more than this is tried.
        """
        from .search import largest

        return largest(self, gpu, "batch_size", limit)

    def max_sequence_length(self, gpu: str | int, *, limit: int = 131_072) -> int:
        """The longest row that surely fits, in steps of 128 tokens above 128; 0 where none does.

        Args:
            gpu: as for `fits`.
            limit: no more than this is tried.
        """
        from .search import largest

        return largest(self, gpu, "sequence_length", limit)

    def at(self, *, batch_size: int | None = None, sequence_length: int | None = None) -> MemoryEstimate:
        """The same run with another batch or length.

        Raises:
            ForgeError: a number that no batch has.
        """
        from .estimate import estimate_described

        rows = self.batch_size if batch_size is None else batch_size
        length = self.sequence_length if sequence_length is None else sequence_length
        return estimate_described(self.described.at(rows, length))

    def calibration_callback(self) -> TrainerCallback:
        """A callback that compares this estimate with the measured peak after the second step of a run.

        It prints by how much the estimate was off, keeps that as `result`, and warns where it was more than the band.
        Of a run with a prefix cache the second step is one that fills it, and `first_epoch` is compared.
        """
        from .calibration import CalibrationCallback

        return CalibrationCallback(self.first_epoch or self)

    def print(self) -> None:
        """Print the parts as a table."""
        from .printed import table

        table(self).print()

    def __str__(self) -> str:
        from .printed import table

        return str(table(self))
