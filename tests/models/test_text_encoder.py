"""Text encoders: class logits from token sequences, trained like image models."""

import copy
import json

import pytest
import torch
from transformers import (
    BertConfig,
    BertModel,
    DistilBertConfig,
    DistilBertModel,
    RobertaConfig,
    RobertaModel,
)

from treelora_avalanche.adapters import (
    TrainableView,
    add_lora,
    find_classifier,
    load_adapter,
    lora_layers,
    save_adapter,
)
from treelora_avalanche.models import TextEncoder, create_text_encoder
from treelora_avalanche.models.text_encoder import encode_texts
from treelora_avalanche.scenarios import TextClasses
from treelora_avalanche.strategies import FrozenNCM, SeqLoRA, TreeLoRAStrategy

pytestmark = pytest.mark.filterwarnings("ignore:No loggers specified")

BERT = BertConfig(
    vocab_size=98,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=2,
    max_position_embeddings=40,
)
DISTILBERT = DistilBertConfig(
    vocab_size=98, dim=32, hidden_dim=48, n_layers=2, n_heads=2, max_position_embeddings=40
)
WORDS = ["alpha", "beta", "gamma", "delta", "omega", "sigma"]


@pytest.fixture
def make_encoder(make_tokenizer):
    def make(num_classes=6, kind=BertModel, config=BERT):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return TextEncoder(kind(config), make_tokenizer(), num_classes=num_classes).eval()

    return make


@pytest.fixture
def folder(tmp_path):
    """Two tasks of three classes: which word is it?"""
    for place, name in enumerate(("first", "second")):
        (tmp_path / name).mkdir()
        for part, n in (("train", 12), ("test", 4)):
            records = [
                {"prompt": f"{word} {word} {i}", "answer": word.upper()}
                for word in WORDS[3 * place : 3 * place + 3]
                for i in range(n)
            ]
            (tmp_path / name / f"{part}.json").write_text(json.dumps(records))
    return tmp_path


@pytest.mark.parametrize(("kind", "config"), [(BertModel, BERT), (DistilBertModel, DISTILBERT)])
def test_logits_are_the_head_on_the_mean_without_padding(make_encoder, kind, config):
    encoder = make_encoder(kind=kind, config=config)
    rows = encode_texts(encoder.tokenizer, ["some text", "x"], 40)
    logits = encoder(rows)
    for n, length in enumerate((9, 1)):
        hidden = encoder.encoder(input_ids=rows[n : n + 1, :length]).last_hidden_state[0]
        expected = hidden.mean(0) @ encoder.head.weight.T + encoder.head.bias
        torch.testing.assert_close(logits[n], expected, rtol=1e-4, atol=1e-5)


def test_too_long_texts_lose_their_end(make_tokenizer):
    tokenizer = make_tokenizer()
    rows = encode_texts(tokenizer, ["abcdef"], 4)
    assert tokenizer.decode(rows[0]) == "abcd"


def test_context_is_that_of_the_encoder(make_tokenizer):
    assert TextEncoder(BertModel(BERT), make_tokenizer(), num_classes=2).max_length == 40
    config = RobertaConfig(
        vocab_size=98,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=42,  # of which two are not for tokens
        pad_token_id=1,
    )
    encoder = TextEncoder(RobertaModel(config), make_tokenizer(), num_classes=2)
    assert encoder.max_length == 40
    encoder(torch.full((1, 40), 5))  # the last position exists


@pytest.mark.parametrize(
    ("kind", "config", "names"),
    [(BertModel, BERT, {"query", "value"}), (DistilBertModel, DISTILBERT, {"q_lin", "v_lin"})],
)
def test_lora_and_head_are_trained_and_reload(make_encoder, tmp_path, kind, config, names):
    model = add_lora(make_encoder(kind=kind, config=config))
    assert {name.split(".")[-1] for name in lora_layers(model)} == names
    assert len(lora_layers(model)) == 4
    head = find_classifier(model)
    assert head.out_features == 6
    assert head.weight.requires_grad
    torch.manual_seed(1)
    for layer in lora_layers(model).values():
        torch.nn.init.normal_(layer.lora_B["default"].weight)
    torch.nn.init.normal_(head.weight)
    save_adapter(model, tmp_path / "adapter")
    again = load_adapter(make_encoder(kind=kind, config=config), tmp_path / "adapter").eval()
    rows = encode_texts(model.tokenizer, ["some text", "more"], 20)
    torch.testing.assert_close(again(rows), model.eval()(rows))
    twin = copy.deepcopy(TrainableView(model))
    torch.testing.assert_close(twin(rows), model(rows))


