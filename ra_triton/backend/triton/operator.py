"""One declaration for each operator: its eager call, ``torch.ops.ra_triton.*``, and its gradient.

An eager call launches directly, with an autograd Function around it where a gradient is needed. A
call that something else has to see (``checks.observed``: compilers, modes, ``torch.func``,
subclasses) takes the registered operator, which has a fake kernel (shapes without data), a formula
for its gradient whose backward is an operator too, a rule for ``vmap`` (a loop over the slices) and
one for ``torch.func``, which differentiates Functions alone. So does a backward that is observed or
recorded (``create_graph=True``): it raises when it is differentiated a second time.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function, forward_ad

from ra_triton import internals
from ra_triton.backend.triton.flops import count, count_all
from ra_triton.checks import in_dtype, needs_grad, observed, transformed
from ra_triton.launch.recorded import Repeated, Tape, Tensors, device_of, record

NAMESPACE = "ra_triton"
Dtypes = tuple[torch.dtype | None, ...]
Results = tuple[Tensor | None, ...]

# Constants that several operators share; values as options.Scores and offsets.Offsets hold them.
SCORES = (
    "bool causal, float? softmax_scale, float dropout_p, int window_left, int window_right, "
    "float softcap"
)
LONGEST = "SymInt max_seqlen_q, SymInt max_seqlen_k, bool complete"

_libraries: list[torch.library.Library] = []  # which end with what holds them


class Backward(NamedTuple):
    """What the backward of an operator gets besides its constants."""

    tensors: Sequence[Any]  # those of the forward, None where there was none
    outputs: Sequence[Tensor]  # if they are saved
    incoming: Sequence[Tensor | None]  # gradients; None: zero
    needed: Sequence[bool]  # which of the first tensors' gradients
    dtypes: Dtypes  # in which those are wanted


class Operator:
    """``(*tensors, *constants) -> outputs``.

    Args:
        name: of the operator.
        tensors: names of the tensors, which come first, separated by commas; ``?`` marks those that
            may be None.
        constants: schema of the other arguments.
        outputs: names of the results.
        forward: ``forward(*tensors, *constants)`` launches and returns a tuple of outputs.
        fake: the same without launches, of fake tensors.
        backward: ``backward(call, *constants)`` of a :class:`Backward` launches and returns the
            gradients of the first tensors, each only if needed.
        inputs: how many of the first tensors may have a gradient, or are refused one.
        differentiable: how many of the first outputs have one.
        saves_outputs: whether the backward reads the outputs; otherwise it gets none.
        saved: the tensors that the backward gets, in the order of the forward's.
        flops: ``flops(*tensors, *constants, out_val=outputs)``, of the forward.
        flops_backward: ``flops_backward(tensors, needed, *constants)``.
    """

    def __init__(
        self,
        name: str,
        tensors: str,
        constants: str,
        outputs: str,
        *,
        forward: Callable[..., Results],
        fake: Callable[..., Results],
        backward: Callable[..., Results] | None = None,
        inputs: int = 0,
        differentiable: int = 1,
        saves_outputs: bool = False,
        saved: Callable[[Tensors], Tensors] = tuple,
        flops: Callable[..., int] | None = None,
        flops_backward: Callable[..., int] | None = None,
    ) -> None:
        """Register the operator, and that of its backward."""
        self.name, self.inputs, self.differentiable = name, inputs, differentiable
        self.forward, self.backward = forward, backward
        self.saves_outputs, self.saved = saves_outputs, saved
        self.tensors, self.outputs = tensors.split(", "), outputs.split(", ")
        self._repeated = Repeated(forward)
        self.repeated_backward = Repeated(self._gradients_of_all)
        formula = () if backward is None else (self._formula, self._save)
        schema = self._schema(constants)
        self.op = _register(name, schema, self._run, self._fake_of(fake), *formula)
        if flops is not None:
            count(name, flops)
        if backward is None:
            return
        schema = self._backward_schema(constants)
        self.backward_op = _register(
            f"{name}_backward", schema, self._run_backward, self._fake_backward, _refuse
        )
        if flops_backward is not None:
            count(f"{name}_backward", partial(self._flops_backward, flops_backward))
        self._function = self._transformable()

    # Calls

    def __call__(
        self, tensors: Tensors, constants: tuple[Any, ...], dtype: torch.dtype | None = None
    ) -> Any:
        """The outputs, in a tuple if there are several; inputs are cast to ``dtype`` before."""
        n = self.inputs
        refuse_tangents(*tensors[:n])
        if observed(*tensors):
            return self._observed(self.cast(tensors, dtype), constants)
        if self.backward is not None and needs_grad(*tensors[:n]):
            outputs = Call(self, constants, dtype, True, repeats=False).run(*tensors)
        else:
            with device_of(tensors[0]):  # type: ignore[arg-type]
                outputs = self.forward(*self.cast(tensors, dtype), *constants)
        return outputs if len(self.outputs) > 1 else outputs[0]

    def cast(self, tensors: Tensors, dtype: torch.dtype | None) -> Tensors:
        """The tensors, with those that may have a gradient in ``dtype``; None: as they are."""
        n = self.inputs
        return tensors if dtype is None else (*in_dtype(dtype, *tensors[:n]), *tensors[n:])

    def _observed(self, tensors: Tensors, constants: tuple[Any, ...]) -> Any:
        """Through the registered operator, under the transforms of ``torch.func`` too."""
        if not torch.compiler.is_compiling():
            count_all()
        if self.backward is not None and transformed():
            transforms = internals.active_transforms()
            if transforms and transforms[-1] != "Functionalize":
                return self._function.apply(*tensors, *constants)
        return self.op(*tensors, *constants)

    def _run(self, *args: Any) -> Any:
        n = len(self.tensors)
        return self._as_returned(args[0], self._repeated(args[:n], args[n:]))

    def _as_returned(self, like: Tensor, outputs: Results) -> Any:
        """As the registered operator returns them: what is absent has size 0."""
        present = tuple(like.new_empty(0) if t is None else t for t in outputs)
        return present if len(present) > 1 else present[0]

    # Gradients

    def differentiated(
        self, tensors: Tensors, needed: Sequence[bool], constants: tuple[Any, ...]
    ) -> Results:
        """The gradients by the operator of the backward, each only if needed.

        ``tensors``: those of the call, the outputs if they are saved, the incoming gradients.
        """
        if not torch.compiler.is_compiling():
            count_all()
        grads = self.backward_op(*tensors, *constants, list(needed))
        grads = grads if self.inputs > 1 else (grads,)
        return tuple(t if need else None for t, need in zip(grads, needed, strict=True))

    def _gradients_of_all(self, *args: Any) -> Results:
        """The backward, of tensors and constants in one row."""
        n, m, k = self._saved_counts()
        tensors, outputs, incoming = args[:n], args[n : n + m], args[n + m : n + m + k]
        needed, dtypes, *constants = args[n + m + k :]
        assert self.backward is not None
        return self.backward(Backward(tensors, outputs, incoming, needed, dtypes), *constants)

    def _run_backward(self, *args: Any) -> Any:
        *rest, needed = args
        count = sum(self._saved_counts())
        dtypes = tuple(None if t is None else t.dtype for t in rest[: self.inputs])
        constants = (tuple(needed), dtypes, *rest[count:])
        grads = self.repeated_backward(rest[:count], constants)
        return self._as_returned(next(t for t in rest if t is not None), grads)

    def _fake_backward(self, *args: Any) -> Any:
        *rest, needed = args
        pairs = zip(rest[: self.inputs], needed, strict=True)
        grads = tuple(gradient_like(t) if need else None for t, need in pairs)
        return self._as_returned(next(t for t in rest if t is not None), grads)

    def _saved_counts(self) -> tuple[int, int, int]:
        """Inputs, outputs and incoming gradients that the backward takes."""
        outputs = len(self.outputs) if self.saves_outputs else 0
        return len(self.tensors), outputs, self.differentiable

    def _save(self, ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        n = len(self.tensors)
        outputs = output if isinstance(output, tuple) else (output,)
        ctx.constants = inputs[n:]  # a tracer's are symbols
        ctx.mark_non_differentiable(*outputs[self.differentiable :])
        ctx.set_materialize_grads(False)  # else backward gets zeros as large as the outputs
        ctx.save_for_backward(*self.saved(inputs[:n]), *(outputs if self.saves_outputs else ()))

    def _formula(self, ctx: Any, *incoming: Tensor | None) -> Results:
        needed = ctx.needs_input_grad[: self.inputs]
        tensors = (*ctx.saved_tensors, *incoming[: self.differentiable])
        grads = self.differentiated(tensors, needed, ctx.constants)
        return (*grads, *[None] * (len(ctx.needs_input_grad) - len(grads)))

    def _transformable(self) -> Any:
        """The Function that ``torch.func`` differentiates."""

        def backward(ctx: Any, *incoming: Any) -> Any:
            transforms = internals.active_transforms() if transformed() else []
            if not transforms:
                return self._formula(ctx, *incoming)
            # No formula of a backward is recorded here, so another level would get no gradient.
            if sum(name != "Vmap" for name in transforms) > 1:
                _refuse(ctx)
            with torch.no_grad():
                return self._formula(ctx, *incoming)

        def vmap(info: Any, in_dims: Any, *args: Any) -> Any:
            return each_slice(self._function.apply, info, in_dims, *args)

        methods: dict[str, Callable[..., Any]]
        methods = {"forward": lambda *args: self.op(*args), "setup_context": self._save}
        methods |= {"backward": backward, "vmap": vmap}
        static = {name: staticmethod(method) for name, method in methods.items()}
        return type(self.name, (Function,), static)

    # Registration

    def _schema(self, constants: str) -> str:
        arguments = ", ".join((*map(_argument, self.tensors), *([constants] if constants else [])))
        return f"({arguments}) -> ({', '.join(f'Tensor {name}' for name in self.outputs)})"

    def _backward_schema(self, constants: str) -> str:
        saved = [f"Tensor {name}" for name in self.outputs] if self.saves_outputs else []
        incoming = [f"Tensor? d_{name}" for name in self.outputs[: self.differentiable]]
        tensors = [*map(_argument, self.tensors), *saved, *incoming]
        arguments = ", ".join((*tensors, *([constants] if constants else []), "bool[] needed"))
        return f"({arguments}) -> ({', '.join(['Tensor'] * self.inputs)})"

    def _fake_of(self, fake: Callable[..., Results]) -> Callable[..., Any]:
        return lambda *args: self._as_returned(args[0], fake(*args))

    def _flops_backward(self, formula: Callable[..., int], *args: Any, **_: Any) -> int:
        *constants, needed = args[sum(self._saved_counts()) :]
        return formula(args[: len(self.tensors)], needed, *constants)


@dataclass(eq=False)
class Call:
    """Eager calls of an operator with the same constants, on tensors of the same layouts.

    Attributes:
        operator: what is called.
        constants: its arguments after the tensors.
        dtype: what its differentiable inputs are cast to; None: nothing.
        recorded: whether autograd records it.
        wanted: how many of the outputs are wanted; None: all.
        repeats: whether to remember the launches of the first call for the later ones.
        run: takes the operator's tensors (None may be left out behind the last one) and returns a
            tuple of outputs, in which those that nobody wants may be missing.
    """

    operator: Operator
    constants: tuple[Any, ...]
    dtype: torch.dtype | None
    recorded: bool
    wanted: int | None = None
    repeats: bool = True
    tape: Tape | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        """Nothing has run yet."""
        self.wanted = None if self.recorded else self.wanted
        self.run: Callable[..., Results] = partial(_Eager.apply, self) if self.recorded else self

    def __call__(self, *tensors: Tensor | None) -> Results:
        """Launch on the operator's tensors, which are cast before."""
        return self.launch(self.operator.cast(tensors, self.dtype))

    def launch(self, tensors: Tensors) -> Results:
        """Launch on tensors as they are."""
        if self.tape is not None:
            return self.tape(*tensors)
        tensors = (*tensors, *[None] * (len(self.operator.tensors) - len(tensors)))
        with device_of(tensors[0]):  # type: ignore[arg-type]
            if not self.repeats:
                return self.operator.forward(*tensors, *self.constants)
            outputs, self.tape = record(self.operator.forward, tensors, self.constants, self.wanted)
        self.repeats = self.tape is not None
        if self.tape is not None and self.dtype is None and not self.recorded:
            self.run = self.tape
        return outputs


