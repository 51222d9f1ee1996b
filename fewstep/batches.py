"""Parts of batches, with all that belongs to their samples."""

from __future__ import annotations

from torch import Tensor

from fewstep.contracts import Batch


def rows_of(batch: Batch, rows: slice | list[int]) -> Batch:
    """Some of a batch's samples with their conditions, keys and pictures.

    Args:
        batch: whose ``images``, where it has any, are equally many a sample.
        rows: which samples: a range without a step, or their numbers, of which any may be there
            more than once.
    """
    numbers = range(len(batch["sample"]))[rows] if isinstance(rows, slice) else rows
    part: Batch = {
        "sample": batch["sample"][rows],
        "cond": {name: value[rows] for name, value in batch["cond"].items()},
        "key": [batch["key"][number] for number in numbers],
    }
    if "prompt" in batch:
        part["prompt"] = [batch["prompt"][number] for number in numbers]
    if "pixels" in batch:
        part["pixels"] = batch["pixels"][rows]
    if "generated" in batch:
        part["generated"] = [batch["generated"][number] for number in numbers]
    if "images" in batch:
        each = len(batch["images"]["sample"]) // len(batch["sample"])
        theirs: slice | list[int]
        if isinstance(numbers, range):
            theirs = slice(each * numbers.start, each * numbers.stop)
        else:
            theirs = [each * number + one for number in numbers for one in range(each)]
        part["images"] = rows_of(batch["images"], theirs)
    return part


def in_shape_of(batch: Batch, size: int) -> Batch:
    """A batch of another size, whose values mean nothing, with as many images a sample."""
    other: Batch = {**batch, "sample": _repeated(batch["sample"], size)}
    if "images" in batch:
        each = len(batch["images"]["sample"]) // len(batch["sample"])
        other["images"] = in_shape_of(batch["images"], each * size)
    return other


def _repeated(values: Tensor, size: int) -> Tensor:
    return values[:1].expand(size, *values.shape[1:])
