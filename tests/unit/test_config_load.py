"""Reading configurations: order, moshi-finetune's files, placeholders, paths, round trip."""

from pathlib import Path

import pytest
import yaml

from launch.config import (
    DEFAULT_CONFIG,
    REPO_ROOT,
    TrainConfig,
    dump_yaml,
    load_config,
    parse_command_line,
    read_config,
    resolve_run_dir,
)
from launch.configuration.keys import KEYS, describe_keys
from launch.errors import UserError

CONFIGS = sorted((REPO_ROOT / "configs").glob("*.yaml"))

# The settings that moshi-finetune's example carries, with '' where it says "fill".
MOSHI_FINETUNE = """
data:
  eval_data: ''
  shuffle: true
  train_data: ''
moshi_paths:
  hf_repo_id: "kyutai/moshiko-pytorch-bf16"
full_finetuning: false
lora:
  enable: true
  rank: 128
  scaling: 2.
  ft_embed: false
first_codebook_weight_multiplier: 100.
text_padding_weight: .5
duration_sec: 100
batch_size: 16
max_steps: 2000
gradient_checkpointing: true
optim:
  lr: 2e-6
  weight_decay: 0.1
  pct_start: 0.05
seed: 0
log_freq: 1
eval_freq: 100
do_eval: false
do_ckpt: true
ckpt_freq: 100
save_adapters: true
param_dtype: bfloat16
run_dir: ''
wandb:
  project: ''
  run_name: ''
  key: ''
  offline: false
"""

# Name, default: moshi-finetune's table, so that a change of a default here is noticed.
MOSHI_FINETUNE_DEFAULTS = {
    "seed": 0,
    "num_microbatches": 1,
    "duration_sec": 10,
    "batch_size": 1,
    "max_norm": 1.0,
    "max_steps": 100,
    "log_freq": 1,
    "ckpt_freq": 0,
    "do_ckpt": True,
    "num_ckpt_keep": 3,
    "save_adapters": True,
    "eval_freq": 0,
    "do_eval": False,
    "gradient_checkpointing": True,
    "full_finetuning": False,
    "overwrite_run_dir": False,
    "first_codebook_weight_multiplier": 1.0,
    "text_padding_weight": 0.5,
    "data.shuffle": False,
    "moshi_paths.hf_repo_id": "kyutai/moshiko-pytorch-bf16",
    "optim.lr": 1e-4,
    "optim.weight_decay": 0.1,
    "optim.pct_start": 0.05,
    "lora.enable": False,
    "lora.rank": 64,
    "lora.scaling": 2.0,
    "lora.ft_embed": False,
    "wandb.offline": False,
}


def write(folder: Path, text: str) -> Path:
    path = folder / "config.yaml"
    path.write_text(text)
    return path


def test_moshi_finetune_file_loads_unchanged(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, MOSHI_FINETUNE))
    assert config.first_codebook_weight_multiplier == 100.0
    assert config.lora.enable
    assert config.lora.rank == 128
    assert config.duration_sec == 100.0
    assert config.batch_size == 16
    assert config.optim.lr == 2e-6  # PyYAML reads this as text
    assert config.param_dtype == "bfloat16"
    assert config.wandb.project is None
    assert config.wandb.key is None


def test_moshi_finetune_defaults() -> None:
    found = {key: KEYS[key]["default"] for key in MOSHI_FINETUNE_DEFAULTS}
    assert found == MOSHI_FINETUNE_DEFAULTS


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_configs_load_and_round_trip(path: Path, tmp_path: Path) -> None:
    config = load_config(path)
    again = load_config(write(tmp_path, dump_yaml(config)))
    assert again == config


def test_shipped_configs_are_these() -> None:
    assert {path.stem for path in CONFIGS} == {"demo", "memory", "moshi_7b_full", "moshi_7b_ttt"}


def test_round_trip_of_every_kind_of_value(tmp_path: Path) -> None:
    overrides = [
        "run_dir=runs/ü x",
        "optim.lr=2e-6",
        "optim.eps=1e-15",
        "ttt.enable=true",
        "ttt.layers=[3, 1]",
        "wandb.run_name=007",
        "ttt.ttt_layer_context=null",
        "data.train_data=a.jsonl:0.3,b",
        "global_batch_size=8",
    ]
    config = load_config(None, overrides)
    assert load_config(write(tmp_path, dump_yaml(config))) == config
    assert config.wandb.run_name == "007"
    assert config.ttt.layers == "3,1"


