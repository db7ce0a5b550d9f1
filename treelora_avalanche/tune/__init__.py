"""Choice of hyper-parameters on the first tasks of a stream. Example::

    from treelora_avalanche.registry import RunSettings
    from treelora_avalanche.tune import tune, write_tuned

    tuned = tune(["TreeLoRA", "SeqLoRA"], RunSettings(tune_tasks=3), "runs/tune", trials=10)
    write_tuned(tuned, RunSettings(tune_tasks=3), "runs/tune")  # and YAML

The protocol is that of Chaudhry et al. 2019 ("Efficient Lifelong Learning with A-GEM"): what is
chosen on the first tasks alone, by held-out training samples, is fixed for the whole stream. Every
method has the same number of trials.
"""

from treelora_avalanche.tune.report import caption, table, tuned_config, write_tuned
from treelora_avalanche.tune.rounds import Tuned, tune
from treelora_avalanche.tune.search import MethodSearch, Trial

__all__ = [
    "MethodSearch",
    "Trial",
    "Tuned",
    "caption",
    "table",
    "tune",
    "tuned_config",
    "write_tuned",
]
