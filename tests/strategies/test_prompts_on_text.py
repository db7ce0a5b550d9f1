"""L2P, DualPrompt and HiDeLoRA on a language model: training and generation agree."""

import json

import pytest
import torch
from torch import nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from treelora_avalanche.adapters import LoRAFactors, lora_layers
from treelora_avalanche.metrics.footprint import stored_bytes
from treelora_avalanche.metrics.generation import find_text_generator
from treelora_avalanche.models import LanguageModel
from treelora_avalanche.models.tokens import first_tokens
from treelora_avalanche.runs.monitors import training_in_words
from treelora_avalanche.scenarios import TextTasks
from treelora_avalanche.strategies import L2P, DualPrompt, HiDeLoRA

pytestmark = pytest.mark.filterwarnings("ignore:No loggers specified")

TASKS = ["zoo", "maths"]
STRATEGIES = {
    "L2P": (L2P, {"pool_size": 6, "prompt_length": 2, "top_k": 2, "query_length": 8}),
    "DualPrompt": (
        DualPrompt,
        {
            "general_layers": (0,),
            "expert_layers": (1, 2),
            "query_length": 8,
        },
    ),
    "HiDeLoRA": (HiDeLoRA, {"rank": 4, "n_centroids": 3, "query_length": 8}),
}
PROMPTS = ["zoo animal 3:", "maths 7 + 1 =", "zoo animal 12, old:", "whatever"]
"""Not shorter than the queries: of shorter ones the query would change with every new token."""


@pytest.fixture
def make_model(make_tokenizer):
    """Makes a language model of random weights, the same at every call."""

    def make(kind="llama", max_length=48):
        sizes = {"vocab_size": 98, "bos_token_id": 96, "eos_token_id": 97}
        with torch.random.fork_rng():
            torch.manual_seed(0)
            network: nn.Module
            if kind == "gpt2":
                network = GPT2LMHeadModel(
                    GPT2Config(
                        n_embd=16,
                        n_layer=3,
                        n_head=2,
                        n_positions=64,
                        initializer_range=0.3,
                        **sizes,
                    )
                )
            else:
                sizes |= {
                    "hidden_size": 16,
                    "intermediate_size": 24,
                    "num_hidden_layers": 3,
                    "num_attention_heads": 4,
                    "num_key_value_heads": 2,
                    "max_position_embeddings": 64,
                    "initializer_range": 0.3,
                }
                if kind == "llama":
                    network = LlamaForCausalLM(LlamaConfig(**sizes))
                else:  # its attention reaches seven tokens back
                    network = MistralForCausalLM(MistralConfig(sliding_window=8, **sizes))
        return LanguageModel(network, make_tokenizer(bos_token="<s>"), max_length=max_length)

    return make


@pytest.fixture(scope="module")
def texts(make_tokenizer, tmp_path_factory):
    """Two tasks, told apart by how their prompts begin."""
    folder = tmp_path_factory.mktemp("texts")
    records = {
        "zoo": [{"prompt": f"zoo {n} animal:", "answer": "ape" * (1 + n % 2)} for n in range(8)],
        "maths": [{"prompt": f"maths {n} + 1 =", "answer": str(n + 1)} for n in range(8)],
    }
    for name in TASKS:
        (folder / name).mkdir()
        for part in ("train", "test"):
            (folder / name / f"{part}.json").write_text(json.dumps(records[name]))
    tokenizer = make_tokenizer(bos_token="<s>")
    return TextTasks(folder, tokenizer, tasks=TASKS, max_length=48, allow_overlap=True)


def make(name, model, seed=1, **options):
    torch.manual_seed(seed)
    strategy_class, own = STRATEGIES[name]
    defaults = {"train_mb_size": 4, "train_epochs": 3, "evaluator": None}
    defaults["optimizer"] = lambda parameters: torch.optim.AdamW(parameters, lr=0.03)
    return strategy_class(model, **{**defaults, **own, **options})


def rows_of(texts):
    rows = [x for e in texts.test_stream for x, *_ in e.dataset]
    return torch.stack(rows)


def logits_of(strategy, rows, batch_size):
    strategy.model.eval()
    with torch.no_grad():
        outputs = [strategy.model(batch) for batch in rows.split(batch_size)]
    return [row for output in outputs for row in output]


@pytest.fixture(params=STRATEGIES)
def trained(request, make_model, texts):
    strategy = make(request.param, make_model())
    strategy.train(texts.train_stream)
    return strategy


# ---------------------------------------------------- all three, in addition to test_contract.py


