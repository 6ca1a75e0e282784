"The training loop: equal to the formulas, to itself after a stop, and to itself in two processes."

import json
import math
import os
import shutil
import subprocess
import sys
from functools import partial

import numpy as np
import pytest
import torch
import train_target as target
import facelab.lab.train as loop
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env
from torch import nn

from facelab.lab.batches import Share, Stream
from facelab.lab.checkpoint import checkpoints
from facelab.lab.errors import InputError, ShapeError
from facelab.lab.paths import root
from facelab.lab.schedule import Cosine, HalfLife, Milestones, Polynomial, WarmupDecay
from facelab.lab.train import EarlyStop, Every, Items, Player, TrainConfig, train

SGD = partial(torch.optim.SGD, lr=0.1)


def mean_square(models, batch, step):
    return {"loss": (models["net"](batch[:, :3])[:, 0] - batch[:, 3]).square().mean()}


def net():
    torch.manual_seed(0)
    return nn.Linear(3, 1)


def fit(loss_fn=mean_square, data=None, optimizer=SGD, models=None, scratch=None, callbacks=(), trains=("net",), **options):
    config = TrainConfig(**({"steps": 6, "batch": 8, "device": "cpu", "threads": 1, "log_every": 2} | options))
    data = Items(len(target.DATA), target.row) if data is None else data
    return train(config, models or {"net": net()}, [Player("net", loss_fn, trains, optimizer)], data, scratch, callbacks, progress=False)


def weights(result):
    return torch.cat([weight.detach().reshape(-1) for weight in result.models["net"].parameters()])


# schedules and averages


def test_schedules_against_their_formulas():
    for step in range(101):
        assert Cosine(100, 10, 0.1)(step) == pytest.approx(step / 10 if step < 10 else 0.1 + 0.45 * (1 + math.cos(math.pi * (step - 10) / 90)))
        assert Polynomial(100, 10, power=2)(step) == pytest.approx(step / 10 if step < 10 else ((100 - step) / 90) ** 2)
        assert Milestones((30, 60))(step) == pytest.approx(0.1 ** ((step >= 30) + (step >= 60)))
    deepspeed = [0.0, *(math.log(i + 1) / math.log(10) if i < 10 else (100 - i) / 90 for i in range(100))]  # WarmupDecayLR counts from -1
    assert [WarmupDecay(100, 10)(step) for step in range(101)] == pytest.approx(deepspeed)
    assert WarmupDecay(100, 10, "linear")(6) == 0.5
    assert HalfLife(batch=32, images=10_000)(10**6) == 0.5 ** (32 / 10_000) and HalfLife(32)(100) == 0.5 ** (32 / 160)


def test_schedule_moves_the_rate_of_each_step():
    rates = []
    fit(callbacks=[lambda run: rates.append(run.seats[0].optimizer.param_groups[0]["lr"])])
    assert rates == [0.1] * 6
    config = TrainConfig(6, 8, device="cpu")
    seen = []
    train(config, {"net": net()}, [Player("net", mean_square, ["net"], SGD, Cosine(6, 2))], Items(23, target.row), progress=False,
          callbacks=[lambda run: seen.append(run.seats[0].optimizer.param_groups[0]["lr"])])
    assert seen == pytest.approx([0.1 * Cosine(6, 2)(step) for step in range(6)])


def test_ema_against_the_closed_form():
    path = []
    start = torch.cat([weight.detach().reshape(-1).clone() for weight in net().parameters()])
    result = fit(ema=0.8, callbacks=[lambda run: path.append(torch.cat([w.detach().reshape(-1).clone() for w in run.models["net"].parameters()]))])
    expected = 0.8**6 * start + sum(0.2 * 0.8 ** (5 - k) * at for k, at in enumerate(path))
    averaged = torch.cat([value.reshape(-1) for value in result.state_dict("net").values()])
    torch.testing.assert_close(averaged, expected)
    assert not torch.allclose(averaged, weights(result))


# accumulation, clipping, precision


def test_accumulation_equals_the_big_batch():
    big, small = fit(batch=24), fit(batch=6, accumulate=4)
    torch.testing.assert_close(weights(big), weights(small), atol=1e-6, rtol=1e-5)
    assert not torch.allclose(weights(big), weights(fit(batch=6)), atol=1e-3)


