"""Split language models: caching the frozen layers' output changes nothing else."""

import json
import logging
from functools import partial

import pytest
import torch
from avalanche.benchmarks import benchmark_from_datasets, with_task_labels
from avalanche.benchmarks.utils import DataAttribute, TaskAwareSupervisedClassificationDataset
from avalanche.training.plugins import EvaluationPlugin, SupervisedPlugin
from transformers import (
    AutoModelForCausalLM,
    FalconConfig,
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
    OPTConfig,
    Qwen2Config,
)

from support import weights
from treelora_avalanche.adapters import add_lora
from treelora_avalanche.models import LanguageModel
from treelora_avalanche.models.features.signature import activation_signature
from treelora_avalanche.models.token_batches import collate_hidden_states, collate_tokens
from treelora_avalanche.models.token_datasets import TokenSequences, TokenTargets
from treelora_avalanche.models.tokenization import EncodedSample
from treelora_avalanche.models.tokens import PADDING, crop
from treelora_avalanche.models.views.split_language import SplitLanguageModel, frozen_layers
from treelora_avalanche.scenarios import TextTasks
from treelora_avalanche.strategies import (
    OGD,
    EWCLoRA,
    GEMLoRA,
    OLoRA,
    SeqLoRA,
    TreeLoRAStrategy,
)

pytestmark = pytest.mark.filterwarnings("ignore:No loggers specified")

STRATEGIES = {
    "SeqLoRA": SeqLoRA,
    "SeqLoRA, several batches a step": partial(SeqLoRA, accumulation_steps=3),
    "TreeLoRA": partial(TreeLoRAStrategy, inference="last"),
    "TreeLoRA, routed": TreeLoRAStrategy,
    "EWC": EWCLoRA,
    "GEM": partial(GEMLoRA, patterns_per_experience=5),
    "OGD": partial(OGD, samples_per_task=4),
    "O-LoRA": OLoRA,
}
SMALL = {
    "vocab_size": 98,
    "hidden_size": 16,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "bos_token_id": 96,
    "eos_token_id": 97,
    "pad_token_id": 97,
}
GATED = {**SMALL, "intermediate_size": 24, "num_key_value_heads": 2}
CONFIGS = {
    "Llama": LlamaConfig(**GATED),
    "Qwen2, windows": Qwen2Config(
        **GATED, use_sliding_window=True, sliding_window=4, max_window_layers=1
    ),
    "Gemma2": Gemma2Config(**GATED, head_dim=4, sliding_window=4),
    "GPT-2": GPT2Config(**SMALL),
    "OPT": OPTConfig(**SMALL, ffn_dim=24, word_embed_proj_dim=16, dropout=0.0),
    "Falcon": FalconConfig(**SMALL, alibi=False),
}


@pytest.fixture
def make_model(make_tokenizer):
    """Makes a language model of four layers of a kind, the same random weights at every call."""

    def make(kind="Llama", **options):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            network = AutoModelForCausalLM.from_config(CONFIGS[kind])
        return LanguageModel(network, make_tokenizer(bos_token="<s>"), max_length=48, **options)

    return make


def make(kind, model, **kwargs):
    torch.manual_seed(1)
    defaults = {
        "layers": "last:2",
        "rank": 2,
        "train_mb_size": 3,
        "train_epochs": 2,
        "eval_mb_size": 5,
        "optimizer": partial(torch.optim.AdamW, lr=1e-2),
        "evaluator": EvaluationPlugin(loggers=[]),
    }
    strategy = STRATEGIES[kind](model, **{**defaults, **kwargs})
    torch.manual_seed(2)
    return strategy


class Count:
    """Counts the samples that pass the first layer, and the first adapted one."""

    def __init__(self, strategy):
        self.first = self.adapted = 0
        layers = strategy.model.module.base.model.layers
        own = [type(layer.self_attn).forward for layer in layers]
        for place, name in ((0, "first"), (strategy.model.n_frozen, "adapted")):

            def counted(*args, name=name, layer=layers[place].self_attn, own=own[place], **kwargs):
                setattr(self, name, getattr(self, name) + len(kwargs["hidden_states"]))
                return own(layer, *args, **kwargs)

            layers[place].self_attn.forward = counted


