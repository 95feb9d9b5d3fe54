"""Builds and loads `kernels.c`: matrix products and the decoder on a CPU, several times faster than torch's.

    SLIME_LOCAL_KERNELS=0 python train.py ...        # without: everything is computed by torch
    SLIME_LOCAL_KERNELS=fp32 python train.py ...     # products in fp32 where bf16 would be twice as fast

The C compiler of the machine (`cc`, or $CC) compiles it at first use, in two seconds, into a cache folder of the user.
Without a compiler, or where something else does not fit, torch computes, and one line in the log says why.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import re
import shutil
import stat
import subprocess
import tempfile
from pathlib import Path

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

SOURCE = Path(__file__).with_name("kernels.c")
COMPILE = ("-std=gnu11", "-O3", "-march=native", "-ffast-math", "-fopenmp", "-fPIC", "-c")
SWITCH = "SLIME_LOCAL_KERNELS"


class NoKernels(Exception):
    """Why there are none."""


def available(dtype: torch.dtype, products: torch.dtype, device: torch.device) -> bool:
    """Whether they compute in `dtype`, which is fp32, with products in `products`, fp32 or bf16, on this device."""
    switch = os.environ.get(SWITCH)
    if dtype != torch.float32 or device.type != "cpu" or switch == "0" or library() is None:
        return False
    return products == torch.float32 or (products == torch.bfloat16 and switch != "fp32" and library().has_bf16() == 1)


def multiplies_bf16(device: torch.device) -> bool:
    """Whether products in bf16 are faster than in fp32 on this device; False where the kernels widen them, and torch's
    are slower still."""
    return device.type != "cpu" or library() is None or library().multiplies_bf16() == 1


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled library, compiled now unless it is in the cache; None, said in the log, where that fails."""
    try:
        openmp = _torchs_openmp()
        built = _built(shutil.which(os.environ.get("CC", "cc")))
        # The library has no OpenMP runtime of its own: two pools of threads on the same cores slow each other down.
        ctypes.CDLL(str(openmp), mode=ctypes.RTLD_GLOBAL)
        loaded = ctypes.CDLL(str(built))
    except (NoKernels, OSError, subprocess.SubprocessError) as error:
        logger.warning("computing without compiled kernels, several times slower: %s", error)
        return None
    for function in (loaded.panel_width, loaded.part_keys, loaded.has_bf16, loaded.multiplies_bf16):
        function.restype = ctypes.c_int64
    return loaded


def _torchs_openmp() -> str:
    """Path of the OpenMP library that torch has loaded into this process."""
    maps = Path("/proc/self/maps")
    found = re.search(r"/\S*/lib(gomp|omp|iomp5)[^/\s]*\.so[^/\s]*$", maps.read_text() if maps.exists() else "", re.M)
    if found is None:
        raise NoKernels("torch has no OpenMP library loaded")
    return found[0]


def _built(compiler: str | None) -> Path:
    """The compiled library in the cache: named by source, flags, compiler and CPU, and put there in one piece."""
    if compiler is None:
        raise NoKernels("no C compiler (install gcc, or name one in CC)")
    version = subprocess.run([compiler, "--version"], capture_output=True, check=True, timeout=60).stdout
    flags = (*COMPILE, *_widen())
    facts = (SOURCE.read_bytes(), repr(flags).encode(), compiler.encode(), version, _cpu().encode())
    folder = _cache_folder()
    path = folder / f"kernels-{hashlib.sha256(b'|'.join(facts)).hexdigest()[:24]}.so"
    if not path.exists():
        with tempfile.TemporaryDirectory(dir=folder) as work:
            compiled, linked = Path(work) / "kernels.o", Path(work) / "kernels.so"
            _run(compiler, *flags, str(SOURCE), "-o", str(compiled))
            # Linked without the flags: -fopenmp would bring a second runtime, -ffast-math another rounding for all.
            _run(compiler, "-shared", str(compiled), "-lm", "-o", str(linked))
            os.replace(linked, path)
    return path


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    if done.returncode != 0:
        raise NoKernels(f"{command[0]} fails: {(done.stderr.strip().splitlines() or ['it says nothing'])[0]}")


def _widen() -> tuple[str, ...]:
    """Intel's vector units take two cycles for a product of bf16 pairs and half a cycle for one in fp32 (an Emerald
    Rapids was measured: 86 and 176 GFLOP/s a core). AMD's are faster in bf16."""
    return ("-DWIDEN",) if "GenuineIntel" in _cpu() else ()


