"""Graphs that ONNX Runtime and OpenVINO run: all copies of a weight side by side, one result each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

NodeMaker = Callable[[int], tuple[list[Any], dict[str, np.ndarray]]]


def told_apart(codes: np.ndarray, copy: int) -> np.ndarray:
    """A copy with another first byte: equal constants are stored once, and the caches would hold that one."""
    made = np.array(codes, order="C")
    made.reshape(-1).view(np.uint8)[0] ^= copy
    return made


def onnx_runtime(nodes: NodeMaker, shared: dict[str, np.ndarray], x: Tensor, shape: Sequence[int], copies: int):  # type: ignore[no-untyped-def]
    """Nodes of copy i, from "x" to f"y{i}", with the constants that are its own; `shared` are all copies'."""
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper

    made, constants = [], dict(shared)
    for copy in range(copies):
        of_copy, own = nodes(copy)
        made += of_copy
        constants |= own
    outputs = {f"y{copy}": torch.empty(tuple(shape)) for copy in range(copies)}
    graph = helper.make_graph(
        made,
        "copies",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, list(x.shape))],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, list(shape)) for name in outputs],
        [numpy_helper.from_array(values, name) for name, values in constants.items()],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = torch.get_num_threads(), 1
    options.log_severity_level = 3  # errors only
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    binding, x = session.io_binding(), x.contiguous()
    binding.bind_input("x", "cpu", 0, np.float32, list(x.shape), x.data_ptr())
    for name, y in outputs.items():
        binding.bind_output(name, "cpu", 0, np.float32, list(shape), y.data_ptr())

    def call(_: int, held: Tensor = x) -> Tensor:  # `held`: the session knows its address only
        session.run_with_iobinding(binding)
        return outputs["y0"]

    return call


def openvino(result: Callable[[Any, int], Any], x: Tensor, copies: int) -> Callable[[int], Tensor]:
    """`result(parameter, copy)` is copy's node in OpenVINO's own terms."""
    import openvino
    from openvino import opset13

    parameter = opset13.parameter(list(x.shape), openvino.Type.f32)
    model = openvino.Model([result(parameter, copy) for copy in range(copies)], [parameter])
    wanted = {"INFERENCE_NUM_THREADS": torch.get_num_threads(), "NUM_STREAMS": 1, "INFERENCE_PRECISION_HINT": "f32"}
    request = openvino.Core().compile_model(model, "CPU", wanted).create_infer_request()
    request.set_input_tensor(openvino.Tensor(x.contiguous().numpy(), shared_memory=True))
    request.infer()
    first = torch.from_numpy(request.get_output_tensor(0).data)

    def call(_: int) -> Tensor:
        request.infer()
        return first

    return call
