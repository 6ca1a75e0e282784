"LLaVA's instruction files: what is written is read back, bad rows are counted, broken files refused, large ones not held in memory."

import json
import random

import numpy as np
import pytest

from facelab.data.instruct import IMAGE_TAG, Talk, Turn, read_instructions, row_of_talk, row_places, talk_of_row, write_instructions
from facelab.lab.errors import InputError, Skipped


def row(question="What is it?", reply="A cat.", **more):
    return {"id": "1", "conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": reply}], **more}


def talk(k=0, **more):
    return Talk(str(k), None, (Turn("user", f"Question {k}?"), Turn("assistant", 'A "quoted" \\ { [ answer\n')), **more)


def test_round_trip_keeps_everything(tmp_path):
    talks = [talk(0), talk(1, kind="several", targets=("a.jpg", "b.jpg")), Talk("2", "f/ä.jpg", (Turn("user", "Ünï ☃?"), Turn("assistant", "Yes.")) * 3, "mixed", {"mouth": "open"}, ("f/ä.jpg",))]
    assert write_instructions(tmp_path / "t.json", talks) == 3
    assert list(read_instructions(tmp_path / "t.json")) == talks
    first = (tmp_path / "t.json").read_bytes()
    write_instructions(tmp_path / "t.json", talks)
    assert (tmp_path / "t.json").read_bytes() == first


def test_published_form_is_read():
    got = talk_of_row(row("<image>\nWhat is it?", image="coco/train2017/000000033471.jpg", model="gpt", id=33471))
    assert got == Talk("33471", "coco/train2017/000000033471.jpg", (Turn("user", "What is it?"), Turn("assistant", "A cat.")))
    assert talk_of_row(row("What is it?\n<image>", image="a.jpg")).turns[0].text == "What is it?"
    sharegpt = row()["conversations"]
    assert talk_of_row({"id": "x", "conversations": sharegpt[1:] + sharegpt}).turns == talk_of_row(row()).turns
    assert talk_of_row({"id": "x", "conversations": sharegpt + sharegpt[:1]}).turns == talk_of_row(row()).turns


@pytest.mark.parametrize(
    "bad",
    [
        "text", 7, None, [], {}, {"conversations": []}, {"conversations": {}}, row("<image>"), row("a", "<image>", image="a.jpg"), row("<image> <image>", image="a.jpg"), row(image=["a.jpg", "b.jpg"]), row(image=""),
        {"id": "1", "conversations": [{"from": "human", "value": "a"}, {"from": "human", "value": "b"}, {"from": "gpt", "value": "c"}, {"from": "gpt", "value": "d"}]},
        {"id": "1", "conversations": [{"from": "system", "value": "a"}, {"from": "gpt", "value": "b"}]}, {"id": "1", "conversations": [{"from": "human", "value": 3}, {"from": "gpt", "value": "b"}]},
    ],
)  # fmt: skip
def test_bad_row_is_one_clear_error(bad):
    with pytest.raises(InputError):
        talk_of_row(bad)


def test_bad_rows_are_counted_and_good_ones_kept(tmp_path):
    rows = [row(), "text", row("<image>"), row("<image>", image="../up.jpg"), row("<image>", image="none.jpg"), row("<image>", image="there.jpg"), [1]]
    (tmp_path / "there.jpg").write_bytes(b"x")
    (tmp_path / "t.json").write_text(json.dumps(rows))
    skipped = Skipped()
    got = read_instructions(tmp_path / "t.json", tmp_path, skipped)
    assert len(got) == 2 and len(skipped) == 5 and got.image_path(got[1]) == tmp_path / "there.jpg" and got.image_path(got[0]) is None
    with pytest.raises(InputError, match="row"):
        read_instructions(tmp_path / "t.json", tmp_path)
    with pytest.raises(InputError, match="folder"):
        read_instructions(tmp_path / "t.json", tmp_path / "none", skipped)
    with pytest.raises(InputError, match="pictures"):
        read_instructions(tmp_path / "t.json", None, Skipped()).image_path(got[1])


@pytest.mark.parametrize("text", ["", "{}", "hello", "[", "[{", '[{"a": "b', '[{"a": 1}]]', "[]", "[1, 2]", '[{"id": 1 "x"}]', "[" * 5000, '[{"a": ' * 3000])
def test_broken_file_is_one_clear_error(tmp_path, text):
    (tmp_path / "t.json").write_text(text)
    with pytest.raises(InputError):
        read_instructions(tmp_path / "t.json")


def test_broken_bytes_and_missing_files(tmp_path):
    (tmp_path / "t.json").write_bytes(b'[{"id": "\xff\xfe", "conversations": []}]')
    with pytest.raises(InputError):
        read_instructions(tmp_path / "t.json")
    for name in ("none.json", "."):
        with pytest.raises(InputError):
            read_instructions(tmp_path / name)


def test_rows_are_found_where_json_finds_them(tmp_path):
    rng = random.Random(4)
    signs = ['"', "\\", "{", "}", "[", "]", ",", "a", "é", "\n", "\\u0022"]
    rows = [{"".join(rng.choices(signs, k=5)): ["".join(rng.choices(signs, k=rng.randrange(30))) for _ in range(3)], "n": {"x": [k]}} for k in range(300)]
    for indent in (None, 1):
        raw = json.dumps(rows, ensure_ascii=False, indent=indent).encode()
        (tmp_path / "t.json").write_bytes(raw)
        assert [json.loads(raw[a:b]) for a, b in row_places(tmp_path / "t.json")] == rows


def test_truncated_anywhere_is_refused(tmp_path):
    write_instructions(tmp_path / "t.json", [talk(k) for k in range(3)])
    raw = (tmp_path / "t.json").read_bytes().rstrip()
    for cut in range(1, len(raw), 7):
        (tmp_path / "cut.json").write_bytes(raw[:cut])
        with pytest.raises(InputError):
            read_instructions(tmp_path / "cut.json", None, Skipped())


def test_a_subset_and_list_manners(tmp_path):
    write_instructions(tmp_path / "t.json", [talk(k) for k in range(10)])
    data = read_instructions(tmp_path / "t.json")
    assert data[-1].id == "9" and [t.id for t in data.keep(np.array([7, 2]))] == ["7", "2"] and len(data.keep(np.arange(10) % 2 == 0)) == 5
    with pytest.raises(IndexError):
        data[10]


def test_writer_refuses_what_would_read_otherwise(tmp_path):
    with pytest.raises(InputError, match="image"):
        row_of_talk(Talk("1", None, (Turn("user", f"what is {IMAGE_TAG}?"), Turn("assistant", "A tag."))))
    with pytest.raises(InputError):
        write_instructions(tmp_path / "t.json", [])
    assert list(tmp_path.iterdir()) == []
