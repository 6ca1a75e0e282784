"What the readers share: reasons that are counted, folders walked whole, shares of a set by seed, names in any casing."

import pickle

import numpy as np
import pytest

from facelab.data.reading import FolderReport, LeftOut, because, folder_of, noted, reading_part, reason_of, subset_rows, walk
from facelab.lab.errors import InputError, Skipped, UnsafeFileError
from facelab.lab.files import read_text


def wrong(came="odd", kind=InputError):
    return kind("x", came, "y", "z")


def test_a_reason_is_the_part_and_what_was_wrong(tmp_path):
    (tmp_path / "empty.txt").write_bytes(b"")
    (tmp_path / "latin.txt").write_bytes(b"\xff")
    found = {}
    for name in ("none", "empty", "latin"):
        with pytest.raises(InputError) as caught, reading_part("caption"):
            read_text(tmp_path / f"{name}.txt")
        found[name] = reason_of(caught.value)
    assert found == {"none": "caption missing", "empty": "caption empty", "latin": "caption damaged"}
    assert reason_of(wrong(kind=UnsafeFileError)) == "item unsafe or too large" and reason_of(because(wrong(), "so")) == "so" and reason_of(OSError()) == "item damaged"


def test_the_inner_part_names_the_reason():
    with pytest.raises(InputError) as caught, reading_part("outer"), reading_part("inner"):
        raise wrong()
    assert reason_of(caught.value) == "inner damaged"
    with pytest.raises(KeyError), reading_part("other"):  # what is no InputError passes as it is
        raise KeyError


def test_a_tally_counts_all_and_keeps_few():
    tally = LeftOut(keep=3)
    for k in range(1000):
        tally.add(k, because(wrong(), "a" if k % 10 else "b"))
    assert isinstance(tally, Skipped) and len(tally) == 1000 and len(tally.items) == 6 and tally.reasons == {"a": 900, "b": 100}
    assert tally.report(5000).splitlines() == ["1,000 of 5,000 items left out:", "  900 a", "  100 b"]
    other = LeftOut()
    other.add("x", wrong())
    tally.merge(other)
    assert len(tally) == 1001 and tally.reasons["item damaged"] == 1
    assert len(pickle.loads(pickle.dumps(tally))) == 1001


class Numbers:
    def __len__(self):
        return 6

    def __getitem__(self, at):
        if at == 4:
            raise wrong()
        return at

    def name_of(self, at):
        return f"n{at}"


def test_a_walk_reads_every_item_once():
    before = LeftOut()
    before.add("row", because(wrong(), "list row damaged"))
    report = walk("numbers", "somewhere", Numbers(), before, lambda n: [("even", n % 2 == 0)], every=1e9)
    assert (report.found, report.used) == (7, 5) and report.counts["even"] == {True: 2, False: 3} and report.left_out.items[-1][0] == "n4" and not report.whole
    assert walk("numbers", "somewhere", Numbers(), LeftOut(), lambda n: [], found=9, every=1e9).found == 9
    assert str(report).splitlines()[:3] == ["numbers: 5 of 7 items can be used", "  1 item damaged", "  1 list row damaged"]
    assert FolderReport("x", "y", 2, 2, LeftOut()).whole and not FolderReport("x", "y", 2, 2, LeftOut(), notes=["odd"]).whole


def test_other_errors_are_ours_and_stop_a_walk():
    class Broken(Numbers):
        def __getitem__(self, at):
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        walk("x", "y", Broken(), LeftOut(), lambda n: [], every=1e9)


@pytest.mark.parametrize(("count", "share", "size"), [(162_770, 0.01, 1627), (162_770, 0.1, 16277), (162_770, 1.0, 162_770), (12_271, 0.2, 2454), (12_271, 0.5, 6135), (12_271, 1, 12_271), (100, 0.29, 29), (1000, 0.57, 570), (3, 1 / 3, 0)])
def test_a_share_is_rounded_down_exactly(count, share, size):
    if size == 0:  # a third in floating point is less than a third
        with pytest.raises(InputError):
            subset_rows(count, share)
        return
    rows = subset_rows(count, share, seed=3)
    assert len(rows) == size == len(set(rows.tolist())) and (np.diff(rows) > 0).all() and rows.min() >= 0 and rows.max() < count


def test_shares_are_nested_and_hang_on_the_seed_alone():
    small, large = (set(subset_rows(5000, share, seed=7).tolist()) for share in (0.01, 0.1))
    assert small < large and small != set(subset_rows(5000, 0.01, seed=8).tolist()) and np.array_equal(subset_rows(5000, 0.01, 7), subset_rows(5000, 0.01, 7))
    spread = subset_rows(10_000, 0.1)
    assert abs(spread.mean() / 10_000 - 0.5) < 0.05  # not the first rows


@pytest.mark.parametrize(("count", "share", "seed"), [(10, 0, 0), (10, -0.1, 0), (10, 1.1, 0), (10, float("nan"), 0), (0, 0.5, 0), (10, 0.5, -1), (10, 0.01, 0)])
def test_wrong_shares_are_refused(count, share, seed):
    with pytest.raises(InputError):
        subset_rows(count, share, seed)


def test_folders_in_another_casing(tmp_path):
    (tmp_path / "HELEN" / "TestSet").mkdir(parents=True)
    (tmp_path / "helen.txt").write_text("")
    assert folder_of(tmp_path, "helen/testset") == tmp_path / "HELEN" / "TestSet"
    (tmp_path / "helen").mkdir()
    assert folder_of(tmp_path, "helen") == tmp_path / "helen" and folder_of(tmp_path, "helen/testset") is None  # the exact name comes first
    assert folder_of(tmp_path / "helen.txt", "a") is None and noted("x", []) == []