def test_accumulation_weighs_by_counts():
    def kept(models, batch, step):
        error, keep = (models["net"](batch[:, :3])[:, 0] - batch[:, 3]).square(), batch[:, 3] > 0
        return {"loss": (error * keep).sum() / keep.sum(), "count": keep.sum()}

    def unweighted(models, batch, step):
        return {"loss": kept(models, batch, step)["loss"]}

    big, small = fit(kept, batch=24), fit(kept, batch=12, accumulate=2)
    torch.testing.assert_close(weights(big), weights(small), atol=1e-6, rtol=1e-5)
    assert np.allclose(big.curve["net/loss"], small.curve["net/loss"], rtol=1e-5)
    assert not torch.allclose(weights(big), weights(fit(unweighted, batch=12, accumulate=2)), atol=1e-4)


def test_clipping_bounds_the_step():
    before = torch.cat([weight.detach().reshape(-1).clone() for weight in net().parameters()])
    assert float((weights(fit(steps=1, clip=0.01)) - before).norm()) == pytest.approx(0.001, rel=1e-4)  # rate 0.1


def test_bf16_on_the_cpu():
    seen = []

    def loss(models, batch, step):
        seen.append(models["net"](batch[:, :3]).dtype)
        return mean_square(models, batch, step)

    result = fit(loss, precision="bf16")
    assert set(seen) == {torch.bfloat16} and weights(result).dtype == torch.float32
    assert 0 < float((weights(result) - weights(fit())).abs().max()) < 0.05


# data


def test_each_item_once_an_epoch_whatever_the_batch():
    seen = []

    def loss(models, batch, step):
        seen.extend(batch.tolist())
        return {"loss": models["net"](torch.zeros(1, 3)).sum()}

    fit(loss, Items(10, lambda index, rng: index), steps=5, batch=4)
    assert sorted(seen) == sorted([*range(10)] * 2) and sorted(seen[:10]) == list(range(10))


def test_worker_processes_change_nothing():
    assert torch.equal(weights(fit(data=Items(23, target.row, workers=2), steps=3)), weights(fit(steps=3)))


def test_a_stream_goes_on_where_it_was(tmp_path):
    def shards(seed, epoch, rank, world):
        return iter(torch.from_numpy(target.DATA[np.random.default_rng([seed, epoch, rank]).permutation(23)]))

    whole = fit(data=Stream(shards), steps=9)
    with pytest.raises(target.PowerCut):
        fit(data=Stream(shards), steps=9, scratch=tmp_path / "run", save_every=2, callbacks=[target.cut_at(7)])
    again = fit(data=Stream(shards), steps=9, scratch=tmp_path / "run", save_every=2)
    assert again.resumed == 6 and torch.equal(weights(again), weights(whole)) and again.curve.equals(whole.curve)


def test_evaluating_does_not_disturb_training():
    often, never = target.gan(None, steps=8, callbacks=[Every(1, target.drawn)]), target.gan(None, steps=8)
    assert all(torch.equal(a, b) for a, b in zip(often.models["maker"].state_dict().values(), never.models["maker"].state_dict().values()))


def test_training_leaves_the_generators_as_they_were():
    models = {"net": net()}
    torch.manual_seed(5)
    np.random.seed(5)
    fit(models=models)
    found = torch.rand(2), np.random.rand()
    torch.manual_seed(5)
    np.random.seed(5)
    assert torch.equal(found[0], torch.rand(2)) and found[1] == np.random.rand()


# several players


def test_players_move_only_their_own_weights_and_in_their_rhythm():
    moves = []

    def logged(name, loss):
        def inner(models, batch, step):
            moves.append((step.number, name, step.micro))
            assert not any(w.requires_grad for w in models["judge" if name == "maker" else "maker"].parameters())
            return loss(models, batch, step)

        return inner

    players = [Player(p.name, logged(p.name, p.loss_fn), p.trains, p.optimizer, p.schedule, p.every, p.accumulate) for p in target.gan_players()]
    models = target.networks()
    train(TrainConfig(5, 6, device="cpu"), models, players, Items(23, target.row), progress=False)
    at = [(0, True), (1, False), (2, False), (3, False), (4, True)]
    assert moves == [move for n, r1 in at for move in [(n, "maker", 0), (n, "judge", 0), (n, "judge", 1)] + [(n, "r1", 0)] * r1]
    assert all(w.requires_grad for model in models.values() for w in model.parameters())


