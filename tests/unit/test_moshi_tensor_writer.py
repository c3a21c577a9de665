"""A `.safetensors` file written tensor by tensor is the library's own."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from ttt_dist.moshi import tensor_writer
from ttt_dist.moshi.tensor_writer import TensorSpec, TensorWriter

VALUES = {
    "b.weight": torch.randn(7, 3, generator=torch.Generator().manual_seed(0)),
    "a.odd": torch.arange(5).to(torch.bfloat16),
    "c.scalar": torch.tensor(2.5),
    "z.half": torch.ones(4, 2, dtype=torch.bfloat16),
    "empty": torch.empty(0, 3),
}
SPECS = {name: TensorSpec(tuple(value.shape), value.dtype) for name, value in VALUES.items()}


def test_the_file_is_the_librarys(tmp_path, monkeypatch):
    """Written in pieces of 4 elements, so that tensors have several."""
    monkeypatch.setattr(tensor_writer, "_PIECE", 4)
    path = tmp_path / "written.safetensors"
    with TensorWriter(path, SPECS, {"format": "pt"}) as writer:
        for name in writer.order:
            writer.write(name, VALUES[name])
    save_file(VALUES, tmp_path / "library.safetensors", metadata={"format": "pt"})
    assert path.read_bytes() == (tmp_path / "library.safetensors").read_bytes()


def test_values_are_cast_and_strides_followed(tmp_path):
    path = tmp_path / "cast.safetensors"
    value = torch.randn(3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with TensorWriter(path, {"x": TensorSpec((5, 3), torch.bfloat16)}, {}) as writer:
        writer.write("x", value.T)
    assert torch.equal(load_file(path)["x"], value.T.to(torch.bfloat16))


def test_nothing_is_left_out_or_out_of_turn(tmp_path):
    first, second = "b.weight", "c.scalar"
    specs = {name: SPECS[name] for name in (first, second)}
    with TensorWriter(tmp_path / "1", specs, {}) as writer:
        assert list(writer.order) == [first, second]
        for name, value in ((second, VALUES[second]), (first, VALUES[first].T)):
            with pytest.raises(ValueError, match="next is"):
                writer.write(name, value)
        writer.write(first, VALUES[first])
        with pytest.raises(ValueError, match="next is"):
            writer.write(first, VALUES[first])
        writer.write(second, VALUES[second])
    unfinished = TensorWriter(tmp_path / "2", specs, {})
    with pytest.raises(ValueError, match=f"never written: {first}, {second}"), unfinished:
        pass
    with pytest.raises(FileExistsError):
        TensorWriter(tmp_path / "1", specs, {})
