"""What a GPU really offers: the memory that CUDA reports, which is less than the number on the box.

A "24 GB" card offers a process between 22 and 23.7 GiB: error correction stores its bits in the same memory on some
cards, and the driver keeps a part of every card for itself. `torch.cuda.get_device_properties(0).total_memory` is
what is left, and every out-of-memory error of PyTorch prints it ("GPU 0 has a total capacity of 23.52 GiB"). The table
below is made of such errors and reports, of the lowest number found for each card under Linux: newer drivers keep
more, and Windows shows more than it can give.

Three rules stand in where no such report was found, and `Card.source` says which one spoke:

    nvidia-smi   its total less what CUDA keeps back from it on the cards where both are known: at most 512 MiB up to
                 24 GB (A10: 23028 MiB and 21.99 GiB), 881 MiB above (A100 80GB: 81920 MiB and 79.14 GiB)
    its kind     as the card most like it: of the GeForce cards of its size, the one that offers least
    its size     for "24GB", the least of all cards of that size; for a size that no card has, its GiB less the largest
                 share that any card keeps back (the T4: 9%), but no less than the next smaller card offers
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from ..errors import ForgeError, UnknownNameError

_MIB, _GIB = 2**20, 2**30


@dataclass(frozen=True)
class Card:
    """A GPU, as far as its memory goes.

    Args:
        name: what people call it.
        usable_bytes: what CUDA reports as its total memory. A process gets less: its CUDA context is in there, and what
            others hold.
        nominal_gb: the number on the box, None where bytes were given.
        profile: the name of its `forge.Hardware`, None where a size is offered by GPUs of several profiles.
        source: where the number comes from, and which rule applied.
    """

    name: str
    usable_bytes: int
    nominal_gb: float | None
    profile: str | None
    source: str


def find_card(name: str | int) -> Card:
    """The GPU called `name`, with the memory it really offers.

    >>> f'{find_card("RTX 4090").usable_bytes / 2**30:.2f} GiB'
    '23.52 GiB'
    >>> find_card("NVIDIA H100 80GB HBM3").profile
    'hopper'
    >>> find_card("24GB").source
    'the least of the 24 GB cards known (A10); PyTorch out-of-memory report, github.com/zai-org/CogVLM/issues/236'

    Args:
        name: a GPU ("4090", "A100-40GB", what `torch.cuda.get_device_name()` says), a size on the box ("24GB",
            "24 GiB", "24"), or a number of bytes, which is taken as it is.

    Raises:
        UnknownNameError: No GPU in the table has that name, or not with that size.
        ForgeError: It is neither a name nor a number of bytes that a GPU could have.
    """
    if isinstance(name, int) and not isinstance(name, bool):
        return _of_bytes(name)
    if not isinstance(name, str):
        raise ForgeError(f"{name!r} is no GPU: {_REMEDY}")
    model, gb = _parse(name)
    if cards := _BY_MODEL.get(_ALSO_CALLED.get(model, model)):
        return _chosen(name, cards, gb)
    if size := re.fullmatch(r"(\d{1,3}(?:\.\d+)?) ?(?:gi?b?)?", name.strip().lower()):
        return _of_size(float(size[1]))
    unknown = UnknownNameError.among("GPU", name, [card.name for cards in _BY_MODEL.values() for card in cards])
    raise UnknownNameError(f"{unknown} If it is none of these, {_REMEDY}")


_REMEDY = 'give the memory it has as text, "24GB", or in bytes: 24 * 2**30.'


def _of_bytes(number: int) -> Card:
    if number < _MIB:
        raise ForgeError(f"{number} bytes are no GPU's memory: {_REMEDY}")
    return Card(f"{number / _GIB:.2f} GiB", number, None, None, "bytes as given")


def _of_size(gb: float) -> Card:
    if gb <= 0:
        raise ForgeError(f"{gb:g} GB is no GPU's memory: {_REMEDY}")
    peers = [card for card in _CARDS if card.nominal_gb == gb]
    if peers:
        least = min(peers, key=lambda card: card.usable_bytes)
        profiles = {card.profile for card in peers}
        return Card(
            f"{gb:g} GB",
            least.usable_bytes,
            gb,
            least.profile if len(profiles) == 1 else None,
            f"the least of the {gb:g} GB cards known ({least.name}); {least.source}",
        )
    usable = int(gb * _GIB * (1 - _LARGEST_SHARE_KEPT))
    rule = f"{gb:g} GiB less {_LARGEST_SHARE_KEPT:.1%}, the largest share that a known card keeps back"
    smaller = [card for card in _CARDS if card.nominal_gb is not None and card.nominal_gb < gb]
    most = max(smaller, key=lambda card: card.usable_bytes, default=None)
    if most and most.usable_bytes > usable:
        usable, rule = most.usable_bytes, f"as the {most.name}, the next smaller one; {most.source}"
    return Card(f"{gb:g} GB", usable, gb, None, f"no known card has {gb:g} GB: {rule}")


def _chosen(name: str, cards: list[Card], gb: float | None) -> Card:
    if gb is None:
        if len(cards) == 1:
            return cards[0]
        others = " and ".join(f"{card.nominal_gb:g} GB" for card in cards[1:])
        return replace(cards[0], source=f"{name!r} taken as {cards[0].name} (there is {others} too); {cards[0].source}")
    for card in cards:
        if card.nominal_gb == gb:
            return card
    known = " or ".join(f"{card.nominal_gb:g} GB" for card in cards)
    raise UnknownNameError(
        f"Unknown GPU {name!r}. {cards[0].name.split(' (')[0]} is known with {known}; else {_REMEDY}"
    )


def _parse(name: str) -> tuple[str, float | None]:
    """The model without brand, memory and form factor, and the memory: ("a100", 40.0) for "NVIDIA A100-SXM4-40GB"."""
    text = re.sub(r"[\s_/-]+", " ", name.lower()).strip()
    text = re.sub(r"\brtx(?=[a-z]?\d)", "rtx ", text)
    text = re.sub(r"(\d)(ti)\b", r"\1 \2", text)
    text = re.sub(r"\b(\d+) (gi?b)\b", r"\1\2", text)
    text = text.replace("gh200 480gb", "gh200 96gb")  # 480 GB are the CPU's
    sizes = [float(size) for size in re.findall(r"\b(\d+)gi?b?\b", text)]
    text = re.sub(r"\b(\d+)gi?b?\b", "", text)
    words = [word for word in text.split() if word not in _NO_MODEL]
    return " ".join(words), sizes[0] if len(sizes) == 1 else None


_NO_MODEL = {"nvidia", "geforce", "tesla", "rtx", "pcie", "sxm", *(f"sxm{n}" for n in range(2, 7))}
_NO_MODEL |= {"hbm2", "hbm2e", "hbm3", "hbm3e"}
"""Words that do not tell models apart; the others must match in full: a laptop's or a sliced GPU is another one."""

