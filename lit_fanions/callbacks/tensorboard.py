"""What SpectralMonitor writes to TensorBoard beside scalars: charts, histograms, figures."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch

from lit_fanions.callbacks import figures
from lit_fanions.callbacks.quantities import PREFIX, QUANTITIES, Tag, parse_tag

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Bounds and width of a histogram's buckets, in powers of ten of the largest singular value.
_LOWEST, _BUCKET = -6.0, 0.1

# Sections of TensorBoard's custom scalars: title -> quantities.
SECTIONS = {
    "The group's own norm": ["gradient_dual", "momentum_dual", "oracle_quality", "update_lr"],
    "Nuclear norm": [
        "gradient_nuclear", "momentum_nuclear", "gradient_nuclear_rank", "momentum_nuclear_rank",
    ],
    "Ky Fan k norm": [
        "gradient_kyfan", "momentum_kyfan", "gradient_energy", "momentum_energy",
    ],
    "Frobenius norm": [
        "gradient_frobenius", "momentum_frobenius", "update_rms", "update_relative",
    ],
    "Spectral norm": [
        "gradient_spectral", "momentum_spectral", "update_spectral", "weight_spectral",
        "weight_stable_rank",
    ],
}  # fmt: skip


def custom_scalars(tags: Iterable[str]) -> dict[str, dict[str, list[Any]]]:
    """Return TensorBoard's layout of custom scalars for the means over groups.

    A chart has one tag, because TensorBoard draws all tags of a run in the colour of the run.
    """
    parsed = [tag for tag in map(parse_tag, tags) if tag is not None and tag.is_group]
    groups = list(dict.fromkeys(tag.matrix for tag in parsed))
    layout: dict[str, dict[str, list[Any]]] = {}
    for section, quantities in SECTIONS.items():
        for tag in (Tag(q, group, True) for q in quantities for group in groups):
            if tag in parsed:
                title = f"{QUANTITIES[tag.quantity].title} ({tag.matrix})"
                chart = ["Multiline", [f"^{re.escape(str(tag))}$"]]
                layout.setdefault(section, {})[title] = chart
    return layout


def add_histogram(writer: Any, name: str, sample: figures.Sample, step: int) -> None:
    """Write a histogram of singular values relative to the largest, in powers of ten."""
    values = torch.tensor(sample.values, dtype=torch.float64)
    weights = torch.tensor(sample.weights, dtype=torch.float64)
    powers = (values / values[0]).clamp(min=10**_LOWEST).log10()
    limits = torch.arange(_LOWEST, _BUCKET / 2, _BUCKET, dtype=torch.float64)
    buckets = torch.bucketize(powers, limits + 1e-9).clamp(max=len(limits) - 1)
    counts = torch.zeros_like(limits).index_add_(0, buckets, weights)
    writer.add_histogram_raw(
        f"{PREFIX}{sample.source}_spectrum/{name}",
        min=float(powers.min()),
        max=0.0,
        num=int(weights.sum().round()),
        sum=float((weights * powers).sum()),
        sum_squares=float((weights * powers.square()).sum()),
        bucket_limits=limits.tolist(),
        bucket_counts=counts.tolist(),
        global_step=step,
    )


def add_figure(writer: Any, name: str, figure: Figure, step: int) -> None:
    """Write a figure as an image.

    ``writer.add_figure`` would load pyplot, which keeps global state in the user's process.
    """
    writer.add_image(f"{PREFIX}{name}", figures.pixels(figure), step, dataformats="HWC")
