"""Every method of ``treelora list`` holds the contract, on real images and on real texts."""

import pytest
import torch

from contract_methods import (
    CASES,
    CLASSES,
    LANGUAGE,
    N_TEXTS,
    PENALISED,
    RANK,
    SETTINGS,
    TREE,
    VISION,
    Watch,
    factories,
    missing,
)
from support import plugin_of
from treelora_avalanche.checkpoint import load_strategy, save_strategy
from treelora_avalanche.models import TokenCrossEntropy
from treelora_avalanche.registry import METHODS
from treelora_avalanche.testing import (
    check_batch_independence,
    check_frozen_weights,
    check_memory,
    check_new_process,
    check_no_task_labels,
    check_present_data,
    check_trainable_weights,
    record_evaluation,
    train_and_record,
)
from treelora_avalanche.testing.reloading import new_process

pytestmark = pytest.mark.filterwarnings("ignore:No loggers specified")

TRAINED = [(kind, name) for kind, name in CASES if not METHODS[name].frozen]
STORES_SAMPLES = {"Replay", "Cumulative"}
READS_NO_TOKENS = {"InContext"}

# The sizes of stories260K, and of an adapter on its queries and values, in bytes.
WIDTH, KEYS, N_BLOCKS = 64, 32, 5
ADAPTER = 4 * N_BLOCKS * RANK * (2 * WIDTH + WIDTH + KEYS)
# The adapter, its layers made equally large; a signature of 256 numbers per layer; the sums of two
# nodes of the tree, in double precision; and from the second task on the layers' picks.
LAST = 4 * 2 * N_BLOCKS * (RANK * 2 * WIDTH + 256) + 8 * (2 * 256 + 2 * N_BLOCKS)
STORED_PER_TASK = {
    "TreeLoRA-last": LAST,
    # Also the features of the prompts, and the mean input of each layer.
    "TreeLoRA": LAST + 4 * WIDTH * (N_TEXTS + 2 * N_BLOCKS),
    "SeqLoRA": 0,
    "EWCLoRA": 0,
    "OGD": N_TEXTS * ADAPTER,
    "OLoRA": ADAPTER,
    # And a magnitude per layer.
    "SDLoRA": ADAPTER + 4 * 2 * N_BLOCKS,
    "OSF": 0,
    "L2P": 0,
    "DualPrompt": 4 * (3 * 2 * 3 * KEYS + WIDTH),
    # On keys and values; and a centroid for each of so few texts.
    "HiDeLoRA": 4 * (N_BLOCKS * RANK * 2 * (WIDTH + KEYS) + N_TEXTS * (2 * WIDTH + 1)),
    "SAPT": ADAPTER + 4 * WIDTH,
    "TaSL": 0,
    "L2Anchor": 0,
    "Naive": 0,
    "LwF": 0,
    "InContext": 4 * WIDTH,
}


def loss_of(strategy, dataset):
    """The mean loss of texts."""
    inputs, targets, *_ = map(torch.stack, zip(*[sample[:2] for sample in dataset], strict=True))
    strategy.model.eval()
    with torch.no_grad():
        return TokenCrossEntropy()(strategy.model(inputs), targets).item()


@pytest.fixture(scope="module")
def trained(data_root):
    """Trains a method when a test first needs it."""
    done = {}

    def of(kind, method):
        if missing(kind, data_root):
            pytest.skip(f"no data: {missing(kind, data_root)} is missing")
        if (kind, method) not in done:
            made = factories(kind, method, data_root)
            done[kind, method] = train_and_record(
                made.make_strategy, make_model=made.make_model, benchmark=made.benchmark
            )
        return done[kind, method]

    return of


@pytest.fixture(scope="module")
def other_process():
    """One new process, which all methods are loaded in."""
    with new_process() as executor:
        yield executor


@pytest.mark.parametrize("method", [name for kind, name in CASES if kind == VISION])
def test_learns_images_and_evaluates(trained, method):
    run = trained(VISION, method)
    outputs = torch.cat(
        [batch.outputs for batch in record_evaluation(run.strategy, run.benchmark.test_stream)]
    )
    targets = torch.tensor([t for e in run.benchmark.test_stream for t in e.dataset.targets])
    assert outputs.shape == (len(targets), len(CLASSES))
    # Better than one class for all within the second task, which nothing came after.
    last = torch.tensor(sorted(run.benchmark.test_stream[1].classes_in_this_experience))
    of_last = torch.isin(targets, last)
    predicted = last[outputs[of_last][:, last].argmax(1)]
    assert (predicted == targets[of_last]).float().mean() > 0.6


