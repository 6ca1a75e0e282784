"The shell's part: the git hooks that `make setup` leaves (a merge works with and without the virtual environment), and which bases `make bases` makes."

import os
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).parent.parent
NOTEBOOK = "nbs/a.ipynb"


def call(folder, *words, **more):
    "Run a command where no nbdev is on PATH."
    who = {f"GIT_{role}_{what}": value for role in ("AUTHOR", "COMMITTER") for what, value in (("NAME", "a"), ("EMAIL", "a@b.c"))}
    git = Path(shutil.which("git")).parent
    env = {"PATH": f"{git}:/usr/bin:/bin", "HOME": str(folder.parent), **who}
    return subprocess.run(words, cwd=folder, env=env, capture_output=True, text=True, **more)


def write(folder, first, last):
    cells = [nbformat.v4.new_code_cell(text, id=f"cell-{k}") for k, text in enumerate([first, *"bcdefgh", last])]
    (folder / "nbs").mkdir(exist_ok=True)
    nbformat.write(nbformat.v4.new_notebook(cells=cells), folder / NOTEBOOK)


@pytest.fixture
def repo(tmp_path):
    "A checkout that `nbdev_install_hooks` and `lab.sh setup` have been in, with two branches that change one notebook."
    folder = tmp_path / "repo"
    folder.mkdir()
    for name in ("lab.sh", "pyproject.toml", "constraints.txt", "settings.ini", ".gitattributes"):
        shutil.copy(ROOT / name, folder)
    (folder / ".gitignore").write_text(".venv\n.gitconfig\n")
    call(folder, "git", "init", "-q", "-b", "main", check=True)
    installed = Path(sys.executable).with_name("nbdev_install_hooks")
    subprocess.run([installed], cwd=folder, env={**os.environ, "HOME": str(tmp_path)}, check=True, capture_output=True)
    (folder / ".venv" / "bin").mkdir(parents=True)
    (folder / ".venv" / "bin" / "python").symlink_to(sys.executable)
    stamp = call(folder, "sh", "-c", "cat pyproject.toml constraints.txt | cksum; printf '%s' \"$(pwd -P)\"", check=True).stdout
    (folder / ".venv" / "facelab-stamp").write_text(stamp)
    assert call(folder, "sh", "lab.sh", "setup").returncode == 0
    for branch, first, last in (("main", "a = 1", "z = 1"), ("other", "a = 1", "z = 2"), ("main", "a = 2", "z = 1")):
        if branch == "other":
            call(folder, "git", "checkout", "-qb", branch, check=True)
        else:
            call(folder, "git", "checkout", "-q", branch)
        write(folder, first, last)
        call(folder, "git", "add", "-A", check=True)
        call(folder, "git", "commit", "-qm", "change", check=True)
    return folder


def merged(folder):
    done = call(folder, "git", "merge", "--no-edit", "other")
    assert done.returncode == 0 and "not found" not in done.stdout + done.stderr and not done.stderr.strip(), done.stdout + done.stderr
    cells = nbformat.read(folder / NOTEBOOK, 4).cells
    assert (cells[0].source, cells[-1].source) == ("a = 2", "z = 2")


def test_a_merge_without_the_environment(repo):
    shutil.rmtree(repo / ".venv")
    merged(repo)


def test_a_merge_with_a_broken_environment(repo):
    python = repo / ".venv" / "bin" / "python"
    python.unlink()
    python.symlink_to("/no/such/python")
    for name in ("nbdev_trust", "nbdev_merge"):
        (repo / ".venv" / "bin" / name).write_text(f"#!{python}\n")
        (repo / ".venv" / "bin" / name).chmod(0o755)
    merged(repo)


def test_a_merge_uses_the_environment_that_is_not_active(repo):
    for name, rest in (("nbdev_trust", ""), ("nbdev_merge", 'git merge-file "$2" "$1" "$3"')):
        (repo / ".venv" / "bin" / name).write_text(f"#!/bin/sh\necho {name} >> .venv/called\n{rest}\n")
        (repo / ".venv" / "bin" / name).chmod(0o755)
    merged(repo)
    assert (repo / ".venv" / "called").read_text().split() == ["nbdev_merge", "nbdev_trust"]


def test_a_conflict_stays_a_conflict(repo):
    shutil.rmtree(repo / ".venv")
    write(repo, "a = 2", "z = 3")
    call(repo, "git", "commit", "-qam", "change", check=True)
    done = call(repo, "git", "merge", "--no-edit", "other")
    assert done.returncode == 1 and "CONFLICT" in done.stdout and "<<<<<<< ours" in (repo / NOTEBOOK).read_text()
    assert call(repo, "git", "diff", "--name-only", "--diff-filter=U").stdout.split() == [NOTEBOOK]


def test_a_hook_of_ones_own_is_left_alone(repo):
    (repo / ".git" / "hooks" / "post-merge").write_text("#!/bin/sh\necho mine\n")
    assert call(repo, "sh", "lab.sh", "setup").returncode == 0
    assert "mine" in (repo / ".git" / "hooks" / "post-merge").read_text()


@pytest.mark.parametrize("profile, words, base, made", [
    ("smoke", "", "b", ["smoke bases b"]), ("smoke", "", "", ["smoke bases a b"]), ("smoke", "a", "b", ["smoke bases a"]), ("mini", "", "b", ["dvc b"]), ("mini", "", "", ["dvc a", "dvc b"]), ("mini", "a", "b", ["dvc a"]), ("mini", "own", "", ["base own"]),
])  # fmt: skip
def test_which_bases_are_made(profile, words, base, made, tmp_path):
    "`python` and `dvc` only say what they were asked for."
    for name in ("a/mini.yaml", "b/mini.yaml", "own/paper.yaml"):
        (tmp_path / "bases" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "bases" / name).touch()
    shutil.copy(ROOT / "bases" / "make.sh", tmp_path / "bases")
    stubs = {"python": """shift; echo "${1#facelab.lab.}" "$(shift; echo "$@")" """, "dvc": """[ "$1" != repro ] || echo dvc "${3#*:}" """}
    (tmp_path / "bin").mkdir()
    for name, text in stubs.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    env = {"PATH": f"{tmp_path / 'bin'}:/usr/bin:/bin", "PROFILE": profile} | ({"BASE": base} if base else {})
    done = subprocess.run(["sh", "bases/make.sh", *words.split()], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0 and [line for line in done.stdout.splitlines() if "is made" not in line] == made, done.stderr
