"""Language models in GGUF files: the same logits as the network that was written."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from treelora_avalanche.adapters import add_lora, lora_layers
from treelora_avalanche.models import create_language_model, gguf
from treelora_avalanche.models.tokens import PADDING

# transformers adds "<|endoftext|>" to tokenizers of this kind that lack it.
WORDS = ["<|endoftext|>", "<s>", "</s>", *"abcdefghij", "Ġ", "ab"]


@pytest.fixture(scope="module")
def network():
    config = LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.3,
        bos_token_id=1,
        eos_token_id=2,
        tie_word_embeddings=False,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LlamaForCausalLM(config).eval()


def interleaved(weight, n_heads):
    """Rows of queries or keys in the order of llama.cpp: both halves of each head in turn."""
    return weight.view(n_heads, 2, -1, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


@pytest.fixture(scope="module")
def file(network, tmp_path_factory):
    """The network in the layout of llama.cpp, in float32."""
    written = pytest.importorskip("gguf", reason="the package gguf is not installed")
    config = network.config
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    writer = written.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(WORDS)
    writer.add_token_types([3, 3, 3, *[1] * (len(WORDS) - 3)])
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    names = {
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
    }
    state = network.state_dict()
    writer.add_tensor("token_embd.weight", state["model.embed_tokens.weight"].numpy())
    writer.add_tensor("output_norm.weight", state["model.norm.weight"].numpy())
    writer.add_tensor("output.weight", state["lm_head.weight"].numpy())
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    for layer in range(config.num_hidden_layers):
        for ours, theirs in names.items():
            weight = state[f"model.layers.{layer}.{ours}.weight"]
            weight = interleaved(weight, heads[theirs]) if theirs in heads else weight
            writer.add_tensor(f"blk.{layer}.{theirs}.weight", weight.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@torch.no_grad()
def test_logits_are_those_of_the_network_written(network, file):
    model = create_language_model(file, max_length=16).eval()
    tokens = torch.randint(3, len(WORDS), (2, 8), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(model(tokens), network(tokens).logits.transpose(1, 2))
    assert model.tokenizer.eos_token == "</s>"
    assert model.tokenizer("abc")["input_ids"][-2:] == [WORDS.index("ab"), WORDS.index("c")]
    assert model.end_tokens == [2]


def test_model_trains_and_is_saved_like_any_other(file, tmp_path):
    model = add_lora(create_language_model(str(file), dtype="bfloat16", max_length=16))
    assert len(lora_layers(model)) == 4
    base = model.base
    assert base.dtype == torch.bfloat16
    assert not hasattr(base.config, "quantization_config")
    model(torch.tensor([[3, 4, PADDING]])).sum().backward()
    assert any(p.grad is not None for p in model.parameters())
    plain = create_language_model(file, max_length=16)
    plain.network.save_pretrained(tmp_path)
    plain.tokenizer.save_pretrained(tmp_path)
    again = create_language_model(tmp_path, max_length=16)
    tokens = torch.tensor([[3, 4, 5]])
    assert torch.equal(again(tokens), plain(tokens))


def test_bad_files_are_refused(tmp_path, monkeypatch):
    with pytest.raises(
        FileNotFoundError, match=r"`name_or_folder` should be a file, but .*no\.gguf"
    ):
        create_language_model(tmp_path / "no.gguf")
    (tmp_path / "model.GGUF").write_bytes(b"GGUF")
    monkeypatch.setattr(gguf, "is_gguf_available", lambda: False)
    with pytest.raises(ImportError, match="pip install gguf"):
        create_language_model(tmp_path / "model.GGUF")
