"""--bitwise: weights, moments, losses and gradient norms have the same bits on 1, 2 and 4 ranks."""

import pytest
from small_runs import STEPS, assert_same_bits, exact_records, launcher, metrics, trained

import train
from runtime.errors import UserError
from runtime.ranks import init_dist

BITWISE = ("--bitwise", "--batch-size", 16, "--micro-batch", 2)


@pytest.fixture(scope="module")
def launch(corpus, tmp_path_factory):
    return launcher(corpus, tmp_path_factory.mktemp("ranks"))


def test_bitwise_on_one_and_two_ranks(launch):
    """Also if the number of ranks changes halfway. The first gradient norm is above 1, so clipping is active."""
    one = trained(launch(1, *BITWISE, out="bit-1"))
    assert metrics(one)[0]["grad_norm"] > 1
    trained(launch(2, *BITWISE, "--stop-at", 5, "--shard", "full", out="bit-2"))
    two = trained(launch(1, *BITWISE, out="bit-2"))
    assert exact_records(two) == exact_records(one)
    assert_same_bits(two / f"step{STEPS}", one / f"step{STEPS}")


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_bitwise_for_fifty_steps(launch, precision):
    flags = (*BITWISE, "--steps", 50, "--precision", precision)
    runs = [trained(launch(world, *flags, out=f"fifty-{precision}-{world}")) for world in (1, 2, 4)]
    assert max(m["grad_norm"] for m in metrics(runs[0])) > 1
    for other in runs[1:]:
        assert exact_records(other) == exact_records(runs[0])
        assert_same_bits(other / "step50", runs[0] / "step50")


@pytest.mark.slow
def test_bitwise_resumed_after_every_step_on_other_ranks(launch):
    flags = (*BITWISE, "--steps", 20)
    whole = trained(launch(1, *flags, out="twenty"))
    for k in range(1, 21):
        handed = trained(launch((2, 1, 4, 2)[k % 4], *flags, "--stop-at", k, out="handed"))
    assert exact_records(handed) == exact_records(whole)
    assert_same_bits(handed / "step20", whole / "step20")


def test_bitwise_micro_batches_do_not_depend_on_ranks(monkeypatch):
    for batch, expected in ((1024, 8), (16, 2), (4, 1)):
        for world in ("1", "2", "4"):
            monkeypatch.setenv("WORLD_SIZE", world)
            assert (
                train.parse(["--size", "14m", "--data", "x", "--bitwise", "--batch-size", str(batch)]).micro_batch
                == expected
            )


def test_bitwise_refuses_what_it_cannot_add_in_pairs(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(UserError, match=r"--bitwise .* needs 1, 2, 4, 8 ... ranks, not 3"):
        init_dist(bitwise=True)
    with pytest.raises(UserError, match=r"--bitwise .*--shard auto, grad or full, not none"):
        train.parse(["--size", "14m", "--bitwise", "--shard", "none"])
