"""Pieces of a recording, one after the other, are the recording in one piece."""

from contextlib import contextmanager

import pytest
import torch

from parallel.activation import checkpoint_layers
from parallel.carry import empty_carry
from tests.distributed.tiny import random_codes
from tests.distributed.training import OneRank
from tests.unit.moshi_cases import active_hybrid_model, set_windows
from ttt_dist.layer import TTTLayer
from ttt_dist.moshi.block import TTTMoshi
from ttt_dist.moshi.build import without_ttt
from ttt_dist.moshi.carry import Carry, LayerCarry, LayerPassage

# Moshi's norms and its rope compute in float32 whatever the model's dtype, and rope's angles are
# those of other places at the same distance: sums of float32 roundings, 5e-7 as measured.
TOLERANCE = 2e-6
PIECE, PIECES = 16, 3  # two mini-batches of 8; attention sees 5 and 7 frames


@pytest.fixture
def model() -> TTTMoshi:
    return set_windows(active_hybrid_model(dtype=torch.float64)).double()


def empty(model, lanes):
    return empty_carry(model, lanes, OneRank(), dtype=torch.float64, device="cpu")


def pass_pieces(model, steps, begins=None, tbptt=PIECES):
    """Losses by step of pieces in a row, and the carry; `begins` by piece, the first by default."""
    lanes = len(steps)
    begins = begins or [[piece == 0] * lanes for piece in range(PIECES)]
    carry = empty(model, lanes)
    texts, audios = [], []
    for piece in range(PIECES):
        part = steps[:, :, piece * PIECE : (piece + 1) * PIECE + 1]
        with model.passing(carry, torch.tensor(begins[piece])) as passage:
            text, audio = model.step_losses(part)
        carry = passage.carry
        if (piece + 1) % tbptt == 0:
            carry = carry.detach()
        texts.append(text)
        audios.append(audio)
    return torch.cat(texts, dim=2), torch.cat(audios, dim=2), carry


def total(losses):
    return losses[0].sum() + losses[1].sum()


def gradients(model, loss):
    """Gradients of all parameters, which are then cleared."""
    loss.backward()
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def largest_difference(found, expected):
    assert found.keys() == expected.keys()
    assert len(found) > 0
    return max(((found[n] - e).norm() / e.norm()).item() for n, e in expected.items())


def compare_with_one_piece(model):
    """The largest differences, of losses and of gradients, that two recordings show."""
    steps = model.steps(random_codes(2, PIECE * PIECES))
    whole = model.step_losses(steps)
    expected = gradients(model, total(whole))
    text, audio, _ = pass_pieces(model, steps)
    losses = max((text - whole[0]).abs().max().item(), (audio - whole[1]).abs().max().item())
    return losses, largest_difference(gradients(model, total((text, audio))), expected)


@pytest.mark.parametrize("recompute", ["none", "layer", "selective"])
def test_pieces_in_a_row_are_one_piece_in_losses_and_every_gradient(model, recompute):
    checkpoint_layers(model, recompute)
    losses, every_gradient = compare_with_one_piece(model)
    assert losses < TOLERANCE
    assert every_gradient < TOLERANCE


@contextmanager
def planted(owner, name, value):
    before = owner.__dict__[name]
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def test_a_window_that_is_cut_at_borders_is_found(model):
    """Planted: attention forgets at each border."""
    cut = property(lambda self: self.before.window.reset(torch.ones_like(self.begins)))
    with planted(LayerPassage, "window", cut):
        losses, _ = compare_with_one_piece(model)
    assert losses > 100 * TOLERANCE


def test_windows_of_ttt_layers_that_are_not_set_are_found(model):
    """Planted: TTT layers see as far as the others; borders alone wouldn't show it."""
    steps = model.steps(random_codes(2, PIECE * PIECES))
    expected = model.step_losses(steps)[0]
    found, _, _ = pass_pieces(set_windows(model, ttt_context=7), steps)
    assert (found - expected).abs().max() > 100 * TOLERANCE


