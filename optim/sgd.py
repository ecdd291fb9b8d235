"""SGD with momentum: the baseline every other optimizer here is measured against.

    d ← g + λ·p                      L2 decay, through the gradient (so momentum averages it too)
    b ← μ·b + d                      b starts at 0, so b₁ = d: no dampening
    p ← p − lr·(d + μ·b)             Nesterov;  p ← p − lr·b  without;  p ← p − lr·d  when μ = 0

    p `p`   g `g`   b `momentum_buffer`   μ `momentum`   λ `weight_decay`

Polyak 1964; Nesterov 1983, in the form of Sutskever, Martens, Dahl and Hinton 2013, which is torch's too.
lr is a step in units of weight per unit of gradient: scale the loss by 10 and the step grows tenfold. That
makes SGD the detector of wrong gradient factors, which scale-free optimizers hide. With momentum the
effective step is lr/(1−μ). lr stays outside the buffer: changing it acts on the whole buffer at once.
State: 4 bytes a parameter with momentum (8 for float64 parameters), 0 without. Half-precision parameters keep
a float32 buffer.
"""

import torch


def sgd_update(p, g, momentum_buffer, lr, momentum=0.0, weight_decay=0.0, nesterov=False) -> None:
    """One step, in place on `p` and `momentum_buffer` (None if momentum is 0), both shaped as `g`."""
    d = g.add(p, alpha=weight_decay) if weight_decay else g
    if momentum_buffer is not None:
        torch.add(d, momentum_buffer, alpha=momentum, out=momentum_buffer)  # μb + d in one pass
        d = d.add(momentum_buffer, alpha=momentum) if nesterov else momentum_buffer
    p.add_(d, alpha=-lr)


class SGD(torch.optim.Optimizer):
    """Raises ValueError for hyperparameters out of range, RuntimeError for sparse or complex gradients."""

    elementwise: bool = True  # a shard of a parameter can be stepped without seeing the rest

    def __init__(self, params, lr: float = 0.1, momentum: float = 0.0, weight_decay: float = 0.0,
                 nesterov: bool = False):
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "nesterov": nesterov}
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict) -> None:
        group = {**self.defaults, **param_group}
        for name, end in ("lr", "inf"), ("momentum", 1), ("weight_decay", "inf"):
            if not 0 <= group[name] < float(end):
                raise ValueError(f"SGD: {name}={group[name]} is not allowed; it must lie in [0, {end})")
        if group["nesterov"] and not group["momentum"] > 0:
            raise ValueError(f"SGD: nesterov=True with momentum={group['momentum']}; it needs one in (0, 1)")
        super().add_param_group(param_group)

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                if p.grad.layout != torch.strided or p.is_complex():
                    raise RuntimeError("SGD: gradients must be dense and real, not sparse or complex")
                work = p.to(torch.promote_types(p.dtype, torch.float32))  # p itself, unless half precision
                state = self.state[p]
                if group["momentum"] and state.get("momentum_buffer") is None:
                    state["momentum_buffer"] = torch.zeros_like(work)
                buffer = state["momentum_buffer"] if group["momentum"] else None
                sgd_update(work, p.grad.to(work.dtype), buffer, group["lr"], group["momentum"],
                           group["weight_decay"], group["nesterov"])
                if work is not p:
                    p.copy_(work)  # the one rounding
        return loss

    def load_state_dict(self, state_dict: dict) -> None:
        """The base class casts state to the parameter's dtype; here it keeps full precision."""
        super().load_state_dict(state_dict)
        saved = [i for group in state_dict["param_groups"] for i in group["params"]]
        for i, p in zip(saved, (p for group in self.param_groups for p in group["params"])):
            dtype = torch.promote_types(p.dtype, torch.float32)
            for name, x in state_dict["state"].get(i, {}).items():
                if torch.is_tensor(x):
                    self.state[p][name] = x.to(p.device, dtype, copy=True)


if __name__ == "__main__":
    torch.manual_seed(0)
    start, target = torch.randn(2, 20, dtype=torch.float64)
    for options in {}, {"momentum": 0.9}, {"momentum": 0.9, "nesterov": True, "weight_decay": 0.01}:
        x, y = start.clone().requires_grad_(), start.clone().requires_grad_()
        ours, theirs = SGD([x], lr=0.1, **options), torch.optim.SGD([y], lr=0.1, **options)
        for _ in range(200):
            for z, optimizer in (x, ours), (y, theirs):
                optimizer.zero_grad()
                (z - target).square().sum().mul(0.5).backward()
                optimizer.step()
        print(f"SGD {options}: 200 steps, {(x - y).abs().max():.0e} from torch.optim.SGD, "
              f"{(x - target).abs().max():.0e} from the minimum of the plain quadratic")
