"""What the paper's batch needs and this place lacks: all of it at once, before anything is done."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from s2d.lab.paper_scale.experiments import TABLES, asked_tables, needed_data, needed_networks
from s2d.lab.paths import output_root

HOW = {
    "imagenet": "IMAGENET=FOLDER, ImageNet-1k as train/ and val/ with a folder of images for each class (its own "
    "licence: register at image-net.org, or the set ILSVRC/imagenet-1k of the Hugging Face hub)",
    "imagenet_split": "IMAGENET_SPLIT=FOLDER, training images alone, some put aside: python -m s2d.lab.paper_scale "
    "split IMAGENET/train -o FOLDER (settings are never chosen on the test set)",
    "gsm8k": "GSM8K=FOLDER with train.jsonl and test.jsonl (the repository openai/grade-school-math of GitHub, folder "
    "grade_school_math/data)",
    "dolci": "DOLCI=SOURCE, conversations as s2d train language takes them (the paper says Dolci, the post-training "
    "data of Olmo 3, and not which part: one of its SFT sets of the Hugging Face hub, cut to under a billion tokens)",
}
"""What each key of ``data`` is, and how it is got."""
GPU = "a GPU that torch can use on this machine; on a cluster, PROFILE=slurm and the like"
IMAGE_SETS = ("imagenet", "imagenet_split")


def lacking(config: Mapping[str, Any], *, gpu: bool) -> list[str]:
    """Everything that is missing for what a configuration asks for.

    Args:
        config: of ``paper/*.yaml``.
        gpu: whether one has to be here, as where jobs run on this machine.

    Returns:
        A sentence each, with the repair; empty where nothing is missing.

    Example:
        >>> config = {"tables": [9], "seeds": [0], "data": {}, "networks": {"Qwen2.5-0.5B": {"model": "a"}}}
        >>> [line.partition("=")[0] for line in lacking(config, gpu=False)]
        ['DOLCI', 'GSM8K']
    """
    found = [] if not gpu or has_gpu() else [GPU]
    given = config.get("data") or {}
    for key in needed_data(config):
        found += _lacking_data(key, given.get(key), config)
    for name in needed_networks(config):
        network = (config.get("networks") or {}).get(name)
        if network is None:
            found.append(f"networks: an entry {name!r}, as in paper/paper.yaml")
        else:
            found += _lacking_weights(name, network)
    return found


def _lacking_data(key: str, given: Any, config: Mapping[str, Any]) -> list[str]:
    if not given:
        return [HOW[key]]
    path = Path(str(given))
    if key in IMAGE_SETS:
        counts = {name: _folders(path / name) for name in ("train", "val")}
        if min(counts.values()) == 0:
            empty = [f"{path / name}/" for name, count in counts.items() if count == 0]
            return [f"{' and '.join(empty)} with a folder of images for each class: {HOW[key]}"]
        classes = config.get("classes") or counts["train"]
        wrong = {name: count for name, count in counts.items() if count != classes}
        return [f"{path / name}: it has {count} folders, not {classes}: {HOW[key]}" for name, count in wrong.items()]
    if key == "gsm8k":
        missing = [str(path / name) for name in ("train.jsonl", "test.jsonl") if not (path / name).is_file()]
        return [f"{' and '.join(missing)}: {HOW[key]}"] if missing else []
    # A name of the hub is for the training command to look up; a path has to be there.
    looks_local = path.is_absolute() or path.suffix in (".json", ".jsonl", ".parquet") or str(given).startswith(".")
    return [f"{path}: {HOW[key]}"] if looks_local and not path.exists() else []


def _folders(path: Path) -> int:
    return sum(entry.is_dir() and not entry.name.startswith(".") for entry in path.iterdir()) if path.is_dir() else 0


def _lacking_weights(name: str, network: Mapping[str, Any]) -> list[str]:
    """A hub's weights that are not in its cache: compute nodes often have no network."""
    hub = network.get("hub")
    if not hub or Path(str(network["model"])).exists() or _cached(hub):
        return []
    return [
        f"the weights of {name}: hf download {hub} where there is a network (HF_HOME on a disk that every node sees)"
    ]


def _cached(hub: str) -> bool:
    if importlib.util.find_spec("huggingface_hub") is None:
        return False
    from huggingface_hub import try_to_load_from_cache

    names = ("model.safetensors", "open_clip_model.safetensors", "model.safetensors.index.json")
    return any(isinstance(try_to_load_from_cache(hub, name), str) for name in names)


def has_gpu() -> bool:
    """Whether torch finds one here."""
    return torch.cuda.is_available()


def lacking_tables(config: Mapping[str, Any]) -> list[str]:
    """The tables of the batch that were not made, a sentence each."""
    folder = output_root() / "data" / str(config["run"])
    names = [TABLES[table] for table in asked_tables(config) if not (folder / f"{TABLES[table]}.csv").is_file()]
    return [f"{folder / names[0]}.csv and {len(names) - 1} other tables: make paper makes them"] if names else []


def refusal(missing: Sequence[str]) -> str:
    """What is said where something is missing.

    Example:
        >>> print(refusal(["GSM8K=FOLDER"]))
        SCALE=paper lacks, before anything is begun:
          - GSM8K=FOLDER
        REPRODUCING.md says what each is for.
    """
    lines = [f"  - {line}" for line in missing]
    return "\n".join(["SCALE=paper lacks, before anything is begun:", *lines, "REPRODUCING.md says what each is for."])
