"""What tests of the training loop run in processes of their own. `python train_target.py MODE FOLDER ...` prints one line of JSON."""

import hashlib
import json
import os
import random
import shutil
import signal
import socket
import sys
import time
import traceback
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import nn

from facelab.lab.errors import InputError
from facelab.lab.schedule import Cosine
from facelab.lab.train import EarlyStop, Every, Items, Player, TrainConfig, train

DATA = np.random.default_rng(0).normal(size=(23, 4)).astype(np.float32)


def row(index, rng):  # draws from its own generator, and as careless data sets do
    return torch.from_numpy(DATA[index] + 0.01 * rng.normal(size=4).astype(np.float32)) + 0.01 * float(np.random.rand() + random.random() + torch.rand(()))


def networks(dropout=0.2):
    torch.manual_seed(3)
    maker = nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Dropout(dropout), nn.Linear(8, 4))
    judge = nn.Sequential(nn.Linear(4, 8), nn.Softplus(), nn.Linear(8, 1))
    judge.register_buffer("seen", torch.zeros(()))
    return {"maker": maker, "judge": judge}


def make_loss(models, batch, step):
    score = models["judge"](models["maker"](step.noise(2)))
    return {"loss": nn.functional.softplus(-score).mean(), "score": score.mean()}


def judge_loss(models, batch, step):
    with torch.no_grad():
        fake = models["maker"](step.noise(2))
        models["judge"].seen += 1
    return {"loss": nn.functional.softplus(models["judge"](fake)).mean() + nn.functional.softplus(-models["judge"](batch)).mean()}


def r1_loss(models, batch, step):
    batch = batch.requires_grad_(True)
    slope = torch.autograd.grad(models["judge"](batch).sum(), batch, create_graph=True)[0]
    return {"loss": slope.square().sum(1).mean()}


def gan_players():
    adam = partial(torch.optim.Adam, lr=3e-3, betas=(0.0, 0.99))
    return [Player("maker", make_loss, ["maker"], adam, Cosine(40, 4)), Player("judge", judge_loss, ["judge"], adam, accumulate=2),
            Player("r1", r1_loss, ["judge"], "judge", every=4)]


def drawn(run):  # an evaluation that draws random numbers, as samples do
    with run.evaluating():
        return {"sample": float(run.models["maker"](torch.randn(16, 2)).mean() + np.random.rand() + random.random())}


def gan(folder, steps=24, dropout=0.2, save_every=2, callbacks=(), workers=0, **options):
    config = TrainConfig(steps, 6, ema=0.9, clip=5.0, seed=1, device="cpu", threads=1, log_every=3, save_every=save_every, save_every_s=None, **options)
    return train(config, networks(dropout), gan_players(), Items(len(DATA), row, workers=workers), scratch=folder, progress=False,
                 callbacks=[Every(5, drawn), EarlyStop("maker/loss", 1000), *callbacks])


def digest(result):
    "Weights, averages and curve of a run, as one hash."
    h = hashlib.sha256(result.curve.to_csv(index=False, float_format="%.6g").encode())
    for model in result.models.values():
        for name, value in model.state_dict().items():
            h.update(name.encode() + value.numpy().tobytes())
    for value in result.ema.state_dict().values():
        h.update(value.numpy().tobytes())
    return h.hexdigest()


def in_child(work):
    "Run `work` in a forked child; its number."
    child = os.fork()
    if child == 0:
        code = 1
        try:
            work()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    return child


def finish(folder, **options):
    "Run to the end in a child; its digest and the steps that it did not have to repeat."
    out = folder.with_suffix(".out")

    def work():
        result = gan(folder, **options)
        out.write_text(json.dumps([digest(result), result.resumed]))

    code = os.waitstatus_to_exitcode(os.waitpid(in_child(work), 0)[1])
    assert code == 0, f"a run that was not killed ended with {code}"
    return json.loads(out.read_text())


