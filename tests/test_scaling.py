"""The model of a step's time: against sums by hand, at its limits, and by measured rates."""

import json
from itertools import pairwise

import pytest

from model import SIZES
from plan import time as scaling
from plan.time import Group, Rates
from runtime.errors import UserError

ROUND = Rates(product=500e12, attention=250e12, copy=2e12, link=300e9, network=100e9)
US = 1e-6


def time(size: str, rates: Rates, shard: str, world: int, micro_batch: int = 4, whole: bool = True, **options):
    micro_steps = options.pop("batch", 1024) // (world * micro_batch)
    args = micro_batch, 2048, "bf16", options.pop("recompute", "none"), shard, world, min(world, 8), micro_steps, whole
    return scaling.step_time(SIZES[size], rates, *args)


def test_a_step_by_hand():
    """1.4b on two nodes of 8, --shard full --recompute cheap, 16 micro-steps of 4 x 2048 tokens, gradients once."""
    tokens, hidden, vocab, everything = 4 * 2048, 2048, 50_304, 1_414_647_808
    layer = (3 + 1 + 4 + 4) * hidden**2 + (3 + 1 + 4 + 1 + 4) * hidden  # matrices; biases and LayerNorms
    activation = 2 * tokens * hidden / 2e12  # seconds to read a tensor [tokens, hidden], or to write it
    scores = 4 * 4 * 2048**2 * hidden / 2  # FLOPs of queries times keys and of weights times values, half of them

    forward = 2 * tokens * layer / 500e12 + scores / 250e12
    forward += (3 + 3) * activation  # x, attn, mlp -> their sum and its two norms
    forward += activation * (1 + 8)  # a quarter of q and of k, read and written; GELU of [tokens, 4 hidden]
    backward = 4 * tokens * layer / 500e12 + 2.5 * scores / 250e12
    backward += (5 + 12 + 3 + 2) * activation  # norms; da, h -> dh; the bias of q, k, v; d_out and out in row sums
    backward += (6 + 8) * activation  # norms and GELU once more
    loss = (
        3 * 2 * tokens * vocab * hidden / 500e12 + 2 * 2 * tokens * vocab / 2e12 + 2 * (2 * 4 * vocab * hidden) / 2e12
    )

    tables = everything - 24 * layer
    once = 16 * (2 * 24 * layer + tables) * (6 / 16 + 4 * 2)  # weights: rounded a sixteenth each, in, on, unpacked
    once += 16 * everything * (2 + 4 + 4)  # gradients, added to their sums
    once += everything * (4 + 4 + 4 + 4)  # packed, in, on
    once += everything / 16 * (4 + 4 * (4 + 4))  # the norm, and AdamW
    compute = 16 * (24 * (forward + backward) + loss) + once / 2e12

    hops = 14 * 3.4 * US + 14 * US  # fifteen, one of them over the network
    gather, gather_tables = (15 / 16 * 2 * n / 100e9 + hops for n in (layer, tables))
    reduce, reduce_tables = (15 / 16 * 4 * n / 100e9 + hops for n in (layer, tables))
    assert gather < forward < gather + reduce < backward  # all but first and last is hidden
    exposed = 16 * (gather_tables + gather) + 16 * gather + reduce + reduce_tables

    found = time("1.4b", ROUND, "full", 16, recompute="cheap")
    assert found.compute == pytest.approx(compute, rel=1e-9)
    assert found.exposed == pytest.approx(exposed, rel=1e-9)
    assert found.total == found.compute + found.exposed

    # Over a quarter of the network the forward pass does not hide gathers, nor the last backward pass gathers and
    # reductions: what is over is waited for after every layer but one.
    gather, gather_tables, reduce, reduce_tables = (
        4 * (x - hops) + hops for x in (gather, gather_tables, reduce, reduce_tables)
    )
    assert forward < gather < backward < gather + reduce
    exposed = 16 * (gather_tables + gather + 23 * (gather - forward))
    exposed += 15 * gather + (gather + 23 * (gather + reduce - backward) + reduce + reduce_tables)
    found = time("1.4b", ROUND._replace(network=25e9), "full", 16, recompute="cheap")
    assert found.exposed == pytest.approx(exposed, rel=1e-9)


