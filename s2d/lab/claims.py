"""The paper's claims beside ours: what is reported, what is measured with its interval, and what follows.

One row an independent claim: what a claim says at further bit widths or settings stands in its details. Every row is a
difference (or a quantity less a threshold) *signed so that the claim says "above zero"*, taken within seeds where two
things are compared, because both start from the same checkpoint or the same initial weights. The verdict is
:func:`s2d.lab.statistics.verdict` of its 95 % interval. Three groups are kept apart: the paper's claims, which alone
are counted; our own findings; and theorems, with what else is true by construction, which cannot fail to hold.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import pandas as pd

from s2d.lab.ablations import BASELINE, REFERENCES, reported_ablations
from s2d.lab.encoder_evidence import seen_of_claims
from s2d.lab.frontier import MEAN_METHOD, with_means
from s2d.lab.origins import powers_of_ten
from s2d.lab.paper import load_paper_table
from s2d.lab.recipes import AS_PRINTED, EVIDENCE_VARIANTS
from s2d.lab.staleness import PAPER_MODE
from s2d.lab.statistics import NO_LOSS, VERDICTS, PairedInterval, excludes, paired_interval, verdict

PAPER, OURS, THEOREM = GROUPS = ("paper", "ours", "theorem")
NOT_MEASURED = "not measured"
OWN_WORDS = {"reproduced": "holds", "not reproduced": "does not hold"}
"""What the verdicts are called where there is nothing to reproduce."""
METHOD = "ERQ"  # the quantizer of the paper's Tables 6, 10 and 11
PAPER_KURTOSIS = 100.0
SAME_KURTOSIS = 0.1  # powers of ten: a factor between 0.8 and 1.26
PAPER_COSINE = 0.99
PAPER_INTERVAL = 100  # steps between refreshes
DOSES = {
    "eps": {"1e-8": "AdamW", "1e-4": "AdamW, eps 1e-4"},
    "beta2": {"0.999": "AdamW, beta2 0.999", "0.99": "AdamW, beta2 0.99", "0.9": "AdamW"},
}
"""Both knobs of AdamW's adaptivity, from the most to the least of it: dose to intervention."""
TABLE_7 = {
    "pcdr_1": ("PCDR_1", "PCDR_1"),
    "max_abs": ("the largest activation", "max abs activation"),
    "sigma_1": ("the largest singular value", "max singular value"),
}
"""Column of ours to its name in a sentence and the paper's metric."""


