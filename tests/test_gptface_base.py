"The shipped GPTFace and its parser: what they know of people whom they have not seen, and that rivals see as many pairs."

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from facelab.data.attributes import ATTRIBUTES
from facelab.data.world import people_of, world_items
from facelab.gptface.decode import Decoding, match_probability
from facelab.gptface.edit import FaceEditor
from facelab.gptface.parser_base import covered_faces, covered_pixels, parser_rows
from facelab.gptface.pretraining_stages import pairs_of, rival_steps
from facelab.gptface.tokens import join, text_ids
from facelab.lab.paths import bases_dir
from facelab.nets.parser import UNetParser

HERE = (bases_dir() / "gptface" / "model.safetensors").is_file()
needs_base = pytest.mark.skipif(not HERE, reason="the GPTFace base is not here: dvc pull bases/gptface/model.safetensors.dvc")


@pytest.fixture(scope="module")
def base():
    return FaceEditor.from_pretrained("base")


@pytest.fixture(scope="module")
def people():
    "One photo each of people of the base's world whom it has not seen, looking ahead."
    return [item for item in world_items(51, people_of("test", 200), 1, 64) if abs(item.pose[0]) < 0.5]


@needs_base
def test_base_tells_men_from_women(base, people):
    codes = base.vqgan.token_ids(torch.from_numpy(np.stack([item.image for item in people])).permute(0, 3, 1, 2))

    def p(text):
        ids = text_ids(base.vocab, base.layout, [text]).ids.expand(len(codes), -1)
        with torch.no_grad():
            return match_probability(base.model, join(base.layout, codes, ids, trim=True)).numpy()

    men = np.array([item.attributes[ATTRIBUTES.index("Male")] > 0 for item in people])
    assert len(men) > 150 and 40 < men.sum() < len(men) - 40
    assert ((p("a photo of a man.") > p("a photo of a woman.")) == men).mean() > 0.75


@needs_base
def test_base_fills_eyes_better_than_the_colour_around_them(base, people):
    images = [item.image for item in people[:24]]
    band = np.zeros((64, 64), bool)
    band[24:40, 16:48] = True
    made = base.edit_all(images, [band] * len(images), None, "whole", decoding=Decoding(temperature=0.5)).items
    gap = np.array([np.abs(edit.image[band].astype(float) - image[band]).mean() for edit, image in zip(made, images)])
    flat = np.array([np.abs(image[~band].mean(0) - image[band].astype(float)).mean() for image in images])
    around = np.zeros_like(band)
    around[20:44, 12:52] = True
    around &= ~band
    near = np.array([np.abs(image[around].mean(0) - image[band].astype(float)).mean() for image in images])
    assert gap.mean() < 0.8 * near.mean() < flat.mean()
    assert np.mean([edit.valid for edit in made]) > 0.95  # the border of the ledger


@pytest.mark.parametrize(("lessons", "seen"), [("0.1, 0.75", 800), ("0, 0.35, 0.5", 1080)])
def test_rivals_see_as_many_pairs(lessons, seen):
    job = SimpleNamespace(recipe="small", lessons=lessons, steps=100, batch=8, rival_batch=40)
    assert pairs_of(job) == seen and rival_steps(job) == seen / 40
    assert pairs_of(SimpleNamespace(**vars(job) | {"recipe": "paper"})) == 800


# ---- the parser that ships ----------------------------------------------------------------------------------------------------------------------


PARSER = (bases_dir() / "parser" / "model.safetensors").is_file()
needs_parser = pytest.mark.skipif(not PARSER, reason="the parser base is not here: dvc pull bases/parser/model.safetensors.dvc")


@pytest.fixture(scope="module")
def covered():
    "People of the parser's world whom it has not seen: one photo with something before the face, one without."
    return covered_faces(71, people_of("test", 12), 1, 64)


@needs_parser
def test_parser_base_finds_what_covers_a_face(covered):
    parser = UNetParser.from_base()
    found = {(row.metric, row.data): row.value for row in parser_rows(parser, covered)}
    assert found["covered pixels found", "mask in front"] > 90 and found["covered pixels found", "anything in front"] > 50 > 15 > found["taken for covered", "free faces"]
    assert found["F1, skin", "held-out people of its world"] > 80 and found["F1, hair", "held-out people of its world"] > 75


@needs_base
@needs_parser
def test_editor_uncovers_a_face_and_says_where_nothing_is(base, covered):
    "The shipped editor as it comes, on pictures framed as they are."
    at = [k for k, kind in enumerate(covered.covers) if kind == "mask"][:2]
    free = next(k for k, kind in enumerate(covered.covers) if kind == "")
    images = [covered.images[k].permute(1, 2, 0).numpy() for k in (*at, free)]
    made = base.remove_occlusion_all(images, face="whole")
    assert len(at) and [item is None for item in made.items] == [False] * len(at) + [True] and "nothing in front" in made.skipped.report(3)
    for k, item in zip(at, made.items):
        true = covered_pixels(covered.labels[k].numpy(), covered.landmarks[k])
        assert (item.mask & true).sum() > 0.9 * true.sum() and item.found == "occlusion" and not np.array_equal(item.image, images[0])
    hair = base.prepare(images[-1], "hair", "a man", "whole")
    assert hair.found == "parts" and hair.notes == ()


@needs_base
def test_tags_of_the_base_tell_something(base, people):
    tags = base.tag(people[0].image, 30, face="whole")
    assert len(set(tags)) == 30 and not set(tags) & {"the", "and", "is", "with", "photo", "tags", "a", "of"}
