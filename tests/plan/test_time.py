"""The seconds of a step: against sums by hand, at its limits, and by measured rates; and the fastest setting."""

import json
from dataclasses import replace
from itertools import pairwise, product

import pytest
import torch

from model import SIZES, SUITE
from plan import time
from plan.memory import RECOMPUTED_ACTIVATIONS, SHARDINGS, Job, total_memory, variants
from plan.time import GPUS, Rates, assumed_rates, decide, fastest, known_gpu, known_rates, peak_flops, step_seconds
from runtime.errors import UserError

ROUND = Rates(matmul=500e12, attention=250e12, copy=2e12)


def seconds(size: str, rates: Rates, shard: str, world_size: int, micro_batch: int = 4, whole: bool = True, **options):
    job = Job(SIZES[size], 1024, micro_batch, 2048, "bf16", shard=shard, world_size=world_size, whole_gradients=whole)
    return step_seconds(replace(job, **options), rates)


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
    backward += activation  # a quarter of d_q and of d_k, read and written
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

    assert seconds("1.4b", ROUND, "full", 16, recompute="cheap") == pytest.approx(compute, rel=1e-9)


def test_full_recompute_costs_a_forward_pass():
    layer_weights, scores = 12 * 2048**2, 4 * 2048 * 2048 / 2  # FLOPs of a token: two a weight; scores, values
    flops = 24 * (2 * layer_weights / 500e12 + scores / 250e12)
    passes = 24 * (6 + 1 + 8) * 2 * 2048 / 2e12
    times = [seconds("1.4b", ROUND, "none", 1, recompute=recompute) for recompute in ("none", "cheap", "full")]
    assert times[2] - times[0] == pytest.approx(1024 * 2048 * (flops + passes), rel=1e-3)
    assert times == sorted(times)


@pytest.mark.parametrize("shard", ["none", "grad", "hybrid", "full"])
@pytest.mark.parametrize("size", ["70m", "12b"])
def test_more_gpus_are_faster_and_cost_more(size, shard):
    """At one setting, of two micro-steps or more, which accumulate gradients in the same way."""
    for gpu in ("H100", "A100-40GB", "4090"):
        rates = assumed_rates(SIZES[size], "bf16", gpu)
        times = {world: seconds(size, rates, shard, world, micro_batch=1) for world in (16, 32, 64, 128, 256, 512)}
        for few, many in pairwise(times):
            assert times[many] < times[few]
            assert many * times[many] > 0.998 * few * times[few]  # ranks divide casts and AdamW


def test_higher_rates_are_faster():
    for shard, name in product(("none", "grad", "hybrid", "full"), Rates._fields):
        slower, faster = (ROUND._replace(**{name: getattr(ROUND, name) * x}) for x in (0.1, 10))
        times = [seconds("12b", rates, shard, 32, micro_batch=1) for rates in (slower, ROUND, faster)]
        assert times[0] > times[1] > times[2]


def test_assumed_rates():
    large = 0.68 * 989e12
    rates = [assumed_rates(config, "bf16", "H100") for config in SUITE.values()]
    assert all(0.25 * large < r.matmul < large for r in rates)
    assert rates[-1].matmul > rates[3].matmul > rates[0].matmul  # narrow models are slower
    assert rates[0][1:] == (large / 2, 0.85 * 3.35e12)
    assert assumed_rates(SIZES["1b"], "fp32", "H100").matmul < 67e12


# Measured rates


def write(folder, name: str, **content) -> None:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(json.dumps({"gpu": "NVIDIA H100 80GB HBM3"} | content))


def test_measured_rates_replace_assumed_ones(tmp_path, monkeypatch):
    monkeypatch.setattr(time, "RESULTS", tmp_path)
    known, config = known_rates, SIZES["1.4b"]
    folder = tmp_path / "h100"
    write(folder, "roofline.json", date="2026-01-01", copy_bytes_per_s=1e12, product_flops_per_s={"1.4b": 1e12})
    write(tmp_path, "roofline-new.json", date="2026-02-01", copy_bytes_per_s=3e12, product_flops_per_s={"1.4b": 5e14})
    write(tmp_path, "roofline-cpu.json", gpu=None, date="2026-03-01", copy_bytes_per_s=2e10)
    write(tmp_path, "roofline-other.json", gpu="NVIDIA A100-SXM4-80GB", copy_bytes_per_s=1.7e12)
    rates, files = known(config, "bf16", "H100")
    assert files == {"copy": "roofline-new.json", "matmul": "roofline-new.json"}
    assert rates == assumed_rates(config, "bf16", "H100")._replace(copy=3e12, matmul=5e14)
    assert seconds("1.4b", rates, "full", 16) != seconds("1.4b", assumed_rates(config, "bf16", "H100"), "full", 16)

    narrow, files = known(
        SIZES["160m"], "bf16", "H100"
    )  # only copies are known, and the rate of matmuls depends on them
    assert files == {"copy": "roofline-new.json"}
    assert narrow.matmul > assumed_rates(SIZES["160m"], "bf16", "H100").matmul
    assert set(known(config, "fp32", "H100")[1]) == {"copy"}
    assert known(config, "bf16", "A100-80GB")[1] == {"copy": "roofline-other.json"}
    for gpu in ("A100-40GB", "H200"):
        assert known(config, "bf16", gpu) == (assumed_rates(config, "bf16", gpu), {})


