"""Spans of tokens: where the data has them, in which rows of which steps, and how often a run saw them.

A span lies in one document. It can go on in the document that follows in the order only behind an end-of-text token
that the span itself contains. Pre-shuffled rows do not know their documents, so there a span lies in one row.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from corpus.indexed import IndexedTokens, block_slices
from corpus.inverse import PIECE, as_json, last_at_most, ramps, sort_served
from corpus.order import Order, Rows, served_rows
from corpus.suffix_index import SuffixIndex, open_index
from corpus.tokenizer import load_tokenizer, tokenizer_errors
from runtime.errors import UserError, printable
from runtime.files import read_small, reason

EOD = 0  # the end-of-text token, in all of Pythia's data
BLOCK = 1 << 22  # tokens that are searched at once
MOST = 1 << 24  # pieces that are sorted in memory, about 3 GB
MOST_PAIRS = 1 << 27  # pairs of a term and a row that are counted in memory, 1 GB
# Tokens that a scan reads in the time in which a hit of the index is verified, and a shard of the index is asked.
PER_HIT, PER_QUESTION = 500, 60_000

# ---- spans in the data -----------------------------------------------------------------------------------------------


def matches(
    data: IndexedTokens, spans: list[np.ndarray], index: SuffixIndex | None
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Yield where documents have the spans: (which span [hits], document [hits], offset in it [hits]), in blocks.

    Asks the index; reads all tokens once if there is none, or if that is quicker.
    """
    lengths = np.array([len(span) for span in spans])
    if index and is_quicker(index, spans, data.tokens):
        hits = ((np.full(len(found), k), found) for k, span in enumerate(spans) for found in index.find(span))
    else:
        hits = scan(data, spans)
    starts = data.starts()
    for which, positions in hits:
        documents = last_at_most(starts, positions * data.dtype.itemsize)
        offsets = positions - starts[documents] // data.dtype.itemsize
        inside = offsets + lengths[which] <= data.sizes.map()[documents]
        if inside.any():
            yield which[inside], documents[inside], offsets[inside]


def is_quicker(index: SuffixIndex, spans: list[np.ndarray], tokens: int) -> bool:
    """Return whether to ask the index is quicker than to read all tokens."""
    left = tokens - len(spans) * len(index.shards) * PER_QUESTION
    for span in spans if left >= 0 else ():
        left -= index.count(span) * PER_HIT
    return left >= 0


class Group(NamedTuple):
    """Spans of one length that are looked for at the same of their tokens."""

    which: np.ndarray  # [spans]
    tokens: np.ndarray  # [spans, length]
    anchor: int  # index of the token that is looked for
    hashes: np.ndarray  # [spans], ascending


def hash_windows(tokens: np.ndarray, starts: np.ndarray, length: int) -> np.ndarray:
    """Return a 64-bit hash of tokens[start : start + length], at most 8 of them, for every start: uint64 [starts]."""
    result = np.zeros(len(starts), np.uint64)
    for k in range(min(length, 8)):
        result = (result ^ tokens[starts + k].astype(np.uint64)) * np.uint64(0x9E3779B97F4A7C15)
        result ^= result >> np.uint64(29)
    return result


def group_spans(spans: list[np.ndarray], sample: np.ndarray) -> list[Group]:
    """Group different spans by length and by the place of their rarest token in a sample of the data."""
    common = dict(zip(*(array.tolist() for array in np.unique(sample, return_counts=True))))
    anchors = [min(range(len(span)), key=lambda k: common.get(int(span[k]), 0)) for span in spans]
    groups: dict[tuple[int, int], list[int]] = {}
    for which, (span, anchor) in enumerate(zip(spans, anchors)):
        groups.setdefault((len(span), anchor), []).append(which)
    result = []
    for (length, anchor), members in groups.items():
        tokens = np.stack([spans[which] for which in members])
        hashes = hash_windows(tokens.ravel(), np.arange(len(members)) * length, length)
        order = hashes.argsort()
        result.append(Group(np.array(members)[order], tokens[order], anchor, hashes[order]))
    return result


