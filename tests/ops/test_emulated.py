"""The CUDA kernels, run on the CPU through `emulator.h`, which takes a C++ compiler and an x86-64.

Every launch is also checked for races between warps, which tools on a GPU cannot do here: they do not see that one lane
arrives at a signal for its warp.
"""

import contextlib
import ctypes
import platform
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from carve.ops import chunk_carve
from carve.ops.kernels import compiler, cuda
from carve.ops.recurrence import Options, Projections, Tokens
from tests.ops.kernel_cases import assert_as_exact, draw

CXX = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
pytestmark = pytest.mark.skipif(
    CXX is None or platform.machine() != "x86_64", reason="takes a C++ compiler, and a processor of x86-64"
)
ENTRY = """
extern "C" int shared_bytes() {{ return SHARED_BYTES; }}
extern "C" int races() {{ return emu::races; }}
extern "C" void launch(int programs, void** arguments, int seed) {{
  emu::run(emu::call<carve_{name}>, programs, THREADS, SPLIT, SHARED_BYTES, arguments, seed);
}}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("kernels")


def source(name: str) -> str:
    """A kernel with what it shares, but for the primitives, which are the emulator's."""
    files = [file for file in (*compiler.HEADERS[name], f"{name}.cu") if file != "primitives.cuh"]
    return "".join((compiler.FOLDER / file).read_text() for file in files)


def build(text: str, name: str, constants: compiler.Constants, folder: Path) -> ctypes.CDLL:
    library = folder / f"{name}-{abs(hash((text, constants)))}.so"
    if not library.exists():
        text = Path(__file__).with_name("emulator.h").read_text() + text + ENTRY.format(name=name)
        library.with_suffix(".cpp").write_text(text)
        macros = [f"-D{key}={value}" for key, value in constants]
        flags = ["-std=c++20", "-O1", "-fno-strict-aliasing", "-w", "-fPIC", "-fsanitize=thread", "-c"]
        command = [str(CXX), *flags, *macros, "-o", f"{library}.o", str(library.with_suffix(".cpp"))]
        subprocess.run(command, check=True)
        subprocess.run([str(CXX), "-shared", "-o", str(library), f"{library}.o"], check=True)
    return ctypes.CDLL(str(library))


@pytest.fixture(autouse=True)
def emulated(folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Kernels go to the emulator, and CPU tensors to the kernels. The number of races of each kernel that ran."""
    races: dict[str, int] = {}

    def launch(
        name: str,
        device: torch.device,
        constants: compiler.Constants,
        programs: int,
        threads: int,
        shared_bytes: int,
        arguments: list[Any],
    ) -> None:
        library = build(source(name), name, constants, folder)
        assert dict(constants)["CARVE_THREADS"] == str(threads)
        assert library.shared_bytes() <= shared_bytes
        values = [ctypes.c_void_p(x) if isinstance(x, int) else x for x in arguments]
        pointers = (ctypes.c_void_p * len(values))(*(ctypes.cast(ctypes.pointer(x), ctypes.c_void_p) for x in values))
        library.launch(programs, pointers, 0)
        races[name] = races.get(name, 0) + library.races()

    def why_not(x: Tokens, p: Projections, options: Options) -> str | None:
        return None if x.v.dtype in cuda.INPUTS else "float64"

    monkeypatch.setattr(compiler, "launch", launch)
    monkeypatch.setattr(cuda, "why_not", why_not)
    monkeypatch.setattr(cuda, "build", lambda *_: None)
    monkeypatch.setattr(cuda, "forward_tile", lambda *_: 64)
    monkeypatch.setattr(cuda, "programs_of_head", lambda K, V, *_: 2 if K == V == 128 else 1)
    return races


@pytest.mark.parametrize("content", [None, "mean", "read"])
@pytest.mark.parametrize(
    "case",
    [
        {"lengths": [0, 1, 17, 65, 130], "H": 1, "groups": 2, "grouped": True, "R": 7, "started": True},
        {"lengths": [150], "decay": "mixed", "C": 48, "started": True, "neg": True},
        {"lengths": [100, 60], "gates": "shut or open", "C": 16},
    ],
    ids=["packed, grouped, from a state", "strong decay", "gates at 0 and 1"],
)
def test_as_exact_and_without_races(emulated: dict[str, int], case: dict[str, Any], content: str | None) -> None:
    assert_as_exact(draw(**case, K=64, V=64, content=content, device="cpu"))
    assert emulated == {"forward": 0, "reverse": 0, "gradients": 0}


@pytest.mark.parametrize(
    "case",
    [
        {"lengths": [0, 1, 17, 130, 70], "R": 7, "started": True, "C": 32},
        {"lengths": [150], "C": 128, "decay": "mixed"},
    ],
    ids=["packed, from a state", "strong decay"],
)
@pytest.mark.parametrize("content", [None, "mean", "read"])
def test_two_programs_share_a_head(emulated: dict[str, int], case: dict[str, Any], content: str | None) -> None:
    assert_as_exact(draw(**case, H=1, content=content, device="cpu"))
    assert emulated == {"forward": 0, "reverse": 0, "gradients": 0}


def test_a_decay_that_is_no_number_is_heard_in_a_strong_block() -> None:
    arguments = draw([40], H=1, K=64, V=64, device="cpu")
    arguments["g"][0, 20, 0, 3], arguments["g"][0, 25, 0, 7] = torch.nan, -100.0
    o = chunk_carve(**arguments, backend="cuda")[0]
    assert o[:, :16].isfinite().all()
    assert o[:, 20:].isnan().all()


@pytest.mark.parametrize(
    ("name", "sync"),
    [("forward", "wait(opened, tile);"), ("reverse", "sync_workers();"), ("gradients", "  sync();")],
)
def test_a_race_is_found(emulated: dict[str, int], monkeypatch: pytest.MonkeyPatch, name: str, sync: str) -> None:
    """Where a kernel's warps do not wait for each other."""
    text, kernels = source(name).replace(sync, "", 1), source
    assert text != kernels(name)
    monkeypatch.setattr(f"{__name__}.source", lambda other: text if other == name else kernels(other))
    with contextlib.suppress(AssertionError):  # results may be wrong then
        assert_as_exact(draw([130], H=1, C=32, content="read", device="cpu"))
    assert emulated.pop(name) > 0
    assert not any(emulated.values())
