"""The machine code of every shipped kernel, for GPUs that this machine need not have."""

import json
from dataclasses import asdict, replace

import pytest

from tests.kernels import cubins
from tests.kernels.cubins import ARCHES, Facts, faults, read_amdgcn, read_sass

pytest.importorskip("triton", reason="the compiler comes with triton, which has wheels for Linux only")

SHIPPED = [
    pytest.param(kernel, arch, id=f"{kernel.name}, sm_{arch}")
    for module in cubins.modules()
    for arch in ARCHES
    for kernel in cubins.kernels(module, arch).values()
]


@pytest.fixture(scope="module")
def facts() -> dict[tuple[str, int], Facts]:
    return cubins.facts_of()


@pytest.mark.cubin
@pytest.mark.parametrize(("kernel", "arch"), SHIPPED)
def test_shipped_kernel(kernel, arch, facts):
    assert not faults(facts[kernel.name, arch], arch, kernel.products)


@pytest.mark.cubin
@pytest.mark.parametrize("arch", ARCHES)
def test_the_loss_computes_exponentials_without_range_checks_and_two_rows_a_multiprocessor(arch, facts):
    losses = [f for (name, on), f in facts.items() if name.startswith("cross-entropy") and on == arch]
    assert len(losses) == 7
    for loss in losses:
        assert loss.fsetp < loss.ex2 / 10
        assert 2 * loss.threads * loss.registers <= 65_536


@pytest.mark.cubin
def test_slow_kernels_are_found():
    found = cubins.facts_of(["tests.kernels.slow_kernels"])
    for arch in ARCHES:
        (spills,) = faults(found["spills", arch], arch, products=False)
        assert "words are spilled" in spills
        (avoids,) = faults(found["avoids the tensor cores", arch], arch, products=True)
        assert "no product on the tensor cores" in avoids
        (wrong,) = faults(found["does not compile", arch], arch, products=False)
        assert "does not compile" in wrong


GOOD = {
    80: Facts(threads=256, hmma=8),
    86: Facts(threads=256, hmma=8),
    90: Facts(threads=256, hgmma=8, warpgroup=4),
    100: Facts(threads=256, utcmma=8),
}


@pytest.mark.parametrize("arch", ARCHES)
def test_a_good_kernel_has_no_faults(arch):
    at_the_limits = replace(GOOD[arch], threads=1024, shared=cubins.SHARED_LIMIT[arch], spilled=16, registers=255)
    assert faults(at_the_limits, arch, products=True) == []
    assert faults(Facts(), arch, products=False) == []


@pytest.mark.parametrize(
    ("arch", "changes", "fault"),
    [
        (80, {"shared": 163 * 1024 + 1}, "bytes of shared memory"),
        (90, {"shared": 227 * 1024 + 1}, "bytes of shared memory"),
        (100, {"shared": 227 * 1024 + 1}, "bytes of shared memory"),
        (80, {"threads": 2048}, "threads"),
        (80, {"spilled": 17}, "spilled"),
        (80, {"registers": 32, "spilled": 3000}, "3000 words are spilled (32 registers)"),
        (80, {"hmma": 0}, "no product"),
        (90, {"hgmma": 0, "hmma": 64}, "no product"),
        (90, {"hmma": 64}, "as on Ampere"),
        (90, {"warpgroup": 16}, "serialised"),
        (100, {"utcmma": 0, "hmma": 64}, "no product"),
        (100, {"error": "PassManager::run failed"}, "PassManager"),
    ],
)
def test_every_fault_is_found(arch, changes, fault):
    found = faults(replace(GOOD[arch], **changes), arch, products=True)
    assert any(fault in line for line in found)


SASS = """
        /*0100*/                   WARPGROUP.ARRIVE ;
        /*0110*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR4], RZ, !UPT ;
        /*0120*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], R24, gsb0 ;
        /*0130*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
        /*0140*/                   HMMA.16816.F32.BF16 R4, R8, R12, R4 ;
        /*0150*/                   UTCHMMA gdesc[UR4], gdesc[UR6], tmem[UR8], tmem[UR10], idesc[UR11], UPT ;
        /*0160*/                   UTMALDG.2D [UR8], [UR4], desc[UR6] ;
        /*0170*/                   STL [R1], R5 ;
        /*0180*/                   STL.64 [R1+0x8], R6 ;
        /*0190*/                   STL.128 [R1+0x10], R8 ;
        /*01a0*/                   LDL.LU R5, [R1] ;
        /*01b0*/                   LDL.LU.64 R6, [R1+0x8] ;
        /*01c0*/                   STS.128 [R3], R8 ;
        /*01d0*/              @!P0 FSETP.GEU.AND P1, PT, R5, -126, PT ;
        /*01e0*/                   MUFU.EX2 R5, R5 ;
        /*01f0*/                   MUFU.RCP R6, R6 ;
"""
USAGE = """
Resource usage:
 Common:
  GLOBAL:0
 Function kernel:
  REG:168 STACK:32 SHARED:0 LOCAL:0 CONSTANT[0]:560 TEXTURE:0 SURFACE:0 SAMPLER:0
"""
AMDGCN = """
	v_mfma_f32_32x32x8_bf16_1k a[0:15], v[0:1], v[2:3], a[0:15]
	v_mfma_f32_32x32x8_bf16_1k a[0:15], v[4:5], v[6:7], a[0:15]
    .vgpr_count:     247
    .vgpr_spill_count: 3
"""


def test_machine_code_is_read():
    assert read_sass(SASS, USAGE, threads=256, shared=1024) == Facts(
        threads=256,
        registers=168,
        shared=1024,
        spilled=7,
        hmma=1,
        hgmma=2,
        utcmma=1,
        warpgroup=2,
        tma=1,
        ex2=1,
        fsetp=1,
    )
    assert read_amdgcn(AMDGCN, threads=512, shared=64) == Facts(
        threads=512, registers=247, shared=64, spilled=3, mfma=2
    )


def test_a_damaged_memory_is_forgotten(tmp_path):
    path = tmp_path / "facts.json"
    assert cubins.recall(path) is None
    whole = asdict(GOOD[90])
    path.write_text(json.dumps(whole))
    assert cubins.recall(path) == GOOD[90]
    text = path.read_text()
    for damaged in (text[:-1], "", "[]", "null", text.replace("256", '"256"'), text.replace('"hmma"', '"mma"'), "{}"):
        path.write_text(damaged)
        assert cubins.recall(path) is None
