import re

import pytest

from forge.errors import ForgeError, UnknownNameError
from forge.hardware import _CALLED, PROFILES
from forge.memory.cards import _BY_MODEL, _CARDS, Card, find_card

GIB = 2**30


@pytest.mark.parametrize(
    ("name", "card", "gib"),
    [
        ("RTX 4090", "RTX 4090", 23.52),
        ("rtx4090", "RTX 4090", 23.52),
        ("RTX-4090", "RTX 4090", 23.52),
        (" 4090 ", "RTX 4090", 23.52),
        ("RTX 4090 24GB", "RTX 4090", 23.52),
        ("NVIDIA GeForce RTX 4090", "RTX 4090", 23.52),
        ("GeForce RTX 3090", "RTX 3090", 23.59),
        ("NVIDIA GeForce RTX 3090 Ti", "RTX 3090 Ti", 23.52),
        ("3060", "RTX 3060", 11.75),
        ("RTX 3060 12 GB", "RTX 3060", 11.75),
        ("3080 12GB", "RTX 3080 12GB", 11.494),
        ("4070ti super", "RTX 4070 Ti Super", 15.42),
        ("RTX 4060 Ti 16GB", "RTX 4060 Ti 16GB", 15.42),
        ("RTX 5090", "RTX 5090", 31.36),
        ("Tesla T4", "T4", 14.56),
        ("Tesla V100-SXM2-16GB", "V100-16GB", 15.78),
        ("Tesla V100-PCIE-32GB", "V100-32GB", 31.74),
        ("NVIDIA A10", "A10", 21.99),
        ("NVIDIA A10G", "A10G", 21.99),
        ("NVIDIA RTX A6000", "RTX A6000", 47.54),
        ("A6000", "RTX A6000", 47.54),
        ("NVIDIA RTX 6000 Ada Generation", "RTX 6000 Ada", 44.43),
        ("RTX 6000 Ada", "RTX 6000 Ada", 44.43),
        ("NVIDIA RTX PRO 6000 Blackwell Server Edition", "RTX PRO 6000", 94.97),
        ("NVIDIA RTX PRO 6000 Blackwell Max-Q Workstation Edition", "RTX PRO 6000", 94.97),
        ("NVIDIA L4", "L4", 21.99),
        ("NVIDIA L40S", "L40S", 44.42),
        ("A100-40GB", "A100-40GB", 39.50),
        ("NVIDIA A100-SXM4-40GB", "A100-40GB", 39.50),
        ("NVIDIA A100 80GB PCIe", "A100-80GB", 79.14),
        ("a100_80g", "A100-80GB", 79.14),
        ("A100 80 GiB", "A100-80GB", 79.14),
        ("NVIDIA H100 80GB HBM3", "H100", 79.11),
        ("NVIDIA H100 PCIe", "H100", 79.11),
        ("H100 SXM5", "H100", 79.11),
        ("NVIDIA H100 NVL", "H100 NVL", 93.00),
        ("NVIDIA H200", "H200", 139.54),
        ("NVIDIA H200 NVL", "H200", 139.54),
        ("NVIDIA GH200 480GB", "GH200-96GB", 93.00),
        ("NVIDIA GH200 144G HBM3e", "GH200-144GB", 139.54),
        ("B200", "B200", 178.35),
    ],
)
def test_what_people_and_drivers_call_a_card(name, card, gib):
    found = find_card(name)
    assert found.name == card
    assert found.usable_bytes == pytest.approx(gib * GIB, abs=0.006 * GIB)


@pytest.mark.parametrize("card", _CARDS, ids=lambda card: card.name)
def test_the_table(card):
    assert find_card(card.name) == card
    assert card.profile in PROFILES
    assert 0.9 * card.nominal_gb * GIB < card.usable_bytes <= card.nominal_gb * GIB
    assert re.search(r"github\.com/[\w.-]+/[\w.-]+/(issues|pull)/\d+", card.source)


def test_each_name_and_size_is_in_the_table_once():
    assert len({card.name for card in _CARDS}) == len(_CARDS)
    for cards in _BY_MODEL.values():
        assert len({card.nominal_gb for card in cards}) == len(cards)


