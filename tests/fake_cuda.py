"""A pretended CUDA device: the CPU computes real numbers, and the rules are those of a GPU.

    with FakeCuda() as gpu:
        x = torch.rand(4, device="cuda")
        with gpu.scope("step"):
            x.sum().item()
    assert not gpu.faults, gpu.report()
    assert [note.what for note in gpu.waits] == ["_local_scalar_dense"]

Tensors are those of the CPU; where one pretends to be is a mark on its storage, which views and detached tensors share.
Python's questions (``.device``, ``.to``, ``device=``) are answered by a mode for torch functions. Every ATen operation,
forward and backward, passes through a mode for dispatch, which holds it to the rules:

* ``faults``: what CUDA refuses. Operands on two devices, an operation or a dtype without a CUDA kernel, an operation
  that raises under deterministic algorithms while they are on, a tensor of the host in a collective of NCCL. They are
  noted and the computation goes on, so that one run finds all.
* ``waits``: where the host stops until the device has caught up: a number read, a shape that depends on values, a copy
  that is not ``non_blocking``, an error code of a decomposition.
* ``launches``, ``bytes`` and ``collectives``, counted by scope.

Lightning's CUDA accelerator and DDP run as they are; gloo stands in for NCCL. Not seen: wrong numbers of CUDA kernels,
memory, hangs, compiled code (``torch.compile`` does nothing here), and what C++ alone decides by the device.
"""

import contextlib
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, wraps
from pathlib import Path
from types import SimpleNamespace, TracebackType
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.distributed_c10d as c10d
from torch import Tensor, nn
from torch._dynamo.trace_rules import get_torch_obj_rule_map
from torch.autograd.function import BackwardCFunction
from torch.nn.parallel import DistributedDataParallel
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from ssl_geometry.geometry.exact_search import faiss

ROOT, HERE = str(Path(__file__).parents[1]), __file__
MEMORY = 80 * 2**30

INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
PRODUCTS = ("mm", "bmm", "addmm", "addbmm", "baddbmm", "mv", "addmv", "dot", "vdot")
HOST_ONLY_DTYPES = {  # the CPU has kernels for these and CUDA has none, by the tables of torch's own tests (2.15)
    **dict.fromkeys((*PRODUCTS, "max_pool2d_with_indices", "max_pool3d_with_indices"), INTEGERS),
    **dict.fromkeys(("convolution", "avg_pool2d", "avg_pool3d"), (torch.int64,)),
    **dict.fromkeys(("upsample_bilinear2d", "_upsample_bilinear2d_aa"), (torch.uint8,)),
    "histc": (torch.float16, torch.bfloat16),
}
NOT_DETERMINISTIC = {  # of the documentation of torch.use_deterministic_algorithms
    *("median.dim", "histc", "put_", "scatter_reduce.two", "scatter_reduce_.two", "nll_loss2d_forward"),
    *("_adaptive_avg_pool2d_backward", "_adaptive_avg_pool3d_backward", "adaptive_max_pool2d_backward"),
    *("avg_pool3d_backward", "max_pool3d_with_indices_backward", "_ctc_loss_backward"),
    *("grid_sampler_2d_backward", "grid_sampler_3d_backward"),
    *(f"reflection_pad{n}d_backward" for n in (1, 2, 3)),
    *(f"upsample_{kind}_backward" for kind in ("linear1d", "bilinear2d", "bicubic2d", "trilinear3d")),
    *(f"_upsample_{kind}2d_aa_backward" for kind in ("bilinear", "bicubic")),
}
WAIT_TAGS = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape)
WAITING = ("equal", "_linalg_check_errors", "_linalg_eigh", "_linalg_svd", "linalg_lstsq")  # beside what torch tags
NO_LAUNCH = ("_local_scalar_dense", "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "set_")
INDEXING = ("index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index", "_unsafe_index_put")


@dataclass(frozen=True)
class Note:
    """What happened, in which line of the package (or of a library on its behalf), within which scope."""

    what: str
    where: str
    scope: str
    operands: str

    def __str__(self) -> str:
        return f"[{self.scope}] {self.what} at {self.where}: {self.operands}"


def is_marked(tensor: Tensor) -> bool:
    """Whether a tensor pretends to be on the device; for handlers and for code outside of the modes."""
    try:
        return getattr(tensor.untyped_storage(), "pretends", False)
    except NotImplementedError:  # sparse
        return False


def mark(tensor: Tensor, there: bool = True) -> Tensor:
    """Put a tensor on the device, with all that shares its storage."""
    tensor.untyped_storage().pretends = there  # type: ignore[attr-defined]
    return tensor


def is_cuda(device: Any) -> bool:
    return isinstance(device, int) or str(device).startswith("cuda")


class FakeCuda:
    """Pretends that this process has CUDA devices, while it is entered.

    Args:
        devices: how many; this process's own is that of LOCAL_RANK.
    """

    def __init__(self, devices: int = 1) -> None:
        self.devices, self.index = devices, int(os.environ.get("LOCAL_RANK", "0"))
        self.faults: list[Note] = []
        self.waits: list[Note] = []
        self.launches: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()
        self.collectives: Counter[str] = Counter()
        self.forbid_waits = False
        self.calls: list[Callable[[], bool]] = []  # whether what the current torch function makes is on the device
        self.nccl: set[str] = set()  # names of process groups
        self._scopes = [""]
        self._exit = contextlib.ExitStack()

    @contextlib.contextmanager
    def scope(self, name: str) -> Iterator[None]:
        """Count and note under a name."""
        self._scopes.append(name)
        try:
            yield
        finally:
            self._scopes.pop()

    def report(self, notes: list[Note] | None = None) -> str:
        """Faults and waits, or the notes given: equal ones once, with their number."""
        notes = self.faults + self.waits if notes is None else notes
        places = Counter((note.scope, note.what, note.where) for note in notes)
        return "\n".join(f"{n} x [{scope}] {what} at {where}" for (scope, what, where), n in places.most_common())

    # -- what the modes report -----------------------------------------------------------------------------------------

    def fault(self, what: str, *operands: Tensor) -> None:
        self.faults.append(Note(what, _line(), self._scopes[-1], _text(operands)))

    def wait(self, what: str, *operands: Tensor) -> None:
        self.waits.append(Note(what, _line(), self._scopes[-1], _text(operands)))
        if self.forbid_waits:
            raise RuntimeError(f"called a synchronizing CUDA operation: {self.waits[-1]}")

    def launch(self, tensors: list[Tensor]) -> None:
        self.launches[self._scopes[-1]] += 1
        self.bytes[self._scopes[-1]] += sum(t.nbytes for t in {id(t): t for t in tensors}.values())

    def move(self, tensor: Tensor, there: bool, non_blocking: bool = False) -> Tensor:
        """A copy to the device or to the host; differentiable."""
        if is_marked(tensor) == there:
            return tensor
        if not non_blocking:
            self.wait("copy to the device" if there else "copy to the host", tensor)
        with _hidden():
            return mark(tensor.clone(), there)

    # -- what is patched while it is entered ---------------------------------------------------------------------------

    def __enter__(self) -> "FakeCuda":
        library = faiss()  # whose wrappers for tensors take the place of its functions when it is loaded
        get_torch_obj_rule_map()  # dynamo's table of functions, made once: before they are others
        for name, value in self._cuda().items():
            self._patch(torch.cuda, name, value)
        self._patch(torch.cuda.nccl, "version", lambda: (2, 0, 0))
        self._patch(torch.accelerator, "current_stream", torch.cuda.current_stream)
        self._patch(torch, "compile", lambda model=None, **_: model if model is not None else lambda f: f)
        self._patch(nn.Module, "compile", lambda *_, **__: None)
        self._patch(torch.autocast, "__init__", _autocast(torch.autocast.__init__))
        self._patch(
            library, "StandardGpuResources", lambda: SimpleNamespace(setTempMemory=_nothing, setPinnedMemory=_nothing)
        )
        self._patch(library, "knn_gpu", self._knn)
        self._patch_collectives()
        functions, backward = _Functions(self), BackwardCFunction.apply

        def apply(node: Any, *gradients: Any) -> Any:  # of backward functions in Python; autograd switches the mode off
            with functions, self.within(lambda: any(isinstance(x, Tensor) and is_marked(x) for x in gradients)):
                return backward(node, *gradients)

        self._patch(BackwardCFunction, "apply", apply)
        self._exit.enter_context(_Operations(self))
        self._exit.enter_context(functions)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._exit.close()

    def _patch(self, owner: Any, name: str, value: Any) -> None:
        had, before = name in vars(owner), getattr(owner, name, None)
        setattr(owner, name, value)
        self._exit.callback(lambda: setattr(owner, name, before) if had else delattr(owner, name))

    def _cuda(self) -> dict[str, Any]:
        facts = SimpleNamespace(name="pretended GPU", major=9, minor=0, total_memory=MEMORY, multi_processor_count=132)
        nowhere = contextlib.nullcontext
        stream = SimpleNamespace(
            wait_stream=_nothing, is_capturing=lambda: False, synchronize=lambda: self.wait("synchronize")
        )
        silent = (
            "init _lazy_init set_device empty_cache ipc_collect reset_peak_memory_stats manual_seed manual_seed_all"
        )
        return {
            **dict.fromkeys([*silent.split(), "manual_seed_all", "set_rng_state", "set_rng_state_all"], _nothing),
            **dict.fromkeys(["is_available", "is_initialized", "is_bf16_supported"], lambda *_, **__: True),
            **dict.fromkeys(["current_stream", "default_stream", "Stream"], lambda *_, **__: stream),
            **dict.fromkeys(["stream", "device"], lambda *_: nowhere()),
            **dict.fromkeys(["memory_allocated", "max_memory_allocated", "memory_reserved"], lambda *_: 0),
            "Event": lambda *_, **__: SimpleNamespace(record=_nothing, query=lambda: True),
            "device_count": lambda: self.devices,
            "current_device": lambda: self.index,
            "get_device_name": lambda *_: facts.name,
            "get_device_properties": lambda *_: facts,
            "get_device_capability": lambda *_: (facts.major, facts.minor),
            "mem_get_info": lambda *_: (MEMORY, MEMORY),
            "memory_stats": lambda *_: {},
            "get_rng_state": lambda *_: torch.zeros(16, dtype=torch.uint8),
            "get_rng_state_all": lambda: [torch.zeros(16, dtype=torch.uint8)] * self.devices,
            "synchronize": lambda *_: self.wait("synchronize"),
            "is_current_stream_capturing": lambda: False,
            "set_sync_debug_mode": lambda mode: setattr(self, "forbid_waits", mode in (2, "error")),
        }

    def _knn(self, resources: Any, queries: Tensor, points: Tensor, k: int, **options: Any) -> tuple[Tensor, Tensor]:
        """FAISS's search on a GPU, whose kernels torch does not see."""
        if not (is_marked(queries) and is_marked(points)):
            self.fault("faiss.knn_gpu: operands on two devices", queries, points)
        with _hidden():
            arrays = (tensor.detach().contiguous().numpy() for tensor in (queries, points))
            values, ids = faiss().knn(*arrays, k, metric=options["metric"])
            return mark(torch.from_numpy(values)), mark(torch.from_numpy(ids))

    def _patch_collectives(self) -> None:
        """Where NCCL is asked for, gloo comes; names and devices are NCCL's still."""
        init, new, backend, device = (
            c10d.init_process_group, c10d.new_group, c10d.get_backend, c10d._get_object_coll_device
        )  # fmt: skip

        def init_process_group(asked: str | None = None, **options: Any) -> None:
            options.pop("device_id", None)
            init("gloo", **options)
            if asked in (None, "nccl"):
                self.nccl.add(dist.group.WORLD.group_name)  # type: ignore[union-attr]

        def new_group(*args: Any, **options: Any) -> Any:
            asked = options.pop("backend", None)
            group = new(*args, backend="gloo", **options)
            if asked == "nccl" or (asked is None and self._is_nccl(dist.group.WORLD)):
                self.nccl.add(group.group_name)
            return group

        def barrier(group: Any = None, async_op: bool = False, device_ids: Any = None) -> None:
            if self._is_nccl(group):
                self.wait("barrier")
            with _hidden():
                dist.all_reduce(torch.zeros(1), group=group)

        for name, value in {
            "init_process_group": init_process_group,
            "new_group": new_group,
            "barrier": barrier,
            "get_backend": lambda group=None: "nccl" if self._is_nccl(group) else backend(group),
            "_get_object_coll_device": lambda group=None: "cuda" if self._is_nccl(group) else device(group),
        }.items():
            self._patch(c10d, name, value)
            if hasattr(dist, name):
                self._patch(dist, name, value)
        for name in ("__init__", "_pre_forward", "_post_forward"):  # C++ makes the buckets where the parameters are
            self._patch(DistributedDataParallel, name, self._there(getattr(DistributedDataParallel, name)))

    def _is_nccl(self, group: Any) -> bool:
        group = group or dist.group.WORLD
        return group is not None and group.group_name in self.nccl

    def _there(self, function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)
        def inner(*args: Any, **kwargs: Any) -> Any:
            with self.within(lambda: True):
                return function(*args, **kwargs)

        return inner

    @contextlib.contextmanager
    def within(self, there: Callable[[], bool]) -> Iterator[None]:
        """Tensors that are made of no tensor are on the device if ``there()``."""
        self.calls.append(there)
        try:
            yield
        finally:
            self.calls.pop()


@contextlib.contextmanager
def on_a_gpu() -> Iterator[None]:
    """A real one where there is one; else a pretended one, and no fault is left when it ends."""
    if torch.cuda.is_available():
        yield
        return
    with FakeCuda() as gpu:
        yield
    assert not gpu.faults, gpu.report(gpu.faults)


class _Functions(TorchFunctionMode):
    """What Python asks of tensors and says of devices."""

    def __init__(self, gpu: FakeCuda) -> None:
        super().__init__()
        self.gpu = gpu
        self.answers: dict[Any, Callable[..., Any]] = {
            Tensor.device.__get__: lambda _, x: self._device(x),  # type: ignore[attr-defined]
            Tensor.is_cuda.__get__: lambda _, x: is_marked(x),  # type: ignore[attr-defined]
            Tensor.is_cpu.__get__: lambda _, x: not is_marked(x),  # type: ignore[attr-defined]
            Tensor.get_device: lambda _, x: gpu.index if is_marked(x) else -1,
            Tensor.to: lambda _, x, *args, **kwargs: self._to(x, *args, **kwargs),
            Tensor.type_as: lambda _, x, other: self._to(x, other),
            Tensor.cuda: lambda _, x, device=None, non_blocking=False: gpu.move(x, True, non_blocking),
            Tensor.cpu: lambda _, x: gpu.move(x, False),
            Tensor.pin_memory: lambda _, x: x,
            Tensor.is_pinned: lambda _, x: False,
            Tensor.numpy: self._numpy,
            Tensor.__array__: self._numpy,
            Tensor.tolist: self._read,
            Tensor.__repr__: self._read,
            Tensor.__deepcopy__: self._deepcopy,
            **dict.fromkeys((torch.tensor, torch.as_tensor, torch.asarray, Tensor.new_tensor), self._from_data),
            nn.functional.one_hot: self._one_hot,
        }

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        answer = self.answers.get(func)
        return self._call(func, *args, **kwargs) if answer is None else answer(func, *args, **kwargs)

    def _call(self, func: Any, *args: Any, **kwargs: Any) -> Any:
        kwargs.pop("pin_memory", None)
        if (device := kwargs.get("device")) is not None:
            there = is_cuda(device)
            with self.gpu.within(lambda: there):
                return func(*args, **(kwargs | {"device": "cpu" if there else device}))
        with self.gpu.within(lambda: any(is_marked(x) for x in _tensors((args, kwargs)))):
            return func(*args, **kwargs)

    def _device(self, x: Tensor) -> torch.device:
        return torch.device("cuda", self.gpu.index) if is_marked(x) else x.device

    def _to(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        copy = kwargs.pop("copy", False)
        others = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        if others:
            args = (self._device(others[0]), others[0].dtype, *args[1:])
            kwargs.pop("other", None)
        device, dtype, non_blocking, layout = torch._C._nn._parse_to(*args, **kwargs)
        there = is_marked(x) if device is None else is_cuda(device)
        if there != is_marked(x):
            x, copy = self.gpu.move(x, there, non_blocking), False
        return self._call(Tensor.to, x, dtype or x.dtype, copy=copy, memory_format=layout or torch.preserve_format)

    def _from_data(self, func: Any, *args: Any, device: Any = None, **kwargs: Any) -> Tensor:
        """From numbers or arrays on the host, or as ``new_tensor`` where a tensor is: made there, then copied."""
        source = args[0] if isinstance(args[0], Tensor) else None
        there = (source is not None and is_marked(source)) if device is None else is_cuda(device)
        with self.gpu.within(lambda: False):
            made = func(*args, **kwargs)
        return self.gpu.move(made, there)

    def _numpy(self, func: Any, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        if is_marked(x):
            raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first.")
        return func(x, *args, **kwargs)

    def _read(self, func: Any, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        if is_marked(x):
            self.gpu.wait(func.__name__, x)
        with _hidden():
            return func(x, *args, **kwargs)

    def _deepcopy(self, func: Any, x: Tensor, memo: dict[int, Any]) -> Any:
        there, copy = is_marked(x), func(x, memo)
        for part in (copy, copy.grad):
            if there and part is not None:
                mark(part)
        return copy

    def _one_hot(self, func: Any, x: Tensor, num_classes: int = -1) -> Tensor:
        if num_classes < 0 or not is_marked(x):
            return self._call(func, x, num_classes)
        self.gpu.launch([x])
        with _hidden():  # the CPU reads the largest class, CUDA checks it on the device
            return mark(func(x, num_classes))


class _Operations(TorchDispatchMode):
    """Every ATen operation, forward and backward."""

    def __init__(self, gpu: FakeCuda) -> None:
        super().__init__()
        self.gpu = gpu

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, gpu = kwargs or {}, self.gpu
        name, tensors = func._schema.name.split("::")[1], _tensors((args, kwargs))
        there = [is_marked(x) for x in tensors]
        new = (not tensors or name == "lift_fresh") and bool(gpu.calls) and gpu.calls[-1]()
        if not any(there) and not new:
            if func.namespace.endswith("c10d") or func.namespace == "_c10d_functional":
                self._check_collective(name, args, tensors)
            return func(*args, **kwargs)
        if new and tensors:
            gpu.wait("numbers of Python", *tensors)
        elif func.namespace == "aten":
            self._check(func, name, args, kwargs, tensors, there)
        else:
            self._check_collective(name, args, [x for x, marked in zip(tensors, there, strict=True) if not marked])
        out = STAND_INS.get(name, func)(*args, **kwargs)
        made = [x for x in _tensors(out) if not any(x is other for other in tensors)]
        for x in (*made, *(tensors if new else ())):
            mark(x)
        if not (func.is_view or name in NO_LAUNCH):
            gpu.launch([*tensors, *made])
        return out

    def _check(
        self, func: Any, name: str, args: Any, kwargs: dict[str, Any], tensors: list[Tensor], there: list[bool]
    ) -> None:
        gpu = self.gpu
        host = [x for x, marked in zip(tensors, there, strict=True) if not marked]
        masks = name in INDEXING and any(x is not None and x.dtype in (torch.bool, torch.uint8) for x in args[1])
        if host and "copy_" in name:
            if not (args[2] if len(args) > 2 else kwargs.get("non_blocking", False)):
                gpu.wait("copy to the device" if there[0] else "copy to the host", *tensors)
        elif host:
            if name in INDEXING and is_marked(args[0]):
                indices = [x for x in host if any(x is index for index in args[1])]
                if indices:
                    gpu.wait("indices to the device", *indices)
                host = [x for x in host if x.ndim and not any(x is index for index in indices)]
            elif torch.Tag.pointwise in func.tags or "masked_fill" in name or "_foreach" in name or name == "fill_":
                host = [x for x in host if x.ndim or (x is args[0] and func._schema.is_mutable)]
            if host:
                gpu.fault(f"{name}: operands on two devices", *tensors)
        sized = name in INDEXING or kwargs.get("output_size") is not None  # a shape that depends on no value
        if masks or name in WAITING or (not sized and any(tag in func.tags for tag in WAIT_TAGS)):
            gpu.wait("mask" if masks else name, *tensors)
        if torch.are_deterministic_algorithms_enabled():
            known = {name, f"{name}.{func._overloadname}"}
            if known & NOT_DETERMINISTIC or (name == "bincount" and len(tensors) > 1):
                gpu.fault(f"{name}: not deterministic on CUDA", *tensors)
        if not _has_cuda_kernel(func):
            gpu.fault(f"{func.name()}: no CUDA kernel", *tensors)
        if tensors and tensors[0].dtype in HOST_ONLY_DTYPES.get(name, ()):
            gpu.fault(f"{name}: no CUDA kernel for {tensors[0].dtype}", *tensors)

    def _check_collective(self, name: str, args: Any, host: list[Tensor]) -> None:
        group = next(
            (dist.ProcessGroup.unbox(x).group_name for x in args if isinstance(x, torch.ScriptObject)), args[-1]
        )
        if group in self.gpu.nccl and name not in ("wait_tensor", "barrier"):
            self.gpu.collectives[self.gpu._scopes[-1]] += 1
            if host:
                self.gpu.fault(f"{name}: a tensor of the host in a collective of NCCL", *host)


@cache
def _has_cuda_kernel(func: Any) -> bool:
    if torch.version.cuda is None or "_for_cpu" in func.name():  # a build, or a branch, for CPUs alone
        return True
    keys = ("CUDA", "CompositeExplicitAutograd", "CompositeExplicitAutogradNonFunctional", "CompositeImplicitAutograd")
    return any(torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), key) for key in keys)


@contextlib.contextmanager
def _hidden() -> Iterator[None]:
    with torch._C.DisableTorchFunction(), _disable_current_modes():
        yield


def _tensors(tree: Any) -> list[Tensor]:
    """Those of an operation: torch's own walk over a tree knows more kinds of nodes, and takes most of the time."""
    if isinstance(tree, Tensor):
        return [tree]
    if isinstance(tree, dict):
        tree = tree.values()
    elif not isinstance(tree, list | tuple):
        return []
    return [x for part in tree for x in _tensors(part)]


def _text(tensors: tuple[Tensor, ...]) -> str:
    with _hidden():
        return ", ".join(f"{'cuda' if is_marked(x) else 'cpu'} {x.dtype} {tuple(x.shape)}" for x in tensors)


def _line() -> str:
    """The innermost line of the project, and of the library that it called, if it did."""
    frame, library = sys._getframe(1), ""
    while frame is not None:
        file, line = frame.f_code.co_filename, frame.f_lineno
        installed = "/site-packages/" in file  # also where the environment lies inside the project
        if file.startswith(ROOT) and file != HERE and not installed:
            return f"{library}{file.removeprefix(ROOT)[1:]}:{line}"
        if installed and "/site-packages/torch/" not in file and not library:
            library = f"{file.rpartition('/site-packages/')[2]}:{line} < "
        frame = frame.f_back  # type: ignore[assignment]
    return library


def _nothing(*_: Any, **__: Any) -> None:
    """What a device would do."""


def _autocast(init: Callable[..., None]) -> Callable[..., None]:
    @wraps(init)
    def inner(self: Any, device_type: str, dtype: torch.dtype | None = None, *args: Any, **kwargs: Any) -> None:
        if device_type == "cuda":
            device_type, dtype = "cpu", dtype or torch.get_autocast_dtype("cuda")
        init(self, device_type, dtype, *args, **kwargs)

    return inner


# -- kernels that CUDA alone has: those of torch.nn.SyncBatchNorm ------------------------------------------------------


def _channels(x: Tensor) -> tuple[list[int], list[int]]:
    return [0, *range(2, x.ndim)], [1, -1, *[1] * (x.ndim - 2)]


def _batch_norm_stats(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    variance, mean = torch.var_mean(x.float(), _channels(x)[0], correction=0)
    return mean, (variance + eps).rsqrt()


def _batch_norm_elemt(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, inverse: Tensor, eps: float
) -> Tensor:
    shape = _channels(x)[1]
    y = (x.float() - mean.view(shape)) * inverse.view(shape)
    if weight is not None and bias is not None:
        y = y * weight.view(shape) + bias.view(shape)
    return y.to(x.dtype)


def _batch_norm_backward_reduce(
    gradient: Tensor, x: Tensor, mean: Tensor, inverse: Tensor, weight: Tensor | None, *needed: bool
) -> tuple[Tensor, ...]:
    over, shape = _channels(x)
    gradient = gradient.float()
    first, second = gradient.sum(over), (gradient * (x.float() - mean.view(shape))).sum(over)
    return first, second, second * inverse, first.clone()


def _batch_norm_backward_elemt(
    gradient: Tensor,
    x: Tensor,
    mean: Tensor,
    inverse: Tensor,
    weight: Tensor | None,
    first: Tensor,
    second: Tensor,
    count: Tensor,
) -> Tensor:
    shape, n = _channels(x)[1], count.sum()
    centred = (x.float() - mean.view(shape)) * (inverse.square() * second / n).view(shape)
    scale = inverse if weight is None else inverse * weight
    return ((gradient.float() - (first / n).view(shape) - centred) * scale.view(shape)).to(x.dtype)


STAND_INS: dict[str, Callable[..., Any]] = {
    "batch_norm_stats": _batch_norm_stats,
    "batch_norm_elemt": _batch_norm_elemt,
    "batch_norm_backward_reduce": _batch_norm_backward_reduce,
    "batch_norm_backward_elemt": _batch_norm_backward_elemt,
}
