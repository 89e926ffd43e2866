"""A GPU that is not there: the device "pretend", whose tensors lie on the CPU and refuse what a GPU's would refuse.

Importing this module makes the device known to torch. A tensor on it holds one on the CPU, on which every operation
runs, after it was looked at for what raises on a GPU: a tensor of the CPU beside one of the device, `.numpy()`, a
generator of the CPU for numbers drawn on the device; and float64, which Apple's GPUs do not have. What a GPU allows
stays allowed: a number (0 dimensions) of the CPU beside tensors of the device, indices on the CPU, copies between the
two. Nothing is faster or slower by kind, and a missing synchronisation is not seen.

With `SD3KIT_DEVICE=pretend pytest tests/...` any test runs on it; `test_devices.py` does so for those that must pass.
torch's hooks for a device in Python: `torch.utils.backend_registration` and its test test_privateuseone_python_backend.
"""

import functools

import torch
from torch.utils import backend_registration
from torch.utils._python_dispatch import return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map_only

NAME = "pretend"
aten = torch.ops.aten
COPIES = {aten.copy_.default, aten._to_copy.default, aten._copy_from.default}
INDEXING = {"aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"}


class Pretended(torch.Tensor):
    """A tensor on the device; `held` is the tensor on the CPU that it stands for."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, held: torch.Tensor):
        if held.dtype in (torch.float64, torch.complex128):
            raise TypeError(f"A tensor on {NAME} cannot be {held.dtype}: Apple's GPUs have no such numbers.")
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            held.shape,
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=f"{NAME}:0",
        )
        made.held = held
        return made

    @classmethod
    def __torch_dispatch__(cls, operation, types, args=(), kwargs=None):
        return run(operation, *args, **(kwargs or {}))

    def numpy(self, *_, **__):
        raise TypeError(f"can't convert {NAME}:0 device type tensor to numpy. Use Tensor.cpu() first.")

    def tolist(self):
        return self.held.tolist()

    def __reduce_ex__(self, protocol):
        return self.held.__reduce_ex__(protocol)  # a stored one is loaded on the CPU

    def untyped_storage(self):
        return self.held.untyped_storage()

    def __repr__(self):
        return f"{self.held!r} on {NAME}"


def run(operation, *args, **kwargs):
    """Do on the held tensors what is asked of those on the device, or raise as a GPU would."""
    there = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Pretended)]
    here = bool(there)
    asked = kwargs.get("device")
    stays = here if asked is None else torch.device(asked).type == NAME
    _refuse(operation, args, kwargs, here, stays)
    if asked is not None:
        kwargs |= {"device": torch.device("cpu"), "pin_memory": False} if "pin_memory" in kwargs else {"device": "cpu"}
    held_args, held_kwargs = tree_map_only(Pretended, lambda x: x.held, (args, kwargs))
    if operation is aten._copy_from.default:  # what torch.tensor(..., device=) comes to
        held_args[1].copy_(held_args[0])
        return args[1]
    found = operation(*held_args, **held_kwargs)
    if any(x.shape != x.held.shape for x in there):
        raise NotImplementedError(f"A tensor on {NAME} has a fixed shape, and {operation} changed it.")
    if not stays:
        return found
    found = tree_map_only(torch.Tensor, Pretended, found)
    return return_and_correct_aliasing(operation, args, kwargs, found) if here else found


def _refuse(operation, args, kwargs, here: bool, stays: bool) -> None:
    name, generator = operation._schema.name, kwargs.get("generator")
    if generator is not None and stays:
        raise RuntimeError(f"Expected a '{NAME}' device type for generator but found '{generator.device.type}'")
    if not here or operation in COPIES:
        return
    if name in INDEXING and isinstance(args[0], Pretended):
        args = (args[0], args[2:])  # the indices may be the CPU's
    for x in tree_leaves((args, kwargs)):
        if isinstance(x, torch.Tensor) and not isinstance(x, Pretended) and x.dim():
            raise RuntimeError(
                "Expected all tensors to be on the same device, but found at least two devices, "
                f"{NAME}:0 and cpu! ({name})"
            )


class _Module(backend_registration._DummyBackendModule):
    """What torch asks of `torch.pretend`."""

    def get_amp_supported_dtype(self):
        return [torch.bfloat16, torch.float16]

    def get_rng_state(self, device=0):
        return torch.get_rng_state()

    def set_rng_state(self, state, device=0):
        torch.set_rng_state(state)

    def synchronize(self, device=None):
        pass

    def empty_cache(self):
        pass


backend_registration._setup_privateuseone_for_python_backend(NAME, backend_module=_Module())
# Kernels last as long as their library. The first is for all that makes tensors out of none; the others are for what
# torch.tensor does, which looks for no kernel in Python, and for what torch makes by resizing an empty tensor.
_everything, _named = torch.library.Library("_", "IMPL"), torch.library.Library("aten", "IMPL")
_everything.fallback(run, "PrivateUse1")
for _operation in (
    aten._copy_from.default, aten._local_scalar_dense.default, aten.arange.default, aten.arange.start,
    aten.arange.start_step, aten.eye.default, aten.eye.m,
):  # fmt: skip
    _named.impl(_operation, functools.partial(run, _operation), "PrivateUse1")
