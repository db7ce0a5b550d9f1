"""On-policy replay: which prompts are kept, what is generated for them, and what is trained on."""

import pytest
import torch
from avalanche.training import Replay
from avalanche.training.plugins import SupervisedPlugin

from support import make, plugin_of, same, train, weights
from treelora_avalanche.adapters import TrainableView, add_lora
from treelora_avalanche.metrics.footprint import stored_bytes
from treelora_avalanche.models.token_loss import IGNORED, TokenCrossEntropy
from treelora_avalanche.plugins import OnPolicyReplayPlugin
from treelora_avalanche.strategies import OnPolicyReplay, SeqLoRA

pytestmark = pytest.mark.filterwarnings("ignore:No loggers specified")

OPTIONS = {"train_epochs": 1, "lr": 0.02, "rank": 2}


class Texts(SupervisedPlugin):
    """The texts of every batch, decoded, by experience."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def before_training_exp(self, strategy, *args, **kwargs):
        self.seen.append([])

    def before_forward(self, strategy, *args, **kwargs):
        tokenizer = strategy.model.module.tokenizer
        for x, y in zip(strategy.mb_x, strategy.mb_y, strict=True):
            answer = tokenizer.decode(y[y != IGNORED][:-1])
            text = tokenizer.decode(x[x >= 0], skip_special_tokens=True)
            self.seen[-1].append((text.removesuffix(answer), answer))

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        pass


def log_probability(strategy, prompt, answer):
    """Mean log-probability of the answer's characters and the end, one forward pass for each."""
    tokenizer = strategy.model.module.tokenizer
    tokens = tokenizer(prompt)["input_ids"]
    total = 0.0
    targets = [*tokenizer(answer, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    for target in targets:
        with torch.no_grad():
            logits = strategy.model.eval()(torch.tensor([tokens]))[0, :, -1]
        total += logits.log_softmax(0)[target].item()
        tokens = [*tokens, target]
    return total / len(targets)


def test_trains_on_its_most_confident_generations_for_kept_prompts(make_language_model, tiny_texts):
    texts = Texts()
    strategy = make(
        OnPolicyReplay, make_language_model(), replay_share=0.5, plugins=[texts], **OPTIONS
    )
    stream = tiny_texts.train_stream
    kept, expected = [], []
    for task in range(3):
        generated = []
        for number, prompts in enumerate(kept):
            limit = stream[number].max_new_tokens
            answers = strategy.model.module.generate(prompts, limit)
            pairs = [pair for pair in zip(prompts, answers, strict=True) if pair[1].strip()]
            pairs.sort(key=lambda pair: -log_probability(strategy, *pair))
            generated += pairs[: 4 // len(kept)]
        expected.append(generated)
        train(strategy, tiny_texts, task)
        kept = [task.prompts for task in plugin_of(strategy, OnPolicyReplayPlugin).tasks]
        assert len(kept[task]) == 4
        assert set(kept[task]) < set(stream[task].prompts)
    assert [len(generated) > 0 for generated in expected] == [False, True, True]
    for experience, seen, generated in zip(stream, texts.seen, expected, strict=True):
        own = list(zip(experience.prompts, experience.answers, strict=True))
        assert sorted(seen) == sorted(own + generated)
        assert len(experience.dataset) == 8
    assert stored_bytes(strategy) == sum(len(prompt) for prompts in kept for prompt in prompts)


def test_first_task_is_that_of_plain_lora_and_a_loaded_state_continues(
    make_language_model, tiny_texts, tmp_path
):
    def new(kind=OnPolicyReplay, **options):
        return make(kind, make_language_model(), **OPTIONS, **options)

    whole = train(new(), tiny_texts, 0)
    assert same(weights(whole), weights(train(new(SeqLoRA), tiny_texts, 0)))
    whole.save(tmp_path / "state")
    resumed = new()
    resumed.load(tmp_path / "state")
    for strategy in (whole, resumed):
        train(strategy, tiny_texts, 1)
    assert same(weights(whole), weights(resumed))
    with pytest.raises(ValueError, match=r"`replay_share` should be 0.1, as in the state"):
        new(replay_share=0.2).load(tmp_path / "state")


def test_replayed_texts_go_through_the_cache(make_language_model, tiny_texts):
    trained = []
    for cache in ("auto", None):
        strategy = make(
            OnPolicyReplay, make_language_model(), layers="last:1", cache=cache, **OPTIONS
        )
        trained.append(weights(train(strategy, tiny_texts, 0, 1)))
    for name, value in trained[0].items():
        torch.testing.assert_close(value, trained[1][name], rtol=1e-3, atol=1e-4)


def test_replayed_texts_count_as_their_tokens(make_language_model, tiny_texts):
    view = TrainableView(add_lora(make_language_model()))
    replay = Replay(
        model=view,
        optimizer=torch.optim.SGD(view.parameters(), lr=0.01),
        criterion=TokenCrossEntropy(),
        mem_size=100,
        train_mb_size=8,
        evaluator=None,
    )
    expected = 0
    for experience in tiny_texts.train_stream[:2]:
        replay.train(experience)
        for prompt, answer in zip(experience.prompts, experience.answers, strict=True):
            expected += 4 * (1 + len(prompt) + len(answer) + 1)  # begins and ends with a token
        assert stored_bytes(replay) == expected


def test_bad_arguments_are_refused(make_language_model, tiny_vit):
    with pytest.raises(ValueError, match="`replay_share` should be above 0 and at most 1, but is"):
        OnPolicyReplay(make_language_model(), replay_share=0)
    with pytest.raises(ValueError, match="should be a language model for OnPolicyReplay"):
        OnPolicyReplay(tiny_vit())
