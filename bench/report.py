"""Tables of the results of bench.step: its own table, and those of docs/speed.md and bench/README.md.

    python -m bench.report             write both tables from the files of bench/results/
    python -m bench.report --check     fail if a table is not up to date

Every number in a table is in a file of results, or is computed from numbers that are.
"""

import json
import re
import sys
from os.path import relpath
from pathlib import Path

from bench.peers import PACKAGES
from model import SIZES
from runtime.errors import Parser, UserError, run_command

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench" / "results"
PRECISION = {"fp32": "fp32", "bf16": "bf16", "own": "own precision"}
BEGIN, END = "<!-- by python -m bench.report -->", "<!-- end -->"


def utilization(report: dict, tokens_per_s: float) -> dict[str, float]:
    """Model FLOP/s as a fraction of what the machine could do.

    MFU is the fraction of the datasheet's peak, if that is known; "of GEMM" is the fraction of a large matmul measured
    in the same run. The causal ones count only the causal half of attention.
    """
    flops, causal = report["flops_per_token"], report["flops_per_token_causal"]
    peak, gemm = report["peak_flops_per_s"], report["gemm_flops_per_s"]
    mfu = {"MFU": flops / peak, "causal MFU": causal / peak} if peak else {}
    fractions = {**mfu, "of GEMM": flops / gemm, "causal": causal / gemm}
    return {name: fraction * tokens_per_s for name, fraction in fractions.items()}


# bench.step


def step_table(report: dict, allocator: str) -> str:
    """One line for each arm of a report of bench.step, then how many measurements were disturbed."""
    records, gpu = report["runs"][allocator], report["machine"]["gpu"]
    ours = records["tripod"] if "summary" in records["tripod"] else None
    rows, notes = [], []
    threads = {}  # a dict as an ordered set: the number of threads of each arm
    for name, record in records.items():
        if "summary" not in record:
            notes.append(f"{name:<16}{record['missing']}")
            continue
        if "stopped" in record:
            notes.append(f"{name:<16}stopped early: {record['stopped']}")
        m, peak, calls = record["summary"], record["peak_bytes"], record.get("calls") or {}
        threads[record["threads"]] = None
        row = {
            "arm": name + "*" * bool(m["disturbed_kept"]),
            "tokens/s": f"{m['tokens_per_s']:,.0f}",
            "min..max": f"{m['tokens_per_s_min']:,.0f}..{m['tokens_per_s_max']:,.0f}",
            "ms/step": f"{1e3 * m['seconds_per_step']:,.1f}",
            "first s": f"{m['first_step_seconds']:.1f}",
            "tripod/arm": f"{ours['summary']['tokens_per_s'] / m['tokens_per_s']:.3f}" if ours else "",
            "peak MB": f"{peak / 1e6:,.0f}",
            "tripod's": f"{ours['peak_bytes'] / peak:.0%}" if ours else "",
        }
        if gpu:
            row |= {name: f"{calls[name]:,}" if name in calls else "?" for name in ("launches", "syncs")}
        else:
            row |= {"faults/step": f"{m['page_faults_per_step']:,.0f}"}
        rows.append(row | {name: f"{x:.1%}" for name, x in utilization(report, m["tokens_per_s"]).items()})
    lines = [*aligned(rows), *notes]
    summaries = [record["summary"] for record in records.values() if "summary" in record]
    if not gpu:
        total, bad, kept = (sum(m[key] for m in summaries) for key in ("measurements", "disturbed", "disturbed_kept"))
        lines.append(
            f"{' or '.join(map(str, threads))} threads; of {total} measurements {bad} were disturbed by other "
            f"processes; {kept} of these had to be kept (*)"
        )
    drifts = {name: record.get("summary", {}).get("second_pass_over_first") for name, record in records.items()}
    if drifts := [f"{name} {drift:+.1%}" for name, drift in drifts.items() if drift is not None]:
        lines.append("second pass over first: " + ", ".join(drifts))
    return "\n".join(lines)


def aligned(rows: list[dict[str, str]]) -> list[str]:
    """Lines of a table. Each row maps headings to cells. The first column is aligned left, the others right."""
    if not rows:
        return []
    cells = [list(rows[0]), *(list(row.values()) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells)]
    first, *others = widths
    return [
        "  ".join([f"{line[0]:<{first}}", *(f"{cell:>{width}}" for cell, width in zip(line[1:], others))])
        for line in cells
    ]


# docs/speed.md and bench/README.md


def results(folder: Path) -> dict[Path, dict]:
    """The reports of bench.step in a folder and its subfolders, by file: GPUs first, then by machine and size.

    Raises UserError if a file is damaged.
    """
    found = {}
    for path in sorted(folder.rglob("*.json")):
        try:
            report = json.loads(path.read_text())
        except ValueError as error:
            raise UserError(f"{path} is damaged ({error}): remove it, or measure again") from None
        if "runs" in report and any("summary" in records["tripod"] for records in report["runs"].values()):
            found[path] = report
    sizes = list(SIZES)

    def key(path: Path) -> tuple:
        machine, settings = found[path]["machine"], found[path]["settings"]
        return not machine["gpu"], machine["gpu"] or machine["cpu"], sizes.index(settings["size"]), path

    return {path: found[path] for path in sorted(found, key=key)}


