"""One run: a method learns a stream of tasks, and leaves a folder of plain files.

config.yaml               first; its keys are flags of `treelora train`
metrics.jsonl             appended: a line per epoch, a line per task
adapters/task_000/ ...    peft folders, one after each task
tree.safetensors, tree.json   TreeLoRA's tree, rewritten after each task
tree.txt                  appended: a drawing of the tree after each task
tensorboard/, *_results.csv   Avalanche's own loggers
state/                    while it runs: where an interrupted run continues
results.json              last; its presence says that the run is finished
"""

from treelora_avalanche.metrics.footprint import stored_bytes
from treelora_avalanche.provenance import git_hash
from treelora_avalanche.runs.config import resolve_config
from treelora_avalanche.runs.folder import (
    SCHEMA_VERSION,
    finished_results,
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
    "check_arguments",
    "finished_results",
    "git_hash",
    "prepare",
    "resolve_config",
    "run",
    "run_name",
    "stored_bytes",
    "to_json",
    "write_text",
]
