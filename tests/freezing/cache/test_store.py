import errno
import os
import re
import shutil
import signal
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from forge.errors import ForgeError
from forge.freezing.cache import room, segment
from forge.freezing.cache.segment import ALIGNMENT, HEADER_BYTES, RECORD_BYTES
from forge.freezing.cache.store import StateStore
from support.resume import Condition, run_until

WIDTH = 8
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def no_reserve(monkeypatch):
    """A full disk is the subject of some tests, and must not fail the others."""
    monkeypatch.setattr(room, "RESERVE_BYTES", 0)
    monkeypatch.setattr(room, "RESERVE_SHARE", 0)


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "states"


def open_store(folder, width=WIDTH, dtype=torch.float32, max_bytes=2**40):
    return StateStore(folder, width=width, dtype=dtype, max_bytes=max_bytes)


def key(number):
    return number.to_bytes(16, "big")


def sample(number, width=WIDTH, dtype=torch.float32):
    """What every process takes for the states of this number: of 1 to 50 tokens."""
    generator = torch.Generator().manual_seed(number)
    return torch.randn(1 + number * 7 % 50, width, generator=generator).to(dtype)


def fill(store, *numbers):
    for number in numbers:
        assert store.add(key(number), sample(number))


def assert_holds(store, *numbers):
    """These samples and no others, each as it was written."""
    assert store.num_samples == len(numbers)
    assert store.num_tokens == sum(len(sample(number)) for number in numbers)
    for number in numbers:
        assert key(number) in store
        torch.testing.assert_close(store.get(key(number)), sample(number), rtol=0, atol=0)


def only(folder, suffix):
    (path,) = folder.glob(f"*{suffix}")
    return path


def flip(path, position):
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bit_for_bit_in_this_process_and_the_next(folder, dtype):
    numbers = range(1, 12)
    samples = {number: sample(number, dtype=dtype) for number in numbers}
    samples[1][0, :3] = torch.tensor([float("nan"), float("-inf"), -0.0])
    with open_store(folder, dtype=dtype) as store:
        for number, states in samples.items():
            assert store.add(key(number), states)
        opened = open_store(folder, dtype=dtype)
        for reader in (store, opened):
            for number, states in samples.items():
                read = reader.get(key(number))
                assert read.dtype == reader.dtype == dtype
                assert torch.equal(read.view(torch.uint8), states.view(torch.uint8))
                assert reader.tokens(key(number)) == len(states)
        opened.close()


@pytest.mark.parametrize(
    "states",
    [
        torch.randn(WIDTH, 5).T,
        torch.randn(5, 2 * WIDTH)[:, ::2],
        torch.randn(9, WIDTH)[2:7],
        torch.randn(1, WIDTH).expand(5, WIDTH),
        torch.randn(5, WIDTH, requires_grad=True),
    ],
    ids=["transposed", "every other column", "rows", "expanded", "with gradient"],
)
def test_any_strides(folder, states):
    with open_store(folder) as store:
        assert store.add(key(1), states)
        assert torch.equal(store.get(key(1)), states)


def test_reading_between_writes_while_the_file_grows(folder):
    with open_store(folder) as store:
        read = {}
        for number in range(1, 20):
            fill(store, number)
            read[number] = store.get(key(number))
        assert_holds(store, *range(1, 20))
        assert all(torch.equal(states, sample(number)) for number, states in read.items())


def test_states_begin_at_whole_cache_lines(folder):
    with open_store(folder, width=3) as store:
        for number in range(1, 9):
            store.add(key(number), sample(number, width=3))
            assert store.get(key(number)).data_ptr() % ALIGNMENT == 0


def test_a_key_is_stored_once(folder):
    with open_store(folder) as store:
        fill(store, 1)
        before = store.nbytes
        assert store.add(key(1), sample(2))
        assert store.nbytes == before
        assert_holds(store, 1)


def test_a_key_that_is_absent(folder):
    with open_store(folder) as store:
        assert key(1) not in store
        assert store.get(key(1)) is None
        with pytest.raises(KeyError):
            store.tokens(key(1))


def test_nbytes_is_what_the_files_take(folder):
    def taken():
        return sum(path.stat().st_size for path in folder.iterdir())

    with open_store(folder) as store:
        assert store.nbytes == taken() == 0
        for number in range(1, 6):
            fill(store, number)
            assert store.nbytes == taken()
        assert store.refresh() == 0
        assert store.nbytes == taken()


