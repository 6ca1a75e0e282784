"My3DGen (arXiv 2307.05468): a personal 3D generative prior from a few low-rank weights."

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(__name__, submod_attrs={"personalize": ["PersonalPrior"]})  # imported when it is asked for
