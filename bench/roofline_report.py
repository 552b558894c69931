"""The tables and the chart of bench.roofline."""

from pathlib import Path
from typing import NamedTuple

from bench.report import aligned

BETWEEN = "between the ops"


def rate_of(rows: list[dict]) -> float:
    """FLOP/s of these rows together."""
    return sum(row["flops"] for row in rows) / sum(row["seconds"] for row in rows)


def table(rows: list[dict], step: dict) -> str:
    """One line for each op, the one farthest above its floor first. The last line is the whole step."""

    def line(op: str, calls: int, seconds: float, floor: float, bound: str | None, reached: float | None) -> dict:
        return {
            "op": op,
            "calls": f"{calls}",
            "ms a step": f"{1e3 * seconds:,.2f}",
            "of step": f"{seconds / step['seconds']:.1%}",
            "floor ms": f"{1e3 * floor:,.2f}",
            "floor by": {"flops": "FLOPs", "bytes": "bytes", None: ""}[bound],
            "reached": "" if reached is None else f"{reached:.0%}",
            "ms above": f"{1e3 * (seconds - floor):,.2f}",
        }

    lines = []
    for r in sorted(rows, key=lambda r: r["seconds"] - r["floor_seconds"], reverse=True):
        reached = r["floor_seconds"] / r["seconds"] if r["bound"] else None
        lines.append(line(r["op"], r["calls"], r["seconds"], r["floor_seconds"], r["bound"], reached))
    reached = step["floor_seconds"] / step["seconds"]
    lines.append(line("the step", 1, step["seconds"], step["floor_seconds"], None, reached))
    return "\n".join(aligned(lines))


def matmuls_table(matmuls: list[dict], ceiling: float) -> str:
    """One line for each weight: the rates of its three matmuls."""
    rates = {row["op"]: rate_of([row]) for row in matmuls}
    lines = []
    for name in dict.fromkeys(op.split()[0] for op in rates):
        line = {"TFLOP/s (of the large matmul)": name}
        for which in ("forward", "d_input", "d_weight"):
            rate = rates[f"{name} {which}"]
            line[which] = f"{rate / 1e12:.3g} ({rate / ceiling:.0%})"
        lines.append(line)
    return "\n".join(aligned(lines))


def text(title: str, matmuls: list[dict], attention: float, rows: list[dict], step: dict) -> str:
    """Everything that is printed for one size."""
    large = step["large_product_flops_per_s"]
    took = f"{1e3 * step['seconds']:,.1f} ms ({1e3 * step['seconds_min']:,.1f}..{1e3 * step['seconds_max']:,.1f})"
    lines = [
        f"\n{title}: {took}, {step['tokens_per_s']:,.0f} tokens/s",
        f"copy {step['copy_bytes_per_s'] / 1e9:,.1f} GB/s, large matmul {large / 1e12:,.3g} TFLOP/s; all matmuls of "
        f"the step {rate_of(matmuls) / 1e12:,.3g}, attention {attention / 1e12:,.3g}",
        "",
        matmuls_table(matmuls, large),
        "",
        table(rows, step),
    ]
    for (reference, now), best in zip(step["mfu"].items(), step["mfu_at_floors"].values()):
        reference = reference.replace("product", "matmul")  # the file keeps the older word
        causal = f"{now['causal']:.1%} with the causal half of attention"
        at_floors = f"at the floors {best['full']:.1%}, {best['causal']:.1%}"
        lines.append(f"MFU of {reference} {now['full']:.1%}, {causal}; {at_floors}")
    if step["foreign_cpu"] is not None:
        lines.append(f"other processes took {step['foreign_cpu']:.0%} of the CPU during the measurement")
    return "\n".join(lines)


COLOURS = {  # piece of a bar: (colour, label)
    "flops": ("#2f6fb3", "floor, by FLOPs"),
    "bytes": ("#2a9d7c", "floor, by bytes"),
    "above": ("#f2a65a", "above the floor"),
    "between": ("#9aa3ad", BETWEEN),
}


class Bar(NamedTuple):
    label: str
    seconds: float
    note: str  # is written beside the bar
    pieces: dict[str, float]  # seconds of each piece in COLOURS


def bars(rows: list[dict], step_seconds: float) -> list[Bar]:
    """The bars of the chart, the shortest first. All ops under 1/200 of a step share one bar."""

    def bar(label: str, rows: list[dict]) -> Bar:
        pieces = dict.fromkeys(COLOURS, 0.0)
        for r in rows:
            if r["bound"]:
                floor = min(r["floor_seconds"], r["seconds"])  # an op may find its inputs in a cache
                pieces[r["bound"]] += floor
                pieces["above"] += r["seconds"] - floor
            else:
                pieces["between"] += max(r["seconds"], 0.0)
        seconds, floors = (sum(r[key] for r in rows) for key in ("seconds", "floor_seconds"))
        reached = f", {floors / seconds:.0%}" if floors else ""
        return Bar(label, seconds, note=f"{1e3 * seconds:,.2f} ms{reached}", pieces=pieces)

    small = [r for r in rows if abs(r["seconds"]) <= step_seconds / 200]
    large = [r for r in rows if r not in small]
    labels = [r["op"] if r["calls"] == 1 else f"{r['op']}  × {r['calls']}" for r in large]
    drawn = [bar(label, [r]) for label, r in zip(labels, large)]
    if small:
        drawn.append(bar(f"{len(small)} others", small))
    return sorted(drawn, key=lambda bar: bar.seconds)


def plot(path: Path, title: str, subtitle: str, rows: list[dict], step: dict) -> None:
    """Draw one bar for each op, the longest on top: its floor and the time above it, in milliseconds of a step."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    drawn = bars(rows, step["seconds"])
    figure = Figure(figsize=(10, 2.2 + 0.3 * len(drawn)), dpi=150, layout="constrained")
    axes = figure.subplots()
    longest = 1e3 * drawn[-1].seconds
    for y, bar in enumerate(drawn):
        left = 0.0
        for kind, piece in bar.pieces.items():
            axes.barh(y, 1e3 * piece, left=left, height=0.72, color=COLOURS[kind][0])
            left += 1e3 * piece
        axes.text(left + 0.008 * longest, y, bar.note, va="center", fontsize=8, color="#444444")
    axes.set_yticks(range(len(drawn)), [bar.label for bar in drawn], fontsize=9)
    axes.set(xlim=(0, 1.16 * longest), ylim=(-0.6, len(drawn) - 0.4))
    axes.set_xlabel("milliseconds a step; percent: floor over time taken", fontsize=9)
    axes.tick_params(axis="y", length=0)
    axes.tick_params(axis="x", labelsize=8)
    axes.grid(axis="x", color="#e3e6ea", linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.set_title(title, loc="left", fontsize=13, fontweight="bold", pad=26)
    axes.annotate(subtitle, (0, 1), (0, 10), "axes fraction", "offset points", fontsize=9, color="#444444")
    handles = [Patch(color=colour, label=label) for colour, label in COLOURS.values()]
    axes.legend(handles=handles, loc="lower right", fontsize=9, frameon=False)
    figure.savefig(path)
