"""Plugins that change how any method is trained: speed, schedules, memory, processes, safety.

They cache activations, freeze blocks, schedule the learning rate, divide batches between processes
and stop at a diverged loss, and know nothing of the method. A plugin that cannot be combined with
one of them says so by an attribute, such as ``requires_whole_adapter``, which
:class:`~treelora_avalanche.plugins.FirstSessionPlugin` reads.
"""
