"""Language models: logits and their mask, the loss, prompts, generation, LoRA by family."""

import copy
import logging

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel
from torch.nn import functional as F
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertModel,
    GemmaConfig,
    GPT2Config,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    Qwen2Config,
)

from treelora_avalanche.adapters import (
    LoRAFactors,
    TrainableView,
    add_lora,
    find_classifier,
    lora_layers,
    merged_weights,
    save_adapter,
)
from treelora_avalanche.models import LanguageModel, TokenCrossEntropy, create_language_model
from treelora_avalanche.models.tokenization import encode_prompt, encode_sample
from treelora_avalanche.models.tokens import PADDING

SIZES = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 128,
}
FAMILIES = {
    "llama": (LlamaConfig(vocab_size=99, **SIZES), ("q_proj", "v_proj")),
    "mistral": (
        MistralConfig(vocab_size=99, num_key_value_heads=1, **SIZES),
        ("q_proj", "v_proj"),
    ),
    "gemma": (
        GemmaConfig(vocab_size=99, num_key_value_heads=1, head_dim=8, **SIZES),
        ("q_proj", "v_proj"),
    ),
    "qwen": (Qwen2Config(vocab_size=99, num_key_value_heads=1, **SIZES), ("q_proj", "v_proj")),
    "gpt2": (
        GPT2Config(vocab_size=99, n_embd=16, n_layer=2, n_head=2, n_positions=128),
        ("c_attn",),
    ),
}
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<u>{{ m['content'] | trim }}</u>{% endfor %}"
    "{% if add_generation_prompt %}<a>{% endif %}"
)


@pytest.fixture
def make_model(make_tokenizer):
    """Makes a random model of a family, the same at every call."""

    def make(family="llama", **options):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            network = AutoModelForCausalLM.from_config(FAMILIES[family][0])
        return LanguageModel(network, make_tokenizer(), **{"max_length": 64, **options}).eval()

    return make


def rows(*lengths, width=64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.full((len(lengths), width), PADDING)
    for row, n in zip(x, lengths, strict=True):
        row[:n] = torch.randint(1, 96, (n,), generator=generator)
    return x


# ------------------------------------------------------------------------------------- the logits


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_the_bare_network_sequence_by_sequence(make_model, family):
    model = make_model(family)
    x = rows(11, 5, 8)
    logits = model(x)
    assert logits.shape == (3, 99, 11)
    for row, n in zip(range(3), (11, 5, 8), strict=True):
        alone = model.network(input_ids=x[row : row + 1, :n]).logits[0]  # (n, vocabulary)
        torch.testing.assert_close(logits[row, :, :n].T, alone, rtol=1e-4, atol=1e-5)
        assert not logits[row, :, n:].any()


def test_logits_are_a_view_and_the_last_columns_can_be_computed_alone(make_model):
    model = make_model()
    x = rows(11, 5)
    logits = model(x)
    assert logits.transpose(1, 2).is_contiguous()
    torch.testing.assert_close(model(x, last=4), logits[:, :, -4:])


def test_an_end_token_within_a_sequence_is_not_padding(make_model):
    model = make_model()
    x = rows(9, 9)
    x[1, 4:6] = 97
    alone = model.network(input_ids=x[1:, :9]).logits[0]
    torch.testing.assert_close(model(x)[1].T, alone, rtol=1e-4, atol=1e-5)


def test_gradient_checkpointing_gives_the_same_gradients(make_model):
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = add_lora(make_model(gradient_checkpointing=checkpointing)).train()
        for layer in lora_layers(model).values():
            torch.nn.init.normal_(layer.lora_B["default"].weight)
        model(rows(11, 5)).square().mean().backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
        counts = model.network.get_base_model().is_gradient_checkpointing
        assert counts is checkpointing
    for plain, again in zip(*gradients, strict=True):
        assert plain.abs().sum() > 0
        torch.testing.assert_close(plain, again)


# ------------------------------------------------------------------------------------- the loss


@settings(max_examples=40, deadline=None)
@given(
    batch=st.integers(1, 3),
    length=st.integers(1, 6),
    extra=st.integers(0, 2),
    fewer=st.integers(0, 2),
    seed=st.integers(0, 10_000),
    chunk=st.sampled_from([1, 50, 1 << 24]),
    reduction=st.sampled_from(["mean", "none"]),
)
def test_loss_and_gradient_are_torchs_in_float64(
    batch, length, extra, fewer, seed, chunk, reduction
):
    from treelora_avalanche.models import token_loss

    generator = torch.Generator().manual_seed(seed)
    logits = 5 * torch.randn(batch, length, 7, generator=generator, dtype=torch.float64)
    targets = torch.randint(0, 7, (batch, length), generator=generator)
    targets[torch.rand(batch, length, generator=generator) < 0.4] = -100
    targets[:, -1] = 3  # every sample has a target
    first = min(fewer, length - 1)
    targets[:, :first] = -100
    ours, theirs = (logits.clone().requires_grad_() for _ in range(2))
    given_targets = (
        targets[:, first:] if first else F.pad(targets, (0, extra), value=-100)
    )  # narrower than the logits, or wider
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(token_loss, "_CHUNK_VALUES", chunk)
        loss = TokenCrossEntropy(reduction)(ours.transpose(1, 2), given_targets)
        loss.sum().backward()
    per_token = F.cross_entropy(theirs.transpose(1, 2), targets, reduction="none")
    counts = (targets != -100).sum(1)
    expected = per_token.sum(1) / counts if reduction == "none" else per_token.sum() / counts.sum()
    expected.sum().backward()
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-12, atol=1e-12)


