"""Schedule-Free AdamW and SGD: averaging in place of a schedule, so training may end at any time.

Three sequences: z takes the steps; x averages z and is the model; y lies between them, and
gradients are taken there.

    y = (1−β₁)·z + β₁·x
    d = g(y) / (√v̂ + ε) + λ·y       AdamW:  v ← β₂·v + (1−β₂)·g²,  v̂ = v / (1 − β₂ᵏ)
    d = g(y) + λ·y                   SGD
    γ = lr·min(1, k / warmup)        γmax its largest value so far
    c = w / W                        w = kʳ·γmax^power, W the sum of w so far; c = 0 if W = 0
    y ← y + c·(z−y) + γ·(β₁(1−c)−1)·d
    z ← z − γ·d                      together: x ← (1−c)·x + c·z, the mean of z weighted by w

    y `p` in train mode   x `p` in eval mode   z `z`   g `g`   v `exp_avg_sq`
    β `betas` (SGD: β₁ `momentum`)
    ε `eps`   λ `weight_decay`   γ `gamma`   power `weight_lr_power`
    k, γmax, W: each parameter's `step`, `lr_max`, `weight_sum`; it counts the steps in which it had
    a gradient. The group's `k`, `lr_max` and `weight_sum` are the largest of its parameters'.

Defazio et al. 2024 (arXiv 2405.15682). A tutorial mixes the roles: the gradient is taken at y, z
moves, and one evaluates, saves and samples from x. Call `train()` before training, `eval()` before
anything else; both may be called twice. A new optimizer is in eval mode, and step() there raises.
The mode is part of the state. lr: for AdamW in units of weight, 1–10 times AdamW's; for SGD weight
per gradient, 10–50 times SGD's. Decay is at y and inside d: multiplied by γ, outside Adam's
denominator.

A scheduler may move β₁. Each parameter keeps the `beta1` that its y was made with; a step with
another one takes g and the decay at the old y, and moves y to the new β₁ as well. So x stays the
mean.

State: 8 bytes a parameter for AdamW, 4 for SGD (16 and 8 for float64). Half-precision parameters
keep float32 state and 4 bytes more, `lost` = y − p (in eval mode x − p): what rounding took away.
So they follow a float32 run. Where somebody loads other weights into p, p counts. States of the
authors' package and older ones of ours load: their group's counts become each parameter's.

Used with: schedulers of lr and of β₁ (OneCycleLR, CyclicLR), a tensor as lr, GradScaler, autocast
around the step, torch.compile(optimizer.step), DDP, pickle, torch.distributed.checkpoint in train
mode. FSDP2's fully_shard keeps weights that a forward without backward has gathered: after
evaluating, before train(), call module.reshard() on each of its modules; eval() warns. Refused,
with nothing changed: step() in eval mode, sparse and complex gradients, β₁ outside (0, 1).

To compile the update alone: torch compiles again for each new float, so hand over 0-D tensors:
    fast = torch.compile(schedule_free_update, dynamic=True)
    schedule_free.schedule_free_update = lambda *args: fast(
        *(torch.tensor(x, dtype=torch.float64) if isinstance(x, float) else x for x in args))

Example:
    import torch
    from optim.schedule_free import AdamWScheduleFree
    layer = torch.nn.Linear(4, 1)
    optimizer = AdamWScheduleFree(layer.parameters(), lr=0.1, warmup_steps=10)
    x = torch.randn(64, 4)
    optimizer.train()
    for _ in range(300):
        loss = (layer(x) - x.sum(1, keepdim=True)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    optimizer.eval()  # the layer holds the average x: evaluate it, save it, or stop
    assert (layer(x) - x.sum(1, keepdim=True)).square().mean() < 1e-3
"""

import math
import warnings

import torch

# What each group starts with: nothing counted, and eval mode, in which step() raises.
NEW = {"k": 0, "lr_max": 0.0, "weight_sum": 0.0, "train_mode": False}


def averaging_weight(k, lr, warmup_steps, r, power, lr_max, weight_sum) -> tuple[float, ...]:
    """Step k (from 1): returns γ, the new γmax and W, and c."""
    gamma = lr * min(1.0, k / warmup_steps) if warmup_steps else lr
    lr_max = max(gamma, lr_max)
    weight = k**r * lr_max**power
    weight_sum += weight
    # Where W is 0, as with lr 0 so far, c would be 0/0: x stays where it is.
    c = weight / weight_sum if weight_sum else 0.0
    return gamma, lr_max, weight_sum, c


def schedule_free_update(
    y, g, z, exp_avg_sq, gamma, c, pull, bias2, beta1, beta2, eps, weight_decay
) -> None:
    """One step, in place on `y`, `z` and `exp_avg_sq` (None for SGD), all shaped as `g`.

    bias2 = 1 − β₂ᵏ. pull: c, or 1 − (1−c)·β₁/β₁ᵒˡᵈ where y was made with another β₁.
    """
    d = g
    if exp_avg_sq is not None:
        exp_avg_sq.mul_(beta2).addcmul_(g, g, value=1 - beta2)
        d = (exp_avg_sq / bias2).sqrt_().add_(eps)
        torch.div(g, d, out=d)
    if weight_decay is not None:
        d = d.add(y, alpha=weight_decay)
    # y first, because it is pulled towards z as z was before this step.
    y.lerp_(z, pull).add_(d, alpha=gamma * (beta1 * (1 - c) - 1))
    z.sub_(d, alpha=gamma)