@pytest.mark.parametrize(
    ("content", "wrong"),
    [
        ("", "Expecting value"),
        ("[1]", "not a JSON object"),
        ('{"copy_bytes_per_s": -1}', "copy_bytes_per_s is -1"),
        ('{"copy_bytes_per_s": NaN}', "copy_bytes_per_s is nan"),
        ('{"product_flops_per_s": 5e14}', "product_flops_per_s is 5"),
        ('{"attention_flops_per_s": {"12b": "fast"}}', "attention_flops_per_s is {'12b': 'fast'}"),
        ('{"gpu": 3}', "gpu is 3"),
    ],
)
def test_damaged_results_are_refused(content, wrong, tmp_path, monkeypatch):
    monkeypatch.setattr(time, "RESULTS", tmp_path)
    (tmp_path / "roofline-h100.json").write_text(content)
    with pytest.raises(UserError, match=rf"roofline-h100\.json is damaged \(.*{wrong}.*\): remove it"):
        known_rates(SIZES["14m"], "bf16", "H100")


def test_peak_of_devices(monkeypatch):
    for name, flops in (("NVIDIA A100-SXM4-40GB", 312e12), ("NVIDIA H200", 989e12), ("Tesla T4", None)):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda _, name=name: name)
        assert peak_flops(torch.device("cuda")) == flops
    assert peak_flops(torch.device("cpu")) is None


# The fastest setting


def test_settings_of_12b_on_a_node_of_a100():
    config = SIZES["12b"]
    rates = assumed_rates(config, "bf16", "A100-80GB")
    for n in (1, 2, 4, 8, 16, 32):
        at = {
            (shard, recompute): seconds("12b", rates, shard, 8, n, recompute=recompute)
            for shard, recompute in product(("none", "grad", "full"), RECOMPUTED_ACTIVATIONS)
        }
        assert min(at, key=at.get) == ("grad", "none")
        order = [at["grad", recompute] for recompute in ("none", "cheap", "full")]
        assert order == sorted(order)
        assert at["grad", "cheap"] < at["full", "cheap"]
        if n > 1:  # a second forward pass costs more than gathering weights twice
            assert at["full", "none"] < at["grad", "full"]
        if n < 32:
            assert seconds("12b", rates, "grad", 8, 2 * n) < at["grad", "none"]
            assert at["grad", "none"] < seconds("12b", rates, "grad", 8, n, whole=False)
    best = fastest(Job(config, 1024, 0, 2048, "bf16", "auto", "auto", world_size=8), 80e9, rates)
    assert best.recompute != "full"
    assert total_memory(best) < 0.92 * 80e9


@pytest.mark.parametrize("size", ["160m", "2.8b", "12b"])
def test_fastest(size):
    job = Job(SIZES[size], 1024, 0, 2048, "bf16", "auto", "auto", world_size=8)
    rates, times = assumed_rates(SIZES[size], "bf16"), []
    every = [
        replace(job, recompute=recompute, micro_batch=n, shard=shard, whole_gradients=whole)
        for recompute, n in product(RECOMPUTED_ACTIVATIONS, (1, 2, 4, 8, 16, 32))
        for shard, whole in SHARDINGS
        if shard != "hybrid"
    ]
    for gigabytes in (10_000, 141, 80, 40, 24, 8):
        best = fastest(job, gigabytes * 1e9, rates)
        fit = [step_seconds(other, rates) for other in every if total_memory(other) <= 0.92 * gigabytes * 1e9]
        if best is None:
            assert not fit
            times.append(float("inf"))
            continue
        assert best in every
        assert total_memory(best) <= 0.92 * gigabytes * 1e9
        assert step_seconds(best, rates) <= 1.02 * min(fit)
        times.append(step_seconds(best, rates))
        if gigabytes == 10_000:
            assert (best.shard, best.recompute, best.whole_gradients) == ("grad", "none", True)
    for more, less in pairwise(times):
        assert more <= 1.02 * less  # less memory is never better


@pytest.mark.parametrize(("gpu", "world_size"), [("H100", 1), ("H100", 8), ("A100-40GB", 8), ("4090", 16)])
@pytest.mark.parametrize("size", ["14m", "410m"])
def test_small_models_do_without_recomputation(size, gpu, world_size):
    """And with micro-batches of 8 rows: they fit, and with fewer rows the GPU would wait for the host."""
    best = fastest(open_job(size, world_size), GPUS[gpu].memory, known_rates(SIZES[size], "fp16", gpu)[0])
    assert (best.recompute, best.micro_batch) == ("none", 8)


