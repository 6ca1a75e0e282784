"A run that is killed at any moment and started again ends with the bits of the run that was never killed."

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

TARGET = Path(__file__).with_name("train_target.py")


def target(mode, folder, *rest):
    done = subprocess.run([sys.executable, TARGET, mode, folder, *map(str, rest)], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def said():
    "One process imports torch once; the runs that are killed are its children, and so is the one that another writer meets. In memory where there is such a folder: a kill, unlike a power cut, loses nothing that was written."
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None) as folder:
        said = target("kills", folder, 20)
        return said | {"again": target("run", Path(folder) / "cut", 24)}  # the same command, in a process of its own


def test_twenty_kills_at_random_moments(said):
    random = said["random"]
    assert random["killed"] == 20 and random["same"] == 20, random
    assert sum(steps > 0 for steps in random["resumed"]) >= 3, "few runs went on from a checkpoint: the kills came too early to show anything"


def test_a_kill_before_each_file_operation_of_a_save(said):
    saves = said["saves"]
    assert saves["operations"] > 25 and saves["same"] == saves["operations"], saves
    assert saves["resumed"] == sorted(saves["resumed"]) and set(saves["resumed"]) == {0, 1, 2, 3}, "a moment at which the old checkpoint was gone and the new one not there"


def test_workers_end_with_the_run_that_was_killed(said):
    if said["orphans"] is None:
        pytest.skip("no /proc to look at processes")
    assert said["orphans"] == {"found": 6, "left": 0}


def test_the_same_command_after_a_kill_and_no_second_writer(said):
    assert said["held"]["busy"], "the run that should be busy has ended"
    assert said["held"]["named"], said["held"]["refused"]
    assert said["again"]["digest"] == said["whole"]
