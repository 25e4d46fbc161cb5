"""What the tables of the encoder's study say, on tables in which the answer is known."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from s2d.lab import encoder_evidence as evidence_of
from s2d.lab.figures import encoder as draw
from s2d.lab.figures.style import use_style

SEEDS = (2, 3, 4)


def evidence(*, s2d: float = 0.1) -> pd.DataFrame:
    """AdamW, the same networks under another name, and S2D: more accurate at four bits, half the error."""
    rows = []
    for seed in SEEDS:
        for variant, gain in (("AdamW", 0.0), ("AdamW, tuned learning rate", 0.0), ("S2D", s2d), ("No PCDR", -0.1)):
            key = f"{'AdamW' if variant.startswith('AdamW') else variant} {seed}"
            for method, bits, level in (("FP", "FP", 0.8), ("RTN", "W4A4", 0.3), ("ERQ", "W4A4", 0.6)):
                accuracy = level + seed / 100 + (gain * (1 + seed / 1000) if method != "FP" else 0.0)
                error = 0.0 if method == "FP" else seed * (0.5 if variant == "S2D" else 1.0)
                row = {"variant": variant, "seed": seed, "method": method, "bits": bits, "key": key}
                rows.append(row | {"accuracy": accuracy, "logit_error": error, "items": 9})
    return pd.DataFrame(rows)


def layers() -> pd.DataFrame:
    """Two blocks; S2D halves what they put out and leaves what goes in."""
    return pd.DataFrame(
        {"variant": variant, "seed": seed, "key": f"{variant} {seed}", "layer": f"encoder.layer.{block}.{kind}.dense"}
        | {"max_abs": level * (block + 1), "sigma_1": level, "pcdr_1": level / 10, "input_ratio": 7.0}
        for seed in SEEDS
        for variant, level in (("AdamW", 8.0), ("S2D", 4.0))
        for block in (0, 1)
        for kind in ("intermediate", "output")
    )


def test_networks_that_two_arms_share_are_counted_once():
    table = evidence_of.by_quantizer(evidence())
    assert list(dict.fromkeys(table.variant)) == ["AdamW", "S2D", "No PCDR"]
    lost = table.set_index(["variant", "seed", "method"]).points_lost
    assert lost["AdamW", 2, "RTN"] == pytest.approx(50.0)
    assert lost["S2D", 2, "RTN"] == pytest.approx(39.98)


def test_training_that_diverged_takes_no_part():
    table = evidence()
    table.loc[table.key == "S2D 3", "accuracy"] = np.nan
    found = evidence_of.against_adamw(table).query("first == 'S2D'")
    assert (found.seeds == 2).all()


def test_ratio_of_errors_is_a_geometric_mean_within_seeds():
    ratios = evidence_of.error_ratios(evidence()).set_index(["variant", "method"])
    assert ratios.loc[("S2D", "ERQ"), ["ratio", "low", "high"]].tolist() == pytest.approx([0.5] * 3)
    assert ratios.loc[("No PCDR", "RTN"), "ratio"] == pytest.approx(1.0)
    assert (ratios.seeds == len(SEEDS)).all()


def test_layers_over_adamw():
    change = evidence_of.changed(layers())
    assert change.loc["S2D"].tolist() == pytest.approx([0.5, 0.5, 1.0])
    assert set(evidence_of.written(layers()).block) == {0, 1}


@pytest.mark.parametrize(("s2d", "verdict"), [(0.1, "reproduced"), (-0.1, "not reproduced"), (0.0, "equivalent")])
def test_claims_get_the_verdict_of_the_interval(s2d, verdict):
    seen = evidence_of.seen_of_claims(evidence(s2d=s2d), layers())
    assert seen["S2D is more accurate than AdamW at W4A4 (ERQ)"].endswith(f"points, {verdict}")
    assert seen["S2D costs no accuracy in full precision"].endswith("+0.0 [+0.0, +0.0] points, reproduced")
    assert seen["S2D lowers the largest activation"].endswith("+50.0 [+50.0, +50.0] % lower, reproduced")


def test_figures_say_in_their_titles_what_they_show():
    use_style()
    title = draw.encoder_test(evidence()).get_suptitle()
    assert title.endswith("20 under RTN, 20 under ERQ")
    title = draw.encoder_differences(evidence()).get_suptitle().replace("\n", " ")
    assert (
        title
        == "Of 2 arms, against AdamW at W4A4: 1 more accurate under RTN, 1 less; 1 more accurate under ERQ, 1 less"
    )
    assert draw.encoder_layers(layers()).get_suptitle().startswith("S2D brings the largest FFN output to 0.50")
