"""The checks of treelora_avalanche.testing: each finds its violation, and names it."""

import pickle
from contextlib import nullcontext
from functools import partial

import pytest
import torch
from avalanche.benchmarks import benchmark_with_validation_stream

import contract_examples as examples
from contract_examples import of_class, with_plugin
from treelora_avalanche.testing import (
    ContractError,
    Factories,
    check_batch_independence,
    check_frozen_weights,
    check_memory,
    check_new_process,
    check_no_task_labels,
    check_present_data,
    check_strategy,
    check_trainable_weights,
    checks,
    predict,
    record_evaluation,
    tiny_benchmark,
    tiny_vit,
    train_and_record,
)
from treelora_avalanche.testing.reloading import new_process

pytestmark = pytest.mark.filterwarnings("ignore:No loggers specified")

IN_THIS_PROCESS = [
    check_frozen_weights,
    check_trainable_weights,
    check_batch_independence,
    check_no_task_labels,
    check_present_data,
]
VIOLATIONS = [
    (with_plugin, examples.WritesToFrozenWeights, check_frozen_weights, r"\[frozen weights\]"),
    (
        with_plugin,
        examples.TakesBackEveryStep,
        check_trainable_weights,
        r"moved 0 of \d+ trainable",
    ),
    (of_class, examples.MajorityOfTheBatch, check_batch_independence, "batches of 64 and of 1"),
    (of_class, examples.ReadsTheTaskLabel, check_no_task_labels, "task label 1 and no experience"),
    (of_class, examples.ChoosesByExperience, check_no_task_labels, "differ from those"),
    (with_plugin, examples.ReadsTheFuture, check_present_data, "experience 0 read 1 samples"),
    (with_plugin, examples.ReadsThePast, check_present_data, "experience 1 read 1 samples"),
    (with_plugin, examples.ReadsTheTestStream, check_present_data, "experience 0 read 1 samples"),
]


@pytest.fixture(scope="module")
def other_process():
    with new_process() as executor:
        yield executor


@pytest.mark.parametrize(("make", "what", "check", "message"), VIOLATIONS)
def test_a_violation_fails_its_check_and_no_other(make, what, check, message):
    trained = train_and_record(partial(make, what))
    with pytest.raises(ContractError, match=message):
        check(trained)
    for other in IN_THIS_PROCESS:
        if other is not check:
            other(trained)


@pytest.mark.parametrize("check", [check_no_task_labels, check_batch_independence])
def test_a_strategy_that_fails_without_an_experience_reads_it(check):
    trained = train_and_record(partial(of_class, examples.ReadsTheExperience))
    with pytest.raises(ContractError, match=r"\[no task labels\].*no experience raised Attribute"):
        check(trained)


def test_the_error_survives_the_way_between_processes():
    error = pickle.loads(pickle.dumps(ContractError("check", "It fails.", "Mend it.")))
    assert str(error) == "[check] It fails. Mend it."
    assert isinstance(error, AssertionError)


def test_a_strategy_that_holds_the_contract_passes_by_reference(other_process, monkeypatch):
    # test_extension.py lets it start its own process.
    monkeypatch.setattr(checks, "new_process", lambda: nullcontext(other_process))
    trained = check_strategy("contract_examples:plain", bytes_per_task=0)
    assert [len(samples) for samples in trained.samples] == [32, 32, 32]
    assert trained.samples == trained.read
    assert trained.stored == [0, 0, 0]
    assert len(trained.inputs) == 48


def test_a_method_that_trains_nothing_passes_where_it_says_so():
    trained = train_and_record(examples.frozen)
    check_frozen_weights(trained)
    check_present_data(trained)
    check_batch_independence(trained)


def test_replay_passes_where_it_is_declared(other_process):
    trained = train_and_record(examples.replay)
    with pytest.raises(ContractError, match="declare stores_samples=True"):
        check_present_data(trained)
    check_present_data(trained, stores_samples=True)
    check_new_process(trained, executor=other_process)


def test_memory_growth_is_compared_with_the_declared_one():
    trained = train_and_record(partial(with_plugin, examples.KeepsAVectorPerTask))
    assert trained.stored == [400, 800, 1200]
    check_memory(trained, 400)
    with pytest.raises(ContractError, match="experience 1 added 400 stored bytes, and 399"):
        check_memory(trained, 399)


def test_memory_needs_two_tasks():
    trained = train_and_record(examples.plain)
    trained.stored = trained.stored[:1]
    with pytest.raises(ValueError, match="at least 2 experiences, but has 1"):
        check_memory(trained, 0)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (partial(with_plugin, examples.ForgetsToSave), "logits differ after loading"),
        (partial(with_plugin, examples.HasNoState), "TypeError.*HasNoState"),
        (examples.elsewhere_different(), "cannot be saved and loaded .ValueError"),
    ],
)
def test_state_that_is_not_saved_is_found(other_process, make, message):
    trained = train_and_record(make)
    with pytest.raises(ContractError, match=message):
        check_new_process(trained, executor=other_process)


def test_a_factory_that_cannot_be_imported_is_refused():
    trained = train_and_record(lambda model: examples.plain(model))
    check_frozen_weights(trained)
    with pytest.raises(ValueError, match="`make_strategy` should be importable"):
        check_new_process(trained)


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("contract_examples.plain", "cannot be imported"),
        ("contract_examples:plane", "cannot be imported"),
        ("no_such_module:plain", "no_such_module"),
        ("contract_examples:OPTIONS", "is a dict"),
    ],
)
def test_a_wrong_reference_is_named(reference, message):
    with pytest.raises(ValueError, match=message):
        train_and_record(reference)


def test_a_benchmark_may_be_given_as_it_is(other_process):
    benchmark = benchmark_with_validation_stream(tiny_benchmark(), validation_size=0.25)
    trained = train_and_record(examples.plain, benchmark=benchmark)
    assert [len(samples) for samples in trained.samples] == [24, 24, 24]
    check_present_data(trained)
    check_new_process(trained, executor=other_process)


def test_the_global_random_state_and_the_data_sets_stay_as_they_were():
    benchmark = tiny_benchmark()
    leaf = type(benchmark.train_stream[0].dataset._flat_data._datasets[0])
    before, original = torch.get_rng_state(), leaf.__getitem__
    train_and_record(examples.plain, benchmark=benchmark)
    assert torch.equal(torch.get_rng_state(), before)
    assert leaf.__getitem__ is original


def test_recording_an_evaluation_leaves_the_strategy_as_it_was():
    strategy, benchmark = Factories(examples.plain).build()
    plugins = list(strategy.plugins)
    batches = record_evaluation(strategy, benchmark.test_stream)
    assert strategy.plugins == plugins
    assert sum(len(batch.targets) for batch in batches) == 48
    inputs, targets = batches[0].inputs, batches[0].targets
    torch.testing.assert_close(predict(strategy, inputs, targets).logits, batches[0].outputs)


def test_the_tiny_model_is_the_same_at_every_call():
    first, second = (dict(tiny_vit().named_parameters()) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_texts_are_generated_too(make_language_model, tiny_texts):
    trained = train_and_record(examples.plain, make_model=make_language_model, benchmark=tiny_texts)
    assert len(trained.prompts) == 12
    assert all(len(text) for text in trained.predictions().texts)
    for check in IN_THIS_PROCESS:
        check(trained)
