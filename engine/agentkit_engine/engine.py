"""Engine: a loaded model, its logits and its sessions.

Dimension key: T tokens, V vocabulary.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from agentkit_engine.arguments import (
    check_backend_dtype,
    check_bytes,
    check_device,
    check_devices,
    check_dtype,
    check_flag,
    check_host_cache_bytes,
    check_kv_cache_dtype,
    check_limits,
    check_model,
    check_quantization,
)
from agentkit_engine.chat import Dialect, Tokenizer, TokenizerError
from agentkit_engine.errors import CheckpointError, ContextLengthError, ModelNotFoundError, TokenizerMissingError
from agentkit_engine.garbage import collection_paused, skip_collection_at_exit
from agentkit_engine.model.decoder import Decoder
from agentkit_engine.reading import Reader
from agentkit_engine.runtime import Request, Scheduler, cache_folder
from agentkit_engine.runtime.capacity import KVCapacity
from agentkit_engine.runtime.disk_cache import DiskCache
from agentkit_engine.runtime.parallel import ParallelRunner
from agentkit_engine.runtime.runner import NUMERICS, CpuLimits, choose_backend, machine
from agentkit_engine.runtime.state import KVCacheDtype, rows_of
from agentkit_engine.runtime.workers import Placement
from agentkit_engine.sampling_params import SamplingParams
from agentkit_engine.session import Session, check_ids, check_whole
from agentkit_engine.spec import ModelSpec
from agentkit_engine.weights.checkpoint import load_checkpoint, read_layout, read_sampling
from agentkit_kernels.packed import FP8_BLOCK, PackedRows
from agentkit_kernels.packing import lay_out

if TYPE_CHECKING:
    from agentkit_engine.grammar import Grammars

CACHE_BYTES = 8 << 30
"""Default limit on the disk cache of one model."""
PACKAGED_MODELS = {"tiny": Path(__file__).parent / "tiny"}
"""Names that `Engine.load` accepts, with their folders."""


class Engine:
    """A loaded model. Synchronous and single-threaded; `AsyncEngine` wraps it for async code.

    Attributes:
        name: the packaged name, or the name of the folder.
        spec: the architecture.
        dialect: the chat encoding the model was trained with, `"v4-preview"` or `"v4-0731"`.
        decoder: the model itself, in evaluation mode.
        folder: the folder it was loaded from.
        lock: held by an `AsyncEngine`'s thread while it uses the model.
    """

    def __init__(
        self,
        decoder: Decoder,
        *,
        name: str,
        dialect: Dialect,
        folder: Path,
        kv_cache_bytes: int | None = None,
        host_cache_bytes: int = 0,
        cache_dir: Path | None = None,
        cache_bytes: int = CACHE_BYTES,
        exact: bool = True,
        backend: str = "auto",
        placement: Placement | None = None,
        limits: CpuLimits | None = None,
        kv_cache_dtype: KVCacheDtype = "auto",
        quantize_activations: bool = False,
    ) -> None:
        """`placement` is how other devices load the same model, if there are any."""
        self.decoder = decoder.eval()
        self.placement = placement
        self.lock = threading.Lock()
        self.kv_cache_bytes, self.kv_cache_dtype = kv_cache_bytes, kv_cache_dtype
        self.host_cache_bytes = host_cache_bytes
        if quantize_activations:
            check_quantization(decoder.spec, {matrix.format for matrix in decoder.packed.values()})
        self.quantize_activations = quantize_activations
        self.cache_dir, self.cache_bytes = cache_dir, cache_bytes
        if cache_dir is not None:
            cache_folder.check_usable(cache_dir)
        self.exact, self.limits = exact, limits
        self.backend = choose_backend(backend, decoder.embed.weight.device)
        self.spec: ModelSpec = decoder.spec
        self.name = name
        self.dialect: Dialect = dialect
        self.folder = folder

    @classmethod
    def load(
        cls,
        path_or_name: str | Path,
        *,
        device: str | torch.device = "cpu",
        devices: int = 1,
        backend: str = "auto",
        dtype: str | torch.dtype | None = None,
        kv_cache_bytes: int | None = None,
        kv_cache_dtype: str = "auto",
        host_cache_bytes: int | None = None,
        quantize_activations: bool = False,
        cache_dir: str | Path | None = None,
        cache_bytes: int = CACHE_BYTES,
        exact: bool = True,
        threads: int | None = None,
        expert_cache_bytes: int | None = None,
    ) -> Engine:
        """Load a packaged model by name (`"tiny"`), or a folder in the official layout by path.

        Args:
            path_or_name: A `str` equal to a packaged name means that model; write `"./tiny"` for a folder of that name.
            device: `"cpu"` or a GPU.
            devices: Number of devices, each with a process of its own: GPUs from `device` on, or a CPU that they share.
                The experts are divided among them, and each session is computed on one of them. Results are the same
                bits for any number.
            backend: What computes forwards: `"cpu"`, kernels that Numba compiles for this CPU; `"triton"`, Triton
                kernels for a GPU; `"reference"`, plain torch on any device, several times slower; `"auto"`, the fastest
                that this machine and device have.
            dtype: Dtype of the weights: `"float32"`, `"bfloat16"`, `"float16"` or the torch dtype; `"triton"` takes
                the first two. Tensors that the official layout stores as float32 stay float32. By default FP8, FP4 and
                int8 matrices stay packed, and other weights are bfloat16 if it represents every stored value exactly
                and the backend is `"cpu"`, or `"triton"` on a GPU, else float32. On a CPU, results are the same bits.
                `"int8"` rounds the matrices that the official checkpoints quantise to 8 bits with a scale per output.
            kv_cache_bytes: Limit on the state of all sessions. Beyond it, state is evicted, lowest priority and least
                recently used first, and recomputed when it is needed. By default 2 GiB on a CPU, which takes memory as
                it is used, and on a GPU what is free beside the weights and the activations of a forward.
            kv_cache_dtype: Format of the rows that sessions keep: `"auto"`, float32; or `"fp8"`, DeepSeek's own of 584
                bytes per row instead of 2,048, and of 132 per index key instead of 512. The rows are rounded as the
                model's training did, but the bits of a result change.
            host_cache_bytes: Host memory, for a GPU: evicted state moves there before it is recomputed, and comes back
                with one copy per span. By default none.
            quantize_activations: Round inputs of FP8 and FP4 matrices to FP8, and index queries and keys to FP4, as
                DeepSeek's own inference does; with `kv_cache_dtype="fp8"` results are closest to it. Slower than
                without.
            cache_dir: Folder in which computed state is also kept, for later processes.
            cache_bytes: Limit on the disk cache.
            exact: If True, a session gives the same bits alone, in any batch, with any chunking and from any cache. If
                False, forwards may use all threads and be faster, and the last bits of a result depend on the batch.
            threads: Threads that share the `"cpu"` backend's work, in each process if there are several devices; by
                default as many as there are cores, in all. The results are the same bits for any number.
            expert_cache_bytes: Memory for the routed experts that were used last; they must be packed. On the `"cpu"`
                backend the others stay in their files, so the checkpoint may be larger than memory; on `"triton"` they
                are in page-locked host memory, and decoding is not captured in CUDA graphs. Each of several devices has
                an equal share. By default all are resident; the results are the same bits.

        Raises:
            TypeError, ValueError: an argument has the wrong type or is out of range, or does not fit the backend.
            ModelNotFoundError: there is no such name and no such folder; the message lists the packaged names.
            DeviceUnavailableError: a GPU does not exist on this machine, or Triton's kernels do not support it.
            WorkerLostError: the process of another device failed.
            CheckpointError: the folder's content is wrong; see `weights.checkpoint`.
            ModelTooLargeError: the weights need more memory than the device has left.
            OutOfMemoryError: a GPU has no room for the state beside the weights, or this machine for
                `host_cache_bytes`.
            CacheFolderError: other users may write to `cache_dir`, or the key that signs its files is unusable.
        """
        path_or_name, device, held_as = check_model(path_or_name), check_device(device), check_dtype(dtype)
        rows_dtype = check_kv_cache_dtype(kv_cache_dtype)
        quantize_activations = check_flag("quantize_activations", quantize_activations)
        devices = check_devices(devices, device, torch.cuda.device_count())
        kv_cache_bytes = None if kv_cache_bytes is None else check_bytes("kv_cache_bytes", kv_cache_bytes)
        cache_bytes = check_bytes("cache_bytes", cache_bytes)
        host_cache_bytes = check_host_cache_bytes(host_cache_bytes, device)
        packaged = {name: folder for name, folder in PACKAGED_MODELS.items() if (folder / "config.json").is_file()}
        folder = packaged.get(path_or_name) if isinstance(path_or_name, str) else None
        folder = folder or Path(path_or_name)
        if not folder.is_dir():
            names = ", ".join(packaged) or "none"
            raise ModelNotFoundError(
                f'no model "{path_or_name}": it is neither a packaged model ({names}) nor an existing folder; '
                "give one of those names, or the path of a folder with config.json and safetensors files"
            )
        skip_collection_at_exit()
        with collection_paused():
            backend = choose_backend(backend, device)
            check_backend_dtype(backend, held_as)
            limits = check_limits(backend, threads, expert_cache_bytes).share(devices)
            if rows_dtype != "auto":
                spec = read_layout(folder).spec
                rows_of(spec.layers[0], spec, rows_dtype)  # refuses a head size before reading weights
            decoder, dialect = read_decoder(
                folder,
                device=device,
                backend=backend,
                dtype=held_as,
                expert_cache_bytes=limits.expert_cache_bytes,
                devices=devices,
            )
        if devices > (experts := decoder.spec.n_routed_experts):
            raise ValueError(
                f"devices={devices} is more than the {experts} experts of this model, which the devices divide among "
                f"themselves; use at most {experts}"
            )
        placement = Placement(devices, folder, device, held_as, rows_dtype, quantize_activations, limits)
        engine = cls(
            decoder,
            name=folder.resolve().name,
            dialect=dialect,
            folder=folder,
            kv_cache_bytes=kv_cache_bytes,
            host_cache_bytes=host_cache_bytes,
            cache_dir=None if cache_dir is None else Path(cache_dir),
            cache_bytes=cache_bytes,
            exact=exact,
            backend=backend,
            placement=placement if devices > 1 else None,
            limits=limits,
            kv_cache_dtype=rows_dtype,
            quantize_activations=quantize_activations,
        )
        if decoder.packed or devices > 1 or device.type == "cuda":
            _ = engine.scheduler  # reads and checks the packed matrices, on all devices, and allocates a GPU's pools
        return engine

    @cached_property
    def scheduler(self) -> Scheduler:
        """The scheduler that computes for all sessions; packs the weights on first use."""
        scheduler = Scheduler(
            self.decoder,
            kv_cache_bytes=self.kv_cache_bytes,
            host_cache_bytes=self.host_cache_bytes,
            exact=self.exact,
            backend=self.backend,
            placement=self.placement,
            limits=self.limits,
            kv_cache_dtype=self.kv_cache_dtype,
            quantize_activations=self.quantize_activations,
        )
        if self.cache_dir is not None:
            scheduler.disk = DiskCache(
                self.cache_dir, scheduler.pools, model=self.fingerprint_here, budget_bytes=self.cache_bytes
            )
        return scheduler

    @property
    def kv_capacity(self) -> KVCapacity:
        """The tokens and bytes that all sessions can hold at once, on each device. Packs the weights on first use."""
        return self.scheduler.capacity

    def warm_up(self) -> None:
        """Pack the weights and compile the CPU kernels, so that the first token is as fast as later ones.

        Compiling takes about twenty seconds, once per machine and kind of layer; a log warning announces it.
        """
        scheduler = self.scheduler
        if self.backend == "cpu":
            from agentkit_engine.runtime.warm_up import warm_up

            warm_up(scheduler.runner, self.decoder)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The folder's tokenizer, read on first use.

        Raises:
            TokenizerMissingError: the folder has no tokenizer.json.
            CheckpointError: the tokenizer.json is not usable.
        """
        if not self._has_tokenizer:
            raise TokenizerMissingError(
                f'{self.folder} holds no tokenizer.json, so model "{self.name}" takes token ids only; '
                "put the model's tokenizer.json there to request with text"
            )
        try:
            return Tokenizer.from_dir(self.folder)
        except TokenizerError as error:
            file = self.folder / "tokenizer.json"
            raise CheckpointError(file, str(error).removeprefix(f"{file}: ")) from error

    @cached_property
    def sampling(self) -> SamplingParams:
        """Sampling parameters from the folder's generation_config.json, or `SamplingParams()` without that file.

        Raises:
            CheckpointError: the file is not a valid generation config.
        """
        return read_sampling(self.folder)

    @cached_property
    def grammars(self) -> Grammars:
        """Builds the grammars that `generate` takes; reads the vocabulary on first use.

        Raises:
            GrammarMissingError: llguidance is not installed.
            TokenizerMissingError, CheckpointError: see `tokenizer`.
        """
        from agentkit_engine.grammar import Grammars

        return Grammars(self.tokenizer, self.spec.vocab_size)

    def flush(self) -> None:
        """Wait until all pending state is written to the disk cache. `AsyncEngine` does so when its block ends."""
        if self.cache_dir is not None and self.scheduler.disk is not None:
            self.scheduler.disk.close()

    def close(self) -> None:
        """Write pending state to the disk cache, and end the processes of other devices; they also end with this one.
        Nothing can be computed on several devices afterwards."""
        self.flush()
        if self.placement is not None and isinstance(runner := self.scheduler.runner, ParallelRunner):
            runner.workers.close()

    def logits(self, token_ids: Iterable[int]) -> Tensor:
        """Return the logits after each of the T ids, float32 [T, V]: the same bits that a session computes.

        Raises:
            ValueError: there are no ids.
            TokenIdError: an id is outside the vocabulary.
            ContextLengthError: there are more ids than the model has positions.
            OutOfMemoryError: the ids do not fit into `kv_cache_bytes`.
        """
        return self.scheduler.logits(self._check_scored(token_ids, "logits()"))

    def logprobs(self, token_ids: Iterable[int]) -> Tensor:
        """Return the log-probability of each of the T ids but the first, given those before it: float32 [T - 1].

        The values are those of `SampledToken.logprob`, from the same logits as a session computes.

        Raises:
            ValueError, TokenIdError, ContextLengthError, OutOfMemoryError: see `logits`.
        """
        return self.scheduler.logprobs(self._check_scored(token_ids, "logprobs()"))

    def _check_scored(self, token_ids: Iterable[int], name: str) -> list[int]:
        ids = check_ids(token_ids, self.spec.vocab_size)
        if not ids:
            raise ValueError(f"{name} needs at least one token id")
        if len(ids) > (limit := self.spec.max_position_embeddings):
            raise ContextLengthError(f"{len(ids)} ids exceed the model's {limit} positions")
        return ids

    def session(self, *, priority: int = 0) -> Session:
        """Return a new, empty session. When memory is short, sessions with a higher priority are evicted later."""
        return Session(self, Request(priority=check_whole("priority", priority)))

    def open(self, path: str | Path) -> Session:
        """Open a session that `Session.save` wrote and continue where it stopped, without recomputing its state.

        Raises:
            SavedSessionError: the file is not a saved session, belongs to another model, or is damaged.
            OSError: the file cannot be read.
            OutOfMemoryError: its state does not fit into the engine's memory.
        """
        request = self.scheduler.open(Path(path), model=self.fingerprint)
        return Session(self, request)

    def reader(self, params: SamplingParams) -> Reader:
        """Return the reader that adds text to the tokens of one generation.

        Raises:
            TokenizerMissingError: there are stop texts, which need a tokenizer, and the model has none.
        """
        if not params.stop and not self._has_tokenizer:
            return Reader(None, params)
        return Reader(self.tokenizer, params)

    @cached_property
    def _has_tokenizer(self) -> bool:
        return (self.folder / "tokenizer.json").is_file()

    @cached_property
    def fingerprint(self) -> str:
        """Hash that identifies compatible state: numerics, architecture, and each weight's name, shape and samples.

        Packed weights have the fingerprint of the same values in a parameter.
        """
        kind = (self.spec, NUMERICS, self.exact, self.backend, self.kv_cache_dtype, self.quantize_activations)
        digest = hashlib.blake2b(repr(kind).encode(), digest_size=16)
        weights = self.decoder.state_dict() | self.decoder.packed
        for name, weight in sorted(weights.items()):
            digest.update(repr((name, tuple(weight.shape), _samples(weight))).encode())
        return digest.hexdigest()

    @cached_property
    def fingerprint_here(self) -> str:
        """`fingerprint` combined with this machine; on another machine the last bits may differ."""
        return hashlib.blake2b(
            repr((self.fingerprint, machine(self.decoder.embed.weight.device))).encode(), digest_size=16
        ).hexdigest()


