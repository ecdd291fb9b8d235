"""SGD with momentum: the baseline every other optimizer here is measured against.

    d ← g + λ·p                      L2 decay, through the gradient (so momentum averages it too)
    b ← μ·b + d                      b starts at 0, so b₁ = d: no dampening
    p ← p − lr·(d + μ·b)             Nesterov;  p ← p − lr·b  without;  p ← p − lr·d  when μ = 0

    p `p`   g `g`   b `momentum_buffer`   μ `momentum`   λ `weight_decay`

Polyak 1964; Nesterov 1983, in the form of Sutskever, Martens, Dahl and Hinton 2013, which is
torch's too. lr is a step in units of weight per unit of gradient: scale the loss by 10 and the step
grows tenfold. That makes SGD the detector of wrong gradient factors, which scale-free optimizers
hide. With momentum the effective step is lr/(1−μ). lr stays outside the buffer: changing it acts on
the whole buffer at once. State: 4 bytes a parameter with momentum (8 for float64 parameters), 0
without. Half-precision parameters keep a float32 buffer.

Used wherever torch.optim.SGD is: with torch's schedulers, GradScaler, autocast, compile, DDP,
fully_shard, torch.distributed.checkpoint. States of torch.optim.SGD load; dampening and maximize
are refused. docs/partners.md has all partners.

Example:
    import torch
    from optim.sgd import SGD
    layer = torch.nn.Linear(4, 1)
    optimizer = SGD(layer.parameters(), lr=0.1, momentum=0.9, nesterov=True)
    x = torch.randn(64, 4)
    for _ in range(200):
        loss = (layer(x) - x.sum(1, keepdim=True)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 1e-6  # the layer has learned to add
"""

import math

import torch


def sgd_update(p, g, momentum_buffer, lr, momentum=0.0, weight_decay=0.0, nesterov=False) -> None:
    """One step, in place on `p` and `momentum_buffer` (None if momentum is 0), shaped as `g`."""
    d = g
    if weight_decay:
        # add, not add_: the caller's p.grad must stay as it is.
        d = g.add(p, alpha=weight_decay)
    if momentum_buffer is not None:
        # μ·b + d in one pass over memory; mul_ and add_ would take two.
        torch.add(d, momentum_buffer, alpha=momentum, out=momentum_buffer)
        d = d.add(momentum_buffer, alpha=momentum) if nesterov else momentum_buffer
    p.add_(d, alpha=-lr)


class SGD(torch.optim.Optimizer):
    """Raises ValueError for bad hyperparameters, RuntimeError for sparse or complex gradients."""

    # Read by other parts of the library; optim/attributes.py says what each one decides.
    elementwise: bool = True  # a shard of a parameter can be stepped without seeing the rest
    zero_init: bool = True  # projections and head may start at 0
    heavy_step: bool = False  # cheap enough for every replica to repeat
    mup_rule: str | None = "sgd"  # a step is as large as the gradient

    @staticmethod
    def state_numbers(shape: tuple[int, ...], *, momentum: float = 0.0) -> int:
        """Numbers of state that a parameter of this shape takes."""
        return math.prod(shape) if momentum else 0

    def __init__(
        self,
        params,
        lr: float = 0.1,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
    ):
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
        }
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict) -> None:
        group = {**self.defaults, **param_group}
        for name, end in ("lr", "inf"), ("momentum", 1), ("weight_decay", "inf"):
            if not 0 <= group[name] < float(end):
                raise ValueError(
                    f"SGD: {name}={group[name]} is not allowed; it must lie in [0, {end})"
                )
        if group["nesterov"] and not group["momentum"] > 0:
            raise ValueError(
                f"SGD: nesterov=True with momentum={group['momentum']}; it needs one in (0, 1)"
            )
        super().add_param_group(param_group)

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        # Check every gradient first: an error must not leave half of the parameters stepped.
        for p in (p for group in self.param_groups for p in group["params"] if p.grad is not None):
            if p.grad.layout != torch.strided or p.is_complex():
                raise RuntimeError("SGD: gradients must be dense and real, not sparse or complex")
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                # A float32 copy for half precision. For other dtypes .to() returns p itself.
                work = p.to(torch.promote_types(p.dtype, torch.float32))
                state = self.state[p]
                buffer = None
                if group["momentum"]:
                    # A state of torch.optim.SGD may hold None here.
                    if state.get("momentum_buffer") is None:
                        state["momentum_buffer"] = torch.zeros_like(work)
                    buffer = state["momentum_buffer"]
                sgd_update(
                    work,
                    p.grad.to(work.dtype),
                    buffer,
                    group["lr"],
                    group["momentum"],
                    group["weight_decay"],
                    group["nesterov"],
                )
                # Half precision is rounded once a step, here.
                if work is not p:
                    p.copy_(work)
        return loss

    def load_state_dict(self, state_dict: dict) -> None:
        """As torch's, which casts state to the parameter's dtype; here it keeps full precision.

        What a saved group lacks stays as it is. Raises ValueError for another method's state.
        """

        def complete(_, saved: dict) -> dict:
            groups = [dict(group) for group in saved["param_groups"]]
            states = {}
            for ours, theirs in zip(self.param_groups, groups):
                for name in ("dampening", "maximize"):
                    if theirs.get(name):
                        raise ValueError(
                            f"SGD: the saved run had {name}={theirs[name]}, which this one "
                            "lacks; load it into the class that saved it"
                        )
                # What an older version did not save keeps this optimizer's value.
                theirs.update((name, x) for name, x in ours.items() if name not in theirs)
                for i, p in zip(theirs["params"], ours["params"]):
                    state = saved["state"].get(i)
                    if not state:
                        continue
                    if state.keys() != {"momentum_buffer"}:
                        raise ValueError(
                            f"SGD: a saved state of {', '.join(state)} is another method's"
                        )
                    # Copies: steps work in place, and must not change the caller's state_dict.
                    dtype = torch.promote_types(p.dtype, torch.float32)
                    states[p] = {
                        name: x.to(p.device, dtype, copy=True) if torch.is_tensor(x) else x
                        for name, x in state.items()
                    }
            # Keyed by the parameter itself, a state escapes torch's cast to the parameter's dtype.
            return saved | {"state": states, "param_groups": groups}

        # Registered last, so that it reads what the caller's own pre-hooks return.
        last = self.register_load_state_dict_pre_hook(complete)
        try:
            super().load_state_dict(state_dict)
        finally:
            last.remove()


if __name__ == "__main__":
    torch.manual_seed(0)
    start, target = torch.randn(2, 20, dtype=torch.float64)
    for options in {}, {"momentum": 0.9}, {"momentum": 0.9, "nesterov": True, "weight_decay": 0.01}:
        x = start.clone().requires_grad_()
        y = start.clone().requires_grad_()
        ours = SGD([x], lr=0.1, **options)
        theirs = torch.optim.SGD([y], lr=0.1, **options)
        for _ in range(200):
            for z, optimizer in (x, ours), (y, theirs):
                optimizer.zero_grad()
                (z - target).square().sum().mul(0.5).backward()
                optimizer.step()
        print(
            f"SGD {options}: 200 steps, {(x - y).abs().max():.0e} from torch.optim.SGD, "
            f"{(x - target).abs().max():.0e} from the minimum of the plain quadratic"
        )