def test_loss_of_bfloat16_is_taken_in_float32():
    generator = torch.Generator().manual_seed(0)
    logits = (5 * torch.randn(2, 40, 9, generator=generator)).bfloat16().requires_grad_()
    targets = torch.randint(0, 40, (2, 9), generator=generator)
    loss = TokenCrossEntropy()(logits, targets)
    loss.backward()
    exact = logits.detach().double().requires_grad_()
    F.cross_entropy(exact, targets).backward()
    assert loss.dtype == torch.float32
    torch.testing.assert_close(
        loss.double(), F.cross_entropy(exact, targets).detach(), rtol=1e-6, atol=1e-6
    )
    torch.testing.assert_close(logits.grad.double(), exact.grad, rtol=5e-3, atol=1e-5)


def test_loss_never_holds_all_logits_in_float32(monkeypatch):
    """The largest tensor that is made next to the gradient is one chunk."""
    from torch.utils._python_dispatch import TorchDispatchMode

    from treelora_avalanche.models import token_loss

    class LargestFloat32(TorchDispatchMode):
        largest = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            output = function(*args, **(kwargs or {}))
            if isinstance(output, torch.Tensor) and output.dtype == torch.float32:
                self.largest = max(self.largest, output.numel())
            return output

    monkeypatch.setattr(token_loss, "_CHUNK_VALUES", 3000)
    logits = torch.randn(2, 1000, 12).bfloat16().requires_grad_()
    targets = torch.randint(0, 1000, (2, 12))
    with LargestFloat32() as ours:
        TokenCrossEntropy()(logits, targets).backward()
    with LargestFloat32() as naive:
        F.cross_entropy(logits.float(), targets).backward()
    assert naive.largest == logits.numel()
    assert ours.largest <= 3000


def test_unknown_reduction_is_refused():
    with pytest.raises(ValueError, match=r"`reduction` should be .*, but is 'sum'"):
        TokenCrossEntropy("sum")


# ------------------------------------------------------------------------------------- prompts


def text(tokenizer, tokens):
    return "".join(tokenizer.convert_ids_to_tokens(tokens))


def test_plain_sample_is_prompt_answer_end(make_tokenizer):
    tokenizer = make_tokenizer()
    sample = encode_sample(tokenizer, "2 + 2 =", "4", 64)
    assert text(tokenizer, sample.tokens) == "2 + 2 =4</s>"
    assert sample.n_prompt == len("2 + 2 =")
    assert sample.n_cut == 0


