"""Reading, cutting and re-running traced programs.

Everything that pdjax knows about the inside of a jaxpr is here, and uses the public
`jax.extend.core` only. A traced program is flattened once (`flatten`): nested `jit` equations are
inlined, so that a cut may fall between any two of the primitive operations, and every value gets a
variable of its own. From then on the rest of pdjax works with lists of equations: it asks which
of them a value needs (`needed`), and turns a list back into a function (`as_function`).
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core as jex
from jax.extend.core import primitives

from pdjax.trees import is_key

Var = jex.Var
Atom = jex.Var | jex.Literal
Equation = jex.JaxprEqn

_INLINED = frozenset({"jit", "pjit", "closed_call", "core_call"})
_REMATERIALISED = frozenset({"checkpoint", "remat", "remat2"})
_HEAVY = frozenset({"dot_general", "conv_general_dilated", "ragged_dot_general", "scan", "while"})
_CHEAP = frozenset(
    """
    abs add and broadcast_in_dim ceil clamp concatenate convert_element_type copy copy_p div eq
    expand_dims floor ge gt integer_pow iota is_finite le lt max min mul ne neg not
    one_minus_square or pad reduce_precision reshape rev round rsqrt select_n sign slice sqrt
    square squeeze stop_gradient sub transpose xor
    """.split()
)
_WITHOUT_DERIVATIVE = frozenset({"ceil", "floor", "nextafter", "round", "sign", "stop_gradient"})
_WRAPPERS = frozenset({"custom_jvp_call", "jit", "pjit", "cond"})
_SHARDED = frozenset({"sharding_constraint", "reshard", "mesh_cast", "shard_map", "xla_pmap"})


@dataclass(frozen=True, eq=False)
class FlatProgram:
    """A traced function without nested `jit`.

    Attributes:
        invars: one variable for each flat input.
        constvars: one variable for each array that the function closed over.
        consts: the values of `constvars`.
        equations: the equations, in program order.
        paths: for each equation the named scopes that it was traced in, such as
            ``"block_0/Dense_1"``; empty where there were none.
        outvars: one variable or literal for each flat output.
    """

    invars: tuple[Var, ...]
    constvars: tuple[Var, ...]
    consts: tuple[Any, ...]
    equations: tuple[Equation, ...]
    paths: tuple[str, ...]
    outvars: tuple[Atom, ...]


class _Inliner:
    """Copies a jaxpr equation by equation, with fresh variables, descending into nested ones."""

    def __init__(
        self, branches_as_selects: bool = False, inlined: frozenset[str] = _INLINED
    ) -> None:
        self.branches_as_selects = branches_as_selects
        self.inlined = inlined
        self.equations: list[Equation] = []
        self.paths: list[str] = []
        self.consts: dict[int, tuple[Var, Any]] = {}

    def run(self, closed: jex.ClosedJaxpr, inputs: Sequence[Atom], scope: str) -> list[Atom]:
        jaxpr = closed.jaxpr
        env: dict[Var, Atom] = dict(zip(jaxpr.invars, inputs, strict=True))
        for var, value in zip(jaxpr.constvars, closed.consts, strict=True):
            env[var] = self.consts.setdefault(id(value), (fresh(var.aval), value))[0]

        def read(atom: Atom) -> Atom:
            return atom if isinstance(atom, jex.Literal) else env[atom]

        for equation in jaxpr.eqns:
            arguments = [read(atom) for atom in equation.invars]
            path = _join(scope, scope_path(equation))
            if equation.primitive.name in self.inlined and not _has_shardings(equation):
                results = self.run(_called(equation), arguments, path)
            elif equation.primitive.name == "cond" and self.branches_as_selects:
                results = self._select(equation, arguments, path)
            else:
                results = [fresh(var.aval) for var in equation.outvars]
                self.equations.append(equation.replace(invars=arguments, outvars=results))
                self.paths.append(path)
            env.update(zip(equation.outvars, results, strict=True))
        return [read(atom) for atom in jaxpr.outvars]

    def _select(self, equation: Equation, arguments: list[Atom], path: str) -> list[Atom]:
        """Runs every branch of a cond and selects among their results."""
        index, *operands = arguments
        branches = [self.run(closed, operands, path) for closed in equation.params["branches"]]
        results = [fresh(var.aval) for var in equation.outvars]
        for result, *cases in zip(results, *branches, strict=True):
            self.equations.append(
                jex.new_jaxpr_eqn(
                    [index, *cases], [result], primitives.select_n_p, {}, jex.no_effects
                )
            )
            self.paths.append(path)
        return list(results)


def flatten(closed: jex.ClosedJaxpr, *, branches_as_selects: bool = False) -> FlatProgram:
    """Inlines the nested `jit` equations of `closed` and renames every variable apart.

    With `branches_as_selects`, a `cond` becomes all of its branches and a selection, so that each
    of its results depends on no more than it must.
    """
    inliner = _Inliner(branches_as_selects)
    invars = [fresh(var.aval) for var in closed.jaxpr.invars]
    outvars = inliner.run(closed, invars, "")
    constvars, consts = zip(*inliner.consts.values(), strict=True) if inliner.consts else ((), ())
    return FlatProgram(
        tuple(invars),
        constvars,
        consts,
        tuple(inliner.equations),
        tuple(inliner.paths),
        tuple(outvars),
    )


def inline(
    equations: Sequence[Equation], outvars: Sequence[Atom]
) -> tuple[tuple[Equation, ...], list[Atom]]:
    """Inlines nested `jit` and `jax.checkpoint`; loops and branches stay one equation each.

    Args:
        equations: a program.
        outvars: values that are wanted of it.

    Returns:
        An equal program that reads the same variables and makes others, and what `outvars` are
        called there.
    """
    reads = free_variables(equations, outvars)
    inliner = _Inliner(inlined=_INLINED | _REMATERIALISED)
    names = inliner.run(_closed(reads, equations, outvars), reads, "")
    return _baked(inliner.equations, names, dict(inliner.consts.values()))


def bake(program: FlatProgram) -> FlatProgram:
    """The same program with the arrays that it closed over as literals of its equations."""
    constants = dict(zip(program.constvars, program.consts, strict=True))
    equations, outvars = _baked(program.equations, program.outvars, constants)
    return replace(program, constvars=(), consts=(), equations=equations, outvars=tuple(outvars))


def _baked(
    equations: Sequence[Equation], outvars: Sequence[Atom], constants: Mapping[Var, Any]
) -> tuple[tuple[Equation, ...], list[Atom]]:
    names: dict[Var, Atom] = {
        var: jex.Literal(value, aval(var)) for var, value in constants.items()
    }
    return tuple(renamed(equation, names) for equation in equations), _read(outvars, names)


def _read(atoms: Sequence[Atom], names: Mapping[Var, Atom]) -> list[Any]:
    """What `atoms` are called."""
    return [names.get(atom, atom) if isinstance(atom, jex.Var) else atom for atom in atoms]


def merge(
    equations: Sequence[Equation], outvars: Sequence[Atom]
) -> tuple[tuple[Equation, ...], list[Atom]]:
    """Runs equations that are equal once; returns what `inline` does.

    Those that are equal but for nested programs of their own stay apart.
    """
    names: dict[Var, Atom] = {}
    known: dict[Any, list[Equation]] = {}
    for equation in equations:
        new = renamed(equation, names)
        alike = known.setdefault((new.primitive, *map(_identity, new.invars)), [])
        twin = next((old for old in alike if _equal_parameters(old, new)), None)
        if twin is None or has_effects(new):
            alike.append(new)
        else:
            names |= zip(new.outvars, twin.outvars, strict=True)
    kept = (renamed(e, names) for e in equations if names.keys().isdisjoint(e.outvars))
    return tuple(kept), _read(outvars, names)


def trace(
    function: Callable[..., Any], *args: Any, branches_as_selects: bool = False
) -> tuple[FlatProgram, Any]:
    """Traces `function` at the shapes of `args`; returns the program and its output structure."""
    closed, shapes = jax.make_jaxpr(function, return_shape=True)(*args)
    flat = flatten(closed, branches_as_selects=branches_as_selects)
    return flat, jax.tree.structure(shapes)


def as_function(
    invars: Sequence[Var], equations: Sequence[Equation], outvars: Sequence[Atom]
) -> Callable[..., list[Any]]:
    """The function that runs `equations` on values for `invars` and returns those of `outvars`."""
    return jex.jaxpr_as_fun(_closed(invars, equations, outvars))


def _closed(
    invars: Sequence[Var], equations: Sequence[Equation], outvars: Sequence[Atom]
) -> jex.ClosedJaxpr:
    effects = frozenset().union(*(equation.effects for equation in equations))
    about = jex.DebugInfo("jit", "pdjax_stage", None, None)
    jaxpr = jex.Jaxpr((), list(invars), list(outvars), list(equations), effects, about)
    return jex.ClosedJaxpr(jaxpr, ())


def fresh(aval: Any) -> Var:
    """A new variable of the given abstract value."""
    return jex.Var(aval)


def renamed(equation: Equation, names: Mapping[Var, Atom]) -> Equation:
    """`equation` with other variables in the place of those in `names`."""
    return equation.replace(
        invars=_read(equation.invars, names), outvars=_read(equation.outvars, names)
    )


def aval(atom: Atom) -> Any:
    """The abstract value of `atom`: its shape and dtype."""
    return atom.aval


def variables(atoms: Iterable[Atom]) -> list[Var]:
    """The distinct variables among `atoms`, in order of first appearance."""
    return list(dict.fromkeys(atom for atom in atoms if not isinstance(atom, jex.Literal)))


def needed(
    equations: Sequence[Equation], wanted: Iterable[Atom], given: Iterable[Var] = ()
) -> list[int]:
    """Positions of the equations that `wanted` depends on, in order, stopping at `given`."""
    live = set(variables(wanted)) - set(given)
    stop = set(given)
    kept = []
    for index in range(len(equations) - 1, -1, -1):
        if live.intersection(equations[index].outvars):
            kept.append(index)
            live.update(var for var in variables(equations[index].invars) if var not in stop)
    return kept[::-1]


def free_variables(equations: Sequence[Equation], outvars: Iterable[Atom]) -> list[Var]:
    """The variables that `equations` and `outvars` read and no equation makes."""
    made = {var for equation in equations for var in equation.outvars}
    read = [atom for equation in equations for atom in equation.invars]
    return [var for var in variables([*read, *outvars]) if var not in made]


# ---------------------------------------------------------------- what an equation is


def scope_path(equation: Equation) -> str:
    """The named scopes of an equation, joined by slashes, without `vmap(...)` and the like."""
    text = str(equation.source_info.name_stack)
    while (bare := re.sub(r"\b\w+\(([^()]*)\)", r"\1", text)) != text:
        text = bare
    return "/".join(part for part in text.split("/") if part)


def is_inexact(atom: Atom) -> bool:
    """Whether a value can carry a gradient: real or complex, neither integer, boolean nor key."""
    return bool(jnp.issubdtype(aval(atom).dtype, jnp.inexact))


def num_elements(atom: Atom) -> int:
    """Number of elements of a value."""
    return math.prod(aval(atom).shape)


def num_bytes(atom: Atom) -> int:
    """Size of a value in bytes."""
    shape = shape_of(atom)
    if is_key(shape):
        shape = jax.eval_shape(jax.random.key_data, shape)
    return math.prod(shape.shape) * np.dtype(shape.dtype).itemsize


def shape_of(atom: Atom) -> jax.ShapeDtypeStruct:
    """The shape and dtype of a value."""
    return jax.ShapeDtypeStruct(aval(atom).shape, aval(atom).dtype)


def has_effects(equation: Equation) -> bool:
    """Whether running the equation twice could be seen: callbacks, prints, other effects."""
    return bool(equation.effects) or any(
        "callback" in primitive for primitive in _primitives(equation)
    )


def is_heavy(equation: Equation) -> bool:
    """Whether the equation holds a matrix product, a convolution or a loop."""
    return any(primitive in _HEAVY for primitive in _primitives(equation))


def is_cheap(equation: Equation) -> bool:
    """Whether repeating the equation costs next to nothing: arithmetic and changes of shape.

    Exponentials and their like are left out: they cost more than reading their result back.
    """
    if equation.primitive.name in _WRAPPERS:
        return all(is_cheap(nested) for inner in subprograms(equation) for nested in inner.eqns)
    return equation.primitive.name in _CHEAP


def blocks_gradient(equation: Equation) -> bool:
    """Whether no gradient ever passes: `stop_gradient`, and step functions such as `round`."""
    return equation.primitive.name in _WITHOUT_DERIVATIVE


def subprograms(equation: Equation) -> list[Any]:
    """The jaxprs that an equation carries (the body of a scan, the branches of a cond, …)."""
    return [getattr(inner, "jaxpr", inner) for inner in jex.jaxprs_in_params(equation.params)]


def scan_layout(equation: Equation) -> tuple[int, int]:
    """The numbers of constants and of carried values of a scan; the rest is scanned over.

    The names of a scan's parameters differ between versions of JAX; the shapes tell as well:
    what is scanned over has one axis less inside the loop than outside.
    """
    (body,) = subprograms(equation)

    def same_rank(outer: Sequence[Atom], inner: Sequence[Atom]) -> int:
        return sum(aval(a).ndim == aval(b).ndim for a, b in zip(outer, inner, strict=True))

    num_carry = same_rank(equation.outvars, body.outvars)
    return same_rank(equation.invars, body.invars) - num_carry, num_carry


def unsupported(equation: Equation) -> str | None:
    """Says why pdjax cannot cut a program with this equation, or None if it can."""
    for effect in _effects(equation):
        name = type(effect).__name__
        if "Ordered" in name:
            return f"an ordered side effect ({name})"
        if "Ref" in name or "Read" in name or "Write" in name:
            return "a mutable array (jax.Ref)"
    for primitive in sorted(_primitives(equation)):
        if primitive in _SHARDED:
            return f"a sharding annotation ({primitive})"
    if equation.primitive.name in _INLINED and _has_shardings(equation):
        return "a nested jax.jit with explicit shardings"
    return None


def fingerprint(equations: Sequence[Equation]) -> str:
    """A digest that is equal for runs of equations alike in everything but variable names."""
    numbers: dict[Var, int] = {}

    def name(atom: Atom) -> str:
        if isinstance(atom, jex.Literal):
            return f"{atom.val}"
        return f"v{numbers.setdefault(atom, len(numbers))}:{aval(atom).str_short()}"

    digest = hashlib.sha256()
    for equation in equations:
        params = " ".join(f"{key}={_stable(equation.params[key])}" for key in equation.params)
        reads = " ".join(map(name, equation.invars))
        makes = " ".join(map(name, equation.outvars))
        digest.update(f"{makes} = {equation.primitive.name}[{params}] {reads}\n".encode())
    return digest.hexdigest()[:16]


def _stable(value: Any) -> str:
    """The text of a parameter without memory addresses."""
    return re.sub(r"0x[0-9a-f]+", "", str(value))


def _identity(atom: Atom) -> Any:
    """What is equal for two reads of one value."""
    if not isinstance(atom, jex.Literal):
        return atom
    value = atom.val
    return (aval(atom).str_short(), repr(value) if np.ndim(value) == 0 else id(value))


def _equal_parameters(one: Equation, other: Equation) -> bool:
    try:
        return bool(one.params == other.params)
    except ValueError:  # of arrays
        return False


def _join(outer: str, inner: str) -> str:
    return f"{outer}/{inner}" if outer and inner else outer or inner


def _called(equation: Equation) -> jex.ClosedJaxpr:
    inner: Any = equation.params.get("jaxpr", equation.params.get("call_jaxpr"))
    if hasattr(inner, "consts"):
        return inner
    return jex.ClosedJaxpr(inner, ())


def _has_shardings(equation: Equation) -> bool:
    given = [
        *equation.params.get("in_shardings", ()),
        *equation.params.get("out_shardings", ()),
    ]
    return any(type(sharding).__name__ != "UnspecifiedValue" for sharding in given)


def _primitives(equation: Equation) -> set[str]:
    names = {equation.primitive.name}
    for inner in subprograms(equation):
        for nested in inner.eqns:
            names |= _primitives(nested)
    return names


def _effects(equation: Equation) -> set[Any]:
    effects = set(equation.effects)
    for inner in subprograms(equation):
        for nested in inner.eqns:
            effects |= _effects(nested)
    return effects
