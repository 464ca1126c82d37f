"""Does a rising score still mean better answers?"""

from collections.abc import Mapping, Sequence

import numpy as np

from keel.diagnose.findings import Cause, Change, Evidence
from keel.diagnose.rule import CRITICAL, WARNING, Levels, Rule, is_now, levels, moved, names, reasons, scaled
from keel.diagnose.run import Run, Series
from keel.diagnose.series import Holds, at_least, at_most, highest, last, latched, rise, start_of, trailing_mean, window

SURE = 4.0  # standard errors


def score_rise(run: Run) -> tuple[Series, Series]:
    """How far the score has risen, in deviations of the first answers' scores, and in standard errors. [S], [S]"""
    width, batch = window(run), float(run.setting("rollout.batch_size", 64))
    spread = start_of(run["objective/scores_std"], width)
    gain = trailing_mean(run["objective/scores"], width) - start_of(run["objective/scores"], width)
    with np.errstate(invalid="ignore", divide="ignore"):
        return gain / spread, gain / (spread * np.sqrt(2 / (width * batch)))


def held_out_fall(run: Run, name: str) -> tuple[Series, Series]:
    """How far a held-out scorer has fallen from its best, in its deviation over the first answers, and in standard
    errors. [S], [S]"""
    width, batch = window(run), float(run.setting("rollout.batch_size", 64))
    smooth = trailing_mean(run[f"rewards/{name}"], width)
    spread = start_of(run[f"spread/{name}"], width)
    fall = highest(smooth) - smooth
    noise = trailing_mean(run[f"spread/{name}"], 2 * width) * np.sqrt(2 / (width * batch))
    with np.errstate(invalid="ignore", divide="ignore"):
        return fall / spread, fall / noise


def fallen(run: Run, name: str) -> Holds:
    """Whether a held-out scorer has fallen from its best, and is not back. [S]"""
    fall, errors = held_out_fall(run, name)
    return latched(at_least(fall, 0.25) & at_least(errors, SURE), at_most(fall, 0.1))


def second_opinions(run: Run) -> Mapping[str, Holds]:
    """Figure -> where it says that the answers get worse while the score says better. Each [S]."""
    width = window(run)
    found: dict[str, Holds] = {}
    for name in run.held_out_scorers():
        found[f"rewards/{name}"] = fallen(run, name)
        early = start_of(run[f"agreement/{name}"], width)
        found[f"agreement/{name}"] = at_most(trailing_mean(run[f"agreement/{name}"], width), 0.0) & at_least(
            early, 0.25
        )
    for figure in (name for name in run.columns if name.startswith("disagreement/")):
        found[figure] = at_least(trailing_mean(run[figure], width), 2 * start_of(run[figure], width))
    surprise = -run["objective/reference_logprob"]
    before, now = start_of(surprise, width), trailing_mean(surprise, width)
    found["objective/reference_logprob"] = at_least(now, 2.0 * before) & at_least(now - before, 0.5)
    repeated = rise(run, "response/repetition")
    found["response/repetition"] = at_least(repeated[0], 0.1) & at_least(repeated[1], SURE)
    distinct = run["response/distinct"]
    found["response/distinct"] = at_most(trailing_mean(distinct, width), 0.5 * start_of(distinct, width))
    for name in (name for name, weight in run.scorer_weights().items() if weight):
        found[f"outside_range/{name}"] = at_least(trailing_mean(run[f"outside_range/{name}"], width), 0.5)
    return found


def _hacking(run: Run) -> Levels:
    gain, errors = score_rise(run)
    rising = at_least(gain, 0.25) & at_least(errors, SURE)
    opinions = second_opinions(run)
    decisive = [holds for figure, holds in opinions.items() if figure.startswith("rewards/")]
    weak = ("rewards/", "outside_range/", "response/distinct")  # the last alone is a collapse
    others = [holds for figure, holds in opinions.items() if not figure.startswith(weak)]
    count = np.sum(others, axis=0) if others else np.zeros(len(run.steps))
    falls = np.any(decisive, axis=0) if decisive else np.zeros(len(run.steps), dtype=bool)
    return levels((rising & (count >= 1), WARNING), (rising & ((count >= 2) | falls), CRITICAL))


