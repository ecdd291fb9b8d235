"""Loss scaling for fp16: gradients that would vanish in half precision are carried at a multiple.

    fp16 carries   smallest   smallest with all 11 bits   largest   a gradient of 1e-8 becomes
    g              6.0e-08    6.1e-05                     65504     0
    g x 2^16       9.1e-13    9.3e-10                     1.0       1.0e-08

    loss x scale -> backward -> sum over ranks -> x 1/scale -> norm
        finite on all ranks -> clip, step
        else                -> no step, a lower scale

Gradients are linear in the loss, so the scaled run is the same run. The best scale is the largest
that overflows nothing, and it moves during training; it is found by trying:

    a step that is finite     the `window`-th in a row    scale x growth; `hysteresis` chances again
                              any other                   nothing
    a step that is not        chances left                one chance less
                              the last chance             scale x backoff, not below min_scale

Since chances come back only when the scale grows, overflows need not follow each other to count:
the first hysteresis - 1 since the last growth are forgiven, and from then on each lowers the scale
(DeepSpeed's rule, consecutive_hysteresis=false). Forgiven or not, the step is skipped and the row
of finite ones begins anew. With hysteresis=1 the scales are those of torch.amp.GradScaler, to the
bit.

Two common mistakes: to clip before unscaling, by a threshold that then means another thing at every
scale (here everything after unscale(), the logged norm too, sees true gradients); and to let each
rank look for overflow in what it holds, so that ranks part where gradients are sharded. `update`
wants one verdict for all: the finiteness of a norm summed over all ranks (parallel/mesh.py:
Mesh.norm), taken before anything that turns infinities into numbers, as clamping does. Nothing more
is sent, and 4 numbers are kept.

Micikevicius et al. 2018 (1710.03740). Defaults: DeepSpeed's 2^16, window 1000, hysteresis 2,
min_scale 1; GradScaler starts at 2^16 as well, and has window 2000, no hysteresis and no minimum.
Both grow by 2 and back off by 1/2. DeepSpeed gives up at the first overflow at the minimum,
GradScaler never; here after `patience` of them in a row.
"""

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor


class LossScaler:
    """`scale` is what the loss of the next step is multiplied with.

    init_power: the first scale is 2^init_power. window, hysteresis, min_scale, growth, backoff: see
    above. fixed: this scale for ever; steps that are not finite are skipped all the same. patience:
    so many skipped steps in a row at a scale that cannot fall end the run. Raises ValueError for
    what is out of range.
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
        whole, number, most = (int,), (int, float), 2.0**126
        for name, value, kinds, low, high in (
            ("init_power", init_power, whole, -126, 126),
            ("window", window, whole, 1, math.inf),
            ("hysteresis", hysteresis, whole, 1, math.inf),
            ("patience", patience, whole, 1, math.inf),
            ("min_scale", min_scale, number, 1 / most, most),
            ("growth", growth, number, 1, most),
            ("backoff", backoff, number, 1 / most, 0.99),
            ("fixed", 1 if fixed is None else fixed, number, 1 / most, most),
        ):
            if type(value) not in kinds or not low <= value <= high:
                raise ValueError(
                    f"--scaler.{name}={value} is not allowed; it must be "
                    f"{'an integer' if kinds is whole else 'a number'} in [{low:g}, {high:g}]"
                )
        if fixed is None and 2.0**init_power < min_scale:
            raise ValueError(
                f"--scaler.init_power={init_power} starts at {2.0**init_power:g}, below "
                f"--scaler.min_scale={min_scale}; start higher, or lower the minimum"
            )
        self.window, self.hysteresis, self.patience = window, hysteresis, patience
        self.growth, self.backoff, self.fixed = growth, backoff, fixed
        self.min_scale = float32(min_scale)
        self.scale = float32(2.0**init_power if fixed is None else fixed)
        # Finite steps in a row; skipped ones in a row where scale cannot fall
        self.good = self.stuck = 0
        self.chances = hysteresis  # at 1 the next overflow lowers the scale

    @torch.no_grad()
    def unscale(self, gradients: Mapping[str, Tensor] | Iterable[Tensor]) -> None:
        """Multiplies by 1/scale in place: once a step, when all sums are done and before any
        norm."""
        tensors = [*(gradients.values() if isinstance(gradients, Mapping) else gradients)]
        if any(g.dtype == torch.float16 for g in tensors):
            raise ValueError(
                "gradients in fp16 lose in unscaling what scaling saved; keep weights in "
                "float32, and let autocast compute in fp16"
            )
        if tensors:
            torch._foreach_mul_(tensors, 1 / self.scale)

    def update(self, finite: bool) -> bool:
        """After the norm: may the step be taken? finite: the same word on all ranks. The scale is
        now the next step's. Raises ValueError when `patience` is at its end."""
        if finite:
            self.stuck, self.good = 0, self.good + 1
            if self.good == self.window:
                self.good, self.chances = 0, self.hysteresis
                self.move(self.growth)
            return True
        self.good = 0
        self.stuck = self.stuck + 1 if self.fixed is not None or self.scale <= self.min_scale else 0
        if self.stuck >= self.patience:
            why = "it is fixed" if self.fixed is not None else "--scaler.min_scale allows no less"
            raise ValueError(
                f"gradients of {self.stuck} steps in a row were not finite at a loss scale of "
                f"{self.scale:g}, and {why}: the run diverged or fp16 cannot hold its numbers; "
                "go on from a checkpoint with a lower --lr, or take --precision=bf16"
            )
        if self.chances > 1:
            self.chances -= 1
        else:
            self.move(self.backoff)
        return False

    def move(self, factor: float) -> None:
        new = max(float32(self.scale * factor), self.min_scale)
        if self.fixed is None and new < math.inf:
            self.scale = new

    def tree(self) -> dict:
        """What a checkpoint has to keep."""
        return {
            "scale": self.scale,
            "good": self.good,
            "stuck": self.stuck,
            "chances": self.chances,
        }

    def load(self, tree: dict) -> None:
        """Takes up what tree() gave, {} for nothing; a `fixed` scale, the minimum and the number of
        chances are this run's to say."""
        if self.fixed is None:
            self.scale = max(tree.get("scale", self.scale), self.min_scale)
        self.good, self.stuck = min(tree.get("good", 0), self.window - 1), tree.get("stuck", 0)
        self.chances = min(tree.get("chances", self.hysteresis), self.hysteresis)


def float32(x: float) -> float:
    """Rounded as GradScaler keeps its scale; inf beyond float32's range."""
    return torch.tensor(x, dtype=torch.float64).to(torch.float32).item()
