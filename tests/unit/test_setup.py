"""What is said of the device that a run starts on."""

import pytest
import torch

from launch.config import DEFAULT_CONFIG, load_config
from launch.setup import device_warnings


@pytest.mark.parametrize(
    ("device", "built_for", "found", "warns"),
    [
        ("auto", "13.0", "cpu", True),
        ("auto", "13.0", "cuda", False),
        ("auto", None, "cpu", False),
        ("cpu", "13.0", "cpu", False),
    ],
)
def test_a_cpu_beside_a_gpu_build_of_torch_is_told(monkeypatch, device, built_for, found, warns):
    monkeypatch.setattr("torch.version.cuda", built_for)
    config = load_config(DEFAULT_CONFIG, [f"device={device}"])
    warnings = device_warnings(config, torch.device(found))
    assert len(warnings) == warns
    for warning in warnings:
        assert "torch is built for CUDA 13.0; check the driver and CUDA_VISIBLE_DEVICES" in warning
