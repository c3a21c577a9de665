"""Releases of the Moshi family: what config.json may hold, and that what builds is moshi's own."""

import pytest
import torch
from moshi.models.lm import LMModel
from moshi.models.loaders import _lm_kwargs as MOSHI_7B_LM_CONFIG
from moshi.modules.lora import replace_all_linear_with_lora
from torch import nn

from tests.distributed.tiny import LM_CONFIG, save_release_weights, stock_model, ttt_placement
from tests.unit.moshi_cases import by_frame, total_loss
from ttt_dist.moshi.build import build_model, is_ttt_parameter
from ttt_dist.moshi.flops import flops_per_frame
from ttt_dist.moshi.lm_config import lm_config_problems
from ttt_dist.moshi.lora import LoRASettings
from ttt_dist.moshi.loss import token_losses
from ttt_dist.moshi.packed import stock_state_dict
from ttt_dist.moshi.weights import init_ttt_weights, load_base_weights

FRAMES = 13
# What Kyutai's releases have beside Moshi's own settings, and what moshi's classes allow besides.
BUILT = {
    "moshi": {},
    # Hibiki's, but for its condition.
    "32 codebooks, a schedule of weights, low-rank embeddings": {
        "n_q": 32,
        "dep_q": 16,
        "delays": [0, 0, *[2] * 15, 0, *[2] * 15],
        "depformer_weights_per_step_schedule": [*range(8), *[8] * 8],
        "depformer_low_rank_embeddings": 6,
        "depformer_dim_feedforward": None,
        "max_period": 100000.0,
        "context": 1500,
        "conditioners": {},
        "fuser": {"cross_attention_pos_emb": False, "sum": [], "prepend": [], "cross": []},
        "cross_attention": False,
    },
    "8 codebooks": {"n_q": 8, "dep_q": 4, "delays": [0, 0, 1, 1, 1, 0, 1, 1, 1]},
    "shared keys and values": {"kv_repeat": 2},
    "one Depformer for all steps": {
        "depformer_weights_per_step": False,
        "depformer_multi_linear": False,
        "depformer_pos_emb": "sin",
    },
    "sizes by step": {"depformer_dim_feedforward": [99, 99, 48, 48, 96, 96, 33, 66]},
    "other norms and no gating": {
        "gating": "none",
        "depformer_gating": "gelu",
        "norm": "layer_norm",
        "depformer_norm": "layer_norm",
        "norm_emb": True,
        "bias_proj": True,
        "layer_scale": 0.1,
        "positional_embedding": "sin",
    },
    "float32 layer norms": {"norm": "layer_norm_f32", "depformer_norm": "layer_norm_f32"},
}

# key -> a value of a release that this project doesn't train, and what the message says it is.
REFUSED = {
    "conditioners": ({"speaker": {"type": "tensor"}}, "conditioned models"),
    "fuser": ({"sum": ["speaker"]}, "conditioned models"),
    "quantize": (True, "quantised releases"),
    "cross_attention": (True, "models with cross-attention"),
    "demux_second_stream": (True, "models of two text streams"),
    "demux_second_text_stream": (True, "models of two text streams"),
    "extra_heads_num_heads": (4, "models with extra heads"),
}

