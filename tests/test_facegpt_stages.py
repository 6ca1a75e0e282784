"FaceGPT's stages: what they read, what they refuse, what two runs give."

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from facelab.data.instruct import Talk, Turn, write_instructions
from facelab.facegpt.dataset import ABOUT_THE_PICTURE, drawn_set, hq_photos, instruction_rows, mirrored_text, told_talks, training_set
from facelab.facegpt.face_tables import spread, test_photos as photos_to_judge
from facelab.facegpt.learn import key_text_talks, told_of
from facelab.facegpt.speed import step_operations
from facelab.facegpt.talk import KINDS
from facelab.facegpt.wordings import TEXT_REQUESTS, fill
from facelab.lab.errors import InputError, Skipped

photos_to_judge.__test__ = False


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    place = tmp_path_factory.mktemp("set")
    _, talks = drawn_set(place / "set", 31, 3, 2, 64, 60, 0, place, 1)
    write_instructions(place / "set" / "talks.json", talks)
    return place / "set", talks


def test_drawn_set_is_the_same_again(drawn, tmp_path):
    folder, talks = drawn
    _, again = drawn_set(tmp_path / "set", 31, 3, 2, 64, 60, 0, tmp_path, 2)
    assert again == talks
    for path in sorted(folder.rglob("*.jpg")) + sorted(folder.rglob("*.pts")):
        assert path.read_bytes() == (tmp_path / "set" / path.relative_to(folder)).read_bytes()


def test_mirrored_set(drawn):
    folder, _ = drawn
    photos, talks = training_set(folder / "faces", folder / "talks.json", 64)
    half = len(photos) // 2
    assert torch.equal(photos.images[half:], photos.images[:half].flip(-1))
    assert torch.allclose(photos.landmarks_2d[half:].flip(-1)[:, 27, 1], 64 - photos.landmarks_2d[:half, 27, 0], atol=1e-3)  # the bridge of the nose
    both = {t.id: t for t in talks}
    for talk in talks:
        if talk.id + "_mirrored" in both:
            other = both[talk.id + "_mirrored"]
            assert [mirrored_text(t.text) for t in other.turns] == [t.text for t in talk.turns]
    assert set(ABOUT_THE_PICTURE) <= set(KINDS)


def test_photos_of_other_splits_are_not_trained_on(drawn, tmp_path):
    import shutil

    shutil.copytree(drawn[0] / "faces", tmp_path / "faces")
    (tmp_path / "faces" / "list_eval_partition.txt").unlink()
    mapping = tmp_path / "faces" / "CelebA-HQ-to-CelebA-mapping.txt"
    head, *rows = mapping.read_text().splitlines()
    originals = (1, 2, 162771, 182637, 182638, 202599)  # CelebA's own bounds: two of train, two of val, two of test
    mapping.write_text("\n".join([head, *(f"{k} {n - 1} {n:06d}.jpg" for k, n in enumerate(originals))]) + "\n")
    photos, _ = training_set(tmp_path / "faces", drawn[0] / "talks.json", 64, mirror=False)
    assert photos.names == ["CelebA-HQ-img/0.jpg", "CelebA-HQ-img/1.jpg"]
    assert photos_to_judge(str(tmp_path / "faces"), "test", 64).names == ["CelebA-HQ-img/4.jpg", "CelebA-HQ-img/5.jpg"]


def test_photos_without_landmarks_are_counted(drawn, tmp_path):
    import shutil

    shutil.copytree(drawn[0] / "faces", tmp_path / "faces")
    for name in ("1", "3"):
        (tmp_path / "faces" / "landmarks" / f"{name}.pts").unlink()
    (tmp_path / "faces" / "CelebA-HQ-img" / "5.jpg").write_bytes(b"no picture")
    skipped = Skipped()
    photos = hq_photos(tmp_path / "faces", 32, skipped=skipped)
    assert len(photos) == 3 and len(skipped) == 3 and photos.size == 32
    with pytest.raises(InputError, match="landmarks"):
        hq_photos(tmp_path / "faces", 32)


def test_oblong_pictures_are_cut_about_their_middle(drawn, tmp_path):
    import shutil

    shutil.copytree(drawn[0] / "faces", tmp_path / "faces")
    picture = tmp_path / "faces" / "CelebA-HQ-img" / "0.jpg"
    whole = np.asarray(Image.open(picture).convert("RGB"))
    wide = np.pad(whole, ((0, 0), (20, 20), (0, 0)))
    Image.fromarray(wide).save(picture, quality=100, subsampling=0)
    marks = tmp_path / "faces" / "landmarks" / "0.pts"
    lines = marks.read_text().splitlines()
    start = lines.index("{") + 1
    lines[start : start + 68] = [f"{float(x) + 20} {y}" for x, y in (line.split() for line in lines[start : start + 68])]
    marks.write_text("\n".join(lines) + "\n")
    plain, cut = hq_photos(drawn[0] / "faces", 64), hq_photos(tmp_path / "faces", 64)
    assert torch.allclose(plain.landmarks_2d[0], cut.landmarks_2d[0], atol=1e-3)
    assert (plain.images[0].float() - cut.images[0].float()).abs().mean() < 3


