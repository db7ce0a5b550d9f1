"""Plugins of the methods that TreeLoRA is compared with, one method per module.

:mod:`~treelora_avalanche.plugins.baselines.past_adapters` holds the common part of O-LoRA and
InfLoRA. The strategies of the same names put these plugins together; each also works in a strategy
of one's own.
"""
