"""LoRA adapters: attaching, factors as one matrix, the bank, and peft folders."""

import copy
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import nn

from treelora_avalanche.adapters import (
    AdapterBank,
    LayerShape,
    LoRAFactors,
    SignatureSketch,
    TrainableView,
    add_lora,
    find_adaptable_layers,
    load_adapter,
    lora_layers,
    merge_factors,
    save_adapter,
)


def images(n=4):
    return torch.randn(n, 1, 8, 8, generator=torch.Generator().manual_seed(1))


def adapted(tiny_vit, **options):
    torch.manual_seed(3)
    return TrainableView(add_lora(tiny_vit(), rank=2, alpha=4, **options))


def train_a_little(model, steps=3):
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    targets = torch.arange(4)
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images()), targets).backward()
        optimizer.step()


# ----------------------------------------------------------------------------------- which layers


@pytest.mark.parametrize(
    ("layers", "blocks"),
    [
        ("first:2", [0, 1]),
        ("last:2", [1, 2]),
        ("last:3", [0, 1, 2]),
        ("all", [0, 1, 2]),
        (None, [0, 1, 2]),  # the default, first:5, of a model with three blocks
        ([1], [1]),
    ],
)
def test_layers_are_chosen_by_block(tiny_vit, layers, blocks):
    names = find_adaptable_layers(tiny_vit(), layers)
    assert names == [f"blocks.{block}.attn.qkv" for block in blocks]


