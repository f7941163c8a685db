"""Many blocks as one: their weights stacked, compiled once, and computed again to save memory."""

from collections.abc import Callable
from typing import Any, Literal, TypeVar

import jax
from flax import nnx

Block = TypeVar("Block", bound=nnx.Module)
Carry = TypeVar("Carry")
Result = TypeVar("Result")

# What of a block is computed again in the backward pass instead of being kept: nothing; all but the
# products with weights; everything.
Rematerialise = Literal["none", "dots", "full"]
POLICIES = {
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}


def stacked(kind: Callable[..., Block], count: int, config: Any, rngs: nnx.Rngs) -> Block:
    """Return ``count`` blocks as one module whose weights have a leading axis for them."""

    @nnx.split_rngs(splits=count)
    @nnx.vmap
    def make(rngs: nnx.Rngs) -> Block:
        return kind(config, rngs)

    blocks: Block = make(rngs)
    return blocks


def scan_blocks(
    apply: Callable[..., tuple[Carry, Result]],
    carry: Carry,
    blocks: nnx.Module,
    xs: tuple[Any, ...],
    rematerialise: Rematerialise,
) -> tuple[Carry, Result]:
    """Call ``apply(carry, block, *xs)`` for one of the stacked ``blocks`` after the other.

    ``xs`` have a leading axis, too. Returns the last carry, and the results, stacked.
    """
    graphdef, weights = nnx.split(blocks)

    def step(carry: Carry, each: tuple[Any, ...]) -> tuple[Carry, Result]:
        weights, *xs = each
        return apply(carry, nnx.merge(graphdef, weights), *xs)

    last: tuple[Carry, Result]
    last = jax.lax.scan(recomputed(step, rematerialise), carry, (weights, *xs))
    return last


def recomputed(f: Callable[..., Result], rematerialise: Rematerialise) -> Callable[..., Result]:
    """Return ``f``, of whose inner values the backward pass computes again what is named."""
    if rematerialise == "none":
        return f
    again: Callable[..., Result] = jax.checkpoint(f, policy=POLICIES[rematerialise])
    return again
