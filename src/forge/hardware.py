"""What a machine can do, as one value: the data types, attention and optimizer that a recipe may choose on it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from .errors import UnknownNameError, UnsupportedError

Device = Literal["cpu", "cuda"]


@dataclass(frozen=True)
class Hardware:
    """A hardware profile. Four of them cover what forge knows; `Hardware.detect()` says which one this machine is.

    Args:
        name: "cpu", "turing", "ampere" or "hopper".
        device: "cpu" or "cuda".
        compute_dtype: the dtype matrix products run in, by torch's name for it.
        tf32: whether fp32 matrix products may use TF32.
        attn_implementation: transformers' name of the attention kernel.
        min_capability: the lowest CUDA compute capability of the profile, None for the CPU.
        rule: why, in one sentence.
    """

    name: str
    device: Device
    compute_dtype: str
    tf32: bool
    attn_implementation: str
    min_capability: tuple[int, int] | None
    rule: str

    @classmethod
    def named(cls, name: str) -> Hardware:
        """The profile called `name`; it need not be in this machine.

        >>> Hardware.named("hopper").compute_dtype
        'bfloat16'

        Raises:
            UnknownNameError: There is no such profile.
        """
        try:
            return PROFILES[name]
        except (KeyError, TypeError):
            if profile := _CALLED.get(str(name).lower()):
                raise UnknownNameError(f'Unknown hardware {name!r}. Its profile is called "{profile}".') from None
            raise UnknownNameError.among("hardware", str(name), PROFILES) from None

    @classmethod
    def detect(cls) -> Hardware:
        """The profile of this machine: of its first CUDA device where there is one, else "cpu".

        Raises:
            UnsupportedError: There is a GPU whose abilities forge does not know.
        """
        import torch

        if not torch.cuda.is_available():
            return PROFILES["cpu"]
        if torch.version.hip:
            raise UnsupportedError(
                f"The GPU is an AMD one ({torch.cuda.get_device_name(0)}); forge's profiles were made for CUDA devices "
                'and never run on it. Name the nearest yourself: hardware="ampere" (bf16, sdpa), or hardware="cpu".'
            )
        capability = torch.cuda.get_device_capability(0)
        for name in ("hopper", "ampere", "turing"):
            profile = PROFILES[name]
            if profile.min_capability and capability >= profile.min_capability:
                return profile
        raise UnsupportedError(
            f"{torch.cuda.get_device_name(0)} has compute capability {capability[0]}.{capability[1]}; fast 16-bit "
            'arithmetic starts at 7.0. Use hardware="cpu", or name the nearest yourself: hardware="turing".'
        )

    def missing_here(self) -> str | None:
        """Why transformers would refuse this profile's arguments on this machine; None when it would not.

        >>> Hardware.named("cpu").missing_here() is None
        True
        """
        if self.device == "cpu":
            return None
        import torch

        if not torch.cuda.is_available():
            return f"the preset is for {self.name}, and this machine has no CUDA device"
        capability = torch.cuda.get_device_capability(0)
        if self.min_capability and capability < self.min_capability:
            return (
                f"the preset is for {self.name} (compute capability {'.'.join(map(str, self.min_capability))} or "
                f"higher), and this GPU has {'.'.join(map(str, capability))}"
            )
        return None


PROFILES: dict[str, Hardware] = {
    profile.name: profile
    for profile in (
        Hardware(
            name="cpu",
            device="cpu",
            compute_dtype="float32",
            tf32=False,
            attn_implementation="sdpa",
            min_capability=None,
            rule="few CPUs multiply bf16 natively, the others emulate it: fp32 is exact and the faster of the two",
        ),
        Hardware(
            name="turing",
            device="cuda",
            compute_dtype="float16",
            tf32=False,
            attn_implementation="sdpa",
            min_capability=(7, 0),
            rule="Volta and Turing have fp16 tensor cores but only emulate bf16, and have no TF32",
        ),
        Hardware(
            name="ampere",
            device="cuda",
            compute_dtype="bfloat16",
            tf32=True,
            attn_implementation="sdpa",
            min_capability=(8, 0),
            rule="Ampere and Ada have bf16 tensor cores (fp32's range: no loss scaling) and TF32",
        ),
        Hardware(
            name="hopper",
            device="cuda",
            compute_dtype="bfloat16",
            tf32=True,
            attn_implementation="sdpa",
            min_capability=(9, 0),
            rule="Hopper and Blackwell have bf16 tensor cores (fp32's range: no loss scaling) and TF32",
        ),
    )
}

_CALLED = {
    **dict.fromkeys(("v100", "t4", "volta", "rtx 2080 ti"), "turing"),
    **dict.fromkeys(("a100", "a10", "a40", "l4", "l40", "l40s", "ada", "rtx 3090", "rtx 4090"), "ampere"),
    **dict.fromkeys(("h100", "h200", "gh200", "b100", "b200", "blackwell", "rtx 5090"), "hopper"),
}
"""What people call their GPUs, and the profile that covers them."""


def peak_flops(device_name: str) -> float | None:
    """The most 16-bit FLOP/s that the data sheet of a GPU promises, the denominator of MFU; None where forge is unsure.

    For dense matrices (data sheets like to print twice that, "with sparsity"), in bf16 or, before Ampere, fp16, summed
    in fp32 as training does: on GeForce cards half the rate of sums in fp16, which their data sheets lead with.

    >>> peak_flops("NVIDIA H100 80GB HBM3") / 1e12
    989.4
    >>> peak_flops("NVIDIA A100-SXM4-40GB MIG 1g.5gb") is None  # a slice of one
    True

    Args:
        device_name: what `torch.cuda.get_device_name()` says.
    """
    name = re.sub(r"^(NVIDIA )?(GeForce |Tesla )?", "", device_name.strip())
    return next((tflops * 1e12 for names, tflops in _PEAK_TFLOPS.items() if re.fullmatch(names, name)), None)


# Whole names: an A10 is not an A100, an L40S no L4, a laptop's or a sliced GPU another one, and those that clouds and
# supercomputers have had made for them (A100-SXM-64GB) are not in the data sheets.
_PEAK_TFLOPS = {
    r"B200": 2250.0,  # HGX B200: 36 PFLOP/s for eight with sparsity
    r"H100 80GB HBM3|H200|GH200 \d+GB?( HBM3e)?": 989.4,  # the SXM module's; Hopper whitepaper, table 2
    r"H100 NVL|H200 NVL": 835.5,
    r"H100 PCIe": 756.0,
    r"(A100-SXM4|A100-PCIE|A800-SXM4)-[48]0GB|A100 80GB PCIe": 312.0,
    r"A40": 149.7,  # from here on GA102 and AD102 whitepapers and product pages
    r"A10": 125.0,
    r"RTX A6000": 154.8,
    r"RTX A5000": 111.1,
    r"RTX 3090": 71.0,
    r"RTX 3090 Ti": 80.0,
    r"L40S": 362.05,
    r"L40": 181.05,
    r"L4": 121.0,
    r"RTX 6000 Ada Generation": 364.2,
    r"RTX 4090": 165.2,
    r"RTX 5090": 209.5,
    r"T4": 65.0,
    r"V100-SXM[23]-(16|32)GB": 125.0,
    r"V100-PCIE-(16|32)GB": 112.0,
    r"V100S-PCIE-32GB": 130.0,
}
"""TFLOP/s by the name of the GPU, a regular expression, without its brand."""