class _Eager(Function):
    """Autograd of an eager call."""

    @staticmethod
    def forward(ctx: Any, call: Call, *tensors: Tensor | None) -> Results:
        operator, n = call.operator, call.operator.inputs
        ctx.dtypes = tuple(None if t is None else t.dtype for t in tensors[:n])
        ctx.call, ctx.count = call, len(tensors)
        operands = tensors if call.dtype is None else operator.cast(tensors, call.dtype)
        outputs = call.tape(*operands) if call.tape is not None else call.launch(operands)
        ctx.mark_non_differentiable(*outputs[operator.differentiable :])
        ctx.set_materialize_grads(False)  # else backward gets zeros as large as the outputs
        saved = operator.saved(operands)
        ctx.save_for_backward(*saved, *(outputs if operator.saves_outputs else ()))
        return outputs

    @staticmethod
    def backward(ctx: Any, *incoming: Tensor | None) -> Results:
        call, count, dtypes = ctx.call, ctx.count, ctx.dtypes
        operator, constants, n = call.operator, call.constants, call.operator.inputs
        saved, needed = ctx.saved_tensors, ctx.needs_input_grad[1 : n + 1]
        absent = (None,) * (len(operator.tensors) - count)  # tensors that were left out
        tensors = (*saved[:count], *absent, *saved[count:], *incoming[: operator.differentiable])
        if torch.is_grad_enabled() or observed(*incoming):
            grads = operator.differentiated(tensors, needed, constants)
        else:
            grads = operator.repeated_backward(tensors, (needed, dtypes, *constants))
        grads = tuple(
            t if t is None or t.dtype is dtype else t.to(dtype)
            for t, dtype in zip(grads, dtypes, strict=True)
        )
        return (None, *grads, *[None] * (count - n))


