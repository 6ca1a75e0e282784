"FaceGPT (arXiv 2406.07163): a vision-language model that answers in 3D faces."

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(__name__, submod_attrs={"use": ["FaceGPT"]})  # imported when it is asked for
