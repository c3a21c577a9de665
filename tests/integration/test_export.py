"""A trained model as a release folder: trained on from there, and judged by moshi's own loaders."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from moshi.models.lm import LMModel
from moshi.models.loaders import CheckpointInfo
from safetensors.torch import load_file, save_file

from launch.config import load_config
from launch.configuration.preflight import check_start
from launch.errors import UserError
from launch.export import main
from launch.setup import ttt_placement
from tests.integration.runs import Run, initial_model, side_by_side, single
from tests.ranks import REPO
from tests.unit.moshi_cases import total_loss
from ttt_dist.moshi.block import TTTMoshi
from ttt_dist.moshi.build import build_model, is_ttt_parameter, without_ttt
from ttt_dist.moshi.context import set_attention_contexts
from ttt_dist.moshi.errors import ReleaseError
from ttt_dist.moshi.release import open_release

pytestmark = [pytest.mark.integration, pytest.mark.timeout(600)]
EXPORT = REPO / "launch" / "export.py"
STEPS = 2
TTT_WINDOW, OTHER_WINDOW = 20, 24  # of configs/demo.yaml; the release's own is 3000


@pytest.fixture(scope="module")
def settings(prepared) -> list[str]:
    """One process in float32: the same weights give the same numbers, to the last bit."""
    return [
        f"data.cache_dir={prepared.folder}",
        *("global_batch_size=2", "eval_batches=1", "tensorboard=false", "device=cpu"),
        *("param_dtype=float32", "max_steps=2"),
    ]


@pytest.fixture(scope="module")
def trained(settings, demo_base, tmp_path_factory) -> Run:
    folder = tmp_path_factory.mktemp("trained") / "run"
    job = single([*settings, f"moshi_paths.hf_repo_id={demo_base}", f"run_dir={folder}"])
    assert job.returncode == 0, job.stdout + job.stderr
    return Run(folder, job)


@pytest.fixture(scope="module")
def exported(trained) -> dict[str, Path]:
    """Folders by dtype; float32 comes by the real command, from another folder."""
    folders = {name: trained.folder / name for name in ("bfloat16", "float32", "base")}
    job = single(
        [str(trained.folder), "--dtype", "float32", "--out", str(folders["float32"])],
        script=EXPORT,
    )
    assert job.returncode == 0, job.stdout + job.stderr
    assert f"folder: {folders['float32']}: 173 tensors" in job.stdout
    assert f"TTT layers={TTT_WINDOW} (2 layers), other layers={OTHER_WINDOW}" in job.stdout
    main([str(trained.folder), "--out", str(folders["bfloat16"])])
    base = ["--base-only", "--dtype", "float32", "--step", str(STEPS)]
    main([str(trained.folder), "--out", str(folders["base"]), *base])
    return folders


@pytest.fixture(scope="module")
def continued(settings, exported, tmp_path_factory) -> dict[str, Run]:
    """Runs that start from the exports."""
    folder = tmp_path_factory.mktemp("continued")
    jobs = side_by_side(
        {
            name: [
                *settings,
                f"moshi_paths.hf_repo_id={exported[name]}",
                f"run_dir={folder / name}",
                *("max_steps=1", "do_ckpt=false"),
                # Loaded gates stay as they are, whatever this says.
                "ttt.initial_gating_alpha=0.9",
            ]
            for name in ("bfloat16", "float32")
        }
    )
    for job in jobs.values():
        assert job.returncode == 0, job.stdout + job.stderr
        assert "TTT weights: 38 tensors from" in job.stdout
    return {name: Run(folder / name, job) for name, job in jobs.items()}


def test_training_goes_on_from_an_export_where_it_stopped(trained, continued):
    last = trained.evaluations[-1]
    assert last["step"] == STEPS
    losses = [key for key in last if key.startswith("eval_") and "without_ttt" not in key]
    first = {name: run.evaluations[0] for name, run in continued.items()}
    for key in losses:
        assert first["float32"][key] == last[key], key
        # bfloat16 keeps 8 bits of Moshi's weights: 2e-3 of each, of random sign; measured 1.2e-4.
        assert first["bfloat16"][key] == pytest.approx(last[key], rel=2e-3), key
        assert first["bfloat16"][key] != last[key]
    # It is no loss that any model has: the base began far from it.
    assert abs(trained.evaluations[0]["eval_loss"] - last["eval_loss"]) > 1
    for run in continued.values():
        assert run.status["state"] == "finished"


def losses_of_steps(model: TTTMoshi, steps: int = 3) -> list[float]:
    """Of further steps, optimizer and codes the same for every model."""
    set_attention_contexts(model, ttt_context=TTT_WINDOW, other_context=OTHER_WINDOW)
    generator = torch.Generator().manual_seed(3)
    codes = torch.randint(0, 100, (2, model.num_codebooks, 2 * TTT_WINDOW), generator=generator)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = total_loss(model(codes), codes, model)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_further_steps_from_an_export_are_those_of_the_trained_weights(trained, exported):
    expected = losses_of_steps(trained_model(trained))
    assert expected[2] < expected[1] < expected[0]
    assert losses_of_steps(initial_model(trained, release=exported["float32"])) == expected
    rounded = losses_of_steps(initial_model(trained, release=exported["bfloat16"]))
    # As above: 8 bits of Moshi's weights; measured 5e-4 after three steps.
    assert rounded == pytest.approx(expected, rel=2e-3)
    assert rounded != expected


def test_a_run_that_contradicts_the_exports_ttt_is_refused(settings, exported, tmp_path):
    def problems(*overrides: str) -> list[str]:
        paths = [f"moshi_paths.hf_repo_id={exported['float32']}", f"run_dir={tmp_path / 'new'}"]
        with pytest.raises(UserError) as caught:
            check_start([*settings, *paths, *overrides], world_size=1, rank=0, local_world_size=1)
        return list(caught.value.problems)

    changed = problems("ttt.layers=1,3", "ttt.base_lr=2.0", "ttt.ttt_layer_context=50")
    assert len(changed) == 3
    assert changed[0].startswith("ttt.layers: found '1,3', but the release was trained with '1,2'")
    assert changed[1].startswith("ttt.base_lr: found 2.0, but the release was trained with 1.0")
    assert changed[2].startswith("ttt.ttt_layer_context: found 50, but the release was trained wi")
    (off,) = problems("ttt.enable=false")
    assert off.startswith("ttt.enable: the release has TTT layers and this run leaves them out")
    assert "ttt.layers='1,2'" in off
    linear = problems("ttt.inner_model=linear")
    assert [line.split(":")[0] for line in linear] == [
        "ttt.inner_model",
        "ttt.ttt_mlp_expansion_factor",
        "ttt.ttt_mlp_layers",
    ]


def open_with_moshi(folder: Path, config_path: Path | None = None) -> CheckpointInfo:
    """moshi's own code, asked for no hub."""
    return CheckpointInfo.from_hf_repo(
        "none/at-all",
        moshi_weights=folder / "model.safetensors",
        mimi_weights=folder / "mimi.safetensors",
        tokenizer=folder / "tokenizer.model",
        config_path=config_path or folder / "config.json",
        mimi_config_path=folder / "mimi_config.json",
    )


