"""The C++ kernels beside the definition, at a model's sizes and at odd ones; building them."""

import os
import platform
import shlex
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

from tests.ranks import REPO
from tests.unit.ops_cases import FRAMES, gradients, make_case, objective, relative
from ttt_dist.ops import deep_mlp_state, native, ttt_mlp
from ttt_dist.ops.dual_form import dual_form
from ttt_dist.ops.implementations import NATIVE, TENSOR_CODE, implementation

pytestmark = pytest.mark.usefixtures("cpp_kernels")
CPU = torch.device("cpu")
# Of a tensor's norm: rounding, 1e-16 and 6e-8 each, over sums and steps.
TOLERANCE = {torch.float64: 1e-11, torch.float32: 2e-5}


def case_of(H, d, h, C, L, dtype=torch.float64, B=2, **settings):
    """Sizes of hidden layers of their own, and frames and rates as a layer hands them on."""
    case = make_case("mlp", B, H, L, d=d, C=C, dtype=dtype, **settings)
    g = torch.Generator().manual_seed(7)

    def weight(*shape):
        return (0.1 * torch.randn(*shape, generator=g, dtype=torch.float64)).to(dtype)

    case.x |= {
        "W1": weight(H, d, h), "b1": weight(H, 1, h), "W2": weight(H, h, d), "b2": weight(H, 1, d),
    }  # fmt: skip
    for n in "qk":
        case.x[n] = torch.nn.functional.normalize(case.x[n].detach(), dim=-1)
    case.x["eta"] = case.x["eta"].detach() / d
    case.x = {n: t.detach().requires_grad_() for n, t in case.x.items()}
    return case


def results(case, op=ttt_mlp, fed=0):
    """Outputs, the returned state and every gradient, after `fed` frames in a call before."""
    state = case.fresh()
    outs = []
    if fed:
        out, state = case.run(state, 0, fed, op=op)
        outs.append(out)
    out, after = case.run(state, fed, None, op=op)
    outs.append(out)
    grads = gradients(objective(torch.cat(outs, dim=2), after), case.x)
    state_tensors = {n: t for n, t in after.tensors().items() if n != "offset"}
    return {"out": torch.cat(outs, dim=2), **state_tensors, **grads}


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(
    ("H", "d", "h", "C", "L", "fed"),
    [
        (2, 64, 256, 16, 75, 0),  # vectors and tiles divide everything but the length
        (1, 128, 512, 64, 140, 0),
        (2, 64, 128, 16, 75, 21),
        (3, 20, 50, 5, 33, 7),  # they divide nothing
        (1, 17, 19, 33, 80, 40),
        (2, 1, 3, 2, 9, 3),
    ],
)
@pytest.mark.parametrize("causal", [True, False])
def test_equal_the_twin_in_float64(dtype, H, d, h, C, L, fed, causal):
    """Outputs, state and gradients; both dtypes of kernels beside the twin in float64."""
    check_against_twin(
        case_of(H, d, h, C, L, causal=causal), dtype, fed if causal else fed // C * C
    )


def check_against_twin(case, dtype, fed):
    slow = results(case, dual_form, fed)
    case.x = {n: t.detach().to(dtype).requires_grad_() for n, t in case.x.items()}
    fast = results(case, ttt_mlp, fed)
    largest = max(t.norm() for n, t in slow.items() if n in case.x)
    for name, expected in slow.items():
        # Gradients that cancel to nothing (LayerNorm over one value is 0, whatever it is) are
        # compared with the largest of all.
        floor = 1e-2 * largest if name in case.x else 0.0
        error = (fast[name].double() - expected).norm()
        assert error <= TOLERANCE[dtype] * max(expected.norm(), floor), name


def test_no_bit_depends_on_groups_threads_or_lanes():
    """Every sum runs in one order: so do heads on other ranks, and other checkpoint groups."""
    case = case_of(3, 20, 40, 4, 53, torch.float32)
    expected = results(case)
    threads = torch.get_num_threads()
    try:
        for count, group in ((1, 1), (1, 100), (3, 2), (5, None)):
            torch.set_num_threads(count)
            case.settings["checkpoint_group_size"] = group
            for name, t in results(case).items():
                assert torch.equal(t, expected[name]), (name, count, group)
    finally:
        torch.set_num_threads(threads)
    lane = case_of(3, 20, 40, 4, 53, torch.float32)
    lane.x = {n: (t[1:] if n in FRAMES else t).detach().requires_grad_() for n, t in case.x.items()}
    out, _ = lane.run(lane.fresh())
    assert torch.equal(out, expected["out"][1:])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_comes_through(bad):
    """A key that isn't finite spoils all that learns from it: nothing clamps it away."""
    case = case_of(1, 16, 32, 4, 20, torch.float32, B=2)
    with torch.no_grad():
        case.x["k"][1, 0, 6, 3] = bad
    found = results(case)
    assert not found["out"][1, 0, 6:].isfinite().any()
    assert found["out"][0].isfinite().all()
    assert found["out"][1, 0, :4].isfinite().all()
    assert not found["W1"].isfinite().all()


def test_gelu_far_out():
    """Where e^x leaves float32's range, as where it doesn't: the twin's values."""
    case = case_of(1, 8, 16, 4, 12, torch.float32, B=1)
    for scale in (30.0, 3e3, 3e6):
        with torch.no_grad():
            case.x["b1"].copy_(torch.linspace(-scale, scale, 16).view(1, 1, 16))
        fast, slow = results(case), results(case, dual_form)
        for name in ("out", "W1", "W2", "b2", "v"):
            assert relative(fast[name], slow[name]) < 1e-4, (name, scale)


