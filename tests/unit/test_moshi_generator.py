"""Moshi's own generator on the hybrid model, and what it needs to record steps as CUDA graphs."""

import pytest
import torch
from moshi.models.lm import LMGen, LMModel
from moshi.modules.transformer import set_attention_context
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.distributed.tiny import stock_model, ttt_placement
from tests.unit.moshi_cases import clean_codes, hybrid_model, set_windows
from tests.unit.streaming_cases import copies, generate, ready, states
from ttt_dist.moshi.build import without_ttt


@torch.no_grad()
def greedy_without_streaming(model: LMModel, user: Tensor) -> Tensor:
    """The same by the training forward alone, over the whole past again at each step.

    LMGen reads the user's frame t in step t + delay; its first step reads initial tokens alone.
    """
    frames, delays = user.shape[2], model.delays
    initial = model._get_initial_token()  # [1, K, 1]
    sequence = initial.expand(-1, -1, frames + 1).clone()  # what each step reads
    for k in range(1 + model.dep_q, model.num_codebooks):
        for t in range(delays[k] + 1, frames):
            sequence[:, k, t] = user[:, k - 1 - model.dep_q, t - delays[k]]
    for t in range(frames):
        out, text = model.forward_text(sequence[:, :, : t + 1])
        targets = sequence[:, :, t + 1 : t + 2].clone()
        targets[:, 0] = text[:, :, -1].argmax(dim=-1)
        for k in range(1, 1 + model.dep_q):
            logits = model.forward_depformer_training(targets, out[:, -1:])
            targets[:, k] = logits[:, k - 1].argmax(dim=-1)
        generated = torch.tensor(delays) <= t  # else the next step reads initial tokens
        generated[1 + model.dep_q :] = False
        sequence[:, generated, t + 1] = targets[:, generated, 0]
    # A frame is out once its most delayed codebook is.
    count = frames - max(delays)
    return torch.stack([sequence[0, k, 1 + d : 1 + d + count] for k, d in enumerate(delays[:9])])


@pytest.mark.parametrize("inner", ["mlp", "linear", "deep"])
def test_moshis_generator_gives_what_greedy_decoding_without_streaming_gives(inner):
    model, user = ready(inner), clean_codes(1, 40)[:, 9:]
    found = generate(model, user)[0]
    assert found.shape == (9, 39)
    assert torch.equal(found, greedy_without_streaming(model, user))
    assert all(len(row.unique()) > 1 for row in found[1:])
    with without_ttt(model):
        assert not torch.equal(generate(model, user)[0], found)


def test_moshis_generator_with_lanes_out_of_step():
    """Idle lanes and a reset, through LMGen: each lane's tokens are those of the lane alone."""
    model, user = ready(), clean_codes(3, 40)[:, 9:]
    alone = [generate(model, user[i : i + 1]) for i in range(3)]
    again = generate(model, user[1:2, :, 5:])
    generator = LMGen(model, use_sampling=False, check=True, support_out_of_sync=True)
    random = torch.Generator().manual_seed(1)
    position, begin = [0, 0, 0], 0
    found: list[list[Tensor]] = [[], [], []]
    before: list[Tensor] = []
    with generator.streaming(3):
        for number in range(34):
            if number == 17:
                before, found[1] = found[1], []
                generator.reset_streaming(torch.tensor([False, True, False]))
                position[1], begin = 5, 5
            active = torch.rand(3, generator=random) < 0.7
            generator.set_exec_mask(active)
            frame = torch.zeros(3, 8, 1, dtype=torch.int64)
            for lane in range(3):
                frame[lane] = user[lane, :, position[lane] : position[lane] + 1]
            tokens = generator.step(frame)
            for lane in range(3):
                position[lane] += int(active[lane])
                steps = position[lane] - (begin if lane == 1 else 0)
                if active[lane] and steps > max(model.delays):
                    found[lane].append(tokens[lane : lane + 1])
    for lane, expected in ((0, alone[0]), (1, again), (2, alone[2])):
        tokens = torch.cat(found[lane], dim=2)
        assert tokens.shape[2] > 8
        assert torch.equal(tokens, expected[:, :, : tokens.shape[2]]), lane
    tokens = torch.cat(before, dim=2)
    assert torch.equal(tokens, alone[1][:, :, : tokens.shape[2]])


