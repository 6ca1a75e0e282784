"GPTFace (arXiv 2510.18345): one masked transformer over image tokens and words."

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(__name__, submod_attrs={"edit": ["FaceEditor"]})  # imported when it is asked for
