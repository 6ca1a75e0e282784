"""GPTFace's pairs, rivals, heads and tags: slow twins, other forms of the same files, bad input."""

import csv
import socket
import tarfile
from itertools import permutations
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist

from facelab.data.celeba import write_celeba
from facelab.data.laion_face import PARTS_20M
from facelab.data.raf_db import write_raf_db
from facelab.data.reading import subset_rows
from facelab.data.world import generate
from facelab.gptface import vqgan_folder
from facelab.gptface.few_shot import HeadTraining, answers_of, celeba_faces, head_scores, raf_faces, train_head, train_heads
from facelab.gptface.model import GPTFaceConfig, build_gptface, load_gptface
from facelab.gptface.objective import MilmItm
from facelab.gptface.pairs import captions_of, encoder_of, keywords, laion_stream, read_pairs, stream_parts, web_vocabulary, write_pairs
from facelab.gptface.pretrain import Pretraining, far_texts, pair_stream, pretrain
from facelab.gptface.pretraining_stages import once, prepare, rate_of, run_train
from facelab.gptface.rivals import RIVALS, Rival, RivalConfig, RivalData, contrast_loss, load_rival, save_rival, train_rival
from facelab.gptface.tagging import GRADED, UNRELATED, average_precision, ndcg, read_ratings, sheet_rows, write_sheets
from facelab.gptface.tokens import Vocabulary
from facelab.gptface.vqgan_base import open_vqgan
from facelab.lab.batches import Share
from facelab.lab.errors import AssetError, InputError, Skipped
from facelab.lab.ledger import Check
from facelab.lab.paths import root
from facelab.lab.profile import profile_values
from facelab.lab.run import Job
from facelab.nets.codec import VQGANConfig
from facelab.nets.vqgan import VQGAN, VQGANS


@pytest.fixture(scope="module")
def items():
    return generate([0, 1, 9], 2, 32, seed=7, workers=1)[0]


def test_ndcg_is_dcg_over_the_best_of_all_orders():
    rng = np.random.default_rng(0)
    for _ in range(20):
        marks = rng.integers(0, 3, 5).astype(float)
        k = int(rng.integers(1, 6))
        dcg = lambda row: sum((2 ** row[i] - 1) / np.log2(i + 2) for i in range(k))  # noqa: B023
        best = max(dcg(order) for order in permutations(marks))
        assert abs(ndcg(marks[None], k)[0] - (dcg(marks) / best if best else 0.0)) < 1e-12


def test_average_precision_is_the_mean_of_precisions():
    rng = np.random.default_rng(1)
    for _ in range(20):
        marks = rng.integers(0, 3, 8).astype(float)
        at = [i for i in range(8) if marks[i] >= 1]
        slow = np.mean([(marks[: i + 1] >= 1).mean() for i in at]) if at else 0.0
        assert abs(average_precision(marks[None])[0] - slow) < 1e-12


def test_published_sizes_of_shares():
    assert [len(subset_rows(162_770, share)) for share in (0.01, 0.1, 1.0)] == [1627, 16277, 162770]
    assert [len(subset_rows(12_271, share)) for share in (0.2, 0.5, 1.0)] == [2454, 6135, 12271]


def test_kaggles_csv_gives_the_same_faces(tmp_path, items):
    write_celeba(tmp_path / "txt", items), write_celeba(tmp_path / "csv", items)
    for name, head in (("list_attr_celeba", True), ("list_eval_partition", False), ("identity_CelebA", False)):
        path = tmp_path / "csv" / f"{name}.txt"
        lines = [line.split() for line in path.read_text().splitlines()]
        names = lines[1] if head else ["partition" if "partition" in name else "identity"]
        with open(path.with_suffix(".csv"), "w", newline="") as file:
            csv.writer(file).writerows([["image_id", *names], *(lines[2:] if head else lines)])
        path.unlink()
    for path in (tmp_path / "csv").glob("list_*landmarks*"):
        path.unlink()
    (tmp_path / "csv" / "list_bbox_celeba.txt").unlink()
    plain, kaggle = celeba_faces(tmp_path / "txt", 16), celeba_faces(tmp_path / "csv", 16)
    assert torch.equal(plain.train, kaggle.train) and torch.equal(plain.test_labels, kaggle.test_labels) and np.array_equal(plain.people, kaggle.people)


