"""The contract on tiny models, and the properties specific to TreeLoRA."""

import copy
import warnings

import pytest
import torch
from avalanche.evaluation.metrics import accuracy_metrics, forgetting_metrics
from avalanche.logging import CSVLogger, InteractiveLogger, TensorboardLogger
from avalanche.training.plugins import (
    EvaluationPlugin,
    EWCPlugin,
    GEMPlugin,
    SupervisedPlugin,
)
from avalanche.training.supervised import Naive
from avalanche.training.templates import SupervisedTemplate
from peft import PeftModel
from torch import nn

from support import make, plugin_of, train
from treelora_avalanche.adapters import LoRAFactors, TrainableView, add_lora
from treelora_avalanche.metrics import AccuracyMatrix
from treelora_avalanche.models.views.split_vit import trainable_view
from treelora_avalanche.strategies import (
    EWCLoRA,
    FrozenGaussian,
    FrozenNCM,
    GEMLoRA,
    SeqLoRA,
    TreeLoRAStrategy,
)

pytestmark = pytest.mark.filterwarnings("ignore:No loggers specified")

STRATEGIES = [SeqLoRA, TreeLoRAStrategy, EWCLoRA, GEMLoRA]


def state_of(strategy):
    return {name: value.clone() for name, value in strategy.model.state_dict().items()}


# ---------------------------------------------------------------------------------- the contract


@pytest.mark.parametrize("strategy_class", STRATEGIES)
def test_trains_and_evaluates_a_plain_timm_model(tiny_vit, tiny_benchmark, strategy_class):
    strategy = make(
        strategy_class,
        tiny_vit(),
        evaluator=EvaluationPlugin(accuracy_metrics(experience=True), loggers=[]),
        train_epochs=10,
    )
    assert isinstance(strategy, SupervisedTemplate)
    train(strategy, tiny_benchmark)
    metrics = strategy.eval(tiny_benchmark.test_stream)
    accuracy = metrics["Top1_Acc_Exp/eval_phase/test_stream/Task000/Exp002"]
    assert accuracy > 0.9


@pytest.mark.parametrize("strategy_class", STRATEGIES)
def test_frozen_weights_stay_and_trainable_ones_move(tiny_vit, tiny_benchmark, strategy_class):
    strategy = make(strategy_class, tiny_vit())
    frozen = {n: p for n, p in strategy.model.module.named_parameters() if not p.requires_grad}
    before = {name: parameter.clone() for name, parameter in frozen.items()}
    trainable = {name: p.clone() for name, p in strategy.model.named_parameters()}
    train(strategy, tiny_benchmark, 0, 1)
    assert len(frozen) > 30
    assert all(torch.equal(before[name], parameter) for name, parameter in frozen.items())
    moved = dict(strategy.model.named_parameters())
    assert not any(torch.equal(trainable[name], moved[name]) for name in trainable)


@pytest.mark.parametrize("strategy_class", STRATEGIES)
def test_prediction_does_not_depend_on_the_batch(tiny_vit, tiny_benchmark, strategy_class):
    strategy = train(make(strategy_class, tiny_vit()), tiny_benchmark, 0, 1)
    images = torch.stack([image for image, *_ in tiny_benchmark.test_stream[0].dataset])
    strategy.model.eval()
    with torch.no_grad():
        together = strategy.model(images)
        alone = torch.cat([strategy.model(image[None]) for image in images])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("strategy_class", STRATEGIES)
def test_plugin_list_of_the_caller_is_not_touched(tiny_vit, strategy_class):
    plugins = []
    make(strategy_class, tiny_vit(), plugins=plugins)
    assert plugins == []


@pytest.mark.parametrize("strategy_class", STRATEGIES)
def test_a_peft_model_is_taken_as_it_is(tiny_vit, strategy_class):
    model = add_lora(tiny_vit(), rank=3, layers=[1])
    assert isinstance(model, PeftModel)
    strategy = make(strategy_class, model)
    assert strategy.model.module is model
    assert len(LoRAFactors(strategy.model).names) == 1
    view = TrainableView(model)
    assert make(strategy_class, view).model is view


