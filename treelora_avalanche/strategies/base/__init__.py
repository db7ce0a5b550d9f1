"""Base classes of the strategies.

:class:`~treelora_avalanche.strategies.base.parameter_efficient.ParameterEfficientStrategy` trains a
small part of a frozen backbone (LoRA, prompts);
:class:`~treelora_avalanche.strategies.base.untrained.UntrainedStrategy` passes over each experience
once and takes no optimizer step. Both are Avalanche's ``SupervisedTemplate`` with mixins:

* ``arguments``: complete constructor signatures, ``model`` first; TypedDicts of shared arguments;
* ``summary``: what ``print(strategy)`` shows;
* ``accumulation``: several mini-batches per optimizer step;
* ``token_batches``: loaders and forward passes for token sequences;
* :class:`~treelora_avalanche.checkpoint.Resumable`: save and load between experiences.

``defaults`` holds the default optimizer, criterion and evaluator for each kind of model.
"""