def random_kills(top, count):
    """Kill runs at random moments, `count` times in all, each run one to four times before it may end; how many ended as the run that was never killed.

    Every second run loads its data in worker processes, which outlive a killed parent for a while."""
    options = {"steps": 28}
    truth, _ = finish(top / "truth", **options)
    began = time.monotonic()
    finish(top / "again", **options)  # the time that a run takes, imports done
    seconds, chance = time.monotonic() - began, random.Random(0)
    killed = same = runs = 0
    resumed = []
    while killed < count and runs < 10 * count:
        folder, runs, workers = top / f"run{runs}", runs + 1, runs % 2
        before, times = killed, min(chance.randint(1, 4), count - killed)
        for _ in range(times):
            child = in_child(lambda folder=folder, workers=workers: gan(folder, workers=workers, **options))
            time.sleep(chance.uniform(0, 1.2 * seconds / times))
            os.kill(child, signal.SIGKILL)
            if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) != -signal.SIGKILL:
                break  # it had ended before
            killed += 1
        if killed > before:
            found, steps = finish(folder, **options)
            same += (killed - before) * (found == truth)
            resumed.append(steps)
        shutil.rmtree(folder, ignore_errors=True)
    return {"killed": killed, "same": same, "resumed": resumed}


def dying_at(count):
    "From now on, the process dies just before its `count`-th file operation that changes something."
    left = [count]

    def wrapped(call):
        def before(*args, **kwargs):
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*args, **kwargs)

        return before

    for name in ("replace", "fsync", "unlink", "rmdir", "mkdir"):
        setattr(os, name, wrapped(getattr(os, name)))


def kills_in_saves(top):
    "Kill a short run at each of its file operations; finish each."
    options = {"steps": 3, "save_every": 1, "keep": 1}  # from the second save on, an old one is taken away
    truth, _ = finish(top / "whole", **options)
    same, resumed = 0, []
    for count in range(1, 500):
        folder = top / f"at{count}"

        def work(folder=folder, count=count):
            dying_at(count)
            gan(folder, **options)

        code = os.waitstatus_to_exitcode(os.waitpid(in_child(work), 0)[1])
        if code == 0:
            return {"operations": count - 1, "same": same, "resumed": resumed}
        assert code == -signal.SIGKILL, code
        found, steps = finish(folder, **options)
        same += found == truth
        resumed.append(steps)
        shutil.rmtree(folder, ignore_errors=True)


def state_of(process):
    "Of a process: R, S, ..., Z where it waits to be buried, X where there is none."
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return "X"


def orphans(top):
    "Kill runs that have worker processes; how many workers there were, and how many were left a second and a half later (torch itself looks every five)."
    found = left = 0
    for _ in range(3):
        child = in_child(lambda: gan(top / "orphans", steps=2, workers=2, callbacks=[Every(1, lambda run: time.sleep(60))]))
        workers, until = [], time.monotonic() + 60
        while len(workers) < 2 and time.monotonic() < until:
            workers = Path(f"/proc/{child}/task/{child}/children").read_text().split()
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        time.sleep(1.5)
        found, left = found + len(workers), left + sum(state_of(worker) not in "ZX" for worker in workers)
    return {"found": found, "left": left}


def held(top):
    "A run that sleeps in step 1, a second one in the same folder, and a kill; what the second one was told, and whether it named the first."
    folder, lock = top / "run", top / "run.lock"
    child, until = in_child(lambda: gan(folder, callbacks=[Every(1, lambda run: time.sleep(3600))])), time.monotonic() + 60
    try:
        while not (lock.is_file() and lock.read_text().strip() == str(child)) and time.monotonic() < until:
            time.sleep(0.02)
        gan(folder)
        said = "nothing: there were two writers"
    except InputError as error:
        said = str(error)
    finally:
        os.kill(child, signal.SIGKILL)
        ended = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return {"refused": said, "busy": ended == -signal.SIGKILL, "named": f"process {child} is writing here" in said}


def counted(models, batch, step):  # a mean over as many things as the batch happens to have
    x, keep = batch[:, :3], batch[:, 3] > 0
    error = (models["net"](x)[:, 0] - batch[:, 3]).square()
    return {"loss": (error * keep).sum() / keep.sum().clamp(min=1), "count": keep.sum()}


def regression(folder=None, steps=12, callbacks=(), optimizer=None, scratch_steps=4, **options):
    torch.manual_seed(0)
    models = {"net": nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8).eval() if options.pop("norm", False) else nn.Tanh(), nn.Linear(8, 1))}
    players = [Player("net", counted, ["net"], optimizer or partial(torch.optim.SGD, lr=0.05, momentum=0.9), Cosine(steps, 2))]
    config = TrainConfig(**({"steps": steps, "batch": 8, "accumulate": 2, "clip": 1.0, "ema": 0.9, "device": "cpu", "threads": 1, "log_every": 4, "save_every": scratch_steps} | options))
    return train(config, models, players, Items(len(DATA), row), scratch=folder, callbacks=callbacks, progress=False)


