"""Faster ways to train on a CPU where PyTorch's own kernels are slow; the results are the same.

Figures: two cores of an AMD EPYC with AVX-512, float32, batches of 32 x 128 frames.

Axis legend: B batch, T frames, D width, C channels, K width of a kernel in frames.
"""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

# Frames in a block of `_kernel_gradient`; a block is multiplied with itself and K - 1 more frames.
_BLOCK = 32
_ONEDNN: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
# PyTorch's names for x86 CPUs without AVX-512.
_NARROW = ("NO AVX", "AVX2")
SLOW_BFLOAT16 = (
    "this CPU has no AVX-512, and without it bfloat16 takes 8 to 60 times as long as float32; "
    "leave out --mixed_precision bf16"
)
_CPU_FRAMES = 4096
# Of glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4


def applies_to(x: Tensor) -> bool:
    """Whether this module's ways apply to a tensor: on a CPU, with gradients, not compiled."""
    return x.device.type == "cpu" and torch.is_grad_enabled() and not torch.compiler.is_compiling()


def is_slow_in_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 many times slower than float32: x86 without AVX-512.

    oneDNN has no kernels for bfloat16 there, and PyTorch's own take 8 (matrices) to 60 times
    (convolutions) as long as those for float32.
    """
    return torch.backends.cpu.get_cpu_capability() in _NARROW


def keep_memory() -> None:
    """Keep freed memory in this process, for the next batch to use.

    glibc maps each tensor of more than 32 MiB anew, and returns memory at the top of its heap. The
    kernel then zeroes the same pages in every step, which takes 4 to 8 % of the step. On segments
    of one length the peak of memory is about the same; on batches of many lengths it grows, see
    `return_memory`. Without glibc nothing happens.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
        mallopt(_M_TOP_PAD, 2**26)


def return_memory(device: torch.device) -> None:
    """Give memory that was freed by a batch on a CPU back to the system.

    Batches of many lengths leave gaps in the heap that the tensors of others do not fit into: by
    some hundred batches a process takes gigabytes, `keep_memory` or not. After each of 80 batches
    of 4,096 frames, this made a residual network 6 % slower, and its peak 0.67 GB in place of 1.6.
    Without glibc nothing happens.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if device.type == "cpu" and trim is not None:
        trim(0)


def largest_batch(frames: int, device: torch.device) -> int:
    """Padded area of a batch of whole utterances: at most so many frames, on a CPU at most 4,096.

    There, larger ones take more memory and more time, since the kernel makes new pages for each of
    their tensors: a residual network took 37 s by 4,096 frames and 54 s by 32,768 (one core of an
    Intel Xeon).
    """
    return min(frames, _CPU_FRAMES) if device.type == "cpu" else frames


def multiply(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`F.linear`; when training on a CPU in float32 by oneDNN, if that is faster than MKL.

    On AMD with AVX-512 it is faster by a tenth, with AVX2 slower by a seventh. oneDNN computes it
    as a convolution of width 1.

    Args:
        x: (B, T, D), or any shape that `F.linear` takes.
        weight: (N, D).
        bias: (N,) or None.

    Returns:
        (B, T, N).
    """
    wide = x.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
    if not (applies_to(x) and wide and x.ndim == 3 and x.numel() and _prefers_onednn()):
        return F.linear(x, weight, bias)
    out = F.conv2d(_as_row(x), weight[:, :, None, None], bias)
    return _as_frames(out)


def _prefers_onednn() -> bool:
    return _ONEDNN and torch.backends.cpu.get_cpu_capability() == "AVX512"


def drop(x: Tensor, p: float) -> Tensor:
    """Dropout in a third of the time of PyTorch's kernel, which draws a number for each value.

    Here a 64-bit number serves four values with 16 bits each, so that p is exact to 2**-16. The
    numbers are from NumPy's SFC64, seeded by PyTorch's generator. If p is 0 or 1 none are drawn.
    """
    if p == 0:
        return x
    if p == 1:
        return x * 0.0
    limit = min(round(p * 2**16), 2**16 - 1)
    source = np.random.SFC64(torch.randint(2**63 - 1, (1,)).numpy())
    draws = torch.from_numpy(source.random_raw((x.numel() + 3) // 4).view(np.int16))
    kept = draws[: x.numel()].view(x.shape).ge_(limit - 2**15)
    # Scale the mask: forward and backward then need one multiplication each.
    return x * kept.to(x.dtype).mul_(1.0 / (1.0 - limit / 2**16))


def convolve_depthwise(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Convolve every channel with its own kernel, to the same number of frames, on a CPU.

    Args:
        x: (B, T, C).
        weight: (C, 1, K), K odd.
        bias: (C,).

    Returns:
        (B, T, C).
    """
    if not applies_to(x) or not x.numel():
        return _depthwise(x, weight, bias)
    if torch.is_autocast_enabled("cpu"):
        dtype = torch.get_autocast_dtype("cpu")
        x, weight, bias = x.to(dtype), weight.to(dtype), bias.to(dtype)
    out: Tensor = _Depthwise.apply(x, weight, bias)  # type: ignore[no-untyped-call]
    return out


class _Depthwise(torch.autograd.Function):
    """Computes gradients by matrix products: 27 ms for 1,024 channels, oneDNN takes 82 ms."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _depthwise(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        by_weight = _kernel_gradient(grad, x, weight.shape[2]).unsqueeze(1)
        return _depthwise(grad, weight.flip(2), None), by_weight, grad.sum((0, 1))


def _depthwise(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`convolve_depthwise` as a two-dimensional convolution of one row.

    oneDNN has no fast one-dimensional kernel for data whose channels are adjacent in memory.
    """
    reach, groups = weight.shape[2] // 2, weight.shape[0]
    out = F.conv2d(_as_row(x), weight.unsqueeze(2), bias, padding=(0, reach), groups=groups)
    return _as_frames(out)


def _kernel_gradient(grad: Tensor, x: Tensor, width: int) -> Tensor:
    """Sums over batch and frames of grad[b, t, c] * x[b, t + k - width // 2, c]: (C, width).

    For each channel, a matrix product multiplies blocks of frames with their surroundings. The
    products for one k are on a diagonal of the result.
    """
    beyond, reach = -x.shape[1] % _BLOCK, width // 2
    padded = F.pad(_channels_first(x), (reach, reach + beyond))
    surroundings = padded.unfold(2, _BLOCK + width - 1, _BLOCK).flatten(
        1, 2
    )  # (C, B * blocks, row)
    blocks = F.pad(_channels_first(grad), (0, beyond)).view(len(surroundings), -1, _BLOCK)
    products = blocks.mT @ surroundings  # (C, _BLOCK, row)
    row = _BLOCK + width - 1
    return products.as_strided((len(products), _BLOCK, width), (_BLOCK * row, row + 1, 1)).sum(1)


def _channels_first(x: Tensor) -> Tensor:
    # (B, T, C) -> (C, B, T). PyTorch copies a transposed matrix twice as fast as three dimensions.
    return x.flatten(0, 1).t().contiguous().view(x.shape[2], *x.shape[:2])


def _as_row(x: Tensor) -> Tensor:
    # (B, T, C) -> (B, C, 1, T), channels last in memory
    return x.transpose(1, 2).unsqueeze(2)


def _as_frames(row: Tensor) -> Tensor:
    # (B, C, 1, T) -> (B, T, C)
    return row.squeeze(2).transpose(1, 2)