def test_full_recompute_costs_a_forward_pass():
    layer_weights, scores = 12 * 2048**2, 4 * 2048 * 2048 / 2  # FLOPs of a token: two a weight; scores, values
    flops = 24 * (2 * layer_weights / 500e12 + scores / 250e12)
    passes = 24 * (6 + 1 + 8) * 2 * 2048 / 2e12
    times = [time("1.4b", ROUND, "none", 1, recompute=recompute).compute for recompute in ("none", "cheap", "full")]
    assert times[2] - times[0] == pytest.approx(1024 * 2048 * (flops + passes), rel=1e-3)
    assert times == sorted(times)


def test_limits(monkeypatch):
    assert time("160m", ROUND, "none", 1).exposed == 0
    for shard in ("none", "grad", "hybrid", "full"):
        for whole in (True, shard == "none"):
            assert time("1.4b", ROUND, shard, 16, whole=whole).exposed > 0
            infinite = ROUND._replace(link=float("inf"), network=float("inf"))
            with monkeypatch.context() as patch:
                patch.setattr(scaling, "LINK_HOP", 0)
                patch.setattr(scaling, "NETWORK_HOP", 0)
                assert time("1.4b", infinite, shard, 16, whole=whole).exposed == 0
    # On the fastest of GPUs the host is what is waited for.
    infinite = Rates(*[float("inf")] * 5)
    assert time("14m", infinite, "none", 1).compute == pytest.approx(256 * 6 * (0.2e-3 + 0.4e-3))


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("shard", ["none", "grad", "hybrid", "full"])
def test_what_travels_is_what_parallel_tells(shard, whole):
    """On so slow a network that nothing else counts: bytes into the busiest node, or along a link, of 4 micro-steps."""
    weights, layers, sums = 1_414_647_808, 24 * SIZES["1.4b"].layer_parameters, 1 if whole else 4
    fetched = 4 * (weights - layers + 2 * layers)  # tables once a micro-step, layers twice
    rates = ROUND._replace(link=3e3, network=1e3)
    expected = {
        "none": sums * 2 * 15 / 16 * 4 * weights / 1e3,
        "grad": 15 / 16 * (2 * weights + sums * 4 * weights) / 1e3,
        "full": 15 / 16 * (2 * fetched + sums * 4 * weights) / 1e3,
        "hybrid": 7 / 8 * (2 * fetched + sums * 4 * weights) / 3e3 + sums * 2 * 1 / 2 * 4 * weights / 1e3,
    }
    found = time("1.4b", rates, shard, 16, micro_batch=4, whole=whole, batch=256)
    assert found.exposed == pytest.approx(expected[shard], rel=1e-6)


def test_collectives():
    full, rates = Group(ranks=512, nodes=64, beside=1), ROUND
    assert scaling.ring(0, full, rates) == pytest.approx(448 * 3.4 * US + 63 * 14 * US)
    assert scaling.ring(512e9, full, rates) == pytest.approx(511 / 100, rel=1e-3)
    assert scaling.all_reduce(0, full, rates) == pytest.approx(2 * (7 * 3.4 * US + 6 * 14 * US))
    assert scaling.ring(8e9, Group(8, 1, 1), rates) == pytest.approx(7 / 300, rel=1e-2)
    assert scaling.ring(8e9, Group(1, 1, 8), rates) == 0
    assert scaling.groups("full", 16, 8) == (Group(16, 2, 1), Group(1, 1, 8))
    assert scaling.groups("grad", 4, 8) == (Group(4, 1, 1), Group(1, 1, 4))
    assert scaling.groups("none", 16, 8) == (Group(1, 1, 8), Group(16, 2, 1))
    assert scaling.groups("hybrid", 32, 8) == (Group(8, 1, 1), Group(4, 4, 8))


@pytest.mark.parametrize("shard", ["none", "grad", "hybrid", "full"])
@pytest.mark.parametrize("size", ["70m", "12b"])
def test_more_gpus_are_faster_and_cost_more(size, shard):
    """At one setting, of two micro-steps or more, which add up gradients alike."""
    for gpu in ("H100", "A100-40GB", "4090"):
        rates = scaling.assumed(SIZES[size], "bf16", gpu)
        times = {world: time(size, rates, shard, world, micro_batch=1) for world in (16, 32, 64, 128, 256, 512)}
        for few, many in pairwise(times):
            assert times[many].compute < times[few].compute
            assert many * times[many].total > 0.999 * few * times[few].total


