"""An arena in this process's memory, and the copy of a state into it.

The copy is one plain memmove per tensor on the calling thread. A large one releases the GIL; a small one
keeps it, because taking it back may cost a switch interval (5 ms) each time when another Python thread is
busy. torch's own copy_ is used only where bytes must be gathered or fetched from a GPU: its thread pool
waits for the slowest core, which on a busy machine made copies seven times slower.
"""

import collections
import ctypes
import json
import mmap
import sys
from typing import Any, Dict, List, NamedTuple, Optional, Tuple, Union

from ckptd_client import control
from ckptd_client.control import PAGE
from ckptd_client.dtypes import framework
from ckptd_client.errors import Refused
from ckptd_client.flatten import FlatState, flatten
from ckptd_client.plan import STATE_FILE, Plan, structure_key
from ckptd_client.torchzip import save_into

GIL_BYTES_MIN = 1 << 20  # about 60 microseconds of copying: from here on the GIL is released
CHUNK_BYTES = 64 << 20  # so that a signal is handled within some milliseconds of copying
POPULATE_BYTES = 64 << 20  # the kernel's lock on the address space is given back between such pieces
TAKEN_BACK = "arena_taken_back"
TARGETS_MAX = 4  # plans whose addresses in this arena are remembered

_MADV_POPULATE_WRITE = 23  # Linux 5.14; Python has no name for it
_ERRNO_UNKNOWN = 22

_libc = ctypes.CDLL(None, use_errno=True)
_libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
_SIGNATURE = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)
_address_of_memmove = ctypes.cast(_libc.memmove, ctypes.c_void_p).value
_move_freely = ctypes.CFUNCTYPE(None, *_SIGNATURE)(_address_of_memmove)  # type: ignore[arg-type]
_move_held = ctypes.PYFUNCTYPE(None, *_SIGNATURE)(_address_of_memmove)  # type: ignore[arg-type]


class MappedArena:
    """An arena mapped into this process.

    address     where it starts        buffer  its bytes, to read and (when mapped writable) to write
    size_bytes  of the whole arena, control page included
    """

    def __init__(self, fd: int, size_bytes: int, arena_id: bytes, *, writable: bool = True) -> None:
        """Map the first `size_bytes` of `fd`, shared with the daemon. `fd` may be closed afterwards.

        OSError when it can't be mapped. Touches no page: see `populate`.
        """
        kind = mmap.MAP_SHARED if fd >= 0 else mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        self._memory = mmap.mmap(fd, size_bytes, kind, mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0))
        self.arena_id = arena_id
        self.size_bytes = size_bytes
        self.buffer = memoryview(self._memory)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self._memory)) if writable else 0
        self._targets: collections.OrderedDict[Any, List[int]] = collections.OrderedDict()

    @classmethod
    def anonymous(cls, size_bytes: int, arena_id: bytes = bytes(16)) -> "MappedArena":
        """Make an arena of private memory, for an image that goes to the spool; its control page is all zeros."""
        return cls(-1, size_bytes, arena_id)

    def populate(self) -> None:
        """Fault in every page now, so that the copy meets none; safe beside a running copy, frees the GIL.

        Blocks, 200 ms/GB when the pages exist, 700 ms/GB when not. OSError when memory is short, where a
        later copy would have been killed by SIGBUS.
        """
        for offset in range(0, self.size_bytes, POPULATE_BYTES):
            size = min(POPULATE_BYTES, self.size_bytes - offset)
            if _libc.madvise(self.address + offset, size, _MADV_POPULATE_WRITE) == 0:
                continue
            code = ctypes.get_errno()
            if code != _ERRNO_UNKNOWN:
                raise OSError(code, f"can't populate {self.size_bytes} bytes of arena")
            pages = self.buffer[offset : offset + size : PAGE]
            pages[:] = bytes(pages)  # writes one byte of each page as it was: only before the first copy

    def targets(self, plan: Plan) -> List[int]:
        """Return the address of each leaf of `plan` in this arena; remembered for the next save."""
        found = self._targets.get(plan.key)
        if found is None or len(found) != len(plan.places):
            found = [self.address + offset for offset, _ in plan.places]
            self._targets[plan.key] = found
            if len(self._targets) > TARGETS_MAX:
                self._targets.popitem(last=False)
        return found

    def close(self) -> None:
        """Unmap. Idempotent; memory that others still view is unmapped when they let go of it."""
        self._targets.clear()
        self.address = 0
        self.buffer.release()
        try:
            self._memory.close()
        except BufferError:
            return  # a view of it is alive; the mapping goes with the last one

    def __enter__(self) -> "MappedArena":  # noqa: PYI034  # Self came with Python 3.11
        """Return the arena itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Unmap."""
        self.close()


class CopiedImage(NamedTuple):
    """What copy_state put into an arena.

    files       [{"path", "offset", "size_bytes"}, ...] as the descriptor wants them, state.json last
    end_offset  where the descriptor goes        format  "safetensors" or "torch"
    """

    files: List[Dict[str, Any]]
    end_offset: int
    format: str = "safetensors"


