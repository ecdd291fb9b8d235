"""Who owns which parameter, where each has one owner among n ranks. Plain arithmetic, no torch.

Two rules, the same on every rank, for two kinds of traffic:

    owners_by_shape   evens the count of each shape    parallel/zero.py
                      Owners send by broadcasts and reduces, which take all ranks the same time
                      whoever owns what. What an owner alone does is the optimizer's work, and that
                      of Muon is Newton-Schulz on matrices: each rank gets as many of a shape.

    owners_by_size    evens the elements               parallel/owners.py
                      An all-to-all between shards and owners takes as long as the owner with most
                      elements: who has a large embedding gets fewer matrices, or none.

memory/estimate.py and memory/plan.py ask the first, for thousands of ranks too; so a heap finds the
rank that has least.
"""

import heapq
import math


def owners_by_shape(shapes: dict[str, tuple[int, ...]], n: int) -> dict[str, int]:
    """{parameter name: its owner among n ranks}.

    Shape by shape, the shape with most elements in all first: each parameter goes to the rank with
    fewest of its shape, and among those to the one with fewest elements so far. So all ranks
    orthogonalise the same matrices, give or take one of each shape, and what is left over goes to
    ranks without an embedding.
    """
    alike, owners, load = {}, {}, [0] * n
    for name, shape in shapes.items():
        alike.setdefault(tuple(shape), []).append(name)
    for shape, names in sorted(
        alike.items(), key=lambda item: (-math.prod(item[0]) * len(item[1]), item[0])
    ):
        # (how many of this shape, elements of all shapes so far, rank)
        heap = [(0, load[rank], rank) for rank in range(n)]
        heapq.heapify(heap)
        for name in names:
            have, elements, rank = heap[0]
            owners[name], load[rank] = rank, elements + math.prod(shape)
            heapq.heapreplace(heap, (have + 1, load[rank], rank))
    return owners


def owners_by_size(shapes: list[tuple[int, ...]], n: int) -> list[int]:
    """The owner of each: largest first, to the rank that has fewest elements; so matrices of one
    shape go round all ranks."""
    owners, heap = [0] * len(shapes), [(0, rank) for rank in range(n)]
    for i in sorted(range(len(shapes)), key=lambda i: (-math.prod(shapes[i]), shapes[i])):
        elements, rank = heap[0]
        owners[i] = rank
        heapq.heapreplace(heap, (elements + math.prod(shapes[i]), rank))
    return owners