def test_broken_faces_are_left_out_and_counted(tmp_path, items):
    write_celeba(tmp_path / "celeba", items), write_raf_db(tmp_path / "raf", items)
    (tmp_path / "celeba" / "img_align_celeba" / "000001.jpg").write_bytes(b"")
    next((tmp_path / "raf").rglob("train_00002*")).write_bytes(b"no picture")
    skipped = Skipped()
    celeba, raf = celeba_faces(tmp_path / "celeba", 16, skipped), raf_faces(tmp_path / "raf", 16, skipped)
    assert len(skipped) == 2 and len(celeba.train) == 3 and len(raf.train) == 3 and len(celeba.test) == 2
    with pytest.raises(InputError):
        celeba_faces(tmp_path / "celeba", 16)


def test_pairs_survive_a_damaged_tar(tmp_path, items):
    write_pairs(tmp_path, items, 1.0)
    whole = read_pairs(tmp_path, 16)
    first = tmp_path / "split_00000" / "00000.tar"
    with tarfile.open(first) as tar:
        cut = tar.getmembers()[6].offset
    first.write_bytes(first.read_bytes()[:cut])
    skipped = Skipped()
    rest = read_pairs(tmp_path, 16, skipped)
    assert len(whole) == 12 and len(whole.images) == 6 and len(rest) == 8 and len(rest.images) == 6 and len(skipped) >= 1
    with pytest.raises(InputError):
        read_pairs(tmp_path, 16)


def test_keywords_hold_words_of_the_caption_alone():
    caption = "This is a young woman with long, wavy brown hair and a hat."
    for seed in range(5):
        words = keywords(caption, np.random.default_rng(seed), 3).removeprefix("tags: ").split(", ")
        assert len(words) == 3 and set(words) <= set("young woman long wavy brown hair hat".split())


def test_words_are_either_graded_or_unrelated():
    assert not set(GRADED) & set(UNRELATED) and len(set(UNRELATED)) == len(UNRELATED) and len(GRADED) + len(UNRELATED) >= 60


@pytest.mark.parametrize("method", RIVALS)
def test_a_seed_gives_a_rival(tmp_path, method):
    rng = torch.Generator().manual_seed(0)
    data = RivalData(torch.randint(0, 255, (8, 3, 16, 16), dtype=torch.uint8, generator=rng), torch.randint(0, 5, (8, 2, 2), generator=rng), torch.arange(8), torch.randint(1, 9, (8, 3), generator=rng), torch.arange(8) % 2)
    config = RivalConfig(method, 16, 8, 1, 16, 2, 16, classes=2, codes=5, words=9, text=3)
    one, two = (train_rival(config, data, 3, 4, seed=seed, threads=1, progress=False)[0] for seed in (4, 4))
    other = train_rival(config, data, 3, 4, seed=5, threads=1, progress=False)[0]
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), two.state_dict().values()))
    assert any(not torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values()))
    save_rival(one, tmp_path / "a.safetensors")
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), load_rival(tmp_path / "a.safetensors").state_dict().values()))


def test_a_file_that_is_no_rival(tmp_path):
    from facelab.lab.arrays import write_safetensors

    write_safetensors(tmp_path / "x.safetensors", {"a": torch.zeros(2)}, {})
    with pytest.raises(InputError, match="no rival"):
        load_rival(tmp_path / "x.safetensors")


def test_head_is_logistic_regression():
    rng = torch.Generator().manual_seed(0)
    features = torch.randn(200, 4, generator=rng)
    labels = (features @ torch.tensor([1.0, -2.0, 0.5, 0.0]) > 0.3).unsqueeze(1)
    head = train_head(features, labels, 1, HeadTraining(300, 200, 1e-1))
    weights = head.weight[0] / head.weight[0].norm()
    assert torch.cosine_similarity(weights, torch.tensor([1.0, -2.0, 0.5, 0.0]), dim=0) > 0.98
    classes = labels[:, 0].long() * 3
    assert head_scores(answers_of(train_head(features, classes, 7, HeadTraining(200, 200, 1e-1)), features, False), classes).balanced > 0.95


