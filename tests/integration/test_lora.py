"""LoRA through the real commands: trained over tensor parallelism, resumed, exported."""

import re

import pytest
import torch
from moshi.models.loaders import CheckpointInfo

from launch.export import main
from tests.integration.runs import TIMEOUT, TRAIN, Run, check_trained, initial_model
from tests.ranks import run_ranks
from ttt_dist.moshi.build import is_ttt_parameter, without_ttt
from ttt_dist.moshi.lora import is_adapter_parameter

pytestmark = [pytest.mark.integration, pytest.mark.timeout(600)]
LORA = ["full_finetuning=false", "lora.enable=true", "lora.rank=5", "lora.ft_embed=true"]
LORA += ["parallel.tp=2"]


@pytest.fixture(scope="module")
def resumed(paths, tmp_path_factory) -> Run:
    """Two steps, and after a resume a third; in bfloat16, so that what is frozen can be told."""
    folder = tmp_path_factory.mktemp("lora") / "run"
    settings = [*paths, *LORA, "global_batch_size=2", "do_eval=false", f"run_dir={folder}"]
    settings += ["tensorboard=false", "param_dtype=bfloat16"]
    for more in (["max_steps=2"], ["max_steps=3", "resume=true"]):
        job = run_ranks(2, TRAIN, [*settings, *more], timeout=TIMEOUT)
        assert job.returncode == 0, job.stdout + job.stderr
    return Run(folder, job)


def test_adapters_train_over_ranks_and_resume(resumed):
    assert "resumed after step 2 from" in resumed.job.stdout
    assert [row["step"] for row in resumed.steps] == [1, 2, 3]
    model = initial_model(resumed)
    initial = dict(model.named_parameters())
    adapters = {name for name in initial if is_adapter_parameter(name)}
    trained = adapters | {n for n in initial if is_ttt_parameter(n) or "emb" in n}
    # lora_A's gradient is 0 while lora_B is, so it has had two where lora_B has had three.
    check_trained(resumed, 3, trained)
    saved = resumed.checkpoint(3)
    frozen = set(initial) - trained
    assert sum(".frozen_W." in name for name in frozen) == len(adapters) / 2
    unlike = [n for n in frozen if not torch.equal(saved[f"model.{n}"], initial[n].bfloat16())]
    assert unlike == []
    assert {saved[f"model.{name}"].dtype for name in frozen} == {torch.bfloat16}
    assert {saved[f"model.{name}"].dtype for name in trained} == {torch.float32}
    assert not any(f"optimizer.state.{name}.exp_avg" in saved for name in frozen)
    (row,) = re.findall(r"^LoRA adapters +([\d,]+) +([\d,]+)", resumed.job.stdout, re.MULTILINE)
    elements = sum(initial[name].numel() for name in adapters)
    assert [int(cell.replace(",", "")) for cell in row] == [elements, elements]


def test_adapters_by_themselves_give_the_trained_model_back(resumed, tmp_path):
    """Written from a checkpoint of two tensor-parallel ranks, embeddings and TTT included."""
    out = tmp_path / "out"
    main([str(resumed.folder), "--adapters-only", "--dtype", "float32", "--out", str(out)])
    saved = resumed.checkpoint(3)
    model = initial_model(resumed, release=out)
    wanted = {name: saved[f"model.{name}"] for name, _ in model.named_parameters()}
    # What is frozen comes from the base, whole.
    found = {name: value.to(wanted[name].dtype) for name, value in model.named_parameters()}
    assert [name for name, value in found.items() if not torch.equal(value, wanted[name])] == []


@pytest.mark.parametrize("fuse", [False, True])
def test_moshi_takes_the_adapters_and_gives_our_logits_without_ttt(resumed, tmp_path, fuse):
    """As `moshi.server --lora-weight` does, which merges them unless it is told not to."""
    out, with_ttt = tmp_path / "out", tmp_path / "with-ttt"
    options = [str(resumed.folder), "--adapters-only", "--dtype", "float32"]
    main([*options, "--base-only", "--out", str(out)])
    main([*options, "--out", str(with_ttt)])
    info = CheckpointInfo.from_hf_repo(
        "none/at-all",
        lora_weights=str(out / "lora.safetensors"),
        config_path=str(out / "config.json"),
    )
    stock = info.get_moshi(dtype=torch.float32, fuse_lora=fuse)
    ours = initial_model(resumed, release=with_ttt)
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 100, (2, stock.num_codebooks, 30), generator=generator)
    with torch.no_grad(), without_ttt(ours):
        found, expected, untrained = ours(codes), stock(codes), initial_model(resumed)(codes)
    for kind in ("logits", "text_logits"):
        a, b = getattr(found, kind).nan_to_num(), getattr(expected, kind).nan_to_num()
        # Apart, bit for bit; merged, other sums in float32: 4e-6 of logits up to 3.
        torch.testing.assert_close(a, b, rtol=0, atol=2e-5 if fuse else 0)
        assert (a - getattr(untrained, kind).nan_to_num()).abs().max() > 1e-2
    assert info.get_mimi().sample_rate == 24000
    assert info.get_text_tokenizer().vocab_size() == stock.text_card
