"GPTFace's tokens and transformer: BERT's tokenisation, the paper's layout and parameter counts, a readable twin, files."

import json
import math
import os
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from facelab.gptface.model import GluBlock, GPTFace, GPTFaceConfig, build_gptface, count_parameters, load_gptface, own_view, put_weights, replace_weights, rows_of, save_gptface
from facelab.gptface.tokens import SPECIALS, TokenLayout, Vocabulary, codes_of, join, learn_pieces, tag_template, tags_in, text_ids
from facelab.lab.errors import AssetError, InputError, ShapeError

TEXTS = ["A man with black hair, smiling.", "Two women: one in a Café", "tags: man, hair, hat", "3 Ways to the naïve über-smile!", "the end"]
LAYOUT = TokenLayout(words=20, codes=12, rows=3, cols=4, text=5, pad=0, unk=1, cls=2, sep=3, mask=4)


def small(**changes):
    return build_gptface(GPTFaceConfig(LAYOUT, **({"layers": 2, "width": 16, "heads": 2, "ffn_dim": 24} | changes))).eval()


def batch(b=3, seed=0):
    g = torch.Generator().manual_seed(seed)
    codes = torch.randint(12, (b, 3, 4), generator=g)
    text = torch.randint(5, 20, (b, 5), generator=g)
    text[0, 3:] = 0
    return codes, text


def paper_vocabulary():
    "30,522 pieces with BERT's special ids and the words of a template; the rest are fillers."
    words = ["tags", ":", ",", *(f"tag{chr(97 + k // 26)}{chr(97 + k % 26)}" for k in range(30))]
    pieces = [f"[unused{k}]" for k in range(30522)]
    for place, name in zip((0, 100, 101, 102, 103), SPECIALS):
        pieces[place] = name
    pieces[1000 : 1000 + len(words)] = words
    return Vocabulary(pieces)


# ---- tokens -----------------------------------------------------------------------------------------------------------------------------------


def test_the_papers_layout():
    vocab = paper_vocabulary()
    layout = vocab.layout(8192, 21, 21)
    assert layout == TokenLayout() and (layout.positions, layout.ids, layout.tokens) == (507, 38714, 441)
    template = tag_template(vocab, layout)
    assert int(template.ne(layout.pad).sum()) == 61 and int(template.eq(layout.mask).sum()) == 30
    seq = join(layout, torch.full((1, 21, 21), 8191), template[None])
    assert seq.ids.shape == (1, 507) and int(seq.ids.max()) == 38713 and int(seq.attend.sum()) == 504
    filled = template.clone()
    filled[template.eq(layout.mask)] = torch.arange(1003, 1033)
    assert tags_in(vocab, filled, template, layout) == list(vocab.pieces[1003:1033])
    with pytest.raises(InputError, match="32 tags, 65 pieces"):
        tag_template(vocab, layout, 32)


def test_tokenisation_is_berts(tmp_path):
    transformers = pytest.importorskip("transformers")
    vocab = Vocabulary.learn(TEXTS, 120)
    vocab.write(tmp_path)
    bert = transformers.BertTokenizer(str(tmp_path / "vocab.txt"), do_lower_case=True)
    for text in [*TEXTS, "Unseen zebra Ω 人 hats", "", "  spaced\tout\n", "SHOUTING, hair-hat"]:
        assert vocab.encode(text) == bert.encode(text, add_special_tokens=False), text
    assert vocab.encode("[MASK] [CLS]") != bert.encode("[MASK] [CLS]", add_special_tokens=False)  # special tokens in a caption are text
    bert.save_pretrained(tmp_path / "folder")
    assert Vocabulary.read(tmp_path / "folder").pieces == vocab.pieces == Vocabulary.read(tmp_path / "folder" / "tokenizer.json").pieces


def test_a_learned_vocabulary_is_the_same_in_each_process():
    code = f"from facelab.gptface.tokens import learn_pieces; print(learn_pieces({TEXTS!r}, 90))"
    said = subprocess.run([sys.executable, "-c", code], env=os.environ | {"PYTHONHASHSEED": "7"}, capture_output=True, text=True, check=True).stdout
    assert said.strip() == repr(learn_pieces(TEXTS, 90))


