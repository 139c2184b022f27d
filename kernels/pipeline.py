"""Numba's compilation, cut down to what this package's functions need: a quarter of its time. docs/adr/0008-compile-time.md.

What a function looks like, and what it computes, is numba's own. Cut out are passes for what is not used here (closures, literal
unrolling, parfors, object mode, reference counts), and modules and machine code of functions that only compiled functions call.
"""

import gc
import operator
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from enum import IntEnum
from typing import Any

import llvmlite.binding as llvm
import numba
import numpy as np
from llvmlite import ir as llvm_ir
from numba.core import cgutils, compiler, ir, types
from numba.core.bytecode import ByteCode, FunctionIdentity
from numba.core.codegen import JITCodeLibrary
from numba.core.compiler_lock import global_compiler_lock
from numba.core.funcdesc import PythonFunctionDescriptor
from numba.core.imputils import lower_constant
from numba.core.interpreter import Interpreter
from numba.core.ir_utils import build_definitions
from numba.core.registry import cpu_target
from numba.core.ssa import reconstruct_ssa
from numba.core.targetconfig import ConfigStack
from numba.core.typed_passes import PreLowerStripPhis, type_inference_stage
from numba.core.types.functions import BaseFunction
from numba.core.typing import builtins
from numba.core.typing.templates import Signature, infer_global, signature
from numba.extending import lower_builtin, models, register_model, type_callable

from kernels.address import Address, Cells, pointer
from kernels.jit import prefetch
from kernels.lowering import Lower, calling

# Numba's own rules for what is used here, tried before its rules for strings, lists, dicts and array expressions.
RULES: dict[Any, Any] = {
    bool: builtins.Bool,
    operator.eq: builtins.CmpOpEq,
    operator.ne: builtins.CmpOpNe,
    operator.lt: builtins.CmpOpLt,
    operator.le: builtins.CmpOpLe,
    operator.gt: builtins.CmpOpGt,
    operator.ge: builtins.CmpOpGe,
    operator.add: builtins.BinOpAdd,
    operator.iadd: builtins.BinOpAdd,
    operator.sub: builtins.BinOpSub,
    operator.isub: builtins.BinOpSub,
    operator.mul: builtins.BinOpMul,
}
for operation, rule in RULES.items():
    infer_global(operation)(type(f"First{rule.__name__}", (rule,), {"metadata": {"target": "cpu"}}))

# Nothing here allocates, and an exception that numba may raise is one number for the caller.
OPTIONS: dict[str, Any] = {"nopython": True, "error_model": "numpy", "no_cfunc_wrapper": True, "_nrt": False}


def optimise(codegen: Any, module: Any) -> None:
    """Once; numba does it twice, for reference counts."""
    manager, builder = codegen._module_pass_manager()
    manager.run(module, builder)


def check_self_contained(module: Any) -> None:
    """Raises RuntimeError if the code refers to what only this process has: numba's functions, or objects by their address."""
    functions = [each.name for each in module.functions if each.is_declaration and not each.name.startswith("llvm.")]
    variables = [each.name for each in module.global_variables if each.is_declaration or each.name.startswith("numba.dynamic")]
    if functions or variables:
        raise RuntimeError(f"machine code that cannot be kept: it refers to {', '.join(functions + variables)}")


class Library(JITCodeLibrary):
    """Code of an entry and all that it calls, with what that calls."""

    def add_linking_library(self, library: Any) -> None:
        if library is not self and library not in self._linking_libraries:
            super().add_linking_library(library)
            for each in library._linking_libraries:
                self.add_linking_library(each)

    def _optimize_final_module(self) -> None:
        optimise(self._codegen, self._final_module)


class Shared(Library):
    """The code of all functions that compiled functions call: one module, that is optimised and made machine code with who calls them."""

    def __init__(self, codegen: Any) -> None:
        super().__init__(codegen, "kernels")
        self.module = codegen._create_empty_module("kernels")
        self._finalized = True

    def create_ir_module(self, _name: str) -> Any:
        return self.module

    def add_ir_module(self, module: Any) -> None:
        """It is there already."""

    def _get_module_for_linking(self) -> Any:
        return llvm.parse_assembly(cgutils.normalize_ir_text(str(self.module)))

    def object_file(self, function: str, symbol: str) -> bytes:
        """Machine code of all, with that function, under another name, the only one that can be called from outside."""
        module = self._get_module_for_linking()
        for library in self._linking_libraries:
            module.link_in(library._get_module_for_linking(), preserve=True)
        for each in (*module.functions, *module.global_variables):
            if not each.is_declaration:
                each.linkage = "internal"
        called = module.get_function(function)
        called.name, called.linkage = symbol, "external"
        module.verify()
        optimise(self._codegen, module)
        check_self_contained(module)
        code: bytes = self._codegen._tm.emit_object(module)
        return code


def fold_members(blocks: dict[int, Any]) -> None:
    """Members of enums become numbers here: else numba types and lowers each, and what is done with it, as something of its own."""
    for block in blocks.values():
        enums: dict[str, type[IntEnum]] = {}
        kept = []
        for statement in block.body:
            value = statement.value if isinstance(statement, ir.Assign) else None
            if isinstance(value, ir.Global) and isinstance(value.value, type) and issubclass(value.value, IntEnum):
                enums[statement.target.name] = value.value
                continue
            if isinstance(value, ir.Expr) and value.op == "getattr" and value.value.name in enums:
                member = enums[value.value.name][value.attr]
                statement.value = ir.Global(str(member), np.int64(member), statement.loc)
            kept.append(statement)
        block.body = kept


