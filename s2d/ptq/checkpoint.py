"""A quantized model as a folder: integer codes, grids and everything else in safetensors, the description in JSON."""

from __future__ import annotations

import hashlib
import importlib
import json
import math
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from s2d import __version__
from s2d.files import write_folder_atomically
from s2d.packages import need

# Imported so that QUANTIZERS knows their classes; those of the methods come with the package itself.
from s2d.ptq import log_sqrt2, twin_uniform  # noqa: F401
from s2d.ptq.copies import independent_copy
from s2d.ptq.prepare import Layout, build, layout_of
from s2d.ptq.quantizers import QUANTIZERS, Quantizer
from s2d.ptq.sites import quantized_layers, set_mode, sites

FORMAT = 2
# Format 1 spent a whole byte on a code.
_READABLE = (1, FORMAT)
TENSORS, DESCRIPTION = "model.safetensors", "quantization.json"


def save_quantized(model: nn.Module, folder: str | os.PathLike[str], *, overwrite: bool = False) -> None:
    """Write a quantized model, whole or not at all.

    The folder holds ``model.safetensors`` (weights as integer codes of n bits each, packed; the grids; everything else
    as it is) and ``quantization.json`` (what is where, with a SHA-256 of both). A weight that its codes do not give
    back bit for bit (an 8-bit grid in bfloat16, say) is stored in floating point.

    Args:
        model: from :func:`s2d.ptq.quantize`; left untouched.
        folder: must not exist.
        overwrite: replace an existing folder, if it holds such a checkpoint and nothing else.

    Raises:
        ValueError: for a model that is not quantized, or a folder that is in the way.
        ImportError: without the package safetensors.

    Example:
        >>> import tempfile
        >>> from s2d.ptq import quantize
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 2))
        >>> quantized = quantize(model, w_bits=4, a_bits=4, calibration=torch.randn(32, 4))
        >>> with tempfile.TemporaryDirectory() as parent:
        ...     save_quantized(quantized, f"{parent}/w4a4")
        ...     loaded = load_quantized(model, f"{parent}/w4a4")
        >>> x = torch.randn(3, 4)
        >>> torch.equal(loaded(x), quantized(x))
        True

    Paper: none.
    """
    safetensors = need("safetensors.torch", "a quantized checkpoint")
    folder = Path(folder)
    check_folder(folder, overwrite=overwrite)
    check_quantized(model)
    description, tensors = _described(model)

    def fill(new: Path) -> None:
        file = new / TENSORS
        safetensors.save_file(tensors, file, metadata={"format": "pt"})
        described = description | {"tensors_file": {"bytes": file.stat().st_size, "sha256": _sha256(file)}}
        described["sha256"] = _digest(described)
        (new / DESCRIPTION).write_text(json.dumps(described, indent=1) + "\n", encoding="utf-8")
        shutil.copymode(new / DESCRIPTION, file)  # safetensors writes for the owner alone

    write_folder_atomically(folder, fill, overwrite=overwrite)


def check_folder(folder: str | os.PathLike[str], *, overwrite: bool = False) -> None:
    """Raise ValueError, as :func:`save_quantized` would, for a folder that is in the way."""
    folder = Path(folder)
    if not folder.exists() and not folder.is_symlink():
        return
    if not overwrite:
        raise ValueError(f"{folder} exists: choose another folder, or overwrite it (overwrite=True, --overwrite)")
    if folder.is_symlink() or not folder.is_dir() or {path.name for path in folder.iterdir()} - {TENSORS, DESCRIPTION}:
        raise ValueError(f"{folder} is no folder with a quantized model alone: it is not overwritten, choose another")


def check_quantized(model: nn.Module) -> None:
    """ValueError unless the model is what :func:`s2d.ptq.quantize` returns, ready to be used."""
    found = sites(model)
    if not found:
        raise ValueError(f"{type(model).__name__} is not quantized: call s2d.ptq.quantize first")
    for name, site in found.items():
        if site.mode != "quantized":
            raise ValueError(
                f"site {name or '(the model)'} is in mode {site.mode!r}: call s2d.ptq.qat.finish_qat after "
                "training, or s2d.ptq.sites.set_mode(model, 'quantized')"
            )


# --- what is stored --------------------------------------------------------------------------------------------------


def attached(model: nn.Module) -> Iterator[tuple[str, str, nn.Module]]:
    """Site, attribute and module of every quantizer and transform of a prepared model."""
    for name, site in sites(model).items():
        for attribute, module in site._modules.items():
            if module is not None:
                yield name, attribute, module


