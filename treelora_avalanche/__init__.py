"""Continual fine-tuning of pretrained transformers, as Avalanche strategies.

The names of ``__init__.pyi`` are loaded when they are first used: importing torch and Avalanche
takes seconds, and ``treelora --help`` needs neither.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