def test_a_gan_is_deterministic_and_its_curve_has_no_time_in_it():
    a, b = target.gan(None), target.gan(None)
    assert target.digest(a) == target.digest(b)
    assert list(a.curve.columns) == ["step", "judge/grad_norm", "judge/loss", "judge/lr", "maker/grad_norm", "maker/loss", "maker/lr", "maker/score", "r1/grad_norm", "r1/loss", "sample"]
    assert target.digest(a) != target.digest(target.gan(None, dropout=0.0))


# stopping and going on


def test_early_stop_is_remembered(tmp_path):
    def worse(run):
        return {"val": float(run.step)}

    def run(callbacks):
        return fit(steps=50, scratch=tmp_path / "run", save_every=2, callbacks=callbacks)

    with pytest.raises(target.PowerCut):
        run([worse, EarlyStop("val", 5), target.cut_at(4)])
    result = run([worse, EarlyStop("val", 5)])
    assert result.steps == 6 and "val was best 5 rows ago" in result.stopped and result.resumed == 2
    assert run([worse, EarlyStop("val", 5)]).resumed == 6


def test_what_a_callback_draws_depends_on_the_step_alone(tmp_path):
    "Also at a step at which no player moves, where no loss has seeded the generators."

    def run(callbacks=(), **options):
        config = TrainConfig(9, 8, device="cpu", threads=1, save_every=1, log_every=1)
        player = Player("net", mean_square, ["net"], SGD, every=3)
        draw = lambda run: {"drawn": np.random.rand() + float(torch.rand(()))}
        return train(config, {"net": net()}, [player], Items(23, target.row), callbacks=[draw, *callbacks], progress=False, **options)

    whole = run()
    with pytest.raises(target.PowerCut):
        run([target.cut_at(6)], scratch=tmp_path / "run")
    again = run(scratch=tmp_path / "run")
    assert again.resumed == 5 and again.curve.equals(whole.curve) and whole.curve["drawn"].nunique() == 9


def halves(precision, device, plain=loop.make_accelerator):
    "Half precision with a loss scaler on the CPU, as Accelerate makes it on a GPU."
    accelerator = plain(precision, device)
    accelerator.state._mixed_precision, accelerator.native_amp = "fp16", True
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12, growth_interval=4)
    return accelerator


def test_the_loss_scaler_is_in_the_checkpoint(tmp_path, monkeypatch):
    "The scale grows every four steps; a step whose loss overflows is left out and the scale falls; all of it survives a stop."
    monkeypatch.setattr(loop, "make_accelerator", halves)
    scales, kinds = [], set()

    def overflows(models, batch, step):
        losses = mean_square(models, batch, step)
        kinds.add(models["net"](batch[:, :3]).dtype)
        return {"loss": losses["loss"] * (1e38 if step.number == 5 else float("nan") if step.number == 9 else 1.0)}

    def run(callbacks=(), **options):
        scales.clear()
        return fit(overflows, steps=14, skip_bad=True, save_every=1, log_every=1, callbacks=[lambda run: scales.append(run.accelerator.scaler.get_scale()), *callbacks], **options)

    whole, grown = run(), list(scales)
    assert kinds == {torch.float16} and grown[3] == 2 * grown[0] and grown[5] == grown[4] / 2
    assert whole.curve["net/skipped"].tolist() == [float(step in (5, 9)) for step in range(14)] and torch.isfinite(weights(whole)).all()
    for cut in (4, 6, 10, 12):
        with pytest.raises(target.PowerCut):
            run([target.cut_at(cut)], scratch=tmp_path / str(cut))
        again = run(scratch=tmp_path / str(cut))
        assert again.resumed == cut - 1 and torch.equal(weights(again), weights(whole)) and scales == grown[cut - 1 :] and again.curve.equals(whole.curve)


def test_accumulation_goes_on_after_a_stop(tmp_path):
    "Two optimisers, one with two micro-batches a turn, averages, clipping, rows every third step: stopped after each step, the same bits."
    whole = target.digest(target.gan(None, steps=9))
    for cut in range(1, 9):
        with pytest.raises(target.PowerCut):
            target.gan(tmp_path / "run", steps=9, save_every=1, callbacks=[target.cut_at(cut)])
    again = target.gan(tmp_path / "run", steps=9, save_every=1)
    assert again.resumed == 7 and target.digest(again) == whole


