"""One optimizer on weights that are sharded over ranks, as plain tensors it can step: an Adapter.

The method never learns of DTensors (FSDP2) or of the plain shards that parallel/tensor.py leaves
(`tp_shards`). Which tensors it gets is decided group by group.

local   A method that works element by element (SGD, AdamW, Lion, Schedule-Free) steps the shards it
        has, plain tensors in the very memory of the DTensors' shards. Nothing is sent.

owner   A method that needs a whole matrix, row or norm (Muon, SOAP, Shampoo, Adafactor, LARS,
        LAMB). Each parameter has one owner among the ranks that hold its shards:

                    rank 0     rank 1     rank 2                  rank 0     rank 1     rank 2
        gradients   A0 B0 C0   A1 B1 C1   A2 B2 C2   all-to-all   A0 A1 A2   B0 B1 B2   C0 C1 C2
        step                                                      A          B          C
        weights     A0 B0 C0   A1 B1 C1   A2 B2 C2   all-to-all   A          B          C
                                                     <---------

        Two collectives a step for each dtype and set of ranks, instead of one gather per parameter.
        State lives at the owner alone, and the owners work at the same time: Newton-Schulz is
        shared out over the ranks for nothing. A matrix method run on the shards would silently be
        another method; on DTensors it repeats the work on every rank and sends inside each product.

Bytes sent per rank and step: local 0; owner 2 (N-1)/N x the bytes of this rank's shards, on
average. Memory: the owners' full weights, over all ranks one more copy of the model.

A class that does not declare `elementwise` gets owners, which is always right. A method that
couples parameters (LBFGS, Prodigy) is refused: an owner sees only its own. After loading other
weights into the model, call gather_weights(). Weights are those of the model: nothing else is sent
at the start, so shards must fit together, as fully_shard's do.

Neighbours: parallel/owners.py, parallel/replicas.py, parallel/shard.py, parallel/mesh.py

Example:
    import tempfile, torch
    import torch.distributed as dist, torch.multiprocessing as mp
    from torch.distributed.fsdp import fully_shard
    from parallel.adapter import Adapter

    def train(rank, file):
        dist.init_process_group("gloo", store=dist.FileStore(file, 2), rank=rank, world_size=2)
        torch.manual_seed(0)
        model, alone = torch.nn.Linear(6, 4), torch.nn.Linear(6, 4)
        alone.load_state_dict(model.state_dict())
        fully_shard(model)
        adapter = Adapter(torch.optim.Adafactor, model.parameters(), lr=0.1)
        plain = torch.optim.Adafactor(alone.parameters(), lr=0.1)  # it needs whole rows and columns
        x = torch.randn(8, 6)
        for net, optimizer in (model, adapter.optimizer), (alone, plain):
            net(x).square().sum().backward()
            optimizer.step()
        assert torch.allclose(model.weight.full_tensor(), alone.weight, atol=1e-6)
        print(f"rank {rank} steps {len(adapter.optimizer.param_groups[0]['params'])} of 2 weights")
        dist.destroy_process_group()

    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(train, (f"{folder}/store",), nprocs=2, start_method="fork")
"""

import inspect

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from parallel.owners import Exchange, first_holder, group_of, spread_of, wire_device
from parallel.replicas import is_spared, refuse_coupled
from parallel.shard import Shard, local, shard_of, shard_of_shard


