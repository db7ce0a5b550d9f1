"""One stream of texts, trained by Avalanche's unchanged strategies and by ours."""

import json
import logging
import os
from functools import partial
from pathlib import Path

import pytest
import torch
from avalanche.evaluation.metrics import loss_metrics
from avalanche.training import (
    AGEM,
    EWC,
    GEM,
    MAS,
    Cumulative,
    JointTraining,
    LwF,
    Naive,
    Replay,
)
from avalanche.training.plugins import EvaluationPlugin, LwFPlugin, ReplayPlugin, SupervisedPlugin
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from treelora_avalanche.adapters import LoRAFactors, TrainableView, add_lora, save_adapter
from treelora_avalanche.models import LanguageModel, TokenCrossEntropy, create_language_model
from treelora_avalanche.models.token_batches import LengthBatchSampler, collate_tokens
from treelora_avalanche.plugins import CosineSchedulePlugin
from treelora_avalanche.scenarios import TRACE, TextTasks
from treelora_avalanche.strategies import EWCLoRA, GEMLoRA, SeqLoRA, TreeLoRAStrategy

pytestmark = pytest.mark.filterwarnings("ignore:No loggers specified")

TASKS = ["NumGLUE-cm", "FOMC", "ScienceQA"]
BUILT_IN = {
    "Naive": (Naive, {}),
    "EWC": (EWC, {"ewc_lambda": 1.0}),
    "LwF": (LwF, {"alpha": 1.0, "temperature": 2.0}),
    "GEM": (GEM, {"patterns_per_exp": 4}),
    "AGEM": (AGEM, {"patterns_per_exp": 4, "sample_size": 4}),
    "Replay": (Replay, {"mem_size": 8}),
    "MAS": (MAS, {}),
    "Cumulative": (Cumulative, {}),
    "JointTraining": (JointTraining, {}),
}
OURS = {
    "SeqLoRA": (SeqLoRA, {}),
    "TreeLoRA": (TreeLoRAStrategy, {}),
    "EWCLoRA": (EWCLoRA, {}),
    "GEMLoRA": (GEMLoRA, {"patterns_per_experience": 4}),
}


@pytest.fixture(scope="module")
def data():
    """The folder of real data, or None."""
    default = Path(__file__).resolve().parents[3] / "shared" / "data"
    root = Path(os.environ.get("TREELORA_DATA", default))
    return root if (root / "stories260K").is_dir() else None


@pytest.fixture(scope="module")
def story_teller(data, make_tokenizer, tmp_path_factory):
    """The folder of a small published Llama; where there is none, of a random one."""
    if data is not None:
        return data / "stories260K"
    folder = tmp_path_factory.mktemp("llama")
    torch.manual_seed(0)
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=98,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=5,
            num_attention_heads=4,
            max_position_embeddings=512,
        )
    ).save_pretrained(folder)
    make_tokenizer(bos_token="<s>").save_pretrained(folder)
    return folder


@pytest.fixture
def model(story_teller):
    torch.manual_seed(0)
    return create_language_model(story_teller, max_length=96)


@pytest.fixture(scope="module")
def make_stream(data, story_teller, tmp_path_factory):
    """Makes a stream of the first tasks of TRACE; without the data, of made-up ones."""
    tokenizer = AutoTokenizer.from_pretrained(story_teller)
    folder = tmp_path_factory.mktemp("texts")
    for place, name in enumerate(TASKS):
        (folder / name).mkdir()
        records = [
            {"prompt": f"{name} number {n}:" + "!" * n, "answer": chr(65 + (n + place) % 4)}
            for n in range(20)
        ]
        for part in ("train", "test"):
            (folder / name / f"{part}.json").write_text(json.dumps(records))

    def make(tasks=TASKS, limit=8):
        options = {"tasks": tasks, "limit": limit, "max_length": 96}
        if data is None:
            return TextTasks(folder, tokenizer, **options, allow_overlap=True)
        return TRACE(data, tokenizer, **options)

    return make


@pytest.fixture(scope="module")
def stream(make_stream):
    """Three tasks, eight samples each."""
    return make_stream()


def silent():
    return EvaluationPlugin(loss_metrics(epoch=True, experience=True), loggers=[])


def losses(strategy, stream):
    """Mean loss of each task's training data."""
    strategy.eval(stream.train_stream)
    results = strategy.evaluator.get_last_metrics()
    return [
        next(
            v for k, v in results.items() if k.startswith("Loss_Exp") and k.endswith(f"Exp{n:03d}")
        )
        for n in range(len(stream.train_stream))
    ]


