"""Who writes what: from what each rank holds, the plan of a checkpoint.

    rank 0  {"model": {"w": rows 0, 1}, "step": 7} ─┐ merge  tree       {"model": {"w": TENSOR},
    rank 1  {"model": {"w": rows 2, 3}, "step": 7} ─┘ ────►              "step": from rank 0}
                                                             tensors    "model/w": F32, (4, 6),
                                                                        sharding 0
                                                             shardings  0: rows 0, 1 in rank_0,
                                                                           rows 2, 3 in rank_1

What several ranks hold, the lowest of them writes. Every rank has a description of what it holds,
which consists of

    form      its tree without numbers; name, dtype and full shape of its tensors
    boxes     the different boxes of those tensors that it holds
    numbers   for each tensor, which of these boxes

At 16,384 ranks the form is the largest by far, and few ranks have a form that no other has. So rank
0 hears boxes and numbers from every rank, but each form from one rank alone. The values in the tree
that are no tensors change from save to save, and belong to no description: the plan says which rank
brings them.

Nothing here is sent or written. `check` accepts a plan, ours or from a damaged file, only if
`merge` could have made it.
"""

from dataclasses import dataclass, field

from checkpoint import shardings
from checkpoint.slices import (
    DTYPE_NAMES,
    DTYPES,
    LEAVES,
    TENSOR,
    Slice,
    as_json,
    sha256,
    to_json,
    walk,
)

VALUE = {"$": "value"}  # in a form, where the tree has something that is no tensor


@dataclass
class Description:
    """What one rank holds. All but `held` is JSON."""

    tree: dict  # with TENSOR and VALUE for leaves
    tensors: list[list]  # [name, dtype, full shape]
    boxes: list[list]  # [offsets, shape], each but once
    numbers: list[int]  # of the box of each tensor
    values: dict  # name -> what stands where `tree` has VALUE
    held: dict[str, Slice]

    @property
    def form(self) -> list:
        return [self.tree, self.tensors]

    def form_key(self) -> str:
        return sha256(as_json(self.form))

    def digest(self) -> str:
        """Changes if and only if the plan may have to change."""
        return sha256(as_json([self.form, self.boxes, self.numbers]))


@dataclass
class Share:
    """What one rank has to do by the last plan, while its description stays as it was."""

    digest: str | None = None  # of the description that the plan was made from
    writes: list[str] = field(default_factory=list)  # names of tensors
    brings: list[str] = field(default_factory=list)  # names of values
    plan: dict | None = None  # on rank 0

    def take(self, plan: dict, rank: int, digest: str) -> None:
        """Takes up a new plan."""
        # Whatever fails here, a later save must not follow half a plan.
        self.digest = None
        self.writes = written_by(plan, rank)
        self.brings = [name for name, leaf in values_of(plan["tree"]) if leaf["rank"] == rank]
        self.plan = plan if rank == 0 else None
        self.digest = digest


# ---- one rank ------------------------------------------------------------------------------------
def describe(tree: dict) -> Description:
    """What this rank holds. Raises ValueError for a tree that cannot be saved."""
    held = {}
    skeleton = walk(tree, lambda name, leaf: to_json(name, leaf, held))
    values = {}
    form = without_values(skeleton, values)

    tensors = []
    numbers = []
    number_of = {}  # box -> its number
    for name, s in held.items():
        global_shape, offsets = s.shard
        tensors.append([name, DTYPE_NAMES[s.tensor.dtype], list(global_shape)])
        box = tuple(offsets), tuple(s.tensor.shape)
        numbers.append(number_of.setdefault(box, len(number_of)))
    boxes = [[list(offsets), list(shape)] for offsets, shape in number_of]
    return Description(form, tensors, boxes, numbers, values, held)


def without_values(node, values: dict, name: str = ""):
    """The tree's form. What it leaves out goes into `values`, by name."""
    if node == TENSOR:
        return node
    if is_value(node):
        values[name] = node
        return VALUE
    if isinstance(node, list):
        return [without_values(x, values, f"{name}/{i}") for i, x in enumerate(node)]
    prefix = f"{name}/" if name else ""
    return {key: without_values(x, values, prefix + key) for key, x in node.items()}


def is_value(node) -> bool:
    """Is it a leaf, or a list of such? A list may grow from save to save, and the form stays."""
    if isinstance(node, list):
        return all(is_value(x) for x in node)
    return not isinstance(node, dict) or ("$" in node and node != TENSOR)


def written_by(plan: dict, rank: int) -> list[str]:
    """The names of the tensors of which this rank writes its shard."""
    is_writer = [shardings.box_of(s, rank) is not None for s in plan["shardings"]]
    return [name for name, entry in plan["tensors"].items() if is_writer[entry["sharding"]]]


def values_of(tree) -> list[tuple[str, dict]]:
    """(name, leaf) of the values in a plan's tree, in its order."""
    found = []

    def add(name, leaf):
        if leaf != TENSOR:
            found.append((name, leaf))

    walk(tree, add)
    return found


