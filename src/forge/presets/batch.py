"""Micro-batch x accumulation x world size = effective batch: change one and the other follows."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import ConflictError


@dataclass(frozen=True)
class Batch:
    """Sequences per optimizer step, and how they are cut up.

    Args:
        effective: sequences per optimizer step, over all processes.
        micro: sequences per forward pass of one process (`per_device_train_batch_size`).
        accumulation: forward passes per optimizer step (`gradient_accumulation_steps`).
        world_size: processes that share the step.
    """

    effective: int
    micro: int
    accumulation: int
    world_size: int

    def __str__(self) -> str:
        return f"{self.micro} x {self.accumulation} x {self.world_size} = {self.effective}"


def resolve_batch(
    *,
    effective: int | None,
    micro: int | None,
    accumulation: int | None,
    world_size: int,
    preferred: tuple[int, int],
) -> Batch:
    """Fill in what was not said, so that the product is the effective batch.

    >>> str(resolve_batch(effective=None, micro=2, accumulation=None, world_size=1, preferred=(16, 4)))
    '2 x 8 x 1 = 16'
    >>> str(resolve_batch(effective=None, micro=None, accumulation=None, world_size=8, preferred=(16, 4)))
    '2 x 1 x 8 = 16'

    Args:
        effective: The effective batch, None when not said.
        micro: The micro-batch, None when not said.
        accumulation: The accumulation steps, None when not said.
        world_size: Processes that share a step.
        preferred: The recipe's effective batch and its micro-batch.

    Raises:
        ConflictError: No whole numbers have that product.
    """
    said = {"per_device_train_batch_size": micro, "gradient_accumulation_steps": accumulation}
    for name, value in {**said, "effective_batch_size": effective, "world_size": world_size}.items():
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
            raise ConflictError(f"{name}={value!r}: it must be a whole number of at least 1.")
    if micro and accumulation:
        product = micro * accumulation * world_size
        if effective not in (None, product):
            raise ConflictError(
                f"per_device_train_batch_size={micro} x gradient_accumulation_steps={accumulation} x world_size="
                f"{world_size} is {product}, not effective_batch_size={effective}. Leave one of them out; it follows."
            )
        return Batch(product, micro, accumulation, world_size)
    target = effective or preferred[0]
    share, rest = divmod(target, world_size)
    if rest or not share:
        raise ConflictError(
            f"effective_batch_size={target} cannot be split over world_size={world_size}. "
            f"Set effective_batch_size={max(1, round(target / world_size)) * world_size}."
        )
    if not micro and not accumulation:
        micro = max(size for size in range(1, min(preferred[1], share) + 1) if share % size == 0)
    name, given = next((name, value) for name, value in {**said, "per_device_train_batch_size": micro}.items() if value)
    if share % given:
        nearest = max(1, round(share / given)) * given * world_size
        raise ConflictError(
            f"{name}={given} x world_size={world_size} does not divide effective_batch_size={target}. "
            f"Set effective_batch_size={nearest}, or {name} to one of {_divisors(share)}."
        )
    other = share // given
    return Batch(target, *((given, other) if micro else (other, given)), world_size)


def _divisors(number: int) -> list[int]:
    return [size for size in range(1, number + 1) if number % size == 0]
