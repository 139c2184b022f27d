"""From numba's typed statements to LLVM's: numba's own way, without its debug information and handling of exceptions."""

from collections.abc import Callable
from typing import Any

from numba.core import cgutils, ir
from numba.core.lowering import Lower as NumbaLower

from kernels.address import Cells, Row, read


class Lower(NumbaLower):
    """A function for callers that are compiled themselves."""

    def lower(self) -> None:
        """Into the library's module; what is left of it after a failure goes."""
        try:
            super().lower()
        except BaseException:
            self.module.globals.pop(self.fndesc.mangled_name, None)
            raise
        self.function.linkage = "linkonce_odr"
        if not self.fndesc.inline:
            self.function.attributes.add("noinline")

    def emit_environment_object(self) -> None:
        """There is none."""

    def lower_block(self, block: Any) -> None:
        self.pre_block(block)
        for statement in block.body:
            self.loc = statement.loc
            if isinstance(statement, ir.Assign):
                self.storevar(self.lower_assign(self.typeof(statement.target.name), statement), statement.target.name)
            else:
                self.lower_inst(statement)
        self.post_block(block)

    def storevar(self, value: Any, name: str, **_other: Any) -> None:
        if name in self._singly_assigned_vars:
            self._blk_local_varmap[name] = value
        else:
            self.builder.store(value, self.getvar(name))

    def alloca_lltype(self, name: str, lltype: Any, **_other: Any) -> Any:
        return cgutils.alloca_once(self.builder, lltype, name=name)

    def lower_getitem(self, resty: Any, expr: Any, value: Any, index: Any, signature: Any) -> Any:
        if not isinstance(signature.args[0], Cells | Row):
            return super().lower_getitem(resty, expr, value, index, signature)
        found = read(self.context, self.builder, signature, [self.loadvar(value.name), self.loadvar(index.name)])
        return self.context.cast(self.builder, found, signature.return_type, resty)


def calling(described: Any, library: Any) -> Callable[..., Any]:
    """How compiled code calls a function: what it raises is passed on as it is."""

    def call(context: Any, builder: Any, _sig: Any, args: Any) -> Any:
        function = builder.module.globals.get(described.mangled_name) or context.declare_function(builder.module, described)
        result = cgutils.alloca_once(builder, function.function_type.args[0].pointee)
        packed = context.call_conv._get_arg_packer(described.argtypes).as_arguments(builder, args)
        status = builder.call(function, [result, builder.function.args[1], *packed])
        with cgutils.if_unlikely(builder, builder.icmp_unsigned("!=", status, status.type(0))):
            builder.ret(status)
        return context.get_returned_value(builder, described.restype, builder.load(result))

    call.libs = (library,)
    return call