class Compiled(types.Callable, types.Opaque):
    """What a function that compiled functions call is to numba."""

    def __init__(self, function: Callable[..., Any], inline: bool) -> None:
        self.function, self.inline = function, inline
        self.made: dict[tuple[Any, ...], tuple[Signature, str]] = {}
        super().__init__(f"{function.__module__}.{function.__qualname__}")

    @property
    def key(self) -> Any:
        return self.function, self.inline

    def get_call_type(self, _context: Any, args: Any, kws: Any) -> Signature | None:
        """Compiles for arguments like those. None: they are passed by name."""
        if kws:
            return None
        if args not in self.made:
            self.made[args] = self._compile(args)
        return self.made[args][0]

    def get_call_signatures(self) -> tuple[list[Signature], bool]:
        return [made[0] for made in self.made.values()], True

    def get_impl_key(self, sig: Signature) -> str:
        """The name in SHARED."""
        return self.made[sig.args][1]

    def _compile(self, kinds: tuple[Any, ...]) -> tuple[Signature, str]:
        flags = compiler.Flags()
        cpu_target.options.parse_as_flags(flags, OPTIONS)
        target = compiler._make_subtarget(cpu_target.target_context, flags)
        identity = FunctionIdentity.from_function(self.function)
        code = Interpreter(identity).interpret(ByteCode(identity))
        fold_members(code.blocks)
        code = reconstruct_ssa(code)
        code._definitions = build_definitions(code.blocks)
        with ConfigStack().enter(flags):
            typed = type_inference_stage(cpu_target.typing_context, target, code, kinds, None)
            code = PreLowerStripPhis()._strip_phi_nodes(code)
            described = PythonFunctionDescriptor.from_specialized_function(
                code,
                typed.typemap,
                typed.return_type,
                typed.calltypes,
                mangler=lambda name, _types, **other: f"{name}.{other['uid']}",
                inline=self.inline,
                noalias=False,
                abi_tags=(),
            )
            with target.push_code_library(SHARED):
                Lower(target, SHARED, described, code).lower()
        name: str = described.mangled_name
        target.insert_func_defn([(calling(described, SHARED), name, kinds)])
        return signature(typed.return_type, *kinds), name


@register_model(Compiled)
class _CompiledModel(models.OpaqueModel):
    pass


@lower_constant(Compiled)
def _no_value(context: Any, _builder: Any, _kind: Any, _value: Any) -> Any:
    return context.get_dummy_value()


SHARED = Shared(cpu_target.target_context.codegen())


class _EntryPoint(compiler.Compiler):
    """Numba's own pipeline, for what tests compile."""

    def _compile_core(self) -> Any:
        self.state.library = Library(self.state.targetctx.codegen(), self.state.func_id.func_qualname)
        return super()._compile_core()


def entry_point(function: Callable[..., Any]) -> Any:
    """Numba's compiler of a function that Python calls."""
    compile_with: Any = numba.jit
    return compile_with(**OPTIONS, pipeline_class=_EntryPoint)(function)


def remembering(resolve: Callable[..., Any]) -> Callable[..., Any]:
    """Numba finds out what an operator gives each time it is used, three times over; once for its kinds of arguments is enough."""
    known: dict[Any, Any] = {}

    def get_call_type(self: Any, context: Any, args: Any, kws: Any) -> Any:
        if kws:
            return resolve(self, context, args, kws)
        key = (self, tuple(args))
        if key not in known:
            known[key] = resolve(self, context, args, kws)
        return known[key]

    return get_call_type


@contextmanager
def undisturbed() -> Iterator[None]:
    """Garbage waits: 20 MB more for a tenth of the time."""
    resolve, collects = BaseFunction.get_call_type, gc.isenabled()
    with global_compiler_lock:
        gc.disable()
        BaseFunction.get_call_type = remembering(resolve)
        try:
            yield
        finally:
            BaseFunction.get_call_type = resolve
            if collects:
                gc.freeze()
                gc.enable()
                gc.unfreeze()


def machine_code(function: Callable[..., int], arguments: Sequence[Any], symbol: str) -> bytes:
    """An object file with the function under that name, and all that it calls, for arguments like those; NamedTuples by address."""
    with undisturbed():
        cpu_target.target_context.refresh()
        kinds = tuple(Address(numba.typeof(each)) if isinstance(each, tuple) else types.int64 for each in arguments)
        compiled = Compiled(function, inline=False)
        compiled.get_call_type(None, kinds, {})
        return SHARED.object_file(compiled.made[kinds][1], symbol)


def _type_of_prefetch(_context: Any) -> Any:
    return lambda array, index: types.void if isinstance(array, types.Array | Cells) and isinstance(index, types.Integer) else None


def _lower_prefetch(context: Any, builder: Any, sig: Any, arguments: Any) -> Any:
    address = builder.bitcast(pointer(context, builder, sig.args[0], *arguments), llvm_ir.IntType(8).as_pointer())
    number = llvm_ir.IntType(32)
    kind = llvm_ir.FunctionType(llvm_ir.VoidType(), [address.type, number, number, number])
    builder.call(cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0"), [address, number(1), number(3), number(1)])
    return context.get_dummy_value()


type_callable(prefetch)(_type_of_prefetch)
for array in (types.Array, Cells):
    lower_builtin(prefetch, array, types.Integer)(_lower_prefetch)
