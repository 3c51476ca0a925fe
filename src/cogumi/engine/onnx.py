"""ONNX Runtime on the CPU: runs trained nets with recurrence or attention without torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cogumi.core.errors import BundleError
from cogumi.core.packages import load


def open_session(path: Path) -> Any:
    """An `onnxruntime.InferenceSession` of a model file, on one thread; its `run` may be called from several threads.

    Raises `BundleError` if the file is missing or not a model that this version can run, `PackageError` if ONNX Runtime
    is not installed.
    """
    onnxruntime: Any = load("onnxruntime", f"the model {path}")
    native: Any = load("onnxruntime.capi.onnxruntime_pybind11_state", f"the model {path}")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.inter_op_num_threads = 1
    options.log_severity_level = 3  # log errors only; they are also raised
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except (
        native.Fail,
        native.InvalidArgument,
        native.InvalidGraph,
        native.InvalidProtobuf,
        native.NoModel,
        native.NoSuchFile,
        native.NotImplemented,
        native.RuntimeException,
    ) as error:
        reason = str(error).splitlines()[0].rpartition(" : ")[2]
        raise BundleError(f"cannot run the model {path}: {reason}; build the bundle again") from error