def test_heads_side_by_side_are_those_trained_alone():
    rng = torch.Generator().manual_seed(1)
    one, two, labels = torch.randn(50, 6, generator=rng), torch.randn(50, 3, generator=rng), torch.randint(7, (50,), generator=rng)
    both = train_heads({"one": one, "two": two}, labels, 7, HeadTraining(20, 16, 1e-2))
    assert all(torch.equal(both[name].weight, train_head(own, labels, 7, HeadTraining(20, 16, 1e-2)).weight) for name, own in (("one", one), ("two", two)))


@pytest.mark.parametrize("photos", [1, 4])
def test_mismatched_texts_are_of_another_person(photos):
    person = torch.arange(10).repeat_interleave(photos)
    text = torch.stack([person + 5, torch.arange(10 * photos) % 3], 1)  # photos of a person may differ in what is said
    found = far_texts(text)
    assert (person[found] != person).all() and torch.equal(found, far_texts(text))
    text[:, 0] = 5  # now many texts are equal: still another one
    assert (text[far_texts(text)] != text).any(1).all()


def test_rates_of_rivals():
    assert rate_of(0.002, "vit") == 0.002 and rate_of("vit 0.001, mae 2e-3", "mae") == 0.002
    for wrong in ("vit 0.001", "mae", "mae fast"):
        with pytest.raises(InputError, match="rival_rate"):
            rate_of(wrong, "mae")
    said = profile_values("gptface-train", "mini")["rival_rate"]
    assert all(rate_of(said, name) > 0 for name in RIVALS)


@pytest.mark.parametrize("sheet", ["rater,image,1,2\nann,a,0\n", "image,1\na,0\n", "rater,image,rank,mark\nann,a,1,0\nann,a,1,2\n", "rater,image,rank,mark\nann,a,2,1\n", ""])
def test_sheets_that_cannot_be_used(tmp_path, sheet):
    (tmp_path / "marks.csv").write_text(sheet)
    with pytest.raises(InputError):
        read_ratings(tmp_path / "marks.csv")


def test_profiles_train_all_methods_alike():
    for name in ("mini", "gpu"):
        values = profile_values("gptface-train", name)
        assert set(values["methods"].replace(" ", "").split(",")) == {"gptface", *RIVALS}
    paper = profile_values("gptface-train", "paper")
    assert (paper["steps"], paper["batch"], paper["layers"], paper["width"], paper["size"], paper["recipe"]) == (1_000_000, 192, 12, 768, 336, "paper")
    assert MilmItm().itm == 1.0


def test_claims_ask_for_rows_that_stages_write():
    import json

    page = (root() / "nbs" / "gptface" / "00_paper.ipynb").read_text()
    code = next("".join(cell["source"]) for cell in json.loads(page)["cells"] if cell["id"] == "claims")
    found: list[Check] = []
    scope = {}
    exec(code, scope)
    for claim in scope["claims"]:
        found += claim.checks
    own = [check for check in found if check.stage in scope["records"]]
    missing = [f"{check.stage}: {check.method}, {check.metric}" for check in own if check.row(scope["records"]) is None]
    assert len(found) > 8 and not missing


# ---- streams, and many processes ----------------------------------------------------------------------------------------------------------------


def clip_batch():
    rng = torch.Generator().manual_seed(3)
    text = torch.randint(1, 9, (8, 5), generator=rng)
    text[:, 3:] = 0
    text[2, 3], text[5] = 7, text[1]  # one is longer; two are equal, on different processes
    torch.manual_seed(0)
    return Rival(RivalConfig("clip", 16, 8, 1, 16, 2, 16, words=9, text=5)), torch.rand(8, 3, 16, 16, generator=rng), text


def contrast_of(net, images, text):
    loss = contrast_loss(net, images, text)
    return [loss.detach(), *torch.autograd.grad(loss, list(net.parameters()), allow_unused=True)]


