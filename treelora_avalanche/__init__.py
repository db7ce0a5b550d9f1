"""Continual fine-tuning of pretrained transformers, as Avalanche strategies.

The names of ``__init__.pyi`` are imported on first access: torch and Avalanche take seconds to
import, and ``treelora --help`` needs neither. Example::

    from treelora_avalanche import TreeLoRAStrategy

    strategy = TreeLoRAStrategy(model, train_epochs=4, device="cuda")
    for experience in benchmark.train_stream:
        strategy.train(experience)
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
