"FaceGPT (arXiv 2406.07163): a vision-language model that answers in 3D faces."

__all__ = ["FaceGPT"]


def __getattr__(name: str):
    "`FaceGPT` with all that facelab.facegpt.use gives it, imported when it is asked for."
    if name in __all__:
        from . import use

        return getattr(use, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
