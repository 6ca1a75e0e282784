"SynthForge (arXiv 2406.07840): faces with exact annotations, and the networks that learn from them."

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(__name__, submod_attrs={"use": ["load_landmarks", "load_parser"]})  # imported when it is asked for