def test_text_over_the_limit():
    vocab = Vocabulary.learn(TEXTS, 120)
    layout = vocab.layout(12, 3, 4, 64)
    fits, long = " ".join(["hair"] * 64), " ".join(["hair"] * 65)
    assert text_ids(vocab, layout, [fits]).cut == 0
    with pytest.raises(InputError, match="65 pieces; needed 64 or fewer"):
        text_ids(vocab, layout, ["man", long])
    cut = text_ids(vocab, layout, ["man", long], "cut")
    assert cut.cut == 1 and torch.equal(cut.ids[1], text_ids(vocab, layout, [fits]).ids[0])


@pytest.mark.parametrize(("name", "content", "kind"), [
    ("vocab.txt", "", InputError), ("vocab.txt", "[PAD]\n[UNK]\na\n", InputError), ("vocab.txt", "\n".join([*SPECIALS, "a", "a"]), InputError), ("vocab.txt", b"\xff\xfe\x00\x01", InputError),
    ("tokenizer.json", '{"model": {"type": "BPE", "vocab": {"a": 0}}}', InputError), ("tokenizer.json", '{"model": {"type": "WordPiece", "vocab": {"a": 5}}}', InputError), ("tokenizer.json", "[1", InputError),
    ("other.txt", "x", AssetError),
])  # fmt: skip
def test_broken_vocabularies(tmp_path, name, content, kind):
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(kind):
        Vocabulary.read(tmp_path)


def test_a_cased_vocabulary_is_refused(tmp_path):
    Vocabulary.learn(TEXTS, 120).write(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"do_lower_case": False}))
    with pytest.raises(InputError, match="cased"):
        Vocabulary.read(tmp_path)


def test_codes_come_back_and_masks_do_not():
    codes, text = batch()
    seq = join(LAYOUT, codes.to(torch.int16), text)
    assert torch.equal(codes_of(LAYOUT, seq.ids), codes) and seq.ids.dtype == torch.long
    with pytest.raises(ShapeError):
        codes_of(LAYOUT, seq.ids.masked_fill(seq.ids.eq(seq.ids[0, 1]), LAYOUT.mask))
    big = TokenLayout(codes=8192)
    assert int(join(big, torch.full((1, 441), 8191, dtype=torch.int16)).ids.max()) == 38713  # 16-bit codes do not overflow


# ---- sizes ------------------------------------------------------------------------------------------------------------------------------------

TABLE = [  # facts 1.3: millions
    ({}, "transformer", 113.40), ({}, "total", 143.57), ({"transform": True}, "total", 144.16), ({"tied": False}, "total", 173.30),
    ({"ffn_dim": 1536}, "transformer", 70.90), ({"ffn_dim": 1536}, "total", 101.06), ({"ffn_dim": 1536, "tied": False}, "total", 130.79),
    ({"ffn_dim": 2048}, "transformer", 85.07), ({"ffn_dim": 2048}, "total", 115.23),
    ({"gate": "none"}, "transformer", 85.06), ({"gate": "none"}, "total", 115.22), ({"gate": "none", "tied": False}, "total", 144.95),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "part", "millions"), TABLE)
def test_parameter_table(changes, part, millions):
    assert round(count_parameters(GPTFaceConfig.paper(**changes))[part] / 1e6, 2) == millions


def test_gates_do_not_change_the_count_and_segments_add_three_rows():
    base = count_parameters(GPTFaceConfig())["total"]
    assert count_parameters(GPTFaceConfig(gate="gelu"))["total"] == base and count_parameters(GPTFaceConfig(segments=True))["total"] == base + 3 * 768


def test_a_plain_layer_is_as_large_as_berts():
    transformers = pytest.importorskip("transformers")
    with torch.device("meta"):
        bert, ours = transformers.BertModel(transformers.BertConfig()), GluBlock(768, 12, 3072, "none")
    assert sum(w.numel() for w in bert.encoder.layer[0].parameters()) == sum(w.numel() for w in ours.parameters())
    assert round(sum(w.numel() for w in bert.parameters()) / 1e6, 1) == 109.5


def test_mini_is_small():
    assert 1.5e6 < count_parameters(GPTFaceConfig.mini(TokenLayout(600, 256, 8, 8, 16, 0, 1, 2, 3, 4)))["total"] < 2.5e6


# ---- the network ------------------------------------------------------------------------------------------------------------------------------


