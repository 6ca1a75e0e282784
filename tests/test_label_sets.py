"Class tables: what the sources say, left and right, one set into another with what is lost, borders that move."

import numpy as np
import pytest

from facelab.data.label_sets import CELEBAMASK_ORDERS, LABEL_SETS, PARTS, LabelSet, celebamask_set, check_labels, class_names, colour_labels, grow_class, label_set, mirror_labels, remap, remap_table
from facelab.data.paint_frame import LABELS11, LABELS19, TO_LAPA
from facelab.face.head_parts import REGION_FLIPS, REGIONS
from facelab.lab.errors import InputError, ShapeError


def test_the_readmes_table_is_as_published():
    said = "background skin nose eye_g l_eye r_eye l_brow r_brow l_ear r_ear mouth u_lip l_lip hair hat ear_r neck_l neck cloth".split()
    assert label_set("celebamask_readme").classes == tuple(said) == LABELS19 and label_set("celebamask_g_mask").classes == tuple(said)
    assert label_set("celebamask_readme").colours[:3] == ((0, 0, 0), (204, 0, 0), (76, 153, 0)) and label_set("celebamask_readme").colours[17:] == ((255, 153, 51), (0, 204, 0))


def test_farls_table_is_as_published():
    said = "neck skin cloth l_ear r_ear l_brow r_brow l_eye r_eye nose mouth l_lip u_lip hair eye_g hat ear_r neck_l".split()
    assert label_set("celebamask_farl").classes[1:] == tuple(said) and sorted(said) == sorted(CELEBAMASK_ORDERS["readme"])
    assert len({CELEBAMASK_ORDERS[name] for name in CELEBAMASK_ORDERS}) == len(CELEBAMASK_ORDERS) - 1  # g_mask is the README's


def test_lapas_table_is_as_published():
    lapa = label_set("lapa")
    assert [name.replace("_", " ") for name in lapa.classes] == "background,skin,left eyebrow,right eyebrow,left eye,right eye,nose,upper lip,inner mouth,lower lip,hair".split(",")
    assert lapa.colours[10] == (255, 0, 102) and lapa.flips == ((2, 3), (4, 5)) and lapa.classes == LABELS11
    other = label_set("lapa_synthforge")
    assert other.classes[0] == "hair" and other.classes[10] == "background" and other.classes[1:10] == lapa.classes[1:10]


def test_synthforges_table_is_as_released():
    s = label_set("synthforge")
    assert len(s) == 20 and s.classes[:19] == REGIONS and s.classes[19] == "background" and s.flips == REGION_FLIPS == ((4, 5), (6, 7), (8, 9), (11, 12))
    assert s.colours[0] == (0xF5, 0xDC, 0xCB) and s.colours[18] == (0x50, 0x44, 0x3D) and s.colours[19] == (0x45, 0x45, 0x45) and len(set(s.colours)) == 20


def test_left_is_the_persons_in_one_set_and_the_pictures_in_the_other():
    part = lambda name, own: label_set(name).parts[label_set(name).id_of(own)]
    assert part("celebamask_readme", "l_eye") == part("celebamask_farl", "l_eye") == part("synthforge", "left_eyeball") == "left_eye"
    assert part("lapa", "left_eye") == part("world19", "l_eye") == "right_eye" and part("world19", "l_lip") == part("celebamask_readme", "l_lip") == "lower_lip"


@pytest.mark.parametrize("name", LABEL_SETS)
def test_every_table_is_sound(name):
    s = label_set(name)
    assert len(s.classes) == len(s.parts) == len(s.colours) == len(set(s.parts)) and set(s.parts) <= set(PARTS) and len(s) in (11, 19, 20)
    assert all(0 <= c <= 255 for colour in s.colours for c in colour)
    swapped = {n for pair in s.flips for n in pair}
    assert swapped == {k for k, part in enumerate(s.parts) if part.startswith(("left_", "right_"))}
    labels = np.arange(len(s))[None].repeat(2, 0)
    assert np.array_equal(mirror_labels(mirror_labels(labels, s), s), labels) and remap_table(s, s).exact and np.array_equal(remap(labels, s, s)[0], labels)
    assert class_names(labels, name) == list(s.classes) and colour_labels(labels, s).shape == (2, len(s), 3)


def test_the_worlds_way_to_lapa_is_the_painters():
    table = remap_table("world19", "lapa")
    assert np.array_equal(table.ids, TO_LAPA) and table.merged == {"eye_g": "skin", "l_ear": "skin", "r_ear": "skin"} and table.dropped == ("hat", "ear_r", "neck_l", "neck", "cloth") and not table.missing


