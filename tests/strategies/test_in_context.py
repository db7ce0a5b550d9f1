"""In-context learning: demonstrations of the nearest task before every prompt, no training."""

import json
from collections import Counter

import pytest
import torch

from treelora_avalanche.cli import main
from treelora_avalanche.metrics.generation import find_text_generator, generation_metrics
from treelora_avalanche.models.views.in_context_language import Demonstrations, answer_form
from treelora_avalanche.plugins.baselines.demonstrations import balanced
from treelora_avalanche.strategies import InContext

pytestmark = pytest.mark.filterwarnings("ignore:No loggers specified")


@pytest.fixture
def make(make_language_model):
    """Makes a strategy whose model has room for the demonstrations."""

    def make(max_length=256, **options):
        model = make_language_model(max_length=max_length, context=320)
        return InContext(model, **{"evaluator": None, **options})

    return make


def train(strategy, texts, *tasks):
    for task in tasks:
        strategy.train(texts.train_stream[task])


def given_to(strategy, monkeypatch):
    """The prompts that the inner language model continues."""
    given = []
    generate = strategy.model.module.generate

    def recorded(prompts, *args, **kwargs):
        given.extend(prompts)
        return generate(prompts, *args, **kwargs)

    monkeypatch.setattr(strategy.model.module, "generate", recorded)
    return given


