"""Compile every shipped kernel for GPUs that this machine need not have, and read the machine code.

    python -m tests.kernels.cubins [MODULE..]         one line a kernel and GPU; default: all of tests/kernels/shipped

A kernel that gives the right numbers may still be a slow one: its values overflow the registers into memory, or its
products miss the tensor cores of the chip. Both can be seen in the machine code, which the compiler makes, and the
disassembler of the triton package prints, on any machine. Compiled under TRITON_INTERPRET=1 a kernel is no kernel, so
tests, which have it set, start this file as a process of its own (`facts_of`).
"""

import argparse
import hashlib
import importlib
import json
import os
import pkgutil
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

from tqdm import tqdm

from tests.kernels import shipped
from tests.kernels.shipped import Shipped

ARCHES = (
    80,
    86,
    90,
    100,
)  # sm_80: A100, 86: RTX 3090 (4090 and L40S have the same limits), 90: H100 and H200, 100: B200
AMD = 942  # MI300, gfx942: compiled with the specialisations of sm_80 and reported; the kernels never ran on one
SHARED_LIMIT = {80: 163 * 1024, 86: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024, AMD: 64 * 1024}  # bytes
THREAD_LIMIT = 1024  # of a program
SPILL_LIMIT = 16  # words; a few spills outside the loops cost nothing measurable
CACHE = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "tripod" / "cubins"


@dataclass(frozen=True)
class Facts:
    """The resources of a compiled kernel, and the number of its instructions of the kinds that matter."""

    threads: int = 0  # of a program
    registers: int = 0  # a thread
    shared: int = 0  # bytes a program
    spilled: int = 0  # words of 4 bytes stored to local memory, or loaded from it, whichever is more
    hmma: int = 0  # matmul instructions of Ampere's tensor cores
    hgmma: int = 0  # of Hopper
    utcmma: int = 0  # of Blackwell
    mfma: int = 0  # of AMD's CDNA
    warpgroup: int = 0  # synchronisations around HGMMA
    tma: int = 0  # loads by the tensor memory accelerator
    ex2: int = 0  # powers of two
    fsetp: int = 0  # comparisons of floats
    error: str = ""  # of the compiler; then all other fields are 0


def faults(facts: Facts, arch: int, products: bool) -> list[str]:
    """Known reasons why the kernel would be slow on `arch`, or not start."""
    if facts.error:
        return [f"does not compile: {facts.error}"]
    found = []
    if facts.threads > THREAD_LIMIT:
        found.append(f"{facts.threads} threads, a program may have {THREAD_LIMIT}")
    if facts.shared > SHARED_LIMIT[arch]:
        found.append(f"{facts.shared} bytes of shared memory, a program may have {SHARED_LIMIT[arch]}")
    # When ptxas gives up, it returns kernels with 32 registers and thousands of spills: this finds them too.
    if facts.spilled > SPILL_LIMIT:
        found.append(f"{facts.spilled} words are spilled ({facts.registers} registers)")
    if products and not {80: facts.hmma, 86: facts.hmma, 90: facts.hgmma, 100: facts.utcmma, AMD: facts.mfma}[arch]:
        found.append("no product on the tensor cores of this generation")
    if products and arch == 90 and facts.hmma:
        found.append(f"{facts.hmma} products as on Ampere, at half the speed")
    # If ptxas cannot prove that matmuls may overlap, it waits for each one: two synchronisations for every HGMMA. A
    # healthy kernel has less than one for every two.
    if facts.warpgroup > facts.hgmma > 0:
        found.append(f"the {facts.hgmma} HGMMA instructions are serialised")
    return found