_ALSO_CALLED = {
    "6000 ada generation": "6000 ada",
    "pro 6000 blackwell": "pro 6000",
    "pro 6000 blackwell server edition": "pro 6000",
    "pro 6000 blackwell workstation edition": "pro 6000",
    "pro 6000 blackwell max q workstation edition": "pro 6000",
    "h200 nvl": "h200",
}


def _reported(name: str, gb: int, profile: str, gib: float, thread: str) -> Card:
    return Card(name, int(gib * _GIB), gb, profile, f"PyTorch out-of-memory report, github.com/{thread}")


def _cuda_total(name: str, gb: int, profile: str, mib: float, thread: str) -> Card:
    return Card(name, int(mib * _MIB), gb, profile, f"CUDA's total memory as reported in github.com/{thread}")


def _from_smi(name: str, gb: int, profile: str, mib: int, thread: str) -> Card:
    kept = 512 if gb <= 24 else 881
    source = f"nvidia-smi's total of {mib} MiB (github.com/{thread}) less {kept} MiB, the most that CUDA keeps of it"
    return Card(name, (mib - kept) * _MIB, gb, profile, source)


def _like(card: Card, name: str, gb: int, why: str, profile: str | None = None) -> Card:
    source = f"no report found; as the {card.name}, {why}; {card.source}"
    return replace(card, name=name, nominal_gb=gb, profile=profile or card.profile, source=source)


def _as_its_kind(name: str, gb: int, profile: str) -> Card:
    least = min((card for card in _GEFORCE if card.nominal_gb == gb), key=lambda card: card.usable_bytes)
    return _like(least, name, gb, f"which offers least of the GeForce cards with {gb} GB", profile)


_GEFORCE = (
    _reported("RTX 2080 Ti", 11, "turing", 10.76, "ispc-lab/TMA/issues/5"),
    _reported("RTX 3060", 12, "ampere", 11.75, "smy20011/dreambooth-gui/issues/78"),
    _reported("RTX 3070", 8, "ampere", 7.76, "sshan-zhao/GASDA/issues/19"),
    _reported("RTX 3080 10GB", 10, "ampere", 9.78, "zai-org/CogVideo/issues/34"),
    _reported("RTX 3090", 24, "ampere", 23.59, "bytedance/X-Portrait/issues/7"),
    _reported("RTX 4060", 8, "ampere", 7.75, "ESRSchao/EdgeRegNet/issues/2"),
    _from_smi("RTX 4070", 12, "ampere", 12282, "meta-llama/llama/issues/466"),
    _reported("RTX 4070 Ti", 12, "ampere", 11.70, "Kwai-Kolors/Kolors/issues/11"),
    _cuda_total("RTX 4080", 16, "ampere", 16076, "ollama/ollama/issues/9245"),
    _reported("RTX 4090", 24, "ampere", 23.52, "pytorch/torchchat/issues/1341"),
    # Under Windows, where CUDA's total is nvidia-smi's: 17094475776 bytes.
    _from_smi("RTX 5070 Ti", 16, "hopper", 16302, "Comfy-Org/ComfyUI/issues/7126"),
    _reported("RTX 5090", 32, "hopper", 31.36, "TrajectoryCrafter/TrajectoryCrafter/issues/20"),
)

