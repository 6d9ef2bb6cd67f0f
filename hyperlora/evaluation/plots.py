"""Plots of evaluations, as PNG files."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping, Sequence

import matplotlib
import numpy as np

matplotlib.use('Agg')
from matplotlib import pyplot as plt  # noqa: E402


def heat_map(
    path: str | pathlib.Path,
    values: np.ndarray,
    rows: Sequence[str],
    columns: Sequence[str],
    row_title: str,
    column_title: str,
    title: str,
) -> None:
    """A table of fractions as colours, with the values written in the cells.

    Args:
      path: file to write.
      values: `[rows, columns]` in 0..1; NaN leaves a cell empty.
      rows, columns: their labels.
    """
    size = (2.5 + 0.8 * len(columns), 1.8 + 0.4 * len(rows))
    figure, axes = plt.subplots(figsize=size, layout='constrained')
    image = axes.imshow(values, vmin=0, vmax=1, cmap='RdYlGn', aspect='auto')
    for (row, column), value in np.ndenumerate(values):
        if not np.isnan(value):
            axes.text(column, row, f'{value:.2f}', ha='center', va='center')
    axes.set_xticks(range(len(columns)), columns)
    axes.set_yticks(range(len(rows)), rows)
    axes.set(xlabel=column_title, ylabel=row_title, title=title)
    figure.colorbar(image)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def curves(
    path: str | pathlib.Path,
    lines: Mapping[str, Mapping[float, float]],
    x_title: str,
    y_title: str,
    title: str,
    marks: Mapping[str, float] | None = None,
) -> None:
    """Fractions over lengths, on a logarithmic axis of base 2.

    Args:
      path: file to write.
      lines: name -> {x: y}, y in 0..1.
      marks: name -> x of a vertical line.
    """
    figure, axes = plt.subplots(figsize=(8, 4.5), layout='constrained')
    for name, points in lines.items():
        xs = sorted(points)
        axes.plot(xs, [points[x] for x in xs], marker='o', label=name)
    for name, x in (marks or {}).items():
        axes.axvline(x, color='grey', linestyle='--', label=name)
    ticks = sorted({x for points in lines.values() for x in points})
    axes.set_xscale('log', base=2)
    axes.set_xticks(ticks, [str(x) for x in ticks], rotation=45)
    axes.set_ylim(-0.03, 1.03)
    axes.set(xlabel=x_title, ylabel=y_title, title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)