class Losses(SupervisedPlugin):
    """Records the loss of every batch that is evaluated."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def after_eval_iteration(self, strategy, **kwargs):
        self.seen.append(strategy.loss)


def train(strategy, stream):
    """Trains and evaluates two tasks; returns the learned weights and the losses on the way."""
    watch = next(p for p in strategy.plugins if isinstance(p, Losses))
    for experience in stream.train_stream[:2]:
        strategy.train(experience)
        strategy.eval(stream.test_stream[:2])
    return {"losses": torch.stack(watch.seen), **weights(strategy)}


@pytest.mark.parametrize("kind", [kind for kind in STRATEGIES if "routed" not in kind])
def test_weights_are_the_same_but_for_rounding(kind, make_model, tiny_texts):
    """In float64: kernels round differently where batches have other shapes."""
    results, counts = [], []
    for cache in (None, "auto"):
        model = make_model()
        model.network.double()
        strategy = make(kind, model, cache=cache, plugins=[Losses()])
        counts.append(Count(strategy))
        results.append(train(strategy, tiny_texts))
    assert results[0].keys() == results[1].keys()
    for name, value in results[0].items():
        assert value.dtype == torch.float64
        torch.testing.assert_close(results[1][name], value, rtol=1e-9, atol=1e-9, msg=name)
    before, now = counts
    assert before.first == before.adapted
    # Two sets of eight to train on and two to test: each once, a token of a text for the shape, two
    # twice to check that nothing is random, and two to check that the model can be split.
    assert now.first == 2 * (8 + 1 + 2 + 4) + 2 * (8 + 1 + 2) + 2  # two before the first task
    assert now.adapted >= before.adapted


@pytest.mark.parametrize("kind", ["SeqLoRA", "TreeLoRA", "TreeLoRA, routed", "EWC"])
def test_bit_for_bit_where_all_batches_have_one_shape(kind, make_model, tmp_path):
    size = 1 if kind == "EWC" else 4  # a sample of its Fisher information is a batch
    for task in range(2):
        records = [{"prompt": f"{task}{n} is", "answer": "abcd"[n % 4]} for n in range(8)]
        for part in ("train", "test"):
            (tmp_path / str(task)).mkdir(exist_ok=True)
            (tmp_path / str(task) / f"{part}.json").write_text(json.dumps(records))
    stream = TextTasks(tmp_path, make_model(), allow_overlap=True)
    one, other = (
        train(
            make(
                kind,
                make_model(),
                cache=cache,
                train_mb_size=size,
                eval_mb_size=size,
                plugins=[Losses()],
            ),
            stream,
        )
        for cache in (None, "auto")
    )
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


@pytest.mark.parametrize("kind", CONFIGS)
def test_the_parts_give_the_output_of_the_whole_in_every_kind_of_model(kind, make_model):
    model = make_model(kind)
    targets = None if kind != "OPT" else ["q_proj", "v_proj"]
    view = SplitLanguageModel(add_lora(model, layers="last:2", target_modules=targets)).eval()
    for factors in view.parameters():
        torch.nn.init.normal_(factors, std=0.3)
    tokens = torch.randint(98, (3, 9))
    tokens[1, 5:] = PADDING
    assert view.n_frozen == 2
    with torch.no_grad():
        hidden = view.frozen_output(tokens)
        assert torch.equal(hidden.isnan().all(2), tokens == PADDING)
        torch.testing.assert_close(view(hidden), view(tokens))
        torch.testing.assert_close(view(hidden, last=3), view(tokens, last=3))
        # The cached output depends neither on a text's padding nor on the other texts.
        torch.testing.assert_close(hidden[1:2, :5], view.frozen_output(tokens[1:2, :5]))
    assert view.agrees(tokens)
    kept = [parameter.grad is None for parameter in view.parameters()]
    view(hidden).sum().backward()
    assert all(kept)
    assert all(parameter.grad is not None for parameter in view.parameters())


def test_which_layers_are_frozen(make_model):
    assert frozen_layers(add_lora(make_model(), layers="last:3")) == 1
    assert frozen_layers(add_lora(make_model(), layers=[2])) == 2
    assert frozen_layers(add_lora(make_model(), layers="all")) == 0
    with_embedding = add_lora(make_model(), layers="last:1")
    with_embedding.base.get_input_embeddings().requires_grad_(True)
    assert frozen_layers(with_embedding) is None
    with_output = add_lora(make_model(), layers="last:1")
    with_output.base.get_output_embeddings().requires_grad_(True)
    assert frozen_layers(with_output) == 3


def test_layers_have_their_own_forward_pass_again(make_model):
    view = SplitLanguageModel(add_lora(make_model(), layers="last:2"))
    view(view.frozen_output(torch.tensor([[1, 2, 3]])))
    assert not any("forward" in layer.__dict__ for layer in view.module.base.model.layers)
    with pytest.raises(IndexError):
        view.frozen_output(torch.tensor([[1, 2, 300]]))
    assert not any("forward" in layer.__dict__ for layer in view.module.base.model.layers)


def test_compiled_layers_give_the_same_output(make_model):
    view = SplitLanguageModel(add_lora(make_model(), layers="last:2"))
    tokens = torch.tensor([[1, 2, 3, 4], [5, 6, PADDING, PADDING]])
    with torch.no_grad():
        logits = view(tokens)
        view.compile(backend="eager")
        torch.testing.assert_close(view(view.frozen_output(tokens)), logits)
        torch.testing.assert_close(view(tokens), logits)
    assert all(layer._compiled_call_impl for layer in view.module.base.model.layers)


def said(strategy, stream, caplog):
    with caplog.at_level(logging.INFO):
        strategy.train(stream.train_stream[0])
    return [r.getMessage() for r in caplog.records if "not cached" in r.getMessage()]


def test_the_log_says_why_the_cache_is_off_with_all_layers_adapted(make_model, tiny_texts, caplog):
    lines = said(make("SeqLoRA", make_model(), layers="all"), tiny_texts, caplog)
    assert len(lines) == 1
    assert "no block is frozen below the adapter" in lines[0]


def test_the_log_says_why_the_cache_is_off_with_dropout(make_model, tiny_texts, caplog):
    # GPT-2 drops a tenth of its embeddings.
    lines = said(make("SeqLoRA", make_model("GPT-2")), tiny_texts, caplog)
    assert len(lines) == 1
    assert "random (dropout)" in lines[0]


def test_a_model_whose_layers_read_more_than_hidden_states_is_not_split(
    make_model, tiny_texts, caplog
):
    model = make_model()
    layers = model.base.model.layers
    left = {}
    layers[0].register_forward_hook(lambda _, __, output: left.update(first=output))
    # As in models that add up what several layers have computed.
    layers[3].register_forward_hook(lambda _, __, output: output + left["first"])
    lines = said(make("SeqLoRA", model), tiny_texts, caplog)
    assert len(lines) == 1
    assert "read more than the output of the layer below" in lines[0]


def test_sequences_shorter_than_their_lengths_switch_the_cache_off(make_model, caplog):
    samples = [EncodedSample([1, 2, 3, 4], 2, 0)] * 3
    dataset = TaskAwareSupervisedClassificationDataset(
        [TokenSequences(samples, 48)],
        data_attributes=[
            TokenTargets([(3, 4)] * 3),
            DataAttribute([3, 3, 4], "lengths"),
            DataAttribute([0] * 3, "targets_task_labels", use_in_getitem=True),
        ],
    )
    stream = with_task_labels(benchmark_from_datasets(train=[dataset]))
    lines = said(make("SeqLoRA", make_model()), stream, caplog)
    assert len(lines) == 1
    assert "a token sequence differs from its `lengths`" in lines[0]


def test_hidden_states_are_padded_as_tokens_are():
    tokens = [torch.tensor([5, 6, 7, PADDING]), torch.tensor([8, PADDING, PADDING, PADDING])]
    targets = [torch.tensor([-100, 6, 7, -100]), torch.tensor([9, -100, -100, -100])]
    lengths = [3, 1]
    hidden = [
        (torch.full((n, 2), float(t[0])), y[:n], 0)
        for t, y, n in zip(tokens, targets, lengths, strict=True)
    ]
    rows = [(t, y, 0) for t, y in zip(tokens, targets, strict=True)]
    for make_batch, width in ((collate_tokens, 3), (partial(collate_hidden_states, width=4), 4)):
        x, y, task = make_batch(hidden)
        assert x.shape == (2, width, 2)
        assert torch.equal(x.isnan().all(2), torch.stack(tokens)[:, :width] == PADDING)
        assert torch.equal(y, torch.stack(targets)[:, :width])
        assert torch.equal(task, torch.zeros(2, dtype=torch.long))
        assert crop(x).shape == (2, 3, 2)
    assert torch.equal(collate_tokens(rows)[1], collate_tokens(hidden)[1])


def test_the_signature_of_a_task_is_that_of_its_tokens(make_model):
    view = SplitLanguageModel(add_lora(make_model(), layers="last:2"))
    tokens = torch.tensor([[1, 2, 3, 4], [5, 6, PADDING, PADDING]])
    signature = activation_signature(view, tokens)
    torch.testing.assert_close(activation_signature(view, view.frozen_output(tokens)), signature)