def readme_table(found: dict[Path, dict], base: Path) -> str:
    """The table of docs/speed.md. Each line is one comparison and links to the file that has its numbers."""
    asked = {peer for report in found.values() for peer in report["settings"]["against"]}
    peers = [peer for peer in PACKAGES if peer in asked]
    head = ("machine", "Pythia", "tokens a step", "tokens/s", *peers, "MFU", "memory", "file")
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for path, report in found.items():
        machine, settings = report["machine"], report["settings"]
        name = machine["gpu"] or f"{machine['cpu']}, {machine['cores']} cores"
        for allocator, records in report["runs"].items():
            if "summary" not in (ours := records["tripod"]):
                continue
            rate = ours["summary"]["tokens_per_s"]
            cells = [
                name + (", glibc tuned" if allocator == "tuned" and not machine["gpu"] else ""),
                settings["size"],
                f"{shape_of(settings)}, {PRECISION[settings['precision']]}",
                f"{rate:,.0f}",
                *(_times(records, peer, rate) for peer in peers),
                _mfu(report, rate),
                _memory(records),
                f"[{path.name}]({Path(relpath(path, base)).as_posix()})",
            ]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def whole_tables(found: dict[Path, dict], base: Path) -> str:
    """The tables of bench/README.md: for every file the table that bench.step printed."""
    parts = []
    for path, report in found.items():
        settings, versions = report["settings"], report["machine"]["versions"]
        shape = f"{settings['size']}, {shape_of(settings)} tokens"
        packages = ", ".join(f"{name} {found}" for name, found in versions.items() if found and name != "python")
        name = path.relative_to(base).as_posix()
        parts.append(f"[{path.name}]({name}): {shape}, {PRECISION[settings['precision']]}; {packages}")
        for allocator in report["runs"]:
            table = f"{allocator} allocator\n{step_table(report, allocator)}"
            parts.append("\n".join(f"    {line}".rstrip() for line in table.splitlines()))
    return "\n\n".join(parts)


def shape_of(settings: dict) -> str:
    """Micro-steps (if several), rows and tokens of a step: "8 x 2048" or "128 x 8 x 2048"."""
    micro_steps = settings.get("micro_steps", 1)  # older files do not have it
    return (f"{micro_steps} x " if micro_steps > 1 else "") + f"{settings['batch']} x {settings['seq_len']}"


def _times(records: dict[str, dict], peer: str, rate: float) -> str:
    """The time of a peer over the time of Tripod, eager and compiled."""

    def times(name: str) -> str:
        if name not in records:
            return "–"
        if "summary" in records[name]:
            return f"{rate / records[name]['summary']['tokens_per_s']:.2f}"
        return "no memory" if records[name]["missing"] == "out of memory" else "–"

    found = times(peer), times(f"{peer}+compile")
    return "–" if found == ("–", "–") else " / ".join(found)


def _mfu(report: dict, rate: float) -> str:
    fractions = utilization(report, rate)
    if "MFU" in fractions:
        return f"{fractions['MFU']:.0%} ({fractions['causal MFU']:.0%})"
    return f"{fractions['of GEMM']:.0%} ({fractions['causal']:.0%}) of GEMM"


def _memory(records: dict[str, dict]) -> str:
    ours = records["tripod"]["peak_bytes"]
    theirs = [r["peak_bytes"] / ours for name, r in records.items() if "summary" in r and not name.startswith("tripod")]
    beside = f", theirs {min(theirs):.1f} to {max(theirs):.1f} times" if theirs else ""
    return f"{ours / 1e9:.1f} GB{beside}"


def main() -> None:
    parser = Parser(prog="bench.report", description=__doc__.split("\n\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit status 1 if a file would change")
    check = parser.parse_args(sys.argv[1:]).check
    for file, make in TABLES.items():
        path, old = ROOT / file, (ROOT / file).read_text()
        new = replace_table(old, make(results(RESULTS), path.parent))
        if check and new != old:
            raise UserError(f"{file} is not up to date with bench/results: run python -m bench.report")
        if not check:
            path.write_text(new)


TABLES = {"docs/speed.md": readme_table, "bench/README.md": whole_tables}


def replace_table(text: str, table: str) -> str:
    """Put the table between the two marks of the text. Raises UserError unless the text has each mark once."""
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise UserError(f"the file needs one {BEGIN} and one {END}: the table of speeds goes between them")
    return re.sub(f"{BEGIN}.*{END}", lambda _: f"{BEGIN}\n\n{table}\n\n{END}", text, flags=re.DOTALL)


if __name__ == "__main__":
    run_command(main)
