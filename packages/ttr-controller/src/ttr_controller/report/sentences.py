"""The page's sentences, each computed from the data; they turn when the data turn."""

from __future__ import annotations

from ttr_controller.report.findings import (
    ALL_FULL,
    ALL_STUDENT,
    PARTLY_READY,
    PROBE,
    READY,
    Comparison,
    FidelitySeries,
    Payoff,
    Reading,
    compare_policy,
    fidelity_series,
    payoff,
    points_of,
    preset_series,
    times_of,
    variants_of,
)
from ttr_controller.report.results import Controller, Distillation, Fidelity, Heatmap, Pareto, Results, Timing
from ttr_controller.report.units import (
    NBSP,
    capital,
    duration,
    large,
    listing,
    percent,
    pretty,
    quantity,
    significant,
    whole,
)

SAME_TIME = 0.1
"""Two times measured once that differ by less than this share are called equal."""


def headline(results: Results) -> str:
    """What was run, in one sentence."""
    teacher, controller, pareto = results.teacher, results.controller, results.pareto
    name = f"{pretty(results.preset)} students"
    if teacher is None:
        return f"A run with {name} that has not yet recorded its teacher."
    layers = len(teacher.layers)
    text = f"{capital(name)} in place of full attention in {count(layers, 'layer')} of a tiny Flux-type model"
    if pareto is not None and pareto.prompts:
        text += f", tested on {count(len(pareto.prompts), 'held-out prompt')}"
    if teacher.tokens is not None and teacher.steps is not None:
        text += f" at {whole(teacher.tokens)} image tokens and {count(teacher.steps, 'step')}"
    if controller is not None:
        source = f"learnt from {count(controller.rollouts, 'rollout')}" if controller.rollouts else "set by a probe"
        text += f"; a policy {source} chose where full attention stays"
    return f"{text}."


def count(number: int, noun: str) -> str:
    """``1 layer``, ``6 layers``."""
    return f"{whole(number)}{NBSP}{noun}{'' if number == 1 else 's'}"


def checks_sentence(results: Results) -> str:
    """How many checks passed, failed, and were not measured."""
    if not results.checks:
        return "This run has not reached its checks."
    total = len(results.checks)
    passed = sum(check.passed is True for check in results.checks)
    failed = sum(check.passed is False for check in results.checks)
    text = f"{passed} of {count(total, 'check')} passed"
    if failed:
        text += f", {failed} failed"
    if total - passed - failed:
        text += f", {total - passed - failed} not measured"
    return f"{text}."


def in_short(results: Results) -> list[str]:
    """The run's main results, one sentence each."""
    lines = []
    if results.fidelity is not None:
        series = preset_series(results.fidelity, results.preset)
        if series is not None:
            lines.append(_series_sentence(series))
    if results.pareto is not None:
        lines.extend(student_sentences(results.pareto))
        lines.append(policy_sentence(compare_policy(results.pareto)))
    if results.timing is not None:
        lines.extend(payoff_sentences(results.timing, preferred=results.preset))
    return lines or ["Nothing has been measured yet."]


def fidelity_sentences(fidelity: Fidelity) -> list[str]:
    """Mean and worst distance of each variant, and what training changed."""
    series = fidelity_series(fidelity)
    lines = [_series_sentence(item) for item in series]
    means = {(item.variant, item.when): item.mean for item in series}
    for variant in dict.fromkeys(item.variant for item in series):
        before, after = means.get((variant, "before")), means.get((variant, "after"))
        if before and after is not None:
            change = after / before - 1
            effect = f"lowered the mean by {percent(-change, 2)}"
            if change > 0:
                effect = f"raised the mean by {percent(change, 2)}, no gain"
            if abs(change) < 0.005:
                effect = "left the mean as it was"
            lines.append(f"Training {pretty(variant)} {effect} ({significant(before)} to {significant(after)}).")
    return lines


def _series_sentence(item: FidelitySeries) -> str:
    text = f"{capital(item.variant)}, {item.when} training: mean cosine distance {significant(item.mean)}, "
    text += f"worst {significant(item.worst)} ({item.worst_layer}); {item.ready} of {count(item.layers, 'layer')} "
    text += f"at most {READY}"
    if item.ready < item.layers:
        text += f", {item.partly_ready} at most {PARTLY_READY}"
    return f"{text}."


def student_sentences(pareto: Pareto) -> list[str]:
    """How good the pictures are with students everywhere."""
    points = points_of(pareto, ALL_STUDENT)
    if not points:
        return []
    point = points[0]
    facts = [f"a latent error of {significant(point.latent_rmse)}"]
    if point.psnr is not None:
        facts.append(f"a PSNR of {quantity(point.psnr, 'dB')}")
    if point.retrieval is not None:
        facts.append(f"a retrieval accuracy of {significant(point.retrieval)}")
    return [
        f"With students everywhere, at {percent(point.cost)} of the attention cost, pictures have {listing(facts)}."
    ]


