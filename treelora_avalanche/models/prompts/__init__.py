"""Prompt tuning and prefix tuning of frozen backbones.

A prompt is a sequence of trainable tokens put before the input (prompt tuning, L2P); a prefix is
trainable keys and values put before those of the attention (prefix tuning, DualPrompt and HiDe).
``pools`` holds prompts and keys, independent of the backbone; ``vit`` puts them on vision
transformers, ``language_input`` and ``language_attention`` on language models.
"""
