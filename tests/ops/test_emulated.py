"""The CUDA kernels' arithmetic, run on the CPU through `emulator.h`, which takes a C++ compiler and an x86-64."""

import ctypes
import platform
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from carve.ops.kernels import compiler, cuda
from carve.ops.recurrence import Options, Projections, Tokens
from tests.ops.kernel_cases import assert_as_exact, draw

CXX = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
pytestmark = pytest.mark.skipif(
    CXX is None or platform.machine() != "x86_64", reason="takes a C++ compiler, and a processor of x86-64"
)
ENTRY = """
extern "C" int shared_bytes() {{ return SHARED_BYTES; }}
extern "C" void launch(int programs, void** arguments, int seed) {{
  emu::run(emu::call<carve_{name}>, programs, THREADS, SPLIT, SHARED_BYTES, arguments, seed);
}}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("kernels")


@pytest.fixture(autouse=True)
def emulated(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels go to the emulator, and CPU tensors to the kernels."""

    def build(name: str, constants: compiler.Constants) -> ctypes.CDLL:
        library = folder / f"{name}-{abs(hash(constants))}.so"
        if not library.exists():
            files = [compiler.FOLDER / file for file in (*compiler.HEADERS[name], f"{name}.cu")]
            text = Path(__file__).with_name("emulator.h").read_text()
            text += "".join(file.read_text() for file in files if file.name != "primitives.cuh")
            library.with_suffix(".cpp").write_text(text + ENTRY.format(name=name))
            macros = [f"-D{key}={value}" for key, value in constants]
            flags = ["-std=c++20", "-O1", "-fno-strict-aliasing", "-w", "-shared", "-fPIC"]
            command = [str(CXX), *flags, *macros, "-o", str(library), str(library.with_suffix(".cpp"))]
            subprocess.run(command, check=True)
        return ctypes.CDLL(str(library))

    def launch(
        name: str,
        device: torch.device,
        constants: compiler.Constants,
        programs: int,
        threads: int,
        shared_bytes: int,
        arguments: list[Any],
    ) -> None:
        library = build(name, constants)
        assert dict(constants)["CARVE_THREADS"] == str(threads)
        assert library.shared_bytes() <= shared_bytes
        values = [ctypes.c_void_p(x) if isinstance(x, int) else x for x in arguments]
        pointers = (ctypes.c_void_p * len(values))(*(ctypes.cast(ctypes.pointer(x), ctypes.c_void_p) for x in values))
        library.launch(programs, pointers, 0)

    def why_not(x: Tokens, p: Projections, options: Options) -> str | None:
        return None if x.v.dtype in cuda.INPUTS else "float64"

    monkeypatch.setattr(compiler, "launch", launch)
    monkeypatch.setattr(cuda, "why_not", why_not)
    monkeypatch.setattr(cuda, "build", lambda *_: None)
    monkeypatch.setattr(cuda, "forward_tile", lambda *_: 64)
    monkeypatch.setattr(cuda, "programs_of_head", lambda K, V, *_: 2 if K == V == 128 else 1)


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
def test_as_exact(case: dict[str, Any], content: str | None) -> None:
    assert_as_exact(draw(**case, K=64, V=64, content=content, device="cpu"))


@pytest.mark.parametrize("content", [None, "mean", "read"])
def test_two_programs_share_a_head(content: str | None) -> None:
    assert_as_exact(draw([0, 1, 17, 130, 70], H=1, R=7, started=True, C=32, content=content, device="cpu"))
