"Personal heads on Next3D: what the page does not show."

import copy

import numpy as np
import pytest
import torch
from facelab.data.views import label_of, orbit_view
from facelab.face.morphable import MorphableModel
from facelab.gptface.edit import FaceEditor
from facelab.gptface.model import GPTFaceConfig, build_gptface
from facelab.gptface.tokens import Vocabulary
from facelab.lab.arrays import write_safetensors
from facelab.lab.errors import InputError, ShapeError
from facelab.my3dgen.adapter import Adapter, AdapterConfig, changes_of, merged
from facelab.my3dgen.personalize import PersonalPrior
from facelab.nets.codec import VQGANConfig
from facelab.nets.eg3d import Generator
from facelab.nets.hourglass import HourglassConfig
from facelab.nets.landmarks import LandmarkDetector
from facelab.nets.parser import FaceParser
from facelab.nets.vqgan import VQGAN
from facelab.my3dgen.distillation import FACE64_EG3D
from facelab.synthforge.model import BackboneConfig, FineTuned, LabelConfig, SyntheticBackbone
from facelab.synthforge.next3d_distillation import FACE64_NEXT3D, start_next3d
from facelab.synthforge.predictor import Predictor
from facelab.synthforge.use import TrainedParser
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


def test_a_copy_takes_no_changes_of_the_original_and_no_broken_styles(net):
    (adapter, style), twin = somebody(net, 4), copy.deepcopy(net)
    mesh, broken = head_meshes(net, MODEL, torch.zeros(1, 80), torch.zeros(1, 64)), style.clone()
    broken[0, -1, 0] = torch.nan  # of the texture
    with pytest.raises(ShapeError, match="not this network's"):
        twin.synthesis(style, CAM, mesh, changes=adapter.changes(net))
    with pytest.raises(ShapeError, match="finite"):
        net.planes(broken, mesh)


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


@pytest.fixture
def parser():
    "SynthForge's parser with a network that calls what is bright one part, all else skin."
    tiny = BackboneConfig(32, 4, 2, 20, HourglassConfig(cin=4, halvings=1, channels=8, levels=2, grid="centres"))
    made = TrainedParser(FineTuned(SyntheticBackbone(tiny), LabelConfig(("seg", "kps"), 19, True, width=2)).eval(), "celebamask_farl")
    made.bright = "hair"

    def ask(images):
        scores = torch.zeros(len(images), 19, 32, 32)
        scores[:, made.classes.index(made.bright)] = 2.0 * (images.mean(1) > 0)
        scores[:, made.classes.index("skin")] += 1
        return made.net(images)._replace(seg=scores)

    made.predictor.ask = ask
    return made


def test_gptfaces_editor_takes_synthforges_parser(parser):
    "By its protocol: a region by name lies where the parser saw it, cut as the parser wants it; what it calls background inside a face is taken away."
    assert all(isinstance(parser, kind) for kind in (FaceParser, LandmarkDetector, Predictor))
    words = Vocabulary.learn(["a man with black hair"], 60)
    torch.manual_seed(0)
    codec = VQGAN(VQGANConfig(ch=8, ch_mult=(1, 2, 2), num_res_blocks=1, attn_resolutions=(), resolution=32, z_channels=8, embed_dim=8, n_embed=24, groups=4)).eval()
    editor = FaceEditor(codec, build_gptface(GPTFaceConfig(words.layout(24, 8, 8, 12), 2, 16, 2, 24)), words, parser=parser)
    assert editor.parser is parser
    angle = np.linspace(0, np.pi, 17)
    points = np.concatenate([np.stack([95 - 40 * np.cos(angle), 70 + 45 * np.sin(angle)], 1), np.stack([np.linspace(60, 130, 51), np.full(51, 60.0)], 1)]).astype(np.float32)
    photo, patch = np.full((150, 190, 3), 60, np.uint8), np.zeros((150, 190), bool)
    patch[80:104, 80:110] = True
    photo[patch] = 220
    done = editor.edit(photo, "hair", "black hair", points, seed=1)
    assert done.found == "parts" and (done.mask & patch).sum() > 0.95 * patch.sum() and done.mask.sum() < 2.2 * patch.sum()
    assert np.array_equal(done.image[~done.mask], photo[~done.mask])
    parser.bright = "background"
    free = editor.remove_occlusion(photo, face=points, seed=1)
    assert free.found == "occlusion" and (free.mask & patch).sum() > 0.9 * patch.sum() and free.mask.sum() < 2.2 * patch.sum()
    parser.bright = "skin"
    with pytest.raises(InputError, match="nothing in front"):
        editor.remove_occlusion(photo, face=points)