def claims_table(tables: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """One row an independent claim, the paper's first.

    Args:
        tables: ``laptop/testbed``, ``origins_interventions``, ``origins_correlation``, ``bound``, ``ptq_conditioning``,
            ``frontier``, ``frontier_outliers``, ``ablation_layers``, ``ablations``, ``staleness``, ``language/tiny``,
            ``language/smollm2``, ``self_supervised/evidence``, ``encoder/evidence``, ``encoder/layers`` and
            ``real/conditioning``, as the notebooks, :mod:`s2d.lab.testbed`, :mod:`s2d.lab.language`,
            :mod:`s2d.lab.self_supervised`, :mod:`s2d.lab.encoder` and
            :mod:`s2d.lab.real_networks` write them.

    Returns:
        Columns group (of ``GROUPS``), claim, source, reported (as printed), reported_size (in ``unit``, where the paper
        has a number for it), measured (mean over seeds; above zero is what the claim says), low, high (95 % interval),
        measured_std, unit, seeds (how many), which_seeds, verdict (of :data:`s2d.lab.statistics.VERDICTS`, in the words
        of ``OWN_WORDS`` outside the group "paper", or ``"not measured"``), excludes_size ("yes" or "no": whether the
        interval leaves out the reported size; empty where there is none), details, real_checkpoints (what was seen
        of the same on published networks, in words: on the encoder over seeds with the interval's verdict, else one
        seed each without one; empty where nothing was).
    """
    rows = [
        *growth_claims(tables["laptop/testbed"]),
        *origin_claims(tables["origins_interventions"], tables["laptop/testbed"]),
        *link_claims(tables["origins_correlation"]),
        *finetuning_claims(tables["frontier"]),
        *layer_claims(tables["ablation_layers"]),
        *sensitivity_claims(tables["ablations"]),
        staleness_claim(tables["staleness"]),
        rotation_claim(tables["ptq_conditioning"]),
        self_supervised_claim(tables["self_supervised/evidence"]),
        language_claim(tables["language/tiny"]),
        *arm_claims(tables["frontier"], tables["frontier_outliers"]),
        *theorem_claims(tables["bound"], tables["ptq_conditioning"]),
    ]
    table = pd.DataFrame(rows)
    seen = [
        seen_of_claims(tables["encoder/evidence"], tables["encoder/layers"]),
        on_real_checkpoints(tables["real/conditioning"], tables["language/smollm2"]),
    ]
    table["real_checkpoints"] = [
        "; ".join(text for texts in seen for part, text in texts.items() if claim.startswith(part))
        for claim in table.claim
    ]
    return table.sort_values("group", key=lambda g: g.map(GROUPS.index), kind="stable", ignore_index=True)


def headline(claims: pd.DataFrame) -> str:
    """The verdicts counted in one sentence: the paper's independent claims, and nothing else.

    Args:
        claims: from :func:`claims_table`.
    """
    own = claims[claims.group == PAPER]
    measured = own[own.verdict != NOT_MEASURED]
    counts = measured.verdict.value_counts()
    parts = [f"{counts[name]} {name}" for name in VERDICTS if name in counts]
    lacking = len(own) - len(measured)
    some = f"{len(measured)} can be measured" if lacking else "all are measured"
    rest = f"; {lacking} cannot" if lacking else ""
    return f"Of {len(own)} independent claims of the paper {some} here: {', '.join(parts)}{rest}."


def undecided_share(claims: pd.DataFrame) -> float:
    """The share of undecided rows among those measured, of all groups."""
    measured = claims[claims.verdict != NOT_MEASURED]
    return float((measured.verdict == "undecided").mean())


# --- rows -------------------------------------------------------------------------------------------------------------


def _row(
    claim: str,
    source: str,
    differences: pd.Series,
    unit: str,
    *,
    group: str = PAPER,
    reported: str = "",
    size: float | None = None,
    margin: float = 0.0,
    details: str = "",
) -> dict:
    """A row of differences, one a seed (the index); without any, nothing is said of the claim."""
    differences = differences.dropna()
    if differences.empty:
        nothing = PairedInterval(float("nan"), float("nan"), float("nan"), float("nan"), 0)
        row = _described(claim, source, nothing, unit, group, reported, size, details or "not trained in this run")
        return row | {"verdict": NOT_MEASURED, "which_seeds": ""}
    interval = paired_interval(differences.tolist())
    row = _described(claim, source, interval, unit, group, reported, size, details, margin=margin)
    return row | {"which_seeds": " ".join(str(seed) for seed in sorted(set(differences.index)))}


def _described(
    claim: str,
    source: str,
    interval: PairedInterval,
    unit: str,
    group: str,
    reported: str,
    size: float | None,
    details: str,
    *,
    margin: float = 0.0,
) -> dict:
    # A band of one point is a band for points, not for a kurtosis or a correlation.
    band = 1.0 if unit.startswith("points") else SAME_KURTOSIS if unit == "powers of ten" else 0.0
    says = verdict(interval, margin=margin, equivalence=band)
    known = size is not None and interval.low == interval.low
    return {
        "group": group,
        "claim": claim,
        "source": source,
        "reported": reported,
        "reported_size": float("nan") if size is None else round(size, 4),
        "measured": interval.mean,
        "low": interval.low,
        "high": interval.high,
        "measured_std": interval.std,
        "unit": unit,
        "seeds": interval.n,
        "which_seeds": "",
        "verdict": says if group == PAPER else OWN_WORDS.get(says, says),
        "excludes_size": ("yes" if excludes(interval, size) else "no") if known else "",
        "details": details,
    }


def _named(values: Mapping[str, float], form: str = "{:+.1f}") -> str:
    """Numbers with their names, those that are known."""
    return ", ".join(f"{name} {form.format(value)}" for name, value in values.items() if value == value)


def _interval(differences: pd.Series) -> str:
    """Mean and interval as text; nothing where nothing was measured."""
    differences = differences.dropna()
    if differences.empty:
        return ""
    interval = paired_interval(differences.tolist())
    return f"{interval.mean:+.1f} [{interval.low:+.1f}, {interval.high:+.1f}]"


def _listed(parts: Iterable[str]) -> str:
    return "; ".join(part for part in parts if part)


def _column(wide: pd.DataFrame, key) -> pd.Series:
    """A column of a pivoted table; unknown everywhere when this run does not have it."""
    return wide[key] if key in wide.columns else pd.Series(float("nan"), index=wide.index)


# --- the abstract and appendix C --------------------------------------------------------------------------------------


def _by_run(testbed: pd.DataFrame) -> pd.DataFrame:
    """The testbed's numbers by run and seed: a seed's mean over the CPU kernels, which are no independent samples."""
    low = _low_bit_columns(testbed)
    lost = {f"lost {column}": 100 * (testbed.FP - testbed[column]) for column in low}
    table = testbed.assign(**lost, lost=pd.DataFrame(lost).mean(axis=1))
    numbers = ["matched_kurtosis", "excess_kurtosis", "sigma_1", "FP", "lost", *lost]
    return table.groupby(["run", "seed"])[numbers].mean()


def _low_bit_columns(testbed: pd.DataFrame) -> list[str]:
    return [column for column in testbed.columns if column.endswith(("W4A4", "W3A3"))]


def growth_claims(testbed: pd.DataFrame) -> list[dict]:
    """The abstract's growth with pretraining, from one to four times the steps of one recipe."""
    runs = _by_run(testbed)
    rows = []
    for column, claim, unit, group in (
        (
            "excess_kurtosis",
            "outlier severity grows with pretraining (excess kurtosis, 4x over 1x)",
            "powers of ten",
            PAPER,
        ),
        ("sigma_1", "the largest sigma_1 of the FFN weights grows with pretraining (4x less 1x)", "sigma_1", OURS),
        ("lost", "the points lost at W4A4 and W3A3 grow with pretraining (4x less 1x)", "points lost", OURS),
    ):
        wide = runs[column].unstack("run")[["1x", "2x", "4x"]].dropna()
        each = ((wide["1x"] < wide["2x"]) & (wide["2x"] < wide["4x"])).sum()
        details = f"{_named(wide.mean(), '{:.1f}')}; larger each time in {each} of {len(wide)} seeds"
        reported = "intensifies (CLIP, SigLIP, SigLIP2)" if group == PAPER else ""
        source = "abstract" if group == PAPER else "the abstract's growth, in another measure"
        compared = powers_of_ten(wide) if column == "excess_kurtosis" else wide
        change = compared["4x"] - compared["1x"]
        rows.append(_row(claim, source, change, unit, group=group, reported=reported, details=details))
    adamw, sgd = runs.loc["2x"], runs.loc["SGD"]
    each = {column: (adamw[f"lost {column}"] - sgd[f"lost {column}"]).mean() for column in _low_bit_columns(testbed)}
    accuracies = f"full precision {100 * adamw.FP.mean():.1f} and {100 * sgd.FP.mean():.1f}"
    rows.append(
        _row(
            "AdamW with its outliers loses more points to quantization than SGD without, at equal accuracy",
            "the abstract's premise",
            adamw.lost - sgd.lost,
            "points lost",
            group=OURS,
            details=_listed([accuracies, _named(each)]),
        )
    )
    return rows


def origin_claims(interventions: pd.DataFrame, testbed: pd.DataFrame) -> list[dict]:
    """Appendix C: kurtosis under other optimizers, at the same validation accuracy."""
    runs = _by_run(testbed)
    adamw, half, sgd, wide = (runs.xs(run, level="run") for run in ("4x", "2x", "SGD", "wide"))
    matched = interventions[interventions.moment == "matched"]
    kurtosis = matched.pivot(index="seed", columns="variant", values="excess_kurtosis")
    powers = powers_of_ten(kurtosis)
    ends = interventions[interventions.moment == "end"]
    accuracy = 100 * ends.pivot(index="seed", columns="variant", values="validation_accuracy")
    unit, rotated = "powers of ten", "AdamW, rotated basis"
    falls = {
        knob: _column(powers, list(doses.values())[0]) - _column(powers, list(doses.values())[-1])
        for knob, doses in DOSES.items()
    }
    said = [
        f"{knob}: {_named({dose: _column(kurtosis, name).mean() for dose, name in doses.items()}, '{:.1f}')}, "
        f"fall by powers of ten {_interval(falls[knob])}"
        for knob, doses in DOSES.items()
    ]
    return [
        _row(
            "AdamW has more excess kurtosis than SGD, at equal accuracy",
            "C [2]",
            powers_of_ten(half.excess_kurtosis) - powers_of_ten(sgd.excess_kurtosis),
            unit,
            reported="> 100 against substantially lower",
            details=f"AdamW after half its steps {half.excess_kurtosis.mean():.1f} (accuracy {half.FP.mean():.2f}), "
            f"SGD {sgd.excess_kurtosis.mean():.1f} ({sgd.FP.mean():.2f}); AdamW at its end "
            f"{adamw.excess_kurtosis.mean():.1f}",
        ),
        _row(
            f"AdamW's excess kurtosis exceeds {PAPER_KURTOSIS:.0f} (how far above, at width 128)",
            "C [2]",
            wide.excess_kurtosis - PAPER_KURTOSIS,
            "excess kurtosis",
            reported="> 100",
            details=f"width 128: {wide.excess_kurtosis.mean():.1f}, where one channel allows 125; "
            f"width 64: {adamw.excess_kurtosis.mean():.1f}",
        ),
        _row(
            "in a rotated basis the outliers disappear (AdamW's kurtosis over the rotated one's, at equal accuracy)",
            "C [6]",
            powers["AdamW"] - powers[rotated],
            unit,
            reported="disappear",
            details=f"AdamW {kurtosis['AdamW'].mean():.1f}, rotated {kurtosis[rotated].mean():.1f}",
        ),
        _row(
            "in a rotated basis nothing is lost: validation accuracy less AdamW's, at the end",
            "C [6]",
            accuracy[rotated] - accuracy["AdamW"],
            "points",
            reported="without performance loss",
            margin=NO_LOSS,
            details=f"AdamW {accuracy['AdamW'].mean():.1f}, rotated {accuracy[rotated].mean():.1f}",
        ),
        _row(
            "less adaptivity gives fewer outliers (fall of the kurtosis from the most adaptive dose to the least, mean "
            "of eps and beta2, at equal accuracy)",
            "C [7]",
            sum(falls.values()) / len(falls),
            unit,
            reported="minimizes outlier formation",
            details=_listed(said),
        ),
        _row(
            "Muon gives less excess kurtosis than AdamW, at equal accuracy",
            "ours",
            powers["AdamW"] - _column(powers, "Muon"),
            unit,
            group=OURS,
            details=f"AdamW {kurtosis['AdamW'].mean():.1f}, Muon {_column(kurtosis, 'Muon').mean():.1f}",
        ),
    ]


def link_claims(correlation: pd.DataFrame) -> list[dict]:
    """The abstract's link between dominant singular values and outliers: rank correlations with bootstrap intervals."""
    rows = []
    over_layers, over_time = "over layers, within a network", "over training time, within a layer"
    for x, scope, group in (
        # Over training time everything grows, so the layers are the test that can fail.
        ("sigma_1", over_layers, PAPER),
        ("sigma_1", over_time, OURS),
        ("pcdr_1", over_layers, OURS),
    ):
        found = correlation[
            (correlation.x == x) & (correlation.y == "max_abs") & (correlation.scope == scope)
        ].squeeze()
        interval = PairedInterval(found.correlation, float("nan"), found.low, found.high, int(found.seeds))
        claim = f"{x} and the largest activation go together {scope}"
        source, reported = ("abstract", "a direct link") if group == PAPER else ("ours", "")
        details = (
            f"{int(found.layers)} layers at {int(found.lengths)} lengths of training, bootstrap over seeds and layers"
        )
        rows.append(_described(claim, source, interval, "rank correlation", group, reported, None, details))
    return rows


# --- fine-tuning: Tables 6, 9 and 11 ----------------------------------------------------------------------------------


def _reported() -> pd.Series:
    """The paper's numbers by group, setting and bits."""
    return reported_ablations().set_index(["group", "setting", "bits"]).reported


def _said(first: float, second: float) -> dict:
    """Two reported numbers and their difference."""
    return {"reported": f"{first} - {second} = {first - second:+.1f}", "size": first - second}


def _wide(frontier: pd.DataFrame, column: str) -> pd.DataFrame:
    values = 100 * frontier.accuracy if column == "accuracy" else frontier.points_lost
    table = frontier.assign(value=values)
    return table.pivot(index=["method", "bits", "seed"], columns="variant", values="value")


def finetuning_claims(frontier: pd.DataFrame) -> list[dict]:
    """Tables 6, 9 and 11 and full precision, on seeds that nothing was chosen on; "S2D" is Algorithm 1 as printed."""
    wide, lost, reported = _wide(frontier, "accuracy"), _wide(frontier, "points_lost"), _reported()
    full, low = wide.loc["FP", "FP"], wide.loc[METHOD, "W4A4"]

    def at_further_bits(first: str, second: str) -> str:
        parts = []
        for bits in ("W5A5", "W6A6"):
            known = (METHOD, bits) in wide.index.droplevel("seed")
            here = _interval(wide.loc[METHOD, bits][first] - wide.loc[METHOD, bits][second]) if known else NOT_MEASURED
            a, b = reported[REFERENCES, first, bits], reported[REFERENCES, second, bits]
            parts.append(f"{bits}: here {here}, paper {a} - {b} = {a - b:+.1f}")
        return _listed(parts)

    def compared(claim: str, source: str, first: str, second: str) -> dict:
        said = _said(*(reported[REFERENCES, variant, "W4A4"] for variant in (first, second)))
        details = at_further_bits(first, second)
        if (first, second) == ("S2D", "AdamW"):
            details = _listed([details, f"with the paper's lam and tau {_interval(low[AS_PRINTED] - low['AdamW'])}"])
        return _row(claim, source, low[first] - low[second], "points", details=details, **said)

    table9 = load_paper_table(9)
    gains = table9.pivot(index="bits", columns="variant", values="value")
    gains = (gains["S2D"] - gains["Baseline"]).drop("FP")
    rounded = {grid: wide.loc[f"RTN, {grid}", "W4A4"] for grid in ("asymmetric", "symmetric")}
    rounded = {grid: values["S2D"] - values["AdamW"] for grid, values in rounded.items()}
    return [
        compared("S2D is more accurate than AdamW at W4A4 (ERQ)", "Table 11, abstract", "S2D", "AdamW"),
        compared("S2D is more accurate than No PCDR at W4A4 (ERQ)", "Table 6", "S2D", "No PCDR"),
        compared("No PCDR falls below AdamW at W4A4 (ERQ)", "Tables 6, 11", "AdamW", "No PCDR"),
        _row(
            "No PCDR degrades capacity: S2D's accuracy in full precision less No PCDR's",
            "D",
            full["S2D"] - full["No PCDR"],
            "points",
            reported="degrading model capacity",
        ),
        _row(
            "S2D costs no accuracy in full precision: less AdamW's",
            "C; Table 10; 85.0 of AdamW is second-hand",
            full["S2D"] - full["AdamW"],
            "points",
            reported="85.0 - 85.0 = 0.0; +1.2 (LLaVA)",
            size=0.0,
            margin=NO_LOSS,
        ),
        _row(
            "S2D is more accurate than AdamW under round-to-nearest at W4A4 (asymmetric grid)",
            "Table 9 (there a language model)",
            rounded["asymmetric"],
            "points",
            reported=_named(gains[["W8A8", "W7A7", "W6A6"]]),
            size=float(gains.mean()),
            details=f"symmetric grid {_interval(rounded['symmetric'])}",
        ),
        _row(
            "S2D quantizes better, not only trains better: it loses fewer points than AdamW at W4A4 (ERQ)",
            "Table 11, in points lost",
            lost.loc[METHOD, "W4A4"]["AdamW"] - lost.loc[METHOD, "W4A4"]["S2D"],
            "points lost",
            group=OURS,
        ),
    ]


def arm_claims(frontier: pd.DataFrame, outliers: pd.DataFrame) -> list[dict]:
    """Every arm against AdamW in accuracy and in points lost, mean of all quantizers at low bits; S2D's kurtosis."""
    means = with_means(frontier)
    low = means[(means.method == MEAN_METHOD) & means.bits.isin(["W4A4", "W3A3"])]
    low = low.assign(accuracy=100 * low.accuracy).groupby(["variant", "seed"])[["accuracy", "points_lost"]].mean()
    accuracy, lost = low.accuracy.unstack("variant"), low.points_lost.unstack("variant")
    at = "mean of all quantizers at W4A4 and W3A3"
    pairs = [(arm, "AdamW") for arm in EVIDENCE_VARIANTS if arm != "AdamW"]
    pairs += [("S2D", "AdamW, tuned weight decay"), ("S2D, live", "S2D")]
    rows = []
    for arm, rival in pairs:
        mine = f"{arm} {accuracy[arm].mean():.1f}, {rival} {accuracy[rival].mean():.1f}" if arm in accuracy else ""
        cost = f"{arm} {lost[arm].mean():.1f}, {rival} {lost[rival].mean():.1f}" if arm in lost else ""
        more, fewer = _column(accuracy, arm) - accuracy[rival], lost[rival] - _column(lost, arm)
        rows += [
            _row(f"{arm}: more accurate than {rival} ({at})", "ours", more, "points", group=OURS, details=mine),
            _row(
                f"{arm}: loses fewer points than {rival} ({at})", "ours", fewer, "points lost", group=OURS, details=cost
            ),
        ]
    kurtosis = outliers.pivot(index="seed", columns="variant", values="excess_kurtosis")
    rows.append(
        _row(
            "S2D lowers the residual stream's excess kurtosis (AdamW's over S2D's, after fine-tuning)",
            "ours",
            powers_of_ten(kurtosis["AdamW"]) - powers_of_ten(kurtosis["S2D"]),
            "powers of ten",
            group=OURS,
            details=_named(kurtosis.mean()[[v for v in EVIDENCE_VARIANTS if v in kurtosis]], "{:.1f}"),
        )
    )
    return rows


# --- appendices D, E and G --------------------------------------------------------------------------------------------


def rotation_claim(conditioning: pd.DataFrame) -> dict:
    """Appendix D: S2D and a rotation, two ways against the same outliers."""
    low = conditioning[conditioning.bits == "W4A4"]
    accuracy = 100 * low.groupby(["seed", "variant", "conditioning"]).accuracy.mean().unstack(
        ["variant", "conditioning"]
    )
    both = accuracy["S2D"]["rotation"]
    return _row(
        "S2D and a rotation complement each other: together less the rotation alone, at W4A4 (RTN, asymmetric)",
        "D",
        both - accuracy["AdamW"]["rotation"],
        "points",
        reported="orthogonal and potentially complementary",
        details=f"together less S2D alone {_interval(both - accuracy['S2D']['none'])}",
    )


def layer_claims(layers: pd.DataFrame) -> list[dict]:
    """Table 7: by how much three quantities of the feed-forward layers fall, in per cent of AdamW's."""
    ffn = layers[layers.layer.str.contains("mlp")]
    means = ffn.groupby(["seed", "variant"])[list(TABLE_7)].mean().unstack("variant")
    table7 = load_paper_table(7).pivot(index=["model", "layer", "metric"], columns="variant", values="value")
    rows = []
    for column, (name, metric) in TABLE_7.items():
        paper = table7.xs(metric, level="metric")
        fall = 100 * (1 - means[column]["S2D"] / means[column]["AdamW"])
        here = f"AdamW {means[column]['AdamW'].mean():.3g}, S2D {means[column]['S2D'].mean():.3g}"
        ranges = ", ".join(f"{a:g} to {b:g}" for a, b in paper[["AdamW", "S2D"]].itertuples(index=False))
        rows.append(
            _row(
                f"S2D lowers {name} of the feed-forward layers",
                "Table 7",
                fall,
                "% of AdamW's",
                reported=ranges,
                size=float(100 * (1 - paper["S2D"] / paper["AdamW"]).mean()),
                details=f"mean over layers: {here}",
            )
        )
    return rows


def sensitivity_claims(ablations: pd.DataFrame) -> list[dict]:
    """Tables 10 and 11: the paper's settings against what it varies, at W4A4 under the paper's quantizer."""
    chosen = ablations[(ablations.method == METHOD) & (ablations.bits == "W4A4")]
    wide = 100 * chosen.pivot(index="seed", columns=["group", "setting"], values="accuracy")
    reported = _reported().xs("W4A4", level="bits")
    baseline, adamw = wide[REFERENCES, BASELINE], wide[REFERENCES, "AdamW"]

    def other(first: pd.Series, group: str, settings: Sequence[str], paper: float) -> str:
        """The claim's other settings: here, and in the paper."""
        parts = []
        for setting in settings:
            here = _interval(first - _column(wide, (group, setting)))
            said = reported[group, setting]
            parts.append(f"{setting}: here {here or NOT_MEASURED}, paper {paper} - {said} = {paper - said:+.1f}")
        return _listed(parts)

    best, strict = reported["tau", "0.95"], _column(wide, ("tau", "0.95"))
    rows = [
        _row(
            "refreshing every 100 steps beats every 10, at W4A4 (ERQ)",
            "Table 10",
            baseline - _column(wide, ("refresh interval", "10")),
            "points",
            **_said(best, reported["refresh interval", "10"]),
        ),
        _row(
            "three components beat ten, at W4A4 (ERQ)",
            "Table 10",
            baseline - _column(wide, ("k_max", "10")),
            "points",
            **_said(best, reported["k_max", "10"]),
            details=other(baseline, "k_max", ["5"], best),
        ),
        _row(
            "the strict threshold 0.95 beats 0.8, at W4A4 (ERQ)",
            "Table 10",
            strict - _column(wide, ("tau", "0.8")),
            "points",
            **_said(best, reported["tau", "0.8"]),
            details=other(strict, "tau", ["0.9"], best),
        ),
    ]
    two = reported["power", "2"]
    rows += [
        _row(
            f"power 2 beats {power}, at W4A4 (ERQ)",
            "Table 11",
            baseline - _column(wide, ("power", power)),
            "points",
            **_said(two, reported["power", power]),
            details=_at_further_bits(ablations, power),
        )
        for power in ("3", "4")
    ]
    higher = {power: _column(wide, ("power", power)) - adamw for power in ("3", "4")}
    paper = {power: reported["power", power] - reported[REFERENCES, "AdamW"] for power in higher}
    return [
        *rows,
        _row(
            "powers 3 and 4 still beat AdamW, at W4A4 (ERQ; mean of both)",
            "Table 11",
            sum(higher.values()) / len(higher),
            "points",
            reported=_named(paper),
            size=sum(paper.values()) / len(paper),
            details=_listed(f"{power}: {_interval(values)}" for power, values in higher.items()),
        ),
    ]


def _at_further_bits(ablations: pd.DataFrame, power: str) -> str:
    """Table 11 at five and six bits: power 2 against another."""
    reported, parts = _reported(), []
    for bits in ("W5A5", "W6A6"):
        chosen = ablations[(ablations.method == METHOD) & (ablations.bits == bits)]
        wide = 100 * chosen.pivot(index="seed", columns=["group", "setting"], values="accuracy")
        here = _interval(wide[REFERENCES, BASELINE] - _column(wide, ("power", power))) if len(wide) else ""
        a, b = reported["power", "2", bits], reported["power", power, bits]
        parts.append(f"{bits}: here {here or NOT_MEASURED}, paper {a} - {b} = {a - b:+.1f}")
    return _listed(parts)


def staleness_claim(staleness: pd.DataFrame) -> dict:
    """G.2: the cached penalty against a fresh one after the paper's interval; top components of all layers."""
    within = staleness[staleness.age <= PAPER_INTERVAL]
    oldest = within[within.age == within.age.max()]
    last = oldest[oldest["mode"] == PAPER_MODE]
    slow = oldest[oldest["mode"] == f"{PAPER_MODE}, lr / 100"].cosine.mean()
    lowest = f"smallest of a layer {last.cosine.min():.3f}"
    return _row(
        f"cached and fresh penalty keep a cosine above {PAPER_COSINE} (mean over layers, after "
        f"{PAPER_INTERVAL} steps, less that)",
        "G.2",
        last.groupby("seed").cosine.mean() - PAPER_COSINE,
        "cosine",
        reported="> 0.99 over 100 steps",
        details=_listed(
            [f"mean {last.cosine.mean():.3f}", lowest, _named({"at a hundredth of the rate": slow}, "{:.3f}")]
        ),
    )


def self_supervised_claim(evidence: pd.DataFrame) -> dict:
    """Table 8: S2D on a self-supervised backbone under PTQ4ViT, mean of its three widths.

    Args:
        evidence: of :func:`s2d.lab.self_supervised.run`.
    """
    widths = ["W8A8", "W6A6", "W5A5"]
    reported = load_paper_table(8).pivot(index="bits", columns="variant", values="value").loc[widths]
    gains = reported["S2D"] - reported["AdamW"]
    wide = 100 * evidence.pivot(index=["method", "bits", "seed"], columns="variant", values="accuracy")
    gain, untuned = wide["S2D"] - wide["AdamW"], _column(wide, AS_PRINTED) - wide["AdamW"]

    def at_widths(differences: pd.Series, method: str) -> pd.DataFrame:
        """One row a seed that was measured at each of the widths, these as columns."""
        known = differences[differences.index.get_level_values("method") == method].droplevel("method")
        return known.unstack("bits").reindex(columns=widths).dropna()

    def at_each_width(method: str) -> str:
        each = at_widths(gain, method)
        return ", ".join(f"{bits} {_interval(each[bits])}" for bits in widths if len(each))

    def over_widths(differences: pd.Series, method: str) -> pd.Series:
        return at_widths(differences, method).mean(axis=1)

    return _row(
        "S2D helps a self-supervised backbone (a DINOv2-S, fine-tuned, under PTQ4ViT at W8A8 to W5A5, less AdamW's)",
        "Table 8",
        over_widths(gain, "PTQ4ViT"),
        "points",
        reported=f"{_named(gains)} (DINOv3-B)",
        size=float(gains.mean()),
        details=_listed(
            [
                at_each_width("PTQ4ViT"),
                f"in full precision {_interval(gain.loc['FP'].loc['FP'])}",
                *(f"under {name} {_interval(over_widths(gain, name)) or NOT_MEASURED}" for name in ("RTN", "ERQ")),
                f"with the paper's lam and tau {_interval(over_widths(untuned, 'PTQ4ViT')) or NOT_MEASURED}",
            ]
        ),
    )


def language_claim(tiny: pd.DataFrame) -> dict:
    """Table 9: S2D with the hyper-parameters of vision, on a language model under round-to-nearest.

    Args:
        tiny: of :func:`s2d.lab.language.tiny_table`.
    """
    table9 = load_paper_table(9).pivot(index="bits", columns="variant", values="value")
    gains = table9["S2D"] - table9["Baseline"]
    widths = ["W8A8", "W7A7", "W6A6"]
    wide = 100 * tiny.pivot(index=["grid", "bits", "seed"], columns="variant", values="exact_match")
    gain = wide[AS_PRINTED] - wide["AdamW"]
    tuned = wide["S2D"] - wide["AdamW"]
    return _row(
        "S2D carries over to a language model with the hyper-parameters of vision (exact match under round-to-nearest "
        "at W8A8 to W6A6, less AdamW's)",
        "Table 9",
        gain.loc["asymmetric"].loc[widths].groupby("seed").mean(),
        "points",
        reported=f"{_named(gains[widths])}; {gains['FP']:+.1f} in full precision",
        size=float(gains[widths].mean()),
        details=_listed(
            [
                "a tiny Qwen2 on word problems",
                f"in full precision {_interval(gain.loc['none'].loc['FP'])}",
                f"symmetric grid {_interval(gain.loc['symmetric'].loc[widths].groupby('seed').mean())}",
                f"W4A4 {_interval(gain.loc['asymmetric'].loc['W4A4'])}",
                f"with this companion's lam and tau of vision "
                f"{_interval(tuned.loc['asymmetric'].loc[widths].groupby('seed').mean())}",
            ]
        ),
    )


def on_real_checkpoints(conditioning: pd.DataFrame, published: pd.DataFrame) -> dict[str, str]:
    """What was seen on networks that somebody else trained, by a part of the claim's sentence.

    Args:
        conditioning: of :func:`s2d.lab.real_networks.conditioning_table`.
        published: of :func:`s2d.lab.language.run_published`.
    """
    runs = conditioning[conditioning.form.str.startswith("S2D")]
    falls = {
        name: ", ".join(
            f"{row.form.removeprefix('S2D, ')} {getattr(row, f'{column}_before'):.3g} to {getattr(row, column):.3g}"
            for row in runs.itertuples()
        )
        for name, column in (("the largest activation of", "max_abs"), ("the largest singular value of", "sigma_1"))
    }
    seen = {
        f"S2D lowers {name}": f"{runs.network.iloc[0]} conditioned without labels, one seed: {text}"
        for name, text in falls.items()
    }
    wide = 100 * published.pivot(index="bits", columns="training", values="exact_match")
    trained = [name for name in wide if name not in ("none", "AdamW")]
    gain = wide[trained[0]] - wide["AdamW"]
    widths = ["W8A8", "W7A7", "W6A6"]
    seen["S2D carries over to a language model"] = (
        f"{published.model.iloc[0]}, {published.problems.iloc[0]} problems, one seed: "
        f"{_named(gain[widths])}; {gain['FP']:+.1f} in full precision"
    )
    return seen


# --- true by construction ---------------------------------------------------------------------------------------------


def theorem_claims(bound: pd.DataFrame, conditioning: pd.DataFrame) -> list[dict]:
    """Theorem 1, and that S2D's weights need no online operation: checks of the code, not findings."""
    held = bound.holds.astype(bool).groupby(bound.seed).mean()
    violations = int((~bound.holds.astype(bool)).sum())
    cost = 100 * conditioning.groupby(["seed", "variant", "conditioning"]).online_operations.mean()
    cost = cost.unstack(["variant", "conditioning"])
    return [
        _row(
            "no layer output exceeds sigma_1 times its input",
            "Theorem 1",
            100 * held,
            "% of layers",
            group=THEOREM,
            reported="a theorem",
            details=f"{violations} violations in {len(bound)} layers",
        )
        | {"verdict": "does not hold" if violations else "holds"},
        _row(
            "a rotation costs online operations that S2D does not",
            "D",
            cost["AdamW"]["rotation"] - cost["S2D"]["none"],
            "% of operations",
            group=THEOREM,
            reported="avoids the online inference overhead",
        ),
    ]