def test_other_data_is_another_run(tmp_path):
    one = fit(scratch=tmp_path / "run", steps=2)
    assert fit(scratch=tmp_path / "run", steps=2, data=Items(22, target.row)).folder != one.folder
    assert fit(scratch=tmp_path / "run", steps=2, data=Items(23, target.row, workers=1)).resumed == 2  # who loads it changes nothing


def half_done(tmp_path):
    with pytest.raises(target.PowerCut):
        fit(scratch=tmp_path / "run", steps=10, save_every=2, callbacks=[target.cut_at(7)])
    (folder,) = [path for path in (tmp_path / "run").iterdir()]
    assert [path.name[-2:] for path in checkpoints(folder)] == ["04", "06"]
    return folder


@pytest.mark.parametrize("damage", ["truncated", "flipped", "no manifest", "empty json", "no tensors"])
def test_a_damaged_newest_checkpoint_is_passed_over(tmp_path, damage, capsys):
    newest = checkpoints(half_done(tmp_path))[-1]
    tensors = newest / "tensors.safetensors"
    if damage == "truncated":
        tensors.write_bytes(tensors.read_bytes()[:-9])
    elif damage == "flipped":
        tensors.write_bytes(tensors.read_bytes()[:-1] + b"\x55")
    elif damage == "no manifest":
        (newest / "manifest.json").unlink()
    elif damage == "empty json":
        (newest / "manifest.json").write_text("")
    else:
        tensors.unlink()
    again = fit(scratch=tmp_path / "run", steps=10, save_every=2)
    assert again.resumed == 4 and torch.equal(weights(again), weights(fit(steps=10)))
    assert "is damaged" in capsys.readouterr().err


def test_both_damaged_means_starting_over(tmp_path):
    for path in checkpoints(half_done(tmp_path)):
        (path / "state.json").write_text("{")
    again = fit(scratch=tmp_path / "run", steps=10, save_every=2)
    assert again.resumed == 0 and torch.equal(weights(again), weights(fit(steps=10)))


def test_another_configuration_has_its_own_folder_and_is_refused_in_this_one(tmp_path):
    folder = half_done(tmp_path)
    other = fit(scratch=tmp_path / "run", steps=12, save_every=2)
    assert other.resumed == 0 and other.folder != folder
    shutil.rmtree(other.folder)
    folder.rename(other.folder)
    with pytest.raises(InputError, match="train.steps: 10, 12"):
        fit(scratch=tmp_path / "run", steps=12, save_every=2)
    assert len(checkpoints(other.folder)) == 2  # untouched


@pytest.mark.parametrize("change", [{"seed": 1}, {"clip": 1.0}, {"optimizer": partial(torch.optim.SGD, lr=0.2)}, {"models": {"net": nn.Linear(3, 1, bias=False)}}, {"precision": "bf16"}])
def test_what_changes_the_result_changes_the_folder(tmp_path, change):
    assert fit(scratch=tmp_path / "run", steps=2).folder != fit(**({"scratch": tmp_path / "run", "steps": 2} | change)).folder


def test_frozen_weights_can_be_left_out_and_are_checked(tmp_path):
    def models(value=1.0):
        torch.manual_seed(0)
        base = nn.Linear(3, 3).requires_grad_(False)
        nn.init.constant_(base.weight, value)
        return {"base": base, "net": net()}

    def loss(models, batch, step):
        return {"loss": (models["net"](models["base"](batch[:, :3]))[:, 0] - batch[:, 3]).square().mean()}

    def run(cut, value=1.0):
        return fit(loss, models=models(value), scratch=tmp_path / "run", save_every=2, keep_frozen=False, callbacks=[target.cut_at(5)] if cut else [])

    with pytest.raises(target.PowerCut):
        run(True)
    (folder,) = (tmp_path / "run").iterdir()
    kept = json.loads((checkpoints(folder)[-1] / "state.json").read_text())["models"]
    assert sorted(kept) == ["net.bias", "net.weight"]
    with pytest.raises(InputError, match="frozen weights"):
        run(False, value=2.0)
    again = run(False)
    assert again.resumed == 4 and torch.equal(weights(again), weights(fit(loss, models=models())))


def test_a_checkpoint_holds_no_pickle(tmp_path):
    names = {path.name for path in half_done(tmp_path).rglob("*") if path.is_file()}
    assert names == {"manifest.json", "state.json", "tensors.safetensors"}