def test_repr(folder):
    with open_store(folder) as store:
        store.add(key(1), torch.zeros(3, WIDTH))
        assert repr(store) == f"StateStore(1 samples, 3 tokens, 272 bytes, {folder})"


def test_a_file_far_larger_than_memory_is_mapped_and_not_read(folder):
    with open_store(folder) as store:
        fill(store, 1)
    os.truncate(only(folder, ".states"), 2**40)  # sparse
    with open_store(folder) as store:
        assert_holds(store, 1)
        (files,) = store._segments.values()
        assert len(files._mapping) == 2**40


def test_what_is_written_into_a_tensor_does_not_reach_the_file(folder):
    with open_store(folder) as store:
        fill(store, 1, 2)
        store.get(key(1)).zero_()
        with open_store(folder) as other:
            assert_holds(other, 1, 2)


def test_a_tensor_outlives_the_growth_the_store_and_the_files(folder):
    with open_store(folder) as store:
        fill(store, 1)
        states = store.get(key(1))
        fill(store, 2)
        store.get(key(2))
    shutil.rmtree(folder)
    assert torch.equal(states, sample(1))


def test_where_nothing_can_be_mapped_states_are_copied(folder, monkeypatch):
    def no_memory(*_, **__):
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    with open_store(folder) as store:
        fill(store, 1, 2)
        monkeypatch.setattr(segment.mmap, "mmap", no_memory)
        assert_holds(store, 1, 2)


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="counts in /proc")
def test_closing_leaves_no_file_open(folder):
    def opened():
        return len(list(Path("/proc/self/fd").iterdir()))

    before = opened()
    with open_store(folder) as store, open_store(folder) as other:
        fill(store, 1)
        fill(other, 2)
        store.refresh()
        assert_holds(store, 1, 2)
        assert opened() > before
    assert opened() == before


def test_a_closed_store_says_so(folder):
    store = open_store(folder)
    store.close()
    store.close()
    for use in (store.refresh, store.clear, lambda: store.get(key(1)), lambda: store.add(key(1), sample(1))):
        with pytest.raises(ForgeError, match="was closed"):
            use()


@pytest.mark.parametrize(
    ("states", "message"),
    [
        (torch.zeros(0, WIDTH), r"shape \(0, 8\).*takes \(tokens, 8\) with one token or more"),
        (torch.zeros(5, WIDTH + 1), r"shape \(5, 9\)"),
        (torch.zeros(WIDTH), r"shape \(8,\)"),
        (torch.zeros(2, 5, WIDTH), "without batch"),
        (torch.zeros(5, WIDTH, dtype=torch.float16), r"torch\.float16 on cpu.*takes torch\.float32 on the CPU"),
        (torch.zeros(5, WIDTH, device="meta"), r"on meta.*give states\.to"),
        ([[0.0] * WIDTH], "a list: give a tensor"),
    ],
    ids=["no tokens", "width", "one dimension", "batch", "dtype", "device", "no tensor"],
)
def test_states_of_another_kind(folder, states, message):
    with open_store(folder) as store:
        with pytest.raises(ForgeError, match=message):
            store.add(key(1), states)
        assert not list(folder.iterdir())


@pytest.mark.parametrize("wrong", [b"", b"x" * 15, b"x" * 17, "x" * 16, 1], ids=repr)
def test_keys_of_another_kind(folder, wrong):
    with open_store(folder) as store:
        uses = (store.get, store.tokens, store.__contains__, lambda wrong: store.add(wrong, sample(1)))
        for use in uses:
            with pytest.raises(ForgeError, match="give 16 bytes"):
                use(wrong)


@pytest.mark.parametrize("options", [{"width": 0}, {"width": 8.0}, {"max_bytes": 0}, {"max_bytes": True}], ids=str)
def test_numbers(folder, options):
    with pytest.raises(ForgeError, match=f"{next(iter(options))}=.*whole number above 0"):
        open_store(folder, **options)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"width": 16}, "holds states of width 8 in float32, but width 16 in float32 is asked for"),
        ({"dtype": torch.bfloat16}, "holds states of width 8 in float32, but width 8 in bfloat16 is asked for"),
    ],
    ids=["width", "dtype"],
)
def test_a_folder_with_states_of_another_layout(folder, asked, message):
    with open_store(folder) as store:
        fill(store, 1)
    with pytest.raises(ForgeError, match=f"{only(folder, '.index')} {message}. Delete the folder {folder}, or give"):
        open_store(folder, **asked)