def test_optimizer_may_be_an_optimizer_or_a_factory(tiny_vit, tiny_benchmark):
    def factory(parameters):
        return torch.optim.SGD(parameters, lr=0.1)

    made = make(SeqLoRA, tiny_vit(), optimizer=factory)
    torch.manual_seed(1)
    model = trainable_view(add_lora(tiny_vit()))
    given = make(SeqLoRA, model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1))
    assert made.optimizer.param_groups[0]["lr"] == 0.1
    first, second = (state_of(train(strategy, tiny_benchmark, 0)) for strategy in (made, given))
    assert all(torch.equal(a, b) for a, b in zip(first.values(), second.values(), strict=True))


def test_built_in_loggers_and_metrics_attach_unchanged(tiny_vit, tiny_benchmark, tmp_path, capsys):
    evaluator = EvaluationPlugin(
        accuracy_metrics(epoch=True, experience=True, stream=True),
        forgetting_metrics(experience=True, stream=True),
        loggers=[
            InteractiveLogger(),
            TensorboardLogger(tmp_path / "tensorboard"),
            CSVLogger(tmp_path / "csv"),
        ],
    )
    strategy = make(TreeLoRAStrategy, tiny_vit(), evaluator=evaluator)
    for experience in tiny_benchmark.train_stream[:2]:
        strategy.train(experience, eval_streams=[tiny_benchmark.test_stream])
        strategy.eval(tiny_benchmark.test_stream)
    printed = capsys.readouterr().out
    assert "StreamForgetting/eval_phase/test_stream" in printed
    assert "SharedCoordinates/train_phase/train_stream" in printed
    assert list((tmp_path / "tensorboard").glob("events*"))
    assert len((tmp_path / "csv" / "training_results.csv").read_text().splitlines()) > 4


def test_model_may_be_positional_without_a_warning(tiny_vit):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        SeqLoRA(tiny_vit(), evaluator=lambda: EvaluationPlugin(loggers=[InteractiveLogger()]))
        TreeLoRAStrategy(
            model=tiny_vit(), evaluator=lambda: EvaluationPlugin(loggers=[InteractiveLogger()])
        )


def test_avalanche_still_warns_of_positional_arguments():
    # When this fails, the part about positions of strategies/base/arguments.py can go.
    class Strategy(SupervisedTemplate):
        def __init__(self, model, **kwargs):
            super().__init__(model=model, optimizer=None, evaluator=None, **kwargs)

    with pytest.warns(UserWarning, match="Avalanche is transitioning"):
        Strategy(nn.Linear(1, 1))


# ------------------------------------------------------------------------------------- TreeLoRA


@pytest.mark.parametrize("selection", ["lcb", "nearest", "random"])
def test_without_penalty_treelora_is_seqlora_bit_for_bit(tiny_vit, tiny_benchmark, selection):
    plain = train(make(SeqLoRA, tiny_vit()), tiny_benchmark)
    tree = train(
        make(TreeLoRAStrategy, tiny_vit(), tree_lambda=0.0, selection=selection), tiny_benchmark
    )
    for expected, value in zip(state_of(plain).values(), state_of(tree).values(), strict=True):
        assert torch.equal(expected, value)


def test_penalty_acts_from_the_second_task_on(tiny_vit, tiny_benchmark):
    plain = make(SeqLoRA, tiny_vit())
    tree = make(TreeLoRAStrategy, tiny_vit(), tree_lambda=0.5)
    equal = []
    for experience in tiny_benchmark.train_stream[:2]:
        for strategy in (plain, tree):
            torch.manual_seed(5)
            strategy.train(experience)
        pairs = zip(state_of(plain).values(), state_of(tree).values(), strict=True)
        equal.append(all(torch.equal(a, b) for a, b in pairs))
    assert equal == [True, False]


def test_penalty_keeps_the_adapter_at_the_one_before(tiny_vit, tiny_benchmark):
    def moved(tree_lambda):
        strategy = make(TreeLoRAStrategy, tiny_vit(), tree_lambda=tree_lambda)
        train(strategy, tiny_benchmark, 0, 1)
        first, second = strategy.bank.factors
        return (first != second).float().mean().item()

    free, pulled, held = moved(0.0), moved(0.3), moved(1e6)
    assert free > 0.99
    assert pulled < 0.9 * free
    assert held == 0


def test_same_seed_same_weights_other_seed_other_search(tiny_vit, tiny_benchmark):
    def run(seed):
        strategy = make(TreeLoRAStrategy, tiny_vit(), tree_lambda=0.3, seed=seed)
        return state_of(train(strategy, tiny_benchmark))

    first, again, other = run(0), run(0), run(7)
    assert all(torch.equal(a, b) for a, b in zip(first.values(), again.values(), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first.values(), other.values(), strict=True))


