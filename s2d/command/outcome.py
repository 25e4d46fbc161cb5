"""What conditioning did, as a page: before and after, the way there, and what to do next."""

from __future__ import annotations

from html import escape
from pathlib import Path
from typing import Any

from s2d.command.page import picture, table, write_page

BEFORE, AFTER, LINE = "#7a8a99", "#00798c", "#d1495b"
ENOUGH = 0.9  # of the error before: less of a change is not called one


def before_and_after(report: dict[str, Any]) -> list[tuple[str, str, str]]:
    """What is measured of both networks: a name and two numbers each.

    Args:
        report: see :func:`findings`.

    Paper: none
    """
    before, after, errors = report["before"], report["after"], report["rtn_error"]
    outliers = (("largest activation", "max_abs"), ("largest sigma_1", "sigma_1"))
    rows = [(name, f"{before[key]:.4g}", f"{after[key]:.4g}") for name, key in outliers]
    return rows + [
        (f"RTN {bits}, relative error", f"{error:.3f}", f"{errors['after'][bits]:.3f}")
        for bits, error in errors["before"].items()
    ]


def findings(report: dict[str, Any]) -> list[str]:
    """What is to be said about a report, a sentence each.

    Args:
        report: of :func:`s2d.command.condition.main`, as in its report.json.

    Paper: none
    """
    before, after, test = report["before"], report["after"], report["test"]
    said = [
        f"The largest activation of the conditioned layers went from {before['max_abs']:.4g} ({before['layer']}) to "
        f"{after['max_abs']:.4g} ({after['layer']}), the largest spectral norm from {before['sigma_1']:.4g} to "
        f"{after['sigma_1']:.4g}.",
        f"On {test['items']} items that it was not trained on ({test['data']}) the outputs keep a mean cosine of "
        f"{test['fidelity']:.4f} with the original's.",
    ]
    if not report["within_budget"]:
        said.append(f"No look kept the cosine of {report['settings']['fidelity']} that was asked for.")
    if report["on_target"] is False:
        said.append("The target was not reached.")
    return said + [_rounding(report["rtn_error"])]


def _rounding(errors: dict[str, dict[str, float]]) -> str:
    ratios = {bits: errors["after"][bits] / before for bits, before in errors["before"].items() if before > 0}
    better = [bits for bits, ratio in ratios.items() if ratio < ENOUGH]
    worse = [bits for bits, ratio in ratios.items() if ratio > 1 / ENOUGH]
    if better or worse:
        parts = [f"smaller at {', '.join(better)}"] if better else []
        parts += [f"larger at {', '.join(worse)}"] if worse else []
        return f"The error of round-to-nearest is {' and '.join(parts)} than it was."
    return (
        "The error of round-to-nearest is about what it was (within a tenth): where the outliers were is not where "
        "this network's quantizers lose, or other inputs decide."
    )


def write_outcome(path: Path, report: dict[str, Any], again: str | None) -> None:
    """Write the page.

    Args:
        path: of the page.
        report: see :func:`findings`.
        again: how the commands name the conditioned network; None where they cannot load it.

    Raises:
        ImportError: without the package matplotlib.

    Paper: none
    """
    settings, errors = report["settings"], report["rtn_error"]
    told = ", ".join(f"{name} {value}" for name, value in settings.items() if value not in (None, [], False))
    about = f"Trained on {report['data']}; {told}. The weights are those of step {report['after']['step']}."
    looks = [
        (
            str(look["step"]),
            f"{look['max_abs']:.4g}",
            look["layer"],
            f"{look['sigma_1']:.4g}",
            f"{look['fidelity']:.4f}",
        )
        for look in report["looks"]
    ]
    commands = {}
    if again is not None:
        commands = {
            "Look at what is left:": f"s2d diagnose {again} --data {report['data']} --html letter.html",
            "Quantize it:": f"s2d quantize {again} --calibration {report['data']} --method repq_vit --w-bits 6 "
            "--a-bits 6",
        }
    parts = [
        "<h2>What became of it</h2>" + "".join(f"<p>{escape(sentence)}</p>" for sentence in findings(report)),
        table(("", "before", "after"), before_and_after(report)),
        "<h2>The way there</h2>",
        picture("largest activation and cosine over the steps", lambda figure: _way(figure, report)),
        picture("error of round-to-nearest before and after", lambda figure: _errors(figure, errors)),
        "<h2>What to do next</h2>" if commands else "",
        *(f"<p>{escape(reason)}</p><pre>{escape(command)}</pre>" for reason, command in commands.items()),
        "<h2>Every look</h2>",
        table(("step", "largest activation", "in", "largest sigma_1", "cosine"), looks),
    ]
    write_page(path, f"Conditioning of {report['model']}", about, parts)


def _way(figure: Any, report: dict[str, Any]) -> None:
    left, right = figure.subplots(1, 2)
    looks, chosen = report["looks"], report["after"]
    steps = [look["step"] for look in looks]
    left.plot(steps, [look["max_abs"] for look in looks], color=LINE, marker=".")
    left.plot(chosen["step"], chosen["max_abs"], color=AFTER, marker="o", markersize=9)
    left.set(xlabel="step", ylim=(0, None))
    left.set_title("The largest activation (dot: what was kept)", loc="left", fontsize=10)
    right.plot(steps, [look["fidelity"] for look in looks], color=BEFORE, marker=".")
    right.plot(chosen["step"], chosen["fidelity"], color=AFTER, marker="o", markersize=9)
    right.axhline(report["settings"]["fidelity"], color="#bbb", lw=0.8, zorder=0)
    right.set(xlabel="step")
    right.set_title("Cosine with the original (line: the budget)", loc="left", fontsize=10)


def _errors(figure: Any, errors: dict[str, dict[str, float]]) -> None:
    axes = figure.add_subplot()
    for shift, (name, colour) in zip((-0.2, 0.2), (("before", BEFORE), ("after", AFTER)), strict=True):
        axes.bar([i + shift for i in range(len(errors[name]))], errors[name].values(), 0.38, color=colour, label=name)
    axes.set_xticks(range(len(errors["before"])), errors["before"])
    axes.set_title("Error of the outputs under round-to-nearest, relative", loc="left", fontsize=10)
    axes.legend(frameon=False)