@pytest.mark.parametrize("method", [name for kind, name in TRAINED if kind == LANGUAGE])
def test_learns_texts(trained, method):
    run = trained(LANGUAGE, method)
    untrained, _ = run.factories.build()
    last = run.benchmark.train_stream[1].dataset
    assert loss_of(run.strategy, last) < loss_of(untrained, last)


@pytest.mark.parametrize(("kind", "method"), CASES)
def test_frozen_weights_stay_bit_for_bit(trained, kind, method):
    run = trained(kind, method)
    if METHODS[method].uses_lora:
        assert len(run.frozen) > 40
    check_frozen_weights(run)


@pytest.mark.parametrize(("kind", "method"), TRAINED)
def test_trainable_weights_move(trained, kind, method):
    check_trainable_weights(trained(kind, method), share=0.4)


@pytest.mark.parametrize(("kind", "method"), CASES)
def test_a_prediction_does_not_depend_on_its_batch(trained, kind, method):
    run = trained(kind, method)
    assert len(run.prompts) == (8 if kind == LANGUAGE else 0)
    check_batch_independence(run)


@pytest.mark.parametrize(("kind", "method"), CASES)
def test_no_task_label_is_read_at_test_time(trained, kind, method):
    run = trained(kind, method)
    batches = record_evaluation(run.strategy, run.benchmark.test_stream)
    assert {label for batch in batches for label in batch.task_labels.tolist()} == {0}
    assert sum(len(batch.inputs) for batch in batches) == sum(
        len(experience.dataset) for experience in run.benchmark.test_stream
    )
    check_no_task_labels(run)


@pytest.mark.parametrize(("kind", "method"), CASES)
def test_training_reads_the_present_task_alone(trained, kind, method):
    run = trained(kind, method)
    for samples, read in zip(run.samples, run.read, strict=True):
        assert samples
        assert samples <= read or method in READS_NO_TOKENS
    check_present_data(run, stores_samples=method in STORES_SAMPLES)


@pytest.mark.parametrize(("kind", "method"), CASES)
def test_loads_in_a_new_process(trained, other_process, tmp_path, kind, method):
    check_new_process(trained(kind, method), tmp_path, other_process)


@pytest.mark.parametrize("kind", SETTINGS)
def test_another_methods_state_is_refused(trained, data_root, tmp_path, kind):
    others = [name for of_kind, name in CASES if of_kind == kind and name != "SeqLoRA"]
    for name in others:
        save_strategy(trained(kind, name).strategy, tmp_path / name)
    strategy, _ = factories(kind, "SeqLoRA", data_root).build()
    for name in others:
        with pytest.raises(ValueError, match=type(trained(kind, name).strategy).__name__):
            load_strategy(strategy, tmp_path / name)


@pytest.mark.parametrize(("kind", "method"), [case for case in CASES if case[1] in PENALISED])
def test_a_penalty_acts_from_the_second_task_on(trained, kind, method):
    run = trained(kind, method)
    first, second = plugin_of(run.strategy, Watch).penalties
    assert len(first) > 0
    assert all(value == 0 for value, _ in first)
    if method in TREE:  # its penalty is a proximal step of its own
        steps, values = run.strategy.evaluator.get_all_metrics()[
            "SparsePenalty/train_phase/train_stream"
        ]
        assert min(steps) > len(first)
        assert min(values) > 0
        return
    # At the first step some are where they are pulled to.
    assert len(second) > 1
    assert all(value > 0 and gradient > 0 for value, gradient in second[1:])


@pytest.mark.parametrize("method", STORED_PER_TASK)
def test_memory_grows_as_the_method_says(trained, method):
    run = trained(LANGUAGE, method)
    first, second = run.stored
    assert second - first == STORED_PER_TASK[method]
    check_memory(run, STORED_PER_TASK[method])


def test_memory_of_inf_lora_is_bounded(trained):
    subspaces = 4 * 2 * N_BLOCKS * WIDTH**2 // 2
    first, second = trained(LANGUAGE, "InfLoRA").stored
    assert 0 < first <= subspaces
    assert ADAPTER < second <= ADAPTER + subspaces
