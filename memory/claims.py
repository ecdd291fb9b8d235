"""Runs that the course texts claim, beside what our fastest layout would need for them.

`python -m memory.plan runs` prints the table. GPUs are A100s of 80 GB, or as the row says.

Neighbours: memory/activations.py, memory/flags.py, memory/known.py, memory/layouts.py,
memory/predict.py, memory/ranks.py, memory/shapes.py, optim/adamw.py, optim/attributes.py,
optim/muon.py, parallel/replicas.py, precision/amp.py

Example:
    from memory.claims import fastest
    from memory.predict import Model
    rate, mfu = fastest(Model(12, 768, 12, 12, 50304, 1024), gpus=8, batch=64)
    print(f"GPT-2 124M on 8 A100s: {rate * 8 / 3600:.0f} sequences of 1024 tokens a second")
    assert 0.2 < mfu < 0.6
"""

import inspect
from collections.abc import Iterator

from memory.known import guess
from memory.layouts import plans
from memory.predict import Cluster, Layout, Model, predict


def fastest(m: Model, gpus: int, batch: int) -> tuple[float, float]:
    """Sequences of a GPU-hour, and MFU, of the fastest layout on A100s."""
    plan = plans(m, Cluster(gpus), batch)[0]
    return batch / plan.step / gpus * 3600, plan.mfu


def bert_runs() -> Iterator[tuple]:
    """(run, the text's figure, ours, text / ours or None, MFU, verdict) of each claim.

    gpt_runs and later_runs yield the same.
    """
    # The average length: 90 % of the steps have sequences of 128 tokens, the rest have 512 (Devlin
    # et al. 2018).
    tokens = 0.9 * 128 + 0.1 * 512
    run = "BERT-Base, 16 GPUs, 256 x 1M steps"
    verdict = "wrong: 16 TPU chips of 2018, no GPUs"
    rate, mfu = fastest(Model(12, 768, 12, 12, 30522, 128), 16, 256)
    days = 256e6 * tokens / 128 / rate / 16 / 24
    yield run, "4 days", f"{days:.2f} days", 4 / days, mfu, verdict
    run = "BERT-Large, LAMB, 16K (16 GPUs)"
    verdict = "wrong: 3 days was the baseline, LAMB took 76 minutes (You et al. 2020)"
    rate, mfu = fastest(Model(24, 1024, 16, 16, 30522, 128), 16, 16384)
    days = 512e6 * tokens / 128 / rate / 16 / 24
    yield run, "3 days", f"{days:.2f} days", 3 / days, mfu, verdict


def gpt_runs() -> Iterator[tuple]:
    run = "GPT-2 1.5B, 64 GPUs, 0.5M tokens a step"
    verdict = "no tokens given: a week is WebText (9e9) many times over"
    rate, mfu = fastest(Model(48, 1600, 25, 25, 50304, 1024), 64, 512)
    tokens = rate * 64 * 24 * 7 * 1024
    yield run, "1 week", f"{tokens / 1e9:.0f}e9 tokens", None, mfu, verdict
    run = "GPT-3 175B, 1024 GPUs, 300e9 tokens"
    verdict = "right with A100s (SC21: 34 days); with its own V100s 2.5 times as long"
    rate, mfu = fastest(Model(96, 12288, 96, 96, 50304, 2048), 1024, 1536)
    weeks = 300e9 / 2048 / rate / 1024 / 24 / 7
    yield run, "some weeks", f"{weeks:.1f} weeks", None, mfu, verdict


def later_runs() -> Iterator[tuple]:
    run = "Llama 2 70B, 2000 GPUs, 2e12 tokens"
    verdict = "right (1,720,320 in Touvron et al. 2023)"
    rate, mfu = fastest(Model(80, 8192, 64, 8, 32000, 4096, 10.5), 2048, 1024)
    hours = 2e12 / 4096 / rate
    yield run, "1.7M GPU-hours", f"{hours / 1e6:.2f}M", 1.7e6 / hours, mfu, verdict
    run = "10B, 8 A100s, 20 tokens a parameter"
    rate, mfu = fastest(Model(**guess(10e9)), 8, 512)
    days = 200e9 / 2048 / rate / 8 / 24
    verdict = f"wrong or hardly trained: two weeks see {14 / days * 20:.1f} tokens a parameter"
    yield run, "14 days", f"{days:.0f} days", 14 / days, mfu, verdict
    run = "Llama 3 405B, 16K and 8K H100s, MFU"
    verdict = "high: 38 to 43 % in the report"
    m = Model(126, 16384, 128, 8, 128256, 8192, 9.75)
    x = Layout(8, True, 1, 16, 1, "interleaved", 8, "fsdp", False)
    h100 = dict(peak_flops=989.5e12, memory_bandwidth=3.35e12, node_bandwidth=450e9, bandwidth=50e9)
    clusters = [Cluster(gpus, **h100) for gpus in (16384, 8192)]
    large, small = [predict(m, c, x, 2048, "mixed").mfu for c in clusters]
    yield run, "38 to 45 %", f"{large:.0%} to {small:.0%}", None, small, verdict


def runs() -> str:
    """The course texts' runs: what they claim, what our fastest layout needs, what is wrong."""
    lines = [f"{'run':41}{'the text':>16}{'ours':>16}{'text/ours':>11}   MFU  verdict"]
    for run, text, ours, ratio, mfu, verdict in (*bert_runs(), *gpt_runs(), *later_runs()):
        ratio = f"{ratio:.2f}" if ratio else "-"
        lines.append(f"{run:41}{text:>16}{ours:>16}{ratio:>11} {mfu:5.0%}  {verdict}")
    lines += ["", "A100s of 80 GB, or as said; sequences and tokens are the papers'."]
    return "\n".join(lines)


if __name__ == "__main__":
    example = __doc__.partition("Example:\n")[2]
    print(example)
    exec(inspect.cleandoc(example))
