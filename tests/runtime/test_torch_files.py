"""Torch files without unpickling: the bits of torch.load, and nothing that a hostile file can do."""

import collections
import io
import pickle
import random
import resource
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from runtime.errors import UserError
from runtime.torch_files import read_torch_file

ROOT = Path(__file__).parents[2]


def state_dict():
    """As in a published pytorch_model.bin: half weights, byte and bool masks; strided, shared and empty views."""
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(20, 30, generator=generator)
    tensors = {
        "half": base.half(),
        "bfloat16": base.bfloat16(),
        "float": base,
        "mask": torch.ones(1, 1, 9, 9, dtype=torch.bool).tril(),
        "old_mask": torch.ones(1, 1, 9, 9, dtype=torch.uint8).tril(),
        "fill": torch.tensor(-1e9),
        "transposed": base.t(),
        "part": base[3:9:2, 5:],
        "shared": base[1],
        "row": base.half()[2],
        "empty": torch.empty(0, 3),
        "empty_end": base.flatten()[600:],
        "nan": torch.tensor([float("nan"), float("inf"), -0.0]),
    }
    tensors = collections.OrderedDict(tensors)
    tensors._metadata = collections.OrderedDict({"": {"version": 1}, "layer": {"version": 2}})
    return tensors


@pytest.fixture
def path(tmp_path):
    torch.save(state_dict(), tmp_path / "pytorch_model.bin")
    return tmp_path / "pytorch_model.bin"


def refused(path, *words):
    with pytest.raises(UserError) as caught:
        {name: tensor.read() for name, tensor in read_torch_file(path).items()}
    assert "\n" not in str(caught.value)
    for word in (str(path), *words):
        assert word in str(caught.value)


def bits(tensor):
    return tensor.contiguous().flatten().view(torch.uint8)


def test_equals_torch_load(path):
    expected, read = torch.load(path, weights_only=True), read_torch_file(path)
    assert list(read) == list(expected)
    for name, tensor in expected.items():
        values = read[name].read()
        assert (values.dtype, values.shape) == (tensor.dtype, tensor.shape), name
        assert torch.equal(bits(values), bits(tensor)), name


def test_old_storages_and_a_model(tmp_path):
    from model import SIZES, Pythia

    model = Pythia(SIZES["14m"]).half()
    torch.save(model.state_dict(), tmp_path / "a.bin", pickle_protocol=2)
    read = read_torch_file(tmp_path / "a.bin")
    for name, tensor in model.state_dict().items():
        assert torch.equal(read[name].read(), tensor)


class Runs:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def repack(path, program):
    """Replace data.pkl, with the right checksum."""
    with zipfile.ZipFile(path) as old:
        members = {info.filename: old.read(info) for info in old.infolist()}
    with zipfile.ZipFile(path, "w") as new:
        for name, data in members.items():
            new.writestr(name, program if name.endswith("/data.pkl") else data)


def test_no_code_runs(tmp_path):
    touched, path = tmp_path / "touched", tmp_path / "a.bin"
    for value in (Runs(open, str(touched), "w"), {"a": Runs(eval, f"open({str(touched)!r}, 'w')")}):
        torch.save(value, path)
        refused(path, "names")
    assert not touched.exists()
    torch.load(path, weights_only=False)
    assert touched.exists()  # unpickling does run the code


@pytest.mark.parametrize(
    "value",
    [
        [torch.zeros(2)],
        torch.zeros(2),
        {"a": 1},
        {"a": {"b": torch.zeros(1)}},
        {1: torch.zeros(1)},
        {"a": torch.zeros(2, dtype=torch.complex64)},
        {"a": torch.nn.Parameter(torch.zeros(2))},
        {"a": torch.zeros(3).to_sparse()},
        {"a": torch.zeros(1).expand(10**6)},
    ],
    ids=["list", "tensor", "int", "nested", "key", "complex", "parameter", "sparse", "expanded"],
)
def test_other_contents_are_refused(tmp_path, value):
    torch.save(value, tmp_path / "a.bin")
    refused(tmp_path / "a.bin")


