"Personal heads on Next3D: what the page does not show."

import numpy as np
import pytest
import torch
from facelab.data.views import label_of, orbit_view
from facelab.face.morphable import MorphableModel
from facelab.lab.arrays import write_safetensors
from facelab.lab.errors import InputError
from facelab.my3dgen.adapter import Adapter, AdapterConfig, changes_of, merged
from facelab.my3dgen.personalize import PersonalPrior
from facelab.nets.eg3d import Generator
from facelab.my3dgen.distillation import FACE64_EG3D
from facelab.synthforge.next3d_distillation import FACE64_NEXT3D, start_next3d
from facelab.together.personal_head import MOVED_PLACES, PersonalHead, head_meshes

MODEL = MorphableModel.procedural()
CAM = torch.from_numpy(label_of(orbit_view()))[None]


@pytest.fixture(scope="module")
def net():
    return start_next3d(FACE64_NEXT3D, MODEL).eval().requires_grad_(False)


def somebody(net, seed):
    "An adapter that does something, and a style."
    random = torch.Generator().manual_seed(seed)
    adapter = Adapter(net, AdapterConfig(places=MOVED_PLACES), random)
    for value in adapter.parameters():
        value.data += 0.2 * torch.randn(value.shape, generator=random)
    with torch.no_grad():
        style = net.mapping(torch.randn(1, net.config.backbone.z_dim, generator=random))
    return adapter.requires_grad_(False), style


def test_two_people_in_a_batch_are_each_themselves(net):
    people = [somebody(net, seed) for seed in (1, 2)]
    exp = torch.zeros(2, 64)
    exp[1, 3] = 2.0
    meshes, styles = head_meshes(net, MODEL, torch.zeros(2, 80), exp), torch.cat([style for _, style in people])
    with torch.no_grad():
        both = net.synthesis(styles, CAM.expand(2, -1), meshes, changes=changes_of([adapter for adapter, _ in people], net)).image
        for k, (adapter, style) in enumerate(people):
            alone = net.synthesis(style, CAM, meshes.pick(slice(k, k + 1)), changes=adapter.changes(net)).image
            assert (alone - both[k : k + 1]).abs().max() < 1e-4
        other = net.synthesis(styles[:1], CAM, meshes.pick(slice(1)), changes=people[1][0].changes(net)).image
    assert (other - both[:1]).abs().max() > 0.01


def test_merged_is_the_same_head_and_comes_out_exactly(net):
    adapter, style = somebody(net, 3)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    mesh = head_meshes(net, MODEL, torch.zeros(1, 80), torch.zeros(1, 64))
    with torch.no_grad():
        beside = net.synthesis(style, CAM, mesh, changes=adapter.changes(net)).image
        with merged(net, adapter):
            inside = net.synthesis(style, CAM, mesh).image
    assert (beside - inside).abs().max() < 1e-4
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_one_style_and_many_expressions(net):
    adapter, style = somebody(net, 4)
    head = PersonalHead(PersonalPrior(net, adapter, style, CAM), torch.zeros(80), MODEL)
    exp = torch.zeros(3, 64)
    exp[1, 0], exp[2, 0] = 2.0, -2.0
    drawn = head.animate(exp, CAM).image
    one = head.animate(exp[1:2], CAM).image
    assert (one - drawn[1:2]).abs().max() < 1e-4 and (drawn[1] - drawn[2]).abs().max() > 1e-3


def test_refused(net, tmp_path):
    still = Generator(FACE64_EG3D)
    adapter = Adapter(still, AdapterConfig())
    styles = torch.zeros(1, still.num_ws, FACE64_EG3D.backbone.w_dim)
    with pytest.raises(InputError, match="needed a Next3D"):
        PersonalHead(PersonalPrior(still, adapter, styles, CAM), torch.zeros(80), MODEL)
    adapter, style = somebody(net, 5)
    head = PersonalHead(PersonalPrior(net, adapter, style, CAM), torch.zeros(80), MODEL)
    folder = head.save(tmp_path / "me")
    write_safetensors(folder / "head.safetensors", {"shape": torch.zeros(7)})
    with pytest.raises(InputError, match=r"shape \(80,\)"):
        PersonalHead.load(folder, net, MODEL)
    with pytest.raises(InputError):
        head.animate(torch.full((1, 64), float(np.nan)), CAM)
