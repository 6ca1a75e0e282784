"SynthForge (arXiv 2406.07840): faces with exact annotations, and the networks that learn from them."

__all__ = ["load_landmarks", "load_parser"]


def __getattr__(name: str):
    "`load_parser` and `load_landmarks` of facelab.synthforge.use, imported when they are asked for."
    if name in __all__:
        from . import use

        return getattr(use, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
