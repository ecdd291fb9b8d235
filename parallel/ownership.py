"""Which of n ranks owns which parameter: plain arithmetic, no torch.

Every rank computes the same answer. There are two rules, for two kinds of traffic:

    owners_by_shape   balances the count of each shape       parallel/zero.py
                      Broadcasts and reduces take all ranks the same time, whoever owns what. So
                      only the optimizer's work is balanced. Muon's work is Newton-Schulz on each
                      matrix: every rank gets as many matrices of a shape as any other.

    owners_by_size    balances the number of elements        parallel/owners.py
                      An all-to-all between shards and owners takes as long as the owner with the
                      most elements. So a rank with a large embedding gets fewer matrices, or none.

memory/estimate.py and memory/plan.py call the first rule for thousands of ranks, so a heap finds
the rank with the least load.
"""

import heapq
import math


def owners_by_shape(shapes: dict[str, tuple[int, ...]], n: int) -> dict[str, int]:
    """The owner of each parameter, by name, among n ranks: as many of each shape on every rank.

    The shape with the most elements in sum comes first. A parameter goes to the rank with the
    fewest of its shape, and among these to the one with the fewest elements so far. So all ranks
    orthogonalise the same matrices, give or take one of each shape, and the remainder goes to ranks
    without an embedding.
    """
    names_of = {}  # shape -> names
    for name, shape in shapes.items():
        names_of.setdefault(tuple(shape), []).append(name)

    def largest_first(shape: tuple[int, ...]) -> tuple:
        # Equal sums are ordered by shape, so that every rank has the same order.
        return -math.prod(shape) * len(names_of[shape]), shape

    owners = {}
    n_elements = [0] * n  # of each rank, all shapes so far
    for shape in sorted(names_of, key=largest_first):
        # (how many of this shape, elements, rank): equal counts go to the rank with the fewest
        # elements, then to the lower rank.
        heap = [(0, n_elements[rank], rank) for rank in range(n)]
        heapq.heapify(heap)
        for name in names_of[shape]:
            count, _, rank = heap[0]
            owners[name] = rank
            n_elements[rank] += math.prod(shape)
            heapq.heapreplace(heap, (count + 1, n_elements[rank], rank))
    return owners


def owners_by_size(shapes: list[tuple[int, ...]], n: int) -> list[int]:
    """The owner of each parameter among n ranks: about as many elements on every rank.

    The largest parameter comes first, and each goes to the rank with the fewest elements so far. So
    matrices of one shape go round all ranks.
    """

    def largest_first(i: int) -> tuple:
        return -math.prod(shapes[i]), shapes[i]

    owners = [0] * len(shapes)
    # Equal loads go to the lower rank. A list in order is a heap already.
    heap = [(0, rank) for rank in range(n)]  # (elements, rank)
    for i in sorted(range(len(shapes)), key=largest_first):
        elements, rank = heap[0]
        owners[i] = rank
        heapq.heapreplace(heap, (elements + math.prod(shapes[i]), rank))
    return owners
