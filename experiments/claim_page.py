"""What people read of a claim on their own text: the plan, a table, a picture, the verdicts."""

from collections import Counter
from pathlib import Path

from experiments.budget import Session, makespan
from experiments.findings import INK, dots, line, markdown, mean_sd, plus_minus
from metrics.outlets import print_line


def plan(session: Session, tokens: int) -> str:
    """Said before it begins. tokens: of the text, to train on."""
    asked, own = session.asked, session.plan
    steps, seeds = own["steps"], own["seeds"]
    lines = [f"{asked.name} on {asked.data}, {tokens:,} tokens to train on; {asked.home}"]
    for name in asked.candidates:
        n, (_, step) = max(1, round(steps * asked.share(name))), own["costs"][name]
        rates = " ".join(f"{lr:.3g}" for lr in asked.rates(name))
        lines.append(f"  {name:24} lr {rates}   {n} steps of {1000 * step:.1f} ms")
    costs = [session.cost(name) for name in asked.candidates] * asked.trials * seeds
    lines.append(
        f"plan: {len(asked.candidates)} candidates x {asked.trials} learning rates x {seeds} seeds"
        f" = {len(costs)} runs of {mean_sd(costs)[0]:.1f} s, {asked.jobs} at a time:"
        f" {makespan(costs, asked.jobs):.0f} s; then whole seeds while time allows,"
        f" {session.spent():.0f} of {asked.budget:.0f} s are spent"
    )
    seen = steps * int(asked.fields["batch_size"]) * int(asked.fields["block_size"])
    if seen > tokens:
        lines.append(f"each run reads the text {seen / tokens:.1f} times: memory counts too")
    return "\n".join(lines)


def write(session: Session) -> None:
    """NAME.md and NAME.png in the claim's folder; the page is printed, too."""
    asked, verdicts = session.asked, session.verdicts()
    page = asked.home / f"{asked.name}.md"
    texts = [one["text"] for one in verdicts]
    lines = [f"# {asked.name} on {Path(asked.data).name}"]
    lines.append(f"**Verdict.** {texts[0]}.")
    if len(texts) > 1:
        lines.append("\n".join(f"- {text}" for text in texts))
    lines += [*notes(session, verdicts), table(session), footer(session)]
    print_line("\n\n".join(lines))
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4.4), dpi=140, layout="constrained")
    picture(session, figure, f"{asked.name} on {Path(asked.data).name}: {texts[0]}")
    figure.savefig(asked.home / f"{asked.name}.png")
    lines.insert(-1, f"![{asked.name}]({asked.name}.png)")
    page.write_text("\n\n".join(lines) + "\n", encoding="utf-8")
    print_line(f"\n{page}\n{page.with_suffix('.png')}")


def ranked(session: Session) -> list[str]:
    """Candidates, the lowest mean loss first; those without a loss last."""
    means = {
        n: mean_sd([*own.values()] or [float("nan")])[0] for n, own in session.losses().items()
    }
    return sorted(means, key=lambda name: (means[name] != means[name], means[name]))


def best_trials(session: Session, name: str) -> Counter:
    """{number of the learning rate: seeds in which it was the best}."""
    found = Counter()
    for seed, loss in session.losses()[name].items():
        for r in session.rows:
            if (r["candidate"], r["seed"], r["val_loss"]) == (name, seed, loss):
                found[r["trial"]] += 1
    return found


def at_rim(session: Session, name: str) -> bool:
    """In most seeds its best learning rate is the lowest, or in most the highest, tried."""
    best, n = best_trials(session, name), session.asked.trials
    return n > 1 and 2 * max(best[0], best[n - 1]) > best.total()


