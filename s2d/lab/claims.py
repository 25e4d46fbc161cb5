"""The paper's claims beside ours: a number reported, one measured with its spread, and whether directions agree."""

from __future__ import annotations

from collections.abc import Mapping

import pandas as pd

BITS = "W4A4"
METHOD = "ERQ"  # the quantizer of the paper's Tables 6 and 11


def verdict(differences: pd.Series, sign: int) -> str:
    """Whether measured differences, one a seed, have the direction of a claim.

    Args:
        differences: one a seed.
        sign: +1 if the paper's difference is positive, -1 if negative.

    Returns:
        ``"reproduced"`` when every seed agrees, ``"not reproduced"`` when every seed disagrees, else ``"undecided"``.

    Example:
        >>> verdict(pd.Series([1.0, 2.0, 0.5]), +1)
        'reproduced'
    """
    signed = differences * sign
    return "reproduced" if (signed > 0).all() else "not reproduced" if (signed < 0).all() else "undecided"


def _row(claim: str, source: str, reported: str, differences: pd.Series, unit: str, sign: int) -> dict:
    return {
        "claim": claim,
        "source": source,
        "reported": reported,
        "measured": differences.mean(),
        "measured_std": differences.std(ddof=1),
        "unit": unit,
        "seeds": len(differences),
        "verdict": verdict(differences, sign),
    }


def claims_table(tables: Mapping[str, pd.DataFrame], *, grid: str = "symmetric") -> pd.DataFrame:
    """One row a claim; differences are taken within a seed, since both sides start from the same checkpoint.

    Args:
        tables: ``origins_outliers``, ``ptq``, ``ptq_methods`` and ``finetuning_layers`` as the notebooks write them.
        grid: quantization grid of the accuracies.

    Returns:
        Columns claim, source, reported, measured, measured_std, unit, seeds, verdict.
    """
    kurtosis = tables["origins_outliers"].pivot(index="seed", columns="variant", values="excess_kurtosis")
    ptq = tables["ptq"]
    ptq = ptq[ptq.grid == grid].pivot(index=["bits", "seed"], columns="variant", values="accuracy") * 100
    low, full = ptq.loc[BITS], ptq.loc["FP"]
    ffn = tables["finetuning_layers"]
    ffn = ffn[ffn.layer.str.contains("mlp")]
    of_ffn = ffn.groupby(["seed", "variant"])[["pcdr_1", "max_abs", "sigma_1"]].mean().unstack("variant")
    rows = [
        _row(
            "AdamW's residual stream has more excess kurtosis than SGD's",
            "appendix C [2]",
            "> 100 against low",
            kurtosis["AdamW"] - kurtosis["SGD"],
            "excess kurtosis",
            +1,
        ),
        _row(
            f"S2D is more accurate than AdamW at {BITS} under RTN",
            "Table 11 (ERQ)",
            "73.0 - 65.6 = +7.4",
            low["S2D"] - low["AdamW"],
            "points",
            +1,
        ),
        _row(
            f"S2D is more accurate than No PCDR at {BITS}",
            "Table 6",
            "73.0 - 40.1 = +32.9",
            low["S2D"] - low["No PCDR"],
            "points",
            +1,
        ),
        _row(
            f"No PCDR is less accurate than AdamW at {BITS}",
            "Tables 6, 11",
            "40.1 - 65.6 = -25.5",
            low["No PCDR"] - low["AdamW"],
            "points",
            -1,
        ),
    ]
    strong = tables["ptq_methods"].query("method == @METHOD and bits == @BITS")
    strong = strong.groupby(["seed", "variant"]).accuracy.mean().unstack() * 100
    rows.append(
        _row(
            f"S2D is more accurate than AdamW at {BITS} under {METHOD}",
            "Table 11",
            "73.0 - 65.6 = +7.4",
            strong["S2D"] - strong["AdamW"],
            "points",
            +1,
        )
    )
    unchanged = full["S2D"] - full["AdamW"]
    rows.append(
        _row("S2D leaves full precision as it is", "second-hand", "85.0 - 85.0 = 0.0", unchanged, "points", +1)
        | {"verdict": "reproduced" if abs(unchanged.mean()) <= 0.5 else "not reproduced"}
    )
    for column, name, reported in (
        ("pcdr_1", "PCDR_1", "0.91 to 0.46 (SigLIP2, layer 5)"),
        ("max_abs", "the largest activation", "176 to 60 (SigLIP2, layer 5)"),
        ("sigma_1", "the largest singular value", "10.4 to 3.2 (SigLIP2, layer 5)"),
    ):
        difference = of_ffn[column]["S2D"] - of_ffn[column]["AdamW"]
        unit = "mean over FFN layers"
        rows.append(_row(f"S2D lowers {name} of FFN layers", "Table 7", reported, difference, unit, -1))
    return pd.DataFrame(rows)


def reported_pcdr_selection() -> pd.DataFrame:
    """Table 6 with the baseline of Table 11 (the same model and quantizer): columns variant, bits, value (%)."""
    from s2d.lab.paper import load_paper_table

    selection = load_paper_table(6).replace({"variant": {"S2D without PCDR": "No PCDR"}})
    baseline = load_paper_table(11).query("variant == 'Baseline'").assign(variant="AdamW")
    table = pd.concat([baseline, selection], ignore_index=True)[["variant", "bits", "value"]]
    return table.sort_values("bits", ascending=False, kind="stable", ignore_index=True)
