"""Triton's interpreter, twice as fast: it patches its language anew at each call of a function inside a kernel.

What a launch has patched stays so until the launch ends; once for each module of the language is enough.
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
        yield