def read_decoder(
    folder: Path,
    *,
    device: torch.device,
    backend: str,
    dtype: torch.dtype | None,
    experts: range | None = None,
    expert_cache_bytes: int | None = None,
    devices: int = 1,
) -> tuple[Decoder, Dialect]:
    """Return the model in `folder`, for a backend, with its chat dialect; see `Engine.load` and `load_checkpoint`."""
    # Plain torch and Triton's interpreter would convert bfloat16 weights in every product.
    converts = backend == "reference" or (backend == "triton" and device.type == "cpu")
    return load_checkpoint(
        folder,
        device=device,
        dtype=torch.float32 if dtype is None and converts else dtype,
        packed=dtype is None,
        experts=experts,
        expert_cache_bytes=expert_cache_bytes,
        devices=devices,
        lay_out=lay_out if backend == "cpu" else None,
    )


def _samples(weight: Tensor | PackedRows) -> list[float]:
    """Return values from a few rows of a weight."""
    *experts, rows, _ = (1, *weight.shape)[-3:] if len(weight.shape) > 1 else (1, 1, weight.shape[0])
    found: list[float] = []
    for expert in {0, experts[0] - 1}:
        for row in {0, rows // 2 // FP8_BLOCK * FP8_BLOCK}:
            if isinstance(weight, Tensor):
                some = weight.detach().reshape(experts[0], rows, -1)[expert, row].cpu()
            else:
                some = weight.rows(row, row + 1, expert if len(weight.shape) == 3 else None).dequantise()[0]
            found += some[:: max(1, len(some) // 64)].tolist()
    return found
