"""Draw a run: its loss, its checkpoints, and what four of them write.

python -m bench.picture runs/pythia-14m --out docs/demo.png
"""

import json
from pathlib import Path

from checkpoints.manifest import saved_steps
from corpus.tokenizer import load_tokenizer
from generate import generate
from model.huggingface import load
from runtime.errors import Parser, UserError, run_command

COLUMNS, LINES = 66, 3  # of each sample
INK, BLUE, GREY, LIGHT = "#20262c", "#2f6fb3", "#5b6570", "#e3e6ea"


def sample(checkpoint: Path, prompt: str) -> str:
    """The prompt and what a checkpoint writes after it, in lines. Signs show spaces, line ends and ids without text."""
    tokenizer, model = load_tokenizer(checkpoint / "tokenizer.json"), load(checkpoint)
    ids = generate(model, tokenizer.encode(prompt).ids, COLUMNS * LINES, temperature=0.8)
    text = prompt + "".join(tokenizer.decode([i]) if tokenizer.id_to_token(i) else "□" for i in ids)
    text = text.replace(" ", "·").replace("\n", "↵")[: COLUMNS * LINES]
    return "\n".join(text[i : i + COLUMNS] for i in range(0, len(text), COLUMNS))


def draw(run: Path, saved: list[int], prompt: str, out: Path) -> None:
    """Write the picture of a run that has checkpoints of these steps. Raises UserError without matplotlib."""
    try:
        import matplotlib.pyplot as plt
    except ImportError:
        raise UserError("bench.picture needs matplotlib: pip install matplotlib") from None
    settings = json.loads((run / "run.json").read_text())["settings"]
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    shown = sorted({min(saved, key=lambda step: abs(step - part * saved[-1])) for part in (0, 1 / 8, 1 / 4, 1)})
    thousands = settings["batch_size"] * settings["seq_len"] / 1000  # of tokens in a step

    plt.rcParams.update({"text.color": INK, "axes.labelcolor": GREY, "xtick.color": GREY, "ytick.color": GREY})
    plt.rcParams.update({"font.size": 9, "axes.edgecolor": LIGHT, "axes.titlelocation": "left"})
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.5), width_ratios=(1, 1.55), layout="constrained")
    left.plot([r["step"] * thousands for r in records], [r["loss"] for r in records], color=BLUE, lw=1.8)
    left.plot([step * thousands for step in saved], [0] * len(saved), "^", color=GREY, ms=5, clip_on=False, zorder=3)
    for step in shown:
        left.annotate(f"step{step}", (step * thousands, 0), (0, 6), "data", "offset points", ha="center", fontsize=8)
    left.set(xlabel="thousand tokens seen (▲ checkpoint)", ylim=(0, None), xlim=(0, None), axisbelow=True)
    left.set_title(f"Pythia-{settings['size']}: loss, nats per token", weight="bold", fontsize=10)
    left.spines[["top", "right", "left"]].set_visible(False)
    left.grid(axis="y", color=LIGHT)
    left.tick_params(length=0, pad=6)

    right.axis("off")
    right.set_title(f"What its checkpoints write after “{prompt}”", weight="bold", fontsize=10)
    for i, step in enumerate(shown):
        y = 0.98 - i * 0.26
        right.text(0, y, f"step{step}", va="top", color=BLUE, weight="bold", fontsize=8.5)
        right.text(0, y - 0.065, sample(run / f"step{step}", prompt), va="top", family="monospace", fontsize=8)
    figure.savefig(out, dpi=180)
    plt.close(figure)


def main() -> None:
    parser = Parser(prog="bench.picture", description=__doc__.split("\n")[0])
    parser.add_argument("run", type=Path, help="a run directory whose checkpoints have a tokenizer.json")
    parser.add_argument("--prompt", default="def ", help="the text that the checkpoints continue (default: 'def ')")
    parser.add_argument("--out", type=Path, default=Path("run.png"), help="the picture (default: %(default)s)")
    args = parser.parse_args()
    if not (saved := saved_steps(args.run)):
        raise UserError(f"{args.run} holds no checkpoints: train first")
    draw(args.run, saved, args.prompt, args.out)


if __name__ == "__main__":
    run_command(main)
