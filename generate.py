"""Text from a checkpoint: a Tripod stepN, the newest one of a run, or any Hugging Face directory of a Pythia.

python generate.py --checkpoint runs/pythia-14m/step60 --prompt "def "
"""

import math
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers.decoders import DecodeStream
from torch import Tensor

from corpus.tokenizer import load_tokenizer, tokenizer_errors
from model import KVCache, Pythia
from model.huggingface import load
from model.sizes import END_OF_TEXT
from runtime.errors import Parser, UserError, printable, run_command
from runtime.manifests import saved_steps


@torch.inference_mode()
def generate(
    model: Pythia, prompt: list[int], tokens: int, temperature: float = 1.0, top_k: int = 0, seed: int = 1234
) -> Iterator[int]:
    """Yield up to `tokens` ids that continue the prompt; stop before <|endoftext|> (id 0).

    temperature=0 always takes the most likely id; top_k > 0 samples among the k most likely ids only. The same seed
    gives the same text on the same machine. Raises FloatingPointError if logits are not finite.
    """
    parameter = model.embed
    generator = torch.Generator(parameter.device).manual_seed(seed)
    capacity = len(prompt) + tokens
    caches = [
        KVCache(model.config, 1, capacity, model.compute_dtype or parameter.dtype, parameter.device)
        for _ in model.blocks
    ]
    ids = torch.tensor([prompt], device=parameter.device)  # [1, new tokens]
    for _ in range(tokens):
        logits = model(ids, caches=caches)[0, -1].float()  # [vocab]
        if not logits.isfinite().all():
            raise FloatingPointError("its logits are not finite: take another checkpoint")
        ids = sample(logits, temperature, top_k, generator).view(1, 1)
        if ids.item() == END_OF_TEXT:
            return
        yield ids.item()


def sample(logits: Tensor, temperature: float, top_k: int, generator: torch.Generator) -> Tensor:
    """Sample one id from softmax(logits / temperature) over the top_k largest of logits [vocab]."""
    if temperature == 0:
        return logits.argmax()
    logits = logits.double() - logits.max()  # or a temperature near 0 would make all of them infinite
    if 0 < top_k < len(logits):
        logits = logits.masked_fill(logits < logits.topk(top_k).values[-1], -torch.inf)
    return torch.multinomial((logits / temperature).softmax(0), 1, generator=generator)[0]


def main() -> None:
    parser = Parser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--checkpoint", type=Path, required=True, help="stepN, a run (its newest step), or a Hugging Face directory"
    )
    parser.add_argument("--prompt", required=True, help="the text to continue; empty starts a new document")
    parser.add_argument("--tokens", type=int, default=200, help="maximum number of tokens (default: %(default)s)")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 is greedy (default: %(default)s)")
    parser.add_argument("--top-k", type=int, default=0, help="sample among the k most likely tokens (default: all)")
    parser.add_argument("--seed", type=int, default=1234, help="seed of the sampling (default: %(default)s)")
    parser.add_argument("--tokenizer", type=Path, help="tokenizer.json (default: the one in the checkpoint)")
    args = parser.parse_args()
    if args.tokens < 1 or not 0 <= args.temperature < math.inf or args.top_k < 0:
        raise UserError("--tokens must be positive, --temperature and --top-k must not be negative")
    if not -(2**63) <= args.seed < 2**64:
        raise UserError(f"--seed {args.seed} does not fit in 64 bits")
    try:
        args.prompt.encode()
    except UnicodeEncodeError:
        raise UserError("--prompt is not valid UTF-8") from None

    checkpoint = newest_checkpoint(args.checkpoint)
    path = args.tokenizer or checkpoint / "tokenizer.json"
    if not os.path.lexists(path) and os.path.lexists(checkpoint / "config.json"):
        raise UserError(f"{path} does not exist: pass the tokenizer.json of the training data with --tokenizer")
    model = load(checkpoint).to("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer = load_tokenizer(path, verify=not args.tokenizer)
    with tokenizer_errors(path):
        prompt = tokenizer.encode(args.prompt).ids or [END_OF_TEXT]
    if max(prompt) >= model.config.vocab:
        raise UserError(
            f"{path} is not the model's tokenizer: it gives id {max(prompt)}, the model has {model.config.vocab} ids"
        )
    if len(prompt) + args.tokens > model.config.seq_len:
        print(
            f"note: the text will be longer than the {model.config.seq_len} tokens that the model was trained on",
            file=sys.stderr,
        )
    show = printable if sys.stdout.isatty() else str  # a terminal obeys control characters
    print(show(args.prompt), end="", flush=True)
    stream = DecodeStream(skip_special_tokens=True)  # prints a character only when all its bytes are there
    try:
        for token in generate(model, prompt, args.tokens, args.temperature, args.top_k, args.seed):
            with tokenizer_errors(path):
                text = stream.step(tokenizer, token) or ""
            print(show(text), end="", flush=True)
    except FloatingPointError as error:
        raise UserError(f"{checkpoint}: {error}") from None
    print()


def newest_checkpoint(path: Path) -> Path:
    """The newest complete checkpoint if the path is a run directory, else the path itself."""
    if os.path.lexists(path / "config.json") or not (steps := saved_steps(path)):
        return path
    print(f"note: step {steps[-1]} is the newest checkpoint of {printable(str(path))}", file=sys.stderr)
    return path / f"step{steps[-1]}"


if __name__ == "__main__":
    run_command(main)
