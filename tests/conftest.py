"Threads are fixed before numpy and torch are imported, so that two test workers use two cores once."

import os
import sys
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("MPLBACKEND", "agg")
sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(scope="session", params=["stand-in", "ict"])
def few_ict(request, tmp_path_factory) -> dict:
    "A few hundred vertices in ICT-FaceKit's layout: of the lab's own head, so that a test always runs, and of the real one where it is. `path`, and two faces of them in float64 (`few_of_ict`)."
    from fixture_files import fixture
    from make_models import few_of_ict, write_ict

    from facelab.face.morphable import MorphableModel

    folder = tmp_path_factory.mktemp("ict")
    whole = fixture("ict/ict_face9409.npz") if request.param == "ict" else write_ict(MorphableModel.procedural(), folder / "whole.npz")
    return few_of_ict(whole, folder / "few.npz") | {"path": folder / "few.npz", "real": request.param == "ict"}
