"""Log-likelihoods of continuations, against float64 softmax of one text at a time, and against greedy generation."""

import numpy as np
import pytest
import torch

pytest.importorskip("pyarrow")
from corpus.tokenizer import byte_tokenizer
from generate import generate
from model import SIZES, Pythia
from runtime.errors import UserError
from studies.likelihood import compare_greedy, encode_pair, pad, score


@pytest.fixture(scope="module")
def model() -> Pythia:
    torch.manual_seed(0)
    model = Pythia(SIZES["nano"]).double().requires_grad_(False)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.normal_(0, 0.3)
    return model


def test_scores_are_those_of_one_text_at_a_time(model):
    rng = np.random.default_rng(0)
    pairs = [(rng.integers(0, 256, n).tolist(), int(rng.integers(1, n))) for n in (2, 9, 30, 17, 5, 5)]
    prompt = [5, 9, 7]  # and one that the model writes itself
    pairs.append((prompt + list(generate(model, prompt, 4, 0.0, 0, 0)), 3))
    found, greedy = score(model, **pad(pairs))
    for (tokens, context), ours in zip(pairs, found):
        logp = model(torch.tensor(tokens)[None])[0].log_softmax(-1)
        expected = sum(logp[i - 1, tokens[i]] for i in range(context, len(tokens)))
        assert ours == pytest.approx(expected.item(), abs=1e-9)
    assert greedy.tolist() == [False] * 6 + [True]


@pytest.mark.parametrize("chunk", [1, 3, 7, 100])
def test_greedy_over_parts_of_the_vocabulary(chunk, monkeypatch):
    """Of equal logits the lowest id is predicted, wherever the vocabulary is cut."""
    monkeypatch.setattr("studies.likelihood.VOCAB_CHUNK", chunk)
    generator = torch.Generator().manual_seed(0)
    y = torch.randint(-2, 3, (200, 4), generator=generator).double()
    weight = torch.randint(-1, 2, (20, 4), generator=generator).double()  # many ties
    targets = torch.randint(0, 20, (200,), generator=generator)
    for banned in (None, 0, 11):
        logits = y @ weight.T
        surprisal = -logits.log_softmax(1)[range(200), targets]
        if banned is not None:
            logits[:, banned] = -torch.inf
        hit, margin, nll = compare_greedy(y, weight, targets, banned)
        assert torch.equal(hit, logits.argmax(1) == targets)
        torch.testing.assert_close(nll, surprisal, rtol=0, atol=1e-12)
        others = logits.scatter(1, targets[:, None], -torch.inf).amax(1)
        torch.testing.assert_close(margin, (y @ weight.T)[range(200), targets] - others, rtol=0, atol=1e-12)


def test_choices_of_one_token_share_a_row(model, monkeypatch):
    pairs = [([5, 9, 7, choice], 3) for choice in (1, 2, 3)] + [([5, 9, 7, 0, 4], 3), ([5, 9, 7, 8, 4], 4)]
    alone, seen, final_hidden = [score(model, **pad([pair])) for pair in pairs], [], model.final_hidden
    monkeypatch.setattr(model, "final_hidden", lambda tokens: seen.append(tokens) or final_hidden(tokens))
    found, greedy = score(model, **pad(pairs))
    assert [len(tokens) for tokens in seen] == [2]  # 5 9 7 with and without the 0 after it are one row
    np.testing.assert_allclose(found, [likelihood[0] for likelihood, _ in alone], rtol=0, atol=1e-9)
    assert greedy.tolist() == [hit[0] for _, hit in alone]


def test_pairs():
    ids = byte_tokenizer().encode("Q: 1? 2").ids
    assert encode_pair(byte_tokenizer(), "Q: 1?", " 2") == (ids, 5)
    assert encode_pair(byte_tokenizer(), "Q: 1? ", "2") == (ids, 5)  # the space is the answer's
    assert encode_pair(byte_tokenizer(), "", "2") == ([0, ids[-1]], 1)
    with pytest.raises(UserError, match="no token after its context"):
        pad([([1, 2], 1), ([1, 2], 2)])


def test_tokens_that_the_model_does_not_have(model):
    with pytest.raises(UserError, match="token id 256 is not one of the 256 of the model"):
        score(model, **pad([([1, 256], 1)]))