def _hacking_evidence(run: Run) -> Sequence[Evidence]:
    speaks = [figure for figure, holds in second_opinions(run).items() if holds[-1]]
    return [moved(run, "objective/scores"), *(_opinion(run, figure) for figure in speaks)]


def _opinion(run: Run, figure: str) -> Evidence:
    if not figure.startswith("rewards/"):
        return moved(run, figure)
    smooth = trailing_mean(run[figure], window(run))
    best = int(np.nanargmax(smooth))
    return Evidence(figure, f"{smooth[best]:.3g} at its best, in step {run.steps[best]}, {last(smooth):.3g} now")


def _hacking_causes(run: Run) -> Sequence[Cause]:
    speaks = {figure for figure, holds in second_opinions(run).items() if holds[-1]}
    kl_coef, kl = last(run["objective/kl_coef"]), last(run["objective/kl"])
    far = not run.has("objective/kl") or kl > 10
    outside = [figure for figure in speaks if figure.startswith(("outside_range/", "disagreement/"))]
    length = abs(last(trailing_mean(run["response/length_correlation"], window(run)))) > 0.4
    near = np.isfinite(kl) and kl < 10
    weak = [
        f"{name} was right on {figures['accuracy']:.0%} of its held-out comparisons, length alone on "
        f"{figures['length_accuracy']:.0%}"
        for name, figures in run.reward_models().items()
        if figures["accuracy"] < figures["length_accuracy"] + 0.05 or figures["accuracy"] < 0.6
    ]
    return [
        Cause(
            "the KL holds the policy too weakly: it has left the answers that the reward model knows",
            reasons(
                (kl_coef == 0, "kl_coef is 0"),
                (far and kl_coef > 0, f"the KL is {kl:.3g} nats an answer"),
                ("objective/reference_logprob" in speaks, "the reference finds the answers odd"),
            ),
            reasons((near and kl_coef > 0, f"the KL is only {kl:.3g} nats an answer")),
            scaled(run, "algorithm.kl_coef", 3) if kl_coef else Change("algorithm.kl_coef", "0.05 (it is 0)"),
        ),
        Cause(
            "the reward model is wrong about answers of this kind",
            reasons(
                (bool(outside), f"{', '.join(sorted(outside))} say that it is beyond what it was trained on"),
                (any(figure.startswith("rewards/") for figure in speaks), "a scorer that is not learned from falls"),
                *((True, text) for text in weak),
            ),
            reasons((not outside, "its scores are within those of its own held-out answers")),
            Change("rewards", "an ensemble with combine: lower, trained also on rankings of this run's answers"),
        ),
        Cause(
            "the score pays for something easy, such as length or a phrase",
            reasons(
                (length, "score and length go together within a step"),
                ("response/repetition" in speaks, "answers repeat themselves"),
                ("response/distinct" in speaks, "different prompts get the same answer"),
            ),
            (),
            Change("rewards", "read the best answers in `keel report`, and rank them against the first ones"),
        ),
    ]


def _outside(run: Run) -> Levels:
    trained = [name for name, weight in run.scorer_weights().items() if weight]
    width = window(run)
    shares = [trailing_mean(run[f"outside_range/{name}"], width) for name in trained]
    beyond = [at_least(share, 0.5) for share in shares]
    return levels((np.any(beyond, axis=0) if beyond else np.zeros(len(run.steps), dtype=bool), WARNING))


def _outside_evidence(run: Run) -> Sequence[Evidence]:
    return [
        is_now(run, f"outside_range/{name}", "share of answers scored beyond all held-out answers of the reward model")
        for name, weight in run.scorer_weights().items()
        if weight and run.has(f"outside_range/{name}")
    ]