def policy_sentence(comparisons: list[Comparison]) -> str:
    """Whether the policy beats the best simple baseline, over all costs it was measured at."""
    judged = [item for item in comparisons if item.best_simple is not None]
    if not judged:
        return "The policy has not been measured beside a simple baseline at equal cost."
    worse = [item for item in judged if item.worse]
    if not worse:
        return f"The policy's latent error is no larger than the best simple baseline's at {_costs(judged)}."
    lead = f"The policy is worse than the best simple baseline at {_costs(worse)}"
    if len(worse) == len(judged):
        return f"{lead}: here the policy does not pay."
    return f"{lead}, and no worse at {_costs([item for item in judged if not item.worse])}."


def _costs(comparisons: list[Comparison]) -> str:
    return f"{listing([percent(item.cost) for item in comparisons])} of the attention cost"


def comparison_sentences(comparisons: list[Comparison]) -> list[str]:
    """One sentence per cost: the policy, the best simple baseline, and the probe alone."""
    lines = []
    for item in comparisons:
        text = f"At {percent(item.cost)} of the attention cost the policy's latent error is "
        text += significant(item.policy.error)
        best, probe = item.best_simple, item.reading(PROBE)
        text += f", {_against(item, best)}" if best is not None else "; no simple baseline was measured there"
        if probe is not None:
            gain = (
                "learning adds to the probe"
                if item.policy.error < probe.error
                else "learning adds nothing to the probe"
            )
            text += f". The probe alone has {_read(probe)}: {gain} here"
        lines.append(f"{text}.")
    return lines


def _read(reading: Reading) -> str:
    return f"{significant(reading.error)}{' (interpolated)' if reading.interpolated else ''}"


def _against(item: Comparison, other: Reading) -> str:
    excess = item.excess(other)
    name = f"the best simple baseline ({other.method}, {_read(other)})"
    if abs(excess) < 0.0005:
        return f"equal to {name}"
    relation = "above" if excess > 0 else "below"
    text = f"{percent(abs(excess), 2)} {relation} {name}"
    if not other.interpolated and item.within_error(other):
        text += ", a difference within the standard error"
    return text


def cost_and_time_sentence(pareto: Pareto) -> str | None:
    """Whether lower cost also meant less time while sampling."""
    full, student = points_of(pareto, ALL_FULL), points_of(pareto, ALL_STUDENT)
    if not full or not student or full[0].seconds is None or student[0].seconds is None:
        return None
    exact, ours = full[0].seconds, student[0].seconds
    facts = f"{duration(ours)} with students everywhere, {duration(exact)} with full attention everywhere"
    if abs(ours / exact - 1) < SAME_TIME:
        return f"Less arithmetic hardly changed the time on this machine at this size: {facts}, each measured once."
    if ours < exact:
        return f"Less arithmetic was also less time on this machine: {facts}, each measured once."
    return f"Less arithmetic was not less time on this machine at this size: {facts}, each measured once."


def payoff_sentences(timing: Timing, preferred: str | None = None) -> list[str]:
    """For each variant (or the preferred one alone, where it was timed): from how many tokens it pays."""
    variants = variants_of(timing)
    if preferred in variants:
        variants = [name for name in variants if name == preferred]
    lines = []
    for variant in variants:
        lines.append(_payoff_sentence(timing, payoff(timing, variant, "step"), "A whole step"))
        lines.append(_payoff_sentence(timing, payoff(timing, variant, "attention"), "Attention alone"))
    return lines


def _payoff_sentence(timing: Timing, found: Payoff, what: str) -> str:
    with_variant = f"{what} with {pretty(found.variant)}"
    if found.verdict == "unknown":
        return f"{with_variant} has not been timed beside exact attention."
    largest = found.sizes[-1]
    exact = times_of(timing, "exact", found.kind)[largest]
    own = times_of(timing, found.variant, found.kind)[largest]
    at_largest = f"{quantity(own, 'ms')} against {quantity(exact, 'ms')} at {whole(largest)} tokens"
    if found.largest_ratio is not None and found.largest_ratio > 1:
        at_largest += f", {significant(found.largest_ratio)} times as fast"
    if found.verdict == "never":
        where = f"at {whole(largest)} tokens"
        if len(found.sizes) > 1:
            where = f"at any measured size up to {whole(largest)} tokens"
        text = f"{with_variant} does not pay on this machine {where}"
    elif found.verdict == "always":
        where = f"every measured size, from {whole(found.sizes[0])} tokens on"
        if len(found.sizes) == 1:
            where = f"{whole(largest)} tokens, the only size measured"
        text = f"{with_variant} pays on this machine at {where}"
    elif found.verdict == "from":
        text = f"{with_variant} pays on this machine from about {significant(found.tokens, 2)} tokens on"
    else:
        sizes = listing([whole(tokens) for tokens in found.faster])
        text = f"{with_variant} is faster on this machine at {sizes} tokens only, without one break-even point"
    return f"{text} ({at_largest})."