def contrast_part(rank, world, port, folder):
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
    net, images, text = clip_batch()
    rows = slice(rank * 4, rank * 4 + 4)
    found = [torch.zeros_like(w) if g is None else g for w, g in zip([torch.zeros(()), *net.parameters()], contrast_of(net, images[rows], text[rows]))]
    for value in found:  # as the training loop averages
        dist.all_reduce(value)
        value /= world
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_captions_of_all_processes_are_negatives(tmp_path):
    "Two processes with half of the batch each: loss and gradients of the whole."
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(contrast_part, (2, port, str(tmp_path)), nprocs=2)
    net, images, text = clip_batch()
    whole, halves = contrast_of(net, images, text), contrast_of(net, images[:4], text[:4])
    for part in (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1)):
        assert all(torch.allclose(a, torch.zeros_like(a) if b is None else b, atol=1e-6) for a, b in zip(part, whole))
        assert not torch.allclose(part[0], halves[0], atol=1e-3)


def test_laion_stream_feeds_all_pretrainings(tmp_path, items):
    "From tars, without holding them: sharded, counted, encoded."
    write_pairs(tmp_path / "laion", items, 1.0)
    first = next((tmp_path / "laion").rglob("*.tar"))
    first.write_bytes(first.read_bytes().replace(items[0].jpeg, bytes(len(items[0].jpeg))))  # one picture is broken
    vocab = web_vocabulary(captions_of(tmp_path / "laion", 100), 200)
    layout = vocab.layout(6, 4, 4, 12)
    torch.manual_seed(0)
    vqgan = VQGAN(VQGANConfig(ch=8, ch_mult=(1, 2), num_res_blocks=1, attn_resolutions=(), resolution=16, z_channels=8, embed_dim=8, n_embed=6, groups=4)).eval().requires_grad_(False)
    opened = lambda: pair_stream(laion_stream(tmp_path / "laion", 8, lists=0.5), vocab, layout)

    def learn(steps, scratch=None):
        source, model = opened(), build_gptface(GPTFaceConfig(layout, 1, 16, 2, 24))
        done = pretrain(Pretraining(4, 4, warmup=0, save_every=2, threads=1, device="cpu"), model, source, encoder_of(vqgan), scratch=scratch, callbacks=[lambda run: run.stop("enough") if run.step == steps else None], progress=False)
        return source, model, done

    source, whole, done = learn(4)
    assert source.left_out.reasons and len(done.curve) and done.steps == 4
    images, text = next(opened().batches(None, Share(4, 0)))[0]
    assert images.shape == (4, 3, 8, 8) and images.dtype == torch.uint8 and text.shape == (4, 12)
    for method in ("mae", "clip", "beit", "farl"):
        config = RivalConfig(method, 8, 2, 1, 16, 2, 16, codes=6, words=len(vocab), text=12)
        net, curve = train_rival(config, opened(), 2, 4, encode=encoder_of(vqgan), accumulate=2, precision="no", device="cpu", progress=False)
        assert not net.training and np.isfinite(curve["rival/loss"]).all()
    with pytest.raises(InputError, match="without encode"):
        train_rival(config, opened(), 2, 4, progress=False)
    with pytest.raises(InputError, match="at least one a lane"):
        next(opened().batches(None, Share(6, 0, 0, 3)))


def test_codes_do_not_depend_on_the_precision_of_the_network():
    torch.manual_seed(0)
    vqgan = VQGAN(VQGANConfig(ch=8, ch_mult=(1, 2), num_res_blocks=1, attn_resolutions=(), resolution=16, z_channels=8, embed_dim=8, n_embed=64, groups=4)).eval()
    images, encode = torch.rand(4, 3, 16, 16), encoder_of(vqgan)
    with torch.autocast("cpu", torch.bfloat16):
        half, coarse = encode(images), vqgan.token_ids(images)
    assert torch.equal(half, vqgan.token_ids(images)) and not torch.equal(coarse, half)


@pytest.mark.parametrize("said", ["", "some", "1;2", "-1"])
def test_streams_of_no_parts(said):
    with pytest.raises(InputError, match="20M"):
        stream_parts(said)