@pytest.mark.parametrize("suffix", [".index", ".states"])
@pytest.mark.parametrize(
    ("position", "message"),
    [
        (0, r"begins with b'.*', not b'forge"),
        (8, f"has format {segment.FORMAT ^ 1}; this version of forge reads format {segment.FORMAT}"),
        (12, "damaged header"),
        (HEADER_BYTES - 1, "damaged header"),
    ],
)
def test_another_header(folder, suffix, position, message):
    with open_store(folder) as store:
        fill(store, 1)
    flip(only(folder, suffix), position)
    with pytest.raises(ForgeError, match=f"{only(folder, suffix)} .*{message}.*Delete the folder"):
        open_store(folder)


def test_foreign_files(folder):
    folder.mkdir()
    (folder / "README.md").write_text("not ours, and not in the way")
    open_store(folder).close()
    (folder / "postgres.index").write_text("mine")
    with pytest.raises(ForgeError, match=r"postgres\.index is no file of cached states: it begins with b'mine'"):
        open_store(folder)


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ForgeError, match=r"cannot be written to \(Not a directory\)\. Give the cache a folder"):
        open_store(tmp_path / "file" / "states")


def test_a_folder_that_cannot_be_written_to_is_found_out_at_once(folder, monkeypatch):
    def read_only(**_):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr("tempfile.TemporaryFile", read_only)
    with pytest.raises(ForgeError, match=r"states cannot be written to \(Read-only file system\)"):
        open_store(folder)


def test_each_writes_its_own_segment_and_reads_all(folder):
    with open_store(folder) as one, open_store(folder) as two, open_store(folder):
        assert not list(folder.iterdir())
        fill(one, 1, 2)
        fill(two, 3)
        assert len(list(folder.glob("*.index"))) == len(list(folder.glob("*.states"))) == 2
        assert key(3) not in one
        assert (one.refresh(), two.refresh()) == (1, 2)
        assert (one.refresh(), two.refresh()) == (0, 0)
        fill(one, 4)
        assert two.refresh() == 1
        assert_holds(one, 1, 2, 3, 4)
        assert_holds(two, 1, 2, 3, 4)
        assert one.nbytes == two.nbytes


def test_refresh_reads_nothing_where_nothing_changed(folder, monkeypatch):
    with open_store(folder) as one, open_store(folder) as two:
        fill(one, 1)
        two.refresh()
        monkeypatch.setattr(Path, "open", None)
        assert (one.refresh(), two.refresh()) == (0, 0)


def test_the_same_key_twice_counts_once_and_the_sound_one_is_read(folder):
    with open_store(folder) as one, open_store(folder) as two:
        fill(one, 1, 2)
        fill(two, 1)
        assert one.refresh() == 0
        assert one.num_samples == 2
    for path in folder.glob("*.states"):
        flip(path, HEADER_BYTES)
        with open_store(folder) as store:
            assert torch.equal(store.get(key(1)), sample(1))
        flip(path, HEADER_BYTES)


def test_max_bytes_smaller_than_a_sample(folder):
    with open_store(folder, max_bytes=100) as store:
        assert store.full is None
        assert not store.add(key(1), sample(1))
        assert re.search(
            r"takes 0 bytes of the 100 bytes that it may, and the next sample .* more\. Raise the limit", store.full
        )
        assert store.num_samples == 0


def test_max_bytes_are_never_passed_and_what_is_stored_stays(folder):
    states = torch.zeros(10, WIDTH)
    with open_store(folder, max_bytes=20_000) as store:
        count = 0
        while store.add(key(count), states):
            count += 1
        size = store.nbytes
        assert 20_000 - states.nbytes - ALIGNMENT - RECORD_BYTES <= size <= 20_000
        assert "of the 19.5 KiB that it may" in store.full
        assert not store.add(key(count), states[:1])
        assert store.add(key(0), states)
        assert store.num_samples == count
        assert torch.equal(store.get(key(count - 1)), states)
    with open_store(folder, max_bytes=20_000) as store:
        assert not store.add(key(count), states)
        assert store.nbytes == size


