"""NamedTuples of arrays as compiled functions pass them to one another: by address.

By value, each array is seven arguments of each call, and a dozen instructions of each access: most of what numba would lower.
What lies at the address (program.Passed: for each array its data and its lengths) never changes, and LLVM is told so: a loop
that calls others need not read it again. An index counts from the front: compiled code adds no length to a negative one.
"""

import operator
from collections.abc import Sequence
from typing import Any, ClassVar

from llvmlite import ir
from numba.core import cgutils, types
from numba.core.typing.templates import AbstractTemplate, AttributeTemplate, Signature, infer_global, signature
from numba.extending import infer_getattr, lower_builtin, lower_getattr_generic, models, register_model, type_callable

BYTES = ir.IntType(8).as_pointer()
WORD = ir.IntType(64)


class Address(types.Type):
    """Where a NamedTuple of C-contiguous arrays is laid out; has its fields."""

    def __init__(self, structure: Any) -> None:
        self.structure = structure
        super().__init__(name=f"Address({structure.instance_class.__name__})")

    @property
    def key(self) -> Any:
        return self.structure

    def cells(self, name: str) -> "Cells | None":
        """The field of that name."""
        if name not in self.structure.fields:
            return None
        array = self.structure[self.structure.fields.index(name)]
        return Cells(array.dtype, array.ndim)


class Cells(types.Type):
    """A field of an Address: where its data and its lengths are laid out."""

    def __init__(self, dtype: Any, ndim: int) -> None:
        self.dtype, self.ndim = dtype, ndim
        super().__init__(name=f"Cells({dtype}, {ndim})")


class Row(types.Type):
    """A row of a Cells of two dimensions, by itself: its data and its length."""

    ndim = 1

    def __init__(self, dtype: Any) -> None:
        self.dtype = dtype
        super().__init__(name=f"Row({dtype})")


@register_model(Address)
@register_model(Cells)
class _AddressModel(models.PrimitiveModel):
    """Words that are all taken for pointers: their types would be most of what is written down for LLVM."""

    def __init__(self, manager: Any, kind: Any) -> None:
        super().__init__(manager, kind, BYTES.as_pointer())


@register_model(Row)
class _RowModel(models.StructModel):
    def __init__(self, manager: Any, kind: Row) -> None:
        super().__init__(manager, kind, [("data", types.CPointer(kind.dtype)), ("length", types.intp)])


@infer_getattr
class _Fields(AttributeTemplate):
    key = Address

    def generic_resolve(self, kind: Address, name: str) -> Cells | None:
        return kind.cells(name)


@lower_getattr_generic(Address)
def _read_field(_context: Any, builder: Any, kind: Address, address: Any, name: str) -> Any:
    before = sum(1 + array.ndim for array in kind.structure.types[: kind.structure.fields.index(name)])
    return builder.gep(address, [WORD(before)], inbounds=True)


def _is_place(kind: Any, index: Any) -> bool:
    """The index names one cell."""
    if isinstance(kind, Cells) and isinstance(index, types.BaseTuple):
        return len(index) == kind.ndim and all(isinstance(each, types.Integer) for each in index)
    return isinstance(kind, Cells | Row) and kind.ndim == 1 and isinstance(index, types.Integer)


@infer_global(operator.getitem)
class _GetItem(AbstractTemplate):
    metadata: ClassVar = {"target": "cpu"}  # tried before those for any target

    def generic(self, args: Any, _kws: Any) -> Signature | None:
        kind, index = args
        if _is_place(kind, index):
            return signature(kind.dtype, kind, index)
        if isinstance(kind, Cells) and kind.ndim == 2 and isinstance(index, types.Integer):
            return signature(Row(kind.dtype), kind, index)
        return None


@infer_global(operator.setitem)
class _SetItem(AbstractTemplate):
    metadata: ClassVar = {"target": "cpu"}  # tried before those for any target

    def generic(self, args: Any, _kws: Any) -> Signature | None:
        kind, index, _ = args
        if _is_place(kind, index) or (isinstance(kind, Cells | Row) and isinstance(index, types.SliceType) and not index.has_step):
            return signature(types.none, kind, index, kind.dtype)
        return None


