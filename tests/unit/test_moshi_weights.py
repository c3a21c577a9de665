"""Filling the model: a packed release file, strictly; TTT's initial values, whatever the layout."""

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.distributed.tiny import (
    LM_CONFIG,
    TTT_LAYERS,
    save_release_weights,
    stock_model,
    ttt_placement,
)
from tests.unit.moshi_cases import split_release
from ttt_dist.config import TTTConfig
from ttt_dist.moshi.block import TTTMoshi
from ttt_dist.moshi.build import TTTPlacement, build_model, is_ttt_parameter
from ttt_dist.moshi.errors import ReleaseError, collapse_numbers
from ttt_dist.moshi.packed import stock_state_dict
from ttt_dist.moshi.weights import init_ttt_weights, load_base_weights

PACKED = "depformer.layers.0.self_attn.in_proj_weight"


@pytest.fixture
def release_file(tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    save_release_weights(path)
    return path


def blank_model(ttt: TTTPlacement | None = None, dtype: torch.dtype = torch.float32) -> TTTMoshi:
    """All parameters 5, so that any copy shows."""
    model = build_model(LM_CONFIG, ttt, device="cpu", dtype=dtype)
    with torch.no_grad():
        for value in model.parameters():
            value.fill_(5.0)
    return model


def is_blank(model: TTTMoshi) -> bool:
    return all(torch.all(value == 5) for value in model.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_release_fills_everything_but_ttt(release_file, dtype):
    model, stock = blank_model(ttt_placement(), dtype), stock_model()
    load_base_weights(model, release_file)
    for name, value in stock_state_dict(model).items():
        if is_ttt_parameter(name):
            assert torch.all(value == 5), name
        else:
            assert value.dtype == dtype
            assert torch.equal(value, stock.get_parameter(name).to(dtype)), name


def test_an_unpacked_file_loads_too(tmp_path):
    """Moshi's own `state_dict()` names, one tensor a Depformer step."""
    stock = stock_model()
    path = tmp_path / "model.safetensors"
    save_file(dict(stock.state_dict()), path)
    model = blank_model()
    load_base_weights(model, path)
    loaded = stock_state_dict(model)
    assert all(torch.equal(v, stock.get_parameter(n)) for n, v in loaded.items())


def test_all_mismatches_in_one_message_and_nothing_copied(release_file):
    tensors = load_file(release_file)
    del tensors["text_linear.weight"], tensors["linears.3.weight"]
    tensors["lora.extra"] = torch.zeros(2)
    tensors["out_norm.alpha"] = tensors["out_norm.alpha"].flatten()
    tensors["emb.0.weight"] = tensors["emb.0.weight"].T.contiguous()
    save_file(tensors, release_file)
    model = blank_model(ttt_placement())
    with pytest.raises(ReleaseError) as caught:
        load_base_weights(model, release_file)
    message = str(caught.value)
    assert str(release_file) in message
    assert "2 missing: linears.3.weight, text_linear.weight" in message
    assert "1 unexpected: lora.extra" in message
    assert "2 of another shape" in message
    assert "out_norm.alpha: found [32] in out_norm.alpha, allowed [1, 1, 32]" in message
    assert "emb.0.weight: found [32, 25]" in message
    assert "\n" not in message
    assert is_blank(model)


def test_long_lists_are_told_whole_layer_by_layer(release_file):
    tensors = load_file(release_file)
    removed = [name for name in tensors if re.match(r"transformer\.layers\.[013]\.", name)]
    save_file({k: v for k, v in tensors.items() if k not in removed}, release_file)
    with pytest.raises(ReleaseError) as caught:
        load_base_weights(blank_model(), release_file)
    message = str(caught.value)
    assert f"{len(removed)} missing: " in message
    parts = {name.split(".", 3)[3] for name in removed}
    for part in parts:
        part = re.sub(r"(in|out)_proj[._]weight", r"\1_projs.0.weight", part)
        assert f"transformer.layers.{{0-1,3}}.{part}" in message


def test_names_stand_together_where_only_the_first_number_differs():
    names = ["a.0.b.1", "a.1.b.1", "a.2.b.1", "a.1.b.2", "c", "d.7"]
    assert collapse_numbers(names) == ["a.1.b.2", "a.{0-2}.b.1", "c", "d.7"]


def test_quantised_weights_are_refused(release_file):
    tensors = load_file(release_file)
    tensors["text_linear.weight"] = tensors["text_linear.weight"].to(torch.int8)
    save_file(tensors, release_file)
    model = blank_model()
    with pytest.raises(ReleaseError, match=r"1 of another dtype: text_linear\.weight: found I8"):
        load_base_weights(model, release_file)
    assert is_blank(model)


def test_an_index_of_several_files_loads_as_one(release_file):
    expected = blank_model()
    load_base_weights(expected, release_file)
    index = split_release(release_file)
    found = blank_model()
    load_base_weights(found, index)
    pairs = zip(expected.parameters(), found.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("steps", [7, 9, 16])
def test_packed_steps_must_be_the_models(release_file, steps):
    """A Depformer of another number of steps: too many would lose weights without a word."""
    tensors = load_file(release_file)
    rows = tensors[PACKED].shape[0] // LM_CONFIG["dep_q"]
    tensors[PACKED] = tensors[PACKED].repeat(2, 1)[: steps * rows].contiguous()
    save_file(tensors, release_file)
    model = blank_model()
    with pytest.raises(ReleaseError, match=r"of another shape: .*in_projs\.") as caught:
        load_base_weights(model, release_file)
    assert f"found [{steps * rows}, 24] in {PACKED}" in str(caught.value)
    assert is_blank(model)


def test_two_packed_names_of_one_weight_are_refused(release_file):
    """Both are names that moshi reads; which one would count is anyone's guess."""
    tensors = load_file(release_file)
    tensors[PACKED.replace("in_proj_weight", "in_proj.weight")] = torch.zeros_like(tensors[PACKED])
    save_file(tensors, release_file)
    with pytest.raises(ReleaseError, match=r"1 unexpected: .*in_proj"):
        load_base_weights(blank_model(), release_file)


@pytest.mark.parametrize("damage", ["truncated", "no header", "empty"])
def test_a_damaged_file_is_named(release_file, damage):
    content = release_file.read_bytes()
    release_file.write_bytes(
        {"truncated": content[:-100], "no header": b"\xff" * 4096, "empty": b""}[damage]
    )
    model = blank_model()
    with pytest.raises(ReleaseError, match="cannot be read as safetensors") as caught:
        load_base_weights(model, release_file)
    assert str(release_file) in str(caught.value)
    assert is_blank(model)


def ttt_values(model: TTTMoshi) -> dict[str, torch.Tensor]:
    return {n: v.detach() for n, v in model.named_parameters() if is_ttt_parameter(n)}


def initialised(layers: tuple[int, ...], seed: int, dtype: torch.dtype = torch.float32) -> TTTMoshi:
    placement = ttt_placement()
    model = blank_model(TTTPlacement(placement.layer, layers, placement.initial_alpha), dtype)
    count = init_ttt_weights(model, seed)
    assert count == sum(value.numel() for value in ttt_values(model).values())
    return model


def test_initial_values_depend_on_seed_and_name_alone():
    """Other layers, the state of torch's generator and the order of filling change nothing."""
    torch.manual_seed(1)
    both = initialised(TTT_LAYERS, seed=4)
    torch.manual_seed(2)
    alone = ttt_values(initialised(TTT_LAYERS[1:], seed=4))
    others = ttt_values(initialised((0, 2, 3), seed=4))
    for name, value in alone.items():
        assert torch.equal(ttt_values(both)[name], value), name
        assert torch.equal(others[name], value), name
    assert all(torch.all(v == 5) for n, v in both.named_parameters() if not is_ttt_parameter(n))


def test_initial_values_are_random_per_parameter_layer_and_seed():
    first, second = ttt_values(initialised((1, 2), seed=4)), ttt_values(initialised((1,), seed=5))
    drawn = [name for name, value in first.items() if len(value.unique()) > 1]
    assert len(drawn) == 2 * 7  # wq wk wv wo, the gate's weight, W1, W2
    for i, name in enumerate(drawn):
        for other in drawn[i + 1 :]:
            same_shape = first[name].shape == first[other].shape
            assert not (same_shape and torch.equal(first[name], first[other])), (name, other)
        if name in second:
            assert not torch.equal(first[name], second[name]), name


def test_initial_values_in_another_dtype_are_the_rounded_ones():
    exact, rounded = initialised((1,), seed=4), initialised((1,), seed=4, dtype=torch.bfloat16)
    for name, value in ttt_values(rounded).items():
        assert torch.equal(value, ttt_values(exact)[name].bfloat16()), name


@pytest.mark.parametrize("inner_model", ["mlp", "linear"])
def test_initial_values_are_those_of_the_specification(inner_model):
    layer = TTTConfig(model_dim=256, num_heads=4, inner_model=inner_model)
    config = LM_CONFIG | {"dim": 256}
    model = build_model(config, TTTPlacement(layer, (3,), 0.05), device="cpu")
    with torch.no_grad():
        for value in model.parameters():
            value.fill_(5.0)
    init_ttt_weights(model, 0)
    prefix = "transformer.layers.3.ttt."
    found = {n.removeprefix(prefix): v for n, v in ttt_values(model).items()}
    normal = {"layer.W1", *(f"layer.{n}.weight" for n in ("wq", "wk", "wv", "wo"))}
    normal.add("layer.learnable_ttt_lr_weight")
    zero = {"layer.learnable_ttt_lr_bias", "layer.ttt_norm_bias", "layer.b1"}
    zero |= {f"layer.{n}.bias" for n in ("wq", "wk", "wv", "wo", "post_norm")}
    if inner_model == "mlp":
        normal.add("layer.W2")
        zero.add("layer.b2")
    one = {"layer.ttt_norm_weight", "layer.post_norm.weight"}
    assert set(found) == normal | zero | one | {"alpha"}
    for name in normal:
        value, n = found[name].double(), found[name].numel()
        # Six standard errors of mean and standard deviation of n normal numbers.
        assert abs(value.mean()) < 6 * 0.02 / n**0.5, name
        assert abs(value.std() - 0.02) < 6 * 0.02 / (2 * n) ** 0.5, name
        # Normal, neither uniform (0 %) nor cut at two sigma (0 %): 4.6 % lie beyond 2 sigma.
        assert 0.02 < (value.abs() > 0.04).double().mean() < 0.08, name
    assert all(torch.all(found[name] == 0) for name in zero)
    assert all(torch.all(found[name] == 1) for name in one)
    assert torch.all(found["alpha"] == 0.05)
    assert found["layer.W1"].shape == ((4, 64, 256) if inner_model == "mlp" else (4, 64, 64))


def save_with_ttt(path: Path) -> TTTMoshi:
    """A release file whose TTT tensors are all its own; returns the model."""
    trained = build_model(LM_CONFIG, ttt_placement(), device="cpu")
    load_base_weights(trained, path)
    init_ttt_weights(trained, 7)
    save_file({n: t.clone() for n, t in stock_state_dict(trained).items()}, path)
    return trained


def test_ttt_tensors_of_a_release_are_loaded_and_not_initialised(release_file):
    trained = save_with_ttt(release_file)
    model = blank_model(ttt_placement())
    loaded = load_base_weights(model, release_file)
    assert loaded == {name for name, _ in model.named_parameters() if is_ttt_parameter(name)}
    assert init_ttt_weights(model, 0, loaded) == 0
    for name, value in model.named_parameters():
        assert torch.equal(value, trained.get_parameter(name)), name


def test_ttt_tensors_come_all_together_or_not_at_all(release_file):
    assert load_base_weights(blank_model(ttt_placement()), release_file) == set()
    save_with_ttt(release_file)
    tensors = load_file(release_file)
    del tensors["transformer.layers.1.ttt.alpha"]
    save_file(tensors, release_file)
    model = blank_model(ttt_placement())
    with pytest.raises(ReleaseError, match=r"1 missing: transformer\.layers\.1\.ttt\.alpha"):
        load_base_weights(model, release_file)
    assert is_blank(model)


def test_ttt_tensors_that_the_model_has_no_place_for_are_refused_by_name(release_file):
    save_with_ttt(release_file)
    model = blank_model()
    with pytest.raises(ReleaseError, match=r"38 unexpected: transformer\.layers\.\{1-2\}\.ttt\.al"):
        load_base_weights(model, release_file)
    assert is_blank(model)
