"Every component notebook runs from top to bottom, as its reader would run it."

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from nbdev.test import test_nb as run_notebook

run_notebook.__test__ = False
NBS = Path(__file__).parent.parent / "nbs"
LAYERS = ("lab", "nets", "face", "data")  # first what draws no world: by then the other worker has compiled its loops
PAGES = (p for p in NBS.rglob("*.ipynb") if "experiments" not in p.parts and ".ipynb_checkpoints" not in p.parts)
COMPONENTS = sorted(PAGES, key=lambda p: (LAYERS.index(p.parent.name) if p.parent.name in LAYERS else len(LAYERS), p))


@pytest.mark.parametrize("path", COMPONENTS, ids=lambda p: str(p.relative_to(NBS)))
def test_notebook_runs(path):
    began, here = time.monotonic(), os.getcwd()
    if "TRITON_INTERPRET" in path.read_text(encoding="utf-8"):  # has to be set before anything imports triton: a process of its own
        code = f"import sys, pathlib; from nbdev.test import test_nb; sys.exit(not test_nb(pathlib.Path({str(path)!r}))[0])"
        ok = subprocess.run([sys.executable, "-c", code], cwd=here).returncode == 0
    else:
        ok, _ = run_notebook(path)
        os.environ.pop("IN_TEST", None)  # nbdev leaves it, and nbdev_export does nothing where it finds it
    os.chdir(here)
    assert ok, f"{path.relative_to(NBS)} failed after {time.monotonic() - began:.0f} s: open it in Jupyter (make lab) and run it"


def test_there_are_notebooks():
    assert len(COMPONENTS) >= 10
