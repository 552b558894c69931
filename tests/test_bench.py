"""bench.step: its peers are our network, and its command measures and reports."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bench.peers import PACKAGES, build_peer, installed
from bench.step import check_equal, parse
from errors import UserError
from model import SIZES, Pythia
from parallel import squared_norm

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def ours():
    """A small Pythia whose biases and LayerNorms are not at their initial zeros and ones."""
    model = Pythia(replace(SIZES["14m"], layers=2, hidden=48, heads=3, vocab=512, seq_len=32, rotary_fraction=0.5))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


@pytest.mark.parametrize("peer", PACKAGES)
def test_peers_are_our_network(peer, ours):
    if not installed(peer):
        pytest.skip(f"{PACKAGES[peer]} is not installed")
    network, loss_of = build_peer(peer, ours)
    tokens = torch.randint(512, (3, 33), generator=torch.Generator().manual_seed(1))
    ours.zero_grad()
    loss = ours(tokens[:, :-1], tokens[:, 1:])
    loss.backward()
    theirs = loss_of(network, tokens[:, :-1], tokens[:, 1:])
    theirs.backward()
    assert network.training
    assert theirs.item() == pytest.approx(loss.item(), abs=1e-5)
    norms = [squared_norm(list(model.parameters())).sqrt().item() for model in (network, ours)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)
    assert sum(p.numel() for p in network.parameters()) == sum(p.numel() for p in ours.parameters())


def test_another_network_is_refused():
    step = {"loss": 10.8, "gradient_norm": 2.0}
    check_equal("fp32", "plain", step, step)
    for other in ({"loss": 10.8003}, {"gradient_norm": 2.01}, {"loss": float("nan")}, {"gradient_norm": float("nan")}):
        with pytest.raises(UserError, match="plain is another network"):
            check_equal("fp32", "plain", step | other, step)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--against", "plain,jax"], "--against knows hf, litgpt, plain, not jax"),
        (["--rounds", "0"], "--rounds must be positive, not 0"),
        (["--seq-len", "-1"], "--seq-len must be positive, not -1"),
        (["--json", "nowhere/at/all.json"], "there is no directory nowhere/at"),
        (["--size", "13m"], "invalid choice"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(UserError, match=message):
        parse(arguments)


@pytest.mark.slow
@pytest.mark.parametrize("mode", [[], ["--alone"]])
def test_command(mode, tmp_path):
    arguments = ["--batch", "1", "--seq-len", "16", "--rounds", "1", "--no-compile", "--json", str(tmp_path / "a.json")]
    command = [sys.executable, "-m", "bench.step", *arguments, *mode]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stderr
    report = json.loads((tmp_path / "a.json").read_text())
    assert report["settings"]["seq_len"] == 16
    assert report["machine"]["versions"]["torch"] == torch.__version__
    assert report["gemm_flops_per_s"] > 0
    arms = report["runs"]["tuned"]
    assert list(arms) == ["tripod", "hf", "litgpt", "plain"]
    for name, arm in arms.items():
        if name != "tripod" and not installed(name):
            assert arm == {"missing": "not installed"}
            assert f"{name:<16}not installed" in run.stdout
            continue
        assert arm["warm_up"][0]["loss"] == pytest.approx(arms["tripod"]["warm_up"][0]["loss"], abs=1e-4)
        kept = [m for m in arm["measurements"] if m["kept"]]
        assert len(kept) == (2 if mode else 1)
        assert all(step["seconds"] > 0 and step["page_faults"] >= 0 for m in kept for step in m["steps"])
        summary = arm["summary"]
        assert summary["tokens_per_s_min"] <= summary["tokens_per_s"] <= summary["tokens_per_s_max"]
        assert arm["peak_bytes"] > 1e8
    assert ("second pass over first" in run.stdout) == bool(mode)


def test_compile_is_a_name_of_the_plain_network():
    assert parse(["--against", "hf,compile,plain"]).against == ["hf", "plain"]
