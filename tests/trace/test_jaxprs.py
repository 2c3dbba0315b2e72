"""The one module that looks inside traced programs."""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import io_callback
from jax.sharding import NamedSharding, PartitionSpec

from pdjax.trace import dataflow, inline, jaxprs


def test_flattening_inlines_nested_jit_and_keeps_the_meaning():
    table = jnp.arange(3.0)

    @jax.jit
    def inner(x):
        return jax.jit(jnp.sin)(x) + table

    def function(x, y):
        with jax.named_scope("outer"):
            z = inner(x)
        return inner(z) * y, x

    x, y = jnp.array([1.0, 2.0, 3.0]), jnp.float32(2.0)
    program, tree = inline.trace(function, x, y)
    assert "jit" not in {equation.primitive.name for equation in program.equations}
    assert program.paths[0] == "outer"
    run = jaxprs.as_function(
        [*program.invars, *program.constvars], program.equations, program.outvars
    )
    chex.assert_trees_all_close(
        jax.tree.unflatten(tree, run(x, y, *program.consts)), function(x, y)
    )


def test_the_same_function_inlined_twice_has_variables_of_its_own():
    twice, _ = inline.trace(lambda x: jnp.where(jnp.where(x > 0, x, 0) > 1, x, 1), jnp.ones(3))
    made = [var for equation in twice.equations for var in equation.outvars]
    assert len(made) == len(set(made))


def test_branches_become_selections():
    def function(flag, x, y):
        return jax.lax.cond(flag, lambda x, y: (x + 1, y), lambda x, y: (x, 2 * y), x, y)

    arguments = (jnp.array(True), jnp.ones(2), jnp.ones(3))
    program, _ = inline.trace(function, *arguments, branches_as_selects=True)
    first = dataflow.needed(program.equations, program.outvars[:1])
    read = dataflow.free_variables([program.equations[i] for i in first], program.outvars[:1])
    assert program.invars[2] not in read, "the first result does not depend on y"
    run = jaxprs.as_function(program.invars, program.equations, program.outvars)
    for flag in (True, False):
        chex.assert_trees_all_close(
            run(jnp.array(flag), *arguments[1:]), list(function(flag, *arguments[1:]))
        )


def test_needed_stops_at_what_is_given():
    program, _ = inline.trace(lambda x: jnp.exp(jnp.sin(jnp.cos(x))), 1.0)
    sine = program.equations[1].outvars[0]
    assert dataflow.needed(program.equations, program.outvars) == [0, 1, 2]
    assert dataflow.needed(program.equations, program.outvars, [sine]) == [2]
    assert dataflow.needed(program.equations, [sine], [sine]) == []


def test_fingerprints_see_everything_but_names():
    def equations(function, *shapes):
        arguments = [jnp.zeros(shape) for shape in shapes]
        return inline.trace(function, *arguments)[0].equations

    def dense(x, w):
        return jnp.tanh(x @ w)

    same = jaxprs.fingerprint(equations(dense, (2, 3), (3, 4)))
    assert same == jaxprs.fingerprint(equations(lambda a, b: jnp.tanh(a @ b), (2, 3), (3, 4)))
    assert same != jaxprs.fingerprint(equations(dense, (2, 3), (3, 5)))
    assert same != jaxprs.fingerprint(equations(lambda x, w: jnp.sin(x @ w), (2, 3), (3, 4)))
    assert same != jaxprs.fingerprint(equations(lambda x, w: jnp.tanh(2 * x @ w), (2, 3), (3, 4)))


def only(function, *arguments):
    return inline.trace(function, *arguments)[0].equations[0]


def test_sizes_and_kinds_of_values():
    def function(x, key):
        return x > 0, jax.random.fold_in(key, 1)

    program, _ = inline.trace(function, jnp.zeros((2, 3), jnp.bfloat16), jax.random.key(0))
    x, key = program.invars
    assert (jaxprs.num_elements(x), jaxprs.num_bytes(x)) == (6, 12)
    assert jaxprs.num_bytes(key) == 8
    assert [jaxprs.is_inexact(a) for a in (x, key, *program.outvars)] == [True, False, False, False]


@pytest.mark.parametrize(
    ("function", "heavy", "cheap", "effects"),
    [
        (lambda x: x @ x, True, False, False),
        (lambda x: x + 1, False, True, False),
        (lambda x: jnp.exp(x), False, False, False),
        (lambda x: jax.nn.relu(x), False, True, False),
        (lambda x: jax.lax.scan(lambda c, _: (c * 2, None), x, length=3)[0], True, False, False),
        (lambda x: jax.debug.print("{}", x), False, False, True),
        (lambda x: jax.pure_callback(np.sin, x, x), False, False, True),
        (lambda x: jax.checkpoint(lambda y: y @ y)(x), True, False, False),
    ],
)
def test_kinds_of_equations(function, heavy, cheap, effects):
    equation = only(function, jnp.ones((2, 2)))
    assert jaxprs.is_heavy(equation) is heavy
    assert jaxprs.is_cheap(equation) is cheap
    assert jaxprs.has_effects(equation) is effects


def ordered_print(x):
    jax.debug.print("{}", x, ordered=True)


def ordered_callback(x):
    io_callback(lambda v: None, None, x, ordered=True)


def reference(x):
    ref = jax.new_ref(x)
    ref[...] += 1
    return ref[...]


def inside_scan(x):
    return jax.lax.scan(lambda c, _: (ordered_print(c), (c, None))[1], x, length=2)


def constraint(x):
    mesh = jax.make_mesh((1,), ("a",), axis_types=(jax.sharding.AxisType.Auto,))
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec("a")))


def sharded_jit(x):
    mesh = jax.make_mesh((1,), ("a",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = NamedSharding(mesh, PartitionSpec("a"))
    return jax.jit(lambda y: y + 1, in_shardings=sharding)(x)


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (ordered_print, "an ordered side effect"),
        (ordered_callback, "an ordered side effect"),
        (reference, "a mutable array"),
        (inside_scan, "an ordered side effect"),
        (constraint, "a sharding annotation"),
        (sharded_jit, "a nested jax.jit with explicit shardings"),
    ],
)
def test_what_cannot_be_cut(function, reason):
    program, _ = inline.trace(function, jnp.ones(3))
    reasons = [jaxprs.unsupported(equation) for equation in program.equations]
    assert any(found and found.startswith(reason) for found in reasons)


def test_what_can_be_cut():
    def function(x):
        jax.debug.print("{}", x)
        return jax.jit(jnp.sin)(jax.checkpoint(jnp.cos)(x))

    program, _ = inline.trace(function, jnp.ones(3))
    assert not any(map(jaxprs.unsupported, program.equations))


@pytest.mark.parametrize(
    ("function", "path"),
    [
        (jnp.sin, "a/b"),
        (jax.vmap(jnp.sin), "a/b"),
        (lambda x: jax.jit(jnp.sin)(x), "a/b"),
    ],
)
def test_scope_paths_have_no_transformations(function, path):
    def scoped(x):
        with jax.named_scope("a"), jax.named_scope("b"):
            return function(x)

    assert inline.trace(scoped, jnp.ones(3))[0].paths == (path,)
    assert inline.trace(jax.vmap(scoped), jnp.ones((2, 3)))[0].paths == (path,)
