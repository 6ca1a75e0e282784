"The identity recipe on a folder in CelebA's layout, as its authors ship it: trained, written, found by its name; nobody of the other splits is seen."

import json

import numpy as np
import pytest
import torch
import yaml

from facelab.data.embedded import Recipe, write_embedded
from facelab.data.celeba import read_celeba
from facelab.lab import base as bases
from facelab.lab.errors import AssetError, InputError, Skipped
from facelab.lab.files import file_sha256, read_yaml
from facelab.lab.paths import root
from facelab.nets.embedder import embedder_inputs, trained_embedder
from facelab.nets.iresnet import IRESNETS, IResNetConfig
from facelab.tasks import identity_base
from facelab.tasks.identity_base import make_from_photos, photo_crops, whole_people
from facelab.tasks.identity_training import IdentityConfig

RECIPE = read_yaml(root() / "bases" / "identity-celeba" / "paper.yaml")
SMALL = {"threads": 1, "people": 3, "val_people": 4, "net": "tiny56", "epochs": 1, "batch": 4}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    place = tmp_path_factory.mktemp("photos")
    write_embedded(place / "data", Recipe(train=4, val=4, test=1, photos=3, size=40, supersample=1), workers=1)
    celeba = place / "assets" / "celeba"
    for folder, stems in (("Anno", ("list_attr_celeba", "list_landmarks_align_celeba", "list_landmarks_celeba", "list_bbox_celeba", "identity_CelebA")), ("Eval", ("list_eval_partition",))):
        (celeba / folder).mkdir(parents=True)
        for stem in stems:
            (place / "data" / "celeba" / f"{stem}.txt").rename(celeba / folder / f"{stem}.txt")
    (celeba / "Img").mkdir()
    (place / "data" / "celeba" / "img_align_celeba").rename(celeba / "Img" / "img_align_celeba")
    return place


@pytest.fixture
def checkout(world, tmp_path, monkeypatch):
    "A checkout that holds this recipe alone, small."
    monkeypatch.setenv("FACELAB_ASSETS", str(world / "assets"))
    folder = tmp_path / "repo" / "bases" / "identity-celeba"
    folder.mkdir(parents=True)
    (tmp_path / "repo" / "nbs").mkdir()
    (tmp_path / "repo" / "settings.ini").touch()
    (folder / "paper.yaml").write_text(yaml.safe_dump(RECIPE | SMALL))
    monkeypatch.setenv("FACELAB_ROOT", str(tmp_path / "repo"))
    return folder


def test_the_recipe_is_arcfaces():
    assert RECIPE["data"] == "asset:celeba" and IRESNETS[RECIPE["net"]] == IResNetConfig() and (RECIPE["margin"], RECIPE["scale"]) == (0.5, 64.0)
    assert RECIPE["run"] == "facelab.tasks.identity_base:make_from_photos" and not (root() / "bases" / "identity-celeba" / "mini.yaml").exists(), "make bases leaves it out"


def test_trained_written_and_found_by_its_name(checkout, monkeypatch):
    with pytest.raises(InputError, match="on purpose|decision"):
        bases.make_base("identity-celeba", "paper")
    with pytest.raises(InputError, match="folder of bases"):
        trained_embedder("identity-celeba")
    monkeypatch.setenv("FACELAB_BASES", "1")
    bases.make_base("identity-celeba", "paper")
    record = json.loads((checkout / "record.json").read_text())
    assert (record["profile"], record["status"]) == ("paper", "full") and record["values"]["data"] == "asset:celeba"
    assert record["trained_on"].startswith("3 people of asset:celeba (split train), 9 photos, 0 rows or photos left out") and "5 people" in record["never_seen"]
    assert {row["method"] for row in record["rows"]} >= {"base", "untrained", "raw pixels"} and all(row["data"] == "validation people of asset:celeba" for row in record["rows"])
    embedder = trained_embedder("identity-celeba")
    assert embedder.name == "identity-celeba" and embedder.embed(torch.rand(2, 3, 56, 56)).shape == (2, 128)
    assert embedder_inputs("identity-celeba") == {"bases/identity-celeba": file_sha256(checkout / "model.safetensors")}


def test_nobody_of_another_split_is_trained_on(checkout, world, monkeypatch):
    "A list that puts a test person's photo among the training photos."
    seen, path = [], world / "assets" / "celeba" / "Eval" / "list_eval_partition.txt"
    whole = path.read_text()
    data = read_celeba(world / "assets" / "celeba")
    name = data.names[int(np.flatnonzero(data.partition == 2)[0])]
    path.write_text(whole.replace(f"{name} 2", f"{name} 0"))
    try:
        monkeypatch.setattr(identity_base, "photo_crops", lambda part, *_: seen.append(set(part.identity.tolist())) or photo_crops(part, IdentityConfig()))
        make_from_photos({key: value for key, value in (RECIPE | SMALL | {"people": 0}).items() if key not in ("run", "cost")})
    finally:
        path.write_text(whole)
    apart = set(data.identity[data.partition > 0].tolist())
    assert len(seen[0]) == 4 and not seen[0] & apart and seen[1] <= apart


def test_a_photo_that_cannot_be_read_is_left_out(world):
    data = whole_people(read_celeba(world / "assets" / "celeba").split("train"))
    whole = photo_crops(data, IdentityConfig(), batch=5)
    picture = data.images / data.names[1]
    kept = picture.read_bytes()
    picture.write_bytes(kept[:200])
    try:
        with pytest.raises(InputError):
            photo_crops(data, IdentityConfig())
        skipped = Skipped()
        rest = photo_crops(data, IdentityConfig(), skipped, batch=5)
    finally:
        picture.write_bytes(kept)
    assert len(skipped) == 1 and data.names[1] in skipped.items[0][0]
    assert torch.equal(rest.images, torch.cat([whole.images[:1], whole.images[2:]])) and rest.people.tolist() == [0, 0, *whole.people[3:].tolist()]


def test_without_the_folder_the_error_says_where_it_is_from(checkout, monkeypatch, tmp_path):
    monkeypatch.setenv("FACELAB_ASSETS", str(tmp_path / "none"))
    with pytest.raises(AssetError, match="mmlab"):
        make_from_photos(RECIPE | SMALL)