def slow_block(block, x, see):
    "Eq. 1 and 2 with loops over samples, heads and positions."
    b, n, c = x.shape
    d = c // block.heads
    out = torch.empty_like(x)
    for s in range(b):
        h = block.attention_norm(x[s])
        q, k, v = block.query(h), block.key(h), block.value(h)
        mixed = torch.zeros(n, c, dtype=x.dtype)
        for head in range(block.heads):
            part = slice(head * d, (head + 1) * d)
            for i in range(n):
                scores = torch.stack([q[i, part] @ k[j, part] / math.sqrt(d) if see[s, j] else torch.tensor(-math.inf, dtype=x.dtype) for j in range(n)])
                p = scores.exp() / scores.exp().sum()
                mixed[i, part] = sum(p[j] * v[j, part] for j in range(n))
        y = x[s] + block.out(mixed)
        z = block.ffn_norm(y)
        gate = {torch.sigmoid: lambda t: 1 / (1 + (-t).exp()), F.gelu: F.gelu}[block.act]
        inner = gate(block.gate(z)) * block.up(z) if block.gate is not None else F.gelu(block.up(z))
        out[s] = y + block.down(inner)
    return out


@pytest.mark.parametrize("gate", ["sigmoid", "gelu", "none"])
def test_block_is_its_slow_twin(gate):
    torch.manual_seed(0)
    block, x = GluBlock(8, 2, 12, gate).double(), torch.randn(2, 5, 8, dtype=torch.double, requires_grad=True)
    see = torch.tensor([[True] * 5, [True, True, True, False, False]])
    fast, slow = block(x, see[:, None, None]), slow_block(block, x, see)
    assert torch.allclose(fast, slow, atol=1e-12)
    weights = [x, *block.parameters()]
    probe = torch.randn_like(fast)
    for a, b in zip(torch.autograd.grad((fast * probe).sum(), weights), torch.autograd.grad((slow * probe).sum(), weights)):
        assert torch.allclose(a, b, atol=1e-10)


def test_encoder_is_its_slow_twin():
    model = small(segments=True).double()
    seq = join(LAYOUT, *batch())
    kinds = torch.tensor([[1] * 14 + [2] * 5] * 3).masked_fill(~seq.attend, 0)
    x = model.tokens.weight[seq.ids] + model.places.weight[None] + model.kinds.weight[kinds]
    for block in model.blocks:
        x = slow_block(block, x, seq.attend)
    x = model.norm(x)
    found = model(*seq)
    assert torch.allclose(found.states, x, atol=1e-10) and torch.allclose(found.match, x[:, 0] @ model.match.weight.T + model.match.bias, atol=1e-10)
    assert torch.allclose(model.logits(found.states), x @ model.tokens.weight.T + model.bias, atol=1e-10)


@pytest.mark.parametrize("changes", [{}, {"segments": True}, {"tied": False}, {"transform": True}, {"gate": "gelu"}])
def test_fast_paths_change_nothing(changes):
    "Only some rows, no padding, a slice of the scores, one sample alone: all the same numbers."
    model, (codes, text) = small(**changes), batch()
    text[:, 4:] = 0
    full, short = join(LAYOUT, codes, text), join(LAYOUT, codes, text, trim=True)
    at = torch.tensor([[1, 7], [14, 3], [0, 12]])
    with torch.no_grad():
        whole, some = model(*full), model(*short, at=at)
        assert short.ids.shape[1] == full.ids.shape[1] - 1
        assert torch.allclose(rows_of(whole.states, at), some.states, atol=1e-5) and torch.allclose(whole.match, some.match, atol=1e-5)
        for part, span in (("words", slice(0, 20)), ("codes", slice(20, 32))):
            assert torch.allclose(model.logits(some.states, part), model.logits(some.states)[..., span], atol=1e-6)
        for k in range(3):
            assert torch.allclose(model(*full.rows(slice(k, k + 1))).states[0], whole.states[k], atol=1e-5)


def test_layers_gives_the_states_of_each_block():
    model, seq = small(layers=3), join(LAYOUT, *batch())
    with torch.no_grad():
        first, last = model.layers(*seq, [1, 3])
        assert torch.allclose(model.blocks[0](model.start(model.embed(seq.ids), seq.attend), seq.attend[:, None, None]), first, atol=1e-6)
        assert torch.allclose(model.norm(last), model(*seq).states, atol=1e-6)
    with pytest.raises(InputError):
        model.layers(*seq, [4])


def test_padding_is_not_seen():
    model, (codes, text) = small(), batch()
    seq = join(LAYOUT, codes, text)
    other = seq.ids.clone()
    other[~seq.attend] = 9
    with torch.no_grad():
        assert torch.equal(model(other, seq.attend).match, model(*seq).match)


