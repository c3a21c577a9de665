"""A conversation that is saved and taken up again is the one that was never interrupted."""

from __future__ import annotations

import dataclasses
import json
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from moshi.modules.streaming import State
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from launch.errors import UserError
from launch.model_source import open_source
from launch.talking.conversation import Conversation
from launch.talking.conversation_file import (
    Identity,
    SavedConversation,
    check_new,
    save_conversation,
)
from launch.talking.talker import Talker, load_talker
from tests.unit.release_cases import write_ttt_release
from ttt_dist.data.audio import FRAME_SAMPLES
from ttt_dist.moshi.fingerprint import fingerprint
from ttt_dist.moshi.stream_state import STATE_PARTS, stream_tensors

FRAMES = 40  # five mini-batches of 8, over three windows of 10 and 12 frames
LIKELIEST = {"temp": 0.0, "temp_text": 0.0}
SAMPLED = {"temp": 0.8, "temp_text": 0.7}
USER = np.random.default_rng(0).normal(0, 0.1, (FRAMES, FRAME_SAMPLES)).astype(np.float32)
Answers = list[tuple[str, np.ndarray] | None]


@pytest.fixture(scope="module")
def talker(demo_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Talker:
    folder = write_ttt_release(demo_base, tmp_path_factory.mktemp("release") / "with-ttt")
    return load_talker(open_source(folder, None, torch.device("cpu")))


def identity_of(talker: Talker) -> Identity:
    return Identity(talker.weights_fingerprint(), talker.settings)


def answers(conversation: Conversation, frames: np.ndarray) -> Answers:
    return [conversation.hear(frame) for frame in frames]


def same(found: Answers, expected: Answers) -> bool:
    """To the last bit."""
    return len(found) == len(expected) and all(
        a is b is None
        or (a is not None and b is not None and a[0] == b[0] and (a[1] == b[1]).all())
        for a, b in zip(found, expected, strict=True)
    )


@pytest.mark.parametrize("sampling", [LIKELIEST, SAMPLED], ids=["likeliest", "sampled"])
def test_saved_and_taken_up_equals_an_uninterrupted_stream(talker, tmp_path, sampling):
    """Bit for bit: after the first frame, at and between the borders of mini-batches."""
    identity, states = identity_of(talker), {}
    torch.manual_seed(3)
    with Conversation(talker.model, talker.codec, sampling) as conversation:
        whole = []
        for number, frame in enumerate(USER, 1):
            whole.append(conversation.hear(frame))
            if number in (1, 8, 29):
                states[number] = tmp_path / f"after-{number}"
                save_conversation(states[number], conversation.state(), identity, number)
    for number, path in states.items():
        with Conversation(talker.model, talker.codec, sampling) as other:
            torch.manual_seed(99)
            answers(other, USER[:3])  # what it has heard is forgotten
            saved = SavedConversation(path)
            assert saved.frames == number
            other.take_up(saved.read(identity, other.state()))
            assert same(answers(other, USER[number:]), whole[number:])


def test_a_half_spelt_character_belongs_to_it(talker):
    with Conversation(talker.model, talker.codec, LIKELIEST) as first:
        first._words.pending = "€".encode()[:2]
        state = {name: value.clone() for name, value in first.state().items()}
    with Conversation(talker.model, talker.codec, LIKELIEST) as second:
        assert second._words.pending == b""
        second.take_up(state)
        assert second._words.pending == "€".encode()[:2]


PARTS = {
    "what Mimi heard": "mimi.encoder.",
    "Mimi's attention": "mimi.decoder_transformer.",
    "what Mimi said": "mimi.decoder.",
    "delayed tokens": "generator.",
    "attention": "model.transformer.layers.0.self_attn.kv_cache.cache",
    "inner networks": "model.transformer.layers.1.inner.W1",
    "pending updates": "model.transformer.layers.2.inner.pending_W2",
    "mini-batch in progress": "model.transformer.layers.2.inner.offset",
    "random numbers": "random",
}


def with_logits(talker: Talker, state: dict[str, Tensor], frames: np.ndarray) -> list[bytes]:
    """What a conversation answers from `state` on, and the text logits behind it: tokens alone
    needn't show a small difference at once."""
    found: list[Tensor] = []
    sampling = SAMPLED | {"on_text_logits_hook": lambda logits: found.append(logits.clone())}
    with Conversation(talker.model, talker.codec, sampling) as conversation:
        conversation.take_up(state)
        said = [answer[1] for answer in answers(conversation, frames) if answer is not None]
    return [part.tobytes() for part in (*said, *(logits.numpy() for logits in found))]


@pytest.fixture(scope="module")
def after_13(talker) -> tuple[dict[str, Tensor], dict[str, Tensor], list[bytes]]:
    """States at the start and after 13 frames, and what comes next."""
    torch.manual_seed(3)
    with Conversation(talker.model, talker.codec, SAMPLED) as conversation:
        start = {name: value.clone() for name, value in conversation.state().items()}
        answers(conversation, USER[:13])
        state = {name: value.clone() for name, value in conversation.state().items()}
    return start, state, with_logits(talker, state, USER[13:26])


@pytest.mark.parametrize("part", PARTS)
def test_no_part_of_it_can_be_left_out(talker, after_13, part):
    start, state, expected = after_13
    left_out = {name: start[name] for name in state if name.startswith(PARTS[part])}
    assert left_out
    assert with_logits(talker, state | left_out, USER[13:26]) != expected


def test_with_every_part_it_is_the_same(talker, after_13):
    _, state, expected = after_13
    assert with_logits(talker, state, USER[13:26]) == expected


def test_every_field_of_moshis_states_is_accounted_for(talker):
    """A newer moshi that remembers more is noticed here, not in what a conversation says."""
    general = {field.name for field in dataclasses.fields(State)}
    for cls, parts in STATE_PARTS.items():
        known = {*parts.tensors, *parts.counters, *parts.inner, *parts.own}
        assert {field.name for field in dataclasses.fields(cls)} - general == known, cls
    with pytest.raises(RuntimeError, match="isn't streaming"):
        stream_tensors(talker.model)


def test_a_state_of_an_unknown_kind_is_refused(talker):
    class More(State):
        """May hold anything."""

    with talker.model.streaming(1):
        talker.model.transformer._streaming_state = More(1, torch.device("cpu"))
        with pytest.raises(RuntimeError, match="More: a streaming state of an unknown kind"):
            stream_tensors(talker.model)


def test_fingerprints_see_every_element():
    """Of any dtype, in and after the first piece; and names, shapes and dtypes."""
    for dtype in (torch.bfloat16, torch.float32, torch.float64, torch.int64, torch.bool):
        value = torch.zeros(2**18 + 5, dtype=dtype)
        tensors = {"a": value, "b": torch.ones(3), "c": torch.ones(1, 0, 2)}
        seen = {fingerprint(tensors)}
        for place in (0, 1, 2**18 - 1, 2**18, 2**18 + 4):
            value[place] = 1
            seen.add(fingerprint(tensors))
        assert len(seen) == 6
    assert fingerprint(tensors) == fingerprint(dict(reversed(tensors.items())))
    others = [{"x": torch.ones(6)}, {"y": torch.ones(6)}, {"x": torch.ones(2, 3)}]
    others += [{"x": torch.ones(6).view(torch.int32)}, {"x": torch.ones(6), "y": torch.ones(0)}]
    assert len(set(map(fingerprint, others))) == 5
    swapped = torch.arange(7.0)[[0, 2, 1, 3, 4, 5, 6]]
    assert fingerprint({"x": swapped}) != fingerprint({"x": torch.arange(7.0)})


@pytest.fixture(scope="module")
def saved(talker, after_13, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("saved") / "state"
    save_conversation(path, after_13[1], identity_of(talker), 13)
    return path


def header_changed(path: Path, **changes: str) -> None:
    with safe_open(path, framework="pt") as opened:
        metadata = opened.metadata()
    save_file(load_file(path), path, metadata | changes)


def tensors_changed(path: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    with safe_open(path, framework="pt") as opened:
        metadata = opened.metadata()
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata)


def flip_last_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


SPOILT = {
    "a pickle": (lambda p: p.write_bytes(pickle.dumps({"a": 1})), "too few for the header"),
    "truncated": (lambda p: p.write_bytes(p.read_bytes()[:-9]), "fetch or copy it again"),
    "empty": (lambda p: p.write_bytes(b""), "too few for the header"),
    "a header bomb": (
        lambda p: p.write_bytes((2**22).to_bytes(8, "little") + b"{" + b" " * 2**22),
        "its header has 4,194,304 bytes, allowed are",
    ),
    "no conversation": (lambda p: save_file({"a": torch.ones(1)}, p), "is no saved conversation"),
    "another version": (lambda p: header_changed(p, version="2"), "is of version '2', allowed"),
    "no JSON": (lambda p: header_changed(p, settings="{"), "its settings are no JSON"),
    "no object": (lambda p: header_changed(p, settings="[]"), "its settings are no JSON object"),
    "no number": (lambda p: header_changed(p, frames="-1"), "its header lacks frames"),
    "another bit": (flip_last_bit, "its tensors aren't those that were saved"),
    "a tensor less": (
        lambda p: tensors_changed(p, lambda t: t.pop("random")),
        "its tensors aren't those of this model's state",
    ),
    "another shape": (
        lambda p: tensors_changed(p, lambda t: t.update(random=t["random"][1:].clone())),
        "its tensors aren't those of this model's state",
    ),
    "gone": (lambda p: p.unlink(), "is no file; allowed: what --save-state wrote"),
}


@pytest.mark.parametrize("kind", SPOILT)
def test_a_spoilt_file_is_refused(talker, after_13, saved, tmp_path, kind):
    path = tmp_path / "state"
    path.write_bytes(saved.read_bytes())
    spoil, why = SPOILT[kind]
    spoil(path)
    with pytest.raises(UserError) as refused:
        SavedConversation(path).read(identity_of(talker), after_13[1])
    (problem,) = refused.value.problems
    assert problem.startswith(f"--load-state: {path}")
    assert why in problem


def test_another_model_is_refused(talker, after_13, saved):
    right = identity_of(talker)
    read = SavedConversation(saved).read(right, after_13[1])
    assert all(torch.equal(value, after_13[1][name]) for name, value in read.items())

    weight = talker.model.text_linear.weight
    before = weight[0, 0].item()
    weight.data[0, 0] = before + 1e-3
    other = identity_of(talker)
    weight.data[0, 0] = before
    assert identity_of(talker) == right
    with pytest.raises(
        UserError, match=r"was saved with other weights \(fingerprint [0-9a-f]{12},"
    ):
        SavedConversation(saved).read(other, after_13[1])

    settings = talker.settings | {"layer 1 TTT base_lr": "1.0", "layer 0 attention context": "50"}
    with pytest.raises(UserError) as refused:
        SavedConversation(saved).read(Identity(right.weights, settings), after_13[1])
    assert "layer 1 TTT base_lr: 2.0, here 1.0" in str(refused.value)
    assert "layer 0 attention context: 12, here 50" in str(refused.value)
    assert refused.value.problems[0].count(", here ") == 2
    fewer = {key: value for key, value in settings.items() if key != "Mimi"}
    with pytest.raises(UserError, match=r"Mimi: [0-9a-f]+, here nothing"):
        SavedConversation(saved).read(Identity(right.weights, fewer), after_13[1])


def test_nothing_is_written_over_and_nothing_left_behind(talker, after_13, saved, tmp_path):
    assert check_new(tmp_path / "new") == []
    (exists,) = check_new(saved)
    assert "exists; nothing is ever overwritten" in exists
    (folder,) = check_new(tmp_path / "no" / "state")
    assert "no is no folder" in folder
    (tmp_path / "state").mkdir()
    with pytest.raises(UserError, match="can't be written"):
        save_conversation(tmp_path / "state", after_13[1], identity_of(talker), 13)
    assert [path.name for path in tmp_path.iterdir()] == ["state"]
    with safe_open(saved, framework="pt") as opened:
        settings = json.loads(opened.metadata()["settings"])
    assert settings["layer 2 TTT mini_batch_size"] == "8"
    assert settings["device"] == "cpu"
