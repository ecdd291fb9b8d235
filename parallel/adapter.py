"""One optimizer on weights that are spread over ranks, as plain tensors it can step: an Adapter.

The method never learns of DTensors (FSDP2) or of the plain shards that parallel/tensor.py leaves
(`tp_shards`). Which tensors it gets is decided group by group.

local   A method that works element by element (SGD, AdamW, Lion, Schedule-Free) steps the shards it
        has, plain tensors in the very memory of the DTensors' shards. Nothing is sent.

owner   A method that looks at a whole matrix, row or norm (Muon, SOAP, Shampoo, Adafactor, LARS,
        LAMB). Each parameter has one owner among the ranks it is spread over:

                    rank 0     rank 1     rank 2                  rank 0     rank 1     rank 2
        gradients   A0 B0 C0   A1 B1 C1   A2 B2 C2   all-to-all   A0 A1 A2   B0 B1 B2   C0 C1 C2
        step                                                      A          B          C
        weights     A0 B0 C0   A1 B1 C1   A2 B2 C2   all-to-all   A          B          C
                                                     <---------

        Two collectives a step for each dtype and set of ranks, instead of one gather per parameter.
        State lives at the owner alone, and the owners work at the same time: Newton-Schulz spreads
        over the ranks for nothing. A matrix method run on the shards would silently be another
        method; on DTensors it repeats the work on every rank and sends inside each product.

Bytes sent per rank and step: local 0; owner 2 (N-1)/N x the bytes of this rank's shards, on
average. Memory: the owners' full weights, over all ranks one more copy of the model.

A class that does not say whether it is `elementwise` gets owners, which is always right. A method
that couples parameters (LBFGS, Prodigy) is refused: an owner sees only its own. Whoever loads
weights into the model afterwards calls gather_weights(). Neighbours: parallel/owners.py,
parallel/shard.py.
"""

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from parallel.coupled import refuse_coupled
from parallel.owners import Exchange, group_of, locate
from parallel.shard import Shard, local


