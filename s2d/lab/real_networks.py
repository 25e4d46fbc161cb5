"""Reports of ``s2d diagnose`` and ``s2d condition`` on networks that somebody else trained, put together as tables.

    python -m s2d.lab.real_networks data FOLDER                     train.txt, test.txt (glosses), photos/ (crops)
    python -m s2d.lab.real_networks diagnosis NETWORK.json ...      of s2d diagnose NETWORK --json NETWORK.json
    python -m s2d.lab.real_networks conditioning FOLDER ...         of s2d condition NETWORK -o FOLDER
    python -m s2d.lab.real_networks inputs BEFORE.json AFTER.json   of s2d diagnose, before and after conditioning

The first writes what the reports are made with; the others write tables of their names in
``data/real``, whose README has the commands.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from PIL import Image
from sklearn.datasets import load_sample_images

from s2d.files import write_atomically, write_text
from s2d.lab.glosses import glosses, split_indices
from s2d.lab.results import provenance, save_table
from s2d.models.conditioning import LAM

RUN = "real"
FORMS = {
    "printed": "S2D, as printed",
    "live": "S2D, live",
    "decoupled": "S2D, decoupled",
    "cap": "spectral-norm cap",
}


def _read(path: Path, repair: str) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is no report ({error}): {repair}") from None


def diagnosis_table(reports: Sequence[Path]) -> pd.DataFrame:
    """The layers with outliers of some networks, and of each network how many layers there are.

    Args:
        reports: files of ``s2d diagnose --json``.

    Returns:
        Columns network, items, layers (of the network), layer, max_abs, ratio, excess_kurtosis, channel, position,
        sigma_1 (upper end), tightness, pcdr_1 and on, on_u1, rank (empty where S2D would leave it alone), finding.

    Raises:
        ValueError: for a file that is no such report.
    """
    rows = []
    for path in reports:
        report = _read(path, "write one with s2d diagnose NETWORK --json FILE")
        if "layers" not in report:
            raise ValueError(f"{path} is no report of s2d diagnose: it has no layers")
        for layer in report["layers"]:
            if layer["finding"] == "no outliers":
                continue
            row = {"network": report["model"], "items": report["items"], "layers": len(report["layers"])}
            row |= {name: layer[name] for name in ("layer", "max_abs", "ratio", "excess_kurtosis", "channel")}
            row |= {"position": layer["position"], "sigma_1": layer["sigma_1"][1], "tightness": layer["tightness"]}
            row |= {f"pcdr_{k}": value for k, value in enumerate(layer["pcdr"], start=1)}
            rows.append(row | {name: layer[name] for name in ("on_u1", "rank", "finding")})
    if not rows:
        raise ValueError("no layer of these reports has outliers: there is nothing to put together")
    return pd.DataFrame(rows).astype({"position": "Int64", "rank": "Int64"})


def conditioning_table(folders: Sequence[Path]) -> pd.DataFrame:
    """Before and after of some runs of ``s2d condition``.

    Args:
        folders: what ``-o`` named.

    Returns:
        One row a run: network, form, the settings, step (of the weights kept), max_abs and sigma_1 before and after,
        items (of the test), fidelity (mean cosine), and the relative errors of RTN before and after.

    Raises:
        ValueError: for a folder without a report.
    """
    rows = []
    for folder in folders:
        report = _read(folder / "report.json", "write one with s2d condition NETWORK --data DATA -o FOLDER")
        settings, before, after = report["settings"], report["before"], report["after"]
        row = {
            "network": report["model"],
            "form": FORMS[settings["form"]],
            "layers": " ".join(settings["include"]) or "all",
        }
        row |= {name: settings[name] for name in ("lam", "tau", "k_max", "cap", "lr", "steps", "batch_size", "seed")}
        row["lam"] = LAM.get(settings["form"]) if row["lam"] is None else row["lam"]
        row |= {"step": after["step"], "items": report["test"]["items"], "fidelity": report["test"]["fidelity"]}
        for name in ("max_abs", "sigma_1"):
            row |= {f"{name}_before": before[name], name: after[name]}
        for bits, error in report["rtn_error"]["before"].items():
            row |= {f"{bits}_before": error, bits: report["rtn_error"]["after"][bits]}
        rows.append(row)
    return pd.DataFrame(rows)


def write_data(folder: Path, *, train: int = 20000, test: int = 2000, photos: int = 64, seed: int = 0) -> None:
    """Data for ``s2d``: WordNet's glosses, a line each, and crops of the two photographs that scikit-learn ships.

    Args:
        folder: to write to; made if it is not there.
        train, test: glosses, of the splits of :mod:`s2d.lab.glosses`.
        photos: crops, 300 x 300 pixels.
        seed: of the crops.

    Raises:
        FileNotFoundError, ValueError: see :func:`s2d.lab.glosses.glosses`.
    """
    texts, _ = glosses()
    folder.mkdir(parents=True, exist_ok=True)
    for split, count in (("train", train), ("test", test)):
        write_text(folder / f"{split}.txt", "\n".join(texts[i] for i in split_indices(split)[:count]) + "\n")
    (folder / "photos").mkdir(exist_ok=True)
    generator = np.random.default_rng(seed)
    pictures = load_sample_images().images
    for number in range(photos):
        picture = pictures[number % len(pictures)]
        top, left = (generator.integers(0, size - 300) for size in picture.shape[:2])
        crop = Image.fromarray(picture[top : top + 300, left : left + 300])
        write_atomically(folder / "photos" / f"{number:03}.png", lambda path, crop=crop: crop.save(path, format="png"))


def inputs_table(reports: Sequence[Path]) -> pd.DataFrame:
    """What comes out of each layer and what goes in, of a network before and after.

    Args:
        reports: two files of ``s2d diagnose --json``, on the same data: before and after.

    Returns:
        Columns layer, max_abs_before, max_abs_after (outputs), input_ratio_before, input_ratio_after.

    Raises:
        ValueError: for files that are no such reports, or not two of the same layers.
    """
    found = [_read(path, "write one with s2d diagnose NETWORK --json FILE").get("layers") for path in reports]
    if len(found) != 2 or None in found or len({tuple(row["layer"] for row in rows) for rows in found}) != 1:
        raise ValueError(f"give two reports of s2d diagnose, of the same layers, not {', '.join(map(str, reports))}")
    table = pd.DataFrame({"layer": [row["layer"] for row in found[0]]})
    for name in ("max_abs", "input_ratio"):
        for when, rows in zip(("before", "after"), found, strict=True):
            table[f"{name}_{when}"] = [row[name] for row in rows]
    return table


TABLES: dict[str, Callable[[Sequence[Path]], pd.DataFrame]] = {
    "diagnosis": diagnosis_table,
    "conditioning": conditioning_table,
    "inputs": inputs_table,
}


def main(argv: Sequence[str] | None = None) -> None:
    """Put reports together as a table."""
    parser = argparse.ArgumentParser(prog="python -m s2d.lab.real_networks", description="Reports of s2d as tables.")
    parser.add_argument("what", choices=["data", *TABLES])
    parser.add_argument("paths", nargs="+", type=Path, metavar="PATH", help="a folder to write to, or reports")
    arguments = parser.parse_args(argv)
    try:
        if arguments.what == "data":
            write_data(arguments.paths[0])
            return
        table = TABLES[arguments.what](arguments.paths)
    except (FileNotFoundError, ValueError) as error:
        parser.error(str(error))
    path = save_table(table, arguments.what, run=RUN, source=provenance("s2d.lab.real_networks", {}))
    print(table.to_string(index=False))
    print(path)


if __name__ == "__main__":
    main()
