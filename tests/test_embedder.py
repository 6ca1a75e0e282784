"The embedders keep one protocol: unit vectors, the same in any batch, differentiable to the image, and clear refusals."

import json
import zlib

import numpy as np
import pytest
import torch
from fixture_files import fixture
from torch.nn import functional as F

from facelab.lab.base import Base, save_base
from facelab.lab.errors import InputError, ShapeError
from facelab.nets.embedder import ArcFaceEmbedder, BaseEmbedder, FaceEmbedder, PixelEmbedder, crop_faces, embed_all, embed_faces, fit_crop, perceptual_loss, untrained_embedder
from facelab.nets.iresnet import IRESNETS, IResNet, IResNetConfig

SMALL = IResNetConfig((1, 1, 1, 1), (8, 8, 16, 16), 56, 24)


def members():
    torch.manual_seed(0)
    return [PixelEmbedder(), untrained_embedder(SMALL), ArcFaceEmbedder(IResNet(IResNetConfig((1, 1, 1, 1), (8, 8, 16, 16), 112, 32)))]


@pytest.mark.parametrize("face", members(), ids=lambda e: e.name)
def test_protocol(face):
    crops = torch.rand(4, 3, 112, 112)
    vectors = face.embed(crops)
    assert isinstance(face, FaceEmbedder) and vectors.shape[0] == 4 and face.size > 0 and face.zoom == 1.0
    assert torch.allclose(vectors.norm(dim=1), torch.ones(4), atol=1e-5)
    assert torch.allclose(face.embed(crops[2:3]), vectors[2:3], atol=1e-5)
    assert torch.allclose(face.embed(crops.flip(0)).flip(0), vectors, atol=1e-5)
    crops.requires_grad_()
    perceptual_loss(face, crops[:2], crops[2:].detach()).sum().backward()
    assert float(crops.grad[:2].abs().max()) > 0 and float(crops.grad[2:].abs().max()) == 0
    assert torch.allclose(perceptual_loss(face, crops, crops), torch.zeros(4), atol=1e-5)
    for bad in (torch.rand(1, 3, 40, 48), torch.rand(1, 1, 56, 56), 255 * torch.rand(1, 3, 56, 56)):
        with pytest.raises((ShapeError, Exception)) as caught:
            face.embed(bad)
        assert "aligned faces" in str(caught.value) or "expected" in str(caught.value).lower()


def test_an_embedder_stays_frozen():
    face = untrained_embedder(SMALL)
    face.train()
    assert not any(module.training for module in face.modules()) and not any(p.requires_grad for p in face.parameters())


def test_official_weights_load_from_a_file(tmp_path):
    "The fixture's weights, written as insightface writes them, read back, against its embeddings."
    meta = json.loads(fixture("arcface/meta.json").read_text())
    numbers = np.load(fixture("arcface/io.npz"))
    state = IResNet(IRESNETS["r50"]).state_dict()
    for key, entry in meta["keys"].items():
        if not entry.get("keep"):
            draw = np.random.RandomState((zlib.crc32(key.encode()) ^ meta["seed"]) & 0xFFFFFFFF).standard_normal(entry["shape"]).astype("float32")
            state[key] = torch.from_numpy(np.asarray(np.float32(entry["a"]) + np.float32(entry["b"]) * (np.abs(draw) if entry.get("abs") else draw)))
    torch.save(state, tmp_path / "backbone.pth")
    face = ArcFaceEmbedder.from_file(tmp_path / "backbone.pth")
    with torch.no_grad():
        found = face.embed((torch.from_numpy(numbers["x"]) + 1) / 2)
    assert np.abs(found.numpy() - numbers["emb_norm"]).max() < 1e-4


def test_bad_checkpoints(tmp_path):
    good = IResNet(SMALL).state_dict()
    cases = {
        "missing": {k: v for k, v in good.items() if k != "layer2.0.bn1.weight"},
        "shape": good | {"layer2.0.bn1.weight": torch.zeros(3)},
        "unknown": good | {"head.weight": torch.zeros(3)},
        "other": {"weight": torch.zeros(3)},
        "nan": good | {"fc.bias": torch.full_like(good["fc.bias"], float("nan"))},
    }
    for name, state in cases.items():
        torch.save(state, tmp_path / f"{name}.pth")
        with pytest.raises(InputError):
            ArcFaceEmbedder.from_file(tmp_path / f"{name}.pth")
    (tmp_path / "empty.pth").write_bytes(b"")
    (tmp_path / "text.pth").write_text("not weights")
    for name in ("empty", "text", "absent"):
        with pytest.raises(InputError):
            ArcFaceEmbedder.from_file(tmp_path / f"{name}.pth")


