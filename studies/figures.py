"""How the figures of all studies look, and the figures themselves. They are drawn from tables, without a model."""

from itertools import groupby
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from runtime.files import atomic_write
from runtime.run_directory import one_line_errors
from studies.statistics import poisson_quantiles

INK, GREY, LIGHT = "#20262c", "#5b6570", "#e3e6ea"
COLORS = ("#2f6fb3", "#c2571a", "#3a8f5c", "#8a5a9e", "#a08b1c", "#5b6570")
STYLE = {
    "font.size": 9,
    "text.color": INK,
    "axes.labelcolor": GREY,
    "xtick.color": GREY,
    "ytick.color": GREY,
    "axes.edgecolor": LIGHT,
    "axes.grid": True,
    "grid.color": LIGHT,
    "axes.axisbelow": True,
    "axes.titlelocation": "left",
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.prop_cycle": mpl.cycler(color=COLORS),
    "lines.linewidth": 1.6,
    "lines.markersize": 4,
    "legend.frameon": False,
    "figure.constrained_layout.use": True,
}


def save_figure(out: Path, name: str, draw, title: str, x: str, y: str) -> None:
    """Write out/NAME.png and .svg, the same bytes every time: draw(axes) draws them. Raises UserError."""
    with one_line_errors(out / name), mpl.rc_context(STYLE | {"svg.hashsalt": name}):
        figure = Figure(figsize=(6.4, 3.6))  # without pyplot, which would open a display
        axes = figure.add_subplot()
        axes.set(title=title, xlabel=x, ylabel=y)
        draw(axes)
        if axes.get_legend_handles_labels()[1]:
            axes.legend()
        for suffix, metadata in (("png", {"Software": None}), ("svg", {"Date": None})):
            with atomic_write(out / f"{name}.{suffix}") as file:
                figure.savefig(file, format=suffix, dpi=150, metadata=metadata)


def column(lines: list[dict], name: str) -> np.ndarray:
    return np.array([line[name] for line in lines], float)


def by_run(lines: list[dict]) -> list[tuple[str, list[dict]]]:
    return [(run, list(found)) for run, found in groupby(lines, lambda line: line["run"])]


def line_with_band(axes: Axes, x: np.ndarray, y: np.ndarray, low: np.ndarray, high: np.ndarray, label: str, **look):
    (drawn,) = axes.plot(x, y, marker="o", label=label, **look)
    axes.fill_between(x, low, high, alpha=0.15, lw=0, color=drawn.get_color())


def draw_memorization(out: Path, summary: list[dict], tables: dict[str, list[dict]], counts: np.ndarray) -> None:
    """The figures of studies/memorization.py. counts [slices]: memorized rows, under the last checkpoint."""

    def rates(axes: Axes) -> None:
        for run, lines in by_run(summary):
            x = column(lines, "step")
            for name, label in (("", "seen"), ("_unseen", "not seen yet, or never")):
                values = (column(lines, f"{kind}{name}") for kind in ("rate", "low", "high"))
                line_with_band(axes, x, *values, f"{run}: {label}", ls="--" if name else "-")
        most = np.nanmax([column(summary, "rate"), column(summary, "rate_unseen")])
        axes.set_ylim(0, 1.4 * most or None)  # the bands of the first checkpoints, which have seen little, are wide

    def effects(axes: Axes) -> None:
        for run, lines in by_run(tables["effect"]):
            last = max(line["step"] for line in lines)
            for label, kept in (
                ("at the first checkpoint after", [line for line in lines if line["step"] == line["cohort"]]),
                (f"at step {last}", [line for line in lines if line["step"] == last]),
            ):
                effect, width = column(kept, "effect"), 1.96 * column(kept, "error")
                line_with_band(axes, column(kept, "cohort"), effect, effect - width, effect + width, f"{run}: {label}")
        axes.axhline(0, color=GREY, lw=0.8)

    def doses(axes: Axes) -> None:
        for run, lines in by_run(tables["doses"]):
            last = [line for line in lines if line["step"] == lines[-1]["step"]]
            line_with_band(axes, *(column(last, name) for name in ("dose", "rate", "low", "high")), run)
        axes.set_xscale("symlog", base=2, linthresh=1)
        axes.xaxis.set_major_formatter("{x:.0f}")

    def positions(axes: Axes) -> None:
        parts = np.array_split(counts, min(40, len(counts)))
        x = (np.arange(len(parts)) + 0.5) / len(parts)
        error = 1.96 * np.sqrt(counts.mean() / np.array([len(part) for part in parts]))
        axes.fill_between(x, (counts.mean() - error).clip(0), counts.mean() + error, alpha=0.15, lw=0)
        axes.plot(x, [part.mean() for part in parts], "o")

    def quantiles(axes: Axes) -> None:
        theory = poisson_quantiles(counts.mean(), len(counts))
        points, times = np.unique(np.stack([theory, np.sort(counts)]), axis=1, return_counts=True)
        axes.plot([0, points.max()], [0, points.max()], color=GREY, lw=0.8)
        axes.scatter(*points, s=6 + 60 * times / times.max())

    save_figure(out, "rate", rates, "Memorized rows", "step", "share of rows")
    if tables["effect"]:
        title = "What training on a row does to its surprisal"
        save_figure(out, "effect", effects, title, "seen before step", "fall in nats per token")
    if len({line["dose"] for line in tables["doses"]}) > 1:
        save_figure(out, "doses", doses, "How often a text must be seen", "times seen", "share memorized")
    if counts.sum():
        title = "Memorized rows by their place in training (band: a constant rate)"
        save_figure(out, "position", positions, title, "share of training", "memorized rows of a slice")
        title = "Slices, sorted: this picture cannot see a change over time"
        save_figure(out, "qq", quantiles, title, "Poisson quantile", "memorized rows of a slice")


