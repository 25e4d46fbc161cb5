"""The paper's experiments as data: for every number it reports, the training and the measurement that give ours.

What is measured is read off ``data/paper``, row by row, so nothing is measured that the paper does not report and
nothing it reports is left out unsaid. The planner (``paper/Snakefile``) loads this file alone, so it stands on the
standard library only.
"""

from __future__ import annotations

import csv
import itertools
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

REPORTED = Path(__file__).resolve().parents[3] / "data" / "paper"
TABLES = {
    "6": "table06_pcdr_selection",
    "7": "table07_ffn_statistics",
    "8": "table08_dinov3_ptq4vit",
    "9": "table09_language_model",
    "10": "table10_hyperparameters",
    "11": "table11_power",
    "second_hand": "second_hand",
    "sweep": "sweep",
}
"""Of the paper, as ``tables`` in the configuration names them, and the file; ``sweep`` is none of the paper's."""
NETWORKS = {"SigLIP2": "SigLIP2-B/16-384", "DINOv3": "DINOv3-B", "": "SigLIP2-B/16-384"}
"""What Table 7 prints without a size and Table 10 without a model, taken for the network of the other tables."""
METHODS = {"ERQ": "erq", "RepQ-ViT": "repq_vit", "PTQ4ViT": "ptq4vit", "RTN": "rtn"}
ASSUMED_QUANTIZER = "ERQ"
"""Table 10 names none; its default row is the ERQ row of Tables 6 and 11."""
DEFAULTS = {"refresh_every": "100", "k_max": "3", "tau": "0.95", "power": "2"}
FFN = ("fc1", "fc2")
"""Table 7 does not say which matrix of the FFN it means: both are measured."""


@dataclass(frozen=True)
class Training:
    """A network fine-tuned in one way with one seed.

    Attributes:
        network: as ``networks`` of the configuration names it.
        arm: the way, a word that names a folder.
        seed: of everything random.
        settings: over the network's recipe, as ``s2d train --set`` takes them.
        start: the training whose model this one begins with; None for the published weights.
        data: the key of ``data`` in the configuration that it trains and is tested on.
    """

    network: str
    arm: str
    seed: int
    settings: tuple[tuple[str, str], ...] = ()
    start: Training | None = None
    data: str = ""

    @property
    def path(self) -> str:
        """Where what belongs to it lies.

        Example:
            >>> Training("SigLIP2-B/16-384", "s2d", 0).path
            'siglip2-b-16-384/s2d/seed0'
        """
        return f"{folder_name(self.network)}/{self.arm}/seed{self.seed}"


@dataclass(frozen=True)
class Cell:
    """One measurement on a trained network.

    Attributes:
        training: whose network.
        kind: ``"quantize"``, ``"evaluate"`` (full precision, or what QAT made), ``"diagnose"`` or ``"answer"`` (GSM8K).
        method, bits: of quantization; empty where there is none.
    """

    training: Training
    kind: str
    method: str = ""
    bits: str = ""

    @property
    def path(self) -> str:
        """Its file.

        Example:
            >>> Cell(Training("DINOv3-B", "adamw", 1), "quantize", "ptq4vit", "W8A8").path
            'dinov3-b/adamw/seed1/ptq4vit-W8A8.json'
        """
        name = {"evaluate": "FP", "diagnose": "layers", "answer": f"answers-{self.bits}"}.get(self.kind)
        return f"{self.training.path}/{name or f'{self.method}-{self.bits}'}.json"


@dataclass(frozen=True)
class Row:
    """One row of a table of ours: a row of the paper's, one seed, and where its value is read.

    Attributes:
        reported: the paper's row, or the columns of a row that it has not.
        cell: the measurement.
        weight: of Table 7, which matrix of the FFN; else empty.
    """

    reported: Mapping[str, str] = field(hash=False)
    cell: Cell
    weight: str = ""


def folder_name(network: str) -> str:
    """A network's name as a folder is called.

    Example:
        >>> folder_name("Qwen2.5-0.5B")
        'qwen2.5-0.5b'
    """
    return re.sub(r"[^a-z0-9.]+", "-", network.lower()).strip("-")