def test_template_is_used_where_there_is_one(make_tokenizer):
    tokenizer = make_tokenizer(bos_token="<s>")
    tokenizer.chat_template = TEMPLATE
    sample = encode_sample(tokenizer, " hi ", "yo", 80)
    assert text(tokenizer, sample.tokens) == "<s><u>hi</u><a>yo</s>"


@pytest.mark.parametrize(("chat_template", "before"), [(True, "<s><u>"), (False, "")])
def test_prompts_stay_raw_without_the_template(
    make_language_model, tmp_path, chat_template, before
):
    model = make_language_model()
    model.tokenizer.chat_template = TEMPLATE
    model.network.save_pretrained(tmp_path)
    model.tokenizer.save_pretrained(tmp_path)
    loaded = create_language_model(tmp_path, chat_template=chat_template)
    (tokens,) = loaded.encode_prompts(["hi"], 4)
    assert text(loaded.tokenizer, tokens).startswith(before + "hi")


@pytest.mark.parametrize("template", [None, TEMPLATE])
@settings(max_examples=40, deadline=None)
@given(
    prompt=st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=1, max_size=90),
    answer=st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=1, max_size=90),
    max_length=st.integers(56, 100),
)
def test_truncation_keeps_template_answer_and_the_end_of_the_prompt(
    make_tokenizer, template, prompt, answer, max_length
):
    tokenizer = make_tokenizer(bos_token="<s>")
    tokenizer.chat_template = template
    before, after = ("<s><u>", "</u><a>") if template else ("", "")
    sample = encode_sample(tokenizer, prompt, answer, max_length)
    got = text(tokenizer, sample.tokens)
    fixed = len(tokenizer(before + after, add_special_tokens=False)["input_ids"])
    full = fixed + len(prompt) + len(answer) + 1
    assert len(sample.tokens) == min(full, max_length)
    kept_prompt, kept_answer = (
        text(tokenizer, sample.tokens[: sample.n_prompt]).removeprefix(before),
        text(tokenizer, sample.tokens[sample.n_prompt :]),
    )
    assert got.startswith(before)
    assert kept_prompt.endswith(after)
    kept_prompt = kept_prompt.removesuffix(after)
    assert prompt.endswith(kept_prompt)
    assert len(kept_prompt) == len(prompt) - sample.n_dropped
    assert len(kept_prompt) >= min(len(prompt), 32)
    if sample.n_cut:
        assert answer.startswith(kept_answer)
        assert sample.n_cut == len(answer) + 1 - len(kept_answer)
        assert len(kept_prompt) == min(len(prompt), 32)
    else:
        assert kept_answer == answer + "</s>"


def test_no_room_is_an_error(make_tokenizer):
    tokenizer = make_tokenizer(bos_token="<s>")
    tokenizer.chat_template = TEMPLATE
    with pytest.raises(ValueError, match="to make room for an answer"):
        encode_sample(tokenizer, 90 * "a", "b", 40)
    with pytest.raises(ValueError, match=r"room for a prompt should be above .*, but is 3"):
        encode_prompt(tokenizer, "a", 3)


def test_tokenizer_without_end_token_is_refused(make_model, make_tokenizer):
    with pytest.raises(ValueError, match="should have an end token"):
        LanguageModel(make_model().network, make_tokenizer(eos_token=None))


def test_tokenizer_of_another_model_is_refused(make_tokenizer):
    network = LlamaForCausalLM(LlamaConfig(vocab_size=50, **SIZES))
    with pytest.raises(ValueError, match=r"at most 50 tokens, .* but has 98"):
        LanguageModel(network, make_tokenizer())


# ------------------------------------------------------------------------------------- generation


