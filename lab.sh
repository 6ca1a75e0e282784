#!/bin/sh
# What `make` calls: set-up once, then the job. POSIX sh; needs Python 3.11+ and git, nothing else.
#   sh lab.sh repro | test | check | smoke | lab | bases [name ...] | bench | list | clean | setup
set -u
cd "$(dirname "$0")" || exit 1
here=$(pwd -P)
need_mb=${FACELAB_NEED_MB:-6000}

say() { printf '%s\n' "facelab: $*" >&2; }
die() { say "$*"; exit 1; }

# A clean room: nothing of the caller's Python, Jupyter or shell leaks in.
unset PYTHONPATH PYTHONHOME PYTHONSTARTUP VIRTUAL_ENV CONDA_PREFIX CONDA_DEFAULT_ENV PIP_USER PIP_TARGET PIP_REQUIRE_VIRTUALENV 2>/dev/null || :
export SHELL=/bin/sh                       # DVC runs stages with $SHELL
export OMP_WAIT_POLICY=PASSIVE             # a waiting thread must not burn the core that the other one needs
export MPLBACKEND=agg TOKENIZERS_PARALLELISM=false DVC_NO_ANALYTICS=1 PIP_DISABLE_PIP_VERSION_CHECK=1
export JUPYTER_PREFER_ENV_PATH=1 IPYTHONDIR="$here/build/ipython" PYTHONNOUSERSITE=1 PYTHONUTF8=1
export PYTHONWARNINGS="${PYTHONWARNINGS:+$PYTHONWARNINGS,}ignore:IProgress not found"   # tqdm's bar is not for logs

find_python() {
    for name in ${PYTHON:-python3.11 python3.12 python3.13 python3 python}; do
        version=$("$name" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null) || continue
        case $version in 3.11|3.12|3.13) python=$name; return 0 ;; esac
        seen="$seen $name is $version;"
    done
    return 1
}

setup() {
    command -v git >/dev/null 2>&1 || die "git is missing. Install git, then call make again."
    stamp_now=$(cat pyproject.toml constraints.txt 2>/dev/null | cksum; printf '%s' "$here")
    if [ -x .venv/bin/python ] && [ "$(cat .venv/facelab-stamp 2>/dev/null)" = "$stamp_now" ]; then git_hooks; return 0; fi
    seen=""
    find_python || die "needs Python 3.11, 3.12 or 3.13 (${seen:-none found on PATH}). Install one, or say where: PYTHON=/path/to/python3.11 make ..."
    mkdir -p build/log 2>/dev/null && [ -w . ] || die "cannot write in this folder. Clone facelab somewhere you may write."
    free_mb=$(df -Pm . 2>/dev/null | awk 'NR==2 {print $4}')
    [ "${free_mb:-$need_mb}" -ge "$need_mb" ] || die "needs about $need_mb MB on this disk, $free_mb MB are free. Make room, or clone elsewhere."
    log=build/log/setup.log
    say "installing into .venv (2 GB, 3 to 6 minutes; log: $log)"
    rm -rf .venv
    "$python" -m venv .venv >"$log" 2>&1 || die "$python cannot make a virtual environment (Debian: apt install python3-venv). Log: $log"
    cp constraints.txt build/log/constraints.txt
    if ! .venv/bin/python -m pip install -q --retries 2 --timeout 30 -c constraints.txt -e '.[dev]' >>"$log" 2>&1; then
        if grep -qiE 'Failed to establish|NewConnectionError|ProxyError|Name or service|Network is unreachable|Temporary failure|Read timed out' "$log"; then
            die "pip cannot reach a package index. Check the network or the proxy, then call make again. Log: $log"
        elif grep -qi 'No space left' "$log"; then
            die "the disk is full while installing. Make room, then call make again. Log: $log"
        fi
        die "pip failed: $(grep -m1 -E '^ERROR' "$log" || tail -n 1 "$log") Log: $log"
    fi
    if [ -d .git ]; then PATH="$here/.venv/bin:$PATH" .venv/bin/nbdev_install_hooks >>"$log" 2>&1 || say "git hooks were not installed (see $log)"; fi
    git_hooks
    say "compiling the loops of the renderer and of the world (a minute, once)"
    .venv/bin/python -c 'from facelab.data.world import photograph, sample_person, sample_photo
photograph(sample_photo(sample_person(1, 0), 0), 16, 1)' >>"$log" 2>&1 &
    .venv/bin/python -c 'import torch
from facelab.face.fit import see
from facelab.face.code import FaceCode
from facelab.face.morphable import MorphableModel
from facelab.face.raster import rasterize
model = MorphableModel.procedural()
code = FaceCode.zeros(1, model.dims).pack().requires_grad_()
see(model, FaceCode.unpack(code, model.dims), 16)[0].image.sum().backward()
corners = torch.tensor([[[-1.0, -1, 1], [1, -1, 1], [0, 1, 1]]], requires_grad=True)
rasterize(corners, torch.tensor([[0, 1, 2]]), 4, faces_per_pixel=2, blur_radius=0.01).dists.sum().backward()' >>"$log" 2>&1 &
    wait || :  # what is not compiled now is at its first use
    printf '%s' "$stamp_now" > .venv/facelab-stamp
}