def test_legacy_and_other_files(tmp_path):
    """The command in the message converts a file of the old format."""
    path, tensors = tmp_path / "a.bin", {"a": torch.arange(5.0)}
    torch.save(tensors, path, _use_new_zipfile_serialization=False)
    refused(path, "before 1.6", "convert it: python -c")
    with pytest.raises(UserError) as caught:
        read_torch_file(path)
    code = str(caught.value).partition('python -c "')[2].removesuffix('"')
    subprocess.run([sys.executable, "-c", code], check=True)
    assert torch.equal(read_torch_file(path)["a"].read(), tensors["a"])
    for data in (b"", b"PK", b"PK\3\4" + bytes(100), b"version https://git-lfs.github.com/spec/v1\n"):
        path.write_bytes(data)
        refused(path)
    refused(tmp_path / "nowhere.bin", "No such file")
    refused(tmp_path)


@pytest.mark.parametrize(
    ("offset", "shape", "stride"),
    [
        (0, (7,), (1,)),
        (1, (6,), (1,)),
        (-1, (2,), (1,)),
        (0, (2,), (-1,)),
        (0, (2, 3), (4, 1)),
        (0, (-2,), (1,)),
        (7, (0,), (1,)),
        (0, (2**40, 2**40), (0, 0)),
        (0, (0, 2**70), (0, 0)),
        (0, (6,), (True,)),
        (0, (2,), (2**70,)),
        (0, (6,), ()),
    ],
)
def test_a_view_outside_its_storage(tmp_path, offset, shape, stride):
    class Tensor:
        def __reduce__(self):
            return torch._utils._rebuild_tensor_v2, (Storage, offset, shape, stride, False, collections.OrderedDict())

    class Storage:
        pass

    class Pickler(pickle.Pickler):
        def persistent_id(self, value):
            return ("storage", torch.HalfStorage, "0", "cpu", 6) if value is Storage else None

    def program(tensor):
        Pickler(buffer := io.BytesIO(), 2).dump({"a": tensor})
        return buffer.getvalue()

    torch.save({"a": torch.zeros(6).half()}, tmp_path / "a.bin")
    repack(tmp_path / "a.bin", program(Tensor()))
    refused(tmp_path / "a.bin")
    offset, shape, stride = 0, (2, 3), (3, 1)
    repack(tmp_path / "a.bin", program(Tensor()))
    assert read_torch_file(tmp_path / "a.bin")["a"].read().shape == (2, 3)


def mutants(count, path, seed=0):
    """Files with damage anywhere, and files whose data.pkl is damaged and has the right checksum."""
    rng, data = random.Random(seed), path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith("data.pkl")]
        program = archive.read(name)
        members = {info.filename: archive.read(info) for info in archive.infolist() if info.filename != name}
    opcodes = b"\x80\x02c}q(X]tRsuQJKM\x85\x86\x87b.N0215oi\x81\x93\x95hj\x8a\x88\x89)Vl"

    def damage(data):
        damaged = bytearray(data)
        for _ in range(rng.randint(1, 3)):
            place = rng.randrange(len(damaged))
            match rng.randrange(4):
                case 0:
                    damaged[place] = rng.randrange(256)
                case 1:
                    damaged[place] ^= 1 << rng.randrange(8)
                case 2:
                    damaged[place : place + 1] = bytes(rng.choices(opcodes, k=rng.randint(1, 3)))
                case 3:
                    del damaged[place : place + rng.randint(1, 9)]
        return bytes(damaged)

    for number in range(count):
        if number % 2:
            yield damage(data)
        else:
            buffer = io.BytesIO()
            with zipfile.ZipFile(buffer, "w") as archive:
                archive.writestr(name, damage(program))
                for member, content in members.items():
                    archive.writestr(member, content)
            yield buffer.getvalue()


@pytest.mark.parametrize("count", [2000, pytest.param(100_000, marks=pytest.mark.slow)])
def test_mutants(path, tmp_path, count):
    """Damaged files give tensors of no more elements than the file has bytes, or a UserError; no code, no crash."""
    torch.save({name: t for name, t in state_dict().items() if name in ("half", "mask", "part")}, path)
    called, watched = [], ("pickle.find_class", "os.system", "subprocess.Popen")
    sys.addaudithook(lambda event, _: called.append(event) if event in watched else None)
    before, outcomes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, {"read": 0, "refused": 0}
    mutant, limit = tmp_path / "mutant.bin", path.stat().st_size
    for data in mutants(count, path):
        mutant.write_bytes(data)
        called.clear()
        try:
            for tensor in read_torch_file(mutant).values():
                assert tensor.read().nbytes <= limit
            outcomes["read"] += 1
        except UserError:
            outcomes["refused"] += 1
        assert called == []
    assert min(outcomes.values()) > count // 20, outcomes
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # kilobytes
