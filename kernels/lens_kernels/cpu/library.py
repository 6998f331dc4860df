"""The compiled library as Python sees it: two functions, each with one struct of arguments."""

from __future__ import annotations

import ctypes
import functools
import os
from pathlib import Path

import torch
from torch import Tensor

from lens_kernels.cpu import build

_INT, _POINTER, _REAL = ctypes.c_int64, ctypes.c_void_p, ctypes.c_double
_TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}


def _fields(kind: type, names: str) -> list[tuple[str, type]]:
    return [(name, kind) for name in names.split()]


class Operand(ctypes.Structure):
    """A [batch, heads, rows, columns] tensor whose last axis is contiguous."""

    _fields_ = [("data", _POINTER), *_fields(_INT, "batch head row type")]

    @classmethod
    def of(cls, tensor: Tensor) -> Operand:
        return cls(tensor.data_ptr(), *tensor.stride()[:3], _TYPES[tensor.dtype])


class Plane(ctypes.Structure):
    """A [batch | 1, heads | 1, queries | 1, keys | 1] tensor; stride 0 where it broadcasts."""

    _fields_ = [("data", _POINTER), *_fields(_INT, "batch head query key")]

    @classmethod
    def of(cls, tensor: Tensor) -> Plane:
        sizes = zip(tensor.shape, tensor.stride(), strict=True)
        return cls(tensor.data_ptr(), *(0 if size == 1 else stride for size, stride in sizes))


class Inputs(ctypes.Structure):
    """`Inputs` of rows.h, field by field; the meaning of each is written there."""

    _fields_ = [
        *_fields(_INT, "batch heads kv_heads queries keys head_dim value_dim"),
        *_fields(_INT, "query_block key_block threads poison"),
        ("openmp_parallel", _POINTER),
        *_fields(_REAL, "scale softcap"),
        *_fields(Operand, "query key value"),
        *_fields(_POINTER, "low high anchor slopes sinks keep"),
        *_fields(Plane, "allowed bias blocks"),
    ]


class Forward(ctypes.Structure):
    """`Forward` of forward.h."""

    _fields_ = [
        ("inputs", Inputs),
        *_fields(_POINTER, "output lse max_logit entropy concentration distance"),
        *_fields(_POINTER, "block_mass block_max block_max_logit block_weighted key_weights"),
        ("top_k", _INT),
        *_fields(_POINTER, "top_keys top_mass received diagonal"),
        *_fields(_INT, "first_distance distances features"),
        *_fields(_POINTER, "features_of_keys feature_means"),
        ("pairs", _INT),
        *_fields(_POINTER, "query_labels key_labels match_mass"),
        ("groups", _INT),
        *_fields(_POINTER, "group_of_key group_output group_lse group_max_logit group_entropy"),
        *_fields(_POINTER, "group_concentration group_distance mean_value_norm"),
        ("few", _INT),
        ("infinite", _POINTER),
    ]


class Backward(ctypes.Structure):
    """`Backward` of backward.c."""

    _fields_ = [
        ("inputs", Inputs),
        ("lse", _POINTER),
        ("of_output", Operand),
        *_fields(_POINTER, "of_lse of_entropy of_block_mass of_received"),
        *_fields(_POINTER, "query key value sinks row_attribution block_attribution"),
        *_fields(_POINTER, "block_influence block_logit_gradient block_logit_gradient_abs"),
    ]


_FUNCTIONS = {"forward": Forward, "backward": Backward}


def open_library(path: str) -> ctypes.CDLL:
    """Loads a compiled library and checks that its structs are ours.

    Raises:
        BuildError: when it cannot be loaded or was compiled from other sources.
    """
    try:
        library = ctypes.CDLL(path)
        for name, struct in _FUNCTIONS.items():
            size = library[f"lens_{name}_size"]
            size.restype = ctypes.c_int64
            if size() != ctypes.sizeof(struct):
                raise build.BuildError(
                    f"{path} expects {size()} bytes for {name}, not {ctypes.sizeof(struct)}; "
                    "delete it"
                )
            function = library[f"lens_{name}"]
            setattr(library, f"lens_{name}", function)
            function.argtypes, function.restype = [ctypes.POINTER(struct)], ctypes.c_int
    except (OSError, AttributeError) as error:
        raise build.BuildError(f"{path} cannot be loaded ({error}); delete it") from error
    return library


@functools.cache
def openmp_parallel() -> int | None:
    """Address of `GOMP_parallel` in the OpenMP library that torch itself runs on, or None.

    gcc's and LLVM's OpenMP both offer it; looked up through torch's library, so that it is the same
    copy, with the same threads. None in a process that was forked: those threads stayed in its parent, and gcc's OpenMP
    would wait for them for ever.
    """
    if _forked:
        return None
    try:
        torch_library = ctypes.CDLL(str(Path(torch.__file__).with_name("lib") / "libtorch_cpu.so"))
        return ctypes.cast(torch_library.GOMP_parallel, _POINTER).value
    except (OSError, AttributeError):
        return None


def _in_a_fork() -> None:
    global _forked
    _forked = True
    openmp_parallel.cache_clear()


_forked = False
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_a_fork)


@functools.cache
def load() -> ctypes.CDLL | str:
    """The library of this machine, or the reason why there is none; settled once per process."""
    try:
        return open_library(str(build.library_path()))
    except build.BuildError as error:
        return str(error)