def _own_tensors(model: nn.Module) -> dict[str, tuple[str, Tensor]]:
    """Kind (``parameter``, ``buffer``, ``transient`` for a buffer that is not in the state dict) and tensor by name.

    Without what belongs to quantizers and transforms; shared tensors are there under each of their names.
    """
    skipped = {id(part) for _, _, module in attached(model) for part in module.modules()}
    found: dict[str, tuple[str, Tensor]] = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        if id(module) in skipped:
            continue
        path = f"{prefix}." if prefix else ""
        for name, tensor in module._parameters.items():
            if tensor is not None:
                found[path + name] = ("parameter", tensor)
        for name, tensor in module._buffers.items():
            if tensor is not None:
                found[path + name] = ("transient" if name in module._non_persistent_buffers_set else "buffer", tensor)
    return found


@torch.no_grad()
def _described(model: nn.Module) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The description, without hashes, and the tensors by their keys in the file."""
    codes = {id(site.weight): found for site in quantized_layers(model).values() if (found := _codes(site)) is not None}
    keys: dict[int, str] = {}
    entries, tensors = {}, {}
    for name, (kind, tensor) in _own_tensors(model).items():
        key = keys.setdefault(id(tensor), name)
        entries[name] = {"key": key, "kind": kind, "shape": list(tensor.shape), "dtype": _name(tensor.dtype)}
        if id(tensor) in codes:
            first, bits = int(codes[id(tensor)].min()), _width(codes[id(tensor)])
            tensors[key] = pack_codes(codes[id(tensor)] - first, bits)
            entries[name] |= {"stored": "packed", "first": first, "bits": bits}
        else:
            tensors[key] = tensor.detach()
            entries[name]["stored"] = "values"
    modules: list[dict[str, Any]] = []
    prefixes: dict[int, str] = {}  # layers may share a rotation
    for site, attribute, module in attached(model):
        key = prefixes.setdefault(id(module), f"{site}.{attribute}.".lstrip("."))
        known = {"class": type(module).__name__, "config": module.config(), "key": key}
        modules.append({"site": site, "attribute": attribute} | known)
        tensors |= {key + name: tensor for name, tensor in module.state_dict().items()}
    description = {
        "format": FORMAT,
        "s2d": __version__,
        "model": type(model).__name__,
        "layout": layout_of(model).as_dict(),
        "quantization": model.__dict__.get("s2d_quantization", {}),
        "modules": modules,
        "tensors": entries,
    }
    # Clones: safetensors refuses tensors that share memory (views of one buffer).
    tensors = {
        key: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for key, tensor in tensors.items()
    }
    return json.loads(json.dumps(description, default=repr)), tensors


def _codes(site: nn.Module) -> Tensor | None:
    """The codes of a weight; None where they do not give it back bit for bit."""
    quantizer = site.weight_quantizer
    if quantizer is None or site.weight.numel() == 0:
        return None
    codes = site.weight_codes()
    return codes if torch.equal(_from_codes(quantizer, codes, site.weight.dtype), site.weight) else None


def _width(codes: Tensor) -> int:
    """How many bits each of these codes needs, counted from the least."""
    return max(1, int(codes.max() - codes.min()).bit_length())


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """Codes one after the other without gaps, each in a few bits, the least significant first.

    Args:
        codes: of any shape and integer type, from 0 to 2^bits - 1.
        bits: 1 to 16.

    Returns:
        uint8, ``(ceil(codes.numel() * bits / 8),)``.

    Raises:
        ValueError: for codes out of range.

    Example:
        >>> pack_codes(torch.tensor([1, 2, 15]), 4).tolist()  # two a byte
        [33, 15]

    Paper: none.
    """
    codes = codes.flatten().to(torch.int32)
    if codes.numel() == 0:
        return codes.to(torch.uint8)
    if not 0 <= int(codes.min()) <= int(codes.max()) < 2**bits:
        raise ValueError(
            f"codes run from {int(codes.min())} to {int(codes.max())}: {bits} bits hold 0 to {2**bits - 1}"
        )
    packed = []
    for part in codes.split(2**20):  # eight codes fill whole bytes, so that parts can be joined
        digits = (part[:, None] >> torch.arange(bits, device=codes.device)) & 1
        digits = torch.nn.functional.pad(digits.flatten(), (0, -digits.numel() % 8)).view(-1, 8)
        packed.append((digits << torch.arange(8, device=codes.device)).sum(1).to(torch.uint8))
    return torch.cat(packed)


def unpack_codes(packed: Tensor, bits: int, shape: Sequence[int]) -> Tensor:
    """What :func:`pack_codes` packed.

    Args:
        packed: uint8, one-dimensional.
        bits: of a code.
        shape: of the codes.

    Returns:
        int16, of that shape.

    Raises:
        ValueError: for a number of bytes that is not that of such codes.

    Example:
        >>> unpack_codes(torch.tensor([33, 15], dtype=torch.uint8), 4, (3,)).tolist()
        [1, 2, 15]

    Paper: none.
    """
    count = math.prod(shape)
    if packed.numel() != math.ceil(count * bits / 8):
        raise ValueError(f"{count} codes of {bits} bits fill {math.ceil(count * bits / 8)} bytes, not {packed.numel()}")
    if count == 0:
        return packed.to(torch.int16).view(tuple(shape))
    found = []
    for part in packed.split(bits * 2**17):
        digits = (part[:, None].to(torch.int32) >> torch.arange(8, device=packed.device)) & 1
        digits = digits.flatten()[: digits.numel() // bits * bits].view(-1, bits)
        found.append((digits << torch.arange(bits, device=packed.device)).sum(1).to(torch.int16))
    return torch.cat(found)[:count].view(tuple(shape))


def _from_codes(quantizer: Quantizer, codes: Tensor, dtype: torch.dtype) -> Tensor:
    return quantizer.dequantize(codes.to(torch.int16)).to(dtype)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _sha256(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _digest(description: dict[str, Any]) -> str:
    """SHA-256 of everything in the description but that hash itself."""
    rest = {key: value for key, value in description.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


# --- loading ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
def load_quantized(model: nn.Module, folder: str | os.PathLike[str]) -> nn.Module:
    """Read a quantized model: the same output, bit for bit, as the model that was saved.

    Args:
        model: of the same architecture in floating point, with any weights, on the device wanted, or on ``meta``
            without any (the result is on the CPU then); left untouched.
        folder: from :func:`save_quantized`.

    Returns:
        A quantized copy, in evaluation mode, in the dtypes of the file.

    Raises:
        ValueError: naming the file and the repair, for files that are missing, truncated or altered, of an unknown
            format version, with an unknown quantizer, or of another model.
        ImportError: without the package safetensors.

    Example: see :func:`save_quantized`.

    Paper: none.
    """
    safetensors = need("safetensors.torch", "a quantized checkpoint")
    folder = Path(folder)
    description = _read_description(folder)
    file = folder / TENSORS
    _check_tensors_file(file, description)
    try:
        tensors = safetensors.load_file(file)
    except Exception as error:  # of the safetensors package; the hash was right, so the file was written like that
        raise ValueError(f"{file} is no safetensors file ({error}): save the model again") from None
    if sites(model):
        raise ValueError(f"{type(model).__name__} is quantized already: give a freshly built model in floating point")
    device = next((p.device for p in model.parameters() if not p.is_meta), torch.device("cpu"))
    try:
        loaded = build(independent_copy(model).eval(), Layout(**description["layout"]))
        if type(loaded).__name__ != description["model"]:  # after building: a model that is one layer becomes a site
            raise ValueError(f"the file is of a {description['model']}")
        _attach(loaded, description, tensors)
        _fill(loaded, description, tensors)
    except (ValueError, KeyError, AttributeError, TypeError, RuntimeError) as error:
        reason = f"lacks {error}" if isinstance(error, KeyError) else str(error)
        raise ValueError(
            f"{folder / DESCRIPTION} does not fit this {type(model).__name__} ({reason}): build the architecture "
            "that was saved, with the same options"
        ) from None
    loaded.__dict__["s2d_quantization"] = description["quantization"]
    set_mode(loaded, "quantized")
    return loaded.to(device)


def read_description(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """What ``quantization.json`` says of a saved model; raises as :func:`load_quantized` does."""
    return _read_description(Path(folder))


def _read_description(folder: Path) -> dict[str, Any]:
    file = folder / DESCRIPTION
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder: give one written by save_quantized")
    if not file.is_file():
        raise ValueError(f"{file} is missing: copy the whole folder again, or save the model again")
    try:
        description = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not JSON ({error}): copy it again, or save the model again") from None
    if not isinstance(description, dict) or description.get("format") not in _READABLE:
        version = description.get("format") if isinstance(description, dict) else None
        raise ValueError(
            f"{file} has format version {version!r}, this is s2d {__version__} and reads {_READABLE[0]} to {FORMAT}: "
            "install the version of s2d that wrote it, or save the model again"
        )
    for module in description.get("modules", ()):
        _class(module["class"], file)
    if description.get("sha256") != _digest(description):
        raise ValueError(f"{file} was altered after it was written: copy it again, or save the model again")
    return description


def _check_tensors_file(file: Path, description: dict[str, Any]) -> None:
    expected = description["tensors_file"]
    if not file.is_file():
        raise ValueError(f"{file} is missing: copy the whole folder again, or save the model again")
    size = file.stat().st_size
    if size != expected["bytes"]:
        raise ValueError(
            f"{file} has {size} bytes instead of {expected['bytes']}, it was cut off or replaced: copy it again, or "
            "save the model again"
        )
    if _sha256(file) != expected["sha256"]:
        raise ValueError(f"{file} was altered (its SHA-256 differs): copy it again, or save the model again")


def _class(name: str, file: Path) -> type[nn.Module]:
    """A quantizer or transform class by its name."""
    if name in QUANTIZERS:
        return QUANTIZERS[name]
    if name == "Rotation":
        return importlib.import_module("s2d.ptq.rotation").Rotation
    raise ValueError(
        f"{file} names the quantizer class {name!r}, which s2d {__version__} does not know: import the module that "
        "defines it first, or install the version of s2d that wrote the file"
    )


def _attach(model: nn.Module, description: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Give every site its quantizers and transforms, in place."""
    found = sites(model)
    made: dict[str, nn.Module] = {}
    for known in description["modules"]:
        key = known["key"]
        if key not in made:
            made[key] = _class(known["class"], Path(DESCRIPTION))(**known["config"]).eval()
            state = {name.removeprefix(key): tensor for name, tensor in tensors.items() if name.startswith(key)}
            made[key].load_state_dict(state, assign=True)  # with the dtypes of the file
        setattr(found[known["site"]], known["attribute"], made[key])