def test_initial_weights_depend_on_the_seed_alone():
    state = torch.get_rng_state()
    one, two, other = build_gptface(GPTFaceConfig(LAYOUT, 1, 16, 2, 24), 3), build_gptface(GPTFaceConfig(LAYOUT, 1, 16, 2, 24), 3), build_gptface(GPTFaceConfig(LAYOUT, 1, 16, 2, 24), 4)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(one.tokens.weight, two.tokens.weight) and not torch.equal(one.tokens.weight, other.tokens.weight)


def test_scaled_init_does_not_depend_on_width():
    for width in (32, 64, 256):
        ours, berts = (build_gptface(GPTFaceConfig(LAYOUT, 1, width, 4, width, init=init)) for init in ("scaled", "bert"))
        assert 0.7 < ours.tokens.weight.norm(dim=1).mean() < 1.3 and abs(float(berts.tokens.weight.detach().std()) - 0.02) < 4e-3


# ---- files and configuration ------------------------------------------------------------------------------------------------------------------


def test_saved_and_loaded_are_equal(tmp_path):
    vocab = Vocabulary((*SPECIALS, *"abcdefghijklmno"))
    model = build_gptface(GPTFaceConfig(vocab.layout(12, 3, 4, 5), 2, 16, 2, 24, segments=True, transform=True, tied=False), 5).eval()
    save_gptface(tmp_path, model, vocab)
    again, words = load_gptface(tmp_path, model.config.layout)
    assert again.config == model.config and words.pieces == vocab.pieces and not again.training
    seq = join(model.config.layout, *batch())
    with torch.no_grad():
        assert torch.equal(again(*seq).states, model(*seq).states) and torch.equal(again.logits(again(*seq).states), model.logits(model(*seq).states))
    assert all(weight.requires_grad and weight.device.type == "cpu" for weight in again.parameters())
    first = (tmp_path / "model.safetensors").read_bytes()
    save_gptface(tmp_path, again, words)
    assert (tmp_path / "model.safetensors").read_bytes() == first


def test_files_that_do_not_fit(tmp_path):
    model = small()
    save_gptface(tmp_path, model)
    for name, value in (("codes", 64), ("rows", 8), ("words", 30)):
        with pytest.raises(InputError, match=f"trained with {name} = "):
            load_gptface(tmp_path, TokenLayout(**{**vars(LAYOUT), name: value}))
    Vocabulary((*SPECIALS, "a")).write(tmp_path)
    with pytest.raises(InputError, match="6 pieces"):
        load_gptface(tmp_path)
    with pytest.raises(InputError, match="missing|shape"):
        put_weights(model, {name: weight for name, weight in model.state_dict().items() if name != "match.bias"}, "file")
    blob = (tmp_path / "model.safetensors").read_bytes()
    for damaged in (b"", blob[: len(blob) // 2], blob.replace(b"layers", b"lavers", 1), blob.replace(b"config", b"gonfig", 1)):
        (tmp_path / "model.safetensors").write_bytes(damaged)
        with pytest.raises(InputError):
            load_gptface(tmp_path)
    with pytest.raises(InputError):
        load_gptface(tmp_path / "none")


@pytest.mark.parametrize("values", [{"depth": 3}, {"gate": "relu"}, {"width": 100, "heads": 12}, {"layers": 0}, {"init": "he"}, {"layout": {"grid": 3}}, {"dropout": 1.0}])
def test_bad_configurations(values):
    with pytest.raises(InputError):
        GPTFaceConfig.of(values)
    assert GPTFaceConfig.of(GPTFaceConfig.mini(LAYOUT).plain()) == GPTFaceConfig.mini(LAYOUT)


def test_a_view_shares_memory_and_nothing_else():
    model = small().train()
    view = own_view(model, ["norm.weight"])
    assert all(a.data_ptr() == b.data_ptr() and a is not b for a, b in zip(view.parameters(), model.parameters()))
    assert [name for name, weight in view.named_parameters() if weight.requires_grad] == ["norm.weight"] and model.training and not view.training
    before = model.blocks[0].up.weight.clone()
    replace_weights(view, {"blocks.0.up.weight": before + 1, "bias": model.bias + 1})
    assert torch.equal(model.blocks[0].up.weight, before) and all(weight.requires_grad for weight in model.parameters()) and isinstance(model, nn.Module) and isinstance(view, GPTFace)
