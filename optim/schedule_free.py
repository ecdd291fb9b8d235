"""Schedule-Free AdamW and SGD: averaging in place of a schedule, so training may end at any time.

Three sequences: z takes the steps, x averages z and is the model, y lies between them and is where gradients
are taken.

    y = (1−β₁)·z + β₁·x
    d = g(y) / (√v̂ + ε) + λ·y       AdamW:  v ← β₂·v + (1−β₂)·g²,  v̂ = v / (1 − β₂ᵏ)
    d = g(y) + λ·y                   SGD
    γ = lr·min(1, k / warmup)        γmax its largest value so far
    c = w / W                        w = kʳ·γmax^power, W the sum of w so far; c = 0 if W = 0
    y ← y + c·(z−y) + γ·(β₁(1−c)−1)·d
    z ← z − γ·d                      together: x ← (1−c)·x + c·z, the mean of z weighted by w

    y `p` in train mode   x `p` in eval mode   z `z`   g `g`   v `exp_avg_sq`   β `betas` (SGD: β₁ `momentum`)
    ε `eps`   λ `weight_decay`   γ `gamma`   power `weight_lr_power`
    k, γmax, W: the group's `k`, `lr_max`, `weight_sum`

Defazio et al. 2024 (arXiv 2405.15682). A common text mixes the roles: the gradient is taken at y, z moves, x
is what one evaluates, saves and samples from. `train()` before training, `eval()` before anything else; both
may be called twice, a new optimizer is in eval mode, and step() there raises. The mode is part of the state.
lr: for AdamW in units of weight, 1–10 times AdamW's; for SGD weight per gradient, 10–50 times SGD's. Decay is
at y and inside d: multiplied by γ, outside Adam's denominator.
State: 8 bytes a parameter for AdamW, 4 for SGD (twice that for float64). Half-precision parameters keep
float32 state.

To compile the step: torch compiles again for every new float, so hand the floats over as 0-D tensors:
    fast = torch.compile(schedule_free_update, dynamic=True)
    schedule_free.schedule_free_update = lambda *args: fast(
        *(torch.tensor(x, dtype=torch.float64) if isinstance(x, float) else x for x in args))
"""

import torch


def averaging_weight(k, lr, warmup_steps, r, power, lr_max, weight_sum) -> tuple[float, float, float, float]:
    """Step k (from 1): returns γ, the new γmax and W, and c."""
    gamma = lr * min(1.0, k / warmup_steps) if warmup_steps else lr
    lr_max = max(gamma, lr_max)
    weight = k**r * lr_max**power
    weight_sum += weight
    return gamma, lr_max, weight_sum, weight / weight_sum if weight_sum else 0.0


def schedule_free_update(y, g, z, exp_avg_sq, gamma, c, bias2, beta1, beta2, eps, weight_decay) -> None:
    """One step, in place on `y`, `z` and `exp_avg_sq` (None for SGD), all shaped as `g`; bias2 = 1 − β₂ᵏ."""
    d = g
    if exp_avg_sq is not None:
        exp_avg_sq.mul_(beta2).addcmul_(g, g, value=1 - beta2)
        d = (exp_avg_sq / bias2).sqrt_().add_(eps)
        torch.div(g, d, out=d)
    if weight_decay is not None:
        d = d.add(y, alpha=weight_decay)
    y.lerp_(z, c).add_(d, alpha=gamma * (beta1 * (1 - c) - 1))
    z.sub_(d, alpha=gamma)


