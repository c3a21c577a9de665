"""launch.benchmark: its rows, that wrong results stop it, what it counts, its command line."""

import json
from functools import partial

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from launch import benchmark
from launch.benchmarking import cases, measure, resident
from launch.benchmarking.cases import (
    Case,
    Drawn,
    outputs_and_gradients,
    scan_bytes,
    scan_flops,
    scan_workload,
)
from launch.benchmarking.measure import DisagreementError, check_agreement, peak_bytes
from launch.benchmarking.resident import resident_bytes, resident_supported
from ttt_dist.layer import TTTLayer
from ttt_dist.ops import ttt_mlp
from ttt_dist.ops.dual_form import dual_form

CPU = torch.device("cpu")
TINY = ["--shapes", "1,2,8,16,4", "--lengths", "40", "10", "--pairs", "3"]


def make_case(inner="mlp", L=8, dtype=torch.float32):
    return Case(inner, 2, 3, 8, 24 if inner == "mlp" else 8, 4, L, dtype, CPU)


@pytest.fixture(autouse=True)
def small_machine_peaks(monkeypatch):
    """The machine's own peaks matter to nobody here."""
    monkeypatch.setitem(measure.MATMUL_SIZE, "cpu", 128)
    monkeypatch.setitem(measure.COPY_BYTES, "cpu", 2**20)
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)  # of this whole process


@pytest.mark.parametrize("op", ["mlp", "linear"])
def test_rows(op, tmp_path, capsys):
    path = tmp_path / "rows.jsonl"
    assert benchmark.main([*TINY, "--op", op, "--json", str(path)]) == 0
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(r["what"], r["L"]) for r in rows] == [
        ("scan", 10),
        ("scan", 40),
        ("layer", 10),
        ("layer", 40),
    ]
    for row in rows:
        assert [row[n] for n in "BHdhC"] == [1, 2, 8, 16 if op == "mlp" else 8, 4]
        assert (row["op"], row["dtype"], row["threads"], row["pairs"]) == (op, "float32", 1, 3)
        assert row["seconds"] > max(row["forward_seconds"], row["backward_seconds"]) > 0
        assert row["peak_bytes"] > 1000
        share = row["flops_per_second"] / row["matmul_peak"]
        assert row["share_of_matmul_peak"] == pytest.approx(share)
    for short, long in (rows[:2], rows[2:]):
        assert short["growth_seconds"] is None
        assert long["growth_seconds"] == pytest.approx(long["seconds"] / short["seconds"])
        assert 1 < long["growth_peak_bytes"] < 6
    for row in rows:
        assert row["ratio_min"] <= row["ratio"] <= row["ratio_max"]
        assert row["memory_ratio"] == row["peak_bytes"] / row["twin_peak_bytes"]
        # Two float32 forms of the same sums.
        assert 0 <= row["worst_difference"] < 1e-5
    for row in rows[2:]:
        assert row["scan_share_min"] <= row["scan_share"] <= row["scan_share_max"]
    printed = capsys.readouterr()
    assert f"{op} 1 2 8 {rows[0]['h']} 4" in printed.out
    assert "{" not in printed.out
    assert printed.err.count("benchmark: ") == 4


def test_rows_go_to_standard_output_without_a_file(capsys):
    assert benchmark.main([*TINY, "--what", "layer", "--group-size", "2"]) == 0
    rows = [json.loads(s) for s in capsys.readouterr().out.splitlines() if s.startswith("{")]
    assert [row["group_size"] for row in rows] == [2, 2]


def test_results_that_disagree_end_it_before_anything_is_timed(monkeypatch, capsys):
    monkeypatch.setitem(cases.FAST, "mlp", partial(ttt_mlp, causal=False))
    assert benchmark.main(TINY) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "scan mlp B 1 H 2 d 8 h 16 C 4 L 10" in printed.err
    assert "results differ from the slow twin's" in printed.err
    assert "output" in printed.err
    assert "Traceback" not in printed.err