def read(p: torch.Tensor, state: dict) -> torch.Tensor:
    """y or x unrounded: p itself, or for half precision the float32 number p was rounded from."""
    work = p.to(torch.promote_types(p.dtype, torch.float32))
    if work is p or "lost" not in state:
        return work
    exact = work + state["lost"]
    # Where p is not the rounding of `exact`, somebody has changed p: then p counts.
    return torch.where(exact.to(p.dtype) == p, exact, work)


def write(p: torch.Tensor, value: torch.Tensor, state: dict) -> None:
    """Rounds `value` into p; `lost` keeps exactly what the rounding takes away."""
    p.copy_(value)
    # A new tensor: a checkpoint that is being saved holds y's `lost` while p holds x.
    if value.dtype != p.dtype:
        state["lost"] = value - p
    else:
        state.pop("lost", None)


class AdamWScheduleFree(torch.optim.Optimizer):
    """Raises ValueError for bad hyperparameters.

    Raises RuntimeError for sparse or complex gradients, and for step() in eval mode.
    """

    # Read by other parts of the library; optim/attributes.py says what each one decides.
    elementwise: bool = True  # a shard of a parameter can be stepped without seeing the rest
    zero_init: bool = False  # moves what lies before zeros by full steps along noise
    heavy_step: bool = False  # cheap enough for every replica to repeat
    mup_rule: str | None = "adam"  # entries of a step have one size, whatever the gradient's

    @staticmethod
    def state_numbers(shape: tuple[int, ...]) -> int:
        """Numbers of state that a parameter of this shape takes."""
        return 2 * math.prod(shape)

    def __init__(
        self,
        params,
        lr: float = 2.5e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        warmup_steps: int = 0,
        r: float = 0.0,
        weight_lr_power: float = 2.0,
    ):
        defaults = dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)
        defaults |= dict(warmup_steps=warmup_steps, r=r, weight_lr_power=weight_lr_power)
        super().__init__(params, defaults | NEW)

    def add_param_group(self, param_group: dict) -> None:
        """A group that joins later takes the mode of the others."""
        group = {**self.defaults, **param_group}
        _, beta2 = self._betas(group)
        for field, x, end in (
            ("lr", group["lr"], "inf"),
            ("eps", group.get("eps", 0), "inf"),
            ("betas[1]", beta2, 1),
            ("weight_decay", group["weight_decay"], "inf"),
            ("warmup_steps", group["warmup_steps"], "inf"),
        ):
            if not 0 <= x < float(end):
                raise ValueError(
                    f"{type(self).__name__}: {field}={x} is not allowed; it must lie in [0, {end})"
                )
        self._check_beta1(group)
        mode = any(other["train_mode"] for other in self.param_groups)
        super().add_param_group({**param_group, **NEW, "train_mode": mode})

    def _betas(self, group: dict) -> tuple[float, float]:
        return group["betas"] if "betas" in self.defaults else (group["momentum"], 0.0)

    def _check_beta1(self, group: dict) -> None:
        beta1, _ = self._betas(group)
        if not 0 < beta1 < 1:
            raise ValueError(
                f"{type(self).__name__}: beta1 (momentum) {beta1} is not allowed; it "
                "must lie in (0, 1)"
            )

    @torch.no_grad()
    def step(self, closure=None):
        if not all(group["train_mode"] for group in self.param_groups):
            raise RuntimeError(f"{type(self).__name__}: step() in eval mode; call train() first")
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        work = [(g, p) for g in self.param_groups for p in g["params"] if p.grad is not None]
        # Check everything first: an error must not leave half of the parameters stepped.
        # A scheduler may have moved β₁ out of its range.
        for group, p in work:
            self._check_beta1(group)
            if p.grad.layout != torch.strided or p.is_complex():
                raise RuntimeError("Schedule-Free: gradients must be dense and real")
        for group, p in work:
            self._step_parameter(group, p)
        return loss

    def _step_parameter(self, group: dict, p: torch.Tensor) -> None:
        state = self.state[p]
        beta1, beta2 = self._betas(group)
        y = read(p, state)
        if not state:
            state |= dict(z=y.clone(), step=0, lr_max=0.0, weight_sum=0.0, beta1=beta1)
            if "betas" in self.defaults:  # AdamW
                state["exp_avg_sq"] = torch.zeros_like(y)
        k = state["step"] = state["step"] + 1
        options = group["warmup_steps"], group["r"], group["weight_lr_power"]
        gamma, state["lr_max"], state["weight_sum"], c = averaging_weight(
            k, float(group["lr"]), *options, state["lr_max"], state["weight_sum"]
        )
        # y was made with another β₁: this step moves y to the new one too, so x stays the mean.
        pull = c
        if beta1 != state["beta1"]:
            pull = 1 - (1 - c) * beta1 / state["beta1"]
        state["beta1"] = beta1
        tensors = y, p.grad.to(y.dtype), state["z"], state.get("exp_avg_sq")
        eps = group.get("eps")  # SGD has none
        weight_decay = group["weight_decay"] or None
        schedule_free_update(
            *tensors, gamma, c, pull, 1 - beta2**k, beta1, beta2, eps, weight_decay
        )
        write(p, y, state)
        # The authors' package reads its counts from the group: show the largest ones there.
        for counted, own in ("k", "step"), ("lr_max", "lr_max"), ("weight_sum", "weight_sum"):
            group[counted] = max(group[counted], state[own])

    @torch.no_grad()
    def _move(self, train_mode: bool) -> None:
        """From x to y = x + (1−β₁)·(z−x), or back: x = y + (1−1/β₁)·(z−y)."""
        for group in self.param_groups:
            if group["train_mode"] == train_mode:
                continue
            for p in group["params"]:
                state = self.state.get(p, {})
                # A parameter that has never been stepped is x, y and z in one.
                if "z" in state:
                    weight = 1 - state["beta1"] if train_mode else 1 - 1 / state["beta1"]
                    write(p, read(p, state).lerp(state["z"], weight), state)
            group["train_mode"] = train_mode

    def train(self) -> None:
        """Put y, where gradients are taken, into the parameters."""
        self._move(True)

    def eval(self) -> None:
        """Put x, the model, into the parameters."""
        params = [p for group in self.param_groups for p in group["params"]]
        if not hasattr(self, "warned") and any(hasattr(p, "placements") for p in params):
            self.warned = True
            warnings.warn(
                f"{type(self).__name__} on DTensors: fully_shard keeps weights that "
                "a forward without backward has gathered; after evaluating, before train(), "
                "call module.reshard() on each module given to fully_shard",
                stacklevel=2,
            )
        self._move(False)

    def __setstate__(self, state: dict) -> None:
        """From a pickle or load_state_dict(). An older parameter's counts are its group's."""
        super().__setstate__(state)
        for group in self.param_groups:
            # Unpickling adds `differentiable` to the defaults; no group of ours has it.
            for name in state.get("defaults", {}).keys() - {"differentiable"}:
                group.setdefault(name, self.defaults[name])
            counts = {
                "step": int(group["k"]),
                "lr_max": float(group["lr_max"]),
                "weight_sum": float(group["weight_sum"]),
                "beta1": self._betas(group)[0],
            }
            for p in group["params"]:
                if "z" in self.state.get(p, {}):
                    self.state[p] = {**counts, **self.state[p]}

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
                    if "z" not in state or ("exp_avg_sq" in state) != ("betas" in self.defaults):
                        raise ValueError(
                            f"{type(self).__name__}: a saved state of {', '.join(state)} is of "
                            "another method"
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


class SGDScheduleFree(AdamWScheduleFree):
    """The same with d = g + λ·y. Raises what AdamWScheduleFree raises."""

    zero_init: bool = True  # projections and head may start at 0
    mup_rule: str | None = "sgd"  # a step is as large as the gradient

    @staticmethod
    def state_numbers(shape: tuple[int, ...]) -> int:
        """Numbers of state that a parameter of this shape takes."""
        return math.prod(shape)

    def __init__(
        self,
        params,
        lr: float = 1.0,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        warmup_steps: int = 0,
        r: float = 0.0,
        weight_lr_power: float = 2.0,
    ):
        defaults = dict(lr=lr, momentum=momentum, weight_decay=weight_decay)
        defaults |= dict(warmup_steps=warmup_steps, r=r, weight_lr_power=weight_lr_power)
        # Past AdamWScheduleFree's constructor: `betas` in the defaults mean AdamW everywhere here.
        torch.optim.Optimizer.__init__(self, params, defaults | NEW)


if __name__ == "__main__":
    torch.manual_seed(0)
    scale = torch.linspace(0.1, 1, 20, dtype=torch.float64)
    target = torch.randn(20, dtype=torch.float64)
    for optimizer_class, lr in (AdamWScheduleFree, 0.1), (SGDScheduleFree, 0.5):
        p = torch.zeros(20, dtype=torch.float64, requires_grad=True)
        optimizer = optimizer_class([p], lr=lr, warmup_steps=10)
        optimizer.train()
        zs = []
        for _ in range(400):
            p.grad = 2 * scale * (p.detach() - target)
            optimizer.step()
            zs.append(optimizer.state[p]["z"].clone())
        optimizer.eval()
        # x must be the mean of all z, weighted by γmax².
        w = torch.tensor([min(1, k / 10) ** 2 for k in range(1, 401)], dtype=torch.float64)
        mean = (torch.stack(zs) * w[:, None]).sum(0) / w.sum()
        print(
            f"{optimizer_class.__name__}: 400 steps, x is {(p - mean).abs().max():.0e} from the"
            f" mean of all z, {(p - target).abs().max():.0e} from the quadratic's minimum"
        )