def test_closed_gate_gives_stock_moshis_tokens():
    """TTT that runs behind a gate of 0, and TTT left out for the stream: bit for bit."""
    stock = stock_model().eval()
    set_attention_context(stock.transformer, 7)
    user = clean_codes(1, 24)[:, 9:]
    expected = generate(stock, user)
    closed = set_windows(hybrid_model(ttt_placement(alpha=0.0)), ttt_context=7).eval()
    assert torch.equal(generate(closed, user), expected)
    model = ready()
    set_windows(model, ttt_context=7)
    with without_ttt(model):
        assert torch.equal(generate(model, user), expected)
    assert not torch.equal(generate(model, user), expected)


class Operators(TorchDispatchMode):
    """Every operator with the shapes that it is given, how many read a value on the host, and the
    devices of all tensors that go in or come out."""

    HOST_READS = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)

    def __init__(self):
        super().__init__()
        self.calls, self.host_reads, self.devices = [], 0, set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        shapes = [list(a.shape) if torch.is_tensor(a) else None for a in args]
        self.calls.append((str(func), shapes))
        self.host_reads += func in self.HOST_READS
        out = func(*args, **(kwargs or {}))
        tensors = [t for t in tree_leaves((args, kwargs, out)) if torch.is_tensor(t)]
        self.devices |= {t.device.type for t in tensors}
        return out


@pytest.mark.parametrize("inner", ["mlp", "linear", "deep"])
@torch.no_grad()
def test_all_steps_are_the_same_operators_and_none_reads_a_value_on_the_host(inner):
    """First frame, mini-batch borders, idle lanes and resets: what a CUDA graph asks for."""
    model, codes = ready(inner), clean_codes(2, 20)
    with model.streaming(2):
        first = None
        for t in range(20):
            if t == 11:
                with Operators() as reset:
                    model.reset_streaming(torch.tensor([True, False]))
                assert reset.host_reads == 0
            model.set_exec_mask(torch.tensor([True, t % 3 != 0]))
            with Operators() as operators:
                model.forward_text(codes[:, :, t : t + 1])
            assert operators.host_reads == 0
            first = first or operators.calls
            assert operators.calls == first, t
    assert len(first) > 100


@pytest.mark.parametrize("inner", ["mlp", "linear", "deep"])
@torch.no_grad()
def test_a_step_makes_no_tensor_on_the_host(inner):
    """A graph can't record copies from the host. The meta device stands for any but the CPU."""
    model = ready(inner).to("meta")
    codes = torch.zeros(2, 17, 1, dtype=torch.int64, device="meta")
    mask = torch.ones(2, dtype=torch.bool, device="meta")
    with model.streaming(2), Operators() as operators:
        model.forward_text(codes)
        model.reset_streaming(mask)
        model.set_exec_mask(mask)
    assert operators.devices == {"meta"}
    # Scalars among tensors are told apart from tensors only where they become some.
    names = {name for name, _ in operators.calls}
    assert "aten.where.self" in names
    assert "aten.where.ScalarSelf" not in names


@pytest.mark.parametrize("inner", ["mlp", "linear", "deep"])
@torch.no_grad()
def test_a_recorded_step_can_be_replayed(inner):
    """As a CUDA graph does it: the first step's operators, again and again on the same tensors."""
    model, codes = ready(inner), clean_codes(3, 41)
    masks = torch.rand(41, 3, generator=torch.Generator().manual_seed(2)) < 0.7

    def stream(replayed: bool) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
        logits = []
        with model.streaming(3):
            run = model.forward_text
            if replayed:
                # Recording runs the step once.
                run = make_fx(model.forward_text)(codes[:, :, :1])
                model.reset_streaming()
            for t in range(41):
                if t == 23:
                    model.reset_streaming(torch.tensor([False, True, False]))
                model.set_exec_mask(masks[t])
                logits.append(run(codes[:, :, t : t + 1])[1])
            return logits, [copies(state) for state in states(model)]

    expected, states_expected = stream(replayed=False)
    found, states_found = stream(replayed=True)
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
    for a, b in zip(states_expected, states_found, strict=True):
        assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
@pytest.mark.parametrize("inner", ["mlp", "linear", "deep"])
def test_cuda_graphs_give_the_tokens_of_eager_steps(inner, monkeypatch):
    """LMGen records its second step and replays it; a reset comes in the middle."""
    model, user = ready(inner).cuda(), clean_codes(2, 40)[:, 9:].cuda()

    def run() -> Tensor:
        generator = LMGen(model, use_sampling=False)
        found = []
        with generator.streaming(2):
            for t in range(40):
                if t == 21:
                    generator.reset_streaming()
                tokens = generator.step(user[:, :, t : t + 1])
                if tokens is not None:
                    found.append(tokens.clone())
        return torch.cat(found, dim=2)

    recorded = run()
    monkeypatch.setenv("NO_CUDA_GRAPH", "1")
    assert torch.equal(recorded, run())