def broken_gradient(name):
    """A scan whose outputs are right, and one gradient is not: a thousandth too large."""

    def op(q, k, v, eta, ln_weight, ln_bias, state, **settings):
        tensors = {"k": k, "eta": eta, "ln_bias": ln_bias}
        t = tensors[name]
        tensors[name] = 1.001 * t - (0.001 * t).detach()
        k, eta, ln_bias = tensors.values()
        return ttt_mlp(q, k, v, eta, ln_weight, ln_bias, state, **settings)

    return op


@pytest.mark.parametrize("name", ["k", "eta", "ln_bias"])
def test_one_wrong_gradient_is_found_and_named(name):
    case = make_case(L=10)
    right = scan_workload(case, ttt_mlp)
    assert check_agreement(right, right, 0, case.dtype) == 0
    wrong = scan_workload(case, broken_gradient(name))
    with pytest.raises(DisagreementError, match=f"gradient of {name} 1.0e-03"):
        check_agreement(wrong, right, 0, case.dtype)


def test_a_layer_is_compared_with_its_twin(monkeypatch, capsys):
    monkeypatch.setattr(TTTLayer, "scan_op", lambda self: broken_gradient("k"))
    assert benchmark.main([*TINY, "--what", "layer"]) == 1
    told = capsys.readouterr().err
    assert "layer mlp B 1 H 2 d 8 h 16 C 4 L 10" in told
    assert "gradient of wk.weight" in told


@pytest.mark.integration  # compiling takes seconds
def test_compiled_rows(capsys, tensor_code):
    assert benchmark.main([*TINY, "--compiled", "--what", "scan"]) == 0
    rows = [json.loads(s) for s in capsys.readouterr().out.splitlines() if s.startswith("{")]
    assert all(row["compiled"] for row in rows)
    assert rows[0]["code"] == "tensor code (TTT_DIST_NATIVE is 0)"
    assert rows[0]["first_seconds"] > rows[0]["seconds"]


def test_results_that_are_not_finite_disagree():
    def op(*arguments, **settings):
        out, state = ttt_mlp(*arguments, **settings)
        return out / 0.0, state

    case = make_case()
    right = scan_workload(case, ttt_mlp)
    with pytest.raises(DisagreementError, match=r"output inf, .*gradient of q nan"):
        check_agreement(scan_workload(case, op), right, 0, case.dtype)


def test_repetitions_have_inputs_of_their_own():
    draw = scan_workload(make_case(), ttt_mlp)
    first, again, other = (draw(seed).leaves for seed in (0, 0, 1))
    assert set(first) >= {"q", "k", "v", "eta", "ln_weight", "ln_bias", "W1", "b1", "W2", "b2"}
    for name, value in first.items():
        assert value.requires_grad
        assert torch.equal(value, again[name])
        assert not torch.equal(value, other[name])


@pytest.mark.parametrize("inner", ["mlp", "linear"])
def test_counted_flops_are_those_of_the_dual_form(inner):
    """What a mini-batch more costs, as torch counts it; nothing is recomputed here."""
    op = partial(dual_form, checkpoint_group_size=0)
    found, expected = [], []
    for L in (8, 12):
        case = make_case(inner, L=L)
        draw = scan_workload(case, op)
        with FlopCounterMode(display=False) as forward:
            draw(0).forward()
        with FlopCounterMode(display=False) as both:
            outputs_and_gradients(draw(0), 0)
        found.append((forward.get_total_flops(), both.get_total_flops()))
        expected.append((scan_flops(case)[0], sum(scan_flops(case))))
    short, long = found
    assert [b - a for a, b in zip(short, long)] == [b - a for a, b in zip(*expected)]
    # Beyond that there is what the scan does after the last mini-batch.
    assert expected[0] <= short


def test_a_shorter_mini_batch_counts_what_it_has():
    three, two, rest = (scan_flops(make_case(L=L))[0] for L in (11, 8, 3))
    assert three == two + rest


def test_bytes_needed_are_the_tensors_that_go_in_and_out():
    case = make_case(L=10)
    draw = scan_workload(case, ttt_mlp)
    results = outputs_and_gradients(draw(0), 0)
    frames = {n: t.nbytes for n, t in draw(0).leaves.items() if n in ("q", "k", "v", "eta")}
    state = sum(results[f"state {n}"].nbytes for n in ("W1", "b1", "W2", "b2"))
    # In twice, gradients out once; the output out and its gradient in; state in and out, twice.
    expected = 3 * sum(frames.values()) + 2 * results["output"].nbytes + 4 * state
    assert scan_bytes(case) == expected


