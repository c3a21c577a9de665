"""A small Mimi whose codes say something about the demo speech, without training.

Mimi's encoder with default random weights averages the waveform away, and its codebooks start at
zero, so that every frame gets the same code. Here the same architecture, narrower, gets

- an encoder of random weights with the shape of a filter bank: the early convolutions are band-pass
  filters with random phases and mixing, ELU rectifies them, the late ones average over time. Layer
  by layer the outputs are scaled to a given standard deviation on speech (as in LSUV, Mishkin and
  Matas 2015, arXiv:1511.06422);
- input projections that whiten the latents of the demo speech (principal components);
- codebooks fitted to those latents by k-means, each residual level to what the one before leaves.

Codes then separate silence from speech and sound from sound. The decoder keeps its random weights:
it runs, but what it says is noise.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from moshi.models.compression import MimiModel
from moshi.models.loaders import _mimi_config, get_mimi
from moshi.quantization import SplitResidualVectorQuantizer
from moshi.quantization.vq import ResidualVectorQuantizer
from moshi.utils.compile import no_compile
from torch import Tensor, nn

NUM_CODEBOOKS = 8
BINS = 128
_DIMENSION = 64
_CODE_DIMENSION = 32
_SEMANTIC_COMPONENTS = 12  # principal components that the first codebook sees; the others see all
_BAND_HZ = (100.0, 3000.0)  # F0 to F3
# Standard deviation after the first convolution, the four strided ones, the last; ELU is close to
# linear below 1 and rectifies above: at 1.2 kHz (after the second strided one) it must rectify.
_STAGE_STD = (1.0, 1.0, 4.0, 2.0, 2.0, 1.0)
_RESIDUAL_STD = 0.5
_CALIBRATION_SEC = 8


def mimi_config() -> dict[str, Any]:
    """Mimi's own configuration with fewer channels, layers and codebooks; plain JSON values."""
    seanet = {**_mimi_config["seanet"], "dimension": _DIMENSION, "n_filters": 4}
    ends = {"input_dimension": _DIMENSION, "output_dimension": _DIMENSION}
    quantizer = {"dimension": _CODE_DIMENSION, "n_q": NUM_CODEBOOKS, "bins": BINS, **ends}
    transformer = {
        **_mimi_config["transformer"],
        "d_model": _DIMENSION,
        "num_heads": 4,
        "num_layers": 2,
        "dim_feedforward": 2 * _DIMENSION,
        "input_dimension": _DIMENSION,
        "output_dimensions": [_DIMENSION],
    }
    parts = {"seanet": seanet, "quantizer": quantizer, "transformer": transformer}
    return {**_mimi_config, **parts}


@torch.no_grad()
def fit_mimi(recordings: list[Tensor], seed: int) -> MimiModel:
    """Build the codec for `recordings`, each `[channels, n]` float32 in [-1, 1] at 24 kHz.

    The result depends on the recordings, `seed` and, in the last bits, the machine's arithmetic;
    the global random state is left as it was.
    """
    with torch.random.fork_rng(devices=[]), no_compile():
        torch.manual_seed(seed)
        model = get_mimi(None, mimi_config(), num_codebooks=NUM_CODEBOOKS)
        generator = torch.Generator().manual_seed(seed)
        head = _CALIBRATION_SEC * model.sample_rate
        _design_encoder(model, torch.cat([r[:, None, :head] for r in recordings[:2]]), generator)
        frames = torch.cat(
            [
                model._encode_to_unquantized_latent(recording[:, None])
                .transpose(1, 2)
                .flatten(0, 1)
                for recording in recordings
            ]
        )  # [N, _DIMENSION]
        _fit_quantizer(model.quantizer, frames, generator)
    return model