def _outside_causes(run: Run) -> Sequence[Cause]:
    return [
        Cause(
            "the policy gives answers better, or odder, than any that people have judged",
            ("the reward model was never asked about scores like these",),
            (),
            Change("rewards", "collect rankings of this run's answers (keel sample, keel rank) and train it again"),
        ),
        Cause(
            "the KL holds the policy too weakly",
            reasons((last(run["objective/kl"]) > 10, f"the KL is {last(run['objective/kl']):.3g} nats an answer")),
            reasons((last(run["objective/kl"]) < 5, f"the KL is {last(run['objective/kl']):.3g} nats an answer")),
            scaled(run, "algorithm.kl_coef", 2),
        ),
    ]


def length_share(run: Run) -> Series:
    """Which part of the score's rise a change of length alone would bring, by how score and length go together within
    a step. [S]"""
    width = window(run)
    slope = trailing_mean(run["response/length_correlation"], 3 * width) * start_of(run["objective/scores_std"], width)
    spread = start_of(run["response/length_std"], width)
    gain = trailing_mean(run["objective/scores"], width) - start_of(run["objective/scores"], width)
    with np.errstate(invalid="ignore", divide="ignore"):
        return slope / spread * rise(run, "response/length")[0] / gain


def _length(run: Run) -> Levels:
    width = window(run)
    gain, errors = score_rise(run)
    change, sure = rise(run, "response/length")
    before = start_of(run["response/length"], width)
    share = length_share(run)
    spread = start_of(run["response/length_std"], width)
    much = (
        at_least(np.abs(change), 0.25 * before) & at_least(np.abs(change), 0.5 * spread) & at_least(np.abs(sure), SURE)
    )
    paid = at_least(share, 0.5) & at_least(gain, 0.25) & at_least(errors, SURE)
    severe = at_least(np.abs(change), 0.6 * before) & at_least(share, 0.75)
    back = at_most(np.abs(change), 0.15 * before)  # answers of one length no longer show what lengthened them
    return levels((latched(much & paid, back), WARNING), (latched(much & paid & severe, back), CRITICAL))


def _length_evidence(run: Run) -> Sequence[Evidence]:
    share = last(length_share(run))
    return [
        moved(run, "response/length"),
        is_now(run, "response/length_correlation", "rank correlation of score and length within a step"),
        Evidence("objective/scores", f"{min(share, 1):.0%} of the rise is what the change of length alone would bring"),
    ]


def _length_causes(run: Run) -> Sequence[Cause]:
    longer = rise(run, "response/length")[0][-1] > 0
    held_out = run.held_out_scorers()
    rising = [name for name in held_out if rise(run, f"rewards/{name}")[1][-1] > SURE]
    return [
        Cause(
            f"the scorer pays for {'longer' if longer else 'shorter'} answers",
            (f"within a step their rank correlation is {last(run['response/length_correlation']):.2f}",),
            (),
            Change("rewards", "a reward model that beats length on held-out pairs: see length in its report.html"),
        ),
        Cause(
            "better answers are really of another length",
            tuple(f"the held-out scorer {name} rises as well" for name in rising),
            tuple(f"the held-out scorer {name} does not rise" for name in held_out if name not in rising),
            Change("", "judge it: keel evaluate gives the win rate with length taken out"),
        ),
    ]


RULES = (
    Rule(
        "length-exploitation",
        "The score rises because the answers change their length, and little else.",
        "reward model",
        _length,
        _length_evidence,
        _length_causes,
        follows=("updates-too-large", "reward-shift"),
    ),
    Rule(
        "reward-hacking",
        "The score rises while a second opinion says that the answers get worse.",
        "reward model",
        _hacking,
        _hacking_evidence,
        _hacking_causes,
        patience=2,
        follows=names(
            "updates-too-large reward-inverted reward-shift length-exploitation prompts-repeated "
            "missing-ends entropy-runaway sampler-mismatch"
        ),
    ),
    Rule(
        "reward-out-of-range",
        "Most answers score beyond everything that the reward model was tested on.",
        "reward model",
        _outside,
        _outside_evidence,
        _outside_causes,
        follows=names("reward-hacking reward-shift updates-too-large length-exploitation prompts-repeated"),
    ),
)