def test_the_limit_is_for_all_segments_together(folder):
    states = torch.zeros(10, WIDTH)
    with open_store(folder, max_bytes=20_000) as one, open_store(folder, max_bytes=20_000) as two:
        numbers = iter(range(1000))
        while one.add(key(next(numbers)), states) & two.add(key(next(numbers)), states):
            pass
        one.refresh()
        assert one.nbytes <= 20_000 + states.nbytes


def test_a_reserve_is_left_on_the_disk(folder, monkeypatch):
    with open_store(folder) as store:
        monkeypatch.setattr(room, "RESERVE_BYTES", 2**60)
        assert not store.add(key(1), sample(1))
        assert "of which 1048576.0 TiB are kept for checkpoints" in store.full
        assert not list(folder.iterdir())


class FaultyDisk:
    """`os.pwrite` that writes so many bytes, a few at a time, and then fails."""

    def __init__(self, monkeypatch, room, error, most=1000):
        self.pwrite, self.room, self.error, self.most = os.pwrite, room, error, most
        monkeypatch.setattr(os, "pwrite", self)

    def __call__(self, descriptor, data, offset):
        if not self.room:
            raise self.error
        part = data[: min(self.room, self.most)]
        self.room -= len(part)
        return self.pwrite(descriptor, part, offset)


class Killed(BaseException):
    """What stops a process between two instructions."""