def greedy(model, tokens, n_new):
    """Without cache, batch or padding."""
    new = []
    for _ in range(n_new):
        logits = model.network(input_ids=torch.tensor([tokens + new])).logits[0, -1]
        new.append(int(logits.argmax()))
        if new[-1] in model.end_tokens:
            return new[:-1]
    return new


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("lora", [False, True])
def test_generation_is_greedy_whatever_the_batch(make_model, family, lora):
    model = make_model(family)
    if lora:
        model = add_lora(model)
        torch.manual_seed(1)
        for layer in lora_layers(model).values():
            torch.nn.init.normal_(layer.lora_B["default"].weight, std=0.3)
    model.train()
    prompts = ["Once upon a time", "x", "The quick brown fox jumps over"]
    expected = []
    model.eval()
    with torch.no_grad():
        for prompt in prompts:
            new = greedy(model, encode_prompt(model.tokenizer, prompt, 64), 12)
            expected.append(model.tokenizer.decode(new, skip_special_tokens=True))
    model.train()
    done = []
    for batch_size in (1, 2, 3):
        done.clear()
        got = model.generate(prompts, 12, batch_size=batch_size, progress=done.append)
        assert got == expected
        assert sum(done) == 3
    assert model.training
    assert any(expected)


def test_generation_keeps_the_end_of_a_prompt_and_takes_tokens_too(make_model):
    model = make_model()
    long = "abcdefghij" * 20
    assert model.generate([long], 8) == model.generate([long[-64:]], 8)
    tokens = encode_prompt(model.tokenizer, "abc", 64)
    assert model.generate([tokens], 8) == model.generate(["abc"], 8)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [((0, 1), "max_new_tokens"), ((4, 0), "batch_size"), ((128, 1), "max_new_tokens")],
)
def test_generation_refuses_numbers_out_of_range(make_model, arguments, named):
    with pytest.raises(ValueError, match=f"`{named}` should be at least 1"):
        make_model().generate(["a"], *arguments)


# ------------------------------------------------------------------------------------- LoRA


@pytest.mark.parametrize("family", FAMILIES)
def test_lora_adapts_what_the_family_calls_queries_and_values(make_model, family):
    model = add_lora(make_model(family))
    kinds = FAMILIES[family][1]
    layers = lora_layers(model)
    assert [name.split(".")[-1] for name in layers] == list(kinds) * 2
    config = model.network.peft_config["default"]
    assert (config.r, config.lora_alpha, config.task_type) == (8, 32, "CAUSAL_LM")
    assert isinstance(model.network, PeftModel)
    assert find_classifier(model) is None
    factors = LoRAFactors(TrainableView(model))
    assert factors.stack.shape[0] == len(kinds) * 2
    # W x + (alpha / r) B A x, of the first layer.
    layer = next(iter(layers.values()))
    torch.manual_seed(0)
    torch.nn.init.normal_(layer.lora_B["default"].weight)
    x = torch.randn(3, 16)
    a, b = factors.parameters[0]
    expected = layer.base_layer(x) + 4 * x @ a.T @ b.T
    torch.testing.assert_close(layer(x), expected)


def test_view_copies_the_adapter_and_shares_the_rest(make_model):
    view = TrainableView(add_lora(make_model()))
    twin = copy.deepcopy(view)
    x = rows(5, 3)
    torch.testing.assert_close(twin(x), view(x))
    assert twin.module.tokenizer is view.module.tokenizer
    with torch.no_grad():
        LoRAFactors(twin).stack.fill_(0.5)
    assert not torch.allclose(twin(x), view(x))
    frozen = {id(p) for p in torch.nn.Module.parameters(view) if not p.requires_grad}
    assert frozen == {id(p) for p in torch.nn.Module.parameters(twin) if not p.requires_grad}


def test_saved_adapter_is_one_of_peft(make_model, tmp_path):
    model = make_model()
    model.network.save_pretrained(tmp_path / "base")
    model.tokenizer.save_pretrained(tmp_path / "base")
    model = create_language_model(tmp_path / "base", max_length=64)
    model = add_lora(model)
    torch.manual_seed(0)
    for layer in lora_layers(model).values():
        torch.nn.init.normal_(layer.lora_B["default"].weight)
    save_adapter(TrainableView(model), tmp_path / "adapter")
    plain = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tmp_path / "base"), str(tmp_path / "adapter")
    ).eval()
    x = rows(9)[:, :9]
    torch.testing.assert_close(plain(input_ids=x).logits.transpose(1, 2), model.eval()(x))


