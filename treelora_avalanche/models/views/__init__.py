"""Views: modules around a backbone that change which part of it runs, and with which adapter.

``split``, ``split_vit`` and ``split_language`` divide a model at the first trainable block.
``router``, ``routed_vit`` and ``routed_language`` choose an adapter for each sample.
``attentive_language`` weighs the adapters of all tasks, ``in_context_language`` puts demonstrations
before a prompt, and ``precision`` sets the precision of a view. A view that shows the trainable
parameters alone, and does nothing else, is :class:`~treelora_avalanche.adapters.TrainableView`.
"""