# Settings that moshi builds a model of, or fails on late and without naming them.
CONTRADICTIONS = {
    "speech to text": ({"dep_q": 0}, "dep_q: found 0; allowed are whole numbers from 1"),
    "all codebooks spoken": ({"dep_q": 16}, "n_q, dep_q: found 16 and 16; allowed are n_q = 2"),
    "few delays": ({"delays": [0, 0, 1]}, "delays: found 3 of them; allowed are 17, one for text"),
    "not causal": ({"causal": False}, "causal: found false; a model that sees later frames"),
    "another vocabulary out": ({"text_card_out": 5}, "text_card_out: found 5; allowed is text_"),
    "short schedule": (
        {"depformer_weights_per_step_schedule": [0, 1]},
        "depformer_weights_per_step_schedule: found [0, 1]; allowed are dep_q = 8 numbers",
    ),
    "schedule with a gap": (
        {"depformer_weights_per_step_schedule": [0, 2, 2, 2, 2, 2, 2, 2]},
        "without a gap",
    ),
    "few sizes": ({"depformer_dim_feedforward": [9]}, "found 1 sizes; allowed are 8, one for each"),
    "odd heads": ({"num_heads": 3}, "dim: found 32, which num_heads = 3 doesn't divide"),
    "Depformer's heads": (
        {"depformer_num_heads": 5},
        "depformer_dim: found 24, which depformer_nu",
    ),
    "keys shared by 3": (
        {"kv_repeat": 3, "depformer_kv_repeat": 1},
        "kv_repeat: found 3, which doesn't divide 4 heads",
    ),
    "a word": (
        {"num_layers": "four"},
        "num_layers: found 'four'; allowed are whole numbers from 1",
    ),
    "a flag": ({"dim": True}, "dim: found True; allowed are whole numbers from 1 on"),
    "null": ({"card": None}, "card: found None; allowed are whole numbers"),
    "text for a window": ({"context": "3000"}, "context: found '3000'; allowed are whole numbers"),
    "no period": ({"max_period": 0}, "max_period: found 0; allowed are numbers above 0"),
    "negative delay": ({"delays": [-1] * 17}, "delays: found [-1, -1,"),
    "norm": (
        {"norm": "batch_norm"},
        "norm: found 'batch_norm'; allowed are layer_norm, layer_norm_",
    ),
    "gating": ({"gating": "swiglu"}, "gating: found 'swiglu'; allowed are none, silu, gelu"),
    "positions": (
        {"positional_embedding": "alibi"},
        "positional_embedding: found 'alibi'; allowed",
    ),
}


LUT = {"type": "lut", "lut": {"n_bins": 31, "dim": 16, "tokenizer": "noop"}}
# Kyutai's other releases, by what sets them apart: settings, and the keys that are refused.
RELEASES = {
    "Moshi": ({}, []),
    "Hibiki 2B": (
        {
            **BUILT["32 codebooks, a schedule of weights, low-rank embeddings"],
            **{"dim": 2560, "num_heads": 20, "num_layers": 24, "text_card": 48000},
            "conditioners": {"description": LUT},
            "fuser": {"cross_attention_pos_emb": False, "sum": ["description"], "cross": []},
        },
        ["conditioners, fuser"],
    ),
    "speech to text 1B": (
        {
            **{"dim": 2048, "num_heads": 16, "num_layers": 16, "n_q": 32, "dep_q": 0},
            **{"delays": [0] * 33, "conditioners": {}, "extra_heads_num_heads": 4},
        },
        ["extra_heads_num_heads", "dep_q"],
    ),
    "text to speech 1.6B": (
        {
            **{"n_q": 32, "dep_q": 32, "delays": [0] * 33, "demux_second_stream": True},
            "depformer_weights_per_step_schedule": [*range(8), *[8] * 8, *[9] * 8, *[10] * 8],
            "depformer_low_rank_embeddings": 128,
            "cross_attention": True,
            "conditioners": {"cfg": LUT},
            "fuser": {"sum": ["cfg"], "cross": ["speaker_wavs"]},
        },
        ["conditioners, fuser", "cross_attention", "demux_second_stream", "n_q, dep_q"],
    ),
    "Moshi, 8 bits": ({"quantize": True}, ["quantize"]),
}


def codes_for(config: dict) -> torch.Tensor:
    """int64 `[2, 1 + n_q, FRAMES]`, the last sample with padded frames at its end."""
    generator = torch.Generator().manual_seed(0)
    shape = (2, 1 + config["n_q"], FRAMES)
    codes = torch.randint(0, config["card"], shape, generator=generator)
    codes[-1, :, -3:] = -1
    return codes