def test_tasks_bring_their_classes_in_turn(folder, make_tokenizer):
    benchmark = TextClasses(folder, make_tokenizer(), max_length=20, allow_overlap=True)
    assert benchmark.class_names == [word.upper() for word in WORDS]
    assert benchmark.n_classes == 6
    assert [e.classes_in_this_experience for e in benchmark.train_stream] == [[0, 1, 2], [3, 4, 5]]
    x, y, task = benchmark.test_stream[1].dataset[0]
    assert (x.shape, y, task) == ((20,), 3, 0)


def test_equal_answers_are_one_class(folder, make_tokenizer):
    for part in ("train", "test"):
        file = folder / "second" / f"{part}.json"
        file.write_text(file.read_text().replace("DELTA", "ALPHA"))
    benchmark = TextClasses(folder, make_tokenizer(), allow_overlap=True)
    assert benchmark.n_classes == 5
    assert benchmark.train_stream[1].classes_in_this_experience == [0, 3, 4]


def test_classes_can_be_divided_among_other_tasks(folder, make_tokenizer):
    benchmark = TextClasses(folder, make_tokenizer(), 3, seed=1, allow_overlap=True)
    dealt = [e.classes_in_this_experience for e in benchmark.train_stream]
    assert [len(classes) for classes in dealt] == [2, 2, 2]
    assert sorted(c for classes in dealt for c in classes) == list(range(6))
    with pytest.raises(ValueError, match=r"`n_experiences` .* but is 4"):
        TextClasses(folder, make_tokenizer(), 4, allow_overlap=True)


@pytest.mark.parametrize("head", ["linear", "task_adaptive"])
@pytest.mark.parametrize("cls", [SeqLoRA, TreeLoRAStrategy])
def test_strategies_learn_the_classes_as_those_of_images(make_encoder, folder, cls, head):
    encoder = make_encoder()
    benchmark = TextClasses(folder, encoder, allow_overlap=True)
    torch.manual_seed(0)
    strategy = cls(
        encoder,
        train_mb_size=12,
        train_epochs=12,
        eval_mb_size=24,
        head=head,
        evaluator=None,
    )
    for experience in benchmark.train_stream:
        strategy.train(experience)
    x, y, _ = zip(*benchmark.train_stream[1].dataset, strict=True)
    strategy.model.eval()
    right = strategy.model(torch.stack(x)).argmax(1) == torch.tensor(y)
    assert right.float().mean() > 0.9


def test_frozen_encoder_is_a_baseline(make_encoder, folder):
    encoder = make_encoder()
    benchmark = TextClasses(folder, encoder, allow_overlap=True)
    strategy = FrozenNCM(encoder, evaluator=None)
    for experience in benchmark.train_stream:
        strategy.train(experience)
    x, y, _ = zip(*benchmark.test_stream[0].dataset, strict=True)
    right = encoder.eval()(torch.stack(x)).argmax(1) == torch.tensor(y)
    assert right.float().mean() > 0.5


def test_encoder_from_a_folder(tmp_path, make_tokenizer, make_encoder):
    BertModel(BERT).save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    encoder = create_text_encoder(tmp_path, 3, max_length=10)
    rows = encode_texts(encoder.tokenizer, ["abc"], 10)
    assert encoder(rows).shape == (1, 3)
    with pytest.raises(ValueError, match="`num_classes` should be at least 1, but is 0"):
        create_text_encoder(tmp_path, 0)
    with pytest.raises(
        ValueError, match="`model` should be a TextEncoder or a tokenizer, but is a BertModel"
    ):
        TextClasses(tmp_path, encoder.encoder)