def test_the_last_columns_are_those_of_all(trained, texts):
    rows = rows_of(texts)
    whole = torch.stack(logits_of(trained, rows, len(rows)))
    with torch.no_grad():
        torch.testing.assert_close(trained.model(rows, last=5), whole[:, :, -5:])


def test_generates_what_greedy_search_without_a_cache_does(trained):
    model = trained.model.eval()
    generator = find_text_generator(model)
    end = generator.tokenizer.eos_token_id

    def continued(prompt):
        tokens = generator.tokenizer(prompt)["input_ids"]
        if tokens[-1:] == [end]:
            tokens = tokens[:-1]
        start = len(tokens)
        while len(tokens) < start + 8:
            with torch.no_grad():
                token = int(model(torch.tensor([tokens]))[0, :, -1].argmax())
            if token == end:
                break
            tokens.append(token)
        return tokens[:start], generator.tokenizer.decode(tokens[start:], skip_special_tokens=True)

    prompts, expected = zip(*map(continued, PROMPTS), strict=True)
    assert len(set(expected)) > 1
    for batch_size in (1, 3, 8):
        done = []
        found = generator.generate(prompts, 8, batch_size, done.append)
        assert found == list(expected)
        assert sum(done) == len(PROMPTS)


# --------------------------------------------------------------------------------------------- L2P


def prompted(strategy):
    return strategy.model.module.network


def test_l2p_picks_what_brute_force_cosine_picks(make_model, texts):
    strategy = make("L2P", make_model())
    network = prompted(strategy)
    rows = rows_of(texts)
    seen = []
    original = network.pool.pick
    network.pool.pick = lambda queries: seen.append(original(queries)) or seen[-1]
    logits = logits_of(strategy, rows, len(rows))
    bare = make_model()
    embeddings = bare.network.get_input_embeddings().weight
    embeddings = embeddings.detach()
    keys, prompts = network.pool.keys.detach(), network.pool.prompts.detach()
    for row, picks, found in zip(rows, seen[0], logits, strict=True):
        text = row[row >= 0]
        query = embeddings[text[:8]].mean(0)
        cosines = [float(query @ key / query.norm() / key.norm()) for key in keys]
        best = sorted(range(6), key=lambda k: -cosines[k])[:2]
        assert picks.tolist() == best
        # Output of the bare network after these prompts.
        embedded = torch.cat((prompts[best[0]], prompts[best[1]], embeddings[text]))
        with torch.no_grad():
            expected = bare.network(inputs_embeds=embedded[None]).logits[0, 4:]
        torch.testing.assert_close(found[:, : len(text)].T, expected, rtol=1e-4, atol=1e-5)


def test_the_query_is_that_of_the_first_tokens_on_either_side_of_the_padding():
    right = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]])
    expected = torch.tensor([[1, 1, 0, 0], [1, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]]).bool()
    assert torch.equal(first_tokens(right, 2), expected)
    left = torch.tensor([[1, 1, 1, 1], [0, 1, 1, 1], [0, 0, 0, 1]])
    expected = torch.tensor([[1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 0, 1]]).bool()
    assert torch.equal(first_tokens(left, 2), expected)


def test_keys_are_pulled_to_the_queries(make_model, texts):
    strategy = make("L2P", make_model(), sim_coefficient=1.0, train_epochs=15)
    network = prompted(strategy)
    rows = rows_of(texts)[:8]
    queries = torch.stack(
        [network.network.get_input_embeddings().weight[row[row >= 0][:8]].mean(0) for row in rows]
    )
    before = network.pool.distance(queries, network.pool.pick(queries)).item()
    strategy.train(texts.train_stream[0])
    after = network.pool.distance(queries, network.pool.pick(queries)).item()
    assert after < 0.8 * before


@pytest.mark.parametrize("prompts", ["L2P", "DualPrompt"])
@pytest.mark.parametrize("kind", ["gpt2", "mistral"])
def test_networks_of_other_kinds(make_model, kind, prompts):
    """GPT-2 has a table of positions, Mistral a window; in both, padding must not count."""
    strategy = make(prompts, make_model(kind))
    model = strategy.model.eval()
    generator = find_text_generator(model)
    rows = [list(range(3, 18)), list(range(20, 28)), list(range(50, 70, 2))]
    expected = []
    for row in rows:
        tokens = list(row)
        while len(tokens) < len(row) + 6:
            with torch.no_grad():
                tokens.append(int(model(torch.tensor([tokens]))[0, :, -1].argmax()))
            if tokens[-1] == 97:
                break
        new = [token for token in tokens[len(row) :] if token != 97]
        expected.append(generator.tokenizer.decode(new, skip_special_tokens=True))
    assert generator.generate(rows, 6, 3) == expected