def test_orders_of_celebamask_lose_nothing_and_change_numbers():
    for a in CELEBAMASK_ORDERS:
        for b in CELEBAMASK_ORDERS:
            assert remap_table(f"celebamask_{a}", f"celebamask_{b}").exact
    assert remap(np.array([[13, 17]]), "celebamask_readme", "celebamask_farl")[0].tolist() == [[14, 1]]


def test_sides_change_hands_between_the_world_and_celebamask():
    assert remap(np.array([[4, 5, 6, 7, 8, 9]]), "world19", "celebamask_readme")[0].tolist() == [[5, 4, 7, 6, 9, 8]]
    assert remap_table("world19", "celebamask_readme").exact


def test_what_is_lost_is_named():
    table = remap_table("synthforge", "lapa")
    assert table.missing == ("hair",) and table.merged["scalp"] == "skin" and table.dropped == ("neck", "neck_back") and not table.exact
    assert all(word in str(table) for word in ("never given: hair", "scalp into skin", "dropped: neck"))
    bald = remap_table("synthforge", "lapa", also={"scalp": "hair", "nape": "hair"})
    assert bald.missing == () and bald.ids[label_set("synthforge").id_of("scalp")] == 10 == bald.ids[18]
    for bad in ({"beard": "hair"}, {"scalp": "beard"}):
        with pytest.raises(InputError):
            remap_table("synthforge", "lapa", also=bad)
    assert remap_table("synthforge", "lapa", also={"forehead": "eye_region"}).ids[1] == 1  # by way of eye_region to skin


@pytest.mark.parametrize("labels", [np.array([[11]]), np.array([[-1, 3]]), np.array([[2.0]]), np.zeros((0, 4), int), np.array(3), np.array([[300]], np.int64)])
def test_a_label_map_of_another_set_is_refused(labels):
    for use in (check_labels, colour_labels, mirror_labels, lambda a, b: remap(a, b, "celebamask_farl")):
        with pytest.raises(InputError):
            use(labels, "lapa")


def test_unknown_classes_are_named_with_their_pixels():
    with pytest.raises(InputError, match=r"unknown class 12 \(3 pixels\), 255 \(1 pixels\)"):
        check_labels(np.array([[12, 12, 12, 255, 1]], np.uint8), "lapa")
    with pytest.raises(ShapeError):
        check_labels(np.zeros((3, 3)), "lapa")


def test_wrong_tables_are_refused():
    good = dict(name="x", classes=("background", "a"), parts=("background", "skin"), colours=((0, 0, 0), (1, 1, 1)), source="")
    LabelSet(**good)
    for bad in ({"parts": ("background", "face")}, {"colours": ((0, 0, 0),)}, {"classes": ("a", "a")}, {"parts": ("skin", "skin")}):
        with pytest.raises(InputError):
            LabelSet(**good | bad)
    for order in ("celeba", ["skin"], [*CELEBAMASK_ORDERS["readme"][:-1], "skin"]):
        with pytest.raises(InputError):
            celebamask_set(order)
    assert celebamask_set(CELEBAMASK_ORDERS["readme"][::-1]).classes[1] == "cloth"


def test_a_border_moves_by_as_many_pixels():
    field = np.zeros((21, 21), np.uint8)
    field[5:16, 5:16] = 1
    for pixels, side in ((1, 13), (3, 17)):
        grown = grow_class(field, "lapa", "skin", pixels)
        assert (grown[10] == 1).sum() == side and (grown[:, 10] == 1).sum() == side
        back = grow_class(grown, "lapa", "skin", -pixels)
        assert (back[10] == 1).sum() == 11 and set(np.unique(back)) == {0, 1}
    assert not grow_class(field, "lapa", "skin", -6).any() and np.array_equal(grow_class(field, "lapa", "skin", 0), field) and np.array_equal(grow_class(field, "lapa", "hair", 2), field)


def test_a_class_grows_only_over_what_it_may():
    field = np.ones((9, 9), np.uint8)
    field[:, :3], field[4, 4] = 10, 2
    grown = grow_class(field, "lapa", "left_eyebrow", 3, over=["skin"])
    assert (grown[:, :3] == 10).all() and (grown == 2).sum() > 9
    shrunk = grow_class(grown, "lapa", "left_eyebrow", -9, over=["hair"])  # what it loses goes to hair
    assert not (shrunk == 2).any() and (shrunk == 10).sum() == 27 + (grown == 2).sum()
    with pytest.raises(InputError):
        grow_class(field, "lapa", "beard", 1)