def draw_rows(out: Path, parts: list[dict]) -> None:
    """The figures of studies/trace.py for the losses of training rows, by parts of training."""
    x = column(parts, "first_step")

    def losses(axes: Axes) -> None:
        line_with_band(axes, x, *(column(parts, name) for name in ("q50", "q25", "q75")), "median, middle half", ms=0)
        axes.fill_between(x, column(parts, "q5"), column(parts, "q95"), alpha=0.1, lw=0, color=COLORS[0])

    again = [name for name in ("sight", "copy") if not np.isnan(column(parts, f"excess_later_{name}")).all()]

    def copies(axes: Axes) -> None:
        for name in again:
            label = {"sight": "of a document", "copy": "of a row"}[name]
            for kind, look in (("first", "-"), ("later", "--")):
                axes.plot(x, column(parts, f"excess_{kind}_{name}"), look, label=f"{kind} sight {label}")
        axes.axhline(0, color=GREY, lw=0.8)

    save_figure(out, "rows", losses, "Loss of rows when they were first met", "step", "nats per token")
    if again:
        title = "Rows whose text was seen before"
        save_figure(out, "copies", copies, title, "step", "loss minus the mean of the step")


def lines_of_texts(axes: Axes, lines: list[dict], name: str) -> None:
    """A value of texts over steps: a line for each text if they are few, else their mean and their middle half."""
    few = len({line["text"] for line in lines}) <= 6
    for run, found in by_run(lines):
        steps = np.unique(column(found, "step"))
        values = column(found, name).reshape(len(steps), -1)  # [steps, texts]
        size = 4 if len(steps) < 200 else 0
        for i, line in enumerate(values.T if few else []):
            axes.plot(steps, line, marker="o", ms=size, label=f"{run}: text {i}")
        if not few:
            middle = np.percentile(values, [25, 75], axis=1)
            line_with_band(axes, steps, values.mean(1), *middle, f"{run}: mean", ms=size)


def draw_probes(out: Path, lines: list[dict]) -> None:
    """The figure of studies/trace.py for given texts."""
    title = "Surprisal of the probes"
    save_figure(out, "probes", lambda axes: lines_of_texts(axes, lines, "nll"), title, "step", "nats per token")


def draw_effects(out: Path, lines: list[dict]) -> None:
    """The figure of studies/effect.py. The band of nudged branches reaches to the largest of their effects."""
    changed, nudged = ([line for line in lines if bool(line["nudge"]) == is_nudged] for is_nudged in (False, True))

    def draw(axes: Axes) -> None:
        steps = np.unique(column(nudged, "step"))
        most = np.array([max(abs(line["effect"]) for line in nudged if line["step"] == step) for step in steps])
        if nudged:
            axes.fill_between(steps, -most, most, color=GREY, alpha=0.25, lw=0, label="chance: nudged branches")
        lines_of_texts(axes, changed, "effect")

    title, y = "What the change did to the probes", "fall of surprisal, nats per token"
    save_figure(out, "effect", draw, title, "step", y)