def test_several_kinds_come_in_the_order_of_the_model(tiny_vit):
    names = find_adaptable_layers(tiny_vit(), "last:1", ["fc2", "proj", "qkv", "fc1"])
    assert names == [f"blocks.2.{n}" for n in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"layers": "lsat:5"}, "Did you mean 'last:5'"),
        ({"layers": "last:0"}, "k at least 1"),
        ({"layers": "last:4"}, "at most the model's 3 blocks, but is 'last:4'. Lower"),
        ({"layers": "first:40"}, "at most the model's 3 blocks, but is 'first:40'. Lower"),
        ({"layers": [0, 7]}, "model's 3 blocks, blocks 0 to 2, but is [0, 7]"),
        ({"layers": range(4)}, "model's 3 blocks, blocks 0 to 2, but is [0, 1, 2, 3]"),
        ({"layers": []}, "at least one of the model's 3 blocks"),
        ({"target_modules": ["qvk"]}, "Did you mean 'qkv'"),
        ({"rank": 0}, "`rank` should be at least 1, but is 0"),
        ({"alpha": 0}, "`alpha` should be positive, but is 0"),
        ({"dropout": 1}, "`dropout` should be at least 0 and below 1, but is 1"),
    ],
)
def test_bad_arguments_leave_the_model_unchanged(tiny_vit, arguments, message):
    model = tiny_vit()
    with pytest.raises(ValueError, match=re.escape(message)):
        add_lora(model, **arguments)
    assert not any(isinstance(module, LoraLayer) for module in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_dropout_sets_inputs_of_lora_to_zero_in_training_alone(tiny_vit):
    model = add_lora(tiny_vit(), layers="last:1", dropout=0.25)
    (layer,) = lora_layers(model).values()
    whole, dropped = [], []
    layer.register_forward_pre_hook(lambda _, inputs: whole.append(inputs[0]))
    layer.lora_A["default"].register_forward_pre_hook(lambda _, inputs: dropped.append(inputs[0]))
    model.train()(images())
    kept = dropped[-1] != 0
    assert 0.7 < kept.float().mean() < 0.8
    torch.testing.assert_close(dropped[-1][kept], whole[-1][kept] / 0.75)
    model.eval()(images())
    assert torch.equal(dropped[-1], whole[-1])


def test_a_model_without_linear_layers_is_refused():
    with pytest.raises(ValueError, match="should have linear layers"):
        add_lora(nn.Sequential(nn.Conv2d(3, 3, 3), nn.ReLU()))


def test_without_the_adapter_the_model_is_the_base_model(tiny_vit):
    before = tiny_vit().eval()(images())
    model = adapted(tiny_vit).eval()
    train_a_little(model)
    with model.module.disable_adapter():
        assert torch.equal(model(images()), before)
    assert not torch.equal(model(images()), before)


# ------------------------------------------------------------------------------ the trainable view


def test_view_yields_adapter_and_head_alone(tiny_vit):
    names = {name for name, _ in adapted(tiny_vit).named_parameters()}
    assert names
    assert all("lora_" in name or "head" in name for name in names)
    assert sum("lora_" in name for name in names) == 2 * 3


def test_copy_of_a_view_shares_only_what_is_frozen(tiny_vit):
    model = adapted(tiny_vit)
    twin = copy.deepcopy(model)
    assert torch.equal(twin(images()), model(images()))
    shared = {id(p) for p in model.module.parameters()} & {id(p) for p in twin.module.parameters()}
    assert shared == {id(p) for p in model.module.parameters() if not p.requires_grad}
    before = model(images())
    train_a_little(twin)
    assert torch.equal(model(images()), before)


# ------------------------------------------------------------------------- the factors as a matrix


def test_stack_holds_the_parameters_themselves(tiny_vit):
    model = adapted(tiny_vit, target_modules=["qkv", "fc1"], layers="last:2")
    expected = model(images())
    factors = LoRAFactors(model)
    assert factors.stack.shape == (4, 2 * (16 + 64))
    assert torch.equal(model(images()), expected)
    for row, shape, (a, b) in zip(factors.stack, factors.shapes, factors.parameters, strict=True):
        assert torch.equal(row[: shape.size], torch.cat((a.flatten(), b.flatten())))
        assert not row[shape.size :].any()
    train_a_little(model)
    a, b = factors.parameters[1]
    assert torch.equal(factors.shapes[1].split(factors.stack[1])[1], b)
    factors.stack.zero_()
    assert not a.any()


def test_two_stacks_on_one_model_are_one(tiny_vit):
    model = adapted(tiny_vit)
    assert LoRAFactors(model).stack.data_ptr() == LoRAFactors(model).stack.data_ptr()


def test_stack_follows_a_model_whose_tensors_were_replaced(tiny_vit):
    model = adapted(tiny_vit)
    first = LoRAFactors(model)
    model.double().float()
    second = LoRAFactors(model)
    assert second.stack.data_ptr() != first.stack.data_ptr()
    second.stack.fill_(0.5)
    assert all((p == 0.5).all() for pair in second.parameters for p in pair)


def test_model_without_lora_has_no_factors(tiny_vit):
    with pytest.raises(ValueError, match="should carry LoRA layers"):
        LoRAFactors(tiny_vit())


# ------------------------------------------------------------------------------------- signatures


def test_sketch_estimates_the_distance_over_all_coordinates():
    shape = LayerShape(rank=4, n_in=500, n_out=500)
    generator = torch.Generator().manual_seed(0)
    start, first, second = torch.randn(3, 2, shape.size, generator=generator)

    def exact(factors):
        moved = factors - start
        return moved / moved.abs().sum(1, keepdim=True)

    def sketched(factors, seed):
        sketch = SignatureSketch([shape, shape], 256, seed)
        return sketch.direction(factors, sketch(start))

    truth = (exact(first) - exact(second)).abs().sum(1)
    estimates = torch.stack(
        [(sketched(first, s) - sketched(second, s)).abs().sum(1) for s in range(50)]
    )
    torch.testing.assert_close(estimates.mean(0), truth, rtol=0.02, atol=0)


def test_sketch_of_a_small_layer_is_the_layer_and_a_still_adapter_has_no_direction():
    sketch = SignatureSketch([LayerShape(1, 3, 4)], 256)
    factors = torch.arange(7.0)[None]
    assert torch.equal(sketch(factors), factors)
    assert torch.equal(sketch.direction(factors, factors), torch.zeros(1, 7))
    direction = sketch.direction(factors, torch.zeros(1, 7))
    torch.testing.assert_close(direction, factors / 21)


def test_sketch_never_samples_the_padding():
    shapes = [LayerShape(1, 2, 3), LayerShape(1, 10, 10)]
    coordinates = SignatureSketch(shapes, 256, seed=5).coordinates
    assert coordinates.shape == (2, 5)
    assert coordinates[0].tolist() == [0, 1, 2, 3, 4]


# -------------------------------------------------------------------------------------- the bank


def test_bank_returns_what_was_stored_and_what_was_picked(tiny_vit):
    model = adapted(tiny_vit)
    factors = LoRAFactors(model)
    bank = AdapterBank()
    stored = []
    for value in range(20):
        factors.stack.normal_(generator=torch.Generator().manual_seed(value))
        stored.append(factors.stack.clone())
        bank.append(factors)
    assert len(bank) == 20
    assert all(torch.equal(bank[i], stored[i]) for i in range(20))
    assert bank.nbytes == 20 * 3 * factors.dim * 4
    for picks in ([0, 19, 7], [3, 3, 3]):
        bank.request(torch.tensor(picks))
        expected = torch.stack([stored[pick][layer] for layer, pick in enumerate(picks)])
        assert torch.equal(bank.receive(), expected)


def test_bank_refuses_adapters_of_another_shape_and_receiving_without_a_request(tiny_vit):
    bank = AdapterBank()
    with pytest.raises(IndexError, match="should hold an adapter, but is empty"):
        bank[0]
    with pytest.raises(RuntimeError, match="nothing was requested"):
        bank.receive()
    bank.append(LoRAFactors(adapted(tiny_vit)))
    with pytest.raises(ValueError, match=r"`factors` should be of shapes .*, but are"):
        bank.append(LoRAFactors(adapted(tiny_vit, layers="last:1")))


@given(
    rank=st.integers(1, 4),
    n_in=st.integers(4, 9),
    n_out=st.integers(4, 9),
    weight=st.floats(0, 1),
    seed=st.integers(0, 1000),
)
@settings(max_examples=40, deadline=None)
def test_merge_is_the_best_adapter_of_the_rank(rank, n_in, n_out, weight, seed):
    shape = LayerShape(rank, n_in, n_out)
    kept, absorbed = torch.randn(
        2, shape.size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)
    )

    def product(row):
        a, b = shape.split(row)
        return b @ a

    mean = weight * product(kept) + (1 - weight) * product(absorbed)
    u, s, vh = torch.linalg.svd(mean, full_matrices=False)
    best = u[:, :rank] * s[:rank] @ vh[:rank]
    merged = merge_factors(kept, absorbed, weight, shape)
    torch.testing.assert_close(product(merged), best, rtol=1e-6, atol=1e-8)