def scan(data: IndexedTokens, spans: list[np.ndarray]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield (which span [hits], position in the data [hits]) of all spans, in blocks, by reading all tokens once.

    The spans differ from each other. A hit can cross the end of a document.
    """
    groups = group_spans(spans, data.read(0, min(data.tokens, 1 << 20)))
    longest = max(map(len, spans))
    for block in block_slices(data.tokens, "searching", BLOCK):
        tokens = data.read(block.start, min(block.stop + longest - 1, data.tokens) - block.start)
        for group in groups:
            which, starts = find_group(group, tokens)
            here = starts < block.stop - block.start
            if here.any():
                yield which[here], block.start + starts[here]


def find_group(group: Group, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return (which span [hits], where it starts in tokens [hits])."""
    length, anchors = group.tokens.shape[1], np.unique(group.tokens[:, group.anchor])
    is_anchor = tokens == anchors[0] if len(anchors) == 1 else np.isin(tokens, anchors)
    starts = np.flatnonzero(is_anchor) - group.anchor
    starts = starts[(starts >= 0) & (starts + length <= len(tokens))]
    hashes = hash_windows(tokens, starts, length)
    # Spans of the same hash are neighbours, and each of them is compared.
    first, last = (np.searchsorted(group.hashes, hashes, side) for side in ("left", "right"))
    found = [(np.zeros(0, np.int64), np.zeros(0, np.int64))]
    for k in range((last - first).max(initial=0)):
        at = np.flatnonzero(first + k < last)
        member = first[at] + k
        for j in range(length):
            same = tokens[starts[at] + j] == group.tokens[member, j]
            at, member = at[same], member[same]
        found.append((group.which[member], starts[at]))
    which, starts = zip(*found)
    return np.concatenate(which), np.concatenate(starts)


# ---- spans in the rows -----------------------------------------------------------------------------------------------


def occurrences(
    rows: Rows, spans: list[np.ndarray], index: SuffixIndex | None
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield (which span [occurrences], pieces (PIECE) of them) in blocks. `span` of a piece is its occurrence.

    Each copy of a document in an order is an occurrence of its own. Raises UserError.
    """
    data, lengths = rows.data, np.array([len(span) for span in spans])
    is_order = isinstance(rows, Order)
    parts = [longest_part(span) if is_order else (0, span) for span in spans]  # what one document has
    sought = {part.tobytes(): part for _, part in parts}
    owners = [[k for k, (_, part) in enumerate(parts) if part.tobytes() == key] for key in sought]
    fans, owner = np.array([len(spans) for spans in owners]), np.concatenate(owners)
    first = np.cumsum(fans) - fans
    for found, documents, offsets in matches(data, [*sought.values()], index):
        hit = np.repeat(np.arange(len(found)), fans[found])  # once for every span with this part
        which = owner[first[found][hit] + ramps(fans[found])]
        if is_order:
            yield in_order(rows, spans, parts, which, documents[hit], offsets[hit])
        else:
            pieces = np.full(len(which), -1, PIECE)
            pieces["span"], pieces["served"], pieces["position"] = np.arange(len(which)), documents[hit], offsets[hit]
            pieces["tokens"], pieces["whole"] = lengths[which], True
            yield which, pieces


def in_order(
    order: Order,
    spans: list[np.ndarray],
    parts: list[tuple[int, np.ndarray]],
    which: np.ndarray,
    documents: np.ndarray,
    offsets: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """Return (which span [occurrences], pieces) for hits [hits] of the parts of spans (longest_part) in documents."""
    copies = order.inverse.places(documents)  # [hits, epochs]
    which, offsets, places = (np.repeat(array, copies.shape[1]) for array in (which, offsets, documents))
    places[:], kept = copies.ravel(), np.ones(len(which), bool)
    is_longer = np.array([len(part) < len(span) for (_, part), span in zip(parts, spans)])
    for k in np.flatnonzero(is_longer[which]).tolist():
        start = start_of_span(order, spans[which[k]], int(places[k]), int(offsets[k]) - parts[which[k]][0])
        if start:
            places[k], offsets[k] = start
        else:
            kept[k] = False
    which, lengths = which[kept], np.array([len(span) for span in spans])
    return which, order.inverse.pieces(places[kept], offsets[kept], lengths[which])


def longest_part(span: np.ndarray) -> tuple[int, np.ndarray]:
    """Return (where it starts, its tokens) of the longest part of a span that lies in one document in any case: the
    document can end behind each end-of-text token."""
    ends = np.flatnonzero(span == EOD) + 1
    return max(zip([0, *ends.tolist()], np.split(span, ends)), key=lambda part: len(part[1]))


def start_of_span(order: Order, span: np.ndarray, place: int, offset: int) -> tuple[int, int] | None:
    """Return (place, offset) of the document in which a span starts; None if the span is not there, or a document ends
    within it without an end-of-text token. A negative offset from a place is in a document before it."""
    data, doc_idx, compared = order.data, order.doc_idx, 0
    while offset < 0 and place > 0:
        place -= 1
        begin, end = data.span(int(doc_idx[place]))
        offset += end - begin
    start, number = (place, offset), place
    while offset >= 0 and compared < len(span) and number < len(doc_idx):
        begin, end = data.span(int(doc_idx[number]))
        part = span[compared : compared + end - begin - offset]
        if len(part) and compared and span[compared - 1] != EOD:
            return None
        if (data.read(begin + offset, len(part)) != part).any():
            return None
        compared, number, offset = compared + len(part), number + 1, 0
    return start if compared == len(span) else None


# ---- commands --------------------------------------------------------------------------------------------------------


def add_span_arguments(command: argparse.ArgumentParser, other: str, metavar: str, text: str, **options) -> None:
    """Add --tokens, --text, a third flag that can stand in their place, and --tokenizer and --json."""
    what = command.add_mutually_exclusive_group(required=True)
    what.add_argument("--tokens", metavar="12,7,9", help="token ids, one behind the other")
    what.add_argument("--text", metavar="TEXT", help="as the tokenizer writes it, with and without a space before it")
    what.add_argument(other, metavar=metavar, help=text, **options)
    command.add_argument("--tokenizer", metavar="FILE", help="tokenizer.json (default: the one beside the data)")
    command.add_argument("--json", action="store_true", help="print one JSON object a line")


def add_find_arguments(command: argparse.ArgumentParser) -> None:
    text = "a document, by its number in PREFIX.idx, from 0"
    add_span_arguments(command, "--document", "N", text, type=int)
    command.add_argument("--unserved", action="store_true", help="also print what the run never serves")


def add_count_arguments(command: argparse.ArgumentParser) -> None:
    add_span_arguments(command, "--terms", "FILE", "many texts, one a line; all are counted in one pass")
    command.add_argument("--at", metavar="1000,2000", help="as seen by these checkpoints (default: the last one)")


def numbers(flag: str, text: str) -> list[int]:
    try:
        return [int(number) for number in text.split(",")]
    except ValueError:
        raise UserError(f"{flag} {text}: give whole numbers with commas between them") from None


def read_lines(flag: str, file: str, limit: int) -> list[str]:
    """The lines of a file of at most `limit` bytes that a flag names. Raises UserError."""
    try:
        return read_small(Path(file), limit).decode().splitlines()
    except (OSError, ValueError) as error:
        raise UserError(f"{flag} {file} cannot be read: {reason(error)}") from None


def span_of(ids: list[int], data: IndexedTokens, where: str) -> np.ndarray:
    """Return token ids as an array in the dtype of the data. Raises UserError if the data cannot have them."""
    limits = np.iinfo(data.dtype)
    if outside := [id for id in ids if not limits.min <= id <= limits.max]:
        raise UserError(f"{where}: {outside[0]} is no {data.dtype.name}, which the tokens of {data.prefix} are")
    return np.array(ids, data.dtype)


def spans_of_texts(texts: list[str], file: object, data: IndexedTokens) -> list[list[np.ndarray]]:
    """Return for each text its tokens as written, then those with a space before it if that is another span.

    Raises UserError if there is no tokenizer, or a text has no tokens.
    """
    if not file:
        raise UserError(f"{data.prefix} has no tokenizer beside it; give --tokenizer tokenizer.json, or --tokens")
    tokenizer, result = load_tokenizer(file), []
    for text in texts:
        with tokenizer_errors(file):
            written, spaced = (tokenizer.encode(t, add_special_tokens=False).ids for t in (text, f" {text}"))
        if not written:
            raise UserError(f"the text {text!r} has no tokens in {file}")
        # If the space is a token of its own, whoever finds the text finds it also behind a space.
        is_other = not text[:1].isspace() and spaced[-len(written) :] != written
        result.append([span_of(ids, data, repr(text)) for ids in ([written, spaced] if is_other else [written])])
    return result


def asked_spans(args: argparse.Namespace, data: IndexedTokens, tokenizer: object) -> list[np.ndarray]:
    """Return the spans of --tokens or --text, and print which tokens a text has."""
    if args.tokens is not None:
        return [span_of(numbers("--tokens", args.tokens), data, "--tokens")]
    (spans,) = spans_of_texts([args.text], tokenizer, data)
    names = (", ".join(map(str, span.tolist())) for span in spans)
    print(f"tokens of the text: {'; with a space before it: '.join(names)}", file=sys.stderr)
    return spans


def find(args: argparse.Namespace, rows: Rows, tokenizer: object) -> None:
    """Print every piece of a document, or of a span, that a run of args.steps serves."""
    last, collected, seen, total = served_rows(rows, args.batch_size, args.steps), [], np.zeros(3, np.int64), 0
    for count, pieces in asked_pieces(args, rows, tokenizer):
        seen += tally(pieces, count, last)
        collected.append(pieces if args.unserved else pieces[(pieces["served"] >= 0) & (pieces["served"] < last)])
        total += len(collected[-1])
        if total > MOST:
            raise UserError(f"more than {MOST:,} places: too many to sort; `data.py count` counts them")
    found = sort_served(np.concatenate([np.zeros(0, PIECE), *collected]), last)
    for piece in as_json(found, args.batch_size, last):
        print(json.dumps(piece) if args.json else as_text(piece))
    whole, cut, never = seen.tolist()
    if not seen.any():
        return print("it occurs nowhere in the data", file=sys.stderr)
    what = "occurrences" if args.document is None else "copies in the order"
    served = f"served: {whole + cut:,}, of which {cut:,} cut by a row's end"
    print(f"{what}: {whole + cut + never:,}; {served}; never served: {never:,}", file=sys.stderr)


def asked_pieces(args: argparse.Namespace, rows: Rows, tokenizer: object) -> Iterator[tuple[int, np.ndarray]]:
    """Yield (number of occurrences, their pieces) of --document, --tokens or --text."""
    if args.document is not None:
        pieces = rows.document_pieces(args.document)
        yield len(np.unique(pieces["span"])), pieces
        return
    for which, pieces in occurrences(rows, asked_spans(args, rows.data, tokenizer), open_index(rows.data)):
        yield len(which), pieces


def tally(pieces: np.ndarray, count: int, rows: int) -> tuple[int, int, int]:
    """Return how many of `count` occurrences the first `rows` rows have whole, only in parts, and not at all."""
    pieces = pieces[(pieces["served"] >= 0) & (pieces["served"] < rows)]
    served, whole = len(np.unique(pieces["span"])), len(np.unique(pieces["span"][pieces["whole"]]))
    return whole, served - whole, count - served


def as_text(piece: dict) -> str:
    if piece["step"] is None:
        where = "never served"
    else:
        where = f"step {piece['step']}, row {piece['row']}, position {piece['position']}"
    document = ""
    if piece["document"] is not None:
        document = f": document {piece['document']} from {piece['offset']}, copy {piece['epoch']}"
    return f"{where}{document} ({piece['tokens']} tokens{'' if piece['whole'] else ', cut'})"


def count(args: argparse.Namespace, rows: Rows, tokenizer: object) -> None:
    """Print how often a run has seen a span, or each of many terms, by each of the checkpoints of --at."""
    steps = min(args.steps, len(rows) // args.batch_size)
    at = sorted({*numbers("--at", args.at)}) if args.at else [steps]
    if not 1 <= at[0] <= at[-1] <= steps:
        raise UserError(f"--at {args.at}: the run has the checkpoints 1 .. {steps}")
    if args.terms:
        names = list(dict.fromkeys(filter(None, read_lines("--terms", args.terms, 1 << 26))))
        if not names:
            raise UserError(f"--terms {args.terms} has no terms; give one a line")
        spans = spans_of_texts(names, tokenizer, rows.data)
    else:
        names, spans = [args.tokens or args.text], [asked_spans(args, rows.data, tokenizer)]
    for record in count_spans(rows, dict(zip(names, spans)), at, args.batch_size, open_index(rows.data)):
        if args.json:
            print(json.dumps(record))
        else:
            documents = "" if record["documents"] is None else f" and {record['documents']:,} documents"
            seen = f"{record['occurrences']:,} occurrences in {record['rows']:,} rows{documents}"
            print(printable(f"by step {record['step']}: {seen}: {record['term']}"))


def count_spans(
    rows: Rows,
    terms: dict[str, list[np.ndarray]],
    at: list[int],
    batch_size: int = 1024,
    index: SuffixIndex | None = None,
) -> Iterator[dict]:
    """Yield what `data.py count --json` prints, by term and checkpoint. A term occurs where one of its spans does.

    Counts the spans that lie whole in a row. at is ascending. Raises UserError if the terms occur in too many rows.
    """
    spans = [span for several in terms.values() for span in several]
    term_of = np.repeat(np.arange(len(terms)), [len(several) for several in terms.values()])
    last, buckets = served_rows(rows, batch_size, at[-1]), len(at)
    seen = np.zeros((len(terms), buckets), np.int64)
    firsts = {"rows": np.zeros(0, np.int64), "documents": np.zeros(0, np.int64)}
    sizes = {"rows": len(rows), "documents": rows.data.documents}
    for which, pieces in occurrences(rows, spans, index):
        pieces = pieces[pieces["whole"] & (pieces["served"] >= 0) & (pieces["served"] < last)]
        term, bucket = term_of[which[pieces["span"]]], np.searchsorted(at, pieces["served"] // batch_size, "right")
        np.add.at(seen, (term, bucket), 1)
        for name, items in (("rows", pieces["served"]), ("documents", pieces["document"])):
            codes = (term * sizes[name] + items) * buckets + bucket
            firsts[name] = first_seen(np.concatenate([firsts[name], codes]), buckets)
            if len(firsts[name]) > MOST_PAIRS:
                raise UserError(f"the terms are in more than {MOST_PAIRS:,} {name}; count fewer at a time")
    counts = {"occurrences": seen}
    for name, codes in firsts.items():
        counts[name] = np.zeros_like(seen)
        np.add.at(counts[name], (codes // buckets // sizes[name], codes % buckets), 1)
    for k, term in enumerate(terms):
        for bucket, step in enumerate(at):
            record = {name: int(array[k, : bucket + 1].sum()) for name, array in counts.items()}
            if not isinstance(rows, Order):
                record["documents"] = None
            yield {"term": term, "step": step, **record}


def first_seen(codes: np.ndarray, buckets: int) -> np.ndarray:
    """Return, of codes item * buckets + bucket, the one with the smallest bucket of each item."""
    codes = np.unique(codes)
    return codes[np.diff(codes // buckets, prepend=-1) > 0]
