"""OGD, O-LoRA, InfLoRA and the L2 anchor on a language model, as they are on images."""

import pytest
import torch
from avalanche.benchmarks import benchmark_from_datasets, with_task_labels
from avalanche.benchmarks.utils import (
    DataAttribute,
    TaskAwareSupervisedClassificationDataset,
)
from torch import nn
from torch.utils.data import TensorDataset
from transformers import LlamaConfig, LlamaForCausalLM

from support import train
from treelora_avalanche.adapters import LoRAFactors, load_adapter, save_adapter
from treelora_avalanche.strategies import OGD, InfLoRA, L2Anchor, OLoRA

pytestmark = pytest.mark.filterwarnings("ignore:No loggers specified")

PADDING, LENGTH, N_TOKENS = 0, 9, 12
BASELINES = {
    "OGD": (OGD, {"samples_per_task": 4, "memory_size": 8}),
    "OLoRA": (OLoRA, {}),
    "InfLoRA": (InfLoRA, {}),
    "L2Anchor": (L2Anchor, {"merge": "ties"}),
}


class CausalLM(nn.Module):
    """Token ids ``(batch, length)`` in, logits ``(batch, n_tokens, length)`` out."""

    def __init__(self):
        super().__init__()
        config = LlamaConfig(
            vocab_size=N_TOKENS,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=LENGTH,
        )
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.language_model = LlamaForCausalLM(config)

    def forward(self, ids):
        length = int((ids != PADDING).sum(1).max())
        mask = (ids != PADDING).long()
        logits = self.language_model(
            input_ids=ids[:, :length], attention_mask=mask[:, :length]
        ).logits
        logits = logits * mask[:, :length, None]
        return nn.functional.pad(logits, (0, 0, 0, ids.shape[1] - length)).transpose(1, 2)


@pytest.fixture(scope="module")
def texts():
    """Three tasks: repeat the tokens backwards, in order, or the first of them only."""
    answers = (lambda t: t.flip(0), lambda t: t, lambda t: t[:1].repeat(len(t)))

    def dataset(task):
        generator = torch.Generator().manual_seed(task)
        ids = torch.full((10, LENGTH), PADDING)
        labels = torch.full((10, LENGTH), -100)
        for row in range(10):
            n = 2 + row % 3
            prompt = torch.randint(1, N_TOKENS, (n,), generator=generator)
            text = torch.cat((prompt, answers[task](prompt)))
            ids[row, : 2 * n - 1] = text[:-1]
            labels[row, n - 1 : 2 * n - 1] = text[n:]
        return TaskAwareSupervisedClassificationDataset(
            TensorDataset(ids, labels),
            data_attributes=[
                DataAttribute(list(labels), "targets", use_in_getitem=False),
                DataAttribute([0] * 10, "targets_task_labels", use_in_getitem=True),
            ],
        )

    datasets = [dataset(task) for task in range(3)]
    return with_task_labels(benchmark_from_datasets(train=datasets, test=datasets))


def make(name, seed=1):
    torch.manual_seed(seed)
    strategy_class, options = BASELINES[name]
    return strategy_class(
        CausalLM(),
        rank=4,
        layers="all",
        target_modules=("q_proj", "v_proj"),
        train_mb_size=5,
        train_epochs=8,
        evaluator=None,
        **options,
    )


def logits_and_loss(model, texts, task=0):
    ids = torch.stack([x for x, *_ in texts.test_stream[task].dataset])
    labels = torch.stack([y for _, y, *_ in texts.test_stream[task].dataset])
    model.eval()
    with torch.no_grad():
        logits = model(ids)
    return logits, nn.functional.cross_entropy(logits, labels).item()


@pytest.mark.parametrize("name", BASELINES)
def test_trains_saves_and_goes_on(texts, tmp_path, name):
    whole, resumed = make(name), make(name, seed=7)
    _, untrained = logits_and_loss(whole.model, texts)
    train(whole, texts, 0)
    assert logits_and_loss(whole.model, texts)[1] < untrained
    train(whole, texts, 1)
    whole.save(tmp_path / "state")
    resumed.load(tmp_path / "state")
    logits, _ = logits_and_loss(whole.model, texts)
    assert torch.equal(logits, logits_and_loss(resumed.model, texts)[0])
    save_adapter(whole.model, tmp_path / "adapter")
    loaded = load_adapter(CausalLM(), tmp_path / "adapter")
    torch.testing.assert_close(logits_and_loss(loaded, texts)[0], logits, rtol=1e-4, atol=1e-5)
    for strategy in (whole, resumed):
        train(strategy, texts, 2)
    assert torch.equal(LoRAFactors(whole.model).stack, LoRAFactors(resumed.model).stack)
    ends = [logits_and_loss(strategy.model, texts)[0] for strategy in (whole, resumed)]
    assert torch.equal(*ends)


def test_padding_is_no_input_of_inf_lora(texts, monkeypatch):
    """The covariances are those of the texts alone, each without padding."""
    taken = []
    from treelora_avalanche.plugins.baselines import inf_lora

    original = inf_lora.input_covariances

    def recorded(model, batches):
        taken.append(original(model, batches))
        return taken[-1]

    monkeypatch.setattr(inf_lora, "input_covariances", recorded)
    strategy = make("InfLoRA")
    bare = CausalLM().language_model.eval()
    train(strategy, texts, 0)
    expected = torch.zeros(16, 16)
    first = bare.model.layers[0]
    for ids, *_ in texts.train_stream[0].dataset:
        text = ids[ids != PADDING]
        with torch.no_grad():
            x = first.input_layernorm(bare.model.embed_tokens(text))
        expected += x.T @ x
    torch.testing.assert_close(taken[0][0], expected / 10, rtol=1e-4, atol=1e-5)