def test_the_profiles_agree_with_hardware():
    named = {name: profile for name, profile in _CALLED.items() if any(letter.isdigit() for letter in name)}
    found = {name: find_card(name).profile for name in named if name != "b100"}  # never sold
    assert found == {name: profile for name, profile in named.items() if name in found}


@pytest.mark.parametrize(
    ("name", "card", "other"),
    [
        ("A100", "A100-40GB", "80 GB"),
        ("V100", "V100-16GB", "32 GB"),
        ("NVIDIA GeForce RTX 3080", "RTX 3080 10GB", "12 GB"),
        ("4060 Ti", "RTX 4060 Ti 8GB", "16 GB"),
        ("H100", "H100", "94 GB"),
    ],
)
def test_a_name_for_several_sizes_says_which_was_taken(name, card, other):
    found = find_card(name)
    assert found.name == card
    assert other in found.source


@pytest.mark.parametrize("spelling", ["24GB", "24 GB", "24gb", "24 GiB", "24GiB", "24G", "24", " 24 ", "24.0 GB"])
def test_a_size_is_the_least_of_its_cards(spelling):
    found = find_card(spelling)
    peers = [card for card in _CARDS if card.nominal_gb == 24]
    assert len(peers) > 4
    assert found.usable_bytes == min(card.usable_bytes for card in peers)
    assert (found.name, found.nominal_gb, found.profile) == ("24 GB", 24, "ampere")
    assert "least of the 24 GB cards known (A10)" in found.source


def test_a_size_of_several_generations_names_no_profile():
    assert find_card("16GB").profile is None
    assert find_card("80GB").profile is None
    assert find_card("48GB").profile == "ampere"


def test_a_size_that_no_card_has():
    """A ninth less a hundredth is what the T4 keeps back of its 16 GB."""
    found = find_card("20GB")
    assert found.usable_bytes == pytest.approx(20 * GIB * 14.56 / 16)
    assert "no known card has 20 GB: 20 GiB less 9.0%" in found.source
    assert find_card("6 GB").usable_bytes == pytest.approx(6 * GIB * 14.56 / 16)
    assert "as the RTX PRO 6000, the next smaller one" in find_card("100GB").source


def test_more_on_the_box_is_never_less_inside():
    sizes = [quarter / 4 for quarter in range(2, 4 * 200)]
    usable = [find_card(f"{size}GB").usable_bytes for size in sizes]
    assert usable == sorted(usable)
    assert all(0.9 * size * GIB < inside or size > 80 for size, inside in zip(sizes, usable, strict=True))
    assert all(inside <= size * GIB for size, inside in zip(sizes, usable, strict=True))


def test_bytes_are_taken_as_they_are():
    number = 23 * GIB + 1
    assert find_card(number) == Card("23.00 GiB", number, None, None, "bytes as given")


@pytest.mark.parametrize("name", [True, False, 0, -1, -24 * GIB, 24, 24.0, 2.5e10, None, ["4090"], b"4090", "0GB", "0"])
def test_what_is_no_gpu(name):
    with pytest.raises(ForgeError, match=r'"24GB", or in bytes'):
        find_card(name)


@pytest.mark.parametrize(
    "name",
    [
        "",
        "GPU",
        "NVIDIA",
        "RTX 4090 Laptop GPU",  # 16 GB
        "NVIDIA GeForce RTX 4090 D",
        "RTX 4090 48GB",
        "A100-SXM-64GB",
        "NVIDIA A100-SXM4-40GB MIG 1g.5gb",
        "NVIDIA H100 80GB HBM3 MIG 3g.40gb",
        "NVIDIA A10-24Q",
        "GRID A100-40C",
        "Quadro RTX 6000",
        "RTX 6000",
        "MI300X",
        "-24GB",
        "24MB",
        "1e3GB",
        "5000",
        "inf",
    ],
)
def test_names_of_nothing_in_the_table(name):
    with pytest.raises(UnknownNameError, match=r'Unknown GPU.*"24GB", or in bytes'):
        find_card(name)


def test_an_unknown_name_names_its_neighbours():
    with pytest.raises(UnknownNameError, match="Did you mean 'RTX 4080 Super'"):
        find_card("RTX 4090 Super")
    with pytest.raises(UnknownNameError, match="A100-40GB is known with 40 GB or 80 GB"):
        find_card("A100-64GB")