PAYLOAD = sample(2).nbytes
INSTANTS = [0, 1, PAYLOAD // 2, PAYLOAD - 1, PAYLOAD, PAYLOAD + 1, PAYLOAD + RECORD_BYTES - 1]


def test_writes_that_take_only_a_part(folder, monkeypatch):
    FaultyDisk(monkeypatch, 2**30, Killed(), most=7)
    with open_store(folder) as store:
        fill(store, 1, 2)
        assert_holds(store, 1, 2)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize("written", INSTANTS)
def test_a_full_disk_cuts_back_and_stops_storing(folder, monkeypatch, code, written):
    with open_store(folder) as store:
        fill(store, 1)
        before = {path: path.read_bytes() for path in folder.iterdir()}
        disk = FaultyDisk(monkeypatch, written, OSError(code, os.strerror(code)))
        assert not store.add(key(2), sample(2))
        assert {path: path.read_bytes() for path in folder.iterdir()} == before
        assert re.search(rf"failed \({os.strerror(code)}\) with .* in it\. Free space", store.full)
        disk.room = 2**30
        assert not store.add(key(3), sample(3))
        assert_holds(store, 1)
    with open_store(folder) as store:
        assert store.full is None
        fill(store, 2)
        assert_holds(store, 1, 2)


def test_a_disk_that_is_full_from_the_beginning(folder, monkeypatch):
    with open_store(folder) as store:
        FaultyDisk(monkeypatch, 10, OSError(errno.ENOSPC, "No space left on device"))
        assert not store.add(key(1), sample(1))
        assert "No space left on device" in store.full
        assert not list(folder.iterdir())


def test_a_disk_too_full_for_the_probe_can_still_be_read(folder, monkeypatch):
    with open_store(folder) as store:
        fill(store, 1)

    def no_space(**_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("tempfile.TemporaryFile", no_space)
    with open_store(folder) as store:
        assert "No space left on device" in store.full
        assert_holds(store, 1)


@pytest.mark.parametrize("written", INSTANTS)
def test_another_error_is_raised_and_the_store_goes_on(folder, monkeypatch, written):
    with open_store(folder) as store:
        fill(store, 1)
        disk = FaultyDisk(monkeypatch, written, OSError(errno.EIO, "Input/output error"))
        with pytest.raises(ForgeError, match=r"cannot be written to \(Input/output error\)"):
            store.add(key(2), sample(2))
        assert store.full is None
        disk.room = 2**30
        fill(store, 3)
        assert_holds(store, 1, 3)


@pytest.mark.parametrize("written", INSTANTS)
def test_stopped_at_any_instant_of_a_write(folder, monkeypatch, written):
    with open_store(folder) as store:
        fill(store, 1)
        disk = FaultyDisk(monkeypatch, written, Killed())
        with pytest.raises(Killed):
            store.add(key(2), sample(2))
        with open_store(folder) as survivor:
            assert_holds(survivor, 1)
        # Ctrl-C in a notebook stops a cell and not the process.
        disk.room = 2**30
        fill(store, 3)
        assert_holds(store, 1, 3)
    with open_store(folder) as store:
        fill(store, 2)
        assert_holds(store, 1, 2, 3)


def test_interrupted_when_others_can_see_the_sample_but_the_writer_does_not_know(folder, monkeypatch):
    pwrite = os.pwrite

    def interrupted(descriptor, data, offset):
        written = pwrite(descriptor, data, offset)
        if len(data) == RECORD_BYTES:
            raise Killed
        return written

    with open_store(folder) as store, open_store(folder) as reader:
        fill(store, 1)
        with monkeypatch.context() as patch:
            patch.setattr(os, "pwrite", interrupted)
            with pytest.raises(Killed):
                store.add(key(2), sample(2))
        reader.refresh()
        assert_holds(reader, 1, 2)
        fill(store, 3)  # over nothing that somebody reads
        reader.refresh()
        assert_holds(reader, 1, 2, 3)
        assert store.refresh() == 1
        assert_holds(store, 1, 2, 3)


def test_stopped_before_the_first_header_is_written(folder, monkeypatch):
    with open_store(folder) as store:
        FaultyDisk(monkeypatch, HEADER_BYTES + 10, Killed())
        with pytest.raises(Killed):
            store.add(key(1), sample(1))
    assert not list(folder.iterdir())


def test_flush_meets_a_full_disk_and_a_broken_one(folder, monkeypatch):
    def fail(_):
        raise OSError(codes.pop(), "failed")

    codes = [errno.EIO, errno.ENOSPC]
    with open_store(folder) as store:
        store.flush()
        fill(store, 1)
        store.flush()
        monkeypatch.setattr(os, "fsync", fail)
        store.flush()
        assert "failed" in store.full
        with pytest.raises(ForgeError, match="cannot be written to"):
            store.flush()


@pytest.fixture
def damaged(folder):
    with open_store(folder) as store:
        fill(store, 1, 2, 3)
    return folder


@pytest.mark.parametrize("torn", [1, 8, RECORD_BYTES - 1])
def test_a_torn_index(damaged, torn):
    index = only(damaged, ".index")
    os.truncate(index, index.stat().st_size - torn)
    with open_store(damaged) as store:
        assert_holds(store, 1, 2)
        fill(store, 3)
        assert_holds(store, 1, 2, 3)


@pytest.mark.parametrize("position", range(0, RECORD_BYTES, 5))
def test_a_bad_record_in_the_middle_takes_no_other_along(damaged, position):
    flip(only(damaged, ".index"), HEADER_BYTES + RECORD_BYTES + position)
    with open_store(damaged) as store:
        assert_holds(store, 1, 3)


def test_a_record_of_zeros(damaged):
    with only(damaged, ".index").open("ab") as file:
        file.write(bytes(RECORD_BYTES))
    with open_store(damaged) as store:
        assert_holds(store, 1, 2, 3)


def test_a_record_that_another_process_is_still_writing(damaged):
    index = only(damaged, ".index")
    whole = index.read_bytes()
    os.truncate(index, len(whole) - RECORD_BYTES - 20)
    with open_store(damaged) as store:
        assert_holds(store, 1)
        for end, new in pairwise(
            [len(whole) - RECORD_BYTES - 20, len(whole) - RECORD_BYTES, len(whole) - 1, len(whole)]
        ):
            with index.open("r+b") as file:
                file.seek(end)
                file.write(whole[end:new])
            assert store.refresh() == (new % RECORD_BYTES == len(whole) % RECORD_BYTES)
        assert_holds(store, 1, 2, 3)


def test_states_that_are_not_all_there(damaged):
    states = only(damaged, ".states")
    os.truncate(states, states.stat().st_size - 1)
    with open_store(damaged) as store:
        assert_holds(store, 1, 2)


def test_a_flipped_bit_makes_the_sample_absent(damaged):
    states = only(damaged, ".states")
    flip(states, states.stat().st_size - 1)
    with open_store(damaged) as store:
        assert key(3) in store
        assert store.get(key(3)) is None
        assert key(3) not in store
        assert_holds(store, 1, 2)
        fill(store, 3)
    # The bad record is still in its segment, and the good one is found whichever comes first.
    with open_store(damaged) as store:
        assert_holds(store, 1, 2, 3)


def test_states_that_end_early_after_opening(damaged):
    with open_store(damaged) as store:
        os.truncate(only(damaged, ".states"), HEADER_BYTES)
        assert store.get(key(1)) is None


def test_half_of_a_pair(damaged):
    only(damaged, ".states").unlink()
    with open_store(damaged) as store:
        assert store.num_samples == 0
        fill(store, 1)
        assert_holds(store, 1)


def test_a_file_that_may_not_be_read(damaged, monkeypatch):
    def denied(*_, **__):
        raise PermissionError(errno.EACCES, "Permission denied")

    with open_store(damaged) as store:
        monkeypatch.setattr(Path, "open", denied)
        with pytest.raises(ForgeError, match=r"\.states cannot be read \(Permission denied\)"):
            store.get(key(1))
        with pytest.raises(ForgeError, match=r"\.index cannot be read \(Permission denied\)"):
            open_store(damaged)


def test_the_folder_disappears_and_the_store_recovers(folder):
    with open_store(folder) as one, open_store(folder) as two:
        fill(one, 1, 2)
        fill(two, 3)
        one.refresh()
        mapped = one.get(key(1))
        shutil.rmtree(folder)
        assert torch.equal(one.get(key(2)), sample(2))
        assert one.get(key(3)) is None
        fill(one, 4)
        assert one.refresh() == 0
        assert_holds(one, 4)
        assert torch.equal(mapped, sample(1))
        assert two.refresh() == 1
        assert_holds(two, 4)


def test_clear_deletes_only_what_is_ours(folder):
    with open_store(folder, max_bytes=5_000) as store, open_store(folder) as other:
        note = folder / "note.txt"
        note.touch()
        (folder / f"{'0' * 32}.new").touch()  # left by a kill
        fill(store, 1)
        fill(other, 2)
        states = store.get(key(1))
        assert not store.add(key(3), torch.zeros(200, WIDTH))
        store.clear()
        assert list(folder.iterdir()) == [note]
        assert store.full is None
        assert store.nbytes == store.num_samples == store.num_tokens == 0
        assert torch.equal(states, sample(1))
        fill(store, 3)
        fill(other, 4)  # its segment was deleted: it begins another
        for each in (store, other):
            each.refresh()
            assert_holds(each, 3, 4)


def in_a_process_of_its_own(code, folder, condition=None):
    """Run a line with this module's names and `store` in `folder`, to its end or until it is killed."""
    start = (
        "from freezing.cache.test_store import *; room.RESERVE_BYTES = room.RESERVE_SHARE = 0;"
        f"store = open_store(Path({str(folder)!r}));"
    )
    return run_until([sys.executable, "-c", start + code], condition, cwd=Path(__file__).parents[2])


def write_until_killed(store, begin):
    number = begin
    while True:
        fill(store, number)
        print(number, flush=True)
        number += 1


def write_before_and_after_a_fork(store):
    """A data loader's worker is a fork: it must not write where its parent writes."""
    fill(store, 1)
    child = os.fork()
    fill(store, 2 if child else 3)
    fill(store, 4 if child else 5)
    if child:
        assert os.waitpid(child, 0)[1] == 0
        assert store.refresh() == 2
    else:
        store.flush()
        store.close()
        os._exit(0)
    assert_holds(store, 6, 1, 2, 3, 4, 5)


def test_another_process_and_its_fork_write_while_this_one_reads(folder):
    with open_store(folder) as store:
        fill(store, 6)
        in_a_process_of_its_own("write_before_and_after_a_fork(store); store.close()", folder)
        assert store.refresh() == 5
        assert_holds(store, 6, 1, 2, 3, 4, 5)
        assert len(list(folder.glob("*.index"))) == 3


@pytest.mark.parametrize(
    "kills", [1, pytest.param(25, marks=pytest.mark.long)], ids=["once", "twenty-five times, at any instant"]
)
def test_kill_9_loses_nothing_that_was_stored(folder, kills):
    stored = set()
    for kill in range(kills):
        # Not at a line where the program waits: it goes on writing while the signal is on its way.
        enough = Condition("some lines", lambda output, lines=20 + kill: output.count("\n") >= lines)
        run = in_a_process_of_its_own(f"write_until_killed(store, {10_000 * kill})", folder, enough)
        assert run.returncode == -signal.SIGKILL
        said = run.output.split("\n")[:-1]  # the last one may be half a line
        stored |= {int(line) for line in said}
    with open_store(folder) as store:
        # One more per kill may have been stored and not yet said.
        assert len(stored) <= store.num_samples <= len(stored) + kills
        for number in stored:
            assert torch.equal(store.get(key(number)), sample(number))