@pytest.mark.parametrize("change", [{"zoom": "x"}, {"zoom": float("nan")}, {"zoom": 0}, {"zoom": None}, {"zoom": [1]}, {"widths": 3}, {"size": "x"}, {"blocks": "ab"}])
def test_a_config_of_other_things_is_one_error(change):
    face = untrained_embedder()
    with pytest.raises(InputError, match="base toy|IResNetConfig"):
        BaseEmbedder.from_parts(face.net.state_dict(), face.config() | change, "toy")


def test_a_base_comes_back_from_its_folder(tmp_path):
    face = untrained_embedder(SMALL, seed=5, zoom=0.8)
    base = Base(face.net.state_dict(), face.config(), [], "nothing", "everybody")
    save_base(base, tmp_path / "identity", "smoke", {}, {})
    again = BaseEmbedder.from_base("identity", tmp_path)
    crops = torch.rand(3, 3, 56, 56)
    assert again.zoom == 0.8 and again.size == 56
    assert (again.embed(crops) * face.embed(crops)).sum(1).min() > 0.999  # half precision on disk
    with pytest.raises(InputError):
        BaseEmbedder.from_base("identity", tmp_path / "elsewhere")
    with pytest.raises(InputError):
        BaseEmbedder.from_parts(face.net.state_dict(), face.config() | {"widths": [4, 4, 4, 4]})


def test_untrained_is_a_function_of_its_seed():
    crops = torch.rand(6, 3, 64, 64)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = untrained_embedder(SMALL, seed=3, crops=crops).embed(crops)
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(99)
    assert torch.equal(first, untrained_embedder(SMALL, seed=3, crops=crops).embed(crops))
    assert not torch.equal(first, untrained_embedder(SMALL, seed=4, crops=crops).embed(crops))


def test_alignment_removes_turn_scale_and_shift():
    torch.manual_seed(0)
    picture = F.interpolate(torch.rand(1, 3, 12, 12), 200, mode="bicubic").clamp(0, 1)
    five = torch.tensor([[[80.0, 90], [120, 90], [100, 110], [85, 130], [115, 130]]])
    angle = torch.tensor(0.2)
    turn = torch.stack([torch.stack([angle.cos(), -angle.sin()]), torch.stack([angle.sin(), angle.cos()])]) / 0.9
    grid = F.affine_grid(torch.cat([turn, torch.tensor([[0.05], [-0.03]])], 1)[None], [1, 3, 200, 200], align_corners=False)
    moved = F.grid_sample(picture, grid, align_corners=False)
    points = ((2 * five / 200 - 1 - torch.tensor([0.05, -0.03])) @ torch.linalg.inv(turn).mT + 1) * 100
    one, two = crop_faces(picture, five, 64), crop_faces(moved, points, 64)
    assert (one - two).abs().mean() < 0.01
    pixels = PixelEmbedder()
    assert float((embed_faces(pixels, picture, five) * embed_faces(pixels, moved, points)).sum()) > 0.995


def test_many_photos_equal_one_by_one():
    images = (torch.rand(7, 3, 80, 80) * 255).to(torch.uint8)
    five = torch.tensor([[30.0, 35], [50, 35], [40, 45], [32, 55], [48, 55]]).expand(7, -1, -1)
    face = PixelEmbedder()
    together = embed_all(face, images, five, batch=3)
    alone = [embed_faces(face, image[None].float() / 255, five[:1])[0].numpy() for image in images]
    assert together.shape == (7, 1024) and np.allclose(together, alone, atol=1e-6)
    assert np.allclose(embed_all(face, images), face.embed(images.float() / 255).numpy(), atol=1e-6)


def test_shrinking_a_crop_averages():
    fine = (torch.arange(64) % 2).float().expand(1, 3, 64, 64)
    assert (fit_crop(fine, 16) - 0.5).abs().max() < 0.1
