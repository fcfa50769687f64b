"""Whole models as ONNX Runtime and OpenVINO run them: exported by torch, in fp32 and on 8 bits.

The 8-bit graph is that of onnxruntime.quantization: one scale a weight row, one fixed scale for each tensor between
layers, where values stay on 8 bits from layer to layer. Both read the same file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

Call = Callable[[int], Tensor]


def export(model: nn.Module, x: Tensor, path: Path) -> None:
    torch.onnx.export(model, (x,), path, dynamo=True, verbose=False, external_data=False, input_names=["x"])


def quantize(fp32: Path, x: Tensor, path: Path) -> None:
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.left: Iterator[dict[str, np.ndarray]] = iter([{"x": x.numpy()}])

        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(self.left, None)

    prepared = path.with_suffix(".prepared.onnx")
    quant_pre_process(fp32, prepared)
    quantize_static(prepared, path, Reader(), quant_format=QuantFormat.QDQ, per_channel=True)


def onnx_runtime(path: Path, x: Tensor) -> Call:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = torch.get_num_threads(), 1
    options.log_severity_level = 3  # errors only
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    data = {"x": x.numpy()}
    return lambda _: torch.from_numpy(session.run(None, data)[0])


def openvino(path: Path, x: Tensor) -> Call:
    import openvino

    wanted = {"INFERENCE_NUM_THREADS": torch.get_num_threads(), "NUM_STREAMS": 1, "INFERENCE_PRECISION_HINT": "f32"}
    request = openvino.Core().compile_model(path, "CPU", wanted).create_infer_request()
    request.set_input_tensor(openvino.Tensor(x.numpy(), shared_memory=True))

    def call(_: int) -> Tensor:
        request.infer()
        return torch.from_numpy(request.get_output_tensor(0).data)

    return call


def racers(model: nn.Module, x: Tensor, folder: Path) -> tuple[dict[str, Call], dict[str, str]]:
    """Those that work here, and why the others do not."""
    fp32, int8 = folder / "fp32.onnx", folder / "int8.onnx"
    found: dict[str, Call] = {}
    missing: dict[str, str] = {}
    steps: dict[str, Callable[[], Call]] = {
        "ORT fp32": lambda: (export(model, x, fp32), onnx_runtime(fp32, x))[1],
        "OpenVINO fp32": lambda: openvino(fp32, x),
        "ORT int8": lambda: (quantize(fp32, x, int8), onnx_runtime(int8, x))[1],
        "OpenVINO int8": lambda: openvino(int8, x),
    }
    for name, make in steps.items():
        try:
            call = make()
            call(0)
            found[name] = call
        except Exception as error:  # a peer may fail in any way: the others are still worth measuring
            missing[name] = f"{type(error).__name__}: {error}".splitlines()[0][:100]
    return found, missing
