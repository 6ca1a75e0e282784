"Where the numbers of other people's official code lie (see tests/fixtures/README.md)."

import os
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
PLACES = [TESTS / "fixtures", TESTS.parent.parent / "shared" / "fixtures"]
if named := os.environ.get("FACELAB_FIXTURES"):
    PLACES.insert(0, Path(named))


def fixture(name: str) -> Path:
    "The path of a fixture file; skips the test, saying what is missing, where there is none."
    for place in PLACES:
        if (place / name).exists():
            return place / name
    pytest.skip(f"fixture {name} is not here: put it under tests/fixtures or name its folder in FACELAB_FIXTURES")
