"""Compiles the C++ beside this file once per machine, and opens it.

Nothing is compiled at install. Without a compiler, or with DERS_NATIVE=0, everything runs in torch operations.
"""

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch
from torch import Tensor

log = logging.getLogger(__name__)

_SOURCES = Path(__file__).parent
# Errno and traps are what keeps a compiler from vectorising exp and rint; nothing else is relaxed.
_FLAGS = ["-O3", "-std=c++20", "-march=native", "-fPIC", "-fopenmp", "-fno-math-errno", "-fno-trapping-math", "-Wall"]
_SUFFIX = {torch.float32: "f32", torch.float64: "f64", torch.bfloat16: "bf16", torch.float16: "f16"}


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled kernels, or None where there is no compiler; says so once."""
    if os.environ.get("DERS_NATIVE", "1") == "0":
        return None
    compiler = next(filter(None, map(shutil.which, [os.environ.get("CXX", "g++"), "c++"])), None)
    if compiler is None:
        log.warning("no C++ compiler found: sparse and quantized deltas run in torch operations, which are slower")
        return None
    try:
        return ctypes.CDLL(str(_built(compiler)))
    except (OSError, subprocess.SubprocessError) as error:
        told = error.stderr.strip()[-2000:] if isinstance(error, subprocess.CalledProcessError) else str(error)
        log.warning("the CPU kernels could not be compiled and run in torch operations, which are slower:\n%s", told)
        return None


@torch.compiler.assume_constant_result
def usable(device: str, dtype: torch.dtype) -> bool:
    """Whether the compiled kernels take tensors of this device type, their floats of this type."""
    return device == "cpu" and dtype in _SUFFIX and library() is not None


def call(name: str, dtype: torch.dtype, *arguments: Tensor | list[Tensor] | tuple[int, ...] | int) -> None:
    """Run `ders_<name>_<dtype>`: tensors go as pointers (they must be contiguous), lists of them as arrays of pointers,
    tuples as arrays of int64."""
    function = getattr(library(), f"ders_{name}_{_SUFFIX[dtype]}")
    function.restype = None
    function(*map(_converted, arguments), ctypes.c_int64(torch.get_num_threads()))


def _converted(argument: Tensor | list[Tensor] | tuple[int, ...] | int) -> object:
    if isinstance(argument, Tensor):
        assert argument.is_contiguous()
        return ctypes.c_void_p(argument.data_ptr())
    if isinstance(argument, list):
        assert all(tensor.is_contiguous() for tensor in argument)
        return (ctypes.c_void_p * max(1, len(argument)))(*(tensor.data_ptr() for tensor in argument))
    if isinstance(argument, tuple):
        return (ctypes.c_int64 * len(argument))(*argument)
    return ctypes.c_int64(argument)


def cache_folder() -> Path:
    """Where what takes long to make is kept for all runs of this user: `$XDG_CACHE_HOME/ders`, else `~/.cache/ders`."""
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "ders"


def _built(compiler: str) -> Path:
    sources = sorted(_SOURCES.glob("*.cpp"))
    about = [compiler, *_FLAGS, _output(compiler, "--version"), _processor()]
    about += [file.read_text() for file in sorted(_SOURCES.glob("*.[ch]*"))]
    folder = cache_folder()
    built = folder / f"kernels-{hashlib.sha256(repr(about).encode()).hexdigest()[:16]}.so"
    if built.exists():
        return built
    log.info("compiling the CPU kernels, once for this machine (half a minute)")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        folder = Path(tempfile.gettempdir())
    # Renamed when whole: processes that start together each compile, and the last one's file stays.
    with tempfile.TemporaryDirectory(dir=folder) as work:
        objects = [f"{work}/{file.stem}.o" for file in sources]
        commands = [[compiler, *_FLAGS, "-c", str(s), "-o", o] for s, o in zip(sources, objects, strict=True)]
        for process, command in [(subprocess.Popen(c, stderr=subprocess.PIPE, text=True), c) for c in commands]:
            _, told = process.communicate()
            if process.returncode:
                raise subprocess.CalledProcessError(process.returncode, command, stderr=told)
        linked = f"{work}/linked.so"
        subprocess.run(
            [compiler, "-shared", "-fopenmp", *objects, "-o", linked], check=True, capture_output=True, text=True
        )
        os.replace(linked, built)
    return built


def _output(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def _processor() -> str:
    """What -march=native depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())