def test_l2p_stores_nothing_per_task(make_model, texts):
    strategy = make("L2P", make_model())
    sizes = []
    for experience in texts.train_stream:
        strategy.train(experience)
        sizes.append(sum(p.numel() for p in strategy.model.parameters()))
    assert sizes == [6 * (2 + 1) * 16] * 2
    assert stored_bytes(strategy) == 0


def test_a_run_says_what_is_trained(make_model):
    words = training_in_words(make("L2P", make_model()), {"lr": 0.03, "batch_size": 4}, [1, 2])
    assert words == (
        "trains 288 values of prompts and keys; learning rate 0.03; batches of 4; epochs 1, 2"
    )


# -------------------------------------------------------------------------------------- DualPrompt


def by_hand(model, tokens, prefixes):
    """Logits of a text by a bare Llama, whose attention to prefixes is written out."""
    llama = model.network.model
    hidden = llama.embed_tokens(tokens)[None]
    n = len(tokens)
    cos, sin = llama.rotary_emb(hidden, torch.arange(n)[None])
    causal = torch.full((n, n), -torch.inf).triu(1)
    for number, layer in enumerate(llama.layers):
        at, x = layer.self_attn, layer.input_layernorm(hidden)
        q, k, v = (
            p(x)[0].unflatten(1, (-1, 4)).transpose(0, 1) for p in (at.q_proj, at.k_proj, at.v_proj)
        )  # (heads, n, 4)
        q, k = apply_rotary_pos_emb(q[None], k[None], cos, sin)
        q, k, bias = q[0], k[0], causal
        if number in prefixes:
            before_k, before_v = prefixes[number].transpose(1, 2)  # (heads, length, 4) each
            k, v = torch.cat((before_k, k), 1), torch.cat((before_v, v), 1)
            bias = torch.cat((torch.zeros(n, before_k.shape[1]), causal), 1)
        k, v = k.repeat_interleave(2, 0), v.repeat_interleave(2, 0)
        mixed = (q @ k.transpose(1, 2) / 2 + bias).softmax(2) @ v
        hidden = hidden + at.o_proj(mixed.transpose(0, 1).flatten(1))
        hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
    return model.network.lm_head(llama.norm(hidden))[0]


def test_dual_prompt_attends_to_the_prefixes_of_the_nearest_key(make_model, texts):
    strategy = make("DualPrompt", make_model(), train_epochs=25)
    strategy.train(texts.train_stream)
    network, bare = prompted(strategy), make_model()
    # (layers, keys and values, length, ...): 2 and 3 by default, as in TRACE.
    assert (network.general.shape[2], network.experts.active.shape[2]) == (2, 3)
    keys = [*network.experts.past_keys, network.experts.key]
    experts = [*network.experts.past, network.experts.active]
    embeddings = bare.network.get_input_embeddings().weight
    rows = rows_of(texts)
    chosen = []
    with torch.no_grad():
        for row, found in zip(rows, logits_of(strategy, rows, 16), strict=True):
            text = row[row >= 0]
            query = embeddings[text[:8]].mean(0)
            cosines = [float(query @ key / query.norm() / key.norm()) for key in keys]
            chosen.append(cosines.index(max(cosines)))
            expert = experts[chosen[-1]]
            expected = by_hand(bare, text, {0: network.general[0], 1: expert[0], 2: expert[1]})
            torch.testing.assert_close(found[:, : len(text)].T, expected, rtol=1e-3, atol=1e-4)
    assert chosen == [0] * 8 + [1] * 8


def test_every_task_has_an_expert_that_later_tasks_leave_alone(make_model, texts):
    strategy = make("DualPrompt", make_model())
    strategy.train(texts.train_stream[0])
    experts = prompted(strategy).experts
    first, key = experts.active.detach().clone(), experts.key.detach().clone()
    strategy.train(texts.train_stream[1])
    assert torch.equal(experts.past[0], first)
    assert torch.equal(experts.past_keys[0], key)
    assert not torch.equal(experts.active, first)
    assert stored_bytes(strategy) == 4 * (2 * 2 * 3 * 2 * 4 + 16)


def test_prefixes_are_gone_after_generation(trained):
    modules = list(trained.model.modules())
    assert not any("prefix" in vars(module) for module in modules)


# ---------------------------------------------------------------------------------------- HiDeLoRA