def test_lanes_begin_anew_where_a_recording_begins(model):
    """Lane 1 takes a new recording at its second piece, which knows nothing of the first."""
    steps = model.steps(random_codes(2, PIECE * PIECES))
    second = model.steps(random_codes(1, PIECE * (PIECES - 1), seed=3))
    steps[1, :, PIECE:] = second[0]
    begins = [[True, True], [False, True], [False, False]]
    whole, alone = model.step_losses(steps[:1])[0], model.step_losses(second)[0]
    text, _, _ = pass_pieces(model, steps, begins)
    assert (text[:1] - whole).abs().max() < TOLERANCE
    assert (text[1:, :, PIECE:] - alone).abs().max() < TOLERANCE
    # Planted: states that aren't reset at a recording's border.
    text, _, _ = pass_pieces(model, steps)
    assert (text[1:, :, PIECE:] - alone).abs().max() > 100 * TOLERANCE
    # Planted: the state written into the parameters, where the next recording begins with it.
    original = TTTLayer.forward

    def writing(layer, *arguments, **keywords):
        y, state = original(layer, *arguments, **keywords)
        for parameter, value in zip(layer.inner_parameters(), state.weights, strict=True):
            parameter.data = value[0].detach()
        return y, state

    with planted(TTTLayer, "forward", writing):
        text, _, _ = pass_pieces(model, steps, begins)
    assert (text[1:, :, PIECE:] - alone).abs().max() > 100 * TOLERANCE


def test_truncated_gradients_go_back_to_the_cut_and_no_further(model):
    """Losses don't change; gradients do, and only the first piece's reach the initial weights."""
    steps = model.steps(random_codes(2, PIECE * PIECES))
    whole = pass_pieces(model, steps)
    through_all = gradients(model, total(whole[:2]))
    cut = pass_pieces(model, steps, tbptt=1)
    assert torch.equal(cut[0], whole[0])
    truncated = gradients(model, total(cut[:2]))
    assert largest_difference(truncated, through_all) > 0.01
    of_first = gradients(model, total(model.step_losses(steps[:, :, : PIECE + 1])))
    for layer in (1, 2):
        for name in ("W1", "b1", "W2", "b2"):
            key = f"transformer.layers.{layer}.ttt.layer.{name}"
            assert (truncated[key] - of_first[key]).norm() < TOLERANCE * of_first[key].norm(), key


def test_states_are_lanes_of_their_own_and_never_parameters(model):
    before = {name: value.clone() for name, value in model.named_parameters()}
    steps = model.steps(random_codes(2, PIECE * PIECES))
    _, _, carry = pass_pieces(model, steps, tbptt=1)
    after = dict(model.named_parameters())
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    for layer, part in zip(model.transformer.layers, carry.layers, strict=True):
        assert part.window.length.tolist() == [layer.self_attn.context - 1] * 2
        if layer.ttt is None:
            assert part.inner is None
            continue
        for initial, inner in zip(layer.ttt.layer.inner_parameters(), part.inner, strict=True):
            assert inner.shape == (2, *initial.shape)
            assert not torch.equal(inner[0], inner[1])
            assert not any(torch.equal(lane, initial) for lane in inner)


def test_without_ttt_the_inner_weights_are_handed_on_untouched(model):
    steps = model.steps(random_codes(2, PIECE * PIECES))
    with without_ttt(model), torch.no_grad():
        whole = model.step_losses(steps)
        text, _, carry = pass_pieces(model, steps)
    assert (text - whole[0]).abs().max() < TOLERANCE
    assert not any(t.any() for part in carry.layers for t in part.inner or ())


def test_inner_weights_may_begin_anew_while_attention_goes_on(model):
    """As if the piece before had left the learned weights, beside its own window."""
    steps = model.steps(random_codes(2, PIECE * PIECES))
    _, _, carry = pass_pieces(model, steps, tbptt=1)
    learned = []
    for layer, part in zip(model.transformer.layers, carry.layers, strict=True):
        inner = part.inner
        if layer.ttt is not None:
            inner = tuple(p.expand(2, *p.shape) for p in layer.ttt.layer.inner_parameters())
        learned.append(LayerCarry(part.window, inner))
    part, none = steps[:, :, -PIECE - 1 :], torch.tensor([False, False])

    def losses(carry, *begins):
        with torch.no_grad(), model.passing(carry, *begins):
            return model.step_losses(part)[0]

    found = losses(carry, none, torch.tensor([True, False]))
    expected, carried = losses(Carry(tuple(learned)), none), losses(carry, none)
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], carried[1])
    assert (found[0] - carried[0]).abs().max() > 100 * TOLERANCE
    windowless = losses(carry, torch.tensor([True, False]))
    assert (found[0] - windowless[0]).abs().max() > 100 * TOLERANCE


def test_a_passage_ends_with_its_forward(model):
    with model.passing(empty(model, 2), torch.tensor([True, True])) as passage:
        assert all(layer.passage is not None for layer in model.transformer.layers)
    with pytest.raises(RuntimeError, match="no forward"):
        _ = passage.carry
    assert all(layer.passage is None for layer in model.transformer.layers)


def test_an_unlimited_window_is_refused(model):
    model.transformer.layers[0].self_attn.context = None
    with pytest.raises(ValueError, match="unlimited"):
        empty(model, 2)
