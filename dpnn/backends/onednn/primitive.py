"""A primitive of oneDNN, bound to arrays: memory descriptions, the objects that own them, one call to execute."""

from collections.abc import Sequence
from ctypes import c_void_p

from dpnn.backends.base import Array
from dpnn.backends.onednn.library import Argument, Library, dims

FLOAT, ANY, LINE = 3, 1, 2
"""The data type f32; the tag with which oneDNN chooses the layout; the tag of a vector."""
SRC, DST, WEIGHTS, BIAS, SCALES = 1, 17, 33, 41, 4096 + 1
DIFF_SRC, DIFF_DST, DIFF_WEIGHTS, DIFF_BIAS = 129, 145, 161, 169
QUERY = {SRC: 129, DIFF_SRC: 130, WEIGHTS: 131, DIFF_WEIGHTS: 132, DST: 133, DIFF_DST: 134}
"""What to ask a primitive's description for, to get the memory description of an argument."""


class Owned:
    """An object of the library that is destroyed with this one."""

    def __init__(self, library: Library, kind: str, handle: c_void_p) -> None:
        self.library, self.kind, self.handle = library, kind, handle

    def __del__(self) -> None:
        self.library.call(f"{self.kind}_destroy", self.handle)


class Layouts:
    """Makes memory descriptions."""

    def __init__(self, library: Library) -> None:
        self._library = library

    def strided(self, shape: Sequence[int], strides: Sequence[int]) -> Owned:
        """Of float32 numbers with the given strides (in numbers)."""
        return self._make("memory_desc_create_with_strides", len(shape), dims(shape), FLOAT, dims(strides))

    def free(self, shape: Sequence[int]) -> Owned:
        """Of float32 numbers in the order that the primitive works best with."""
        return self._make("memory_desc_create_with_tag", len(shape), dims(shape), FLOAT, ANY)

    def _make(self, name: str, *arguments: object) -> Owned:
        return Owned(self._library, "memory_desc", self._library.make(name, *arguments))


class Description:
    """What a primitive will do, and how; `layout` tells how an argument has to lie."""

    def __init__(self, library: Library, handle: c_void_p) -> None:
        self.library = library
        self.owned = Owned(library, "primitive_desc", handle)

    @property
    def name(self) -> str:
        """The implementation."""
        return self.library.name(self.owned.handle)

    def layout(self, argument: int) -> c_void_p:
        """The memory description of an argument; it belongs to this object."""
        return c_void_p(self.library.call("primitive_desc_query_md", self.owned.handle, QUERY[argument], 0))

    def nbytes(self, argument: int) -> int:
        """The bytes of an argument."""
        return self.library.call("memory_desc_get_size", self.layout(argument))


class Primitive:
    """Ready to run on the memory it was bound to: calling it executes."""

    def __init__(self, description: Description, arguments: Sequence[tuple[int, c_void_p, Array]]) -> None:
        """`arguments`: index, memory description, the array whose first byte is the memory's."""
        library = description.library
        self._library, self._description = library, description
        handle = library.make("primitive_create", description.owned.handle)
        self._owned = [Owned(library, "primitive", handle)]
        self._arrays = [array for _, _, array in arguments]
        self._arguments = (Argument * len(arguments))()
        for slot, (index, layout, array) in zip(self._arguments, arguments, strict=True):
            memory = library.make("memory_create", layout, library.engine, c_void_p(array.ctypes.data))
            self._owned.append(Owned(library, "memory", memory))
            slot.index, slot.memory = index, memory.value
        self._call = (handle, library.stream, len(arguments), self._arguments)

    def __call__(self) -> None:
        status = self._library.execute(*self._call)
        if status:
            self._library.check(self._description.name, status)


def reorder(
    library: Library, source: c_void_p, target: c_void_p, add: bool = False, scaled_dims: int = 0
) -> Description:
    """From one layout to another; with `add`, onto what stands there. `scaled_dims`: the first so many have SCALES."""
    attribute = attributes(library, [("sum", (1.0, 0, 0))] if add else ())
    if scaled_dims:
        library.do("primitive_attr_set_scales_mask", attribute.handle, SRC, (1 << scaled_dims) - 1)
    ends = (source, library.engine, target, library.engine)
    return Description(library, library.make("reorder_primitive_desc_create", *ends, attribute.handle))


def attributes(
    library: Library, post_ops: Sequence[tuple[str, tuple[object, ...]]] = (), bfloat16: bool = False
) -> Owned:
    """Post-operations by name ("eltwise", "sum") with their arguments; whether products may be bfloat16."""
    operations = Owned(library, "post_ops", library.make("post_ops_create"))
    for name, arguments in post_ops:
        library.do(f"post_ops_append_{name}", operations.handle, *arguments)
    attribute = Owned(library, "primitive_attr", library.make("primitive_attr_create"))
    library.do("primitive_attr_set_post_ops", attribute.handle, operations.handle)
    library.do("primitive_attr_set_fpmath_mode", attribute.handle, int(bfloat16))
    return attribute


def same(library: Library, a: c_void_p, b: c_void_p) -> bool:
    """Whether two memory descriptions are equal."""
    return bool(library.call("memory_desc_equal", a, b))
