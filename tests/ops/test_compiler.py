"""Compiled kernels on disk, and what is said where they cannot be compiled. A stub stands in for NVRTC and the GPU."""

import contextlib
import multiprocessing
import os
import re
import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from carve.ops.kernels import compiler

CONSTANTS = (("CARVE_K", "64"), ("CARVE_V", "64"))
COMPILE_CODE = compiler.compile_code
KEPT = [function for function in vars(compiler).values() if hasattr(function, "cache_clear")]


@pytest.fixture(autouse=True)
def forget() -> Iterator[None]:
    """Each test is a new process, as far as it goes: nothing that earlier calls left in memory."""
    assert COMPILE_CODE in KEPT
    for function in KEPT:
        function.cache_clear()
    yield
    for function in KEPT:
        function.cache_clear()


class Nvrtc:
    """Counts what it compiles; the code says what it was made of."""

    def __init__(self) -> None:
        self.calls = 0

    def compile(self, text: str, name: str, arch: str, constants: compiler.Constants) -> bytes:
        self.calls += 1
        return repr((len(text), name, arch, constants)).encode()


@pytest.fixture
def nvrtc(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Nvrtc:
    stub = Nvrtc()
    monkeypatch.setattr(compiler, "compile_source", stub.compile)
    monkeypatch.setattr(compiler, "nvrtc_version", lambda: (13, 0))
    monkeypatch.setattr(compiler, "source", lambda name: f"source of {name}")
    monkeypatch.setenv("CARVE_CACHE", str(tmp_path / "cache"))
    return stub


def compile_anew(name: str = "forward", arch: str = "sm_90", constants: compiler.Constants = CONSTANTS) -> bytes:
    """As the first call of a process."""
    compiler.compile_code.cache_clear()
    return compiler.compile_code(name, arch, constants)


# -- the cache --


def test_code_is_compiled_once_and_read_from_then_on(nvrtc: Nvrtc, tmp_path: Path) -> None:
    code = compile_anew()
    assert compile_anew() == code
    assert nvrtc.calls == 1
    (kept,) = (tmp_path / "cache").iterdir()
    assert kept.name.startswith("forward-sm_90-")
    assert kept.suffix == ".cubin"


def test_code_of_another_kernel_is_no_use(nvrtc: Nvrtc, monkeypatch: pytest.MonkeyPatch) -> None:
    compile_anew()
    for other in ({"name": "backward"}, {"arch": "sm_80"}, {"constants": (("CARVE_K", "128"),)}):
        before = nvrtc.calls
        compile_anew(**other)
        assert nvrtc.calls == before + 1, other
    monkeypatch.setattr(compiler, "nvrtc_version", lambda: (13, 1))
    compile_anew()
    monkeypatch.setattr(compiler, "source", lambda name: "another source")
    compile_anew()
    assert nvrtc.calls == 6


@pytest.mark.parametrize("damage", ["empty", "cut", "changed", "a folder"])
def test_a_damaged_file_is_made_anew(nvrtc: Nvrtc, tmp_path: Path, damage: str) -> None:
    code = compile_anew()
    (kept,) = (tmp_path / "cache").iterdir()
    whole = kept.read_bytes()
    if damage == "a folder":
        kept.unlink()
        kept.mkdir()
        with pytest.warns(UserWarning, match="cannot be kept"):
            assert compile_anew() == code
        return
    kept.write_bytes({"empty": b"", "cut": whole[:-1], "changed": whole[:40] + b"?" + whole[41:]}[damage])
    assert compile_anew() == code
    assert nvrtc.calls == 2
    assert kept.read_bytes() == whole


def test_a_folder_that_cannot_be_written_is_said_and_does_no_harm(
    nvrtc: Nvrtc, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("CARVE_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.warns(UserWarning, match=r"cannot be kept in .*file/cache .*CARVE_CACHE names another folder"):
        code = compile_anew()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert compiler.compile_code("forward", "sm_90", CONSTANTS) == code
    assert nvrtc.calls == 1


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_write_that_fails_leaves_nothing(
    nvrtc: Nvrtc, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    def fail(*_: Any) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(os, step, fail)
    with pytest.warns(UserWarning, match="no space left on device"):
        compile_anew()
    assert list((tmp_path / "cache").iterdir()) == []


def test_where_code_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    monkeypatch.delenv("CARVE_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert compiler.cache_folder() == Path("/home/someone/.cache/carve")
    monkeypatch.setenv("XDG_CACHE_HOME", "/caches")
    assert compiler.cache_folder() == Path("/caches/carve")
    monkeypatch.setenv("CARVE_CACHE", "/kernels")
    assert compiler.cache_folder() == Path("/kernels")
    monkeypatch.setenv("CARVE_CACHE", "~/kernels")
    assert compiler.cache_folder() == Path("/home/someone/kernels")


def test_a_user_without_a_home_has_a_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("CARVE_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "expanduser", fail)
    assert compiler.cache_folder() == Path(tempfile.gettempdir()) / f"carve-{os.getuid()}"


def keep_writing(path: Path, code: bytes, times: int) -> None:
    for _ in range(times):
        compiler.write_cached(path, code)


def test_processes_that_write_at_once_do_no_harm(tmp_path: Path) -> None:
    path = tmp_path / "cache" / "kernel.cubin"
    codes = [bytes([i]) * 100_000 * (i + 1) for i in range(3)]
    fork = multiprocessing.get_context("fork")
    writers = [fork.Process(target=keep_writing, args=(path, code, 20)) for code in codes]
    for writer in writers:
        writer.start()
    seen = set()
    while any(writer.is_alive() for writer in writers):
        seen.add(compiler.read_cached(path) if path.exists() else codes[0])
    for writer in writers:
        writer.join()
    assert all(writer.exitcode == 0 for writer in writers)
    assert seen <= set(codes)
    assert compiler.read_cached(path) in codes
    assert list(path.parent.iterdir()) == [path]


# -- compiling --


class Refusing:
    """cuda-core, its compiler refusing everything."""

    ProgramOptions = SimpleNamespace

    class Program:
        def __init__(self, *_: Any) -> None: ...

        def compile(self, target: str) -> None:
            raise RuntimeError('NVRTC_ERROR_COMPILATION, compilation log:\nforward(3): error: expected a ";"')


def test_a_refused_kernel_shows_the_log(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(compiler, "core", lambda: Refusing)
    monkeypatch.setattr(compiler, "nvrtc_version", lambda: (13, 0))
    monkeypatch.setenv("CARVE_CACHE", str(tmp_path))
    with pytest.raises(RuntimeError, match=r"refused forward for sm_90: (?s:.*)forward\(3\): error: expected a"):
        compile_anew()
    assert list(tmp_path.iterdir()) == []


class Status(SimpleNamespace):
    """Of cuda-bindings: an enumeration with a name and a value."""


OK = Status(name="SUCCESS", value=0)


@pytest.fixture
def bindings(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """cuda-core and cuda-bindings for an H100, NVRTC 12.8 and a driver of CUDA 12.9."""
    nvrtc = SimpleNamespace(
        nvrtcVersion=lambda: (OK, 12, 8),
        nvrtcGetSupportedArchs=lambda: (OK, [80, 90]),
    )
    driver = SimpleNamespace(cuDriverGetVersion=lambda: (OK, 12090))
    package = ModuleType("cuda.bindings")
    package.nvrtc, package.driver = nvrtc, driver  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "cuda", ModuleType("cuda"))
    monkeypatch.setitem(sys.modules, "cuda.bindings", package)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    found = SimpleNamespace(core=lambda: SimpleNamespace(), nvrtc=nvrtc, driver=driver)
    monkeypatch.setattr(compiler, "core", lambda: found.core())
    return found


def missing(*_: Any) -> Any:
    raise RuntimeError("libnvrtc.so was not found")


def not_installed() -> Any:
    raise ModuleNotFoundError("No module named 'cuda'")


def test_what_is_there_is_good(bindings: SimpleNamespace) -> None:
    assert compiler.why_not(0) is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"core": not_installed},
            r"cuda-core is not installed \(No module .*\), .*pip install 'carve-attention\[gpu\]'",
        ),
        (
            {"nvrtcVersion": missing},
            r"the compiler NVRTC was not found \(libnvrtc.*\), expected: pip install nvidia-cuda-nvrtc-cu12",
        ),
        (
            {"nvrtcVersion": lambda: (Status(name="NVRTC_ERROR", value=7),)},
            r"the compiler NVRTC was not found \(NVRTC_ERROR",
        ),
        (
            {"nvrtcGetSupportedArchs": lambda: (OK, [75, 80])},
            r"NVRTC 12.8 does not know sm_90, expected a newer one: pip install -U nvidia-cuda-nvrtc-cu12",
        ),
        (
            {"nvrtcVersion": lambda: (OK, 13, 0)},
            r"NVRTC 13.0 is too new for the NVIDIA driver, which serves CUDA 12, expected one of CUDA 12",
        ),
    ],
)
def test_what_to_install_is_said(bindings: SimpleNamespace, changes: dict[str, Any], message: str) -> None:
    for name, value in changes.items():
        for part in (bindings, bindings.nvrtc, bindings.driver):
            if hasattr(part, name):
                setattr(part, name, value)
    assert re.match(message, compiler.why_not(0) or "")


# -- launching --


class FakeCore:
    """cuda-core that notes what is launched."""

    def __init__(self) -> None:
        self.launched: list[tuple[Any, ...]] = []
        self.contexts = 0
        self.Stream = SimpleNamespace(from_handle=lambda handle: SimpleNamespace(handle=handle))
        self.ObjectCode = SimpleNamespace(from_cubin=self.from_cubin)

    def LaunchConfig(self, **options: int) -> Any:
        return SimpleNamespace(**options)

    def from_cubin(self, code: bytes) -> Any:
        return SimpleNamespace(get_kernel=lambda name: SimpleNamespace(name=name, code=code, handle=1))

    def Device(self, index: int) -> Any:
        def set_current() -> None:
            self.contexts += 1

        return SimpleNamespace(set_current=set_current)

    def launch(self, *arguments: Any) -> None:
        self.launched.append(arguments)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, bindings: SimpleNamespace, nvrtc: Nvrtc) -> FakeCore:
    fake = FakeCore()
    monkeypatch.setattr(compiler, "core", lambda: fake)
    monkeypatch.setattr(compiler, "THREAD", compiler.Thread())
    monkeypatch.setattr(torch.cuda, "device", lambda index: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda index: SimpleNamespace(cuda_stream=index * 1000))
    bindings.driver.CUfunction_attribute = SimpleNamespace(CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES=8)
    bindings.driver.CUkernel = int
    bindings.driver.cuKernelSetAttribute = lambda *_: (OK,)
    return fake


def start(device: str, programs: int) -> None:
    compiler.launch("forward", torch.device(device), CONSTANTS, programs, 128, 1000, [1, 2])


def test_a_launch_goes_to_the_stream_of_the_device(gpu: FakeCore, nvrtc: Nvrtc) -> None:
    start("cuda:0", 70_000)
    start("cuda:0", 70_000)
    start("cuda:3", 5)
    (s0, c0, k0, *rest), (s1, c1, k1, *_), (s2, c2, k2, *_) = gpu.launched
    assert s0 is s1
    assert c0 is c1
    assert k0 is k1
    assert rest == [1, 2]
    assert (c0.grid, c0.block, c0.shmem_size) == (70_000, 128, 1000)
    assert (s0.handle, s2.handle) == (1, 3000)
    assert k0.name == "carve_forward"
    assert k2 is not k0
    assert c2.grid == 5
    assert gpu.contexts == 1
    assert nvrtc.calls == 1


def test_too_much_shared_memory_is_said(gpu: FakeCore, bindings: SimpleNamespace) -> None:
    bindings.driver.cuKernelSetAttribute = lambda *_: (Status(name="CUDA_ERROR_INVALID_VALUE", value=1),)
    with pytest.raises(
        RuntimeError, match=r"forward wants 1000 bytes of shared memory on device 0: CUDA_ERROR_INVALID"
    ):
        start("cuda:0", 1)
