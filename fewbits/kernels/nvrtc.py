"""CUDA C++ compiled when it is first needed, and launched.

The compiler (NVRTC) and its Python bindings come with torch's CUDA builds, so nothing is to be installed and no nvcc to
be found. A kernel takes a second to compile; what was compiled is kept on disk (`~/.cache/fewbits`, or `FEWBITS_CACHE`)
under a digest of the source, the options and the compiler's version.

Launches use *programmatic dependent launch* (CUDA programming guide): a kernel may start while the one before it ends,
and waits itself before it reads what that one wrote. This is what keeps memory busy between two small products.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
from collections.abc import Mapping, Sequence
from functools import lru_cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewbits.core.errors import FewbitsError, Unsupported, first_line
from fewbits.core.record import atomic_path

COUNTERS = 1024  # that a kernel can have: one a block
Argument = ctypes.c_void_p | ctypes.c_int | ctypes.c_longlong | ctypes.c_float | ctypes.Structure


@lru_cache(maxsize=1)
def available() -> str | None:
    """None where kernels can be compiled; else the reason why not."""
    try:
        from cuda.bindings import driver, nvrtc  # noqa: F401
    except ImportError:
        return "cuda-bindings, which compiles kernels, is missing: pip install 'fewbits[cuda]'"
    try:
        nvrtc.nvrtcVersion()
    except RuntimeError as error:  # the library is not found
        return f"CUDA's compiler is missing: pip install nvidia-cuda-nvrtc ({first_line(error)})"
    return None


def _check(result: tuple[Any, ...]) -> Any:
    """The value of a call of the bindings, which return (error, value...)."""
    from cuda.bindings import driver

    error, *values = result
    if int(error) != 0:
        name = error.name if not isinstance(error, driver.CUresult) else str(driver.cuGetErrorName(error)[1], "ascii")
        raise FewbitsError(f"CUDA: {name}")
    return values[0] if len(values) == 1 else tuple(values)


def folder() -> Path:
    """Where compiled kernels and measured choices are kept."""
    named = os.environ.get("FEWBITS_CACHE")
    return Path(named) if named else Path.home() / ".cache" / "fewbits"


@lru_cache(maxsize=8)
def _text(name: str) -> str:
    return (files("fewbits.kernels") / "cuda" / f"{name}.cu").read_text(encoding="utf-8")


def program(macros: Mapping[str, int], *names: str) -> str:
    """The source of a kernel: macros, cuda/instructions.cu, then cuda/NAME.cu for each of `names`."""
    lines = [f"#define {name} {value}\n" for name, value in macros.items()]
    return "".join([*lines, *map(_text, ("instructions", *names))])


def compiled(source: str, options: Sequence[str]) -> bytes:
    """source -> machine code (cubin), from disk where it was compiled before."""
    from cuda.bindings import nvrtc

    version = _check(nvrtc.nvrtcVersion())
    digest = hashlib.sha256("\0".join((source, *options, str(version))).encode()).hexdigest()
    kept = folder() / f"{digest[:32]}.cubin"
    if kept.is_file():
        return kept.read_bytes()
    program = _check(nvrtc.nvrtcCreateProgram(source.encode(), b"fewbits.cu", 0, [], []))
    given = [option.encode() for option in options]
    error, *_ = nvrtc.nvrtcCompileProgram(program, len(given), given)
    if int(error) != 0:
        log = b" " * _check(nvrtc.nvrtcGetProgramLogSize(program))
        _check(nvrtc.nvrtcGetProgramLog(program, log))
        made = ".".join(map(str, version))
        raise Unsupported(
            f"CUDA's compiler {made} does not compile a kernel with {' '.join(options)}. For a GPU newer than it, "
            f"install a torch of newer CUDA. It says:\n{log.decode(errors='replace')}"
        )
    cubin = b" " * _check(nvrtc.nvrtcGetCUBINSize(program))
    _check(nvrtc.nvrtcGetCUBIN(program, cubin))
    _check(nvrtc.nvrtcDestroyProgram(program))
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(kept) as path:
            path.write_bytes(cubin)
    except OSError:
        pass  # a cache that cannot be written is compiled again
    return cubin


def options(device: int) -> tuple[str, ...]:
    """What kernels are compiled with for `device` (an index)."""
    major, minor = torch.cuda.get_device_capability(device)
    return f"--gpu-architecture=sm_{major}{minor}{'a' if major >= 9 else ''}", "--std=c++17"


class CudaKernel:
    """One kernel of a compiled source on one device."""

    def __init__(self, source: str, name: str, device: int) -> None:
        from cuda.bindings import driver

        if (reason := available()) is not None:
            raise Unsupported(reason)
        major, _ = torch.cuda.get_device_capability(device)
        self.name, self.device, self.dependent = name, device, major >= 9
        with torch.cuda.device(device):
            torch.cuda.current_stream().synchronize()  # makes torch's context the current one
            module = _check(driver.cuModuleLoadData(compiled(source, options(device))))
            self.function = _check(driver.cuModuleGetFunction(module, name.encode()))
        self._shared = 28 << 10  # with what a kernel has beside it, under the 48 KB that need no asking
        self._driver = driver
        # Told once: to make one takes longer than everything else of a launch.
        attribute = driver.CUlaunchAttribute()
        attribute.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
        attribute.value.programmaticStreamSerializationAllowed = 1
        self._attributes = [attribute]
        self.multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count

    def launch(self, grid: tuple[int, int], threads: int, shared: int, arguments: Sequence[Argument]) -> None:
        """On torch's current stream of the device. `shared`: bytes of dynamic shared memory."""
        try:
            with torch.cuda.device(self.device):
                self._launch(grid, threads, shared, arguments)
        except FewbitsError as error:
            size = f"{grid[0]} x {grid[1]} blocks of {threads} threads, each block {shared} bytes of shared memory"
            raise FewbitsError(f"{error}, starting kernel {self.name}: {size}") from error

    def _launch(self, grid: tuple[int, int], threads: int, shared: int, arguments: Sequence[Argument]) -> None:
        driver = self._driver
        if shared > self._shared:
            attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            _check(driver.cuFuncSetAttribute(self.function, attribute, shared))
            self._shared = shared
        config = driver.CUlaunchConfig()
        config.gridDimX, config.gridDimY, config.gridDimZ = (*grid, 1)
        config.blockDimX, config.blockDimY, config.blockDimZ = threads, 1, 1
        config.sharedMemBytes = shared
        config.hStream = torch.cuda.current_stream().cuda_stream
        if self.dependent:
            config.attrs, config.numAttrs = self._attributes, 1
        pointers = (ctypes.c_void_p * len(arguments))(*map(ctypes.addressof, arguments))
        _check(driver.cuLaunchKernelEx(config, self.function, ctypes.addressof(pointers), 0))