git_hooks() {  # nbdev's call nbdev by name; these look for it in .venv, and without it a merge is git's own
    grep -qx nbdev_trust .git/hooks/post-merge 2>/dev/null || return 0
    cat > .git/hooks/post-merge <<'SH' || return 0
#!/bin/sh
# From facelab's lab.sh: Jupyter trusts the notebooks that a merge brought.
if [ -x .venv/bin/nbdev_trust ]; then .venv/bin/nbdev_trust >/dev/null 2>&1; fi
exit 0
SH
    git config -f .gitconfig merge.nbdev-merge.driver 'if .venv/bin/python -c "" 2>/dev/null && [ -x .venv/bin/nbdev_merge ]; then .venv/bin/nbdev_merge %O %A %B %P; else git merge-file -L ours -L base -L theirs %A %O %B; fi'
}

quiet_kernel() {  # no 'Kernel is running over TCP' line at each stage
    mkdir -p "$IPYTHONDIR/profile_default"
    printf 'c.IPKernelApp.log_level = 40\n' > "$IPYTHONDIR/profile_default/ipython_kernel_config.py"
}

unlock() {  # locks that a killed run left, which DVC itself does not heal
    lock=.dvc/tmp/rwlock
    [ -f $lock ] || return 0
    python - <<'PY' || rm -f $lock
import json, pathlib, sys
try: held = json.loads(pathlib.Path('.dvc/tmp/rwlock').read_text())
except ValueError: sys.exit(1)
pids = {i['pid'] for v in held.values() for i in ([v['write']] if v.get('write') else []) + v.get('read', [])}
def dvc_runs(pid):
    try: return b'dvc' in pathlib.Path(f'/proc/{pid}/cmdline').read_bytes()
    except OSError: return False
sys.exit(0 if not pids or any(map(dvc_runs, pids)) else 1)
PY
}

fetch() {  # the embedded data and bases, from the remote inside the repository
    pins=$(ls data.dvc bases/*/*.dvc 2>/dev/null)
    [ -z "$pins" ] || dvc pull -q $pins || die "the embedded data could not be restored. If you edited data/ or bases/, undo it (git status; rm -rf data), then call make again."
}

job=${1:-repro}; [ $# -gt 0 ] && shift
case $job in
setup) setup ;;
clean) rm -rf .venv build .pytest_cache .ruff_cache .import_linter_cache; find . -name __pycache__ -type d -prune -exec rm -rf {} + ;;
repro)
    setup; PATH="$here/.venv/bin:$PATH"; export PATH; quiet_kernel; unlock; fetch
    trap 'say "stopped. make repro goes on where it was."; exit 130' INT TERM HUP
    dvc repro "$@" || die "a stage failed: the lines above name it; runs/<stage>.ipynb opens at the cell that failed. make repro goes on from there."
    python -m facelab.lab.table ;;
smoke)  # the whole pipeline in the smoke profile, in a clone, so that nothing here changes
    setup; PATH="$here/.venv/bin:$PATH"; export PATH; quiet_kernel
    python -m facelab.lab.smoke ;;
test)
    setup; PATH="$here/.venv/bin:$PATH"; export PATH; quiet_kernel; fetch
    # one worker more than two cores: a tenth of the time a test waits for a process or a disk
    python -m pytest -n "${FACELAB_WORKERS:-3}" --dist worksteal "$@" ;;
check)
    setup; PATH="$here/.venv/bin:$PATH"; export PATH
    python -m facelab.lab.check "$@" ;;
list)
    setup; PATH="$here/.venv/bin:$PATH"; export PATH; python -m facelab.lab.run --list ;;
bench)
    setup; PATH="$here/.venv/bin:$PATH"; export PATH; python -m facelab.lab.run face-benchmark "$@" ;;
bases)
    setup; PATH="$here/.venv/bin:$PATH"; export PATH; quiet_kernel; sh bases/make.sh "$@" ;;
lab)
    setup; PATH="$here/.venv/bin:$PATH"; export PATH; jupyter lab "$@" ;;
*) die "no such job: $job (repro, test, check, smoke, lab, bases, bench, list, clean, setup)" ;;
esac