# what is refused


def test_a_loss_that_is_not_finite_names_step_and_term():
    def loss(models, batch, step):
        losses = mean_square(models, batch, step)
        return losses | {"photo": losses["loss"] * (float("nan") if step.number == 3 else 1.0)}

    with pytest.raises(InputError, match="player net at step 3: photo is nan"):
        fit(loss)


def test_a_bad_step_can_be_skipped_and_is_counted():
    def loss(models, batch, step):
        losses = mean_square(models, batch, step)
        return {"loss": losses["loss"] * (float("inf") if step.number == 3 else 1.0)}

    result = fit(loss, skip_bad=True)
    assert result.curve["net/skipped"].tolist() == [0, 1, 0] and torch.isfinite(weights(result)).all() and np.isfinite(result.curve).all().all()


@pytest.mark.parametrize("wrong, error, words", [
    ({"loss_fn": lambda models, batch, step: {"photo": 1}}, InputError, "a dict with 'loss'"),
    ({"loss_fn": lambda models, batch, step: {"loss": models["net"](batch[:, :3])}}, ShapeError, "one number"),
    ({"loss_fn": lambda models, batch, step: {"loss": torch.zeros(())}}, InputError, "no gradient"),
    ({"trains": ["generator"]}, InputError, "generator"),
    ({"models": {"net": net().requires_grad_(False)}}, InputError, "requires grad"),
    ({"precision": "fp16"}, InputError, "fp16 on the CPU"),
    ({"precision": "int4"}, InputError, "int4"),
    ({"batch": 0}, InputError, "TrainConfig.batch"),
    ({"steps": 2.5}, InputError, "TrainConfig.steps"),
    ({"ema": 1.5}, InputError, "EMA decay"),
    ({"data": Stream(lambda *_: iter(()))}, InputError, "no item in epoch 0"),
])
def test_refused(wrong, error, words):
    with pytest.raises(error, match=words):
        fit(**wrong)


# many processes


def launch(mode, folder):
    "Run a mode of train_target.py, which forks two processes; what the first one says."
    done = subprocess.run([sys.executable, target.__file__, mode, str(folder)], env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def together(tmp_path_factory):
    folder = tmp_path_factory.mktemp("together")
    return folder, launch("pair", folder)


def test_two_processes_follow_one(together):
    folder, said = together
    one = target.regression()
    assert np.allclose(said["plain"], target.flat(one), atol=2e-6)
    assert np.allclose(said["curve"], one.curve["net/loss"], atol=2e-6)
    assert np.allclose(said["gan"], target.flat(target.gan(None, dropout=0.0)), atol=1e-5)
    assert said["same"] and said["resumed"] == 10  # two processes, stopped and started again: the same bits
    moved = target.regression(folder / "moved")  # begun by two, ended by one
    assert moved.resumed == 8 and np.allclose(target.flat(moved), target.flat(one), atol=2e-6)
    assert "9 items for 2 processes" in said["refused"]


def test_two_processes_with_sharded_weights_follow_one(together):
    said = together[1]["fsdp"]
    assert said["spread"] and np.allclose(said["plain"], target.flat(target.regression()), atol=2e-6)
    assert said["same"] and said["resumed"] == 8


def test_the_accelerate_configurations_parse():
    "As `accelerate launch` reads and checks them, before it starts anything."
    kinds = {}
    for path in sorted((root() / "profiles" / "accelerate").glob("*.yaml")):
        args = launch_command_parser().parse_args(["--config_file", str(path), "-m", "facelab.lab.run", "face-fit", "--profile", "gpu"])
        kinds[path.stem] = (args.num_processes or load_config_from_file(str(path)).num_processes, _validate_launch_command(args)[0].mixed_precision, args.multi_gpu, args.use_fsdp, args.use_deepspeed)
        said = load_config_from_file(str(path))
        if path.stem.startswith("zero"):
            assert said.deepspeed_config["zero_stage"] == int(path.stem[-1])
        if path.stem == "fsdp":
            assert prepare_multi_gpu_env(args)["FSDP_VERSION"] == "2"
    assert kinds == {"ddp": (8, "no", True, False, False), "fsdp": (8, "bf16", False, True, False), "zero2": (8, "bf16", False, False, True), "zero3": (8, "bf16", False, False, True)}


def test_share_of_a_batch():
    with pytest.raises(InputError):
        Share(0)