def copy_state(plan: Plan, state: Any, arena: MappedArena, generation: Optional[int] = None) -> CopiedImage:
    """Copy `state`, or its `flatten(state)`, into `arena` as `plan` lays it out.

    generation  of the lease; without one, whoever holds it is the caller

    Blocks for one memcpy of the tensors; when it returns they may change again. Until then the control
    word is WRITING, so that an arena whose writer died is never taken for a whole one. Refused
    arena_too_small, arena_not_leased, arena_taken_back: lease another. ValueError: `state` has another structure.
    """
    if arena.size_bytes < plan.arena_bytes:
        message = f"the arena has {arena.size_bytes} bytes, the plan needs {plan.arena_bytes}"
        raise Refused("arena_too_small", message, "lease an arena of plan.arena_bytes")
    page = control.read(arena.buffer)
    _check_lease(page, generation)
    if page is not None:
        if page.state not in (control.LEASED, control.WRITING):
            raise Refused("arena_not_leased", f"the arena's control word is {page.state}", "lease an arena first")
        control.set_state(arena.buffer, control.WRITING)
    if plan.format == "torch":
        size = save_into(state, arena.buffer[PAGE : plan.state_offset])
        files = [{"path": plan.files[0].path, "offset": PAGE, "size_bytes": size}]
        return CopiedImage(files, PAGE + size, "torch")
    flat = flatten(state)
    if structure_key(flat) != plan.key:
        raise ValueError("the state's structure is not the plan's: build the plan from the same state")
    _copy_leaves(plan, flat, arena)
    files = [{"path": file.path, "offset": file.offset, "size_bytes": file.size_bytes} for file in plan.files]
    for file in plan.files:
        arena.buffer[file.offset : file.offset + len(file.header)] = file.header
    size = _write_state(plan, flat, arena.buffer)
    files.append({"path": STATE_FILE, "offset": plan.state_offset, "size_bytes": size})
    return CopiedImage(files, plan.state_offset + size)


def commit_image(
    arena: MappedArena,
    descriptor: Union[Dict[str, Any], bytes],
    image: CopiedImage,
    generation: Optional[int] = None,
) -> None:
    """Write the descriptor behind the files and flip the arena's control word to COMMITTED.

    A dict gets "files" and "format" from the image where it has none; `generation` is that of the lease.
    Refused descriptor_too_large: it has more in it (config, notes) than the plan left room for;
    arena_taken_back: the arena is somebody else's by now, lease another.
    """
    if not isinstance(descriptor, bytes):
        full = {"format": image.format, "files": image.files, **descriptor}
        descriptor = json.dumps(full, separators=(",", ":"), allow_nan=False).encode()
    end = image.end_offset + len(descriptor)
    if end > arena.size_bytes:
        room = arena.size_bytes - image.end_offset
        message = f"a descriptor of {len(descriptor)} bytes, room for {room}"
        raise Refused("descriptor_too_large", message, "log less in config, note or meta")
    _check_lease(control.read(arena.buffer), generation)  # before a byte of the descriptor: it may be another's memory
    arena.buffer[image.end_offset : end] = descriptor
    if not control.commit(arena.buffer, image.end_offset, descriptor, generation):
        raise _taken_back(generation)


def _check_lease(page: Optional[control.Control], generation: Optional[int]) -> None:
    if generation is None:
        return
    if page is None or page.generation != generation or page.state not in (control.LEASED, control.WRITING):
        raise _taken_back(generation)


def _taken_back(generation: Optional[int]) -> Refused:
    message = f"the daemon took the arena back: the lease of generation {generation} is over"
    return Refused(TAKEN_BACK, message, "lease another arena")


def _copy_leaves(plan: Plan, flat: FlatState, arena: MappedArena) -> None:
    torch = sys.modules.get("torch")
    array = getattr(sys.modules.get("numpy"), "ndarray", ())
    large: List[Tuple[int, int, int]] = []
    for leaf, address, target, (_, size) in zip(flat.leaves, flat.addresses, arena.targets(plan), plan.places):  # noqa: B905  # strict= came with Python 3.10
        # Asked for again: a tensor may have been given other memory since the walk. What it had is free then, and may be
        # what it was given: of another size, it would be read beyond its end, or not to it.
        if not address or (type(leaf) is not array and (leaf.data_ptr() != address or leaf.nbytes != size)):
            if size:
                _gather(torch, leaf, arena.buffer[target - arena.address :][:size])
        elif size < GIL_BYTES_MIN:
            _move_held(target, address, size)
        else:
            large.append((target, address, size))
    for target, address, size in large:
        for at in range(0, size, CHUNK_BYTES):
            _move_freely(target + at, address + at, min(CHUNK_BYTES, size - at))


def _gather(torch: Any, leaf: Any, room: memoryview) -> None:
    """Pack a strided leaf, or fetch one from a GPU, into `room`."""
    if torch is not None and isinstance(leaf, torch.Tensor):
        with torch.no_grad():
            view = torch.frombuffer(room, dtype=leaf.dtype)
            if view.numel() != leaf.numel():
                raise ValueError("a tensor changed its shape between the walk and the copy")
            view.reshape(leaf.shape).copy_(leaf)
        return
    numpy = framework("numpy")
    numpy.copyto(numpy.frombuffer(room, leaf.dtype).reshape(leaf.shape), leaf)


def _write_state(plan: Plan, flat: FlatState, buffer: memoryview) -> int:
    """Write state.json: the plan's text with the values of this save between; return its size."""
    parts: List[Optional[str]] = [None] * (len(plan.fragments) + len(flat.holes))
    parts[0::2] = plan.fragments
    parts[1::2] = flat.holes
    text = "".join(parts).encode("ascii")  # type: ignore[arg-type]
    if len(text) > plan.state_room_bytes:
        message = f"plain values of {len(text)} bytes, room for {plan.state_room_bytes}"
        raise Refused("arena_too_small", message, "take the plan from PlanCache.get for each save")
    buffer[plan.state_offset : plan.state_offset + len(text)] = text
    return len(text)