def test_faster_is_faster():
    """Every rate, down to a network that hides nothing and up to one that hides all."""
    for shard in ("none", "grad", "hybrid", "full"):
        for name in Rates._fields:
            slower, faster = (ROUND._replace(**{name: getattr(ROUND, name) * x}) for x in (0.1, 10))
            totals = [time("12b", rates, shard, 32, micro_batch=1).total for rates in (slower, ROUND, faster)]
            assert totals == sorted(totals, reverse=True)
        sooner, later = (time("12b", ROUND._replace(network=x), shard, 32).exposed for x in (1e12, 1e9))
        assert sooner < later


def test_assumed_rates():
    large = 0.68 * 989e12
    rates = [scaling.assumed(config, "bf16", "H100") for config in SIZES.values()]
    assert all(0.25 * large < r.product < large for r in rates)
    assert rates[-1].product > rates[3].product > rates[0].product  # narrow models are slower
    assert rates[0][1:] == (large / 2, 0.85 * 3.35e12, 360e9, 320e9)
    assert scaling.assumed(SIZES["1b"], "fp32", "H100").product < 67e12


# Measured rates


def write(folder, name: str, **content) -> None:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(json.dumps({"gpu": "NVIDIA H100 80GB HBM3"} | content))


def test_measured_rates_replace_assumed_ones(tmp_path, monkeypatch):
    monkeypatch.setattr(scaling, "RESULTS", tmp_path)
    known, config = scaling.known_rates, SIZES["1.4b"]
    folder = tmp_path / "h100"
    write(folder, "roofline.json", date="2026-01-01", copy_bytes_per_s=1e12, product_flops_per_s={"1.4b": 1e12})
    write(tmp_path, "roofline-new.json", date="2026-02-01", copy_bytes_per_s=3e12, product_flops_per_s={"1.4b": 5e14})
    write(tmp_path, "roofline-cpu.json", gpu=None, date="2026-03-01", copy_bytes_per_s=2e10)
    write(tmp_path, "roofline-other.json", gpu="NVIDIA A100-SXM4-80GB", copy_bytes_per_s=1.7e12)
    rates, files = known(config, "bf16", "H100")
    assert files == {"copy": "roofline-new.json", "product": "roofline-new.json"}
    assert rates == scaling.assumed(config, "bf16", "H100")._replace(copy=3e12, product=5e14)
    assert time("1.4b", rates, "full", 16) != time("1.4b", scaling.assumed(config, "bf16", "H100"), "full", 16)

    narrow, files = known(SIZES["160m"], "bf16", "H100")  # of which only copies are known: products need them too
    assert files == {"copy": "roofline-new.json"}
    assert narrow.product > scaling.assumed(SIZES["160m"], "bf16", "H100").product
    assert set(known(config, "fp32", "H100")[1]) == {"copy"}
    assert known(config, "bf16", "A100-80GB")[1] == {"copy": "roofline-other.json"}
    for gpu in ("A100-40GB", "H200"):
        assert known(config, "bf16", gpu) == (scaling.assumed(config, "bf16", gpu), {})


@pytest.mark.parametrize(
    ("content", "wrong"),
    [
        ("", "Expecting value"),
        ("[1]", "no object"),
        ('{"copy_bytes_per_s": -1}', "copy_bytes_per_s is -1"),
        ('{"copy_bytes_per_s": NaN}', "copy_bytes_per_s is nan"),
        ('{"product_flops_per_s": 5e14}', "product_flops_per_s is 5"),
        ('{"attention_flops_per_s": {"12b": "fast"}}', "attention_flops_per_s is {'12b': 'fast'}"),
        ('{"gpu": 3}', "gpu is 3"),
    ],
)
def test_damaged_results_are_refused(content, wrong, tmp_path, monkeypatch):
    monkeypatch.setattr(scaling, "RESULTS", tmp_path)
    (tmp_path / "roofline-h100.json").write_text(content)
    with pytest.raises(UserError, match=rf"roofline-h100\.json is damaged \(.*{wrong}.*\): remove it"):
        scaling.known_rates(SIZES["14m"], "bf16", "H100")