class AdamWScheduleFree(torch.optim.Optimizer):
    """Raises ValueError for hyperparameters out of range, RuntimeError for sparse or complex gradients and in
    eval mode."""

    elementwise: bool = True  # a shard of a parameter can be stepped without seeing the rest

    def __init__(self, params, lr: float = 2.5e-3, betas: tuple[float, float] = (0.9, 0.999),
                 eps: float = 1e-8, weight_decay: float = 0.0, warmup_steps: int = 0, r: float = 0.0,
                 weight_lr_power: float = 2.0):
        super().__init__(params, {
            "lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "warmup_steps": warmup_steps,
            "r": r, "weight_lr_power": weight_lr_power, "k": 0, "lr_max": 0.0, "weight_sum": 0.0,
            "train_mode": False})

    def add_param_group(self, param_group: dict) -> None:
        group, name = {**self.defaults, **param_group}, type(self).__name__
        beta1, beta2 = self._betas(group)
        if not 0 < beta1 < 1:
            raise ValueError(f"{name}: beta1 (momentum) {beta1} is not allowed; it must lie in (0, 1)")
        for field, x, end in (("lr", group["lr"], "inf"), ("eps", group.get("eps", 0), "inf"),
                              ("betas[1]", beta2, 1), ("weight_decay", group["weight_decay"], "inf"),
                              ("warmup_steps", group["warmup_steps"], "inf")):
            if not 0 <= x < float(end):
                raise ValueError(f"{name}: {field}={x} is not allowed; it must lie in [0, {end})")
        super().add_param_group(param_group)

    @staticmethod
    def _betas(group: dict) -> tuple[float, float]:
        return group["betas"]

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            if not group["train_mode"]:
                raise RuntimeError(f"{type(self).__name__}: step() in eval mode; call train() first")
            (beta1, beta2), k = self._betas(group), group["k"] + 1
            gamma, group["lr_max"], group["weight_sum"], c = averaging_weight(
                k, group["lr"], group["warmup_steps"], group["r"], group["weight_lr_power"], group["lr_max"],
                group["weight_sum"])
            group["k"] = k
            for p in group["params"]:
                if p.grad is None:
                    continue
                if p.grad.layout != torch.strided or p.is_complex():
                    raise RuntimeError("Schedule-Free: gradients must be dense and real")
                work = p.to(torch.promote_types(p.dtype, torch.float32))  # p itself, unless half precision
                state = self.state[p]
                if not state:
                    state["z"] = work.clone()
                    if "betas" in group:
                        state["exp_avg_sq"] = torch.zeros_like(work)
                schedule_free_update(work, p.grad.to(work.dtype), state["z"], state.get("exp_avg_sq"), gamma,
                                     c, 1 - beta2**k, beta1, beta2, group.get("eps"),
                                     group["weight_decay"] or None)
                if work is not p:
                    p.copy_(work)  # the one rounding
        return loss

    @torch.no_grad()
    def _move(self, train_mode: bool) -> None:
        for group in self.param_groups:
            beta1 = self._betas(group)[0]
            weight = 1 - beta1 if train_mode else 1 - 1 / beta1
            for p in group["params"]:
                if group["train_mode"] != train_mode and "z" in self.state.get(p, {}):
                    z = self.state[p]["z"]
                    p.copy_(p.to(z.dtype).lerp(z, weight))
            group["train_mode"] = train_mode

    def train(self) -> None:
        """Put y, where gradients are taken, into the parameters."""
        self._move(True)

    def eval(self) -> None:
        """Put x, the model, into the parameters."""
        self._move(False)

    def load_state_dict(self, state_dict: dict) -> None:
        """The base class casts state to the parameter's dtype; here it keeps full precision."""
        super().load_state_dict(state_dict)
        saved = [i for group in state_dict["param_groups"] for i in group["params"]]
        for i, p in zip(saved, (p for group in self.param_groups for p in group["params"])):
            dtype = torch.promote_types(p.dtype, torch.float32)
            for name, x in state_dict["state"].get(i, {}).items():
                if torch.is_tensor(x):
                    self.state[p][name] = x.to(p.device, dtype, copy=True)


class SGDScheduleFree(AdamWScheduleFree):
    """The same with d = g + λ·y. Raises what AdamWScheduleFree raises."""

    def __init__(self, params, lr: float = 1.0, momentum: float = 0.9, weight_decay: float = 0.0,
                 warmup_steps: int = 0, r: float = 0.0, weight_lr_power: float = 2.0):
        torch.optim.Optimizer.__init__(self, params, {
            "lr": lr, "momentum": momentum, "weight_decay": weight_decay, "warmup_steps": warmup_steps,
            "r": r, "weight_lr_power": weight_lr_power, "k": 0, "lr_max": 0.0, "weight_sum": 0.0,
            "train_mode": False})

    @staticmethod
    def _betas(group: dict) -> tuple[float, float]:
        return group["momentum"], 0.0


if __name__ == "__main__":
    torch.manual_seed(0)
    scale, target = torch.linspace(0.1, 1, 20, dtype=torch.float64), torch.randn(20, dtype=torch.float64)
    for optimizer_class, lr in (AdamWScheduleFree, 0.1), (SGDScheduleFree, 0.5):
        p = torch.zeros(20, dtype=torch.float64, requires_grad=True)
        optimizer = optimizer_class([p], lr=lr, warmup_steps=10)
        optimizer.train()
        zs = []
        for _ in range(400):
            optimizer.zero_grad()
            (scale * (p - target).square()).sum().backward()
            optimizer.step()
            zs.append(optimizer.state[p]["z"].clone())
        optimizer.eval()
        w = torch.tensor([min(1, k / 10) ** 2 for k in range(1, 401)], dtype=torch.float64)
        mean = (torch.stack(zs) * w[:, None]).sum(0) / w.sum()
        print(f"{optimizer_class.__name__}: 400 steps, x is {(p - mean).abs().max():.0e} from the mean "
              f"of all z, {(p - target).abs().max():.0e} from the quadratic's minimum")
