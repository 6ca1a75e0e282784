#!/bin/sh
# Train the shipped bases, on purpose: sh bases/make.sh [name ...]. FORCE=1 trains although nothing changed. PROFILE=smoke walks the way in a clone.
set -eu
cd "$(dirname "$0")/.."
all=$(cd bases && ls -d */ | tr -d /)
if [ "${PROFILE:-mini}" = smoke ]; then exec python -m facelab.lab.smoke bases ${*:-$all}; fi
export FACELAB_BASES=1
for base in ${*:-${BASE:-$all}}; do
    dvc repro -s ${FORCE:+-f} "bases/dvc.yaml:$base"
    dvc add -q "bases/$base/model.safetensors"
    dvc push -q "bases/$base/model.safetensors.dvc"
    echo "bases/$base is made; commit bases/$base, bases/dvc.lock and .dvcstore"
done
