"""ggml's product, where the environment variable GGML_LIBRARY names its shared library (libggml.so, 0.9 or later).

Weights lie where its CPU backend likes them best: rearranged for wide products when it has such for a type.
"""

from __future__ import annotations

import ctypes
import os
from ctypes import POINTER, c_char_p, c_float, c_int, c_int64, c_size_t, c_void_p
from functools import lru_cache

import torch
from torch import Tensor

from . import Built

# name: its number in ggml's list of types, bits, weights with a scale of their own, bytes of such a scale (with its
# share of the scales' own scale)
KINDS = {
    "Q4_0": (2, 4, 32, 2), "Q4_K": (12, 4, 32, 2), "Q8_0": (8, 8, 32, 2), "Q2_K": (10, 2, 16, 1.25),
    "TQ2_0": (35, 2, 256, 2),  # ternary
}  # fmt: skip
F32 = 0
SILENT = ctypes.CFUNCTYPE(None, c_int, c_char_p, c_void_p)(lambda level, text, data: None)
OVERHEAD = 1 << 20  # bytes for the descriptions of tensors and of a graph


class Context(ctypes.Structure):
    _fields_ = (("bytes", c_size_t), ("memory", c_void_p), ("no_alloc", ctypes.c_bool))


class Traits(ctypes.Structure):
    _fields_ = (
        ("name", c_char_p),
        ("block", c_int64),
        ("interleaved", c_int64),
        ("bytes", c_size_t),
        ("quantized", ctypes.c_bool),
        ("to_float", ctypes.CFUNCTYPE(None, c_void_p, c_void_p, c_int64)),
    )


@lru_cache
def library() -> ctypes.CDLL:
    path = os.environ.get("GGML_LIBRARY")
    if not path:
        raise ImportError("GGML_LIBRARY names no library")
    found, p = ctypes.CDLL(path), c_void_p
    for name, result, arguments in (
        ("init", p, (Context,)),
        ("free", None, (p,)),
        ("get_type_traits", POINTER(Traits), (c_int,)),
        ("quantize_chunk", c_size_t, (c_int, p, p, c_int64, c_int64, c_int64, p)),
        ("new_tensor_2d", p, (p, c_int, c_int64, c_int64)),
        ("mul_mat", p, (p, p, p)),
        ("new_graph", p, (p,)),
        ("build_forward_expand", None, (p, p)),
        ("get_data", p, (p,)),
        ("nbytes", c_size_t, (p,)),
        ("backend_cpu_init", p, ()),
        ("backend_cpu_set_n_threads", None, (p, c_int)),
        ("backend_cpu_reg", p, ()),
        ("backend_reg_get_proc_address", p, (p, c_char_p)),
        ("backend_get_device", p, (p,)),
        ("backend_get_default_buffer_type", p, (p,)),
        ("backend_alloc_ctx_tensors_from_buft", p, (p, p)),
        ("backend_buffer_free", None, (p,)),
        ("backend_dev_supports_op", ctypes.c_bool, (p, p)),
        ("backend_tensor_set", None, (p, p, c_size_t, c_size_t)),
        ("backend_graph_compute", c_int, (p, p)),
    ):
        function = getattr(found, f"ggml_{name}")
        function.restype, function.argtypes = result, arguments
    found.ggml_log_set(SILENT, None)
    return found


class Graph:
    """Products of one x with copies of a weight, in memory of one kind; `fits` says whether ggml computes so."""

    def __init__(self, backend: int, memory: int, kind: int, shape: torch.Size, x: Tensor, copies: int) -> None:
        g = self.library = library()
        self.backend, device = backend, g.ggml_backend_get_device(backend)
        self.contexts = [g.ggml_init(Context(OVERHEAD, None, True)) for _ in range(2)]
        weights, others = self.contexts
        n, k = shape
        self.weights = [g.ggml_new_tensor_2d(weights, kind, k, n) for _ in range(copies)]
        self.buffers = [g.ggml_backend_alloc_ctx_tensors_from_buft(weights, memory)]
        given = g.ggml_new_tensor_2d(others, F32, k, len(x))
        results = [g.ggml_mul_mat(others, weight, given) for weight in self.weights]
        self.buffers.append(
            g.ggml_backend_alloc_ctx_tensors_from_buft(others, g.ggml_backend_get_default_buffer_type(backend))
        )
        self.fits = all(self.buffers) and g.ggml_backend_dev_supports_op(device, results[0])
        self.graph = g.ggml_new_graph(others)
        for result in results:
            g.ggml_build_forward_expand(self.graph, result)
        x = x.contiguous()
        g.ggml_backend_tensor_set(given, x.data_ptr(), 0, x.numel() * 4)
        first = (c_float * (len(x) * n)).from_address(g.ggml_get_data(results[0]))
        self.result = torch.frombuffer(first, dtype=torch.float32).view(len(x), n)

    def fill(self, packed: Tensor) -> None:
        for weight in self.weights:
            self.library.ggml_backend_tensor_set(weight, packed.data_ptr(), 0, packed.numel())

    def __call__(self, _: int) -> Tensor:
        self.library.ggml_backend_graph_compute(self.backend, self.graph)
        return self.result

    def __del__(self) -> None:
        for buffer in self.buffers:
            self.library.ggml_backend_buffer_free(buffer)
        for context in self.contexts:
            self.library.ggml_free(context)


@lru_cache
def backend(threads: int) -> tuple[int, list[int]]:
    """The CPU backend, and the kinds of memory that it has for weights, the best first."""
    g = library()
    made = g.ggml_backend_cpu_init()
    g.ggml_backend_cpu_set_n_threads(made, threads)
    address = g.ggml_backend_reg_get_proc_address(g.ggml_backend_cpu_reg(), b"ggml_backend_dev_get_extra_bufts")
    listed = ctypes.CFUNCTYPE(POINTER(c_void_p), c_void_p)(address)(g.ggml_backend_get_device(made))
    kinds = []
    while listed[len(kinds)]:
        kinds.append(listed[len(kinds)])
    return made, [*kinds, g.ggml_backend_get_default_buffer_type(made)]


def product(weight: Tensor, x: Tensor, copies: int, *, kind: str) -> Built:
    g, number, (n, k) = library(), KINDS[kind][0], weight.shape
    made, memories = backend(torch.get_num_threads())
    traits = g.ggml_get_type_traits(number).contents
    if k % traits.block:
        raise ValueError(f"K={k}; wanted a multiple of {traits.block}")
    packed, values = torch.empty(n * k // traits.block * traits.bytes, dtype=torch.uint8), torch.empty(n, k)
    weight = weight.contiguous()
    g.ggml_quantize_chunk(number, weight.data_ptr(), packed.data_ptr(), 0, n, k, None)
    traits.to_float(packed.data_ptr(), values.data_ptr(), n * k)
    graphs = (Graph(made, memory, number, weight.shape, x, copies) for memory in memories)
    graph = next(graph for graph in graphs if graph.fits)
    graph.fill(packed)
    return Built(graph, values, copies)