def test_peak_bytes_sees_what_is_alive_at_once():
    """Scratch that is gone before the end counts, what comes after another's end doesn't add."""
    x = torch.ones(1000, requires_grad=True)
    doubled = 2 * x.nbytes  # output and gradient

    def peak(*scratch):
        def forward():
            for size in scratch:
                torch.empty(size, dtype=torch.uint8)
            return x * 2.0, None

        return peak_bytes(lambda seed: Drawn(forward, {"x": x}, torch.ones(1000)), 0, CPU)

    without = peak()
    assert doubled <= without <= doubled + 100
    assert peak(10**6) == 10**6
    assert peak(10**6, 10**6) == 10**6


@pytest.mark.skipif(not resident_supported(), reason="Linux tells a process its peak")
def test_resident_bytes_hold_the_tensors():
    """Pages of tensors that are never written don't count; code and small blocks come on top."""
    case = Case("mlp", 1, 2, 64, 256, 16, 256, torch.float32, CPU)
    tensors = peak_bytes(scan_workload(case, ttt_mlp), 0, CPU)
    assert 0.5 * tensors < resident_bytes("fast", case, None, 1) < 2 * tensors + 2**22


def test_a_failed_process_ends_it(monkeypatch, capsys):
    monkeypatch.setattr(resident.sys, "executable", "/bin/false")
    assert benchmark.main([*TINY, "--what", "scan", "--resident"]) == 1
    assert "stopped. the process that measures resident bytes failed" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--shapes", "1,4,64,256"], "--shapes: found '1,4,64,256', allowed are five numbers"),
        (["--shapes", "1,4,64,256,0"], "--shapes: found '0', allowed are whole numbers from 1"),
        (["--shapes", "1,4,64,200,16"], "found d 64, h 200; a layer has"),
        (["--lengths", "1e3"], "--lengths: found '1e3', allowed are whole numbers from 1"),
        (["--pairs", "0"], "--pairs: found '0', allowed are whole numbers from 1"),
        (["--threads", "-1"], "--threads: "),
        (["--group-size", "x"], "--group-size: found 'x', allowed are whole numbers from 0"),
        (["--op", "attention"], "argument --op: invalid choice: 'attention'"),
        (["--what", "model"], "argument --what: invalid choice"),
        (["--dtype", "int8"], "argument --dtype: invalid choice"),
        (["--speed"], "unrecognized arguments: --speed"),
        (["--json", "no/such/folder/rows.jsonl"], "--json: found 'no/such/folder/rows.jsonl'"),
    ],
)
def test_wrong_arguments_are_told_in_one_message(arguments, told, capsys):
    with pytest.raises(SystemExit) as exit_:
        benchmark.main(arguments)
    printed = capsys.readouterr()
    assert exit_.value.code == 2
    assert "benchmark can't start: 1 problem." in printed.err
    assert told in printed.err
    assert printed.out == ""


def test_all_problems_are_told_together(capsys):
    with pytest.raises(SystemExit):
        benchmark.main(["--pairs", "0", "--lengths", "-3", "--shapes", "2"])
    assert "3 problems" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="a machine without a GPU is told so")
def test_a_gpu_that_is_not_there_is_told(capsys):
    with pytest.raises(SystemExit):
        benchmark.main(["--device", "cuda"])
    assert "torch sees no GPU" in capsys.readouterr().err


def test_the_default_is_the_shapes_of_the_project():
    settings = benchmark.read_arguments([])
    sizes = [(c.d, c.h, c.C, c.L) for c in settings.cases]
    assert sizes == [
        (64, 256, 16, 1024),
        (64, 256, 16, 4096),
        (64, 256, 16, 16384),
        (128, 512, 16, 1024),
        (128, 512, 64, 1024),
    ]
    assert (settings.what, settings.pairs, settings.threads) == (("scan", "layer"), 7, 1)