def one_step(model: LMModel, codes: torch.Tensor) -> None:
    loss = total_loss(model(codes), codes, model)
    loss.backward()
    torch.optim.AdamW(model.parameters(), lr=1e-3, eps=1e-3).step()


@pytest.mark.parametrize("name", BUILT)
def test_what_builds_is_moshis_own_model(tmp_path, name):
    """Loaded from a file as released: logits, losses, gradients and a step, bit for bit."""
    config = LM_CONFIG | BUILT[name]
    assert lm_config_problems(config) == []
    stock = stock_model(lm_config={k: v for k, v in config.items() if k not in REFUSED})
    save_release_weights(tmp_path / "model.safetensors", stock=stock)
    placement = ttt_placement(alpha=0.0, lm_config=config)
    model = build_model(config, placement, device="cpu")
    load_base_weights(model, tmp_path / "model.safetensors")
    init_ttt_weights(model, seed=0)
    codes = codes_for(config)
    with torch.no_grad():
        found, expected = model(codes), stock(codes)
        own = model.step_losses(model.steps(codes))
        for first, (a, b) in enumerate(zip(own, token_losses(expected, codes), strict=True)):
            assert torch.equal(by_frame(a, model, first), b)
    assert found.logits.shape == (2, config["dep_q"], FRAMES, config["card"])
    for a, b in ((found.logits, expected.logits), (found.text_logits, expected.text_logits)):
        assert torch.equal(a.nan_to_num(), b.nan_to_num())
    for trained in (model, stock):
        one_step(trained, codes)
    after = {n: v for n, v in stock_state_dict(model).items() if not is_ttt_parameter(n)}
    assert after.keys() == stock.state_dict().keys()
    for key, value in stock.named_parameters():
        gradient = model.get_parameter(key).grad
        assert gradient is not None, key
        assert torch.equal(gradient.view(value.shape), value.grad), key
        assert torch.equal(after[key], value), key


@pytest.mark.parametrize("norm", ["layer_norm", "layer_norm_f32", "rms_norm", "rms_norm_f32"])
def test_every_norm_runs_in_bfloat16(norm):
    """As FSDP2 has the model compute: gathered weights and activations alike."""
    config = LM_CONFIG | {"norm": norm, "depformer_norm": "layer_norm_f32"}
    assert lm_config_problems(config) == []
    stock = stock_model(lm_config=config)
    model = build_model(config, None, device="cpu", dtype=torch.bfloat16)
    with torch.no_grad():
        for name, value in stock.named_parameters():
            own = model.get_parameter(name)
            own.copy_(value.view(own.shape))
    text, audio = model.step_losses(model.steps(codes_for(config)))
    (text.sum() + audio.sum()).backward()
    for name, value in model.named_parameters():
        assert value.grad is not None, name
        assert value.grad.isfinite().all(), name
    # Of the same bfloat16 weights and inputs, what moshi's float32 norm gives, rounded.
    x = torch.randn(2, 5, config["depformer_dim"]).bfloat16()
    own, expected = model.depformer_norms[0], stock.depformer_norms[0].bfloat16().float()
    assert torch.equal(own(x), expected(x.float()).bfloat16())


@pytest.mark.parametrize("name", BUILT)
def test_adapters_of_what_builds_are_moshis(name):
    config = LM_CONFIG | BUILT[name]
    model = build_model(config, None, LoRASettings(3, 2.0))
    stock = LMModel(device="meta", **{k: v for k, v in config.items() if k not in REFUSED})
    replace_all_linear_with_lora(stock, 3, 2.0)
    found = {name: value.shape for name, value in stock_state_dict(model).items()}
    assert found == {name: value.shape for name, value in stock.state_dict().items()}