def built_in(name, model, **kwargs):
    cls, arguments = BUILT_IN[name]
    view = TrainableView(add_lora(model))
    return cls(
        model=view,
        optimizer=torch.optim.AdamW(view.parameters(), lr=3e-3),
        criterion=TokenCrossEntropy(),
        train_mb_size=4,
        train_epochs=4,
        eval_mb_size=8,
        evaluator=silent(),
        **arguments,
        **kwargs,
    )


def ours(name, model, **kwargs):
    cls, arguments = OURS[name]
    return cls(
        model,
        **{
            "optimizer": partial(torch.optim.AdamW, lr=3e-3),
            "train_epochs": 4,
            "evaluator": silent(),
            **arguments,
            **kwargs,
        },
    )


def frozen(strategy):
    return {
        name: parameter.detach().clone()
        for name, parameter in torch.nn.Module.named_parameters(strategy.model)
        if not parameter.requires_grad
    }


@pytest.mark.parametrize("name", [*BUILT_IN, *OURS])
def test_strategy_learns_each_task_and_leaves_the_backbone_alone(name, model, stream):
    strategy = built_in(name, model) if name in BUILT_IN else ours(name, model)
    backbone = frozen(strategy)
    before = losses(strategy, stream)
    if name == "JointTraining":
        strategy.train(stream.train_stream)
        assert all(now < then for now, then in zip(losses(strategy, stream), before, strict=True))
    else:
        for n, experience in enumerate(stream.train_stream):
            strategy.train(experience)
            after = losses(strategy, stream)
            assert after[n] < before[n], TASKS[n]
            before = after
    for key, parameter in torch.nn.Module.named_parameters(strategy.model):
        if key in backbone:
            assert torch.equal(parameter, backbone[key]), key


def test_lwf_distils_all_labels_seen_and_not_the_first_task_alone(model, stream):
    strategy = built_in("LwF", model)
    for experience in stream.train_stream[:2]:
        strategy.train(experience)
    plugin = next(p for p in strategy.plugins if isinstance(p, LwFPlugin))
    seen = {
        int(token)
        for experience in stream.train_stream[:2]
        for _, y, _ in experience.dataset
        for token in y[y >= 0]
    }
    assert plugin.lwf.prev_classes_by_task[0] == seen


def test_batches_hold_plain_tensors_of_similar_length(model, stream):
    class Shapes(SupervisedPlugin):
        def __init__(self):
            super().__init__()
            self.seen = []

        def before_training_iteration(self, strategy, *args, **kwargs):
            assert all(type(part) is torch.Tensor for part in strategy.mbatch)
            x, y, _ = strategy.mbatch
            # Nothing but padding would be cut off, and nothing with a target was.
            assert (x[:, -1] >= 0).any()
            assert (y[:, 0] >= 0).any()
            self.seen.append(x.shape[1])

    shapes = Shapes()
    strategy = ours("SeqLoRA", model, plugins=[shapes], train_epochs=1, train_mb_size=2)
    experience = stream.train_stream[0]
    strategy.train(experience)
    lengths = sorted(len(tokens) - 1 for tokens, _ in experience.dataset._datasets[0].samples)
    assert sorted(shapes.seen) == lengths[1::2]  # pairs of neighbours, each padded to its longer


def test_cropped_batches_give_the_losses_of_whole_rows(model, stream):
    samples = [stream.train_stream[2].dataset[i] for i in range(4)]
    x, y, _ = collate_tokens(samples)
    whole_x, whole_y = (torch.stack([s[part] for s in samples]) for part in (0, 1))
    model.eval()
    for reduction in ("mean", "none"):
        loss = TokenCrossEntropy(reduction)
        expected = loss(model(whole_x), whole_y)
        torch.testing.assert_close(loss(model(x), y), expected)
        torch.testing.assert_close(loss(model(x, last=y.shape[1]), y), expected)


def test_sampler_takes_every_sample_once_and_follows_the_seed():
    lengths = torch.randint(1, 1000, (1000,)).tolist()
    orders = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        batches = list(LengthBatchSampler(lengths, 4))
        assert sorted(i for batch in batches for i in batch) == list(range(1000))
        orders.append(batches)
    assert orders[0] == orders[1] != orders[2]
    padded = sum(4 * max(lengths[i] for i in batch) for batch in orders[0])
    assert padded < 1.05 * sum(lengths)
    # Not sorted: long batches and short ones take turns.
    firsts = torch.tensor([lengths[batch[0]] for batch in orders[0]]).float()
    trend = torch.corrcoef(torch.stack((firsts, torch.arange(len(firsts)).float())))[0, 1]
    assert abs(trend) < 0.25
    assert len(LengthBatchSampler(lengths[:7], 4)) == 2
    assert len(list(LengthBatchSampler(lengths[:7], 4, drop_last=True))) == 1


