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


def blocks(network: nn.Module) -> Iterator[nn.Module]:
    """The blocks of encoders and decoders: what stands in lists that are called blocks, or something_blocks."""
    for name, part in network.named_modules():
        if isinstance(part, nn.ModuleList) and name.endswith("blocks"):
            yield from part


def carry_out(network: nn.Module, compiled: bool, checkpointed: bool) -> None:
    """Makes the blocks of a network compute so from now on; names of tensors stay as they are.

    Args:
        compiled: by torch.compile, block by block: those of one kind share what was compiled.
        checkpointed: a block keeps its input alone, and computes the rest again in the backward pass, with the same
            random numbers.
    """
    for block in blocks(network):
        if compiled:
            block.forward = partial(_compiled, block, block.forward, torch.compile(block.forward))
        if checkpointed:
            block.forward = partial(_checkpointed, block.forward)


def check_compiler(device: str) -> None:
    """Raises UserError: `--compile` on a CPU without a C++ compiler."""
    if device == "cpu" and not any(map(shutil.which, filter(None, (os.environ.get("CXX"), *_COMPILERS)))):
        raise UserError("--compile on a CPU needs a C++ compiler, found none; install g++, or leave --compile out")


def _compiled(block: nn.Module, plain: Callable[..., Any], compiled: Callable[..., Any], *args: Any, **kwargs: Any):
    # pictures are not worth a compilation
    return (compiled if block.training else plain)(*args, **kwargs)


def _checkpointed(forward: Callable[..., Any], *args: Any, **kwargs: Any):
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    return checkpoint(forward, *args, use_reentrant=False, **kwargs)