class Adapter:
    """`optimizer`, an instance of `cls` on plain tensors, tied to the sharded weights in `groups`.

    groups: tensors or dicts, as torch's optimizers take them. What this rank does not step is left
    out of a dict's `params` and `names`.
    elementwise: may a shard be stepped alone? None asks the class, where no answer counts as no.
    Muon's groups with use_muon=False always may, and what hooks (hooks/wear.py) leave alone.
    tp_shards: name -> Shard, or (full shape, offsets), of the parameters that already are shards,
    over tp_group.
    agree: in each step the ranks tell each other which gradients they have, and whether anybody
    else changed their weights.

    shards: name -> Shard of each parameter that the optimizer steps shard by shard.
    sent_bytes: by this rank in each step; the optimizer has this number too.

    Collective: all ranks make it together, with the same groups. Raises ValueError for a method
    that couples parameters.
    """

    def __init__(
        self,
        cls: type[Optimizer],
        groups,
        elementwise: bool | None = None,
        tp_shards: dict[str, tuple] | None = None,
        tp_group: dist.ProcessGroup | None = None,
        agree: bool = False,
        **arguments,
    ):
        groups = list(groups)
        if not isinstance(groups[0], dict):
            groups = [{"params": groups}]
        if elementwise is None:
            elementwise = getattr(cls, "elementwise", False)
        self.cls = cls
        self.elementwise = elementwise
        self.tp_shards = {name: Shard(*where) for name, where in (tp_shards or {}).items()}
        self.tp_group = tp_group
        self.agree = agree
        # Weight -> the plain tensor that the optimizer here steps for it: the weight itself, its
        # shard, or the full weight at its owner. Other owners' weights have none.
        self.stepped = {}
        # DTensors stepped shard by shard: FSDP2 may move their memory between two steps.
        self.stepped_shards = []
        # For each way in which weights are spread over ranks: (the group of these ranks, the device
        # from which messages leave, the weights they share).
        self.sharded = {}
        self.exchanges = []  # one for each dtype and set of ranks
        self.owners = {}  # weight that is gathered -> its owner, by rank in the weight's group
        # Weights whose gradient only other ranks have: here it counts as zero.
        self.missing_here = set()
        self.shards = {}
        self.sent_bytes = 0
        mine = self.take_over(groups)
        if self.sharded:
            refuse_coupled(cls, groups, arguments)
        # Hooks, not a step() of our own: the optimizer stays an instance of `cls` for everybody.
        self.optimizer = cls(mine, **arguments)
        self.optimizer.register_step_pre_hook(self.before_step)
        self.optimizer.register_step_post_hook(self.after_step)
        self.optimizer.sent_bytes = self.sent_bytes

    @torch.no_grad()
    def take_over(self, groups: list[dict]) -> list[dict]:
        """The groups, with the tensors that this rank steps in place of their weights."""
        groups = [{**group, "params": listed(group["params"])} for group in groups]
        # Weights that must be gathered: those alike in ranks, dtype and device travel together.
        owned = {}  # (spread, dtype, device) -> [(weight, where it lies if it is a tp shard)]
        for group in groups:
            works_on_shards = self.elementwise or is_spared(self.cls, group)
            names = group.get("names") or [None] * len(group["params"])
            for p, name in zip(group["params"], names):
                shard = shard_of(p)
                tp_shard = self.tp_shards.get(name)
                if tp_shard is not None:
                    shard = shard_of_shard(tp_shard, shard)
                # A weight that one rank holds in full is an ordinary weight, DTensor or not.
                spread = spread_of(p, tp_shard is not None)
                is_sharded = spread is not None
                if is_sharded:
                    self.enlist(p, spread, self.tp_group if tp_shard else None)
                if is_sharded and not works_on_shards:
                    key = (spread, p.dtype, local(p).device)
                    owned.setdefault(key, []).append((p, tp_shard))
                    continue
                self.step_here(p)
                if name is not None and is_sharded and p in self.stepped:
                    self.shards[name] = shard

        # Messages follow: `owned` is in the order of the weights, the same on all ranks.
        for (spread, *_), pairs in owned.items():
            params = [p for p, _ in pairs]
            tp_shards = [tp_shard for _, tp_shard in pairs]
            exchange = Exchange(params, self.sharded[spread][0], tp_shards, self.tp_group)
            self.exchanges.append(exchange)
            self.owners |= zip(params, exchange.owners)
            self.sent_bytes += exchange.sent_bytes
            for i, full in exchange.full.items():
                self.stepped[params[i]] = full
            self.fill_owners(exchange)
        return [self.stepped_group(group) for group in groups]

    def enlist(self, p: Tensor, spread: tuple, tp_group: dist.ProcessGroup | None) -> None:
        """Notes that p is spread like this; makes the ranks' group for the first such weight."""
        if spread not in self.sharded:
            self.sharded[spread] = group_of(p, tp_group), wire_device(p), []
        self.sharded[spread][2].append(p)

    def step_here(self, p: Tensor) -> None:
        """The optimizer steps what this rank has of p, in the same memory; it may have nothing."""
        if not hasattr(p, "placements"):
            self.stepped[p] = p
        elif local(p).numel():
            self.stepped[p] = nn.Parameter(local(p), p.requires_grad)
            self.stepped_shards.append(p)

    def stepped_group(self, group: dict) -> dict:
        """The group with the tensors stepped here, and their names."""
        here = [i for i, p in enumerate(group["params"]) if p in self.stepped]
        result = {name: x for name, x in group.items() if name != "param_names"}
        result["params"] = [self.stepped[group["params"][i]] for i in here]
        if "names" in group:
            result["names"] = [group["names"][i] for i in here]
        return result

    def knows_state(self, p: Tensor, group: dist.ProcessGroup) -> int:
        """The rank, in the DTensor p's group, that has state of p: its owner, or one with a shard.

        The same on all ranks, and nothing is sent.
        """
        if p in self.owners:
            return self.owners[p]
        return first_holder(p, group)

    # ---- a step ----------------------------------------------------------------------------------
    @torch.no_grad()
    def before_step(self, optimizer, args, kwargs) -> None:
        """Gives each tensor that is stepped its gradient."""
        if any(x is not None for x in (*args[1:], *kwargs.values())):
            raise ValueError(
                "step(closure) has no meaning with sharded weights: they would be needed in the "
                "middle of a step; call loss.backward() and then step()"
            )
        self.refresh()
        for p in self.stepped_shards:
            self.stepped[p].grad = self.gradient(p)
        for exchange in self.exchanges:
            gradients = [self.gradient(p) for p in exchange.params]
            # All ranks send alike: a gradient that is missing everywhere travels as zeros.
            sent = []
            for p, gradient in zip(exchange.params, gradients):
                sent.append(torch.zeros_like(local(p)) if gradient is None else gradient)
            received = {i: torch.empty_like(full) for i, full in exchange.full.items()}
            exchange.to_owners(sent, received)
            for i, full in exchange.full.items():
                full.grad = None if gradients[i] is None else received[i]

    def gradient(self, p: Tensor) -> Tensor | None:
        """This rank's shard of p's gradient; zeros where only other ranks have one."""
        if p.grad is None and p in self.missing_here:
            return torch.zeros_like(local(p))
        if p.grad is None:
            return None
        # A gradient may have other placements than its weight, partial sums for example.
        if hasattr(p.grad, "placements") and p.grad.placements != p.placements:
            return p.grad.redistribute(placements=p.placements).to_local()
        return local(p.grad)

    @torch.no_grad()
    def after_step(self, optimizer, args, kwargs) -> None:
        """Sends the new weights to the shards and lets go of the gradients."""
        self.broadcast_weights()
        for p in self.stepped_shards:
            self.stepped[p].grad = None
        for exchange in self.exchanges:
            for full in exchange.full.values():
                full.grad = None

    @torch.no_grad()
    def refresh(self) -> None:
        """Takes in what has happened to the model since the last step.

        Its shards may lie in other memory. With `agree`, also: another weight may have been copied
        in, and a gradient may be missing on some ranks.
        """
        for p in self.stepped_shards:
            self.stepped[p].data = local(p)
        if not self.agree:
            return
        for group, wire, params in self.sharded.values():
            exchanges = [exchange for exchange in self.exchanges if exchange.group is group]
            # One message: a byte for each gradient, and one for changed weights. The maximum over
            # the ranks answers "does anybody have it?" and "has anybody changed one?".
            has_gradient = [p.grad is not None for p in params]
            is_changed = any(differs(exchange) for exchange in exchanges)
            flags = torch.tensor([*has_gradient, is_changed], dtype=torch.uint8).to(wire)
            dist.all_reduce(flags, dist.ReduceOp.MAX, group=group)
            *anybody_has, is_changed = flags.tolist()
            self.missing_here.difference_update(params)
            for p, has in zip(params, anybody_has):
                if has and p.grad is None:
                    self.missing_here.add(p)
            if is_changed:
                for exchange in exchanges:
                    self.fill_owners(exchange)

    # ---- weights between the model and the optimizer ---------------------------------------------
    @torch.no_grad()
    def broadcast_weights(self) -> None:
        """Owners to model: after step(), or after anything else changed the optimizer's tensors."""
        for exchange in self.exchanges:
            exchange.to_shards()
            self.keep_copy(exchange)

    @torch.no_grad()
    def gather_weights(self) -> None:
        """Model to owners: after something other than the optimizer changed the model's weights."""
        for exchange in self.exchanges:
            self.fill_owners(exchange)

    def fill_owners(self, exchange: Exchange) -> None:
        exchange.to_owners([local(p) for p in exchange.params], exchange.full)
        self.keep_copy(exchange)

    def keep_copy(self, exchange: Exchange) -> None:
        """Owners and shards are equal now: a copy shows later whether anybody changed a shard."""
        if self.agree:
            exchange.shared = [local(p).clone() for p in exchange.params]


def listed(params) -> list:
    """A group's parameters as a list; a generator is read once."""
    if torch.is_tensor(params):
        return [params]
    return list(params)


def differs(exchange: Exchange) -> bool:
    """Has anybody changed this rank's shards since the last copy?"""
    for p, before in zip(exchange.params, exchange.shared):
        if not torch.equal(local(p), before):
            return True
    return False


if __name__ == "__main__":
    example = __doc__.partition("Example:\n")[2]
    print(example)
    exec(inspect.cleandoc(example))
