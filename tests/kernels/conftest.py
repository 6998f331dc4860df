"""Triton's interpreter, more than twice as fast: it patches its language anew at each call of a function inside a kernel.

What a launch has patched stays so until the launch ends; once for each module of the language is enough. And
what a type is (its name, its size, the numbers of its shape) is found once, not for each tensor.
"""

import importlib.util
import inspect
import os
from functools import cache
from typing import Any

import pytest


@pytest.fixture(scope="session", autouse=True)
def _patched_once():
    if os.environ.get("TRITON_INTERPRET") != "1" or not importlib.util.find_spec("triton"):
        yield  # a GPU runs the kernels, or nothing does
        return
    interpreter: Any = importlib.import_module("triton.runtime.interpreter")
    launch, patched = interpreter.GridExecutor.__call__, set()

    @cache
    def languages(function):
        known = (interpreter.tl, interpreter.tl.core)
        modules = filter(inspect.ismodule, function.__globals__.values())
        return frozenset(one.__name__ for one in modules if one in known)

    def launched(self, *args, **kwargs):
        patched.clear()
        return launch(self, *args, **kwargs)

    def called(self, *args, **kwargs):
        function = self.rewrite()
        if not languages(self.fn) <= patched:
            interpreter._patch_lang(self.fn)
            patched.update(languages(self.fn))
        try:
            return function(*args, **kwargs)
        except Exception as error:
            raise interpreter.InterpreterError(repr(error)) from error

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter.GridExecutor, "__call__", launched)
        patch.setattr(interpreter.InterpretedFunction, "__call__", called)
        _known_once(patch, interpreter)
        yield


def _known_once(patch: pytest.MonkeyPatch, interpreter: Any) -> None:
    core: Any = interpreter.tl.core
    numpy_type, unwrapped = interpreter._get_np_dtype, core._unwrap_if_constexpr
    block, tensor = core.block_type.__init__, core.tensor.__init__
    numpy_types: dict[Any, Any] = {}
    blocks: dict[Any, dict[str, Any]] = {}

    def as_numpy(kind):
        key = type(kind), kind.name
        if key not in numpy_types:
            numpy_types[key] = numpy_type(kind)
        return numpy_types[key]

    def plain(value):
        kind = value.__class__
        if kind is core.constexpr:
            return value.value
        return value if kind is int or kind is core.tensor else unwrapped(value)

    def of_block(self, element_ty, shape):
        key = (type(element_ty), element_ty.name, *map(plain, shape))
        if (known := blocks.get(key)) is None:
            block(self, element_ty, shape)
            blocks[key] = self.__dict__.copy()
        else:
            self.__dict__.update(known)

    def of_tensor(self, handle, type):
        sizes = type.__dict__.get("_sizes")
        if sizes is None:
            tensor(self, handle, type)
            type._sizes = self.numel, self.shape
        else:
            self.handle, self.type, self.dtype = handle, type, type.scalar
            self.numel, self.shape = sizes

    patch.setattr(interpreter, "_get_np_dtype", as_numpy)
    patch.setattr(core, "_unwrap_if_constexpr", plain)
    patch.setattr(core.block_type, "__init__", of_block)
    patch.setattr(core.tensor, "__init__", of_tensor)