def test_the_caller_chooses_nothing():
    """Kernels for what they are written for, tensor code for all else."""
    f32, bf16 = torch.float32, torch.bfloat16
    assert implementation(2, CPU, f32, f32) is NATIVE
    assert implementation(2, CPU, torch.float64, torch.float64) is NATIVE
    assert implementation(1, CPU, f32, f32) is TENSOR_CODE
    assert implementation(2, CPU, bf16, f32) is TENSOR_CODE
    assert implementation(2, torch.device("cuda"), f32, f32) is TENSOR_CODE


def test_the_switch(tensor_code):
    assert implementation(2, CPU, torch.float32, torch.float32) is TENSOR_CODE
    assert native.library().told == "TTT_DIST_NATIVE is 0"


@pytest.fixture
def unbuilt(monkeypatch, tmp_path):
    """As on a machine that never built them; its cache folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    native.build.built.cache_clear()
    yield tmp_path / "ttt-dist" / "kernels"
    monkeypatch.undo()
    native.build.built.cache_clear()


@pytest.mark.integration  # runs the compiler, 4 s
def test_built_once(unbuilt, monkeypatch):
    """The second process finds the file; nothing stays beside it but the lock."""
    told = native.library().told
    assert {str(p) for p in unbuilt.iterdir()} == {told, str(unbuilt / ".lock")}
    native.build.built.cache_clear()
    monkeypatch.setattr(subprocess, "run", None)
    assert native.library().told == told


@pytest.mark.integration  # runs the compiler, 4 s
@pytest.mark.skipif(platform.machine() != "x86_64", reason="its vectors")
@pytest.mark.parametrize("without", ["avx512f", "avx"])
def test_processors_with_shorter_vectors(unbuilt, monkeypatch, without):
    """Other tiles, other padding."""
    monkeypatch.setenv("CXX", shlex.join([*native.compiler(), f"-mno-{without}"]))
    for dtype in TOLERANCE:
        check_against_twin(case_of(2, 64, 128, 16, 75), dtype, 21)
        check_against_twin(case_of(3, 20, 50, 5, 33), dtype, 7)
    assert native.library().told.startswith(str(unbuilt))


def test_without_a_compiler_tensor_code_runs(unbuilt, monkeypatch):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(unbuilt))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert implementation(2, CPU, torch.float32, torch.float32) is TENSOR_CODE
    assert native.library().told == "no C++ compiler found (CXX, g++, clang++, c++)"


@pytest.mark.parametrize(
    ("compiler", "words"),
    [("false", "returned non-zero exit status 1"), ("no-such-compiler", "No such file")],
)
def test_a_compiler_that_fails_is_told_once(unbuilt, monkeypatch, compiler, words):
    monkeypatch.setenv("CXX", compiler)
    with pytest.warns(UserWarning, match=f"with {compiler} failed: .*{words}.*TTT_DIST_NATIVE=0"):
        assert implementation(2, CPU, torch.float32, torch.float32) is TENSOR_CODE
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert native.library().functions is None


@pytest.mark.integration  # runs the compiler, 5 s
def test_processes_that_start_together_build_once(unbuilt, tmp_path):
    """With a compiler that counts: the others wait, and load what the first one made."""
    counting = tmp_path / "counting"
    real = shlex.join(native.compiler())
    counting.write_text(f'#!/bin/sh\necho run >> {tmp_path}/runs\nexec {real} "$@"\n')
    counting.chmod(0o755)
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path), "CXX": str(counting)}
    code = "from ttt_dist.ops import native; print(native.library().told)"
    command = [sys.executable, "-c", code]
    started = [
        subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True, cwd=REPO)
        for _ in range(3)
    ]
    told = {process.communicate(timeout=120)[0] for process in started}
    assert len(told) == 1, told
    assert told.pop().startswith(str(unbuilt))
    assert (tmp_path / "runs").read_text().split() == ["run"]


@pytest.mark.integration  # runs the compiler, 4 s each
@pytest.mark.parametrize("wrong", ["folder", "file", "home"])
def test_where_the_cache_is_of_no_use(unbuilt, monkeypatch, wrong):
    """It can't be written, holds a file cut short, or isn't known: built for this process alone."""
    if wrong == "folder":
        unbuilt.parent.parent.joinpath("ttt-dist").write_text("a file in the way")
    elif wrong == "file":
        unbuilt.mkdir(parents=True)
        command = [*native.compiler(), *native.build._FLAGS]
        (unbuilt / f"scan-{native.build._fingerprint(command)}.so").touch()
    else:
        monkeypatch.delenv("XDG_CACHE_HOME")
        monkeypatch.delenv("HOME", raising=False)
        monkeypatch.setattr(Path, "home", no_home)
    assert native.library().functions is not None
    assert native.library().told.endswith("removed once loaded")
    check_against_twin(case_of(2, 20, 50, 5, 33), torch.float32, 7)


def no_home() -> Path:
    """What `Path.home` does for a user whom the machine doesn't know."""
    raise RuntimeError("Could not determine home directory.")


def test_deeper_networks_have_no_kernels():
    W1, b1 = torch.zeros(1, 6, 6).double(), torch.zeros(1, 1, 6).double()
    state = deep_mlp_state([W1] * 3, [b1] * 3, 1)
    case = make_case("mlp", 1, 1, 8)
    out, _ = case.run(state, op=ttt_mlp)
    assert out.isfinite().all()
    assert not native.suits(3, CPU, torch.float64, torch.float64)
