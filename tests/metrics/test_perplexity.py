"""Perplexity on plain text: each token once, each window by its own route."""

import math

import pytest
import torch

from support import make, train
from treelora_avalanche import TreeLoRAStrategy
from treelora_avalanche.adapters import LoRAFactors
from treelora_avalanche.metrics.perplexity import encode_passages, n_predicted, perplexity
from treelora_avalanche.models.views.routed_language import RoutedLanguageModel
from treelora_avalanche.plain_text import ENGLISH, read_passages


def test_every_token_but_the_first_is_predicted_once(make_tokenizer):
    tokenizer = make_tokenizer()
    windows = encode_passages(tokenizer, ["abcdefgh", "x", "a</s>"], max_length=3)
    predicted = ["".join(tokenizer.convert_ids_to_tokens(window[1:])) for window in windows]
    assert predicted == ["bcd", "efg", "h", "</s", ">"]  # the name of the end token stays text
    assert n_predicted(windows) == 7 + 4
    with pytest.raises(ValueError, match="at least 2 tokens, but holds none"):
        encode_passages(tokenizer, ["x"], max_length=3)


def test_text_of_the_package():
    passages = read_passages()
    assert len(passages) == 14
    assert all(200 < len(passage) < 800 for passage in passages)
    assert ENGLISH.stat().st_size < 20_000


def test_every_window_has_its_own_route(make_language_model, tiny_texts):
    base = make_language_model()
    strategy = train(make(TreeLoRAStrategy, make_language_model()), tiny_texts)
    view = strategy.model
    assert isinstance(view, RoutedLanguageModel)
    texts = [tiny_texts.train_stream[k].prompts[3] for k in range(3)]
    texts.append("Quite another text, about rivers.")
    windows = encode_passages(base.tokenizer, texts, 48)
    chosen = [
        int(view.router(view.frozen_features(torch.tensor([window[:-1]])))) for window in windows
    ]
    assert chosen[-1] == -1  # foreign
    assert len(set(chosen)) > 2

    factors = LoRAFactors(view.module)
    total = 0.0
    for window, adapter in zip(windows, chosen, strict=True):
        with factors.restored(), torch.no_grad():
            factors.zero_()
            if adapter >= 0:
                factors.stack.copy_(strategy.bank[adapter])
            logits = view.module(torch.tensor([window[:-1]]))
            total += torch.nn.functional.cross_entropy(
                logits, torch.tensor([window[1:]]), reduction="sum"
            ).item()
    expected = math.exp(total / n_predicted(windows))
    assert perplexity(view, windows, batch_size=4) == pytest.approx(expected, rel=1e-5)
    # Foreign windows alone: exactly the base model.
    assert perplexity(view, windows[-1:]) == perplexity(base, windows[-1:])