class TensorMap(ctypes.Structure):
    """What the tensor memory accelerator is told of a matrix; passed to a kernel by value."""

    _align_ = 64
    _fields_ = [("bytes", ctypes.c_uint8 * 128)]


def tensor_map(x: Tensor, box: tuple[int, int]) -> TensorMap:
    """x [rows, columns], contiguous, rows of a multiple of 16 bytes, read in boxes of (rows, columns), in the 128-byte
    swizzle; zeros beyond its edges."""
    return tensor_map_at(x.data_ptr(), x.dtype, *x.shape, box, True)


@lru_cache(maxsize=16384)  # those of a model's weights: an address and a shape are all that is in one
def tensor_map_at(
    address: int, dtype: torch.dtype, rows: int, columns: int, box: tuple[int, int], swizzled: bool
) -> TensorMap:
    """`tensor_map` of a matrix at this address, swizzled or not, which is asked for at every product: a view takes
    longer to make."""
    from cuda.bindings import driver

    kinds = driver.CUtensorMapDataType
    kind = {
        torch.float16: "FLOAT16",
        torch.bfloat16: "BFLOAT16",
        torch.uint8: "UINT8",
        torch.int32: "INT32",
        torch.int64: "INT64",
    }[dtype]
    made = _check(
        driver.cuTensorMapEncodeTiled(
            getattr(kinds, f"CU_TENSOR_MAP_DATA_TYPE_{kind}"),
            2,
            address,
            [driver.cuuint64_t(columns), driver.cuuint64_t(rows)],
            [driver.cuuint64_t(dtype.itemsize * columns)],
            [driver.cuuint32_t(box[1]), driver.cuuint32_t(box[0])],
            [driver.cuuint32_t(1), driver.cuuint32_t(1)],
            driver.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
            getattr(driver.CUtensorMapSwizzle, f"CU_TENSOR_MAP_SWIZZLE_{'128B' if swizzled else 'NONE'}"),
            driver.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
            driver.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
        )
    )
    out = TensorMap()
    ctypes.memmove(ctypes.addressof(out), made.getPtr(), 128)
    return out


class _Counters:
    """Zeros by which the blocks of a kernel wait for one another; a kernel leaves them zero again.

    Kernels that run at the same time must not share them: every stream has its own, and so has every stream of a
    capture, whose graph may be replayed on any. They are taken from one allocation, made when a weight is packed, for
    nothing can be allocated while a graph is captured.
    """

    MOST = 256  # streams and captures, before the first is given again

    def __init__(self, device: int) -> None:
        self.memory = torch.zeros(self.MOST, COUNTERS, dtype=torch.int32, device=torch.device("cuda", device))
        self.given: dict[tuple[int, int], int] = {}

    def address(self) -> int:
        from cuda.bindings import driver

        stream = torch.cuda.current_stream(self.memory.device).cuda_stream
        capture = 0
        if torch.cuda.is_current_stream_capturing():
            capture = int(_check(driver.cuStreamGetCaptureInfo(stream))[1])
        place = self.given.setdefault((stream, capture), len(self.given) % self.MOST)
        return self.memory.data_ptr() + 4 * COUNTERS * place


def settle(weight: Tensor) -> None:
    """Waits until what was just packed is in memory: products read weights while the kernel before them still runs."""
    if weight.is_cuda and not torch.cuda.is_current_stream_capturing():
        torch.cuda.current_stream(weight.device).synchronize()


@lru_cache(maxsize=16)
def _counters(device: int) -> _Counters:
    return _Counters(device)


def counters(device: int) -> int:
    """The address of `COUNTERS` zeros for a kernel on the current stream of `device` (an index)."""
    return _counters(device).address()


@lru_cache(maxsize=512)
def kernel(source: str, name: str, device: int) -> CudaKernel:
    """Kernel `name` of `source`, compiled for `device` (an index) once a process."""
    return CudaKernel(source, name, device)