def distillation_sentences(distillation: Distillation) -> list[str]:
    """How many layers' training loss fell, and how many learned students serve."""
    lines = _curve_sentences(distillation)
    if distillation.kept_learned:
        kept, layers = sum(distillation.kept_learned.values()), len(distillation.kept_learned)
        text = f"What was learnt is used in {kept} of {count(layers, 'layer')}"
        lines.append(f"{text}{'' if kept == layers else '; elsewhere it was no better on held-out queries'}.")
    return lines


def _curve_sentences(distillation: Distillation) -> list[str]:
    work = "" if distillation.updates is None else f", over {count(distillation.updates, 'update')} in all"
    if distillation.images is not None:
        work += f", on {count(distillation.images, 'sampled picture')}"
    lines = []
    for words, values in (
        ("training loss", [curve.loss for curve in distillation.curves]),
        ("cosine distance on held-out queries", [curve.cosine_distance for curve in distillation.curves]),
    ):
        known = [[value for value in line if value is not None] for line in values]
        falls = [line[-1] < line[0] for line in known if len(line) > 1]
        if falls:
            lines.append(
                f"The {words} ended lower than it began in {sum(falls)} of {count(len(falls), 'layer')}{work}."
            )
            work = ""
    return lines


def routing_sentences(heatmap: Heatmap) -> list[str]:
    """Which layers and which half of the steps the policy keeps at full attention most."""
    cells = [value for row in heatmap.full_probability for value in row if value is not None]
    if not cells:
        return []
    lines = [f"On average the policy keeps {percent(sum(cells) / len(cells), 2)} of the slots at full attention."]
    layers = {}
    for place, layer in enumerate(heatmap.layers):
        known = [value for row in heatmap.full_probability if (value := row[place]) is not None]
        if known:
            layers[layer] = sum(known) / len(known)
    most, least = max(layers, key=lambda name: layers[name]), min(layers, key=lambda name: layers[name])
    if layers[most] - layers[least] >= 0.1:
        lines.append(f"Most in {most} ({percent(layers[most], 2)}), least in {least} ({percent(layers[least], 2)}).")
    else:
        lines.append("It treats all layers much alike.")
    half = len(heatmap.sigmas) // 2
    if half:
        early, late = (
            [value for row in rows for value in row if value is not None]
            for rows in (heatmap.full_probability[:half], heatmap.full_probability[half:])
        )
        if early and late:
            shares = f"{percent(sum(early) / len(early), 2)}, in the later steps {percent(sum(late) / len(late), 2)}"
            lines.append(f"In the first {count(half, 'step')}: {shares}.")
    return lines


def learning_sentence(controller: Controller) -> str | None:
    """Whether the reward rose; where there is none, whether the error on the validation prompts fell."""
    known = [(point.rollouts, point.reward) for point in controller.curve if point.reward is not None]
    if len(known) < 2:
        return _validation_sentence(controller)
    (_, first), (last_rollouts, last) = known[0], known[-1]
    verb = "rose" if last > first else "did not rise"
    text = f"The reward {verb}: {significant(first)} at the start, {significant(last)} after "
    text += f"{count(last_rollouts, 'rollout')}. Single values are noisy: each is a mean over few pictures."
    if controller.target_full is not None:
        text += f" While learning, the policy aims at full attention in {percent(controller.target_full)} of the slots."
    return text


def _validation_sentence(controller: Controller) -> str | None:
    known = [(point.rollouts, point.validation_error) for point in controller.curve]
    errors = [(rollouts, error) for rollouts, error in known if error is not None]
    if len(errors) < 2:
        return None
    (_, first), (rollouts, last) = errors[0], errors[-1]
    verb = "fell" if last < first else "did not fall"
    return (
        f"The error on the validation prompts {verb}: {significant(first)} with the first steps full, "
        f"{significant(last)} after {count(rollouts, 'rollout')}."
    )


def honesty(results: Results) -> list[str]:
    """What this page does not show."""
    teacher, machine = results.teacher, results.machine
    size = f" of {large(teacher.parameters)} parameters" if teacher is not None and teacher.parameters else ""
    lines = [
        f"The teacher is a toy: a real but tiny Flux-type transformer{size}, trained on emoji pictures. Errors and "
        "retrieval are measured on its pictures only.",
        "Nothing here is a statement about Flux weights or any other large model: how near a student comes there, and "
        "what it saves, has to be measured there.",
    ]
    threads = "" if machine.threads is None else f" with {count(machine.threads, 'thread')}"
    where = f" ({machine.cpu or machine.device}{threads})" if machine.cpu or machine.device else ""
    lines.append(
        f"Times are this machine's{where}, taken during this run, with whatever else the machine was doing. Another "
        "machine has another break-even point."
    )
    if results.pareto is not None and results.pareto.prompts:
        lines.append(
            f"Quality is a mean over {count(len(results.pareto.prompts), 'prompt')}: differences smaller than the "
            "error bars say nothing."
        )
    return lines
