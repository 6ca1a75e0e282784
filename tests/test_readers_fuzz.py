"""Damaged files at random: each gives a value or an `InputError`, none another exception, none takes long.

The cases of test_bad_input.py are what somebody thought of; these are what nobody did. The damage is drawn from a fixed seed.
"""

import os
import time
import warnings

import numpy as np
import pytest
from PIL import Image
from test_bad_input import READERS

from facelab.lab.errors import InputError
from facelab.lab.images import read_image

FILES = 60  # damaged files a reader
SECONDS = 10.0  # for one of them


def picture(path):
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 24, 3), np.uint8)).save(path)


CASES = {name: (read, suffix, good) for name, (read, suffix, good, _) in READERS.items()} | {suffix: (read_image, f".{suffix}", picture) for suffix in ("jpg", "webp", "gif", "bmp", "tif", "ppm")}


def damaged(whole: bytes, rng: np.random.Generator) -> bytes:
    "Cut, flipped anywhere, set to telling values near the head, or with bytes put in."
    data, kind = np.frombuffer(whole, np.uint8).copy(), rng.integers(4)
    if kind == 0:
        return data[: rng.integers(0, len(data))].tobytes()
    if kind == 1:
        data[rng.integers(0, len(data), rng.integers(1, 4))] = rng.integers(0, 256)
    elif kind == 2:
        data[rng.integers(0, min(len(data), 256), rng.integers(1, 4))] = rng.choice([0, 1, 127, 128, 255])
    else:
        at = rng.integers(0, len(data))
        data = np.concatenate([data[:at], rng.integers(0, 256, rng.integers(1, 9), np.uint8), data[at:]])
    return data.tobytes()


@pytest.mark.parametrize("name", CASES)
def test_damage_gives_a_value_or_an_input_error(name, tmp_path, monkeypatch):
    read, suffix, good = CASES[name]
    monkeypatch.chdir(tmp_path)
    good(tmp_path / f"good{suffix}")
    whole, rng, path, refused = (tmp_path / f"good{suffix}").read_bytes(), np.random.default_rng(7), tmp_path / f"bad{suffix}", 0
    for file in range(FILES):
        path.write_bytes(damaged(whole, rng))
        began = time.process_time()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                read(path)
            except InputError as error:
                refused += 1
                assert error.came and error.needed and error.fix
        assert time.process_time() - began < SECONDS, f"file {file} took too long"
    assert refused >= FILES // 10, "hardly anything was refused: is the damage real?"
    assert sorted(os.listdir(tmp_path)) == sorted({f"good{suffix}", path.name}), "a reader wrote something"


def test_the_damage_is_the_same_each_time():
    assert damaged(b"face" * 99, np.random.default_rng(3)) == damaged(b"face" * 99, np.random.default_rng(3)) != b"face" * 99
