"""LoRA through the real commands: trained over tensor parallelism, resumed, verified."""

import re

import pytest
import torch

from tests.integration.runs import TIMEOUT, TRAIN, Run, check_trained, initial_model
from tests.ranks import REPO, run_ranks
from ttt_dist.moshi.build import is_ttt_parameter
from ttt_dist.moshi.lora import is_adapter_parameter

pytestmark = [pytest.mark.integration, pytest.mark.timeout(600)]
VERIFY = REPO / "launch" / "verify.py"
LORA = ["full_finetuning=false", "lora.enable=true", "lora.rank=5", "lora.ft_embed=true"]
LORA += ["parallel.tp=2"]


@pytest.fixture(scope="module")
def resumed(paths, tmp_path_factory) -> Run:
    """Two steps, and after a resume a third."""
    folder = tmp_path_factory.mktemp("lora") / "run"
    settings = [*paths, *LORA, "global_batch_size=2", "do_eval=false", f"run_dir={folder}"]
    settings += ["tensorboard=false"]
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
    assert [n for n in frozen if not torch.equal(saved[f"model.{n}"], initial[n])] == []
    assert not any(f"optimizer.state.{name}.exp_avg" in saved for name in frozen)
    (row,) = re.findall(r"^LoRA adapters +([\d,]+) +([\d,]+)", resumed.job.stdout, re.MULTILINE)
    elements = sum(initial[name].numel() for name in adapters)
    assert [int(cell.replace(",", "")) for cell in row] == [elements, elements]


def test_verify_takes_the_flags_and_passes(tmp_path):
    job = run_ranks(2, VERIFY, [*LORA, "max_steps=1"], timeout=TIMEOUT, cwd=tmp_path)
    assert job.returncode == 0, job.stdout + job.stderr
    assert "full_finetuning false, lora of rank 5, ft_embed true" in job.stdout
    assert job.stdout.endswith("verify: all within tolerance\n")
    (compared,) = re.findall(r"^ +float64 +gradient \((\d+)\)", job.stdout, re.MULTILINE)
    (total,) = re.findall(r"^ +float64 +initial value \((\d+)\)", job.stdout, re.MULTILINE)
    # Gradients of adapters, TTT and embeddings alone were there to compare.
    assert 200 < int(compared) < int(total)