def reported_rows(table: str) -> list[dict[str, str]]:
    """The paper's numbers, a row each, as text.

    Args:
        table: a key of ``TABLES``.

    Raises:
        ValueError: for an unknown table.

    Example:
        >>> reported_rows("8")[0]["value"]
        '58.03'
    """
    check_table(table)
    with (REPORTED / f"{TABLES[table]}.csv").open(newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def check_table(table: str) -> None:
    """ValueError for an unknown table."""
    if table not in TABLES:
        raise ValueError(f"tables: there is no {table!r}: choose among {', '.join(TABLES)}")


def rows(table: str, config: Mapping[str, Any]) -> list[Row]:
    """What a table of ours consists of.

    Args:
        table: a key of ``TABLES``.
        config: of ``paper/*.yaml``: ``seeds``, and ``sweep`` for the table of that name.

    Returns:
        The paper's rows in its order, each seed after the other. A row that no job gives (a time on other hardware, the
        default ``lam``) is left out.

    Raises:
        ValueError: for an unknown table, or a sweep that is not described.

    Example:
        >>> [row.cell.path for row in rows("6", {"seeds": [0]})][:2]
        ['siglip2-b-16-384/s2d_without_pcdr/seed0/erq-W4A4.json', 'siglip2-b-16-384/s2d/seed0/erq-W4A4.json']
    """
    seeds = config["seeds"]
    if table == "sweep":
        return [row for seed in seeds for row in _sweep(config.get("sweep"), seed)]
    return [row for reported in reported_rows(table) for seed in seeds for row in _measured(reported, seed)]


def _measured(reported: Mapping[str, str], seed: int) -> Iterator[Row]:
    """What gives our number for one of the paper's: nothing where no job does."""
    metric, quantizer, bits = reported["metric"], reported["quantizer"], reported["bits"]
    language = reported["dataset"] == "GSM8K"
    training = _training(reported, seed, "dolci" if language else "imagenet")
    if "layer" in reported:
        yield from (Row(reported, Cell(training, "diagnose"), weight) for weight in FFN)
    elif language:
        yield Row(reported, Cell(training, "answer", METHODS.get(quantizer, ""), bits))
    elif metric == "top-1 accuracy" and bits.startswith("FP"):
        yield Row(reported, Cell(training, "evaluate"))
    elif metric == "top-1 accuracy" and quantizer == "QAT":
        yield Row(reported, Cell(_aware(training, bits), "evaluate", "", bits))
    elif metric == "top-1 accuracy":
        yield Row(reported, Cell(training, "quantize", METHODS[quantizer or ASSUMED_QUANTIZER], bits))


def _training(reported: Mapping[str, str], seed: int, data: str) -> Training:
    network, variant = NETWORKS.get(reported["model"], reported["model"]), reported["variant"]
    if variant in ("AdamW", "Baseline"):
        return Training(network, "adamw", seed, (("decay", "none"),), data=data)
    changed = {
        name: reported[name]
        for name, usual in DEFAULTS.items()
        if reported.get(name) and float(reported[name]) != float(usual)
    }
    if variant == "S2D without PCDR":
        changed["criterion"] = "all"
    settings = (("decay", "s2d"), *changed.items())
    arm = "s2d_without_pcdr" if "criterion" in changed else "-".join(["s2d", *itertools.chain(*changed.items())])
    return Training(network, arm, seed, settings, data=data)


def _aware(start: Training, bits: str) -> Training:
    """Quantization-aware training of what a training made."""
    w_bits, a_bits = re.fullmatch(r"W(\d+)A(\d+)", bits).groups()
    settings = (("decay", "none"), ("qat_w_bits", w_bits), ("qat_a_bits", a_bits))
    return Training(start.network, f"{start.arm}-qat-{bits}", start.seed, settings, start, start.data)


def _sweep(sweep: Mapping[str, Any] | None, seed: int) -> Iterator[Row]:
    """Every combination of some settings, quantized; on images that were put aside, as settings are chosen by it."""
    if not sweep:
        raise ValueError(
            "tables: sweep is asked for, and sweep is empty: write such as sweep: {network: SigLIP2-B/16-384, "
            "quantizer: ERQ, bits: [W4A4], set: {lr: [1e-5, 3e-5]}}"
        )
    names = list(sweep["set"])
    for values in itertools.product(*sweep["set"].values()):
        chosen = {name: str(value) for name, value in zip(names, values, strict=True)}
        arm = "-".join(["sweep", *itertools.chain(*chosen.items())])
        settings = (("decay", "s2d"), *chosen.items())
        training = Training(sweep["network"], arm, seed, settings, data="imagenet_split")
        same = {"model": sweep["network"], "dataset": "put aside", "variant": "S2D", **chosen}
        for bits in ("FP", *sweep["bits"]):
            quantizer = "" if bits == "FP" else sweep["quantizer"]
            row = {**same, "quantizer": quantizer, "bits": bits, "metric": "top-1 accuracy", "unit": "%"}
            cell = Cell(training, "quantize", METHODS[quantizer], bits) if quantizer else Cell(training, "evaluate")
            yield Row(row, cell)


def asked_tables(config: Mapping[str, Any]) -> list[str]:
    """The tables that a configuration asks for: those of ``tables``, by default the paper's.

    Raises:
        ValueError: for an unknown one.

    Example:
        >>> asked_tables({"tables": "6 11"}), len(asked_tables({}))
        (['6', '11'], 7)
    """
    asked = config.get("tables") or [table for table in TABLES if table != "sweep"]
    asked = str(asked).replace(",", " ").split() if isinstance(asked, (str, int)) else [str(table) for table in asked]
    for table in asked:
        check_table(table)
    return asked


def cells(config: Mapping[str, Any]) -> list[Cell]:
    """Every measurement that some table needs, once.

    Example:
        >>> len(cells({"tables": [6, 11], "seeds": [0]}))
        15
    """
    return list(dict.fromkeys(row.cell for table in asked_tables(config) for row in rows(table, config)))


def trainings(config: Mapping[str, Any]) -> list[Training]:
    """Every training that some measurement needs, once, and those that it begins with.

    Example:
        >>> [training.arm for training in trainings({"tables": [6], "seeds": [0]})]
        ['s2d_without_pcdr', 's2d']
    """
    return list(dict.fromkeys(itertools.chain(*(_chain(cell.training) for cell in cells(config)))))


def _chain(training: Training) -> Iterator[Training]:
    if training.start is not None:
        yield from _chain(training.start)
    yield training


def by_path(found: Iterable[Training | Cell]) -> dict[str, Training | Cell]:
    """Trainings or measurements by their paths.

    Raises:
        ValueError: for two of one path.
    """
    named: dict[str, Training | Cell] = {}
    for entry in found:
        if named.setdefault(entry.path, entry) != entry:
            raise ValueError(f"{entry.path} stands for {named[entry.path]} and for {entry}")
    return named


def with_locations(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration whose ``data`` says where ``IMAGENET=`` and the like point to, as a command line has them.

    Example:
        >>> with_locations({"data": {"gsm8k": ""}, "GSM8K": "/data/gsm8k"})
        {'data': {'gsm8k': '/data/gsm8k'}}
    """
    data = dict(config.get("data") or {})
    given = {name: config[name.upper()] for name in data if config.get(name.upper())}
    rest = {name: value for name, value in config.items() if name.lower() not in data}
    return rest | {"data": data | given}


def needed_data(config: Mapping[str, Any]) -> list[str]:
    """The keys of ``data`` that the asked tables need.

    Example:
        >>> needed_data({"tables": [9], "seeds": [0]})
        ['dolci', 'gsm8k']
    """
    found = [cell.training.data for cell in cells(config)]
    found += ["gsm8k" for cell in cells(config) if cell.kind == "answer"]
    return list(dict.fromkeys(found))


def needed_networks(config: Mapping[str, Any]) -> list[str]:
    """The networks that the asked tables need.

    Example:
        >>> needed_networks({"tables": [7], "seeds": [0]})
        ['SigLIP2-B/16-384', 'DINOv3-B']
    """
    return list(dict.fromkeys(cell.training.network for cell in cells(config)))


def seeds_of(text: str | int | Sequence[int]) -> list[int]:
    """Seeds as a configuration or a command line has them.

    Raises:
        ValueError: for what is no list of whole numbers, or has one twice.

    Example:
        >>> seeds_of("0 1 2"), seeds_of([3])
        ([0, 1, 2], [3])
    """
    words = str(text).replace(",", " ").split() if isinstance(text, (str, int)) else [str(seed) for seed in text]
    if not words or not all(word.isdigit() for word in words) or len(set(words)) != len(words):
        raise ValueError(f"seeds: {text!r} is no list of different whole numbers: give such as 0 1 2")
    return [int(word) for word in words]


# --- commands ---------------------------------------------------------------------------------------------------------


def train_command(training: Training, config: Mapping[str, Any]) -> list[str]:
    """What trains, behind ``python -m``; ``-o`` and ``--json`` are for the planner to add.

    Args:
        training: of :func:`trainings`.
        config: of ``paper/*.yaml``.

    Example:
        >>> network = {"kind": "vision", "model": "vit", "recipe": "r", "arguments": ["--pretrained"]}
        >>> config = {"networks": {"DINOv3-B": network}, "data": {"imagenet": "in"}, "device": "cuda"}
        >>> config |= {"seeds": [0], "tables": [8], "gpu": 1}
        >>> " ".join(train_command(trainings(config)[0], config))
        's2d train vision vit --pretrained --data in/train --recipe r --set decay=none seed=0'
    """
    network = config["networks"][training.network]
    if training.start is None:
        model = [network["model"], *network.get("arguments", ())]
    else:
        model = trained_model(training.start, config)
    data = str(config["data"][training.data])
    settings = {**config.get("set", {}), **network.get("set", {}), **dict(training.settings), "seed": training.seed}
    count = gpus(training, config)
    spread = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(count), "-m"] if count > 1 else []
    return [
        *spread,
        *("s2d", "train", network["kind"], *model),
        *("--data", f"{data}/train" if network["kind"] == "vision" else data),
        *("--recipe", str(network["recipe"])),
        *("--set", *(f"{name}={_yaml(value)}" for name, value in settings.items())),
        *(["--cpu"] if config["device"] == "cpu" else []),
    ]


def _yaml(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def gpus(training: Training, config: Mapping[str, Any]) -> int:
    """How many a training takes: ``gpu`` of its network, by default what every job takes."""
    return int(config["networks"][training.network].get("gpu", config["gpu"]))


def run_folder(training: Training, config: Mapping[str, Any]) -> str:
    """Where a training keeps its checkpoints and its model."""
    return f"{config['runs']}/{training.path}"


def trained_model(training: Training, config: Mapping[str, Any]) -> list[str]:
    """What a training made, as MODEL and its options of the other commands."""
    return [f"{run_folder(training, config)}/model"]


def cell_command(cell: Cell, config: Mapping[str, Any]) -> list[str]:
    """What measures, behind ``python -m``; ``--json`` is for the planner to add.

    Args:
        cell: of :func:`cells`.
        config: of ``paper/*.yaml``.
    """
    kind, data = cell.kind, str(config["data"].get(cell.training.data))
    model = trained_model(cell.training, config)
    run = ["--device", config["device"], "--seed", cell.training.seed, "--batch-size", config["batch"][kind]]
    tested = config["test"]["answer" if kind == "answer" else "quantize"]
    few = ["--items" if kind == "answer" else "--test-images", tested] if tested else []
    if kind == "quantize":
        w_bits, a_bits = re.fullmatch(r"W(\d+)A(\d+)", cell.bits).groups()
        how = ["--method", cell.method, "--w-bits", w_bits, "--a-bits", a_bits]
        where = ["--calibration", f"{data}/train", "--images", config["calibration"][kind], "--test", f"{data}/val"]
        found = ["s2d", "quantize", *model, *how, *where, *few, *run]
    elif kind == "evaluate":
        aware = ["--quantized", f"{run_folder(cell.training, config)}/quantized"] if cell.bits else []
        found = ["s2d", "eval", *model, *aware, "--test", f"{data}/val", *few, *run]
    elif kind == "diagnose":
        where = ["--data", f"{data}/train", "--images", config["calibration"][kind], "--k-max", DEFAULTS["k_max"]]
        found = ["s2d", "diagnose", *model, *where, *run]
    else:
        how = ["--bits", cell.bits, "--calibration", config["calibration"][kind], "--new-tokens", config["new_tokens"]]
        where = ["--problems", config["data"]["gsm8k"]]
        found = ["s2d.lab.paper_scale", "answer", *model, *where, *how, *few, *run]
    return [str(word) for word in found]
