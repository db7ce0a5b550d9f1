"""One run: one method, one seed, one stream of tasks, and a folder of plain files. Example::

    from treelora_avalanche.registry import RunSettings
    from treelora_avalanche.runs import run

    results = run("TreeLoRA", seed=0, settings=RunSettings(epochs=2), folder="runs/first")
    results["metrics"]["class_incremental"]["overall_performance"]

The run folder holds::

    config.yaml                   written first; its keys are flags of ``treelora train``
    metrics.jsonl                 appended: one line per epoch, one line per task
    adapters/task_000/ ...        PEFT adapters, one after each task
    tree.safetensors, tree.json   TreeLoRA's tree, rewritten after each task
    tree.txt                      appended: a drawing of the tree after each task
    generated.jsonl               appended: texts that a language model generated in evaluation
    tensorboard/, *_results.csv   Avalanche's loggers
    state/                        only while the run is unfinished: the state to resume from
    model/                        of a language run: what its predictions need beyond the weights
    results.json                  written last: its presence marks a finished run
"""

from treelora_avalanche.metrics.footprint import stored_bytes
from treelora_avalanche.provenance import git_hash
from treelora_avalanche.runs.config import resolve_config
from treelora_avalanche.runs.fingerprints import fingerprints
from treelora_avalanche.runs.folder import (
    SCHEMA_VERSION,
    changed_inputs,
    finished_results,
    read_results,
    run_name,
    to_json,
    write_text,
)
from treelora_avalanche.runs.monitors import JsonLinesLogger, Progress, ProgressPlugin
from treelora_avalanche.runs.setup import Ingredients, check_arguments, prepare
from treelora_avalanche.runs.single import run

__all__ = [
    "SCHEMA_VERSION",
    "Ingredients",
    "JsonLinesLogger",
    "Progress",
    "ProgressPlugin",
    "changed_inputs",
    "check_arguments",
    "fingerprints",
    "finished_results",
    "git_hash",
    "prepare",
    "read_results",
    "resolve_config",
    "run",
    "run_name",
    "stored_bytes",
    "to_json",
    "write_text",
]