@pytest.mark.parametrize("name", BUILT)
def test_flops_are_those_of_every_matrix_of_what_builds(name):
    """Trained as a whole: three times the forward, in which attention sees half of all frames."""
    config = LM_CONFIG | BUILT[name]
    stock = LMModel(device="meta", **{k: v for k, v in config.items() if k not in REFUSED})
    replace_all_linear_with_lora(stock, 3, 2.0)
    weights = sum(m.weight.numel() for m in stock.modules() if isinstance(m, nn.Linear))
    forward = 2 * weights + config["num_layers"] * 4 * config["dim"] * (FRAMES + 1) / 2
    model = build_model(config, None, LoRASettings(3, 2.0))
    assert flops_per_frame(model, FRAMES) == 3 * forward


@pytest.mark.parametrize("key", REFUSED)
def test_releases_that_cannot_be_trained_are_refused_by_name(key):
    value, what = REFUSED[key]
    problems = lm_config_problems(LM_CONFIG | {key: value})
    assert len(problems) == 1
    assert problems[0].startswith(f"config.json: {key}: {what} are not supported yet: ")
    with pytest.raises(ValueError, match=f"config.json: {key}: "):
        build_model(LM_CONFIG | {key: value}, None)
    empty: object = type(value)()  # False or {}: what releases without the feature hold
    assert lm_config_problems(LM_CONFIG | {key: empty}) == []
    build_model(LM_CONFIG | {key: empty}, None)


@pytest.mark.parametrize("name", RELEASES)
def test_kyutais_releases_build_or_are_refused_by_name(name):
    changes, keys = RELEASES[name]
    config = MOSHI_7B_LM_CONFIG | changes
    assert [line.split(": ")[1] for line in lm_config_problems(config)] == keys
    if not keys:
        build_model(config, None)


def test_a_condition_and_what_fuses_it_are_one_problem():
    both = {key: REFUSED[key][0] for key in ("conditioners", "fuser")}
    (problem,) = lm_config_problems(LM_CONFIG | both)
    assert problem.startswith("config.json: conditioners, fuser: conditioned models are not")


@pytest.mark.parametrize("name", CONTRADICTIONS)
def test_settings_that_cannot_be_meant_are_refused_by_name(name):
    changes, message = CONTRADICTIONS[name]
    (problem,) = lm_config_problems(LM_CONFIG | changes)
    assert problem.startswith("config.json: ")
    assert message in problem


# Not settings: what moshi's model computes itself, or the program gives.
@pytest.mark.parametrize("prefix", ["", "depformer_"])
@pytest.mark.parametrize(
    "name", ["d_model", "rope", "device", "dtype", "layer_class", "checkpointing", "num_layer"]
)
def test_unknown_keys_are_refused_by_name(prefix, name):
    key = prefix + name
    with pytest.raises(ValueError, match=f"config.json: {key}: not a setting"):
        build_model(LM_CONFIG | {key: 1}, None)


def test_all_problems_of_a_configuration_at_once():
    wrong = {"demux_second_stream": True, "num_layer": 3, "dimm": 4, "quantize": True, "dim": 0}
    with pytest.raises(ValueError, match=r"config\.json") as caught:
        build_model(LM_CONFIG | wrong, None)
    assert all(f"config.json: {key}: " in str(caught.value) for key in wrong)


def test_settings_of_released_models_are_known():
    assert lm_config_problems(MOSHI_7B_LM_CONFIG) == []
    ignored = {"depformer_causal": True, "lora_rank": 128, "gradient_checkpointing": True}
    assert lm_config_problems(LM_CONFIG | ignored) == []
    model = build_model(LM_CONFIG | ignored, None)
    assert not model.transformer.checkpointing  # ours recomputes; moshi's would do it twice


def test_nothing_of_a_model_on_meta_is_allocated():
    """moshi leaves its heads to the default device: half a gigabyte for Moshi 7B."""
    made: list[torch.device] = []
    original = nn.Linear.__init__

    def watched(self: nn.Linear, *args: object, **kwargs: object) -> None:
        original(self, *args, **kwargs)
        made.append(self.weight.device)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nn.Linear, "__init__", watched)
        build_model(LM_CONFIG, None)
    assert {device.type for device in made} == {"meta"}
