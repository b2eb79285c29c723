"""CUDA C++ compiled at first use by NVRTC, through cuda-core, and kept on disk.

A kernel is compiled for one device architecture and one set of constants; the compiled code is kept in
`$CARVE_CACHE`, else `$XDG_CACHE_HOME/carve`, else `~/.cache/carve`, under the hash of all that went into it.
"""

import contextlib
import functools
import hashlib
import os
import tempfile
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, cast

import torch

FOLDER = Path(__file__).parent
Constants = tuple[tuple[str, str], ...]
F = TypeVar("F", bound=Callable[..., Any])


def constant(function: F) -> F:
    """Cached, and called for good when `torch.compile` traces it, which knows its result from then on."""
    cached = functools.cache(function)

    @torch.compiler.assume_constant_result
    def call(*arguments: Any) -> Any:
        return cached(*arguments)

    return cast(F, call)


# -- what there is to compile with --


@functools.cache
def core() -> Any:
    """cuda-core, whose names lay in `experimental` before 1.0."""
    import cuda.core

    if hasattr(cuda.core, "Program"):
        return cuda.core
    import cuda.core.experimental

    return cuda.core.experimental


def checked(result: tuple[Any, ...]) -> Any:
    """What a function of cuda-bindings returned, its status taken off."""
    status, *values = result
    if status.value != 0:
        raise RuntimeError(f"{status.name} (error {status.value})")
    return values[0] if len(values) == 1 else tuple(values)


@functools.cache
def nvrtc_version() -> tuple[int, int]:
    from cuda.bindings import nvrtc

    return checked(nvrtc.nvrtcVersion())


@functools.cache
def why_not(device: int) -> str | None:
    """Why kernels cannot be compiled for a CUDA device here; None if they can."""
    from_pip = "nvidia-cuda-nvrtc" + ("-cu12" if str(torch.version.cuda).startswith("12.") else "")
    try:
        core()
        from cuda.bindings import driver, nvrtc
    except ImportError as error:
        return f"cuda-core is not installed ({error}), expected: pip install 'carve-attention[gpu]'"
    try:
        major, minor = nvrtc_version()
        known = checked(nvrtc.nvrtcGetSupportedArchs())
    except RuntimeError as error:
        return f"the compiler NVRTC was not found ({error}), expected: pip install {from_pip}"
    arch = int("{}{}".format(*torch.cuda.get_device_capability(device)))
    if arch not in known:
        return f"NVRTC {major}.{minor} does not know sm_{arch}, expected a newer one: pip install -U {from_pip}"
    served = checked(driver.cuDriverGetVersion()) // 1000
    if major > served:
        return (
            f"NVRTC {major}.{minor} is too new for the NVIDIA driver, which serves CUDA {served}, expected one of "
            f"CUDA {served}, or a newer driver: pip install {from_pip}"
        )
    return None


# -- the cache --


def cache_folder() -> Path:
    """$CARVE_CACHE, else `carve` among the user's caches; a user without a home has a temporary folder."""
    try:
        if folder := os.environ.get("CARVE_CACHE"):
            return Path(folder).expanduser()
        return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "carve"
    except RuntimeError:  # of a user that the system does not know, as in containers
        return Path(tempfile.gettempdir()) / f"carve-{os.getuid()}"


def read_cached(path: Path) -> bytes | None:
    """The code kept at `path`; None if there is none, or if it is damaged."""
    try:
        kept = path.read_bytes()
    except OSError:
        return None
    digest, code = kept[:32], kept[32:]
    return code if hashlib.sha256(code).digest() == digest else None