def gradient_like(t: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Memory for a gradient of ``t``: contiguous, or transposed where a matrix is."""
    dtype = t.dtype if dtype is None else dtype
    if is_transposed(t):
        return t.new_empty(t.shape[::-1], dtype=dtype).mT
    return t.new_empty(t.shape, dtype=dtype)


def is_transposed(t: Tensor) -> bool:
    """Whether a matrix lies in memory by columns, as ``nn.Linear``'s weight does for ``x @ W``."""
    return t.dim() == 2 and t.stride(1) != 1 and t.stride(0) == 1


def refuse_tangents(*tensors: Tensor | None) -> None:
    """Forward-mode differentiation would lose its tangents in the kernels: raise instead."""
    if torch.compiler.is_compiling() or not internals.forward_mode():
        return
    if any(t is not None and forward_ad.unpack_dual(t).tangent is not None for t in tensors):
        raise NotImplementedError(
            "backend='triton': the kernels have no forward-mode derivative; use reverse mode"
        )


def each_slice(function: Callable[..., Any], info: Any, in_dims: Any, *args: Any) -> Any:
    """The rule of ``vmap``: ``function`` of each slice, and the results as one."""
    if info.batch_size == 0:
        raise NotImplementedError("backend='triton': no vmap over a dim of size 0")
    outs = [
        function(
            *(
                arg.select(dim, i) if isinstance(dim, int) else arg
                for arg, dim in zip(args, in_dims, strict=True)
            )
        )
        for i in range(info.batch_size)
    ]
    if isinstance(outs[0], Tensor):
        return torch.stack(outs), 0
    stacked = tuple(torch.stack(parts) for parts in zip(*outs, strict=True))
    return stacked, (0,) * len(stacked)


def _register(
    name: str,
    schema: str,
    run: Callable[..., Any],
    fake: Callable[..., Any],
    formula: Callable[..., Any] | None = None,
    save: Callable[..., None] | None = None,
) -> Any:
    """The operator of this name; ``formula`` of its gradient, after ``save``."""
    qualified, library = f"{NAMESPACE}::{name}", internals.library_of(NAMESPACE, name)
    library.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
    library.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(qualified, fake, lib=library)
    if formula is not None:
        torch.library.register_autograd(qualified, formula, setup_context=save, lib=library)
    op = getattr(getattr(torch.ops, NAMESPACE), name).default
    torch.library.register_vmap(qualified, partial(each_slice, op), lib=library)
    _libraries.append(library)
    return op


def _refuse(ctx: Any, *_: Any) -> Results:
    raise RuntimeError("the Triton kernels cannot differentiate twice; use backend='sdpa'")


def _argument(name: str) -> str:
    """``"bias?"`` as a schema has it."""
    return f"Tensor? {name[:-1]}" if name.endswith("?") else f"Tensor {name}"
