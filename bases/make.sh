#!/bin/sh
# Train the shipped bases, on purpose: sh bases/make.sh [name ...]. FORCE=1 trains although nothing changed. PROFILE=smoke walks the way in a clone.
set -eu
cd "$(dirname "$0")/.."
names=${*:-${BASE:-$(cd bases && ls */mini.yaml | cut -d / -f 1)}}
if [ "${PROFILE:-mini}" = smoke ]; then exec python -m facelab.lab.smoke bases $names; fi
export FACELAB_BASES=1
for base in $names; do
    for profile in paper gpu; do  # from the user's own data, or on the user's own GPU: nothing is pinned
        if [ -f "bases/$base/$profile.yaml" ]; then
            FACELAB_BASE_PROFILE=$profile python -m facelab.lab.base "$base"
            echo "bases/$base is made; it stays on this machine"
            continue 2
        fi
    done
    dvc repro -s ${FORCE:+-f} "bases/dvc.yaml:$base"
    dvc add -q "bases/$base/model.safetensors"
    dvc push -q "bases/$base/model.safetensors.dvc"
    echo "bases/$base is made; commit bases/$base, bases/dvc.lock and .dvcstore"
done