def test_every_text_uses_the_adapter_of_its_task(make_model, texts):
    strategy = make("HiDeLoRA", make_model())
    strategy.train(texts.train_stream)
    rows = rows_of(texts)  # eight of each task
    found = logits_of(strategy, rows, 16)
    live = LoRAFactors(strategy.model)
    assert not torch.equal(strategy.bank[0], strategy.bank[1])
    assert torch.equal(live.stack, strategy.bank[1])
    for row, logits, task in zip(rows, found, [0] * 8 + [1] * 8, strict=True):
        live.stack.copy_(strategy.bank[task])
        with torch.no_grad():
            expected = strategy.model.module(row[None])[0]
        width = expected.shape[1]
        torch.testing.assert_close(logits[:, :width], expected, rtol=1e-4, atol=1e-5)


def test_features_are_those_of_the_bare_network(make_model, texts):
    strategy = make("HiDeLoRA", make_model())
    strategy.train(texts.train_stream)
    rows = rows_of(texts)
    with torch.no_grad():
        found = strategy.model.eval().frozen_features(rows)
        bare = make_model().network.model
        for row, features in zip(rows, found, strict=True):
            hidden = bare(input_ids=row[row >= 0][None]).last_hidden_state[0, :8]
            torch.testing.assert_close(features, hidden.mean(0), rtol=1e-4, atol=1e-5)


def test_hide_lora_adapts_keys_and_values_and_stores_what_it_says(make_model, texts):
    strategy = make("HiDeLoRA", make_model())
    assert {layer.rpartition(".")[2] for layer in lora_layers(strategy.model)} == {
        "k_proj",
        "v_proj",
    }
    sizes = []
    for experience in texts.train_stream:
        strategy.train(experience)
        sizes.append(stored_bytes(strategy))
    adapter = 4 * 4 * (16 + 8) * 6  # four bytes, rank, inputs and outputs, matrices
    centroids = 4 * 3 * (2 * 16 + 1)
    assert sizes == [adapter + centroids, 2 * (adapter + centroids)]


# --------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize("strategy", [L2P, DualPrompt, HiDeLoRA])
def test_another_model_is_refused_by_name(strategy):
    with pytest.raises(ValueError, match=r"VisionTransformer.*is a Linear.*or a LanguageModel"):
        strategy(nn.Linear(2, 2))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"query_length": 0}, "`query_length` should be at least 1, but is 0"),
        ({"top_k": 9}, "`top_k` should be at most 6, the size of the pool, but is 9"),
        ({"prompt_length": 20}, r"at most 24, its context of 64 less .* = 40, but is"),
        ({"head": "task_adaptive"}, "has no classifier to re-train"),
    ],
)
def test_l2p_refuses_before_it_touches_the_model(make_model, options, message):
    model = make_model()
    network = model.network
    with pytest.raises(ValueError, match=message):
        make("L2P", model, **options)
    assert model.network is network
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("prompts", ["L2P", "DualPrompt"])
def test_prompts_are_put_on_a_model_once(make_model, prompts):
    model = make_model()
    make(prompts, model)
    with pytest.raises(ValueError, match="should carry neither prompts nor LoRA"):
        make(prompts, model)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"query_length": 0}, "`query_length` should be at least 1, but is 0"),
        ({"expert_layers": (2, 3)}, r"`expert_layers` .*which are 0 to 2, but is \[2, 3\]"),
        ({"expert_layers": (0, 1)}, "should have no block in common"),
        ({"general_length": 0}, "`general_length` should be at least 1"),
    ],
)
def test_dual_prompt_refuses_before_it_touches_the_model(make_model, options, message):
    model = make_model()
    network = model.network
    with pytest.raises(ValueError, match=message):
        make("DualPrompt", model, **options)
    assert model.network is network
    assert all(p.requires_grad for p in model.parameters())


def test_dual_prompt_refuses_gradient_checkpointing(make_model):
    model = make_model()
    model.network.gradient_checkpointing_enable()
    with pytest.raises(ValueError, match="gradient_checkpointing=False"):
        make("DualPrompt", model)


def test_hide_lora_refuses_what_it_cannot_do(make_model):
    with pytest.raises(ValueError, match="`query_length` should be at least 1, but is 0"):
        make("HiDeLoRA", make_model(), query_length=0)
    with pytest.raises(ValueError, match="`n_centroids` should be at least 1"):
        make("HiDeLoRA", make_model(), n_centroids=0)
    with pytest.raises(ValueError, match=r"`target_modules` should be one of .*, but is 'k_proj'"):
        make("HiDeLoRA", make_model("gpt2"))
