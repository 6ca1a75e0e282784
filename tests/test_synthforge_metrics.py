"Metrics on cases with known answers; evaluation finds its way back from crops, counts failures and names its choices."

from importlib import resources
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from facelab.data.find_faces import FoundFace, cascade_faces
from facelab.data.w300 import read_pts, write_pts
from facelab.face.align import FLIP68
from facelab.face.morphable import MorphableModel
from facelab.lab.errors import InputError, ShapeError
from facelab.lab.images import write_image
from facelab.nets.landmarks import BaseLandmarks, LandmarkDetector, LandmarkNet, landmark_square
from facelab.synthforge.annotated import AnnotatedFace
from facelab.synthforge.evaluate import (
    CROPS,
    SYNTHFORGE_LAPA,
    WHOLE,
    CropChoice,
    Scoring,
    evaluate,
    evaluate_300w,
    label_rows,
)
from facelab.synthforge.metrics import TABLE2, TABLE3, class_counts, curve_area, f1_of, f1_rows, failure_rate, landmark_nme, nme_rows
from facelab.synthforge.model import MINI, FineTuned, LabelConfig, SyntheticBackbone
from facelab.synthforge.predictor import Prediction, DetectorPredictor, FunctionPredictor, NetPredictor, Predictor

CLASSES = ("background", "skin", "hair")


def marks68(left=(20.0, 40.0), right=(60.0, 40.0)):
    marks = np.stack([np.linspace(15, 65, 68), 30 + 25 * np.sin(np.linspace(0, 3, 68))], 1)
    marks[36], marks[45] = left, right
    return marks


def test_nme_by_hand():
    true = marks68()
    assert landmark_nme(true + [3.0, 4.0], true) == pytest.approx(100 * 5 / 40)
    off = true.copy()
    off[10] += [6.8, 0]
    assert landmark_nme(off, true) == pytest.approx(100 * 0.1 / 40)
    assert landmark_nme(10 * off, 10 * true) == pytest.approx(landmark_nme(off, true))  # size does not matter
    assert landmark_nme(off, true, (0, 1)) != landmark_nme(off, true)
    lapa = np.random.default_rng(0).random((106, 2))
    assert landmark_nme(lapa + [1, 0], lapa) == pytest.approx(100 / np.linalg.norm(lapa[66] - lapa[79]))


def test_nme_uses_the_true_eyes():
    true = marks68()
    far = true.copy()
    far[45] += [40.0, 0.0]  # the prediction's own eyes are twice as far apart
    assert landmark_nme(far, true) == pytest.approx(100 * (40 / 68) / 40)


@pytest.mark.parametrize("found, true", [(marks68()[:67], marks68()), (marks68() * np.nan, marks68()), (marks68(), marks68((5, 5), (5, 5)))])
def test_nme_refuses(found, true):
    with pytest.raises(InputError):
        landmark_nme(found, true)


def test_failures_and_area_by_hand():
    assert failure_rate(np.array([8.0, 10.0, 10.1, np.inf])) == 50.0
    assert curve_area(np.array([0.0, 10.0, np.inf, 2.5])) == pytest.approx(100 * (1 + 0 + 0 + 0.75) / 4)
    errors, steps = np.random.default_rng(0).exponential(5, 400), np.linspace(0, 10, 20001)
    curve = (errors[None] <= steps[:, None]).mean(1)
    assert curve_area(errors) == pytest.approx(100 * np.trapezoid(curve, steps) / 10, abs=0.01)