def _design_encoder(model: MimiModel, audio: Tensor, generator: torch.Generator) -> None:
    """Overwrite the weights of all convolutions up to the 12.5 Hz latents; `audio` `[B, 1, n]`."""
    convs = [module for module in model.encoder.modules() if isinstance(module, nn.Conv1d)]
    first, *blocks, last = convs  # blocks: per stride two residual convolutions and the strided one
    stages = [(blocks[i], blocks[i + 1], blocks[i + 2]) for i in range(0, len(blocks), 3)]
    rate = float(model.sample_rate)

    def draw(conv: nn.Conv1d, std: float, band_pass: bool) -> None:
        out, inner, kernel = conv.weight.shape
        mixing = torch.randn(out, inner, 1, generator=generator)
        window = torch.hann_window(kernel + 2)[1:-1].expand(out, 1, kernel)
        if band_pass:
            low, high = _BAND_HZ
            hertz = low * (high / low) ** torch.linspace(0, 1, out)[:, None, None]
            phase = 2 * math.pi * torch.rand(out, 1, 1, generator=generator)
            window = window * torch.cos(2 * math.pi * hertz / rate * torch.arange(kernel) + phase)
        conv.weight.copy_(mixing * window)
        if conv.bias is not None:
            conv.bias.zero_()
        outputs: list[Tensor] = []
        hook = conv.register_forward_hook(lambda module, inputs, output: outputs.append(output))
        model._encode_to_unquantized_latent(audio)
        hook.remove()
        measured = outputs[0].std(dim=(0, 2)).clamp(min=1e-8)  # [out]
        conv.weight.mul_((std / measured)[:, None, None])

    draw(first, _STAGE_STD[0], band_pass=True)
    for index, (inner, outer, strided) in enumerate(stages):
        draw(inner, 1.0, band_pass=False)
        draw(outer, _RESIDUAL_STD, band_pass=False)
        draw(strided, _STAGE_STD[1 + index], band_pass=index < 2)
        rate /= strided.stride[0]
    draw(last, _STAGE_STD[-1], band_pass=False)
    draw(model.downsample.conv.conv.conv, 1.0, band_pass=False)


def _fit_quantizer(
    quantizer: SplitResidualVectorQuantizer, frames: Tensor, generator: torch.Generator
) -> None:
    """Fit projections and codebooks to `frames` `[N, D]`, in the form that moshi reads them."""
    centred = (frames - frames.mean(0)).double()
    variance, axes = torch.linalg.eigh(centred.T @ centred / len(centred))
    variance, axes = variance.flip(0)[:_CODE_DIMENSION], axes.flip(1)[:, :_CODE_DIMENSION]
    # Components below 2 % of the largest deviation are damped, not blown up to unit variance.
    std = variance.clamp(min=0).sqrt()
    whiten = (axes / (std + 0.02 * std[0])).T.float()  # [_CODE_DIMENSION, D]
    semantic = whiten.clone()
    semantic[_SEMANTIC_COMPONENTS:] = 0
    for part, projection in ((quantizer.rvq_first, semantic), (quantizer.rvq_rest, whiten)):
        part.input_proj.weight.copy_(projection[..., None])
        _fit_levels(part, frames @ projection.T, generator)


def _fit_levels(
    part: ResidualVectorQuantizer, residual: Tensor, generator: torch.Generator
) -> None:
    for level in part.vq.layers:
        centroids, counts = kmeans(residual, BINS, generator)
        codebook = level._codebook
        codebook.cluster_usage.copy_(counts)
        codebook.embedding_sum.copy_(centroids * counts[:, None])
        codebook._initialized.fill_(1)
        residual = residual - codebook.decode(codebook.encode(residual))


def kmeans(
    points: Tensor, k: int, generator: torch.Generator, iterations: int = 20
) -> tuple[Tensor, Tensor]:
    """Lloyd's algorithm from k-means++ seeds (Arthur and Vassilvitskii 2007).

    Args:
        points: `[N, d]`, with at least `k` different rows.
        k: number of clusters; none ends empty.

    Returns:
        Centroids `[k, d]` and the number of points in each `[k]`, both in `points`' dtype.
    """
    chosen = [int(torch.randint(len(points), (1,), generator=generator))]
    nearest = (points - points[chosen[0]]).square().sum(1)
    while len(chosen) < k:
        chosen.append(int(torch.multinomial(nearest, 1, generator=generator)))
        nearest = torch.minimum(nearest, (points - points[chosen[-1]]).square().sum(1))
    centroids = points[chosen]
    for _ in range(iterations):
        distance, label = torch.cdist(points, centroids).min(1)
        counts = torch.bincount(label, minlength=k)
        empty = (counts == 0).nonzero()[:, 0]
        if len(empty):  # an empty cluster takes one of the points that are served worst
            worst = distance.topk(len(empty)).indices
            label[worst] = empty
            counts = torch.bincount(label, minlength=k)
        sums = torch.zeros_like(centroids).index_add_(0, label, points)
        centroids = sums / counts.clamp(min=1)[:, None]
    return centroids, counts.clamp(min=1).to(points.dtype)
