"""Evaluates the model of a finished language run on what is none of its tasks.

The base model and the final model are compared: by the perplexity on plain text, or by tasks of
EleutherAI's lm-evaluation-harness (``pip install treelora-avalanche[eval]``), as the general
ability delta of TRACE (Wang et al. 2023, arXiv 2310.06762). ``command`` is ``treelora evaluate``,
``finished`` loads a run, ``harness`` adapts its model to the harness, ``scores`` has the table.
Nothing heavy is imported here. Example::

    treelora evaluate runs/compare/TreeLoRA-seed0-1a2b3c4d --harness piqa boolq
"""