def test_tree_and_bank_hold_every_task(tiny_vit, tiny_benchmark):
    strategy = train(make(TreeLoRAStrategy, tiny_vit()), tiny_benchmark)
    assert strategy.tree.tasks == [[0], [1], [2]]
    live = LoRAFactors(strategy.model).stack
    assert torch.equal(strategy.bank[2], live)


def test_strategy_equals_its_plugins_attached_to_naive(tiny_vit, tiny_benchmark):
    from treelora_avalanche.adapters import AdapterBank
    from treelora_avalanche.plugins import (
        LCBSelectorPlugin,
        SparseUpdatePlugin,
        TreeBuilderPlugin,
    )
    from treelora_avalanche.tree import AdapterTree

    tree, bank = AdapterTree(), AdapterBank()
    selector = LCBSelectorPlugin(tree)
    torch.manual_seed(1)
    model = trainable_view(add_lora(tiny_vit()))
    attached = Naive(
        model=model,
        optimizer=torch.optim.Adam(model.parameters(), lr=0.005),
        train_mb_size=8,
        train_epochs=2,
        evaluator=None,
        plugins=[
            TreeBuilderPlugin(tree, bank),
            selector,
            SparseUpdatePlugin(selector, bank, 0.5),
        ],
    )
    train(attached, tiny_benchmark)
    own = train(make(TreeLoRAStrategy, tiny_vit()), tiny_benchmark)
    for expected, value in zip(state_of(own).values(), state_of(attached).values(), strict=True):
        assert torch.equal(expected, value)


# ------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tree_lambda": -1}, "`tree_lambda` should be at least 0, but is -1"),
        ({"selection": "nearst"}, "Did you mean 'nearest'"),
        ({"depth": 0}, "depth"),
        ({"depth": 4}, "at most the number of adapted matrices, 3, but is 4"),
        ({"max_adapters": 0}, "max_adapters"),
        ({"rank": 0}, "rank"),
        ({"layers": "middle"}, "`layers` should be .*, but is 'middle'"),
    ],
)
def test_bad_arguments_are_named_and_the_model_stays(tiny_vit, options, message):
    model = tiny_vit()
    names = [name for name, _ in model.named_modules()]
    with pytest.raises(ValueError, match=message):
        make(TreeLoRAStrategy, model, **options)
    assert [name for name, _ in model.named_modules()] == names


def test_misspelled_argument_is_refused(tiny_vit):
    with pytest.raises(TypeError, match="tree_lamda"):
        make(TreeLoRAStrategy, tiny_vit(), tree_lamda=0.1)


def test_experience_without_samples_is_refused_before_training(tiny_vit, tiny_benchmark):
    strategy = make(SeqLoRA, tiny_vit())
    before = state_of(strategy)
    empty = copy.copy(tiny_benchmark.train_stream[0])
    empty.dataset = empty.dataset.subset([])
    with pytest.raises(ValueError, match="experience 0 has no samples"):
        strategy.train(empty)
    after = state_of(strategy)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_more_classes_than_the_head_has_are_refused(tiny_vit, tiny_benchmark):
    strategy = make(SeqLoRA, tiny_vit(num_classes=4))
    train(strategy, tiny_benchmark, 0, 1)
    with pytest.raises(ValueError, match=r"class 5.*has 4 outputs.*num_classes=6"):
        train(strategy, tiny_benchmark, 0, 1, 2)


# ---------------------------------------------------------------------- real weights, real images


def test_all_defaults_on_a_pretrained_vit_and_real_images(data_root):
    weights_file = data_root / "deit_tiny_patch16_224_in1k" / "model.fp16.safetensors"
    images = data_root / "caltech101"
    for needed in (weights_file, images):
        if not needed.exists():
            pytest.skip(f"no data: {needed} is missing")
    from treelora_avalanche.models import create_vit, image_preprocessing
    from treelora_avalanche.scenarios import SplitImageFolder

    model = create_vit(
        "deit_tiny_patch16_224", num_classes=4, checkpoint=weights_file, img_size=112
    )
    benchmark = SplitImageFolder(
        images,
        n_experiences=2,
        preprocessing=image_preprocessing(model),
        classes=["ant", "airplanes", "panda", "pizza"],
        seed=0,
    )
    torch.manual_seed(0)
    evaluator = EvaluationPlugin(accuracy_metrics(experience=True), loggers=[])
    strategy = TreeLoRAStrategy(model, train_epochs=4, evaluator=evaluator)
    strategy.train(benchmark.train_stream[0])
    results = strategy.eval(benchmark.test_stream[:1])
    assert results["Top1_Acc_Exp/eval_phase/test_stream/Task000/Exp000"] > 0.9
    strategy.train(benchmark.train_stream[1])
    assert strategy.tree.n_tasks == 2