def test_shows_six_demonstrations_of_the_prompts_task(make, tiny_texts, monkeypatch):
    strategy = make()
    train(strategy, tiny_texts, 0, 1, 2)
    given = given_to(strategy, monkeypatch)
    prompts = [prompt for task in tiny_texts.test_stream for prompt in task.prompts]
    strategy.model.generate(prompts, 4)
    assert len(given) == len(prompts) == 24
    for place, (prompt, text) in enumerate(zip(prompts, given, strict=True)):
        task = tiny_texts.train_stream[place // 8]
        *shown, last = text.split("\n\n")
        assert last == prompt
        known = {f"{p} {a}" for p, a in zip(task.prompts, task.answers, strict=True)}
        assert len(shown) == len(set(shown)) == 6
        assert set(shown) <= known


def test_the_nearest_task_is_that_of_the_greatest_cosine(make, tiny_texts):
    """Against a loop over prompts, tokens and tasks."""
    strategy = make()
    train(strategy, tiny_texts, 0, 1, 2)
    model = strategy.model
    table = model.module.network.get_input_embeddings().weight

    def mean(prompt):
        return sum(table[token] for token in model.tokenizer(prompt)["input_ids"]) / len(prompt)

    prompts = ["zoo? animal", "3 + 4 = 7", "WO", "zoo maths WORDS", "~~~"]
    tasks = [
        sum(mean(prompt) for prompt in task.prompts) / len(task.prompts)
        for task in tiny_texts.train_stream
    ]
    expected = []
    for prompt in prompts:
        query = mean(prompt)
        cosines = [float(query @ task / (query.norm() * task.norm())) for task in tasks]
        expected.append(cosines.index(max(cosines)))
    assert model.nearest_tasks(prompts) == expected
    assert len(set(expected)) > 1


def test_the_seed_chooses(make, tiny_texts):
    chosen = []
    for seed in (0, 0, 1):
        strategy = make(seed=seed)
        torch.manual_seed(len(chosen))  # which has no part in it
        train(strategy, tiny_texts, 0)
        chosen.append(strategy.model.tasks[0].prompts)
    assert chosen[0] == chosen[1] != chosen[2]


def test_where_there_is_no_room_the_first_demonstrations_go(make, tiny_texts, monkeypatch):
    strategy = make(max_length=80)
    train(strategy, tiny_texts, 0)
    taken = []
    inner = strategy.model.module.generate_batch
    monkeypatch.setattr(
        strategy.model.module,
        "generate_batch",
        lambda rows, n: taken.extend(rows) or inner(rows, n),
    )
    task = strategy.model.tasks[0]
    shown = [f"{p} {a}\n\n" for p, a in zip(task.prompts, task.answers, strict=True)]
    assert len(shown) == 3
    tokenizer = strategy.model.tokenizer
    for n in (3, 2, 1, 0):
        kept = "".join(shown[3 - n :])
        prompt = "z" * (80 - len(kept))  # one token per character
        strategy.model.generate([prompt], 4)
        assert taken.pop() == tokenizer(kept + prompt)["input_ids"]
        longer = "z" * (81 - len(kept))
        strategy.model.generate([longer], 4)
        fewer = "".join(shown[4 - n :]) if n else ""
        assert taken.pop() == tokenizer(fewer + longer)["input_ids"][-80:]


def test_says_how_many_demonstrations_fit(make, tiny_texts, caplog):
    with caplog.at_level("WARNING", logger="treelora_avalanche"):
        train(make(max_length=80), tiny_texts, 0)
    assert "zoo: 3 of 6 demonstrations fit before a prompt of median length into 80" in caplog.text
    caplog.clear()
    strategy = make(max_length=30)
    with caplog.at_level("WARNING", logger="treelora_avalanche"):
        train(strategy, tiny_texts, 0, 1)
    assert "zoo: 0 of 6 demonstrations fit" in caplog.text
    assert "maths: 1 of 6 demonstrations fit" in caplog.text
    assert [len(task.prompts) for task in strategy.model.tasks] == [0, 1]
    caplog.clear()
    with caplog.at_level("WARNING", logger="treelora_avalanche"):
        train(make(), tiny_texts, 0)
    assert not caplog.text


def test_a_stream_without_room_is_refused_with_the_remedy(make, tiny_texts):
    # "zoo 3 animal:" twice, " ape" and an empty line are 32 characters.
    with pytest.raises(ValueError, match=r"prompt, 32 tokens .*leaves 12, .*by at least 20"):
        train(make(max_length=12), tiny_texts, 0)


def test_demonstrations_are_balanced_over_the_answers(make, tiny_texts):
    order, answers = [5, 2, 7, 0, 3, 1, 4, 6], ["A", "A", "A", "B", "A", "A", "C", "A"]
    assert balanced(order, answers) == [5, 3, 6, 2, 7, 0, 1, 4]
    assert balanced(order, list(range(8))) == order
    for seed in range(3):
        strategy = make(seed=seed)
        train(strategy, tiny_texts, 0, 1, 2)
        zoo, maths, words = strategy.model.tasks
        assert sorted(Counter(zoo.answers).values()) == [3, 3]
        assert sorted(Counter(words.answers).values()) == [2, 2, 2]
        assert len(set(maths.answers)) == 6


@pytest.mark.parametrize(
    ("answers", "form", "generated", "extracted"),
    [
        (["A", "C", "B"], "letter", " C. Neutral\n\nText: A", "C"),
        (["A", "C"], "letter", "", ""),
        (["12", "3.5", "7"], "line", "\n12\nQuestion: 3", "12"),
        (["12", "3"], "line", " 12", "12"),
        (["1", "2"], "line", "12\n", "12"),  # numbers are not letters
        (["B\nsince ..."], "paragraph", " B\nas so\n\nQuestion", "B\nas so"),
        ([" 4", " 5"], "text", " 4\nx", " 4\nx"),
        (["one\n\ntwo"], "text", "one\n\nthree", "one\n\nthree"),
    ],
)
def test_answers_are_extracted_by_the_form_of_the_training_answers(
    answers, form, generated, extracted
):
    assert answer_form(answers) == form
    assert Demonstrations([], [], torch.zeros(1), form).answer_in(generated) == extracted


def test_generates_answers_alone(make, tiny_texts, monkeypatch):
    strategy = make()
    train(strategy, tiny_texts, 0, 2)
    monkeypatch.setattr(
        strategy.model.module, "generate", lambda prompts, *_: [" Ape\n\nzoo"] * len(prompts)
    )
    assert strategy.model.generate(["zoo 3 animal:", "WORDS!!"], 4) == ["Ape", "A"]


def test_the_model_stays_as_it_was(make, make_language_model, tiny_texts):
    """No weight moves, nothing is trainable, and logits are the model's own."""
    strategy = make()
    train(strategy, tiny_texts, 0, 1)
    fresh = make_language_model(max_length=256, context=320)
    for (name, one), (_, other) in zip(
        strategy.model.module.named_parameters(), fresh.named_parameters(), strict=True
    ):
        assert torch.equal(one, other), name
        assert not one.requires_grad
    tokens = torch.tensor([[5, 6, 7, 8], [9, 10, -1, -1]])
    strategy.model.eval()
    with torch.no_grad():
        assert torch.equal(strategy.model(tokens), fresh.eval()(tokens))


def test_generated_texts_do_not_depend_on_their_batch(make, tiny_texts):
    strategy = make()
    train(strategy, tiny_texts, 0, 1)
    prompts = ["zoo 3 animal:", "maths 7 + 1 =", "WORDS!!!", "maths"]
    without = strategy.model.module.generate(prompts, 6)
    one, many = (strategy.model.generate(prompts, 6, batch_size=size) for size in (1, 4))
    assert one == many != without


def test_is_scored_by_what_it_generates(make, tiny_texts):
    from avalanche.training.plugins import EvaluationPlugin

    metrics = generation_metrics()
    strategy = make(evaluator=EvaluationPlugin(*metrics, loggers=[]))
    assert find_text_generator(strategy.model) is strategy.model
    train(strategy, tiny_texts, 0)
    strategy.eval(tiny_texts.test_stream[:1])
    task = tiny_texts.test_stream[0]
    predictions = [prediction for _, _, prediction in metrics[0].generated["zoo"]]
    assert predictions == strategy.model.generate(task.prompts, task.max_new_tokens)


def test_continues_in_a_new_strategy(make, tiny_texts, tmp_path):
    whole, resumed = make(), make()
    train(whole, tiny_texts, 0, 1)
    whole.save(tmp_path / "state")
    resumed.load(tmp_path / "state")
    prompts = ["zoo 3 animal:", "maths 7 + 1 ="]
    for task in (None, 2):
        for strategy in (whole, resumed):
            if task is not None:
                train(strategy, tiny_texts, task)
        for one, other in zip(whole.model.tasks, resumed.model.tasks, strict=True):
            assert one[:2] == other[:2]
            assert torch.equal(one.embedding, other.embedding)
        assert whole.model.generate(prompts, 6) == resumed.model.generate(prompts, 6)
    with pytest.raises(ValueError, match="seed=0 to continue"):
        make(seed=1).load(tmp_path / "state")


def test_stores_six_pairs_and_a_vector_per_task(make, tiny_texts):
    strategy = make()
    for n_tasks in (1, 2, 3):
        train(strategy, tiny_texts, n_tasks - 1)
        assert len(strategy.model.tasks) == n_tasks
        last = strategy.model.tasks[-1]
        assert len(last.prompts) == len(last.answers) == 6
        assert last.embedding.shape == (16,)


def test_a_run_of_the_command_line(make_language_model, tmp_path):
    model = make_language_model()
    model.network.save_pretrained(tmp_path / "model")
    model.tokenizer.save_pretrained(tmp_path / "model")
    for name in ("zoo", "maths"):
        records = [{"prompt": f"{name} {n}:", "answer": str(n)} for n in range(8)]
        (tmp_path / "texts").mkdir(exist_ok=True)
        (tmp_path / "texts" / f"{name}.json").write_text(json.dumps(records))
    folder = tmp_path / "run"
    arguments = {
        "--method": "InContext",
        "--scenario": "text_tasks",
        "--data": tmp_path / "texts",
        "--model": tmp_path / "model",
        "--max_length": 48,
        "--device": "cpu",
        "--output": folder,
    }
    assert main(["train", *(str(part) for pair in arguments.items() for part in pair)]) == 0
    (results,) = [json.loads(path.read_text()) for path in folder.rglob("results.json")]
    assert results["method"] == "InContext"
    assert results["parameters"]["trainable"] == 0
    assert results["timings"]["steps"] == 0


def test_a_bad_argument_is_refused(tiny_vit, make_language_model, tiny_benchmark, make):
    with pytest.raises(
        ValueError, match="should be a language model for InContext, but is a VisionTransformer"
    ):
        InContext(tiny_vit())
    model = make_language_model()
    with pytest.raises(ValueError, match="`n_demonstrations` should be at least 1, but is 0"):
        InContext(model, n_demonstrations=0)
    assert all(parameter.requires_grad for parameter in model.parameters())
    with pytest.raises(
        ValueError, match="experience 0 should have texts in `prompts` and `answers`"
    ):
        make().train(tiny_benchmark.train_stream[0])
