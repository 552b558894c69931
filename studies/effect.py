"""What a change of the data did: the surprisal of given texts in two branches of a run, at every common checkpoint.

Runs are exact, so a branch without a change has the bits of its parent. The difference of two branches is the effect of
the change and of nothing else: it is 0.0 up to the first row that differs. What a smallest change becomes later, by
chance, branches made with `train.py --nudge` show: give them too, and the figure has them as a grey band.

    items.parquet    every text under every checkpoint: nll, the surprisal in nats of each token but the first
    effect.csv       every text at every step that BASE and a branch have: effect, by how much the branch lowers the
                     mean surprisal of its tokens; largest, the largest change of one token; nudge, of the branch
    changed.csv      the rows that a branch was trained on otherwise than BASE: how many tokens, and weights of losses
    summary.csv      the mean effect on all texts, and how many changed rows a checkpoint has seen
"""

import numpy as np

from corpus.indexed import block_slices
from runtime.errors import UserError, run_command
from runtime.run_directory import read_run
from studies import figures
from studies.common import Columns, Run, Study, all_ranks, recorded_settings, study_parser, write_csv
from studies.trace import add_probe_flags, measure_probes, probes_of


def changed_rows(base: Run, branch: Run) -> list[dict]:
    """The rows that a branch was trained on otherwise than another run: one line for each, in the order of training."""
    edits = [run.rows.edits for run in (base, branch) if run.rows.edits]
    numbers = np.unique(np.concatenate([np.zeros(0, np.int64), *(part["row"] for e in edits for part in e.groups())]))
    first, batch = read_run(branch.path).get("parent", {}).get("step", 0), branch.asked.batch_size
    numbers = numbers[(first * batch <= numbers) & (numbers < branch.asked.steps * batch)]
    lines = []
    for block in block_slices(len(numbers), "comparing rows", 1 << 12):
        rows = numbers[block]
        tokens = (base.rows.take(rows) != branch.rows.take(rows)).sum(1)
        ours, theirs = (run.rows.weights(rows) for run in (base, branch))
        weights = (np.float32(1) if ours is None else ours) != (np.float32(1) if theirs is None else theirs)
        weights = np.broadcast_to(weights, (len(rows), base.rows.seq_len)).sum(1)
        for row, *changed in zip(rows.tolist(), tokens.tolist(), weights.tolist()):
            line = {"run": branch.name, "step": row // batch, "row": row, "tokens": changed[0], "weights": changed[1]}
            lines += [line] if any(changed) else []
    return lines


def effects(base: Columns, branch: Columns) -> tuple[np.ndarray, np.ndarray]:
    """By how much a branch lowers the mean surprisal of each text [texts], and the largest change of one token."""
    change = base["nll"].astype(np.float64) - branch["nll"]  # [texts, longest - 1], NaN after the end of a text
    return np.nanmean(change, 1), np.nanmax(abs(change), 1)


def effect_lines(study: Study, branch: Run) -> list[dict]:
    """The lines of effect.csv of a branch. Raises UserError if it has no checkpoint in common with BASE."""
    base = study.runs[0]
    if not (common := [step for step in branch.steps if step in base.steps]):
        raise UserError(f"{branch.path} and {base.path} have no step in common: their checkpoints cannot be compared")
    nudge, lines = recorded_settings(branch.path / f"step{common[0]}").get("nudge", 0), []
    for step in common:
        means, largest = effects(study.columns(base, step), study.columns(branch, step))
        for text, (effect, most) in enumerate(zip(means.tolist(), largest.tolist())):
            values = {"text": text, "effect": effect, "largest": most, "nudge": nudge}
            lines.append({"run": branch.name, "step": step} | values)
    return lines


def main(arguments: list[str] | None = None) -> None:
    parser = study_parser("effect", __doc__.split("\n\n")[0])
    add_probe_flags(parser, required=True)
    args = parser.parse_args(arguments)
    with all_ranks() as dist:
        study = Study("effect", args, {}, dist)
        base, *branches = study.runs
        if not branches:
            raise UserError("give a run, and one or more branches of it")
        changed = {run.name: changed_rows(base, run) for run in branches}
        measure_probes(study, probes_of(study, args))

        def summarize(run: Run, step: int, items: Columns) -> dict:
            line = {"nll": float(np.nanmean(items["nll"])), "effect": float("nan"), "changed_rows": 0}
            if run is not base and step in base.steps:
                line["effect"] = float(effects(study.columns(base, step), items)[0].mean())
                line["changed_rows"] = sum(row["step"] < step for row in changed[run.name])
            return line

        def write() -> None:
            found = [line for run in branches for line in effect_lines(study, run)]
            write_csv(study.out / "effect.csv", found)
            if lines := [line for run in branches for line in changed[run.name]]:
                write_csv(study.out / "changed.csv", lines)
            figures.draw_effects(study.out, found)

        study.finish(summarize)
        dist.run_on_main(write)


if __name__ == "__main__":
    run_command(main)