# ------------------------------------------------------------------------------------- baselines


def final_matrix(strategy_class, model, benchmark, **options):
    matrix = AccuracyMatrix()
    torch.manual_seed(1)
    strategy = strategy_class(
        model, evaluator=EvaluationPlugin(matrix, loggers=[]), eval_mb_size=16, **options
    )
    for experience in benchmark.train_stream:
        strategy.train(experience)
        strategy.eval(benchmark.test_stream[: experience.current_experience + 1])
    return strategy, matrix.result()


@pytest.mark.parametrize("strategy_class", [FrozenNCM, FrozenGaussian])
def test_frozen_backbone_stays_frozen_and_beats_chance(tiny_vit, tiny_benchmark, strategy_class):
    model = tiny_vit()
    body = {n: p.clone() for n, p in model.named_parameters() if not n.startswith("head")}
    _, matrix = final_matrix(strategy_class, model, tiny_benchmark)
    assert all(torch.equal(body[n], dict(model.named_parameters())[n]) for n in body)
    assert matrix[-1].mean() > 0.5


def test_frozen_ncm_is_the_nearest_class_mean(tiny_vit, tiny_benchmark):
    model = tiny_vit()
    final_matrix(FrozenNCM, model, tiny_benchmark)
    bare = tiny_vit().eval()

    def features(stream):
        images = torch.stack([image for e in stream for image, *_ in e.dataset])
        targets = torch.tensor([target for e in stream for _, target, *_ in e.dataset])
        with torch.no_grad():
            return bare.forward_head(bare.forward_features(images), pre_logits=True), targets

    train, targets = features(tiny_benchmark.train_stream)
    test, _ = features(tiny_benchmark.test_stream)
    means = torch.stack([train[targets == c].mean(0) for c in range(6)])
    expected = torch.cdist(test, means).argmin(1)
    assert torch.equal(model.head(test).argmax(1), expected)


def test_frozen_ncm_never_predicts_an_unseen_class(tiny_vit, tiny_benchmark):
    strategy = FrozenNCM(tiny_vit(), evaluator=None)
    strategy.train(tiny_benchmark.train_stream[1])
    images = torch.stack([image for image, *_ in tiny_benchmark.test_stream[0].dataset])
    with torch.no_grad():
        predicted = strategy.model.eval()(images).argmax(1)
    assert set(predicted.tolist()) <= set(tiny_benchmark.train_stream[1].classes_in_this_experience)


@pytest.mark.parametrize("mode", ["online", "separate"])
def test_ewc_holds_the_adapter_and_stores_only_what_is_trained(tiny_vit, tiny_benchmark, mode):
    def moved(ewc_lambda):
        strategy = make(EWCLoRA, tiny_vit(), ewc_lambda=ewc_lambda, mode=mode)
        train(strategy, tiny_benchmark, 0)
        before = LoRAFactors(strategy.model).stack.clone()
        torch.manual_seed(5)
        strategy.train(tiny_benchmark.train_stream[1])
        return strategy, (LoRAFactors(strategy.model).stack - before).abs().sum().item()

    (strategy, held), (_, free) = moved(1e6), moved(0.0)
    assert held < 0.8 * free
    ewc = next(p for p in strategy.plugins if isinstance(p, EWCPlugin))
    names = {name for name, _ in strategy.model.named_parameters()}
    assert all(set(importances) == names for importances in ewc.importances.values())
    assert len(ewc.importances) == (1 if mode == "online" else 2)


