"GPTFace (arXiv 2510.18345): one masked transformer over image tokens and words."

__all__ = ["FaceEditor"]


def __getattr__(name: str):
    "`FaceEditor` of facelab.gptface.edit, imported when it is asked for."
    if name in __all__:
        from . import edit

        return getattr(edit, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