# ---- all ranks -----------------------------------------------------------------------------------
def merge(described: list, forms: dict) -> dict:
    """The plan: {"tree", "tensors", "shardings"}.

    described: of each rank [key, boxes, numbers]; forms: key -> [tree, tensors] of the ranks with
    this key. Raises ValueError where ranks contradict each other.
    """
    ranks_with = {}  # key of a form -> ranks
    for rank, (key, _, _) in enumerate(described):
        ranks_with.setdefault(key, []).append(rank)

    tree = {}
    tensors = {}
    for key, ranks in ranks_with.items():
        form, names = forms[key]
        tree = union(tree, brought_by(form, ranks[0]))
        for name, dtype, full in names:
            entry = tensors.setdefault(name, {"dtype": dtype, "shape": full})
            if (full, dtype) != (entry["shape"], entry["dtype"]):
                lower = f"{entry['dtype']} {entry['shape']}"
                raise ValueError(
                    f"{name} is {dtype} {full} on rank {ranks[0]} but {lower} on a lower one"
                )

    found = []
    number_of = {}  # what determines a sharding -> its number
    box_of, holders = who_holds(described, forms, ranks_with)
    for name, entry in tensors.items():
        same = tuple(entry["shape"]), tuple(holders[name])
        if same not in number_of:
            number_of[same] = len(found)
            held = [
                (rank, i) for key, column in same[1] for rank, i in zip(ranks_with[key], column)
            ]
            found.append(shardings.compress(first_holders(held, box_of, entry["shape"])))
        entry["sharding"] = number_of[same]
    without_ranks = walk(tree, lambda _, leaf: leaf if leaf == TENSOR else None)
    check(without_ranks, tensors, found, len(described))
    return {"tensors": tensors, "shardings": found, "tree": tree}


def brought_by(form, rank: int):
    """The form, with values that come from this rank."""
    return walk(form, lambda _, leaf: {**VALUE, "rank": rank} if leaf == VALUE else leaf)


def who_holds(described: list, forms: dict, ranks_with: dict) -> tuple[list, dict]:
    """All boxes; and name -> for each form with it [(key, the box of each rank with that form)]."""
    number_of = {}  # box -> its number
    holders = {}
    for key, ranks in ranks_with.items():
        rows = []
        for rank in ranks:
            _, boxes, numbers = described[rank]
            here = []
            for offsets, shape in boxes:
                box = tuple(offsets), tuple(shape)
                here.append(number_of.setdefault(box, len(number_of)))
            rows.append([here[i] for i in numbers])
        _, names = forms[key]
        for (name, _, _), column in zip(names, zip(*rows)):
            holders.setdefault(name, []).append((key, column))
    return list(number_of), holders


def first_holders(held: list[tuple[int, int]], box_of: list, full: list[int]) -> list:
    """(rank, offsets, shape) of each box of a tensor, by rank: the lowest one that holds it.

    held: (rank, number of its box). Nobody writes an empty box, unless the full tensor is empty.
    """
    first = {}
    for rank, i in sorted(held):
        first.setdefault(i, rank)
    found = []
    for i, rank in first.items():
        offsets, shape = box_of[i]
        if 0 not in shape or 0 in full:
            found.append((rank, list(offsets), list(shape)))
    return found


def union(low, high):
    """Two trees as one; where both have a leaf, the leaf of `low` stays."""
    if isinstance(low, dict) and isinstance(high, dict) and "$" not in low and "$" not in high:
        both = dict(low)
        for key, value in high.items():
            both[key] = union(low[key], value) if key in low else value
        return both
    if isinstance(low, list) and isinstance(high, list) and len(low) == len(high):
        return [union(a, b) for a, b in zip(low, high)]
    return low


def with_values(plan: dict, brought: list[list]):
    """The plan's tree with the values that each rank brings, in the order of the tree."""
    each = [iter(values) for values in brought]
    return walk(plan["tree"], lambda _, x: x if x == TENSOR else next(each[x["rank"]]))


# ---- is it one? ----------------------------------------------------------------------------------
def check(tree, tensors: dict, found: list, world: int) -> None:
    """Raises ValueError unless each tensor has its place in the tree and slices that cover it.

    All may be any JSON, from a damaged file: whatever raises here, such as a TypeError, is no plan.
    """
    placed = set()

    def place(name, leaf):
        if isinstance(leaf, dict) and leaf not in LEAVES:
            raise ValueError(f"{name} is {leaf}, which means nothing here")
        if leaf == TENSOR:
            placed.add(name)

    # `union` keeps the lowest rank's leaf: where that is a number, a higher rank's tensor has no
    # place in the tree.
    walk(tree, place)
    for name in placed ^ set(tensors):
        raise ValueError(f"{name} is a tensor on one rank but not on a lower one")

    checked = set()  # a sharding is shared by many tensors
    for name, entry in tensors.items():
        full = entry["shape"]
        number = entry["sharding"]
        if entry["dtype"] not in DTYPES or type(number) is not int or not 0 <= number < len(found):
            raise ValueError(f"{name} is {entry['dtype']}, no known type, or has no sharding")
        # As text, where 1.0 is not 1.
        what = f"{number} {full}"
        if what not in checked:
            shardings.check(name, full, found[number], world)
            checked.add(what)