def write_cached(path: Path, code: bytes) -> None:
    """Keep the code, under its final name only once it is whole.

    Raises:
        OSError: the folder cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".partial", delete=False) as file:
        try:
            file.write(hashlib.sha256(code).digest() + code)
            file.flush()
            os.fsync(file.fileno())
            os.replace(file.name, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(file.name)
            raise


# -- compiling --


HEADERS = {
    "forward": ["primitives.cuh", "tile.cuh", "blocks.cuh"],
    "reverse": ["primitives.cuh", "tile.cuh", "blocks.cuh"],
    "gradients": ["primitives.cuh", "tile.cuh"],
    "decode": ["primitives.cuh"],
}


def source(name: str) -> str:
    return "".join((FOLDER / file).read_text() for file in [*HEADERS[name], f"{name}.cu"])


def compile_source(text: str, name: str, arch: str, constants: Constants) -> bytes:
    """Machine code of a source.

    Raises:
        RuntimeError: the compiler refused; the message holds its log.
    """
    options = core().ProgramOptions(name=name, arch=arch, std="c++17", define_macro=list(constants))
    try:
        return bytes(core().Program(text, "c++", options).compile("cubin").code)
    except Exception as error:  # its text holds the log
        raise RuntimeError(f"the CUDA compiler refused {name} for {arch}: {error}") from error


@functools.cache
def compile_code(name: str, arch: str, constants: Constants) -> bytes:
    """Machine code of the kernel `name` for `arch`, such as "sm_90"; from the disk if it is there.

    Raises:
        ImportError: cuda-core is not installed.
        RuntimeError: the compiler refused; the message holds its log.
    """
    text = source(name)
    key = hashlib.sha256(repr((text, arch, constants, nvrtc_version())).encode()).hexdigest()
    path = cache_folder() / f"{name}-{arch}-{key[:32]}.cubin"
    code = read_cached(path)
    if code is None:
        code = compile_source(text, name, arch, constants)
        try:
            write_cached(path, code)
        except OSError as error:
            warnings.warn(
                f"carve: compiled kernels cannot be kept in {path.parent} ({error}), so that every process compiles "
                "them; the environment variable CARVE_CACHE names another folder",
                stacklevel=2,
            )
    return code


@functools.cache
def load(name: str, device: int, constants: Constants, shared_bytes: int) -> Any:
    """The kernel `carve_<name>`, ready to be launched on a device with `shared_bytes` of shared memory."""
    from cuda.bindings import driver

    major, minor = torch.cuda.get_device_capability(device)
    code = compile_code(name, f"sm_{major}{minor}", constants)
    kernel = core().ObjectCode.from_cubin(code).get_kernel(f"carve_{name}")
    attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
    try:
        checked(driver.cuKernelSetAttribute(attribute, shared_bytes, driver.CUkernel(int(kernel.handle)), device))
    except RuntimeError as error:
        raise RuntimeError(f"{name} wants {shared_bytes} bytes of shared memory on device {device}: {error}") from error
    return kernel


# -- launching: what does not change from call to call is kept --


class Thread(threading.local):
    has_context = False  # whether the driver has a context in this thread


THREAD = Thread()


@functools.lru_cache(1024)
def configuration(programs: int, threads: int, shared_bytes: int) -> Any:
    return core().LaunchConfig(grid=programs, block=threads, shmem_size=shared_bytes)


@functools.lru_cache(1024)
def stream_of(device: int, handle: int) -> Any:
    return core().Stream.from_handle(handle or 1)  # 1 is the driver's name for the default stream


def launch(
    name: str,
    device: torch.device,
    constants: Constants,
    programs: int,
    threads: int,
    shared_bytes: int,
    arguments: list[Any],
) -> None:
    """Start the kernel on torch's current stream. Arguments: addresses as int, numbers as ctypes."""
    index = torch.cuda.current_device() if device.index is None else device.index
    with torch.cuda.device(index):
        if not THREAD.has_context:  # torch sets one at its first own call, which this may come before
            core().Device(index).set_current()
            THREAD.has_context = True
        kernel = load(name, index, constants, shared_bytes)
        stream = stream_of(index, torch.cuda.current_stream(index).cuda_stream)
        core().launch(stream, configuration(programs, threads, shared_bytes), kernel, *arguments)
