"""SAPT: one attention over all tasks' adapters, from the prompt alone."""

import copy
import math

import pytest
import torch
from torch.nn import functional as F

from support import train
from treelora_avalanche.adapters import add_lora, lora_layers
from treelora_avalanche.metrics.footprint import count_parameters
from treelora_avalanche.metrics.generation import find_text_generator
from treelora_avalanche.models.views.attentive_language import AttentiveLanguageModel
from treelora_avalanche.plugins.baselines.sapt import attention_divergence
from treelora_avalanche.strategies import SAPT, SeqLoRA
from treelora_avalanche.strategies.sapt import prompt_lengths

pytestmark = pytest.mark.filterwarnings("ignore:No loggers specified")

PROMPTS = ["zoo 3 animal:", "maths 7 + 1 =", "WORDS!", "something else altogether", "?"]


@pytest.fixture
def make(make_language_model):
    """Makes an untrained strategy."""

    def make(seed=1, cls=SAPT, model_options=None, **options):
        torch.manual_seed(seed)
        settings = {"rank": 4, "train_mb_size": 4, "train_epochs": 3, "evaluator": None}
        model = make_language_model(**(model_options or {}))
        optimizer = lambda parameters: torch.optim.AdamW(parameters, lr=0.02)  # noqa: E731
        return cls(model, optimizer=optimizer, **{**settings, **options})

    return make


@pytest.fixture
def trained(make, tiny_texts):
    """A strategy that has learned three tasks."""
    strategy = make()
    train(strategy, tiny_texts, 0, 1, 2)
    strategy.model.eval()
    return strategy


def rows(strategy, prompts=PROMPTS):
    """Prompts as token sequences, padded on the right."""
    lengths = [strategy.model.tokenizer(prompt)["input_ids"] for prompt in prompts]
    tokens = torch.full((len(prompts), max(map(len, lengths))), -1)
    for i, row in enumerate(lengths):
        tokens[i, : len(row)] = torch.tensor(row)
    return tokens


def attention_by_hand(attention, embeddings):
    """The attention of one prompt, from the embeddings of its tokens."""
    mean = torch.stack(list(embeddings)).mean(0)
    dim = len(mean)
    first, _, second, norm = attention.projection
    hidden = first.weight @ (mean / mean.norm() * math.sqrt(dim))
    hidden = second.weight @ (hidden * hidden.sigmoid())
    query = (hidden - hidden.mean()) / (hidden.var(unbiased=False) + norm.eps).sqrt()
    query = query * norm.weight + norm.bias
    keys = [*attention.past_keys, attention.key]
    exponentials = [((query @ key) / math.sqrt(dim)).exp() for key in keys]
    return torch.stack(exponentials) / sum(exponentials)


def with_weights(strategy, tokens, adapters):
    """Logits of the plain network whose weights carry ``sum_i share_i B_i A_i``.

    :param adapters: of every layer, pairs of a share and the product BA.
    """
    model = strategy.model
    layers = list(lora_layers(model).values())
    before = [layer.base_layer.weight.detach().clone() for layer in layers]
    with torch.no_grad(), strategy.model.module.network.disable_adapter():
        for layer, parts in zip(layers, adapters, strict=True):
            for share, product in parts:
                layer.base_layer.weight += share * layer.scaling["default"] * product
        logits = strategy.model.module(tokens)
        for layer, weight in zip(layers, before, strict=True):
            layer.base_layer.weight.copy_(weight)
    return logits


def products(layer):
    """BA of every task in a layer, the active one last."""
    a = [*layer.shared_A.split(4), layer.lora_A["default"].weight]
    b = [*layer.shared_B.split(4, 1), layer.lora_B["default"].weight]
    return [y @ x for x, y in zip(a, b, strict=True)]


def test_output_is_the_attentions_sum_of_all_adapters(trained):
    """Against a network whose weights are changed, sample by sample, by a loop over the tasks."""
    tokens = rows(trained)
    attention = trained.model.attention
    with torch.no_grad():
        logits = trained.model(tokens)
    table = trained.model.module.network.get_input_embeddings().weight
    shares = []
    for row, output in zip(tokens, logits, strict=True):
        real = row[row >= 0]
        with torch.no_grad():
            shares.append(attention_by_hand(attention, table[real]))
        adapters = [
            list(zip(shares[-1], products(layer), strict=True))
            for layer in lora_layers(trained.model).values()
        ]
        expected = with_weights(trained, real[None], adapters)[0]
        torch.testing.assert_close(output[:, : len(real)], expected, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        weights = attention(trained.model._inputs(tokens))
    torch.testing.assert_close(weights, torch.stack(shares))
    torch.testing.assert_close(weights.sum(1), torch.ones(len(tokens)))
    assert weights.shape == (len(tokens), 3)
    assert (weights - weights[0]).abs().max() > 1e-3, "the attention looks at the prompt"


@pytest.mark.parametrize("task", [0, 1, 2])
def test_an_attention_of_one_task_is_its_adapter(trained, task):
    tokens = rows(trained)
    one_hot = F.one_hot(torch.full((len(tokens),), task), 3).float()
    with torch.no_grad(), trained.model.attention.attending(one_hot):
        logits = trained.model.module(tokens)
    adapters = [[(1.0, products(layer)[task])] for layer in lora_layers(trained.model).values()]
    expected = with_weights(trained, tokens, adapters)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)