def test_instruction_rows(tmp_path):
    (tmp_path / "coco").mkdir()
    Image.fromarray(np.full((30, 50, 3), 90, np.uint8)).save(tmp_path / "coco" / "a.png")
    say = lambda q, a: (Turn("user", q), Turn("assistant", a))
    write_instructions(tmp_path / "mix.json", [Talk("1", "a.png", say("What is this?", "Grey.")), Talk("2", None, say("2 + 2?", "4")), Talk("3", "a.png", say("And now?", "Still grey."))])
    photos, talks = instruction_rows(tmp_path / "mix.json", tmp_path / "coco", 10, 16)
    assert photos.names == ["a.png"] and photos.images.shape == (1, 3, 16, 16) and [t.kind for t in talks] == ["general"] * 3
    none, talks = instruction_rows(tmp_path / "mix.json", None, 10, 16)
    assert none is None and [t.id for t in talks] == ["2"]
    (tmp_path / "coco" / "a.png").write_bytes(b"torn")
    skipped = Skipped()
    none, talks = instruction_rows(tmp_path / "mix.json", tmp_path / "coco", 10, 16, skipped)
    assert none is None and [t.id for t in talks] == ["2"] and len(skipped) == 2


@pytest.mark.parametrize(("content", "word"), [("{}", "list"), ("[", "brackets"), (json.dumps([{"id": "1", "conversations": []}]), "turns")])
def test_bad_talks_are_one_clear_error(drawn, tmp_path, content, word):
    path = tmp_path / "talks.json"
    path.write_text(content)
    with pytest.raises(InputError, match=word):
        training_set(drawn[0] / "faces", path, 64)


def test_talk_about_a_photo_that_is_not_there(drawn, tmp_path):
    from facelab.facegpt.batches import talk_set
    from facelab.facegpt.llava_training import PLAIN
    from facelab.facegpt.prompt import Encoder
    from facelab.facegpt.vlm import add_face_token, load_llava, random_llava

    llava = load_llava(random_llava(tmp_path / "llava", size=32, patch=16))
    add_face_token(llava)
    photos = hq_photos(drawn[0] / "faces", 64)
    lost = Talk("9", "lost.jpg", (Turn("user", "Who?"), Turn("assistant", "Nobody.")))
    with pytest.raises(InputError, match="lost.jpg"):
        talk_set(Encoder(llava, PLAIN), [lost], photos)


def test_told_of_reads_every_template_and_nothing_else():
    for template in TEXT_REQUESTS:
        assert told_of(fill(template, description="A broad smile, and {braces}.")) == "A broad smile, and {braces}"
    assert told_of("What is 3 and 4?") == ""


def test_key_text_talks_have_the_same_descriptions(drawn):
    folder, _ = drawn
    photos, talks = training_set(folder / "faces", folder / "talks.json", 64, mirror=False)
    made = key_text_talks(photos, talks)
    told = [told_of(t.turns[0].text) for t in talks if t.kind == "text_to_face"]
    assert len(made) == len(told) > 5 and all(said in talk.turns[0].text for said, talk in zip(told, made))


def test_described_photos_need_a_description_each():
    with pytest.raises(InputError):
        told_talks(["a"], ["x"], 0, {"general": 1.0})


def test_photos_to_judge_are_of_the_test_split():
    photos = photos_to_judge("data/celeba", "test", 64, 12)
    assert len(photos) == 12 and photos.codes is not None and photos.facts is not None
    with pytest.raises(InputError):
        photos_to_judge("data/nothing", "test", 64)


def test_spread():
    assert spread(10, 3) == [0, 4, 9] and spread(2, 8) == [0, 1] and spread(1, 3) == [0]


def test_operations_are_linear_in_rows():
    one = step_operations(10**6, 10**5, 2, 64, 30, 16, 1)
    assert step_operations(10**6, 10**5, 2, 64, 30, 16, 7) == 7 * one > 0


def test_module_of_every_facegpt_stage_is_where_dvc_says():
    from facelab.lab.profile import stages
    from facelab.lab.run import named_function

    found = [s for name, s in stages(Path(__file__).parent.parent).items() if name.startswith("facegpt-")]
    assert len(found) == 7 and all(callable(named_function(s.run)) for s in found)