def test_stock_moshi_refuses_an_export_with_ttt(exported, tmp_path):
    folder = exported["bfloat16"]
    with pytest.raises(TypeError, match="unexpected keyword argument 'ttt'"):
        open_with_moshi(folder).get_moshi()
    # And without the section its tensors are too many; nothing of TTT is passed over.
    config = json.loads((folder / "config.json").read_text())
    del config["ttt"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(RuntimeError, match=r"Unexpected key\(s\).*layers\.1\.ttt\.alpha"):
        open_with_moshi(folder, tmp_path / "config.json").get_moshi()


def trained_model(run: Run) -> TTTMoshi:
    """From the checkpoint itself, whole and in one process."""
    config = load_config(run.folder / "config.yaml")
    release = open_release(**config.moshi_paths.model_dump())
    placement = ttt_placement(config, release.lm_config)
    model = build_model(release.lm_config, placement, device="cpu")
    saved = run.checkpoint(STEPS)
    model.load_state_dict({name: saved[f"model.{name}"] for name in model.state_dict()})
    return model


def logits(model: LMModel, codes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    with torch.no_grad():
        output = model(codes)
    return output.text_logits, output.logits


@pytest.mark.parametrize("frames", [TTT_WINDOW, 3 * TTT_WINDOW])
def test_stock_moshi_loads_the_base_and_gives_our_logits_without_ttt(trained, exported, frames):
    """Bit for bit: on the CPU PackedLinear and nn.Linear are one computation."""
    info = open_with_moshi(exported["base"])
    stock = info.get_moshi(dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 100, (2, stock.num_codebooks, frames), generator=generator)
    ours = trained_model(trained)
    windows = {"ttt_context": TTT_WINDOW, "other_context": OTHER_WINDOW}
    if frames <= TTT_WINDOW:  # further back, only the release's windows see what stock moshi sees
        set_attention_contexts(ours, **windows)
    expected = logits(stock, codes)
    with without_ttt(ours):
        found = logits(ours, codes)
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a.isnan(), b.isnan())
        assert torch.equal(a.nan_to_num(), b.nan_to_num())
    with_ttt = logits(ours, codes)
    assert not torch.equal(with_ttt[0].nan_to_num(), expected[0].nan_to_num())
    assert info.get_text_tokenizer().vocab_size() == stock.text_card
    assert info.get_mimi().sample_rate == 24000


def test_ttt_tensors_and_their_section_come_together(exported, tmp_path):
    folder = tmp_path / "release"
    shutil.copytree(exported["float32"], folder)
    config = json.loads((folder / "config.json").read_text())
    tensors = load_file(folder / "model.safetensors")
    assert open_release(str(folder)).lm_config.get("ttt") is None
    (folder / "config.json").write_text(json.dumps({k: config[k] for k in config if k != "ttt"}))
    with pytest.raises(ReleaseError, match=r"has tensors of TTT layers, but config\.json has no"):
        open_release(str(folder))
    (folder / "config.json").write_text(json.dumps(config))
    save_file(
        {n: t for n, t in tensors.items() if not is_ttt_parameter(n)}, folder / "model.safetensors"
    )
    with pytest.raises(ReleaseError, match="section ttt tells of TTT layers, but"):
        open_release(str(folder))


def message_of(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    message = capsys.readouterr().err
    assert message.count("Can't export: 1 problem.") == 1
    return message


def test_mistakes_are_told_in_one_message(trained, exported, tmp_path, capsys):
    run = str(trained.folder)
    out = str(tmp_path / "out")
    expected = {
        (str(tmp_path / "nowhere"),): "nowhere is no folder, so no run began there",
        (str(tmp_path),): "holds no config.yaml",
        (run, "--step", "7", "--out", out): "--step: found 7, allowed: 2, which ",
        # First, before any checkpoint is looked for and read.
        (run, "--step", "7", "--out", str(exported["base"])): "base exists; nothing is ever",
        (run, "--merge-lora"): f"--merge-lora: {run} has no adapters",
        (run, "--adapters-only"): f"--adapters-only: {run} has no adapters",
        (run, "--out", "/dev/null/out"): "/dev/null/out can't be written",
    }
    for arguments, part in expected.items():
        assert part in message_of(capsys, *arguments), arguments
    assert not Path(out).exists()


def without_checkpoints(run: Path) -> None:
    shutil.rmtree(run / "checkpoints" / "step-000002")


DAMAGES = {
    "no checkpoint": (without_checkpoints, "holds no checkpoint (step-NNNNNN)"),
    "no progress": (
        lambda run: next(run.rglob("progress.json")).unlink(),
        "progress.json is missing",
    ),
    "no metadata": (lambda run: next(run.rglob(".metadata")).unlink(), ".metadata is missing"),
    "a file less": (lambda run: next(run.rglob("*.distcp")).unlink(), ".distcp is missing"),
    "a torn file": (
        lambda run: (p := next(run.rglob("*.distcp"))).write_bytes(p.read_bytes()[:-9]),
        "is damaged: __0_0.distcp has ",
    ),
    "other TTT layers": (
        lambda run: (p := run / "config.yaml").write_text(p.read_text().replace("1,2", "1,3")),
        "missing: transformer.layers.3.ttt.",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_torn_checkpoint_is_refused_and_nothing_is_left(trained, tmp_path, capsys, damage):
    run = tmp_path / "run"
    for path in (trained.folder / "config.yaml", *trained.folder.glob("checkpoints/*/*")):
        copy = run / path.relative_to(trained.folder)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, copy)
    spoil, why = DAMAGES[damage]
    spoil(run)
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    assert why in message_of(capsys, str(run))
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before
