"""Where a step's numbers went wrong: the first layer and tensor that isn't finite."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from launch.step import Microbatches
from parallel.reduce import highest_over_ranks
from ttt_dist.moshi.block import HybridStreamingTransformerLayer, TTTMoshi
from ttt_dist.moshi.build import depformer_layers, transformer_layers
from ttt_dist.moshi.probe import probing
from ttt_dist.reading import Reading

# A layer's parts as its backward comes to them, after feed-forward; by the start of their names.
_LAYER_BACKWARD = (
    *("ttt.alpha", "ttt.layer.wo", "ttt.layer.post_norm", "ttt.layer.W", "ttt.layer.b", "ttt."),
    *("cross_attention", "norm_cross", "layer_scale_1", "self_attn", "norm1"),
)


class _Look:
    """Remembers the first tensor that isn't finite, and how many came before it."""

    def __init__(self) -> None:
        self.found: tuple[int, str] | None = None
        self._looked = 0

    def at(self, name: str, value: Tensor) -> None:
        if self.found is None and not value.isfinite().all():
            self.found = (self._looked, name)
        self._looked += 1


def where_not_finite(
    model: TTTMoshi, microbatches: Microbatches, losses: Tensor, grad_norm: float
) -> str | None:
    """The first tensor that isn't finite in a step that was computed; all ranks call it together.

    The last microbatch whose loss isn't finite on some rank is computed once more, without
    gradients. Where it is finite then, the gradients tell: the first that isn't, in the backward's
    order.

    Args:
        losses: `[M]`, of this rank's microbatches.
        grad_norm: of the step; gradients are as the backward left them.

    Returns:
        Layer and tensor, for a person; None where all is finite.
    """
    broken = [i + 1 for i, good in enumerate(losses.isfinite().tolist()) if not good]
    is_norm = not torch.tensor(grad_norm).isfinite()
    last, any_norm = highest_over_ranks([max(broken, default=0), is_norm])
    if last:
        place = _first_of_ranks(first_not_finite(model, microbatches, last - 1))
        if place is not None:
            return place
    elif not any_norm:
        return None
    place = _first_of_ranks(first_gradient_not_finite(model))
    again = "the forward, computed again, is finite; " if last else ""
    return None if place is None else f"{again}gradient of {place}"


def first_not_finite(
    model: TTTMoshi, microbatches: Microbatches, index: int
) -> tuple[int, str] | None:
    """The first tensor of this microbatch's forward that isn't finite, and its place in the order.

    Layers run without compilation. FSDP2 gathers as ever: all ranks call it together.
    """
    look = _Look()

    def probe(number: int, reading: Reading) -> None:
        for name, value in reading.tensors().items():
            look.at(f"layer {number} TTT: {name}", value)

    # Probing takes wrappers off; what looks at a layer's parts is put on after that.
    with torch.no_grad(), probing(model, probe), ExitStack() as stack:
        for name, module in _outside_of_layers(model).items():
            hook = module.register_forward_hook(_hook(look, name))
            stack.callback(hook.remove)
        named = {"layer": transformer_layers(model), "Depformer layer": depformer_layers(model)}
        for kind, layers in named.items():
            for number, layer in enumerate(layers):
                stack.enter_context(layer.unwrapped())
                stack.enter_context(_looked_at(layer, f"{kind} {number}", look))

        for number, layer in enumerate(transformer_layers(model)):
            if layer.ttt is not None:
                hook = layer.ttt.layer.register_forward_hook(
                    _hook(look, f"layer {number} TTT: output")
                )
                stack.callback(hook.remove)

        text, audio = microbatches.aside(model, index)
        look.at("text loss", text)
        look.at("audio loss", audio)
    return look.found


def first_gradient_not_finite(model: TTTMoshi) -> tuple[int, str] | None:
    """The first parameter, in the backward's order, whose gradient isn't finite on this rank."""
    look = _Look()
    for name, parameter in sorted(model.named_parameters(), key=_backward_order):
        if parameter.grad is not None:
            grad = parameter.grad
            look.at(name, grad.to_local() if isinstance(grad, DTensor) else grad)
    return look.found


def _backward_order(named: tuple[str, Any]) -> tuple[int, int, int]:
    """Heads and Depformer, then the layers from the last on, then embeddings."""
    kind, _, rest = named[0].partition(".")
    if kind != "transformer":
        stage = {"linears": 0, "depformer_norms": 0, "emb": 3, "text_emb": 3}
        return stage.get(kind, 1), 0, 0
    _, number, part = rest.split(".", 2)
    place = next((i for i, each in enumerate(_LAYER_BACKWARD) if part.startswith(each)), -1)
    return 2, -int(number), place


def _first_of_ranks(found: tuple[int, str] | None) -> str | None:
    everywhere: list[tuple[int, str] | None] = [None] * dist.get_world_size()
    dist.all_gather_object(everywhere, found)
    places = [place for place in everywhere if place is not None]
    return min(places)[1] if places else None


def _outside_of_layers(model: TTTMoshi) -> dict[str, nn.Module]:
    """Embeddings, projections, norms and heads, by name."""
    return {
        name: module
        for name, module in model.named_modules()
        if name and not next(module.children(), None) and ".layers." not in name
    }


def _hook(look: _Look, name: str) -> Callable[[nn.Module, Any, Any], None]:
    def hook(module: nn.Module, arguments: Any, output: Any) -> None:
        look.at(name, _tensor(output))

    return hook


def _tensor(output: Any) -> Tensor:
    """What a module or part hands on, without what it remembers."""
    return output[0] if isinstance(output, tuple) else output


@contextmanager
def _looked_at(layer: HybridStreamingTransformerLayer, name: str, look: _Look) -> Iterator[None]:
    """The layer's parts: attention, what TTT's gate lets through, feed-forward."""
    parts: list[tuple[nn.Module, str, str]] = [
        (layer, "_attend", "attention"),
        (layer, "_ff_block", "feed-forward"),
    ]
    if layer.ttt is not None:
        parts.append((layer.ttt, "gate", "TTT: gate"))

    def looking(part: Callable[..., Any], named: str) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            output = part(*args, **kwargs)
            look.at(named, _tensor(output))
            return output

        return run

    for module, part, called in parts:
        setattr(module, part, looking(getattr(module, part), f"{name} {called}"))
    try:
        yield
    finally:
        for module, part, _ in parts:
            delattr(module, part)
