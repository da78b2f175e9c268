"""Launches that are made again: what was checked, chosen and compiled for tensors of some shapes is
launched at once for others of the same shapes.

A step asks for the same launch in every layer. What a wrapper checks of some ten tensors, and what
Triton makes of some forty arguments, takes a processor longer than the kernel takes the card.
"""

from __future__ import annotations

import copy
from collections.abc import Hashable, Sequence
from typing import Any

import torch

MOST = 1024  # launches that an operation remembers

Tensors = tuple[torch.Tensor, ...]


class Launch:
    """A kernel that was launched, and its arguments but for the tensors, whose places are kept."""

    __slots__ = ("_arguments", "_descriptors", "_pointers", "_run")

    def __init__(self, run: Any, arguments: Sequence[Any], tensors: Tensors) -> None:
        self._run = run
        self._arguments = list(arguments)
        self._pointers: list[tuple[int, int]] = []
        self._descriptors: list[tuple[int, int]] = []
        places = {id(x): j for j, x in enumerate(tensors)}
        for i, argument in enumerate(arguments):
            if isinstance(argument, torch.Tensor):
                self._pointers.append((i, places[id(argument)]))
                self._arguments[i] = None  # nobody's memory is kept from being given back
            elif isinstance(base := getattr(argument, "base", None), torch.Tensor):
                self._descriptors.append((i, places[id(base)]))
                self._arguments[i] = _of(argument, None)

    def __call__(self, tensors: Tensors, pointers: list[int]) -> None:
        """The same with other tensors of the same shapes, which lie at pointers."""
        arguments = self._arguments.copy()
        for i, j in self._pointers:
            arguments[i] = pointers[j]
        for i, j in self._descriptors:
            arguments[i] = _of(arguments[i], tensors[j])
        self._run(*arguments)


def _of(descriptor: Any, base: torch.Tensor | None) -> Any:
    """A descriptor of a tensor as that of another one, which is not checked again."""
    other = copy.copy(descriptor)
    other.base = base
    return other


def launch(kernel: Any, grid: tuple[int, ...], tensors: Tensors, *args: Any, **rest: Any) -> Any:
    """kernel[grid](*args, **rest), and a Launch that makes it again; None where kernels are
    interpreted, or one tensor plays two parts. tensors: at least those among the arguments."""
    compiled = kernel[grid](*args, **rest)
    if compiled is None or len({id(x) for x in tensors}) < len(tensors):
        return None
    constants = [rest[name] for name in kernel.arg_names[len(args) :]]
    return Launch(compiled[(*grid, 1, 1)[:3]], (*args, *constants), tensors)


class Launches:
    """Those of one operation, one or several for each call, by what the call was for."""

    def __init__(self, most: int = MOST) -> None:
        self._most = most
        self._known: dict[Hashable, tuple[Launch, ...]] = {}

    def again(self, tensors: Tensors, *numbers: Hashable) -> bool:
        """Launch what was kept for such tensors and these numbers; False: nothing was."""
        pointers = [x.data_ptr() for x in tensors]
        known = self._known.get(_key(tensors, pointers, numbers))
        if known is None:
            return False
        for each in known:
            each(tensors, pointers)
        return True

    def keep(self, made: Sequence[Launch | None], tensors: Tensors, *numbers: Hashable) -> None:
        """Remember what a call has launched, unless it was interpreted."""
        launches = tuple(each for each in made if each is not None)
        if not launches or len(launches) < len(made):
            return
        while len(self._known) >= self._most:
            del self._known[next(iter(self._known))]
        pointers = [x.data_ptr() for x in tensors]
        self._known[_key(tensors, pointers, numbers)] = launches


def _key(tensors: Tensors, pointers: list[int], numbers: tuple[Hashable, ...]) -> Hashable:
    """All that a launch depends on, but for where tensors lie: of that what a compiler may use."""
    shapes = [(x.dtype, x.shape, x.stride()) for x in tensors]
    return (*shapes, *[pointer % 16 == 0 for pointer in pointers], tensors[0].device, numbers)