# ------------------------------------------------------------------------------------- loading


def test_dtype_is_that_of_the_frozen_weights(make_model, make_tokenizer, tmp_path):
    make_model().network.save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    model = add_lora(create_language_model(tmp_path, dtype=torch.bfloat16))
    frozen = {p.dtype for p in model.parameters() if not p.requires_grad}
    trained = {p.dtype for p in model.parameters() if p.requires_grad}
    assert frozen == {torch.bfloat16}
    assert trained == {torch.float32}
    assert model(rows(5)).dtype == torch.bfloat16


def test_length_is_at_most_the_context(make_model, caplog):
    with caplog.at_level(logging.INFO):
        assert make_model(max_length=1024).max_length == 128
    assert "max_length is 128" in caplog.text


def test_folder_without_safetensors_is_refused(make_model, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"should hold a config\.json"):
        create_language_model(tmp_path)
    make_model().network.config.save_pretrained(tmp_path)
    torch.save({}, tmp_path / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match=r"safetensors.* \(found pytorch_model\.bin"):
        create_language_model(tmp_path)
    with pytest.raises(FileNotFoundError, match="should be a folder"):
        create_language_model(tmp_path / "missing")


def test_hub_out_of_reach_is_one_line_that_names_the_model(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(OSError, match="no-such-model', which could not be fetched") as error:
        create_language_model("nobody/no-such-model")
    assert "pass a folder" in str(error.value)
    assert "\n" not in str(error.value)


def test_encoder_is_no_causal_model(make_tokenizer, tmp_path):
    BertModel(
        BertConfig(
            vocab_size=99,
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
        )
    ).save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="causal"):
        create_language_model(tmp_path)


def test_published_model_continues_a_story(data_root):
    folder = data_root / "stories260K"
    if not folder.is_dir():
        pytest.skip(f"{folder} is missing")
    model = create_language_model(folder)
    (story,) = model.generate(["Once upon a time, there was a"], 40)
    # From the folder's README: what the conversion of these weights was checked against.
    assert story.startswith("little girl named Lily. She loved to play outside in the p")


# ------------------------------------------------------------------- the adapter in the weights


def trained_somewhere(model):
    """A model whose LoRA changes its output."""
    add_lora(model)
    generator = torch.Generator().manual_seed(1)
    stack = LoRAFactors(model).stack
    stack.copy_(0.3 * torch.randn(stack.shape, generator=generator))
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_merged_weights_give_the_same_output_and_restore_every_bit(make_model, family):
    model = trained_somewhere(make_model(family))
    tokens = rows(9, 30)
    plain = model(tokens)
    before = copy.deepcopy(model.state_dict())
    with merged_weights(model):
        torch.testing.assert_close(model(tokens), plain, rtol=1e-4, atol=1e-5)
        for layer in lora_layers(model).values():
            adapter = layer.active_adapters[0]
            layer.lora_B[adapter].weight.data.zero_()  # no longer affects the output
        torch.testing.assert_close(model(tokens), plain, rtol=1e-4, atol=1e-5)
        for name, layer in lora_layers(model).items():
            weight = layer.lora_B[layer.active_adapters[0]].weight
            weight.data.copy_(before[f"{name}.lora_B.default.weight"])
    assert not any(layer.merged for layer in lora_layers(model).values())
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert torch.equal(model(tokens), plain)


def test_merged_weights_are_restored_after_an_error(make_model):
    model = trained_somewhere(make_model())
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError, match="out of memory"), merged_weights(model):
        raise RuntimeError("out of memory")
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_layers_whose_output_would_change_are_not_merged(make_model):
    model = trained_somewhere(make_model())
    first, *others = lora_layers(model).values()
    first.get_base_layer().to(torch.bfloat16)
    listener = others[0].lora_A["default"].register_forward_hook(lambda *_: None)
    with merged_weights(model):
        assert [layer.merged for layer in lora_layers(model).values()] == [False, False, True, True]
    listener.remove()
    with merged_weights(model):
        assert [layer.merged for layer in lora_layers(model).values()] == [False, True, True, True]
