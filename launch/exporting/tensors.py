"""A checkpoint's weights under the names and in the shapes of a release, one at a time.

Adapters are merged into the weights that they adapt, or written by themselves.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import torch
from torch import Tensor

from parallel.checkpoint import CheckpointError
from parallel.checkpoint_files import SavedTensors
from ttt_dist.moshi.block import TTTMoshi
from ttt_dist.moshi.build import is_ttt_parameter
from ttt_dist.moshi.errors import collapse_numbers
from ttt_dist.moshi.lora import add_product, is_adapter_parameter, released_name
from ttt_dist.moshi.packed import stock_state_dict
from ttt_dist.moshi.tensor_writer import TensorSpec

_PREFIX = "model."
_ADAPTED = ".frozen_W.weight"


class TrainedTensors:
    """What a checkpoint holds of a model, for a release.

    Args:
        checkpoint: a folder `step-NNNNNN`.
        model: the run's, on the meta device; of it names and shapes are taken.
        merged_with: the scaling with which adapters are merged into their weights; None keeps them
            apart.

    Raises:
        CheckpointError: the checkpoint is damaged, or doesn't hold this model's tensors.
    """

    def __init__(self, checkpoint: Path, model: TTTMoshi, merged_with: float | None) -> None:
        self._saved = SavedTensors(checkpoint)
        self._scaling = merged_with
        wanted = {name: tuple(value.shape) for name, value in model.state_dict().items()}
        _check(checkpoint, self._saved, wanted)
        self._names = {released_name(name): name for name in wanted}

    def read(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """The released tensor `name`, as `shape`, in the saved dtype; merged with adapters, in the
        widest of theirs and its own.

        Raises:
            CheckpointError: its bytes cannot be read.
        """
        own = self._names[name]
        value = self._saved.read(_PREFIX + own).reshape(shape)
        if self._scaling is None or not own.endswith(_ADAPTED):
            return value
        layer = _PREFIX + own.removesuffix(_ADAPTED)
        down = self._saved.read(f"{layer}.lora_A.weight")  # [rank, inputs]
        up = self._saved.read(f"{layer}.lora_B.weight").flatten(0, -2)  # [outputs, rank]
        return add_product(value, down, up, self._scaling)


def tensor_specs(
    model: TTTMoshi,
    *,
    base_only: bool,
    dtype: torch.dtype,
    adapters_for: Collection[str] | None = None,
) -> dict[str, TensorSpec]:
    """Name to shape and dtype of a model's tensors in a release: Moshi's are stock moshi's own.

    Args:
        base_only: leave TTT's tensors out, which are float32.
        dtype: of Moshi's tensors.
        adapters_for: what was trained alone, adapters too, and those of these names, which the
            base doesn't have so; None for all tensors but adapters.
    """
    trained = {name for name, value in model.named_parameters() if value.requires_grad}
    specs = {}
    for name, value in stock_state_dict(model).items():
        is_ttt, released = is_ttt_parameter(name), released_name(name)
        if adapters_for is None:
            wanted = not is_adapter_parameter(name)
        else:
            wanted = name in trained or released in adapters_for
        if wanted and not (is_ttt and base_only):
            own = torch.float32 if is_ttt else dtype
            specs[released] = TensorSpec(tuple(value.shape), own)
    return specs


def _check(checkpoint: Path, saved: SavedTensors, wanted: dict[str, tuple[int, ...]]) -> None:
    """The checkpoint holds the wanted tensors of a model, no others, in their shapes."""
    names = {name: shape for name, shape in saved.shapes().items() if name.startswith(_PREFIX)}
    found = {name.removeprefix(_PREFIX): shape for name, shape in names.items()}
    shapes = [
        f"{name} {list(found[name])} instead of {list(wanted[name])}"
        for name in sorted(found.keys() & wanted.keys())
        if found[name] != wanted[name]
    ]
    kinds = {
        "missing": collapse_numbers(wanted.keys() - found.keys()),
        "unexpected": collapse_numbers(found.keys() - wanted.keys()),
        "of another shape": shapes,
    }
    problems = [f"{kind}: {', '.join(names)}" for kind, names in kinds.items() if names]
    if problems:
        raise CheckpointError(
            f"{checkpoint} doesn't fit the model of the run's config.yaml: {'; '.join(problems)}"
        )
