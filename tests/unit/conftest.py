"""Which code runs scans of TTT-MLP on a CPU."""

import pytest

from ttt_dist.ops import native


@pytest.fixture
def tensor_code(monkeypatch):
    """Tensor code, which everything but a CPU runs."""
    monkeypatch.setenv(native.SWITCH, "0")


@pytest.fixture
def cpp_kernels():
    """C++ kernels, where there is a compiler."""
    if native.compiler() is None:
        pytest.skip("no C++ compiler here")
    assert native.library().functions is not None, native.library().told


@pytest.fixture(params=["cpp_kernels", "tensor_code"])
def either_code(request):
    """One after the other."""
    request.getfixturevalue(request.param)