def test_ewc_importance_is_the_mean_of_squared_gradients_of_single_samples(
    tiny_vit, tiny_benchmark
):
    strategy = train(make(EWCLoRA, tiny_vit(), fisher_samples=1000), tiny_benchmark, 0)
    model = strategy.model.eval()
    names, parameters = zip(*model.named_parameters(), strict=True)
    samples = [(x[None], y) for x, y, *_ in tiny_benchmark.train_stream[0].dataset]
    squares = []
    for image, label in samples:
        surprise = -model(image).softmax(1)[0, label].log()
        squares.append([g.square() for g in torch.autograd.grad(surprise, parameters)])
    importances = plugin_of(strategy, EWCPlugin).importances[0]
    for name, *of_samples in zip(names, *squares, strict=True):
        mean = torch.stack(of_samples).mean(0)
        torch.testing.assert_close(importances[name].data, mean, rtol=1e-3, atol=1e-9)


def test_ewc_draws_as_many_samples_as_it_is_given(tiny_vit, tiny_benchmark):
    calls = []

    class Watch(SupervisedPlugin):
        def after_training_exp(self, strategy, *args, **kwargs):
            strategy.model.register_forward_hook(lambda model, x, y: calls.append(len(x[0])))

    strategy = make(EWCLoRA, tiny_vit(), fisher_samples=5, train_epochs=1, plugins=[Watch()])
    train(strategy, tiny_benchmark, 0)
    assert calls == [1] * 5


@pytest.mark.parametrize("within_task", [True, False])
def test_gem_compares_a_memory_with_the_classes_of_its_task(tiny_vit, tiny_benchmark, within_task):
    """By hand: the logits of other classes cut away, as in the released code, or not."""
    found = []

    class Watch(SupervisedPlugin):
        def before_training_iteration(self, strategy, *args, **kwargs):
            gem = plugin_of(strategy, GEMPlugin)
            for task, gradient in enumerate(gem.G):
                classes = tiny_benchmark.train_stream[task].classes_in_this_experience
                columns = torch.tensor(sorted(classes) if within_task else range(6))
                logits = strategy.model(gem.memory_x[task])[:, columns]
                targets = torch.searchsorted(columns, gem.memory_y[task])
                loss = torch.nn.functional.cross_entropy(logits, targets)
                parts = torch.autograd.grad(loss, list(strategy.model.parameters()))
                found.append((gradient, torch.cat([part.flatten() for part in parts])))

    strategy = make(GEMLoRA, tiny_vit(), patterns_per_experience=8, within_task=within_task)
    strategy.plugins.append(Watch())  # after GEM
    train(strategy, tiny_benchmark, 0, 1, 2)
    assert len(found) == 8 * (1 + 2)
    for gradient, by_hand in found:
        assert by_hand.abs().max() > 0
        torch.testing.assert_close(gradient, by_hand, rtol=1e-3, atol=1e-6)


def test_gem_step_keeps_every_constraint(tiny_vit, tiny_benchmark):
    """The projected gradient makes no acute angle with the gradient of any past memory."""
    angles = []

    class Watch(SupervisedPlugin):
        def after_backward(self, strategy, *args, **kwargs):
            gem = next(p for p in strategy.plugins if isinstance(p, GEMPlugin))
            if strategy.clock.train_exp_counter > 0:
                gradient = torch.cat(
                    [p.grad.flatten() for p in strategy.model.parameters() if p.grad is not None]
                )
                angles.append((gem.G @ gradient).min().item())

    strategy = make(GEMLoRA, tiny_vit(), patterns_per_experience=8, memory_strength=0.0)
    strategy.plugins.insert(-1, Watch())
    train(strategy, tiny_benchmark, 0, 1)
    assert len(angles) == 8
    assert min(angles) > -1e-3


@pytest.mark.parametrize(
    ("strategy_class", "options", "message"),
    [
        (EWCLoRA, {"ewc_lambda": -1}, "ewc_lambda"),
        (EWCLoRA, {"mode": "onlin"}, "Did you mean 'online'"),
        (EWCLoRA, {"fisher_samples": 0}, "`fisher_samples` should be at least 1, but is 0"),
        (GEMLoRA, {"patterns_per_experience": 0}, "patterns_per_experience"),
        (GEMLoRA, {"memory_strength": -0.5}, "memory_strength"),
        (
            SeqLoRA,
            {"head": "gaussian"},
            "`head` should be one of linear, task_adaptive, .*, but is 'gaussian'",
        ),
        (TreeLoRAStrategy, {"inference": "route"}, "Did you mean 'routed'"),
    ],
)
def test_bad_arguments_of_baselines(tiny_vit, strategy_class, options, message):
    with pytest.raises(ValueError, match=message):
        make(strategy_class, tiny_vit(), **options)
