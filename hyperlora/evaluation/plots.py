"""Plots of evaluations, as PNG files and in TensorBoard."""

from __future__ import annotations

import contextlib
import pathlib
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
import tensorboardX

from hyperlora.errors import UserError

matplotlib.use('Agg')
from matplotlib import pyplot as plt  # noqa: E402


def to_tensorboard(folder: str | pathlib.Path) -> None:
    """Shows the PNG files of a folder in TensorBoard, by events in that folder."""
    with tensorboardX.SummaryWriter(str(folder)) as board:
        for path in sorted(pathlib.Path(folder).glob('*.png')):
            board.add_image(path.stem, plt.imread(path)[..., :3], dataformats='HWC')


@contextlib.contextmanager
def _figure(path: str | pathlib.Path, *args: Any, **kwargs: Any) -> Iterator[tuple[Any, Any]]:
    """The figure and axes of `plt.subplots`, to draw on; then they are written to a file."""
    figure, axes = plt.subplots(*args, layout='constrained', **kwargs)
    try:
        yield figure, axes
        figure.savefig(path, dpi=120)
    except OSError as error:
        raise UserError(f'{path}: cannot write ({error.strerror}): make room there') from error
    finally:
        plt.close(figure)


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
    with _figure(path, figsize=size) as (figure, axes):
        image = axes.imshow(values, vmin=0, vmax=1, cmap='RdYlGn', aspect='auto')
        for (row, column), value in np.ndenumerate(values):
            if not np.isnan(value):
                axes.text(column, row, f'{value:.2f}', ha='center', va='center')
        axes.set_xticks(range(len(columns)), columns)
        axes.set_yticks(range(len(rows)), rows)
        axes.set(xlabel=column_title, ylabel=row_title, title=title)
        figure.colorbar(image)


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
    with _figure(path, figsize=(8, 4.5)) as (_, axes):
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


def bars(
    path: str | pathlib.Path,
    groups: Mapping[str, Mapping[str, float]],
    y_title: str,
    title: str,
) -> None:
    """Fractions side by side.

    Args:
      path: file to write.
      groups: name of a group -> {name of a bar: its height in 0..1}; groups may lack some.
    """
    names = list(dict.fromkeys(name for heights in groups.values() for name in heights))
    with _figure(path, figsize=(3 + 0.9 * len(names), 4.5)) as (_, axes):
        width = 0.8 / len(groups)
        for number, (group, heights) in enumerate(groups.items()):
            places = [names.index(name) + number * width for name in heights]
            drawn = axes.bar(places, list(heights.values()), width, label=group)
            axes.bar_label(drawn, fmt='%.2f')
        axes.set_xticks(np.arange(len(names)) + 0.4 - width / 2, names, rotation=30, ha='right')
        axes.set_ylim(0, 1.03)
        axes.set(ylabel=y_title, title=title)
        axes.legend()


def attention(
    path: str | pathlib.Path, weights: np.ndarray, tokens: Sequence[str], title: str
) -> None:
    """Where a Perceiver looks.

    Args:
      path: file to write.
      weights: `[blocks, s]`, the attention of each block to each token.
      tokens: s texts.
    """
    with _figure(path, figsize=(2 + 0.22 * len(tokens), 2 + 0.3 * len(weights))) as (figure, axes):
        image = axes.imshow(weights, vmin=0, cmap='viridis', aspect='auto')
        axes.set_xticks(range(len(tokens)), [t.strip() for t in tokens], rotation=90, fontsize=7)
        axes.set_yticks(range(len(weights)), range(1, 1 + len(weights)))
        axes.set(xlabel='token', ylabel='block', title=title)
        figure.colorbar(image)


def layers(
    path: str | pathlib.Path, values: Mapping[str, Sequence[float]], y_title: str, title: str
) -> None:
    """Values by layer of the base model.

    Args:
      path: file to write.
      values: name of a line -> l numbers.
    """
    with _figure(path, figsize=(8, 4.5)) as (_, axes):
        for name, line in values.items():
            axes.plot(range(len(line)), line, marker='o', label=name)
        axes.set(xlabel='layer', ylabel=y_title, title=title)
        axes.grid(alpha=0.3)
        axes.legend()


def scatter(
    path: str | pathlib.Path,
    vectors: np.ndarray,
    groups: Sequence[str],
    title: str,
) -> None:
    """A map of vectors: their two principal components.

    Args:
      path: file to write.
      vectors: `[n, d]`.
      groups: of each vector; a group has a colour and a mark.
    """
    centred = vectors - vectors.mean(0)
    u, s, _ = np.linalg.svd(centred, full_matrices=False)
    x, y = (u * s)[:, :2].T
    with _figure(path, figsize=(9, 6)) as (figure, axes):
        marks = 'osD^v<>PX*'
        for number, group in enumerate(dict.fromkeys(groups)):
            own = [g == group for g in groups]
            colour = plt.get_cmap('tab20')(number % 20)
            axes.scatter(x[own], y[own], color=colour, marker=marks[number % 10], label=group)
        axes.set(title=title, xlabel='first component', ylabel='second component')
        figure.legend(loc='outside right upper', fontsize=7)


def contact_sheet(
    path: str | pathlib.Path,
    images: Sequence[Any],
    answers: Sequence[str],
    right: Sequence[bool],
    columns: int = 8,
) -> None:
    """Pictures with what was said about them, a cross before what is wrong.

    Args:
      path: file to write.
      images: as matplotlib shows them.
    """
    rows = -(-len(images) // columns)
    size = (1.6 * columns, 1.9 * rows)
    with _figure(path, rows, columns, figsize=size, squeeze=False) as (_, axes):
        for place in axes.flat:
            place.axis('off')
        for place, image, answer, is_right in zip(axes.flat, images, answers, right, strict=False):
            place.imshow(image)
            text = textwrap.fill(answer, 18) if is_right else f'\u2717 {textwrap.fill(answer, 16)}'
            place.set_title(text, fontsize=7, color='black' if is_right else 'firebrick')