def test_generates_by_the_attention_of_the_prompt(trained):
    """Token by token, without a cache, with the attention that the whole text's prompt has."""
    model = trained.model
    tokenizer = model.tokenizer
    for prompt, text in zip(PROMPTS, model.generate(PROMPTS, 6), strict=True):
        row = tokenizer(prompt)["input_ids"]
        n_prompt = torch.tensor([len(row)])
        for _ in range(6):
            with torch.no_grad():
                logits = model(torch.tensor([row]), n_prompt=n_prompt)
            row.append(int(logits[0, :, -1].argmax()))
            if row[-1] == tokenizer.eos_token_id:
                row.pop()
                break
        assert tokenizer.decode(row[int(n_prompt) :], skip_special_tokens=True) == text


def test_tokens_of_the_answer_do_not_enter_the_attention(trained, tiny_texts):
    """The targets tell where the prompt ends, also where the batch has lost columns of them."""
    targets = torch.tensor([[-100, 5, 6], [-100, -100, 7], [-100, -100, -100]])
    assert prompt_lengths(targets, 6).tolist() == [5, 6, 6]
    assert prompt_lengths(targets, 3).tolist() == [2, 3, 3]
    seen = []

    class Record:
        def __call__(self, module, inputs):
            seen.append((trained.mbatch, inputs[0]))

    handle = trained.model.attention.register_forward_pre_hook(Record())
    trained.eval(tiny_texts.test_stream[1])
    handle.remove()
    table = trained.model.module.network.get_input_embeddings().weight
    by_prompt = {
        tuple(trained.model.tokenizer(prompt)["input_ids"])
        for prompt in tiny_texts.test_stream[1].prompts
    }
    expected = {prompt: table[list(prompt)].mean(0) for prompt in by_prompt}
    (batch, inputs), *_ = seen
    for row, mean in zip(batch[0].tolist(), inputs, strict=True):
        (prompt,) = [p for p in by_prompt if tuple(row[: len(p)]) == p]
        torch.testing.assert_close(mean, expected[prompt].detach())


def test_the_first_task_is_plain_lora(make, tiny_texts):
    """An attention over one task is 1."""
    ours, plain = make(), make(cls=SeqLoRA)
    # The attention is drawn after the adapter, which is then the same.
    train(ours, tiny_texts, 0)
    train(plain, tiny_texts, 0)
    for layer, other in zip(
        lora_layers(ours.model).values(), lora_layers(plain.model).values(), strict=True
    ):
        torch.testing.assert_close(layer.lora_A["default"].weight, other.lora_A["default"].weight)
        torch.testing.assert_close(layer.lora_B["default"].weight, other.lora_B["default"].weight)


def test_divergence_is_that_of_the_definition():
    old, new = torch.tensor([[1.0, -2.0], [0.0, 0.5]]), torch.tensor([[0.5, 1.0], [0.0, 0.5]])
    expected = 0.0
    for before, now in zip(old.tolist(), new.tolist(), strict=True):
        p = [math.exp(s) for s in (0.0, *before)]
        q = [math.exp(s) for s in (0.0, *now)]
        expected += sum(
            x / sum(p) * math.log((x / sum(p)) / (y / sum(q))) for x, y in zip(p, q, strict=True)
        )
    assert attention_divergence(old, new).item() == pytest.approx(expected / 2, rel=1e-5)
    assert attention_divergence(old, old).item() == pytest.approx(0, abs=1e-7)


def test_distillation_holds_the_attention_over_the_past(make, tiny_texts):
    """Non-zero from the second task on, its gradient reaches the projection, and it holds."""
    from avalanche.training.plugins import SupervisedPlugin

    class Watch(SupervisedPlugin):
        def __init__(self):
            super().__init__()
            self.penalties = []

        def before_backward(self, strategy, **kwargs):
            if len(strategy.model.attention):
                penalty = strategy._sapt.penalty()
                gradients = torch.autograd.grad(
                    penalty,
                    list(strategy.model.attention.projection.parameters()),
                    retain_graph=True,
                )
                self.penalties.append((penalty.item(), max(g.abs().max() for g in gradients)))

    drift = {}
    for weight in (1e-3, 50.0):
        watch = Watch()
        strategy = make(distillation=weight, plugins=[watch])
        train(strategy, tiny_texts, 0)
        assert not watch.penalties
        train(strategy, tiny_texts, 1)
        nothing_has_moved = pytest.approx(0, abs=1e-6 * weight)
        assert watch.penalties[0][0] == nothing_has_moved
        assert all(value > 0 and gradient > 0 for value, gradient in watch.penalties[1:])
        drift[weight] = watch.penalties[-1][0] / weight
    assert drift[50.0] < 0.2 * drift[1e-3]


