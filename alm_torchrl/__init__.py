"""Aligned Latent Models as modular TorchRL components.

The names are imported when they are first used, so that ``alm-torchrl --help`` does
not wait for PyTorch. They are listed in ``__init__.pyi``.
"""

import lazy_loader

__version__ = "0.1.0"

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
