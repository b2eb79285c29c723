"""CUDA C++ compiled at first use by NVRTC, through cuda-core, and kept on disk.

A kernel is compiled for one device architecture and one set of constants; the compiled code is kept in
`$CARVE_CACHE`, else `$XDG_CACHE_HOME/carve`, else `~/.cache/carve`, under the hash of all that went into it.
"""

import functools
import hashlib
import io
import os
import tempfile
from pathlib import Path
from typing import Any

import torch

FOLDER = Path(__file__).parent
Constants = tuple[tuple[str, str], ...]


def cache_folder() -> Path:
    home = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(os.environ.get("CARVE_CACHE") or Path(home) / "carve")


def source(name: str) -> str:
    return "".join((FOLDER / file).read_text() for file in ("primitives.cuh", "tile.cuh", f"{name}.cu"))


def read_cached(path: Path) -> bytes | None:
    """The code kept at `path`; None if there is none, or if it is damaged."""
    try:
        kept = path.read_bytes()
    except OSError:
        return None
    digest, code = kept[:32], kept[32:]
    return code if hashlib.sha256(code).digest() == digest else None


def write_cached(path: Path, code: bytes) -> None:
    """Keep the code, under its final name only once it is whole; a folder that cannot be written is left alone."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            file.write(hashlib.sha256(code).digest() + code)
            file.flush()
            os.fsync(file.fileno())
        os.replace(file.name, path)
    except OSError:
        return


def compile_code(name: str, arch: str, constants: Constants) -> bytes:
    """Machine code of the kernel `name` for `arch`, such as "sm_90"; from the disk if it is there.

    Raises:
        ImportError: cuda-core is not installed.
        RuntimeError: the compiler refused; the message holds its log.
    """
    from cuda.core import Program, ProgramOptions

    text = source(name)
    key = hashlib.sha256(repr((text, arch, constants, torch.version.cuda)).encode()).hexdigest()
    path = cache_folder() / f"{name}-{arch}-{key[:32]}.cubin"
    code = read_cached(path)
    if code is None:
        options = ProgramOptions(name=name, arch=arch, std="c++17", define_macro=list(constants))
        log = io.StringIO()
        try:
            code = bytes(Program(text, "c++", options).compile("cubin", logs=log).code)
        except Exception as error:
            raise RuntimeError(f"the CUDA compiler refused {name} for {arch}: {error}\n{log.getvalue()}") from error
        write_cached(path, code)
    return code


@functools.cache
def load(name: str, device: int, constants: Constants, shared_bytes: int) -> Any:
    """The kernel `carve_<name>`, ready to be launched on a device with `shared_bytes` of shared memory."""
    from cuda.bindings import driver
    from cuda.core import ObjectCode

    major, minor = torch.cuda.get_device_capability(device)
    kernel = ObjectCode.from_cubin(compile_code(name, f"sm_{major}{minor}", constants)).get_kernel(f"carve_{name}")
    attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
    (status,) = driver.cuKernelSetAttribute(attribute, shared_bytes, driver.CUkernel(int(kernel.handle)), device)
    if status != driver.CUresult.CUDA_SUCCESS:
        raise RuntimeError(f"{name} wants {shared_bytes} bytes of shared memory on device {device}: {status}")
    return kernel


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
    from cuda.core import LaunchConfig, Stream, launch

    index = torch.cuda.current_device() if device.index is None else device.index
    with torch.cuda.device(index):
        kernel = load(name, index, constants, shared_bytes)
        config = LaunchConfig(grid=programs, block=threads, shmem_size=shared_bytes)
        stream = torch.cuda.current_stream(index).cuda_stream or 1  # 1 is the driver's name for the default stream
        launch(Stream.from_handle(stream), config, kernel, *arguments)