def test_only_the_live_task_is_trained(make, tiny_texts):
    strategy = make()
    train(strategy, tiny_texts, 0)
    layer = next(iter(lora_layers(strategy.model).values()))
    attention = strategy.model.attention
    first = layer.lora_B["default"].weight.detach().clone()
    key = attention.key.detach().clone()
    trainable = {id(p) for group in strategy.optimizer.param_groups for p in group["params"]}
    assert id(attention.key) in trainable
    train(strategy, tiny_texts, 1)
    assert torch.equal(layer.shared_B, first)
    assert torch.equal(attention.past_keys, key[None])
    before = [p.detach().clone() for p in strategy.model.parameters()]
    frozen = layer.base_layer.weight.detach().clone()
    train(strategy, tiny_texts, 2)
    assert torch.equal(layer.shared_B[:, :4], first)
    assert torch.equal(layer.base_layer.weight, frozen)
    for parameter, old in zip(strategy.model.parameters(), before, strict=True):
        assert not torch.equal(parameter, old)


def test_continues_in_a_new_strategy(make, tiny_texts, tmp_path):
    whole, resumed = make(), make(seed=7)
    train(whole, tiny_texts, 0, 1)
    whole.save(tmp_path / "state")
    resumed.load(tmp_path / "state")
    for task in (None, 2):
        for strategy in (whole, resumed):
            if task is not None:
                train(strategy, tiny_texts, task)
            strategy.model.eval()
        with torch.no_grad():
            assert torch.equal(whole.model(rows(whole)), resumed.model(rows(resumed)))
        assert whole.model.generate(PROMPTS, 6) == resumed.model.generate(PROMPTS, 6)
    with pytest.raises(ValueError, match=r"distillation=0\.5 to continue"):
        make(distillation=0.1).load(tmp_path / "state")


def test_stores_an_adapter_and_a_key_per_task(make, tiny_texts):
    strategy = make()
    sizes = []
    for task in range(3):
        train(strategy, tiny_texts, task)
        past = strategy._sapt.state_dict()["past"]
        sizes.append(sum(t.numel() for t in (*past["A"], *past["B"], past["keys"])))
    # Queries (16 x 16) and values (8 x 16) of two blocks, at rank 4, and a key of 16.
    per_task = 2 * 4 * (16 + 16) + 2 * 4 * (16 + 8) + 16
    assert sizes == [0, per_task, 2 * per_task]


def test_a_run_counts_the_attention_too(make):
    strategy = make(bottleneck=10)
    adapter = 2 * 4 * (16 + 16) + 2 * 4 * (16 + 8)
    projection = 2 * 16 * 10 + 2 * 16  # two matrices, and the scale and shift of the layer norm
    assert count_parameters(strategy.model)["trainable"] == adapter + projection + 16


def test_checkpointing_gives_the_same_gradients(make, tiny_texts):
    """The blocks are computed again in the backward pass, under the same attention."""
    weights = []
    for checkpointing in (False, True):
        strategy = make(model_options={"gradient_checkpointing": checkpointing})
        train(strategy, tiny_texts, 0, 1)
        weights.append([p.detach().clone() for p in strategy.model.parameters()])
    for one, other in zip(*weights, strict=True):
        torch.testing.assert_close(one, other)


def test_a_copy_has_an_attention_of_its_own(make, tiny_texts):
    strategy = make()
    train(strategy, tiny_texts, 0, 1)
    twin = copy.deepcopy(strategy.model)
    tokens = rows(strategy)
    for model in (strategy.model, twin):
        model.eval()
    with torch.no_grad():
        before = strategy.model(tokens)
        assert torch.equal(twin(tokens), before)
        for parameter in twin.attention.parameters():
            parameter.add_(torch.ones_like(parameter).cumsum(0))
        twin.attention.past_keys.neg_()
        assert torch.equal(strategy.model(tokens), before)
        assert not torch.allclose(twin(tokens), before)


def test_is_what_generates(trained):
    assert find_text_generator(trained.model) is trained.model


def test_a_bad_argument_is_refused(make, tiny_vit, make_language_model):
    with pytest.raises(
        ValueError, match="should be a language model for SAPT, but is a VisionTransformer"
    ):
        SAPT(tiny_vit())
    for options, message in (
        ({"bottleneck": 0}, "`bottleneck` should be at least 1, but is 0"),
        ({"distillation": -1.0}, "`distillation` should be at least 0, but is"),
    ):
        model = make_language_model()
        with pytest.raises(ValueError, match=message):
            SAPT(model, evaluator=None, **options)
        assert not lora_layers(model)
    view = AttentiveLanguageModel(add_lora(make_language_model(), rank=4), 8)
    with pytest.raises(ValueError, match="`batch_size` should be at least 1, but is 0"):
        view.generate(PROMPTS, 4, batch_size=0)
