"""Loss scaling for fp16: gradients that would vanish in half precision are carried at a multiple.

    fp16 carries   smallest   smallest with all 11 bits   largest   a gradient of 1e-8 becomes
    g              6.0e-08    6.1e-05                     65504     0
    g x 2^16       9.1e-13    9.3e-10                     1.0       1.0e-08

    loss x scale -> backward -> sum over ranks -> x 1/scale -> norm
        finite on all ranks -> clip, step
        else                -> no step, a lower scale

Gradients are linear in the loss, so the scaled run is the same run. The best scale is the largest
that overflows nothing. It moves during training, and is found by trying:

    a step that is finite     the `window`-th in a row    scale x growth; `hysteresis` chances again
                              any other                   nothing
    a step that is not        chances left                one chance less
                              the last chance             scale x backoff, not below min_scale

Chances come back only when the scale grows, so overflows need not follow each other to count: the
first hysteresis - 1 since the last growth are forgiven, and every later one lowers the scale
(DeepSpeed's rule, consecutive_hysteresis=false). Forgiven or not, the step is skipped, and the row
of finite steps begins anew. With hysteresis=1 the scales are torch.amp.GradScaler's, to the bit.

Two common mistakes. One clips before unscaling, by a threshold that means another thing at every
scale; here everything after unscale(), the logged norm too, sees true gradients. The other lets
each rank search for overflow in what it holds, so that ranks disagree where gradients are sharded.
`update` wants one verdict for all: the finiteness of a norm summed over all ranks
(parallel/mesh.py: Mesh.norm), taken before anything, such as clamping, turns infinities into
numbers. Nothing more is sent, and 4 numbers are kept.

Micikevicius et al. 2018 (1710.03740). Defaults: DeepSpeed's 2^16, window 1000, hysteresis 2,
min_scale 1. GradScaler starts at 2^16 as well, and has window 2000, no hysteresis and no minimum.
Both grow by 2 and back off by 1/2. DeepSpeed gives up at the first overflow at the minimum,
GradScaler never; this one gives up after `patience` of them in a row.

Example:
    import torch
    from precision.loss_scale import LossScaler
    layer = torch.nn.Linear(4, 1)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    scaler = LossScaler(hysteresis=1)
    for outlier in 1.0, 1e30, 1.0:
        loss = layer(outlier * torch.randn(8, 4)).square().mean()
        optimizer.zero_grad()
        (loss * scaler.scale).backward()
        gradients = [p.grad for p in layer.parameters()]
        scaler.unscale(gradients)
        norm = torch.nn.utils.get_total_norm(gradients)
        if scaler.update(bool(norm.isfinite())):
            optimizer.step()
    assert scaler.scale == 2**15 and layer.weight.isfinite().all()  # one step was skipped
"""

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor


class LossScaler:
    """`scale` is what the loss of the next step is multiplied by.

    init_power: the first scale is 2^init_power. window, hysteresis, min_scale, growth, backoff: see
    above. fixed: this scale forever; steps that are not finite are skipped all the same. patience:
    the run ends after this many skipped steps in a row at a scale that cannot fall. Raises
    ValueError for what is out of range.
    """

    def __init__(
        self,
        init_power: int = 16,
        window: int = 1000,
        hysteresis: int = 2,
        min_scale: float = 1.0,
        growth: float = 2.0,
        backoff: float = 0.5,
        fixed: float | None = None,
        patience: int = 20,
    ):
        most = 2.0**126  # a scale and its inverse are normal float32 numbers
        check_range("init_power", init_power, -126, 126, whole=True)
        check_range("window", window, 1, math.inf, whole=True)
        check_range("hysteresis", hysteresis, 1, math.inf, whole=True)
        check_range("patience", patience, 1, math.inf, whole=True)
        check_range("min_scale", min_scale, 1 / most, most)
        check_range("growth", growth, 1, most)
        check_range("backoff", backoff, 1 / most, 0.99)
        first_scale = 2.0**init_power
        if fixed is not None:
            check_range("fixed", fixed, 1 / most, most)
            first_scale = fixed
        elif first_scale < min_scale:
            raise ValueError(
                f"--scaler.init_power={init_power} starts at {first_scale:g}, below "
                f"--scaler.min_scale={min_scale}; start higher, or lower the minimum"
            )
        self.window = window
        self.hysteresis = hysteresis
        self.patience = patience
        self.growth = growth
        self.backoff = backoff
        self.fixed = fixed
        self.min_scale = float32(min_scale)
        # What changes from step to step; a checkpoint keeps these four.
        self.scale = float32(first_scale)
        self.good = 0  # finite steps in a row
        self.stuck = 0  # skipped steps in a row where the scale cannot fall
        self.chances = hysteresis  # at 1 the next overflow lowers the scale

    @torch.no_grad()
    def unscale(self, gradients: Mapping[str, Tensor] | Iterable[Tensor]) -> None:
        """Multiplies by 1/scale in place: once a step, after all sums and before any norm.

        Raises ValueError for gradients in fp16.
        """
        if isinstance(gradients, Mapping):
            gradients = gradients.values()
        tensors = list(gradients)
        if any(g.dtype == torch.float16 for g in tensors):
            raise ValueError(
                "gradients in fp16 lose in unscaling what scaling saved; keep weights in "
                "float32, and let autocast compute in fp16"
            )
        # A rank may hold no gradients at all, and _foreach_mul_ takes no empty list.
        if tensors:
            torch._foreach_mul_(tensors, 1 / self.scale)

    def update(self, finite: bool) -> bool:
        """After the norm: may the step be taken? From here on the scale is the next step's.

        finite: is the norm? The same answer on all ranks. Raises ValueError when `patience` is
        exhausted.
        """
        if finite:
            self.stuck = 0
            self.good += 1
            # No overflow in a whole window: a larger scale may fit, and saves smaller numbers.
            if self.good == self.window:
                self.good = 0
                self.chances = self.hysteresis
                self.move(self.growth)
            return True

        self.good = 0
        # Where the scale cannot fall, skipping step after step mends nothing: give up in time.
        cannot_fall = self.fixed is not None or self.scale <= self.min_scale
        self.stuck = self.stuck + 1 if cannot_fall else 0
        if self.stuck >= self.patience:
            why = "--scaler.min_scale allows no less" if self.fixed is None else "it is fixed"
            raise ValueError(
                f"gradients of {self.stuck} steps in a row were not finite at a loss scale of "
                f"{self.scale:g}, and {why}: the run diverged or fp16 cannot hold its numbers; "
                "resume from a checkpoint with a lower --lr, or take --precision=bf16"
            )
        # A single overflow may be an outlier of the data, not of the scale.
        if self.chances > 1:
            self.chances -= 1
        else:
            self.move(self.backoff)
        return False

    def move(self, factor: float) -> None:
        """Multiplies the scale, unless it is fixed or would exceed float32's range."""
        # Rounded at every move, as GradScaler's is: its scale is a float32 tensor.
        new = max(float32(self.scale * factor), self.min_scale)
        if self.fixed is None and new < math.inf:
            self.scale = new

    def state_dict(self) -> dict:
        """What a checkpoint has to keep."""
        return {
            "scale": self.scale,
            "good": self.good,
            "stuck": self.stuck,
            "chances": self.chances,
        }

    def load_state_dict(self, state_dict: dict) -> None:
        """Resumes from what state_dict() gave; {} is a fresh start.

        This run's own arguments decide on a `fixed` scale, the minimum and the number of chances.
        """
        if self.fixed is None:
            self.scale = max(state_dict.get("scale", self.scale), self.min_scale)
        # A shorter window than the saved run's must not be overshot: `good` is compared by ==.
        self.good = min(state_dict.get("good", 0), self.window - 1)
        self.stuck = state_dict.get("stuck", 0)
        self.chances = min(state_dict.get("chances", self.hysteresis), self.hysteresis)


def check_range(name: str, value, low: float, high: float, whole: bool = False) -> None:
    """Raises ValueError unless the value is a number, or an integer if `whole`, in [low, high]."""
    kinds = (int,) if whole else (int, float)
    # type(), not isinstance(): True is an int, and no scale.
    if type(value) not in kinds or not low <= value <= high:
        kind = "an integer" if whole else "a number"
        raise ValueError(
            f"--scaler.{name}={value} is not allowed; it must be {kind} in [{low:g}, {high:g}]"
        )


def float32(x: float) -> float:
    """x rounded to float32, as GradScaler keeps its scale; inf beyond float32's range."""
    return torch.tensor(x, dtype=torch.float64).to(torch.float32).item()


if __name__ == "__main__":
    scaler = LossScaler(window=2)
    for finite in False, False, True, True:
        print(f"finite: {finite}, step taken: {scaler.update(finite)}, scale: {scaler.scale:g}")
