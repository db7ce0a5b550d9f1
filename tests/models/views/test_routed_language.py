"""Routed language models: every text gets one adapter of the bank, or none."""

import pytest
import torch

from treelora_avalanche.adapters import AdapterBank, LoRAFactors, add_lora
from treelora_avalanche.models.features.discriminant import Discriminant
from treelora_avalanche.models.tokens import pad_tokens
from treelora_avalanche.models.views.prompt_router import PromptRouter
from treelora_avalanche.models.views.routed_language import RoutedLanguageModel

PROMPTS = ["zoo 3", "maths 1 + 2 =", "a", "greet Ann now", "zoo again", "what?"]


@pytest.fixture(params=[{"layers": "last:2"}, {"layers": "all", "dropout": 0.5}], ids=str)
def view(request, make_language_model):
    """A routed model whose bank holds three adapters; its router reads a frozen prefix, or not."""
    return routed(add_lora(make_language_model(n_layers=4), rank=2, **request.param))


def routed(model):
    bank, factors = AdapterBank(), LoRAFactors(model)
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        factors.stack.copy_(torch.randn(factors.stack.shape, generator=generator))
        bank.append(factors)
    view = RoutedLanguageModel(model, bank).eval()
    set_router(view, PROMPTS[:3])
    return view


def set_router(view, centres, threshold=torch.inf):
    """Sends the prompts nearest to centre k to adapter k."""
    features = torch.cat([view.frozen_features(tokens_of(view, [text])) for text in centres])
    n = len(centres)
    fitted = Discriminant.fit([f[None] + torch.randn(4, f.shape[0]) * 1e-3 for f in features])
    names = tuple(f"task {k}" for k in range(n))
    view.router = PromptRouter(fitted, torch.arange(n), tuple(range(n)), names, threshold, 1.0)


def tokens_of(view, texts):
    return pad_tokens(view.module.encode_prompts(texts, 6))


def alone(view, text, adapter):
    """What the model generates with one adapter, or with none."""
    factors = LoRAFactors(view.module)
    with factors.restored():
        factors.zero_() if adapter is None else factors.stack.copy_(view.bank[adapter])
        return view.module.generate([text], max_new_tokens=6)[0]


def test_texts_of_a_mixed_batch_are_those_of_their_own_adapters(view):
    routes = view.route(PROMPTS)
    assert {route.task for route in routes} == {0, 1, 2}
    expected = [alone(view, text, r.task) for text, r in zip(PROMPTS, routes, strict=True)]
    assert view.generate(PROMPTS, max_new_tokens=6, batch_size=4) == expected
    assert len(set(expected)) > 3


def test_generation_records_the_routes_in_the_order_of_the_prompts(view):
    view.generate(PROMPTS, max_new_tokens=2, batch_size=4)
    for found, expected in zip(view.routes, view.route(PROMPTS), strict=True):
        assert (found.task, found.task_name) == (expected.task, expected.task_name)
        assert found.distance == pytest.approx(expected.distance, rel=1e-3)
    assert [route.task for route in view.routes[:3]] == [0, 1, 2]


def test_foreign_prompts_get_the_base_model(view):
    set_router(view, PROMPTS[:3], threshold=10.0)  # of the centres alone
    routes = view.route(PROMPTS)
    assert [route.task for route in routes[:3]] == [0, 1, 2]
    assert [route.task for route in routes[3:]] == [None, None, None]
    expected = [alone(view, text, r.task) for text, r in zip(PROMPTS, routes, strict=True)]
    assert view.generate(PROMPTS, max_new_tokens=6, batch_size=6) == expected
    tokens = tokens_of(view, PROMPTS[3:])
    factors = LoRAFactors(view.module)
    logits = view(tokens)
    with factors.restored():
        factors.zero_()
        assert torch.equal(logits, view.module(tokens))


def test_logits_are_those_of_the_chosen_adapters(view):
    tokens = tokens_of(view, PROMPTS)
    logits = view(tokens)
    factors = LoRAFactors(view.module)
    for i, route in enumerate(view.route(PROMPTS)):
        with factors.restored():
            factors.stack.copy_(view.bank[route.task])
            own = view.module(tokens[i : i + 1])
        found = logits[i : i + 1, :, : own.shape[2]]
        torch.testing.assert_close(found, own, rtol=1e-4, atol=1e-4)


def test_router_reads_the_prompt_alone(view):
    tokens = tokens_of(view, ["zoo 3maths 1 + 2 ="])
    lengths = torch.tensor([len(tokens_of(view, ["zoo 3"])[0])])
    torch.testing.assert_close(
        view.frozen_features(tokens, lengths), view.frozen_features(tokens_of(view, ["zoo 3"]))
    )
    assert not torch.allclose(view.frozen_features(tokens), view.frozen_features(tokens, lengths))


def test_hidden_states_are_routed_as_tokens_are(make_language_model):
    view = routed(add_lora(make_language_model(n_layers=4), layers="last:2", rank=2))
    tokens = tokens_of(view, PROMPTS)
    torch.testing.assert_close(view(view.frozen_output(tokens)), view(tokens))


def test_generation_leaves_the_model_as_it_was(view):
    before = {name: p.detach().clone() for name, p in view.module.named_parameters()}
    trained = {name for name, p in view.module.named_parameters() if p.requires_grad}
    torch.manual_seed(3)
    draw = torch.rand(2)
    torch.manual_seed(3)
    view.generate(PROMPTS, max_new_tokens=2)
    assert torch.equal(torch.rand(2), draw)
    after = dict(view.module.named_parameters())
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert {name for name, p in after.items() if p.requires_grad} == trained
    assert list(view.module.network.peft_config) == ["default"]


def test_a_compiled_model_generates_the_same(view):
    expected = view.generate(PROMPTS, max_new_tokens=4)
    for block in view.blocks:  # what torch.compile sets; were it run, it would fail
        block._compiled_call_impl = lambda *_, **__: 1 / 0
    assert view.generate(PROMPTS, max_new_tokens=4) == expected
    assert all(block._compiled_call_impl is not None for block in view.blocks)


@pytest.mark.parametrize("layer", [0, 4, "first"])
def test_layers_that_the_model_lacks_are_refused(make_language_model, layer):
    model = add_lora(make_language_model(n_layers=4))
    with pytest.raises(ValueError, match=r"`router_layer` should be from 1 to 3 .* but is"):
        RoutedLanguageModel(model, AdapterBank(), layer=layer)


def test_a_model_of_one_layer_is_routed_by_its_embeddings(make_language_model):
    view = RoutedLanguageModel(add_lora(make_language_model(n_layers=1)), AdapterBank())
    tokens = tokens_of(view, ["zoo 3"])
    embedded = view.module.base.get_input_embeddings()(tokens)
    torch.testing.assert_close(view.frozen_features(tokens), embedded.mean(1))


def test_no_route_before_the_first_task(make_language_model):
    view = RoutedLanguageModel(add_lora(make_language_model()), AdapterBank())
    with pytest.raises(RuntimeError, match="Train a task first"):
        view.route(["a"])