def read_sass(sass: str, usage: str, threads: int, shared: int) -> Facts:
    """Facts from the output of nvdisasm and of cuobjdump's resource usage."""

    def count(pattern: str) -> int:
        return len(re.findall(rf"\b{pattern}", sass))

    def words(instruction: str) -> int:
        widths = re.findall(rf"\b{instruction}\b(?:\.(?!64\b|128\b)\w+)*(?:\.(64|128))?", sass)
        return sum(int(width or 32) // 32 for width in widths)

    return Facts(
        threads=threads,
        registers=int(re.search(r"\bREG:(\d+)", usage)[1]),
        shared=shared,
        spilled=max(words("STL"), words("LDL")),
        hmma=count(r"HMMA\."),
        hgmma=count(r"HGMMA\."),
        utcmma=count(r"UTC\w*MMA"),
        warpgroup=count(r"WARPGROUP\."),
        tma=count(r"UTMALDG"),
        ex2=count(r"MUFU\.EX2"),
        fsetp=count(r"FSETP"),
    )


def read_amdgcn(assembly: str, threads: int, shared: int) -> Facts:
    """Facts from the assembly that LLVM writes for AMD."""

    def number(key: str) -> int:
        return int(re.search(rf"\.{key}:\s+(\d+)", assembly)[1])

    return Facts(
        threads=threads,
        registers=number("vgpr_count"),
        shared=shared,
        spilled=number("vgpr_spill_count"),
        mfma=len(re.findall(r"\bv_mfma_", assembly)),
    )


def modules() -> list[str]:
    return [f"{shipped.__name__}.{module.name}" for module in pkgutil.iter_modules(shipped.__path__)]


def kernels(module: str, arch: int) -> dict[str, Shipped]:
    """The shipped kernels of a module by name. Those with matmuls in bf16 are listed for fp16 as well."""
    listed = importlib.import_module(module).shipped(80 if arch == AMD else arch)
    for kernel in [kernel for kernel in listed if kernel.products and "bf16" in str(kernel.signature)]:
        types = {argument: type.replace("bf16", "fp16") for argument, type in kernel.signature.items()}
        listed.append(replace(kernel, name=f"{kernel.name}, fp16", signature=types))
    by_name = {kernel.name: kernel for kernel in listed}
    if len(by_name) < len(listed):
        raise ValueError(f"two kernels of {module} have the same name")
    return by_name


def inspect(module: str, name: str, arch: int) -> Facts:
    """Facts of one kernel, compiled now or read from the cache."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = kernels(module, arch)[name]
    signature = {a: kernel.signature.get(a, "constexpr") for a in kernel.kernel.arg_names}
    # As at a launch: the tensors are aligned, and sizes are multiples of 16.
    aligned = [i for i, type in enumerate(signature.values()) if type.startswith("*") or type in ("i32", "i64")]
    attributes = {(i,): [["tt.divisibility", 16]] for i in aligned}
    source = ASTSource(kernel.kernel, signature, kernel.constants, attributes)
    options = {"num_warps": kernel.num_warps, "num_stages": kernel.num_stages, "maxnreg": kernel.max_registers}

    environment = sorted((k, v) for k, v in os.environ.items() if k.startswith("TRITON_"))  # may name another ptxas
    everything = [triton.__version__, source.hash(), arch, options, environment, Path(__file__).read_text()]
    remembered = CACHE / f"{hashlib.sha256(repr(everything).encode()).hexdigest()}.json"
    if (facts := recall(remembered)) is not None:
        return facts
    target = GPUTarget("hip", "gfx942", 64) if arch == AMD else GPUTarget("cuda", arch, 32)
    try:
        compiled = triton.compile(source, target=target, options=options)
    except Exception as error:  # of any kind: the table, or a test, shows it
        lines = str(error.__cause__ or error).strip().splitlines()
        return Facts(error=f"{type(error).__name__}: {lines[-1] if lines else ''}"[:200])
    needs = kernel.num_warps * target.warp_size, compiled.metadata.shared
    if arch == AMD:
        facts = read_amdgcn(compiled.asm["amdgcn"], *needs)
    else:
        facts = read_sass(*disassemble(compiled.asm["cubin"]), *needs)
    remembered.parent.mkdir(parents=True, exist_ok=True)
    part = remembered.with_suffix(f".{os.getpid()}")
    part.write_text(json.dumps(asdict(facts)))
    part.replace(remembered)
    return facts


def recall(path: Path) -> Facts | None:
    """Facts written by `inspect`; None if there are none, or the file is damaged."""
    try:
        values = json.loads(path.read_text())
        types = {field.name: type(field.default) for field in fields(Facts)}
        return Facts(**values) if {k: type(v) for k, v in values.items()} == types else None
    except (OSError, ValueError, AttributeError):
        return None


def disassemble(cubin: bytes) -> tuple[str, str]:
    """The machine code as text, and the resource usage, by the tools in triton's wheel."""
    import triton

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        commands = [tools / "nvdisasm", "-c", file.name], [tools / "cuobjdump", "--dump-resource-usage", file.name]
        sass, usage = (subprocess.run(c, capture_output=True, text=True, check=True).stdout for c in commands)
        return sass, usage


def inspect_all(names: list[str], arches: tuple[int, ...]) -> list[tuple[Shipped, int, Facts]]:
    """(kernel, arch, facts) of all kernels of these modules, from as many processes as there are processors."""
    jobs = [(module, kernel, arch) for module in names for arch in arches for kernel in kernels(module, arch).values()]
    with ProcessPoolExecutor(min(os.cpu_count(), len(jobs))) as pool:
        submitted = {}
        for module, kernel, arch in sorted(jobs, key=lambda job: -job[2]):  # the newest chips take longest
            submitted[pool.submit(inspect, module, kernel.name, arch)] = module, kernel.name, arch
        finished = tqdm(as_completed(submitted), "compiling", len(jobs), leave=False)
        facts = {submitted[future]: future.result() for future in finished}
    return [(kernel, arch, facts[module, kernel.name, arch]) for module, kernel, arch in jobs]


def facts_of(names: list[str] | None = None) -> dict[tuple[str, int], Facts]:
    """Facts by (kernel, arch) from a process in which kernels are compiled, not interpreted."""
    command = [sys.executable, "-m", "tests.kernels.cubins", "--json", *(names or modules())]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    output = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True).stdout
    return {(name, arch): Facts(**facts) for name, arch, facts in json.loads(output)}


def main() -> None:
    parser = argparse.ArgumentParser(description="Compile the shipped kernels and read their machine code.")
    parser.add_argument("modules", nargs="*", default=modules(), help="default: all of tests/kernels/shipped")
    parser.add_argument("--json", action="store_true", help="print the facts for NVIDIA's GPUs as JSON")
    settings = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise SystemExit("TRITON_INTERPRET=1 is set: kernels would be interpreted, not compiled")
    rows = inspect_all(settings.modules, ARCHES if settings.json else (*ARCHES, AMD))
    if settings.json:
        print(json.dumps([(kernel.name, arch, asdict(facts)) for kernel, arch, facts in rows]))
        return
    width = max(len(kernel.name) for kernel, _, _ in rows)
    print(f"{'':{width}}  GPU     registers  shared KB  spilled words  HMMA  HGMMA  UTC*MMA  MFMA  TMA")
    for kernel, arch, f in rows:
        line = f"{kernel.name:{width}}  {'gfx942' if arch == AMD else f'sm_{arch}':6}"
        if not f.error:
            line += f"{f.registers:11}{f.shared / 1024:11.1f}{f.spilled:15}"
            line += f"{f.hmma:6}{f.hgmma:7}{f.utcmma:9}{f.mfma:6}{f.tma:5}"
        print(line, "; ".join(faults(f, arch, kernel.products)), sep="  ")


if __name__ == "__main__":
    main()