def test_tree_without_pull_is_plain_lora_bit_for_bit(story_teller, stream):
    stacks = []
    for name, options in (("SeqLoRA", {}), ("TreeLoRA", {"tree_lambda": 0.0, "inference": "last"})):
        torch.manual_seed(0)
        strategy = ours(name, create_language_model(story_teller, max_length=96), **options)
        for experience in stream.train_stream:
            strategy.train(experience)
        stacks.append(LoRAFactors(strategy.model).stack)
    assert torch.equal(*stacks)


def test_four_batches_of_four_are_one_of_sixteen(story_teller, make_stream):
    """Each batch weighs by its tokens, so that the mean is over all of the sixteen samples'."""
    stream = make_stream(TASKS[:1], limit=16)
    stacks = []
    for batch, steps in ((16, 1), (4, 4)):
        torch.manual_seed(0)
        strategy = ours(
            "SeqLoRA",
            create_language_model(story_teller, max_length=96),
            optimizer=partial(torch.optim.SGD, lr=0.05),
            schedule="constant",
            train_mb_size=batch,
            accumulation_steps=steps,
            train_epochs=3,
        )
        strategy.train(stream.train_stream[0])
        assert strategy.clock.train_iterations == 3
        stacks.append(LoRAFactors(strategy.model).stack)
    assert (stacks[0] - stacks[1]).abs().max() < 1e-6


def test_penalties_count_once_however_many_batches_share_a_step(story_teller, make_stream):
    """EWC adds its penalty to every batch's loss."""
    stream = make_stream(TASKS[:2])
    stacks = []
    for batch, steps in ((8, 1), (2, 4)):
        torch.manual_seed(0)
        strategy = ours(
            "EWCLoRA",
            create_language_model(story_teller, max_length=96),
            ewc_lambda=1.0,
            optimizer=partial(torch.optim.SGD, lr=0.1),
            schedule="constant",
            train_mb_size=batch,
            accumulation_steps=steps,
            train_epochs=2,
        )
        for experience in stream.train_stream:
            strategy.train(experience)
        stacks.append(LoRAFactors(strategy.model).stack)
    # Not to the last bits: importances are taken over batches of the step's size.
    assert (stacks[0] - stacks[1]).abs().max() < 0.05 * stacks[0].abs().max()


def test_accumulation_is_refused_where_gradients_are_compared(model):
    before = model.network
    with pytest.raises(
        ValueError,
        match=r"should be 1 with GEMPlugin, which compares the gradient.*but is 2",
    ):
        GEMLoRA(model, accumulation_steps=2)
    with pytest.raises(ValueError, match="`accumulation_steps` should be at least 1, but is 0"):
        SeqLoRA(model, accumulation_steps=0)
    assert model.network is before  # nothing attached


def test_learning_rate_follows_the_cosine_of_every_experience(model, stream):
    class Rates(SupervisedPlugin):
        def __init__(self):
            super().__init__()
            self.seen = []

        def after_update(self, strategy, *args, **kwargs):
            self.seen.append(strategy.optimizer.param_groups[0]["lr"])

    rates = Rates()
    strategy = SeqLoRA(model, plugins=[rates], evaluator=silent(), train_epochs=3)
    for experience in stream.train_stream[:2]:
        strategy.train(experience)
    steps = torch.arange(6) / 6  # 8 samples in batches of 4, 3 epochs
    expected = (1e-4 * (1 + torch.cos(torch.pi * steps)) / 2).tolist()
    assert rates.seen == pytest.approx(expected * 2)
    assert strategy.optimizer.param_groups[0]["lr"] == 1e-4


def test_cosine_starts_anew_after_an_interruption(model, stream):
    class Stop(SupervisedPlugin):
        armed = True

        def before_training_epoch(self, strategy, *args, **kwargs):
            if self.armed and strategy.clock.train_exp_epochs == 1:
                self.armed = False
                raise KeyboardInterrupt

    strategy = SeqLoRA(model, plugins=[Stop()], evaluator=silent(), train_epochs=2)
    with pytest.raises(KeyboardInterrupt):
        strategy.train(stream.train_stream[0])
    assert strategy.optimizer.param_groups[0]["lr"] < 1e-4
    strategy.train(stream.train_stream[0])
    assert strategy.optimizer.param_groups[0]["lr"] == 1e-4