def test_micro_batches_divide_the_rows_of_a_rank():
    job = Job(SIZES["14m"], 24, 0, 2048, "bf16", "auto", "auto", world_size=4)
    for scale in (1, 1e-3):  # a GPU on which copies, and so passes over weights, take nearly all the time
        best = fastest(job, 80e9, ROUND._replace(copy=scale * ROUND.copy))
        assert best.micro_batch in (1, 2)


# What a run takes


@pytest.mark.parametrize(
    ("name", "reported", "expected"),
    [
        ("NVIDIA H100 80GB HBM3", 85.0e9, ("H100", 80e9)),
        ("NVIDIA A100-SXM4-40GB", 42.4e9, ("A100-40GB", 40e9)),
        ("NVIDIA A100 80GB PCIe", 85.1e9, ("A100-80GB", 80e9)),
        ("NVIDIA L40S", 47.7e9, ("L40S", 47.7e9)),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", 17.2e9, ("H100", 17.2e9)),
        ("NVIDIA GH200 480GB", 102e9, ("H100", 102e9)),
        ("Tesla T4", 15.8e9, ("H100", 15.8e9)),
    ],
)
def test_known_gpu(name, reported, expected):
    assert known_gpu(name, reported) == expected


def open_job(size: str, world_size: int, **options) -> Job:
    return replace(Job(SIZES[size], 1024, 0, 2048, "fp16", "auto", "auto", world_size), **options)


@pytest.mark.parametrize("size", SUITE)
@pytest.mark.parametrize("machine", [("H100", 8), ("A100-40GB", 16), ("4090", 8)])
def test_a_run_fits_or_is_refused(size, machine):
    """The setting is the fastest one that fits; what is given stays; a run for which nothing fits does not start."""
    (gpu, world_size), rates = machine, known_rates(SIZES[size], "fp16", machine[0])[0]
    for given in ({}, {"recompute": "cheap"}, {"micro_batch": 16}, {"shard": "full"}, {"bitwise": True}):
        job = open_job(size, world_size, **given)
        if min(map(total_memory, variants(job))) > GPUS[gpu].memory:  # all of it, and not only 92%
            with pytest.raises(UserError, match="does not fit"):
                decide(job, 0, gpu, GPUS[gpu].memory)
            continue
        chosen, note = decide(job, 0, gpu, GPUS[gpu].memory)
        if best := fastest(job, GPUS[gpu].memory, rates):
            assert chosen == best
        assert bool(note) == (total_memory(chosen) > 0.92 * GPUS[gpu].memory) == (best is None)
        assert all(getattr(chosen, name) == value for name, value in given.items())


def test_the_defaults_of_6_9b_fit_a_node():
    """At most 8 rows and no recomputation took 82 GB."""
    before = Job(SIZES["6.9b"], 1024, 8, 2048, "fp16", "none", "full", 8, whole_gradients=False)
    assert total_memory(before) > 80e9
    chosen, note = decide(open_job("6.9b", 8), 0, "H100", 80e9)
    assert total_memory(chosen) < 0.92 * 80e9
    assert not note


def test_what_does_not_fit_is_refused_unless_everything_is_given():
    message = r"12b does not fit: --shard full --recompute full --micro-batch 1 needs [\d.]+ GB .* has 24\.0; .*--plan"
    with pytest.raises(UserError, match=message):
        decide(open_job("12b", 4), 0, "4090", 24e9)
    given = open_job("12b", 4, shard="full", recompute="none", micro_batch=2)
    chosen, note = decide(given, 0, "4090", 24e9)
    assert chosen.flags == given.flags
    assert "more than the 22.1 GB that fit" in note
    least = min(map(total_memory, variants(open_job("12b", 4))))
    chosen, note = decide(open_job("12b", 4), 0, "4090", least / 0.96)  # it takes 96% of the memory: more than 92%
    assert total_memory(chosen) == least
    assert note


def test_a_run_keeps_its_micro_batch():
    """On other GPUs, as long as it fits: another micro-batch changes the last bits. With --bitwise always."""
    assert decide(open_job("1.4b", 8), 0, "H100", 80e9)[0].micro_batch not in (2, 32)
    assert decide(open_job("1.4b", 8), 2, "H100", 80e9)[0].micro_batch == 2
    assert decide(open_job("1.4b", 8, micro_batch=4), 2, "H100", 80e9)[0].micro_batch == 4  # as given
    assert decide(open_job("12b", 8), 32, "A100-40GB", 40e9)[0].micro_batch < 32
    with pytest.raises(UserError, match="--micro-batch 32 needs"):
        decide(open_job("12b", 8, bitwise=True), 32, "A100-40GB", 40e9)
    taken = {decide(open_job("410m", n, bitwise=True), 2, "H100", 80e9)[0].micro_batch for n in (1, 2, 4, 8)}
    assert taken == {2}
