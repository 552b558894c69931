"""bench.tiles: its launches compute attention, it finds tiles that cannot be used, and it chooses by the times."""

import json
import sys
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bench import tiles as bench_tiles
from bench.tiles import KERNELS, OWN_KEYS, OWN_QUERIES, Timed, best, choose, draw, entry, parse, table, time_all
from kernels import tiles
from kernels.tiles import Attention, Tile
from model import SIZES
from runtime.errors import UserError, run_command

A, B, C = Tile(128, 128, 8, 2), Tile(128, 64, 8, 3), Tile(64, 64, 4, 2)


@pytest.fixture
def one_round(monkeypatch):
    """Every candidate is launched once in a turn, and takes one second."""
    monkeypatch.setattr(bench_tiles, "measure", lambda call, device, flush: [call() or 1.0])


def gradients(qkv: Tensor, d_out: Tensor) -> tuple[Tensor, Tensor]:
    """out and the gradient of qkv by torch in float64. q and k count as rotated already."""
    qkv = qkv.double().requires_grad_()
    q, k, v = qkv.permute(3, 0, 2, 1, 4)
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)
    return out.detach(), torch.autograd.grad(out, qkv, d_out.double())[0]


@pytest.mark.parametrize("two_launches", [False, True])
def test_every_candidate_computes_attention(two_launches, triton_kernels, one_round, monkeypatch, device):
    """At a toy shape in the interpreter: no tile has an obstacle, and the numbers are those of torch."""
    drawn = []
    monkeypatch.setattr(bench_tiles, "draw", lambda *shape: drawn.append(draw(*shape)) or drawn[0])
    like = torch.empty(0, dtype=torch.float16, device=device)
    shipped = Attention(A, A, A, A if two_launches else None)
    timed = time_all((1, 140, 1, 32), like, shipped)
    assert timed.keys() == KERNELS.keys()
    for name, kernel in KERNELS.items():
        assert {t.tile for t in timed[name]} == set(kernel.candidates)
        assert all(t.obstacle == "" and len(t.seconds) == bench_tiles.TURNS for t in timed[name]), name
        if kernel.shipped(shipped):
            assert timed[name][0].tile == kernel.shipped(shipped)
    (tensors,) = drawn
    for found, exact in zip((tensors.out, tensors.d_qkv), gradients(tensors.qkv, tensors.d_out)):
        assert (found - exact).norm() < 2e-3 * exact.norm()
    assert choose(timed, shipped) == Attention(A, A, A)  # all take the same time, so two launches take twice as long


@dataclass
class Fake:
    """Launches of a kernel that is right with tile A, and wrong in one way with every other one."""

    wrong: str
    launches: int = 0

    def __call__(self, tensors, tile: Tile) -> None:
        self.launches += 1
        tensors.out.fill_(1.0)
        if tile == A:
            return
        if self.wrong == "raises":
            raise RuntimeError("out of resource: shared memory\nRequired: 1")
        if self.wrong == "other numbers":
            tensors.out.fill_(1.1)
        if self.wrong == "not finite":
            tensors.out[0, 0] = torch.nan
        if self.wrong == "other bits":
            tensors.out.add_(1e-6 * self.launches)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("raises", "RuntimeError: out of resource: shared memory"),
        ("other numbers", "out differs from the shipped tile's by 1.0e-01"),
        ("not finite", "different bits"),
        ("other bits", "two launches give different bits"),
    ],
)
def test_a_tile_that_cannot_be_used_is_not_timed(wrong, message, one_round):
    kernel = KERNELS["forward"]._replace(launch=Fake(wrong), outputs=("out",), candidates=[B, A])
    tensors = draw(1, 4, 1, 16, torch.empty(0))
    shipped, other = bench_tiles.time_kernel(kernel, A, tensors, flush=lambda: None)
    assert (shipped.tile, shipped.obstacle, len(shipped.seconds)) == (A, "", bench_tiles.TURNS)
    assert (other.tile, other.seconds) == (B, [])
    assert message in other.obstacle
    assert best([shipped, other], A) == shipped
    assert "shipped" in table({name: [shipped, other] for name in KERNELS}, Attention(A, A, A), 1e9).splitlines()[1]


def times(**seconds: dict[Tile, float]) -> dict[str, list[Timed]]:
    return {
        name: [Timed(tile, [s, s, 9.0]) for tile, s in seconds.get(name.replace(" ", "_"), {}).items()]
        or [Timed(A, [], "does not run")]
        for name in KERNELS
    }