def test_merging_an_adapter_with_itself_stays_near_its_own_factors():
    # A balanced adapter (A A^T = B^T B) is already in the form that the merge returns.
    shape = LayerShape(2, 6, 6)
    a = torch.linalg.qr(torch.randn(6, 2, generator=torch.Generator().manual_seed(0)))[0].T
    b = torch.linalg.qr(torch.randn(6, 2, generator=torch.Generator().manual_seed(1)))[0]
    row = torch.cat((a.flatten(), b.flatten()))
    torch.testing.assert_close(merge_factors(row, row, 0.3, shape), row, rtol=1e-4, atol=1e-5)


def test_bank_merge_replaces_two_by_one(tiny_vit):
    factors = LoRAFactors(adapted(tiny_vit))
    bank = AdapterBank()
    for value in range(4):
        factors.stack.normal_(generator=torch.Generator().manual_seed(value))
        bank.append(factors)
    before = bank.factors.clone()
    bank.merge(1, 2, 0.25)
    assert len(bank) == 3
    assert torch.equal(bank[0], before[0])
    assert torch.equal(bank[2], before[3])
    expected = merge_factors(before[1, 0], before[2, 0], 0.25, factors.shapes[0])
    assert torch.equal(bank[1][0], expected)


# ------------------------------------------------------------------------------------ peft folders


def test_adapter_saved_here_is_loaded_by_plain_peft(tiny_vit, tmp_path):
    model = adapted(tiny_vit).eval()
    LoRAFactors(model)
    train_a_little(model)
    save_adapter(model, tmp_path / "adapter")
    expected = model(images())
    loaded = PeftModel.from_pretrained(tiny_vit(), str(tmp_path / "adapter")).eval()
    assert torch.equal(loaded(images()), expected)
    again = load_adapter(tiny_vit(), tmp_path / "adapter").eval()
    assert torch.equal(again(images()), expected)
    assert any(parameter.requires_grad for parameter in again.parameters())


def test_saving_again_replaces_the_folder_and_leaves_no_temporary_files(tiny_vit, tmp_path):
    model = adapted(tiny_vit).eval()
    save_adapter(model, tmp_path / "adapter")
    train_a_little(model)
    save_adapter(model, tmp_path / "adapter")
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]
    loaded = load_adapter(tiny_vit(), tmp_path / "adapter").eval()
    assert torch.equal(loaded(images()), model(images()))


def test_saving_or_loading_no_adapter_is_an_error(tiny_vit, tmp_path):
    with pytest.raises(ValueError, match="should be or wrap a peft model"):
        save_adapter(tiny_vit(), tmp_path / "adapter")
    with pytest.raises(FileNotFoundError, match=r"has no adapter_config\.json"):
        load_adapter(tiny_vit(), tmp_path)
