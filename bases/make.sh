#!/bin/sh
# Train the shipped bases, on purpose: sh bases/make.sh [name ...]. FORCE=1 trains although nothing changed. PROFILE=smoke walks the way in a clone.
set -eu
cd "$(dirname "$0")/.."
all=$(cd bases && ls */mini.yaml | cut -d / -f 1)
if [ "${PROFILE:-mini}" = smoke ]; then exec python -m facelab.lab.smoke bases ${*:-$all}; fi
export FACELAB_BASES=1
for base in ${*:-${BASE:-$all}}; do
    if [ -f "bases/$base/paper.yaml" ]; then  # from the user's own data: nothing is pinned
        FACELAB_BASE_PROFILE=paper python -m facelab.lab.base "$base"
        echo "bases/$base is made; it stays on this machine"
        continue
    fi
    dvc repro -s ${FORCE:+-f} "bases/dvc.yaml:$base"
    dvc add -q "bases/$base/model.safetensors"
    dvc push -q "bases/$base/model.safetensors.dvc"
    echo "bases/$base is made; commit bases/$base, bases/dvc.lock and .dvcstore"
done