class Here(Job):
    "A job whose folders are the test's."

    def checkpoint(self):
        return Path(self.values["here"]) / self.stage

    def scratch(self):
        return Path(self.values["here"]) / "scratch"


def test_the_paper_recipe_runs_from_tars(tmp_path, items, monkeypatch):
    "All six, with a vocabulary of BERT's form, from a stream: no picture is kept, what is broken is told."
    write_pairs(tmp_path / "laion", items, 1.0), write_celeba(tmp_path / "people", items)
    first = next((tmp_path / "laion").rglob("*.tar"))
    first.write_bytes(first.read_bytes().replace(items[0].jpeg, bytes(len(items[0].jpeg))))
    torch.manual_seed(0)
    VQGAN(VQGANConfig(ch=8, ch_mult=(1, 2, 2), num_res_blocks=1, attn_resolutions=(), resolution=32, z_channels=8, embed_dim=8, n_embed=6, groups=4)).save(tmp_path / "vqgan")
    Vocabulary.learn([item.caption for item in items] + ["tags: a, b"], 150).write(tmp_path / "bert")
    values = dict(seed=0, threads=1, workers=1, laion=str(tmp_path / "laion"), labelled=str(tmp_path / "people"), pairs=0, size=32, words=90, vqgan=str(tmp_path / "vqgan"), layers=1, width=16, heads=2, ffn_dim=16, steps=3, batch=4, rate=1e-3, rival_rate=1e-3, rival_batch=4,
                  lessons="0, 0", recipe="paper", methods=", ".join(("gptface", *RIVALS)), device="cpu", vocab=str(tmp_path / "bert"), stream="0, 1", precision="bf16", accumulate=2, here=str(tmp_path))  # fmt: skip
    monkeypatch.setattr("facelab.gptface.pretraining_stages.read_pairs", None)
    out = run_train(Here("gptface-train", "paper", values))
    assert not (tmp_path / "scratch" / "prepared" / "prepared.safetensors").exists()
    model, words = load_gptface(tmp_path / "gptface-train" / "gptface")
    assert len(words) == len(Vocabulary.read(tmp_path / "bert")) and model.config.layout.rows == 8
    assert {load_rival(tmp_path / "gptface-train" / f"{name}.safetensors").config.method for name in RIVALS} == set(RIVALS)
    settings = out.tables["settings"].set_index("method")
    assert settings.loc["GPTFace", "pictures"] == 12 and settings.loc["GPTFace", "epochs"] == 2.0 and settings.loc["ViT", "pictures"] == 4
    assert settings.loc["ViT", "epochs"] == 6.0 and settings.loc["MAE", "epochs"] == 2.0, "the ViT goes through four labelled pictures, the others through twelve texts"
    assert any(note.startswith("GPTFace: ") and "left out" in note for note in out.notes)
    with pytest.raises(InputError, match="recipe paper"):
        run_train(Here("gptface-train", "paper", values | {"recipe": "small"}))
    with pytest.raises(AssetError, match="uncased"):
        run_train(Here("gptface-train", "paper", values | {"vocab": "nowhere/vocab.txt"}))
    learnt = prepare(Here("gptface-train", "paper", values | {"vocab": "", "words": 100}), tmp_path / "words")
    assert learnt == 12 and len(Vocabulary.read(tmp_path / "words")) <= 100


def test_one_process_prepares(monkeypatch):
    job, done = Here("gptface-train", "paper", {"device": "cpu"}), []
    assert once(job, lambda: done.append(1) or 7) == 7
    monkeypatch.setenv("WORLD_SIZE", "2")
    for main, expected in ((True, 2), (False, 2)):
        monkeypatch.setattr("facelab.gptface.pretraining_stages.make_accelerator", lambda precision, device: SimpleNamespace(is_main_process=main))  # noqa: B023
        monkeypatch.setattr("facelab.gptface.pretraining_stages.from_main", lambda value, accelerator: 7)
        assert once(job, lambda: done.append(1) or 7) == 7 and len(done) == expected


