"My3DGen (arXiv 2307.05468): a personal 3D generative prior from a few low-rank weights."

__all__ = ["PersonalPrior"]


def __getattr__(name: str):
    "`PersonalPrior` of facelab.my3dgen.personalize, imported when it is asked for."
    if name in __all__:
        from . import personalize

        return getattr(personalize, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
