"""The Pythia suite as one table: the shape of every model, its training recipe, and the steps of its checkpoints.

The paper (Biderman et al. 2023, arXiv:2304.01373), the published configuration files and the models disagree in places.
The table has what the models were really trained with; the column `paper` has what the paper says. One more size,
nano, is none of the suite.
"""

import re
from dataclasses import dataclass

END_OF_TEXT = 0  # id of <|endoftext|>, the last token of every document
VOCAB_USED = 50_277  # ids of the tokenizer; `vocab` is padded to a multiple of 128 x tensor-parallel ranks


@dataclass(frozen=True)
class Config:
    """The shape of a GPT-NeoX network and its training recipe."""

    name: str
    layers: int
    hidden: int
    heads: int
    vocab: int = 50_304
    lr: float = 1e-3  # peak; the floor is a tenth of the peak
    init: str = "small"  # "small": small_init and wang_init; "normal": GPT-NeoX defaults (see model.pythia.init_std)
    precision: str = "fp16"  # of the published training
    paper: str = ""  # where the paper or the model card says something else: what they say

    seq_len: int = 2048
    ffn_ratio: int = 4
    rotary_fraction: float = 0.25
    rotary_base: float = 10_000.0
    eps: float = 1e-5  # of every LayerNorm
    gelu: str = "tanh"  # as trained; published config.json files evaluate by erf ("none")
    parallel: bool = True  # attention and MLP read the same residual; False: GPT-NeoX models outside the suite

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads

    @property
    def rotary_dim(self) -> int:
        """Rotated columns of a head: a quarter, rounded down."""
        return int(self.rotary_fraction * self.head_dim)

    @property
    def ffn(self) -> int:
        return self.ffn_ratio * self.hidden

    @property
    def layer_parameters(self) -> int:
        """Weights and biases of one layer: two LayerNorms, QKV, attention output, and the two MLP projections."""
        h, f = self.hidden, self.ffn
        return 4 * h + (3 * h * h + 3 * h) + (h * h + h) + (f * h + f) + (h * f + h)

    @property
    def parameters(self) -> int:
        """All parameters. Embedding and unembedding are not tied; both are padded."""
        return self.non_embedding_parameters + 2 * self.vocab * self.hidden

    @property
    def non_embedding_parameters(self) -> int:
        return self.layers * self.layer_parameters + 2 * self.hidden

    def flops_per_token(self, seq_len: int | None = None, causal: bool = False) -> int:
        """Floating-point operations to train on one token: forward and backward, without recomputation.

        6 for every weight of a matmul (with the unembedding, without the embedding), and 12 x layers x hidden x seq_len
        for attention (Chowdhery et al. 2022, PaLM, appendix B). causal=True counts half of the latter.
        """
        attention = 12 * self.layers * self.hidden * (seq_len or self.seq_len)
        return 6 * (self.non_embedding_parameters + self.vocab * self.hidden) + attention // (2 if causal else 1)


# Common to all: 143,000 steps of 1024 x 2048 tokens, AdamW (0.9, 0.95, 1e-8), weight decay 0.1, clipping at 1.
_LARGE_INIT = "small_init and wang_init (Table 6); the configurations that ran leave both out"
_TABLE = (
    Config("14m", layers=6, hidden=128, heads=4, lr=1e-3),
    Config("31m", layers=6, hidden=256, heads=8, lr=1e-3),
    Config("70m", layers=6, hidden=512, heads=8, lr=1e-3),
    Config("160m", layers=12, hidden=768, heads=12, lr=6e-4),
    Config("410m", layers=24, hidden=1024, heads=16, lr=3e-4),
    # bfloat16 ran for pythia-1b after an unrecoverable spike in float16; pythia-1b-deduped is float16.
    Config("1b", layers=16, hidden=2048, heads=8, lr=2.5e-4, precision="bf16", paper="lr 3e-4, float16"),
    Config("1.4b", layers=24, hidden=2048, heads=16, lr=2e-4),
    Config("2.8b", layers=32, hidden=2560, heads=32, lr=1.6e-4),
    Config("6.9b", layers=32, hidden=4096, heads=32, vocab=50_432, lr=1.2e-4, init="normal", paper=_LARGE_INIT),
    Config("12b", layers=36, hidden=5120, heads=40, vocab=50_688, lr=1.2e-4, init="normal", paper=_LARGE_INIT),
)
SUITE: dict[str, Config] = {config.name: config for config in _TABLE}

# None of the suite: a model for examples and tests, which a laptop trains in a minute. Its vocabulary has room for the
# 245 ids of corpus.tokenizer.byte_tokenizer. With 50,304 logits almost all the time would go into the unembedding.
NANO = Config("nano", layers=2, hidden=128, heads=4, vocab=256, precision="bf16")
SIZES: dict[str, Config] = SUITE | {NANO.name: NANO}


def is_published_step(step: int, last: int) -> bool:
    """Whether Pythia has a checkpoint of this step: 0, 1, 2, 4 ... 512, every 1000th, and the last. 154 in all."""
    return step in (0, last) or step % 1000 == 0 or (step <= 512 and step.bit_count() == 1)


def parse_steps(text: str, last: int) -> set[int]:
    """The steps of a list such as 0,512,1000:143000:10000 in a run of `last` steps. A:B:N is A, A + N ... up to B.

    Raises ValueError: the message says which part of the list is wrong.
    """
    steps: set[int] = set()
    for part in text.split(","):
        match = re.fullmatch(r"(\d{1,12})(?::(\d{1,12}):(\d{1,12}))?", part.strip(), re.ASCII)
        first, end, every = map(int, (match[1], match[2] or match[1], match[3] or 1)) if match else (0, 0, 0)
        if first > end or not every:
            raise ValueError(f"{part!r} is neither a step nor FIRST:LAST:EVERY, such as 1000:5000:500")
        if end > last:
            raise ValueError(f"{part!r} lies past step {last}, the last of the run")
        steps.update(range(first, end + 1, every))
    return steps