def test_f1_by_hand_and_against_its_definition():
    true, found = np.array([[0, 0, 1, 2], [0, 1, 1, 2]]), np.array([[0, 1, 1, 2], [0, 1, 0, 0]])
    # class 0: 2 of 4 found, 3 true; class 1: 2 of 3 found, 3 true; class 2: 1 of 1 found, 2 true
    assert np.allclose(f1_of(class_counts(found, true, 4)), [400 / 7, 400 / 6, 200 / 3, np.nan], equal_nan=True)
    rng = np.random.default_rng(1)
    maps = [(rng.integers(0, 5, (9, 7)), rng.integers(0, 5, (9, 7))) for _ in range(4)]
    f, t = (np.concatenate([m[at].ravel() for m in maps]) for at in (0, 1))
    slow = []
    for k in range(5):  # from precision and recall
        hit = float(((f == k) & (t == k)).sum())
        precision, recall = hit / (f == k).sum(), hit / (t == k).sum()
        slow.append(100 * 2 * precision * recall / (precision + recall))
    assert np.allclose(f1_of(np.stack([class_counts(f, t, 5) for f, t in maps])), slow)


def test_f1_is_one_matrix_and_not_a_mean_of_pictures():
    small = class_counts(np.zeros((1, 2), int), np.array([[1, 1]]), 2)
    large = class_counts(np.ones((10, 10), int), np.ones((10, 10), int), 2)
    assert f1_of(np.stack([small, large]))[1] == pytest.approx(100 * 200 / 202)
    assert np.mean([np.nan_to_num(f1_of(c)[1]) for c in (small, large)]) == 50.0


def test_pixels_that_are_not_judged_do_not_count():
    true = np.array([[1, 255], [1, 0]])
    assert f1_of(class_counts(np.array([[1, 0], [1, 0]]), true, 2)).tolist() == [100.0, 100.0]
    with pytest.raises(InputError, match="no judged pixel"):
        class_counts(np.zeros((2, 2), int), np.full((2, 2), 255), 2)
    with pytest.raises(ShapeError, match="class 7"):
        class_counts(np.zeros((2, 2), int), np.full((2, 2), 7), 2)