def _cpu() -> str:
    """What -march=native depends on."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = ("vendor_id", "model name", "flags", "Features", "CPU implementer", "CPU part")
    return "\n".join(sorted({line for line in lines if line.startswith(names)}))


def _cache_folder() -> Path:
    """A folder that nobody else can write to: what lies there is loaded as code."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(base) / "slime_local"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = folder.stat()
    if found.st_uid != os.getuid() or found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise NoKernels(f"{folder} belongs to another user or can be written by others: remove it")
    return folder


# ---- products ----------------------------------------------------------------------------------------------------


def panels(weight: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """A weight [n_out, n_in] as `product` reads it: [panels, n_in, width], neighbouring outputs side by side; in bf16
    [panels, n_in / 2, width, 2], neighbouring inputs too."""
    width, pair = library().panel_width(), 2 if dtype == torch.bfloat16 else 1
    n_out, n_in = weight.shape
    weight = torch.nn.functional.pad(weight.to(dtype), (0, -n_in % pair, 0, -n_out % width))
    shape = (len(weight) // width, width, weight.shape[1] // pair, pair)
    return weight.view(shape).transpose(1, 2).contiguous()


def product(x: Tensor, weight: Tensor, n_out: int, bias: Tensor | None = None) -> Tensor:
    """fp32 x [..., n_in] times a weight [n_out, n_in], given as its panels -> [..., n_out]."""
    x = x.contiguous()
    y = x.new_empty(*x.shape[:-1], n_out)
    n_in = x.shape[-1]
    rows = x.numel() // n_in
    rounded = room_for_rounded(weight, rows, n_in)
    operands = (x, weight, None if bias is None else bias.contiguous(), y, rounded)
    pointers = [ctypes.c_void_p(None if tensor is None else tensor.data_ptr()) for tensor in operands]
    sizes = [ctypes.c_int64(size) for size in (rows, n_out, n_in, torch.get_num_threads())]
    library().product(*pointers, *sizes)
    return y


def room_for_rounded(weight: Tensor, rows: int, n_in: int) -> Tensor | None:
    """Where the kernels put the rounded input of a product with bf16 panels, widened or not; None for fp32."""
    if weight.dtype == torch.float32:
        return None
    return torch.empty(rows, n_in + n_in % 2)


# ---- element by element ------------------------------------------------------------------------------------------


def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Root-mean-square norm of fp32 x [..., n] with a weight [n]."""
    x, y = x.contiguous(), torch.empty(x.shape)
    _call("norm", (x, weight.contiguous(), y), _rows(x), ctypes.c_double(eps))
    return y


def norm_backward(x: Tensor, weight: Tensor, grad: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Gradients by x and weight of `norm`, given that by its result."""
    x, dx, dw = x.contiguous(), torch.empty(x.shape), torch.empty(weight.shape)
    sums = torch.zeros(torch.get_num_threads(), len(weight))
    _call("norm_backward", (x, weight.contiguous(), grad.contiguous(), dx, dw, sums), _rows(x), ctypes.c_double(eps))
    return dx, dw


def gate(gate_up: Tensor) -> Tensor:
    """silu(gate) * up: fp32 [T, 2 F] -> [T, F]."""
    gate_up = gate_up.contiguous()
    out = torch.empty(len(gate_up), gate_up.shape[1] // 2)
    _call("gate", (gate_up, out), _rows(out))
    return out


def gate_backward(gate_up: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """The gradient of `gate` by gate_up, given that by its result, and its result once more: in the memory of both,
    which are contiguous."""
    _call("gate_backward", (gate_up, grad), _rows(grad))
    return gate_up, grad


def _rows(x: Tensor) -> tuple[ctypes.c_int64, ctypes.c_int64]:
    """How many rows, and how wide."""
    width = x.shape[-1]
    return ctypes.c_int64(x.numel() // width), ctypes.c_int64(width)


def _call(name: str, tensors: tuple[Tensor, ...], sizes: tuple, *more: ctypes.c_double) -> None:
    assert all(tensor.is_contiguous() and tensor.dtype == torch.float32 for tensor in tensors)
    pointers = (ctypes.c_void_p(tensor.data_ptr()) for tensor in tensors)
    getattr(library(), name)(*pointers, *sizes, *more, ctypes.c_int64(torch.get_num_threads()))


# ---- attention in training ---------------------------------------------------------------------------------------


class _Attention(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int64) for name in ("n", "m", "kv", "group", "dim", "in_bf16", "wide")]
    _fields_ += [(name, ctypes.c_void_p) for name in ("q", "k", "v", "out", "sums", "grad", "dq", "dk", "dv")]
    _fields_ += [(name, ctypes.c_void_p) for name in ("keys", "values", "scores", "rounded")]
    _fields_ += [(name, ctypes.c_void_p) for name in ("key_rows", "value_rows", "turned_keys", "sum_dk", "sum_dv")]


TILE, MAX_DIM, LANES = 32, 256, 16  # of kernels.c


def attends(q: Tensor, k: Tensor, products: torch.dtype) -> bool:
    """Whether `attend` can be called with such tensors."""
    dim = q.shape[-1]
    return dim % LANES == 0 and dim <= MAX_DIM and q.dtype == k.dtype and available(q.dtype, products, q.device)


def attend(q: Tensor, k: Tensor, v: Tensor, products: torch.dtype) -> tuple[Tensor, Tensor]:
    """The last n of m positions attend causally: q [n, kv, group, D], k and v [m, kv, D], fp32 and contiguous -> out
    [n, kv, group, D] and the log-sum-exps [n, kv, group]. D: a multiple of LANES, at most MAX_DIM."""
    out, sums, threads = torch.empty_like(q), q.new_empty(q.shape[:3]), torch.get_num_threads()
    wide = _wide(k)
    memory = {name: torch.empty(wide * k[0].numel(), dtype=products) for name in ("keys", "values")}
    memory |= {name: q.new_empty(threads * TILE * wide) for name in ("scores", "rounded")}
    pointers = [ctypes.c_void_p(tensor.data_ptr()) for tensor in (out, sums)]
    library().attend_forward(ctypes.byref(_attention(q, k, v, products, memory)), *pointers, ctypes.c_int64(threads))
    return out, sums


def attend_backward(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, sums: Tensor, grad: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients by q, k and v of `attend` with products in bf16, as its own are, given that by `out`."""
    threads = torch.get_num_threads()
    gradients = {"dq": torch.empty_like(q), "dk": torch.empty_like(k), "dv": torch.empty_like(v)}
    memory = gradients | {"out": out, "sums": sums, "grad": grad}
    memory |= {name: q.new_zeros(threads * k.numel()) for name in ("sum_dk", "sum_dv")}
    # Room for fp32: some CPUs multiply what was rounded so.
    memory |= {name: q.new_empty(_wide(k) * k[0].numel()) for name in ("key_rows", "value_rows", "turned_keys")}
    step = _attention(q, k, v, torch.bfloat16, memory)
    library().attend_backward(ctypes.byref(step), ctypes.c_int64(threads))
    return gradients["dq"], gradients["dk"], gradients["dv"]


def _wide(k: Tensor) -> int:
    """The keys of k [m, kv, D], filled up to whole panels."""
    return -(-len(k) // library().panel_width()) * library().panel_width()


def _attention(q: Tensor, k: Tensor, v: Tensor, products: torch.dtype, memory: dict[str, Tensor]) -> _Attention:
    """The struct of kernels.c, which points into these tensors."""
    n, kv, group, dim = q.shape
    pointers = {name: tensor.data_ptr() for name, tensor in ({"q": q, "k": k, "v": v} | memory).items()}
    in_bf16 = products == torch.bfloat16
    return _Attention(n=n, m=len(k), kv=kv, group=group, dim=dim, in_bf16=in_bf16, wide=_wide(k), **pointers)


# ---- sampling ----------------------------------------------------------------------------------------------------


def sample(logits: Tensor, temperatures: list[float], uniforms: list[float]) -> tuple[list[int], list[float]]:
    """Next tokens [N] from logits [N, V] with one uniform number each, and their log-probs, as `engine.sample`."""
    logits = logits.contiguous()
    ids, logprobs = torch.empty(len(logits), dtype=torch.int64), torch.empty(len(logits))
    inputs = torch.tensor(temperatures, dtype=torch.float32), torch.tensor(uniforms, dtype=torch.float64)
    pointers = [ctypes.c_void_p(tensor.data_ptr()) for tensor in (*inputs, ids, logprobs)]
    rows, columns, threads = map(ctypes.c_int64, (*logits.shape, torch.get_num_threads()))
    library().sample(ctypes.c_void_p(logits.data_ptr()), rows, columns, *pointers, threads)
    return ids.tolist(), logprobs.tolist()
