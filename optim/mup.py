"""μP, the maximal update parametrization: the best learning rate stays put as the model gets wider.

With m = width / base width (Yang et al. 2022, 2203.03466, table 8, throughout: mixing its tables
counts twice):

    kind        initial std           output times   lr of SGD   Adam, Lion   Muon
    embedding   as at base width      1              m           1            1 (by AdamW)
    matrix      1/sqrt(fan_in)        1              1           1/m          1
    head        as at base width      1/m            m           1            1 (by AdamW)
    scalar      as at base width      1              m           1            1 (by AdamW)

    attention logits   q·k / d_head instead of q·k / sqrt(d_head); here 8 q·k / d_head, which is the
                       usual at d_head = 64

Why: Adam's update of a matrix has entries of one size and lines up with its input, so the change of
each output grows with fan_in = m, and lr falls as 1/m. Muon's update has spectral norm
sqrt(rows/cols) at any width: nothing to correct; with adjust_lr_fn='match_rms_adamw' it grows with
sqrt(m), and lr falls as 1/sqrt(m). So it does for SOAP and KL-SOAP, whose entries are Adam's in a
rotated basis, where they line up with no input; their head's lr grows with sqrt(m), as the outputs'
1/m expects sums that grow with m. Initial std, output and attention scaling belong to the model
(`GPTConfig.mup_base_width`); a tied head keeps the embedding's lr.

The widths inside a block grow with it: n_head head_dim and, where they are given, mlp_width.

Where a tutorial errs: it divides attention logits by m² and gives the hidden matrices no lr rule
at all. Depth does not transfer; nor, without more, does weight decay (lr·λ shrinks with lr).

Neighbours: optim/attributes.py

Example:
    import torch
    from optim.mup import lr_multipliers
    class Mine(torch.optim.Adam):
        mup_rule = "adam"
    multipliers = lr_multipliers(Mine, width=1024, base_width=256)
    assert multipliers == {"embedding": 1.0, "matrix": 0.25, "head": 1.0, "scalar": 1.0}
"""

from optim.attributes import attribute, own_classes


def lr_multipliers(
    optimizer_class: type, width: int, base_width: int, adjust_lr_fn: str = "original", **unused
) -> dict[str, float]:
    """kind of parameter -> what its lr is multiplied by.

    adjust_lr_fn: Muon's; options of other optimizers change nothing. Raises ValueError for an
    optimizer without a rule.
    """
    m = width / base_width
    rule = attribute(optimizer_class, "mup_rule")
    # A gradient falls as 1/m. In a matrix the sum over its fan-in makes up for that.
    if rule == "sgd":
        return {"embedding": m, "matrix": 1.0, "head": m, "scalar": m}
    # Adam removes the gradient's 1/m, so in a matrix the sum over the fan-in grows with m.
    if rule == "adam":
        matrix = 1 / m
    # Adam's entries in a rotated basis line up with no input: a sum over them grows with sqrt(m).
    elif rule == "soap":
        return {"embedding": 1.0, "matrix": m**-0.5, "head": m**0.5, "scalar": 1.0}
    elif rule == "muon":
        matrix = m**-0.5 if adjust_lr_fn == "match_rms_adamw" else 1.0
    else:
        ours = own_classes().values()
        known = [cls.__name__ for cls in ours if attribute(cls, "mup_rule") is not None]
        raise ValueError(
            f"there is no μP rule for {optimizer_class.__name__}, whose step follows the weights' "
            f"size; there is one for {', '.join(known)}"
        )
    return {"embedding": 1.0, "matrix": matrix, "head": 1.0, "scalar": 1.0}


if __name__ == "__main__":
    for name, cls in own_classes().items():
        if attribute(cls, "mup_rule") is not None:
            print(f"{name:33} at four times the width: lr x {lr_multipliers(cls, 4, 1)}")
