"""A CUDA device without a card: tensors are computed on the CPU, and refused wherever CUDA would refuse them.

    with pretended_card():
        make_trainer(folder, device="cuda").run()

Refused are operations on tensors of two devices, ``numpy()``, and, while a CUDA graph records, all that waits for
the card or copies to or from it. Speed, memory, kernels and their rounding are a real card's.
"""

from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")
aten = torch.ops.aten
INDEX = aten.index.Tensor, aten.index_put_.default, aten.index_put.default, aten._index_put_impl_.default
COPY = aten.copy_.default, aten._to_copy.default
WAIT = aten._local_scalar_dense.default, aten.nonzero.default, aten.equal.default, aten._unique2.default
recording = False  # whether a CUDA graph records now
graphs = []  # the graphs recorded so far


class Card(Tensor):
    """A tensor that says it is on a card; ``held`` has its numbers. C++ sees a CPU tensor without storage."""

    device, is_cuda, is_cpu = property(lambda self: CUDA), property(lambda self: True), property(lambda self: False)

    @staticmethod
    def __new__(cls, held, requires_grad=False):
        layout = {"strides": held.stride(), "storage_offset": held.storage_offset(), "dtype": held.dtype}
        made = Tensor._make_wrapper_subclass(cls, held.size(), **layout, requires_grad=requires_grad)
        made.held = held
        return made

    def __repr__(self):
        return f"Card({self.held!r})"

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        """What C++ would do on the CPU, as it takes these for CPU tensors."""
        kwargs, name = kwargs or {}, getattr(function, "__name__", "")
        if name == "numpy":
            raise TypeError("can't convert cuda:0 device type tensor to numpy; use Tensor.cpu() first")
        if name == "tolist":
            _waits(name)
            return args[0].held.tolist()
        if name in ("storage", "untyped_storage", "data_ptr"):  # safetensors asks which tensors share memory
            return function(args[0].held)
        if name == "pad_sequence":
            return _pad_sequence(*args, **kwargs)
        if name in ("cpu", "to") and isinstance(args[0], Card):
            others = [*args[1:], *kwargs.values()]
            device = CPU if name == "cpu" else next((d for x in others if (d := _device(x))), CUDA)
            kinds = [x.dtype if isinstance(x, Tensor) else x for x in others]
            dtype = next((kind for kind in kinds if isinstance(kind, torch.dtype)), args[0].dtype)
            if device.type == "cpu":
                return _ToHost.apply(args[0], dtype)
            return args[0] if dtype == args[0].dtype else args[0].type(dtype)
        with torch._C.DisableTorchFunctionSubclass():
            return function(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return _run(function, args, kwargs or {})


class _ToHost(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, dtype):
        _waits("copy to the host")
        return x.held.to(dtype, copy=True)

    @staticmethod
    def backward(ctx, grad):
        return Card(grad), None


def _device(x):
    """The device that an argument of ``to`` names, if it names one."""
    if isinstance(x, Tensor | torch.device):
        return x if isinstance(x, torch.device) else x.device
    return torch.device(x) if isinstance(x, str) else None


def _pad_sequence(rows, batch_first=False, padding_value=0.0, padding_side="right"):
    """As torch's for rows on one device; C++ would make the result on the CPU."""
    assert batch_first and padding_side == "right" and all(isinstance(row, Card) for row in rows)
    longest = max(map(len, rows))
    gaps = [(0, 0) * (row.dim() - 1) + (0, longest - len(row)) for row in rows]
    return torch.stack([torch.nn.functional.pad(r, g, value=padding_value) for r, g in zip(rows, gaps, strict=True)])


def _waits(what):
    if recording:
        raise RuntimeError(f"operation not permitted when stream is capturing: {what}")


def _run(function, args, kwargs):
    """One operation, on the numbers of its cards."""
    leaves = tree_leaves((args, kwargs))
    tensors = [x for x in leaves if isinstance(x, Tensor)]
    cards, plain = [x for x in tensors if isinstance(x, Card)], [x for x in tensors if not isinstance(x, Card)]
    device = torch.device(kwargs.get("device") or CPU)
    indexed = function in INDEX and isinstance(args[0], Card)
    if cards and any(x.dim() for x in plain) and function not in COPY:
        places = [x for x in tree_leaves(args[1:2]) if isinstance(x, Tensor)] if indexed else []
        if not all(any(x is place for place in places) for x in plain):
            shapes = [(type(x).__name__, tuple(x.shape)) for x in tensors]
            raise RuntimeError(f"Expected all tensors to be on the same device: {function} of {shapes}")
        _waits("indices from the host")
    if cards and (
        function in WAIT or (indexed and any(x.dtype == torch.bool for x in tree_leaves(args[1]) if x is not None))
    ):
        _waits(function)
    if function in COPY and (device.type == "cuda" or cards) and any(x.dim() for x in plain):
        _waits("copy between host and card")
    # C++ takes cards for CPU tensors, and says so where it makes a tensor like one of them; so do gradients.
    on_card = cards or device.type == "cuda" or not tensors and torch._C._current_autograd_node() is not None
    generator = kwargs.get("generator")
    if generator is not None and (generator.device.type == "cuda") != bool(on_card):
        raise RuntimeError(f"Expected a generator of the tensor's device: {function}")
    if function is aten.mm.dtype:  # CPUs have no such product
        return Card(args[0].held.to(args[2]) @ args[1].held.to(args[2]))

    def held(x):
        return x.held if isinstance(x, Card) else CPU if isinstance(x, torch.device) else x

    def wrapped(x):
        if not isinstance(x, Tensor):
            return x
        own = [t for t in tensors if x is held(t)]  # an operation in place
        return own[0] if own else Card(x) if on_card else x

    return tree_map(wrapped, function(*tree_map(held, args), **tree_map(held, kwargs)))


class _Mode(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return _run(function, args, kwargs or {})


class _Index(TorchFunctionMode):
    """``cuda`` means the one card there is; C++ would ask CUDA which."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        def indexed(x):
            return CUDA if (isinstance(x, torch.device) and x.type == "cuda") or x in ("cuda", "cuda:0") else x

        kwargs = {name: indexed(x) if name == "device" else x for name, x in (kwargs or {}).items()}
        if getattr(function, "__name__", "") == "to":
            args = (args[0], *(x if isinstance(x, Tensor) else indexed(x) for x in args[1:]))
        return function(*args, **kwargs)


class _Graph:
    """A CUDA graph: the same tensors in and out at every replay, and nothing waits for the card."""

    def __init__(self, function):
        self.function = function
        self.output = self._record().clone()
        graphs.append(self)

    def _record(self):
        global recording
        recording = True
        try:
            return self.function()
        finally:
            recording = False

    def replay(self):
        self.output.copy_(self._record())


def _record(function):
    """As ``sampling.record``: what is made at the first calls is no part of the graph."""
    for _ in range(2):
        function()
    graph = _Graph(function)
    return graph, graph.output


def _flex(query, key, value, block_mask, scale, enable_gqa):
    """FlexAttention's numbers: its rule for pairs of queries and keys, in the blocks that it computes."""
    heads, n, shared = query.shape[1], query.shape[2], key.shape[1]
    place = torch.arange(n, device=query.device)
    allowed = block_mask.mask_mod(0, 0, place[:, None], place)
    blocks = block_mask.to_dense()[0, 0].bool()
    allowed = allowed & blocks.repeat_interleave(n // len(blocks), 0).repeat_interleave(n // len(blocks), 1)
    key, value = (x.repeat_interleave(heads // shared, 1) for x in (key, value))
    scores = (query @ key.mT * scale).masked_fill(~allowed, float("-inf"))
    return scores.softmax(-1) @ value


def _to_card(module):
    for part in module.modules():
        for name, x in list(part._parameters.items()):
            if x is not None:
                part._parameters[name] = moved = torch.nn.Parameter(Card(x.data), requires_grad=x.requires_grad)
                vars(moved).update(vars(x))  # bitsandbytes keeps there how the weight is packed
                _state_to_card(getattr(x, "quant_state", None))
        for name, x in list(part._buffers.items()):
            part._buffers[name] = x if x is None else Card(x)
    return module


def _state_to_card(state):
    for name, x in list(vars(state).items()) if state else ():
        if isinstance(x, Tensor):
            setattr(state, name, Card(x))
    if state and state.nested:
        _state_to_card(state.state2)


@contextmanager
def pretended_card(memory_gib=80):
    """Inside, torch sees one card with this much memory, and models are loaded onto it."""
    from covrl_lab.train import models, sampling, tree  # before a card is seen: imports look for one

    about = SimpleNamespace(total_memory=memory_gib * 2**30, name="pretended card", major=9, minor=0)
    load = models._load_frozen
    # A torch that was built for CUDA would ask the driver.
    checks = [name for name in vars(torch.optim.Optimizer) if name.endswith("graph_capture_health_check")]
    patches = {
        torch.optim.Optimizer: dict.fromkeys(checks, lambda self: None),
        torch.cuda: {
            "_lazy_init": lambda: None,
            "is_available": lambda: True,
            "device_count": lambda: 1,
            "get_device_capability": lambda *_: (9, 0),
            "get_device_properties": lambda *_: about,
            "synchronize": lambda *_: None,
            "max_memory_allocated": lambda *_: 0,
            "reset_peak_memory_stats": lambda *_: None,
            "get_rng_state": lambda *_: torch.zeros(1),
            "set_rng_state": lambda *_: None,
        },
        sampling: {"record": _record},
        tree: {"_flex_kernel": lambda device: _flex},
        models: {"_load_frozen": lambda name, kind, dtype, device: _to_card(load(name, kind, dtype, CPU))},
    }
    graphs.clear()
    with ExitStack() as stack:
        for module, replaced in patches.items():
            for name, function in replaced.items():
                stack.enter_context(mock.patch.object(module, name, function))
        torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(..., device="cuda") would ask CUDA itself
        stack.callback(torch._C._set_only_lift_cpu_tensors, False)
        overwrite = torch.__future__.set_overwrite_module_params_on_conversion
        stack.callback(overwrite, torch.__future__.get_overwrite_module_params_on_conversion())
        overwrite(True)
        stack.enter_context(_Mode())
        stack.enter_context(_Index())
        yield