def test_the_paper_profile_is_the_papers():
    values = profile_values("gptface-train", "paper")
    assert (values["stream"], values["precision"], values["vocab"]) == ("20M", "bf16", "assets/bert-base-uncased") and "vit" in values["methods"] and values["labelled"]
    assert stream_parts(values["stream"]) == PARTS_20M
    for name in ("smoke", "mini"):
        assert [profile_values("gptface-train", name)[key] for key in ("stream", "precision", "vocab", "accumulate")] == ["", "no", "", 1]


# ---- people's marks, and a tokenizer of one's own -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["Timestamp,rater,image,1,2\n2026/01/02,a,x,0,2\n", "\ufeffrater;image;1;2\na;x;0;2\n", "Rater,Image,Email Address,1,2\na,x,a@b.c,0,2\n", "rater,image,rank,tag,mark\na,x,2,hat,2\na,x,1,man,0\n"])
def test_sheets_as_forms_export_them(tmp_path, text):
    (tmp_path / "marks.csv").write_text(text, encoding="utf-8")
    marks, images, raters = read_ratings(tmp_path / "marks.csv")
    assert marks.tolist() == [[0, 2]] and images == ["x"] and raters == ["a"]


def test_sheets_go_out_and_come_back(tmp_path):
    "Two methods, two pictures, two raters: NDCG of what they marked; an unmarked sheet is refused."
    words, ranked = ["man", "hat", "old"], {"GPTFace": np.array([[1, 0, 2], [0, 1, 2]]), "CLIP": np.array([[2, 1, 0], [2, 1, 0]])}
    sheets = write_sheets(tmp_path, torch.zeros(2, 3, 8, 8, dtype=torch.uint8), ranked, words)
    assert [path.name for path in sheets] == ["GPTFace.csv", "CLIP.csv"] and len(list((tmp_path / "pictures").glob("*.png"))) == 2
    with pytest.raises(InputError, match="mark"):
        sheet_rows(tmp_path)
    worth = {"man": 2, "hat": 1, "old": 0}
    for path in sheets:
        head, *lines = path.read_text().splitlines()
        path.write_text("\n".join([head, *(f"{rater}{line}{worth[line.split(',')[3]]}" for rater in "ab" for line in lines)]))
    found = {(row.method, row.metric): row.value for row in sheet_rows(tmp_path)}
    marks = np.vectorize(dict(enumerate(worth.values())).get)(ranked["GPTFace"]).astype(float)
    assert found["GPTFace, marked by people", "NDCG@5"] == pytest.approx(100 * ndcg(marks, 5).mean()) and found["CLIP, marked by people", "NDCG@5"] < found["GPTFace, marked by people", "NDCG@5"]
    with pytest.raises(InputError, match="no sheet"):
        sheet_rows(tmp_path / "pictures")
    assert all(profile_values("gptface-tables", name)["ratings"] == "" for name in ("smoke", "mini", "gpu", "paper"))


def test_a_vqgan_from_tars_and_from_a_folder(tmp_path, items, capsys, monkeypatch):
    "The command writes what the profiles name; a broken picture is left out and counted."
    monkeypatch.setenv("FACELAB_ASSETS", str(tmp_path / "no-assets"))
    write_pairs(tmp_path / "laion", items, 1.0), write_celeba(tmp_path / "celeba", items)
    (tmp_path / "celeba" / "img_align_celeba" / "000002.jpg").write_bytes(b"no picture")
    for name in ("laion", "celeba"):
        said = [str(tmp_path / name), str(tmp_path / f"{name}-vqgan"), "--net", "face64", "--size", "32", "--steps", "2", "--batch", "4", "--lanes", "0", "--disc-start", "-1", "--device", "cpu"]
        assert vqgan_folder.main(said) == 0
        assert open_vqgan(tmp_path / f"{name}-vqgan", 512).config == VQGANS["face64"]
    assert "PSNR" in (out := capsys.readouterr().out) and "left out: 0" not in out.splitlines()[-1]
    assert "compared with gradients" in out, "without LPIPS's weights the plain command runs, and says what it did without"
    assert vqgan_folder.main([*said, "--perceptual", "lpips"]) == 2
    assert vqgan_folder.main([str(tmp_path / "nowhere"), str(tmp_path / "out")]) == 2
    assert vqgan_folder.main([*said[:5], "33", *said[6:]]) == 2
