"""The table at the end of `pytest bench --benchmark-only`, and the goals of the kernels."""

from bench.kernels.peers import Floor

# Goals on one H100 or H200, in bfloat16 at 8 x 2048 tokens. Keys are (op, passes, size, arm).
# ratio       the least time of a peer over ours
# ceiling     the least fraction of the ceiling that our kernel reaches
# peak_bytes  the most memory
GOALS: dict[tuple[str, str, str, str], tuple[str, float]] = {
    ("rotary_attention", "forward", "160m", "eager"): ("ratio", 1.6),
    ("rotary_attention", "forward", "1.4b", "eager"): ("ratio", 1.5),
    ("rotary_attention", "forward", "160m", "rotary+cudnn"): ("ratio", 1.0),
    ("rotary_attention", "forward", "1.4b", "rotary+cudnn"): ("ratio", 0.85),
    ("rotary_attention", "forward", "2.8b", "rotary+cudnn"): ("ratio", 1.15),
    **{
        # The stricter comparison: our backward also rotates the gradient back, the backward of the peer does not.
        ("rotary_attention", "backward", size, f"{peer} alone"): ("ratio", limit)
        for size, limit in (("160m", 1.5), ("1.4b", 1.3))
        for peer in ("flash-deterministic", "flash-attn")
    },
    **{
        ("add_dual_layer_norm", passes, size, peer): ("ratio", limit)
        for size in ("160m", "1.4b", "12b")
        for passes, peer, limit in (
            ("forward", "eager", 1.6),
            ("forward", "compile", 1.1),
            ("backward", "eager", 2.8),
            ("backward", "compile", 1.3),
            ("backward", "liger", 2.5),
        )
    },
    ("add_dual_layer_norm", "forward", "1.4b", "tripod"): ("ceiling", 0.85),
    ("add_dual_layer_norm", "forward", "12b", "tripod"): ("ceiling", 0.85),
    ("linear_cross_entropy", "both", "160m", "eager"): ("ratio", 1.8),
    ("linear_cross_entropy", "both", "160m", "torch chunked"): ("ratio", 1.1),
    **{("linear_cross_entropy", "both", "160m", f"liger{kind}"): ("ratio", 1.3) for kind in ("", " x16", " logits")},
    ("linear_cross_entropy", "both", "160m", "tripod"): ("peak_bytes", 0.6e9),
}


def metrics(seconds: float, floor: Floor, ceilings: dict[str, float], peak_bytes: int | None) -> dict:
    """What is reported of a measured arm.

    bound        "flops" or "bytes": which of them determines the least time of the floor at the ceilings
    ceiling      this least time over the measured time
    peak_bytes   above the inputs; for backward it includes the forward pass before it
    """
    least, bound = floor.least_seconds(**ceilings)
    return {
        "seconds": seconds,
        "bytes_per_s": floor.bytes / seconds,
        "flops_per_s": floor.flops / seconds,
        "bound": bound,
        "ceiling": least / seconds,
        "peak_bytes": peak_bytes,
        "ceilings": ceilings,
    }


def table(cases: list[dict]) -> str:
    """One line for each arm, with its time over ours ("peer/ours") and whether each goal is met."""
    measured = {_key(case): case for case in cases if "missing" not in case}
    for key, case in measured.items():
        ours = measured.get((*key[:3], "tripod"))
        if ours and case is not ours:
            measured[key] = case | {"ratio": case["seconds"] / ours["seconds"]}
    lines = []
    if measured:
        copy, matmul = next(iter(measured.values()))["ceilings"].values()
        lines += [f"measured ceilings: copy {copy / 1e9:,.0f} GB/s, matmul {matmul / 1e12:,.3g} TFLOP/s"]
    header = ("op", "pass", "size", "arm", "ms", "peer/ours", "goal", "rate", "of ceiling", "peak MB")
    rows = [header, *(_row(case) for case in measured.values())]
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines += ["  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths)).rstrip() for row in rows]
    lines += [f"{' '.join(_key(case))}: not measured, {case['missing']}" for case in cases if "missing" in case]
    judged = {key for key, case in measured.items() if _verdict(case)}
    lines += ["", f"goals not measured: {len(GOALS) - len(judged)} of {len(GOALS)}"]
    lines += [f"{' '.join(key)}: {_limit(*goal)}, not measured" for key, goal in GOALS.items() if key not in judged]
    return "\n".join(lines)


def _key(case: dict) -> tuple[str, str, str, str]:
    return case["op"], case["passes"], case["size"], case["arm"]


def _limit(quantity: str, limit: float) -> str:
    texts = {"ratio": f">= {limit}", "ceiling": f">= {limit:.0%} of ceiling", "peak_bytes": f"<= {limit / 1e6:.0f} MB"}
    return texts[quantity]


def _verdict(case: dict) -> str:
    """The goal of a case and whether it is met. Empty if there is no goal, or nothing to compare with."""
    quantity, limit = GOALS.get(_key(case), (None, 0.0))
    if case.get(quantity) is None:
        return ""
    met = case[quantity] <= limit if quantity == "peak_bytes" else case[quantity] >= limit
    return f"{_limit(quantity, limit)} {'yes' if met else 'NO'}"


def _row(case: dict) -> tuple[str, ...]:
    rate = f"{case['bytes_per_s'] / 1e9:,.0f} GB/s"
    if case["bound"] == "flops":
        rate = f"{case['flops_per_s'] / 1e12:,.3g} TFLOP/s"
    return (
        *_key(case),
        f"{case['seconds'] * 1e3:,.3f}",
        f"{case['ratio']:.2f}" if "ratio" in case else "",
        _verdict(case),
        rate,
        f"{case['ceiling']:.0%}",
        "" if case["peak_bytes"] is None else f"{case['peak_bytes'] / 1e6:,.0f}",
    )