def test_defaults_are_the_papers_for_language_models(model, caplog):
    with caplog.at_level(logging.INFO):
        strategy = TreeLoRAStrategy(model)
    assert isinstance(strategy.optimizer, torch.optim.AdamW)
    assert strategy.optimizer.param_groups[0]["lr"] == 1e-4
    assert isinstance(strategy._criterion, TokenCrossEntropy)
    assert strategy.train_mb_size == 4
    assert any(isinstance(plugin, CosineSchedulePlugin) for plugin in strategy.plugins)
    assert LoRAFactors(strategy.model).shapes[0].rank == 8
    assert len(LoRAFactors(strategy.model).names) == 10  # queries and values of all five blocks
    assert "q_proj" in caplog.text
    assert "AdamW at 0.0001, cosine" in caplog.text


def test_bfloat16_with_checkpointing_and_accumulation_learns(story_teller, stream):
    torch.manual_seed(0)
    model = create_language_model(
        story_teller, dtype=torch.bfloat16, max_length=96, gradient_checkpointing=True
    )
    strategy = ours("TreeLoRA", model, accumulation_steps=2)
    at_start = losses(strategy, stream)
    for experience in stream.train_stream[:2]:
        strategy.train(experience)
    assert losses(strategy, stream)[1] < at_start[1]
    assert LoRAFactors(strategy.model).stack.dtype == torch.float32


@pytest.mark.parametrize("make", [partial(LwFPlugin, 1.0, 2.0), partial(ReplayPlugin, 6)])
def test_avalanches_plugins_join_in(make, model, stream):
    strategy = ours("SeqLoRA", model, plugins=[make()], train_epochs=1)
    before = LoRAFactors(strategy.model).stack.clone()
    for experience in stream.train_stream[:2]:
        strategy.train(experience)
    assert not torch.equal(before, LoRAFactors(strategy.model).stack)


def test_adapter_of_a_trained_strategy_generates_the_same_with_peft_alone(
    tmp_path, story_teller, model, stream
):
    strategy = ours("TreeLoRA", model)
    for experience in stream.train_stream[:2]:
        strategy.train(experience)
    save_adapter(strategy.model, tmp_path / "adapter")
    network = AutoModelForCausalLM.from_pretrained(story_teller)
    plain = PeftModel.from_pretrained(network, str(tmp_path / "adapter")).eval()
    prompts = stream.test_stream[0].prompts[:3]
    generated = strategy.model.module.generate(prompts, 12, batch_size=3)
    tokenizer = model.tokenizer
    for prompt, text in zip(prompts, generated, strict=True):
        tokens = torch.tensor([model_tokens(model, prompt)])
        new = plain.generate(input_ids=tokens, max_new_tokens=12, do_sample=False)
        assert tokenizer.decode(new[0, tokens.shape[1] :], skip_special_tokens=True) == text
    untrained = AutoModelForCausalLM.from_pretrained(story_teller).eval()
    assert LanguageModel(untrained, tokenizer, max_length=96).generate(prompts, 12) != generated


def model_tokens(model, prompt):
    """The beginning token, then the end of the prompt."""
    tokens = model.tokenizer(prompt)["input_ids"]
    room = model.max_length
    return tokens if len(tokens) <= room else [tokens[0], *tokens[len(tokens) - room + 1 :]]


def test_saved_strategy_goes_on_as_if_nothing_had_been(tmp_path, story_teller, stream):
    def make():
        torch.manual_seed(0)
        return ours("TreeLoRA", create_language_model(story_teller, max_length=96))

    whole = make()
    for experience in stream.train_stream[:2]:
        whole.train(experience)
    whole.save(tmp_path / "state")
    whole.train(stream.train_stream[2])
    resumed = make()
    resumed.load(tmp_path / "state")
    resumed.train(stream.train_stream[2])
    assert torch.equal(LoRAFactors(whole.model).stack, LoRAFactors(resumed.model).stack)
    x = torch.stack([stream.test_stream[0].dataset[i][0] for i in range(3)])
    assert torch.equal(whole.model.eval()(x), resumed.model.eval()(x))


def test_what_needs_classes_is_refused_on_a_language_model(model):
    network = model.network
    with pytest.raises(ValueError, match="has no classifier to re-train"):
        SeqLoRA(model, head="task_adaptive")
    with pytest.raises(ValueError, match=r"LanguageModel\(model, tokenizer\)"):
        SeqLoRA(network)
