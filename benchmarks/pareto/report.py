"""What the rows of ``benchmarks.pareto`` say, as tables that a person reads."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from benchmarks.hardware import statement
from benchmarks.pareto.changes import BASELINE, BUDGETS, CONTROL, LIBRARY, REFERENCE, TRAINED, VARIANT
from benchmarks.pareto.front import front
from benchmarks.pareto.points import OTHER, OURS, UNDECIDED, Point, Seed, contests, shown, verdict
from surgery.measure.rows import CEILING, EARLIER, is_ceiling

HEAD = """# Recovery, and what it costs elsewhere: every selector beside everything people use today

Written by `python -m benchmarks.pareto`; [how it was done](#how-it-was-done). {statement}

All numbers but seconds in %. Recovery: mean ± standard deviation over seeds, in brackets its 95 % interval (paired
bootstrap over evaluation items within each seed; it says nothing about other seeds). Touched: parameters whose bits
differ from the later model's. Δ: the change of another domain, in points, mean over seeds; worst Δ: the least of them
in each seed, mean over seeds (below 0 something is lost). Seconds: choosing and writing, or training, on one core;
without the evaluation. β: a share of the neurons, of units of several kinds of their parameters; entries: a share of
the weights that may be taken.
"""

HOW = """## How it was done

On live models, what is done today about an earlier skill that a later stage damaged. Each method edits the later
checkpoint, at every value of its knob; the edited model is evaluated and put back bit for bit. All values are in this
report and in `pareto.json.gz`; none was left out and none was chosen.

**Axes.** Recovery of the damaged domain; the change on every other domain, of which the worst counts; parameters whose
bits differ from the later model's, after rounding to the checkpoint's bf16; seconds to choose and write, or to train.
Scores are exact probabilities of the right answer on 256 items a domain, so they have no sampling noise. Intervals
resample items within a seed (paired, 2 000 times, the same items for every method); the spread between seeds is the ±.
A seed that did not lose significantly is left out: it has nothing to recover.

**What each may see.** The selectors see the 128 calibration prompts of the damaged domain, never an evaluation item;
A, M and C see what they need of them and of the checkpoints. Strengths are fitted to the same prompts, on a copy in
float32. The baselines see only weights, but CRANE and RegMean, which see the other domains' calibration prompts too. Random controls are drawn three times and averaged.

| method | what was taken | what is ours |
|---|---|---|
| WiSE-FT | θB + α (θA − θB), all parameters (arXiv 2109.01903) | θA takes the place of the zero-shot model; α = 1 is full restoration |
| LiNeS | layer ℓ of L keeps the share α + (1 − α) ℓ / (L − 1) of δB, embeddings and the last norm keep α (arXiv 2410.17146, its editing of one fine-tuned model) | θA takes the place of the pre-trained model |
| most-changed entries | ParamRestore: single entries with the largest abs(δB) / (abs(θA) + 1e-8) of all layers' weights together, without norms and embeddings (its default region) | ranked in float32; the tool ranks in bf16 by default |
| most-changed neurons | the largest ‖δB,n‖ of the whole model (what marv does) | the neurons are those of the library's layout |
| layers | whole layers set back: attention, MLP, norms | most changed first (by ‖δB‖), and each layer alone: all are shown, so the best of them is chosen by the reader, on evaluation items |
| TIES trim | the first step of TIES (arXiv 2306.01708): per tensor keep the share `density` of δB's largest entries | with one task vector the other two steps do nothing. What is dropped is reverted, so this reverts the *least* changed entries |
| DARE | drop entries of δB with probability p, divide the rest by 1 − p (arXiv 2311.03099) | applied to one δB, not to a merge. What stays moves *away* from θA |
| spectral | DG-Hard (Spectral Unforgetting): per matrix of at least 1 024 entries keep the singular values of δB above factor · ω(β) · median / μ(β) (arXiv 1305.5870); the tool's factor is 1 | the sweep over the factor; bits are copied where all or nothing stays |
| SAR | Spectral Rewiring: of each matrix's δB keep U Uᵀ δB,k V Vᵀ with δB,k its k highest singular values and U, V the first k singular vectors of θA, k a share of the short side (arXiv 2607.03065, Algorithm 1); *the whole space*: all singular vectors of θA, as the tool does by default. All other tensors are θA's | the sweep; θA takes the place of the base model |
| CRANE's gate | the single weights with the highest max(0, min(g_A · δB, g_B · δB)), g the gradients of the damaged domain's and of all other domains' cross-entropy (arXiv 2605.14084), set back | CRANE uses the gate only to weigh whole components; reverting the weights themselves is ours |
| CRANE | θB + α S T(θA − θB): per matrix the larger half of the entries, doubled; S is 1 for MLPs and for attention the ratio of the gates' sums, each over its weights' norm (same source) | without its projection away from tool-call and chat tokens; sees the other domains' prompts |
| RegMean | per linear layer the least-squares fit to θA's outputs on the damaged domain's inputs and, λ times as heavy, to θB's on the other domains' (arXiv 2212.09849); what is off the Gram matrices' diagonal is multiplied by 0.9 | the weight λ; what is not linear stays θB's; *least squares*: Gram matrices as they are, with 0.001 of their mean diagonal added |
| GRPO | the damaged domain's own stage in `lab/train.py` (rate, group size), 5, 10 and 20 steps from the later checkpoint, in float32, rounded to bf16 | once on the 128 calibration prompts, once on the training prompts; one run each |

**Reading it.** *Who wins* takes, within a bound on the loss elsewhere or on the parameters touched, the best point of
the library's selectors and the best of everything else that trains nothing, and names a winner only where the paired
interval of their difference leaves out zero. Both are maxima over many points on the same items, so both are a little
too good; the side with more points gains more from that, and the library has more. Most baselines touch attention, norms
or embeddings as well, which neuron selectors can't: the ceiling row says what all MLP neurons give.

**Seeds of another order** of training: `SEED_FOLDER:code,qa,math` (the third stage does the damage). Rows of the same
checkpoints and prompts are taken from `pareto.json.gz`, not measured again; `--fresh` measures all.
"""  # noqa: E501


FITTED = "D (KL), strengths ≤ 2", "D, strengths ≤ 2"
ASKED = "D (KL)", "D", FITTED[1]  # of neurons
ALONE = ("D (KL)", "D", "D of single weights", "D of units (neurons and value channels)")


def _recovery(point: Point) -> str:
    spread = f" ± {100 * point.sd:.1f}" if len(point.seeds) > 1 else ""
    return f"{100 * point.recovery:.1f}{spread} [{100 * point.low:.1f}, {100 * point.high:.1f}]"


def _delta(change: tuple[float, float, float]) -> str:
    mean, low, high = (100 * value for value in change)
    return f"{mean:+.2f} [{low:.2f}, {high:.2f}]"


def markdown(runs: Mapping[str, Sequence[Mapping[str, Any]]], found: Mapping[str, Sequence[Point]]) -> str:
    """The whole report; ``runs`` and ``found`` by the pair's name."""
    parts = [HEAD.format(statement=statement()), _short(found), _targets(found)]
    measured = sorted({one for group in runs.values() for run in group for one in run["measured"]} - {statement()})
    parts += [f"Some rows were measured earlier: {one}.\n" for one in measured]
    for name, group in runs.items():
        parts += [f"## {name}\n", _references(group)]
        if not found[name]:
            parts.append("No seed showed a significant loss: there is nothing to recover.\n")
            continue
        parts += ["### Who wins\n", *_wins(found[name])]
        parts += [
            "### The front\n\nWithout training; baselines and controls in bold, variants of D that are no selectors of "
            "the library in italics.\n",
            _front(found[name]),
        ]
        parts += ["### Neurons and units, by budget\n", _budgets(found[name])]
        parts += ["### Variants of D\n", _variants(found[name])]
        everything = _everything(found[name], len(group))
        parts.append(
            f"<details><summary>Everything, at every value of its knob</summary>\n\n{everything}\n</details>\n"
        )
    return "\n".join([*parts, HOW])


def _references(group: Sequence[Mapping[str, Any]]) -> str:
    """What each seed lost, and every domain before and after."""
    lines = []
    for seed in map(Seed, group):
        low, high = (100 * value for value in seed.interval)
        moved = ", ".join(
            f"{domain} {100 * seed.earlier['metrics'][domain]:.1f} → {100 * score:.1f}"
            for domain, score in seed.later["metrics"].items()
        )
        note = "" if seed.damaged else " **No significant loss: left out below.**"
        lost = 100 * float(seed.lost_items.mean())
        lines.append(f"- {seed.name}: lost {lost:.1f} points [{low:.1f}, {high:.1f}] ({moved}).{note}")
    return "\n".join(lines) + "\n"


def _budgets(found: Sequence[Point]) -> str:
    """Recovery of everything that reverts whole neurons or units, by budget."""
    lines = ["| | " + " | ".join(f"{100 * b:g} %" for b in BUDGETS) + " | touched | worst Δ | seconds |"]
    lines.append("|---|" + "---|" * (len(BUDGETS) + 3))
    of_units = [
        point for point in found if point.knob == "β" and point.kind != VARIANT and not is_ceiling(point.method)
    ]
    for name, row in _curves(of_units).items():
        last = f"{100 * row[-1].touched:.1f} | {100 * min(point.worst for point in row):+.2f}"
        seconds = np.mean([point.seconds for point in row])
        lines.append(f"| {name} | " + " | ".join(map(_recovery, row)) + f" | {last} | {seconds:.2f} |")
    for point in found:
        if point.method == EARLIER or is_ceiling(point.method):
            last = f"{100 * point.touched:.1f} | {100 * point.worst:+.2f} | {point.seconds:.2f} |"
            lines.append(f"| {point.method} | " + " | " * (len(BUDGETS) - 1) + f"{_recovery(point)} | {last}")
    return "\n".join(lines) + "\n\nTouched at the largest budget; the worst Δ over all budgets.\n"


def _curves(found: Sequence[Point]) -> dict[str, list[Point]]:
    """Each method's points, by rising budget."""
    curves: dict[str, list[Point]] = {}
    for point in sorted(found, key=lambda point: point.value):
        curves.setdefault(point.method, []).append(point)
    return {name: curves[name] for name in dict.fromkeys(point.method for point in found)}


def _variants(found: Sequence[Point]) -> str:
    """What D and each variant of it recovers more than D by KL with as many neurons, and what it costs elsewhere."""
    of = [point for point in found if point.kind == VARIANT or point.method in ("D (KL)", "D", *FITTED)]
    curves = _curves(of)
    if "D (KL)" not in curves or len(curves) == 1:
        return "None was measured.\n"
    plain = {point.value: point for point in curves["D (KL)"]}
    lines = [
        "D by KL; then what D and the variants recover more with as many neurons, in points, and in brackets 95 % of",
        "that difference over the same resampled items. The worst Δ is that of all budgets up to the one named.\n",
        "| | " + " | ".join(f"{100 * b:g} %" for b in BUDGETS) + " | worst Δ to 4 % | to 32 % | seconds |",
        "|---|" + "---|" * (len(BUDGETS) + 3),
    ]
    for name, row in curves.items():
        cells = [_recovery(point) if name == "D (KL)" else _gain(point, plain[point.value]) for point in row]
        least = [min((point.worst for point in row if point.value <= end), default=np.nan) for end in (0.04, 0.32)]
        worst = [f"{100 * value:+.2f}" for value in least]
        seconds = f"{np.mean([point.seconds for point in row]):.2f}"
        lines.append(f"| {' | '.join([name, *cells, *worst, seconds])} |")
    return "\n".join(lines) + "\n"


def _gain(point: Point, plain: Point) -> str:
    if point.seeds != plain.seeds:
        return "–"
    low, high = (100 * float(value) for value in np.quantile(point.samples - plain.samples, [0.025, 0.975]))
    return f"{100 * (point.recovery - plain.recovery):+.1f} [{low:.1f}, {high:.1f}]"


def _everything(found: Sequence[Point], seeds: int) -> str:
    domains = list(found[0].deltas)
    lines = ["| method | knob | recovery | touched | " + " | ".join(f"Δ {domain}" for domain in domains)]
    lines[0] += " | worst Δ | seconds |"
    lines.append("|---|" + "---|" * (5 + len(domains)))
    for point in found:
        seen = f" ({len(point.seeds)} of {seeds} seeds)" if len(point.seeds) < seeds else ""
        lines.append(
            f"| {point.method}{seen} | {f'{point.knob} {shown(point)}' if point.knob else ''} | {_recovery(point)} "
            f"| {100 * point.touched:.1f} | {' | '.join(map(_delta, point.deltas.values()))} "
            f"| {100 * point.worst:+.2f} | {point.seconds:.2f} |"
        )
    return "\n".join(lines) + "\n"


def _short(found: Mapping[str, Sequence[Point]]) -> str:
    """How many of the contests are won, by all selectors and by D alone, whose curve has no more points than others."""
    lines = [
        "How many comparisons within a bound (see *Who wins*) the library wins, loses to the best baseline or control,",
        "and leaves open: with the best of all its selectors, and with one alone.\n",
        f"| pair | seeds | all selectors | {' | '.join(ALONE)} |",
        "|---|" + "---|" * (2 + len(ALONE)),
    ]
    for pair, group in found.items():
        sides = [[point for point in group if point.kind != LIBRARY or point.method == name] for name in ALONE]
        seeds = len(group[0].seeds) if group else 0
        lines.append(f"| {pair} | {seeds} | " + " | ".join(map(_counts, [group, *sides])) + " |")
    return "\n".join(lines) + "\n"


def _counts(found: Sequence[Point]) -> str:
    results = [verdict(one.library, one.other)[1] for one in contests(found)]
    return f"{results.count(OURS)} won, {results.count(OTHER)} lost, {results.count(UNDECIDED)} open"


def _targets(found: Mapping[str, Sequence[Point]]) -> str:
    """What was asked of D, as a table of what it does."""
    lines = [
        "What was asked of D of neurons, on the mean over seeds, up to 16 % of them; **bold** where it is not met,",
        "and – where A×M×C recovers nothing:\n",
        "| pair | by | × A×M×C at 1, 2, 4 % (≥ 2) | of the ceiling (≥ 90 %) | least Δ elsewhere (≥ −0.2) |",
        "|---|---|---|---|---|",
    ]
    for pair, group in found.items():
        held = {(point.method, point.value): point for point in group}
        for name in ASKED:
            first = held.get((name, BUDGETS[0]))
            if first is None or first.seeds != held["A×M×C", BUDGETS[0]].seeds:
                continue
            pairs = [(held[name, beta].recovery, held["A×M×C", beta].recovery) for beta in BUDGETS[:3]]
            few = [held[name, beta] for beta in BUDGETS if beta <= 0.16]
            share = max(point.recovery for point in few) / held[CEILING, 1.0].recovery
            least, domain = min((mean, d) for point in few for d, (mean, _, _) in point.deltas.items())
            cells = (
                ", ".join(_met(f"{d / amc:.1f}" if amc > 0 else "–", d >= 2 * amc) for d, amc in pairs),
                _met(f"{100 * share:.0f} %", share >= 0.9),
                _met(f"{100 * least:+.2f}", least >= -0.002) + f" ({domain})",
            )
            lines.append(f"| {pair} | {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _met(text: str, met: bool) -> str:
    return text if met else f"**{text}**"


def _front(found: Sequence[Point]) -> str:
    """The untrained points that no other one beats: none loses as little elsewhere and recovers more."""
    ends = front(
        [point for point in found if point.kind not in (TRAINED, REFERENCE)], lambda point: max(0, -point.worst)
    )
    lines = ["| worst loss elsewhere | recovery | touched | method |", "|---|---|---|---|"]
    for point in ends:
        marks = {BASELINE: "**", CONTROL: "**", VARIANT: "*"}.get(point.kind, "")
        name = f"{marks}{point}{marks}"
        cells = f"{100 * max(0, -point.worst):.2f} | {_recovery(point)} | {100 * point.touched:.1f} | {name}"
        lines.append(f"| {cells} |")
    return "\n".join(lines) + "\n"


def _wins(found: Sequence[Point]) -> Iterator[str]:
    yield (
        "The best of each kind within a bound, chosen on the same evaluation items (so all are a little too good). "
        "In brackets: 95 % of the difference, other minus library, over items.\n"
    )
    rows: dict[str, list[str]] = {}
    for one in contests(found):
        cells = [
            one.bound,
            _named(one.library),
            _named(one.other),
            *verdict(one.library, one.other),
            _named(one.trained),
        ]
        rows.setdefault(one.cost, []).append("| " + " | ".join(cells) + " |")
    for cost, lines in rows.items():
        head = f"| {cost} | library | baselines and controls | difference | who wins | trained |\n" + "|---" * 6 + "|"
        yield "\n".join([head, *lines]) + "\n"


def _named(point: Point | None) -> str:
    return f"{100 * point.recovery:.1f}: {point}" if point else "–"