def _data(context: Any, builder: Any, kind: Any, value: Any) -> Any:
    if isinstance(kind, Row):
        return builder.extract_value(value, 0)
    return builder.bitcast(_constant(builder, value), context.get_value_type(types.CPointer(kind.dtype)))


def _length(builder: Any, kind: Any, value: Any, dimension: int) -> Any:
    if isinstance(kind, Row):
        return builder.extract_value(value, 1)
    return _constant(builder, builder.bitcast(builder.gep(value, [WORD(1 + dimension)], inbounds=True), WORD.as_pointer()))


def _constant(builder: Any, address: Any) -> Any:
    word = builder.load(address)
    word.set_metadata("invariant.load", builder.module.add_metadata([]))
    return word


def _place(context: Any, builder: Any, kinds: Sequence[Any], value: Any, index: Any) -> Any:
    """Pointer to a cell."""
    kind, of_index = kinds[:2]
    parts = [(of_index, index)]
    if isinstance(of_index, types.BaseTuple):
        parts = [(each, builder.extract_value(index, i)) for i, each in enumerate(of_index)]
    offset, *inner = (context.cast(builder, part, each, types.intp) for each, part in parts)
    for i, part in enumerate(inner):
        offset = builder.add(builder.mul(offset, _length(builder, kind, value, 1 + i)), part)
    return builder.gep(_data(context, builder, kind, value), [offset])


@lower_builtin(operator.getitem, Cells, types.Integer)
@lower_builtin(operator.getitem, Cells, types.BaseTuple)
@lower_builtin(operator.getitem, Row, types.Integer)
def read(context: Any, builder: Any, sig: Any, args: Any) -> Any:
    if not isinstance(sig.return_type, Row):
        return builder.load(_place(context, builder, sig.args, *args))
    index, length = context.cast(builder, args[1], sig.args[1], types.intp), _length(builder, sig.args[0], args[0], 1)
    first = builder.gep(_data(context, builder, sig.args[0], args[0]), [builder.mul(index, length)])
    return cgutils.pack_struct(builder, [first, length])


@lower_builtin(operator.setitem, Cells, types.Integer, types.Any)
@lower_builtin(operator.setitem, Cells, types.BaseTuple, types.Any)
@lower_builtin(operator.setitem, Row, types.Integer, types.Any)
def write(context: Any, builder: Any, sig: Any, args: Any) -> Any:
    builder.store(args[2], _place(context, builder, sig.args, *args[:2]))
    return context.get_dummy_value()


@lower_builtin(operator.setitem, Cells, types.SliceType, types.Any)
@lower_builtin(operator.setitem, Row, types.SliceType, types.Any)
def _fill(context: Any, builder: Any, sig: Any, args: Any) -> Any:
    """The slice of the first dimension, all of the others."""
    kind = sig.args[0]
    length, *inner = [_length(builder, kind, args[0], i) for i in range(kind.ndim)]
    part = context.make_helper(builder, sig.args[1], args[1])
    first = part.start
    end = builder.select(builder.icmp_signed("<", part.stop, length), part.stop, length)
    for each in inner:
        first, end = builder.mul(first, each), builder.mul(end, each)
    data = _data(context, builder, kind, args[0])
    with cgutils.for_range(builder, end, start=first) as loop:
        builder.store(args[2], builder.gep(data, [loop.index]))
    return context.get_dummy_value()


@type_callable(len)
def _type_of_len(_context: Any) -> Any:
    return lambda kind: types.intp if isinstance(kind, Cells | Row) else None


@lower_builtin(len, Cells)
@lower_builtin(len, Row)
def _len(_context: Any, builder: Any, sig: Any, args: Any) -> Any:
    return _length(builder, sig.args[0], args[0], 0)


def pointer(context: Any, builder: Any, kind: Any, value: Any, index: Any) -> Any:
    """Pointer to a cell of one dimension, of a Cells or of an array of numba's."""
    data = _data(context, builder, kind, value) if isinstance(kind, Cells) else context.make_array(kind)(context, builder, value).data
    return builder.gep(data, [index])