def test_rows_name_their_classes_and_intervals_hold_them():
    rng = np.random.default_rng(0)
    counts = np.stack([class_counts(np.where(rng.random((8, 8)) < 0.8, t, 1), t, 3) for t in rng.integers(0, 3, (20, 8, 8))])
    rows = {r.metric: r for r in f1_rows("m", counts, CLASSES, {"hair": "hair", "skin": "face"}, draws=300, data="toy")}
    assert list(rows) == ["F1 hair", "F1 face", "F1 mean"] and all(r.low < r.value < r.high for r in rows.values())
    assert rows["F1 mean"].value == pytest.approx((rows["F1 hair"].value + rows["F1 face"].value) / 2)
    again = f1_rows("m", counts, CLASSES, {"hair": "hair", "skin": "face"}, draws=300, data="toy")
    assert again == list(rows.values())
    people = {r.metric: r for r in f1_rows("m", counts, CLASSES, {"hair": "hair"}, groups=np.arange(20) // 10, draws=300)}
    assert people["F1 hair"].value == rows["F1 hair"].value and people["F1 hair"].low != rows["F1 hair"].low
    with pytest.raises(InputError, match="beard"):
        f1_rows("m", counts, CLASSES, {"beard": "beard"})


def test_a_class_that_is_nowhere_is_left_out_of_the_mean():
    counts = class_counts(np.array([[0, 1]]), np.array([[0, 1]]), 3)[None]
    rows = f1_rows("m", counts, CLASSES, {"skin": "face", "hair": "hair"}, draws=20)
    assert [r.metric for r in rows] == ["F1 face", "F1 mean"] and rows[-1].value == 100.0
    with pytest.raises(InputError, match="none of hair"):
        f1_rows("m", counts, CLASSES, {"hair": "hair"}, draws=20)


def test_columns_are_those_of_the_papers_tables():
    from facelab.data.paint_frame import LABELS11, LABELS19

    assert set(TABLE2) == set(LABELS11) - {"background"} and len(TABLE2) == 10
    assert set(TABLE3) == set(LABELS19) - {"background", "hat", "ear_r", "neck_l", "cloth"} and len(TABLE3) == 14


def scene(k=0, size=(90, 120)):
    "A picture whose red channel is its label map."
    labels = np.zeros(size, np.uint8)
    labels[20:70, 30 + k : 80 + k] = 1
    labels[20:35, 30 + k : 80 + k] = 2
    image = np.repeat((labels * 100)[..., None], 3, 2)
    return AnnotatedFace(f"scene {k}", image, labels, landmarks_2d=(marks68() + [15 + k, 10]).astype(np.float32))


def reads(picture):
    return np.round(picture[..., 0] / 100).astype(np.uint8)


@pytest.mark.parametrize("kind", [kind for kind in CROPS if kind != "detector"])  # which needs a face: see below
def test_a_crop_and_the_way_back(kind):
    "A predictor that reads the labels off the picture is right to within the border of a pixel, whatever the crop."
    scoring, choice = Scoring(CLASSES), CropChoice(kind, 1.6 if kind != "picture" else 1.0)
    result = evaluate(FunctionPredictor("reads", reads, size=256), [scene(k) for k in range(3)], choice, scoring)
    assert not len(result.failed) and not len(result.left_out) and f1_of(np.stack(result.counts))[1:].min() > 97
    one_hot = lambda picture: np.stack([reads(picture) == k for k in range(3)]).astype(np.float32)
    smooth = evaluate(FunctionPredictor("scores", one_hot, size=256), [scene(k) for k in range(3)], choice, scoring)
    assert f1_of(np.stack(smooth.counts))[1:].min() > 97
    assert str(choice) in result.crop and ("true" in result.crop) == (kind in ("landmarks", "labels"))


def test_landmarks_come_back_from_a_crop():
    "A predictor that is right in the crop is right in the picture, to float precision; one that is a crop pixel off is off by the crop's scale."
    face = scene()
    for kind in ("labels", "picture"):
        from facelab.data.face_crop import crop_face, move_points
        from facelab.synthforge.evaluate import square_of

        choice = CropChoice(kind, 1.5)
        crop = crop_face(face.image, square_of(face, choice), 64, 1.5)
        inverse = np.linalg.inv(np.vstack([crop.back, [0, 0, 1]]))[:2]
        inside = move_points(face.landmarks_2d.astype(np.float64), inverse)
        right, off = (evaluate(FunctionPredictor("p", lambda p, shift=shift: inside + [shift, 0.0], size=64), [face], choice, Scoring()) for shift in (0.0, 1.0))
        assert right.errors[0] < 1e-3
        assert off.errors[0] == pytest.approx(100 * np.linalg.norm(crop.back[:, 0]) / np.linalg.norm(face.landmarks_2d[36] - face.landmarks_2d[45]), rel=1e-3)


def test_labels_may_be_of_another_size_than_the_picture():
    "CelebAMask-HQ: pictures of 1024 pixels, masks of 512."
    face = scene()
    item = SimpleNamespace(name="big", image=np.repeat(np.repeat(face.image, 2, 0), 2, 1), labels=face.labels)
    for predictor in (FunctionPredictor("whole", reads), FunctionPredictor("crops", reads, size=256)):
        result = evaluate(predictor, [item], CropChoice("labels"), Scoring(CLASSES))
        assert f1_of(np.stack(result.counts))[1:].min() > 97


def test_other_schemes_go_through_a_table():
    swapped = FunctionPredictor("other", lambda p: np.array([2, 0, 1], np.uint8)[reads(p)])  # background 2, skin 0, hair 1
    wrong = evaluate(swapped, [scene()], WHOLE, Scoring(CLASSES))
    right = evaluate(swapped, [scene()], WHOLE, Scoring(CLASSES, ids=(1, 2, 0)))
    assert f1_of(np.stack(wrong.counts)).max() < 50 and f1_of(np.stack(right.counts)).min() == 100.0
    with pytest.raises(ShapeError, match="class 255"):
        evaluate(swapped, [scene()], WHOLE, Scoring(CLASSES, ids=(1, 2)))  # the table lacks a class: no picture's fault
    with pytest.raises(InputError, match="Scoring"):
        Scoring(CLASSES, ids=(0, 1, 3))


def test_scoring_in_the_crop_is_another_number_and_says_so():
    def sloppy(picture):  # finds no hair, and takes the upper part of the crop for skin
        found = np.minimum(reads(picture), 1)
        found[: len(found) // 4] = 1
        return found

    predictor = FunctionPredictor("sloppy", sloppy, size=256)
    outside, inside = (evaluate(predictor, [scene()], SYNTHFORGE_LAPA, Scoring(CLASSES, at=at)) for at in ("picture", "crop"))
    assert "in the crop" in inside.crop and "in the crop" not in outside.crop and "80 px" in inside.crop
    assert abs(f1_of(np.stack(outside.counts))[1] - f1_of(np.stack(inside.counts))[1]) > 1


def test_failures_are_counted_and_scored_broken_truth_is_left_out():
    faces = [scene(k) for k in range(4)]
    empty = AnnotatedFace("empty", faces[0].image, np.full(faces[0].size, 255, np.uint8), landmarks_2d=faces[0].landmarks_2d)
    foreign = AnnotatedFace("foreign", faces[0].image, np.full(faces[0].size, 9, np.uint8), landmarks_2d=faces[0].landmarks_2d)
    blind = AnnotatedFace("blind", faces[0].image, faces[0].labels, landmarks_2d=np.full((68, 2), 7, np.float32))

    def moody(picture):
        if picture[50, 110, 0] == 0 and picture[50, 80, 0]:  # the later scenes
            raise InputError("moody", "a face at the right", "one at the left", "None.")
        return Prediction(labels=reads(picture), landmarks_2d=faces[0].landmarks_2d)

    result = evaluate(FunctionPredictor("moody", moody), [*faces, empty, foreign, blind], WHOLE, Scoring(CLASSES))
    assert [name for name, _ in result.left_out.items] == ["empty", "foreign", "blind"]
    assert [name for name, _ in result.failed.items] == [n for n, e in zip(result.names, result.errors, strict=True) if np.isinf(e)] != []
    failed = [at for at, e in enumerate(result.errors) if np.isinf(e)]
    assert all(result.counts[at][1, 1:].sum() == 0 for at in failed)  # a face that is not found is all background
    assert "3 of 7 items skipped" in result.report() and f"{len(failed)} of 4 faces" in result.report()
    rows = {r.metric: r for r in nme_rows("moody", {"full": result.nme()})}
    assert rows["failures full"].value == 100 * len(failed) / 4 and rows["NME full"].n == 4 - len(failed) and rows["AUC full"].n == 4


def test_one_bad_picture_of_a_batch_costs_one_answer():
    def fussy(pictures):
        if any(p.max() == 200 and (p == 200).mean() > 0.5 for p in pictures):
            raise InputError("fussy", "a picture full of hair", "a face", "None.")
        return [Prediction(labels=reads(p)) for p in pictures]

    full = AnnotatedFace("full", np.full((40, 40, 3), 200, np.uint8), np.full((40, 40), 2, np.uint8))
    fussy.name, fussy.size = "fussy", 48
    result = evaluate(fussy, [scene(0), full, scene(1)], WHOLE, Scoring(CLASSES, points=False))
    assert [name for name, _ in result.failed.items] == ["full"] and len(result.counts) == 3


def test_300w_rows(tmp_path):
    marks = marks68().astype(np.float32)
    for k, name in enumerate(("helen/testset/1", "lfpw/testset/1", "ibug/image_092 _01", "ibug/bad")):
        write_image(tmp_path / f"{name}.jpg", np.full((80, 80, 3), 40 * k, np.uint8))
        write_pts(tmp_path / f"{name}.pts", marks)
    (tmp_path / "ibug/bad.pts").write_text("version: 1\nn_points: 67\n{\n" + "1 1\n" * 67 + "}\n")
    (tmp_path / "ibug/lonely.pts").write_text((tmp_path / "helen/testset/1.pts").read_text())
    rows, result = evaluate_300w(FunctionPredictor("off", lambda p: marks + [p.mean() / 10, 0.0]), tmp_path)
    value = {r.metric: r.value for r in rows}
    assert value["NME common"] == pytest.approx(5.0, abs=0.1) and value["NME challenging"] == pytest.approx(20.0, abs=0.2)
    assert value["NME full"] == pytest.approx((0 + 10 + 20) / 3, abs=0.2) and {r.data for r in rows} == {"300-W, whole picture, own crop"}
    assert sorted(name for name, _ in result.left_out.items) == ["ibug/bad.pts", "ibug/lonely.pts"]


def test_the_labs_networks_are_predictors_and_detectors():
    torch.manual_seed(0)
    tuned = FineTuned(SyntheticBackbone(MINI), LabelConfig(("seg", "kps"), 3, True, width=4))
    whole, frozen = NetPredictor(tuned, "SB + LF"), NetPredictor(tuned, "SB", synthetic=True)
    picture = np.random.default_rng(0).integers(0, 255, (64, 64, 3)).astype(np.uint8)
    answer, other = whole([picture])[0], frozen([picture])[0]
    assert answer.scores.shape == (3, 64, 64) and other.scores.shape == (20, 64, 64) and answer.landmarks_2d.shape == (68, 2)
    assert isinstance(whole, Predictor) and isinstance(whole, LandmarkDetector)
    big = torch.nn.functional.interpolate(torch.from_numpy(picture).permute(2, 0, 1)[None] / 255, size=(128, 128))
    assert whole.landmarks(big).shape == (1, 68, 2) and not tuned.training
    rows = label_rows(evaluate(whole, [scene()], CropChoice("landmarks"), Scoring(CLASSES)), Scoring(CLASSES), {"skin": "face"}, "toy")
    assert [r.metric for r in rows] == ["F1 face", "F1 mean"] and rows[0].data == "toy, crop from true landmarks x1.6"
    only = NetPredictor(FineTuned(SyntheticBackbone(MINI), LabelConfig(("seg",), 3, False, width=4)))
    with pytest.raises(InputError, match="landmarks"):
        only.landmarks(torch.zeros(1, 3, 64, 64))


class MeanFace(BaseLandmarks):
    "Sees the same face in every square."

    def __init__(self):
        super().__init__(LandmarkNet(), "mean face")
        head = MorphableModel.procedural()
        flat = head.landmarks(head.mean[None])[..., :2] * torch.tensor([1.0, -1.0])
        middle, side, _ = landmark_square(flat)
        self.mean = ((flat - middle[:, None]) / (side * self.room)[:, None, None])[0] + 0.5

    def landmarks(self, images):
        return self.mean.expand(len(images), -1, -1) * images.shape[-1]


def test_detector_crops_use_no_truth(monkeypatch):
    "A real portrait, found by the cascade alone: the mean face is not far off, and another truth changes nothing in where one looks."
    from skimage.data import astronaut

    import facelab.synthforge.evaluate as page

    monkeypatch.setattr(page, "faces_of", lambda image, finder: [FoundFace(box, np.zeros((68, 2)), 1.0) for box in cascade_faces(image)])
    portrait = read_pts(resources.files("facelab.data") / "nasa_portrait.pts")
    items, shown = [SimpleNamespace(name="portrait", image=astronaut(), landmarks_2d=p) for p in (portrait, portrait[list(FLIP68)])], []
    looker = DetectorPredictor(MeanFace())

    def spy(pictures):
        shown.extend(pictures)
        return looker(pictures)

    spy.name, spy.size = looker.name, looker.size
    seen, fooled = (evaluate(spy, [item], CropChoice("detector"), Scoring()) for item in items)
    assert np.array_equal(*shown) and not len(seen.failed)
    assert seen.errors[0] < 25 < 50 < fooled.errors[0]
    blank = SimpleNamespace(name="blank", image=np.full((60, 60, 3), 127, np.uint8), landmarks_2d=marks68())
    lost = evaluate(looker, [blank], CropChoice("detector"), Scoring())
    assert "no face" in lost.failed.items[0][1] and np.isinf(lost.errors[0])
