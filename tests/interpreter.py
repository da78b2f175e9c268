"""Triton's interpreter, made quicker, with the same results bit for bit.

Of itself it lists every member of triton.language to find the builtins, at each launch and at each
call of a function by a kernel; makes a table of dtypes for every tensor and the tuples of its shape
anew; computes whether integers overflow, for an assertion that is switched off; and goes element by
element where a reduction is by a function of ours. That is most of the time kernels take there.
"""

import dataclasses
import functools
import inspect
from types import ModuleType
from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter

_POINTER = np.dtype(np.uint64)
_numpy_dtype = functools.cache(interpreter._get_np_dtype)
_patch = interpreter._patch_lang
_equal = tl.dtype.__eq__
_broadcast = interpreter.TritonSemantic.broadcast_impl_value
_reduce_elements = interpreter.ReduceOps.generic_reduce


def quicken() -> None:
    """Before the first launch of the process, while none of triton.language is replaced."""
    for where in (tl, tl.core, tl.math, tl.tensor, tl.core.tensor_descriptor_base):
        _builtins(where)
    interpreter._patch_builtin = _patch_builtin
    interpreter._patch_lang = _patch_lang
    interpreter._get_np_dtype = _get_np_dtype
    interpreter.ReduceOps.generic_reduce = _reduce
    interpreter.TritonSemantic.broadcast_impl_value = _broadcast_impl_value
    tl.dtype.__eq__ = _dtype_eq
    tl.block_type.__init__ = _block_type
    tl.tensor.__init__ = _tensor
    options = interpreter.interpreter_builder.options
    assert not options.debug
    unchecked = dataclasses.replace(options, sanitize_overflow=False)
    interpreter.interpreter_builder.options = unchecked


@functools.cache
def _builtins(where: ModuleType | type) -> dict[str, Any]:
    """What stands for each builtin of a module or class while a kernel runs."""
    return {
        name: _bound(getattr(member, "__wrapped__", member))
        for name, member in inspect.getmembers(where, tl.core.is_builtin)
    }


def _bound(function: Any) -> Any:
    def call(*args: Any, **kwargs: Any) -> Any:
        kwargs["_semantic"] = interpreter.interpreter_semantic
        return function(*args, **kwargs)

    return call


def _patch_builtin(where: ModuleType | type, builder: Any, scope: Any) -> None:
    for name, bound in _builtins(where).items():
        if tl.core.is_builtin(getattr(where, name)):  # tl and tl.core are replaced by turns
            scope.set_attr(where, name, bound)


def _patch_lang(function: Any) -> Any:
    """In a call by a kernel nothing is left to replace: its launch, or a call before, did it."""
    left = any(tl.core.is_builtin(where.load) for where in (tl, tl.core))
    return _patch(function) if left else interpreter._LangPatchScope()


def _get_np_dtype(dtype: tl.dtype) -> np.dtype:
    scalar = dtype.element_ty if isinstance(dtype, tl.block_type) else dtype
    return _POINTER if isinstance(scalar, tl.pointer_type) else _numpy_dtype(scalar)


def _dtype_eq(self: tl.dtype, other: Any) -> bool:
    return self is other or _equal(self, other)


def _broadcast_impl_value(
    self: Any, left: tl.tensor, right: tl.tensor
) -> tuple[tl.tensor, tl.tensor]:
    same = getattr(left.type, "shape", None) is getattr(right.type, "shape", None)
    return (left, right) if same else _broadcast(self, left, right)


@dataclasses.dataclass(frozen=True)
class _Shape:
    """What tensors of a shape, and their types, share of it."""

    ints: tl.tuple
    constexprs: tl.tuple
    numel: int
    constexpr_numel: tl.constexpr
    name: str


@functools.cache
def _shape(shape: tuple[int, ...]) -> _Shape:
    numel = tl.core.validate_block_shape(shape)
    ints = tl.tuple(shape)
    constexprs = tl.tuple([tl.constexpr(n) for n in shape])
    return _Shape(ints, constexprs, numel, tl.constexpr(numel), str(ints))


def _block_type(self: tl.block_type, element_ty: tl.dtype, shape: Any) -> None:
    if isinstance(shape, tl.constexpr):
        shape = shape.value
    values = shape.values if isinstance(shape, tl.tuple) else shape
    ints = tuple([n.value if isinstance(n, tl.constexpr) else n for n in values])
    if not ints:
        raise TypeError("0d block_type is forbidden")
    kept = _shape(ints)
    self.element_ty = element_ty
    self.shape = kept.ints
    self.numel = kept.numel
    self.name = f"<{kept.name}, {element_ty.name}>"


def _tensor(self: tl.tensor, handle: interpreter.TensorHandle, type: tl.dtype) -> None:
    shape = _shape(tuple(type.shape.values) if type.is_block() else ())
    self.handle = handle
    self.type = type
    self.dtype = type.scalar
    self.shape = shape.constexprs
    self.numel = shape.constexpr_numel


def _reduce(self: Any, tensors: tuple[tl.tensor, ...]) -> list[tl.tensor]:
    """Folds slices along the axis, one by one in the order in which elements would be."""
    arrays = [tensor.handle.data for tensor in tensors]
    if self.axis is None or arrays[0].ndim == 1:
        return _reduce_elements(self, tensors)

    def at(index: int) -> list[tl.tensor]:
        slices = [array.take(index, self.axis) for array in arrays]
        return [self.to_tensor(s, t.dtype) for s, t in zip(slices, tensors, strict=True)]

    folded = at(0)
    for index in range(1, arrays[0].shape[self.axis]):
        result = self.combine_fn.fn(*folded, *at(index))
        folded = list(result) if isinstance(result, tuple) else [result]
    results = [tensor.handle.data for tensor in folded]
    if self.keep_dims:
        results = [np.expand_dims(result, self.axis) for result in results]
    return [self.to_tensor(r, t.dtype) for r, t in zip(results, tensors, strict=True)]
