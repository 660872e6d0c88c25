"""How the blocks of a method are carried out: compiled, or without keeping their activations. Results are the same."""

import os
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from nnunetv2_hiendmae.errors import UserError

_COMPILERS = ("g++", "clang++", "c++", "cl")


def segments(network: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    """The functions, as module and name, that encoders and decoders consist of: those that a module names in its
    attribute `segments`, and `forward` of other modules in lists that are called blocks, or something_blocks."""
    for name, module in network.named_modules():
        yield from ((module, segment) for segment in getattr(module, "segments", ()))
        if isinstance(module, nn.ModuleList) and name.endswith("blocks"):
            yield from ((block, "forward") for block in module if not hasattr(block, "segments"))


def carry_out(network: nn.Module, compiled: bool, checkpointed: bool) -> None:
    """Makes the segments of a network compute so from now on; names of tensors stay as they are.

    Args:
        compiled: by torch.compile, one by one: those of one kind share what was compiled.
        checkpointed: a segment keeps its input alone, and computes the rest again in the backward pass, with the same
            random numbers.
    """
    for module, name in segments(network):
        function = getattr(module, name)
        if compiled:
            function = partial(_compiled, module, function, torch.compile(function))
        if checkpointed:
            function = partial(_checkpointed, function)
        setattr(module, name, function)


def check_compiler(device: str) -> None:
    """Raises UserError: `--compile` on a CPU without a C++ compiler."""
    if device == "cpu" and not any(map(shutil.which, filter(None, (os.environ.get("CXX"), *_COMPILERS)))):
        raise UserError("--compile on a CPU needs a C++ compiler, found none; install g++, or leave --compile out")


def _compiled(module: nn.Module, plain: Callable[..., Any], compiled: Callable[..., Any], *args: Any, **kwargs: Any):
    # pictures are not worth a compilation
    return (compiled if module.training else plain)(*args, **kwargs)


def _checkpointed(forward: Callable[..., Any], *args: Any, **kwargs: Any):
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    return checkpoint(forward, *args, use_reentrant=False, **kwargs)
