"""A Triton driver without a device: launches compile for a chosen target, and nothing runs.

Launchers call their kernels as on a GPU, with tensors on torch's `meta` device, which have shapes, strides and
alignment but no memory. Triton specialises, compiles and checks shared memory as it would on the target.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.runtime import driver

from agentkit_kernels.aot.targets import TARGETS, Target


@dataclass(frozen=True, slots=True)
class Program:
    """One compiled specialisation of a kernel.

    Attributes:
        key: Triton's hash of the source, the specialisation and the options.
        assembly: PTX or AMD GCN.
        binary: The file of the cubin or hsaco.
    """

    kernel: str
    target: Target
    key: str
    num_warps: int
    shared_bytes: int
    assembly: str
    binary: Path


class _Utilities:
    """Properties that Triton asks of a device before it loads a kernel."""

    def __init__(self, target: Target) -> None:
        self.properties = {"max_shared_mem": target.shared_bytes, "warpSize": target.warp_size}

    def get_device_properties(self, device: int) -> dict[str, int]:
        return self.properties

    def load_binary(self, name: str, binary: bytes, shared: int, device: int) -> tuple[object, object, int, int, int]:
        return object(), object(), 0, 0, 1024  # module, function, registers, spills, most threads per program

    def unload_module(self, module: object) -> None: ...


class _NoDevice(DriverBase):  # type: ignore[misc]  # triton has no types
    def __init__(self, target: Target) -> None:
        self.target = target
        self.utils = _Utilities(target)
        self.files: dict[str, Mapping[str, str]] = {}
        self.launched: list[Program] = []

    def launcher_cls(self, source: Any, metadata: Any) -> Callable[..., None]:
        """Return what Triton calls to launch a kernel that it has compiled."""
        files = {Path(path).suffix: Path(path) for path in self.files[metadata.hash].values()}
        cuda = self.target.backend == "cuda"
        program = Program(
            kernel=metadata.name,
            target=self.target,
            key=metadata.hash,
            num_warps=metadata.num_warps,
            shared_bytes=metadata.shared,
            assembly=files[".ptx" if cuda else ".amdgcn"].read_text(),
            binary=files[".cubin" if cuda else ".hsaco"],
        )
        return lambda *args: self.launched.append(program)

    def listen(self, *, metadata: dict[str, Any], metadata_group: Mapping[str, str], **rest: Any) -> None:
        """Note where Triton has written a kernel's files."""
        self.files[metadata["hash"]] = metadata_group

    def get_current_target(self) -> GPUTarget:
        return GPUTarget(self.target.backend, self.target.arch, self.target.warp_size)

    def get_current_device(self) -> int:
        # JITFunction keeps what it has compiled by this number alone, so each target needs its own.
        return list(TARGETS).index(self.target.name)

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("meta")

    def map_python_to_cpp_type(self, ty: str) -> str:
        return ty

    def get_benchmarker(self) -> Any:
        raise RuntimeError("There is no device to time a kernel on.")

    @classmethod
    def is_active(cls) -> bool:
        return True


_driver = functools.cache(_NoDevice)  # compiled kernels keep the driver that launched them first


@contextmanager
def compiling_for(target: Target) -> Generator[list[Program], None, None]:
    """Compile every launch within for `target`, and add its program to the list.

    Raises:
        RuntimeError: TRITON_INTERPRET is set, so that Triton would interpret kernels instead.
        triton.OutOfResources: By a launch whose program needs more shared memory than the target has.
        triton.CompilationError: By a launch whose kernel the target cannot run.
    """
    if triton.knobs.runtime.interpret:
        raise RuntimeError("TRITON_INTERPRET is set, so kernels would be interpreted and not compiled; unset it.")
    device = _driver(target)
    device.launched = []
    active, listener = driver._active, triton.knobs.compilation.listener
    driver.set_active(device)
    triton.knobs.compilation.listener = device.listen
    try:
        yield device.launched
    finally:
        driver.set_active(active)
        triton.knobs.compilation.listener = listener