class Adapter:
    """`optimizer`, an instance of `cls` on plain tensors, and what ties it to the weights in
    `groups`.

    groups: tensors or dicts, as torch's optimizers take them; what this rank does not step is left
    out of a dict's `params` and `names`. elementwise: may a shard be stepped alone? None asks the
    class, and one that does not say counts as no; Muon's groups with use_muon=False always may.
    tp_shards: name -> Shard of the parameters that already are shards, over tp_group. agree: in
    each step the ranks tell each other which gradients they have and whether somebody changed their
    weights.

    shards: name -> Shard of each parameter of which the optimizer here has one.
    sent_bytes: by this rank in each step, also on the optimizer. Collective: all ranks make it
    together, with the same groups. Raises ValueError for a method that couples parameters.
    """

    def __init__(
        self,
        cls: type[Optimizer],
        groups,
        elementwise: bool | None = None,
        tp_shards: dict[str, Shard] | None = None,
        tp_group: dist.ProcessGroup | None = None,
        agree: bool = False,
        **arguments,
    ):
        groups = list(groups)
        groups = groups if isinstance(groups[0], dict) else [{"params": groups}]
        self.elementwise = (
            getattr(cls, "elementwise", False) if elementwise is None else elementwise
        )
        self.tp_shards, self.tp_group, self.agree = tp_shards or {}, tp_group, agree
        # Weight -> what the optimizer gets; those of which it gets a shard
        self.stepped, self.local = {}, []
        self.spread, self.exchanges = {}, []  # ranks -> (their group, device on the wire, weights)
        self.elsewhere = set()  # weights of which other ranks alone have a gradient
        self.shards, self.sent_bytes = {}, 0
        mine = self.hold(groups)
        if self.spread:
            refuse_coupled(cls, groups, arguments)
        self.optimizer = cls(mine, **arguments)
        self.optimizer.register_step_pre_hook(self.before_step)
        self.optimizer.register_step_post_hook(self.after_step)
        self.optimizer.sent_bytes = self.sent_bytes

    @torch.no_grad()
    def hold(self, groups: list[dict]) -> list[dict]:
        """The groups with what this rank steps in place of their weights."""
        owned, mine = {}, []  # (ranks, dtype, device) -> weights that go to owners
        groups = [
            {**g, "params": [p] if torch.is_tensor(p := g["params"]) else list(p)} for g in groups
        ]
        for group in groups:
            alone = self.elementwise or group.get("use_muon") is False
            for p, name in zip(
                group["params"], group.get("names") or [None] * len(group["params"])
            ):
                shard, ranks = locate(p, self.tp_shards.get(name), self.tp_group)
                if len(ranks) > 1:
                    wire = p.device_mesh.device_type if hasattr(p, "placements") else p.device
                    if ranks not in self.spread:
                        group_here = group_of(ranks, p, self.tp_group)
                        self.spread[ranks] = group_here, torch.device(wire), []
                    self.spread[ranks][2].append(p)
                if len(ranks) > 1 and not alone:
                    owned.setdefault((ranks, p.dtype, local(p).device), []).append((p, shard))
                    continue
                if not hasattr(p, "placements"):
                    self.stepped[p] = p
                elif local(p).numel():
                    self.stepped[p] = nn.Parameter(local(p), p.requires_grad)
                    self.local.append(p)
                if name is not None and len(ranks) > 1 and p in self.stepped:
                    self.shards[name] = shard
        for (ranks, *_), found in owned.items():
            exchange = Exchange(*map(list, zip(*found)), self.spread[ranks][0])
            self.exchanges.append(exchange)
            self.stepped |= {exchange.params[i]: full for i, full in exchange.full.items()}
            self.sent_bytes += exchange.sent_bytes
            self.take(exchange)
        for group in groups:
            here = [i for i, p in enumerate(group["params"]) if p in self.stepped]
            kept = {"params": [self.stepped[group["params"][i]] for i in here]}
            if "names" in group:
                kept["names"] = [group["names"][i] for i in here]
            mine.append({name: x for name, x in group.items() if name != "param_names"} | kept)
        return mine

    # ---- a step ----------------------------------------------------------------------------------
    @torch.no_grad()
    def before_step(self, optimizer, args, kwargs) -> None:
        if any(x is not None for x in (*args[1:], *kwargs.values())):
            raise ValueError(
                "step(closure) has no meaning with sharded weights: they would be needed in the "
                "middle of a step; call loss.backward() and then step()"
            )
        self.look()
        for p in self.local:
            self.stepped[p].grad = self.gradient(p)
        for exchange in self.exchanges:
            shards = [self.gradient(p) for p in exchange.params]
            grads = {i: torch.empty_like(full) for i, full in exchange.full.items()}
            exchange.to_owners(
                [
                    torch.zeros_like(local(p)) if g is None else g
                    for p, g in zip(exchange.params, shards)
                ],
                grads,
            )
            for i, full in exchange.full.items():
                full.grad = None if shards[i] is None else grads[i]

    def gradient(self, p: Tensor) -> Tensor | None:
        """The shard of p's gradient on this rank."""
        if p.grad is None:
            return torch.zeros_like(local(p)) if p in self.elsewhere else None
        if hasattr(p.grad, "placements") and p.grad.placements != p.placements:
            return p.grad.redistribute(placements=p.placements).to_local()
        return local(p.grad)

    @torch.no_grad()
    def after_step(self, optimizer, args, kwargs) -> None:
        self.broadcast_weights()
        for p in self.local:
            self.stepped[p].grad = None
        for exchange in self.exchanges:
            for full in exchange.full.values():
                full.grad = None

    @torch.no_grad()
    def look(self) -> None:
        """What happened to the model since: its shards may lie elsewhere; ranks may have other
        weights, and gradients that others lack."""
        for p in self.local:
            self.stepped[p].data = local(p)
        for group, wire, params in self.spread.values() if self.agree else ():
            exchanges = [exchange for exchange in self.exchanges if exchange.group is group]
            changed = any(
                not torch.equal(local(p), before)
                for exchange in exchanges
                for p, before in zip(exchange.params, exchange.shared)
            )
            flags = torch.tensor(
                [p.grad is not None for p in params] + [changed], dtype=torch.uint8
            )
            flags = flags.to(wire)
            dist.all_reduce(flags, dist.ReduceOp.MAX, group=group)
            *have, changed = flags.tolist()
            self.elsewhere.difference_update(params)
            self.elsewhere |= {p for p, has in zip(params, have) if has and p.grad is None}
            for exchange in exchanges if changed else ():
                self.take(exchange)

    # ---- weights between the model and the optimizer ---------------------------------------------
    @torch.no_grad()
    def broadcast_weights(self) -> None:
        """After something other than step() changed the optimizer's parameters: the model sees it
        too."""
        for exchange in self.exchanges:
            exchange.to_shards()
            self.remember(exchange)

    @torch.no_grad()
    def gather_weights(self) -> None:
        """After something other than the optimizer changed the model's weights: the owners see it
        too."""
        for exchange in self.exchanges:
            self.take(exchange)

    def take(self, exchange: Exchange) -> None:
        exchange.to_owners([local(p) for p in exchange.params], exchange.full)
        self.remember(exchange)

    def remember(self, exchange: Exchange) -> None:
        if self.agree:  # what owners and shards both have
            exchange.shared = [local(p).clone() for p in exchange.params]
