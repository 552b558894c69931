"""How likely a model finds a text after another: the log-likelihood that multiple choice and exact answers rest on.

pairs = [encode_pair(tokenizer, "Q: 2 plus 2? A:", " 4"), ..]
inputs = pad(pairs)                              # columns for Study.measure
log_likelihood, greedy = score(model, **inputs)
"""

from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from corpus.probes import pad as pad_texts
from corpus.tokenizer import load_tokenizer, tokenizer_errors
from kernels import linear
from model import KVCache, Pythia
from model.sizes import END_OF_TEXT
from runtime.errors import UserError

VOCAB_CHUNK = 8192  # logits of a token at a time: those of a whole batch, [tokens, vocab], are never there


def compare_greedy(y: Tensor, weight: Tensor, targets: Tensor, banned: int | None = None) -> tuple[Tensor, ...]:
    """Compare greedy predictions with targets [n], from final hidden states y [n, hidden] and weight [vocab, hidden].

    Returns [n] each: whether the target is predicted (of equal logits the lowest id is); the logit of the target minus
    the best other one; the surprisal in nats. A banned id is never predicted.
    """
    best = y.new_full((len(y),), -torch.inf, dtype=torch.promote_types(y.dtype, torch.float32))
    best_id, lse, own = torch.zeros_like(targets), best.clone(), best.clone()
    for start in range(0, len(weight), VOCAB_CHUNK):
        z = linear(y, weight[start : start + VOCAB_CHUNK]).to(best.dtype)  # [n, chunk]
        lse = torch.logaddexp(lse, z.logsumexp(1))
        column = targets - start
        inside = (column >= 0) & (column < z.shape[1])
        column = column.clamp(0, z.shape[1] - 1)[:, None]
        value = z.gather(1, column)[:, 0]
        own = torch.where(inside, value, own)
        z.scatter_(1, column, torch.where(inside, -torch.inf, value)[:, None])
        if banned is not None and 0 <= banned - start < z.shape[1]:
            z[:, banned - start] = -torch.inf
        top, index = z.max(1)
        best, best_id = torch.where(top > best, top, best), torch.where(top > best, index + start, best_id)
    hit = (own > best) | ((own == best) & (targets < best_id))
    if banned is not None:
        hit &= targets != banned
    return hit, own - best, lse - own


def write_greedy(model: Pythia, prompts: Tensor, count: int, banned: int | None = None) -> Tensor:
    """The `count` tokens that greedy generation writes after prompts [batch, k]: [batch, count]."""
    shape = len(prompts), prompts.shape[1] + count, model.embed.dtype, prompts.device
    caches, written, tokens = [KVCache(model.config, *shape) for _ in model.blocks], [], prompts
    for _ in range(count):
        logits = linear(model.final_hidden(tokens, caches)[:, -1], model.unembed)  # [batch, vocab]
        if banned is not None:
            logits[:, banned] = -torch.inf
        tokens = logits.argmax(1, keepdim=True)
        written.append(tokens)
    return torch.cat(written, 1)


def tokenizer_of(run: Path, step: int, given: Path | None = None) -> Tokenizer:
    """The tokenizer of --tokenizer, or that of a checkpoint. Raises UserError if there is none, or it is damaged."""
    path = given or run / f"step{step}" / "tokenizer.json"
    if not path.exists():
        raise UserError(f"{path} does not exist: pass the tokenizer.json of the training data with --tokenizer")
    return load_tokenizer(path, verify=not given)


def encode_pair(tokenizer: Tokenizer, context: str, continuation: str) -> tuple[list[int], int]:
    """The tokens of context + continuation, and the number of those that are the context's.

    As in lm-evaluation-harness, white space at the end of the context belongs to the continuation, and the text is cut
    where the tokens of the context alone end. An empty context is <|endoftext|>, which begins a document.
    """
    stripped = context.rstrip()
    continuation = context[len(stripped) :] + continuation
    with tokenizer_errors("the tokenizer"):
        whole, before = tokenizer.encode(stripped + continuation).ids, tokenizer.encode(stripped).ids
    if not before:
        return [END_OF_TEXT, *whole], 1
    return whole, len(before)


def pad(pairs: list[tuple[list[int], int]]) -> dict[str, np.ndarray]:
    """Pairs (tokens, tokens of the context) as arrays: tokens int32 [items, longest], context and length int32 [items].

    Raises UserError if a pair has no continuation, for example because the two texts are joined in one token.
    """
    if empty := [tokens for tokens, context in pairs if len(tokens) <= context]:
        raise UserError(f"a text has no token after its context: {empty[0]}")
    tokens = pad_texts([ids for ids, _ in pairs])[0].astype(np.int32)
    context = np.array([context for _, context in pairs], np.int32)
    return {"tokens": tokens, "context": context, "length": np.array([len(ids) for ids, _ in pairs], np.int32)}


def score(model: Pythia, tokens: np.ndarray, context: np.ndarray, length: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The log-likelihood of tokens[i, context[i] : length[i]] after those before them, in nats, and whether greedy
    generation writes them: float64 and bool [items]. Raises UserError for a token that the model does not have.

    Items that differ in their last token only, as choices of one token do, are one row of the model.
    """
    device, width = model.embed.device, int(length.max())
    if tokens.max() >= model.config.vocab:
        raise UserError(f"token id {tokens.max()} is not one of the {model.config.vocab} of the model")
    ids, places = tokens[:, :width].astype(np.int64), np.arange(1, width)
    inputs, row = np.unique(np.where(places < length[:, None], ids[:, :-1], 0), axis=0, return_inverse=True)
    scored = (places >= context[:, None]) & (places < length[:, None])  # [items, width - 1]: the continuations
    item, place = scored.nonzero()
    row, place, targets, item = (
        torch.from_numpy(n).to(device) for n in (row.ravel()[item], place, ids[:, 1:][scored], item)
    )
    y = model.final_hidden(torch.from_numpy(inputs).to(device))[row, place]
    hit, _, surprisal = compare_greedy(y, model.unembed, targets)
    sums = torch.zeros(len(ids), dtype=torch.float64, device=device).index_add_(0, item, -surprisal.double())
    misses = torch.zeros(len(ids), dtype=torch.int64, device=device).index_add_(0, item, (~hit).long())
    return sums.cpu().numpy(), (misses == 0).cpu().numpy()
