"The bytes of a coarse copy as one hash; `python coarse_digest.py` prints it."

import hashlib

from facelab.face.coarse import _coarse
from facelab.face.morphable import MorphableModel


def digest() -> str:
    small = _coarse(MorphableModel.procedural(), 1600)
    return hashlib.sha256(b"".join(x.numpy().tobytes() for x in (small.faces, small.info["vertex_ids"], small.uv_faces, small.region_ids, small.shape_basis))).hexdigest()


if __name__ == "__main__":
    print(digest())