def table(session: Session) -> str:
    asked, losses, cells = session.asked, session.losses(), []
    for name in ranked(session):
        mine, own = [r for r in session.rows if r["candidate"] == name], [*losses[name].values()]
        rates = asked.rates(name)
        best = [f"{rates[i]:.3g} ({n})" for i, n in sorted(best_trials(session, name).items())]
        tried = [[r["val_loss"] for r in mine if r["trial"] == i] for i in range(asked.trials)]
        steps = [1000 * r["step_s"] for r in mine]
        cells.append(
            [
                name,
                plus_minus(own) if own else "",
                len(own),
                ", ".join(best) + " (rim)" * at_rim(session, name),
                *(f"{mean_sd(x)[0]:.3f}" if x else "" for x in tried),
                f"{mean_sd(steps)[0]:.1f}" if steps else "",
            ]
        )
    factors = [asked.range ** (2 * i / max(1, asked.trials - 1) - 1) for i in range(asked.trials)]
    head = ["candidate", "validation loss, nats", "seeds", "best lr (seeds)"]
    head += [f"at lr x {x:.2g}" for x in factors] if asked.trials > 1 else ["at its lr"]
    return markdown([*head, "ms a step"], cells)


def notes(session: Session, verdicts: list[dict]) -> list[str]:
    """What a reader should know before believing it."""
    asked, found = session.asked, []
    rims = [name for name in asked.candidates if at_rim(session, name)]
    if rims:
        found.append(
            f"The best learning rate of {', '.join(rims)} lies at the rim of those tried: it may"
            f" end lower beyond. --range={3 * asked.range:g} --trials={asked.trials + 2} looks"
            " further."
        )
    if len(session.plan["looks"]) > 1:
        found.append(
            f"Judged {len(session.plan['looks'])} times, at {session.plan['looks']} seeds: p is"
            " multiplied by as much."
        )
    if len(verdicts) > 1:
        found.append(f"p is corrected for {len(verdicts)} comparisons (Holm).")
    return found


def footer(session: Session) -> str:
    asked, rows = session.asked, session.rows
    places = {f"commit {r['commit']}, {r['machine']}, {r['date']}" for r in rows}
    batch, block = asked.fields["batch_size"], asked.fields["block_size"]
    return (
        f"{session.plan['steps']} steps of {batch} x {block} tokens, {len(rows)} runs,"
        f" {session.spent():.0f} of {asked.budget:.0f} s; ± is the standard deviation over seeds;"
        f" each seed sweeps {asked.trials} learning rates and counts the best;"
        f" {'; '.join(sorted(places))}."
    )


def picture(session: Session, figure, title: str) -> None:
    ends, sweep, curves = figure.subplots(1, 3, width_ratios=(1, 1, 1.3))
    losses, order, drawn = session.losses(), ranked(session), []
    dots(ends, {name: [*losses[name].values()] or [float("nan")] for name in order})
    ends.set(xlabel="validation loss, each seed at its best lr", title="The end")
    for name, color in zip(order, (*INK, *INK)):
        mine = [r for r in session.rows if r["candidate"] == name]
        rates = {r["lr"]: [x["val_loss"] for x in mine if x["lr"] == r["lr"]] for r in mine}
        line(sweep, dict(sorted(rates.items())), name, color=color, marker="o", ms=4)
        best = best_trials(session, name).most_common(1)
        shown = [r["curve"] for r in mine if best and r["trial"] == best[0][0]]
        points = dict(enumerate(zip(*shown), 1))
        share = {(i - 0.5) / max(1, len(points)): [*x] for i, x in points.items()}
        line(curves, share, name, color=color, lw=1)
        drawn += [values for x, values in share.items() if x > 0.15]
    lows = [r["val_loss"] for r in session.rows if r["val_loss"] == r["val_loss"]]
    if lows:  # a rate that is far too high does not spend the axis
        sweep.set_ylim(top=min(sweep.get_ylim()[1], min(lows) + 1.5))
    sweep.set(xscale="log", xlabel="learning rate", ylabel="validation loss", title="Its sweep")
    curves.set(
        xlabel="share of the run", ylabel="training loss", title="On the way, at its best lr"
    )
    # The first steps do not spend the axis.
    late = [mean_sd(values)[0] for values in drawn if values]
    if late := [x for x in late if x == x]:
        curves.set_ylim(min(late) - 0.05, max(late) + 0.05)
    curves.legend(frameon=False)
    figure.suptitle(title)