def test_order_is_defaults_file_command_line(tmp_path: Path) -> None:
    path = write(tmp_path, "run_dir: r\nfull_finetuning: true\nseed: 3\noptim: {lr: 0.5, eps: 1.0}")
    config = load_config(path, ["optim.lr=2e-6", "optim={weight_decay: 0.0}"])
    assert (config.seed, config.max_steps) == (3, 100)
    assert (config.optim.lr, config.optim.eps, config.optim.weight_decay) == (2e-6, 1.0, 0.0)


def test_a_schedule_is_replaced_as_a_whole(tmp_path: Path) -> None:
    lines = "run_dir: r\nfull_finetuning: true\nduration_sec: {0: 3, 10: 5, 20: 8}"
    config = load_config(write(tmp_path, lines), ["duration_sec={0: 4, 30: 6}"])
    assert config.duration_sec == {0: 4.0, 30: 6.0}


@pytest.mark.parametrize(
    ("text", "layers"),
    [("29,30,31", "29,30,31"), ("[29, 30]", "29,30"), ("29", "29"), ("all", "all")],
)
def test_layers_come_as_text_list_or_number(text: str, layers: str) -> None:
    config = load_config(None, ["run_dir=r", "ttt.enable=true", f"ttt.layers={text}"])
    assert config.ttt.layers == layers


def test_relative_paths_start_at_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "release").mkdir()
    config = load_config(
        None,
        [
            "run_dir=r",
            "full_finetuning=true",
            "data.train_data=a.jsonl:2,/b/c.jsonl",
            "data.cache_dir=cache",
            "moshi_paths.hf_repo_id=release",
        ],
    )
    assert config.run_dir == str(tmp_path / "r")
    assert config.data.train_data == f"{tmp_path}/a.jsonl:2,/b/c.jsonl"
    assert config.data.eval_data == ""
    assert config.data.cache_dir == str(tmp_path / "cache")
    assert config.moshi_paths.hf_repo_id == str(tmp_path / "release")


def test_demo_names_the_same_files_from_any_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config = load_config(DEFAULT_CONFIG)
    assert config.data.train_data == str(REPO_ROOT / "configs/demo/train.jsonl")
    assert Path(config.data.train_data).is_file()
    assert Path(config.data.eval_data).is_file()
    assert config.moshi_paths.hf_repo_id == str(REPO_ROOT / ".cache/demo-base")
    resolved = resolve_run_dir(config, "20260102-030405")
    assert resolved.run_dir == str(REPO_ROOT / "runs/demo-20260102-030405")


def test_demo_shapes_prove_what_they_should() -> None:
    """Pieces of at least four mini-batches and not a whole number; windows below a quarter."""
    config = load_config(DEFAULT_CONFIG)
    frames = round(config.duration_sec * 12.5)
    assert frames == config.duration_sec * 12.5
    assert frames >= 4 * config.ttt.mini_batch_size
    assert frames % config.ttt.mini_batch_size != 0
    assert config.ttt.ttt_layer_context is not None
    assert config.ttt.non_ttt_layer_context is not None
    assert max(config.ttt.ttt_layer_context, config.ttt.non_ttt_layer_context) * 4 < frames


def test_config_is_frozen() -> None:
    config = load_config(None, ["run_dir=r", "full_finetuning=true"])
    with pytest.raises(ValueError, match="frozen"):
        config.optim.lr = 1.0  # type: ignore[misc]


def test_empty_section_means_defaults(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, "run_dir: r\nfull_finetuning: true\nttt:\nlora:\n"))
    assert config == load_config(None, ["run_dir=r", "full_finetuning=true"])


def test_secrets_are_not_dumped() -> None:
    reading = read_config(None, ["run_dir=r", "full_finetuning=true", "wandb.key=abcSECRET"])
    assert "abcSECRET" not in dump_yaml(reading.config)
    assert "abcSECRET" not in repr(reading.config)
    assert "abcSECRET" not in "\n".join(reading.problems)


def test_command_line() -> None:
    assert parse_command_line([]) == (DEFAULT_CONFIG, [])
    assert parse_command_line(["a=1", "x.yaml", "b.c=2"]) == (Path("x.yaml"), ["a=1", "b.c=2"])
    for wrong in (["--tp", "2"], ["a.yaml", "b.yaml"]):
        with pytest.raises(UserError, match="command line"):
            parse_command_line(wrong)


def test_every_key_is_described() -> None:
    text = describe_keys()
    fields = yaml.safe_load(dump_yaml(TrainConfig(run_dir="r")))
    for section, value in fields.items():
        names = [f"{section}.{key}" for key in value] if isinstance(value, dict) else [section]
        for name in names:
            assert f"  {name}: " in text
            assert KEYS[name]["description"]
