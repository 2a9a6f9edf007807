import pytest
import torch

from forge.errors import UnsupportedError
from forge.freezing.cache.samples import find_samples

IDS = torch.tensor([[5, 6, 7, 8], [5, 6, 7, 8]])


def spans(samples):
    return [(sample.row, sample.start, sample.stop) for sample in samples]


def keys(*args, **kwargs):
    return [sample.key for sample in find_samples(*args, **kwargs)]


def test_a_row_is_a_sample():
    samples = find_samples(IDS)
    assert spans(samples) == [(0, 0, 4), (1, 0, 4)]
    assert samples[0].key == samples[1].key
    assert len(samples[0].key) == 16


def test_padding_on_the_right_is_no_part_of_it():
    padded = torch.tensor([[5, 6, 7, 8, 0, 0], [5, 6, 7, 0, 0, 0]])
    mask = torch.tensor([[1, 1, 1, 1, 0, 0], [1, 1, 1, 0, 0, 0]])
    assert spans(find_samples(padded, mask)) == [(0, 0, 4), (1, 0, 3)]
    assert keys(padded, mask)[0] == keys(IDS)[0]
    other = torch.tensor([[5, 6, 7, 8, 9], [5, 6, 7, 9, 9]])
    assert keys(other, mask[:, :5]) == keys(padded, mask)


def test_padding_on_the_left_moves_the_positions():
    left, mask = torch.tensor([[0, 5, 6, 7, 8]]), torch.tensor([[0, 1, 1, 1, 1]])
    assert spans(find_samples(left, mask)) == [(0, 1, 5)]
    assert keys(left, mask)[0] != keys(IDS)[0]
    counted = torch.tensor([[1, 0, 1, 2, 3]])  # as generation counts them: the same positions as without padding
    assert keys(left, mask, counted)[0] == keys(IDS)[0]


@pytest.mark.parametrize(
    "changed",
    [
        {"input_ids": torch.tensor([[5, 6, 7, 9]])},
        {"input_ids": torch.tensor([[5, 6, 7]])},
        {"attention_mask": torch.tensor([[1, 0, 1, 1]])},
        {"position_ids": torch.tensor([[1, 2, 3, 4]])},
        {"position_ids": torch.tensor([[0, 2, 3, 4]])},
        {"token_type_ids": torch.tensor([[0, 1, 0, 0]])},
    ],
)
def test_whatever_the_states_depend_on_changes_the_key(changed):
    assert keys(**{"input_ids": IDS[:1], **changed}) != keys(IDS[:1])


@pytest.mark.parametrize(
    "same",
    [
        {"attention_mask": torch.ones(1, 4, dtype=torch.bool)},
        {"position_ids": torch.arange(4)[None]},
        {"token_type_ids": torch.zeros(1, 4, dtype=torch.long)},
        {"input_ids": IDS[:1].int()},
    ],
)
def test_what_says_the_same_has_the_same_key(same):
    assert keys(**{"input_ids": IDS[:1], **same}) == keys(IDS[:1])


def test_packed_documents_are_samples():
    ids = torch.tensor([[5, 6, 7, 8, 5, 6, 9]])
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 0]])
    samples = find_samples(ids, position_ids=positions)
    assert spans(samples) == [(0, 0, 4), (0, 4, 6), (0, 6, 7)]
    assert samples[0].key == keys(IDS)[0]


def test_positions_for_all_rows():
    assert keys(IDS, position_ids=torch.arange(4)[None]) == keys(IDS)


def test_a_row_of_padding_has_no_sample():
    assert find_samples(IDS[:1], torch.zeros(1, 4, dtype=torch.long)) == []


@pytest.mark.parametrize("name", ["attention_mask", "position_ids", "token_type_ids"])
@pytest.mark.parametrize("shape", [(2, 1, 4, 4), (3, 2, 4), (2, 5), (4,)])
def test_other_shapes_are_refused(name, shape):
    with pytest.raises(UnsupportedError, match=rf"{name} has the shape \({shape[0]},.*reads \(2, 4\)"):
        find_samples(IDS, **{name: torch.ones(shape, dtype=torch.long)})