def test_the_fastest_tile_is_chosen_unless_the_shipped_one_is_as_fast():
    timed = times(forward={A: 1.0, B: 0.97}, dq={A: 1.0, B: 0.99}, dk_and_dv={A: 2.0, C: 1.0})
    assert choose(timed, Attention(A, A, A)) == Attention(B, A, C)
    assert choose(times(dq={B: 1.0}), Attention(A, A, A, C)) == Attention(A, B, A, C)  # nothing else runs


@pytest.mark.parametrize(
    ("one", "two", "shipped", "launches"),
    [
        (1.0, 0.99, None, 1),
        (1.0, 0.97, None, 2),
        (0.99, 1.0, B, 2),
        (0.97, 1.0, B, 1),
    ],
)
def test_dk_and_dv_keep_their_number_of_launches_unless_the_other_is_faster(one, two, shipped, launches):
    timed = times(forward={A: 1.0}, dq={A: 1.0}, dk_and_dv={A: one}, dk={B: two / 2}, dv={C: two / 2})
    chosen = choose(timed, Attention(A, A, B, shipped))
    assert chosen == (Attention(A, A, A) if launches == 1 else Attention(A, A, B, C))


def test_the_entry_is_a_line_of_the_table():
    for row in tiles.ATTENTION.values():
        for head_dim, launches in row.items():
            assert eval("{" + entry(head_dim, launches) + "}") == {head_dim: launches}
    with open(tiles.__file__) as file:
        lines = file.read().splitlines()
    assert entry(64, tiles.ATTENTION[90][64]) in lines


def test_candidates_fit_the_kernels():
    """As tests/kernels/test_attention.py requires of the table. Tiles that fit two programs of H100 are among them."""
    assert all(tile.block_q % tile.block_k == 0 for tile in OWN_QUERIES)
    assert all(tile.block_k % tile.block_q == 0 for tile in OWN_KEYS)
    assert {Tile(128, 64, 8, 3), Tile(128, 64, 8, 2), Tile(64, 64, 4, 2)} <= set(OWN_QUERIES)
    assert Tile(64, 64, 4, 2) in OWN_KEYS
    assert {head_dim: SIZES[size].head_dim for head_dim, size in bench_tiles.SIZE_OF.items()} == {
        head_dim: head_dim for head_dim in sorted({config.head_dim for config in SIZES.values()})
    }


def test_settings():
    assert parse([]).sizes == bench_tiles.SIZE_OF
    assert parse(["--head-dim", "128,64"]).sizes == {128: "1.4b", 64: "160m"}
    assert parse(["--head-dim", "128", "--size", "12b"]).sizes == {128: "12b"}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--head-dim", "48"], "--head-dim knows 32,64,80,128,256, not 48"),
        (["--head-dim", "64", "--size", "9b"], "not 9b"),
        (["--size", "12b"], "--size 12b needs --head-dim 128"),
        (["--batch", "0"], "must be positive"),
        (["--json", "/nowhere/x.json"], "there is no directory /nowhere"),
    ],
)
def test_refuses_settings(flags, message):
    with pytest.raises(UserError, match=message):
        parse(flags)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_refuses_without_a_gpu(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["bench.tiles"])
    with pytest.raises(SystemExit, match=r"^error: bench.tiles needs a GPU of .*: there is none$"):
        run_command(bench_tiles.main)


def test_the_report(triton_kernels, one_round, monkeypatch, tmp_path, capsys, device):
    """The whole of it, with two candidates."""
    few = {name: kernel._replace(candidates=kernel.candidates[3:5]) for name, kernel in KERNELS.items()}
    monkeypatch.setattr(bench_tiles, "KERNELS", few)
    file = tmp_path / "tiles.json"
    flags = ["--head-dim", "32", "--size", "14m", "--batch", "1", "--seq-len", "20", "--json", str(file)]
    bench_tiles.run(parse(flags), "the command", torch.empty(0, dtype=torch.float16, device=device))
    report, printed = json.loads(file.read_text()), capsys.readouterr().out
    shipped = entry(32, tiles.ATTENTION[report["arch"]][32])
    assert report["entries"] == {"32": shipped.strip()}
    assert report["command"] == "the command"
    assert f"ATTENTION[{report['arch']}], as shipped:\n{shipped}\n" in printed
    assert [t["seconds"] for t in report["times"]["14m"]["dq"]] == [[1.0] * bench_tiles.TURNS] * 3
    assert "head_dim 32, the shape of 14m: 1 x 20 tokens, 4 heads" in printed
