"""LARS: SGD with momentum whose step, layer by layer, is a fixed fraction of the layer's weights.

    k = τ·‖p‖ / (‖g‖ + λ·‖p‖ + ε)      trust ratio; 1 where ‖p‖ or ‖g‖ is 0
    d = k·(g + λ·p)
    b ← μ·b + d                        b starts at 0
    p ← p − lr·(d + μ·b)               Nesterov;  p ← p − lr·b  without

    p `p`   g `g`   b `momentum_buffer`   τ `trust_coefficient`   μ `momentum`
    λ `weight_decay`   ε `eps`

You, Gitman and Ginsburg 2017 (arXiv 1708.03888). Differences from it, as in the common
implementations: lr stays outside the buffer (the paper has it inside), and, with `exclude_1d`,
gains and biases take plain SGD, without decay or trust ratio. A tutorial takes a momentum that
it never uses, and freezes weights that start at zero. lr has no unit: a layer's step is about lr·τ
times the layer's norm, so matrices that start at 0 hardly learn. Elements of excluded vectors move
by lr times the gradient, as in SGD. State: 4 bytes a parameter with momentum (8 for float64
parameters), 0 without. Half-precision parameters keep a float32 buffer.

Used with torch's schedulers, GradScaler, autocast, compile, DDP and torch.distributed.checkpoint,
and with fully_shard, there best by make_optimizer of parallel/sharded_optimizer.py.
docs/partners.md has all partners.

Example:
    import torch
    from optim.lars import LARS
    layer = torch.nn.Linear(8, 8)
    optimizer = LARS(layer.parameters(), lr=1.0, trust_coefficient=0.01)
    before = layer.weight.detach().clone()
    loss = 1e6 * layer(torch.randn(64, 8)).square().mean()
    loss.backward()
    optimizer.step()
    moved = (layer.weight - before).norm() / before.norm()
    assert abs(moved - 0.01) < 1e-5  # lr x trust_coefficient of the weights, for any loss
"""

import math

import torch


def lars_update(
    p, g, momentum_buffer, lr, momentum, weight_decay, trust_coefficient, eps, nesterov, trust
):
    """One step, in place on `p` and `momentum_buffer` (None if momentum is 0), both shaped as `g`.

    `trust=False` leaves out k and λ: plain SGD, for gains and biases.
    """
    d = g
    if trust:
        p_norm = torch.linalg.vector_norm(p)
        g_norm = torch.linalg.vector_norm(g)
        k = trust_coefficient * p_norm / (g_norm + weight_decay * p_norm + eps)
        # A fraction of the norm of zero weights is 0: without k = 1 they would never move.
        k = torch.where((p_norm > 0) & (g_norm > 0), k, 1)
        d = g.add(p, alpha=weight_decay).mul_(k) if weight_decay else g * k
    if momentum_buffer is not None:
        # μ·b + d in one pass over memory; mul_ and add_ would take two.
        torch.add(d, momentum_buffer, alpha=momentum, out=momentum_buffer)
        d = d.add(momentum_buffer, alpha=momentum) if nesterov else momentum_buffer
    p.add_(d, alpha=-lr)


class LARS(torch.optim.Optimizer):
    """Raises ValueError for bad hyperparameters, RuntimeError for sparse or complex gradients."""

    # Read by other parts of the library; optim/attributes.py says what each one decides.
    elementwise: bool = False  # needs the norm of the whole parameter
    zero_init: bool = False  # a step follows the weights' norm: zeros hardly leave 0
    heavy_step: bool = False  # cheap enough for every replica to repeat
    mup_rule: str | None = None  # no rule: a step follows the weights' size

    @staticmethod
    def state_numbers(shape: tuple[int, ...], *, momentum: float = 0.9) -> int:
        """Numbers of state that a parameter of this shape takes."""
        return math.prod(shape) if momentum else 0

    def __init__(
        self,
        params,
        lr: float = 1.0,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        trust_coefficient: float = 1e-3,
        eps: float = 1e-8,
        nesterov: bool = False,
        exclude_1d: bool = True,
    ):
        super().__init__(
            params,
            {
                "lr": lr,
                "momentum": momentum,
                "weight_decay": weight_decay,
                "eps": eps,
                "trust_coefficient": trust_coefficient,
                "nesterov": nesterov,
                "exclude_1d": exclude_1d,
            },
        )

    def add_param_group(self, param_group: dict) -> None:
        group = {**self.defaults, **param_group}
        for name, end in (
            ("lr", "inf"),
            ("momentum", 1),
            ("weight_decay", "inf"),
            ("eps", "inf"),
            ("trust_coefficient", "inf"),
        ):
            if not 0 <= group[name] < float(end):
                raise ValueError(
                    f"LARS: {name}={group[name]} is not allowed; it must lie in [0, {end})"
                )
        if group["nesterov"] and not group["momentum"] > 0:
            raise ValueError(
                f"LARS: nesterov=True with momentum={group['momentum']}; it needs one in (0, 1)"
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
                raise RuntimeError("LARS: gradients must be dense and real, not sparse or complex")
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                # A float32 copy for half precision. For other dtypes .to() returns p itself.
                work = p.to(torch.promote_types(p.dtype, torch.float32))
                state = self.state[p]
                buffer = None
                if group["momentum"]:
                    if not state:
                        state["momentum_buffer"] = torch.zeros_like(work)
                    buffer = state["momentum_buffer"]
                lars_update(
                    work,
                    p.grad.to(work.dtype),
                    buffer,
                    group["lr"],
                    group["momentum"],
                    group["weight_decay"],
                    group["trust_coefficient"],
                    group["eps"],
                    group["nesterov"],
                    trust=p.ndim >= 2 or not group["exclude_1d"],
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
                # What an older version did not save keeps this optimizer's value.
                theirs.update((name, x) for name, x in ours.items() if name not in theirs)
                for i, p in zip(theirs["params"], ours["params"]):
                    state = saved["state"].get(i)
                    if not state:
                        continue
                    if state.keys() != {"momentum_buffer"}:
                        raise ValueError(
                            f"LARS: a saved state of {', '.join(state)} is another method's"
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
    w = torch.randn(8, 8, dtype=torch.float64, requires_grad=True)
    for scale in 1.0, 1e6:
        before = w.detach().clone()
        w.grad = scale * torch.randn_like(w)
        LARS([w], lr=1.0, trust_coefficient=0.01).step()
        fraction = (w - before).norm() / before.norm()
        print(
            f"LARS: gradient of norm {w.grad.norm():.0e}, the step is {fraction:.6f} of the weights"
        )
    inputs = torch.randn(256, 32)
    teacher = torch.randn(16, 32)
    w = torch.randn(16, 32, requires_grad=True)
    optimizer = LARS([w])
    for t in range(300):
        optimizer.param_groups[0]["lr"] = 10 * (1 - t / 300)
        optimizer.zero_grad()
        loss = (inputs @ (w - teacher).T).square().mean()
        loss.backward()
        optimizer.step()
    print(f"LARS: a linear layer learns its teacher, loss {loss:.0e} after 300 steps")