class PowerCut(Exception):
    pass


def cut_at(step):
    def power_cut(run):
        if run.step == step:
            raise PowerCut

    return power_cut


def flat(result):
    return [value for name in sorted(result.models) for tensor in result.state_dict(name).values() for value in tensor.double().reshape(-1).tolist()]


def no_cut(run):
    return None


def many(top):
    "What two processes do together; the first one prints."
    plain = regression()
    said = {"plain": flat(plain), "gan": flat(gan(None, dropout=0.0)), "curve": plain.curve["net/loss"].tolist()}
    whole = digest(gan(top / "whole", callbacks=[no_cut]))
    try:
        gan(top / "cut", callbacks=[cut_at(11)])
    except PowerCut:
        pass
    again = gan(top / "cut", callbacks=[no_cut])
    said |= {"resumed": again.resumed, "same": digest(again) == whole}
    try:
        regression(top / "moved", callbacks=[cut_at(9)])
    except PowerCut:
        pass
    try:
        regression(batch=9)
    except InputError as error:
        said["refused"] = str(error)
    return said | {"fsdp": sharded(top)}


def pair(top):
    "`many` in two processes over gloo, forked from one that has imported everything."
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    os.environ |= {"ACCELERATE_USE_CPU": "true", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}

    def work(rank):
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        said = many(top)
        if rank == 0:
            print(json.dumps(said), flush=True)

    children = {in_child(partial(work, rank)) for rank in range(2)}
    while children:
        child, status = os.wait()
        children.discard(child)
        if status:
            for other in children:  # it would wait for the one that has gone
                os.kill(other, signal.SIGKILL)
            sys.exit(f"one of two processes ended with {os.waitstatus_to_exitcode(status)}")


def sharded(top):
    "The same under FSDP 2 on the CPU, which Accelerate's launcher offers for GPUs only: its state is told so here."
    from accelerate.state import AcceleratorState, PartialState
    from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

    import facelab.lab.train as loop

    plain = loop.make_accelerator

    def make(precision, device):
        accelerator = plain(precision, device)
        plugin = FullyShardedDataParallelPlugin(fsdp_version=2, cpu_ram_efficient_loading=False, auto_wrap_policy="no_wrap")
        for state in (AcceleratorState._shared_state, PartialState._shared_state):
            state["distributed_type"] = DistributedType.FSDP
        AcceleratorState._shared_state["fsdp_plugin"] = plugin
        os.environ["FSDP_VERSION"] = "2"
        return accelerator

    loop.make_accelerator = make
    adam = partial(torch.optim.AdamW, lr=0.01)
    said = {"plain": flat(regression()), "spread": hasattr(next(regression(steps=3).models["net"].parameters()), "full_tensor")}
    whole = flat(regression(top / "fsdp_whole", optimizer=adam, callbacks=[no_cut]))
    try:
        regression(top / "fsdp_cut", optimizer=adam, callbacks=[cut_at(10)])
    except PowerCut:
        pass
    again = regression(top / "fsdp_cut", optimizer=adam, callbacks=[no_cut])
    return said | {"resumed": again.resumed, "same": flat(again) == whole}


def main(mode, folder, *rest):
    top = Path(folder)
    top.mkdir(parents=True, exist_ok=True)
    if mode in ("kills", "pair"):
        torch.use_deterministic_algorithms(False)  # torch imports a compiler for this: once, before the forks
    if mode == "pair":
        return pair(top)
    if mode == "kills":
        gan(top / "first", steps=4)
    if mode == "run":
        said = {"digest": digest(result := gan(top / "run", steps=int(rest[0]))), "resumed": result.resumed}
    else:
        said = {"whole": digest(gan(None)), "random": random_kills(top, int(rest[0])), "saves": kills_in_saves(top), "orphans": orphans(top) if Path("/proc/self/task").exists() else None, "held": held(top / "cut")}
    print(json.dumps(said), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