def _fill(model: nn.Module, description: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Put all other tensors in their places, in place."""
    entries = description["tensors"]
    present = _own_tensors(model)
    missing = [name for name, (kind, _) in present.items() if kind != "transient" and name not in entries]
    if missing:
        raise ValueError(f"the model has {missing[0]}, which the file lacks")
    owners = {id(site.weight): site for site in quantized_layers(model).values()}
    made: dict[str, Tensor] = {}
    for name, entry in entries.items():
        old = present.get(name, ("", None))[1]
        if old is not None and entry["kind"] != "transient" and list(old.shape) != entry["shape"]:
            raise ValueError(f"{name} has shape {tuple(old.shape)}, in the file {tuple(entry['shape'])}")
        key = entry["key"]
        if key not in made:
            tensor = tensors[key]
            if entry["stored"] == "packed":
                tensor = unpack_codes(tensor, entry["bits"], entry["shape"]) + entry["first"]
            if entry["stored"] in ("packed", "codes"):
                tensor = _from_codes(owners[id(old)].weight_quantizer, tensor, getattr(torch, entry["dtype"]))
            if entry["kind"] == "parameter":
                tensor = nn.Parameter(tensor, requires_grad=tensor.is_floating_point() and _trains(old))
            made[key] = tensor
        _place(model, name, entry["kind"], made[key])
    empty = next((name for name, (_, tensor) in _own_tensors(model).items() if tensor.is_meta), None)
    if empty is not None:
        raise ValueError(f"the file lacks {empty}, which the model has on the meta device")


def _trains(old: Tensor | None) -> bool:
    return True if old is None else old.requires_grad


def _place(model: nn.Module, name: str, kind: str, tensor: Tensor) -> None:
    parent, _, leaf = name.rpartition(".")
    module = model.get_submodule(parent)
    slots = module._parameters if kind == "parameter" else module._buffers
    if leaf not in slots:  # None (a bias that the method added) is a place
        raise ValueError(f"the file has {name}, which the model lacks")
    slots[leaf] = tensor


# --- size ------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def quantized_size(model: nn.Module, float_model: nn.Module) -> dict[str, float]:
    """How many bytes a quantized model takes with every code packed into its n bits.

    The file of :func:`save_quantized` is larger by its headers, and by what its description says.

    Args:
        model: from :func:`s2d.ptq.quantize`.
        float_model: what it was made of.

    Returns:
        Bytes of ``codes``, ``grids`` (scales and zero points, of activations too, and rotations), ``floats`` (the
        rest), ``quantized`` (their sum) and ``float_model``; ``ratio`` of the last two.

    Example:
        >>> from s2d.ptq import quantize
        >>> model = nn.Linear(64, 64, bias=False)
        >>> quantized_size(quantize(model, w_bits=4, a_bits=32, calibration=torch.randn(8, 64)), model)["codes"]
        2048.0

    Paper: none.
    """
    layers = [site for site in quantized_layers(model).values() if _codes(site) is not None]
    bits = {id(site.weight): site.weight_quantizer.n_bits for site in layers}
    own = {id(tensor): tensor for kind, tensor in _own_tensors(model).values() if kind != "transient"}
    size = {"codes": 0.0, "grids": 0.0, "floats": 0.0}
    for key, tensor in own.items():
        size["codes" if key in bits else "floats"] += tensor.numel() * bits[key] / 8 if key in bits else tensor.nbytes
    modules = {id(module): module for _, _, module in attached(model)}
    size["grids"] = float(sum(tensor.nbytes for module in modules.values() for tensor in module.state_dict().values()))
    total = sum(size.values())
    kept = {id(t): t for kind, t in _own_tensors(float_model).values() if kind != "transient"}
    before = float(sum(tensor.nbytes for tensor in kept.values()))
    return size | {"quantized": total, "float_model": before, "ratio": before / total}