_A10 = _reported("A10", 24, "ampere", 21.99, "zai-org/CogVLM/issues/236")
_H100_NVL = _reported("H100 NVL", 94, "hopper", 93.00, "ali-vilab/VACE/issues/56")
_H200 = _from_smi("H200", 141, "hopper", 143771, "sgl-project/sglang/issues/3196")

# Of two sizes the first is the one that is meant when none is said.
_CARDS = (
    *_GEFORCE,
    _as_its_kind("RTX 3060 Ti", 8, "ampere"),
    _as_its_kind("RTX 3070 Ti", 8, "ampere"),
    _as_its_kind("RTX 3080 12GB", 12, "ampere"),
    _as_its_kind("RTX 3080 Ti", 12, "ampere"),
    _as_its_kind("RTX 3090 Ti", 24, "ampere"),
    _as_its_kind("RTX 4060 Ti 8GB", 8, "ampere"),
    _as_its_kind("RTX 4060 Ti 16GB", 16, "ampere"),
    _as_its_kind("RTX 4070 Super", 12, "ampere"),
    _as_its_kind("RTX 4070 Ti Super", 16, "ampere"),
    _as_its_kind("RTX 4080 Super", 16, "ampere"),
    _as_its_kind("RTX 5060", 8, "hopper"),
    _as_its_kind("RTX 5060 Ti 8GB", 8, "hopper"),
    _as_its_kind("RTX 5060 Ti 16GB", 16, "hopper"),
    _as_its_kind("RTX 5070", 12, "hopper"),
    _as_its_kind("RTX 5080", 16, "hopper"),
    _reported("T4", 16, "turing", 14.56, "Zheng-Chong/CatVTON/issues/133"),
    _reported("V100-16GB", 16, "turing", 15.78, "kchengiva/Shift-GCN/issues/34"),
    _reported("V100-32GB", 32, "turing", 31.74, "haotian-liu/LLaVA/issues/812"),
    _A10,
    _like(_A10, "A10G", 24, "with which it shares nvidia-smi's total of 23028 MiB"),
    _reported("A30", 24, "ampere", 23.53, "google/RB-Modulation/issues/5"),
    _cuda_total("A40", 48, "ampere", 44.35 * 1024, "ollama/ollama/issues/9858 (as 44.4 GiB)"),
    _reported("RTX A4000", 16, "ampere", 15.61, "DengKaiCQ/VGGT-Long/issues/6"),
    _reported("RTX A5000", 24, "ampere", 23.68, "zai-org/GLM-4/issues/730"),
    _reported("RTX A6000", 48, "ampere", 47.54, "google-research/semivl/issues/18"),
    _from_smi("L4", 24, "ampere", 23034, "modal-labs/modal-client/pull/2797"),
    _reported("L40", 48, "ampere", 44.40, "NVlabs/Eagle/issues/68"),
    _reported("L40S", 48, "ampere", 44.42, "stepfun-ai/Step-Video-T2V/issues/8"),
    _reported("RTX 6000 Ada", 48, "ampere", 44.43, "DINGYANB/MTVCrafter/issues/21 (error correction on)"),
    _cuda_total("RTX PRO 6000", 96, "hopper", 94.97 * 1024, "antirez/ds4/issues/431"),
    _reported("A100-40GB", 40, "ampere", 39.50, "TianheWu/CoSeR/issues/10"),
    _reported("A100-80GB", 80, "ampere", 79.14, "lianqi1008/Control-GIC/issues/6"),
    _reported(
        "H100", 80, "hopper", 79.11, "vllm-project/vllm/issues/27508 (the usual one; there is an H100 NVL with 94 GB)"
    ),
    _H100_NVL,
    _H200,
    _like(_H100_NVL, "GH200-96GB", 96, "the next smaller Hopper card"),
    _like(_H200, "GH200-144GB", 144, "the next smaller Hopper card"),
    _cuda_total("B200", 180, "hopper", 178.35 * 1024, "pytorch/ao/pull/4002"),
)

_BY_MODEL: dict[str, list[Card]] = {}
for _card in _CARDS:
    _BY_MODEL.setdefault(_parse(_card.name)[0], []).append(_card)

_LARGEST_SHARE_KEPT = max(1 - card.usable_bytes / (card.nominal_gb * _GIB) for card in _CARDS if card.nominal_gb)
